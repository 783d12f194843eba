"""The network fails in every way: tried a few times in fresh processes, then failed for good, and said so."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch
from pydicom import dcmread

from tests import peers
from tests.boxes import Boxes
from tests.faults.children import role, running
from tests.faults.kills import PHANTOM, check_database, opened
from tests.faults.table import Context, Row
from triage import assemble, config, models
from triage.db import Database
from triage.dicom import header, phantom, spool
from triage.domain import Findings, Status, StudyState, Volume
from triage.models.compute import Compute

POISON = 32
"""Slices of the study at which the network fails."""
ATTEMPTS = 2
LEASE = 6.0
"""Seconds in which a busy machine, too, judges the healthy study; those that crash wait as long."""
CPU = Compute(torch.device("cpu"), torch.float32, 1)


def _memory() -> None:
    with CPU.running():
        raise MemoryError


def _numbers() -> None:
    CPU.map(lambda batch: batch / 0, [torch.zeros(1, 1, 2, 2)])


FAILURES: dict[str, tuple[Callable[[], object], str]] = {
    "out of memory": (_memory, "not enough memory"),
    "no numbers": (_numbers, "no numbers"),
    "hangs": (partial(time.sleep, 600), "ended without a word"),
    "aborts": (os.abort, "ended without a word"),
    "native crash": (partial(ctypes.string_at, 0), "ended without a word"),
}
"""{name: (what the network does, what is said of the study in the end)}"""


class Poisoned(Boxes):
    """Works, but for one study."""

    fails: Callable[[], object]

    def predict(self, volume: Volume) -> Findings:
        if len(volume.array) == POISON:
            self.fails()
        return super().predict(volume)


def poisoned(name: str, _folder: Path) -> None:
    """In the analyzer's process."""
    network = Poisoned()
    network.fails = FAILURES[name][0]
    models.load = lambda _analysis: network


def every_failure(context: Context) -> dict[str, Row]:
    some = list(FAILURES)[:: context.number(4, 1)]
    return {name: one_failure(context, name) for name in some}


def one_failure(context: Context, name: str) -> Row:
    """One poisonous study before a healthy one; a supervisor starts the analyzer as often as it ends."""
    row = Row()
    home = context.folder / name.replace(" ", "_")
    analysis = {"lease_seconds": LEASE, "maximum_attempts": ATTEMPTS, "retry_seconds": 0.2}
    path = peers.write_config(home, analysis=analysis, results={"key_slices": False, "picture": False})
    settings = config.load(path, {})
    with opened(settings) as db:
        db.migrate()
        uids = [_arrived(db, settings, home, slices) for slices in (POISON, 30)]
        starts, began, healthy = 0, time.monotonic(), 0.0
        while not _all_settled(db) and starts < 4 * ATTEMPTS and time.monotonic() - began < 180:
            starts += 1
            with running(
                role, "analyzer", path, context.folder / "log", None, partial(poisoned, name)
            ) as one:
                while one.is_alive() and not _all_settled(db):
                    db.release_leases(datetime.now(UTC))  # as the clerk does
                    if not healthy and _states(db, uids[1:]) == {StudyState.ANALYZED}:
                        healthy = time.monotonic() - began
                    time.sleep(0.1)
        poison, *others = (db.entry(uid) for uid in uids)
        assert poison is not None
        row.tries = starts
        row.expect(poison.study.state is StudyState.FAILED, f"it is {poison.study.state}")
        row.expect(FAILURES[name][1] in poison.priority.reason, f"said: {poison.priority.reason}")
        row.expect("given up" in poison.priority.reason, f"said: {poison.priority.reason}")
        said = {result.status for result in db.results(uids[0])}
        row.expect(said == {Status.FAILED}, f"answers: {said}")
        row.expect(starts <= ATTEMPTS + 2, f"{starts} processes")
        row.keep(
            all(one and one.study.state is StudyState.ANALYZED for one in others), "a healthy study waits"
        )
        check_database(settings, row)
    row.recovered.append(healthy or time.monotonic() - began)
    row.figure = f"given up after {time.monotonic() - began:.0f} s and {starts} processes"
    return row


def _arrived(db: Database, settings: config.Config, home: Path, slices: int) -> str:
    """A study that is ready to be judged; the more slices, the sooner it came."""
    now = datetime.now(UTC)
    for path in phantom.write_study(home / f"study{slices}", **{**PHANTOM, "seed": slices, "slices": slices}):
        syntax, body = header.split(path.read_bytes())
        filed = spool.file(settings.storage.spool, bytes(body), spool.read(bytes(body), syntax), "SCANNER")
        assemble.register(db, settings, filed.instance, now)
    study = db.quiet_study(now)
    assert study is not None
    db.mark_ready(study)
    return str(dcmread(path).StudyInstanceUID)


def _states(db: Database, uids: list[str]) -> set[StudyState]:
    return {entry.study.state for uid in uids if (entry := db.entry(uid))}


def _all_settled(db: Database) -> bool:
    return all(
        entry.study.state is StudyState.ANALYZED or "given up" in entry.priority.reason
        for entry in db.search("")
    )
