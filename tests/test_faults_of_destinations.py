"""Every fault of a destination is survived: nothing that was accepted is sent twice, nothing is lost, and
nobody else waits. Each peer fails in its own way first, and works well thereafter.
"""

from __future__ import annotations

import json
import re
import socket
import socketserver
import ssl
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread
from pydicom.uid import CTImageStorage
from pynetdicom import AE, evt

from tests.hospital import Hospital, hospital
from tests.objects import ct, save
from tests.peers import HOST, free_port
from tests.test_db import NOW, an_answer, an_instance, place, register
from tests.test_deliver import judge
from tests.test_outgoing import SECRET, certificate, letter, mllp, receiver, ris, server_context  # noqa: F401
from triage import deliver, outbox
from triage.config import AnyDestination, Tls
from triage.domain import DeliveryState, ResultKind, ResultObject

PATIENCE = 1.0
"""Seconds after which a silent peer counts as away."""
Certificate = tuple[Path, Path]


@dataclass
class Peer:
    """A destination that fails as ``fault`` says, until that is None; ``accepted`` is what it took."""

    fault: str | None
    accepted: list[str] = field(default_factory=list)
    port: int = 0
    let_go: threading.Event = field(default_factory=threading.Event)

    def hang(self) -> None:
        """Say nothing until the test ends."""
        self.let_go.wait(30)


def reset(connection: socket.socket) -> None:
    """Close as a crashed peer does: RST instead of FIN."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


# --- the peers ------------------------------------------------------------------------------------

Playing = Callable[[Peer, ssl.SSLContext | None], Any]


@contextmanager
def pacs(peer: Peer, tls: ssl.SSLContext | None) -> Iterator[None]:
    """A storage SCP; what fails is the second object, or the association."""
    ae = AE("PACS")
    ae.add_supported_context(CTImageStorage)

    def store(event: evt.Event) -> int:
        uid = str(event.request.AffectedSOPInstanceUID)
        if peer.fault is not None and uid.endswith(".2"):
            if peer.fault.startswith("0x"):
                return int(peer.fault, 16)
            if peer.fault == "hang":
                peer.hang()
            if peer.fault == "drop in mid-PDU":
                connection = event.assoc.dul.socket.socket
                connection.sendall(b"\x04\x00\x00\x00\x10\x00\x00\x00")
                connection.shutdown(socket.SHUT_RDWR)
            return 0x0110
        peer.accepted.append(uid)
        return 0x0000

    def asked(event: evt.Event) -> None:
        event.assoc.ae.ae_title = "OTHER" if peer.fault == "association refused" else "PACS"

    ae.require_called_aet = True
    server = ae.start_server(
        (HOST, peer.port),
        block=False,
        ssl_context=tls,
        evt_handlers=[(evt.EVT_C_STORE, store), (evt.EVT_CONN_OPEN, asked)],
    )
    assert server is not None
    peer.port = server.server_address[1]
    yield
    server.shutdown()


@contextmanager
def web(peer: Peer, tls: ssl.SSLContext | None) -> Iterator[None]:
    """A webhook's program and a DICOMweb archive."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            identity = self.headers["webhook-id"] or stored_uid(body)
            if peer.fault == "hang":
                peer.hang()
            elif peer.fault == "reset":
                reset(self.connection)
            elif peer.fault == "taken, but the answer is lost":
                peer.accepted.append(identity)
                reset(self.connection)
            elif peer.fault is not None:
                self.send_response(int(peer.fault.split()[0]))
                if "Retry-After" in peer.fault:
                    self.send_header("Retry-After", peer.fault.split()[-1])
                self.end_headers()
            else:
                peer.accepted.append(identity)
                said = {"00081199": {"vr": "SQ", "Value": [{"00081155": {"vr": "UI", "Value": [identity]}}]}}
                self.send_response(200)
                self.send_header("Content-Type", "application/dicom+json")
                self.end_headers()
                self.wfile.write(json.dumps(said).encode())

        def finish(self) -> None:
            if self.connection.fileno() >= 0:
                super().finish()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer((HOST, peer.port), Handler) as server:
        yield from serving(server, peer, tls)


def stored_uid(body: bytes) -> str:
    return str(dcmread(BytesIO(body[body.index(b"DICM") - 128 :])).SOPInstanceUID)


