"""The baselines keep the contract of every network, and do what the paper says of them."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from rich.progress import Progress
from scipy import ndimage

from tests import test_models
from tests.test_datasets import metaimage, nifti
from tests.test_models import loaded, phantom
from tests.test_training import write_volume
from triage import models
from triage.config import Analysis
from triage.domain import Volume
from triage.errors import ConfigError
from triage.models import compute, packages, resnet50, threshold, unet2d, unet3d, weights
from triage.models.networks import PAPER_WIDTHS, MultitaskNet
from triage.models.preprocessing import pad, prepare
from triage.training import baselines, evaluation, making, run
from triage.training import recipe as recipes
from triage.training.cases import Case
from triage.training.datasets import DATASETS
from triage.training.run import Run
from triage.training.scans import scan
from triage.training.trainer import Schedule, Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

NETWORKS = {
    "unet2d": {"widths": "4,8,16"},
    "unet2d_plus": {"widths": "4,8,16"},
    "unet3d": {"widths": "4,8,16"},
    "resnet50": {"widths": "4,4,8,8", "hidden": "16"},
}
"""System → a tiny variant of its network."""


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
        logits = network(slices[None, None] if recipe["network"] == "unet3d" else slices[:, None])
        last = [part for part in network.modules() if isinstance(part, torch.nn.Conv2d | torch.nn.Conv3d)][-1]
        last.bias -= logits.median()
    return network


@pytest.fixture(scope="session")
def package_folders(tmp_path_factory):
    """Every baseline as a package in a folder of its own."""
    root = tmp_path_factory.mktemp("baselines")
    packages.write(root / "threshold", card("threshold", parameters={"sigma_mm": 4.0}), {})
    for system, size in NETWORKS.items():
        recipe = {"network": system, **size}
        file = root / f"{system}.safetensors"
        weights.save(untrained(recipe), recipe, file)
        packages.write(root / system, card(system), {system: file})
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


SMALL = (24, 110, 130)
SMALL_SPACING = (6.0, 2.8, 2.8)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Made-up data: COVID-19 volumes with masks, others with lungs, and graded ones without any mask."""
    root = tmp_path_factory.mktemp("data")
    for kind in ("medseg9", "luna16", "mosmed"):
        (root / kind).mkdir()
    for number, patient in enumerate(("p1", "p2", "p3", "p4")):
        write_volume(root / "medseg9", number, patient)
    clear = phantom(SMALL, (3.0, 2.0, 1.0), lesion=False).array
    metaimage(root / "luna16" / "subset0" / "1.2.3.mhd", clear)
    metaimage(
        root / "luna16" / "seg-lungs-LUNA16" / "1.2.3.mhd", np.where(lungs_of(clear), 3, 0).astype("u1")
    )
    for number, (grade, lesion) in enumerate((("CT-0", False), ("CT-0", False), ("CT-2", True))):
        volume = phantom(SMALL, SMALL_SPACING, lesion=lesion)
        path = root / "mosmed" / "studies" / grade / f"study_{number:04}.nii.gz"
        nifti(path, volume.array, spacing=SMALL_SPACING)
        if lesion:
            mask = root / "mosmed" / "masks" / f"study_{number:04}_mask.nii.gz"
            nifti(mask, (volume.array > -600) & (volume.array < -300), spacing=SMALL_SPACING)
    return {kind: root / kind for kind in ("medseg9", "luna16", "mosmed")}


def lungs_of(array):
    """Air that is shut in by the chest."""
    labels, _ = ndimage.label(array < -500)
    return (labels > 0) & (labels != labels[0, 0, 0])


def small(folder, name):
    """The recipe that ships, made so small that it trains in a second."""
    for each in ("lungs", name):
        data = yaml.safe_load((recipes.RECIPES / f"{each}.yaml").read_text())
        data["schedule"] = {"steps": 2, "learning_rate": 0.01, "warm_up": 1, "average": 0.5}
        if each == "lungs":
            data["network"], data["options"] = {"widths": [4, 8]}, {"canvas": [48, 64], "batch": 6}
            data["schedule"]["steps"] = 40
        else:
            data["lungs"] = str(folder / "lungs.yaml")
            if each != "threshold":
                data["network"]["widths"] = [4, 8] if each != "resnet50" else [4, 4, 8, 8]
                data["options"] = {"canvas": [48, 64], **({"depth": 6} if each != "resnet50" else {})}
        (folder / f"{each}.yaml").write_text(yaml.safe_dump(data))
    return recipes.load(str(folder / f"{name}.yaml"))


def given(sources, *kinds):
    return {kind: sources[kind] for kind in kinds}


