"""Self-supervised Inf-Net (Fung et al.): equations by hand, a coach that makes it hard, kinds of lesion."""

import json
from dataclasses import replace
from math import exp, log, sqrt
from typing import ClassVar

import numpy as np
import pytest
import torch
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from tests import test_models
from tests.needs import DATA, needs_data
from tests.test_baselines import card
from tests.test_models import loaded, phantom
from tests.test_paper_tables import cells, of
from tests.test_training import Unwatched, write_volume
from triage import models
from triage.config import Analysis
from triage.domain import Volume
from triage.errors import ConfigError, Retryable
from triage.models import packages, weights
from triage.models.infnet import squared
from triage.models.infnet_networks import (
    CLASSES,
    RES2NET,
    Coach,
    EdgeAttention,
    InfNet,
    Inpainting,
    PartialDecoder,
    Res2Net,
    ReverseAttention,
    Seen,
    SingleInfNet,
    UNet,
    constrained,
)
from triage.models.preprocessing import prepare
from triage.training import infnet, making, metrics, paper, published, variants
from triage.training import recipe as recipes
from triage.training.datasets import DATASETS
from triage.training.evaluation import evaluate, from_json, to_json
from triage.training.run import Run, chain
from triage.training.run import given as with_lungs_given
from triage.training.scans import scan
from triage.training.tasks import Draw
from triage.training.trainer import Schedule, Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = {"encoder": RES2NET, "width": 1 / 16, "multi_width": 1 / 16, "size": 64}
NORM = 1 / sqrt(1 + 1e-5)
"""What a batch normalisation that has seen nothing multiplies with."""


def made_up(folder):
    """Random weights that call some of a phantom's lungs ground glass and some consolidation."""
    torch.manual_seed(4)
    network = InfNet(**TINY).requires_grad_(False)
    slices = squared(prepare(phantom())[:, None], 64)
    lung = slices < 0.5
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = 1.0  # it knows these slices at once
    network.multi(torch.cat([slices, network.single(slices).lesions.sigmoid()], dim=1))
    network.eval()
    network.single.last["level3"].bias -= network.single(slices).lesions[lung].median()
    logits = network.multi(torch.cat([slices, network.single(slices).lesions.sigmoid()], dim=1))
    network.multi.decoder.head.bias[2] -= (logits[:, 2:] - logits[:, 1:2])[lung].median()
    path = folder / "infnet.safetensors"
    weights.save(network, {"network": "infnet", **{k: str(v) for k, v in TINY.items()}}, path)
    return packages.write(folder / "model", {**card("infnet"), "lungs": "multitask"}, {"infnet": path})


@pytest.fixture(scope="session")
def package(tmp_path_factory):
    return made_up(tmp_path_factory.mktemp("infnet"))


@pytest.fixture
def place(package):
    return str(package.folder)


@pytest.fixture
def model(place):
    return loaded(place)


class TestInfNet(test_models.TestContract):
    """The system keeps the contract of every network."""

    def test_each_lesion_is_ground_glass_or_consolidation(self, model):
        findings = model.predict(phantom())
        assert list(findings.lesion_classes) == list(CLASSES)
        glass, dense = findings.lesion_classes.values()
        assert glass.dtype == dense.dtype == bool
        assert glass.shape == dense.shape == findings.lesion_mask.shape
        assert not (glass & dense).any()
        assert np.array_equal(glass | dense, findings.lesion_mask)
        for part in (findings.lesion_mask, glass, dense):
            assert 0.01 < part.sum() / findings.lung_mask.sum() < 0.99

    def test_kinds_go_with_the_slices_however_they_are_stored(self, model):
        upright = phantom()
        stored = np.ascontiguousarray(upright.array[::-1, :, ::-1])
        turned = model.predict(Volume(stored, upright.spacing, (-1.0, 0.0, 0.0, 0.0, 1.0, 0.0)))
        for kind, mask in model.predict(upright).lesion_classes.items():
            assert np.array_equal(turned.lesion_classes[kind][::-1, :, ::-1], mask)

    def test_the_maps_of_both_kinds_are_the_lesion_map(self, model):
        picture = phantom((1, 120, 140))
        maps = model.class_maps(picture, None)
        assert list(maps) == list(CLASSES)
        assert np.allclose(sum(maps.values()), model.lesion_map(picture, None), atol=1e-6)

    @pytest.mark.parametrize("part", ["single", "multi"])
    def test_what_is_no_number_gives_no_answer(self, place, part):
        broken = models.load(Analysis(model=place, device="cpu", threads=1))
        bias = {"single": broken.network.single.last["level3"], "multi": broken.network.multi.decoder.head}
        bias[part].bias.data.fill_(float("nan"))
        with pytest.raises(Retryable, match="no numbers"):
            broken.predict(phantom((3, 120, 140)))

    def test_a_slice_in_which_nothing_is_likely_stays_empty(self, place):
        """Stretched from its lowest to its highest value, each would have a lesion."""
        shy = models.load(Analysis(model=place, device="cpu", threads=1))
        shy.network.single.last["level3"].bias.data -= 20
        findings = shy.predict(phantom((3, 120, 140)))
        assert not findings.lesion_mask.any()
        assert not any(mask.any() for mask in findings.lesion_classes.values())
        assert findings.probability == 0


