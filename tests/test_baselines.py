"""The baselines keep the contract of every network, and do what the paper says of them."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from tests import test_models
from tests.test_models import loaded, phantom
from triage import models
from triage.config import Analysis
from triage.domain import Volume
from triage.errors import ConfigError
from triage.models import compute, packages, resnet50, threshold, unet2d, unet3d, weights
from triage.models.networks import PAPER_WIDTHS, MultitaskNet
from triage.models.preprocessing import pad, prepare

NETWORKS = {
    "unet2d": ("lesions", {"network": "unet2d", "widths": "4,8,16"}),
    "unet2d_plus": ("lesions", {"network": "unet2d", "widths": "4,8,16"}),
    "unet3d": ("lesions", {"network": "unet3d", "widths": "4,8,16"}),
    "resnet50": ("classifier", {"network": "resnet50", "widths": "4,4,8,8", "hidden": "16"}),
}
"""System → role of its network's file and a tiny variant of it."""


def card(system, **changes):
    return {
        "name": system,
        "system": system,
        "summary": "a baseline with made-up weights",
        "lungs": "multitask",
        "lesion_threshold": 0.5,
        "training_data": ["none"],
        "licence": "research use only",
        "limits": ["made-up weights"],
        **changes,
    }


def untrained(recipe):
    """Random weights, shifted so that a network of lesions calls about half of a phantom lesion."""
    torch.manual_seed(3)
    network = weights.build(recipe).eval().requires_grad_(False)
    if recipe["network"] != "resnet50":
        slices = pad(prepare(phantom())[:8], 4)
        logits = network(slices[:, None] if recipe["network"] == "unet2d" else slices[None, None])
        last = [part for part in network.modules() if isinstance(part, torch.nn.Conv2d | torch.nn.Conv3d)][-1]
        last.bias -= logits.median()
    return network


@pytest.fixture(scope="session")
def package_folders(tmp_path_factory):
    """Every baseline as a package in a folder of its own."""
    root = tmp_path_factory.mktemp("baselines")
    packages.write(root / "threshold", card("threshold", parameters={"sigma_mm": 4.0}), {})
    for system, (role, recipe) in NETWORKS.items():
        file = root / f"{system}.safetensors"
        weights.save(untrained(recipe), recipe, file)
        packages.write(root / system, card(system), {role: file})
    return root


@pytest.fixture(params=["threshold", *NETWORKS])
def place(request, package_folders):
    return str(package_folders / request.param)


@pytest.fixture
def model(place):
    return loaded(place)


class TestBaselines(test_models.TestContract):
    """Every baseline keeps the contract."""

    def test_is_built_by_its_own_system(self, place, model):
        assert model.info == packages.read(packages.find(place)).info


class TestSizes:
    """The paper's full size can be built; what ships is narrower (published counts; see each module)."""

    def test_unet2d_is_the_multitask_network_without_its_classifier(self):
        multitask, alone = MultitaskNet().state_dict(), unet2d.LesionsNet().state_dict()
        shared = {name: value.shape for name, value in multitask.items() if "classifier" not in name}
        assert {name: value.shape for name, value in alone.items()} == shared

    def test_resnet50_has_the_published_size(self):
        """25,557,032 weights (He et al., 2016; torchvision), less the last layer and two of three inputs."""
        features = resnet50.SliceClassifier().features
        count = sum(weight.numel() for weight in features.parameters())
        assert count == 25_557_032 - (2048 * 1000 + 1000) - 2 * 64 * 7 * 7
        assert features(torch.rand(2, 1, 64, 80)).shape == (2, 2048)

    def test_unet3d_has_the_levels_of_the_2d_network(self):
        network = unet3d.VolumeNet()
        assert network.stride == 64
        assert unet3d.VolumeNet((4, 8, 16)).eval()(torch.rand(1, 1, 4, 8, 12)).shape == (1, 1, 4, 8, 12)
        assert network.unet.channels == PAPER_WIDTHS


