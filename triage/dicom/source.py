"""What our objects inherit from the received series: geometry, and who and which study it is of.

Scanners and de-identification tools leave broken attributes behind; copied along they would make our
objects invalid. ``COPIED`` is the written table of what is taken, what is repaired and what is left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydicom.datadict import dictionary_VR
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.tag import Tag
from pydicom.valuerep import DA, TM

from triage.dicom.header import BROKEN, character_set, parse, read_bytes, split
from triage.dicom.uids import derive
from triage.domain import Instance, Series

LONGEST_TEXT = 64
"""Characters of a Long String and of a code's meaning."""
LONGEST_CODE = 16
"""Characters of CodeValue and of a coding scheme's name."""
CONTROLS = r"[\x00-\x1a\x1c-\x1f\x7f]+"
"""All but Escape, which changes the character set in the midst of a text."""
METHOD_UNKNOWN = "not told by the source"


@dataclass(frozen=True, slots=True)
class Rule:
    """What of an attribute is taken: ``words`` say it in deploy/CONFORMANCE.md, ``value`` does it.

    ``value`` gives what to write of a sound or repaired attribute, and None of any other. The bytes of text
    are handed on as they came where nothing is to be repaired, or where there is no ``value``.
    """

    words: str
    value: Callable[[DataElement], Any] | None = None


def _text(element: DataElement) -> Any:
    """None also where the bytes are not of the character set that the source names."""
    texts = [re.sub(CONTROLS, " ", str(text or "")) for text in _values(element)]
    sound = [text.strip()[:LONGEST_TEXT] for text in texts]
    return sound if any(sound) and not any("\ufffd" in text for text in sound) else None


def _date(element: DataElement) -> str | None:
    return f"{DA(str(element.value)):%Y%m%d}" if element.value else None


def _time(element: DataElement) -> str | None:
    return str(element.value) if element.value and TM(str(element.value)) else None


def _one_of(*terms: str) -> Callable[[DataElement], str | None]:
    return lambda element: element.value if element.value in terms else None


def _age(element: DataElement) -> str | None:
    return element.value if re.fullmatch(r"\d{3}[DWMY]", str(element.value)) else None


def _positive(element: DataElement) -> str | None:
    text = str(element.value)
    return text if len(text) <= 16 and 0 < float(text) < 10_000 else None


def _references(element: DataElement) -> list[Dataset] | None:
    return _items(element, _reference)


def _reference(item: Dataset) -> Dataset | None:
    return _with(item, "ReferencedSOPClassUID", "ReferencedSOPInstanceUID")


def _coded(element: DataElement) -> list[Dataset] | None:
    return _items(element, _code)


def _code(item: Dataset) -> Dataset | None:
    code = _with(item, "CodeMeaning", "CodingSchemeDesignator")
    value = next((item.get(k) for k in ("CodeValue", "LongCodeValue") if item.get(k)), None)
    if code is None or value is None or len(code.CodingSchemeDesignator) > LONGEST_CODE:
        return None
    code.CodeMeaning = code.CodeMeaning[:LONGEST_TEXT]
    setattr(code, "CodeValue" if len(value) <= LONGEST_CODE else "LongCodeValue", value)
    if 0 < len(item.get("CodingSchemeVersion") or "") <= LONGEST_CODE:
        code.CodingSchemeVersion = item.CodingSchemeVersion
    return None if "\ufffd" in code.CodeMeaning else code


def _items(element: DataElement, sound: Callable[[Dataset], Dataset | None]) -> list[Dataset] | None:
    return [made for item in element.value or () if (made := sound(item)) is not None] or None


def _with(item: Dataset, *keywords: str) -> Dataset | None:
    """These attributes of the item and no other, or None where one is missing."""
    made = Dataset()
    for keyword in keywords:
        if not item.get(keyword):
            return None
        setattr(made, keyword, item.get(keyword))
    return made


