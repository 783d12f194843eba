"""The sender against a real PACS, peers that refuse, and sockets that misbehave."""

from __future__ import annotations

import logging
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import (
    CTImageStorage,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    SecondaryCaptureImageStorage,
    SegmentationStorage,
)
from pynetdicom import AE, evt

from tests.needs import DATA, needs_data, needs_dcmtk
from tests.objects import ct, save
from tests.peers import free_port, wait_until
from triage.config import Destination
from triage.dicom import sender
from triage.dicom.upper_layer import guard

HOST = "127.0.0.1"
QUICK = 0.5
VERIFICATION = "1.2.840.10008.1.1"


def at(port: int, ae_title: str = "PACS") -> Destination:
    return Destination(name="PACS", ae_title=ae_title, host=HOST, port=port)


def send(port: int, *paths: Path, timeout_seconds: float = 5) -> list[sender.SendOutcome]:
    return sender.send(paths, at(port), calling_ae_title="TRIAGE", timeout_seconds=timeout_seconds)


@contextmanager
def peer(
    answer: Callable[[evt.Event], int] = lambda _event: 0x0000,
    classes: Sequence[str] = (CTImageStorage, VERIFICATION),
    syntaxes: Sequence[str] = (ExplicitVRLittleEndian, ImplicitVRLittleEndian),
    **settings: object,
) -> Iterator[int]:
    """A storage SCP that answers each object as ``answer`` says; gives its port."""
    ae = AE("PACS")
    for name, value in settings.items():
        setattr(ae, name, value)
    for sop_class_uid in classes:
        ae.add_supported_context(sop_class_uid, list(syntaxes))
    handlers = [(evt.EVT_C_STORE, answer), (evt.EVT_CONN_OPEN, guard, [30])]
    server = ae.start_server((HOST, 0), block=False, evt_handlers=handlers)
    assert server is not None
    yield server.server_address[1]
    server.shutdown()


@contextmanager
def stub(behave: Callable[[socket.socket], None]) -> Iterator[int]:
    """A peer spoken by hand: ``behave`` gets each connection in a thread of its own."""
    done = threading.Event()

    def serve(connection: socket.socket) -> None:
        with connection:
            behave(connection)
            done.wait(20)

    def accept() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=[connection], daemon=True).start()

    with socket.create_server((HOST, 0)) as server:
        threading.Thread(target=accept, daemon=True).start()
        yield server.getsockname()[1]
        done.set()
        server.shutdown(socket.SHUT_RDWR)


# --- what is sent ---------------------------------------------------------------------------------


@needs_dcmtk
@needs_data
def test_a_foreign_pacs_gets_every_file(tmp_path: Path) -> None:
    port = free_port()
    store = ["storescp", "+xa", "-aet", "PACS", "-od", str(tmp_path), "--fork", str(port)]
    files = sorted((DATA / "dicom" / "covid_ricord_1012").iterdir())[:4]
    files += sorted((DATA / "dicom" / "lungdx_a0001_two_kernels").rglob("*.dcm"))[:4]
    with subprocess.Popen(store) as process:
        try:
            wait_until(lambda: sender.echo(at(port), "TRIAGE", 5) is None)
            assert [outcome.error for outcome in send(port, *files)] == [""] * 8
        finally:
            process.terminate()
    sent = {dcmread(file).SOPInstanceUID: file for file in files}
    kept = [dcmread(path) for path in tmp_path.iterdir()]
    assert {dataset.SOPInstanceUID for dataset in kept} == sent.keys()
    for dataset in kept:
        assert dataset.PixelData == dcmread(sent[dataset.SOPInstanceUID]).PixelData


def test_the_bytes_leave_as_they_lie(tmp_path: Path) -> None:
    received = []

    def keep(event: evt.Event) -> int:
        received.append(event.encoded_dataset(include_meta=False))
        return 0x0000

    files = [save(ct(n), tmp_path / f"{n}.dcm") for n in (1, 2, 3)]
    with peer(keep) as port:
        assert send(port, *files) == [sender.SendOutcome(file, sent=True) for file in files]
    assert all(file.read_bytes().endswith(raw) for file, raw in zip(files, received, strict=True))


