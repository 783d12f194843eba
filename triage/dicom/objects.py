"""What all our objects share: who made them, how they are numbered, and how they reach the disk."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from io import BytesIO
from pathlib import Path
from typing import Any

import highdicom
from pydicom.charset import convert_encodings, default_encoding
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.filewriter import correct_ambiguous_vr
from pydicom.sequence import Sequence
from pydicom.tag import Tag
from pydicom.uid import (
    UID,
    Comprehensive3DSRStorage,
    ComprehensiveSRStorage,
    EnhancedSRStorage,
    MultiFrameTrueColorSecondaryCaptureImageStorage,
    SecondaryCaptureImageStorage,
    SegmentationStorage,
)
from pydicom.valuerep import DA, DT, TM

from triage import __version__
from triage.dicom import stamp
from triage.dicom.files import write_durably
from triage.dicom.uids import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME, derive
from triage.domain import ModelInfo, Result, ResultKind, ResultObject

MANUFACTURER = "triage"
DISCLAIMER = "Research use, not a medical device"
SERIES_NUMBERS = {
    ResultKind.LESION_SEG: 9001,
    ResultKind.LUNG_SEG: 9002,
    ResultKind.SR: 9003,
    ResultKind.PICTURE: 9004,
    ResultKind.VIEW_3D: 9005,
    ResultKind.KEY_SLICES: 9006,
}
"""High, so that viewers list our series after the scanner's."""
_SEGMENTATIONS = (SegmentationStorage, UID("1.2.840.10008.5.1.4.1.1.66.7"))
SOP_CLASSES: Mapping[ResultKind, tuple[UID, ...]] = {
    ResultKind.LESION_SEG: _SEGMENTATIONS,
    ResultKind.LUNG_SEG: _SEGMENTATIONS,
    ResultKind.SR: (Comprehensive3DSRStorage, ComprehensiveSRStorage, EnhancedSRStorage),
    ResultKind.PICTURE: (SecondaryCaptureImageStorage,),
    ResultKind.KEY_SLICES: (SecondaryCaptureImageStorage,),
    ResultKind.VIEW_3D: (MultiFrameTrueColorSecondaryCaptureImageStorage,),
}
"""What each object may be, by the settings: who stores our results must take these. 66.7 is the label map."""
DESCRIPTIONS = {
    ResultKind.LESION_SEG: "triage: lesions (research use)",
    ResultKind.LUNG_SEG: "triage: lungs (research use)",
    ResultKind.SR: "triage: report (research use)",
    ResultKind.PICTURE: "triage: summary (research use)",
    ResultKind.VIEW_3D: "triage: 3D view, turning (research use)",
    ResultKind.KEY_SLICES: "triage: key slices (research use)",
}


def series_instance_uid(kind: ResultKind, result: Result) -> str:
    """UID of the series of this kind and content key."""
    return derive(f"series of {kind.value}", result.study_instance_uid, result.content_key)


def identity(kind: ResultKind, result: Result, info: ModelInfo | None, now: datetime) -> dict[str, Any]:
    """Keyword arguments that highdicom's constructors share: UIDs, numbers, equipment, local date and time.

    One series for each kind and revision: (study, content key, kind) give the UIDs. Without ``info`` no
    network had a part in it.
    """
    moment = now.astimezone()
    network = [] if info is None else [f"{info.name} {info.version}"[:64]]
    return {
        "series_instance_uid": series_instance_uid(kind, result),
        "sop_instance_uid": derive(kind.value, result.study_instance_uid, result.content_key),
        "series_number": SERIES_NUMBERS[kind],
        "instance_number": 1,
        "series_description": DESCRIPTIONS[kind],
        "content_date": moment.date(),
        "content_time": moment.time().replace(tzinfo=None),
        "manufacturer": MANUFACTURER,
        "manufacturer_model_name": MANUFACTURER if info is None else f"{MANUFACTURER} {info.name}"[:64],
        "software_versions": [f"triage {__version__}"[:64], *network],
        "device_serial_number": __version__ if info is None else info.version[:64],
    }


def write(
    kind: ResultKind,
    dataset: Dataset,
    patient: Dataset,
    folder: Path,
    now: datetime,
    encoded: Iterable[stamp.Encoded] = (),
) -> ResultObject:
    """Give the object its patient and its time of making, and put it durably into the folder.

    ``encoded`` are sequences of it, or within it, that are bytes already. One folder belongs to one content
    key. Raises Retryable when the disk refuses.
    """
    dataset.update(patient)
    moment = now.astimezone()
    dataset.InstanceCreationDate = DA(moment.date())
    dataset.InstanceCreationTime = TM(moment.time().replace(tzinfo=None))
    for part in dataset.get("ContributingEquipmentSequence", ()):
        if part.get("ManufacturerModelName") == highdicom.__name__:  # it looks at the clock itself
            part.ContributionDateTime = DT(moment.replace(tzinfo=None))
    dataset.file_meta.ImplementationClassUID = UID(IMPLEMENTATION_CLASS_UID)
    dataset.file_meta.ImplementationVersionName = IMPLEMENTATION_VERSION_NAME
    buffer = BytesIO()
    _keep_bytes(dataset)
    for made in encoded:
        _put(made)
    dataset.save_as(buffer, enforce_file_format=True)
    path = folder / f"{kind.value}.dcm"
    write_durably(path, buffer.getbuffer())
    return ResultObject(kind, path, str(dataset.SOPInstanceUID), str(dataset.SOPClassUID))


def _keep_bytes(dataset: Dataset) -> None:
    """Have the patient's bytes written as they are: pydicom cannot write again all that it reads."""
    correct_ambiguous_vr(dataset, True)
    _as_it_will_be(dataset)


def _as_it_will_be(dataset: Dataset) -> None:
    """Say that it is encoded so already: pydicom then keeps bytes, and leaves ambiguous VRs to us."""
    terms = dataset.get("SpecificCharacterSet")
    dataset.set_original_encoding(False, True, convert_encodings(terms) if terms else default_encoding)
    for element in dataset.elements():
        if isinstance(element.value, Sequence):
            for item in element.value:
                _as_it_will_be(item)


def _put(made: stamp.Encoded) -> None:
    tag = Tag(made.keyword)
    made.holder[tag] = RawDataElement(tag, "SQ", len(made.items), made.items, 0, False, True)


ASCII_FOR = {"–": "-", "—": "-", "≤": "<=", "≥": ">=", "…": "...", "×": "x", "\u202f": " ", "\xa0": " "}


def plain(text: str) -> str:
    """ASCII, which every source's character set can write; typography is replaced, the rest becomes '?'."""
    for character, replacement in ASCII_FOR.items():
        text = text.replace(character, replacement)
    return text.encode("ascii", "replace").decode()
