"""Training on a tiny made-up copy of the documented data layout."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from triage.errors import ConfigError
from triage.models import weights
from triage.models.networks import MultitaskNet
from triage.training import augment, evaluation
from triage.training.data import Scan, cases, medseg9, read, semiseg50, split
from triage.training.tasks import LungsTask, MultitaskTask
from triage.training.trainer import Schedule, Trainer

NAMES = {1: "p1", 2: "p2", 3: "p2", 4: "p3", 5: "p4"}
DEPTH, SIZE = 26, 96


def write_volume(folder, number, patient):
    """Two dark discs in a bright body; the upper half of the left one is hazy and drawn as lesion."""
    z, y, x = np.meshgrid(np.arange(DEPTH), *(np.linspace(-1, 1, SIZE),) * 2, indexing="ij")
    lung = ((np.abs(x) - 0.4) / 0.3) ** 2 + (y / 0.5) ** 2 < 1
    lesion = lung & (x > 0) & (y < 0) & (z > DEPTH - 8)
    hu = np.where((x / 0.9) ** 2 + (y / 0.8) ** 2 < 1, 40.0, -1000.0)
    hu[lung], hu[lesion] = -850, -450
    hu += np.random.default_rng(number).normal(0, 20, hu.shape)
    gray = ((np.clip(hu, -1400, 200) + 1400) / 1600 * 255).astype(np.uint8)
    np.savez(
        folder / f"medseg9_{number}_{patient}.npz",
        gray=gray, lung=lung.astype(np.uint8), lesion=lesion * np.uint8(2),
        hu_lo=np.float32(-1400), hu_hi=np.float32(200), patient=patient,
    )  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for number, patient in NAMES.items():
        write_volume(folder, number, patient)
    for kind in ("Imgs", "GT"):
        (folder / "semiseg50" / kind).mkdir(parents=True)
    picture = np.full((120, 90), 60, np.uint8)
    picture[20:60, 10:30] = 200
    Image.fromarray(picture).save(folder / "semiseg50" / "Imgs" / "7.jpg", quality=95)
    Image.fromarray((picture > 100) * np.uint8(255)).save(folder / "semiseg50" / "GT" / "7.png")
    return folder


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Networks this small only lose by waiting for a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class SmallLungsTask(LungsTask):
    canvas, batch = (64, 64), 6


class SmallMultitaskTask(MultitaskTask):
    canvas, depth = (48, 64), 6


def trainer(data, output, network="lungs", steps=60, every=100):
    scans = split(read(data), ["p3"], ["p4"]).train
    torch.manual_seed(0)
    task = SmallLungsTask(scans, (4, 8)) if network == "lungs" else SmallMultitaskTask(scans, (4, 8), 8)
    recipe = {"network": network, "widths": "4,8", "hidden": "8", "lesion_threshold": "0.5"}
    schedule = Schedule(steps=steps, learning_rate=1e-2, warm_up=5, average=0.9, every=every)
    return Trainer(task, schedule, recipe, output)


class TestData:
    def test_volumes_are_read_as_inference_prepares_them(self, data):
        scans = medseg9(data)
        assert [s.patient for s in scans] == ["p1", "p2", "p2", "p3", "p4"]
        scan = scans[0]
        assert scan.slices.shape == scan.lung.shape == scan.lesion.shape == (DEPTH, 60, 60)
        assert scan.has_lung
        clear = scan.lung & ~scan.lesion
        assert scan.slices[clear].mean() == pytest.approx(150 / 1300, abs=0.03)
        assert scan.slices[scan.lesion].mean() == pytest.approx(550 / 1300, abs=0.05)

    def test_pictures_stand_upright_and_have_no_lungs(self, data):
        (scan,) = semiseg50(data / "semiseg50")
        assert not scan.has_lung
        _, h, w = scan.slices.shape
        assert (h, w) == (round(145 * 90 / 120), 145)
        rows, columns = torch.nonzero(scan.lesion[0], as_tuple=True)
        assert rows.float().mean() / h == pytest.approx(20 / 90, abs=0.02)
        assert columns.float().mean() / w == pytest.approx(1 - 40 / 120, abs=0.02)
        assert scan.slices[scan.lesion].mean() > scan.slices[~scan.lesion].mean() + 0.2

    def test_a_crop_keeps_all_of_the_lungs(self, data):
        scan = medseg9(data)[0]
        cropped = scan.cropped()
        assert cropped.lung.sum() == scan.lung.sum()
        assert cropped.slices.numel() < scan.slices.numel()

    def test_an_empty_folder_is_told(self, tmp_path):
        with pytest.raises(ConfigError, match="medseg9"):
            read(tmp_path)


def blank(patient, number):
    one = torch.ones(1, 2, 2)
    return Scan(f"{patient}-{number}", patient, one, one > 0, one > 0)


class TestSplit:
    @given(st.lists(st.sampled_from("abcdef"), min_size=1), st.sets(st.sampled_from("abc")), st.data())
    def test_no_patient_is_in_two_parts_and_none_is_lost(self, patients, validation, data):
        scans = [blank(p, k) for k, p in enumerate(patients)]
        validation &= set(patients)
        test = data.draw(st.sets(st.sampled_from("def"))) & set(patients)
        parts = split(scans, sorted(validation), sorted(test))
        groups = [{s.patient for s in part} for part in (parts.train, parts.validation, parts.test)]
        assert groups[1:] == [validation, test]
        assert not groups[0] & (validation | test)
        names = sorted(s.name for part in (parts.train, parts.validation, parts.test) for s in part)
        assert names == sorted(s.name for s in scans)

    def test_a_patient_named_twice_or_not_at_all_is_told(self):
        scans = [blank("p1", 1), blank("p2", 1)]
        with pytest.raises(ConfigError, match="p1"):
            split(scans, ["p1"], ["p1"])
        with pytest.raises(ConfigError, match="p9"):
            split(scans, [], ["p9"])


class TestAugmentation:
    @settings(max_examples=20, deadline=None)
    @given(st.integers(0, 10_000))
    def test_image_and_mask_move_together(self, seed):
        layers = torch.zeros(2, 2, 60, 80)
        layers[:, :, 20:40, 30:60] = 1
        placed = augment.place(layers, (64, 96), np.random.default_rng(seed))
        assert torch.equal(placed[:, 0], placed[:, 1])
        assert 0.5 < placed.sum() / layers.sum() < 1.7

    @settings(max_examples=20, deadline=None)
    @given(st.integers(0, 10_000))
    def test_values_stay_on_the_networks_scale(self, seed):
        rng = np.random.default_rng(seed)
        slices = augment.intensity(torch.rand(3, 1, 20, 20), rng)
        assert slices.min() >= 0
        assert slices.max() <= 1

    @settings(max_examples=20, deadline=None)
    @given(st.integers(0, 10_000))
    def test_painting_makes_lung_denser_never_darker_and_moves_nothing(self, seed):
        slices = torch.zeros(2, 1, 64, 64)
        slices[:, :, 10:50, 5:60] = 0.8
        lung = torch.zeros_like(slices)
        lung[:, :, 20:40, 10:30] = 1
        painted = augment.surroundings(slices, lung, np.random.default_rng(seed))
        assert (painted >= slices)[lung > 0].all()
        assert painted.min() >= 0
        assert painted.max() <= 1


class TestTrainer:
    @pytest.mark.parametrize("network", ["lungs", "multitask"])
    def test_the_loss_falls(self, data, tmp_path, network):
        run = trainer(data, tmp_path, network, steps=100)
        before = run.train([], until=2)
        assert run.train([]) < 0.9 * before

    @pytest.mark.parametrize("network", ["lungs", "multitask"])
    def test_a_resumed_run_is_the_same_run(self, data, tmp_path, network):
        whole = trainer(data, tmp_path / "whole", network, steps=4)
        whole.train([])
        first = trainer(data, tmp_path / "halves", network, steps=4, every=2)
        first.train([], until=2)
        second = trainer(data, tmp_path / "halves", network, steps=4, every=2)
        second.resume()
        assert second.step == 2
        second.train([])
        for name, value in whole.averaged.state_dict().items():
            assert torch.equal(second.averaged.state_dict()[name], value), name

    def test_sub_volumes_are_labelled_by_their_lesions(self, data):
        task = MultitaskTask(split(read(data), [], []).train, (4, 8), 8)
        for label, patients in task.by_label.items():
            assert set(patients) == {"p1", "p2", "p3", "p4"}
            for window in (w for windows in patients.values() for w in windows):
                assert len(window.index) == task.depth
                assert bool(window.scan.lesion[list(window.index)].any()) == bool(label)

    def test_patients_without_clear_slices_cannot_teach_the_classifier(self, data):
        scan = medseg9(data)[0]
        ill = Scan(scan.name, scan.patient, scan.slices, scan.lung, scan.lung)
        with pytest.raises(ConfigError, match="with and without lesions"):
            MultitaskTask([ill], (4, 8), 8)


class TestEvaluation:
    def test_trained_weights_are_judged_patient_by_patient(self, data, tmp_path):
        trainer(data, tmp_path, "lungs").train([])
        trainer(data, tmp_path, "multitask", steps=3).train([])
        scores = evaluation.evaluate(data, tmp_path, ["p4", "p2"])
        assert [(s.name, s.patient) for s in scores] == [
            ("medseg9_2_p2", "p2"), ("medseg9_3_p2", "p2"), ("medseg9_5_p4", "p4"),
        ]  # fmt: skip
        assert all(s.lungs > 0.5 for s in scores)
        drawn = next(c for c in cases(data) if c.patient == "p4")
        assert scores[-1].drawn_fraction == pytest.approx(drawn.lesion.sum() / drawn.lung.sum())
        assert re.search(r"medseg9_5_p4 +p4 +0\.\d{3}", evaluation.table(scores))

        best = evaluation.choose_threshold(data, tmp_path, ["p3"])
        _, recipe = weights.read(tmp_path / "multitask.safetensors", MultitaskNet)
        assert float(recipe["lesion_threshold"]) == best
        assert recipe["widths"] == "4,8"

    def test_from_the_command_line(self, data, tmp_path):
        command = [sys.executable, "-m", "triage.training", "multitask", "--data", data, "--output", tmp_path]
        options = ["--steps", "2", "--threads", "1", "--widths", "4,8", "--validation", "p3", "--test", "p4"]
        done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "medseg9_4_p3" in done.stderr
        _, recipe = weights.read(tmp_path / "multitask.safetensors", MultitaskNet)
        assert (recipe["test"], recipe["steps"]) == ("p4", "2")
        done = subprocess.run([*command, "--test", "p9"], capture_output=True, text=True, check=False)
        assert done.returncode != 0
        assert "p9" in done.stderr
        assert "Traceback" not in done.stderr