def test_a_peer_that_takes_only_implicit_vr_gets_it(tmp_path: Path) -> None:
    received: list[Dataset] = []

    def keep(event: evt.Event) -> int:
        received.append(event.dataset)
        return 0x0000

    file = save(ct(1), tmp_path / "1.dcm")
    with peer(keep, syntaxes=[ImplicitVRLittleEndian]) as port:
        assert send(port, file)[0].sent
    assert received[0].original_encoding == (True, True)
    assert {e.tag: e.value for e in received[0]} == {e.tag: e.value for e in dcmread(file)}


@pytest.mark.parametrize("status", [0xB000, 0xB006, 0xB007, 0x0107])
def test_a_warning_is_a_success_with_a_note(
    status: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with peer(lambda _event: status) as port:
        assert send(port, save(ct(1), tmp_path / "1.dcm"))[0].sent
    assert any(r.name == "triage.dicom.sender" and r.levelno == logging.WARNING for r in caplog.records)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "permanent", "text"),
    [
        (0xA700, False, "out of resources (0xA700)"),
        (0xA702, False, "out of resources (0xA702)"),
        (0x0110, False, "processing failure"),
        (0xA900, True, "does not match its SOP class"),
        (0xC123, True, "cannot understand the object (0xC123)"),
        (0x0122, True, "SOP class not supported"),
        (0x0124, True, "not authorised"),
        (0xDEAD, False, "unknown status (0xDEAD)"),
    ],
)
def test_a_refusal_is_never_sent(status: int, permanent: bool, text: str, tmp_path: Path) -> None:
    with peer(lambda _event: status) as port:
        (outcome,) = send(port, save(ct(1), tmp_path / "1.dcm"))
    assert not outcome.sent
    assert outcome.permanent == permanent
    assert text in outcome.error
    assert f"destination PACS at {HOST}:{port}" in outcome.error


def test_one_refusal_does_not_hold_up_the_others(tmp_path: Path) -> None:
    def refuse_the_second(event: evt.Event) -> int:
        return 0xC000 if event.request.AffectedSOPInstanceUID.endswith(".2") else 0x0000

    files = [save(ct(n), tmp_path / f"{n}.dcm") for n in (1, 2, 3)]
    files.insert(1, tmp_path / "missing.dcm")
    files.append(tmp_path / "text.dcm")
    files[-1].write_text("not DICOM")
    with peer(refuse_the_second) as port:
        outcomes = send(port, *files)
    assert [outcome.path for outcome in outcomes] == files
    assert [outcome.sent for outcome in outcomes] == [True, False, False, True, False]
    assert "missing.dcm cannot be read" in outcomes[1].error
    assert "text.dcm cannot be read" in outcomes[4].error


def test_a_class_or_syntax_the_peer_does_not_take(tmp_path: Path) -> None:
    picture = save(ct(1, SOPClassUID=SecondaryCaptureImageStorage), tmp_path / "1.dcm")
    packed = save(ct(2, PixelData=b"\xfe\xff\x00\xe0" + bytes(4)), tmp_path / "2.dcm", ExplicitVRLittleEndian)
    packed.write_bytes(
        packed.read_bytes().replace(  # the same length keeps the group length right
            b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.5\0"
        )
    )
    image = save(ct(3), tmp_path / "3.dcm")
    with peer() as port:
        outcomes = send(port, picture, packed, image)
    assert [outcome.sent for outcome in outcomes] == [False, False, True]
    assert [outcome.permanent for outcome in outcomes] == [True, True, False]
    assert "does not accept Secondary Capture Image Storage in Explicit VR Little Endian" in outcomes[0].error
    assert "does not accept CT Image Storage in RLE Lossless; allow it there" in outcomes[1].error


def test_nothing_of_it_is_taken(tmp_path: Path) -> None:
    with peer(syntaxes=[JPEG2000Lossless]) as port:
        (outcome,) = send(port, save(ct(1), tmp_path / "1.dcm"))
    assert not outcome.sent
    assert f"accepts none of the SOP classes {CTImageStorage}" in outcome.error


