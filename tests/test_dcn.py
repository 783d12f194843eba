"""The dual-branch system (Gao et al.): equations by hand, branches apart, maps where they belong."""

from dataclasses import replace
from datetime import UTC, datetime
from itertools import chain, pairwise
from math import log

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.progress import Progress
from torch import nn

from tests import test_models
from tests.test_baselines import card
from tests.test_models import AXIAL, loaded, phantom
from tests.test_training import write_volume
from triage import models, predict
from triage.config import Analysis, Config
from triage.dicom import attention
from triage.dicom import phantom as chest
from triage.domain import Volume
from triage.errors import ConfigError, Retryable
from triage.models import dcn as system
from triage.models import packages, weights
from triage.models.dcn_networks import (
    DualBranchNet,
    LesionAttention,
    Seen,
    StudyNet,
    UNet,
    normalised,
    probability_mapping,
)
from triage.models.preprocessing import prepare
from triage.training import attention as measured
from triage.training import dcn, evaluation, making
from triage.training import recipe as recipes
from triage.training.cases import Diagnosis
from triage.training.datasets import DATASETS
from triage.training.run import Run
from triage.training.scans import Scan, scan
from triage.training.tasks import Draw
from triage.training.trainer import Schedule, Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = 1 / 16
"""Of the paper's width."""
NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)


def made_up(folder, **switches):
    """A package of random weights that call about half of a phantom's lungs lesion."""
    torch.manual_seed(4)
    network = DualBranchNet(TINY, switches.get("attention", True)).eval().requires_grad_(False)
    slices = prepare(phantom())[:2, :96, :176]
    logits = network(system.masked(slices, slices < 0.5)[:, None]).lesions
    network.segmentation.head.bias -= logits[:, 0][slices < 0.5].median()
    study = StudyNet(TINY, switches.get("mapping", True))
    files = {}
    for role, made in (("dcn_slices", network), ("dcn_study", study)):
        files[role] = folder / f"{role}.safetensors"
        size = {"width": str(TINY), **{key: str(value) for key, value in switches.items()}}
        weights.save(made, {"network": role, **size}, files[role])
    return packages.write(folder / "model", card("dcn"), files)


@pytest.fixture(scope="session")
def package(tmp_path_factory):
    return made_up(tmp_path_factory.mktemp("dcn"))


@pytest.fixture
def place(package):
    return str(package.folder)


@pytest.fixture
def model(place):
    return loaded(place)


def leave_a_tip(pixels):
    """Of the lungs in a slice (h, w) of a phantom, only a little of one."""
    y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in pixels.shape), indexing="ij")
    tip = ((x - 0.42) / 0.33) ** 2 + (y / 0.55) ** 2 < 0.06
    pixels[(pixels < -300) & ((x / 0.9) ** 2 + (y / 0.75) ** 2 < 1) & ~tip] = 40