class TestTraining:
    @pytest.mark.parametrize(
        ("name", "kinds"),
        [
            ("threshold", ("medseg9",)),
            ("unet2d", ("medseg9",)),
            ("unet2d_plus", ("medseg9", "luna16", "mosmed")),
            ("unet3d", ("medseg9",)),
            ("resnet50", ("medseg9", "mosmed")),
        ],
    )
    def test_each_becomes_a_model_that_can_be_measured(self, sources, tmp_path, name, kinds):
        asked = Run(
            recipe=small(tmp_path, name),
            sources=given(sources, *kinds),
            output=tmp_path / "out",
            validation=("p3",),
            test=("p4",),
            device="cpu",
            threads=1,
        )
        with Progress(disable=True) as bars:
            package = packages.read(making.make(asked, making.Watch(bars)))
        assert package.card.system == name
        assert set(package.files) == {"lungs"} | ({name} if name != "threshold" else set())
        model = models.load(Analysis(model=str(package.folder), device="cpu"))
        left_out = (case for case in DATASETS["medseg9"].read(sources["medseg9"]) if case.patient == "p4")
        (score,) = evaluation.evaluate(model, left_out, "medseg9")
        assert score.lungs.dice > 0.2
        assert (score.lesions is None) == (name == "resnet50")
        assert (score.found is None) == (name == "resnet50")

    @pytest.mark.parametrize("name", ["unet2d_plus", "resnet50"])
    def test_what_the_data_cannot_teach_is_told_before_anything_is_trained(self, sources, tmp_path, name):
        asked = Run(recipe=small(tmp_path, name), sources=given(sources, "medseg9"), output=tmp_path / "out")
        with pytest.raises(ConfigError, match=r"^not measurable here: .*without.* --data"):
            run.train(asked)
        assert not asked.output.exists()

    def test_the_command_says_so_in_one_line(self, sources, tmp_path):
        command = [sys.executable, "-m", "triage", "train", "unet2d_plus", "--output", tmp_path / "out"]
        data = [f"--data=medseg9={sources['medseg9']}"]
        done = subprocess.run([*command, *data], capture_output=True, text=True, check=False)
        assert done.returncode != 0
        assert "not measurable here" in done.stderr
        assert "Traceback" not in done.stderr

    @pytest.mark.parametrize("task", ["unet2d", "unet3d", "resnet50"])
    def test_the_loss_falls(self, sources, tmp_path, task):
        torch.manual_seed(0)
        scans = [scan(case) for kind, path in sources.items() for case in DATASETS[kind].read(path)]
        if task == "resnet50":  # but for its patch the ill one looks like the others: too hard for a minute
            scans = [s for s in scans if s.name != "study_0002"]
        network = {"widths": (4, 4, 8, 8), "hidden": 32} if task == "resnet50" else {"widths": (4, 8)}
        options = {"canvas": (64, 64)} | ({"slices": 8} if task == "resnet50" else {"depth": 6})
        made = run.TASKS[task](scans, **network, **options)
        for part in made.network.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.0  # the noise of dropout is larger than what so few steps gain
        schedule = Schedule(steps=60, learning_rate=3e-3, warm_up=5, average=0.9, every=100)
        training = Trainer(made, schedule, tmp_path, torch.device("cpu"))
        before = np.mean([training.take_step() for _ in range(4)])
        assert training.train([]) < 0.9 * before
        marks = [made.score(training.kept, s) for s in scans]
        assert all(mark is None or 0 <= mark <= 1 for mark in marks)
        assert any(mark is not None for mark in marks)

    def test_other_patients_count_as_free_of_lesions_and_need_no_mask(self, sources):
        scans = [scan(case) for kind, path in sources.items() for case in DATASETS[kind].read(path)]
        windows = baselines.Unet2dPlusTask(scans, (4, 8), depth=6).windows.by_label
        others = {s.patient for s in scans if s.diagnosis in baselines.WITHOUT_COVID}
        assert len(others) == 3
        assert others <= set(windows[0])
        assert not others & set(windows[1])

    def test_lungs_that_nobody_marked_are_found(self, sources):
        (first, *_) = [scan(case) for case in DATASETS["mosmed"].read(sources["mosmed"])]
        assert first.lung is None
        nothing = replace(first, slices=torch.zeros_like(first.slices))
        (found,) = baselines.with_lungs([first, nothing])
        truth = torch.from_numpy(lungs_of((first.slices * 1300 - 1000).numpy()))
        both = ((found.lung > 0.5) & truth).sum()
        assert 2 * both / ((found.lung > 0.5).sum() + truth.sum()) > 0.8


class TestBlur:
    @staticmethod
    def case(patient, vessels):
        array = np.full((12, 80, 80), -850, np.int16)
        lesion = np.zeros(array.shape, bool)
        lesion[3:9, 10:34, 10:34] = True
        array[lesion] = -300
        if vessels:
            array[:, 44::8, 5:75] = 40
        lung = np.ones(array.shape, bool)
        volume = Volume(array, (2.0, 2.0, 2.0))
        return Case(name=patient, patient=patient, volume=volume, lung=lung, lesions=(lesion,))

    def test_the_blur_of_the_best_dice_is_chosen(self):
        assert baselines.best_blur([self.case("a", vessels=False)], (0, 2, 8)) == {"sigma_mm": 0.0}
        assert baselines.best_blur([self.case("a", vessels=True)], (0, 2, 30)) == {"sigma_mm": 2.0}

    def test_patients_who_are_held_out_have_no_say(self, sources, tmp_path, monkeypatch):
        asked = Run(
            recipe=small(tmp_path, "threshold"),
            sources=given(sources, "medseg9"),
            output=tmp_path / "out",
            validation=("p3",),
            test=("p4",),
            device="cpu",
            threads=1,
        )
        seen = []
        monkeypatch.setitem(
            run.SEARCHES, "threshold", lambda cases, **_: seen.extend(cases) or {"sigma_mm": 1}
        )
        run.train(asked)
        assert {case.patient for case in seen} == {"p1", "p2"}

    def test_without_drawings_nothing_can_be_chosen(self):
        with pytest.raises(ConfigError, match="not measurable here"):
            baselines.best_blur([replace(self.case("a", vessels=False), lesions=())], (0, 2))


@pytest.mark.parametrize("name", ["unet2d", "unet2d_plus", "unet3d", "resnet50"])
def test_the_variants_that_recipes_train_are_small(name, tmp_path):
    shape = recipes.load(name).network
    size = {key: ",".join(map(str, v)) if isinstance(v, list) else str(v) for key, v in shape.items()}
    weights.save(weights.build({"network": name, **size}), {}, tmp_path / "w.safetensors")
    assert (tmp_path / "w.safetensors").stat().st_size <= 15e6
