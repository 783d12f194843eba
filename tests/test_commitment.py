"""Delivered is not committed: who is asked to keep what it took, whose answers count, what silence means."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pydicom.dataset import Dataset
from typer.testing import CliRunner

from tests import objects, peers
from tests.archive import Archive, archive, item
from tests.hospital import Hospital, hospital
from tests.needs import needs_orthanc
from tests.test_db import NOW, an_answer, an_instance, place, register
from tests.test_orthanc import Orthanc, orthanc
from triage import commitment, config, deliver
from triage.cli import app
from triage.db import Database
from triage.dicom import storage_commitment
from triage.domain import Delivery, DeliveryState, Owed, ResultKind, ResultObject
from triage.errors import ConfigError, Retryable
from triage.web import words

PENDING, SENT, COMMITTING = DeliveryState.PENDING, DeliveryState.SENT, DeliveryState.COMMITTING
COMMITTED, NOT_COMMITTED = DeliveryState.COMMITTED, DeliveryState.NOT_COMMITTED
STUDY = objects.STUDY
FIRST, SECOND = f"{objects.SERIES}.1", f"{objects.SERIES}.2"


@pytest.fixture(autouse=True)
def _patiently(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine may be slow to answer."""
    monkeypatch.setattr(storage_commitment, "ANSWER_SECONDS", 30.0)


def owe(db: Database, folder: Path) -> None:
    """A judged study of which the PACS is owed two objects."""
    kinds = (ResultKind.SR, ResultKind.PICTURE)
    files = [objects.save(objects.ct(n), folder / f"{n}.dcm") for n in (1, 2)]
    made = [
        ResultObject(kind, file, f"{objects.SERIES}.{n}", str(objects.ct(n).SOPClassUID))
        for n, (kind, file) in enumerate(zip(kinds, files, strict=True), 1)
    ]
    register(db, an_instance(STUDY))
    seen = db.quiet_study(NOW)
    assert seen is not None
    db.mark_ready(seen)
    claimed = db.claim("me", NOW, 60)
    assert claimed is not None
    assert db.finish(claimed, an_answer(STUDY), [Owed("PACS", tuple(made))], place(), NOW)


@contextmanager
def owing(folder: Path, port: int) -> Iterator[Hospital]:
    """A hospital whose PACS at this port is owed two objects, and another archive nothing."""
    pacs = {"name": "PACS", "ae_title": "PACS", "host": peers.HOST, "port": port, "commitment": True}
    sections: dict[str, dict[str, Any]] = {
        "delivery": {
            "destinations": [pacs, {**pacs, "name": "VNA", "ae_title": "VNA"}],
            "timeout_seconds": 30,
        },
        "retention": {"leave_list_after_days": 36500},
    }
    with hospital(folder, **sections) as here:
        here.now = NOW
        owe(here.db, folder)
        yield here


def states(here: Hospital) -> list[DeliveryState]:
    return [one.state for one in here.db.deliveries(STUDY)]


def errors(here: Hospital) -> set[str]:
    return {one.last_error for one in here.db.deliveries(STUDY)}


def transactions(here: Hospital) -> set[str | None]:
    return {one.transaction_uid for one in here.db.deliveries(STUDY)}


def shown(here: Hospital) -> str:
    """The column "Delivery" of the list."""
    answer = words.delivered(here.entry(STUDY))
    assert answer is not None
    return f"{answer.sign} {answer.title}"


def triage(here: Hospital, *arguments: str) -> str:
    path = here.config.storage.spool.parent / "config.yaml"
    answer = CliRunner().invoke(app, ["--config", str(path), *arguments])
    assert answer.exit_code == 0, answer.output
    return answer.output


# --- settings -------------------------------------------------------------------------------------


def test_an_archive_that_may_not_call_us_is_named_at_the_start() -> None:
    pacs = {"name": "A", "ae_title": "VNA", "host": "h", "port": 104, "commitment": True}
    with pytest.raises(ConfigError, match=r"add VNA to listener\.calling_ae_titles"):
        config.parse({"listener": {"calling_ae_titles": ["CT1"]}, "delivery": {"destinations": [pacs]}})


