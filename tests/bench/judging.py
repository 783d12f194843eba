"""One study of 300 slices, files → answer and results; what runs networks; each network.

    python -m tests.bench.judging

Where there is a GPU also from HU to masks on it. Made-up slices of 512 × 512 at 1.25 mm, in turn, medians.
"""

from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter

import torch
from pydicom import dcmread

from tests.bench import networks
from tests.bench.table import Line, show
from tests.needs import DATA
from triage import analyze, models
from triage.config import Analysis, Assemble, Config
from triage.dicom.header import find_instances
from triage.dicom.phantom import write_study
from triage.dicom.series import choose
from triage.dicom.volume import read
from triage.models import engine

SLICES, ROUNDS = 300, 5
GOAL_SECONDS, GOAL_GPU_SECONDS = 5.0, 0.5


def smooth(folder, slices):
    """Every slice several times in turn: drawing them all takes half a minute."""
    times = 5
    drawn = [
        dcmread(path)
        for path in write_study(
            folder / "drawn", seed=7, slices=slices // times, rows=512, lesion_fraction=0.2
        )
    ]
    drawn.sort(key=lambda one: one.ImagePositionPatient[2])
    below = folder / "source"
    below.mkdir()
    for number in range(slices):
        one = drawn[number // times]
        one.SOPInstanceUID = one.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.{number + 1}"
        one.InstanceNumber, one.SliceThickness = number + 1, 1.25
        one.ImagePositionPatient = [*one.ImagePositionPatient[:2], 375 / slices * number]
        one.save_as(below / f"{number:04}.dcm")
    return choose(find_instances([below])[0], Assemble())


def engines(volume, rounds):
    """HU → masks by each engine in turn, in the precision that ``auto`` takes."""
    names = [name for name in (*engine.ENGINES, "torch") if engine.installed(name)]
    loaded = {name: models.load(Analysis(device="cpu", engine=name)) for name in names}
    taken = {name: [] for name in names}
    for _ in range(rounds + 1):  # in the first, plans are made
        for name, model in loaded.items():
            taken[name].append(networks.seconds(model, volume)[0])
    seconds = {name: median(times[1:]) for name, times in taken.items()}
    for name, value in seconds.items():
        what = f"{len(volume.array)} slices, HU → masks by {name}: torch over it"
        yield Line(what, f"{value:.2f} s", seconds["torch"] / value)


def whole(chosen, rounds):
    """From files to results on disk, as the analyzer and ``triage predict`` judge."""
    config = Config()
    model, taken = models.load(config.analysis), []
    for _ in range(rounds + 1):
        with TemporaryDirectory() as folder:
            start = perf_counter()
            answer = analyze.judge(chosen, model, config, Path(folder), datetime.now(UTC)).answer
            taken.append((perf_counter() - start, answer.seconds))
    stages = {name: median(seconds[name] for _, seconds in taken[1:]) for name in taken[0][1]}
    seconds = median(seconds for seconds, _ in taken[1:])
    told = ", ".join(f"{name} {value:.2f}" for name, value in stages.items() if name != "total")
    what, goal = f"{len(chosen.instances)} slices, files → results", f"≤ {GOAL_SECONDS:g} s"
    yield Line(what, f"{seconds:.2f} s: {told}", None, goal, seconds <= GOAL_SECONDS)


def on_gpu(volume, rounds):
    what, goal = f"{len(volume.array)} slices, HU → masks on a GPU", f"≤ {GOAL_GPU_SECONDS:g} s"
    if not torch.cuda.is_available():
        yield Line(what, "not measured: no GPU here", None, goal)
        return
    model = models.load(Analysis(device="cuda"))
    seconds = median([networks.seconds(model, volume)[0] for _ in range(rounds + 1)][1:])
    yield Line(what, f"{seconds:.2f} s", None, goal, seconds <= GOAL_GPU_SECONDS)


def each_network(rounds):
    """On a real series, where it is at hand."""
    if not (DATA / "dicom" / networks.SERIES).is_dir():
        yield Line("each network", "not measured: no real series here")
        return
    for name, study_seconds, slice_seconds in networks.measured([*models.MODELS], rounds):
        goal, met = ("≤ 0.1 s a slice", slice_seconds <= 0.1) if name == "ssm" else ("", None)
        yield Line(
            f"{name}: a real series", f"{study_seconds:.2f} s, {slice_seconds:.3f} s a slice", None, goal, met
        )


def lines(quick=False):
    slices, rounds = (60, 1) if quick else (SLICES, ROUNDS)
    with TemporaryDirectory() as folder:
        chosen = smooth(Path(folder), slices)
        volume = read(chosen)
        yield from engines(volume, rounds)
        yield from whole(chosen, rounds)
        yield from on_gpu(volume, rounds)
    yield from each_network(1 if quick else 3)


if __name__ == "__main__":
    show(lines())
