"""The single-shot model (Ter-Sarkisov): its sizes, its losses by hand, who learns when, and the contract."""

from dataclasses import replace
from itertools import pairwise
from math import log

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.progress import Progress

from tests import test_models
from tests.test_baselines import card
from tests.test_dcn import blank, leave_a_tip
from tests.test_models import loaded, phantom
from tests.test_training import write_volume
from triage import models
from triage.config import Analysis
from triage.domain import Volume
from triage.errors import ConfigError, Retryable
from triage.models import boxes as box
from triage.models import packages, weights
from triage.models import ssm as system
from triage.models import ssm_networks as networks
from triage.models.preprocessing import prepare
from triage.models.ssm_networks import MASK, RANKS, SsmNet, balanced, ranked
from triage.training import evaluation, making, ssm
from triage.training import recipe as recipes
from triage.training.cases import Case, Diagnosis
from triage.training.datasets import DATASETS
from triage.training.paper import SSM_ORDER
from triage.training.run import Run
from triage.training.scans import scan
from triage.training.scoring import evaluate
from triage.training.tasks import Draw
from triage.training.trainer import Schedule, Trainer
from triage.training.variants import MEASURED

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = {"encoder": "resnet18", "blocks": 2, "branches": 2, "classes": 2, "width": 1 / 16, "zoom": 1}
TABLE_1 = {
    ("resnet18", 2, 1): (4.51, 1.90),
    ("resnet18", 3, 1): (6.64, 4.03),
    ("resnet34", 2, 1): (5.17, 2.56),
    ("resnet34", 3, 1): (12.04, 9.42),
    ("resnet18", 2, 2): (6.13, 1.90),
    ("resnet18", 3, 2): (8.27, 4.03),
    ("resnet34", 2, 2): (6.80, 2.56),
    ("resnet34", 3, 2): (13.66, 9.42),
}
"""(encoder, blocks, branches) → millions of weights, and of those that learn from classes; the paper repeats
the latter of two blocks in the rows of three."""


def count(*parts):
    return sum(weight.numel() for part in parts for weight in part.parameters())