def test_who_was_asked_and_is_no_longer_has_simply_been_sent(tmp_path: Path) -> None:
    with archive() as pacs, owing(tmp_path, pacs.port) as here:
        here.deliver()
        assert states(here) == [COMMITTING] * 2
        here.db.waive_commitments(["PACS"])
        assert states(here) == [COMMITTING] * 2
        here.db.waive_commitments([])
        assert states(here) == [SENT] * 2
        here.commit()
    assert pacs.asked == []


def test_in_shadow_mode_a_live_archive_is_asked_nothing_and_its_answer_counts(tmp_path: Path) -> None:
    with archive() as pacs, owing(tmp_path, pacs.port) as here:
        here.deliver()
        here.config = here.config.model_copy(update={"shadow": True})
        here.commit()
        assert pacs.asked == []
        assert states(here) == [COMMITTING] * 2
        here.db.waive_commitments([one.name for one in commitment.wanted(here.config)])
        assert states(here) == [COMMITTING] * 2, "it is asked when shadow mode ends"
        here.config = here.config.model_copy(update={"shadow": False})
        here.commit()
        assert states(here) == [COMMITTED] * 2
    assert len(pacs.asked) == 1


# --- the answer -----------------------------------------------------------------------------------


def test_an_answer_on_the_same_association(tmp_path: Path) -> None:
    with archive() as pacs, owing(tmp_path, pacs.port) as here:
        assert deliver.reach(here.config.delivery.destinations[0], here.config) is None
        here.deliver()
        assert shown(here) == "… 2 delivered, 0 committed"
        assert "PACS: delivered, commitment awaited, tried 1 time" in triage(here, "deliveries")
        here.commit()
        peers.wait_until(lambda: len(pacs.told) == 1)
        assert pacs.told == [0x0000]
        assert states(here) == [COMMITTED] * 2
        told = [words.delivery_state(one).title for one in here.db.deliveries(STUDY)]
        assert told == ["Delivered and committed"] * 2
        assert shown(here) == "✓ 2 delivered, 2 committed"
        assert "2 of 2 delivered, 2 committed" in triage(here, "worklist")
        assert "everything has been sent" in triage(here, "deliveries")
    ((_, references),) = pacs.asked
    assert [uid for _, uid in references] == pacs.stored == [FIRST, SECOND]


def test_the_association_is_kept_until_the_answer_is_acknowledged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = storage_commitment.Reports.on_event_report

    def slowly(reports: storage_commitment.Reports, event: Any) -> tuple[int, None]:
        answer = heard(reports, event)
        time.sleep(0.3)
        return answer

    monkeypatch.setattr(storage_commitment.Reports, "on_event_report", slowly)
    with archive() as pacs, owing(tmp_path, pacs.port) as here:
        here.deliver()
        here.commit()
        peers.wait_until(lambda: len(pacs.told) == 1)
        assert pacs.told == [0x0000]


@pytest.mark.parametrize("role", [True, False])
def test_an_answer_on_an_association_of_its_own(tmp_path: Path, role: bool) -> None:
    with archive(answers=False) as pacs, owing(tmp_path, pacs.port) as here:
        here.deliver()
        here.commit()
        assert states(here) == [COMMITTING] * 2
        port = here.config.listener.port
        assert pacs.call(port, role=role) == 0x0000
        assert states(here) == [COMMITTED] * 2
        assert pacs.call(port, role=role) == 0x0000  # again, because our acknowledgement was lost
        assert states(here) == [COMMITTED] * 2
    assert len(pacs.asked) == 1


@pytest.mark.parametrize("status", [0x0000, 0x0110])
def test_an_answer_may_come_before_the_response_to_the_request(tmp_path: Path, status: int) -> None:
    with archive(answers=False, status=status) as pacs, owing(tmp_path, pacs.port) as here:
        pacs.meanwhile = lambda: pacs.call(here.config.listener.port)
        here.deliver()
        here.commit()
        assert states(here) == [COMMITTED] * 2
        assert errors(here) == {""}


