"""Cross-validation by patient: who is tested where, and what a file of folds may say."""

import json
import shutil
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from tests.test_training import InThisProcess, Unwatched, recipe, small_recipe, sources  # noqa: F401
from triage.cli import app
from triage.errors import ConfigError
from triage.models import packages
from triage.training import folds, making, run
from triage.training import recipe as recipes
from triage.training.run import Run

PATIENTS = ["p1", "p2", "p3", "p4", "p5", "p6", "p7"]
pytestmark = pytest.mark.usefixtures("one_thread")


class TestDealing:
    @given(st.integers(3, 40), st.integers(2, 50), st.integers(0, 9), st.floats(0.05, 0.9))
    def test_each_patient_is_tested_once_and_never_learned_from_there(self, people, count, seed, share):
        patients = [f"p{k}" for k in range(people)]
        dealt = folds.with_validation(folds.deal(patients, count, seed), patients, share, seed)
        tested = [patient for test in dealt.tested for patient in test]
        assert sorted(tested) == sorted(patients)
        assert len(dealt.folds) == min(count, people)
        sizes = [len(test) for test in dealt.tested]
        assert max(sizes) - min(sizes) <= 1
        for fold in (*dealt.folds, folds.Fold.model_construct(test=(), validation=dealt.validation)):
            others = people - len(fold.test)
            assert not {*fold.test} & {*fold.validation}
            assert len(fold.validation) == min(max(1, round(share * others)), others - 1)

    def test_a_seed_decides_it(self):
        assert folds.deal(PATIENTS, 3, seed=1) == folds.deal(PATIENTS, 3, seed=1)
        assert folds.deal(PATIENTS, 3, seed=1) != folds.deal(PATIENTS, 3, seed=2)

    def test_folders_of_patients_left_out_alone_are_called_after_them(self):
        alone = folds.deal(PATIENTS, folds.ONE_EACH, seed=1)
        assert alone.names == [f"without_{patient}" for patient in PATIENTS]
        assert folds.deal(PATIENTS, 7, seed=1) == alone
        assert folds.deal(PATIENTS, 3, seed=1).names == ["fold_1", "fold_2", "fold_3"]

    def test_one_fold_is_none(self):
        with pytest.raises(ConfigError, match="at least 2"):
            folds.deal(PATIENTS, 1, seed=1)


class TestPlan:
    def test_is_kept_and_taken_again(self, tmp_path):
        planned = folds.plan(3, PATIENTS, tmp_path, 1, 0.2)
        assert json.loads((tmp_path / "folds.json").read_text())["folds"][0]["test"] == [*planned.tested[0]]
        assert [len(fold.validation) for fold in planned.folds] == [1, 1, 1]
        assert len(planned.validation) == 1
        assert folds.plan(3, PATIENTS, tmp_path, seed=2, validation_share=0.9) == planned
        with pytest.raises(ConfigError, match="choose another --output"):
            folds.plan(2, PATIENTS, tmp_path, 1, None)
        with pytest.raises(ConfigError, match="choose another --output"):
            folds.plan(folds.ONE_EACH, PATIENTS, tmp_path, 1, None)

    def test_a_file_of_ones_own(self, tmp_path):
        mine = {"folds": [{"test": ["p1", "p2"]}, {"test": ["p3"], "validation": ["p1"]}]}
        (tmp_path / "mine.json").write_text(json.dumps(mine))
        planned = folds.plan(tmp_path / "mine.json", PATIENTS[:3], tmp_path / "out", 1, 0.2)
        assert planned.tested == [("p1", "p2"), ("p3",)]
        assert planned.folds[1].validation == ("p1",)
        # Of one patient alone none can be taken to validate: plateau says so later.
        assert planned.folds[0].validation == ()
        assert planned == folds.plan(2, PATIENTS[:3], tmp_path / "out", 1, 0.2)

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("{", "Invalid JSON"),
            ('{"folds": [{"test": ["p1", "p2", "p3"]}]}', "at least 2 items"),
            ('{"folds": [{"test": []}, {"test": ["p1", "p2", "p3"]}]}', r"folds\.0\.test"),
            ('{"folds": [{"test": ["p1"]}, {"test": ["p2"]}]}', "in no fold's test: p3"),
            ('{"folds": [{"test": ["p1", "p2"]}, {"test": ["p2", "p3"]}]}', "tested twice: p2"),
            ('{"folds": [{"test": ["p1", "p2"]}, {"test": ["p3", "p9"]}]}', "unknown: p9; there are p1, p2"),
            (
                '{"folds": [{"test": ["p1", "p2"], "validation": ["p2"]}, {"test": ["p3"]}]}',
                "tested and validating in one fold: p2",
            ),
            (
                '{"folds": [{"test": ["p1", "p2"], "validation": ["p3"]}, {"test": ["p3"]}]}',
                "nobody is left to learn from",
            ),
        ],
    )
    def test_a_wrong_file_is_told(self, tmp_path, text, words):
        (tmp_path / "mine.json").write_text(text)
        with pytest.raises(ConfigError, match=words):
            folds.plan(tmp_path / "mine.json", PATIENTS[:3], tmp_path / "out", 1, None)
        assert not (tmp_path / "out").exists()

    def test_too_few_patients(self, tmp_path):
        with pytest.raises(ConfigError, match="at least 3"):
            folds.plan(2, PATIENTS[:2], tmp_path, 1, None)