class TestDcn(test_models.TestContract):
    """The system keeps the contract of every network."""

    def test_lesions_are_no_empty_case(self, model):
        findings = model.predict(phantom())
        assert 0.01 < findings.lesion_mask.sum() / findings.lung_mask.sum() < 0.99

    def test_it_judges_slices_and_shows_where_it_looked(self, model):
        volume = phantom((12, 220, 260))
        volume.array[:3] = 40  # no lung there
        findings = model.predict(volume)
        lung = findings.lung_mask.any(axis=(1, 2))
        assert not lung[:3].any()
        assert findings.slice_scores.shape == (12,)
        assert findings.slice_scores.dtype == np.float32
        assert ((findings.slice_scores > 0) == lung).all()
        assert list(findings.attention) == [f"attention {n}" for n in (1, 2, 3, 4)]
        for maps in findings.attention.values():
            assert maps.dtype == np.uint8
            assert maps.shape == (12, 77, 91)  # 4 mm a pixel
            assert not maps[~lung].any()
            assert maps[lung].max() > 100

    def test_the_tips_of_the_lungs_are_not_judged(self, model):
        """Neither a slice with little lung nor what it shows changes the answer of the study."""
        volume = phantom()
        leave_a_tip(volume.array[0])
        findings = model.predict(volume)
        lung = findings.lung_mask.sum(axis=(1, 2))
        assert 0 < lung[0] < 0.05 * lung.max()
        assert findings.slice_scores[0] == 0
        assert (findings.slice_scores[1:] > 0).all()
        without = volume.array.copy()
        without[0] = 40
        expected = model.predict(replace(volume, array=without)).probability
        assert findings.probability == pytest.approx(expected, abs=1e-5)

    def test_maps_and_scores_go_with_the_slices_however_they_are_stored(self, model):
        upright = phantom()
        findings = model.predict(upright)
        stored = np.ascontiguousarray(upright.array[::-1, :, ::-1])
        turned = model.predict(Volume(stored, upright.spacing, (-1.0, 0.0, 0.0, 0.0, 1.0, 0.0)))
        assert np.array_equal(turned.slice_scores[::-1], findings.slice_scores)
        for name, maps in findings.attention.items():
            assert np.array_equal(turned.attention[name][::-1], maps)

    def test_it_sees_nothing_but_the_lungs_and_no_finer_than_8_bits(self):
        slices = (torch.tensor([[[-950.0, -900, -500, 100, 250, -500]]]) + 1000) / 1300
        lung = torch.tensor([[[True, True, True, True, True, False]]])
        seen = system.masked(slices, lung)
        assert seen.flatten().tolist() == pytest.approx([0, 0, 102 / 255, 1, 1, 0])

    def test_a_study_network_that_gives_no_number_gives_no_answer(self, place):
        broken = models.load(Analysis(model=place, device="cpu", threads=1))
        broken.study.layers[-1].bias.data.fill_(float("nan"))
        with pytest.raises(Retryable, match="no numbers"):
            broken.predict(phantom())

    def test_without_attention_there_are_no_maps_and_without_mapping_still_an_answer(self, tmp_path):
        package = made_up(tmp_path, attention=False, mapping=False)
        findings = models.load(Analysis(model=str(package.folder), threads=1)).predict(phantom())
        assert not findings.attention
        assert findings.slice_scores.any()
        assert 0 < findings.probability < 1