def give(layer, weight, bias=0.0):
    """Weights of a convolution, and a bias where it has one."""
    layer.weight.copy_(torch.as_tensor(weight, dtype=torch.float32).view_as(layer.weight))
    if layer.bias is not None:
        layer.bias.fill_(bias)


def middle(value=1.0):
    """A 3 × 3 kernel that only sees its own pixel."""
    return [0, 0, 0, 0, value, 0, 0, 0, 0]


class TestEquations:
    TRUTH = torch.tensor([[[[1.0, 0.0]]]])
    NEAR, FAR = 1 + 5 * (1 - 1 / 961), 1 + 5 / 961
    """Weights of the two pixels: one of 31 × 31 around either is lesion."""

    def test_edge_attention(self):
        """Doubled, negatives to 0; then each pixel plus its left neighbour."""
        unit = EdgeAttention(1, 1).eval().requires_grad_(False)
        give(unit.layers[0][0], [2])
        give(unit.layers[1][0], [0, 0, 0, 1, 1, 0, 0, 0, 0])
        features = unit(torch.tensor([[[[1.0, -1.0, 2.0]]]]))
        assert features.flatten().tolist() == pytest.approx([2 * NORM**2, 2 * NORM**2, 4 * NORM**2])

    def test_the_edge_is_both_sides_of_the_outline(self):
        lesion = torch.zeros(1, 1, 5, 6)
        lesion[..., 1:4, 1:5] = 1
        edge = infnet.outline(lesion)[0, 0]
        assert edge[2].tolist() == [1, 1, 0, 0, 1, 1]
        assert edge[0].tolist() == [1] * 6

    def test_reverse_attention(self):
        """Where the coarser map says 1/2 and 3/4, (f + e) counts half and a quarter."""
        unit = ReverseAttention(1, 1, 1).eval().requires_grad_(False)
        give(unit.layers[0][0], [1, 1])
        for layer in unit.layers[1:]:
            give(layer[0], middle())
        f, e, found = (torch.tensor([[[row]]]) for row in ([1.0, 2.0], [3.0, 4.0], [0.0, log(3)]))
        expected = [NORM**3 * 4 * 0.5, NORM**3 * 6 * 0.25]
        assert unit(f, e, found).flatten().tolist() == pytest.approx(expected)

    def test_each_level_adds_to_the_coarser_one(self):
        torch.manual_seed(0)
        network = SingleInfNet(width=1 / 16).eval()
        for level in (5, 4, 3):
            nn.init.zeros_(network.last[f"level{level}"].weight)
            nn.init.constant_(network.last[f"level{level}"].bias, level)
        s_g, s_5, s_4, s_3 = network(torch.rand(1, 1, 64, 64)).maps[0]
        assert (s_5 - s_g).mean().item() == pytest.approx(5, abs=1e-3)
        assert (s_4 - s_5).mean().item() == pytest.approx(4, abs=0.05)
        assert (s_3 - s_4).mean().item() == pytest.approx(3, abs=0.05)

    def test_partial_decoder(self):
        """One pixel of 1, 2 and 3, nothing learned between: 3, 2·3 and 1·3·2, joined."""
        unit = PartialDecoder([1, 1, 1], 1).eval().requires_grad_(False)
        for reduce in unit.reduce:
            give(reduce[0][0], [1])
            give(reduce[1][0], middle())
        for layer in unit.weigh:
            give(layer[0], middle())
        for layer in unit.join:
            size = len(layer[0].weight)
            give(layer[0], [middle(float(a == b)) for a in range(size) for b in range(size)])
        one, two, three = (torch.full((1, 1, 1, 1), v) for v in (1.0, 2.0, 3.0))
        assert unit([one, two, three]).flatten().tolist() == pytest.approx([6, 6, 3], rel=1e-3)

    def iou(self, p, q):
        """Of two pixels, the first lesion."""
        both, either = self.NEAR * p, self.NEAR * (1 + p) + self.FAR * q
        return (both + 1) / (either - both + 1)

    def test_weighted_iou_and_cross_entropy(self):
        logits = torch.tensor([[[[log(3), -log(3)]]]])
        expected = 1 - self.iou(0.75, 0.25) - log(0.75)
        assert infnet.segmentation_loss(logits, self.TRUTH).item() == pytest.approx(expected, rel=1e-5)

    def test_the_loss_is_that_of_the_edge_and_of_four_maps(self):
        """A network that says 1/2 everywhere, and one that is sure of S_3."""
        unsure = Seen(torch.zeros(1, 1, 1, 2), torch.zeros(1, 4, 1, 2))
        seg = 1 - self.iou(0.5, 0.5) + log(2)
        assert infnet.single_loss(unsure, self.TRUTH).item() == pytest.approx(log(2) + 4 * seg, rel=1e-5)
        maps = unsure.maps.clone()
        maps[0, 3] = torch.tensor([[50.0, -50.0]])
        loss = infnet.single_loss(Seen(unsure.edge, maps), self.TRUTH)
        assert loss.item() == pytest.approx(log(2) + 3 * seg, rel=1e-5)

    def test_cross_entropy_of_three_classes(self):
        logits = torch.tensor([0.0, log(2), 0.0])[None, :, None, None]
        classes = torch.tensor([0.0, 0.75, 0.25])[None, :, None, None]
        expected = -0.75 * log(2 / 4) - 0.25 * log(1 / 4)
        assert infnet.multi_loss(logits, classes).item() == pytest.approx(expected)

    def test_the_coachs_mask(self):
        """Three of four are kept: the third largest score becomes a half."""
        scores = torch.tensor([[[[3.0, -2.0], [0.0, 1.0]]]])
        expected = [1 / (1 + exp(-b)) for b in (3, -2, 0, 1)]
        assert constrained(scores).flatten().tolist() == pytest.approx(expected)

    @given(
        st.integers(1, 3), st.integers(2, 20), st.integers(2, 20), st.integers(0, 99), st.floats(0.01, 100)
    )
    @example(1, 19, 20, 1, 0.015625)
    @settings(max_examples=50)
    def test_the_coach_erases_a_quarter_whatever_it_scores(self, n, h, w, seed, scale):
        scores = torch.randn(n, 1, h, w, generator=torch.Generator().manual_seed(seed)) * scale
        values, wanted = constrained(scores).flatten(1), max(1, round(0.75 * h * w))
        surely, at_most = (values > 0.5).sum(1), (values >= 0.5).sum(1)
        assert ((surely <= wanted) & (wanted <= at_most)).all()
        assert (at_most - surely <= 2).all(), "at the border, where a sigmoid cannot tell numbers apart"

    def test_edges_of_a_slice(self):
        """A step of 1 is 1 steep, on both sides of it; nothing else is."""
        slices = torch.zeros(1, 1, 5, 6)
        slices[..., 3:] = 1
        assert infnet.edges(slices)[0, 0, 2].tolist() == pytest.approx([0, 0, 1, 1, 0, 0])


