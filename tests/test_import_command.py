"""`triage import`: from files, from a real Orthanc."""

from __future__ import annotations

import os
import signal
import tracemalloc
import zipfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pydicom import Dataset, dcmread
from pynetdicom import evt
from typer.testing import CliRunner

from tests import peers
from tests.archives import SMALL, Scripted, filled, slices
from tests.archives import archive as serving
from tests.faults import children
from tests.hospital import Hospital, hospital
from tests.needs import needs_orthanc
from tests.objects import SERIES, STUDY, ct, save
from tests.test_cli import triage
from tests.test_orthanc import Orthanc
from triage import config, pull
from triage.cli import app
from triage.config import DicomSource
from triage.db import Database
from triage.dicom import header, phantom
from triage.dicom.query import Pacs, Query
from triage.dicom.receiving import Receiver
from triage.domain import Instance, StudyState
from triage.errors import ConfigError, Retryable
from triage.pull import Coming


def receiver(ward: Hospital) -> Receiver:
    return pull.receiver(ward.db, ward.config, lambda: ward.now)


def import_files(ward: Hospital, *paths: Path, dry_run: bool = False) -> pull.FilesRead:
    return pull.read_files(pull.find(paths), ward.db, None if dry_run else receiver(ward))


def zipped(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


# --- files ---------------------------------------------------------------------------------------


def test_what_is_imported_is_judged_like_what_was_sent(tmp_path: Path) -> None:
    phantom.write_study(tmp_path / "in" / "deep", seed=3, **SMALL)
    with hospital(tmp_path / "sent") as sent, hospital(tmp_path / "imported") as imported:
        peers.scan(tmp_path / "in", sent.config)
        (study,) = import_files(imported, tmp_path / "in").studies.values()
        answers = []
        for ward in (sent, imported):
            ward.work()
            entry = ward.entry(study.study_instance_uid)
            assert entry.study.state is StudyState.ANALYZED
            assert entry.result is not None
            answers.append((entry.result.content_key, entry.priority, entry.images, entry.study.notes))
    assert answers[0] == answers[1]


def test_files_that_came_already_change_nothing_and_other_bytes_are_noted(tmp_path: Path) -> None:
    paths = [save(ct(number), tmp_path / "in" / f"{number}.dcm") for number in (1, 2)]
    with hospital(tmp_path / "here") as ward:
        (first,) = import_files(ward, *paths).studies.values()
        before = ward.entry(STUDY)
        ward.pass_time(5)
        (again,) = import_files(ward, *paths).studies.values()
        assert (first.new, again.new, len(again.objects)) == (2, 0, 2)
        assert ward.entry(STUDY) == before
        save(ct(1, PatientID="P2"), paths[0])
        import_files(ward, *paths)
        assert "different content" in ward.entry(STUDY).study.notes[0]


def test_a_dry_run_only_looks(tmp_path: Path) -> None:
    save(ct(1), tmp_path / "in" / "1.dcm")
    with hospital(tmp_path / "here") as ward:
        (study,) = import_files(ward, tmp_path / "in", dry_run=True).studies.values()
        assert study.new == 1
        assert ward.db.entry(STUDY) is None
        assert not list(ward.config.storage.spool.rglob("*.dcm"))


def test_zip_files_are_read_without_unpacking_and_their_names_lead_nowhere(tmp_path: Path) -> None:
    image = save(ct(1), tmp_path / "1.dcm").read_bytes()
    members = {"../../../escaped.dcm": image, "notes.txt": b"hello", "empty/": b""}
    (tmp_path / "in").mkdir()
    zipped(tmp_path / "in" / "cd.zip", members)
    with hospital(tmp_path / "here") as ward:
        read = import_files(ward, tmp_path / "in")
        assert [study.new for study in read.studies.values()] == [1]
        assert [(file.member, reason) for file, reason in read.passed_over] == [
            ("notes.txt", "not a DICOM file")
        ]
    assert not list(tmp_path.parent.rglob("escaped*"))


def test_what_cannot_be_an_image_is_not_read_to_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pull, "LARGEST_OBJECT", 100_000)
    image = save(ct(1), tmp_path / "1.dcm").read_bytes()
    film = tmp_path / "film"
    film.write_bytes(image + bytes(100_000))
    bomb = zipped(tmp_path / "a.zip", {"zeros": bytes(10**7), "bomb": image + bytes(10**7), "image": image})
    torn = tmp_path / "b.zip"
    torn.write_bytes(bomb.read_bytes()[:500])
    with hospital(tmp_path / "here") as ward:
        tracemalloc.start()
        read = import_files(ward, film, bomb, torn)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert [reason for _, reason in read.passed_over] == [
            "too large for an image",
            "not a DICOM file",
            "too large for an image",
            "not a readable zip file",
        ]
        assert len(read.studies) == 1
    assert most < 5_000_000


