"""The one outbox: who is owed what, in which order, how often, and what a person sees and resends."""

from __future__ import annotations

import base64
import json
import socket
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from io import BytesIO
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import alembic.command
import alembic.config
import pytest
import yaml
from pydicom import dcmread
from pynetdicom import AE, evt
from typer.testing import CliRunner

from tests import peers
from tests.boxes import Boxes
from tests.hospital import Hospital, hospital
from tests.needs import needs_orthanc
from tests.objects import ct, save
from tests.test_db import NOW, an_answer, an_instance, objects, place, register, waiting
from tests.test_outgoing import (  # noqa: F401
    HOST,
    SECRET,
    certificate,
    content,
    mllp,
    receiver,
    server_context,
    smtp,
    stub,
)
from tests.test_way import study  # noqa: F401
from triage import config, daemon, deliver, outbox
from triage.cli import app
from triage.config import Destination, DicomWeb, Tls
from triage.db import Database
from triage.db.engine import MIGRATIONS, connect
from triage.dicom import sender, stow
from triage.domain import (
    Band,
    DeliveryState,
    Findings,
    Owed,
    Priority,
    ResultKind,
    ResultObject,
    Status,
    StudyState,
    Volume,
)
from triage.errors import ConfigError

HOOK = {"name": "HOOK", "kind": "webhook", "secret": SECRET}


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("destination", "words"),
    [
        ({"name": "A", "kind": "fax"}, ["kind must be dicom, dicomweb, hl7, webhook or email"]),
        ({"name": "A", "kind": "hl7", "host": "h"}, ["port", "required"]),
        (
            {"name": "A", "kind": "webhook", "url": "ftp://x", "secret": SECRET},
            ["url", "ftp://x", "https://host/path"],
        ),
        ({"name": "A", "kind": "webhook", "url": "http://x", "secret": "short"}, ["secret = ***", "16"]),
        (
            {"name": "A", "kind": "email", "host": "h", "sender": "a@b", "to": "c@d", "user": "u"},
            ["user and secret would be sent readable"],
        ),
        (
            {"name": "A", "kind": "email", "host": "h", "sender": "a@b", "to": ["c@d", "e@f"]},
            ["to = ['c@d', 'e@f']", "one address", "make a destination of each"],
        ),
        ({"name": "A", "kind": "email", "host": "h", "sender": "a@b", "to": "c@d,e@f"}, ["to", "pattern"]),
        (
            {"name": "A", "kind": "dicomweb", "url": "http://x", "tls": {"key": "k"}},
            ["certificate and key belong together"],
        ),
        ({"name": "A", "kind": "dicomweb", "url": "http://x", "tls": {}}, ["url is not https"]),
        ({"name": "A", "kind": "dicomweb", "url": "http://x", "only": "negative"}, ["only", "critical"]),
        (
            {"name": "A", "kind": "dicomweb", "url": "http://us:short@x"},
            ["url = ***", "set user and secret"],
        ),
        ({"name": "A", "kind": "dicomweb", "url": "http://x", "also": ["failed"]}, ["also: unknown key"]),
        ({**HOOK, "url": "http://x", "also": ["negative"]}, ["also", "not_analysable"]),
        ({**HOOK, "url": "http://x", "mode": "dark"}, ["mode", "shadow"]),
    ],
)
def test_a_wrong_destination_is_named(destination: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        config.parse({"delivery": {"destinations": [destination]}})
    for word in words:
        assert word in str(error.value)
    assert "short" not in str(error.value)


def test_a_secret_comes_from_the_environment_and_files_lie_beside_the_settings(tmp_path: Path) -> None:
    hook = {"name": "on call", "kind": "webhook", "url": "https://x/y", "tls": {"ca": "ca.pem"}}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"delivery": {"destinations": [hook]}}))
    (found,) = config.load(path, {"TRIAGE_SECRET_ON_CALL": SECRET}).delivery.destinations
    assert found.secret == SECRET
    assert SECRET not in repr(found)
    assert found.tls == Tls(ca=tmp_path / "ca.pem")


# --- who is owed what -----------------------------------------------------------------------------


