"""A study that was not judged is reported once, where the site wants it; a later answer replaces that."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset

from tests import peers
from tests.hospital import Hospital, hospital
from tests.results import NOW
from triage import assemble, predict, unjudged
from triage.config import Config, Results
from triage.dicom import phantom
from triage.dicom.header import find_instances
from triage.domain import DeliveryState, Instance, ResultKind, StudyState, Volume
from triage.errors import Retryable

Ward = tuple[Hospital, list[Instance]]
HOLE = range(12, 18)
"""These slices come later, or never."""


@pytest.fixture
def ward(tmp_path: Path) -> Iterator[Ward]:
    wanted = {"sr_not_judged": True}
    with (
        peers.pacs(tmp_path / "pacs") as (port, received),
        hospital(tmp_path / "daemon", port, results=wanted) as built,
    ):
        yield built, received


@pytest.fixture
def study(tmp_path: Path) -> Path:
    phantom.write_study(tmp_path / "study", seed=3, slices=30, rows=64, slice_spacing=8.0)
    return tmp_path / "study"


@pytest.fixture
def rest(study: Path, tmp_path: Path) -> Path:
    """What is missing of the study, taken out of it."""
    (tmp_path / "rest").mkdir()
    files = sorted(study.iterdir(), key=lambda file: dcmread(file).ImagePositionPatient[2])
    for number in HOLE:
        shutil.move(files[number], tmp_path / "rest")
    return tmp_path / "rest"


def uid_of(study: Path) -> str:
    return str(dcmread(next(study.iterdir())).StudyInstanceUID)


def told(report: Path) -> tuple[str, str]:
    """The answer and the CAD summary of a report."""

    def items(dataset: Dataset) -> Iterator[Dataset]:
        for item in dataset.get("ContentSequence", ()):
            yield item
            yield from items(item)

    codes = {
        item.ConceptNameCodeSequence[0].CodeMeaning: item.ConceptCodeSequence[0].CodeValue
        for item in items(dcmread(report))
        if item.ValueType == "CODE"
    }
    return codes["Triage result"], codes["CAD Processing and Findings Summary"]


def replaced(report: Path) -> str:
    (document,) = dcmread(report).PredecessorDocumentsSequence
    return str(document.ReferencedSeriesSequence[0].ReferencedSOPSequence[0].ReferencedSOPInstanceUID)


def reports(received: list[Instance]) -> list[Path]:
    return [instance.path for instance in received if instance.modality == "SR"]


def test_not_analysable_is_reported_once_and_replaced_when_the_images_come(
    ward: Ward, study: Path, rest: Path
) -> None:
    here, pacs = ward
    peers.scan(study, here.config)
    here.work()
    assert here.entry(uid_of(study)).study.state is StudyState.REJECTED
    (report,) = [instance.path for instance in pacs]
    assert told(report) == ("not-analysable", "111245")
    here.requeue(uid_of(study))
    here.work()
    assert len(pacs) == 1
    assert len(here.db.results(uid_of(study))) == 1

    peers.scan(rest, here.config)
    here.work()
    entry = here.entry(uid_of(study))
    assert entry.study.state is StudyState.ANALYZED
    assert entry.deliveries == {DeliveryState.SENT: 5}
    first, second = reports(pacs)
    assert told(second)[0] == "10828004"
    assert replaced(second) == dcmread(first).SOPInstanceUID


def test_given_up_is_reported_and_replaced_when_the_fault_is_mended(ward: Ward, study: Path) -> None:
    here, pacs = ward
    sound, here.model = here.model, Broken()
    peers.scan(study, here.config)
    for _ in range(here.config.analysis.maximum_attempts):
        assert pacs == []  # it may still succeed
        with pytest.raises(ZeroDivisionError):
            here.work()
        here.pass_time(10_000)
    here.work()
    (report,) = [instance.path for instance in pacs]
    assert told(report) == ("failed", "111245")
    assert b"ZeroDivisionError" in report.read_bytes()

    here.model = sound
    here.requeue(uid_of(study))
    here.work()
    assert here.entry(uid_of(study)).study.state is StudyState.ANALYZED
    first, second = reports(pacs)
    assert told(second)[0] == "10828004"
    assert replaced(second) == dcmread(first).SOPInstanceUID
    assert len(pacs) == 5


class Broken:
    """A network with a fault of its own."""

    def __getattr__(self, name: str) -> object:
        raise ZeroDivisionError

    def predict(self, volume: Volume) -> object:
        raise ZeroDivisionError


def test_a_judged_study_that_loses_its_answer_replaces_that(ward: Ward, study: Path, rest: Path) -> None:
    here, pacs = ward
    peers.scan(study, here.config)
    here.work()
    peers.scan(rest, here.config)
    here.work()
    strict = here.config.assemble.model_copy(update={"minimum_slices": 100})
    here.config = here.config.model_copy(update={"assemble": strict})
    here.requeue(uid_of(study))
    here.work()
    _, judged, last = reports(pacs)
    assert told(last)[0] == "not-analysable"
    assert replaced(last) == dcmread(judged).SOPInstanceUID


def test_a_disk_that_is_away_delays_the_report(ward: Ward, study: Path, rest: Path, tmp_path: Path) -> None:
    here, pacs = ward
    peers.scan(study, here.config)
    spool = here.config.storage.spool
    spool.rename(tmp_path / "unmounted")
    here.work()
    assert "is the disk mounted?" in here.entry(uid_of(study)).priority.reason
    (tmp_path / "unmounted").rename(spool)
    here.pass_time(assemble.LONGEST_RETRY.total_seconds())
    here.work()
    assert here.entry(uid_of(study)).study.state is StudyState.REJECTED
    assert len(reports(pacs)) == 1


def test_images_too_odd_for_a_report_are_told_without(ward: Ward, study: Path, rest: Path) -> None:
    here, pacs = ward
    peers.scan(study, here.config)
    for instance in here.db.instances(uid_of(study)):
        instance.path.write_bytes(b"no DICOM any longer")
    here.work()
    entry = here.entry(uid_of(study))
    assert entry.study.state is StudyState.REJECTED
    assert "missing slices" in entry.study.reason
    assert pacs == []


def test_the_same_report_has_the_same_uids_and_bytes(study: Path, rest: Path, tmp_path: Path) -> None:
    instances, _ = find_instances([study])
    answer = assemble.not_analysable(instances, "missing slices")

    def uids(folder: str, **changes: object) -> set[str]:
        wanted = replace(answer, **changes)
        result, (report,) = unjudged.tell(wanted, instances, (), Results(), tmp_path / folder, NOW)
        assert result.sr_sop_instance_uid == report.sop_instance_uid
        dataset = dcmread(report.path)
        return {dataset.SOPInstanceUID, dataset.SeriesInstanceUID}

    assert uids("a") == uids("b")
    assert (tmp_path / "a" / "sr.dcm").read_bytes() == (tmp_path / "b" / "sr.dcm").read_bytes()
    assert not uids("a") & uids("c", reason="another reason")


def test_a_full_disk_is_told(study: Path, rest: Path, tmp_path: Path) -> None:
    instances, _ = find_instances([study])
    (tmp_path / "full").write_bytes(b"")
    with pytest.raises(Retryable, match="cannot"):
        unjudged.tell(
            assemble.not_analysable(instances, "why"), instances, (), Results(), tmp_path / "full" / "x", NOW
        )


@pytest.mark.parametrize("wanted", [True, False])
def test_predict_writes_it_where_it_is_wanted(study: Path, rest: Path, tmp_path: Path, wanted: bool) -> None:
    config = Config(results=Results(sr_not_judged=wanted))
    (answer,) = predict.predict(predict.find([study]), tmp_path / "out", Broken(), config, NOW)
    assert answer.status == "not_analysable"
    assert [path.name for path in tmp_path.glob("out/*/*")] == (["sr.dcm"] if wanted else [])
    assert (ResultKind.SR in answer.files) is wanted
