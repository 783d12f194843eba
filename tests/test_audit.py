"""The audit trail: what is recorded, in which words, where it goes, and that nobody changes it unseen."""

from __future__ import annotations

import base64
import re
import socket
import sqlite3
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from tests.objects import STUDY, ct, save
from tests.peers import free_port
from tests.test_outgoing import certificate, server_context  # noqa: F401
from tests.test_web import Reader
from tests.web_studies import NOON, Ward, configured
from triage import cli, trail
from triage import config as configuration
from triage.audit import ACCESSED, ALERT, Actor, Event, Outcome, messages
from triage.config import Audit, Syslog, Tls
from triage.domain import Study, StudyState
from triage.errors import Retryable
from triage.outgoing import syslog
from triage.web import access

JANE = Actor("jane", "10.1.2.3")


@pytest.fixture
def ward(tmp_path: Path) -> Iterator[Ward]:
    ward = Ward(configured(tmp_path))
    yield ward
    ward.database.close()


def study(uid: str, patient: str, name: str = "DOE^JANE") -> Study:
    return Study(
        study_instance_uid=uid,
        state=StudyState.READY,
        arrived_at=NOON,
        last_received_at=NOON,
        patient_id=patient,
        patient_name=name,
        study_description="CT thorax",
    )


def recorded(ward: Ward) -> list[Element]:
    return [ElementTree.fromstring(record.message) for record in ward.database.trail.records()]


def kinds(ward: Ward) -> list[str]:
    """Which event each record is of, in our words."""
    return [_event(message).name for message in recorded(ward)]


def _event(message: Element) -> Event:
    code = message.find("EventIdentification/EventTypeCode")
    assert code is not None
    return next(event for event in Event if event.value.type[0] == code.get("csd-code"))


def uids(message: Element) -> list[str]:
    return [
        str(one.get("ParticipantObjectID"))
        for one in message.findall("ParticipantObjectIdentification")
        if one.get("ParticipantObjectTypeCodeRole") == "3"
    ]


# --- the messages -------------------------------------------------------------------------------

CHILDREN = {
    "AuditMessage": [
        "EventIdentification",
        "ActiveParticipant",
        "AuditSourceIdentification",
        "ParticipantObjectIdentification",
    ],
    "EventIdentification": ["EventID", "EventTypeCode", "EventOutcomeDescription"],
    "ActiveParticipant": ["RoleIDCode"],
    "AuditSourceIdentification": ["AuditSourceTypeCode"],
    "ParticipantObjectIdentification": [
        "ParticipantObjectIDTypeCode",
        "ParticipantObjectName",
        "ParticipantObjectQuery",
        "ParticipantObjectDetail",
    ],
}
"""Elements of the schema in PS3.15 A.5.1 that we use, in its order."""
CODE = {"csd-code", "codeSystemName", "originalText"}
ATTRIBUTES = {
    "AuditMessage": set(),
    "EventIdentification": {"EventActionCode", "EventDateTime", "EventOutcomeIndicator"},
    "EventID": CODE,
    "EventTypeCode": CODE,
    "EventOutcomeDescription": set(),
    "ActiveParticipant": {"UserID", "UserIsRequestor"},
    "RoleIDCode": CODE,
    "AuditSourceIdentification": {"AuditSourceID"},
    "AuditSourceTypeCode": {"csd-code"},
    "ParticipantObjectIdentification": {
        "ParticipantObjectID",
        "ParticipantObjectTypeCode",
        "ParticipantObjectTypeCodeRole",
    },
    "ParticipantObjectIDTypeCode": CODE,
    "ParticipantObjectName": set(),
    "ParticipantObjectQuery": set(),
    "ParticipantObjectDetail": {"type", "value"},
}
NETWORK = {"NetworkAccessPointID", "NetworkAccessPointTypeCode"}


def obeys_the_schema(element: Element) -> None:
    order = CHILDREN.get(element.tag, [])
    places = [order.index(child.tag) for child in element]
    assert places == sorted(places), f"{element.tag}: {[child.tag for child in element]}"
    assert set(element.keys()) - NETWORK == ATTRIBUTES[element.tag]
    for child in element:
        obeys_the_schema(child)


