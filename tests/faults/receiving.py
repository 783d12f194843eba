"""Whatever peers do while they send: what was acknowledged is kept, and nothing is held thereafter."""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from pydicom import dcmread
from pydicom.uid import CTImageStorage, ImplicitVRLittleEndian

from tests import peers, wire
from tests.boxes import Boxes
from tests.faults.children import Footprint, footprint, listening
from tests.faults.kills import PHANTOM, check_database, check_kept
from tests.faults.mutations import Sample, mutated
from tests.faults.table import Context, Row
from tests.objects import body, ct, save
from triage import analyze, assemble, config, daemon
from triage.config import Config
from triage.db import Database
from triage.dicom import phantom, sender, upper_layer
from triage.domain import StudyState, WorklistEntry

TIMEOUT = 2.5
"""Seconds after which the listener lets go of a peer here."""
LARGEST = 24 << 20
"""Bytes that an object may have here."""
MORE_MEGABYTES = 64
"""By which a listener may be larger after a fault: allocators keep what they had."""


@dataclass
class Station:
    """A listener in a process of its own, and its database."""

    settings: Config
    db: Database
    process: ForkServerProcess
    folder: Path
    context: Context
    known: dict[str, Path] = field(default_factory=dict)
    """What was acknowledged: SOP Instance UID → the file that was sent."""
    numbers: Iterator[int] = field(default_factory=lambda: iter(range(1, 1_000_000)))
    before: Footprint = field(default_factory=lambda: Footprint(0, 0, 0))

    @property
    def port(self) -> int:
        return self.settings.listener.port

    def slices(self, count: int, studies: int = 1, series: int = 1) -> list[Path]:
        """Files, as interleaved as can be; each is named as its SOP Instance UID."""
        first = next(self.numbers)
        for _ in range(studies - 1):
            next(self.numbers)
        made = []
        for number in range(count):
            study = f"1.2.{first + number % studies}"
            own = f"{study}.{number // studies % series}"
            one = ct(number, StudyInstanceUID=study, SeriesInstanceUID=own)
            one.SOPInstanceUID = f"{own}.{number}"
            made.append(save(one, self.folder / "sent" / one.SOPInstanceUID))
        return made

    def send(self, files: list[Path], calling: str = "SCANNER", seconds: float = 8) -> list[Path]:
        """What was not acknowledged."""
        outcomes = sender.send(
            files, peers.destination(self.settings), calling_ae_title=calling, timeout_seconds=seconds
        )
        self.known |= {one.path.name: one.path for one in outcomes if one.sent}
        return [one.path for one in outcomes if not one.sent]

    def send_all(self, files: list[Path], patience: float = 60) -> bool:
        """Again and again, as scanners do."""
        deadline = time.monotonic() + patience
        while (files := self.send(files)) and time.monotonic() < deadline:
            time.sleep(0.2)
        return not files

    def echo(self) -> str | None:
        return sender.echo(peers.destination(self.settings), "SCANNER", 10)

    def work(self, now: datetime) -> None:
        """The other roles, later."""
        while any(
            step()
            for step in (
                lambda: assemble.step(self.db, self.settings, now),
                lambda: analyze.step(self.db, self.settings, Boxes(), "here", now),
            )
        ):
            pass

    def entry(self, uid: str) -> WorklistEntry:
        found = self.db.entry(uid)
        assert found is not None, f"{uid} is not on record"
        return found

    def settled(self) -> Footprint:
        """What the process holds once peers are let go."""
        deadline = time.monotonic() + TIMEOUT + 8
        while True:
            held = footprint(self.process.pid or 0)
            if held.files <= self.before.files and held.threads <= self.before.threads:
                return held
            if time.monotonic() > deadline:
                return held
            time.sleep(0.1)


def prepared(folder: Path) -> None:
    """In the listener's process: small limits, and a clock that can be put wrong."""
    upper_layer.LARGEST_OBJECT = LARGEST
    daemon.now = lambda: datetime.now(UTC) + timedelta(seconds=float((folder / "clock").read_text()))


@contextmanager
def station(context: Context, name: str = "daemon", **listener: object) -> Iterator[Station]:
    section = {"timeout_seconds": TIMEOUT, "calling_ae_titles": ["SCANNER", "CT1"], **listener}
    home = context.folder / name
    path = peers.write_config(home, listener={**section, **context.listener})
    (home / "clock").write_text("0")
    settings = config.load(path, {})
    db = Database(settings.database.url)
    db.migrate()
    with listening(path, context.folder / "log", None, prepared) as process:
        here = Station(settings, db, process, context.folder, context)
        warm = [here.slices(3) for _ in range(12)]
        with ThreadPoolExecutor(12) as pool:
            list(pool.map(here.send_all, warm))
        here.before = Footprint(10_000, 10_000, 10_000)
        time.sleep(0.3)
        here.before = footprint(process.pid or 0)
        yield here
    db.close()


