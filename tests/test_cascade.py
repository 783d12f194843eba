"""The cascade: its networks, its equations by hand, the contract of every network, and its training."""

from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.nn import functional as F

from tests import test_models
from tests.results import NOW, small_study
from tests.test_models import loaded, orientations, phantom
from tests.test_training import Unwatched, write_volume
from triage import analyze, models, rows, severity
from triage.config import Analysis, Config
from triage.db.records import result_document, result_of
from triage.domain import Volume
from triage.errors import ConfigError
from triage.models import cascade, encoders, packages, weights
from triage.models.cascade import EncoderDecoder
from triage.models.decoders import DECODERS
from triage.models.pipeline import score
from triage.models.preprocessing import Grid, bounding_box, prepare, restore, shrink, spread
from triage.training import cascade as learning
from triage.training import evaluation, making, run
from triage.training import recipe as recipes
from triage.training.datasets import DATASETS
from triage.training.run import GRIDS, TASKS, Run
from triage.training.scans import scan
from triage.training.trainer import Schedule, Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

PUBLISHED = {
    "resnet18": 11.69e6,
    "resnet50": 25.56e6,
    "resnet152": 60.19e6,
    "densenet121": 7.98e6,
    "densenet161": 28.68e6,
    "densenet201": 20.01e6,
}
"""Weights of the classifiers (He et al. 2016a, Huang et al. 2017, as commonly counted)."""
TINY = {"encoder": "resnet18", "decoder": "fpn", "width": "0.0625"}


