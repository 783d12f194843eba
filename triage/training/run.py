"""From a recipe and data sets to a model package."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch

from triage import models
from triage.config import Analysis
from triage.errors import ConfigError
from triage.models import cascade, compute, packages, weights
from triage.models.packages import Package
from triage.models.preprocessing import CANONICAL, Grid
from triage.training import recipe as recipes
from triage.training.baselines import Resnet50Task, Unet2dPlusTask, Unet2dTask, Unet3dTask, best_blur
from triage.training.cascade import CascadeLungsTask, CascadeTask
from triage.training.datasets import DATASETS, cases
from triage.training.dcn import DcnSlicesTask, DcnStudyTask
from triage.training.infnet import InfNetTask, InpaintingTask
from triage.training.recipe import Recipe
from triage.training.scans import Split, scan, split
from triage.training.ssm import SsmTask
from triage.training.tasks import LungsTask, MultitaskTask, Task
from triage.training.trainer import Progress, Trainer

TASKS: dict[str, Callable[..., Task]] = {
    "lungs": LungsTask,
    "multitask": MultitaskTask,
    "unet2d": Unet2dTask,
    "unet2d_plus": Unet2dPlusTask,
    "unet3d": Unet3dTask,
    "resnet50": Resnet50Task,
    "cascade_lungs": CascadeLungsTask,
    "cascade": CascadeTask,
    "dcn_slices": DcnSlicesTask,
    "dcn_study": DcnStudyTask,
    "infnet": InfNetTask,
    "infnet_inpainting": InpaintingTask,
    "ssm": SsmTask,
}
"""What a recipe's ``task`` names; made with the scans to learn from and the recipe's network and options."""
GRIDS = {"cascade_lungs": cascade.GRID, "cascade": cascade.GRID}
"""What the scans of a task are, where they are not canonical slices at 2 mm."""
SEARCHES: dict[str, Callable[..., dict[str, float]]] = {
    "threshold": best_blur,
}
"""Tasks without a network to train: made with the cases to learn from, they give the card's parameters."""

CLAIM = "made.json"
"""What a folder was made with."""
LEARNED = ("task", "network", "options", "data", "also", "hold_out", "schedule")
"""The parts of a recipe that change what is learned."""
LATER = {"decay": "cosine", "factor": None, "stale": 5}
"""What a schedule was before it could be told; not written, so that what was made then is known again."""

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
    shared: tuple[Path, ...] = ()
    """Outputs of other runs: networks that they finished alike are taken over, not trained again."""


def train(run: Run, progress: Callable[[Recipe], Progress] | None = None) -> Path:
    """Train the recipe's network, first the lungs' where it needs them; returns the folder of the result.

    Goes on where an earlier run with the same output stopped. Raises ConfigError where that one was another.
    """
    steps = [replace(run, recipe=recipe) for recipe in chain(run.recipe)]
    by_grid = {grid: read(run, grid) for grid in {grid_of(step.recipe) for step in steps}}
    every = [(step, by_grid[grid_of(step.recipe)]) for step in steps]
    for step, parts in every:
        _refuse_another(step, _identity(step, parts))
        _refuse_unvalidated(step, parts)
    for other in run.shared:
        _take_over(other, every)
    # Every task is made before one is trained: what cannot be learned from this data is told at once.
    untrained = [(s, parts, _made(s, parts)) for s, parts in every if not outcome_of(s).exists()]
    for step, parts, task in untrained:
        outcome_of(step).parent.mkdir(parents=True, exist_ok=True)
        _claim_of(step).write_text(json.dumps(_identity(step, parts), indent=1), encoding="utf-8")
        if task is None:
            _search_one(step, parts)
        else:
            _train_one(step, task, parts, progress and progress(step.recipe))
    return outcome_of(run).parent


def _claim_of(run: Run) -> Path:
    return outcome_of(run).parent / CLAIM


def _claimed(run: Run) -> Any:
    """What the folder says that it was made with; None where it says nothing."""
    claim = _claim_of(run)
    return json.loads(claim.read_text(encoding="utf-8")) if claim.exists() else None


def _identity(run: Run, parts: Split) -> dict[str, Any]:
    """What decides what a network learns, as JSON has it."""
    scans = {k: n for k, n in parts.counts().items() if k in (*run.recipe.data, *run.recipe.also)}
    learned = run.recipe.model_dump(mode="json", include=set(LEARNED))
    learned["schedule"] = {k: v for k, v in learned["schedule"].items() if (k, v) not in LATER.items()}
    identity = {**learned, "validation": [*run.validation], "test": [*run.test], "scans": scans}
    return {**identity, **{how: _identity(before, parts) for how, before in _before(run).items()}}


