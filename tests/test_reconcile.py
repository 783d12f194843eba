"""A study is compared with the archive before it is judged: with a real Orthanc, with archives that fail."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from itertools import count, islice
from pathlib import Path
from typing import Any

import pytest
from pydicom import Dataset
from pynetdicom import evt

from tests import peers
from tests.archives import Answer, Scripted, archive, filled, multipart, part_10, slices, web_archive
from tests.hospital import Hospital, hospital
from tests.needs import needs_orthanc
from tests.objects import SERIES, STUDY, ct, save
from tests.test_orthanc import Orthanc
from tests.test_outgoing import certificate, server_context  # noqa: F401
from triage import assemble, daemon, pull
from triage.config import DicomSource, Tls, WebSource
from triage.dicom import wado
from triage.dicom.header import read_instance
from triage.dicom.query import FIND, GET, MOVE, Pacs
from triage.dicom.upper_layer import hang_up
from triage.dicom.wado import Web
from triage.domain import StudyState
from triage.errors import ConfigError, Retryable

BOUND = 100
"""Seconds that a study waits for what is missing."""
RETRY = 20
SOURCE: dict[str, Any] = {"name": "ARCHIVE", "ae_title": "PACS", "host": peers.HOST}


def pulling(source: dict[str, Any], timeout: float = 30) -> dict[str, Any]:
    return {
        "sources": [source],
        "reconcile": source["name"],
        "timeout_seconds": timeout,
        "reconcile_seconds": BOUND,
        "retry_seconds": RETRY,
    }


def quiet(ward: Hospital) -> None:
    ward.pass_time(ward.config.assemble.quiet_seconds)


def compare(ward: Hospital) -> bool:
    """One step of the comparison, as the daemon has it."""
    asked = pull.archive(ward.config, "ARCHIVE")
    return pull.step(
        ward.db, ward.config, asked, pull.receiver(ward.db, ward.config, lambda: ward.now), ward.now
    )


def assembled(ward: Hospital) -> bool:
    return assemble.step(ward.db, ward.config, ward.now)


def remarks(ward: Hospital, uid: str = STUDY) -> tuple[str, ...]:
    return ward.entry(uid).study.remarks


def take(ward: Hospital, folder: Path, images: list[Dataset]) -> None:
    """They come as if sent, and then all is quiet."""
    paths = [save(image, folder / f"{image.SOPInstanceUID}.dcm") for image in images]
    pull.read_files(pull.find(paths), ward.db, pull.receiver(ward.db, ward.config, lambda: ward.now))
    quiet(ward)


def here(ward: Hospital) -> set[int]:
    return {int(uid.rpartition(".")[2]) for uid in ward.db.sop_instance_uids(STUDY)}


# --- a real archive ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def orthanc_here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Orthanc, list[Path], int]]:
    with filled(tmp_path_factory.mktemp("archive")) as known:
        yield known


def source_at(running: Orthanc, how: str) -> dict[str, Any]:
    if how == "web":
        url = f"http://{peers.HOST}:{running.http_port}/dicom-web"
        return {"name": "ARCHIVE", "kind": "dicomweb", "url": url}
    return {**SOURCE, "port": running.dicom_port, "retrieve": how}


@needs_orthanc
@pytest.mark.parametrize("how", ["get", "move", "web"])
def test_what_is_missing_is_fetched_before_a_study_is_judged(
    tmp_path: Path, orthanc_here: tuple[Orthanc, list[Path], int], how: str
) -> None:
    running, first, listener = orthanc_here
    sections = {"listener": {"port": listener}, "pull": pulling(source_at(running, how))}
    with hospital(tmp_path / "here", **sections) as ward:
        pull.read_files(pull.find(first[3:]), ward.db, pull.receiver(ward.db, ward.config, lambda: ward.now))
        uid = read_instance(first[0]).study_instance_uid
        assert not compare(ward)  # it may still be coming
        quiet(ward)
        assert not assembled(ward)
        assert compare(ward)
        assert ward.entry(uid).images == len(first)
        assert not assembled(ward)
        quiet(ward)
        assert compare(ward)
        assert not compare(ward)
        assert assembled(ward)
        assert ward.entry(uid).study.state is StudyState.READY
        assert remarks(ward, uid) == ()


@needs_orthanc
def test_the_daemon_compares_on_its_own(
    tmp_path: Path, orthanc_here: tuple[Orthanc, list[Path], int]
) -> None:
    running, first, listener = orthanc_here
    source = pulling(source_at(running, "auto"))
    with hospital(tmp_path / "here", listener={"port": listener}, pull=source) as ward:
        ward.now = daemon.now()
        pull.read_files(pull.find(first[3:]), ward.db, pull.receiver(ward.db, ward.config, daemon.now))
        uid = read_instance(first[0]).study_instance_uid
        stop = threading.Event()
        clerk = threading.Thread(target=daemon.run_clerk, args=(ward.config, stop))
        clerk.start()
        try:
            peers.wait_until(lambda: ward.entry(uid).study.state is StudyState.READY, seconds=120)
        finally:
            stop.set()
            clerk.join()
        assert ward.entry(uid).images == len(first)


@needs_orthanc
@pytest.mark.parametrize("how", ["get", "move", "web"])
def test_check_says_how_a_source_answers(
    tmp_path: Path, orthanc_here: tuple[Orthanc, list[Path], int], how: str
) -> None:
    running, _, listener = orthanc_here
    sections = {"listener": {"port": listener}, "pull": pulling(source_at(running, how))}
    with hospital(tmp_path / "here", **sections) as ward:
        told = pull.archive(ward.config, "ARCHIVE").reach()
    offered = {"get": "answers C-FIND and offers C-GET", "move": "offers C-MOVE", "web": "answers QIDO-RS"}
    assert offered[how] in told


@needs_orthanc
def test_check_finds_out_that_an_archive_does_not_know_us(
    orthanc_here: tuple[Orthanc, list[Path], int],
) -> None:
    source = DicomSource(**source_at(orthanc_here[0], "auto"))
    with pytest.raises(
        Retryable, match=r"ended the association, .*; does it know STRANGER with our address\?"
    ):
        Pacs(source, "STRANGER", 10).reach()


def test_check_finds_out_that_an_archive_cannot_send_to_us() -> None:
    with archive(Scripted([]), offers=[FIND, MOVE]) as port:
        with pytest.raises(ConfigError, match="does not know TRIAGE as a C-MOVE destination"):
            Pacs(DicomSource(**SOURCE, port=port), "TRIAGE", 10).reach()
        with pytest.raises(ConfigError, match="does not offer C-GET to TRIAGE; allow it there"):
            Pacs(DicomSource(**SOURCE, port=port, retrieve="get"), "TRIAGE", 10).reach()


# --- what an archive says ------------------------------------------------------------------------


def test_nothing_is_missing(tmp_path: Path) -> None:
    held = Scripted(slices(1, 2, 3))
    with archive(held) as port, hospital(tmp_path / "here", pull=pulling({**SOURCE, "port": port})) as ward:
        take(ward, tmp_path, held.images)
        assert not assembled(ward)
        assert compare(ward)
        assert assembled(ward)
        assert remarks(ward) == ()


def test_a_study_that_the_archive_does_not_have_is_judged_at_once(tmp_path: Path) -> None:
    with (
        archive(Scripted([])) as port,
        hospital(tmp_path / "here", pull=pulling({**SOURCE, "port": port})) as ward,
    ):
        take(ward, tmp_path, [ct(1)])
        assert compare(ward)
        assert assembled(ward)
        assert remarks(ward) == (pull.NOT_THERE,)


@pytest.mark.parametrize("retrieve", ["get", "move"])
def test_what_cannot_be_fetched_is_waited_for_and_then_said(tmp_path: Path, retrieve: str) -> None:
    held = Scripted(slices(1, 2, 3, 4, 5), broken={f"{SERIES}.5"})
    with archive(held) as port:
        source = {**SOURCE, "port": port, "retrieve": retrieve}
        with hospital(tmp_path / "here", pull=pulling(source)) as ward:
            held.move_to = ward.config.listener.port
            take(ward, tmp_path, held.images[:3])
            assert compare(ward)
            assert here(ward) == {1, 2, 3, 4}
            quiet(ward)
            assert compare(ward)
            assert remarks(ward) == ("4 of 5 images: the archive has more than came here",)
            assert not compare(ward)  # not again before the wait is over
            assert not assembled(ward)
            ward.pass_time(RETRY)
            assert compare(ward)
            ward.pass_time(BOUND - RETRY - 1)
            assert not assembled(ward)
            ward.pass_time(1)
            assert assembled(ward)
            assert remarks(ward) == ("4 of 5 images: the archive has more than came here",)
            held.broken.clear()
            assert not compare(ward)
            take(ward, tmp_path, held.images[4:])
            assert compare(ward)
            assert assembled(ward)
            assert remarks(ward) == ()


def test_studies_that_wait_or_hang_hold_up_no_other(tmp_path: Path) -> None:
    """Nobody compares, as if one archive never answered: the bound counts from each study's last image."""
    with hospital(tmp_path / "here", pull=pulling({**SOURCE, "port": peers.free_port()})) as ward:
        take(ward, tmp_path, [ct(1)])
        other = ct(1, StudyInstanceUID="1.2.9", SeriesInstanceUID="1.2.9.1", SOPInstanceUID="1.2.9.1.1")
        ward.pass_time(BOUND / 2)
        take(ward, tmp_path, [other])
        assert not assembled(ward)
        ward.pass_time(BOUND / 2)
        assert assembled(ward)
        assert not assembled(ward)
        assert remarks(ward) == (assemble.NOT_COMPARED,)
        assert ward.entry("1.2.9").study.state is StudyState.RECEIVING
        quiet(ward)
        ward.pass_time(BOUND / 2)
        assert assembled(ward)


