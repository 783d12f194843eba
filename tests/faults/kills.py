"""Acknowledged means kept: kill -9 while slices come, and at each edge of each step thereafter."""

from __future__ import annotations

import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from tests import peers
from tests.faults.children import ask, listening, running, steps
from tests.faults.table import Context, Row
from tests.hospital import NOON, Hospital, hospital
from tests.objects import body, ct, save
from triage import config
from triage.config import Config
from triage.db import Database
from triage.dicom import header, phantom, sender
from triage.domain import DeliveryState, Instance, StudyState

SENDERS = 4
SLICES_EACH = 6
PHANTOM = {"slices": 30, "rows": 64, "slice_spacing": 8.0}
OWNER = "here/analyzer"


# --- while slices come ----------------------------------------------------------------------------


def while_receiving(context: Context) -> Row:
    """Four senders send; the listener is killed after a random answer, or at a random edge of its work.

    After each start all that was acknowledged must be on record and on the disk, byte for byte, before
    anything is sent again; what was not is sent again, as scanners do.
    """
    row, chance = Row(), context.random
    log = context.folder / "log"
    path = peers.write_config(context.folder / "daemon", listener=context.listener)
    settings = config.load(path, {})
    Database(settings.database.url).migrate()
    known: dict[str, Path] = {}
    waiting: list[Path] = []
    for number in range(context.number(10, 270)):
        edge = chance.randrange(400) if number % 2 else None
        start = time.monotonic()
        with listening(path, log, edge) as process:
            if process.is_alive():
                row.recovered.append(time.monotonic() - start)
            check_kept(settings, known, row)
            waiting += made(context.folder / "sent", number)
            after = chance.randrange(1, len(waiting))
            taken = send_until(settings, waiting, after, process.is_alive)
            process.kill()
            process.join()
            row.tries += 1
        known |= {path.name: path for path in taken}
        waiting = [path for path in waiting if path.name not in known]
    with listening(path, log):
        taken = send_until(settings, waiting, len(waiting) + 1, lambda: True)
        known |= {path.name: path for path in taken}
        check_kept(settings, known, row)
        row.expect(len(taken) == len(waiting), "what is sent again is taken")
    check_database(settings, row)
    left = list(settings.storage.spool.glob("incoming/*"))
    row.expect(not left, f"{len(left)} unfinished files are left")
    row.figure = f"{len(known)} slices acknowledged, each on record and on the disk"
    return row


def made(folder: Path, number: int) -> list[Path]:
    """Slices of one study, of a series for each sender; the file's name is the SOP Instance UID."""
    study, paths = f"1.2.{number + 1}", []
    for series in range(1, SENDERS + 1):
        for slice_number in range(1, SLICES_EACH + 1):
            uid = f"{study}.{series}.{slice_number}"
            one = ct(slice_number, StudyInstanceUID=study, SeriesInstanceUID=f"{study}.{series}")
            one.SOPInstanceUID = uid
            paths.append(save(one, folder / uid))
    return paths


def send_until(settings: Config, files: list[Path], enough: int, alive: Callable[[], bool]) -> list[Path]:
    """Several senders at once, until so many answers have come or the listener is dead; what it took."""
    taken: list[Path] = []
    end = threading.Event()

    def send(own: list[Path]) -> None:
        while own and alive() and not end.is_set():
            outcomes = sender.send(
                own[:3], peers.destination(settings), calling_ae_title="SCANNER", timeout_seconds=5
            )
            taken.extend(outcome.path for outcome in outcomes if outcome.sent)
            own = [outcome.path for outcome in outcomes if not outcome.sent] + own[3:]
            if len(taken) >= enough:
                end.set()

    threads = [threading.Thread(target=send, args=(files[n::SENDERS],)) for n in range(SENDERS)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads) and not end.wait(0.002):
        pass
    for thread in threads:
        thread.join(0 if end.is_set() else None)  # those in mid-association are cut off by the kill
    return list(taken)


def check_kept(settings: Config, known: dict[str, Path], row: Row) -> None:
    found = dict(ask(settings, "SELECT sop_instance_uid, path FROM instance"))
    for uid, sent in known.items():
        there = Path(found.get(uid, "/nowhere"))
        row.keep(there.exists() and body(there) == body(sent), f"slice {uid}")


def check_database(settings: Config, row: Row) -> None:
    (said,) = ask(settings, "PRAGMA integrity_check")
    row.expect(said == ("ok",), f"integrity: {said}")
    leases = ask(
        settings, "SELECT count(*) FROM study WHERE lease_owner IS NOT NULL AND state != 'analyzing'"
    )
    row.expect(leases == [(0,)], "a lease without work")


# --- at each edge of each step --------------------------------------------------------------------


def one_study(here: Hospital, folder: Path) -> None:
    """A study that can be judged."""
    phantom.write_study(folder, seed=7, **PHANTOM)
    peers.scan(folder, here.config)


def late_slices(here: Hospital, folder: Path) -> None:
    """A study that was judged and delivered, and of which two more slices came thereafter."""
    phantom.write_study(folder, seed=7, **PHANTOM)
    late = sorted(folder.iterdir())[-2:]
    for path in late:
        path.rename(folder.parent / path.name)
    peers.scan(folder, here.config)
    here.work()
    for path in late:
        (folder.parent / path.name).rename(path)
    peers.scan(folder, here.config)