class TestNetwork:
    @pytest.mark.parametrize("key", TABLE_1)
    def test_sizes_are_those_of_table_1(self, key):
        network = SsmNet(*key)
        total, trainable = TABLE_1[key]
        assert count(network) == pytest.approx(total * 1e6, rel=0.02)
        assert count(*network.learning(classes=True)) == pytest.approx(trainable * 1e6, rel=0.02)
        rest = count(*network.learning(classes=False), network.s)
        copied = count(network.classification) if key[2] == 2 else 0
        assert rest + copied == count(network)

    @pytest.mark.parametrize(("blocks", "branches", "classes", "zoom"), [(2, 2, 2, 1), (3, 1, 3, 2)])
    def test_shapes(self, blocks, branches, classes, zoom):
        network = SsmNet("resnet34", blocks, branches, classes, 1 / 16, zoom).eval()
        with torch.no_grad():
            seen = network(torch.rand(2, 1, 40, 56))
        many = networks.DETECTIONS
        assert seen.classes.shape == (2, classes)
        assert seen.scores.shape == (2, many)
        assert seen.boxes.shape == (2, many, 4)
        assert seen.masks.shape == (2, many, 28, 28)
        assert (seen.scores.diff(dim=1) <= 0).all()
        assert seen.boxes.min() >= 0
        assert (seen.boxes[..., 2:].amax((0, 1)) <= torch.tensor([40, 56])).all()
        features, _ = network.features(torch.rand(1, 1, 64, 64))
        cells = 64 * zoom // network.cell
        assert features.shape[2:] == (cells, cells)
        assert network.anchors(features).shape == (cells * cells * 30, 4)

    @pytest.mark.parametrize(
        ("what", "match"),
        [
            ({"encoder": "resnet50"}, "encoder 'resnet50': there are resnet18, resnet34"),
            ({"blocks": 4}, "blocks 4: there are 2, 3"),
            ({"branches": 3}, "branches"),
            ({"classes": 1}, "classes"),
            ({"zoom": 0}, "zoom 0: there are 1, 2, 3, 4"),
        ],
    )
    def test_what_is_not_there_is_told(self, what, match):
        with pytest.raises(ConfigError, match=match):
            SsmNet(**what)

    def test_what_ships_is_small(self, tmp_path):
        for name, network in (("narrow", recipes.load("ssm").network), ("full", {"blocks": 2})):
            weights.save(SsmNet(**network), {}, tmp_path / name)
            assert (tmp_path / name).stat().st_size <= 15e6

    @given(st.integers(1, 300))
    def test_a_batch_of_fixed_size_keeps_the_order_of_ranks(self, kept):
        chosen = balanced(kept).tolist()
        assert len(chosen) == RANKS
        assert chosen == sorted(chosen)
        times = np.bincount(chosen, minlength=kept)
        if kept < RANKS:
            assert times.max() - times.min() <= 1
        else:
            assert chosen[:64] == list(range(64))
            assert chosen[64:] == list(range(kept - 64, kept))

    def test_the_batch_is_ranked_and_without_overlaps(self):
        """Four boxes, the second best on the best one: three rows, each repeated, by descending score."""
        boxes = torch.tensor([[0, 0, 8, 8], [20, 20, 30, 30], [0, 0, 8, 9], [40, 0, 50, 9.0]])
        logits = torch.stack([torch.zeros(4), torch.tensor([1.0, 3.0, 2.0, -1.0])], dim=1)
        codes = torch.arange(16.0).reshape(4, 4)
        rows = ranked(logits, codes, boxes)
        assert rows.shape == (RANKS, 5)
        assert rows[:, 4].unique().tolist() == pytest.approx([1 / (1 + np.exp(-x)) for x in (-1, 2, 3)])
        assert (rows[:, 4].diff() <= 0).all()
        assert rows[[0, 64, 127], :4].tolist() == codes[[1, 2, 3]].tolist()
        order = torch.tensor([2, 0, 3, 1])
        assert torch.equal(ranked(logits[order], codes[order], boxes[order]), rows)


def made_up(folder, **changes):
    """A package of random weights that finds lesions nearly everywhere and draws about half of each box."""
    torch.manual_seed(4)
    size = {**TINY, **changes}
    network = SsmNet(**size).eval().requires_grad_(False)
    network.segmentation.classes.bias.copy_(torch.tensor([-2.0, 2.0]))
    network.segmentation.codes.bias[6:] = 5.0  # boxes of e times the side
    slices = prepare(phantom())[:2, :96, :176]
    logits = network((slices * (slices < 0.5))[:, None]).masks.logit()
    last = network.masks.layers[-1]
    last.weight.mul_(4 / logits.std())
    last.bias.sub_(logits.median()).mul_(4 / logits.std())
    path = folder / "ssm.safetensors"
    weights.save(network, {"network": "ssm", **{key: str(value) for key, value in size.items()}}, path)
    return packages.write(folder / "model", card("ssm"), {"ssm": path})


@pytest.fixture(scope="session")
def package(tmp_path_factory):
    return made_up(tmp_path_factory.mktemp("ssm"))


@pytest.fixture
def place(package):
    return str(package.folder)


@pytest.fixture
def model(place):
    return loaded(place)


def spread_out(detected, shape):
    """The masks of lesions (z, y, x) together."""
    mask = np.zeros(shape, bool)
    for one in detected:
        top, left, bottom, right = one.box
        mask[one.slice_index, top:bottom, left:right] |= one.mask
    return mask


