"""The daemon's roles in processes of their own that can be killed, at a named moment or from outside."""

from __future__ import annotations

import logging
import os
import signal
import sqlite3
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from itertools import count
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from pynetdicom.association import Association
from sqlalchemy.engine.default import DefaultDialect

from tests import peers
from tests.boxes import Boxes
from tests.forked import PROCESSES
from triage import analyze, assemble, config, daemon, deliver
from triage.config import Config
from triage.db import Database

ACTS: tuple[tuple[Any, str], ...] = (
    (os, "fsync"),
    (os, "link"),
    (os, "replace"),
    (os, "unlink"),
    (os, "mkdir"),
    (DefaultDialect, "do_commit"),
    (Association, "send_c_store"),
)
"""Whatever others can see of a step; each has an edge before it and one behind it."""
PATIENCE = 60


def die_at(edge: int | None) -> Callable[[], int]:
    """Kill this process at that edge, as kill -9 and a power cut do. Gives how many have been passed."""
    passed = count()
    seen = [0]

    def die_here() -> None:
        seen[0] = next(passed)
        if seen[0] == edge:
            os.kill(os.getpid(), signal.SIGKILL)

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def act(*args: Any, **kwargs: Any) -> Any:
            die_here()
            result = function(*args, **kwargs)
            die_here()
            return result

        return act

    for where, name in ACTS:
        setattr(where, name, watched(getattr(where, name)))
    return lambda: seen[0]


def _unchanged(_folder: Path) -> None:
    pass


def role(
    name: str,
    path: Path,
    log: Path,
    edge: int | None = None,
    prepare: Callable[[Path], None] = _unchanged,
) -> None:
    """One role of the daemon, until a signal; ``prepare`` changes something in its process before."""
    _log_to(log)
    stop = daemon.stopped_by_signals()
    prepare(path.parent)
    if edge is not None:
        die_at(edge)
    daemon.ROLES[name](config.load(path, {}), stop)


def steps(path: Path, log: Path, owner: str, now: datetime, edge: int | None = None) -> None:
    """What the clerk and the analyzer do at their start, and then all there is to do."""
    _log_to(log)
    settings = config.load(path, {})
    db = Database(settings.database.url)
    passed = die_at(edge)
    db.release_leases(now, owner)
    db.restart_quiet_periods(now)
    db.restart_waits(now)
    now += timedelta(seconds=settings.assemble.quiet_seconds)
    work = [
        partial(assemble.step, db, settings, now),
        partial(analyze.step, db, settings, Boxes(), owner, now),
        *(partial(deliver.step, db, settings, one, now) for one in settings.destinations),
    ]
    while any(step() for step in work):
        pass
    (path.parent / "edges").write_text(str(passed()))


@contextmanager
def running(target: Callable[..., None], *args: Any) -> Iterator[ForkServerProcess]:
    """The function in a process of its own, which is gone in the end."""
    process = PROCESSES.Process(target=target, args=args)
    process.start()
    try:
        yield process
    finally:
        process.terminate()
        process.join(PATIENCE)
        if process.exitcode is None:
            process.kill()
            process.join()


@contextmanager
def listening(
    path: Path, log: Path, edge: int | None = None, prepare: Callable[[Path], None] = _unchanged
) -> Iterator[ForkServerProcess]:
    """The listener, once it answers; it may have died before, at its edge."""
    peer = peers.destination(config.load(path, {}))
    with running(role, "listener", path, log, edge, prepare) as process:
        peers.wait_until(lambda: not process.is_alive() or peers.answers(peer), log=log)
        yield process


def _log_to(log: Path) -> None:
    with log.open("ab") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    threading.excepthook = lambda arguments: logging.getLogger(__name__).error("%s", arguments.exc_value)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")


@dataclass(frozen=True)
class Footprint:
    """What a process holds; the database's files, of which a pool keeps some open, do not count."""

    megabytes: float
    files: int
    threads: int

    def __str__(self) -> str:
        return f"{self.megabytes:.0f} MB, {self.files} files, {self.threads} threads"


def footprint(pid: int) -> Footprint:
    status = Path(f"/proc/{pid}/status").read_text()
    told = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    files = sum(1 for one in Path(f"/proc/{pid}/fd").iterdir() if not _is_database(one))
    return Footprint(int(told["VmRSS"].split()[0]) / 1024, files, int(told["Threads"]))


def _is_database(descriptor: Path) -> bool:
    try:
        return "triage.db" in os.readlink(descriptor)
    except OSError:
        return True  # closed meanwhile


def ask(settings: Config, query: str) -> list[Any]:
    """Rows of the daemon's database, read beside it."""
    with closing(sqlite3.connect(settings.database.file)) as connection:
        return connection.execute(query).fetchall()