def some_objects() -> list[ResultObject]:
    return [
        ResultObject(kind, Path(kind.value), f"2.25.{n}", "1.2.840.10008.5.1.4.1.1.88.34")
        for n, kind in enumerate((ResultKind.LESION_SEG, ResultKind.SR, ResultKind.PICTURE))
    ]


def settings(*destinations: dict[str, Any]) -> tuple[config.AnyDestination, ...]:
    return config.parse({"delivery": {"destinations": destinations}}).delivery.destinations


def test_archives_are_owed_the_objects_they_list_and_others_the_answer() -> None:
    pacs = {"name": "PACS", "ae_title": "PACS", "host": "h", "port": 104}
    web = {"name": "WEB", "kind": "dicomweb", "url": "http://h", "objects": ["sr"]}
    ris = {"name": "RIS", "kind": "hl7", "host": "h", "port": 2575}
    owed = outbox.owed(settings(pacs, web, ris), an_answer(), place(), some_objects())
    assert [(o.destination, o.objects and len(o.objects)) for o in owed] == [
        ("PACS", 3),
        ("WEB", 1),
        ("RIS", None),
    ]
    assert all(o.wanted for o in owed)


@pytest.mark.parametrize(
    ("only", "status", "band", "wanted"),
    [
        ("all", Status.NEGATIVE, Band.ROUTINE, True),
        ("all", Status.NOT_ANALYSABLE, Band.NOT_JUDGED, False),
        ("all", Status.FAILED, Band.NOT_JUDGED, False),
        ("positive", Status.POSITIVE, Band.ROUTINE, True),
        ("positive", Status.NEGATIVE, Band.CRITICAL, False),  # ordered STAT
        ("severe", Status.POSITIVE, Band.POSITIVE, False),
        ("severe", Status.POSITIVE, Band.CRITICAL, True),
        ("critical", Status.POSITIVE, Band.SEVERE, False),
        ("critical", Status.POSITIVE, Band.CRITICAL, True),
    ],
)
def test_a_filter_looks_at_answer_and_band(only: str, status: Status, band: Band, wanted: bool) -> None:
    (hook,) = settings({**HOOK, "url": "http://h", "only": only})
    (owed,) = outbox.owed([hook], an_answer(status=status), place(band), [])
    assert owed.wanted is wanted


@pytest.mark.parametrize(
    ("also", "status", "wanted"),
    [
        ([], Status.FAILED, False),
        (["failed"], Status.FAILED, True),
        (["failed"], Status.NOT_ANALYSABLE, False),
        (["failed", "not_analysable"], Status.NOT_ANALYSABLE, True),
        (["failed"], Status.NEGATIVE, False),
    ],
)
def test_who_asks_is_told_that_there_is_no_answer(also: list[str], status: Status, wanted: bool) -> None:
    (hook,) = settings({**HOOK, "url": "http://h", "only": "positive", "also": also})
    (owed,) = outbox.owed([hook], an_answer(status=status), place(Band.CRITICAL), [])
    assert owed.wanted is wanted


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{tmp_path}/triage.db")
    database.migrate()
    register(database, an_instance())
    yield database
    database.close()


def judge(db: Database, key: str, *owed: Owed, where: Priority | None = None) -> None:
    db.requeue("1.2", NOW, waiting)
    seen = db.quiet_study(NOW)
    assert seen is not None
    db.mark_ready(seen)
    claimed = db.claim("me", NOW, 60)
    assert claimed is not None
    assert db.finish(claimed, an_answer(key=key), list(owed), where or place(), NOW)


ANSWER = Owed("HOOK", None)


def test_of_the_answers_a_destination_is_owed_the_newest(db: Database) -> None:
    judge(db, "a", ANSWER)
    judge(db, "b", ANSWER)
    (owed,) = db.due_deliveries("HOOK", NOW)
    assert owed.revision == 2
    _, _, answer = db.answer(owed)
    assert answer.revision == 2
    db.mark_sent(owed.delivery_id, NOW)
    judge(db, "c", ANSWER)
    assert [(d.revision, d.state) for d in db.deliveries("1.2")] == [
        (2, DeliveryState.SENT),
        (3, DeliveryState.PENDING),
    ]


