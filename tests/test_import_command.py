"""`triage import`: from files, from a real Orthanc; and what an archive counts before a study is judged."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from tests import peers
from tests.hospital import Hospital, hospital
from tests.objects import STUDY, ct, save
from tests.test_cli import triage
from triage import pull
from triage.dicom import phantom
from triage.dicom.receiving import Receiver
from triage.domain import StudyState
from triage.errors import Retryable

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
    nothing = triage("-c", settings, "import", tmp_path / "in" / "README", status=78)
    assert "no DICOM object found" in nothing.stderr
