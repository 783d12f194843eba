"""A real Orthanc routes three real studies to us and gets the results back; the loop ends."""

from __future__ import annotations

import json
import os
import subprocess
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import Dataset, dcmread

from tests import peers
from tests.needs import DATA, needs_data, needs_dcmtk, needs_dicom3tools, needs_orthanc
from triage import config
from triage.db import Database
from triage.domain import DeliveryState, ResultKind, StudyState, WorklistEntry

RICORD, LIDC, ACRIN = "covid_ricord_1012", "lidc_0001", "acrin_013_gap"
ROUTING = (
    "function OnStableStudy(studyId, tags, metadata) RestApiPost('/modalities/triage/store', studyId) end"
)
DICOMWEB = "/usr/share/orthanc/plugins/libOrthancDicomWeb.so"
SEG, SR, PICTURE = (
    "1.2.840.10008.5.1.4.1.1.66.4",
    "1.2.840.10008.5.1.4.1.1.88.34",
    "1.2.840.10008.5.1.4.1.1.7",
)


@dataclass(frozen=True)
class Orthanc:
    """A running Orthanc and its REST API."""

    dicom_port: int
    http_port: int

    def get(self, path: str) -> Any:
        return json.loads(self.read(path))

    def read(self, path: str) -> bytes:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.http_port}{path}", timeout=30) as answer:
            return bytes(answer.read())

    def objects(self) -> list[Dataset]:
        """Everything in the archive that did not come from the scanner, as it lies there."""
        found = []
        for orthanc_id in self.get("/instances"):
            if self.get(f"/instances/{orthanc_id}/simplified-tags")["Modality"] != "CT":
                found.append(dcmread(BytesIO(self.read(f"/instances/{orthanc_id}/file"))))
        return found

    def times_stable(self) -> Counter[str]:
        changes = self.get("/changes?limit=100000")["Changes"]
        return Counter(change["ID"] for change in changes if change["ChangeType"] == "StableStudy")

    def is_idle(self) -> bool:
        jobs = [self.get(f"/jobs/{job}") for job in self.get("/jobs")]
        return all(job["State"] == "Success" for job in jobs)


@contextmanager
def orthanc(folder: Path, triage_port: int, dicom_port: int, *, web: bool = False) -> Iterator[Orthanc]:
    folder.mkdir()
    (folder / "route.lua").write_text(ROUTING)
    running = Orthanc(dicom_port, peers.free_port())
    settings = {
        "Name": "test",
        "StorageDirectory": str(folder / "archive"),
        "IndexDirectory": str(folder / "archive"),
        "DicomAet": "PACS",
        "DicomPort": running.dicom_port,
        "HttpPort": running.http_port,
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": False,
        "StableAge": 2,
        "DicomModalities": {"triage": ["TRIAGE", "127.0.0.1", triage_port]},
        "LuaScripts": [str(folder / "route.lua")],
    }
    if web:  # an archive that is asked: it speaks DICOMweb too, and sends nothing unasked
        settings |= {"Plugins": [DICOMWEB], "LuaScripts": []}
    (folder / "orthanc.json").write_text(json.dumps(settings))
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(["Orthanc", str(folder / "orthanc.json")], stdout=log, stderr=log)
    try:
        peers.wait_until(lambda: _is_up(running), process, folder / "log")
        yield running
    finally:
        process.terminate()
        process.wait(60)


def _is_up(running: Orthanc) -> bool:
    try:
        return bool(running.get("/system"))
    except OSError:
        return False


@contextmanager
def database(settings: config.Config) -> Iterator[Database]:
    db = Database(settings.database.url)
    try:
        yield db
    finally:
        db.close()


def entries_of(settings: config.Config) -> list[WorklistEntry]:
    with database(settings) as db:
        return db.worklist(peers.now(), settings.priority.ordering, 7)