AS_RECEIVED = Rule("as received, however odd")
TEXT = Rule("64 characters of it at most, control characters made spaces", _text)
DATE = Rule("a date; 1950.12.31 as 19501231", _date)
TIME = Rule("a time", _time)
MEASURE = Rule("a number above 0", _positive)
CODES = Rule(
    "the items with value, scheme and meaning; a value of more than 16 characters as LongCodeValue", _coded
)

COPIED: Mapping[str, Rule] = {
    # Identity: never altered, byte for byte.
    "PatientID": AS_RECEIVED,
    "PatientName": AS_RECEIVED,
    "StudyInstanceUID": AS_RECEIVED,
    "AccessionNumber": AS_RECEIVED,
    "StudyID": AS_RECEIVED,
    "ReferringPhysicianName": AS_RECEIVED,
    # Patient and study.
    "IssuerOfPatientID": TEXT,
    "PatientBirthDate": DATE,
    "PatientSex": Rule("M, F or O", _one_of("M", "F", "O")),
    "PatientAge": Rule("three digits and D, W, M or Y", _age),
    "PatientSize": MEASURE,
    "PatientWeight": MEASURE,
    "PatientIdentityRemoved": Rule("YES or NO", _one_of("YES", "NO")),
    "DeidentificationMethod": TEXT,
    "DeidentificationMethodCodeSequence": CODES,
    "StudyDate": DATE,
    "StudyTime": TIME,
    "StudyDescription": TEXT,
    "ProcedureCodeSequence": CODES,
    "ReferencedStudySequence": Rule("the items with SOP class and instance", _references),  # Lung_Dx: without
    # Clinical trial, an optional module: taken whole or not at all, see _clinical_trial.
    "ClinicalTrialSponsorName": TEXT,
    "ClinicalTrialProtocolID": TEXT,
    "ClinicalTrialProtocolName": TEXT,
    "ClinicalTrialSiteID": TEXT,
    "ClinicalTrialSiteName": TEXT,
    "ClinicalTrialSubjectID": TEXT,  # ACRIN: empty
    "ClinicalTrialSubjectReadingID": TEXT,
}
"""Attributes taken from the source, and what of them is sound (PS3.3 C.7.1.1, C.7.1.3, C.7.2.1, C.7.2.2)."""

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
    """patient: what every object of ours copies. images: one of each series and SOP class at least.

    No image says whose it is: names reach our objects from ``patient`` alone, byte for byte, past
    highdicom, which prints names that it finds odd (one component is enough).
    """

    patient: Dataset
    images: list[Dataset]


def read(series: Series) -> Source:
    """What the segmentation needs of the series: its first slice, with its place.

    Only that file is opened: all other facts were kept at arrival. Raises Retryable when the file cannot be
    read, Rejected when it is no longer DICOM.
    """
    header = _header(series.instances[0].path)
    frame_of_reference_uid = header.get("FrameOfReferenceUID") or derive("space", series.series_instance_uid)
    return _source(header, [slice_of(series, series.instances[0], str(frame_of_reference_uid))])


def of_instances(instances: Sequence[Instance]) -> Source:
    """What a report needs of the images that it is about; raises as ``read``."""
    kinds = {(one.series_instance_uid, one.sop_class_uid): one for one in reversed(instances)}
    return _source(_header(instances[0].path), [_named(one) for one in reversed(kinds.values())])


def patient(series: Series) -> Dataset:
    """Patient and study attributes of the series by the table ``COPIED``; raises as ``read``."""
    return _patient(_header(series.instances[0].path))


def _source(header: Dataset, images: list[Dataset]) -> Source:
    for keyword in TYPE_2:
        setattr(images[0], keyword, None)
    return Source(_patient(header), images)


def _header(path: Path) -> Dataset:
    transfer_syntax_uid, body = split(read_bytes(path))
    return parse(body, transfer_syntax_uid, ["SpecificCharacterSet", *COPIED, "FrameOfReferenceUID"])