def test_a_study_that_is_looked_at_again_is_compared_again(tmp_path: Path) -> None:
    with hospital(tmp_path / "here", pull=pulling({**SOURCE, "port": peers.free_port()})) as ward:
        take(ward, tmp_path, [ct(1)])
        assert compare(ward)
        assert assembled(ward)
        ward.requeue(STUDY)
        assert remarks(ward) == ()
        quiet(ward)
        assert not assembled(ward)
        assert compare(ward)


# --- archives that fail, by DIMSE ------------------------------------------------------------------


def refusing(code: int) -> Any:
    def on_find(_: evt.Event) -> Iterator[Any]:
        yield code, None

    return on_find


def leaving(event: evt.Event) -> Iterator[Any]:
    answer = Dataset()
    answer.QueryRetrieveLevel = "SERIES"
    answer.SeriesInstanceUID = SERIES
    yield 0xFF00, answer
    hang_up(event.assoc)
    yield 0xFF00, answer


def nameless(_: evt.Event) -> Iterator[Any]:
    answer = Dataset()
    answer.QueryRetrieveLevel = "SERIES"
    answer.PatientName = "SECRET^PATIENT"
    yield 0xFF00, answer


HELD = Scripted(slices(1, 2, 3))
FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "refuses": ({"allowed": ["OTHER"]}, "refused the association: calling AE title not recognised"),
    "offers nothing": ({"offers": [MOVE]}, "accepts none of the SOP classes"),
    "out of resources": ({"on_find": refusing(0xA700)}, "refused: out of resources (0xA700)"),
    "cannot understand": ({"on_find": refusing(0xC001)}, "refused: cannot understand"),
    "not authorised": ({"on_find": refusing(0x0124)}, "not authorised"),
    "leaves": ({"on_find": leaving}, "ended the association"),
    "speaks nonsense": ({"on_find": nameless}, "has no SeriesInstanceUID"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_archive_that_fails_keeps_no_study_waiting(
    tmp_path: Path, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    behaviour, said = FAULTS[fault]
    with (
        archive(HELD, **behaviour) as port,
        hospital(tmp_path / "here", pull=pulling({**SOURCE, "port": port})) as ward,
    ):
        take(ward, tmp_path, HELD.images[:2])
        assert compare(ward)
        assert not compare(ward)
        assert assembled(ward)
        assert remarks(ward) == (assemble.NOT_COMPARED,)
    assert f"study {STUDY} is not compared with the archive: " in caplog.text
    assert said in caplog.text
    assert "SECRET" not in caplog.text


def test_an_archive_that_is_silent_keeps_no_study_waiting(tmp_path: Path) -> None:
    held = Scripted([])

    def silent(_: evt.Event) -> Iterator[Any]:
        held.ended.wait(60)
        yield 0x0000, None

    with (
        archive(held, on_find=silent) as port,
        hospital(tmp_path / "here", pull=pulling({**SOURCE, "port": port}, timeout=1)) as ward,
    ):
        take(ward, tmp_path, [ct(1)])
        began = time.monotonic()
        assert compare(ward)
        assert time.monotonic() - began < 50
        assert assembled(ward)
        assert remarks(ward) == (assemble.NOT_COMPARED,)
        held.ended.set()


@pytest.mark.parametrize("leaves", [True, False])
def test_what_came_before_an_archive_left_or_hung_stays(tmp_path: Path, leaves: bool) -> None:
    held = Scripted(slices(1, 2, 3, 4, 5, 6))

    def on_get(event: evt.Event) -> Iterator[Any]:
        for number, item in enumerate(held.on_get(event)):
            if number == 3 and leaves:
                hang_up(event.assoc)
            if number == 3 and not leaves:
                held.ended.wait(60)
            yield item

    source = {**SOURCE, "port": (port := peers.free_port())}
    with hospital(tmp_path / "here", pull=pulling(source, timeout=30 if leaves else 10)) as ward:
        with archive(held, on_get=on_get, port=port):
            take(ward, tmp_path, held.images[:1])
            assert compare(ward)
            assert here(ward) == {1, 2, 3}
            held.ended.set()
        with archive(held, port=port):
            quiet(ward)
            assert compare(ward)
            assert here(ward) == {1, 2, 3, 4, 5, 6}


# --- archives that fail, by DICOMweb ---------------------------------------------------------------

NO_JSON: Answer = (200, "application/dicom+json", b"<html>log in</html>")
NO_UID: Answer = (
    200,
    "application/dicom+json",
    b'[{"00100010": {"vr": "PN", "Value": [{"Alphabetic": "SECRET"}]}}]',
)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((401, "text/plain", b""), "does not let us in (HTTP 401): see its user and secret"),
        ((404, "text/plain", b""), "refused (HTTP 404); is the url right?"),
        ((500, "text/plain", b""), "failed (HTTP 500); see its log"),
        ((503, "text/plain", b""), "is busy or broken (HTTP 503)"),
        (NO_JSON, "did not answer well"),
        (NO_UID, "has no SeriesInstanceUID"),
        ("silence", "did not answer within 1 s"),
    ],
    ids=lambda value: str(value)[:12],
)
def test_a_web_archive_that_fails_keeps_no_study_waiting(
    tmp_path: Path, answer: Any, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    ended = threading.Event()
    with web_archive(HELD.images, {"/series": ended if answer == "silence" else answer}) as url:
        source = {"name": "ARCHIVE", "kind": "dicomweb", "url": url}
        seconds = 1 if answer == "silence" else 30
        with hospital(tmp_path / "here", pull=pulling(source, seconds)) as ward:
            take(ward, tmp_path, HELD.images[:2])
            assert compare(ward)
            assert assembled(ward)
            assert remarks(ward) == (assemble.NOT_COMPARED,)
        ended.set()
    assert said in caplog.text
    assert "SECRET" not in caplog.text


@pytest.mark.parametrize(
    ("said", "changed", "to"),
    [
        ("has more than 20 answers", "MOST_ANSWERS", 20),
        ("too slow: .* 50 s", "monotonic", count(0, 10).__next__),
    ],
)
def test_a_web_archive_that_pages_on_and_on_is_let_go(
    said: str, changed: str, to: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = iter(range(1, 100))

    def page() -> Answer:
        rows = [{"0020000E": {"vr": "UI", "Value": [f"1.2.{number}"]}} for number in islice(numbers, 3)]
        return 200, "application/dicom+json", json.dumps(rows).encode()

    monkeypatch.setattr(wado, changed, to)
    with web_archive([], {"/series": page}) as url, pytest.raises(Retryable, match=said):
        Web(WebSource(name="ARCHIVE", kind="dicomweb", url=url), 5).images(STUDY)
    assert next(numbers) < 90


def broken_answers() -> dict[str, tuple[Answer, set[int]]]:
    """What is said for the second of three images, and which are here thereafter: the first was before."""
    second, other = map(part_10, slices(2, 9))
    status, kind, whole = multipart(second)
    return {
        "404": ((404, "text/plain", b""), {1, 3}),
        "500": ((500, "text/plain", b""), {1, 3}),
        "503": ((503, "text/plain", b""), {1}),
        "401": ((401, "text/plain", b""), {1}),
        "cut off": ((status, kind, whole[: len(whole) // 2]), {1, 3}),
        "cut object": (multipart(second[:-20]), {1, 3}),
        "noise": (multipart(b"noise" * 100), {1, 3}),
        "another image": (multipart(other), {1, 3}),
        "no multipart": ((200, "application/dicom", second), {1, 2, 3}),
    }


@pytest.mark.parametrize(
    "fault",
    ["404", "500", "503", "401", "cut off", "cut object", "noise", "another image", "no multipart"],
)
def test_an_image_that_a_web_archive_cannot_give_is_waited_for(tmp_path: Path, fault: str) -> None:
    answer, came = broken_answers()[fault]
    faults: dict[str, Any] = {rf"/instances/{SERIES}\.2$": answer}
    with web_archive(HELD.images, faults) as url:
        source = {"name": "ARCHIVE", "kind": "dicomweb", "url": url}
        with hospital(tmp_path / "here", pull=pulling(source)) as ward:
            take(ward, tmp_path, HELD.images[:1])
            assert compare(ward)
            assert here(ward) == came
            assert not assembled(ward)
            faults.clear()
            ward.pass_time(RETRY)
            quiet(ward)
            assert compare(ward)
            assert here(ward) == {1, 2, 3}
            quiet(ward)
            compare(ward)
            assert assembled(ward)


# --- TLS -----------------------------------------------------------------------------------------


def test_sources_speak_tls(tmp_path: Path, certificate: tuple[Path, Path]) -> None:  # noqa: F811
    mine = Tls(ca=certificate[0], certificate=certificate[0], key=certificate[1])

    def pacs(port: int, tls: Tls | None) -> Pacs:
        return Pacs(DicomSource(**SOURCE, port=port, retrieve="get", tls=tls), "TRIAGE", 2)

    with archive(HELD, tls=server_context(certificate, mutual=True), offers=[FIND, GET]) as port:
        assert "answers C-FIND" in pacs(port, mine).reach()
        assert pacs(port, mine).images(STUDY) == {SERIES: [f"{SERIES}.{n}" for n in (1, 2, 3)]}
        with pytest.raises(Retryable, match="does not agree on TLS with us"):
            pacs(port, Tls()).images(STUDY)
        with pytest.raises(ConfigError, match="a file of its tls cannot be used"):
            pacs(port, Tls(ca=tmp_path / "none.pem")).images(STUDY)
    with web_archive(HELD.images, tls=server_context(certificate)) as url:
        web = WebSource(name="ARCHIVE", kind="dicomweb", url=url, tls=Tls(ca=certificate[0]))
        assert "answers QIDO-RS" in Web(web, 5).reach()
        with pytest.raises(ConfigError, match="a file of its tls cannot be used"):
            Web(web.model_copy(update={"tls": Tls(ca=tmp_path / "none.pem")}), 5).reach()
        with pytest.raises(Retryable, match="does not agree on TLS with us, or cannot be trusted"):
            Web(web.model_copy(update={"tls": None}), 5).reach()


def test_the_bound_is_after_the_last_image(tmp_path: Path) -> None:
    """Each image that comes gives the archive its time anew."""
    with hospital(tmp_path / "here", pull=pulling({**SOURCE, "port": peers.free_port()})) as ward:
        for number in (1, 2):
            take(ward, tmp_path, [ct(number)])
            ward.now += timedelta(seconds=BOUND - 1)
            assert not assembled(ward)
        ward.pass_time(1)
        assert assembled(ward)