def test_what_failed_is_sent_again_and_asked_for_again(tmp_path: Path) -> None:
    with archive(fails={SECOND}) as pacs, owing(tmp_path, pacs.port) as here:
        here.deliver()
        here.commit()
        assert states(here) == [COMMITTED, PENDING]
        assert "destination PACS does not commit itself: no such object instance (0x0112)" in errors(here)
        assert shown(here) == "… 1 of 2 delivered"
        here.deliver()
        assert pacs.stored == [FIRST, SECOND]  # not at once: an archive that fails must not be flooded
        here.pass_time(20)
        here.deliver()
        assert pacs.stored == [FIRST, SECOND, SECOND]
        pacs.fails.clear()
        here.commit()
        assert states(here) == [COMMITTED] * 2
    (first, both), (second, one) = pacs.asked
    assert first != second
    assert [uid for _, uid in both] == [FIRST, SECOND]
    assert [uid for _, uid in one] == [SECOND]


def test_an_archive_that_never_commits_is_given_up_some_day(tmp_path: Path) -> None:
    with archive(fails={SECOND}) as pacs, owing(tmp_path, pacs.port) as here:
        while PENDING in states(here):
            here.deliver()
            here.commit()
            here.pass_time(3600 * 8)
        assert states(here) == [COMMITTED, DeliveryState.GIVEN_UP]
        assert shown(here) == "✕ 1 of 2 not delivered"
    assert 3 < pacs.stored.count(SECOND) < 12


def revise(here: Hospital, folder: Path) -> list[str]:
    """Late images: there are two newer objects."""
    here.requeue(STUDY)
    seen = here.db.quiet_study(here.now)
    assert seen is not None
    here.db.mark_ready(seen)
    claimed = here.db.claim("me", here.now, 60)
    assert claimed is not None
    made = [
        ResultObject(
            ResultKind.SR,
            objects.save(objects.ct(n), folder / f"{n}.dcm"),
            f"{objects.SERIES}.{n}",
            str(objects.ct(n).SOPClassUID),
        )
        for n in (3, 4)
    ]
    owed = [Owed("PACS", tuple(made))]
    assert here.db.finish(claimed, an_answer(STUDY, key="later"), owed, place(), here.now)
    return [one.sop_instance_uid for one in made]


@pytest.mark.parametrize("silent", [False, True])
def test_what_failed_is_not_sent_again_when_there_is_something_newer(tmp_path: Path, silent: bool) -> None:
    with archive(answers=False, fails={FIRST, SECOND}) as pacs, owing(tmp_path, pacs.port) as here:
        here.deliver()
        here.commit()
        newer = revise(here, tmp_path)
        here.deliver()
        if silent:
            here.pass_time(here.config.delivery.commitment_seconds)
        else:
            assert pacs.call(here.config.listener.port) == 0x0000
        pacs.answers = True
        here.commit()
        assert states(here) == [SENT] * 2 + [COMMITTED] * 2
        here.pass_time(here.config.delivery.longest_retry_seconds)
        here.deliver()
        assert pacs.stored == [FIRST, SECOND, *newer]
        assert shown(here) == "✓ 4 delivered, 2 committed"


def test_what_was_taken_is_asked_for_when_all_was_tried(tmp_path: Path) -> None:
    with archive(refuses={SECOND}) as pacs, owing(tmp_path, pacs.port) as here:
        first, _ = here.db.deliveries(STUDY)
        here.db.mark_sent(first.delivery_id, here.now, commit=True)
        here.commit()
        assert (states(here), pacs.asked) == ([COMMITTING, PENDING], [])  # the other may be taken, too
        here.deliver()
        here.commit()
        assert states(here) == [COMMITTED, PENDING]  # and may be refused for days
        pacs.refuses.clear()
        here.pass_time(10)
        here.deliver()
        here.commit()
        assert states(here) == [COMMITTED] * 2
    assert [len(references) for _, references in pacs.asked] == [1, 1]


