"""What our objects inherit from the received series: geometry, and who and which study it is of.

Scanners and de-identification tools leave broken attributes behind; copied along they would make our
objects invalid. ``COPIED`` is the written table of what is taken and when it is left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydicom.charset import python_encoding
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.valuerep import DA, TM

from triage.dicom.header import parse, read_bytes, split
from triage.dicom.uids import derive
from triage.domain import Instance, Series

Check = Callable[[DataElement], bool]


def _as_received(_: DataElement) -> bool:
    return True


def _filled(element: DataElement) -> bool:
    return not element.is_empty


def _character_set(element: DataElement) -> bool:
    terms = [element.value] if element.VM == 1 else element.value or ()
    return bool(terms) and all(term in python_encoding for term in terms)


def _date(element: DataElement) -> bool:
    return _parses(DA, element)


def _time(element: DataElement) -> bool:
    return _parses(TM, element)


def _parses(kind: Callable[[str], object], element: DataElement) -> bool:
    try:
        return element.is_empty or kind(str(element.value)) is not None
    except ValueError:
        return False


def _sex(element: DataElement) -> bool:
    return element.is_empty or element.value in ("M", "F", "O")


def _age(element: DataElement) -> bool:
    return re.fullmatch(r"\d{3}[DWMY]", str(element.value)) is not None


def _positive(element: DataElement) -> bool:
    return element.VM == 1 and not element.is_empty and float(element.value) > 0


def _references(element: DataElement) -> bool:
    return _complete(element, ("ReferencedSOPClassUID",), ("ReferencedSOPInstanceUID",))


def _coded(element: DataElement) -> bool:
    return _complete(
        element, ("CodeValue", "LongCodeValue", "URNCodeValue"), ("CodeMeaning",), ("CodingSchemeDesignator",)
    )


def _complete(element: DataElement, *needed: tuple[str, ...]) -> bool:
    items = element.value or ()
    return bool(items) and all(any(item.get(k) for k in one_of) for item in items for one_of in needed)


COPIED: Mapping[str, Check] = {
    "SpecificCharacterSet": _character_set,
    # Identity: never altered, however odd.
    "PatientID": _as_received,
    "PatientName": _as_received,
    "IssuerOfPatientID": _filled,
    "StudyInstanceUID": _as_received,
    "AccessionNumber": _as_received,
    "StudyID": _as_received,
    "ReferringPhysicianName": _as_received,
    # Patient and study, left out (type 2: emptied) where the value is not what the standard allows.
    "PatientBirthDate": _date,
    "PatientSex": _sex,
    "PatientAge": _age,
    "PatientSize": _positive,
    "PatientWeight": _positive,
    "PatientIdentityRemoved": _filled,
    "DeidentificationMethod": _filled,
    "DeidentificationMethodCodeSequence": _coded,
    "StudyDate": _date,
    "StudyTime": _time,
    "StudyDescription": _filled,
    "ProcedureCodeSequence": _coded,
    "ReferencedStudySequence": _references,  # Lung_Dx: items without their SOP class
    # Clinical trial, an optional module: taken whole or not at all, see _clinical_trial.
    "ClinicalTrialSponsorName": _filled,
    "ClinicalTrialProtocolID": _filled,
    "ClinicalTrialProtocolName": _as_received,
    "ClinicalTrialSiteID": _as_received,
    "ClinicalTrialSiteName": _as_received,
    "ClinicalTrialSubjectID": _filled,  # ACRIN: empty
    "ClinicalTrialSubjectReadingID": _filled,
}
"""Attributes taken from the source, and when each is sound (PS3.3 C.7.1.1, C.7.1.3, C.7.2.1, C.7.2.2)."""

TYPE_2 = (
    "PatientID",
    "PatientName",
    "PatientBirthDate",
    "PatientSex",
    "StudyDate",
    "StudyTime",
    "AccessionNumber",
    "StudyID",
    "ReferringPhysicianName",
)
"""Attributes that every object has, if only empty."""


@dataclass(frozen=True, slots=True)
class Source:
    """patient: what every object of ours copies. slices: one small data set a slice, in series order.

    The first slice also carries the patient, but no name and no character set: highdicom prints names
    that it finds odd (one component is enough), and ours must never show one.
    """

    patient: Dataset
    slices: list[Dataset]


def read(series: Series) -> Source:
    """What the segmentation and the report need of the series.

    Only the first file is opened: all other facts were kept at arrival. Raises Retryable when the file
    cannot be read, Rejected when it is no longer DICOM.
    """
    header = _header(series.instances[0].path)
    patient = _patient(header)
    frame_of_reference_uid = header.get("FrameOfReferenceUID") or derive("space", series.series_instance_uid)
    slices = [_slice(series, instance, str(frame_of_reference_uid)) for instance in series.instances]
    for element in patient:
        if element.keyword not in ("PatientName", "SpecificCharacterSet"):
            slices[0].add(element)
    slices[0].PatientName = None
    return Source(patient, slices)


def patient(series: Series) -> Dataset:
    """Patient and study attributes of the series by the table ``COPIED``; raises as ``read``."""
    return _patient(_header(series.instances[0].path))


def _header(path: Path) -> Dataset:
    transfer_syntax_uid, body = split(read_bytes(path))
    return parse(body, transfer_syntax_uid, [*COPIED, "FrameOfReferenceUID"])


def _patient(header: Dataset) -> Dataset:
    kept = Dataset()
    for keyword, sound in COPIED.items():
        if keyword in header and sound(header[keyword]):
            kept.add(header[keyword])
        elif keyword in TYPE_2:
            setattr(kept, keyword, "")
    return _clinical_trial(kept)


def _clinical_trial(kept: Dataset) -> Dataset:
    """Without sponsor, protocol and a subject there is no Clinical Trial Subject module (PS3.3 C.7.1.3)."""
    subject = "ClinicalTrialSubjectID" in kept or "ClinicalTrialSubjectReadingID" in kept
    if not (subject and "ClinicalTrialSponsorName" in kept and "ClinicalTrialProtocolID" in kept):
        for keyword in [k for k in COPIED if k.startswith("ClinicalTrial") and k in kept]:
            delattr(kept, keyword)
        return kept
    for keyword in ("ClinicalTrialProtocolName", "ClinicalTrialSiteID", "ClinicalTrialSiteName"):
        kept.setdefault(keyword, "")
    return kept


def _slice(series: Series, instance: Instance, frame_of_reference_uid: str) -> Dataset:
    dataset = Dataset()
    dataset.Modality = instance.modality
    dataset.SOPClassUID = instance.sop_class_uid
    dataset.SOPInstanceUID = instance.sop_instance_uid
    dataset.StudyInstanceUID = instance.study_instance_uid
    dataset.SeriesInstanceUID = instance.series_instance_uid
    dataset.FrameOfReferenceUID = frame_of_reference_uid
    dataset.Rows = instance.rows
    dataset.Columns = instance.columns
    dataset.ImagePositionPatient = list(instance.image_position_patient or ())
    dataset.ImageOrientationPatient = list(series.orientation)
    dataset.PixelSpacing = [series.spacing[1], series.spacing[2]]
    dataset.SliceThickness = instance.slice_thickness or series.spacing[0]
    dataset.SpacingBetweenSlices = series.spacing[0]
    return dataset
