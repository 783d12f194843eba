"""Answers by webhook, HL7 and mail: real or scripted peers that accept, refuse, hang and drop."""

from __future__ import annotations

import http.server
import json
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email import message_from_bytes, policy
from pathlib import Path
from unicodedata import category

import pytest
from hl7 import parse
from hl7apy.mllp import AbstractErrorHandler, AbstractHandler, MLLPServer
from hl7apy.parser import parse_message
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.peers import HOST, free_port
from triage.config import Email, Hl7, Tls, Webhook
from triage.domain import Band, Grade, Priority, Result, Status, Study, StudyState
from triage.outgoing import email, hl7, webhook
from triage.outgoing.letters import SENT, Letter

NOON = datetime(2026, 3, 2, 12, 0, tzinfo=UTC)
QUICK = 0.5
SECRET = "correct horse battery"


def letter(band: Band = Band.CRITICAL, status: Status = Status.POSITIVE, revision: int = 1) -> Letter:
    study = Study(
        study_instance_uid="1.2.3",
        state=StudyState.ANALYZED,
        arrived_at=NOON,
        last_received_at=NOON,
        patient_id="P|1",
        patient_name="Müller^Jörg^^Dr^=Yamada",
        accession_number="A&7",
        study_date="20260302",
        study_description="CT Thorax",
    )
    result = Result(
        study_instance_uid="1.2.3",
        patient_id="P|1",
        status=status,
        reason="because",
        probability=0.97,
        probability_kind="classifier",
        affected_fraction=0.625,
        grade=Grade.CT3,
        revision=revision,
        model="multitask",
        model_version="abc",
        files={},
    )
    place = Priority(band, 0.6, NOON + timedelta(minutes=15), "right lung 62 % affected, P 0.97")
    return Letter("triage.7", study, place, result, NOON)


@contextmanager
def stub(behave: Callable[[socket.socket], None], tls: ssl.SSLContext | None = None) -> Iterator[int]:
    """A peer spoken by hand, one connection after the other; what it raises ends that connection."""

    def serve() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            connection.settimeout(5)
            try:
                with connection if tls is None else tls.wrap_socket(connection, server_side=True) as spoken:
                    behave(spoken)
            except OSError:
                continue

    with socket.create_server((HOST, 0)) as server:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield server.getsockname()[1]
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join(10)


def until_closed(connection: socket.socket) -> None:
    while connection.recv(65536):
        pass


def drop(connection: socket.socket) -> None:
    connection.recv(1)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that is its own authority, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=test"]
    made += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "key.pem", "-out", "cert.pem"]
    subprocess.run(made, cwd=folder, check=True, capture_output=True)
    return folder / "cert.pem", folder / "key.pem"


def server_context(certificate: tuple[Path, Path], *, mutual: bool = False) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*certificate)
    if mutual:
        context.load_verify_locations(certificate[0])
        context.verify_mode = ssl.CERT_REQUIRED
    return context


# --- webhook --------------------------------------------------------------------------------------


def hook(port: int, scheme: str = "http", tls: Tls | None = None) -> Webhook:
    return Webhook(
        kind="webhook", name="HOOK", url=f"{scheme}://{HOST}:{port}/triage", secret=SECRET, tls=tls
    )