@contextmanager
def mllp_peer(peer: Peer, tls: ssl.SSLContext | None) -> Iterator[None]:
    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            message = b""
            while not message.endswith(b"\x1c\r"):
                if not (part := self.connection.recv(65536)):
                    return
                message += part
            identity = message.split(b"|")[9].decode()
            fault = peer.fault
            code = fault if fault in ("AE", "AR") else "AA"
            if fault == "hang":
                peer.hang()
            if fault in ("hang", "drop"):
                return
            if code == "AA":
                peer.accepted.append(identity)
            if fault == "taken, but the answer is lost":
                return reset(self.connection)
            head = "MSH|^~\\&|RIS||TRIAGE||20260302||ACK|1|P|2.5.1"
            self.wfile.write(f"\x0b{head}\rMSA|{code}|{identity}|Doe^Jane unknown\r\x1c\r".encode())

        def finish(self) -> None:
            pass

    with socketserver.ThreadingTCPServer((HOST, peer.port), Handler) as server:
        yield from serving(server, peer, tls)


@contextmanager
def smtp_peer(peer: Peer, tls: ssl.SSLContext | None) -> Iterator[None]:
    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.say("220 here")
            while line := self.rfile.readline():
                command = line.split(b" ")[0].strip().upper().decode()
                if command == peer.fault:
                    return
                if command == "DATA":
                    self.take()
                elif command == "RCPT" and peer.fault is not None and peer.fault.isdecimal():
                    self.say(f"{peer.fault} no")
                elif command == "STARTTLS":
                    self.say("454 no TLS here" if tls is None else "220 go")
                    if tls is not None:
                        self.connection = tls.wrap_socket(self.connection, server_side=True)
                        self.rfile = self.connection.makefile("rb")
                elif command == "EHLO":
                    self.say("250-here\r\n250 STARTTLS")
                else:
                    self.say("221 bye" if command == "QUIT" else "250 fine")
                if command == "QUIT":
                    return

        def take(self) -> None:
            if peer.fault == "hang":
                peer.hang()
            self.say("354 go")
            content = b""
            while not content.endswith(b"\r\n.\r\n") and (line := self.rfile.readline()):
                content += line
            identity = re.search(rb"(?im)^message-id: <(\w+)@", content)
            assert identity
            peer.accepted.append(identity[1].decode())
            if peer.fault == "taken, but the answer is lost":
                reset(self.connection)
            else:
                self.say("250 taken")

        def say(self, text: str) -> None:
            self.connection.sendall(f"{text}\r\n".encode())

        def finish(self) -> None:
            self.rfile.close()
            self.connection.close()

    with socketserver.ThreadingTCPServer((HOST, peer.port), Handler) as server:
        yield from serving(server, peer, None)


def serving(server: socketserver.BaseServer, peer: Peer, tls: ssl.SSLContext | None) -> Iterator[None]:
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # a client that hangs up is part of the play
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    peer.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=[0.01])
    thread.start()
    yield
    peer.let_go.set()
    server.shutdown()
    thread.join()


KINDS: dict[str, tuple[Playing, dict[str, Any]]] = {
    "dicom": (pacs, {"ae_title": "PACS"}),
    "dicomweb": (web, {}),
    "webhook": (web, {"secret": SECRET}),
    "hl7": (mllp_peer, {}),
    "email": (smtp_peer, {"sender": "triage@hospital.test", "to": "a@hospital.test"}),
}


def settings_of(kind: str, port: int, scheme: str = "http") -> dict[str, Any]:
    where: dict[str, Any] = {"host": HOST, "port": port}
    if kind in ("dicomweb", "webhook"):
        where = {"url": f"{scheme}://{HOST}:{port}"}
    return {"name": "FAULTY", "kind": kind, **KINDS[kind][1], **where}


# --- what is owed ---------------------------------------------------------------------------------


@contextmanager
def clerk(folder: Path, faulty: dict[str, Any], other_port: int) -> Iterator[Hospital]:
    """One judged study with three objects, owed to the faulty destination; its answer also to another."""
    other = {"name": "OTHER", "kind": "webhook", "secret": SECRET, "url": f"http://{HOST}:{other_port}"}
    section = {"destinations": [faulty, other], "timeout_seconds": PATIENCE}
    objects = [
        ResultObject(ResultKind.SR, save(ct(n), folder / f"{n}.dcm"), ct(n).SOPInstanceUID, CTImageStorage)
        for n in (1, 2, 3)
    ]
    with hospital(folder / "hospital", delivery=section) as here:
        here.now = NOW
        register(here.db, an_instance())
        judge(here.db, "a", *outbox.owed(here.config.destinations, an_answer(), place(), objects))
        yield here