def _refuse_another(run: Run, identity: dict[str, Any]) -> None:
    """Raises ConfigError where the folder holds what was made of another recipe, split or data."""
    claim = _claim_of(run)
    if claim.exists() and _claimed(run) != identity:
        raise ConfigError(
            f"{claim.parent} was made with another recipe, other data or other patients left out "
            f"(see {claim.name} there): choose another --output, or delete it"
        )
    if outcome_of(run).exists() and not claim.exists():
        raise ConfigError(f"{outcome_of(run)}: nobody knows what this was made with; choose another --output")


def _refuse_unvalidated(run: Run, parts: Split) -> None:
    """Raises ConfigError where the learning rate waits for a validation that nobody is there for."""
    if run.recipe.schedule.decay == "plateau" and not parts.validation:
        raise ConfigError(
            f"recipe {run.recipe.name} lowers its learning rate where validation gains nothing (decay "
            "plateau), and no patient validates: give --validation, --folds or --leave-one-out"
        )


def _take_over(other: Path, steps: Iterable[tuple[Run, Split]]) -> None:
    """What another run finished alike, up to the first network that differs: later ones may build on it."""
    for step, parts in steps:
        theirs = replace(step, output=other)
        if not outcome_of(theirs).exists() or _claimed(theirs) != _identity(step, parts):
            return
        if not outcome_of(step).exists():
            outcome_of(step).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(_claim_of(theirs), _claim_of(step))
            partial = outcome_of(step).with_suffix(".partial")
            shutil.copyfile(outcome_of(theirs), partial)
            partial.replace(outcome_of(step))