def not_analysable(here: Hospital, folder: Path) -> None:
    """A study that cannot be judged, which is reported."""
    phantom.write_study(folder, seed=7, **{**PHANTOM, "missing": (12, 13)})
    peers.scan(folder, here.config)


STUDIES: dict[str, tuple[Callable[[Hospital, Path], None], StudyState, int, int]] = {
    "one study": (one_study, StudyState.ANALYZED, 1, 4),
    "late slices": (late_slices, StudyState.ANALYZED, 2, 8),
    "not analysable": (not_analysable, StudyState.REJECTED, 1, 1),
}
"""{name: (how it came, its state in the end, revisions, objects delivered)}"""


def at_each_step(context: Context) -> Row:
    """assemble, analyze and deliver are killed before and after each write, commit and C-STORE they do.

    Another process goes on: every second time as the same owner, else as another one when the lease is over.
    """
    row = Row()
    edges_seen = 0
    for name in STUDIES:
        with Ward(context.folder / name.replace(" ", "_"), name) as ward:
            edges = ward.edges()
            edges_seen += edges
            wanted = context.number(3 if name != "one study" else 4, edges)
            for place in range(wanted):
                ward.kill(place * edges // wanted, place, row)
    row.figure = f"{edges_seen} edges in {len(STUDIES)} ways of a study, one report a revision"
    return row


class Ward:
    """One study that has come, put back to that moment again and again."""

    def __init__(self, folder: Path, name: str) -> None:
        self._name, self._folder = name, folder
        self._home, self._template, self._log = folder / "daemon", folder / "before", folder / "log"
        self._now = NOON + timedelta(days=1)
        self._received: list[Instance] = []
        self._before: list[Instance] = []

    def __enter__(self) -> Ward:
        self._pacs = peers.pacs(self._folder / "pacs")
        port, self._received = self._pacs.__enter__()
        arrive = STUDIES[self._name][0]
        (self._folder / "pacs").mkdir(parents=True)
        with hospital(self._home, port, results={"sr_not_judged": True}) as here:
            arrive(here, self._folder / "study")
        self._before = list(self._received)
        self._copy(self._folder, self._template)
        return self

    def __exit__(self, *_: object) -> None:
        self._pacs.__exit__(None, None, None)

    @property
    def _path(self) -> Path:
        return self._home / "config.yaml"

    def edges(self) -> int:
        """How many there are, counted in a run that nobody kills."""
        self._go(OWNER, self._now, None)
        return int((self._home / "edges").read_text())

    def kill(self, edge: int, number: int, row: Row) -> None:
        self._copy(self._template, self._folder)
        self._received[:] = self._before
        code = self._go(OWNER, self._now, edge)
        row.tries += 1
        row.expect(code == -signal.SIGKILL, f"{self._name}, edge {edge}: it was to be killed, not {code}")
        same = number % 2 == 0
        later = self._now + timedelta(seconds=1 if same else 3600)
        with row.recovering():
            code = self._go(OWNER if same else "elsewhere/analyzer", later, None)
        row.expect(code == 0, f"{self._name}, edge {edge}: the next process ended with {code}")
        self._check(f"{self._name}, edge {edge}", row)

    def _copy(self, there: Path, here: Path) -> None:
        """The daemon's files and the PACS's."""
        for name in ("daemon", "pacs"):
            shutil.rmtree(here / name, ignore_errors=True)
            shutil.copytree(there / name, here / name)

    def _go(self, owner: str, now: object, edge: int | None) -> int | None:
        with running(steps, self._path, self._log, owner, now, edge) as process:
            process.join(120)
            return process.exitcode

    def _check(self, what: str, row: Row) -> None:
        _, state, revisions, objects = STUDIES[self._name]
        settings = config.load(self._path, {})
        check_database(settings, row)
        with opened(settings) as db:
            (entry,) = db.search("")
            uid = entry.study.study_instance_uid
            row.expect(entry.study.state is state, f"{what}: {entry.study.state}")
            numbers = [result.revision for result in db.results(uid)]
            row.expect(sorted(numbers) == list(range(1, revisions + 1)), f"{what}: revisions {numbers}")
            sent = entry.deliveries.get(DeliveryState.SENT, 0)
            row.expect(sum(entry.deliveries.values()) == sent, f"{what}: {entry.deliveries}")
            for one in db.instances(uid):
                raw = one.path.read_bytes() if one.path.exists() else b""
                kept = bool(raw) and header.digest_of(header.split(raw)[1]) == one.digest
                row.keep(kept, f"{what}: slice {one.sop_instance_uid}")
        delivered = {one.sop_instance_uid for one in self._received}
        row.keep(len(delivered) == objects, f"{what}: the PACS has {len(delivered)} objects, not {objects}")
        others = list((self._folder / "pacs").glob("*/*/conflicts/*"))
        row.expect(not others, f"{what}: {len(others)} objects came again with other bytes")


@contextmanager
def opened(settings: Config) -> Iterator[Database]:
    db = Database(settings.database.url)
    try:
        yield db
    finally:
        db.close()