# --- the faults -----------------------------------------------------------------------------------


def interleaved(here: Station, row: Row) -> None:
    """Eight senders, each with slices of four studies and three series in turn."""
    files = [here.slices(24, studies=4, series=3) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        row.expect(all(pool.map(here.send_all, files)), "not all was taken")
    row.tries = 8


def many_senders(here: Station, row: Row) -> None:
    """Fifty at once, twice as many as are served: the others are told to come back, and do."""
    files = [here.slices(here.context.number(2, 40)) for _ in range(50)]
    with ThreadPoolExecutor(50) as pool:
        row.expect(all(pool.map(here.send_all, files)), "not all was taken")
    row.tries = 50


def aborts(here: Station, row: Row) -> None:
    """A-ABORT, FIN or RST in mid-series and in mid-object; sent again, all of it is there."""
    for number in range(here.context.number(9, 300)):
        files = here.slices(6)
        taken = here.send(files[:3])
        row.expect(not taken, "the first three were not taken")
        with suppress(ConnectionError):
            connection, _ = wire.associate(here.port)
            pieces = stored(files[3], maximum=106)
            # An A-ABORT is 10 bytes: it must not complete the object.
            connection.sendall(b"".join(pieces[: 1 + number % len(pieces)])[: -11 - number % 50])
            if number % 3 == 0:
                connection.sendall(wire.ABORTED)
            wire.hang_up(connection, rudely=number % 3 == 1)
        row.expect(here.send_all(files[3:]), "the rest was not taken")
        row.tries += 1


def stored(path: Path, context: int = 1, maximum: int = 16_000) -> list[bytes]:
    """The PDUs that store a file."""
    return wire.store(context, str(dcmread(path).SOPInstanceUID), body(path), maximum)


def stalls(here: Station, row: Row) -> None:
    """Peers fall silent before, in and after a request, and in mid-object; nobody else notices."""
    begun = [b"", b"\1\0", wire.request()[:40], wire.request(), wire.request() + wire.echo()[:9]]
    begun.append(wire.request() + wire.store(1, "1.2", b"")[0])
    connections = []
    for said in begun * here.context.number(2, 4):
        connections.append(wire.connect(here.port))
        connections[-1].sendall(said)
    began = time.monotonic()
    row.expect(here.echo() is None, "no echo meanwhile")
    row.expect(here.send_all(here.slices(6)), "nothing was taken meanwhile")
    for connection in connections:
        left = TIMEOUT * 3 + 5 - (time.monotonic() - began)
        row.expect(wire.closed_within(connection, max(left, 0.1)), "a silent peer is held")
        connection.close()
        row.tries += 1
    row.recovered.append(time.monotonic() - began)


def slow_loris(here: Station, row: Row) -> None:
    """Byte by byte, ten times a second: neither a request nor a message may take for ever."""
    with ThreadPoolExecutor(20) as pool:
        began = time.monotonic()

        def drip(number: int) -> bool:
            connection = wire.connect(here.port)
            connection.sendall(wire.request()[:12] if number % 2 else wire.request() + wire.echo()[:8])
            gone = wire.closed_within(connection, TIMEOUT * 3 + 5, b"\0")
            connection.close()
            return gone

        found = pool.map(drip, range(20))
        row.expect(here.echo() is None, "no echo meanwhile")
        row.expect(all(found), "a dripping peer is held")
        row.recovered.append(time.monotonic() - began)
    row.tries = 20


def half_open(here: Station, row: Row) -> None:
    """Peers that are gone without a word: with their association open, after an object, or in its midst."""
    connections = []
    for number in range(20):
        connection, _ = wire.associate(here.port)
        sent = stored(here.slices(1)[0])
        connection.sendall(b"".join(sent[: number % 3]))
        connections.append(connection)
    began = time.monotonic()
    row.expect(here.send_all(here.slices(3)), "nothing was taken meanwhile")
    row.expect(
        all(wire.closed_within(one, TIMEOUT * 3 + 5) for one in connections), "a peer that is gone is held"
    )
    row.recovered.append(time.monotonic() - began)
    for connection in connections:
        connection.close()
    row.tries = 20


def probes(here: Station, row: Row) -> None:
    """Port scans and health checks: TCP connections that say nothing, or something else."""
    words = [b"", b"GET / HTTP/1.0\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00", b"SSH-2.0-probe\r\n"]

    def probe(number: int) -> None:
        connection = wire.connect(here.port)
        connection.sendall(words[number % len(words)])
        wire.hang_up(connection, rudely=number % 3 == 0)

    count = here.context.number(200, 10_000)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(probe, range(count)))
    with row.recovering():
        peers.wait_until(lambda: here.echo() is None, seconds=15)
    row.tries = count


