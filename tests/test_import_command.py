"""`triage import`: from files, from a real Orthanc."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from pydicom import dcmread

from tests import peers
from tests.hospital import Hospital, hospital
from tests.needs import needs_orthanc
from tests.objects import STUDY, ct, save
from tests.test_cli import triage
from tests.test_orthanc import Orthanc, orthanc
from triage import pull
from triage.config import Destination
from triage.dicom import header, phantom, sender
from triage.dicom.query import Pacs, Query
from triage.dicom.receiving import Receiver
from triage.domain import StudyState
from triage.errors import ConfigError, Retryable
from triage.pull import Coming

ARCHIVE = "PACS"
SMALL = {"slices": 30, "rows": 64, "slice_spacing": 8.0}


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


def test_what_a_zip_file_blows_up_is_not_read_to_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pull, "LARGEST_OBJECT", 100_000)
    image = save(ct(1), tmp_path / "1.dcm").read_bytes()
    bomb = zipped(tmp_path / "a.zip", {"bomb": bytes(10_000_000), "image": image})
    torn = tmp_path / "b.zip"
    torn.write_bytes(bomb.read_bytes()[:500])
    with hospital(tmp_path / "here") as ward:
        read = import_files(ward, bomb, torn)
        assert [reason for _, reason in read.passed_over] == [
            "too large for an image",
            "not a readable zip file",
        ]
        assert len(read.studies) == 1


def test_a_full_disk_ends_the_import_and_the_next_goes_on(tmp_path: Path) -> None:
    save(ct(1), tmp_path / "in" / "1.dcm")
    with hospital(tmp_path / "here") as ward:
        full = Receiver(ward.config.storage.spool, ward.receive, has_room=lambda: False)
        with pytest.raises(Retryable, match="disk is full"):
            pull.read_files(pull.find([tmp_path / "in"]), ward.db, full)
        (study,) = import_files(ward, tmp_path / "in").studies.values()
        assert study.new == 1


def test_the_command(tmp_path: Path) -> None:
    settings = peers.write_config(tmp_path / "daemon")
    save(ct(1), tmp_path / "in" / "1.dcm")
    (tmp_path / "in" / "README").write_text("hello")
    looked = triage("-c", settings, "import", tmp_path / "in", "--dry-run")
    assert "1 to come, 0 here before" in looked.stdout
    assert "README: not a DICOM file" in looked.stderr
    assert "1 came, 0 here before" in triage("-c", settings, "import", tmp_path / "in").stdout
    assert "0 came, 1 here before" in triage("-c", settings, "import", tmp_path / "in").stdout
    assert STUDY in triage("-c", settings, "worklist").stdout
    nothing = triage("-c", settings, "import", tmp_path / "in" / "README", status=1)
    assert "0 objects of 0 studies came" in nothing.stdout


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


def fill(orthanc: Orthanc, paths: list[Path]) -> None:
    peer = Destination(name="x", ae_title="PACS", host=peers.HOST, port=orthanc.dicom_port)
    sent = sender.send(paths, peer, calling_ae_title="TRIAGE", timeout_seconds=30)
    assert all(outcome.sent for outcome in sent)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Orthanc, list[Path], int]]:
    folder = tmp_path_factory.mktemp("archive")
    listener, port = peers.free_port(), peers.free_port()
    first = phantom.write_study(folder / "first", seed=3, **SMALL)
    second = phantom.write_study(folder / "second", seed=4, **SMALL)
    with orthanc(folder / "orthanc", listener, port, web=True) as running:
        fill(running, [*first, *second])
        yield running, first, listener


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
    around.ward.db.close()
    settings = tmp_path / "here" / "config.yaml"
    ask = ("-c", settings, "import", "--from", "auto", "--patient", "PHANTOM-3")
    assert "30 to come, 0 here before" in triage(*ask, "--dry-run").stdout
    assert "30 objects of 1 studies came" in triage(*ask).stdout
    assert "give folders or files" in triage("-c", settings, "import", status=78).stderr