class TestEquations:
    def test_lesion_attention(self):
        """Three pixels, two channels of the classification, one of the segmentation."""
        unit = LesionAttention(2, 1).eval().requires_grad_(False)

        def give(layer, weight, bias):
            layer.weight.copy_(torch.tensor(weight)[..., None, None])
            layer.bias.copy_(torch.tensor(bias))

        give(unit.of_classes, [[1.0, -1.0]], [0.5])
        give(unit.of_lesions, [[2.0]], [-1.0])
        give(unit.weigh, [[1.0, 2.0]], [-1.0])
        give(unit.blend[0], [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]], [0.0, 1.0])
        unit.blend[1].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, -1.0]])[..., None, None])
        x_c = torch.tensor([[[1.0, 0.0, 1.0]], [[0.0, 2.0, 1.0]]])[None]
        x_s = torch.tensor([[[0.5, 3.0, 0.0]]])[None]
        x_out, alpha = unit(x_c, x_s)
        # (1), f1: (1.5, 0), (0, 5), (0.5, 0); (2): sigmoids of 0.5, 9 and -0.5
        low, middle, high = (1 / (1 + np.exp(-v)) for v in (-0.5, 0.5, 9.0))
        first = (middle - low) / (high - low)
        assert alpha.flatten().tolist() == pytest.approx([first, 1, 0])
        # (3): the joined channels are (first, 0, 0.5), (0, 2, 3), (0, 0, 0); the last channel turns negative
        expected = [first + 0.5, 3, 0, 0, 0, 0]
        assert x_out.flatten().tolist() == pytest.approx(expected, rel=1e-4)

    def test_features_of_another_size_are_resized(self):
        unit = LesionAttention(4, 3).eval()
        x_out, alpha = unit(torch.rand(2, 4, 8, 6), torch.rand(2, 3, 4, 3))
        assert x_out.shape == (2, 4, 8, 6)
        assert alpha.shape == (2, 1, 8, 6)

    def test_each_map_runs_from_0_to_1(self):
        maps = torch.rand(3, 1, 4, 5) * torch.tensor([1e-2, 0.5, 0.0])[:, None, None, None] + 0.2
        stretched = normalised(maps).flatten(1)
        assert stretched.amin(1).tolist() == [0, 0, 0]
        assert stretched.amax(1).tolist() == pytest.approx([1, 1, 0])

    def test_weighted_dice(self):
        """Of the first slice 1 - (2·0.8 + 1) / (1 + 1 + 1); the second, nothing drawn, weighs nothing."""
        logits = torch.tensor([[log(4), -log(4)], [3.0, -3.0]])[:, None, None]
        truth = torch.tensor([[1.0, 0.0], [0.0, 0.0]])[:, None, None]
        assert dcn.weighted_dice(logits, truth).item() == pytest.approx((1 - 2.6 / 3) / 2)

    def test_the_loss_is_dice_and_cross_entropy(self, few):
        """A network that says 1/2 of every pixel and 3/4 of every slice."""
        task = dcn.DcnSlicesTask(few, TINY, canvas=(48, 64), batch=8)
        (epochs, _), task.parts = task.parts[0], task.parts[:1]

        class Undecided(nn.Module):
            def __init__(self):
                super().__init__()
                self.unused = nn.Parameter(torch.zeros(1))

            def forward(self, slices):
                ones = torch.ones(len(slices))
                return Seen(torch.zeros_like(slices), log(3) * ones, [], ones[:, None])

        task.network = Undecided()
        batch = epochs.batch(1, 0, 8)
        torch.manual_seed(5)
        truth = torch.cat([task._slice(s, rng)[1] for rng in [Draw(1, 0)] for s in batch])
        area = truth.flatten(1).sum(1)
        overlap = (1 - (area + 1) / (48 * 64 / 2 + area + 1)) * (truth > 0.5).flatten(1).any(1)
        entropy = [-log(0.75) if s.label else -log(0.25) for s in batch]
        assert 0 < sum(s.label for s in batch) < 8
        torch.manual_seed(5)
        expected = float(overlap.mean()) + np.mean(entropy)
        assert task.loss(Draw(1, 0)).item() == pytest.approx(expected, rel=1e-5)

    @pytest.mark.parametrize(
        ("p", "curve"),
        [
            ([0.2, 1.0], np.linspace(1.0, 0.2, 100)),
            ([0.7], np.full(100, 0.7)),
            ([0.1, 0.9, 0.5], np.interp(np.linspace(0, 2, 100), [0, 1, 2], [0.9, 0.5, 0.1])),
            (np.linspace(0, 1, 397), np.linspace(1, 0, 100)),
        ],
    )
    def test_probability_mapping(self, p, curve):
        mapped = probability_mapping(torch.tensor(np.asarray(p), dtype=torch.float32))
        assert mapped.shape == (100,)
        assert mapped.tolist() == pytest.approx(curve, abs=1e-6)

    def test_a_study_is_judged_by_its_curve_or_else_by_the_maxima_of_its_features(self):
        p, features = torch.rand(30), torch.rand(30, 128)
        order = torch.randperm(30)
        for mapping in (True, False):
            study = StudyNet(TINY, mapping)
            logit = study(p, features)
            assert logit.shape == ()
            assert study(p[order], features[order]).item() == pytest.approx(logit.item(), abs=1e-5)
        assert study(p, features).item() == study(0 * p, features.amax(0)[None]).item()
        assert [tuple(w.shape) for w in StudyNet().parameters() if w.dim() == 2] == [
            (256, 100),
            (128, 256),
            (1, 128),
        ]

    @given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=40), st.integers(0, 99))
    @settings(max_examples=50)
    def test_a_study_never_falls_where_its_slices_rise(self, pairs, seed):
        torch.manual_seed(seed)
        study = StudyNet(TINY)
        low, high = torch.tensor([sorted(pair) for pair in pairs]).T
        features = torch.rand(len(pairs), 128)
        assert study(high, features) >= study(low, features) - 1e-5

    def test_a_study_is_never_like_one_with_less(self):
        """However far its units are below 0."""
        study, features = StudyNet(TINY), torch.rand(30, 128)
        for layer in study.layers:
            if isinstance(layer, nn.Linear):
                nn.init.constant_(layer.bias, -1.0)
        logits = [study(torch.full((30,), p), features).item() for p in (0.0, 0.05, 0.1, 0.9, 1.0)]
        assert all(a < b for a, b in pairwise(logits))


