"""The traffic of a big department against the whole daemon: nothing piles up, grows or slows down."""

from __future__ import annotations

import itertools
import sqlite3
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import Queue
from statistics import median

from pydicom import dcmread
from pydicom.uid import generate_uid

from tests import peers, wire
from tests.faults.children import Footprint, ask, footprint
from tests.faults.kills import check_database
from tests.faults.receiving import stored
from tests.faults.table import Context, Row
from tests.test_daemon import children
from triage import config
from triage.config import Config
from triage.dicom import phantom, sender

STUDIES_AN_HOUR = 300
QUICKEST_SECONDS = 4
"""Between two studies, where there is less than an hour for them."""
SENDERS = 3
KINDS: tuple[dict[str, object], ...] = (
    {"slices": 30, "rows": 64, "slice_spacing": 8.0},
    {"slices": 60, "rows": 128, "slice_spacing": 4.0},
    {"slices": 40, "rows": 128, "slice_spacing": 6.0, "transfer_syntax_uid": "1.2.840.10008.1.2.4.70"},
    {"slices": 30, "rows": 64, "slice_spacing": 8.0, "missing": (12, 13)},
)
"""Small ones, larger ones, compressed ones, and some that cannot be judged."""
SAMPLE_SECONDS = 5.0
MOST_GROWTH = 0.02
SETTLED = ("analyzed", "rejected", "failed")


@dataclass
class Ledger:
    """What was sent, when it was settled, and what the roles held meanwhile."""

    sent: dict[str, tuple[float, int]] = field(default_factory=dict)
    """Study Instance UID → when its last slice was acknowledged, and how many slices it has."""
    settled: dict[str, float] = field(default_factory=dict)
    held: dict[str, list[Footprint]] = field(default_factory=lambda: defaultdict(list))


def soak(context: Context) -> Row:
    """300 studies an hour, or as many in less time; some senders hang up in the midst, some send twice."""
    row, ledger = Row(), Ledger()
    seconds = context.seconds or 3600.0
    count = int(min(max(1.0, seconds / 3600) * STUDIES_AN_HOUR, seconds / QUICKEST_SECONDS))
    models = [_template(context.folder / f"kind{n}", n, kind) for n, kind in enumerate(KINDS)]
    with peers.pacs(context.folder / "pacs") as (port, received):
        path = peers.write_config(
            context.folder / "daemon",
            port,
            analysis={"minimum_lung_ml": 0},
            assemble={"quiet_seconds": 5},
            listener=context.listener,
        )
        settings, log = config.load(path, {}), context.folder / "log"
        with peers.daemon(path, log) as process:
            over = threading.Event()
            watcher = threading.Thread(target=_watch, args=(process.pid, settings, ledger, over))
            watcher.start()
            _send(settings, models, count, seconds, ledger, lambda: process.poll() is None)
            deadline = time.monotonic() + 120
            while len(ledger.settled) < len(ledger.sent) and time.monotonic() < deadline:
                row.expect(process.poll() is None, "the daemon ended")
                time.sleep(1)
            time.sleep(5)
            over.set()
            watcher.join()
        row.expect(process.returncode == 0, f"the daemon ended with {process.returncode}")
        row.expect("Traceback" not in log.read_text(), "a traceback in the log")
        _judge(settings, ledger, row)
        owed = ask(settings, "SELECT count(*), sum(state = 'sent') FROM delivery")[0]
        row.keep(owed[0] == (owed[1] or 0), f"of {owed[0]} objects {owed[1]} were delivered")
        row.figure += f", {len(received)} objects delivered"
    return row


def _template(folder: Path, seed: int, kind: dict[str, object]) -> list[Path]:
    return sorted(phantom.write_study(folder, seed=seed, **kind))  # type: ignore[arg-type]


