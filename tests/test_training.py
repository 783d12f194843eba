"""Training on a tiny made-up copy of the documented data layout."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from triage import models
from triage.config import Analysis
from triage.errors import ConfigError
from triage.models import packages
from triage.training import augment, evaluation, folds, making, run
from triage.training import recipe as recipes
from triage.training.datasets import DATASETS
from triage.training.run import TASKS, Run
from triage.training.scans import Scan, scan, split
from triage.training.tasks import LungsTask, MultitaskTask, forward
from triage.training.trainer import Schedule, Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = {1: "p1", 2: "p2", 3: "p2", 4: "p3", 5: "p4"}
DEPTH, SIZE = 26, 96
CPU = torch.device("cpu")


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
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for number, patient in NAMES.items():
        write_volume(folder, number, patient)
    for kind in ("Imgs", "GT"):
        (folder / "semiseg50" / kind).mkdir(parents=True)
    picture = np.full((120, 90), 60, np.uint8)
    picture[20:60, 10:30] = 200
    for name in ("7", "9", "10"):
        picture[100, 80] += 20  # each is another one
        Image.fromarray(picture).save(folder / "semiseg50" / "Imgs" / f"{name}.jpg", quality=95)
        mask = Image.fromarray((picture > 100) * np.uint8(255))
        mask.save(folder / "semiseg50" / "GT" / f"{name}.png")
    return {"medseg9": folder, "semiseg": folder / "semiseg50"}


@pytest.fixture(scope="module")
def scans(sources):
    return tuple(scan(case) for kind, path in sources.items() for case in DATASETS[kind].read(path))


def small_recipe(folder, name, **changes):
    """The recipe that ships, made so small that it trains in seconds; written and read back."""
    folder.mkdir(exist_ok=True)
    data = yaml.safe_load((recipes.RECIPES / f"{name}.yaml").read_text())
    data["network"]["widths"] = [4, 8]
    data["options"] = {"canvas": [48, 64]}
    data["schedule"] = {"steps": 3, "learning_rate": 0.01, "warm_up": 2, "average": 0.9, "every": 2}
    if name == "lungs":
        data["options"]["batch"] = 6
        data["schedule"] |= {"steps": 30, "every": 100}
    else:
        data["network"]["hidden"] = 8
        data["options"] |= {"depth": 6, "pictures": 1}
        data["hold_out"] = {"semiseg": 1}
        data["lungs"] = str(folder / "lungs.yaml")
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(data | changes))
    return path


@pytest.fixture
def recipe(tmp_path):
    small_recipe(tmp_path / "recipes", "lungs")
    return recipes.load(str(small_recipe(tmp_path / "recipes", "multitask")))


def trainer(scans, output, network="lungs", **schedule):
    torch.manual_seed(0)
    train = split(scans, ["p3"], ["p4"]).train
    if network == "lungs":
        task = LungsTask(train, (4, 8), canvas=(64, 64), batch=6)
    else:
        task = MultitaskTask(train, (4, 8), 8, canvas=(48, 64), depth=6)
    plan = {"steps": 60, "learning_rate": 1e-2, "warm_up": 5, "average": 0.9, "every": 100, **schedule}
    return Trainer(task, Schedule(**plan), output, CPU)


class TestScans:
    def test_cases_are_read_as_inference_prepares_them(self, scans):
        volumes = [s for s in scans if not s.cropped]
        assert [s.patient for s in volumes] == ["p1", "p2", "p2", "p3", "p4"]
        first = volumes[0]
        (lesion,) = first.lesions
        assert first.slices.shape == first.lung.shape == lesion.shape == (DEPTH, 60, 60)
        clear = (first.lung > 0.5) & (lesion < 0.5)
        assert first.slices[clear].mean() == pytest.approx(150 / 1300, abs=0.03)
        assert first.slices[lesion > 0.5].mean() == pytest.approx(550 / 1300, abs=0.05)

    def test_a_border_through_a_pixel_is_the_share_of_it(self, sources, scans):
        case = next(DATASETS["medseg9"].read(sources["medseg9"]))
        inside = scans[0].lung
        assert ((inside > 0.1) & (inside < 0.9)).any()
        area = case.volume.spacing[1] * case.volume.spacing[2]
        assert float(inside.sum()) * 4 == pytest.approx(case.lung.sum() * area, rel=0.01)

    def test_pictures_have_no_lungs_and_stay_whole(self, scans):
        picture = scans[-1]
        assert picture.cropped
        assert picture.lung is None
        assert picture.to_lungs() is picture

    def test_a_crop_keeps_all_of_the_lungs(self, scans):
        cropped = scans[0].to_lungs()
        assert float(cropped.lung.sum()) == pytest.approx(float(scans[0].lung.sum()), rel=1e-5)
        assert cropped.slices.numel() < scans[0].slices.numel()


def blank(patient, number):
    one = torch.ones(1, 2, 2)
    return Scan(f"{patient}-{number}", patient, one, one, (one,))


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
    @settings(max_examples=20)
    @given(st.integers(0, 10_000))
    def test_image_and_mask_move_together(self, seed):
        layers = torch.zeros(2, 2, 60, 80)
        layers[:, :, 20:40, 30:60] = 1
        placed = augment.place(layers, (64, 96), np.random.default_rng(seed))
        assert torch.equal(placed[:, 0], placed[:, 1])
        assert 0.5 < placed.sum() / layers.sum() < 1.7

    @settings(max_examples=20)
    @given(st.integers(0, 10_000), st.booleans())
    def test_values_stay_on_the_networks_scale(self, seed, picture):
        rng = np.random.default_rng(seed)
        slices = augment.intensity(torch.rand(3, 1, 20, 20), rng, picture)
        assert slices.min() >= 0
        assert slices.max() <= 1

    @settings(max_examples=20)
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

    @settings(max_examples=30)
    @given(st.integers(0, 10_000))
    def test_painted_opacities_are_marked_and_lie_in_the_lungs(self, seed):
        torch.manual_seed(seed)
        slices = torch.full((6, 1, 64, 64), 0.1)
        lung = torch.zeros_like(slices)
        lung[:, :, 10:50, 10:30] = 1
        slices, lesion = augment.opacities(slices, 0 * lung, lung, np.random.default_rng(seed))
        assert not lesion[lung == 0].any()
        assert slices[lung == 0] == pytest.approx(0.1)
        if lesion.any():
            assert slices[lesion > 0.5].mean() > 0.12
        assert slices[lesion < 0.5].mean() < 0.3

    def test_dependent_lung_is_denser_at_the_back_and_nowhere_else(self):
        lung = torch.zeros(3, 1, 64, 64)
        lung[:, :, 10:50, 10:30] = 1
        slices, rises = torch.full_like(lung, 0.1), []
        for seed in range(40):
            torch.manual_seed(seed)
            rise = (augment.dependent(slices, lung, np.random.default_rng(seed)) - slices) / augment.HU
            assert not rise[lung == 0].any()
            assert not rise[:, :, :25].any()
            rises.append(float(rise[:, :, 45:50, 10:30].mean()))
        painted = [rise for rise in rises if rise]
        assert 5 < len(painted) < 30
        assert min(painted) > 5
        assert max(painted) < 140


class TestTrainer:
    @pytest.mark.parametrize("network", ["lungs", "multitask"])
    def test_the_loss_falls(self, scans, tmp_path, network):
        training = trainer(scans, tmp_path, network, steps=50)
        before = np.mean([training.take_step() for _ in range(2)])
        assert training.train([]) < 0.9 * before

    @pytest.mark.parametrize("network", ["lungs", "multitask"])
    def test_a_resumed_run_is_the_same_run(self, scans, tmp_path, network):
        whole = trainer(scans, tmp_path / "whole", network, steps=4)
        whole.train([])
        first = trainer(scans, tmp_path / "halves", network, steps=4)
        first.output.mkdir()
        for _ in range(2):
            first.take_step()
        first.save()
        second = trainer(scans, tmp_path / "halves", network, steps=4)
        second.resume()
        assert second.step == 2
        second.train([])
        for name, value in whole.averaged.state_dict().items():
            assert torch.equal(second.averaged.state_dict()[name], value), name

    def test_training_that_comes_to_grief_stops_before_its_weights_do(self, scans, tmp_path):
        training = trainer(scans, tmp_path)
        training.take_step()
        loss = training.task.loss
        training.task.loss = lambda rng: loss(rng) * torch.inf
        with pytest.raises(ConfigError, match=r"step 1: the gradient is no number; train with a lower sched"):
            training.train([])
        assert training.step == 1
        assert all(value.isfinite().all() for value in training.task.network.state_dict().values())

    @pytest.mark.parametrize(("shape", "precision"), [((2, 8, 8), "bfloat16"), ((2, 8, 8, 8), "float32")])
    def test_volumes_are_learned_in_float32_on_a_processor(self, monkeypatch, shape, precision):
        monkeypatch.setattr("triage.training.tasks.fast_bfloat16", lambda on_gpu: True)
        convolve = torch.nn.Conv2d if len(shape) == 3 else torch.nn.Conv3d
        answer = forward(convolve(2, 4, 3, padding=1), torch.rand(1, *shape))
        assert answer.dtype == getattr(torch, precision)

    def test_training_ends_early_and_keeps_the_best(self, scans, tmp_path):
        validation = split(scans, ["p3"], ["p4"]).validation
        training = trainer(scans, tmp_path, steps=50, every=1, patience=2)
        marks = iter([0.2, 0.9, 0.3, 0.4])
        seen = []
        training.task.score = lambda network, scan: next(marks)
        progress = lambda step: seen.append(  # noqa: E731
            {name: value.clone() for name, value in training.averaged.state_dict().items()}
        )
        training.train(validation, progress)
        assert training.step == 4
        for name, value in training.kept.state_dict().items():
            assert torch.equal(value, seen[1][name])

    def test_a_plateau_lowers_the_rate_and_patience_ends_training(self, scans, tmp_path):
        """Best at the second of the validations; then nothing gained for two, and for two more."""
        schedule = {"steps": 50, "every": 1, "warm_up": 1, "decay": "plateau", "stale": 2, "patience": 4}
        training = trainer(scans, tmp_path, **schedule)
        marks = iter([0.2, 0.9, 0.3, 0.4, 0.5, 0.6])
        training.task.score = lambda network, scan: next(marks)
        rates = []
        training.train(split(scans, ["p3"], []).validation, lambda step: rates.append(training.rate))
        # What each step leaves for the next one.
        assert rates == pytest.approx([1e-2, 1e-2, 1e-2, 2e-3, 2e-3, 4e-4])
        assert training.step == 6

    def test_a_plateau_is_the_same_after_a_stop(self, scans, tmp_path):
        def made(name):
            schedule = {"steps": 6, "every": 1, "warm_up": 1, "decay": "plateau", "stale": 1}
            training = trainer(scans, tmp_path / name, **schedule)
            training.task.score = lambda network, scan: 1 / training.step
            return training

        def stop(step):
            if step == 3:
                raise Stopped

        validation = split(scans, ["p3"], []).validation
        whole, first, second = made("whole"), made("halves"), made("halves")
        whole.train(validation)
        with pytest.raises(Stopped):
            first.train(validation, stop)
        second.resume()
        assert (second.step, second.lowered) == (3, 2)
        second.train(validation)
        assert second.lowered == whole.lowered == 5
        for name, value in whole.averaged.state_dict().items():
            assert torch.equal(second.averaged.state_dict()[name], value), name

    def test_a_plateau_without_anything_to_score_is_told(self, scans, tmp_path):
        training = trainer(scans, tmp_path, every=1, decay="plateau")
        with pytest.raises(ConfigError, match="no validation case"):
            training.train([s for s in scans if s.cropped])

    def test_a_checkpoint_from_before_there_were_plateaus_goes_on(self, scans, tmp_path):
        training = trainer(scans, tmp_path, steps=2)
        training.take_step()
        training.save()
        state = torch.load(training.checkpoint, weights_only=True)
        del state["lowered"]
        torch.save(state, training.checkpoint)
        training = trainer(scans, tmp_path, steps=2)
        training.resume()
        assert (training.step, training.lowered) == (1, 0)

    def test_the_log_can_be_read_by_tensorboard(self, scans, tmp_path):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        validation = split(scans, ["p3"], ["p4"]).validation
        trainer(scans, tmp_path, steps=3, every=3).train(validation)
        log = EventAccumulator(str(tmp_path / "log")).Reload()
        assert [event.step for event in log.Scalars("loss")] == [1, 2, 3]
        assert "validation/medseg9_4_p3" in log.Tags()["scalars"]

    def test_sub_volumes_are_labelled_by_their_lesions(self, scans):
        task = MultitaskTask(scans, (4, 8), 8)
        for label, patients in task.windows.by_label.items():
            assert set(patients) == {"p1", "p2", "p3", "p4"}
            for window in (w for windows in patients.values() for w in windows):
                assert len(window.index) == task.windows.depth
                assert bool((window.scan.lesions[0][list(window.index)] > 0.5).any()) == bool(label)

    def test_patients_without_clear_slices_cannot_teach_the_classifier(self, scans):
        ill = replace(scans[0], lesions=(scans[0].lung,))
        with pytest.raises(ConfigError, match="with and without lesions"):
            MultitaskTask([ill], (4, 8), 8)


class TestSchedule:
    @pytest.mark.parametrize(
        ("schedule", "rates"),
        [
            ({}, [0.25, 0.5, 0.75, 1 - 0.49 * (1 - np.cos(0.3 * np.pi)), 0.51, 0.02]),
            ({"decay": "constant"}, [0.25, 0.5, 0.75, 1, 1, 1]),
            ({"decay": "exponential"}, [0.25, 0.5, 0.75 * 0.95, 0.95, 0.95**2, 0.95**5]),
            ({"decay": "exponential", "factor": 0.5}, [0.25, 0.5, 0.75 / 2, 0.5, 0.25, 1 / 32]),
        ],
    )
    def test_a_rate_is_warmed_up_and_lowered(self, schedule, rates):
        made = Schedule(steps=10, learning_rate=1.0, warm_up=4, every=2, **schedule)
        warm = [made.rate(step) for step in (0, 1, 2, 3, 5, 10)]
        if not schedule:
            rates[:3] = [k / 4 * (0.51 + 0.49 * np.cos((k - 1) / 10 * np.pi)) for k in (1, 2, 3)]
        assert warm == pytest.approx(rates)

    @pytest.mark.parametrize(
        ("schedule", "words"),
        [
            ({"factor": 0.5}, "factor is for decay plateau or exponential"),
            ({"decay": "plateau", "patience": 5}, "patience 5 ends training before"),
            ({"decay": "plateau", "factor": 1.0}, "less than 1"),
            ({"decay": "linear"}, "'cosine', 'plateau', 'exponential' or 'constant'"),
        ],
    )
    def test_nonsense_is_told(self, tmp_path, schedule, words):
        path = small_recipe(tmp_path, "lungs", schedule={"steps": 3, **schedule})
        with pytest.raises(ConfigError, match=words):
            recipes.load(str(path))


class TestRecipes:
    @pytest.mark.parametrize("name", recipes.names())
    def test_every_recipe_names_what_there_is(self, name):
        recipe = recipes.load(name)
        assert recipe.name == name
        assert recipe.task in {**TASKS, **run.SEARCHES}
        assert set(recipe.data) <= set(DATASETS)
        assert recipe.system is None or recipe.system in models.SYSTEMS
        assert recipe.lungs is None or recipe.lungs in recipes.names()

    def test_a_wrong_recipe_names_the_key(self, tmp_path):
        path = small_recipe(tmp_path, "lungs", colour="red")
        with pytest.raises(ConfigError, match="colour"):
            recipes.load(str(path))
        with pytest.raises(ConfigError, match="multitask"):
            recipes.load("nothing")
        path = small_recipe(tmp_path, "lungs", schedule={"steps": 0})
        with pytest.raises(ConfigError, match=r"schedule\.steps"):
            recipes.load(str(path))
        path = small_recipe(tmp_path, "lungs", hold_out={"semiseg": 3})
        with pytest.raises(ConfigError, match="semiseg"):
            recipes.load(str(path))
        path = small_recipe(tmp_path, "lungs", options={"batch": 0})
        with pytest.raises(ConfigError, match=r"options\.batch = 0: at least 1"):
            recipes.load(str(path))
        path = small_recipe(tmp_path, "lungs", variants={"short": {"schedule": {"steps": 0}}})
        with pytest.raises(ConfigError, match=r"variants\.short: schedule\.steps"):
            recipes.load(str(path))


class Stopped(Exception):
    pass


class TestMaking:
    def test_a_run_that_was_stopped_goes_on(self, sources, tmp_path, recipe):
        whole = Run(
            recipe=recipe, sources=sources, output=tmp_path / "whole", test=("p4",), device="cpu", threads=1
        )
        run.train(whole)

        def stop(recipe):
            def told(step):
                if (recipe.name, step) == ("multitask", 2):
                    raise Stopped

            return told

        halves = replace(whole, output=tmp_path / "halves")
        with pytest.raises(Stopped):
            run.train(halves, stop)
        assert not (halves.output / "multitask" / "multitask.safetensors").exists()
        steps = []
        run.train(halves, lambda recipe: steps.append)
        assert steps == [3]
        for part in ("lungs", "multitask"):
            one, other = (load_file(r.output / part / f"{part}.safetensors") for r in (whole, halves))
            assert all(torch.equal(one[name], other[name]) for name in one | other)

    def test_what_earlier_versions_made_is_known_again(self, sources, tmp_path):
        """``made.json`` as it was before a schedule could say how the learning rate falls."""
        folder = tmp_path / "out" / "lungs"
        folder.mkdir(parents=True)
        made = """{"task": "lungs", "network": {"widths": [4, 8], "inputs": 3},
            "options": {"canvas": [48, 64], "batch": 6}, "data": ["medseg9"], "also": [], "hold_out": {},
            "schedule": {"steps": 30, "learning_rate": 0.01, "warm_up": 2, "weight_decay": 0.0001,
                "average": 0.9, "every": 100, "patience": 0, "seed": 1},
            "validation": [], "test": ["p4"], "scans": {"medseg9": {"scans": 4, "patients": 3}}}"""
        (folder / "made.json").write_text(made)
        (folder / "lungs.safetensors").write_bytes(b"finished")
        recipe = recipes.load(str(small_recipe(tmp_path / "recipes", "lungs")))
        asked = Run(recipe=recipe, sources=sources, output=tmp_path / "out", test=("p4",))
        assert run.train(asked) == folder
        plan = {**json.loads(made)["schedule"], "decay": "constant"}
        other = recipes.load(str(small_recipe(tmp_path / "recipes", "lungs", schedule=plan)))
        with pytest.raises(ConfigError, match="choose another --output"):
            run.train(replace(asked, recipe=other))

    def test_a_plateau_needs_somebody_who_validates(self, sources, tmp_path):
        plan = {"steps": 3, "every": 1, "decay": "plateau"}
        recipe = recipes.load(str(small_recipe(tmp_path / "recipes", "lungs", schedule=plan)))
        asked = Run(recipe=recipe, sources=sources, output=tmp_path / "out", device="cpu", threads=1)
        with pytest.raises(ConfigError, match="give --validation, --folds or --leave-one-out"):
            run.train(asked)
        assert not asked.output.exists()
        run.train(replace(asked, validation=("p4",)))

    @pytest.mark.parametrize("change", ["test", "validation", "recipe"])
    def test_what_was_made_otherwise_is_never_taken_for_this(self, sources, tmp_path, recipe, change):
        first = Run(
            recipe=recipe, sources=sources, output=tmp_path / "out", test=("p4",), device="cpu", threads=1
        )
        run.train(first)
        other = recipe.model_copy(update={"network": {**recipe.network, "hidden": 9}})
        changes = {
            "test": {"test": ("p3",)},
            "validation": {"validation": ("p3",)},
            "recipe": {"recipe": other},
        }
        with pytest.raises(ConfigError, match="choose another --output"):
            run.train(replace(first, **changes[change]))

    def test_each_patient_is_judged_by_networks_that_never_saw_that_patient(
        self, sources, tmp_path, recipe, monkeypatch
    ):
        """In this process, so that what every network learned from can be seen."""
        seen = {}
        make_task = run._task

        def spy(recipe, parts):
            seen.setdefault(frozenset(s.patient for s in parts.train), []).append(recipe.name)
            return make_task(recipe, parts)

        monkeypatch.setattr(run, "_task", spy)
        monkeypatch.setattr(making, "ProcessPoolExecutor", lambda *_: InThisProcess())
        folder = making.make(
            Run(recipe=recipe, sources=sources, output=tmp_path / "out", device="cpu", threads=1),
            Unwatched(),
            folds.ONE_EACH,
        )
        pictures = {"semiseg_7", "semiseg_9"}  # the last one, 10, is held out
        everybody = {"p1", "p2", "p3", "p4"}
        assert seen == {
            frozenset({*everybody, *pictures} - left): ["lungs", "multitask"]
            for left in ({"p1"}, {"p2"}, {"p3"}, {"p4"}, set())
        }
        package = packages.read(folder)
        assert {m.patients for m in package.card.metrics if m.name == "Lungs, Dice"} == {4}
        assert all(f"| {patient} |" in package.text for patient in everybody)
        model = models.load(Analysis(model=str(folder), device="cpu", threads=1))
        assert model.settings["lesion_threshold"] == package.card.lesion_threshold
        assert package.card.training_data[0].startswith("medseg9: 5 cases of 4 patients")
        assert package.card.training_data[1].startswith("semiseg: 2 cases of unknown patients")
        known = {m.name: m.patients for m in package.card.metrics}
        assert known["Pictures, lesion Dice at the fixed threshold"] is None

    def test_a_patient_has_no_part_in_the_choice_of_the_threshold(self, tmp_path, recipe, monkeypatch):
        """p1 would choose 0.3; the others choose 0.7."""
        liked = {"p1": 0.3, "p2": 0.7, "p3": 0.7}
        monkeypatch.setattr(making, "ProcessPoolExecutor", lambda *_: InThisProcess())
        monkeypatch.setattr(making, "_train_and_judge", lambda fold: [fold.test[0]])
        monkeypatch.setattr(making, "_judge_left_out", lambda fold, threshold: [])
        monkeypatch.setattr(making, "choose", lambda recipe, scores: max(liked[s] for s in scores))
        asked = Run(recipe=recipe, sources={}, output=tmp_path)
        planned = folds.deal([*liked], 3, seed=1)
        parts = making.cross_validate(asked, planned, 1, Unwatched())
        assert {p.patients: p.lesion_threshold for p in parts} == {("p1",): 0.7, ("p2",): 0.7, ("p3",): 0.7}
        liked |= {"p1": 0.9}
        parts = making.cross_validate(asked, planned, 1, Unwatched())
        assert {p.patients: p.lesion_threshold for p in parts} == {("p1",): 0.7, ("p2",): 0.9, ("p3",): 0.9}

    def test_from_the_command_line(self, sources, tmp_path, recipe):
        options = [f"--data={kind}={path}" for kind, path in sources.items()]
        path = tmp_path / "recipes" / "multitask.yaml"
        command = [
            sys.executable,
            "-m",
            "triage",
            "train",
            path,
            *options,
            "--device",
            "cpu",
            "--threads",
            "1",
        ]
        more = ["--output", tmp_path / "out", "--validation", "p3", "--test", "p4"]
        done = subprocess.run([*command, *more], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        package = packages.read(tmp_path / "out" / making.MODEL)
        assert package.card.splits == {"validation": "p3, last 1 of semiseg", "test": "p4"}
        assert package.card.lesion_threshold in making.THRESHOLDS
        answer = evaluation.run(Analysis(model=str(package.folder), device="cpu", threads=1), sources)
        learned = {"medseg9_1_p1", "medseg9_2_p2", "medseg9_3_p2", "semiseg_7", "semiseg_9"}
        assert set(answer.trained_on) == learned  # not p3, p4 and semiseg_10
        assert "Goncharov" not in package.text  # what is said of our weights is not said of others
        done = subprocess.run(
            [*command, *more, "--leave-one-out"], capture_output=True, text=True, check=False
        )
        assert done.returncode == os.EX_CONFIG
        assert "give neither" in done.stderr

    def test_what_is_missing_is_told(self, sources, tmp_path, recipe):
        asked = Run(recipe=recipe, sources={"medseg9": sources["medseg9"]}, output=tmp_path)
        with pytest.raises(ConfigError, match="--data semiseg=PATH"):
            run.train(asked)
        with pytest.raises(ConfigError, match="p9"):
            run.train(replace(asked, sources=sources, test=("p9",)))
        with pytest.raises(ConfigError, match="lunngs"):
            making.make(replace(asked, recipe=recipe.model_copy(update={"task": "lunngs"})), Unwatched())
        bare = recipe.model_copy(update={"card": {"limits": ["some"]}})
        with pytest.raises(ConfigError, match=r"recipe multitask: licence: missing"):
            making.make(replace(asked, recipe=bare), Unwatched())
        with pytest.raises(ConfigError, match="system 'mulitask' is unknown"):
            making.make(replace(asked, recipe=recipe.model_copy(update={"system": "mulitask"})), Unwatched())
        with pytest.raises(ConfigError, match="part of a model"):
            making.make(replace(asked, recipe=recipes.load("lungs")), Unwatched(), folds.ONE_EACH)
        wrong = recipe.model_copy(update={"options": {"colour": "red"}})
        with pytest.raises(ConfigError, match="colour"):
            run.train(replace(asked, sources=sources, recipe=wrong))


class InThisProcess:
    """Instead of a pool of processes."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def map(self, function, *arguments):
        return list(map(function, *arguments))


class Unwatched:
    """Instead of progress bars."""

    def network(self, recipe):
        return lambda step: None

    def folds(self, parts, total):
        return list(parts)