class TestSsm(test_models.TestContract):
    """The system keeps the contract of every network."""

    def test_lesions_are_no_empty_case(self, model):
        findings = model.predict(phantom())
        assert 0.01 < findings.lesion_mask.sum() / findings.lung_mask.sum() < 0.99
        assert len(findings.detected) > 10

    def test_lesions_one_by_one_make_the_lesion_mask(self, model):
        for shape, spacing in (((10, 220, 260), (8.0, 1.4, 1.4)), ((4, 90, 110), (10.0, 3.3, 3.3))):
            findings = model.predict(phantom(shape, spacing))
            for one in findings.detected:
                top, left, bottom, right = one.box
                assert one.mask.shape == (bottom - top, right - left)
                assert one.mask.any()
                assert model.lesion_threshold < one.score <= 1
            together = spread_out(findings.detected, shape)
            assert not (together & ~findings.lesion_mask).any()
            assert together.sum() > 0.8 * findings.lesion_mask.sum()

    @pytest.mark.parametrize("orientation", [(1, 0, 0, 0, -1, 0), (0, 1, 0, -1, 0, 0), (-1, 0, 0, 0, 1, 0)])
    def test_lesions_and_scores_lie_where_the_slices_are_stored(self, model, orientation):
        volume = phantom((6, 130, 150), (8.0, 2.3, 2.3))
        turned = Volume(volume.array, volume.spacing, tuple(map(float, orientation)))
        findings = model.predict(turned)
        together = spread_out(findings.detected, turned.array.shape)
        assert together.any()
        assert not (together & ~findings.lesion_mask).any()
        assert together.sum() > 0.8 * findings.lesion_mask.sum()
        assert [one.slice_index for one in findings.detected] == sorted(
            d.slice_index for d in findings.detected
        )

    def test_it_judges_slices_with_more_than_a_tip_of_lung(self, model):
        volume = phantom((12, 220, 260))
        volume.array[:3] = 40  # no lung there
        leave_a_tip(volume.array[3])
        findings = model.predict(volume)
        lung = findings.lung_mask.sum(axis=(1, 2))
        assert not lung[:3].any()
        assert 0 < lung[3] < 0.05 * lung.max()
        assert (findings.slice_scores > 0).tolist() == [False] * 4 + [True] * 8
        assert findings.slice_scores.dtype == np.float32
        assert findings.probability == pytest.approx(system.pooled(findings.slice_scores[4:]))

    def test_a_lesion_is_drawn_where_its_mask_is_at_least_one_half(self):
        seen = networks.Seen(
            torch.zeros(1, 2),
            torch.tensor([[0.8, 0.9]]),
            torch.tensor([[[2.0, 2, 4, 6], [0, 0, 8, 8]]]),
            torch.stack([torch.full((MASK, MASK), 0.6), torch.full((MASK, MASK), 0.45)])[None],
        )
        lesions = system.lesion_probability(system.Looked(torch.tensor([1]), seen), (2, 8, 8))
        assert lesions[1, 2:4, 2:6].tolist() == [[pytest.approx(0.48)] * 4] * 2
        assert lesions.count_nonzero() == 8, "a box that is unsure of all its pixels draws none"

    def test_a_study_is_the_mean_of_the_upper_half_of_its_slices(self):
        assert system.pooled(np.array([0.1, 0.9, 0.5, 0.2, 0.7], np.float32)) == pytest.approx(2.1 / 3)
        assert system.pooled(np.array([0.4], np.float32)) == pytest.approx(0.4)

    @given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=30), st.integers(0, 29), st.floats(0, 1))
    def test_no_slice_that_looks_iller_lowers_it(self, scores, which, more):
        raised = np.array(scores, np.float32)
        raised[which % len(scores)] = max(raised[which % len(scores)], more)
        before, after = (system.pooled(np.asarray(s, np.float32)) for s in (scores, raised))
        assert 0 <= before <= after <= 1

    @pytest.mark.parametrize("part", ["rpn.objects", "rpn.codes", "segmentation.classes", "s.layers.5"])
    def test_what_is_no_number_anywhere_is_no_answer(self, place, part):
        broken = models.load(Analysis(model=place, device="cpu", threads=1))
        broken.network.get_submodule(part).bias.data.fill_(float("nan"))
        with pytest.raises(Retryable, match="no numbers"):
            broken.predict(phantom((3, 120, 140), (8.0, 2.6, 2.6)))

    def test_of_three_classes_the_last_is_covid(self, tmp_path):
        package = made_up(tmp_path, classes=3, branches=1)
        three = models.load(Analysis(model=str(package.folder), threads=1))
        three.network.s.layers[-1].bias.data.copy_(torch.tensor([9.0, 9.0, -9.0]))
        assert three.predict(phantom((3, 120, 140), (8.0, 2.6, 2.6))).probability < 0.01
        picture = replace(phantom(), array=phantom().array[5:6])
        labelled = Case(name="a", patient="a", volume=picture, cropped=True, diagnosis=Diagnosis.OTHER)
        three.network.s.layers[-1].bias.data.copy_(torch.tensor([-9.0, 9.0, -9.0]))
        (score,) = evaluate(three, [labelled])
        assert score.own == {"class": 1.0}


