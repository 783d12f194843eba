"""Judging on this machine: each engine in turn, and the whole way from files to written results.

    python -m tests.bench.judging

A real series of 248 slices, and a made-up chest of 300 slices of 512 × 512. A GPU is measured where there is
one. The table of all networks: ``python -m tests.bench.networks``.
"""

import sys
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter

import torch

from tests.bench.results import SLICES, study, timed
from tests.bench.table import Line, show
from tests.needs import DATA
from triage import models
from triage.analyze import judge
from triage.config import Analysis, Assemble, Config
from triage.dicom.header import find_instances
from triage.dicom.series import choose
from triage.dicom.volume import read
from triage.models import engine

ROUNDS = 3
SERIES = "covid_ricord_1012"
V100 = "the paper: 8 s on a V100"


def dice(one, other) -> float:
    return 2 * float((one & other).sum()) / max(float(one.sum() + other.sum()), 1)


def of_engines(volume, rounds):
    """The same network by each engine, as precise as this processor likes it best."""
    names = ["torch", *(name for name in engine.ENGINES if engine.installed(name))]
    loaded = {name: models.load(Analysis(engine=name)) for name in names}
    taken = timed({name: lambda one=one: one.predict(volume) for name, one in loaded.items()}, rounds)
    exact = models.load(Analysis(engine="torch", precision="float32")).predict(volume)
    for name, seconds in taken.items():
        found = loaded[name].predict(volume)
        apart = 1 - dice(exact.lesion_mask, found.lesion_mask)
        precision = loaded[name].settings["precision"]
        yield Line(
            f"lungs and lesions of {len(volume.array)} real slices by {name}, {precision}",
            f"{seconds:.2f} s; 1 − Dice of lesions with float32: {apart:.4f}",
            taken["torch"] / seconds,
        )


def whole(series, what, rounds, goal):
    """Files → masks, report, pictures, as the daemon and ``triage predict`` judge."""
    model, config, stages = models.load(Analysis()), Config(), []
    with TemporaryDirectory() as name:
        for number in range(rounds + 1):
            folder, start = Path(name) / str(number), perf_counter()
            answer = judge(series, model, config, folder, datetime.now(UTC)).answer
            stages.append({**answer.seconds, "total": perf_counter() - start})
    taken = {stage: median(one.get(stage, 0) for one in stages[1:]) for stage in stages[0]}
    told = ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in taken.items() if stage != "total")
    met = taken["total"] <= goal if goal else None
    return Line(
        what, f"{taken['total']:.2f} s: {told}", goal=f"≤ {goal:g} s; {V100}" if goal else "", met=met
    )


def on_a_gpu(volume, rounds) -> Line:
    what, goal = f"HU → masks on a GPU, {len(volume.array)} made-up slices", "≤ 0.5 s on an H200"
    if not torch.cuda.is_available():
        return Line(what, "no GPU here: not measured", goal=goal)
    model = models.load(Analysis(device="cuda"))
    start = perf_counter()
    found = model.predict(volume)
    first = perf_counter() - start
    seconds = timed({"gpu": lambda: model.predict(volume)}, rounds)["gpu"]
    apart = 1 - dice(models.load(Analysis(device="cpu")).predict(volume).lesion_mask, found.lesion_mask)
    told = f"{seconds:.2f} s on {torch.cuda.get_device_name()}, {first:.2f} s when graphs are recorded"
    measured = f"{told}; 1 − Dice of lesions with the CPU: {apart:.4f}"
    return Line(what, measured, goal=goal, met=seconds <= 0.5)


def lines(quick: bool) -> list[Line]:
    rounds = 1 if quick else ROUNDS
    real = choose(find_instances([DATA / "dicom" / SERIES])[0], Assemble())
    volume = read(real)
    found = list(of_engines(volume, rounds))
    found.append(whole(real, f"files → results, {len(volume.array)} real slices", rounds, 5))
    with TemporaryDirectory() as name:
        made_up = study(Path(name), 125 if quick else SLICES)
        found.append(whole(made_up, f"files → results, {len(made_up.instances)} made-up slices", rounds, 5))
        found.append(on_a_gpu(read(made_up), rounds))
    return found


if __name__ == "__main__":
    show(lines(quick="--quick" in sys.argv))
