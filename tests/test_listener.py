"""The listener against real peers: dcmtk, pynetdicom, and sockets that misbehave."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    SecondaryCaptureImageStorage,
)
from pynetdicom import AE
from pynetdicom.association import Association
from pynetdicom.presentation import build_context

from tests import wire
from tests.needs import DATA, dcmtk, needs_data, needs_dcmtk
from tests.objects import PATIENT, SERIES, STUDY, body, ct, save, with_body
from tests.peers import free_port
from triage import config
from triage.config import Destination
from triage.dicom import header, sender, spool, uids
from triage.dicom.listener import Listener, index_spool
from triage.dicom.receiving import Receiver
from triage.dicom.status import StoreStatus
from triage.domain import Instance
from triage.errors import Rejected, Retryable

HOST = "127.0.0.1"
QUICK = 0.5
"""Seconds after which a listener in these tests lets a stalled peer go."""
PATIENCE = 60
"""Seconds that a sender waits for an answer: a busy machine flushes files slowly."""


@dataclass
class Received:
    """A running listener and what it was told."""

    spool: Path
    instances: list[Instance] = field(default_factory=list)
    conflicts: list[Instance] = field(default_factory=list)
    errors: list[Exception] = field(default_factory=list)
    """Raised by the next calls of on_received, one each."""
    room: bool = True
    port: int = 0

    def take(self, instance: Instance) -> None:
        self.instances.append(instance)
        if self.errors:
            raise self.errors.pop(0)

    @property
    def peer(self) -> Destination:
        return Destination(name="us", ae_title="TRIAGE", host=HOST, port=self.port)

    def send(self, *paths: Path) -> list[sender.SendOutcome]:
        return sender.send(paths, self.peer, calling_ae_title="SCANNER", timeout_seconds=PATIENCE)

    def echo(self) -> str | None:
        return sender.echo(self.peer, "SCANNER", PATIENCE)


@contextmanager
def listening(folder: Path, **settings: object) -> Iterator[Received]:
    received = Received(folder)
    section = config.Listener.model_validate({"host": HOST, "port": free_port(), **settings})
    with Listener(
        section, folder, received.take, lambda: received.room, received.conflicts.append
    ) as listener:
        received.port = listener.port
        yield received


@pytest.fixture
def received(tmp_path: Path) -> Iterator[Received]:
    with listening(tmp_path / "spool") as running:
        yield running


@contextmanager
def associated(received: Received, sop_class_uid: str, *transfer_syntaxes: str) -> Iterator[Association]:
    association = AE("PEER").associate(
        HOST,
        received.port,
        [build_context(sop_class_uid, list(transfer_syntaxes) or None)],
        ae_title="TRIAGE",
    )
    try:
        yield association
    finally:
        association.release()


# --- what comes is kept ---------------------------------------------------------------------------


@needs_dcmtk
@needs_data
@pytest.mark.parametrize("tool", [["storescu", "-xs"], ["dcmsend"]])
@pytest.mark.parametrize("tuned", [True, False])
def test_a_scanner_sends_a_real_series(tool: list[str], tuned: bool, received: Received) -> None:
    files = sorted((DATA / "dicom" / "covid_ricord_1012").iterdir())[:6]
    environment = {**os.environ, **({"TCP_NODELAY": "1"} if tuned else {})}
    program = dcmtk(tool[0])
    assert program
    command = [program, *tool[1:], "-aec", "TRIAGE", HOST, str(received.port), *map(str, files)]
    subprocess.run(command, check=True, env=environment, timeout=60)
    for instance, file in zip(received.instances, files, strict=True):
        assert dcmread(instance.path).PixelData == dcmread(file).PixelData  # dcmtk writes the rest anew
        assert instance.path.relative_to(received.spool).parts == (
            instance.study_instance_uid,
            instance.series_instance_uid,
            f"{instance.sop_instance_uid}.dcm",
        )
    assert list(received.spool.glob("incoming/*")) == []


@needs_data
def test_every_transfer_syntax_is_kept_byte_for_byte(received: Received) -> None:
    files = sorted((DATA / "dicom" / "odd" / "codecs_chest_ge").glob("CTImage*.dcm"))
    stored = {}
    for file in files:  # one by one: some share a SOP Instance UID
        (outcome,) = received.send(file)
        if outcome.sent:
            filed = (received.conflicts or received.instances).pop()
            assert body(filed.path) == body(file)
            stored[filed.transfer_syntax_uid] = file
        else:
            assert outcome.permanent, outcome.error
    assert {DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ImplicitVRLittleEndian} <= stored.keys()
    assert len(stored) >= 10


@pytest.mark.parametrize(
    "syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian]
)
def test_every_plain_encoding_is_kept_byte_for_byte(syntax: str, tmp_path: Path, received: Received) -> None:
    file = save(ct(1), tmp_path / "1.dcm", syntax)
    assert received.send(file)[0].sent
    (instance,) = received.instances
    assert instance.transfer_syntax_uid == syntax
    assert body(instance.path) == body(file)


@pytest.mark.parametrize(
    "sop_class_uid",
    [
        SecondaryCaptureImageStorage,
        "1.2.840.10008.5.1.4.1.1.88.67",  # dose report
        "1.2.840.10008.5.1.4.1.1.66.4",  # segmentation
        "1.2.840.10008.5.1.4.1.1.3",  # retired ultrasound
        "1.3.12.2.1107.5.9.1",  # a vendor's private class
    ],
)
def test_whatever_else_is_in_the_study_is_filed(
    sop_class_uid: str, tmp_path: Path, received: Received
) -> None:
    file = save(ct(1, SOPClassUID=sop_class_uid), tmp_path / "1.dcm")
    assert received.send(file)[0].error == ""
    assert [i.sop_class_uid for i in received.instances] == [sop_class_uid]


def test_the_file_names_its_sender_and_writer(tmp_path: Path, received: Received) -> None:
    received.send(save(ct(1), tmp_path / "1.dcm"))
    raw = received.instances[0].path.read_bytes()
    assert raw[128:132] == b"DICM"
    meta = raw[: len(raw) - len(body(received.instances[0].path))]
    assert b"SCANNER" in meta
    assert uids.IMPLEMENTATION_CLASS_UID.encode() in meta


def test_the_peers_own_order_of_transfer_syntaxes_counts(received: Received) -> None:
    plain = ExplicitVRLittleEndian
    for proposed, taken in [
        ([ImplicitVRLittleEndian, plain], plain),
        ([ExplicitVRBigEndian, ImplicitVRLittleEndian], ExplicitVRBigEndian),
        ([JPEG2000Lossless, plain], JPEG2000Lossless),
        ([plain, JPEG2000Lossless], plain),
    ]:
        with associated(received, CTImageStorage, *proposed) as association:
            assert association.accepted_contexts[0].transfer_syntax == [taken]


def test_a_service_that_is_not_offered_is_refused(received: Received) -> None:
    with associated(received, "1.2.840.10008.5.1.4.1.2.2.1") as association:
        assert not association.accepted_contexts


# --- the same again -------------------------------------------------------------------------------


def test_an_identical_object_is_acknowledged_and_its_file_left_alone(
    tmp_path: Path, received: Received
) -> None:
    file = save(ct(1), tmp_path / "1.dcm")
    received.send(file)
    before = received.instances[0].path.stat()
    assert received.send(file)[0].sent
    after = received.instances[1].path.stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert received.instances[0] == received.instances[1]


def test_other_bytes_under_the_same_uid_overwrite_nothing(tmp_path: Path, received: Received) -> None:
    first = save(ct(1), tmp_path / "first.dcm")
    second = save(ct(1, PatientID="P2"), tmp_path / "second.dcm")
    assert all(outcome.sent for outcome in received.send(first, second, second))
    (kept,) = set(received.instances)
    beside, again = received.conflicts
    assert body(kept.path) == body(first)
    assert beside == again
    assert body(beside.path) == body(second)
    assert beside.path.parent == received.spool / STUDY / SERIES / "conflicts"
    assert beside.path.name == f"{SERIES}.1.{beside.digest[:12]}.dcm"
    assert list(index_spool(received.spool)) == [kept]


def test_a_conflict_also_records_what_was_filed_first(tmp_path: Path, received: Received) -> None:
    first = save(ct(1), tmp_path / "first.dcm")
    second = save(ct(1, PatientID="P2"), tmp_path / "second.dcm")
    received.errors.append(Retryable("database is locked"))
    assert not received.send(first)[0].sent
    received.instances.clear()
    received.errors.append(Retryable("database is locked"))
    assert not received.send(second)[0].sent
    assert received.conflicts == []
    received.instances.clear()
    assert received.send(second)[0].sent
    (recorded,), (beside,) = received.instances, received.conflicts
    assert body(recorded.path) == body(first)
    assert list(index_spool(received.spool)) == [recorded]
    assert body(beside.path) == body(second)


def test_a_conflict_with_a_broken_file_is_noted(
    tmp_path: Path, received: Received, caplog: pytest.LogCaptureFixture
) -> None:
    own = received.spool / STUDY / SERIES / f"{SERIES}.1.dcm"
    own.parent.mkdir(parents=True)
    own.write_bytes(b"not DICOM")
    file = save(ct(1), tmp_path / "1.dcm")
    assert received.send(file)[0].sent
    assert received.instances == []
    assert [body(i.path) for i in received.conflicts] == [body(file)]
    assert f"{own.relative_to(received.spool)} in the spool cannot be read: not a DICOM file" in caplog.text


def test_two_associations_race_for_one_uid(tmp_path: Path, received: Received) -> None:
    files = [save(ct(1, PatientID=f"P{n}"), tmp_path / f"{n}.dcm") for n in range(8)]
    threads = [threading.Thread(target=received.send, args=[file]) for file in files]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    filed = [*set(received.instances), *received.conflicts]
    assert len(filed) == 8
    assert len(received.conflicts) == 7
    assert sorted(body(i.path) for i in filed) == sorted(body(file) for file in files)


# --- what is refused ------------------------------------------------------------------------------


def refusal(received: Received, path: Path, caplog: pytest.LogCaptureFixture) -> str:
    """The one warning that the refusal of ``path`` leaves; nothing of it may stay on the disk."""
    caplog.clear()
    (outcome,) = received.send(path)
    assert not outcome.sent
    assert received.echo() is None
    (record,) = [r for r in caplog.records if r.name == "triage.dicom.receiving" and "refused" in r.message]
    assert "SCANNER at 127.0.0.1" in record.message
    assert [p for p in received.spool.rglob("*") if p.is_file()] == []
    return f"{outcome.error} | {record.message}"


def test_bytes_that_are_no_data_set(
    tmp_path: Path, received: Received, caplog: pytest.LogCaptureFixture
) -> None:
    path = with_body(save(ct(1), tmp_path / "1.dcm"), b"\xff not DICOM at all " * 40)
    assert "cannot understand (0xC000)" in refusal(received, path, caplog)


def test_an_empty_data_set(tmp_path: Path, received: Received, caplog: pytest.LogCaptureFixture) -> None:
    path = save(ct(1), tmp_path / "1.dcm")
    path = with_body(path, body(path)[:30])
    assert "0xC000" in refusal(received, path, caplog)


def test_a_data_set_that_is_cut_off(
    tmp_path: Path, received: Received, caplog: pytest.LogCaptureFixture
) -> None:
    path = save(ct(1), tmp_path / "1.dcm")
    path = with_body(path, body(path)[:-10])
    assert "cut off" in refusal(received, path, caplog)


@needs_data
@pytest.mark.parametrize("share", [0.2, 0.5, 0.999])
def test_a_compressed_image_that_is_cut_off(
    share: float, tmp_path: Path, received: Received, caplog: pytest.LogCaptureFixture
) -> None:
    source = DATA / "dicom" / "covid_ricord_1012" / "0100.dcm"
    path = tmp_path / "cut.dcm"
    path.write_bytes(source.read_bytes())
    whole = body(path)
    assert "0xC000" in refusal(received, with_body(path, whole[: int(len(whole) * share)]), caplog)


def test_a_deflated_data_set_that_is_cut_off(
    tmp_path: Path, received: Received, caplog: pytest.LogCaptureFixture
) -> None:
    path = save(ct(1), tmp_path / "1.dcm", DeflatedExplicitVRLittleEndian)
    assert "0xC000" in refusal(received, with_body(path, body(path)[:-20]), caplog)


def test_another_instance_than_announced(
    tmp_path: Path, received: Received, caplog: pytest.LogCaptureFixture
) -> None:
    path = save(ct(1), tmp_path / "1.dcm", sop_instance_uid="1.2.9")
    assert "does not match (0xA900): SOP Instance UID" in refusal(received, path, caplog)


def test_another_class_than_announced(
    tmp_path: Path, received: Received, caplog: pytest.LogCaptureFixture
) -> None:
    path = save(ct(1), tmp_path / "1.dcm", sop_class_uid=SecondaryCaptureImageStorage)
    assert "does not match (0xA900): SOP Class UID" in refusal(received, path, caplog)


def test_a_class_that_was_not_negotiated(tmp_path: Path, received: Received) -> None:
    dataset = ct(1)
    save(dataset, tmp_path / "1.dcm")
    with associated(received, SecondaryCaptureImageStorage, ExplicitVRLittleEndian) as association:
        context = association.accepted_contexts[0]
        context.abstract_syntax = CTImageStorage  # a sender that does not keep to what was agreed
        assert association.send_c_store(dataset).Status == 0x0122
    assert received.instances == []


@pytest.mark.parametrize("keyword", ["StudyInstanceUID", "SeriesInstanceUID"])
@pytest.mark.parametrize(
    "name", ["..", ".", "../../etc/passwd", "/tmp/x", "1/../../2", "1.2 3", "1" * 65, ""]
)
def test_a_uid_is_never_a_path(
    keyword: str, name: str, tmp_path: Path, received: Received, caplog: pytest.LogCaptureFixture
) -> None:
    path = save(ct(1, **{keyword: name}), tmp_path / "1.dcm")
    assert "0xC000" in refusal(received, path, caplog)


@given(st.text(st.sampled_from("0123456789./\\ \0a"), max_size=70))
def test_no_name_leads_out_of_the_spool(name: str) -> None:
    if header.UID_NAME.fullmatch(name):
        assert "/" not in name
        assert name.strip(".") == name.lstrip(".").rstrip(".")
        assert Path("/spool", name).resolve().parent == Path("/spool")


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian])
def test_a_cut_at_any_byte_is_noticed(syntax: str, tmp_path: Path) -> None:
    """Only a cut exactly between two elements leaves a valid, shorter data set."""
    dataset = ct(1)
    whole = body(save(dataset, tmp_path / "1.dcm", syntax))
    boundaries = set()
    for element in dataset:
        rest = Dataset({e.tag: e for e in dataset if e.tag <= element.tag})
        rest.file_meta = dataset.file_meta
        rest.save_as(tmp_path / "part.dcm", enforce_file_format=False)
        boundaries.add(len(body(tmp_path / "part.dcm")))
    unnoticed = set()
    for end in range(len(whole) + 1):
        with suppress(Rejected):
            spool.read(whole[:end], syntax)
            unnoticed.add(end)
    assert unnoticed <= boundaries
    assert len(whole) in unnoticed


def test_a_full_disk_asks_the_sender_to_come_again(
    tmp_path: Path, received: Received, caplog: pytest.LogCaptureFixture
) -> None:
    path = save(ct(1), tmp_path / "1.dcm")
    received.room = False
    assert "out of resources (0xA700): the disk is full" in refusal(received, path, caplog)
    received.room = True
    assert received.send(path)[0].sent


def test_a_spool_that_takes_no_files(tmp_path: Path, received: Received) -> None:
    received.spool.mkdir()
    (received.spool / STUDY).write_text("a file where a folder should be")
    (outcome,) = received.send(save(ct(1), tmp_path / "1.dcm"))
    assert not outcome.permanent
    assert "0xA700" in outcome.error
    assert received.instances == []


def test_what_could_not_be_recorded_is_asked_for_again(tmp_path: Path, received: Received) -> None:
    path = save(ct(1), tmp_path / "1.dcm")
    received.errors.append(Retryable("database is locked"))
    (outcome,) = received.send(path)
    assert "0xA700" in outcome.error
    assert received.send(path)[0].sent
    assert received.instances[0] == received.instances[1]


def test_a_mistake_in_the_callback_costs_one_object(
    tmp_path: Path, received: Received, caplog: pytest.LogCaptureFixture
) -> None:
    files = [save(ct(n), tmp_path / f"{n}.dcm") for n in (1, 2)]
    received.errors.append(ZeroDivisionError("a mistake of ours"))
    (first,), (second,) = (received.send(path) for path in files)
    assert "0x0110" in first.error
    assert second.sent
    assert "ZeroDivisionError at dicom/receiving.py" in caplog.text
    assert "a mistake of ours" not in caplog.text, "it may quote a patient"


def test_a_request_that_nobody_understands_is_counted_as_refused(tmp_path: Path) -> None:
    counted: list[str] = []
    receiver = Receiver(tmp_path, lambda _: None, lambda: True, on_refused=counted.append)
    event: Any = SimpleNamespace()
    assert receiver.on_store(event) == StoreStatus.PROCESSING_FAILURE
    assert counted == [StoreStatus.PROCESSING_FAILURE.label]


def test_no_patient_in_the_log(tmp_path: Path, received: Received, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    good = save(ct(1), tmp_path / "1.dcm")
    cut = save(ct(2), tmp_path / "2.dcm")
    other = save(ct(1, PatientID="P2"), tmp_path / "3.dcm")
    outcomes = received.send(good, with_body(cut, body(cut)[:-10]), other)
    assert [outcome.sent for outcome in outcomes] == [True, False, True], outcomes
    assert f"refused SOP instance {SERIES}.2" in caplog.text
    assert f"SOP instance {SERIES}.1 came again with other bytes" in caplog.text
    assert PATIENT not in caplog.text
    assert "SECRET" not in caplog.text


# --- who may come ---------------------------------------------------------------------------------


def test_our_ae_title_must_be_called(received: Received) -> None:
    wrong = received.peer.model_copy(update={"ae_title": "SOMEONE"})
    assert "called AE title not recognised" in str(sender.echo(wrong, "SCANNER", 5))


def test_only_listed_ae_titles_may_call(tmp_path: Path) -> None:
    with listening(tmp_path, calling_ae_titles=["CT1", "CT2"]) as received:
        assert "calling AE title not recognised" in str(sender.echo(received.peer, "CT3", 5))
        assert sender.echo(received.peer, "CT2", 5) is None


def test_only_listed_addresses_may_call(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with listening(tmp_path, peers=["10.0.0.0/8"]) as received:
        assert "refused the association: no reason given" in str(received.echo())
    assert "rejected the association of SCANNER at 127.0.0.1" in caplog.text
    with listening(tmp_path, peers=["10.0.0.0/8", "127.0.0.0/8"]) as received:
        assert received.echo() is None


def test_no_more_associations_than_allowed(tmp_path: Path) -> None:
    with listening(tmp_path, maximum_associations=2) as received:
        with associated(received, CTImageStorage), associated(received, CTImageStorage):
            assert "too many associations" in str(received.echo())
        wait_for_echo(received)


def test_peers_that_come_and_go_use_up_nothing(tmp_path: Path) -> None:
    with listening(tmp_path, maximum_associations=1, timeout_seconds=60) as received:
        for _ in range(10):
            socket.create_connection((HOST, received.port)).close()
        for _ in range(3):
            connection = socket.create_connection((HOST, received.port))
            connection.sendall(b"GET / HTTP/1.1\r\nHost: triage\r\n\r\n")
            connection.close()
        wait_for_echo(received)


def wait_for_echo(received: Received, seconds: float = 5) -> None:
    """A place becomes free a moment after a peer has gone."""
    deadline = time.monotonic() + seconds
    while (error := received.echo()) is not None:
        assert time.monotonic() < deadline, error


# --- peers that stall -----------------------------------------------------------------------------


def closed_after(connection: socket.socket, drip: bytes = b"") -> float:
    """Seconds until the listener has closed; ``drip`` is what the peer goes on sending, byte by byte."""
    start = time.monotonic()
    connection.settimeout(0.1 if drip else 20)
    while time.monotonic() - start < 20:
        try:
            if drip:
                connection.send(drip)
            if not connection.recv(4096):
                break
        except TimeoutError:
            continue
        except OSError:
            break
    return time.monotonic() - start


REQUEST_BEGUN = b"\x01\x00\x00\x00\x00\xf0" + b"\x00\x01"


@pytest.mark.parametrize(
    ("begin", "drip"),
    [
        (b"", b""),
        (b"\x01\x00", b""),
        (REQUEST_BEGUN, b""),
        (REQUEST_BEGUN, b"\x00"),
        (b"\x01\x00\xff\xff\xff\xff" + b"\x00" * 1000, b""),
        (b"GET / HTTP/1.1\r\n\r\n", b""),
    ],
    ids=["silent", "half a header", "half a request", "dripping request", "endless request", "not DICOM"],
)
def test_a_peer_that_stalls_before_associating_is_let_go(begin: bytes, drip: bytes, tmp_path: Path) -> None:
    with listening(tmp_path, timeout_seconds=QUICK, maximum_associations=1) as received:
        with socket.create_connection((HOST, received.port)) as connection:
            connection.sendall(begin)
            assert closed_after(connection, drip) < 6 * QUICK
        wait_for_echo(received)


@pytest.mark.parametrize(
    ("begin", "drip"),
    [(b"", b""), (b"\x04\x00\x00\x00\x10\x00" + b"x" * 100, b""), (b"\x04\x00\x00\x00\x10\x00x", b"x")],
    ids=["idle", "mid-PDU", "dripping"],
)
@pytest.mark.parametrize("fast", [True, False], ids=["fast", "pynetdicom's"])
def test_a_peer_that_stalls_in_an_association_is_let_go(
    fast: bool, begin: bytes, drip: bytes, tmp_path: Path
) -> None:
    with listening(tmp_path, timeout_seconds=QUICK, maximum_associations=1, fast=fast) as received:
        with wire.associate(received.port)[0] as connection:
            connection.sendall(begin)
            assert closed_after(connection, drip) < 6 * QUICK
        wait_for_echo(received)


def test_who_is_just_connecting_does_not_keep_it_from_stopping(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python counts a thread from the moment at which it is asked to start."""
    beginning = Association(AE(), "acceptor")
    with listening(tmp_path):
        monkeypatch.setattr(AE, "active_associations", [beginning])


