"""Whether cost grows with work: studies one after the other, slices of one study, and the start.

    python -m tests.bench.scale [--quick]

Studies are of 24 small slices and go the daemon's own way: registered, assembled, judged by a network
without weights and written; the many in between are answered without files. Memory is the peak of a process
of its own, the masks it is given included. The start is from the command to an answered C-ECHO.
"""

import json
import resource
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter, sleep

import numpy as np

from tests import peers
from tests.bench.results import masks, study
from tests.bench.table import Line, show
from tests.results import INFO, NOW, SEVERE, positive, small_study
from triage import analyze, assemble, config, priority
from triage.config import Assemble
from triage.db import Database
from triage.dicom import seg, sender, sr, volume
from triage.dicom.header import find_instances
from triage.dicom.series import choose
from triage.domain import Findings, Series, StudyState

STUDIES, WINDOWS = 5000, 10
WHOLE = 40
"""Studies at the begin and at the end that are judged with all that is written of them."""
SLICES = (250, 500, 1000, 2000)
FLAT = 1.25
"""What costs this much more beside so much more work still counts as flat: a machine's moods do as much."""
FEW = 6
"""Images of the studies in between: registering takes most of their time."""


class Stub:
    """Finds the same in every study, at once."""

    info = INFO

    def __init__(self):
        self.settings = {}

    def predict(self, ct):
        lung = np.zeros(ct.array.shape, bool)
        lung[2:22, 20:44, 5:30] = lung[2:22, 20:44, 36:60] = True
        lesion = np.zeros_like(lung)
        lesion[5:12, 25:35, 10:20] = True
        return Findings(0.97, "classifier", True, lung, lesion)


class Hospital:
    """One database and one spool that every study of the benchmark goes through."""

    def __init__(self, folder):
        settings = {
            "storage": {"spool": folder / "spool", "minimum_free_gb": 0},
            "database": {"url": f"sqlite:///{folder}/triage.db"},
            "analysis": {"minimum_lung_ml": 1},
            "assemble": {"quiet_seconds": 1},
        }
        self.config, self.now = config.parse(settings), datetime.now(UTC)
        self.db = Database(self.config.database.url)
        self.db.migrate()
        self.images = small_study(folder / "spool" / "source").instances

    def arrive(self, number, images):
        uid = f"1.2.840.113619.{number}"
        (self.config.storage.spool / uid).mkdir()
        for image in images:
            one = replace(image, study_instance_uid=uid, digest=f"{number}.{image.digest}")
            assemble.register(self.db, self.config, one, self.now)
        self.now += timedelta(seconds=2)

    def judge(self, number):
        """The whole way."""
        self.arrive(number, self.images)
        assert assemble.step(self.db, self.config, self.now)
        assert analyze.step(self.db, self.config, Stub(), "bench", self.now)

    def answer(self, number):
        """As if it were judged, without files."""
        self.arrive(number, self.images[:FEW])
        assert self.db.mark_ready(self.db.quiet_study(self.now))
        seen = self.db.claim("bench", self.now, 900)
        answer = positive(Series(self.images, (1, 1, 1), (1, 0, 0, 0, 1, 0)))
        answer = replace(answer, study_instance_uid=seen.study_instance_uid)
        settings = self.config
        place = priority.prioritise(answer, seen.arrived_at, False, settings.priority, settings.analysis)
        assert self.db.finish(seen, answer, [], place, self.now)

    def seconds(self, numbers, judge):
        start = perf_counter()
        for number in numbers:
            judge(number)
        return (perf_counter() - start) / len(numbers)


def of_studies(quick):
    count, whole = (STUDIES // 20, WHOLE // 4) if quick else (STUDIES, WHOLE)
    with TemporaryDirectory() as folder:
        here = Hospital(Path(folder))
        here.seconds(range(-3, 0), here.judge)  # what is loaded once
        first = here.seconds(range(whole), here.judge)
        each = (count - 2 * whole) // WINDOWS
        windows = [
            here.seconds(range(whole + n * each, whole + (n + 1) * each), here.answer) for n in range(WINDOWS)
        ]
        last = here.seconds(range(count - whole, count), here.judge)
        states = here.db.counts(here.now, 7)
        assert set(states) == {StudyState.ANALYZED}, states
        here.db.close()
    for what, before, after in (
        ("a study from its first image to its answer, objects written", first, last),
        (f"a study of {FEW} images through the database alone", windows[0], windows[-1]),
    ):
        measured = f"{before * 1e3:.0f} ms at first, {after * 1e3:.0f} ms after {count} studies"
        yield Line(what, measured, after / before, f"≤ {FLAT} ×", after / before <= FLAT)


def of_slices(quick):
    sizes = SLICES[:2] if quick else SLICES
    with TemporaryDirectory() as folder:
        study(Path(folder), sizes[-1])
        command = [sys.executable, "-m", "tests.bench.scale", "--one", folder]
        told = [json.loads(subprocess.check_output([*command, str(size)])) for size in sizes]
    for what, unit, digits in (("seconds", "s", 2), ("peak", "MB", 0)):
        values = [one[what] for one in told]
        growth = (values[-1] / sizes[-1]) / (values[0] / sizes[0])
        measured = ", ".join(
            f"{size}: {value:.{digits}f} {unit}" for size, value in zip(sizes, values, strict=True)
        )
        goal = f"≤ {FLAT} × a slice"
        yield Line(f"{what} of reading, masks and report by slices", measured, growth, goal, growth <= FLAT)


def one(folder, slices):
    """A process of its own: what it takes to read so many slices and to write masks and report of them."""
    series = choose(find_instances(sorted((folder / "source").iterdir())[:slices])[0], Assemble())
    right, left, lesions = masks(slices)
    result, before = positive(series), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = perf_counter()
    volume.read(series)
    written = [
        seg.write_lungs(series, left, right, result, INFO, folder, now=NOW),
        seg.write_lesions(series, lesions, result, INFO, folder, now=NOW),
    ]
    sr.write(series, result, SEVERE, INFO, {}, folder, now=NOW, segmentations=written)
    taken, peak = perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"seconds": taken, "peak": peak / 1024, "before": before / 1024}))


def of_the_start(quick):
    for what, role in (("the listener", ["--role", "listener"]), ("the whole daemon", [])):
        taken = median(started(role) for _ in range(1 if quick else 5))
        yield Line(f"start of {what} to its first answer", f"{taken:.1f} s", None, "≤ 3 s", taken <= 3)


def started(role):
    """Seconds from the command to an answered C-ECHO, on a new spool and database."""
    with TemporaryDirectory() as folder:
        path = peers.write_config(Path(folder))
        daemon, start = peers.destination(config.load(path)), perf_counter()
        command = [sys.executable, "-m", "triage", "--config", str(path), "serve", *role]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            while not peers.answers(daemon):
                sleep(0.01)
            assert sender.echo(daemon, "BENCH", 5) is None
            taken = perf_counter() - start
            process.terminate()
    return taken


def lines(quick: bool) -> list[Line]:
    return [*of_the_start(quick), *of_studies(quick), *of_slices(quick)]


if __name__ == "__main__":
    if "--one" in sys.argv:
        one(Path(sys.argv[-2]), int(sys.argv[-1]))
    else:
        show(lines(quick="--quick" in sys.argv))