@pytest.mark.parametrize("event", Event, ids=lambda event: event.name)
@pytest.mark.parametrize("outcome", Outcome)
def test_every_message_obeys_the_schema(event: Event, outcome: Outcome) -> None:
    patients = [study("1.1", "P1"), study("1.2", "P2"), study("1.3", "P1")]
    about = patients if event.value.event_id == ACCESSED else []
    for text in messages(event, JANE, NOON, about, "why", outcome):
        message = ElementTree.fromstring(text)
        obeys_the_schema(message)
        assert len(message.findall("ActiveParticipant")) == 2
        assert len(message.findall("AuditSourceIdentification")) == 1
        assert "\n" not in text
        if event.value.event_id == ALERT:
            detail = message.find("ParticipantObjectIdentification/ParticipantObjectDetail")
            assert detail is not None
            assert base64.b64decode(str(detail.get("value"))) == b"why"


def test_one_message_is_about_one_patient() -> None:
    """PS3.15 A.5.3.6; where no patient ID came, nobody knows whether two studies are of one patient."""
    about = [study("1.1", "P1"), study("1.2", ""), study("1.3", "P1"), study("1.4", "")]
    found = [ElementTree.fromstring(one) for one in messages(Event.LISTED, JANE, NOON, about)]
    assert sorted(uids(one) for one in found) == [["1.1", "1.3"], ["1.2"], ["1.4"]]
    for one in found:
        people = [
            part
            for part in one.findall("ParticipantObjectIdentification")
            if part.get("ParticipantObjectTypeCode") == "1"
        ]
        assert len(people) == 1
        assert people[0].findtext("ParticipantObjectName") == "DOE^JANE"


@given(st.text(max_size=40), st.text(max_size=40))
def test_no_name_breaks_a_message(name: str, typed: str) -> None:
    about = [study("1.1", name, name)]
    for text in messages(Event.STUDY_SEEN, Actor(typed, "::1"), NOON, about, typed, Outcome.FAILURE):
        assert "\n" not in text
        message = ElementTree.fromstring(text)
        obeys_the_schema(message)
    (text,) = messages(Event.SEARCHED, JANE, NOON, (), name)
    query = ElementTree.fromstring(text).findtext("ParticipantObjectIdentification/ParticipantObjectQuery")
    assert len(base64.b64decode(query or "").decode()) == len(name)


# --- sights -------------------------------------------------------------------------------------


def test_every_sight_of_patient_data_is_recorded(ward: Ward) -> None:
    ward.arrive("1.1")
    ward.judge("1.1", picture=ward.png())
    reader = Reader(ward)
    seen: dict[str, set[str]] = {
        "/": {"LISTED"},
        "/search?q=DOE": {"SEARCHED", "LISTED"},
        "/studies/1.1": {"STUDY_SEEN"},
        "/pictures/1.1.png": {"PICTURES_SEEN"},
        "/api/worklist": {"LISTED"},
    }
    for address, events in seen.items():
        ward.now += timedelta(hours=2)
        before = len(kinds(ward))
        assert reader.get(address).status_code == 200
        assert set(kinds(ward)[before:]) == events, address
    for message in recorded(ward):
        assert uids(message) == ([] if _event(message) is Event.SEARCHED else ["1.1"])
        who = message.find("ActiveParticipant")
        assert who is not None
        assert (who.get("UserID"), who.get("NetworkAccessPointID")) == ("local", "127.0.0.1")


def test_an_empty_list_shows_nothing_of_anybody(ward: Ward) -> None:
    for address in ("/", "/api/worklist", "/search?q=NOBODY"):
        assert Reader(ward).get(address).status_code == 200
    assert kinds(ward) == ["SEARCHED"]


def test_a_page_that_renews_itself_is_recorded_once_an_hour_and_what_is_new_at_once(ward: Ward) -> None:
    reader = Reader(ward)
    ward.arrive("1.1")
    for minute in range(130):
        if minute == 70:
            ward.arrive("1.2")
        reader.get("/api/worklist")
        ward.now += timedelta(minutes=1)
    assert [uids(message) for message in recorded(ward)] == [["1.1"], ["1.1"], ["1.2"], ["1.1"]]


def test_what_cannot_be_recorded_is_not_shown(ward: Ward) -> None:
    ward.arrive("1.1", patient_name="SECRET^NAME")
    with closing(sqlite3.connect(_file(ward))) as connection, connection:
        connection.execute("ALTER TABLE audit RENAME TO away")
    for address in ("/", "/search?q=SECRET", "/studies/1.1", "/api/worklist"):
        page = Reader(ward, raise_errors=False).get(address)
        assert (page.status_code, "NAME" in page.text) == (503, False), address


