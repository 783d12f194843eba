"""Orders and final reports over MLLP, sent with the hl7 package's client into the running role."""

from __future__ import annotations

import re
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hl7
import pytest
from hl7.client import MLLPClient
from hypothesis import given
from hypothesis import strategies as st
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian
from pynetdicom import AE, evt

from tests.needs import dcmtk, needs_dcmtk
from tests.peers import HOST, free_port
from triage import config, daemon, orders
from triage.config import Config, Peer
from triage.db import Database
from triage.dicom import asking, sender, storage_commitment
from triage.dicom.lists import MODALITY_WORKLIST, Lists
from triage.dicom.receiving import Receiver
from triage.domain import Band, Instance, Ordered, Priority, Result, Status, StudyState, WorklistEntry
from triage.errors import ConfigError, Retryable
from triage.incoming import messages, mllp
from triage.priority import pending

NOW = datetime(2026, 3, 1, 8, 0, tzinfo=UTC)
MSH = "MSH|^~\\&|RIS|HOSP|TRIAGE|HOSP|20260301080000||{kind}|{number}|P|2.5.1"
PID = "PID|1||P1^^^HOSP~X9^^^OLD||Doe^Jane"


def orm(
    accession: str = "A1", priority: str = "S", control: str = "NW", status: str = "", number: int = 1
) -> str:
    """IHE's layout: the accession number in OBR-18, the priority in TQ1-9."""
    return "\r".join(
        [
            MSH.format(kind="ORM^O01^ORM_O01", number=f"C{number}"),
            PID,
            f"ORC|{control}|PL1|F1||{status}",
            f"TQ1|||||||||{priority}^x^HL70485" if priority else "TQ1|1",
            f"OBR|1|PL1||CT^Chest||||||||||||||{accession}",
        ]
    )


def oru(accession: str = "A1", status: str = "F", patient: str = PID) -> str:
    obr = f"OBR|1||{accession}|CT^Chest" + "|" * 21 + status
    return "\r".join([MSH.format(kind="ORU^R01", number="R1"), patient, obr, "OBX|1|TX|T||Pneumonia"])


@dataclass
class Ris:
    """The RIS, talking to the running role ``orders``, and the database behind."""

    config: Config
    db: Database
    sent: int = field(default=0)

    def send(self, message: str | bytes) -> hl7.Message:
        with MLLPClient(HOST, self.config.orders.port) as client:
            return hl7.parse(client.send_message(message).decode().strip("\x0b\x1c\r"))

    def images(
        self, accession: str = "A1", study: str = "1.2", patient: str = "P1", now: datetime = NOW
    ) -> None:
        """A CT image arrives."""
        self.sent += 1
        received = Instance(
            study_instance_uid=study,
            series_instance_uid=f"{study}.1",
            sop_instance_uid=f"{study}.1.{self.sent}",
            sop_class_uid="1.2.840.10008.5.1.4.1.1.2",
            transfer_syntax_uid="1.2.840.10008.1.2.1",
            path=Path("/spool/x"),
            digest=str(self.sent),
            patient_id=patient,
            accession_number=accession,
        )

        def place(arrived_at: datetime, stat: bool) -> Priority:
            return pending(arrived_at, stat, self.config.priority)

        self.db.register(received, now, judgeable=True, stat=False, pending=place)

    def entry(self, study: str = "1.2") -> WorklistEntry:
        found = self.db.entry(study)
        assert found is not None
        return found


def settings_for(folder: Path, **keys: Any) -> Config:
    sections = {"database": {"url": f"sqlite:///{folder}/triage.db"}}
    return config.parse({**sections, "orders": {"host": HOST, "port": free_port(), **keys}})


@contextmanager
def running(role: Callable[[threading.Event], None], port: int) -> Iterator[None]:
    stop = threading.Event()
    thread = threading.Thread(target=role, args=[stop])
    thread.start()
    try:
        for _ in range(200):
            try:
                socket.create_connection((HOST, port), 1).close()
                break
            except OSError:
                time.sleep(0.05)
        yield
    finally:
        stop.set()
        thread.join(20)
        assert not thread.is_alive()