@pytest.fixture
def few():
    """Volumes with lesions, and pictures of either class."""
    picture = replace(blank("x", [], 1, lesions=()), data="pictures", cropped=True)
    told = [(Diagnosis.COVID, 3), (Diagnosis.OTHER, 2)]
    return [
        blank("a", [0, 1], data="volumes"),
        blank("b", [2], data="volumes"),
        *(replace(picture, patient=f"{d}{n}", diagnosis=d) for d, times in told for n in range(times)),
    ]


def task(scans, **options):
    torch.manual_seed(0)
    return ssm.SsmTask(scans, **{**TINY, "canvas": (48, 64), "batch": 3, **options})


def trained(made, folder, steps, rate=3e-3):
    return Trainer(
        made, Schedule(steps=steps, learning_rate=rate, warm_up=1, every=1000), folder, torch.device("cpu")
    )


class TestLosses:
    ANCHORS = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 5], [40, 40, 50, 50], [0, 8, 10, 18.0]])
    TRUTH = torch.tensor([[0, 0, 10, 10], [60, 60, 90, 90.0], [38, 40, 50, 52]])

    def test_boxes_are_matched_by_overlap_and_no_lesion_is_left_alone(self):
        """IoU with the first lesion: 1, 0.5, 0, 1/9; with the third: 0.69; the second has no anchor."""
        found = ssm.matched(self.ANCHORS, self.TRUTH, (0.3, 0.7))
        assert found.tolist() == [0, ssm.NEITHER, ssm.NEITHER, ssm.BACKGROUND]
        found = ssm.matched(self.ANCHORS, self.TRUTH[[0, 2]], (0.3, 0.7), best_too=True)
        assert found.tolist() == [0, ssm.NEITHER, 1, ssm.BACKGROUND]
        found = ssm.matched(self.ANCHORS, self.TRUTH, (0.3, 0.7), best_too=True)
        assert found.tolist() == [0, ssm.NEITHER, 2, ssm.BACKGROUND], "nothing is a lesion it does not touch"
        assert ssm.matched(self.ANCHORS, self.TRUTH[:0], (0.3, 0.7)).tolist() == [ssm.BACKGROUND] * 4

    def test_few_positives_are_filled_with_background(self):
        found = torch.tensor([0, 1, 2, ssm.NEITHER, *[ssm.BACKGROUND] * 6])
        lesions, others = ssm.chosen(found, (8, 0.25))
        assert len(lesions) == 2
        assert set(others.tolist()) == set(range(4, 10))
        lesions, others = ssm.chosen(found[:4], (8, 0.5))
        assert sorted(lesions.tolist()) == [0, 1, 2]
        assert not len(others)

    def test_the_rpn_by_hand(self):
        """A lesion that an anchor is, one that is background with a chance of 3/4, and a code off by 1.5."""
        anchors, truth = self.ANCHORS[[0, 3]], self.TRUTH[:1]
        codes = torch.tensor([[0.5, 0, -1.0, 0], [9, 9, 9, 9]])
        loss = ssm.rpn_loss(torch.tensor([0.0, log(3)]), codes, anchors, truth)
        assert loss.item() == pytest.approx((log(2) + log(4)) / 2 + 1.5 / 2)

    def test_a_branch_by_hand(self):
        boxes = self.ANCHORS[[0, 3]]
        logits, codes = (
            torch.tensor([[0.0, log(3)], [0.0, 0.0]]),
            torch.tensor([[2.0, 0, 0, 0], [9, 9, 9, 9]]),
        )
        loss = ssm.roi_loss(logits, codes, boxes, torch.tensor([0, ssm.BACKGROUND]), self.TRUTH[:1])
        assert loss.item() == pytest.approx((log(4 / 3) + log(2)) / 2 + (2 - 1 / 18) / 2)

    def test_a_mask_is_compared_with_its_own_lesion_in_the_box(self):
        masks = torch.zeros(2, 20, 20)
        masks[1, :, 10:] = 1
        boxes, which = torch.tensor([[0, 0, 20, 20.0]]), torch.tensor([1])
        right = torch.where(torch.arange(28) >= 14, 20.0, -20.0).expand(1, 28, 28)
        assert ssm.mask_loss(right, boxes, masks, which).item() < 0.5
        assert ssm.mask_loss(-right, boxes, masks, which).item() > 15
        assert ssm.mask_loss(right, boxes, masks, torch.tensor([0])).item() == pytest.approx(10, rel=0.05)
        assert ssm.mask_loss(right[:0], boxes[:0], masks, which[:0]) == 0

    def test_instances_are_the_large_parts_of_what_is_drawn(self):
        lesion = torch.zeros(40, 40)
        lesion[2:6, 3:6] = lesion[20:30, 10:25] = lesion[35, 35:38] = 1
        found = ssm.instances(lesion)
        assert ssm.LEAST_PIXELS == 12
        assert found.boxes.tolist() == [[2, 3, 6, 6], [20, 10, 30, 25]]
        assert found.masks.sum((1, 2)).tolist() == [12, 150]
        assert ssm.instances(torch.zeros(40, 40)).boxes.shape == (0, 4)

    def test_classes_by_hand(self, few, monkeypatch):
        """Equation 2: a slice of each of two classes; the first is called likely (3/4), the second not."""
        made = task(few, batch=2)
        monkeypatch.setattr(made.network, "classify", lambda s: torch.tensor([[log(3), -log(3)]] * len(s)))
        right, wrong = 2 * log(4 / 3), 2 * log(4)  # both logits
        assert made._classes(Draw(1, 0)).item() == pytest.approx((right + wrong) / 4)

    def test_lesions_are_enlarged_with_the_slices_and_their_masks_are_not(self, few, monkeypatch):
        lesion, seen = torch.zeros(48, 64), []
        lesion[8:28, 10:40] = 1
        made = task(few, zoom=2)
        monkeypatch.setattr(ssm, "rpn_loss", lambda *args: seen.append(args[3].tolist()) or torch.zeros(()))
        monkeypatch.setattr(ssm, "mask_loss", lambda *args: seen.append(args[1].tolist()) or args[0].sum())
        made._of_lesions(torch.rand(1, 1, 48, 64), [ssm.instances(lesion)])
        truth, with_masks = seen
        assert truth == [[16, 20, 56, 80]]
        assert [8, 10, 28, 40] in with_masks

    def test_a_slice_without_lesions_left_has_a_loss_too(self, few):
        made = task(few)
        nothing = [ssm.instances(torch.zeros(48, 64))] * 2
        assert made._of_lesions(torch.rand(2, 1, 48, 64), nothing).isfinite()