class TestThreshold:
    SPACING = (4.0, 2.0, 2.0)

    def find(self, dense, sigma_mm, lung=None):
        """HU 40 where dense, -850 elsewhere."""
        slices = torch.from_numpy(np.where(dense, (40 + 1000) / 1300, 150 / 1300)).float()
        return threshold.find(slices, np.ones_like(dense) if lung is None else lung, self.SPACING, sigma_mm)

    def test_dense_tissue_inside_the_lungs_is_lesion(self):
        dense = np.zeros((12, 40, 40), bool)
        dense[3:9, 10:25, 10:25] = True
        lung = np.ones_like(dense)
        lung[:, :, 20:] = False
        np.testing.assert_array_equal(self.find(dense, 0.0, lung) > 0.5, dense & lung)

    @pytest.mark.parametrize(("hu", "lesion"), [(-710, False), (-690, True), (290, True), (310, False)])
    def test_what_counts_as_dense_lies_between_air_and_bone(self, hu, lesion):
        volume = Volume(np.full((3, 20, 20), hu, np.int16), (2.0, 2.0, 2.0))
        lung = np.ones(volume.array.shape, bool)
        assert (threshold.find(prepare(volume), lung, volume.spacing, 0.0) > 0.5).all() == lesion

    def test_blur_is_in_millimetres_and_takes_vessels_away(self):
        dense = np.zeros((12, 60, 60), bool)
        dense[:, 30, 30] = True  # a vessel along z, 2 mm wide
        dense[:, 5:20, 5:20] = True
        found = self.find(dense, 3.0) > 0.5
        assert not found[:, 25:, 25:].any()
        assert found[4:8, 8:17, 8:17].all()
        expected = ndimage.gaussian_filter(dense.astype(np.float32), (0.75, 1.5, 1.5), truncate=3)
        np.testing.assert_allclose(self.find(dense, 3.0), np.where(expected > 0, expected, 0), atol=1e-6)

    def test_components_below_a_thousandth_of_the_lungs_are_dropped(self):
        dense = np.zeros((10, 50, 40), bool)  # 20,000 voxels of lung: 20 are the limit
        dense[2, 10, 10:29] = True
        dense[6, 30, 10:30] = True
        found = self.find(dense, 0.0) > 0.5
        assert not found[2].any()
        assert found[6].sum() == 20

    def test_a_card_without_sigma_is_refused(self, tmp_path):
        for parameters in ({}, {"sigma_mm": -1.0}, {"sigma_mm": "four"}):
            packages.write(tmp_path / "t", card("threshold", parameters=parameters), {})
            with pytest.raises(ConfigError, match="sigma_mm"):
                models.load(Analysis(model=str(tmp_path / "t")))

    def test_a_hazy_lung_is_more_affected_than_a_clear_one(self, package_folders):
        model = loaded(str(package_folders / "threshold"))
        hazy, clear = model.predict(phantom()), model.predict(phantom(lesion=False))
        assert hazy.lesion_mask.sum() > 5 * clear.lesion_mask.sum()


class TestUnet3d:
    def test_windows_agree_with_the_whole_volume_away_from_their_ends(self):
        """Slices whose surroundings lie within one window get what the whole volume at once would give."""
        torch.manual_seed(0)
        network = untrained({"network": "unet3d", "widths": "4,8"}).eval().requires_grad_(False)
        running = compute.choose(Analysis(device="cpu", precision="float32", threads=2))
        slices = torch.rand(80, 16, 24)
        with running.running():
            found = unet3d.window_by_window(network, running)(slices)
            whole = network(slices[None, None])[0, 0].sigmoid()
        assert found.shape == slices.shape
        torch.testing.assert_close(found, whole, atol=0.05, rtol=0)
        torch.testing.assert_close(found[:12], whole[:12], atol=1e-5, rtol=0)


class TestResnet50:
    def test_the_order_of_batches_and_their_size_do_not_matter(self, monkeypatch, package_folders):
        model = loaded(str(package_folders / "resnet50"))
        whole = model.predict(phantom()).probability
        monkeypatch.setattr(resnet50, "BATCH", 3)
        assert model.predict(phantom()).probability == pytest.approx(whole, abs=1e-5)

    def test_one_telling_slice_can_decide_wherever_it_is(self):
        """Maxima over the slices: what one slice shows is not averaged away by the others."""
        torch.manual_seed(0)
        network = resnet50.SliceClassifier((4, 4, 8, 8), 16).eval()
        quiet = torch.zeros(40, 32)
        for slice_index in (0, 20, 39):
            loud = quiet.clone()
            loud[slice_index] = 5.0
            assert network.classify(loud) != network.classify(quiet)


def test_made_up_weights_are_no_empty_case(package_folders):
    """Else the contract's comparisons of masks would compare nothing."""
    for name in ("threshold", "unet2d", "unet3d"):
        findings = loaded(str(package_folders / name)).predict(phantom())
        assert 0.01 < findings.lesion_mask.sum() / findings.lung_mask.sum() < 0.99, name