def is_settled(settings: config.Config, orthanc: Orthanc) -> bool:
    """Judged, delivered, and sent back to us by the routing as often as the archive changed."""
    entries = entries_of(settings)
    states = Counter(entry.study.state for entry in entries)
    if states != {StudyState.ANALYZED: 2, StudyState.REJECTED: 1}:
        return False
    if any(entry.deliveries.get(DeliveryState.PENDING) for entry in entries):
        return False
    if not orthanc.is_idle() or sum(orthanc.times_stable().values()) != 5:
        return False
    with database(settings) as db:
        return all(
            len(db.instances(uid)) == len(orthanc.get(f"/studies/{_study(orthanc, uid)['ID']}/instances"))
            for uid in (entry.study.study_instance_uid for entry in entries)
        )


def _study(orthanc: Orthanc, uid: str) -> Any:
    studies = (orthanc.get(f"/studies/{study}") for study in orthanc.get("/studies"))
    return next(study for study in studies if study["MainDicomTags"]["StudyInstanceUID"] == uid)


@needs_orthanc
@needs_data
@needs_dcmtk
@needs_dicom3tools
@pytest.mark.timeout(600)
def test_from_the_scanner_through_orthanc_and_back(tmp_path: Path) -> None:
    listener, archive = peers.free_port(), peers.free_port()
    path = peers.write_config(tmp_path / "daemon", archive, listener={"port": listener})
    settings = config.load(path, {})
    log = tmp_path / "daemon.log"
    with orthanc(tmp_path / "orthanc", listener, archive) as pacs, peers.daemon(path, log) as process:
        for name in (LIDC, RICORD, ACRIN):
            command = ["dcmsend", "--scan-directories", "127.0.0.1", str(archive), str(DATA / "dicom" / name)]
            subprocess.run(command, check=True, env={**os.environ, "TCP_NODELAY": "1"})
        peers.wait_until(lambda: is_settled(settings, pacs), process, log, seconds=300)
        objects = pacs.objects()
    first, *_ = entries = entries_of(settings)
    patients = [entry.study.patient_id for entry in entries]
    assert "RICORD" in patients[0]
    by_patient = {entry.study.patient_id: entry for entry in entries}
    lidc = by_patient["LIDC-IDRI-0001"]
    acrin = by_patient["ACRIN-FLT-Breast_013"]
    assert first.result is not None
    assert first.result.status == "positive"
    assert lidc.result is not None
    assert lidc.result.status == "negative"
    assert patients.index("LIDC-IDRI-0001") > 0
    assert acrin.result is not None
    assert acrin.result.status == "not_analysable"
    assert "missing slices" in acrin.result.reason
    check_objects(objects, entries, tmp_path)


def check_objects(objects: list[Dataset], entries: list[WorklistEntry], folder: Path) -> None:
    """One SR and picture, and where there is a lesion one SEG and key slices; valid; the mask as written."""
    for entry in entries:
        uid, result = entry.study.study_instance_uid, entry.result
        assert result is not None
        mine = [o for o in objects if o.StudyInstanceUID == uid]
        classes = Counter(o.SOPClassUID for o in mine)
        if entry.study.state is StudyState.REJECTED:
            assert not classes
            continue
        assert result.revision == 1
        has_lesion = bool(result.lesion_volume_ml)
        assert classes == {SR: 1, PICTURE: 1 + has_lesion, **({SEG: 1} if has_lesion else {})}
        for number, received in enumerate(mine):
            file = folder / f"{uid}.{number}.dcm"
            received.save_as(file)
            checked = subprocess.run(["dciodvfy", str(file)], capture_output=True, text=True, check=False)
            assert "Error" not in checked.stderr, checked.stderr
        if has_lesion:
            (seg,) = (o for o in mine if o.SOPClassUID == SEG)
            written = dcmread(result.files[ResultKind.LESION_SEG])
            np.testing.assert_array_equal(seg.pixel_array, written.pixel_array)
            assert seg.PerFrameFunctionalGroupsSequence == written.PerFrameFunctionalGroupsSequence