def test_sights_in_memory_are_bounded(ward: Ward, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "MOST_REMEMBERED", 5)
    auditor = access.Auditor(ward.database.trail, ward.clock, timedelta(hours=1))
    for number in range(20):
        auditor.record(Event.STUDY_SEEN, JANE, [study(f"1.{number}", "P1")], "", Outcome.SUCCESS)
    assert len(auditor._seen) <= 6
    assert len(kinds(ward)) == 20


# --- the chain ----------------------------------------------------------------------------------


def _file(ward: Ward) -> str:
    return str(ward.config.database.file)


def filled(ward: Ward, rows: int = 8) -> None:
    for number in range(rows):
        told = messages(Event.SEARCHED, JANE, NOON + timedelta(seconds=number), (), str(number))
        ward.database.trail.append(told)


def tampered(ward: Ward, *statements: str) -> list[str]:
    """What is found after somebody with the database in hand did this."""
    with closing(sqlite3.connect(_file(ward))) as connection, connection:
        connection.execute("DROP TRIGGER audit_knows_no_update")
        connection.execute("DROP TRIGGER audit_knows_no_delete")
        for statement in statements:
            connection.execute(statement)
    return list(ward.database.trail.faults())


def test_an_untouched_trail_is_whole(ward: Ward) -> None:
    assert list(ward.database.trail.faults()) == []
    filled(ward, 2500)
    assert list(ward.database.trail.faults()) == []


@pytest.mark.parametrize("statement", ["UPDATE audit SET message = ''", "DELETE FROM audit WHERE number = 3"])
def test_the_database_itself_refuses_changes(ward: Ward, statement: str) -> None:
    filled(ward)
    with (
        closing(sqlite3.connect(_file(ward))) as connection,
        pytest.raises(sqlite3.IntegrityError, match="only ever added to"),
    ):
        connection.execute(statement)
    assert list(ward.database.trail.faults()) == []


CHANGES = {
    "UPDATE audit SET message = replace(message, 'jane', 'joan') WHERE number = 4": "row 4 was changed",
    "UPDATE audit SET hash = 'f00' WHERE number = 4": "row 4 was changed",
    "DELETE FROM audit WHERE number = 1": "row 1 was removed",
    "DELETE FROM audit WHERE number BETWEEN 3 AND 5": "rows 3 to 5 were removed",
    "DELETE FROM audit WHERE number = 8": "row 8 was removed",
    "DELETE FROM audit": "rows 1 to 8 were removed",
    "INSERT INTO audit VALUES (9, 'm', 'h')": "row 9 was changed",
    "INSERT INTO audit VALUES (0, 'm', 'h')": "row 0 was inserted",
    "UPDATE audit SET number = 20 WHERE number = 8": "rows 8 to 19 were removed",
}
APPENDED_AFTER = {"DELETE FROM audit WHERE number > 6": "rows 7 to 8 were removed"}
"""What would go unseen if the next row took the number of one that was removed."""


@pytest.mark.parametrize("statement", CHANGES)
def test_whatever_is_done_to_a_row_is_found(ward: Ward, statement: str) -> None:
    filled(ward)
    found = tampered(ward, statement)
    assert any(one.startswith(CHANGES[statement]) for one in found), found


@pytest.mark.parametrize("statement", APPENDED_AFTER)
def test_what_is_done_to_a_row_stays_found_when_others_follow(ward: Ward, statement: str) -> None:
    filled(ward)
    tampered(ward, statement)
    filled(ward, 3)
    assert list(ward.database.trail.faults()) == [APPENDED_AFTER[statement]]


def test_rows_that_changed_places_are_found(ward: Ward) -> None:
    filled(ward)
    swapped = (
        "SET number = -1 WHERE number = 3",
        "SET number = 3 WHERE number = 4",
        "SET number = 4 WHERE number = -1",
    )
    assert tampered(ward, *(f"UPDATE audit {one}" for one in swapped))