@contextmanager
def talking(folder: Path, **keys: Any) -> Iterator[Ris]:
    settings = settings_for(folder, **keys)
    database = daemon.open_database(settings)
    with running(lambda stop: daemon.run_orders(settings, stop), settings.orders.port or 0):
        yield Ris(settings, database)
    database.close()


@pytest.fixture
def ris(tmp_path: Path) -> Iterator[Ris]:
    with talking(tmp_path) as one:
        yield one


def said(answer: hl7.Message) -> tuple[str, str, str]:
    msa = answer.segment("MSA")
    return str(msa[1]), str(msa[2]), str(msa[3]) if len(msa) > 3 else ""


# --- STAT ----------------------------------------------------------------------------------------


def test_an_order_that_comes_before_its_images_is_remembered(ris: Ris) -> None:
    answer = ris.send(orm())
    assert said(answer) == ("AA", "C1", "")
    assert [str(answer[0][n]) for n in (3, 4, 5, 6)] == ["TRIAGE", "HOSP", "RIS", "HOSP"]
    assert str(answer[0][9]) == "ACK^O01^ACK"
    ris.images("A1")
    ris.images("A2", study="1.3")
    assert ris.entry().study.stat
    assert ris.entry().priority.band is Band.CRITICAL
    assert ris.entry().priority.reason == "STAT order; not judged yet"
    assert not ris.entry("1.3").study.stat


def test_a_stat_order_without_images_is_forgotten_after_60_days(here: Ris) -> None:
    for accession, days in (("A1", 0), ("A2", 0), ("A2", 30), ("A9", 61)):
        raw = orm(accession).encode()
        assert b"|AA|" in orders.receive(here.db, here.config, raw, NOW + timedelta(days=days))
    here.images("A1", "1.1")
    here.images("A2", "1.2")
    assert [here.entry(study).study.stat for study in ("1.1", "1.2")] == [False, True]


def test_an_order_that_comes_later_moves_the_study_up_and_again_changes_nothing(ris: Ris) -> None:
    ris.images()
    before = ris.entry().priority
    for _ in range(2):
        assert said(ris.send(orm()))[0] == "AA"
        after = ris.entry().priority
        assert after.band is Band.CRITICAL
        assert after.due_at == NOW + timedelta(minutes=15) < before.due_at
        assert after.reason == "STAT order; not judged yet"


def judged(ris: Ris, finish_later: bool = False) -> Callable[[], bool]:
    seen = ris.db.quiet_study(NOW + timedelta(days=1))
    assert seen is not None
    ris.db.mark_ready(seen)
    claimed = ris.db.claim("me", NOW, 60)
    assert claimed is not None
    answer = Result(
        study_instance_uid="1.2", patient_id="P1", status=Status.NEGATIVE, reason="", content_key="k"
    )
    place = Priority(Band.ROUTINE, 0.1, NOW + timedelta(hours=8), "no lesion found, P 0.10")

    def finish() -> bool:
        return ris.db.finish(claimed, answer, [], place, NOW)

    assert finish_later or finish()
    return finish


def test_a_judged_study_moves_up_and_keeps_its_answer(ris: Ris) -> None:
    ris.images()
    judged(ris)
    ris.send(orm())
    assert ris.entry().study.state is StudyState.ANALYZED
    assert ris.entry().priority.reason == "STAT order; no lesion found, P 0.10"
    assert ris.entry().priority.due_at == NOW + timedelta(minutes=15)


def test_an_order_that_comes_while_the_network_works_is_not_lost(ris: Ris) -> None:
    ris.images()
    finish = judged(ris, finish_later=True)
    ris.send(orm())
    assert finish()
    assert ris.entry().priority == Priority(
        Band.CRITICAL, 0.1, NOW + timedelta(minutes=15), "STAT order; no lesion found, P 0.10"
    )


def test_a_study_that_gets_its_accession_number_late_finds_its_order(ris: Ris) -> None:
    ris.send(orm())
    ris.images("")
    assert not ris.entry().study.stat
    ris.images("A1")
    assert ris.entry().study.stat


