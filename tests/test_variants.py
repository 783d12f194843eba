"""Variants of a recipe: trained alike, compared in one table."""

import json

import pytest
from rich.console import Console
from typer.testing import CliRunner

from tests.test_training import InThisProcess, Unwatched, small_recipe, sources  # noqa: F401
from triage.cli import app
from triage.errors import ConfigError
from triage.models import packages
from triage.training import making, run, variants
from triage.training import recipe as recipes
from triage.training.run import Run

pytestmark = pytest.mark.usefixtures("one_thread")
VARIANTS = {
    "full": {},
    "other_lungs": {"parts": {"lungs": {"network": {"widths": [4, 6]}}}},
    "wide": {"network": {"widths": [4, 12]}, "schedule": {"steps": 2}},
}


def asked(sources, folder, **changes):  # noqa: F811
    small_recipe(folder / "recipes", "lungs")
    path = small_recipe(folder / "recipes", "multitask", variants=VARIANTS)
    return Run(
        recipe=recipes.load(str(path)), sources=sources, output=folder / "out", device="cpu", threads=1,
        **changes,
    )  # fmt: skip


@pytest.fixture
def trained(monkeypatch):
    """(folder, recipe) of every network that is trained, in this process."""
    seen = []
    train_one = run._train_one

    def spy(asked, *rest):
        seen.append((asked.output.name, asked.recipe.name, asked.recipe.network["widths"]))
        train_one(asked, *rest)

    monkeypatch.setattr(run, "_train_one", spy)
    monkeypatch.setattr(making, "ProcessPoolExecutor", lambda *_: InThisProcess())
    return seen


def test_a_variant_overrides_what_it_names(tmp_path):
    recipe = asked({}, tmp_path).recipe
    wide, other = recipe.variant("wide"), recipe.variant("other_lungs")
    assert wide.network == {**recipe.network, "widths": [4, 12]}
    assert (wide.schedule.steps, wide.schedule.every) == (2, recipe.schedule.every)
    assert (wide.card["name"], wide.text, wide.variants) == ("multitask-wide", recipe.text, {})
    assert [r.network["widths"] for r in run.chain(other)] == [[4, 6], [4, 8]]
    assert recipe.variant("full").model_dump(exclude={"card", "variants"}) == recipe.model_dump(
        exclude={"card", "variants"}
    )


def test_each_is_measured_on_those_left_out(sources, tmp_path, trained):  # noqa: F811
    one = asked(sources, tmp_path, test=("p4",))
    compared = variants.compare(one, variants.chosen(one.recipe, "all"), Unwatched(), None, 1)
    assert trained == [
        ("full", "lungs", [4, 8]),
        ("full", "multitask", [4, 8]),
        ("other_lungs", "lungs", [4, 6]),
        ("other_lungs", "multitask", [4, 8]),
        ("wide", "multitask", [4, 12]),  # with the lungs of "full"
    ]
    assert compared.measured_on == "patients left out of training"
    full, _, wide = compared.trained
    assert (tmp_path / "out" / "wide" / "model") == wide.folder
    assert packages.read(wide.folder).card.name == "multitask-wide"
    network = run.TASKS["multitask"]  # its learned numbers, counted in another way
    for trained_one, steps in ((full, [4, 8]), (wide, [4, 12])):
        parts = run.read(one)
        made = network(parts.train, steps, 8, 3, canvas=(48, 64), depth=6, pictures=1).network
        assert trained_one.parameters == sum(p.numel() for p in made.parameters())
    assert full.summary.figures["lungs_dice"].n == 1  # p4's volume
    assert full.summary.figures["pictures_dice"].n == 1  # held out

    stored = json.loads((tmp_path / "out" / "variants.json").read_text())
    assert stored["recipe"] == "multitask"
    assert list(stored["variants"]) == [*VARIANTS]
    dice = full.summary.figures["lungs_dice"].value
    assert stored["variants"]["full"]["figures"]["lungs_dice"]["value"] == dice
    console = Console(width=200)
    with console.capture() as printed:
        console.print(variants.table(compared))
    text = printed.get()
    for words in (*VARIANTS, "parameters (M)", "seconds a volume", f"{dice:.3f}"):
        assert words in text
    assert "slices, accuracy" not in text  # no variant judges slices

    trained.clear()
    again = variants.compare(one, ["full", "wide"], Unwatched(), None, 1)
    assert trained == []
    assert again.trained[1].summary.figures["lungs_dice"] == wide.summary.figures["lungs_dice"]


def test_folds_are_the_same_for_all(sources, tmp_path, trained):  # noqa: F811
    one = asked(sources, tmp_path)
    compared = variants.compare(one, ["full", "wide"], Unwatched(), 2, 1)
    assert compared.measured_on == "patients left out of training, in 2 folds"
    plans = [json.loads(path.read_text()) for path in sorted((tmp_path / "out").rglob("folds.json"))]
    assert len(plans) == 3
    assert plans[0] == plans[1] == plans[2]
    assert [folder for folder, name, _ in trained if name == "lungs"] == ["fold_1", "fold_2", "full"]
    assert all(one.summary.figures["lungs_dice"].patients == 4 for one in compared.trained)


def test_what_cannot_be_compared_is_told(sources, tmp_path):  # noqa: F811
    recipe = asked(sources, tmp_path).recipe
    with pytest.raises(ConfigError, match="multitask has full, other_lungs, wide"):
        variants.chosen(recipe, "full,narrow")
    with pytest.raises(ConfigError, match="has none"):
        variants.chosen(recipe.variant("full"), "all")
    nobody = Run(recipe=recipe.model_copy(update={"hold_out": {}}), sources=sources, output=tmp_path / "out")
    with pytest.raises(ConfigError, match="nobody to compare"):
        variants.compare(nobody, ["full"], Unwatched(), None, 1)
    strange = recipe.model_copy(update={"parts": {"lunngs": {}}})
    with pytest.raises(ConfigError, match="does not build on lunngs"):
        run.chain(strange)
    with pytest.raises(ConfigError, match=r"parts\.lungs: schedule\.steps"):
        run.chain(recipe.model_copy(update={"parts": {"lungs": {"schedule": {"steps": 0}}}}))
    data = [f"--data={kind}={path}" for kind, path in sources.items()]
    command = ["train", "multitask", *data, "--output", str(tmp_path / "out"), "--variants", "all"]
    ended = CliRunner().invoke(app, command)
    assert ended.exit_code == 78
    assert "recipe multitask has none" in ended.stderr
    part = recipe.model_copy(update={"system": None})
    with pytest.raises(ConfigError, match="nothing to compare"):
        variants.compare(Run(recipe=part, sources=sources, output=tmp_path), ["full"], Unwatched(), None, 1)