@contextmanager
def receiver(*codes: int) -> Iterator[tuple[int, list[tuple[dict[str, str], bytes]]]]:
    """Answers with each code in turn, the last for good; gives its port and what it received."""
    received: list[tuple[dict[str, str], bytes]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            received.append(({name.lower(): value for name, value in self.headers.items()}, body))
            self.send_response(codes[min(len(received), len(codes)) - 1])
            self.end_headers()

        def do_GET(self) -> None:
            self.send_error(405)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer((HOST, 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server.server_address[1], received
        server.shutdown()
        thread.join()


def test_a_webhook_gets_the_answer_signed() -> None:
    with receiver(202) as (port, received):
        assert webhook.reach(hook(port), 5) is None
        assert webhook.send(letter(), hook(port), 5) == SENT
    ((headers, body),) = received
    said = json.loads(body)
    assert (said["status"], said["band"], said["accession_number"]) == ("positive", "critical", "A&7")
    assert said["affected_fraction"] == 0.625
    assert "files" not in said
    identity, timestamp = headers["webhook-id"], headers["webhook-timestamp"]
    assert (identity, timestamp) == ("triage.7", str(int(NOON.timestamp())))
    signed = subprocess.run(  # another implementation of HMAC than ours
        ["openssl", "dgst", "-sha256", "-hmac", SECRET, "-binary"],
        input=f"{identity}.{timestamp}.".encode() + body,
        capture_output=True,
        check=True,
    )
    encoded = subprocess.run(["base64", "-w0"], input=signed.stdout, capture_output=True, check=True)
    assert headers["webhook-signature"] == f"v1,{encoded.stdout.decode()}"


@pytest.mark.parametrize(
    ("code", "permanent"), [(429, False), (500, False), (503, False), (400, True), (401, True), (302, True)]
)
def test_what_a_webhook_answers_is_for_now_or_for_good(code: int, permanent: bool) -> None:
    with receiver(code) as (port, _):
        outcome = webhook.send(letter(), hook(port), 5)
    assert (outcome.sent, outcome.permanent) == (False, permanent)
    assert str(code) in outcome.error


@pytest.mark.parametrize(("behave", "words"), [(until_closed, "did not answer within 0.5 s"), (drop, "HOOK")])
def test_a_webhook_that_hangs_or_drops_is_tried_again(
    behave: Callable[[socket.socket], None], words: str
) -> None:
    with stub(behave) as port:
        outcome = webhook.send(letter(), hook(port), QUICK)
    assert (outcome.sent, outcome.permanent) == (False, False)
    assert words in outcome.error


def test_a_webhook_that_is_not_there_is_tried_again() -> None:
    port = free_port()
    outcome = webhook.send(letter(), hook(port), QUICK)
    assert (outcome.sent, outcome.permanent) == (False, False)
    assert "cannot be reached" in outcome.error
    assert "cannot be reached" in str(webhook.reach(hook(port), QUICK))


def test_a_webhook_is_sure_of_the_server_and_the_server_of_us(certificate: tuple[Path, Path]) -> None:
    def accept(connection: socket.socket) -> None:
        request = b""  # whoever hangs up on a body breaks the connection
        while not request.endswith(b"}") and (piece := connection.recv(65536)):
            request += piece
        connection.sendall(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")

    mine = Tls(ca=certificate[0], certificate=certificate[0], key=certificate[1])
    with stub(accept, server_context(certificate, mutual=True)) as port:
        assert webhook.send(letter(), hook(port, "https", mine), 5) == SENT
        strange = webhook.send(letter(), hook(port, "https"), 5)
        assert "cannot be trusted" in strange.error
        unnamed = webhook.send(letter(), hook(port, "https", Tls(ca=certificate[0])), 5)
        assert (unnamed.sent, unnamed.permanent) == (False, False)
        lost = webhook.send(letter(), hook(port, "https", Tls(ca=Path("/nowhere.pem"))), 5)
        assert "a file that its tls names is not there" in lost.error


# --- HL7 ------------------------------------------------------------------------------------------


def ris(port: int, tls: Tls | None = None) -> Hl7:
    return Hl7(kind="hl7", name="RIS", host=HOST, port=port, application="RIS", facility="H&S", tls=tls)


@contextmanager
def mllp() -> Iterator[tuple[int, list[str]]]:
    """hl7apy's MLLP server, which parses by its own grammar of HL7 2.5.1."""
    received: list[str] = []

    class Keep(AbstractHandler):
        def reply(self) -> str:
            received.append(self.incoming_message)
            parsed = parse_message(self.incoming_message)
            control = parsed.msh.msh_10.value
            return f"\x0bMSH|^~\\&|RIS||TRIAGE||20260302||ACK^R01|1|P|2.5.1\rMSA|AA|{control}\r\x1c\r"

    class Fail(AbstractErrorHandler):
        def reply(self) -> str:
            raise self.exc

    server = MLLPServer(HOST, free_port(), {"ORU^R01^ORU_R01": (Keep,), "ERR": (Fail,)})
    thread = threading.Thread(target=server.serve_forever, args=[0.01])
    thread.start()
    yield server.server_address[1], received
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_ris_gets_the_answer_and_the_priority() -> None:
    with mllp() as (port, received):
        assert hl7.reach(ris(port), 5) is None
        assert hl7.send(letter(), ris(port), 5) == SENT
    (text,) = received
    parsed = parse_message(text, find_groups=True)
    parsed.validate()
    patient = parsed.oru_r01_patient_result.oru_r01_patient.pid
    assert patient.pid_3.pid_3_1.value == "P\\F\\1"
    assert patient.pid_5.to_er7() == "Müller^Jörg^^^Dr"
    order = parsed.oru_r01_patient_result.oru_r01_order_observation
    assert order.obr.obr_18.value == "A\\T\\7"
    assert (order.obr.obr_5.value, order.obr.obr_25.value) == ("S", "P")
    assert order.oru_r01_timing_qty.tq1.tq1_9.value == "S"
    facts = {group.obx.obx_3.obx_3_1.value: group.obx.obx_5.to_er7() for group in order.oru_r01_observation}
    assert facts["STATUS"] == "positive"
    assert (facts["P"], facts["AFFECTED"], facts["GRADE"]) == ("0.97", "62.5", "CT-3")


def test_a_score_is_not_called_a_probability() -> None:
    answer = replace(letter().result, probability_kind="score", probability=0.04)
    told = str(hl7.message(replace(letter(), result=answer), ris(1)))
    assert "|SCORE^Score, not a probability, not calibrated^99TRIAGE||0.04|" in told
    assert "|P^" not in told


@settings(max_examples=40)
@given(st.text(), st.text(), st.text())
def test_no_name_leaves_its_field(name: str, patient_id: str, accession_number: str) -> None:
    """Neither separators nor line ends in what a scanner sent make fields or segments of their own."""
    study = replace(
        letter().study, patient_name=name, patient_id=patient_id, accession_number=accession_number
    )
    sent = str(hl7.message(replace(letter(), study=study), ris(1)))
    read = parse(sent)
    assert [str(segment[0]) for segment in read] == [str(s[0]) for s in hl7.message(letter(), ris(1))]
    assert str(read.segment("MSH")(10)) == "triage.7"
    assert not set(sent.replace("\r", "")) & set(map(chr, range(32)))
    printable = "".join(c for c in patient_id if category(c) not in ("Cc", "Cs", "Zl", "Zp"))
    assert read.unescape(str(read.segment("PID")(3))) == printable


@settings(max_examples=40)
@given(st.text(), st.text())
def test_no_accession_number_writes_a_header(accession_number: str, study_date: str) -> None:
    study = replace(letter().study, accession_number=accession_number, study_date=study_date)
    written = email.compose(replace(letter(), study=study), mail(25))
    read = message_from_bytes(written.as_bytes(), policy=policy.default)
    assert sorted(read.keys()) == sorted(email.compose(letter(), mail(25)).keys())
    assert read["to"] == "a@hospital.test"


@pytest.mark.parametrize(
    ("study_date", "told"), [("20260302", "20260302"), ("2026.03.02", NOON), ("", NOON), ("today", NOON)]
)
def test_only_a_date_is_told_as_one(study_date: str, told: str | datetime) -> None:
    """A field of type TS that holds anything else is an error to the RIS, and refused for good."""
    dated = replace(letter(), study=replace(letter().study, study_date=study_date))
    expected = told if isinstance(told, str) else f"{told:%Y%m%d%H%M%S%z}"
    assert str(hl7.message(dated, ris(1)).segment("OBR")(7)) == expected


@pytest.mark.parametrize(("band", "priority"), [(Band.SEVERE, "A"), (Band.ROUTINE, "R")])
def test_the_band_is_the_priority(band: Band, priority: str) -> None:
    assert str(hl7.message(letter(band), ris(1)).segment("TQ1")(9)) == priority


def acknowledging(*lines: str) -> Callable[[socket.socket], None]:
    def behave(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(b"\x0b" + "\r".join(lines).encode() + b"\r\x1c\r")
        until_closed(connection)

    return behave


HEAD = "MSH|^~\\&|RIS||TRIAGE||20260302||ACK|1|P|2.5.1"


@pytest.mark.parametrize(
    ("behave", "permanent", "words"),
    [
        (acknowledging(HEAD, "MSA|AE|triage.7|unknown patient"), True, "AE unknown patient"),
        (acknowledging(HEAD, "MSA|AR|triage.7|queue full"), False, "AR queue full"),
        (acknowledging(HEAD, "MSA|AA|another"), False, "not acknowledged"),
        (acknowledging(HEAD), False, "not acknowledged"),
        (acknowledging("nonsense"), False, "not acknowledged"),
        (until_closed, False, "did not answer within 0.5 s"),
        (drop, False, "not acknowledged"),
    ],
)
def test_only_an_acknowledgement_of_this_message_counts(
    behave: Callable[[socket.socket], None], permanent: bool, words: str
) -> None:
    with stub(behave) as port:
        outcome = hl7.send(letter(), ris(port), QUICK)
    assert (outcome.sent, outcome.permanent) == (False, permanent)
    assert words in f"{outcome.error} {outcome.said}"


def test_a_ris_that_is_not_there_is_tried_again() -> None:
    port = free_port()
    outcome = hl7.send(letter(), ris(port), QUICK)
    assert (outcome.sent, outcome.permanent) == (False, False)
    assert "cannot be reached" in str(hl7.reach(ris(port), QUICK))


def test_hl7_over_tls_and_with_a_stranger(certificate: tuple[Path, Path]) -> None:
    with stub(acknowledging(HEAD, "MSA|AA|triage.7"), server_context(certificate)) as port:
        assert hl7.send(letter(), ris(port, Tls(ca=certificate[0])), 5) == SENT
        assert "cannot be trusted" in hl7.send(letter(), ris(port, Tls()), 5).error
        assert not hl7.send(letter(), ris(port), QUICK).sent


# --- mail -----------------------------------------------------------------------------------------


def mail(port: int, tls: Tls | None = None, user: str = "") -> Email:
    return Email(
        kind="email",
        name="ONCALL",
        host=HOST,
        port=port,
        sender="triage@hospital.test",
        to="a@hospital.test",
        tls=tls,
        user=user,
        secret=SECRET if user else "",
    )


OTHERS = {"DATA": "354 go", "QUIT": "221 bye", "STARTTLS": "220 go"}


def smtp(
    replies: dict[str, str], heard: list[bytes], tls: ssl.SSLContext | None = None
) -> Callable[[socket.socket], None]:
    """A mail server: ``replies`` by command, '.' being the end of a letter; the others are fine."""

    def behave(connection: socket.socket) -> None:
        lines = connection.makefile("rb")
        connection.sendall(b"220 here\r\n")
        data = False
        while line := lines.readline():
            heard.append(line)
            command = line.split(b" ")[0].strip().decode().upper()
            if data and line != b".\r\n":
                continue
            answer = replies.get(command, OTHERS.get(command, "250 fine"))
            data = command == "DATA" and answer.startswith("354")
            if answer == "drop":
                return
            connection.sendall(answer.encode() + b"\r\n")
            if command == "STARTTLS" and tls is not None:
                connection = tls.wrap_socket(connection, server_side=True)
                lines = connection.makefile("rb")
            if command == "QUIT":
                break
        connection.close()

    return behave


def content(heard: Sequence[bytes]) -> bytes:
    start = next(n for n, line in enumerate(heard) if line.upper().startswith(b"DATA"))
    return b"".join(heard[start + 1 : heard.index(b".\r\n")])


def test_the_on_call_gets_a_letter_without_the_patient() -> None:
    heard: list[bytes] = []
    with stub(smtp({}, heard)) as port:
        assert email.send(letter(revision=2), mail(port), 5) == SENT
        assert email.reach(mail(port), 5) is None
    written = content(heard)
    received = message_from_bytes(written, policy=policy.default)
    assert received["subject"] == "critical: chest CT A&7"
    assert received["message-id"] == "<triage.7@hospital.test>"
    body = received.get_content()
    assert "right lung 62 % affected" in body
    assert "revision 2: earlier answers are out of date" in body
    for secret in (b"P|1", "Müller".encode(), b"Yamada", b"J=C3=B6rg"):
        assert secret not in written


@pytest.mark.parametrize(
    ("replies", "sent", "permanent", "words"),
    [
        ({"RCPT": "550 no such box"}, False, True, "550"),
        ({"RCPT": "450 greylisted"}, False, False, "450"),
        ({"DATA": "554 no"}, False, True, "554 no"),
        ({".": "451 disk full"}, False, False, "451 disk full"),
        ({".": "drop"}, False, False, "ended the connection"),
        ({"MAIL": "drop"}, False, False, "ended the connection"),
        ({"QUIT": "drop"}, True, False, ""),
        ({"QUIT": "500 what"}, True, False, ""),
    ],
)
def test_a_letter_is_sent_when_the_server_took_it(
    replies: dict[str, str], sent: bool, permanent: bool, words: str
) -> None:
    with stub(smtp(replies, [])) as port:
        outcome = email.send(letter(), mail(port), 5)
    assert (outcome.sent, outcome.permanent) == (sent, permanent)
    assert words in f"{outcome.error} {outcome.said}"


def test_a_mail_server_that_hangs_or_is_not_there_is_tried_again() -> None:
    with stub(until_closed) as port:
        outcome = email.send(letter(), mail(port), QUICK)
    assert (outcome.sent, outcome.permanent) == (False, False)
    gone = email.send(letter(), mail(free_port()), QUICK)
    assert (gone.sent, gone.permanent) == (False, False)
    assert "cannot be reached" in gone.error


def test_a_password_goes_only_through_tls_to_who_we_meant(certificate: tuple[Path, Path]) -> None:
    replies = {"EHLO": "250-here\r\n250-STARTTLS\r\n250 AUTH PLAIN", "AUTH": "235 in"}
    heard: list[bytes] = []
    with stub(smtp(replies, heard, server_context(certificate))) as port:
        assert email.send(letter(), mail(port, Tls(ca=certificate[0]), "triage"), 5) == SENT
        assert any(line.startswith(b"AUTH PLAIN") for line in heard)
        del heard[:]
        assert "cannot be trusted" in email.send(letter(), mail(port, Tls(), "triage"), 5).error
        assert not any(line.startswith(b"AUTH") for line in heard)
    stranger = {**replies, "AUTH": "535 who"}
    with stub(smtp(stranger, [], server_context(certificate))) as port:
        outcome = email.send(letter(), mail(port, Tls(ca=certificate[0]), "triage"), 5)
    assert (outcome.sent, outcome.permanent, outcome.away) == (False, True, True)
    with stub(smtp({}, [])) as port:  # a server without STARTTLS
        outcome = email.send(letter(), mail(port, Tls(ca=certificate[0]), "triage"), 5)
    assert (outcome.sent, outcome.permanent) == (False, True)
    assert "tls" in outcome.error