@pytest.mark.parametrize(
    "undo", [orm(priority="R", control="XO"), orm(control="CA"), orm(priority="", control="XO")]
)
def test_a_changed_order_is_forgotten_before_images_come_but_nothing_moves_down_thereafter(
    undo: str, ris: Ris
) -> None:
    ris.send(orm())
    ris.send(undo)
    ris.images()
    assert not ris.entry().study.stat
    ris.send(orm())
    ris.send(undo)
    assert ris.entry().study.stat


def test_a_status_without_a_priority_changes_nothing(ris: Ris) -> None:
    ris.send(orm())
    assert said(ris.send(orm(priority="", control="SC", status="IP")))[0] == "AA"
    ris.images()
    assert ris.entry().study.stat


@pytest.mark.parametrize(
    "segments",
    [
        ["ORC|NW||||||^^^^^S", "OBR|1||A1"],
        ["ORC|NW", "OBR|1||A1^x||S"],
        ["ORC|NW", "OBR|1||A1" + "|" * 24 + "^^^^^STAT"],
        ["ORC|NW", "TQ1|1||||||||s", "OBR|1|||||||||||||||" + "|A1"],
        ["ORC|NW|1", "OBR|1||A0", "ORC|NW|2", "TQ1|1||||||||S", "OBR|2||A1"],
    ],
)
def test_the_priority_is_found_where_versions_and_sites_put_it(segments: list[str], tmp_path: Path) -> None:
    settings = settings_for(tmp_path, accession_number=["OBR-18", "OBR-3", "OBR-17"])
    text = "\n".join([MSH.format(kind="ORM^O01", number="1"), PID, *segments])
    told = messages.news(messages.parse(text.encode()), settings.orders)
    assert told[-1] == Ordered("A1", stat=True)
    assert all(isinstance(one, Ordered) and not one.stat for one in told[:-1])


# --- read ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["F", "C"])
def test_a_final_report_closes_the_study(status: str, ris: Ris) -> None:
    ris.images()
    ris.images("A2", study="1.3")
    assert said(ris.send(oru(status=status))) == ("AA", "R1", "")
    assert ris.entry().study.closed_reason == "final report"
    assert ris.entry("1.3").study.closed_at is None


@pytest.mark.parametrize(
    "message", [oru(status="P"), oru(status=""), oru("A9"), orm(control="SC", status="CM")]
)
def test_what_is_not_final_or_not_ours_is_acknowledged_and_closes_nothing(message: str, ris: Ris) -> None:
    ris.images()
    assert said(ris.send(message))[0] == "AA"
    assert ris.entry().study.closed_at is None


def test_an_order_status_closes_where_the_site_says_so(tmp_path: Path) -> None:
    with talking(tmp_path, closing_statuses=["CM"]) as ris:
        ris.images()
        assert said(ris.send(orm(control="SC", status="CM")))[0] == "AA"
        assert ris.entry().study.closed_reason == "order completed"


def test_a_report_of_another_patient_closes_nothing_and_says_so(ris: Ris) -> None:
    ris.images()
    code, _, reason = said(ris.send(oru(patient="PID|1||P7^^^HOSP")))
    assert (code, "another patient" in reason) == ("AE", True)
    assert ris.entry().study.closed_at is None
    assert said(ris.send(oru(patient="PID|1||P7^^^NEW~P1^^^HOSP")))[0] == "AA"
    assert ris.entry().study.closed_at is not None


def test_of_a_message_about_two_patients_nothing_is_stored(ris: Ris) -> None:
    ris.images()
    ris.images("A2", study="1.3", patient="P7")
    second = oru("A2").split("\r")[2]
    assert said(ris.send(f"{oru()}\r{second}"))[0] == "AE"
    assert [ris.entry(study).study.closed_at for study in ("1.2", "1.3")] == [None, None]