def test_what_an_archive_loses_after_days_is_sent_again(tmp_path: Path) -> None:
    with archive(answers=False, fails={SECOND}) as pacs, owing(tmp_path, pacs.port) as here:
        here.deliver()
        here.commit()
        here.pass_time(here.config.delivery.give_up_hours * 3600)
        assert pacs.call(here.config.listener.port) == 0x0000
        assert states(here) == [COMMITTED, PENDING]
        here.pass_time(here.config.delivery.longest_retry_seconds)
        here.deliver()
        assert states(here) == [COMMITTED, COMMITTING]
    assert pacs.stored == [FIRST, SECOND, SECOND]


# --- whose answers count --------------------------------------------------------------------------


def another(pacs: Archive, transaction_uid: str) -> Dataset:
    said = pacs.report()
    said.TransactionUID = transaction_uid
    return said


STRANGERS: dict[str, tuple[dict[str, Any], int]] = {
    "a stranger": ({"ae_title": "STRANGER"}, 0x0115),
    "another destination": ({"ae_title": "VNA"}, 0x0115),
    "another event": ({"event_type": 3}, 0x0113),
    "another instance": ({"instance_uid": "1.2.840.10008.1.20.1.2"}, 0x0112),
}


@pytest.mark.parametrize("name", STRANGERS)
def test_who_was_not_asked_marks_nothing(tmp_path: Path, name: str) -> None:
    changes, status = STRANGERS[name]
    with archive(answers=False) as pacs, owing(tmp_path, pacs.port) as here:
        here.deliver()
        here.commit()
        assert pacs.call(here.config.listener.port, **changes) == status
        assert states(here) == [COMMITTING] * 2


def test_a_transaction_that_we_do_not_know_marks_nothing(tmp_path: Path) -> None:
    with archive(answers=False) as pacs, owing(tmp_path, pacs.port) as here:
        here.deliver()
        here.commit()
        port = here.config.listener.port
        assert pacs.call(port, another(pacs, "2.25.1")) == 0x0115
        nameless = pacs.report()
        del nameless.TransactionUID
        assert pacs.call(port, nameless) == 0x0115
        garbage = pacs.report()
        garbage.FailedSOPSequence = [Dataset()]
        garbage.FailedSOPSequence[0].add_new("FailureReason", "LO", "none")
        assert pacs.call(port, garbage) == 0x0110
        assert states(here) == [COMMITTING] * 2


def test_only_what_was_asked_for_counts(tmp_path: Path) -> None:
    with archive(answers=False) as pacs, owing(tmp_path, pacs.port) as here:
        here.deliver()
        here.commit()
        said = pacs.report()
        ct_image, mr_image = str(objects.ct(1).SOPClassUID), "1.2.840.10008.5.1.4.1.1.4"
        said.ReferencedSOPSequence = [
            item((ct_image, FIRST)),
            item((mr_image, SECOND)),
            item((ct_image, "9")),
        ]
        assert pacs.call(here.config.listener.port, said) == 0x0000
        assert states(here) == [COMMITTED, COMMITTING]  # the second is looked for when time is over


def test_a_busy_database_lets_the_archive_repeat_its_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(*_: Any) -> None:
        raise Retryable("database: locked")

    with archive(answers=False) as pacs, owing(tmp_path, pacs.port) as here:
        here.deliver()
        here.commit()
        with monkeypatch.context() as patched:
            patched.setattr(Database, "settle_commitment", busy)
            assert pacs.call(here.config.listener.port) == 0x0213
        assert states(here) == [COMMITTING] * 2
        assert pacs.call(here.config.listener.port) == 0x0000
        assert states(here) == [COMMITTED] * 2


# --- silence --------------------------------------------------------------------------------------


def silence(here: Hospital) -> None:
    """Delivered and asked for; then the time for the answer passes."""
    here.deliver()
    here.commit()
    here.pass_time(here.config.delivery.commitment_seconds - 1)
    here.commit()
    assert states(here) == [COMMITTING] * 2
    here.pass_time(1)