def package(
    run: Run,
    folder: Path,
    lesion_threshold: float,
    metrics: Sequence[Mapping[str, Any]] = (),
    text: str = "",
    trained_on: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> Package:
    """The trained networks and what is known of them as a folder that ``analysis.model`` can name."""
    recipe = run.recipe
    held = [f"last {n} of {kind}" for kind, n in recipe.hold_out.items() if kind in run.sources]
    card = {
        "name": recipe.name,
        "system": recipe.system,
        "summary": recipe.summary,
        "lesion_threshold": lesion_threshold,
        "training_data": learned_from(run),
        "splits": {
            "validation": ", ".join([*run.validation, *held]) or "none",
            "test": ", ".join(run.test) or "none",
        },
        "trained_on": dict(trained_on),
        "metrics": list(metrics),
        "recipe": {r.name: _in_words(r) for r in chain(recipe)},
        **recipe.card,
    }
    if recipe.task in SEARCHES:
        card["parameters"] = json.loads(outcome_of(run).read_text(encoding="utf-8"))
    return packages.write(folder, card, model_files(run), text)


def learned_from(run: Run) -> list[str]:
    """What the run was trained on, its lungs too: a sentence for each kind of data."""
    claims = [
        _claim_of(replace(run, recipe=recipe)).read_text(encoding="utf-8") for recipe in chain(run.recipe)
    ]
    counts = {kind: count for claim in claims for kind, count in json.loads(claim)["scans"].items()}
    return [f"{kind}: {_counted(kind, **count)}" for kind, count in counts.items()]


def _counted(kind: str, scans: int, patients: int) -> str:
    known = DATASETS[kind].patients_known
    whose = f"of {patients} patients" if known else "of unknown patients"
    return f"{scans} cases {whose}, laid out as {DATASETS[kind].source}"


def fingerprints(run: Run) -> dict[str, list[str]]:
    """Of every case that the run was trained on, by kind of data."""
    held_back = {*run.validation, *held_out(run), *run.test}
    found: dict[str, list[str]] = {kind: [] for kind in kinds(run)}
    for kind, case in cases(run.sources, kinds(run)):
        found[kind] += [] if case.patient in held_back else [case.fingerprint]
    return found


def check_card(recipe: Recipe) -> None:
    """Raises ConfigError where no card could be written once all is trained."""
    known = {"name": recipe.name, "system": recipe.system, "summary": recipe.summary}
    packages.check({**known, "training_data": [], **recipe.card}, f"recipe {recipe.name}")
    if recipe.system not in models.SYSTEMS:
        names = ", ".join(sorted(models.SYSTEMS))
        raise ConfigError(f"recipe {recipe.name}: system {recipe.system!r} is unknown; there are {names}")


def _in_words(recipe: Recipe) -> str:
    shape = ", ".join(f"{key} {value}" for key, value in recipe.network.items())
    return f"{shape}; {recipe.schedule.steps} batches" if recipe.network else "nothing trained"


def kinds(run: Run) -> list[str]:
    """Of the data that the recipe and its lungs learn from, also those that it could do without."""
    every = [kind for r in chain(run.recipe) for kind in (*r.data, *(k for k in r.also if k in run.sources))]
    return list(dict.fromkeys(every))


def chain(recipe: Recipe) -> list[Recipe]:
    """The recipe and, before it, those whose lungs it needs, that it comes after, and that it begins with.

    Raises ConfigError where it changes parts that it does not build on.
    """
    before = [recipe.part(name) for name in (recipe.lungs, recipe.after, recipe.start) if name]
    unknown = {*recipe.parts} - {part.name for part in before}
    if unknown:
        raise ConfigError(f"recipe {recipe.name}, parts: it does not build on {', '.join(sorted(unknown))}")
    return [*before, recipe]


def given(run: Run) -> Run:
    """The run, with lungs of a shipped package where its recipe has some to spare and no data for its own."""
    recipe = run.recipe
    if recipe.lungs is None or recipe.spare_lungs is None:
        return run
    missing = {*recipe.part(recipe.lungs).data} - {*run.sources}
    return replace(run, recipe=recipe.without_lungs()) if missing else run


def model_files(run: Run) -> dict[str, Path]:
    """Weights of the networks that make the model, by their role; not those that one only began with."""
    recipe = run.recipe
    start = recipe.part(recipe.start).name if recipe.start else None
    own = [part for part in chain(recipe) if part.task in TASKS and part.name != start]
    return {_role(part, recipe): outcome_of(replace(run, recipe=part)) for part in own}


def _role(part: Recipe, recipe: Recipe) -> str:
    """What a package calls the file of a part of the chain."""
    return "lungs" if recipe.lungs and part.name == recipes.load(recipe.lungs).name else part.task


def outcome_of(run: Run) -> Path:
    """Weights, or the parameters that were searched for."""
    name = run.recipe.name
    file = f"{name}.safetensors" if run.recipe.task in TASKS else "parameters.json"
    return run.output / name / file


def _before(run: Run) -> dict[str, Run]:
    """The runs of the networks that this one's recipe comes ``after``, and that it is to ``start`` with."""
    names = {"after": run.recipe.after, "start": run.recipe.start}
    return {how: replace(run, recipe=run.recipe.part(name)) for how, name in names.items() if name}


def _made(run: Run, parts: Split) -> Task | None:
    """The task of the run's recipe; one that builds on another is told where that one's weights will be."""
    return _task(run.recipe, parts, **{how: outcome_of(before) for how, before in _before(run).items()})


def _task(recipe: Recipe, parts: Split, **before: Path) -> Task | None:
    """None where nothing is trained, only searched for."""
    if recipe.task in SEARCHES:
        return None
    torch.manual_seed(recipe.schedule.seed)
    try:
        return TASKS[recipe.task](parts.train, **before, **recipe.network, **recipe.options)
    except TypeError as error:
        raise ConfigError(f"recipe {recipe.name}, network or options: {error}") from error


def _train_one(run: Run, task: Task, parts: Split, progress: Progress | None) -> None:
    path = outcome_of(run)
    device = compute.choose(Analysis(device=run.device)).device
    torch.set_num_threads(run.threads or os.cpu_count() or 1)
    trainer = Trainer(task, run.recipe.schedule, path.parent, device)
    trainer.resume()
    trainer.train(parts.validation, progress)
    partial = path.with_suffix(".partial")
    weights.save(trainer.kept, _facts(run, trainer), partial)
    partial.replace(path)


def _search_one(run: Run, parts: Split) -> None:
    seen = {scan.patient for scan in parts.train}
    every = (case for _, case in cases(run.sources, kinds(run), seen))
    found = SEARCHES[run.recipe.task](every, **run.recipe.options)
    outcome_of(run).write_text(json.dumps(found), encoding="utf-8")


def grid_of(recipe: Recipe) -> Grid:
    """What the recipe's network sees."""
    return GRIDS.get(recipe.task, CANONICAL)


def read(run: Run, grid: Grid = CANONICAL) -> Split:
    """The data of the recipe and of its lungs', split by patient; each task takes from it what it can use.

    Raises ConfigError where a data set is missing or a patient is unknown.
    """
    wanted = kinds(run)
    missing = [kind for kind in wanted if kind not in run.sources]
    if missing:
        options = ", ".join(f"--data {kind}=PATH" for kind in missing)
        raise ConfigError(f"recipe {run.recipe.name} learns from {', '.join(wanted)}: give {options}")
    scans = [replace(scan(case, grid), data=kind) for kind, case in cases(run.sources, wanted)]
    return split(scans, [*run.validation, *held_out(run)], run.test)


def held_out(run: Run) -> tuple[str, ...]:
    """The cases that the recipe holds out of kinds without patients, by the name they have as patients."""
    last = (
        [case.patient for _, case in cases(run.sources, [kind])][-count:]
        for kind, count in run.recipe.hold_out.items()
        if kind in run.sources
    )
    return tuple(patient for patients in last for patient in patients)


def _facts(run: Run, trainer: Trainer) -> dict[str, str]:
    """What ``weights.read`` needs to build the network again, and how it was trained."""
    network: Mapping[str, Any] = run.recipe.network
    shape = {
        key: ",".join(map(str, v)) if isinstance(v, list | tuple) else str(v) for key, v in network.items()
    }
    return {
        "network": run.recipe.task,
        **shape,
        "recipe": run.recipe.model_dump_json(),
        "torch": torch.__version__,
        "steps": str(trainer.step),
        "validation": ",".join(run.validation),
        "test": ",".join(run.test),
    }