# --- what cannot be taken --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "code", "error", "words"),
    [
        ("hello", "AR", "200", "begins with MSH"),
        ("MSH", "AR", "200", "begins with MSH"),
        (b"\xff\x00\x80", "AR", "200", "begins with MSH"),
        (MSH.format(kind="ORM^O01", number=""), "AR", "101", "MSH-10"),
        (MSH.format(kind="ADT^A01", number="7"), "AR", "200", "ADT"),
        (MSH.format(kind="ORU^W01", number="7"), "AR", "201", "W01"),
        (MSH.format(kind="ORM^O01", number="7"), "AE", "100", "no order"),
        (orm(accession=""), "AE", "101", "OBR-18 and OBR-3 are empty"),
        (oru(accession=""), "AE", "101", "accession number"),
    ],
)
def test_what_cannot_be_taken_is_refused_with_its_reason(
    message: str | bytes, code: str, error: str, words: str, ris: Ris
) -> None:
    answer = ris.send(message)
    assert said(answer)[0] == code
    assert words in said(answer)[2]
    assert str(answer.segment("ERR")[3]) == f"{error}^^HL70357"
    assert said(ris.send(orm()))[0] == "AA"  # and the next one is taken


def test_no_message_writes_a_line_of_the_log(ris: Ris, caplog: pytest.LogCaptureFixture) -> None:
    answer = ris.send(MSH.format(kind="ADT\\X0A\\ERROR^A01", number="7"))
    assert said(answer)[0] == "AR"
    refused = [one.getMessage() for one in caplog.records if "refused" in one.getMessage()]
    assert len(refused) == 1
    assert "ADTERROR" in refused[0]
    assert refused[0].isprintable()


def test_nothing_is_acknowledged_that_was_not_stored(ris: Ris, monkeypatch: pytest.MonkeyPatch) -> None:
    def locked(*_: object) -> None:
        raise Retryable("database: locked")

    with monkeypatch.context() as broken:
        broken.setattr(Database, "hear", locked)
        assert said(ris.send(orm())) == ("AR", "C1", "database: locked; send it again")
        broken.setattr(Database, "hear", lambda *_: 1 / 0)
        assert said(ris.send(orm())) == ("AR", "C1", "internal error: ZeroDivisionError")
    ris.images()
    assert not ris.entry().study.stat


def test_what_fails_unexpectedly_is_named_in_the_log_by_its_place_and_quotes_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Broken:
        """A library's error quotes the value that it stumbled over."""

        assoc = SimpleNamespace(remote={"ae_title": "PEER", "address": HOST})
        request = SimpleNamespace(Identifier=None, AffectedSOPInstanceUID="1.2")

        def __getattr__(self, name: str) -> Any:
            raise ValueError("could not convert Doe^Jane")

    broken: Any = Broken()
    orders.receive(broken, Config(), orm().encode(), NOW)
    assert not daemon.drain(lambda: broken.step, threading.Event())
    (status,) = Lists(lambda _: [], "TRIAGE", 10).on_find(broken)
    assert isinstance(status[0], Dataset)
    storage_commitment.Reports(lambda _: True).on_event_report(broken)
    Receiver(Path("/none"), lambda _: None, lambda: True).on_store(broken)
    for place in ("orders.py", "daemon.py", "lists.py", "storage_commitment.py", "receiving.py"):
        assert re.search(rf"Error at .*{place}:\d+", caplog.text)
    assert "Doe" not in caplog.text


def test_many_messages_over_one_connection_also_in_pieces(ris: Ris) -> None:
    with closing(socket.create_connection((HOST, ris.config.orders.port), 10)) as line:
        stream = b"".join(b"\x0b" + orm(f"A{n}", number=n).encode() + b"\x1c\r" for n in range(20))
        for start in range(0, len(stream), 700):
            line.sendall(stream[start : start + 700])
        answers = b""
        while answers.count(b"\x1c\r") < 20:
            answers += line.recv(4096)
    controls = [said(hl7.parse(part.decode().strip("\x0b\r")))[1] for part in answers.split(b"\x1c\r")[:-1]]
    assert controls == [f"C{n}" for n in range(20)]


