"""A model from a recipe, and its evidence: each patient judged by networks that never saw that patient.

The lesion threshold for a patient's figures is chosen on the other patients, each of them judged by the
networks that had not seen them; the model's own threshold is chosen on all patients in the same way.
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
from triage.training import evaluation
from triage.training.datasets import cases
from triage.training.evaluation import Extent, Overlap, Score
from triage.training.metrics import Figure
from triage.training.recipe import Recipe
from triage.training.run import (
    SEARCHES,
    TASKS,
    Run,
    check_card,
    fingerprints,
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
LEFT_OUT_WORDS = "patients left out of training, one at a time"
HELD_OUT_WORDS = (
    "pictures held out of training; patients unknown, they may be those of others: the interval takes each "
    "picture for a patient"
)


class Watch:
    """Progress bars: one for each network, one for the patients left out."""

    def __init__(self, bars: Bars) -> None:
        self.bars = bars

    def network(self, recipe: Recipe) -> Progress:
        """A bar of the recipe's steps."""
        bar = self.bars.add_task(recipe.name, total=recipe.schedule.steps)
        return lambda step: self.bars.update(bar, completed=step)

    def folds(self, parts: Iterable[list[Score]], total: int) -> list[list[Score]]:
        """A bar of the patients left out."""
        return list(self.bars.track(parts, total, description="patients left out"))


def make(run: Run, watch: Watch, jobs: int | None = None) -> Path:
    """Train, and package what is a model; returns its folder, or that of the weights of a part.

    With ``jobs`` each patient is also left out once, so many trainings at a time. The lesion threshold is
    chosen on the patients left out, else on the validation patients, else it is the recipe's own. Raises
    ConfigError.
    """
    _refuse(run, jobs)
    left_out = leave_one_out(run, jobs, watch) if jobs else []
    volumes = [score for part in left_out for score in part.scores]
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
    known = [*metrics(volumes, LEFT_OUT_WORDS), *metrics(pictures, HELD_OUT_WORDS, pictures=True)]
    text = card_text(run.recipe, left_out)
    return package(run, run.output / MODEL, threshold, known, text, fingerprints(run)).folder


def _refuse(run: Run, jobs: int | None) -> None:
    """Raises ConfigError for what would only be noticed after hours."""
    if jobs and (run.validation or run.test):
        raise ConfigError(
            "--leave-one-out leaves out every patient once: give neither --validation nor --test"
        )
    if jobs and run.recipe.system is None:
        raise ConfigError(f"recipe {run.recipe.name} trains a part of a model: there is nothing to judge")
    if run.recipe.task not in (*TASKS, *SEARCHES):
        names = ", ".join((*TASKS, *SEARCHES))
        raise ConfigError(f"recipe {run.recipe.name}: task {run.recipe.task!r} is unknown; there are {names}")
    if run.recipe.system is not None:
        check_card(run.recipe)


@dataclass(frozen=True, slots=True)
class LeftOut:
    """One patient, judged by networks that never saw the patient."""

    patient: str
    lesion_threshold: float
    """Chosen on the other patients left out."""
    scores: tuple[Score, ...]


def leave_one_out(run: Run, jobs: int, watch: Watch) -> list[LeftOut]:
    """Train once for each patient with drawn volumes, and judge that patient; goes on where it stopped.

    Raises ConfigError for fewer than 3 patients.
    """
    names = patients(run)
    if len(names) < 3:
        raise ConfigError(f"{len(names)} patients have volumes with lesions drawn: at least 3 are needed")
    share = max(1, (run.threads or os.cpu_count() or 1) // jobs)
    folds = [_without(replace(run, threads=share), name) for name in names]
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        first = watch.folds(pool.map(_train_and_judge, folds), len(folds))
        others = [[s for part in first if part is not left for s in part] for left in first]
        thresholds = [choose(run.recipe, scores) for scores in others]
        final = pool.map(_judge_left_out, folds, thresholds)
        return [LeftOut(*row) for row in zip(names, thresholds, map(tuple, final), strict=True)]


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
        model = models.load(Analysis(model=folder, device=run.device, threads=run.threads))
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
    figures = evaluation.summarise(scores).figures
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
        part.patient,
        dice(score.lungs),
        dice(score.lesions),
        share(score.drawn),
        share(score.found),
        f"{part.lesion_threshold:.2f}",
    )


def _without(run: Run, patient: str) -> Run:
    return replace(run, output=run.output / f"without_{patient}", test=(patient,))


def _train_and_judge(fold: Run) -> list[Score]:
    train(fold)
    return _judge_left_out(fold, fold.recipe.lesion_threshold)