@pytest.mark.parametrize("ignores_keys", [False, True])
def test_a_silent_archive_is_asked_what_it_has(tmp_path: Path, ignores_keys: bool) -> None:
    with (
        archive(answers=False, lists={FIRST, "9.9"}, lists_everything=ignores_keys) as pacs,
        owing(tmp_path, pacs.port) as here,
    ):
        silence(here)
        assert pacs.found == []
        here.commit()
        assert states(here) == [COMMITTED, PENDING]
        assert "destination PACS was silent on its commitment and does not list the object" in errors(here)
        here.pass_time(20)
        here.deliver()
        assert states(here) == [COMMITTED, COMMITTING]
        assert pacs.stored == [FIRST, SECOND, SECOND]
    keys = pacs.found[0]
    assert keys.QueryRetrieveLevel == "IMAGE"
    assert (keys.StudyInstanceUID, keys.SeriesInstanceUID) == (STUDY, objects.SERIES)


def test_an_archive_that_says_no_after_all_counts_more_than_its_list(tmp_path: Path) -> None:
    with (
        archive(answers=False, lists={FIRST, SECOND}, fails={FIRST}) as pacs,
        owing(tmp_path, pacs.port) as here,
    ):
        silence(here)
        here.commit()
        assert states(here) == [COMMITTED] * 2
        assert pacs.call(here.config.listener.port) == 0x0000
        assert states(here) == [PENDING, COMMITTED]


def test_an_answer_that_comes_while_the_archive_is_asked_what_it_has_counts(tmp_path: Path) -> None:
    with archive(answers=False, fails={SECOND}) as pacs, owing(tmp_path, pacs.port) as here:
        silence(here)
        pacs.meanwhile = lambda: pacs.call(here.config.listener.port)
        here.commit()
        assert states(here) == [COMMITTED, PENDING]
        assert "destination PACS does not commit itself: no such object instance (0x0112)" in errors(here)


def test_a_silent_archive_that_cannot_be_asked_is_named_and_may_still_answer(tmp_path: Path) -> None:
    with archive(answers=False, finds=False) as pacs, owing(tmp_path, pacs.port) as here:
        silence(here)
        here.commit()
        assert states(here) == [COMMITTING] * 2
        (error,) = errors(here)
        assert "accepts none of the SOP classes 1.2.840.10008.5.1.4.1.2.2.1; allow them there" in error
        here.pass_time(here.config.delivery.give_up_hours * 3600)
        here.commit()
        assert states(here) == [NOT_COMMITTED] * 2
        assert shown(here) == "✕ 2 delivered, 2 not committed"
        (row, _) = json.loads(triage(here, "deliveries", "--json"))
        assert row["state"] == "not_committed"
        assert "PACS: delivered, not committed" in triage(here, "deliveries")
        here.requeue(STUDY)
        assert states(here) == [NOT_COMMITTED] * 2  # it has them: nothing is sent again
        assert pacs.call(here.config.listener.port) == 0x0000
        assert states(here) == [COMMITTED] * 2
    assert len(pacs.stored) == 2


def test_who_was_given_up_is_asked_again_on_request(tmp_path: Path) -> None:
    with archive(status=0x0110) as pacs, owing(tmp_path, pacs.port) as here:
        here.deliver()
        here.pass_time(here.config.delivery.give_up_hours * 3600)
        here.commit()
        assert states(here) == [NOT_COMMITTED] * 2
        pacs.status = 0x0000
        assert "asked again to commit itself to 2 that it has" in triage(here, "resend", "PACS")
        here.now = peers.now()  # the command goes by the clock
        here.commit()
        assert states(here) == [COMMITTED] * 2
    assert len(pacs.stored) == 2


