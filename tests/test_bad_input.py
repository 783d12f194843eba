"""Bad input gets its named answer; the daemon goes on; nothing received is lost."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pydicom import Dataset, dcmread
from pydicom.uid import generate_uid

from tests import peers
from tests.hospital import Hospital, hospital
from tests.needs import DATA, needs_data
from triage.dicom import phantom, sender
from triage.dicom.header import find_instances
from triage.dicom.sender import SendOutcome
from triage.domain import StudyState

DICOM = DATA / "dicom"
PHANTOM = {"slices": 30, "rows": 64, "slice_spacing": 8.0}


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Hospital]:
    with hospital(tmp_path / "daemon") as built:
        yield built


def send(here: Hospital, *paths: Path) -> list[SendOutcome]:
    return sender.send(paths, peers.destination(here.config), calling_ae_title="SCANNER", timeout_seconds=10)


def made_up(folder: Path, change: Callable[[Dataset], None] = lambda _: None, **settings: object) -> Path:
    """A phantom study with every header changed."""
    phantom.write_study(folder, seed=11, **{**PHANTOM, **settings})  # type: ignore[arg-type]
    for path in folder.iterdir():
        header = dcmread(path)
        change(header)
        header.save_as(path)
    return folder


def answer_to(here: Hospital, folder: Path) -> str:
    """Send everything below the folder and let the daemon work; the reason it gives for one study."""
    instances, _ = find_instances([folder])
    peers.scan(folder, here.config)
    here.work()
    entry = here.entry(instances[0].study_instance_uid)
    assert entry.study.state is StudyState.REJECTED
    kept = here.db.instances(entry.study.study_instance_uid)
    assert {i.sop_instance_uid for i in kept} == {i.sop_instance_uid for i in instances}
    assert all(i.path.exists() for i in kept)
    return entry.priority.reason


def still_works(here: Hospital, folder: Path) -> None:
    phantom.write_study(folder, seed=99, **PHANTOM)  # type: ignore[arg-type]
    peers.scan(folder, here.config)
    here.work()
    uid = str(dcmread(next(folder.iterdir())).StudyInstanceUID)
    assert here.entry(uid).study.state is StudyState.ANALYZED


@needs_data
@pytest.mark.parametrize(
    ("folder", "reason"),
    [
        ("acrin_013_gap", "missing slices"),
        ("odd/sagittal_ricord_0906", "sagittal"),
        ("odd/head_tilt_ge", "not a chest"),
        ("odd/localizer_philips", "localizer"),
        ("odd/exam_summary_philips", "no CT images: only 6 secondary captures"),
    ],
)
def test_real_studies_that_cannot_be_judged(here: Hospital, tmp_path: Path, folder: str, reason: str) -> None:
    assert reason in answer_to(here, DICOM / folder)
    still_works(here, tmp_path / "next")


def a_head(header: Dataset) -> None:
    header.BodyPartExamined = "HEAD"
    header.SeriesDescription = header.StudyDescription = "CT HEAD"


def a_tilt(header: Dataset) -> None:
    header.ImageOrientationPatient = [1, 0, 0, 0, 0.9511, -0.3090]


def no_slope(header: Dataset) -> None:
    del header.RescaleSlope


def a_colour_picture(header: Dataset) -> None:
    header.SOPClassUID = header.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    header.Modality = "OT"


@pytest.mark.parametrize(
    ("change", "settings", "reason"),
    [
        (a_head, {}, "not a chest"),
        (a_tilt, {}, "tilt 18°"),
        (no_slope, {}, "missing RescaleSlope"),
        (a_colour_picture, {}, "no CT images: only 30 secondary captures"),
        (lambda _: None, {"slices": 1}, "too few slices (1)"),
        (lambda _: None, {"missing": (12, 13)}, "missing slices"),
        (lambda _: None, {"patient_age": "012Y"}, "under 18 years"),
    ],
)
def test_named_answers(
    here: Hospital,
    tmp_path: Path,
    change: Callable[[Dataset], None],
    settings: dict[str, object],
    reason: str,
) -> None:
    assert reason in answer_to(here, made_up(tmp_path / "study", change, **settings))
    still_works(here, tmp_path / "next")


def test_broken_pixels_are_named(here: Hospital, tmp_path: Path) -> None:
    def cut(header: Dataset) -> None:
        header.PixelData = header.PixelData[: len(header.PixelData) // 2]

    assert "pixel data" in answer_to(here, made_up(tmp_path / "study", cut))
    still_works(here, tmp_path / "next")


def test_a_file_that_is_not_dicom_never_leaves_the_sender(here: Hospital, tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("not an image")
    (outcome,) = send(here, text)
    assert not outcome.sent
    still_works(here, tmp_path / "next")


def test_a_wrong_uid_is_refused_by_name(
    here: Hospital, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = made_up(tmp_path / "study")
    path = next(folder.iterdir())
    header = dcmread(path)
    header.SOPInstanceUID = generate_uid()  # not the one the command and the file meta information name
    header.save_as(path, enforce_file_format=False)
    with caplog.at_level(logging.WARNING, "triage"):
        (outcome,) = send(here, path)
    assert not outcome.sent
    assert "does not match" in caplog.text.lower() or "not_match" in caplog.text.lower()
    still_works(here, tmp_path / "next")
