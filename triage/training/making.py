"""A model from a recipe, and its evidence: each patient judged by networks that never saw that patient.

The lesion threshold for a patient's figures is chosen on the patients of the other folds, each of them
judged by the networks that had not seen them; the model's own threshold is chosen on all patients in the
same way.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from rich.progress import Progress as Bars

from triage import models
from triage.config import Analysis
from triage.errors import ConfigError
from triage.models import packages
from triage.training import evaluation, folds
from triage.training.datasets import cases
from triage.training.evaluation import Evaluation, Extent, Overlap, Score
from triage.training.folds import Folds
from triage.training.metrics import Figure
from triage.training.recipe import Recipe
from triage.training.run import (
    SEARCHES,
    TASKS,
    Run,
    chain,
    check_card,
    fingerprints,
    given,
    held_out,
    kinds,
    package,
    train,
)
from triage.training.trainer import Progress

MODEL = "model"
"""Folder of the finished package within a run's output."""
THRESHOLDS = tuple(round(float(t), 2) for t in np.arange(0.1, 0.91, 0.05))
LEFT_OUT = "left_out.json"
"""Beside it: the scores of all patients who were left out."""
HELD_OUT_WORDS = (
    "pictures held out of training; patients unknown, they may be those of others: the interval takes each "
    "picture for a patient"
)


class Watch:
    """Progress bars: one for each network, one for the folds."""

    def __init__(self, bars: Bars) -> None:
        self.bars = bars

    def network(self, recipe: Recipe) -> Progress:
        """A bar of the recipe's steps."""
        bar = self.bars.add_task(recipe.card.get("name", recipe.name), total=recipe.schedule.steps)
        return lambda step: self.bars.update(bar, completed=step)

    def folds(self, parts: Iterable[list[Score]], total: int) -> list[list[Score]]:
        """A bar of the folds whose patients are judged."""
        return list(self.bars.track(parts, total, description="patients left out"))


def make(run: Run, watch: Watch, asked: int | Path | None = None, jobs: int = 1) -> Path:
    """Train, and package what is a model; returns its folder, or that of the weights of a part.

    With ``asked``, so many folds or a file of them, each patient is also left out of one training, so many
    ``jobs`` at a time. The lesion threshold is chosen on the patients left out, else on the validation
    patients, else it is the recipe's own. Raises ConfigError.
    """
    run = given(run)
    refuse(run, asked)
    planned = None if asked is None else plan(run, asked, [run.recipe])
    left_out = cross_validate(run, planned, jobs, watch) if planned else []
    volumes = [score for part in left_out for score in part.scores]
    run = replace(run, validation=planned.validation) if planned else run
    weights = train(run, watch.network)
    if run.recipe.system is None:
        return weights
    threshold = run.recipe.lesion_threshold
    if volumes:
        threshold = choose(run.recipe, volumes)
        (run.output / LEFT_OUT).write_text(evaluation.to_json(volumes), encoding="utf-8")
    elif run.validation:
        threshold = choose(run.recipe, judge(run, run.validation, threshold))
    pictures = judge(run, held_out(run), threshold)
    words = left_out_words(planned) if planned else ""
    known = [*metrics(volumes, words), *metrics(pictures, HELD_OUT_WORDS, pictures=True)]
    text = card_text(run.recipe, left_out)
    return package(run, run.output / MODEL, threshold, known, text, fingerprints(run)).folder


def evidence(output: Path) -> Evaluation:
    """The figures of those who were left out, of an earlier run with folds. Raises ConfigError."""
    package = packages.read(output / MODEL)
    path = output / LEFT_OUT
    try:
        scores = evaluation.from_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error.strerror}; triage train with --leave-one-out or --folds writes it"
        ) from error
    except ValueError as error:
        raise ConfigError(f"{path} is damaged: delete it and give the command again that wrote it") from error
    return Evaluation(
        info=package.info,
        settings={"lesion_threshold": "of each patient chosen on the other folds' patients"},
        sources={score.data: path for score in scores},
        trained_on=(),
        patients_chosen=(),
        scores=tuple(scores),
        summary=evaluation.summarise(scores),
        worst=(),
        networks=evaluation.networks_of(package),
        left_out=True,
    )


def refuse(run: Run, asked: int | Path | None) -> None:
    """Raises ConfigError for what would only be noticed after hours."""
    if asked is not None and (run.validation or run.test):
        raise ConfigError(
            "--folds and --leave-one-out leave out every patient once: give neither --validation nor --test"
        )
    if asked is not None and run.recipe.system is None:
        raise ConfigError(f"recipe {run.recipe.name} trains a part of a model: there is nothing to judge")
    if run.recipe.task not in (*TASKS, *SEARCHES):
        names = ", ".join((*TASKS, *SEARCHES))
        raise ConfigError(f"recipe {run.recipe.name}: task {run.recipe.task!r} is unknown; there are {names}")
    if run.recipe.system is not None:
        check_card(run.recipe)


def plan(run: Run, asked: int | Path, recipes: Iterable[Recipe]) -> Folds:
    """The folds of a run, with patients who validate where the schedule of a recipe needs them.

    Raises ConfigError.
    """
    validated = any(part.schedule.validated for recipe in recipes for part in chain(recipe))
    share = run.recipe.validation_share if validated else None
    return folds.plan(asked, patients(run), run.output, run.recipe.schedule.seed, share)


def left_out_words(planned: Folds) -> str:
    """What figures of a cross-validation were measured on."""
    how = "one at a time" if planned.one_each else f"in {len(planned.folds)} folds"
    return f"patients left out of training, {how}"