# --- archives that cannot be asked ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "says", "longest"),
    [
        (0x0213, "resource limitation", False),
        (0x0110, "processing failure", False),
        (0x0124, "not authorised", True),
        (0x0211, "unrecognised operation", True),
    ],
)
def test_a_request_that_is_refused_is_made_again(
    tmp_path: Path, status: int, says: str, longest: bool
) -> None:
    with archive(status=status) as pacs, owing(tmp_path, pacs.port) as here:
        here.deliver()
        here.commit()
        assert states(here) == [COMMITTING] * 2
        assert transactions(here) == {None}
        (error,) = errors(here)
        assert says in error
        pacs.status = 0x0000
        rules = here.config.delivery
        here.pass_time(rules.longest_retry_seconds if longest else 20)
        here.commit()
        assert states(here) == [COMMITTED] * 2
    (first, _), (second, _) = pacs.asked
    assert first != second


def test_an_archive_without_the_service_says_so_in_the_check(tmp_path: Path) -> None:
    with archive(commits=False) as pacs, owing(tmp_path, pacs.port) as here:
        wrong = deliver.reach(here.config.delivery.destinations[0], here.config)
        assert wrong is not None
        assert "accepts none of the SOP classes 1.2.840.10008.1.20.1" in wrong
        assert "or set its commitment to false" in wrong
        here.deliver()
        here.commit()
        assert errors(here) == {wrong}
        assert states(here) == [COMMITTING] * 2


def test_an_archive_that_is_away_is_asked_when_it_is_back(tmp_path: Path) -> None:
    with archive() as pacs, owing(tmp_path, pacs.port) as here:
        here.deliver()
        port = pacs.port
    with hospital_again(tmp_path) as here:
        here.now = NOW
        here.commit()
        (error,) = errors(here)
        assert "cannot be reached" in error
        assert transactions(here) == {None}
        with archive(port=port):
            here.pass_time(20)
            here.commit()
        assert states(here) == [COMMITTED] * 2


def test_an_archive_that_hangs_up_on_the_request_may_have_heard_it(tmp_path: Path) -> None:
    with archive(hangs_up=True) as pacs, owing(tmp_path, pacs.port) as here:
        here.deliver()
        here.commit()
        ((asked, _),) = pacs.asked
        assert transactions(here) == {asked}
        assert pacs.call(here.config.listener.port) == 0x0000
        assert states(here) == [COMMITTED] * 2


# --- a real archive -------------------------------------------------------------------------------


@pytest.fixture
def _briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Orthanc keeps the association and never answers on it."""
    monkeypatch.setattr(storage_commitment, "ANSWER_SECONDS", 0.2)


@contextmanager
def beside_orthanc(folder: Path, knows: int | None = None) -> Iterator[tuple[Hospital, Orthanc]]:
    """Orthanc answers on an association of its own, at the port under which it ``knows`` TRIAGE."""
    port = peers.free_port()
    with (
        owing(folder / "triage", port) as here,
        orthanc(folder / "orthanc", knows or here.config.listener.port, port, web=True) as pacs,
    ):
        here.deliver()
        assert states(here) == [COMMITTING] * 2
        yield here, pacs


def lose(pacs: Orthanc, sop_instance_uid: str) -> None:
    for one in pacs.get("/instances"):
        if pacs.get(f"/instances/{one}/simplified-tags")["SOPInstanceUID"] == sop_instance_uid:
            address = f"http://{peers.HOST}:{pacs.http_port}/instances/{one}"
            urllib.request.urlopen(urllib.request.Request(address, method="DELETE"), timeout=30).close()


@needs_orthanc
@pytest.mark.usefixtures("_briefly")
def test_orthanc_commits_itself_and_says_what_it_has_lost(tmp_path: Path) -> None:
    with beside_orthanc(tmp_path) as (here, pacs):
        lose(pacs, SECOND)
        here.commit()
        peers.wait_until(lambda: states(here) == [COMMITTED, PENDING])
        assert "destination PACS does not commit itself: no such object instance (0x0112)" in errors(here)
        here.pass_time(20)
        here.deliver()
        here.commit()
        peers.wait_until(lambda: states(here) == [COMMITTED] * 2)


@needs_orthanc
@pytest.mark.usefixtures("_briefly")
def test_an_orthanc_that_cannot_reach_us_is_asked_what_it_has(tmp_path: Path) -> None:
    with beside_orthanc(tmp_path, knows=peers.free_port()) as (here, pacs):
        here.commit()
        assert states(here) == [COMMITTING] * 2
        assert None not in transactions(here)
        lose(pacs, SECOND)
        here.pass_time(here.config.delivery.commitment_seconds)
        here.commit()
        assert states(here) == [COMMITTED, PENDING]


@contextmanager
def roles(path: Path, *names: str) -> Iterator[None]:
    """The daemon's processes of these roles."""
    command = [sys.executable, "-m", "triage", "--config", str(path), "serve", "--role"]
    with (path.parent / "log").open("wb") as log:
        processes = [subprocess.Popen([*command, name], stderr=log) for name in names]
    try:
        yield
    finally:
        for process in processes:
            process.terminate()
        assert [process.wait(60) for process in processes] == [0] * len(names)


