"""Small DICOM objects for tests of the network."""

from __future__ import annotations

from pathlib import Path

import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian

from triage.dicom.header import split

STUDY = "1.2.3"
SERIES = "1.2.3.4"
PATIENT = "SECRET^PATIENT"


def ct(number: int, **changes: object) -> Dataset:
    """One tiny CT slice; ``changes`` are DICOM keywords."""
    dataset = Dataset()
    dataset.SOPClassUID = CTImageStorage
    dataset.SOPInstanceUID = f"{SERIES}.{number}"
    dataset.Modality = "CT"
    dataset.PatientName = PATIENT
    dataset.PatientID = "P1"
    dataset.StudyInstanceUID = STUDY
    dataset.SeriesInstanceUID = SERIES
    dataset.InstanceNumber = number
    dataset.Rows = dataset.Columns = 8
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit = 15
    dataset.SamplesPerPixel = 1
    dataset.PixelRepresentation = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.PixelData = bytes([number % 256]) * 128
    for keyword, value in changes.items():
        setattr(dataset, keyword, value)
    return dataset


def save(dataset: Dataset, path: Path, syntax: str = ExplicitVRLittleEndian, **meta: str) -> Path:
    """Write a file; ``meta`` lets the file meta information, and so the command, say something else."""
    dataset.preamble = b"\0" * 128
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.MediaStorageSOPClassUID = UID(meta.get("sop_class_uid", dataset.SOPClassUID))
    dataset.file_meta.MediaStorageSOPInstanceUID = UID(meta.get("sop_instance_uid", dataset.SOPInstanceUID))
    dataset.file_meta.TransferSyntaxUID = UID(syntax)
    path.parent.mkdir(parents=True, exist_ok=True)
    pydicom.dcmwrite(path, dataset, enforce_file_format=False)
    return path


def with_body(path: Path, body: bytes) -> Path:
    """The same file meta information before another data set."""
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) - len(split(raw)[1])] + body)
    return path


def body(path: Path) -> bytes:
    """The data set's bytes, file meta information left out."""
    return bytes(split(path.read_bytes())[1])