class TestSharing:
    def test_weights_are_copied_where_the_mean_of_the_last_losses_was_never_lower(self, monkeypatch):
        monkeypatch.setattr(networks, "WINDOW", 3)
        copied, source = (kind(4, 3) for kind in (networks.CopiedBranch, networks.RoiBranch))
        losses = [4.0, 6.0, 2.0, 1.0, 9.0, 0.5, 0.5, 0.0]
        # Means: 4, 5, 4, 3, 4, 3.5, 10/3, 1/3
        did = []
        for loss in losses:
            source.classes.bias.data.fill_(loss)
            did.append(copied.follow(source, torch.tensor(loss)))
            assert torch.equal(copied.classes.bias, source.classes.bias) == did[-1]
        assert did == [True, False, False, True, False, False, False, True]
        assert all(torch.equal(a, b) for a, b in zip(copied.parameters(), source.parameters(), strict=True))

    @staticmethod
    def changed(made, before):
        after = made.network.state_dict()
        return {
            name.partition(".")[0]
            for name, value in before.items()
            if not name.endswith(MEASURED) and not torch.equal(value, after[name])
        }

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({}, ["backbone rpn segmentation masks classification", "backbone s"]),
            ({"branches": 1}, ["backbone rpn segmentation masks", "backbone s"]),
            (
                {"pretrain": 2},
                [
                    "backbone rpn segmentation masks",
                    "backbone rpn segmentation masks",
                    "backbone rpn segmentation masks classification",
                    "backbone s",
                    "backbone rpn segmentation masks",
                    "backbone s",
                ],
            ),
        ],
    )
    def test_who_learns_from_what(self, few, tmp_path, options, expected):
        """Lesions teach all but S and the copied branch, classes S and the backbone, in turn."""
        made = task(few, **options)
        training = trained(made, tmp_path, len(expected))
        for parts in expected:
            before = {name: value.clone() for name, value in made.network.state_dict().items()}
            training.take_step()
            assert self.changed(made, before) == set(parts.split())

    def test_a_resumed_run_is_the_same_run(self, few, tmp_path):
        whole = trained(task(few), tmp_path / "whole", 4)
        whole.train([])
        first = trained(task(few), tmp_path / "halves", 4)
        first.output.mkdir()
        for _ in range(3):
            first.take_step()
        first.save()
        second = trained(task(few), tmp_path / "halves", 4)
        second.resume()
        second.train([])
        state = second.task.network.state_dict()
        assert state["classification.seen"] == 2
        for name, value in whole.task.network.state_dict().items():
            assert torch.equal(state[name], value), name