@dataclass(frozen=True, slots=True)
class LeftOut:
    """The patients of one fold, judged by networks that never saw them."""

    patients: tuple[str, ...]
    lesion_threshold: float
    """Chosen on the patients of the other folds."""
    scores: tuple[Score, ...]


def cross_validate(run: Run, planned: Folds, jobs: int, watch: Watch) -> list[LeftOut]:
    """Train once for each fold, and judge those who were left out; goes on where it stopped.

    Raises ConfigError.
    """
    share = max(1, (run.threads or os.cpu_count() or 1) // jobs)
    runs = _runs(replace(run, threads=share), planned)
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        first = watch.folds(pool.map(_train_and_judge, runs), len(runs))
        others = [[s for part in first if part is not left for s in part] for left in first]
        thresholds = [choose(run.recipe, scores) for scores in others]
        final = pool.map(_judge_left_out, runs, thresholds)
        return [LeftOut(*row) for row in zip(planned.tested, thresholds, map(tuple, final), strict=True)]


def _runs(run: Run, planned: Folds) -> list[Run]:
    """One for each fold, in a folder of its own."""
    return [
        replace(
            run,
            output=run.output / name,
            shared=tuple(other / name for other in run.shared),
            test=fold.test,
            validation=fold.validation,
        )
        for name, fold in zip(planned.names, planned.folds, strict=True)
    ]


def patients(run: Run) -> list[str]:
    """Those of whom a volume with lungs and lesions was drawn, in the data that the recipe learns from."""
    every = (case for _, case in cases(run.sources, kinds(run)))
    drawn = {c.patient for c in every if c.lung is not None and c.lesions and not c.picture}
    return sorted(drawn.difference(held_out(run)))


def choose(recipe: Recipe, scores: Iterable[Score]) -> float:
    """The lesion threshold at which the affected fraction comes nearest to the drawn one, mean over patients.

    The fraction orders the list, and the threshold decides it; Dice hardly depends on it. What is found in
    those with a trace of lesion counts too. It is the recipe's own for a network that finds no lesions, and
    for a method that defines it.
    """
    known = [s for s in scores if s.histograms and s.drawn]
    if not known or recipe.task in SEARCHES:
        return recipe.lesion_threshold
    curve = evaluation.threshold_curve(known, THRESHOLDS)
    return min(curve, key=curve.__getitem__)


def judge(run: Run, names: Collection[str], lesion_threshold: float) -> list[Score]:
    """The cases of these patients, in a package of the run's networks that nobody else sees."""
    if not names:
        return []
    with TemporaryDirectory() as folder:
        package(run, Path(folder), lesion_threshold)
        return judge_with(Path(folder), run, names)


def judge_with(folder: Path, run: Run, names: Collection[str]) -> list[Score]:
    """The cases of these patients of the run's data, by the model in a folder."""
    model = models.load(Analysis(model=str(folder), device=run.device, threads=run.threads))
    return [
        score
        for kind, case in cases(run.sources, kinds(run), names)
        for score in evaluation.evaluate(model, [case], kind)
    ]


def _judge_left_out(fold: Run, lesion_threshold: float) -> list[Score]:
    return judge(fold, fold.test, lesion_threshold)


def metrics(scores: Sequence[Score], measured_on: str, pictures: bool = False) -> list[dict[str, Any]]:
    """The figures of volumes, or of pictures, as a model's card has them, with those that have no value."""
    if not scores:
        return []
    figures = evaluation.summarise(scores).applicable
    return [
        _metric(evaluation.FIGURES[name], figure, measured_on, None if pictures else figure.patients)
        for name, figure in figures.items()
        if name.startswith("pictures") == pictures and name != "seconds"
    ]


def _metric(name: str, figure: Figure, measured_on: str, patients: int | None) -> dict[str, Any]:
    """``patients`` is None where they are unknown."""
    value, low, high = (None if v is None else round(v, 4) for v in (figure.value, figure.low, figure.high))
    measured = {"value": value, "low": low, "high": high, "unit": figure.unit, "patients": patients}
    return {"name": name, **measured, "reason": figure.reason, "measured_on": measured_on}


def card_text(recipe: Recipe, left_out: Sequence[LeftOut]) -> str:
    """``card.md``: what stands beside the recipe, and a line for every volume of the patients left out."""
    if not left_out:
        return recipe.text
    head = (
        "volume",
        "patient",
        "Dice lungs",
        "Dice lesions",
        "affected, drawn",
        "affected, found",
        "threshold",
    )
    rows = [head, ("---",) * len(head)]
    rows += [_row(part, score) for part in left_out for score in part.scores]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"{recipe.text}\n## Each patient, judged by networks that never saw the patient\n\n{table}\n"


def _row(part: LeftOut, score: Score) -> tuple[str, ...]:
    def dice(overlap: Overlap | None) -> str:
        return "" if overlap is None else f"{overlap.dice:.3f}"

    def share(extent: Extent | None) -> str:
        return score.reason if extent is None or extent.grade is None else f"{100 * extent.fraction:.2f} %"

    return (
        score.name,
        score.patient,
        dice(score.lungs),
        dice(score.lesions),
        share(score.drawn),
        share(score.found),
        f"{part.lesion_threshold:.2f}",
    )


def _train_and_judge(fold: Run) -> list[Score]:
    train(fold)
    return _judge_left_out(fold, fold.recipe.lesion_threshold)