class TestNetworks:
    @pytest.mark.parametrize(("encoder", "decoder"), list(product(encoders.ENCODERS, DECODERS)))
    def test_every_encoder_goes_with_every_decoder(self, encoder, decoder):
        network = EncoderDecoder(encoder, decoder, width=1 / 16).eval()
        assert network.stride == (16 if encoder == "unet" else 32)
        maps = [torch.rand(2, 1, 64, 96)]
        for stage in network.stages:
            maps.append(stage(maps[-1]))
        finest = network.stride // 16
        assert [64 // m.shape[2] for m in maps[1:]] == [finest << level for level in range(5)]
        assert network(maps[0]).shape == (2, 2, 64, 96)

    @pytest.mark.parametrize("encoder", PUBLISHED)
    def test_full_size_encoders_have_the_published_size(self, encoder):
        network = encoders.CLASSIFIERS[encoder](1.0, 3)
        count = sum(weight.numel() for weight in network.parameters())
        assert count == pytest.approx(PUBLISHED[encoder], rel=0.001)

    def test_the_encoder_is_all_of_the_classifier_but_its_head(self):
        for encoder, head in (("resnet18", 512 * 1000 + 1000), ("densenet121", 1024 * 1000 + 1000)):
            stages = encoders.stages(encoder, 1.0, 3)
            count = sum(weight.numel() for stage in stages for weight in stage.parameters())
            assert count + head == pytest.approx(PUBLISHED[encoder], rel=0.001)

    def test_the_plain_unet_has_the_published_size(self):
        """31.03 million (Ronneberger et al. 2015), 64 to 1024 channels."""
        count = sum(weight.numel() for weight in EncoderDecoder("unet", "unet").parameters())
        assert count == pytest.approx(31.03e6, rel=0.001)

    def test_the_width_scales_encoder_and_decoder(self):
        full, half = (
            sum(weight.numel() for weight in EncoderDecoder("resnet18", "unet", width).parameters())
            for width in (1.0, 0.5)
        )
        assert half == pytest.approx(full / 4, rel=0.02)

    def test_a_small_change_far_away_is_seen(self):
        """Every map reaches the answer: the coarse ones see the whole slice."""
        torch.manual_seed(0)
        for decoder in DECODERS:
            network = EncoderDecoder("resnet18", decoder, width=1 / 8).eval()
            slices = torch.rand(1, 1, 128, 128)
            changed = slices.clone()
            changed[..., :8, :8] = 0
            assert (network(slices) - network(changed))[..., 64:, 64:].abs().max() > 0

    def test_unknown_names_are_told_with_the_known_ones(self):
        with pytest.raises(ConfigError, match=r"encoder 'resnet34'.*resnet18.*unet"):
            EncoderDecoder("resnet34", "fpn")
        with pytest.raises(ConfigError, match=r"decoder 'unet3'.*unet, fpn"):
            EncoderDecoder("resnet18", "unet3")


def torchvision_names(network):
    """A classifier's state dict as torchvision names it."""
    return {
        name.replace(".layers.", ".").replace("class_layers.out", "classifier"): value.clone()
        for name, value in network.state_dict().items()
    }


class TestEncoderWeights:
    @pytest.mark.parametrize("encoder", ["resnet18", "densenet121"])
    @pytest.mark.parametrize("suffix", ["safetensors", "pth"])
    def test_published_weights_are_taken_over_and_colours_summed(self, tmp_path, encoder, suffix):
        torch.manual_seed(1)
        published = encoders.CLASSIFIERS[encoder](1.0, 3).eval()
        path = tmp_path / f"weights.{suffix}"
        state = torchvision_names(published)
        save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
        slices = torch.rand(1, 1, 64, 64)
        network = EncoderDecoder(encoder, "fpn", encoder_weights=path).eval()
        first = published.conv1 if encoder == "resnet18" else published.features.conv0
        found = network.stages[0][0](slices)
        assert torch.allclose(found, first(slices.expand(1, 3, 64, 64)), atol=1e-5)
        last = [p for p in network.stages.modules() if isinstance(p, torch.nn.Conv2d)][-1].weight
        expected = [p for p in published.modules() if isinstance(p, torch.nn.Conv2d)][-1].weight
        assert torch.equal(last, expected)

    def test_names_of_old_files_are_understood(self, tmp_path):
        published = encoders.CLASSIFIERS["densenet121"](1.0, 3)
        state = torchvision_names(published)
        old = {
            name.replace("norm1.", "norm.1.").replace("norm2.", "norm.2.").replace("conv1.", "conv.1.")
            if "denselayer" in name else name: value
            for name, value in state.items()
        }  # fmt: skip
        torch.save(old, tmp_path / "old.pth")
        network = EncoderDecoder("densenet121", "unet", inputs=3, encoder_weights=tmp_path / "old.pth")
        wanted = published.features.denseblock2.denselayer3.layers.conv1.weight
        assert any(torch.equal(weight, wanted) for weight in network.parameters())

    def test_other_weights_are_refused_by_the_first_wrong_name(self, tmp_path):
        path = tmp_path / "resnet18.safetensors"
        state = torchvision_names(encoders.CLASSIFIERS["resnet18"](1.0, 3))
        save_file(state, path)
        with pytest.raises(ConfigError, match=r"resnet18\.safetensors: not those of this encoder.*layer1"):
            EncoderDecoder("resnet50", "fpn", encoder_weights=path)
        with pytest.raises(ConfigError, match="of another size"):
            EncoderDecoder("resnet18", "fpn", width=0.5, encoder_weights=path)
        with pytest.raises(ConfigError, match="plain U-Net"):
            EncoderDecoder("unet", "unet", encoder_weights=path)
        with pytest.raises(ConfigError, match="cannot be read"):
            EncoderDecoder("resnet18", "fpn", encoder_weights=tmp_path / "missing.pth")

    def test_nothing_in_a_file_is_executed(self, tmp_path):
        class Evil:
            def __reduce__(self):
                return (open, (str(tmp_path / "harm"), "w"))

        torch.save({"conv1.weight": Evil()}, tmp_path / "evil.pth")
        with pytest.raises(ConfigError, match="cannot be read"):
            EncoderDecoder("resnet18", "fpn", encoder_weights=tmp_path / "evil.pth")
        assert not (tmp_path / "harm").exists()
        torch.save({"conv1.weight": [1, 2]}, tmp_path / "list.pth")
        with pytest.raises(ConfigError, match="something else than named tensors"):
            EncoderDecoder("resnet18", "fpn", encoder_weights=tmp_path / "list.pth")


class TestEquations:
    def test_percent_infection_by_hand(self):
        """Slices with 4 of 8, 1 of 2 and 0 of 10 infected, one without lung: (0.5 + 0.5 + 0) / 3."""
        lung, lesion = np.zeros((2, 4, 2, 5), bool)
        lung[0].flat[:8] = lung[1].flat[:2] = lung[2].flat[:10] = True
        lesion[0].flat[:4] = lesion[1].flat[:1] = True
        lesion[1].flat[5] = lesion[3] = True  # outside the lungs: not infected lung
        assert cascade.percent_infection(lung, lesion) == pytest.approx(1 / 3)
        assert cascade.percent_infection(lung, lung) == 1
        assert cascade.percent_infection(np.zeros_like(lung), lesion) == 0

    @settings(max_examples=50)
    @given(st.integers(0, 2**32 - 1))
    def test_it_is_the_figure_that_severity_reports(self, seed):
        lung, lesion = np.random.default_rng(seed).random((2, 5, 4, 4)) > 0.6
        reported = severity.percent_infection(lung, lesion) or 0.0
        assert cascade.percent_infection(lung, lesion) == pytest.approx(reported)

    def test_the_tip_of_a_lung_says_nothing_of_its_slice(self):
        """Below a twentieth of the fullest slice's lung: 4 of 100 pixels, not 5."""
        lung, lesion = np.zeros((2, 3, 10, 10), bool)
        lung[0] = lung[1].flat[:4] = lung[2].flat[:5] = True
        lesion[0].flat[:20] = lesion[1].flat[:4] = lesion[2].flat[:5] = True
        assert cascade.percent_infection(lung, lesion) == pytest.approx((0.2 + 1) / 2)
        assert severity.percent_infection(lung, lesion) == pytest.approx((0.2 + 1) / 2)
        scores = cascade.slice_scores(torch.from_numpy(lesion).float(), lung, 1)
        assert scores.tolist() == [1, 0, 1]

    def test_a_slice_is_positive_from_the_first_pixel_in_the_lungs(self):
        probability = torch.zeros(5, 3, 3)
        lung = np.ones((5, 3, 3), bool)
        probability[0, 0, 0] = 0.51
        probability[1, 0, 0] = 0.5  # "p > 0.5"
        probability[2, :, 0] = 0.9
        lung[2, :, 0] = False
        probability[3, 1, :2] = torch.tensor([0.8, 0.6])
        lung[4] = False
        one, two = (cascade.slice_scores(probability, lung, n) for n in (1, 2))
        assert one.tolist() == pytest.approx([0.51, 0.5, 0, 0.8, 0])
        assert (one > 0.5).tolist() == [True, False, False, True, False]
        assert two.tolist() == pytest.approx([0, 0, 0, 0.6, 0])

    @given(st.floats(0, 1), st.floats(0, 1))
    def test_more_infection_never_scores_less(self, a, b):
        """Of masks: the score is that of PI."""
        lung = np.ones((1, 10, 10), bool)
        low, high = (np.arange(100).reshape(1, 10, 10) < round(100 * f) for f in sorted((a, b)))
        scores = [score(cascade.percent_infection(lung, lesion)) for lesion in (low, high)]
        assert 0 <= scores[0] <= scores[1] <= 1


class TestFixedGrid:
    GRID = Grid(size=(256, 256))

    @settings(max_examples=40)
    @given(
        shape=st.tuples(st.integers(1, 5), st.integers(40, 300), st.integers(40, 300)),
        pixel=st.tuples(st.floats(0.5, 2.5), st.floats(0.5, 2.5)),
        orientation=orientations,
    )
    def test_whole_slices_and_back_whatever_the_shape(self, shape, pixel, orientation):
        mask = np.zeros(shape, bool)
        mask[:, shape[1] // 4 : shape[1] // 2, shape[2] // 4 : 3 * shape[2] // 4] = True
        volume = Volume(np.where(mask, 300, -1000).astype(np.int16), (5.0, *pixel), orientation)
        slices = prepare(volume, self.GRID)
        assert slices.shape == shrink(mask, volume, self.GRID).shape == (shape[0], 256, 256)
        back = restore(slices, 0.5, volume)
        assert 2 * (back & mask).sum() / (back.sum() + mask.sum()) > 0.9
        assert spread(slices, volume).shape == shape
        z, y, x = self.GRID.millimetres(volume)
        assert (z, y * x * 256**2) == pytest.approx((5.0, np.prod(shape[1:]) * np.prod(pixel)))

    def test_rows_and_columns_of_a_volume_that_lies_on_its_side(self):
        volume = Volume(np.zeros((2, 100, 50), np.int16), (5.0, 1.0, 2.56), (0, 1, 0, 1, 0, 0))
        assert self.GRID.millimetres(volume) == pytest.approx((5.0, 128 / 256, 100 / 256))

    def test_the_box_keeps_whole_slices_but_only_those_with_lung(self):
        lung = np.zeros((6, 256, 256), bool)
        lung[2:5, 100:110, 40:50] = True
        whole = slice(0, 256)
        assert bounding_box(lung, self.GRID.margin) == (slice(2, 5), whole, whole)


def untrained(recipe):
    """Random weights that call about half of what lies in a phantom's lungs a lesion."""
    torch.manual_seed(3)
    network = weights.build(recipe).eval().requires_grad_(False)
    slices = prepare(phantom(), cascade.GRID)
    lung = (slices > 0.05) & (slices < 0.5)
    logits = network((slices * lung)[:, None])
    network.decoder.head.bias[1] -= (logits[:, 1] - logits[:, 0])[lung].median()
    return network


def trained_on_phantoms(recipe):
    """Weights that know a phantom's lungs from one without any, which random ones cannot."""
    torch.manual_seed(3)
    network = weights.build(recipe)
    chests = [phantom(), phantom(lesion=False), phantom(lung=False)]
    slices = torch.cat([*(prepare(chest, cascade.GRID) for chest in chests), torch.zeros(5, 256, 256)])
    y, x = torch.meshgrid(*(torch.linspace(-1, 1, 256),) * 2, indexing="ij")
    inside = ((x.abs() - 0.42) / 0.33) ** 2 + (y / 0.55) ** 2
    height = torch.linspace(-1, 1, 10)[:, None, None] / 1.3
    lung = (inside + height**2 < 1).long()
    truth = torch.cat([lung, lung, torch.zeros(15, 256, 256, dtype=torch.long)])
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(60):
        batch = torch.randperm(35)[:4]
        loss = F.cross_entropy(network(slices[batch, None]), truth[batch])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    return network


def card(name, **changes):
    return {
        "name": name,
        "system": "cascade",
        "summary": "two encoder-decoders with made-up weights",
        "lesion_threshold": 0.5,
        "training_data": ["none"],
        "licence": "research use only",
        "limits": ["made-up weights"],
        **changes,
    }


@pytest.fixture(scope="session")
def package_folders(tmp_path_factory):
    """The cascade with the default's lungs network, and with one of its own."""
    root = tmp_path_factory.mktemp("cascade")
    torch.set_num_threads(1)
    files = {}
    for role, kind in (("cascade", "cascade"), ("lungs", "cascade_lungs")):
        recipe = {"network": kind, **TINY}
        files[role] = root / f"{kind}.safetensors"
        weights.save((untrained if role == "cascade" else trained_on_phantoms)(recipe), recipe, files[role])
    packages.write(root / "shared", card("shared", lungs="multitask"), {"cascade": files["cascade"]})
    packages.write(root / "own", card("own", parameters={"minimum_area_pixels": 4}), files)
    return root


@pytest.fixture(params=["shared", "own"])
def place(request, package_folders):
    return str(package_folders / request.param)


@pytest.fixture
def model(place):
    return loaded(place)


class TestCascade(test_models.TestContract):
    """The cascade keeps the contract, with either kind of lungs."""

    def test_it_judges_slices_in_the_volumes_order(self, model):
        upright = phantom()
        findings = model.predict(upright)
        scores = findings.slice_scores
        assert scores.shape == (len(upright.array),)
        assert scores.dtype == np.float32
        assert 0 <= scores.min() <= scores.max() <= 1
        assert findings.grade_from == "percent_infection"
        assert findings.positive_slices == sum(score > 0.5 for score in scores)
        assert len(set(scores.tolist())) > 1
        down = Volume(upright.array[::-1, :, ::-1].copy(), upright.spacing, (-1, 0, 0, 0, 1, 0))
        np.testing.assert_allclose(model.predict(down).slice_scores, scores[::-1], atol=1e-5)

    def test_the_score_follows_the_percentage_of_infection(self, place):
        for threshold in (0.3, 0.5, 0.7):
            findings = loaded(place, lesion_threshold=threshold).predict(phantom())
            share = severity.percent_infection(findings.lung_mask, findings.lesion_mask)
            assert findings.probability == pytest.approx(share / (share + 0.03))
            measured = severity.measure(phantom(), findings, 0.005)
            assert measured.grade == severity.grade(share, 0.005)

    def test_the_slices_do_not_depend_on_the_threshold_of_the_mask(self, place):
        found = [loaded(place, lesion_threshold=t).predict(phantom()).slice_scores for t in (0.2, 0.5, 0.9)]
        for one, other in pairwise(found):
            assert np.array_equal(one, other)

    def test_what_lies_outside_the_lungs_is_not_seen_by_the_second_stage(self, model):
        volume = phantom()
        lung = np.zeros(volume.array.shape, bool)
        lung[2:8, 60:160, 40:100] = True
        other = volume.array.copy()
        other[:, 180:] = 1000
        same = model.lesion_map(replace(volume, array=other), lung)
        np.testing.assert_allclose(model.lesion_map(volume, lung), same, atol=1e-6)


class TestPackages:
    def test_a_study_is_judged_to_the_end(self, package_folders, tmp_path):
        """What the page, the report and ``--json`` are made from; the row tells the slices, too."""
        chosen = small_study(tmp_path)
        model = loaded(str(package_folders / "own"))
        config = Config(analysis={"minimum_lung_ml": 0})
        answer = analyze.judge(chosen, model, config, tmp_path / "out", NOW).answer
        row = rows.result_row(answer)
        share = answer.percent_infection
        assert row["probability"] == pytest.approx(share / (share + 0.03))
        assert row["grade"] == severity.grade(share, config.analysis.ct0_tolerance).value
        assert answer.grade_from == "percent_infection"
        assert 0 <= row["positive_slices"] <= 24
        assert result_of(result_document(answer)) == answer

    def test_made_up_weights_are_no_empty_case(self, package_folders):
        """Else the contract's comparisons of masks would compare nothing."""
        for name in ("shared", "own"):
            findings = loaded(str(package_folders / name)).predict(phantom())
            assert 0.01 < findings.lesion_mask.sum() / findings.lung_mask.sum() < 0.99, name

    def test_the_area_is_told_and_changes_slices(self, package_folders, tmp_path):
        files = {"cascade": package_folders / "cascade.safetensors"}
        wide = card("wide", lungs="multitask", parameters={"minimum_area_pixels": 400})
        packages.write(tmp_path / "wide", wide, files)
        one, many = (loaded(str(folder)) for folder in (package_folders / "shared", tmp_path / "wide"))
        assert one.settings["minimum_area_pixels"] == 1
        assert many.settings["minimum_area_pixels"] == 400
        first, wanted = (model.predict(phantom()).slice_scores for model in (one, many))
        assert (wanted <= first).all()
        assert (wanted < first).any()

    @pytest.mark.parametrize("area", [0, -1, 2.5, True, "four", 65537])
    def test_a_wrong_area_is_refused(self, package_folders, tmp_path, area):
        files = {"cascade": package_folders / "cascade.safetensors"}
        packages.write(
            tmp_path / "p", card("p", lungs="multitask", parameters={"minimum_area_pixels": area}), files
        )
        with pytest.raises(ConfigError, match="minimum_area_pixels"):
            models.load(Analysis(model=str(tmp_path / "p")))


class TestLosses:
    LOGITS = torch.tensor([[[[0.0, 2.0]], [[0.0, -1.0]]]])
    """Two pixels: (0, 0) and (2, -1) for background and lesion."""

    def test_cross_entropy_by_hand(self):
        """-(log 1/2 + log e^-1 / (e^2 + e^-1)) / 2 where both pixels are lesion."""
        lesion = torch.ones(1, 1, 1, 2)
        expected = -(np.log(0.5) + np.log(np.exp(-1) / (np.exp(2) + np.exp(-1)))) / 2
        assert learning.cross_entropy(self.LOGITS, lesion) == pytest.approx(expected)
        expected = -(np.log(0.5) + np.log(np.exp(2) / (np.exp(2) + np.exp(-1)))) / 2
        assert learning.cross_entropy(self.LOGITS, 0 * lesion) == pytest.approx(expected)

    def test_it_is_torchs_nll_of_the_softmax(self):
        torch.manual_seed(0)
        logits, truth = torch.randn(3, 2, 5, 4), torch.randint(2, (3, 1, 5, 4))
        expected = F.nll_loss(logits.log_softmax(1), truth[:, 0])
        assert learning.cross_entropy(logits, truth.float()) == pytest.approx(float(expected))
        odds = F.binary_cross_entropy_with_logits(learning.log_odds(logits), truth.float())
        assert learning.cross_entropy(logits, truth.float()) == pytest.approx(float(odds))
        assert learning.both_losses(logits, truth.float()) > expected


@pytest.fixture(scope="module")
def medseg9(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for number, patient in enumerate(("p1", "p2", "p3", "p4")):
        write_volume(folder, number, patient)
    return folder


@pytest.fixture(scope="module")
def scans(medseg9):
    return [scan(case, cascade.GRID) for case in DATASETS["medseg9"].read(medseg9)]


SMALL = {"encoder": "resnet18", "decoder": "fpn", "width": 1 / 16}


def task(name, scans, **options):
    return TASKS[name](scans, **SMALL, **{"canvas": (64, 64), **options})


class TestLearning:
    def test_scans_are_whole_slices(self, scans):
        assert GRIDS == {"cascade_lungs": cascade.GRID, "cascade": cascade.GRID}
        for each in scans:
            assert each.slices.shape == each.lung.shape == each.lesions[0].shape == (26, 256, 256)

    def test_the_papers_ways_only_turn_by_quarters(self, scans):
        ways = learning.Ways()
        rng = np.random.default_rng(0)
        turned = [ways.placed(scans[0], [20], (256, 256), rng, 1) for _ in range(20)]
        whole = scans[0].slices[20]
        quarters = [torch.rot90(whole, k) for k in range(4)]
        seen = {next(k for k in range(4) if torch.equal(t.slices[0, 0], quarters[k])) for t in turned}
        assert seen == {0, 1, 2, 3}
        for each in turned:
            k = next(k for k in range(4) if torch.equal(each.slices[0, 0], quarters[k]))
            assert torch.equal(each.lesion[0, 0], torch.rot90(scans[0].lesions[0][20], k))
            assert torch.equal(each.lung[0, 0], torch.rot90(scans[0].lung[20], k))

    def test_lesions_are_learned_from_slices_that_are_black_outside_the_lungs(self, scans):
        made = task("cascade", scans, canvas=(256, 256))
        rng = np.random.default_rng(1)
        for label in (0, 1):
            window = made.windows.draw(label, rng)
            slices, lesion = made._window(window, label, rng)
            lung = sum(float((part > 0.5).sum()) for part in window.scan.lung[list(window.index)])
            assert float((slices > 0).sum()) <= lung
            assert bool((lesion > 0.5).any()) == bool(label)
            assert not lesion[slices == 0].any()

    def test_varied_lungs_are_as_a_network_might_find_them(self, scans):
        lung = scans[0].lung[20][None, None]
        rng = np.random.default_rng(2)
        sizes = [float(learning.as_found(lung, 0 * lung, rng).sum() / lung.sum()) for _ in range(40)]
        assert min(sizes) < 1 < max(sizes)
        assert sizes.count(1.0) > 10
        assert all(0.8 < size < 1.2 for size in sizes)

    def test_turned_slices_need_a_square_canvas(self, scans):
        for name in ("cascade", "cascade_lungs"):
            with pytest.raises(ConfigError, match="must be square"):
                task(name, scans, canvas=(64, 96))
            assert task(name, scans, canvas=(64, 96), turns=False).network.stride == 32

    @pytest.mark.parametrize("name", ["cascade_lungs", "cascade"])
    @pytest.mark.parametrize("ways", [{}, {"varied": True, "soft_dice": True}])
    def test_the_loss_falls(self, scans, tmp_path, name, ways):
        torch.manual_seed(0)
        cases = [replace(s, slices=s.slices[:, ::4, ::4], lung=s.lung[:, ::4, ::4],
                         lesions=tuple(m[:, ::4, ::4] for m in s.lesions)) for s in scans]  # fmt: skip
        if name == "cascade":  # so small, a slice shows fewer pixels of lung than its windows ask for
            cases = scans
        made = task(name, cases, **ways)
        schedule = Schedule(steps=60, learning_rate=1e-2, warm_up=5, average=0.9, every=100)
        training = Trainer(made, schedule, tmp_path, torch.device("cpu"))
        before = np.mean([training.take_step() for _ in range(4)])
        assert training.train([]) < 0.9 * before
        assert 0 <= made.score(training.kept, cases[0]) <= 1

    @pytest.mark.parametrize("lungs", ["lungs", "cascade_lungs"])
    def test_it_becomes_a_model_that_can_be_measured(self, medseg9, tmp_path, lungs):
        for name in (lungs, "cascade"):
            data = yaml.safe_load((recipes.RECIPES / f"{name}.yaml").read_text())
            data["schedule"] = {"steps": 2, "learning_rate": 0.01, "warm_up": 1, "average": 0.5}
            if name == "lungs":
                data["network"], data["options"] = {"widths": [4, 8]}, {"canvas": [48, 64], "batch": 6}
            else:
                data["network"] |= {"width": 0.0625, "decoder": "fpn"}
                data["options"]["batch"] = 4
            if name == "cascade":
                data["lungs"] = str(tmp_path / f"{lungs}.yaml")
            else:
                data["schedule"]["steps"] = 40
            (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(data))
        asked = Run(
            recipe=recipes.load(str(tmp_path / "cascade.yaml")),
            sources={"medseg9": medseg9},
            output=tmp_path / "out",
            validation=("p3",),
            test=("p4",),
            device="cpu",
            threads=1,
        )
        package = packages.read(making.make(asked, Unwatched()))
        assert package.card.system == "cascade"
        assert set(package.files) == {"lungs", "cascade"}
        model = models.load(Analysis(model=str(package.folder), device="cpu"))
        assert model.lungs_grid == run.grid_of(recipes.load(str(tmp_path / f"{lungs}.yaml")))
        left_out = (case for case in DATASETS["medseg9"].read(medseg9) if case.patient == "p4")
        (result,) = evaluation.evaluate(model, left_out, "medseg9")
        assert result.lungs.dice > 0.2
        assert result.lesions is not None
        assert result.found is not None