def oversized(here: Station, row: Row) -> None:
    """PDUs, items and objects that are larger than anything, in words or in fact."""
    lies = [
        b"\x01\x00\xff\xff\xff\xff" + bytes(1000),
        b"\x01\x00\x7f\xff\xff\xff" + bytes(1000),
        wire.request(user=wire.item(0x54, b"\xff\xff" + bytes(200))),
        wire.request([b"\x20\x00\xff\xff" + bytes(300)]),
        wire.request(user=b"".join(wire.item(0x52, b"1" * 60_000) for _ in range(1))),
    ]
    spoken = []
    for said in lies:
        spoken.append((said, wire.connect(here.port)))
        spoken[-1][1].sendall(said)
    inside = [
        b"\x04\x00\xff\xff\xff\xff" + bytes(1000),
        wire.pdu(4, b"\xff\xff\xff\xff\x01\x03" + bytes(100)),
        wire.pdu(4, b"\0\0\0\0\x01\x03" + bytes(100)),
        wire.pdu(4, b"\0\0\0\1\x01"),
        wire.pdu(4, bytes(4 << 20)),
    ]
    for said in inside:
        spoken.append((said, wire.associate(here.port)[0]))
        with suppress(OSError):
            spoken[-1][1].sendall(said)
    for said, connection in spoken:
        row.expect(wire.closed_within(connection, TIMEOUT * 3 + 5), f"{said[:12]!r} is waited for")
        connection.close()
    row.tries = len(lies) + len(inside) + 1
    row.expect(_endless(here, 8 * LARGEST), "an object without an end is taken in for ever")


def _endless(here: Station, most: int) -> bool:
    """Whether a sender of an object without an end is stopped before it has sent so many bytes."""
    connection, _ = wire.associate(here.port)
    (begin,) = wire.store(1, "1.2", b"")
    piece = wire.pdu(wire.P_DATA, wire.pdv(1, 0, bytes(16_000)))
    sent = 0
    with connection, suppress(ConnectionError):
        connection.sendall(begin)
        while sent < most:
            connection.sendall(piece)
            sent += len(piece)
    return sent < most


def context_abuse(here: Station, row: Row) -> None:
    """Presentation contexts: too many, twice the same, even, none, unknown; objects in a wrong one."""
    syntax = str(ImplicitVRLittleEndian)
    requests = [
        wire.request([wire.context(n, CTImageStorage, syntax) for n in range(1, 256, 2)]),
        wire.request([wire.context(1, CTImageStorage, syntax)] * 200),
        wire.request([wire.context(n, CTImageStorage, syntax) for n in range(0, 256)]),
        wire.request([]),
        wire.request([wire.context(1, CTImageStorage)]),
        wire.request([wire.context(1, "", syntax)]),
        wire.request([wire.context(1, "9" * 64, *["1.2.840.10008.1.2.999"] * 400)]),
        wire.request([wire.context(1, CTImageStorage, "\xff" * 10)]),
    ]
    for said in requests:
        connection = wire.connect(here.port)
        connection.sendall(said)
        connection.settimeout(TIMEOUT * 2)
        try:
            wire.answered(connection)
        except TimeoutError:
            row.wrong.append(f"request {row.tries} was not answered")
        connection.sendall(wire.ABORTED)
        row.expect(wire.closed_within(connection, TIMEOUT * 3), f"request {row.tries} is waited for")
        row.tries += 1
        connection.close()
    path = here.slices(1)[0]
    spoken = []
    for number in (5, 0, 255, 3):
        spoken.append((number, wire.associate(here.port)[0]))
        with suppress(OSError):
            spoken[-1][1].sendall(b"".join(stored(path, number)))
    for number, connection in spoken:
        row.expect(wire.closed_within(connection, TIMEOUT * 3 + 5), f"context {number} is waited for")
        connection.close()
    row.expect(path.name not in here.db.sop_instance_uids(dcmread(path).StudyInstanceUID), "was taken in")
    row.tries += 4