def test_a_full_disk_ends_the_import_and_the_next_goes_on(tmp_path: Path) -> None:
    paths = [save(ct(number), tmp_path / "in" / f"{number}.dcm") for number in (1, 2, 3)]
    room = [True, True, False]
    with hospital(tmp_path / "here") as ward:
        full = Receiver(ward.config.storage.spool, ward.receive, has_room=lambda: room.pop(0))
        with pytest.raises(Retryable, match=r"disk is full: make room .* 2 objects have come and stay"):
            pull.read_files(pull.find(paths), ward.db, full)
        (study,) = import_files(ward, tmp_path / "in").studies.values()
        assert (study.new, len(study.objects)) == (1, 3)


@pytest.mark.parametrize("source", ["", "VNA"])
def test_ctrl_c_says_what_came_and_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    """At the third of three images."""
    paths = [save(ct(number), tmp_path / "in" / f"{number}.dcm") for number in (1, 2, 3)]
    kept: list[str] = []

    def keep(self: Receiver, raw: bytes, instance: Instance, source: str) -> bool:
        if len(kept) == 2:
            raise KeyboardInterrupt
        kept.append(instance.sop_instance_uid)
        return True

    def fetch(*_: object) -> Iterator[int]:
        yield 2
        raise KeyboardInterrupt

    monkeypatch.setattr(Receiver, "keep", keep)
    monkeypatch.setattr(Pacs, "fetch", fetch)
    with serving(Scripted(slices(1, 2, 3))) as port:
        sources = [{"name": "VNA", "ae_title": "PACS", "host": peers.HOST, "port": port}]
        settings = peers.write_config(tmp_path / "daemon", pull={"sources": sources})
        what = ["--from", source, "--study", STUDY] if source else map(str, paths)
        ended = CliRunner().invoke(app, ["-c", str(settings), "import", *what])
    assert ended.exit_code == 130
    said = "stopped; 2 objects have come and stay; start the same import again to go on"
    assert said in " ".join(ended.output.split())


def test_root_does_not_import_for_another_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = tmp_path.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    if owner == 0:
        pull.check_user(tmp_path / "spool")
        os.chown(tmp_path, 10001, -1)
    with pytest.raises(ConfigError, match=r"daemon's user: sudo -u '#[0-9]+' triage"):
        pull.check_user(tmp_path / "spool")


def import_and_die(home: Path, folder: Path, edge: int) -> None:
    """In a process of its own."""
    settings = config.load(home / "config.yaml", {})
    db = Database(settings.database.url)
    children.die_at(edge)
    pull.read_files(pull.find([folder]), db, pull.receiver(db, settings, peers.now))


@pytest.mark.parametrize("edge", [0, 101, 150, 205, 252])
def test_an_import_that_was_killed_goes_on(tmp_path: Path, edge: int) -> None:
    """By kill -9, before or behind a write or commit."""
    for number in range(30):
        save(ct(number), tmp_path / "in" / f"{number:02}.dcm")
    with hospital(tmp_path / "here") as ward:
        with children.running(import_and_die, tmp_path / "here", tmp_path / "in", edge) as process:
            process.join(60)
            assert process.exitcode == -signal.SIGKILL
        (study,) = import_files(ward, tmp_path / "in").studies.values()
        assert len(study.here_before) + study.new == 30
        assert {i.path.stem for i in ward.db.instances(STUDY)} == study.objects
        assert ward.entry(STUDY).study.notes == ()