def test_who_was_told_is_told_of_the_correction(db: Database) -> None:
    unwanted = Owed("HOOK", None, wanted=False)
    judge(db, "a", unwanted)
    assert db.due_deliveries("HOOK", NOW) == []
    judge(db, "b", ANSWER)
    judge(db, "c", unwanted)
    (owed,) = db.due_deliveries("HOOK", NOW)
    assert owed.revision == 3


def test_what_was_given_up_is_seen_and_resent(db: Database) -> None:
    judge(db, "a", Owed("PACS", objects()), ANSWER)
    for name in ("PACS", "HOOK"):
        (owed,) = db.due_deliveries(name, NOW)
        db.give_up(owed.delivery_id, "refused for days")
    assert [d.last_error for d in db.undelivered()] == ["refused for days"] * 2
    assert db.resend("HOOK", "9.9", NOW) == 0
    assert db.resend("HOOK", "1.2", NOW) == 1
    assert db.due_deliveries("PACS", NOW) == []
    (owed,) = db.due_deliveries("HOOK", NOW)
    db.mark_sent(owed.delivery_id, NOW)
    assert db.resend("HOOK", None, NOW) == 0  # it has it


# --- the step -------------------------------------------------------------------------------------


@contextmanager
def clerk(folder: Path, *destinations: dict[str, Any]) -> Iterator[Hospital]:
    """A hospital with one judged study, whose answer is owed to every destination."""
    with hospital(folder, delivery={"destinations": list(destinations)}) as here:
        here.now = NOW
        register(here.db, an_instance())
        owed = outbox.owed(here.config.delivery.destinations, an_answer(), place(), ())
        judge(here.db, "a", *owed)
        yield here


def hook_at(port: int) -> dict[str, Any]:
    return {**HOOK, "url": f"http://{HOST}:{port}"}


def test_a_busy_webhook_is_tried_again_and_then_never_again(tmp_path: Path) -> None:
    with receiver(429, 500, 204) as (port, received), clerk(tmp_path, hook_at(port)) as here:
        for tries in (1, 2, 3, 3, 3):
            here.deliver()
            here.deliver()  # not before its time
            assert len(received) == tries
            here.pass_time(40)
        assert here.entry("1.2").deliveries == {DeliveryState.SENT: 1}
    assert len({headers["webhook-id"] for headers, _ in received}) == 1


def test_waits_grow_with_chance_and_never_beyond_the_longest(tmp_path: Path) -> None:
    with clerk(tmp_path, hook_at(peers.free_port())) as here:
        rules = here.config.delivery
        for attempt in range(12):
            here.deliver()
            wait = min(rules.first_retry_seconds * 2**attempt, rules.longest_retry_seconds)
            early = here.now + timedelta(seconds=wait * (1 - deliver.JITTER) - 0.01)
            assert here.db.due_deliveries("HOOK", early) == []
            here.pass_time(wait)
            assert len(here.db.due_deliveries("HOOK", here.now)) == 1


def test_one_destination_that_refuses_for_good_holds_up_no_other(tmp_path: Path) -> None:
    with receiver(401) as (bad, _), receiver(200) as (good, received):
        first = hook_at(bad)
        second = {**hook_at(good), "name": "OTHER"}
        with clerk(tmp_path, first, second) as here:
            here.deliver()
            assert len(received) == 1
            here.pass_time(here.config.delivery.longest_retry_seconds * (1 - deliver.JITTER) - 1)
            assert here.db.due_deliveries("HOOK", here.now) == []


def test_a_name_of_another_kind_now_gives_up_what_it_cannot_take(tmp_path: Path) -> None:
    with clerk(tmp_path, {**HOOK, "url": "http://127.0.0.1:9"}) as here:
        pacs = Destination(name="HOOK", ae_title="X", host=HOST, port=9)
        assert deliver.step(here.db, here.config, pacs, here.now)
        (given_up,) = here.db.undelivered()
    assert given_up.state is DeliveryState.GIVEN_UP
    assert "is of kind dicom now" in given_up.last_error