class TestNetworks:
    def test_the_papers_size(self):
        """Res2Net-50, 26w × 4s: 25.7 million (Gao et al. 2019); a U-Net of 64 to 1024: about 31.0 million."""
        last_layer, two_of_three_inputs = 2048 * 1000 + 1000, 2 * 32 * 9
        assert count(Res2Net()) + last_layer + two_of_three_inputs == pytest.approx(25.7e6, rel=0.02)
        assert count(UNet(2, 3)) == pytest.approx(31.0e6, rel=0.02)
        sizes = [block.convs[0].in_channels for block, *_ in Res2Net().stages()[2:]]
        assert sizes == [52, 104, 208]

    @pytest.mark.parametrize("encoder", [RES2NET, "resnet18", "densenet121", "unet"])
    def test_shapes_with_any_encoder(self, encoder):
        network = SingleInfNet(encoder, 1 / 16)
        side = 2 * network.stride
        seen = network(torch.rand(2, 1, side, 2 * side))
        assert seen.edge.shape == (2, 1, side, 2 * side)
        assert seen.maps.shape == (2, 4, side, 2 * side)

    def test_what_cannot_be_built_is_told(self):
        with pytest.raises(ConfigError, match="'vgg': there are res2net50, resnet18"):
            SingleInfNet("vgg")
        with pytest.raises(ConfigError, match="size 100: must be a multiple of 32"):
            InfNet(**{**TINY, "size": 100})

    def test_published_weights_fill_the_encoder(self, tmp_path):
        """Of three colours, with a head."""
        torch.manual_seed(0)
        theirs = Res2Net(1 / 16, 3).state_dict()
        torch.save({**theirs, "fc.weight": torch.zeros(1), "fc.bias": torch.zeros(1)}, tmp_path / "w.pth")
        own = InfNet(**TINY, encoder_weights=tmp_path / "w.pth").single.stages[0][0][0].weight
        assert torch.allclose(own, theirs["conv1.0.weight"].sum(1, keepdim=True))

    def test_the_second_network_teaches_the_first_nothing(self, batch):
        network = InfNet(**TINY)
        _, multi = infnet.losses(network, batch)
        multi.backward()
        assert all(w.grad is None for w in network.single.parameters())
        assert all(w.grad is not None for w in network.multi.parameters())

    def test_what_ships_is_small(self, tmp_path):
        recipe = recipes.load("infnet")
        shape = {key: str(value) for key, value in recipe.network.items()}
        weights.save(weights.build({"network": recipe.task, **shape}), {}, tmp_path / "w")
        assert (tmp_path / "w").stat().st_size <= 15e6