@needs_orthanc
def test_the_daemon_asks_orthanc_and_hears_its_answer(tmp_path: Path) -> None:
    port = peers.free_port()
    with owing(tmp_path / "triage", port) as here:
        listener = here.config.listener.port
    log = tmp_path / "triage" / "log"
    with (
        orthanc(tmp_path / "orthanc", listener, port, web=True),
        hospital_again(tmp_path / "triage") as here,
        roles(tmp_path / "triage" / "config.yaml", "listener", "clerk"),
    ):
        peers.wait_until(lambda: states(here) == [COMMITTED] * 2, log=log)
    assert f"{FIRST} sent to PACS" in log.read_text()
    assert f"{FIRST} committed by PACS" in log.read_text()


# --- kill -9 --------------------------------------------------------------------------------------

KILLED = {
    "before the request": (storage_commitment, "request", "before"),
    "after the request": (storage_commitment, "request", "after"),
    "after the answer": (Database, "settle_commitment", "after"),
}


@contextmanager
def hospital_again(folder: Path) -> Iterator[Hospital]:
    settings = config.load(folder / "config.yaml", {})
    db = Database(settings.database.url)
    try:
        yield Hospital(settings, db)
    finally:
        db.close()


def ask_and_die(folder: Path, point: str) -> None:
    """In a process of its own: deliver, ask, and be killed at the point."""
    where, name, when = KILLED[point]
    function = getattr(where, name)

    def killing(*arguments: Any, **named: Any) -> None:
        if when == "after":
            function(*arguments, **named)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(where, name, killing)
    storage_commitment.ANSWER_SECONDS = 30.0
    with hospital_again(folder) as here:
        here.now = NOW
        here.deliver()
        here.commit()


@pytest.mark.parametrize("point", KILLED)
@pytest.mark.parametrize("keeps", [True, False])
def test_a_kill_loses_no_commitment_and_sends_nothing_twice_that_is_kept(
    tmp_path: Path, point: str, keeps: bool
) -> None:
    answers = point == "after the answer"
    lists = {FIRST, SECOND} if keeps else {FIRST}
    with archive(answers=answers, lists=lists, fails=set() if keeps else {SECOND}) as pacs:
        with owing(tmp_path, pacs.port):
            pass
        process = multiprocessing.get_context("spawn").Process(target=ask_and_die, args=(tmp_path, point))
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        pacs.fails.clear()
        pacs.answers = True
        with hospital_again(tmp_path) as here:
            before: list[Delivery] = here.db.deliveries(STUDY)
            assert all(one.transaction_uid for one in before)
            here.now = NOW
            here.pass_time(here.config.delivery.commitment_seconds)
            here.commit()
            here.deliver()
            here.pass_time(20)
            here.deliver()
            here.commit()
            assert states(here) == [COMMITTED] * 2
    assert pacs.stored == [FIRST, SECOND] + [SECOND] * (not keeps)