def test_stopping_does_not_wait_for_stalled_peers(tmp_path: Path) -> None:
    with listening(tmp_path, timeout_seconds=60) as received:
        silent = socket.create_connection((HOST, received.port))
        stalled = wire.associate(received.port)[0]
        stalled.sendall(b"\x04\x00\x00\x00\x10\x00x")
        start = time.monotonic()
    assert time.monotonic() - start < 5
    silent.close()
    stalled.close()


# --- the process dies -----------------------------------------------------------------------------


def test_recovery_reads_what_is_not_on_record(
    tmp_path: Path, received: Received, caplog: pytest.LogCaptureFixture
) -> None:
    received.send(*[save(ct(n), tmp_path / f"{n}.dcm") for n in (1, 2, 3)])
    series = received.spool / STUDY / SERIES
    (series / "1.2.3.4.9.dcm").write_bytes(b"not DICOM")
    save(ct(7), received.spool / STUDY / "results" / "sr.dcm")
    left = list(index_spool(received.spool, lambda study: {f"{SERIES}.1"} if study == STUDY else set()))
    assert left == received.instances[1:]
    assert "1.2.3.4.9.dcm in the spool cannot be read" in caplog.text


def test_recovery_of_a_spool_that_is_not_there_yet(tmp_path: Path) -> None:
    assert list(index_spool(tmp_path / "spool")) == []