def test_a_chain_that_was_written_anew_differs_from_the_file(ward: Ward, tmp_path: Path) -> None:
    settings = Audit(file=tmp_path / "audit.log")
    filled(ward)
    while trail.step(ward.database, "file", trail.sinks(settings)["file"]):
        pass
    assert list(trail.faults(ward.database, settings)) == []
    tampered(ward, "DELETE FROM audit", "DELETE FROM sqlite_sequence WHERE name = 'audit'")
    filled(ward, 4)
    with closing(sqlite3.connect(_file(ward))) as connection, connection:
        (other,) = connection.execute("SELECT message FROM audit WHERE number = 4").fetchone()
        connection.execute("DELETE FROM audit WHERE number = 4")
        connection.execute("UPDATE sqlite_sequence SET seq = 3 WHERE name = 'audit'")
    ward.database.trail.append([other.replace("jane", "joan")])
    assert list(ward.database.trail.faults()) == []
    found = list(trail.faults(ward.database, settings))
    assert found[0] == f"row 4 stands in {tmp_path}/audit.log in other words"
    assert found[1:] == [
        f"row {number} stands in {tmp_path}/audit.log, but not in the database" for number in range(5, 9)
    ]


def handed_on(ward: Ward, path: Path, rows: int = 8) -> Audit:
    filled(ward, rows)
    settings = Audit(file=path)
    assert trail.step(ward.database, "file", trail.sinks(settings)["file"])
    return settings


FILE_CHANGES: dict[str, tuple[Callable[[list[str]], list[str]], list[str]]] = {
    "a message": (
        lambda lines: [one.replace("NA==", "NQ==") for one in lines],
        ["row 5 stands in FILE in other words"],
    ),
    "a line missing": (lambda lines: lines[:3] + lines[4:], ["row 4 was removed from FILE"]),
    "the end missing": (lambda lines: lines[:-2], ["rows 7 to 8 were removed from FILE"]),
    "no line at all": (lambda lines: [*lines[:4], "x\n", *lines[4:]], ["line 5 of FILE cannot be read"]),
    "a line that was cut": (
        lambda lines: [*lines[:3], lines[3][:90] + "\n", *lines[4:]],
        ["row 4 was removed from FILE"],
    ),
    "a row that never was": (
        lambda lines: [*lines[:4], "99" + lines[4], *lines[4:]],
        ["rows 5 to 994 were removed from FILE", "row 995 stands in FILE, but not in the database"],
    ),
    "the beginning put away": (lambda lines: lines[3:], []),
    "written twice": (lambda lines: [*lines, *lines[5:]], []),
    "cut off, then whole": (lambda lines: [*lines[:5], lines[5][:80] + "\n", *lines[5:]], []),
    "cut off in its number": (lambda lines: [*lines, "1"], []),
}
"""What happens to the lines of the file, and what is said of it."""


@pytest.mark.parametrize("change", FILE_CHANGES)
def test_what_is_done_to_the_file_is_found_and_what_a_crash_leaves_is_no_fault(
    ward: Ward, tmp_path: Path, change: str
) -> None:
    path = tmp_path / "audit.log"
    settings = handed_on(ward, path)
    happens, said = FILE_CHANGES[change]
    path.write_text("".join(happens(path.read_text().splitlines(keepends=True))))
    found = list(trail.faults(ward.database, settings))
    assert found == [one.replace("FILE", str(path)) for one in said]


def test_a_file_of_many_lines_is_compared_to_its_end(ward: Ward, tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    settings = handed_on(ward, path, 1000)
    handed_on(ward, path, 200)
    assert list(trail.faults(ward.database, settings)) == []
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:1100], *lines[1101:]]))
    assert list(trail.faults(ward.database, settings)) == [f"row 1101 was removed from {path}"]