class TestClasses:
    def test_only_data_that_has_all_classes_teaches_them(self, few):
        every = list(ssm.samples([*few, blank("c", range(6), data="ill")]))
        kinds = ssm.by_class(every, 2)
        assert set(kinds) == {"volumes", "pictures"}
        assert [len(part) for part in kinds["pictures"]] == [2, 3]
        assert [len(part) for part in kinds["volumes"]] == [9, 3]
        with pytest.raises(ConfigError, match=r"3 classes.*volumes 9/0/3, pictures 0/2/3.*covidxct"):
            ssm.by_class(list(ssm.samples(few)), 3)

    def test_nothing_to_learn_is_told(self, few):
        with pytest.raises(ConfigError, match="not measurable here: ssm learns from lesions drawn"):
            task([s for s in few if not s.lesions])

    def test_every_class_is_drawn_as_often(self, few, monkeypatch):
        healthy = replace(few[-1], patient="h", diagnosis=Diagnosis.HEALTHY)
        made = task([*few, healthy], classes=3, batch=2)
        drawn = []
        monkeypatch.setattr(made, "_slice", lambda s, _: drawn.append(s) or (torch.rand(1, 1, 48, 64), None))
        for step in range(60):
            made._classes(Draw(1, step))
        times = np.bincount([ssm.class_of(s, 3) for s in drawn])
        assert times.sum() == 120
        assert times.min() > 25

    def test_three_classes_are_learned(self, tmp_path):
        """Pictures that differ in how much of them is hazy: control, common pneumonia, COVID-19."""
        hazy = [blank(f"v{n}", [0, 1], 3, data="volumes") for n in range(2)]
        pictures = []
        for n, (diagnosis, haze) in enumerate(zip(SSM_ORDER, (0, 12, 40), strict=True)):
            grey = torch.full((1, 40, 48), 0.1)
            grey[:, :, :haze] = 0.6
            lung = torch.ones(1, 40, 48)
            one = replace(hazy[0], slices=grey, lung=lung, lesions=(), diagnosis=diagnosis, cropped=True)
            pictures += [replace(one, patient=f"{n}{k}", data="pictures") for k in range(2)]
        made = task([*hazy, *pictures], classes=3, batch=6)
        training = trained(made, tmp_path, 60, rate=1e-2)
        losses = [training.take_step() for _ in range(60)][1::2]
        assert all(np.isfinite(losses))
        assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])

    def test_lesions_are_learned(self, few, tmp_path):
        made = task(few)
        training = trained(made, tmp_path, 80)
        losses = [training.take_step() for _ in range(80)][::2]
        assert np.mean(losses[-8:]) < 0.7 * np.mean(losses[:8])
        score = made.score(training.kept, few[0])
        assert 0 <= score <= 1
        assert made.score(training.kept, few[-1]) is None


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Volumes with lesions drawn in some slices, and pictures of chests with a label."""
    root = tmp_path_factory.mktemp("data")
    for number, patient in enumerate(("p1", "p2", "p3", "p4")):
        write_volume(root, number, patient)
    for group, lesion in (("covid", True), ("non-covid", False)):
        (root / "sarscov2" / group).mkdir(parents=True)
        for number in range(2):
            grey = (
                np.clip(phantom((7, 150, 180), lesion=lesion).array[number + 2], -1400, 200) + 1400
            ) / 1600
            Image.fromarray((255 * grey).astype(np.uint8)).save(root / "sarscov2" / group / f"{number}.png")
    return {"medseg9": root, "sarscov2": root / "sarscov2"}


def small(folder):
    """The recipe that ships, made so small that it trains in a second."""
    for each in ("lungs", "ssm"):
        data = yaml.safe_load((recipes.RECIPES / f"{each}.yaml").read_text())
        data["schedule"] = {"steps": 2, "learning_rate": 0.01, "warm_up": 1, "average": 0.5}
        data["hold_out"], data["data"] = {}, ["medseg9", "sarscov2"]
        if each == "lungs":
            data["network"], data["options"] = {"widths": [4, 8]}, {"canvas": [48, 64], "batch": 6}
            data["schedule"]["steps"] = 40
        else:
            data["network"] |= {"width": 1 / 16, "zoom": 1}
            data["options"] = {"canvas": [48, 64], "batch": 2}
            data["lungs"] = str(folder / "lungs.yaml")
        (folder / f"{each}.yaml").write_text(yaml.safe_dump(data))
    return recipes.load(str(folder / "ssm.yaml"))


def test_it_becomes_a_model_that_can_be_measured(sources, tmp_path):
    recipe = small(tmp_path)
    asked = Run(
        recipe=recipe.variant("parallel_resnet18_3"),
        sources=sources,
        output=tmp_path / "out",
        test=("p4",),
        device="cpu",
        threads=1,
    )
    with Progress(disable=True) as bars:
        package = packages.read(making.make(asked, making.Watch(bars)))
    assert set(package.files) == {"lungs", "ssm"}
    model = models.load(Analysis(model=str(package.folder), device="cpu", threads=1))
    cases = [c for c in DATASETS["medseg9"].read(sources["medseg9"]) if c.patient == "p4"]
    (score,) = evaluation.evaluate(model, cases, "medseg9")
    assert score.lesions is not None
    assert any(one.drawn for one in score.instances)
    assert {s.drawn for s in score.slices} == {True, False}
    assert evaluation.from_json(evaluation.to_json([score])) == [score]
    assert 0 <= ssm.SsmTask([scan(c) for c in cases], **TINY).score(model.network, scan(cases[0])) <= 1


def test_what_encodes_a_box_is_what_module_s_is_given(few):
    """Rows are codes as the branch gives them: decoded they are its boxes."""
    network = task(few).network.eval()
    with torch.no_grad():
        features, proposals, size, certain = network.propose(torch.rand(1, 1, 48, 64))
        logits, codes = network.classification(network.aligned(features[0], proposals[0], networks.BINS))
        rows = network._ranked(network.aligned(features[0], proposals[0], networks.BINS), proposals[0], size)
    assert not certain.any()
    assert {tuple(row) for row in rows[:, :4].tolist()} <= {tuple(code) for code in codes.tolist()}
    boxes = box.cut(box.decode(codes, proposals[0], networks.SCALED), size)
    best = int(logits.softmax(1)[:, 1].argmax())
    assert rows[0, :4].tolist() == codes[best].tolist()
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    assert all(high >= low for high, low in pairwise(rows[:, 4].tolist()))