class TestNetwork:
    @pytest.mark.parametrize(("attention", "scales"), [(True, [4, 4, 8, 16]), (False, [])])
    def test_shapes(self, attention, scales):
        seen = DualBranchNet(TINY, attention)(torch.rand(2, 1, 48, 80))
        assert seen.lesions.shape == (2, 1, 48, 80)
        assert seen.logits.shape == (2,)
        assert [m.shape for m in seen.attention] == [(2, 1, 48 // s, 80 // s) for s in scales]
        assert seen.features.shape == (2, 128)

    @pytest.mark.parametrize("attention", [True, False])
    def test_no_gradient_crosses_the_branches(self, attention):
        def reached(part):
            return [w.grad is not None and bool(w.grad.abs().sum() > 0) for w in part.parameters()]

        torch.manual_seed(0)
        network = DualBranchNet(TINY, attention)
        classes = nn.ModuleList([network.classification, network.joins, network.classifier])
        seen = network(torch.rand(2, 1, 48, 64))
        seen.lesions.square().sum().backward(retain_graph=True)
        assert not any(reached(classes))
        assert np.mean(reached(network.segmentation)) > 0.9
        network.zero_grad()
        seen.logits.square().sum().backward()
        assert not any(reached(network.segmentation))
        assert np.mean(reached(classes)) > 0.9

    def test_the_papers_size(self):
        """U-Net of 64 to 1024 channels: about 31.0 million; ResNet-50: 25,557,032 (He et al., 2016)."""
        network = DualBranchNet()
        unet, resnet = (
            sum(w.numel() for w in part.parameters())
            for part in (network.segmentation, network.classification)
        )
        assert unet == pytest.approx(31.0e6, rel=0.02)
        last_layer, two_of_three_inputs = 2048 * 1000 + 1000, 2 * 64 * 7 * 7
        assert resnet + last_layer + two_of_three_inputs == 25_557_032
        assert [block[0].out_channels for block in network.segmentation.down] == [64, 128, 256, 512, 1024]
        shapes = [(j.of_classes.in_channels, j.of_lesions.in_channels) for j in network.joins]
        assert shapes == [(64, 256), (256, 256), (512, 512), (1024, 1024)]
        assert [j.of_classes.out_channels for j in network.joins] == [32, 128, 256, 512]

    def test_a_block_is_convolution_normalisation_relu_convolution(self):
        kinds = [type(part).__name__ for part in UNet((4, 8)).up[0]]
        assert kinds == ["Conv2d", "BatchNorm2d", "ReLU", "Conv2d"]

    def test_the_variant_that_is_trained_is_small(self, tmp_path):
        for name in ("dcn_slices", "dcn"):
            recipe = recipes.load(name)
            size = {key: str(value) for key, value in recipe.network.items()}
            weights.save(weights.build({"network": recipe.task, **size}), {}, tmp_path / name)
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 15e6


def blank(patient, drawn, slices=6, **changes):
    """Lung everywhere; lesions drawn in these slices."""
    lesion = torch.zeros(slices, 40, 48)
    lesion[drawn, 5:30, 5:40] = 1
    every = torch.full_like(lesion, 0.1)
    made = Scan(patient, patient, every + 0.4 * lesion, torch.ones_like(lesion), (lesion,))
    return replace(made, **changes)


@pytest.fixture
def few():
    picture = blank("x", [], 1, lesions=())
    return [
        blank("a", [0, 1]),
        blank("b", [2]),
        *(replace(picture, diagnosis=Diagnosis.COVID, patient=f"c{n}", cropped=True) for n in range(3)),
        *(replace(picture, diagnosis=Diagnosis.OTHER, patient=f"d{n}", cropped=True) for n in range(2)),
    ]


class TestSamples:
    def test_a_slice_is_positive_where_lesions_are_drawn_or_by_its_own_label(self, few):
        told = [(s.scan.patient, s.index, s.label) for s in dcn.samples(few)]
        assert [t for t in told if t[0] == "a"] == [("a", z, int(z < 2)) for z in range(6)]
        assert [t[1:] for t in told if t[0] > "b"] == [(0, 1)] * 3 + [(0, 0)] * 2

    def test_of_an_ill_patient_without_drawings_no_slice_is_known_of_a_healthy_one_every(self):
        ill, healthy = (blank(d, [], lesions=(), diagnosis=d) for d in (Diagnosis.COVID, Diagnosis.HEALTHY))
        assert {(s.scan.patient, s.label) for s in dcn.samples([ill, healthy])} == {("healthy", 0)}

    def test_tips_of_lungs_teach_nothing(self):
        scan = blank("p", (1, 2))
        lung = torch.zeros_like(scan.slices)
        lung[1:5] = 1
        lung[1], lung[1, 0, 0] = 0, 1
        assert [s.index for s in dcn.samples([replace(scan, lung=lung)])] == [1, 2, 3]

    def test_slices_without_lung_are_left_out_and_the_others_keep_their_marks(self):
        whole = blank("a", [3])
        whole.lung[:2], whole.lung[5] = 0, 0
        whole.lung[:, :, 40:] = 0
        made = list(dcn.samples([whole]))
        assert [s.label for s in made] == [0, 1, 0]
        for s in made:
            assert bool((s.scan.lesions[0][s.index] > 0.5).any()) == bool(s.label)

    def test_lungs_of_pictures_are_found(self):
        volume = phantom((1, 220, 260))
        picture = Scan("x", "x", prepare(volume), None, diagnosis=Diagnosis.OTHER, cropped=True)
        (sample,) = dcn.samples([picture])
        share = float((sample.scan.lung > 0.5).float().mean())
        assert 0.2 < share < 0.8


class TestEpochs:
    @staticmethod
    def epochs(positives, negatives):
        return dcn.Epochs([dcn.Sample(None, n, int(n < positives)) for n in range(positives + negatives)])

    @pytest.mark.parametrize(("positives", "negatives"), [(5, 20), (7, 7), (9, 4)])
    def test_every_positive_once_and_as_many_negatives_drawn_afresh(self, positives, negatives):
        epochs = self.epochs(positives, negatives)
        orders = [[s.index for s in epochs.order(1, epoch)] for epoch in range(4)]
        for order in orders:
            assert sorted(n for n in order if n < positives) == list(range(positives))
            drawn = [n for n in order if n >= positives]
            assert len(drawn) == positives
            assert len(set(drawn)) == min(positives, negatives)
        assert len({tuple(order) for order in orders}) == 4
        if negatives > positives:
            assert len({frozenset(order) for order in orders}) > 1

    def test_steps_go_through_the_epochs_and_depend_on_nothing_else(self):
        epochs = self.epochs(5, 20)
        steps = [[s.index for s in epochs.batch(3, step, 4)] for step in range(5)]
        ordered = [s.index for epoch in (0, 1) for s in epochs.order(3, epoch)]
        assert list(chain.from_iterable(steps)) == ordered
        assert [s.index for s in self.epochs(5, 20).batch(3, 3, 4)] == steps[3]
        assert [s.index for s in epochs.batch(4, 0, 4)] != steps[0]

    def test_one_kind_only_teaches_nothing(self):
        with pytest.raises(ConfigError, match="not measurable here"):
            self.epochs(3, 0)


class TestTraining:
    @staticmethod
    def trainer(scans, folder):
        torch.manual_seed(0)
        task = dcn.DcnSlicesTask(scans, TINY, canvas=(48, 64), batch=3, pictures=2)
        schedule = Schedule(steps=4, learning_rate=0.01, warm_up=1, average=0.5, every=100)
        return Trainer(task, schedule, folder, torch.device("cpu"))

    def test_a_resumed_run_is_the_same_run(self, few, tmp_path):
        whole = self.trainer(few, tmp_path / "whole")
        whole.train([])
        first = self.trainer(few, tmp_path / "halves")
        first.output.mkdir()
        for _ in range(2):
            first.take_step()
        first.save()
        second = self.trainer(few, tmp_path / "halves")
        second.resume()
        second.train([])
        for name, value in whole.averaged.state_dict().items():
            assert torch.equal(second.averaged.state_dict()[name], value), name

    def test_the_study_network_learns_what_the_slices_say(self, few, tmp_path):
        """Slices judged as they are labelled: a study is positive where some of its slices are."""
        torch.manual_seed(0)
        task = dcn.DcnStudyTask(few, tmp_path / "unused", TINY, slices=(20, 40))
        sure = tuple((torch.full((9,), p), torch.zeros(9, 128)) for p in (0.1, 0.9))
        task.__dict__["_judged"] = sure
        schedule = Schedule(steps=60, learning_rate=3e-3, warm_up=1, average=0.5, every=100)
        Trainer(task, schedule, tmp_path, torch.device("cpu")).train([])
        for share, answer in ((0.0, False), (0.3, True), (1.0, True)):
            p = torch.full((50,), 0.1)
            p[: int(50 * share)] = 0.9
            assert bool(task.network(p, torch.zeros(50, 128)) > 0) == answer

    def test_it_learns_from_what_a_frozen_network_says(self, few, tmp_path):
        path = tmp_path / "dcn_slices.safetensors"
        weights.save(DualBranchNet(TINY), {"network": "dcn_slices", "width": str(TINY)}, path)
        task = dcn.DcnStudyTask(few, path, TINY, canvas=(48, 64))
        (negative, _), (positive, features) = task._judged
        assert (len(negative), len(positive)) == (11, 6)
        assert features.shape == (6, 128)
        assert task.loss(Draw(1, 0)).requires_grad
        assert task.score(task.network, few[0]) is None

    @pytest.mark.parametrize("variant", ["full", "base"])
    def test_it_becomes_a_model_that_can_be_measured(self, sources, tmp_path, variant):
        recipe = small(tmp_path, "dcn").variant(variant)
        asked = Run(
            recipe=recipe, sources=sources, output=tmp_path / "out", test=("p4",), device="cpu", threads=1
        )
        with Progress(disable=True) as bars:
            package = packages.read(making.make(asked, making.Watch(bars)))
        assert set(package.files) == {"lungs", "dcn_slices", "dcn_study"}
        assert [line.partition(":")[0] for line in package.card.training_data] == ["medseg9", "sarscov2"]
        model = models.load(Analysis(model=str(package.folder), device="cpu", threads=1))
        cases = [c for c in DATASETS["medseg9"].read(sources["medseg9"]) if c.patient == "p4"]
        (score,) = evaluation.evaluate(model, cases, "medseg9")
        assert score.lesions is not None
        assert len(score.attention) == (4 if variant == "full" else 0)
        assert {s.area_mm2 > 0 for s in score.slices if s.drawn} == {True}
        assert evaluation.from_json(evaluation.to_json([score])) == [score]
        findings = model.predict(cases[0].volume)
        assert len(findings.attention) == (4 if variant == "full" else 0)
        scans = [scan(case) for case in cases]
        task = dcn.DcnSlicesTask(
            [scan(c) for kind, path in sources.items() for c in DATASETS[kind].read(path)], TINY
        )
        assert 0 <= task.score(task.network.eval(), scans[0]) <= 1


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Volumes with lesions drawn in some slices, and pictures of chests with a label."""
    root = tmp_path_factory.mktemp("data")
    for number, patient in enumerate(("p1", "p2", "p3", "p4")):
        write_volume(root, number, patient)
    for group, lesion in (("covid", True), ("non-covid", False)):
        (root / "sarscov2" / group).mkdir(parents=True)
        for number in range(3):
            volume = phantom((7, 150, 180), lesion=lesion)
            grey = (np.clip(volume.array[number + 2], -1400, 200) + 1400) / 1600 * 255
            Image.fromarray(grey.astype(np.uint8)).save(root / "sarscov2" / group / f"{number}.png")
    return {"medseg9": root, "sarscov2": root / "sarscov2"}


def small(folder, name):
    """The recipes that ship, made so small that they train in a second."""
    for each in ("lungs", "dcn_slices", "dcn"):
        data = yaml.safe_load((recipes.RECIPES / f"{each}.yaml").read_text())
        data["schedule"] = {"steps": 2, "learning_rate": 0.01, "warm_up": 1, "average": 0.5}
        data["hold_out"], data["data"] = {}, ["medseg9", "sarscov2"]
        if each == "lungs":
            data["network"], data["options"] = {"widths": [4, 8]}, {"canvas": [48, 64], "batch": 6}
            data["schedule"]["steps"] = 40
        else:
            data["network"]["width"] = TINY
        if each == "dcn_slices":
            data["options"] = {"canvas": [48, 64], "batch": 3, "pictures": 2}
        if each == "dcn":
            data |= {key: str(folder / f"{data[key]}.yaml") for key in ("lungs", "after")}
        (folder / f"{each}.yaml").write_text(yaml.safe_dump(data))
    return recipes.load(str(folder / f"{name}.yaml"))


class TestPictures:
    def test_predict_writes_a_picture_of_every_slice_with_lung_and_clears_old_ones(self, model, tmp_path):
        chest.write_study(tmp_path / "in", seed=2, slices=30, rows=128, slice_spacing=8)
        found = predict.find([tmp_path / "in"])
        (answer,) = predict.predict(found, tmp_path / "out", model, Config(), NOW)
        folder = tmp_path / "out" / answer.study_instance_uid / "attention"
        names = sorted(path.name for path in folder.iterdir())
        assert 15 < len(names) <= 30
        assert set(names) <= {f"slice_{n:04}.png" for n in range(1, 31)}
        with Image.open(folder / names[0]) as picture:
            assert picture.width == 5 * attention.WIDTH
        stale = folder / "slice_0999.png"
        stale.write_bytes(b"of an earlier run")
        list(predict.predict(found, tmp_path / "out", loaded("multitask"), Config(), NOW))
        assert not list(folder.iterdir())

    def test_the_slice_lies_as_its_maps_do_however_it_is_stored(self, model, tmp_path):
        upright = phantom()
        turned = Volume(
            np.ascontiguousarray(upright.array[:, ::-1].swapaxes(1, 2)[::1]),
            upright.spacing,
            (0.0, -1.0, 0.0, 1.0, 0.0, 0.0),
        )
        assert upright.orientation == AXIAL
        for name, volume in (("upright", upright), ("turned", turned)):
            attention.write(volume, model.predict(volume), tmp_path / name)
        pictures = sorted((tmp_path / "upright").iterdir())
        assert len(pictures) == 10
        for path in pictures:
            assert path.read_bytes() == (tmp_path / "turned" / path.name).read_bytes()

    def test_a_bright_spot_of_a_map_is_drawn_where_it_is(self, model, tmp_path):
        volume = phantom()
        findings = model.predict(volume)
        spot = np.zeros((10, 50, 60), np.uint8)
        spot[4, 10:15, 40:45] = 255
        attention.write(volume, replace(findings, attention={"attention 1": spot}), tmp_path)
        ct, heated = np.split(np.asarray(Image.open(tmp_path / "slice_0005.png"), float), 2, axis=1)
        changed = np.argwhere(np.abs(heated - ct).sum(2)[20:] > 60)  # below the titles
        scale = attention.WIDTH / 60
        assert changed.mean(0) == pytest.approx([12.5 * scale - 20, 42.5 * scale], abs=2)


class TestAttentionMeasured:
    VOLUME = Volume(np.zeros((3, 40, 60), np.int16), (5.0, 1.0, 1.0))

    def test_dice_of_the_maps_over_the_slices_with_lesions(self):
        """Maps, of 4 mm a pixel, that cover the lesion, half of it, and something else."""
        lesion = np.zeros((3, 40, 60), bool)
        lesion[1, 8:16, 20:36] = True
        hit, half, other = np.zeros((3, 3, 10, 15), np.uint8)
        hit[1, 2:4, 5:9] = 255
        half[1, 2:4, 5:7] = 255
        other[:, 6:8, 5:9] = 255
        hit[0] = 255  # nothing is drawn there: it does not count
        found = measured.dice({"hit": hit, "half": half, "other": other}, lesion, self.VOLUME)
        assert found == pytest.approx({"hit": 1.0, "half": 2 / 3, "other": 0.0}, abs=0.02)
        assert measured.dice({"hit": hit}, np.zeros_like(lesion), self.VOLUME) == {}

    def test_maps_go_with_slices_that_are_stored_from_head_to_feet(self):
        lesion = np.zeros((3, 40, 60), bool)
        lesion[2, 8:16, 20:36] = True
        maps = np.zeros((3, 10, 15), np.uint8)
        maps[2, 2:4, 6:10] = 255  # columns are turned, so that they run to the left
        turned = replace(self.VOLUME, orientation=(-1.0, 0.0, 0.0, 0.0, 1.0, 0.0))
        assert measured.dice({"it": maps}, lesion, turned)["it"] == pytest.approx(1, abs=0.02)

    def test_slices_are_grouped_by_the_size_of_their_lesions(self):
        """Groups of 1,000 of the paper's pixels, 494 mm² each."""
        lesion = np.zeros((3, 40, 60), bool)
        lesion[0, :10, :50] = lesion[1, :20, :60] = True
        areas = measured.lesion_areas(lesion, replace(self.VOLUME, spacing=(5.0, 0.5, 2.0)))
        assert areas.tolist() == [500, 1200, 0]
        groups = [measured.size_group(area) for area in (10, 490, 500, 1200, 2400, 2500, 9e3)]
        assert groups == ["0–1k", "0–1k", "1–2k", "2–3k", "4–5k", "≥5k", "≥5k"]