def test_more_kinds_of_objects_than_one_association_holds(tmp_path: Path) -> None:
    files = [
        save(ct(n, SOPClassUID=f"1.2.3.99.{n}"), tmp_path / f"{n}.dcm", ImplicitVRLittleEndian)
        for n in range(1, 131)
    ]
    with peer(classes=["1.2.3.99.1"]) as port:
        outcomes = send(port, *files)
    assert len(outcomes) == 130
    assert not outcomes[-1].sent


# --- who refuses, and who is not there ------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"require_called_aet": True, "ae_title": "OTHER"}, "called AE title not recognised"),
        ({"require_calling_aet": ["OTHER"]}, "calling AE title not recognised"),
    ],
)
def test_a_refused_association_says_why(settings: dict[str, object], text: str, tmp_path: Path) -> None:
    with peer(**settings) as port:
        (outcome,) = send(port, save(ct(1), tmp_path / "1.dcm"))
        error = sender.echo(at(port), "TRIAGE", 5)
    assert outcome.error == error == f"destination PACS at {HOST}:{port} refused the association: {text}"
    assert not outcome.permanent


def test_nobody_there(tmp_path: Path) -> None:
    port = free_port()
    outcomes = send(port, *[save(ct(n), tmp_path / f"{n}.dcm") for n in (1, 2)])
    for outcome in outcomes:
        assert "cannot be reached: connection refused" in outcome.error
        assert outcome.tried
        assert not outcome.permanent


def test_a_name_that_does_not_exist(tmp_path: Path) -> None:
    nowhere = Destination(name="PACS", ae_title="PACS", host="pacs.invalid", port=104)
    (outcome,) = sender.send(
        [save(ct(1), tmp_path / "1.dcm")], nowhere, calling_ae_title="TRIAGE", timeout_seconds=5
    )
    assert "destination PACS at pacs.invalid:104 cannot be found" in outcome.error


def test_echo() -> None:
    with peer() as port:
        assert sender.echo(at(port), "TRIAGE", 5) is None
    with peer(classes=[CTImageStorage]) as port:
        assert "accepts none of the SOP classes" in str(sender.echo(at(port), "TRIAGE", 5))


def test_a_peer_that_aborts_after_the_first(tmp_path: Path) -> None:
    def abort_at_the_second(event: evt.Event) -> int:
        if event.request.AffectedSOPInstanceUID.endswith(".2"):
            event.assoc.abort()
        return 0x0000

    start = time.monotonic()
    with peer(abort_at_the_second) as port:
        outcomes = send(port, *[save(ct(n), tmp_path / f"{n}.dcm") for n in (1, 2, 3)])
    assert [outcome.sent for outcome in outcomes] == [True, False, False]
    assert [outcome.tried for outcome in outcomes] == [True, True, False]
    assert "did not acknowledge 2.dcm, or ended the association" in outcomes[1].error
    assert outcomes[2].error == f"3.dcm was not tried: {outcomes[1].error}"
    assert time.monotonic() - start < 4, "the third must not wait for the timeout"


def test_a_class_at_which_a_peer_aborts_holds_up_no_other(tmp_path: Path) -> None:
    """Whoever sends the untried ones again gets every other object through, however many are aborted at."""

    def abort_at_a_segmentation(event: evt.Event) -> int:
        if event.request.AffectedSOPClassUID == SegmentationStorage:
            event.assoc.abort()
        return 0x0000

    kinds = [SegmentationStorage, CTImageStorage, SegmentationStorage, SegmentationStorage, CTImageStorage]
    files = [save(ct(n, SOPClassUID=kind), tmp_path / f"{n}.dcm") for n, kind in enumerate(kinds)]
    last: dict[Path, sender.SendOutcome] = {}
    left, calls = files, 0
    with peer(abort_at_a_segmentation, classes=[CTImageStorage, SegmentationStorage]) as port:
        while left:
            outcomes = send(port, *left)
            assert any(outcome.tried for outcome in outcomes)
            last |= {outcome.path: outcome for outcome in outcomes}
            left, calls = [outcome.path for outcome in outcomes if not outcome.tried], calls + 1
    assert [last[file].sent for file in files] == [kind == CTImageStorage for kind in kinds]
    assert calls == 4, "one for each abort, and one for what came after the last"
    for file in (files[0], files[2], files[3]):
        assert f"did not acknowledge {file.name}" in last[file].error
        assert not last[file].permanent