def identities(here: Hospital) -> list[str]:
    """What the faulty destination must accept, each once."""
    (answer,) = here.db.results("1.2")
    owed = [one for one in here.db.deliveries("1.2") if one.destination == "FAULTY"]
    return [one.sop_instance_uid or deliver.identity("FAULTY", answer) for one in owed]


def states(here: Hospital, name: str) -> list[DeliveryState]:
    return [one.state for one in here.db.deliveries("1.2") if one.destination == name]


def send(here: Hospital, destination: AnyDestination) -> None:
    while deliver.step(here.db, here.config, destination, here.now):
        pass


# --- the faults -----------------------------------------------------------------------------------

FOR_NOW, FOR_GOOD = False, True
FAULTS = [
    ("dicom", "association refused", FOR_NOW),
    ("dicom", "0xA700", FOR_NOW),
    ("dicom", "0xA900", FOR_GOOD),
    ("dicom", "0x0110", FOR_NOW),
    ("dicom", "hang", FOR_NOW),
    ("dicom", "drop in mid-PDU", FOR_NOW),
    *[
        (kind, fault, permanent)
        for kind in ("dicomweb", "webhook")
        for fault, permanent in (
            ("429", FOR_NOW),
            ("500", FOR_NOW),
            ("503", FOR_NOW),
            ("401", FOR_GOOD),
            ("hang", FOR_NOW),
            ("reset", FOR_NOW),
        )
    ],
    ("hl7", "AE", FOR_GOOD),
    ("hl7", "AR", FOR_NOW),
    ("hl7", "hang", FOR_NOW),
    ("hl7", "drop", FOR_NOW),
    ("email", "451", FOR_NOW),
    ("email", "550", FOR_GOOD),
    ("email", "hang", FOR_NOW),
    ("email", "MAIL", FOR_NOW),
]


@pytest.mark.parametrize(("kind", "fault", "permanent"), FAULTS)
def test_a_fault_is_survived(kind: str, fault: str, permanent: bool, tmp_path: Path) -> None:
    peer = Peer(fault)
    with (
        KINDS[kind][0](peer, None),
        receiver(200) as (other_port, told),
        clerk(tmp_path, settings_of(kind, peer.port), other_port) as here,
    ):
        owed = identities(here)
        began = time.monotonic()
        here.deliver()
        assert time.monotonic() - began < 3 * PATIENCE + 5
        assert (states(here, "OTHER"), len(told)) == ([DeliveryState.SENT], 1)
        check_failed(here, peer, permanent)
        peer.fault = None
        here.pass_time(here.config.delivery.longest_retry_seconds)
        here.deliver()
        here.deliver()
        assert set(states(here, "FAULTY")) == {DeliveryState.SENT}
        assert (Counter(peer.accepted), len(told)) == (Counter(owed), 1)


def check_failed(here: Hospital, peer: Peer, permanent: bool) -> None:
    """Something waits with its reason, what is marked sent was accepted, and the wait is right."""
    known = {one.sop_instance_uid: one.state for one in here.db.deliveries("1.2") if one.sop_instance_uid}
    assert {uid for uid, state in known.items() if state is DeliveryState.SENT} == (
        set(peer.accepted) if known else set()
    )
    waiting = here.db.undelivered()
    assert "destination FAULTY" in waiting[0].last_error
    assert all(not one.last_error or "destination FAULTY" in one.last_error for one in waiting)
    soon = here.now + timedelta(seconds=here.config.delivery.first_retry_seconds)
    assert here.db.due_deliveries("FAULTY", here.now) == []
    assert len(here.db.due_deliveries("FAULTY", soon)) == (0 if permanent else len(waiting))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", ["an authority we do not know", "no TLS there"])
def test_tls_that_does_not_fit_is_survived(
    kind: str,
    fault: str,
    tmp_path: Path,
    certificate: Certificate,  # noqa: F811
) -> None:
    """No byte of a patient leaves before we know who takes it; once it fits, all is sent."""
    context, known = server_context(certificate), Tls(ca=certificate[0])
    peer = Peer(None)
    with ExitStack() as stack:
        other_port, told = stack.enter_context(receiver(200))
        with ExitStack() as first:
            plain = fault == "no TLS there"
            first.enter_context(KINDS[kind][0](peer, None if plain else context))
            settings = settings_of(kind, peer.port, "https")
            settings["tls"] = {"ca": str(certificate[0])} if plain else {}
            here = stack.enter_context(clerk(tmp_path, settings, other_port))
            faulty, other = here.config.delivery.destinations
            owed = identities(here)
            send(here, faulty)
            send(here, other)
            assert (peer.accepted, len(told)) == ([], 1)
            assert set(states(here, "FAULTY")) == {DeliveryState.PENDING}
        peer.let_go.clear()
        stack.enter_context(KINDS[kind][0](peer, context))
        here.pass_time(here.config.delivery.longest_retry_seconds)
        send(here, faulty.model_copy(update={"tls": known}))
        assert set(states(here, "FAULTY")) == {DeliveryState.SENT}
        assert (Counter(peer.accepted), len(told)) == (Counter(owed), 1)