def test_who_was_killed_while_writing_writes_on_below(ward: Ward, tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    handed_on(ward, path, 3)
    filled(ward, 2)
    with path.open("a") as file:
        file.write(trail._line(ward.database.trail.owed("file")[0])[:70])
    settings = handed_on(ward, path, 1)
    assert len(path.read_text().splitlines()) == 7
    assert list(trail.faults(ward.database, settings)) == []


# --- to the file and to a collector -----------------------------------------------------------------


def test_the_file_has_each_row_once_and_nobody_else_may_read_it(ward: Ward, tmp_path: Path) -> None:
    path = tmp_path / "somewhere" / "audit.log"
    sink = trail.sinks(Audit(file=path))["file"]
    assert not trail.step(ward.database, "file", sink)
    for _ in range(2):
        filled(ward, 3)
        assert trail.step(ward.database, "file", sink)
        assert not trail.step(ward.database, "file", sink)
    lines = path.read_text().splitlines()
    rows = list(ward.database.trail.records())
    assert lines == [f"{row.number} {row.hash} {row.message}" for row in rows]
    assert path.stat().st_mode & 0o777 == 0o600


class Collector(threading.Thread):
    """Takes one connection, or some datagrams, and keeps their bytes."""

    def __init__(self, kind: str, context: ssl.SSLContext | None = None) -> None:
        super().__init__(daemon=True)
        self.port, self.taken, self.context, self.kind = free_port(), b"", context, kind
        type_ = socket.SOCK_DGRAM if kind == "udp" else socket.SOCK_STREAM
        self.socket = socket.socket(socket.AF_INET, type_)
        self.socket.settimeout(10)
        self.socket.bind(("127.0.0.1", self.port))
        if kind != "udp":
            self.socket.listen()
        self.datagrams: list[bytes] = []
        self.start()

    def run(self) -> None:
        with self.socket:
            if self.kind == "udp":
                self.datagrams += [self.socket.recv(65536) for _ in range(3)]
                return
            stream, _ = self.socket.accept()
            with stream, suppress(ssl.SSLError):
                if self.context:
                    stream = self.context.wrap_socket(stream, server_side=True)
                while more := stream.recv(65536):
                    self.taken += more
                stream.close()


def frames(stream: bytes) -> list[bytes]:
    """RFC 6587 and RFC 5425: each message with its length before it."""
    found = []
    while stream:
        length, _, rest = stream.partition(b" ")
        found.append(rest[: int(length)])
        stream = rest[int(length) :]
    return found


@pytest.mark.parametrize("protocol", ["tcp", "udp", "tls"])
def test_a_collector_gets_every_message_as_the_standard_has_it(
    ward: Ward,
    protocol: str,
    certificate: tuple[Path, Path],  # noqa: F811
) -> None:
    collector = Collector(protocol, server_context(certificate) if protocol == "tls" else None)
    tls = Tls(ca=certificate[0])
    told = [
        *messages(Event.STUDY_SEEN, JANE, NOON, [study("1.1", "P1", "MÜLLER^\nJÜRGEN")]),
        *messages(Event.LOGGED_IN, JANE, NOON, (), "wrong", Outcome.FAILURE),
        *messages(Event.STARTED, JANE, NOON),
    ]
    ward.database.trail.append(told)
    settings = Syslog(host="127.0.0.1", port=collector.port, protocol=protocol, tls=tls)
    assert trail.step(ward.database, "syslog", trail.sinks(Audit(file=None, syslog=settings))["syslog"])
    collector.join(10)
    lines = collector.datagrams if protocol == "udp" else frames(collector.taken)
    for line, message, pri in zip(lines, told, (85, 84, 85), strict=True):
        header, mark, xml = line.decode().partition("\ufeff")
        assert mark
        assert xml == message
        form = rf"<{pri}>1 2026-03-02T12:00:00\.000\+00:00 \S+ triage - DICOM\+RFC3881 - "
        assert re.fullmatch(form, header), header


def test_a_collector_that_is_not_trusted_gets_nothing(certificate: tuple[Path, Path]) -> None:  # noqa: F811
    collector = Collector("tls", server_context(certificate))
    settings = Syslog(host="127.0.0.1", port=collector.port)
    with pytest.raises(Retryable, match=r"audit\.syslog: 127\.0\.0\.1:\d+ over tls: .*certificate"):
        syslog.send(["<AuditMessage/>"], settings, 5)
    collector.join(10)
    assert collector.taken == b""


def test_what_the_collector_did_not_take_is_sent_when_it_is_back(ward: Ward) -> None:
    filled(ward, 3)
    port = free_port()
    sink = trail.sinks(Audit(file=None, syslog=Syslog(host="127.0.0.1", port=port, protocol="tcp")))["syslog"]
    with pytest.raises(Retryable, match=f"127.0.0.1:{port} over tcp"):
        trail.step(ward.database, "syslog", sink)
    assert len(ward.database.trail.owed("syslog")) == 3


# --- the application, and the terminal ------------------------------------------------------------


def test_start_and_stop_of_each_role_are_recorded(ward: Ward) -> None:
    with trail.lifetime(ward.database, "listener", ward.clock):
        assert kinds(ward) == ["STARTED"]
    assert kinds(ward) == ["STARTED", "STOPPED"]
    roles = [one.get("UserID") for one in recorded(ward)[1].findall("ActiveParticipant")]
    assert roles[1] == "triage/listener"


def typed(ward: Ward, folder: Path, *words: str, stdin: str | None = None) -> tuple[int, str]:
    """A command at a terminal, on the ward's database."""
    path = folder / "config.yaml"
    path.write_text(f"database: {{url: '{ward.config.database.url}'}}\naudit: {{file: audit.log}}\n")
    result = CliRunner().invoke(cli.app, ["--config", str(path), *words], input=stdin)
    return result.exit_code, result.output


def test_a_site_that_is_locked_out_lets_itself_in_again(ward: Ward, tmp_path: Path) -> None:
    long, longer = "correct horse battery\n", "another long password\n"
    assert "no user yet" in typed(ward, tmp_path, "user", "list")[1]
    assert typed(ward, tmp_path, "user", "add", "jane", stdin="short\n")[0] == 78
    assert typed(ward, tmp_path, "user", "add", "j ne", stdin=long)[0] == 78
    assert typed(ward, tmp_path, "user", "add", "jane", stdin=long)[0] == 0
    assert typed(ward, tmp_path, "user", "add", "jane", stdin=long)[0] == 78
    assert re.search(r"jane\s+admin\s+never", typed(ward, tmp_path, "user", "list")[1])
    reader = Reader(ward)
    for _ in range(5):
        reader.post("/login", data={"name": "jane", "password": "wrong"})
    assert reader.post("/login", data={"name": "jane", "password": long.strip()}).status_code == 429
    assert typed(ward, tmp_path, "user", "password", "nobody", stdin=longer)[0] == 78
    assert typed(ward, tmp_path, "user", "password", "jane", stdin=longer)[0] == 0
    assert reader.post("/login", data={"name": "jane", "password": longer.strip()}).status_code == 303


def test_what_is_typed_at_the_terminal_is_recorded(ward: Ward, tmp_path: Path) -> None:
    assert typed(ward, tmp_path, "worklist")[0] == 0
    ward.now = datetime.now(UTC)
    ward.arrive("1.1")
    assert typed(ward, tmp_path, "worklist", "--json")[0] == 0
    assert typed(ward, tmp_path, "requeue", "1.1")[0] == 0
    assert typed(ward, tmp_path, "close", "1.1")[0] == 0
    assert kinds(ward) == ["LISTED", "REQUEUED", "MARKED_READ"]
    assert [uids(message) for message in recorded(ward)] == [["1.1"]] * 3


def test_what_is_sent_again_and_imported_at_the_terminal_is_recorded(ward: Ward, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        f"database: {{url: 'sqlite:///{tmp_path}/here.db'}}\nstorage: {{spool: '{tmp_path}/here'}}\n"
        "delivery:\n  destinations:\n"
        "    - {name: PACS, ae_title: PACS, host: 127.0.0.1, port: 104}\n"
    )
    here = Ward(configuration.load(path))
    for uid in ("1.1", "1.2", "1.3"):
        here.arrive(uid)
    here.judge("1.1", to=("PACS",))
    here.judge("1.2", to=("PACS",))
    for number in range(2):
        save(ct(number), tmp_path / "in" / f"{number}.dcm")
    for words in (
        ["resend", "PACS"],
        ["resend", "PACS", "--study", "1.2"],
        ["resend", "PACS", "--study", "9.9"],
        ["import", str(tmp_path / "in"), "--dry-run"],
        ["import", str(tmp_path / "in")],
    ):
        CliRunner().invoke(cli.app, ["--config", str(path), *words])
    found = [(kind, uids(message)) for kind, message in zip(kinds(here), recorded(here), strict=True)]
    here.database.close()
    assert found == [
        ("RESENT", ["1.1"]),
        ("RESENT", ["1.2"]),
        ("RESENT", ["1.2"]),
        ("UPLOADED", [STUDY]),
    ]


def test_verify_says_what_it_found(ward: Ward, tmp_path: Path) -> None:
    filled(ward)
    assert typed(ward, tmp_path, "audit", "verify") == (0, "the audit trail is whole\n")
    assert kinds(ward)[-1] == "AUDIT_USED"
    tampered(ward, "UPDATE audit SET message = 'x' WHERE number = 2")
    status, said = typed(ward, tmp_path, "audit", "verify")
    assert (status, "row 2 was changed" in said) == (1, True)