# --- peers that stall -----------------------------------------------------------------------------


def accept_association(connection: socket.socket) -> None:
    """A-ASSOCIATE-AC with the first transfer syntax of every proposed context (PS3.8 section 9.3.3)."""
    header = receive(connection, 6)
    body = receive(connection, struct.unpack(">xxL", header)[0])
    items, at_byte = b"", 68
    while at_byte < len(body):
        kind, length = struct.unpack(">BxH", body[at_byte : at_byte + 4])
        value = body[at_byte + 4 : at_byte + 4 + length]
        if kind == 0x20:
            abstract_length = struct.unpack(">H", value[6:8])[0]
            syntax = value[8 + abstract_length :]
            syntax = syntax[: 4 + struct.unpack(">H", syntax[2:4])[0]]
            items += struct.pack(">BxHBxBx", 0x21, 4 + len(syntax), value[0], 0) + syntax
        elif kind in (0x10, 0x50):
            items += body[at_byte : at_byte + 4 + length]
        at_byte += 4 + length
    answer = body[:68] + items
    connection.sendall(struct.pack(">BxL", 2, len(answer)) + answer)


def receive(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count and (part := connection.recv(count - len(data))):
        data += part
    return data


def stays_silent(connection: socket.socket) -> None:
    pass


def stalls_in_its_answer(connection: socket.socket) -> None:
    connection.sendall(b"\x02\x00\x00\x00\x10\x00\x00")


def answers_nonsense(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")


def hangs_up(connection: socket.socket) -> None:
    connection.shutdown(socket.SHUT_RDWR)


def accepts_and_stays_silent(connection: socket.socket) -> None:
    accept_association(connection)
    while connection.recv(65536):
        pass


def accepts_and_stalls_in_a_pdu(connection: socket.socket) -> None:
    accept_association(connection)
    connection.recv(65536)
    connection.sendall(b"\x04\x00\x00\x00\x10\x00\x00\x00")


def accepts_and_drips(connection: socket.socket) -> None:
    accept_association(connection)
    connection.sendall(b"\x04\x00\x00\x00\x10\x00")
    try:
        while True:
            connection.sendall(b"\x00")
            time.sleep(0.1)
    except OSError:
        pass


def accepts_and_does_not_read(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    accept_association(connection)


@pytest.mark.parametrize(
    "behave",
    [
        stays_silent,
        stalls_in_its_answer,
        answers_nonsense,
        hangs_up,
        accepts_and_stays_silent,
        accepts_and_stalls_in_a_pdu,
        accepts_and_drips,
        accepts_and_does_not_read,
    ],
)
def test_a_peer_that_stalls_holds_up_nobody(
    behave: Callable[[socket.socket], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender, "SLOWEST_BYTES_PER_SECOND", 2**40)  # no extra patience for the size
    size = 20_000_000 if behave is accepts_and_does_not_read else 128
    files = [save(ct(n, PixelData=bytes(size)), tmp_path / f"{n}.dcm") for n in (1, 2)]
    start = time.monotonic()
    with stub(behave) as port:
        outcomes = send(port, *files, timeout_seconds=QUICK)
        error = sender.echo(at(port), "TRIAGE", QUICK)
    assert time.monotonic() - start < 16 * QUICK
    assert not any(outcome.sent or outcome.permanent for outcome in outcomes)
    associated = behave.__name__.startswith("accepts")
    assert [outcome.tried for outcome in outcomes] == [True, not associated]
    assert all(f"{HOST}:{port}" in outcome.error for outcome in outcomes)
    if behave is not accepts_and_does_not_read:
        assert error is not None


def test_a_slow_peer_gets_time_for_a_large_object(tmp_path: Path) -> None:
    """A line slower than the timeout is no reason to give up while bytes flow."""

    def slowly(_event: evt.Event) -> int:
        time.sleep(2 * QUICK)
        return 0x0000

    file = save(ct(1, PixelData=bytes(200_000)), tmp_path / "1.dcm")
    with peer(slowly) as port:
        assert send(port, file, timeout_seconds=QUICK)[0].sent