def strangers(here: Station, row: Row) -> None:
    """Calling AE titles that are not allowed, and another's called AE title: refused, nothing is kept."""
    files = here.slices(1)
    for number in range(here.context.number(10, 500)):
        row.expect(here.send(files, calling=f"NOBODY{number}") == files, "a stranger was let in")
        row.tries += 1
    other = peers.destination(here.settings).model_copy(update={"ae_title": "SOMEONE"})
    row.expect("called AE title" in str(sender.echo(other, "SCANNER", 5)), "we answer to another name")
    uid = str(dcmread(files[0]).StudyInstanceUID)
    row.expect(not here.db.sop_instance_uids(uid), "a stranger's object is on record")


def duplicates(here: Station, row: Row) -> None:
    """The same bytes again: acknowledged, and no new answer. Other bytes: kept aside and said on the list."""
    folder = here.folder / "twice"
    files = phantom.write_study(folder, seed=next(here.numbers), **PHANTOM)
    uid = str(dcmread(files[0]).StudyInstanceUID)
    row.expect(here.send_all(list(files)), "not all was taken")
    here.work(datetime.now(UTC) + timedelta(minutes=1))
    row.expect(here.send_all(list(files)), "the same again was not taken")
    here.work(datetime.now(UTC) + timedelta(minutes=2))
    row.expect(len(here.db.results(uid)) == 1, "the same bytes again made another answer")
    row.expect(here.entry(uid).study.state is StudyState.ANALYZED, "the same bytes again reopened the study")
    other = dcmread(files[0])
    other.PixelData = bytes(len(other.PixelData))
    other.save_as(folder / "other")
    row.expect(not here.send([folder / "other"]), "other bytes were not taken")
    here.known.pop("other", None)
    here.work(datetime.now(UTC) + timedelta(minutes=3))
    row.expect("different content" in "".join(here.entry(uid).study.notes), "other bytes are not on the list")
    beside = list(here.settings.storage.spool.glob(f"{uid}/*/conflicts/*"))
    row.expect(len(beside) == 1, f"{len(beside)} files are kept aside")
    row.expect(len(here.db.results(uid)) == 1, "other bytes made another answer")
    _forget(here, files)
    row.tries = len(files) * 2 + 1


def late_slices(here: Station, row: Row) -> None:
    """Slices that come after the answer: a second revision, which names the first."""
    files = phantom.write_study(here.folder / "late", seed=next(here.numbers), **PHANTOM)
    uid = str(dcmread(files[0]).StudyInstanceUID)
    row.expect(here.send_all(list(files[:-3])), "not all was taken")
    here.work(datetime.now(UTC) + timedelta(minutes=1))
    row.expect(here.send_all(list(files[-3:])), "late slices were not taken")
    here.work(datetime.now(UTC) + timedelta(minutes=2))
    found = here.db.results(uid)
    row.expect([one.revision for one in found] == [2, 1], f"revisions {[one.revision for one in found]}")
    row.expect(len(found) == 2 and found[0].supersedes == found[1].sr_sop_instance_uid, "supersedes nothing")
    row.expect(here.entry(uid).images == len(files), "late slices are not on record")
    _forget(here, files)
    row.tries = 3


def _forget(here: Station, files: object) -> None:
    """These files are not named as their objects."""
    for path in list(files):  # type: ignore[call-overload]
        here.known.pop(path.name, None)


def clock_steps(here: Station, row: Row) -> None:
    """The clock is wrong while a study comes, and put right: it is judged once, and does not wait long."""
    clock = here.settings.storage.spool.parent / "clock"
    for ahead in (3600, 86_400, -3600, -86_400):
        files = list(phantom.write_study(here.folder / f"clock{ahead}", seed=next(here.numbers), **PHANTOM))
        uid = str(dcmread(files[0]).StudyInstanceUID)
        clock.write_text(str(ahead))
        row.expect(here.send_all(files), "not all was taken")
        clock.write_text("0")
        now = datetime.now(UTC)
        here.db.heed_clock(now, here.settings.analysis.lease_seconds)  # as the clerk does
        here.work(now + timedelta(seconds=60))
        entry = here.entry(uid)
        row.expect(entry.study.state is StudyState.ANALYZED, f"clock {ahead:+} s: {entry.study.state}")
        row.expect(len(here.db.results(uid)) == 1, f"clock {ahead:+} s: {len(here.db.results(uid))} answers")
        late = entry.priority.due_at - now
        row.expect(late < timedelta(hours=9), f"clock {ahead:+} s: due in {late}")
        _forget(here, files)
        row.tries += 1