def test_patients_who_validate_are_neither_learned_from_nor_tested(sources, tmp_path, monkeypatch):  # noqa: F811
    """In this process, so that what every network learned from can be seen."""
    schedule = {"steps": 1, "every": 1, "decay": "plateau"}
    small_recipe(tmp_path / "recipes", "lungs")
    path = small_recipe(tmp_path / "recipes", "multitask", schedule=schedule)
    seen = []
    train_one = run._train_one

    def spy(asked, task, parts, progress):
        everybody = [{s.patient for s in part if not s.cropped} for part in (parts.train, parts.validation)]
        seen.append((asked.recipe.name, *everybody, {*asked.test}))
        train_one(asked, task, parts, progress)

    monkeypatch.setattr(run, "_train_one", spy)
    monkeypatch.setattr(making, "ProcessPoolExecutor", lambda *_: InThisProcess())
    asked = Run(
        recipe=recipes.load(str(path)), sources=sources, output=tmp_path / "out", device="cpu", threads=1
    )
    folder = making.make(asked, Unwatched(), 2)
    planned = folds.read(tmp_path / "out" / "folds.json", PATIENTS[:4])
    everybody = {*PATIENTS[:4]}
    expected = [(*fold.validation,) for fold in (*planned.folds, planned)]
    tests = [*planned.tested, ()]
    assert seen == [
        (name, everybody - {*validation, *test}, {*validation}, {*test})
        for validation, test in zip(expected, tests, strict=True)
        for name in ("lungs", "multitask")
    ]
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.is_dir()) == [
        "fold_1", "fold_2", "lungs", "model", "multitask",
    ]  # fmt: skip
    package = packages.read(folder)
    assert {m.measured_on for m in package.card.metrics if m.patients} >= {
        "patients left out of training, in 2 folds"
    }
    assert all(f"| {patient} |" in package.text for patient in everybody)
    check_evidence(tmp_path / "out", package, everybody)
    seen.clear()
    assert making.make(asked, Unwatched(), 2) == folder
    assert seen == []
    with pytest.raises(ConfigError, match="choose another --output"):
        making.make(asked, Unwatched(), 3)


def check_evidence(output, package, everybody):
    """Those left out, told again by a command without data or network, with the card's figures."""

    def asked(*options):
        return CliRunner().invoke(app, ["evaluate", *options])

    answer = json.loads(asked("--left-out", str(output), "--json").stdout)
    assert answer["version"] == package.version
    assert {score["patient"] for score in answer["scores"]} == everybody
    assert answer["trained_on"] == []
    of_card = {metric.name: metric.value for metric in package.card.metrics}
    for name in ("lungs_dice", "lesions_dice", "fraction_error"):
        figure = answer["figures"][name]
        assert of_card[figure["name"]] == pytest.approx(figure["value"], abs=1e-4)
    both = asked("--left-out", str(output), "--left-out", str(output), "--report", str(output / "report"))
    assert "by networks that never saw the patient" in " ".join(both.stdout.split())
    assert list((output / "report").rglob("report.html"))
    for options in (
        [],
        ["--left-out", str(output), "--data", "semiseg=x"],
        ["--left-out", "a", "--model", "b"],
    ):
        assert "give --data KIND=PATH, or --left-out" in " ".join(asked(*options).stderr.split())
    assert "cannot read" in asked("--left-out", str(output / "lungs")).stderr
    kept = (output / "left_out.json").read_text()
    (output / "left_out.json").write_text(kept[:-9])
    assert "left_out.json is damaged" in " ".join(asked("--left-out", str(output)).stderr.split())
    shutil.rmtree(output / "report")


def test_leaving_out_takes_neither_validation_nor_test(recipe, tmp_path):  # noqa: F811
    asked = Run(recipe=recipe, sources={}, output=tmp_path, validation=("p1",))
    for one in (asked, replace(asked, validation=(), test=("p1",))):
        with pytest.raises(ConfigError, match="give neither --validation nor --test"):
            making.make(one, Unwatched(), 2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--folds", "2", "--leave-one-out"], "give one of the two"),
        (["--folds", "nowhere.json"], "give a number, or a file"),
        (["--folds", "1"], "at least 2 are needed"),
    ],
)
def test_a_mistake_is_told_in_a_sentence(sources, tmp_path, options, words):  # noqa: F811
    data = [f"--data={kind}={path}" for kind, path in sources.items()]
    ended = CliRunner().invoke(app, ["train", "multitask", *data, "--output", str(tmp_path), *options])
    assert ended.exit_code == 78
    assert words in " ".join(ended.stderr.split())