def test_a_peer_that_speaks_no_mllp_or_too_long_is_let_go(ris: Ris) -> None:
    for nonsense in (b"GET / HTTP/1.1\r\n\x1c\r", b"\x0b" + b"x" * (mllp.LONGEST_MESSAGE * 3)):
        with closing(socket.create_connection((HOST, ris.config.orders.port), 10)) as line:
            try:
                line.sendall(nonsense)
                assert line.recv(10) == b""
            except ConnectionError:
                pass
    assert said(ris.send(orm()))[0] == "AA"


def test_only_named_networks_may_connect(tmp_path: Path) -> None:
    with (
        talking(tmp_path, peers=["10.9.0.0/16"]) as ris,
        closing(socket.create_connection((HOST, ris.config.orders.port), 10)) as line,
    ):
        assert line.recv(10) == b""


def test_the_role_is_started_where_a_port_is_set_and_a_taken_port_is_named(tmp_path: Path) -> None:
    settings = settings_for(tmp_path)
    assert settings.roles == list(daemon.ROLES)
    assert Config().roles == [role for role in daemon.ROLES if role != "orders"]
    with pytest.raises(ConfigError, match=r"orders\.port is not set"):
        daemon.run_orders(Config(), threading.Event())
    with (
        closing(socket.create_server((HOST, settings.orders.port or 0))),
        pytest.raises(ConfigError, match=r"orders\.port = \d+: cannot listen"),
    ):
        daemon.run_orders(settings, threading.Event())


@given(
    st.binary(max_size=300)
    | st.text(max_size=300).map(lambda text: ("MSH|^~\\&" + text).encode("utf-8", "replace"))
)
def test_whatever_comes_is_answered_by_a_message(raw: bytes) -> None:
    class Nowhere:
        def hear(self, *_: object) -> list[tuple[str, str]]:
            return []

    answer = orders.receive(Nowhere(), Config(), raw, NOW)  # type: ignore[arg-type]
    text = answer.decode()
    assert text.startswith("MSH")
    assert "internal error" not in text
    assert "\rMSA" in text


# --- asking the RIS --------------------------------------------------------------------------------


@contextmanager
def wlmscpfs(folder: Path, priorities: dict[str, str]) -> Iterator[Peer]:
    """dcmtk's worklist server, with an order for each accession number."""
    (folder / "RIS").mkdir(parents=True)
    (folder / "RIS" / "lockfile").touch()
    for accession, priority in priorities.items():
        step = Dataset()
        step.Modality = "CT"
        step.ScheduledStationAETitle = "CT1"
        step.ScheduledProcedureStepStartDate = "20260301"
        step.ScheduledProcedureStepStartTime = "0800"
        order = Dataset()
        order.AccessionNumber = accession
        order.PatientName, order.PatientID, order.StudyInstanceUID = "Doe^Jane", "P1", "1.2"
        order.RequestedProcedureID = "R1"
        order.RequestedProcedurePriority = priority
        order.ScheduledProcedureStepSequence = [step]
        order.file_meta = FileMetaDataset()
        order.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        order.file_meta.MediaStorageSOPClassUID = MODALITY_WORKLIST
        order.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
        order.save_as(folder / "RIS" / f"{accession}.wl", enforce_file_format=True)
    program, port = dcmtk("wlmscpfs"), free_port()
    assert program
    server = subprocess.Popen([program, "-dfr", "-dfp", str(folder), str(port)])
    try:
        ris = Peer(ae_title="RIS", host=HOST, port=port)
        deadline = time.monotonic() + 20
        while sender.echo(ris, "TRIAGE", 5) is not None:
            assert time.monotonic() < deadline
        yield ris
    finally:
        server.terminate()
        server.wait(20)


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Ris]:
    """The database alone; nobody listens."""
    settings = settings_for(tmp_path)
    database = daemon.open_database(settings)
    yield Ris(settings, database)
    database.close()


@needs_dcmtk
def test_the_ris_is_asked_once_for_each_study(here: Ris, tmp_path: Path) -> None:
    here.images("A1", "1.1")
    here.images("A2", "1.2")
    here.images("A3", "1.3")
    here.images("A*", "1.4")
    here.images("", "1.5")
    with wlmscpfs(tmp_path / "worklist", {"A1": "STAT", "A2": "ROUTINE"}) as ris:
        for _ in range(4):
            assert orders.step(here.db, here.config, ris, NOW)
        assert not orders.step(here.db, here.config, ris, NOW)
    assert [here.entry(f"1.{n}").study.stat for n in range(1, 6)] == [True, False, False, False, False]
    assert here.entry("1.1").priority.due_at == NOW + timedelta(minutes=15)