@pytest.mark.parametrize("kind", ["webhook", "hl7", "email"])
def test_an_answer_whose_receipt_is_lost_comes_again_as_the_same(kind: str, tmp_path: Path) -> None:
    """As after a kill -9 between a peer's word and our mark: the peer can tell that it has it."""
    peer = Peer("taken, but the answer is lost")
    with (
        KINDS[kind][0](peer, None),
        receiver(200) as (other_port, _),
        clerk(tmp_path, settings_of(kind, peer.port), other_port) as here,
    ):
        here.deliver()
        assert states(here, "FAULTY") == [DeliveryState.PENDING]
        peer.fault = None
        here.pass_time(here.config.delivery.longest_retry_seconds)
        here.deliver()
        assert states(here, "FAULTY") == [DeliveryState.SENT]
        assert peer.accepted == identities(here) * 2
        first = peer.accepted[0]
        judge(here.db, "b", *outbox.owed(here.config.destinations, an_answer(), place(), ()))
        here.deliver()
    assert peer.accepted[2] != first, "a correction is another message"
    assert len(first) == deliver.IDENTITY_LENGTH


# --- when it is tried again -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dicomweb", "webhook"])
def test_a_server_that_says_when_to_come_back_is_left_alone_until_then(kind: str, tmp_path: Path) -> None:
    peer = Peer("429 Retry-After 600")
    with (
        KINDS[kind][0](peer, None),
        receiver(200) as (other_port, _),
        clerk(tmp_path, settings_of(kind, peer.port), other_port) as here,
    ):
        here.deliver()
        peer.fault = None
        here.pass_time(599)
        here.deliver()
        register(here.db, an_instance("1.3", "2.1"))
        if kind == "webhook":
            judged_too(here, "1.3")  # what comes meanwhile waits, too
            assert here.db.entry("1.3").deliveries == {DeliveryState.PENDING: 2}
        here.deliver()
        assert peer.accepted == []
        here.pass_time(1)
        here.deliver()
        assert set(identities(here)) <= set(peer.accepted)
        assert len(peer.accepted) == len(identities(here)) + (kind == "webhook")


@pytest.mark.parametrize(
    ("retry_after", "seconds"),
    [
        ("120", 120),
        ("Sun, 01 Mar 2026 08:02:00 GMT", 120),
        ("Sun, 01 Mar 2026 07:00:00 GMT", 0),
        ("99999999", 86400),
        ("9" * 5000, 0),
        ("soon", 0),
        ("-5", 0),
        ("", 0),
    ],
)
def test_retry_after_is_seconds_or_a_date_and_never_more_than_a_day(retry_after: str, seconds: int) -> None:
    assert deliver._rest(retry_after, NOW) == timedelta(seconds=seconds)


def test_what_waited_for_a_destination_goes_at_once_when_it_is_back(tmp_path: Path) -> None:
    """After a night's outage the waits have grown to hours; the first that comes through ends them all."""
    port = free_port()
    with (
        receiver(200) as (other_port, _),
        clerk(tmp_path, settings_of("webhook", port), other_port) as here,
    ):
        for _ in range(10):
            here.deliver()
            here.pass_time(3600)
        (waiting,) = here.db.undelivered()
        assert waiting.attempts > 5
        assert here.db.due_deliveries("FAULTY", here.now) == []
        register(here.db, an_instance("1.3", "2.1"))
        peer = Peer(None, port=port)
        with web(peer, None):
            judged_too(here, "1.3")
            here.deliver()
        assert states(here, "FAULTY") == [DeliveryState.SENT]
        assert len(peer.accepted) == 2