def test_the_commands_show_and_resend(tmp_path: Path) -> None:
    away = hook_at(peers.free_port())
    with clerk(tmp_path, away) as here:
        here.deliver()
        here.pass_time(here.config.delivery.give_up_hours * 3600)
        here.deliver()

        def triage(*words: str) -> Any:
            return CliRunner().invoke(app, ["--config", str(tmp_path / "config.yaml"), *words])

        shown = triage("deliveries")
        assert "HOOK: given up, tried 2 times" in shown.output
        assert "revision 1 of 1.2" in shown.output
        assert "cannot be reached" in shown.output
        (row,) = json.loads(triage("deliveries", "--json").output)
        assert (row["state"], row["revision"], row["path"]) == ("given_up", 1, None)
        assert "delivery.destinations has HOOK" in triage("resend", "PACS").output
        assert "1 result will be sent to HOOK again" in triage("resend", "HOOK").output
        assert here.entry("1.2").deliveries == {DeliveryState.PENDING: 1}


@pytest.mark.parametrize("tried", [False, True])
def test_the_time_in_which_nobody_could_try_gives_up_nothing(
    tmp_path: Path, tried: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with clerk(tmp_path, hook_at(peers.free_port())) as here:
        monkeypatch.setattr(daemon, "now", lambda: here.now)
        monkeypatch.setattr(daemon, "BackgroundScheduler", MagicMock())  # it has the real clock
        stopped = threading.Event()
        stopped.set()
        if tried:
            here.deliver()
        for _ in range(2):  # off, and in shadow mode
            here.pass_time(here.config.delivery.give_up_hours * 3600)
            daemon.run_clerk(here.config, stopped)
        here.deliver()  # the other has just been started, too
        assert here.entry("1.2").deliveries == {DeliveryState.PENDING: 1}
        here.pass_time(here.config.delivery.give_up_hours * 3600)
        here.deliver()
        assert here.entry("1.2").deliveries == {DeliveryState.GIVEN_UP: 1}


# --- the whole way --------------------------------------------------------------------------------


def test_from_the_scanner_to_every_kind_of_destination(tmp_path: Path, study: Path) -> None:  # noqa: F811
    heard: list[bytes] = []
    with (
        peers.pacs(tmp_path / "pacs") as (pacs_port, objects_there),
        receiver(200) as (hook_port, posted),
        mllp() as (ris_port, messages),
        stub(smtp({}, heard)) as mail_port,
    ):
        destinations = [
            {"name": "PACS", "ae_title": "PACS", "host": HOST, "port": pacs_port, "objects": ["sr"]},
            hook_at(hook_port),
            {"name": "RIS", "kind": "hl7", "host": HOST, "port": ris_port},
            {"name": "ONCALL", "kind": "email", "host": HOST, "port": mail_port, "only": "severe"}
            | {"sender": "triage@hospital.test", "to": "a@hospital.test"},
        ]
        with hospital(tmp_path / "daemon", delivery={"destinations": destinations}) as here:
            peers.scan(study, here.config)
            here.work()
            (entry,) = here.db.worklist(here.now, "deadline", 7)
            assert entry.deliveries == {DeliveryState.SENT: 4}
            here.work()
    assert [o.modality for o in objects_there] == ["SR"]
    ((_, body),) = posted
    assert (json.loads(body)["status"], json.loads(body)["band"]) == ("positive", "severe")
    assert len(messages) == 1
    assert entry.priority.reason.encode() in content(heard).replace(b"=\r\n", b"")


def test_not_analysable_is_told_to_who_asks_for_it(tmp_path: Path, study: Path) -> None:  # noqa: F811
    with receiver(200) as (port, posted):
        asks = {**hook_at(port), "name": "ASKS", "only": "critical", "also": ["not_analysable"]}
        sections = {
            "delivery": {"destinations": [hook_at(port), asks]},
            "analysis": {"minimum_lung_ml": 90_000},
        }
        with hospital(tmp_path / "daemon", **sections) as here:
            peers.scan(study, here.config)
            here.work()
    ((_, body),) = posted
    assert json.loads(body)["status"] == "not_analysable"
    assert "ml of lung found" in json.loads(body)["reason"]


def test_given_up_is_told_to_who_asks_for_it_and_once(tmp_path: Path, study: Path) -> None:  # noqa: F811
    class Broken(Boxes):
        def predict(self, volume: Volume) -> Findings:
            raise KeyError("bug")

    with receiver(200) as (port, posted):
        asks = {**hook_at(port), "name": "ASKS", "only": "positive", "also": ["failed"]}
        sections = {
            "delivery": {"destinations": [hook_at(port), asks]},
            "analysis": {"maximum_attempts": 1},
        }
        with hospital(tmp_path / "daemon", **sections) as here:
            here.model = Broken()
            peers.scan(study, here.config)
            for _ in range(2):
                with pytest.raises(KeyError):
                    here.work()
                here.deliver()
                (entry,) = here.db.worklist(here.now, "deadline", 7)
                assert (entry.study.state, entry.result) == (StudyState.FAILED, None)
                here.requeue(entry.study.study_instance_uid)
            here.model = Boxes()
            here.work()
    failed, *later = [json.loads(body) for _, body in posted]
    assert (failed["status"], failed["reason"]) == ("failed", "internal error: KeyError")
    assert [one["status"] for one in later] == ["positive", "positive"], "both, and the one told is corrected"


# --- shadow mode ----------------------------------------------------------------------------------


def test_in_shadow_mode_all_is_recorded_and_nobody_is_told_who_did_not_ask(
    tmp_path: Path,
    study: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    modes = ("live", "shadow", "both")
    with receiver(200) as (port, posted):
        hooks = [{**hook_at(port), "name": mode, "mode": mode} for mode in modes]
        with hospital(tmp_path / "daemon", shadow=True, delivery={"destinations": hooks}) as here:
            peers.scan(study, here.config)
            register(here.db, an_instance(), here.now - timedelta(hours=1))
            here.work()
            assert here.config.ordering == "arrival"
            first, judged = here.db.worklist(here.now, here.config.ordering, 7)
            assert (first.study.study_instance_uid, judged.result.status) == ("1.2", Status.POSITIVE)
            bands = [judged.priority.band, first.priority.band]
            assert bands == [Band.SEVERE, Band.NOT_JUDGED], "what was found does not move it up"
            by_policy = here.db.worklist(here.now, here.config.priority.ordering, 7)
            assert [one.study for one in by_policy] == [judged.study, first.study], "it would have"
            assert judged.deliveries == {DeliveryState.SENT: 2}
            monkeypatch.setattr(daemon, "now", lambda: here.now)
            told = daemon._lists(here.db, here.config)._open_studies(10)
            assert [entry.study for entry in told] == [first.study, judged.study]
            assert [entry.priority.band for entry in told] == [Band.NOT_JUDGED] * 2
            assert [entry.priority.reason for entry in told] == [""] * 2
            here.config = here.config.model_copy(update={"shadow": False})
            here.work()
            assert here.entry(judged.study.study_instance_uid).deliveries == {DeliveryState.SENT: 2}
    assert len(posted) == 2


# --- C-STORE over TLS -----------------------------------------------------------------------------


def test_c_store_over_tls_and_with_a_stranger(
    tmp_path: Path,
    certificate: tuple[Path, Path],  # noqa: F811
) -> None:
    file = save(ct(1), tmp_path / "1.dcm")
    ae = AE("PACS")
    ae.add_supported_context(ct(1).SOPClassUID)
    ae.add_supported_context(sender.VERIFICATION)
    stored: list[str] = []

    def keep(event: evt.Event) -> int:
        stored.append(event.request.AffectedSOPInstanceUID)
        return 0x0000

    server = ae.start_server(
        (HOST, 0),
        block=False,
        ssl_context=server_context(certificate, mutual=True),
        evt_handlers=[(evt.EVT_C_STORE, keep)],
    )
    assert server is not None
    mine = Tls(ca=certificate[0], certificate=certificate[0], key=certificate[1])

    def at(tls: Tls | None) -> Destination:
        return Destination(name="PACS", ae_title="PACS", host=HOST, port=server.server_address[1], tls=tls)

    def send(tls: Tls | None) -> sender.SendOutcome:
        (outcome,) = sender.send([file], at(tls), calling_ae_title="TRIAGE", timeout_seconds=2)
        return outcome

    try:
        assert sender.echo(at(mine), "TRIAGE", 5) is None
        assert send(mine).sent
        strange = send(Tls())
        assert (strange.sent, strange.permanent) == (False, False)
        assert "does not agree on TLS" in strange.error
        assert "a file of its tls cannot be used" in send(Tls(ca=tmp_path / "none.pem")).error
        assert not send(None).sent
    finally:
        server.shutdown()
    assert len(stored) == 1


# --- STOW-RS --------------------------------------------------------------------------------------


def archive(port: int, **settings: Any) -> DicomWeb:
    return DicomWeb(kind="dicomweb", name="WEB", url=f"http://{HOST}:{port}/dicom-web", **settings)


@pytest.mark.parametrize(("code", "permanent"), [(429, False), (500, False), (401, True), (409, True)])
def test_what_an_archive_answers_is_for_now_or_for_good(tmp_path: Path, code: int, permanent: bool) -> None:
    file = save(ct(1), tmp_path / "1.dcm")
    with receiver(code) as (port, received):
        (outcome,) = stow.send([file], archive(port, secret="token"), 5)
    assert (outcome.sent, outcome.permanent) == (False, permanent)
    assert str(code) in outcome.error
    ((headers, _),) = received
    assert headers["authorization"] == "Bearer token"


def test_an_archive_that_hangs_ends_it_at_that_file(tmp_path: Path) -> None:
    files = [save(ct(n), tmp_path / f"{n}.dcm") for n in (1, 2)]
    with socket.create_server((HOST, 0)) as server:
        first, second = stow.send(files, archive(server.getsockname()[1]), 0.5)
    assert (first.sent, first.permanent, first.tried) == (False, False, True)
    assert "did not answer within 0.5 s" in first.error
    assert not second.tried


def test_an_answer_that_is_no_dicomweb_holds_up_nothing(tmp_path: Path) -> None:
    def babble(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nhi")

    files = [save(ct(n), tmp_path / f"{n}.dcm") for n in (1, 2)]
    with stub(babble) as port:
        first, second = stow.send(files, archive(port), 5)
    assert (first.sent, first.permanent, first.tried, second.tried) == (False, False, True, False)


def stored(number: int) -> bytes:
    """What an archive says that has stored this object."""
    uids = {"00081155": {"vr": "UI", "Value": [ct(number).SOPInstanceUID]}}
    body = json.dumps({"00081199": {"vr": "SQ", "Value": [uids]}}).encode()
    head = "HTTP/1.1 200 OK\r\nContent-Type: application/dicom+json\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def test_an_archive_may_ask_who_we_are(tmp_path: Path, certificate: tuple[Path, Path]) -> None:  # noqa: F811
    def accept(connection: socket.socket) -> None:
        received = b""
        while not received.rstrip().endswith(b"--"):
            received += connection.recv(65536)
        connection.sendall(stored(1))

    file = save(ct(1), tmp_path / "1.dcm")
    known = Tls(ca=certificate[0], certificate=certificate[0], key=certificate[1])
    with stub(accept, server_context(certificate, mutual=True)) as port:
        web = archive(port).model_copy(update={"url": f"https://{HOST}:{port}/dicom-web"})
        assert stow.send([file], web.model_copy(update={"tls": known}), 5)[0].sent
        (unnamed,) = stow.send([file], web.model_copy(update={"tls": Tls(ca=certificate[0])}), 5)
    assert (unnamed.sent, unnamed.permanent) == (False, False)


ORTHANC = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")


@contextmanager
def orthanc(folder: Path) -> Iterator[int]:
    """A real archive with DICOMweb that wants a user and password; gives its port."""
    port = peers.free_port()
    folder.mkdir()
    running = {
        "StorageDirectory": str(folder / "archive"),
        "IndexDirectory": str(folder / "archive"),
        "DicomPort": peers.free_port(),
        "HttpPort": port,
        "RemoteAccessAllowed": True,
        "AuthenticationEnabled": True,
        "RegisteredUsers": {"triage": SECRET},
        "Plugins": [str(ORTHANC)],
    }
    (folder / "orthanc.json").write_text(json.dumps(running))
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(["Orthanc", str(folder / "orthanc.json")], stdout=log, stderr=log)
    try:
        peer = Destination(name="x", ae_title="x", host=HOST, port=port)
        peers.wait_until(lambda: peers.answers(peer), process, folder / "log")
        yield port
    finally:
        process.terminate()
        process.wait(60)


@needs_orthanc
@pytest.mark.skipif(not ORTHANC.exists(), reason="needs Orthanc's DICOMweb plugin")
def test_orthanc_takes_objects_by_stow(tmp_path: Path) -> None:
    files = [save(ct(n), tmp_path / f"{n}.dcm") for n in (1, 2)]
    broken = tmp_path / "broken.dcm"
    broken.write_bytes(b"no DICOM")
    with orthanc(tmp_path / "orthanc") as port:
        web = archive(port, user="triage", secret=SECRET)
        assert stow.reach(web, 5) is None
        one, bad, two = stow.send([files[0], broken, files[1]], web, 10)
        assert (one.sent, two.sent) == (True, True)
        assert (bad.sent, bad.permanent) == (False, True)
        (again,) = stow.send(files[:1], web, 10)
        assert again.sent  # a second time after a lost answer is harmless
        kept = [dcmread(BytesIO(read(port, f"/instances/{one}/file"))) for one in held(port)]
        assert sorted(kept, key=lambda o: o.SOPInstanceUID) == sorted(
            map(dcmread, files), key=lambda o: o.SOPInstanceUID
        )
        (stranger,) = stow.send(files[:1], archive(port, user="triage", secret="wrong"), 5)
        assert (stranger.sent, stranger.permanent) == (False, True)
        assert "401" in stranger.error
        assert "401" in str(stow.reach(archive(port), 5))


def held(port: int) -> list[str]:
    return list(json.loads(read(port, "/instances")))


def read(port: int, path: str) -> bytes:
    """What Orthanc's own interface says, asked without any code of ours."""
    login = base64.b64encode(f"triage:{SECRET}".encode()).decode()
    request = urllib.request.Request(
        f"http://{HOST}:{port}{path}", headers={"Authorization": f"Basic {login}"}
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        return bytes(answer.read())


# --- the tables -----------------------------------------------------------------------------------


def test_an_outbox_from_before_answers_keeps_what_it_owes(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/triage.db"
    engine, scripts = connect(url), alembic.config.Config()
    scripts.set_main_option("script_location", str(MIGRATIONS))
    with engine.begin() as connection:
        scripts.attributes["connection"] = connection
        alembic.command.upgrade(scripts, "0001")
        for statement in BEFORE:
            connection.exec_driver_sql(statement)
    engine.dispose()
    db = Database(url)
    db.migrate()
    (owed,) = db.due_deliveries("PACS", NOW)
    assert (owed.sop_instance_uid, owed.path, owed.revision) == ("2.25.1", Path("/spool/sr.dcm"), None)
    register(db, an_instance())
    judge(db, "a", ANSWER)
    assert len(db.due_deliveries("HOOK", NOW)) == 1
    db.close()


TIME = "'2026-03-01 08:00:00'"
BEFORE = (
    "INSERT INTO study (study_instance_uid, state, reason, arrived_at, last_received_at, patient_id,"
    " patient_name, accession_number, study_date, study_description, stat, notes, attempts, band, score,"
    f" due_at, priority_reason, closed_reason) VALUES ('1.2', 'analyzed', '', {TIME}, {TIME}, '', '', '', '',"
    f" '', 0, '[]', 0, 1, 0, {TIME}, '', '')",
    "INSERT INTO delivery (study_instance_uid, destination, sop_instance_uid, sop_class_uid, path, state,"
    " attempts, created_at, next_attempt_at, last_error) VALUES ('1.2', 'PACS', '2.25.1', '1.2.840',"
    f" '/spool/sr.dcm', 'pending', 0, {TIME}, {TIME}, '')",
)
