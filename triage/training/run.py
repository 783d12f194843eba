"""From a recipe and data sets to a model package."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from triage.config import Analysis
from triage.errors import ConfigError
from triage.models import compute, packages, weights
from triage.models.packages import Package
from triage.training import recipe as recipes
from triage.training.baselines import Resnet50Task, Unet2dPlusTask, Unet2dTask, Unet3dTask, best_blur
from triage.training.datasets import DATASETS
from triage.training.recipe import Recipe
from triage.training.scans import Split, scan, split
from triage.training.tasks import LungsTask, MultitaskTask, Task
from triage.training.trainer import Progress, Trainer

TASKS: dict[str, Callable[..., Task]] = {
    "lungs": LungsTask,
    "multitask": MultitaskTask,
    "unet2d": Unet2dTask,
    "unet2d_plus": Unet2dPlusTask,
    "unet3d": Unet3dTask,
    "resnet50": Resnet50Task,
}
"""What a recipe's ``task`` names; made with the scans to learn from and the recipe's network and options."""
SEARCHES: dict[str, Callable[..., dict[str, float]]] = {
    "threshold": best_blur,
}
"""Tasks without a network to train: made with the cases to learn from, they give the card's parameters."""

MODEL = "model"
"""Folder of the finished package within a run's output."""

Sources = Mapping[str, Path]
"""Folder or file of each kind of data set."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One training: what, from which data, who is left out, and where it goes."""

    recipe: Recipe
    sources: Sources
    output: Path
    validation: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = 0
    """Of the processor; 0: all cores."""


def train(run: Run, progress: Callable[[Recipe], Progress] | None = None) -> Path:
    """Train the recipe's network, first the lungs' where it needs them; returns the folder of the weights.

    Goes on where an earlier run with the same output stopped.
    """
    parts = read(run)
    todo = [recipe for recipe in chain(run.recipe) if not outcome_of(run, recipe).exists()]
    # Every task is made before one is trained: what cannot be learned from this data is told at once.
    tasks = [(recipe, _task(recipe, parts)) for recipe in todo if recipe.task in TASKS]
    for recipe, task in tasks:
        _train_one(replace(run, recipe=recipe), task, parts, progress and progress(recipe))
    for recipe in (recipe for recipe in todo if recipe.task in SEARCHES):
        _search_one(replace(run, recipe=recipe), parts, progress and progress(recipe))
    return run.output


def package(
    run: Run, lesion_threshold: float, metrics: Sequence[Mapping[str, Any]] = (), text: str = ""
) -> Package:
    """The trained networks and what is known of them as a folder that ``analysis.model`` can name."""
    recipe = run.recipe
    if recipe.system is None:
        raise ConfigError(f"recipe {recipe.name} trains a part of a model, not a model")
    held = [f"last {n} of {kind}" for kind, n in recipe.hold_out.items()]
    card = {
        "name": recipe.name,
        "system": recipe.system,
        "summary": recipe.summary,
        "lesion_threshold": lesion_threshold,
        "training_data": [f"{kind}: {DATASETS[kind].summary}" for kind in kinds(run)],
        "splits": {
            "validation": ", ".join([*run.validation, *held]) or "none",
            "test": ", ".join(run.test) or "none",
        },
        "metrics": list(metrics),
        "recipe": {r.name: f"{r.network} {r.schedule.steps} steps" for r in chain(recipe)},
        **recipe.card,
    }
    files = {r.name: outcome_of(run, r) for r in chain(recipe) if r.task in TASKS}
    if recipe.task in SEARCHES:
        card["parameters"] = json.loads(outcome_of(run, recipe).read_text(encoding="utf-8"))
    return packages.write(run.output / MODEL, card, files, text)


def kinds(run: Run) -> list[str]:
    """Of the data that the recipe and its lungs learn from, also those that it could do without."""
    every = [kind for r in chain(run.recipe) for kind in (*r.data, *(k for k in r.also if k in run.sources))]
    return list(dict.fromkeys(every))


def chain(recipe: Recipe) -> list[Recipe]:
    """The recipe and, before it, the one whose lungs it needs."""
    return [*([recipes.load(recipe.lungs)] if recipe.lungs else []), recipe]


def outcome_of(run: Run, recipe: Recipe) -> Path:
    """Of one recipe: weights, or the parameters that were searched for."""
    folder = run.output / recipe.name
    return folder / (f"{recipe.name}.safetensors" if recipe.task in TASKS else "parameters.json")


def _task(recipe: Recipe, parts: Split) -> Task:
    torch.manual_seed(recipe.schedule.seed)
    return TASKS[recipe.task](parts.train, **recipe.network, **recipe.options)


def _train_one(run: Run, task: Task, parts: Split, progress: Progress | None) -> None:
    recipe, path = run.recipe, outcome_of(run, run.recipe)
    device = compute.choose(Analysis(device=run.device)).device
    torch.set_num_threads(run.threads or os.cpu_count() or 1)
    trainer = Trainer(task, recipe.schedule, path.parent, device)
    trainer.resume()
    trainer.train(parts.validation, progress)
    weights.save(trainer.kept, _facts(run, trainer), path)


def _search_one(run: Run, parts: Split, progress: Progress | None) -> None:
    recipe, path = run.recipe, outcome_of(run, run.recipe)
    seen = {scan.patient for scan in parts.train}
    every = (case for kind in kinds(run) for case in DATASETS[kind].read(run.sources[kind]))
    found = SEARCHES[recipe.task]((case for case in every if case.patient in seen), **recipe.options)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found), encoding="utf-8")
    if progress:
        progress(recipe.schedule.steps)


def read(run: Run) -> Split:
    """The data of the recipe and of its lungs', split by patient; each task takes from it what it can use.

    Raises ConfigError where a data set is missing or a patient is unknown.
    """
    wanted = kinds(run)
    missing = [kind for kind in wanted if kind not in run.sources]
    if missing:
        options = ", ".join(f"--data {kind}=PATH" for kind in missing)
        raise ConfigError(f"recipe {run.recipe.name} learns from {', '.join(wanted)}: give {options}")
    scans = [scan(case) for kind in wanted for case in DATASETS[kind].read(run.sources[kind])]
    return split(scans, [*run.validation, *held_out(run)], run.test)


def held_out(run: Run) -> tuple[str, ...]:
    """The cases that the recipe holds out of kinds without patients, by the name they have as patients."""
    last = (
        [case.patient for case in DATASETS[kind].read(run.sources[kind])][-count:]
        for kind, count in run.recipe.hold_out.items()
    )
    return tuple(patient for patients in last for patient in patients)


def _facts(run: Run, trainer: Trainer) -> dict[str, str]:
    """What ``weights.read`` needs to build the network again, and how it was trained."""
    network: Mapping[str, Any] = run.recipe.network
    shape = {key: ",".join(map(str, v)) if isinstance(v, Sequence) else str(v) for key, v in network.items()}
    return {
        "network": run.recipe.task,
        **shape,
        "recipe": run.recipe.model_dump_json(),
        "steps": str(trainer.step),
        "validation": ",".join(run.validation),
        "test": ",".join(run.test),
    }