def mutated_pdus(here: Station, row: Row) -> None:
    """Whole conversations in which one PDU is wrong; each is answered or closed, and the next one served."""
    count, longest = here.context.number(300, 20_000), [0.0]
    path = here.slices(1)[0]
    spoken = [wire.request(), *stored(path, maximum=156), wire.echo(), wire.RELEASED]
    samples = [Sample(str(n), one, tuple(range(2, min(len(one), 240), 2))) for n, one in enumerate(spoken)]
    ends = here.context.ends()

    def talk(number: int) -> str:
        if ends():
            return "over"
        chance = random.Random(f"{here.context.seed} {number}")
        at = 0 if chance.random() < 0.5 else chance.randrange(1, len(spoken))
        began = time.monotonic()
        try:
            with wire.connect(here.port, 12) as connection:
                if at:
                    connection.sendall(spoken[0])
                    wire.answered(connection)
                connection.sendall(b"".join(spoken[1:at]) + mutated(samples[at], chance))
                connection.sendall(b"".join(spoken[at + 1 :]))
                if number % 25:
                    connection.shutdown(socket.SHUT_WR)
                closed = wire.closed_within(connection, 10)
        except OSError:
            closed = True
        longest[0] = max(longest[0], time.monotonic() - began)
        return "closed" if closed else "held"

    with ThreadPoolExecutor(8) as pool:
        said = list(pool.map(talk, range(count)))
    row.tries = count - said.count("over")
    row.expect("held" not in said, f"{said.count('held')} conversations were held for 10 s")
    row.figure = f"slowest {longest[0]:.1f} s, "


FAULTS: dict[str, Callable[[Station, Row], None]] = {
    "studies and series interleaved": interleaved,
    "50 senders at once": many_senders,
    "aborts in mid-series": aborts,
    "peers that stall": stalls,
    "slow loris": slow_loris,
    "half-open connections": half_open,
    "TCP probes": probes,
    "oversized PDUs, items, objects": oversized,
    "presentation context abuse": context_abuse,
    "strangers": strangers,
    "duplicates": duplicates,
    "late slices": late_slices,
    "clock steps": clock_steps,
    "mutated PDUs": mutated_pdus,
}
PAUSE = "a pause in mid-series"
BEHIND = ("duplicates", "late slices", "clock steps", PAUSE)
"""Hardly depend on the way of receiving: in the short form one way is enough."""


def all_faults(context: Context) -> dict[str, Row]:
    """One after the other against one listener, which must answer and hold nothing more after each."""
    rows: dict[str, Row] = {}
    passed_over = BEHIND if context.listener and not context.long else ()
    with station(context) as here:
        for name, fault in FAULTS.items():
            if name in passed_over:
                continue
            row = rows[name] = Row()
            try:
                fault(here, row)
            except Exception as error:  # noqa: BLE001 - one case must not hide the others
                row.wrong.append(f"{type(error).__name__}: {error}")
            _is_well(here, row)
    if PAUSE not in passed_over:
        rows[PAUSE] = Row()
        pause(context, rows[PAUSE])
    return rows


def _is_well(here: Station, row: Row) -> None:
    held = here.settled()
    row.expect(here.process.is_alive(), "the listener ended")
    row.expect(here.echo() is None, "no echo thereafter")
    row.expect(
        held.files <= here.before.files and held.threads <= here.before.threads,
        f"holds {held}, before {here.before}",
    )
    grown = held.megabytes - here.before.megabytes
    row.expect(grown < MORE_MEGABYTES, f"grew by {grown:.0f} MB")
    row.figure += f"{grown:+.0f} MB, {held.files - here.before.files:+} files, "
    row.figure += f"{held.threads - here.before.threads:+} threads"
    check_kept(here.settings, here.known, row)
    check_database(here.settings, row)
    left = list((here.settings.storage.spool / "incoming").glob("*"))
    row.expect(not left, f"{len(left)} unfinished files are left")


def pause(context: Context, row: Row) -> None:
    """A sender that is silent for 90 s in mid-series, and goes on."""
    seconds = context.number(2, 90)
    with station(context, "patient", timeout_seconds=seconds * 1.5) as here:
        files = here.slices(4)
        connection, _ = wire.associate(here.port)
        for number, path in enumerate(files):
            if number == 2:
                time.sleep(seconds)
            connection.sendall(b"".join(stored(path)))
            answer = wire.answered(connection)
            row.expect(answer[:1] == b"\x04", "a slice was not answered")
        connection.sendall(wire.RELEASED)
        connection.close()
        uid = str(dcmread(files[0]).StudyInstanceUID)
        row.keep(len(here.db.sop_instance_uids(uid)) == 4, "slices of a slow sender")
        row.tries = 1
        _is_well(here, row)
