"""Inputs made wrong: each is answered, quickly, and none ends the process or fills its memory."""

from __future__ import annotations

import faulthandler
import json
import os
import random
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.faults.children import footprint, running
from tests.faults.inputs import WRONG, WRONG_ARCHIVES, archives, samples
from tests.faults.mutations import Sample, mutated
from tests.faults.readers import STUCK, Read, attempted, kilobytes, limit_memory, read_image
from tests.faults.table import Context, Row
from triage import pull

MOST_MEGABYTES = 1024
"""By which an input may make the process grow."""


def read_archive(raw: bytes, path: Path) -> None:
    """The way of an upload or import up to the spool."""

    class Nothing:
        def sop_instance_uids(self, _study: str) -> set[str]:
            return set()

    named = path.with_suffix(".zip")
    named.write_bytes(raw)
    pull.read_files(pull.find([named]), Nothing(), None)  # type: ignore[arg-type]
    with named.open("rb") as stream:
        for file, content in pull.streamed(named, stream, 128 << 20):
            pull.read_in(file, content, Nothing(), None, pull.FilesRead())  # type: ignore[arg-type]


KINDS: dict[str, tuple[Read, Callable[[], Sequence[Sample]], dict[str, Callable[[], bytes]]]] = {
    "image": (read_image, samples, WRONG),
    "archive": (read_archive, archives, WRONG_ARCHIVES),
}
"""{kind: (who reads it, good ones to be mutated, wrong ones made by hand)}"""


def images(context: Context) -> Row:
    """Mutated images, real headers and made-up ones in every encoding, and those made wrong by hand."""
    return _fuzz(context, "image", context.number(1200, 1_000_000))


def zips(context: Context) -> Row:
    """Mutated zip files, and those that lead elsewhere, blow up, lie or nest."""
    return _fuzz(context, "archive", context.number(250, 20_000))


def _fuzz(context: Context, kind: str, count: int) -> Row:
    """In a process of its own; when an input ends it, the next one goes on behind that input."""
    memory = Path("/dev/shm")
    with TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        return _fuzz_in(Path(folder), context, kind, count)


def _fuzz_in(folder: Path, context: Context, kind: str, count: int) -> Row:
    row, done, answers, growth, slowest = Row(), 0, Counter[str](), 0.0, 0.0
    ends = context.ends()
    report, log = folder / "report", folder / "log"
    while done < count and not ends():
        report.unlink(missing_ok=True)
        with running(work, kind, folder, context.seed, done, count, context.seconds) as process:
            process.join()
            code = process.exitcode
        if not report.exists():
            row.wrong.append(f"the reader did not begin: {log.read_text()[-1500:]}")
            break
        told = json.loads(report.read_text())
        done, slowest = int((folder / "at").read_text()), max(slowest, told["slowest"])
        answers.update(told["answers"])
        growth = max(growth, told["growth"])
        row.wrong += told["wrong"]
        if code == 0:
            done = told["done"]
        else:
            said = log.read_text()[-1500:] if code == 1 else ""
            row.wrong.append(f"input {done} of seed {context.seed} ended the process with {code} {said}")
            done += 1
        if len(row.wrong) > 100:
            break
    row.tries = done
    row.expect(growth < MOST_MEGABYTES, f"grew by {growth:.0f} MB")
    readable = f"{100 * answers['taken'] / max(done, 1):.0f} % readable nonetheless, "
    said = readable if kind == "image" else ""  # an archive is gone through, whatever its members are
    row.figure = f"{said}slowest {slowest:.1f} s, {growth:+.0f} MB"
    return row


def inputs(kind: str, seed: int, begin: int, count: int) -> Iterator[tuple[str, bytes]]:
    """Input *n* depends on kind, seed and *n* alone: whatever one does can be done again."""
    _, good, bad = KINDS[kind]
    by_hand = list(bad.items())
    corpus = good()
    for number in range(begin, count):
        if number < len(by_hand):
            name, make = by_hand[number]
            yield name, make()
            continue
        chance = random.Random(f"{kind} {seed} {number}")
        sample = chance.choice(corpus)
        yield f"{number} ({sample.name})", mutated(sample, chance)


def work(kind: str, folder: Path, seed: int, begin: int, count: int, seconds: float | None) -> None:
    """In a process of its own: read one input after the other; what is said of them goes to a file."""
    warnings.simplefilter("ignore")
    read, path = KINDS[kind][0], folder / "input.dcm"
    told: dict[str, Any] = {"done": begin, "slowest": 0.0, "answers": Counter(), "wrong": [], "growth": 0.0}
    log, at = (folder / "log").open("a"), os.open(folder / "at", os.O_WRONLY | os.O_CREAT)
    start, before = time.monotonic(), footprint(os.getpid()).megabytes
    limit_memory()

    def report() -> None:
        told["growth"] = max(told["growth"], kilobytes("VmHWM") / 1024 - before)
        (folder / "report").write_text(json.dumps(told))

    def attempt(name: str, raw: bytes) -> None:
        faulthandler.dump_traceback_later(STUCK, exit=True, file=log)
        began = time.perf_counter()
        answer, complaint = attempted(read, raw, path)
        told["answers"][answer] += 1
        told["wrong"] += [f"input {name}: {complaint}"] if complaint else []
        faulthandler.cancel_dump_traceback_later()
        told["slowest"] = max(told["slowest"], time.perf_counter() - began)

    for name, raw in inputs(kind, seed, begin, count):
        if told["done"] % 200 == 0 or told["done"] == begin:
            report()
        os.pwrite(at, b"%d" % told["done"], 0)
        attempt(name, raw)
        told["done"] += 1
        if seconds is not None and time.monotonic() - start > seconds:
            break
    report()
