"""A recipe's variants, trained alike and set beside each other: the papers' ablations and combinations."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path

from rich.table import Table
from safetensors import safe_open

from triage.errors import ConfigError
from triage.training import evaluation, folds, making, tables
from triage.training.making import Watch
from triage.training.recipe import Recipe
from triage.training.run import Run, given, held_out, model_files
from triage.training.scores import Score
from triage.training.summary import Summary, summarise
from triage.training.wording import value

FILE = "variants.json"
"""Every figure of every variant, beside their folders."""
EVERY = "all"
MEASURED = ("running_mean", "running_var", "num_batches_tracked", ".losses", ".lowest", ".seen")
"""What batch normalisation and ``CopiedBranch`` count: in the weights' file, but not learned."""

COLUMNS = {
    "lungs_dice": "lungs, Dice",
    "lesions_dice": "lesions, Dice",
    "fraction_error": "affected fraction, error",
    "spearman": "Spearman's ρ",
    "slices_accuracy": "slices, accuracy",
    "slices_average_accuracy": "slices, AA",
    "slices_auc": "slices, AUC",
    "accuracy": "studies, accuracy",
    "auc_others": "studies, AUC",
    "pictures_dice": "pictures, Dice",
    "pictures_dice_threshold_averaged": "threshold-averaged",
    "pictures_ground_glass_dice": "ground glass, Dice",
    "pictures_ground_glass_dice_threshold_averaged": "threshold-averaged",
    "pictures_consolidation_dice": "consolidation, Dice",
    "pictures_consolidation_dice_threshold_averaged": "threshold-averaged",
    "pictures_loss_single": "loss, single",
    "pictures_loss_multi": "loss, multi",
    "seconds": "seconds a volume",
}
"""Figure of ``FIGURES`` → heading; the table shows those that some variant has."""


@dataclass(frozen=True, slots=True)
class Trained:
    """One variant, its model and how it did."""

    name: str
    folder: Path
    parameters: int
    """Learned numbers of its networks; that for the lungs is not counted."""
    summary: Summary


@dataclass(frozen=True, slots=True)
class Comparison:
    """Variants of one recipe, all measured on the same cases."""

    recipe: str
    measured_on: str
    trained: tuple[Trained, ...]


def chosen(recipe: Recipe, text: str) -> list[str]:
    """The variants that "all" or "a,b,c" names. Raises ConfigError for one that is unknown."""
    names = [*recipe.variants] if text == EVERY else [*dict.fromkeys(text.split(","))]
    unknown = [name for name in names if name not in recipe.variants]
    if unknown or not names:
        known = ", ".join(recipe.variants) or "none"
        raise ConfigError(f"--variants {text}: recipe {recipe.name} has {known}")
    return names


def compare(run: Run, names: Sequence[str], watch: Watch, asked: int | Path | None, jobs: int) -> Comparison:
    """Train these variants into folders of their names, and measure each on the same cases.

    With folds, the same for all, these are the patients left out; else those of ``--test``, or where nobody
    is, of ``--validation``, who choose the threshold; and pictures that the recipe holds out. A part that
    several variants have alike, such as the lungs' network, is trained once. ``variants.json`` is written.
    Raises ConfigError.
    """
    run = given(run)
    runs = [
        replace(
            run,
            recipe=run.recipe.variant(name),
            output=run.output / name,
            shared=tuple(run.output / earlier for earlier in names[:number]),
        )
        for number, name in enumerate(names)
    ]
    for one in runs:
        making.refuse(one, asked)
    if run.recipe.system is None:
        raise ConfigError(f"recipe {run.recipe.name} trains a part of a model: there is nothing to compare")
    if asked is None and not (run.test or run.validation or held_out(run)):
        raise ConfigError(
            "nobody to compare the variants on: give --folds, --leave-one-out, --test or --validation"
        )
    words = _measured_on(run)
    if asked is not None:
        planned = making.plan(run, asked, [one.recipe for one in runs])
        words, asked = making.left_out_words(planned), run.output / folds.FILE
    trained = [_train(name, one, watch, asked, jobs) for name, one in zip(names, runs, strict=True)]
    comparison = Comparison(run.recipe.name, words, tuple(trained))
    (run.output / FILE).write_text(_to_json(comparison), encoding="utf-8")
    return comparison


def _measured_on(run: Run) -> str:
    if run.test:
        return "patients left out of training"
    return "patients who chose the lesion threshold" if run.validation else "pictures held out of training"


def _train(name: str, run: Run, watch: Watch, asked: Path | None, jobs: int) -> Trained:
    folder = making.make(run, watch, asked, jobs)
    if asked is None:
        volumes = _judged(folder, run, run.test or run.validation)
    else:
        volumes = evaluation.from_json((run.output / making.LEFT_OUT).read_text(encoding="utf-8"))
    pictures = _judged(folder, run, held_out(run))
    parameters = sum(_count(path) for role, path in model_files(run).items() if role != "lungs")
    return Trained(name, folder, parameters, summarise([*volumes, *pictures]))


def _judged(folder: Path, run: Run, names: Sequence[str]) -> list[Score]:
    """Nobody where none are named."""
    return making.judge_with(folder, run, names) if names else []


def _count(path: Path) -> int:
    """Learned numbers in a file of weights."""
    with safe_open(path, framework="pt") as file:
        learned = (name for name in file.keys() if not name.endswith(MEASURED))  # noqa: SIM118 - not a dict
        return sum(prod(file.get_slice(name).get_shape()) for name in learned)


def _to_json(comparison: Comparison) -> str:
    rows = {
        one.name: {
            "folder": str(one.folder),
            "parameters": one.parameters,
            "not_analysable": dict(one.summary.not_analysable),
            "figures": one.summary.named(),
        }
        for one in comparison.trained
    }
    facts = {**asdict(replace(comparison, trained=())), "variants": rows}
    del facts["trained"]
    return json.dumps(facts, indent=1, ensure_ascii=False, allow_nan=False)


def table(comparison: Comparison) -> Table:
    """A row for each variant: its size, and its figures with 95 % intervals."""
    shown = [
        key
        for key in COLUMNS
        if any(one.summary.figures[key].value is not None for one in comparison.trained)
    ]
    headings = ("variant", "parameters (M)", *(COLUMNS[key] for key in shown))
    rows = [
        (
            one.name,
            f"{one.parameters / 1e6:.2f}",
            *(value(one.summary.figures[key]) for key in shown),
        )
        for one in comparison.trained
    ]
    return tables.table(headings, rows)