def test_the_command(tmp_path: Path) -> None:
    settings = peers.write_config(tmp_path / "daemon")
    save(ct(1), tmp_path / "in" / "1.dcm")
    for number in range(12):
        (tmp_path / "in" / f"viewer{number:02}.dll").write_text("hello")
    looked = triage("-c", settings, "import", tmp_path / "in", "--dry-run")
    assert "1 to come, 0 here before" in looked.stdout
    assert "viewer00.dll: not a DICOM file" in looked.stderr
    assert "passed over 2 more: not a DICOM file" in looked.stderr
    came = triage("-c", settings, "import", tmp_path / "in").stdout
    assert "1 came, 0 here before" in came
    assert "1 object of 1 study came" in came
    nothing = triage("-c", settings, "import", tmp_path / "in" / "viewer00.dll", status=1)
    assert "0 objects of 0 studies came" in nothing.stdout
    assert "give folders or files" in triage("-c", settings, "import", status=78).stderr
    both = triage("-c", settings, "import", "--from", "GET", tmp_path / "in", status=78)
    assert "not both" in both.stderr
    patient = triage("-c", settings, "import", tmp_path / "in", "--patient", "P", status=78)
    assert "--patient goes with --from" in patient.stderr
    with closing(Database(f"sqlite:///{tmp_path}/daemon/triage.db")) as db:
        assert db.sop_instance_uids(STUDY) == {f"{SERIES}.1"}


@pytest.mark.parametrize(
    "day", ["20260301", "20260301-20260331", "20260301-", "-20260331", "20260301-20260301"]
)
def test_days_and_ranges_are_asked_for(day: str) -> None:
    assert Query(day).keys()["StudyDate"] == day


@pytest.mark.parametrize(
    "day", ["2000-01-01", "20000101-19990101", "20011301-20000101", "2000111", "-", "now"]
)
def test_what_is_no_day_or_range_is_said_and_not_just_never_found(day: str) -> None:
    with pytest.raises(ConfigError, match=f"{day} is no study date or range: write 20260301, "):
        Query(day)


# --- archives ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Around:
    """An Orthanc that holds two phantoms, and what we need to fetch them."""

    ward: Hospital
    orthanc: Orthanc
    first: list[Path]

    def asked(self, name: str) -> pull.Archive:
        return pull.archive(self.ward.config, name)

    def look(self, name: str, query: Query) -> list[Coming]:
        return list(pull.look(self.ward.db, self.asked(name), query))

    def fetch(self, name: str, query: Query) -> list[Coming]:
        studies = self.look(name, query)
        for study in studies:
            for _ in pull.fetch(self.ward.db, self.asked(name), study, receiver(self.ward)):
                pass
        return studies


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Orthanc, list[Path], int]]:
    with filled(tmp_path_factory.mktemp("archive")) as known:
        yield known


@pytest.fixture
def around(tmp_path: Path, archive: tuple[Orthanc, list[Path], int]) -> Iterator[Around]:
    running, first, listener = archive
    dicom = {"ae_title": "PACS", "host": peers.HOST, "port": running.dicom_port}
    sources = [
        *({"name": retrieve, **dicom, "retrieve": retrieve} for retrieve in ("get", "move", "auto")),
        {"name": "web", "kind": "dicomweb", "url": f"http://127.0.0.1:{running.http_port}/dicom-web"},
        {"name": "nobody", **dicom, "port": peers.free_port()},
    ]
    sections = {"listener": {"port": listener}, "pull": {"sources": sources}}
    with hospital(tmp_path / "here", **sections) as ward:
        yield Around(ward, running, first)