def _patient(header: Dataset) -> Dataset:
    kept = Dataset()
    for keyword, rule in COPIED.items():
        element = _taken(header, keyword, rule) if keyword in header else None
        if element is not None:
            kept[element.tag] = element
        elif keyword in TYPE_2:
            setattr(kept, keyword, "")
    if kept.get("PatientIdentityRemoved") == "YES" and not kept.get("DeidentificationMethodCodeSequence"):
        kept.setdefault("DeidentificationMethod", METHOD_UNKNOWN)
    _clinical_trial(kept)
    if "SpecificCharacterSet" in header or not _is_ascii(kept):
        kept.SpecificCharacterSet = character_set(header)
    return kept


def _taken(header: Dataset, keyword: str, rule: Rule) -> DataElement | RawDataElement | None:
    tag = Tag(keyword)
    vr, raw = dictionary_VR(tag), header.get_item(tag)
    as_received = _bytes(raw, vr) if isinstance(raw, RawDataElement) and raw.value else None
    if rule.value is None:
        return as_received
    try:
        element = header[tag]
        sound = rule.value(element)
    except BROKEN:
        return None
    if sound is None:
        return None
    if as_received is not None and vr == "LO" and sound == _values(element):
        return as_received
    return DataElement(tag, vr, sound)


def _values(element: DataElement) -> list[Any]:
    return list(element.value) if isinstance(element.value, MultiValue) else [element.value]


def _bytes(raw: RawDataElement, vr: str) -> RawDataElement:
    """The value as it came, padded anew."""
    value = (raw.value or b"").rstrip(b"\0 ")
    value += (b"\0" if vr == "UI" else b" ") * (len(value) % 2)
    return RawDataElement(raw.tag, vr, len(value), value, 0, False, True)


def _is_ascii(kept: Dataset) -> bool:
    """Whether nothing that was taken needs a character set."""
    values = (element.value for element in kept.values())
    return all((value if isinstance(value, bytes) else str(value)).isascii() for value in values)


def _clinical_trial(kept: Dataset) -> None:
    """Without sponsor, protocol and a subject there is no Clinical Trial Subject module (PS3.3 C.7.1.3)."""
    subject = "ClinicalTrialSubjectID" in kept or "ClinicalTrialSubjectReadingID" in kept
    if not (subject and "ClinicalTrialSponsorName" in kept and "ClinicalTrialProtocolID" in kept):
        for keyword in [k for k in COPIED if k.startswith("ClinicalTrial") and k in kept]:
            delattr(kept, keyword)
        return
    for keyword in ("ClinicalTrialProtocolName", "ClinicalTrialSiteID", "ClinicalTrialSiteName"):
        kept.setdefault(keyword, "")


def _named(instance: Instance) -> Dataset:
    dataset = Dataset()
    dataset.Modality = instance.modality
    dataset.SOPClassUID = instance.sop_class_uid
    dataset.SOPInstanceUID = instance.sop_instance_uid
    dataset.StudyInstanceUID = instance.study_instance_uid
    dataset.SeriesInstanceUID = instance.series_instance_uid
    return dataset


def slice_of(series: Series, instance: Instance, frame_of_reference_uid: str) -> Dataset:
    """One slice as highdicom needs to know it."""
    dataset = _named(instance)
    dataset.FrameOfReferenceUID = frame_of_reference_uid
    dataset.Rows = instance.rows
    dataset.Columns = instance.columns
    dataset.ImagePositionPatient = list(instance.image_position_patient or ())
    dataset.ImageOrientationPatient = list(series.orientation)
    dataset.PixelSpacing = [series.spacing[1], series.spacing[2]]
    dataset.SliceThickness = instance.slice_thickness or series.spacing[0]
    dataset.SpacingBetweenSlices = series.spacing[0]
    return dataset