def count(network):
    return sum(w.numel() for w in network.parameters())


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Pictures of two discs, half of one hazy and partly dense, with kinds told apart; and two volumes."""
    root = tmp_path_factory.mktemp("data")
    for number, patient in enumerate(("p1", "p2")):
        write_volume(root, number, patient)
    for kind in ("Imgs", "GT", "GT-multi"):
        (root / "semiseg50" / kind).mkdir(parents=True)
    y, x = np.mgrid[-1:1:120j, -1:1:90j]
    lung = ((np.abs(y) - 0.45) / 0.35) ** 2 + (x / 0.8) ** 2 < 1
    for number in range(6):
        glass, dense = lung & (y > 0) & (x > 0), lung & (y > 0.5) & (x > 0.1 * number)
        grey = np.where(lung, 60, 200)
        grey[glass], grey[dense] = 130, 190
        labels = (glass.astype(np.uint8) + dense).astype(np.uint8)
        folder = root / "semiseg50"
        Image.fromarray(grey.astype(np.uint8)).save(folder / "Imgs" / f"{number}.jpg", quality=95)
        Image.fromarray((labels > 0) * np.uint8(255)).save(folder / "GT" / f"{number}.png")
        Image.fromarray(labels).save(folder / "GT-multi" / f"{number}.png")
    return {"semiseg": root / "semiseg50", "medseg9": root}


@pytest.fixture(scope="module")
def pictures(sources):
    return [scan(case) for case in DATASETS["semiseg"].read(sources["semiseg"])]


@pytest.fixture(scope="module")
def volumes(sources):
    return [scan(case) for case in DATASETS["medseg9"].read(sources["medseg9"])]


def slices(scans, batch=4, **ways):
    return infnet.Slices(scans, batch, 1, infnet.Ways(**ways))


@pytest.fixture
def batch(pictures):
    return slices(pictures, 2).draw(Draw(1, 0), 64)


class TestSlices:
    def test_pictures_keep_their_kinds(self, pictures):
        drawn = slices(pictures, augmented=False).draw(Draw(1, 0), 64)
        assert drawn.slices.shape == drawn.lesion.shape == (4, 1, 64, 64)
        assert drawn.told.all()
        assert torch.allclose(drawn.classes.sum(1), torch.ones(4, 64, 64), atol=1e-5)
        assert torch.allclose(drawn.classes[:, 1:].sum(1), drawn.lesion[:, 0], atol=1e-5)
        glass, dense = (drawn.slices[:, 0][drawn.classes[:, k] > 0.99].mean() for k in (1, 2))
        assert glass < dense - 0.1

    @pytest.mark.parametrize("varied", [True, False])
    def test_volumes_teach_where_lesions_are_but_not_of_which_kind(self, pictures, volumes, varied):
        drawn = slices([*pictures, *volumes], 5, varied=varied).draw(Draw(1, 0), 64)
        assert drawn.told.tolist() == [False] * 4 + [True]
        assert len(drawn.classes) == 1
        shown = (drawn.lesion > 0.5).flatten(1).any(1)
        assert shown[:4].sum() <= 2  # half of the volumes' slices have none
        network = InfNet(**TINY)
        single, multi = infnet.losses(network, drawn)
        assert single.isfinite()
        assert multi.isfinite()
        alone = slices(volumes, 3).draw(Draw(1, 0), 64)
        assert not alone.told.any()
        assert infnet.losses(network, alone)[1] == 0

    def test_a_step_depends_on_its_number_only(self, pictures):
        one, same, other = (slices(pictures).draw(Draw(1, step), 64).slices for step in (3, 3, 4))
        assert torch.equal(one, same)
        assert not torch.equal(one, other)

    def test_nothing_to_learn_from_is_told(self, pictures):
        with pytest.raises(ConfigError, match="there are none"):
            slices([replace(p, lesions=()) for p in pictures])

    @given(st.sampled_from([0.2, 0.4, 0.5]), st.integers(20, 90), st.integers(20, 90), st.integers(0, 99))
    @settings(max_examples=30)
    def test_a_box_of_the_share_is_cut_out_of_all_layers(self, share, h, w, seed):
        cut = infnet.cut_out(torch.ones(3, h, w), share, np.random.default_rng(seed))
        gone = cut[0] == 0
        assert gone.float().mean().item() == pytest.approx(share, abs=0.04)
        assert all(torch.equal(layer, cut[0]) for layer in cut)
        rows, columns = gone.any(1), gone.any(0)
        assert int(gone.sum()) == int(rows.sum()) * int(columns.sum())  # one box

    def test_cut_out_places_vary_and_nothing_is_cut_without(self, pictures):
        empty = [
            (slices(pictures, augmented=False, cut_out=share).draw(Draw(1, s), 64).slices == 0)[:, 0]
            for share, s in ((0.5, 0), (0.5, 1), (0.0, 0))
        ]
        assert not torch.equal(empty[0], empty[1])
        assert empty[0].float().mean() > 0.45
        assert empty[2].float().mean() < 0.05
        with pytest.raises(ConfigError, match="below 1"):
            infnet.Ways(cut_out=1.0)

    def test_layers_are_turned_over_and_cropped_alike(self):
        layers = torch.arange(40 * 30.0).view(1, 1, 40, 30).expand(1, 2, 40, 30)
        seen = set()
        for seed in range(40):
            turned = infnet.turned_and_cropped(layers, np.random.default_rng(seed))
            assert torch.equal(turned[:, 0], turned[:, 1])
            h, w = turned.shape[2:]
            assert 30 <= h <= 40
            assert 22 <= w <= 30
            step = turned[0, 0, 1, 0] - turned[0, 0, 0, 0], turned[0, 0, 0, 1] - turned[0, 0, 0, 0]
            seen.add(tuple(int(s) for s in step))
        assert seen == {(a * 30, b) for a in (1, -1) for b in (1, -1)}

    def test_scales_come_in_turn_and_go_through_the_network(self):
        assert [infnet.side_of(InfNet(**{**TINY, "size": 352}), s) for s in range(4)] == [256, 352, 448, 256]
        assert [infnet.side_of(InfNet(**{**TINY, "size": 192}), s) for s in range(3)] == [160, 192, 256]

    @needs_data
    def test_the_outline_is_what_the_set_draws_as_edge(self):
        root = DATA / "train" / "semiseg50"
        for path in sorted((root / "GT").iterdir())[:5]:
            with Image.open(path) as lesion, Image.open(root / "Edge" / path.name) as edge:
                drawn, edges = (torch.from_numpy(np.asarray(p) > 127) for p in (lesion, edge))
            outline = infnet.outline(drawn[None, None].float())[0, 0] > 0
            assert bool(outline[edges].all())
            assert edges.sum() > 0.6 * outline.sum()


def reconstructed(network, seen):
    with torch.no_grad():
        return infnet.reconstruction_loss(network, seen).item()


class TestSelfSupervision:
    SMALL: ClassVar = {**TINY, "encoder": "unet", "size": 32}

    def trainer(self, pictures, folder, **options):
        torch.manual_seed(0)
        task = infnet.InpaintingTask(pictures, **self.SMALL, coach_width=1 / 16, batch=3, **options)
        schedule = Schedule(steps=200, learning_rate=1e-2, warm_up=1, average=0, weight_decay=0, every=100)
        return Trainer(task, schedule, folder, torch.device("cpu"))

    def test_the_coach_raises_the_loss_of_a_network_that_stays_as_it_is(self, pictures, tmp_path):
        trainer = self.trainer(pictures, tmp_path)
        task, network = trainer.task, trainer.task.network
        seen = task.slices.draw(Draw(7, 0), 32).slices

        def learn(coach_steps, network_steps, steps):
            task.coach_steps, task.network_steps = coach_steps, network_steps
            before = {name: weight.clone() for name, weight in network.named_parameters()}
            for _ in range(steps):
                trainer.take_step()
            moved = {
                name.partition(".")[0]
                for name, weight in network.named_parameters()
                if not torch.equal(weight, before[name])
            }
            return reconstructed(network, seen), moved

        untrained = reconstructed(network, seen)
        able, moved = learn(0, 1, 40)
        assert able < 0.5 * untrained
        assert moved == {"infnet"}
        harder, moved = learn(1, 0, 30)
        assert harder > 1.25 * able
        assert moved == {"coach"}
        kept = network.coach(seen) >= 0.5
        assert kept.float().mean().item() == pytest.approx(0.75, abs=0.01)

    def test_the_coach_goes_first_and_each_teaches_only_itself(self, pictures, tmp_path):
        task = self.trainer(pictures, tmp_path, coach_steps=2, network_steps=1).task
        taught = []
        for step in range(4):
            task.network.zero_grad()
            task.loss(Draw(1, step)).backward()
            grads = [
                any(w.grad is not None for w in p.parameters())
                for p in (task.network.coach, task.network.infnet)
            ]
            taught.append(("coach", "network")[grads.index(True)])
            assert sum(grads) == 1
        assert taught == ["coach", "coach", "network", "coach"]

    def test_a_resumed_run_is_the_same_run(self, pictures, tmp_path):
        options = {"coach_steps": 1, "network_steps": 2}
        whole = self.trainer(pictures, tmp_path / "whole", **options)
        for _ in range(5):
            whole.take_step()
        first = self.trainer(pictures, tmp_path / "halves", **options)
        first.output.mkdir()
        first.take_step()
        first.save()
        second = self.trainer(pictures, tmp_path / "halves", **options)
        second.resume()
        for _ in range(4):
            second.take_step()
        for name, value in whole.averaged.state_dict().items():
            assert torch.equal(second.averaged.state_dict()[name], value), name

    def test_nobody_who_learns_is_told(self, pictures, tmp_path):
        with pytest.raises(ConfigError, match="at least one of them must be 1"):
            self.trainer(pictures, tmp_path, coach_steps=0, network_steps=0)

    def test_the_network_sees_what_the_coach_leaves(self, pictures, tmp_path):
        network = self.trainer(pictures, tmp_path).task.network.eval()
        seen, shown = torch.rand(1, 1, 32, 32), []
        network.infnet.single.stages[0].register_forward_pre_hook(lambda _, given: shown.append(given[0]))
        with torch.no_grad():
            infnet.reconstruction_loss(network, seen)
            mask = network.coach(seen)
        assert torch.allclose(shown[0].float(), seen * mask, atol=0.02)

    def test_everything_but_the_last_layers_is_taken_over(self, pictures, tmp_path):
        torch.manual_seed(1)
        before = Inpainting(**TINY, coach_width=1 / 16)
        path = tmp_path / "w.safetensors"
        facts = {k: str(v) for k, v in {**TINY, "coach_width": 1 / 16}.items()}
        weights.save(before, {"network": "infnet_inpainting", **facts}, path)
        task = infnet.InfNetTask(pictures, **TINY, start=path)
        untouched = {k: v.clone() for k, v in task.untrained.state_dict().items()}
        theirs = before.infnet.state_dict()
        for name, value in task.network.state_dict().items():
            last = name.startswith(("single.last.", "multi.decoder.head."))
            expected = untouched[name] if last else theirs[name]
            assert torch.allclose(value.float(), expected.float(), atol=1e-3), name
        other = infnet.InfNetTask(pictures, **{**TINY, "width": 1 / 8}, start=path)
        with pytest.raises(ConfigError, match="another encoder or width"):
            _ = other.network

    def test_the_coach_is_a_network_of_the_same_kind(self):
        mask = Coach(1 / 16)(torch.rand(2, 1, 32, 48))
        assert mask.shape == (2, 1, 32, 48)
        assert 0 < mask.min() < 0.5 < mask.max() < 1


def small(folder):
    """The recipes that ship, made so small that they train in a second."""
    for name in ("infnet_inpainting", "infnet"):
        data = yaml.safe_load((recipes.RECIPES / f"{name}.yaml").read_text())
        data["network"] |= TINY
        data["options"] |= {"batch": 2}
        data["hold_out"] = {"semiseg": 2}
        data["schedule"] = {"steps": 2, "learning_rate": 0.001, "warm_up": 1, "average": 0.5}
        if name == "infnet":
            data["start"] = str(folder / "infnet_inpainting.yaml")
        else:
            data["network"]["coach_width"] = 1 / 16
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(data))
    return recipes.load(str(folder / "infnet.yaml"))


class TestTraining:
    def test_variants_fill_the_papers_table_from_pictures_alone(self, sources, tmp_path):
        recipe = small(tmp_path)
        run = Run(
            recipe=recipe,
            sources={"semiseg": sources["semiseg"]},
            output=tmp_path / "out",
            device="cpu",
            threads=1,
        )
        names = ["plain", "self_supervised", "self_supervised_cut_out"]
        compared = variants.compare(run, names, Unwatched(), None, 1)
        assert compared.measured_on == "pictures held out of training"
        trained = {path.name for path in (tmp_path / "out" / "plain").iterdir()}
        assert trained == {"infnet", "model"}
        parts = [tmp_path / "out" / name / "infnet_inpainting" for name in names]
        assert [(part / "checkpoint.pt").exists() for part in parts] == [False, True, False]
        assert [(part / "infnet_inpainting.safetensors").exists() for part in parts] == [False, True, True]
        for one in compared.trained:
            package = packages.read(one.folder)
            assert set(package.files) == {"infnet", "lungs"}
            assert package.card.lungs == "multitask"
            assert one.parameters == count(InfNet(**TINY))
            assert one.summary.cases == 2  # the last two pictures, no other
            shown = [key for key in published.INFNET if key not in ("dice", "dice_threshold_averaged")]
            assert all(one.summary.figures[f"pictures_{key}"].value is not None for key in shown)
        stored = json.loads((tmp_path / "out" / "variants.json").read_text())["variants"]
        assert stored["plain"]["figures"]["pictures_loss_single"]["value"] > 1

    def test_a_variant_that_starts_with_no_recipe_is_told(self, tmp_path):
        small(tmp_path)
        path = tmp_path / "infnet.yaml"
        data = yaml.safe_load(path.read_text()) | {"variants": {"wide": {"start": {"width": 1}}}}
        path.write_text(yaml.safe_dump(data))
        with pytest.raises(ConfigError, match=r"variants\.wide: start: Input should be a valid string"):
            recipes.load(str(path))

    def test_lungs_are_borrowed_only_where_their_data_is_missing(self, sources, tmp_path):
        recipe = small(tmp_path)
        some, every = ({"semiseg": sources["semiseg"]}, sources)
        runs = [with_lungs_given(Run(recipe=recipe, sources=s, output=tmp_path)) for s in (some, every)]
        names = [[part.name for part in chain(run.recipe)] for run in runs]
        assert names == [["infnet_inpainting", "infnet"], ["lungs", "infnet_inpainting", "infnet"]]
        assert [run.recipe.card.get("lungs") for run in runs] == ["multitask", None]

    def test_it_learns_from_volumes_too_and_is_measured_on_them(self, sources, tmp_path):
        recipe = small(tmp_path).model_copy(update={"lungs": None, "hold_out": {}})
        recipe = recipe.model_copy(update={"card": {**recipe.card, "lungs": "multitask"}})
        run = Run(
            recipe=recipe, sources=sources, output=tmp_path / "out", test=("p2",), device="cpu", threads=1
        )
        package = packages.read(making.make(run, Unwatched()))
        assert [line.partition(":")[0] for line in package.card.training_data] == ["semiseg", "medseg9"]
        assert len(package.card.trained_on["medseg9"]) == 1
        assert "infnet_inpainting" in package.card.recipe

    def test_its_score_is_the_dice_of_the_finest_map(self, pictures):
        task = infnet.InfNetTask(pictures, **TINY)
        task.network.eval()
        nn.init.constant_(task.network.single.last["level3"].bias, 50.0)
        share = float((pictures[0].lesions[0] > 0.5).float().mean())
        with torch.no_grad():
            assert task.score(task.network, pictures[0]) == pytest.approx(2 * share / (1 + share))
        assert task.score(task.network, replace(pictures[0], lesions=())) is None


class TestMeasured:
    def test_losses_and_kinds_of_a_picture(self, sources, model):
        case = next(DATASETS["semiseg"].read(sources["semiseg"]))
        (score,) = evaluate(model, [case], "semiseg")
        assert from_json(to_json([score])) == [score]
        maps = model.class_maps(case.volume, None)
        lesion = sum(maps.values()) > 0.5
        dense = maps["consolidation"] > maps["ground_glass"]
        drawn = case.lesion_classes["consolidation"]
        assert score.own["consolidation_dice"] == metrics.dice(lesion & dense, drawn)
        averaged = metrics.threshold_averaged_dice(maps["consolidation"], drawn)
        assert score.own["consolidation_dice_threshold_averaged"] == averaged
        seen = infnet.Slices([scan(case)], 1, 1, infnet.Ways(augmented=False)).draw(Draw(1, 0), 64)
        with torch.no_grad():
            single, multi = (loss.item() for loss in infnet.losses(model.network, seen))
        assert score.own["loss_single"] == pytest.approx(single, rel=0.05)
        assert score.own["loss_multi"] == pytest.approx(multi, rel=0.05)
        (alone,) = evaluate(model, [replace(case, lesion_classes={})], "semiseg")
        assert set(alone.own) == {"loss_single"}

    def test_ours_stand_in_the_rows_that_were_empty(self):
        def facts(start, **options):
            return {"infnet": {"recipe": json.dumps({"start": start, "options": options})}}

        ours = [
            of("infnet", facts(None, cut_out=0.2)),
            of("infnet", facts("infnet_inpainting", augmented=False)),
            of("infnet", facts("infnet_inpainting", cut_out=0.5)),
            of("infnet", facts("infnet_inpainting", cut_out=0.2, varied=True)),
        ]
        (table,) = published.tables(ours)
        rows = cells(table)
        assert list(rows) == [
            "SInfNet",
            "SInfNet + data aug (0.2), ours: ours 0123",
            "SInfNet + data aug (0.4)",
            "SInfNet + data aug (0.5)",
            "Self-super, ours: ours 0123",
            "Self-super + data aug (0.5), ours: ours 0123",
            "ours: ours 0123",
        ]
        assert rows["SInfNet"]["multi, test loss"] == ("1.17", "")
        assert rows["SInfNet + data aug (0.2), ours: ours 0123"]["single, test loss"][0] == "3.87"

    def test_the_recipe_has_a_variant_for_every_row(self):
        recipe = recipes.load("infnet")
        ways = [
            (one.start is not None, one.options["cut_out"]) for one in map(recipe.variant, recipe.variants)
        ]
        assert ways == [*paper.INFNET]
        inpainting = chain(recipe)[1]
        assert {k: v for k, v in inpainting.network.items() if k != "coach_width"} == recipe.network
        assert inpainting.hold_out == recipe.hold_out