@needs_orthanc
@pytest.mark.parametrize("name", ["get", "move", "auto", "web"])
def test_what_an_archive_has_comes_as_it_keeps_it_and_only_once(around: Around, name: str) -> None:
    one = dcmread(around.first[0])
    query = Query(patient_id=one.PatientID, study_description="CHEST CT")
    (looked,) = around.look(name, query)
    assert looked.new == len(looked.objects) == len(around.first)
    assert (looked.study_instance_uid, looked.study_date) == (one.StudyInstanceUID, one.StudyDate)
    (came,) = around.fetch(name, query)
    assert (came.error, came.missing, came.new) == ("", 0, len(around.first))
    kept = {i.sop_instance_uid: i for i in around.ward.db.instances(one.StudyInstanceUID)}
    for path in around.first:
        sent = header.read_instance(path)
        assert kept[sent.sop_instance_uid].digest == sent.digest
        assert kept[sent.sop_instance_uid].transfer_syntax_uid == sent.transfer_syntax_uid
    (again,) = around.fetch(name, query)
    assert again.new == 0


@needs_orthanc
@pytest.mark.parametrize("name", ["get", "move", "web"])
def test_only_what_is_missing_is_fetched(around: Around, name: str) -> None:
    here = around.first[5:]
    import_files(around.ward, *here)
    uid = str(dcmread(here[0]).StudyInstanceUID)
    written = {i.path: i.path.stat().st_mtime_ns for i in around.ward.db.instances(uid)}
    (came,) = around.fetch(name, Query(study_instance_uid=uid))
    assert (came.new, came.missing) == (5, 0)
    assert {path: path.stat().st_mtime_ns for path in written} == written


@needs_orthanc
@pytest.mark.parametrize("name", ["get", "web"])
def test_dates_select_and_ours_and_theirs_are_kept_apart(around: Around, name: str) -> None:
    assert len(around.look(name, Query(study_date="20200401-20200402"))) == 2
    assert around.look(name, Query(study_date="20190101-20191231")) == []
    with pytest.raises(ConfigError, match="say what to fetch"):
        around.look(name, Query())


@needs_orthanc
def test_faults_of_an_archive_say_what_to_do(around: Around) -> None:
    query = Query(patient_id="PHANTOM-3")
    with pytest.raises(Retryable, match=r"source nobody at .* cannot be reached"):
        around.look("nobody", query)
    with pytest.raises(ConfigError, match=r"pull\.sources names get, move, auto, web"):
        around.asked("elsewhere")
    (study,) = around.look("move", query)
    (source,) = (s for s in around.ward.config.pull.sources if s.name == "move")
    stranger = Pacs(source, "STRANGER", 10)
    list(pull.fetch(around.ward.db, stranger, study, receiver(around.ward)))
    assert study.missing == 30
    assert study.error


@needs_orthanc
def test_an_archive_whose_images_cannot_reach_us_is_said_with_the_study(around: Around) -> None:
    (study,) = around.look("get", Query(patient_id="PHANTOM-3"))
    full = Receiver(around.ward.config.storage.spool, around.ward.receive, has_room=lambda: False)
    list(pull.fetch(around.ward.db, around.asked("get"), study, full))
    assert study.missing == 30
    assert "could not send" in study.error


@needs_orthanc
def test_the_command_asks_an_archive(around: Around, tmp_path: Path) -> None:
    settings = tmp_path / "here" / "config.yaml"
    ask = ("-c", settings, "import", "--from", "auto", "--patient", "PHANTOM-3")
    assert "30 to come, 0 here before" in triage(*ask, "--dry-run").stdout
    assert "30 objects of 1 study came" in triage(*ask).stdout


def studies_of(*uids: str) -> list[Dataset]:
    """Two images of each."""
    changes = [
        {"StudyInstanceUID": uid, "SeriesInstanceUID": f"{uid}.1", "SOPInstanceUID": f"{uid}.1.{number}"}
        for uid in uids
        for number in (1, 2)
    ]
    return [image for changed in changes for image in slices(1, **changed)]