def _send(
    settings: Config,
    models: list[list[Path]],
    count: int,
    seconds: float,
    ledger: Ledger,
    alive: Callable[[], bool],
) -> None:
    """A study in turn of each kind, evenly over the time; what was not taken is sent again."""
    queue: Queue[int | None] = Queue()
    begin = time.monotonic()

    def work() -> None:
        while (number := queue.get()) is not None:
            time.sleep(max(0.0, begin + number * seconds / count - time.monotonic()))
            _send_one(settings, models[number % len(models)], number, ledger, alive)

    threads = [threading.Thread(target=work) for _ in range(SENDERS)]
    for number in itertools.chain(range(count), [None] * SENDERS):
        queue.put(number)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _send_one(
    settings: Config, model: list[Path], number: int, ledger: Ledger, alive: Callable[[], bool]
) -> None:
    folder = model[0].parent.parent / f"study{number}"
    files = list(_renamed(model, folder))
    uid = str(dcmread(files[0], specific_tags=["StudyInstanceUID"]).StudyInstanceUID)
    if number % 7 == 3:  # hangs up in the midst of an object first
        with suppress(OSError):
            connection, _ = wire.associate(settings.listener.port)
            connection.sendall(b"".join(stored(files[0]))[:-99])
            wire.hang_up(connection, rudely=number % 2 == 0)
    left = files + files[:5] if number % 7 == 5 else files  # some come twice
    while left and alive():
        outcomes = sender.send(
            left, peers.destination(settings), calling_ae_title="SCANNER", timeout_seconds=30
        )
        left = [one.path for one in outcomes if not one.sent]
    ledger.sent[uid] = (time.monotonic(), len(files))
    for path in files:
        path.unlink()
    folder.rmdir()


def _renamed(model: list[Path], folder: Path) -> Iterator[Path]:
    """The same images as a study of their own."""
    folder.mkdir()
    study, series = generate_uid(), generate_uid()
    for path in model:
        one = dcmread(path)
        one.StudyInstanceUID, one.SeriesInstanceUID = study, series
        one.SOPInstanceUID = one.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        one.save_as(folder / path.name)
        yield folder / path.name


def _watch(pid: int, settings: Config, ledger: Ledger, over: threading.Event) -> None:
    listed = f"SELECT study_instance_uid FROM study WHERE state IN {SETTLED}"
    sampled = 0.0
    while not over.wait(0.5):
        now = time.monotonic()
        with suppress(sqlite3.Error):
            for (uid,) in ask(settings, listed):
                if uid in ledger.sent:
                    ledger.settled.setdefault(uid, now)
        if now - sampled >= SAMPLE_SECONDS:
            sampled = now
            for role, one in {"supervisor": pid, **children(pid)}.items():
                with suppress(OSError, KeyError):
                    ledger.held[role].append(footprint(one))


def _judge(settings: Config, ledger: Ledger, row: Row) -> None:
    """The second half against the fifth before it: until then pools and caches fill."""
    row.tries = len(ledger.sent)
    for uid, (_, slices) in ledger.sent.items():
        row.keep(uid in ledger.settled, f"study {uid} was not settled")
        (found,) = ask(settings, f"SELECT count(*) FROM instance WHERE study_instance_uid = '{uid}'")
        row.keep(found[0] == slices, f"study {uid} has {found[0]} of {slices} slices")
    failed = ask(settings, "SELECT count(*) FROM study WHERE state = 'failed'")[0][0]
    row.expect(not failed, f"{failed} studies failed")
    grown = {}
    for role, held in ledger.held.items():
        size = len(held)
        before, after = held[4 * size // 10 : 6 * size // 10], held[8 * size // 10 :]
        if not before or not after:
            continue
        megabytes = [median(one.megabytes for one in part) for part in (before, after)]
        grown[role] = megabytes[1] / megabytes[0] - 1
        row.expect(grown[role] < MOST_GROWTH, f"{role} grew from {megabytes[0]:.0f} to {megabytes[1]:.0f} MB")
        for what in ("files", "threads"):
            counts = [median(getattr(one, what) for one in part) for part in (before, after)]
            row.expect(counts[1] <= counts[0] + 1, f"{role}: {what} went from {counts[0]} to {counts[1]}")
    waits = [ledger.settled[uid] - sent for uid, (sent, _) in ledger.sent.items() if uid in ledger.settled]
    third = max(len(waits) // 3, 1)
    first, last = median(waits[:third] or [0]), median(waits[-third:] or [0])
    row.expect(last < 1.25 * first + 2, f"answers took {first:.1f} s, in the end {last:.1f} s")
    most = ", ".join(f"{role} {share:+.1%}" for role, share in sorted(grown.items()))
    row.figure = f"memory {most}; answered after {first:.1f} s at first, {last:.1f} s at last"
    check_database(settings, row)