@pytest.mark.parametrize("fault", ["401", "404"])
def test_what_was_not_let_in_goes_as_soon_as_anything_is(fault: str, tmp_path: Path) -> None:
    """A server that is being set up says 404 for minutes: no answer waits a day for that."""
    peer = Peer(fault)
    with (
        web(peer, None),
        receiver(200) as (other_port, _),
        clerk(tmp_path, settings_of("webhook", peer.port), other_port) as here,
    ):
        here.deliver()
        peer.fault = None
        here.pass_time(60)
        here.deliver()
        assert peer.accepted == []
        register(here.db, an_instance("1.3", "2.1"))
        judged_too(here, "1.3")
        here.deliver()
        assert states(here, "FAULTY") == [DeliveryState.SENT]
        assert len(peer.accepted) == 2


def judged_too(here: Hospital, study: str) -> None:
    here.db.restart_quiet_periods(here.now)
    seen = here.db.quiet_study(here.now)
    assert seen is not None
    here.db.mark_ready(seen)
    claimed = here.db.claim("me", here.now, 60)
    assert claimed is not None
    owed = outbox.owed(here.config.destinations, an_answer(study), place(), ())
    assert here.db.finish(claimed, an_answer(study), owed, place(), here.now)


@pytest.mark.parametrize(
    ("kind", "fault"), [("dicom", "0xA700"), ("dicom", "drop in mid-PDU"), ("dicomweb", "500")]
)
def test_of_a_study_the_order_is_kept_for_a_while(kind: str, fault: str, tmp_path: Path) -> None:
    """A report may refer to what comes before it; yet it is worth more than its order."""
    peer = Peer(fault)
    with (
        KINDS[kind][0](peer, None),
        receiver(200) as (other_port, _),
        clerk(tmp_path, settings_of(kind, peer.port), other_port) as here,
    ):
        owed = identities(here)
        here.deliver()
        here.deliver()
        before = owed[: len(peer.accepted)]
        assert peer.accepted == before
        assert len(before) < 2, "nothing overtakes what is tried again soon"
        refused = here.db.deliveries("1.2")[len(before)]
        here.db.postpone(refused.delivery_id, "refused", here.now + timedelta(hours=1))
        peer.fault = None
        here.deliver()
        assert peer.accepted == [uid for uid in owed if uid != refused.sop_instance_uid]
        here.pass_time(3600)
        here.deliver()
        assert peer.accepted[-1] == refused.sop_instance_uid


# --- the outbox while it is being sent --------------------------------------------------------------


def test_a_correction_that_comes_while_the_earlier_answer_is_sent_is_not_lost(tmp_path: Path) -> None:
    peer = Peer(None)
    with (
        web(peer, None),
        receiver(200) as (other_port, _),
        clerk(tmp_path, settings_of("webhook", peer.port), other_port) as here,
    ):
        faulty, _ = here.config.delivery.destinations
        (sending,) = here.db.due_deliveries("FAULTY", here.now)
        judge(here.db, "b", *outbox.owed(here.config.destinations, an_answer(), place(), ()))
        here.db.mark_sent(sending.delivery_id, here.now)
        send(here, faulty)
        newest = here.db.results("1.2")[0]
        assert peer.accepted == [deliver.identity("FAULTY", newest)]


def test_what_trips_us_holds_up_no_other_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    peer = Peer(None)
    with (
        web(peer, None),
        receiver(200) as (other_port, _),
        clerk(tmp_path, settings_of("webhook", peer.port), other_port) as here,
    ):
        register(here.db, an_instance("1.3", "2.1"))
        judged_too(here, "1.3")
        answer_of, (first,) = here.db.answer, here.db.due_deliveries("FAULTY", here.now, limit=1)

        def trip(owed: Any) -> Any:
            if owed == first:
                raise KeyError("bug")
            return answer_of(owed)

        monkeypatch.setattr(here.db, "answer", trip)
        send(here, here.config.delivery.destinations[0])
        assert len(peer.accepted) == 1
        (waiting,) = [one for one in here.db.undelivered() if one.destination == "FAULTY"]
    assert (waiting.delivery_id, waiting.last_error) == (first.delivery_id, "internal error: KeyError")
    assert "was not sent to FAULTY" in caplog.text


def test_what_a_peer_says_of_a_patient_is_on_the_list_but_in_no_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    peer = Peer("AE")
    with (
        mllp_peer(peer, None),
        receiver(200) as (other_port, _),
        clerk(tmp_path, settings_of("hl7", peer.port), other_port) as here,
    ):
        here.deliver()
        assert "AE Doe^Jane unknown" in here.db.undelivered()[0].last_error
    assert "refused: AE" in caplog.text
    assert "Doe" not in caplog.text