def test_a_study_that_an_archive_cannot_list_holds_up_no_other(tmp_path: Path) -> None:
    held = Scripted(studies_of("1.2.1", "1.2.2"))

    def on_find(event: evt.Event) -> Iterator[Any]:
        if event.identifier.QueryRetrieveLevel == "IMAGE" and event.identifier.StudyInstanceUID == "1.2.1":
            yield 0xC001, None
        else:
            yield from held.on_find(event)

    with hospital(tmp_path / "here") as ward, serving(held, on_find=on_find) as port:
        source = DicomSource(name="S", ae_title="PACS", host=peers.HOST, port=port, retrieve="get")
        studies = list(pull.look(ward.db, Pacs(source, "TRIAGE", 10), Query(study_date="20200101-")))
        for study in studies:
            list(pull.fetch(ward.db, Pacs(source, "TRIAGE", 10), study, receiver(ward)))
        assert [study.error for study in studies if not study.new] == [
            f"source S at 127.0.0.1:{port} refused: cannot understand the object (0xC001)"
        ]
        assert ward.db.sop_instance_uids("1.2.2") == {"1.2.2.1.1", "1.2.2.1.2"}


@pytest.mark.parametrize("retrieve", ["get", "move"])
def test_an_image_that_an_archive_cannot_send_holds_up_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, retrieve: str
) -> None:
    monkeypatch.setattr("triage.dicom.query.AT_ONCE", 2)
    with hospital(tmp_path / "here") as ward:
        held = Scripted(slices(1, 2, 3, 4, 5, 6), ward.config.listener.port, broken={f"{SERIES}.2"})
        with serving(held) as port:
            source = DicomSource(name="S", ae_title="PACS", host=peers.HOST, port=port, retrieve=retrieve)
            asked = Pacs(source, "TRIAGE", 10)
            (study,) = pull.look(ward.db, asked, Query(study_instance_uid=STUDY))
            assert sum(pull.fetch(ward.db, asked, study, receiver(ward))) == 5
        assert (study.new, study.missing) == (5, 1)
        assert "could not send 1 image" in study.error


@pytest.mark.parametrize(
    "fault", ["refused: cannot understand the object (0xC514)", "could not send 1 image"]
)
def test_an_archive_that_fails_to_reach_us_is_told_with_what_to_look_at(tmp_path: Path, fault: str) -> None:
    """By C-MOVE while nobody listens here."""

    def on_move(_: evt.Event) -> Iterator[Any]:
        if "refused" in fault:
            raise OSError
        yield peers.HOST, ward.config.listener.port
        yield 1
        yield 0xC000, None

    with hospital(tmp_path / "here") as ward, serving(Scripted(slices(1)), on_move=on_move) as port:
        source = DicomSource(name="S", ae_title="PACS", host=peers.HOST, port=port, retrieve="move")
        asked = Pacs(source, "TRIAGE", 10)
        (study,) = pull.look(ward.db, asked, Query(study_instance_uid=STUDY))
        list(pull.fetch(ward.db, asked, study, receiver(ward)))
        look = "does `triage serve` run, and does the archive know TRIAGE at our address and port?"
        assert study.error == f"source S at {peers.HOST}:{port} {fault}; {look}"


def test_nothing_found_is_said_with_what_was_looked_for(tmp_path: Path) -> None:
    with serving(Scripted([])) as port:
        source = {"name": "VNA", "ae_title": "PACS", "host": peers.HOST, "port": port}
        settings = peers.write_config(tmp_path / "daemon", pull={"sources": [source]})
        ask = ("-c", settings, "import", "--from", "VNA", "--date", "20200101")
        assert "VNA has no such study: --date 20200101\n" in triage(*ask).stdout
        one = triage(*ask, "--study", "1.2.3", status=1)
        assert "VNA has no such study: --date 20200101 --study 1.2.3\n" in one.stderr