def test_a_ris_that_is_away_is_asked_again(here: Ris) -> None:
    here.images()
    away = Peer(ae_title="RIS", host=HOST, port=free_port())
    for _ in range(2):
        with pytest.raises(Retryable, match=r"destination RIS at .* cannot be reached"):
            orders.step(here.db, here.config, away, NOW)


@pytest.mark.parametrize(
    ("answers", "stat", "again"),
    [
        ([(0xFF00, "A1", "STAT")], True, False),
        ([(0xFF00, "A1", "ROUTINE"), (0xFF01, "A1", "stat ")], True, False),
        ([(0xFF00, "A7", "STAT")], False, False),  # it did not match by accession number
        ([(0xC001, "", "")], False, False),
        ([(0xA700, "", "")], False, True),
    ],
)
def test_a_ris_that_answers_oddly(
    answers: list[tuple[int, str, str]], stat: bool, again: bool, here: Ris
) -> None:
    def on_find(_: evt.Event) -> Iterator[tuple[int, Dataset]]:
        for status, accession, priority in answers:
            order = Dataset()
            order.AccessionNumber, order.RequestedProcedurePriority = accession, priority
            yield status, order

    here.images()
    ae = AE("RIS")
    ae.add_supported_context(MODALITY_WORKLIST)
    server = ae.start_server((HOST, 0), block=False, evt_handlers=[(evt.EVT_C_FIND, on_find)])
    ris = Peer(ae_title="RIS", host=HOST, port=server.server_address[1])
    try:
        if again:
            with pytest.raises(Retryable, match="out of resources"):
                orders.step(here.db, here.config, ris, NOW)
        else:
            assert orders.step(here.db, here.config, ris, NOW)
        assert (here.db.study_to_ask_for(NOW, 7) is not None) == again
    finally:
        server.shutdown()
    assert here.entry().study.stat == stat


def test_a_study_that_the_ris_gives_no_answer_for_holds_up_no_other(here: Ris) -> None:
    asked = []

    def on_find(event: evt.Event) -> Iterator[tuple[int, Dataset | None]]:
        asked.append(event.identifier.AccessionNumber)
        if asked[-1] in ("A3", "A2"):
            event.assoc.abort()
        yield 0x0000, None

    for number in (1, 2, 3):
        here.images(f"A{number}", f"1.{number}", now=NOW + timedelta(seconds=number))
    ae = AE("RIS")
    ae.add_supported_context(MODALITY_WORKLIST)
    server = ae.start_server((HOST, 0), block=False, evt_handlers=[(evt.EVT_C_FIND, on_find)])
    ris = Peer(ae_title="RIS", host=HOST, port=server.server_address[1])
    try:
        for seconds in (10, 20, 30, 40, 50):
            with suppress(Retryable):
                orders.step(here.db, here.config, ris, NOW + timedelta(seconds=seconds))
    finally:
        server.shutdown()
    assert asked == ["A3", "A2", "A1", "A3", "A2"]


def test_a_ris_whose_answers_never_end_is_let_go() -> None:
    done = threading.Event()

    def on_find(_: evt.Event) -> Iterator[tuple[int, Dataset]]:
        while not done.wait(0.05):
            order = Dataset()
            order.AccessionNumber = "A7"
            yield 0xFF00, order

    ae = AE("RIS")
    ae.add_supported_context(MODALITY_WORKLIST)
    server = ae.start_server((HOST, 0), block=False, evt_handlers=[(evt.EVT_C_FIND, on_find)])
    ris = Peer(ae_title="RIS", host=HOST, port=server.server_address[1])
    try:
        with pytest.raises(Retryable, match="too slow"):
            asking.ordered_priority("A1", ris, calling_ae_title="TRIAGE", timeout_seconds=0.2)
    finally:
        done.set()
        server.shutdown()
