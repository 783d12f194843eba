"""Bytes of a DICOM object → the header facts that choosing and judging need.

Tolerant: scanners write broken optional attributes every day, and a bad age must not lose a study. Only
what identifies an object (its UIDs) is required.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from io import BytesIO
from itertools import count
from pathlib import Path
from typing import Any

import pydicom
from pydicom.charset import STAND_ALONE_ENCODINGS, convert_encodings, python_encoding
from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset
from pydicom.errors import BytesLengthException
from pydicom.filereader import data_element_generator
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from triage.dicom import elements
from triage.domain import Instance, Vector
from triage.errors import Rejected, Retryable

# Values are checked here, one by one; pydicom's own complaints would put patient data into warnings.
pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE

BROKEN = (
    ValueError, TypeError, KeyError, AttributeError, NotImplementedError, OverflowError, struct.error,
    BytesLengthException, EOFError, OSError, RecursionError,
)  # fmt: skip
"""What pydicom raises when a value cannot be understood; OSError is its word for a cut sequence, and
RecursionError for sequences in sequences without end.
"""

UID_NAME = re.compile(r"[0-9][0-9.]{0,63}", re.ASCII)
"""A UID as tolerant as scanners need it, and as strict as the name of a file or folder must be."""

HEAD = 132
"""Bytes after which it shows whether a file may be DICOM."""
LARGEST_INFLATED = 2 * 1024**3
MOST_INFLATED = 20
"""Times its size that a large deflated data set may unpack to: images never shrink as much, only bombs."""
SMALL = 64 * 1024**2
"""Bytes that any deflated data set may unpack to."""
MOST_ELEMENTS = 100_000
PIXEL_GROUP = 0x7FE00000
LONG_LENGTH_VRS = (b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV")
SCANNER = ("Manufacturer", "ManufacturerModelName")
KEYWORDS = (
    "SpecificCharacterSet", "ImageType", "SOPClassUID", "SOPInstanceUID", "StudyDate", "AccessionNumber",
    "Modality", "StudyDescription", "SeriesDescription", "PatientName", "PatientID", "PatientBirthDate",
    "PatientAge", "BodyPartExamined", "SliceThickness", "GantryDetectorTilt", "ConvolutionKernel",
    "StudyInstanceUID", "SeriesInstanceUID", "InstanceNumber", "ImagePositionPatient",
    "ImageOrientationPatient", "NumberOfFrames", "Rows", "Columns", "PixelSpacing", "RescaleIntercept",
    "RescaleSlope", "RequestAttributesSequence", "RequestedProcedurePriority", *SCANNER,
)  # fmt: skip
"""The attributes an Instance is made of."""
WANTED = elements.wanted(KEYWORDS, {"RequestAttributesSequence": ["RequestedProcedurePriority"]})

DAYS = {"D": 1.0, "W": 7.0, "M": 365.25 / 12, "Y": 365.25}
"""Units of an Age String (PS3.5 section 6.2) in days."""


def read_instance(path: Path, digest: str | None = None) -> Instance:
    """The header facts of the object in ``path``; ``digest`` spares the hashing where it is known.

    Raises Rejected ("not a DICOM file", a missing UID) or Retryable (the file cannot be read).
    """
    transfer_syntax_uid, body = split(read_bytes(path))
    dataset = parse(body, transfer_syntax_uid, KEYWORDS)
    return instance_of(dataset, transfer_syntax_uid, path, digest or digest_of(body))


def facts_of(body: bytes | memoryview, transfer_syntax_uid: str) -> elements.Facts | None:
    """What ``instance_of`` needs of a whole data set, quickly; None where only ``parse`` can tell."""
    if transfer_syntax_uid in (DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian):
        return None
    return elements.find(body, WANTED, explicit=_is_explicit(body))


def instance_of(
    dataset: Dataset | elements.Facts, transfer_syntax_uid: str, path: Path, digest: str
) -> Instance:
    """The header facts of a parsed data set (pixel data is not needed).

    Raises Rejected when an identifying UID is missing or none, and so could not name a file.
    """
    return Instance(
        study_instance_uid=_uid(dataset, "StudyInstanceUID"),
        series_instance_uid=_uid(dataset, "SeriesInstanceUID"),
        sop_instance_uid=_uid(dataset, "SOPInstanceUID"),
        sop_class_uid=_uid(dataset, "SOPClassUID"),
        transfer_syntax_uid=transfer_syntax_uid,
        path=path,
        digest=digest,
        modality=_text(dataset, "Modality").upper(),
        image_type=tuple(part.strip().upper() for part in _texts(dataset, "ImageType")),
        rows=_whole(dataset, "Rows") or 0,
        columns=_whole(dataset, "Columns") or 0,
        number_of_frames=_whole(dataset, "NumberOfFrames") or 1,
        instance_number=_whole(dataset, "InstanceNumber"),
        image_position_patient=_position(dataset),
        image_orientation_patient=_numbers(dataset, "ImageOrientationPatient", 6),
        pixel_spacing=_pixel_spacing(dataset),
        slice_thickness=_number(dataset, "SliceThickness"),
        gantry_detector_tilt=_number(dataset, "GantryDetectorTilt"),
        rescale_slope=_number(dataset, "RescaleSlope"),
        rescale_intercept=_number(dataset, "RescaleIntercept"),
        convolution_kernel="\\".join(_texts(dataset, "ConvolutionKernel")),
        scanner=" ".join(filter(None, (_text(dataset, name) for name in SCANNER))),
        body_part_examined=_text(dataset, "BodyPartExamined").upper(),
        series_description=_text(dataset, "SeriesDescription"),
        patient_id=_text(dataset, "PatientID"),
        patient_name=_text(dataset, "PatientName"),
        patient_age_years=_age_years(dataset),
        accession_number=_text(dataset, "AccessionNumber"),
        study_date=_text(dataset, "StudyDate"),
        study_description=_text(dataset, "StudyDescription"),
        requested_procedure_priority=_priority(dataset),
    )


def find_instances(paths: Iterable[Path], threads: int = 2) -> tuple[list[Instance], list[tuple[Path, str]]]:
    """Every DICOM object in the files and folders of ``paths``, and the other files with the reason.

    Folders are walked to the bottom, in a stable order; a file that is named twice is read once.
    """
    files = list(dict.fromkeys(file for path in paths for file in walk(path)))
    with ThreadPoolExecutor(threads) as pool:
        answers = list(pool.map(_instance_or_reason, files))
    found = [answer for answer in answers if isinstance(answer, Instance)]
    refused = [(file, answer) for file, answer in zip(files, answers, strict=True) if isinstance(answer, str)]
    return found, refused


def read_bytes(path: Path) -> bytes:
    """All bytes of a file; raises Retryable, for a disk may come back."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise Retryable(f"cannot read {path}: {error.strerror}") from error


def may_be_dicom(head: bytes) -> bool:
    """False when ``split`` would not take a file that begins with these HEAD bytes."""
    return head[128:132] == b"DICM" or head[:2] == b"\x02\x00" or _starts_like_a_data_set(memoryview(head))


def split(raw: bytes | bytearray) -> tuple[str, memoryview]:
    """Transfer syntax UID and data set of a file (PS3.10 section 7.1).

    Preamble and file meta information may both be missing, as old archives write it; the encoding is then
    guessed from the first element. Raises Rejected for what cannot be DICOM.
    """
    start = 132 if raw[128:132] == b"DICM" else 0
    transfer_syntax_uid, end = _file_meta(raw, start)
    body = memoryview(raw)[end:]
    if len(body) < 8 or not (start or _starts_like_a_data_set(body)):
        raise Rejected("not a DICOM file")
    if not transfer_syntax_uid:
        transfer_syntax_uid = ExplicitVRLittleEndian if _is_explicit(body) else ImplicitVRLittleEndian
    return transfer_syntax_uid, body


def digest_of(body: bytes | memoryview) -> str:
    """SHA-256 (hex) of a data set as received; the file meta information belongs to the receiver."""
    return hashlib.sha256(body).hexdigest()


def parse(
    body: bytes | memoryview, transfer_syntax_uid: str, keywords: Sequence[str] = (), *, pixels: bool = False
) -> Dataset:
    """The attributes ``keywords`` (all, when empty) of a data set without file meta information.

    Stops before the pixel data unless ``pixels``. Raises Rejected for bytes that are no data set.
    """
    try:
        plain = _inflated(body) if transfer_syntax_uid == DeflatedExplicitVRLittleEndian else body
        little = transfer_syntax_uid != ExplicitVRBigEndian
        # Mislabelled files exist; the first element says the truth for little endian.
        implicit = little and not _is_explicit(plain)
        tags = [tag for keyword in keywords if (tag := tag_for_keyword(keyword)) is not None]
        stop = _end(pixels=pixels)
        elements = data_element_generator(BytesIO(plain), implicit, little, stop, specific_tags=tags or None)
        dataset = Dataset({element.tag: element for element in elements})
        dataset.set_original_encoding(implicit, little, convert_encodings(character_set(dataset)))
    except (zlib.error, *BROKEN) as error:
        raise Rejected("not a readable DICOM data set") from error
    return dataset


def _inflated(body: bytes | memoryview) -> bytes:
    """A deflated data set, as far as one fits into memory: what a few bytes blow up to is refused."""
    inflater = zlib.decompressobj(-15)
    plain = inflater.decompress(body, min(LARGEST_INFLATED, max(SMALL, MOST_INFLATED * len(body))))
    if inflater.unconsumed_tail:
        raise Rejected("deflated data set unpacks to more than any image has")
    if not inflater.eof:
        raise zlib.error("incomplete stream")
    return plain


def _end(*, pixels: bool) -> Callable[[int, str | None, int], bool]:
    """Ends a data set before its pixels unless they are wanted, and behind MOST_ELEMENTS whatever they are.

    Megabytes of zeros behind the pixels, as some archives pad with, are millions of empty elements.
    """
    seen = count(1)
    return lambda tag, _vr, _length: next(seen) > MOST_ELEMENTS or (not pixels and int(tag) >= PIXEL_GROUP)


def _file_meta(raw: bytes | bytearray, start: int) -> tuple[str, int]:
    """Transfer syntax UID ("" when not told) and the offset behind group 0002 (explicit little endian)."""
    transfer_syntax_uid, at = "", start
    while raw[at : at + 2] == b"\x02\x00" and len(raw) >= at + 12:
        if raw[at + 4 : at + 6] in LONG_LENGTH_VRS:
            value, length = at + 12, int.from_bytes(raw[at + 8 : at + 12], "little")
        else:
            value, length = at + 8, int.from_bytes(raw[at + 6 : at + 8], "little")
        if raw[at + 2 : at + 4] == b"\x10\x00":
            transfer_syntax_uid = raw[value : value + length].decode("ascii", "replace").strip("\0 ")
        at = value + length
    return transfer_syntax_uid, at


def _is_explicit(body: bytes | memoryview) -> bool:
    return bytes(body[4:6]).isalpha() and bytes(body[4:6]).isupper()


def _starts_like_a_data_set(body: memoryview) -> bool:
    """True for group 0008 first: nothing else begins with these bytes often enough to matter."""
    length = int.from_bytes(body[6:8] if _is_explicit(body) else body[4:8], "little")
    return bytes(body[:2]) == b"\x08\x00" and length < 256


def character_set(dataset: Dataset) -> list[str]:
    """SpecificCharacterSet in the standard's terms (PS3.3 C.12.1.1.2), misspelt ones corrected.

    ISO_IR 100, in which every byte is a character, where none is told, or one that nobody knows.
    """
    terms = [_term(text) for text in _texts(dataset, "SpecificCharacterSet")]
    known = all(term in python_encoding for term in terms)
    if not any(terms) or not known or terms in (["ISO_IR 6"], ["ISO 2022 IR 6"]):
        return ["ISO_IR 100"]
    if terms[0] in STAND_ALONE_ENCODINGS:
        return terms[:1]
    return [term for term in terms if term not in STAND_ALONE_ENCODINGS]


def _term(text: str) -> str:
    """ "ISO-IR 192" and "UTF-8" as "ISO_IR 192", "iso_2022_ir 87" as "ISO 2022 IR 87"."""
    found = re.fullmatch(r"ISO[ _-]?(2022)?[ _-]?IR[ _-]?(\d+)", text.upper())
    if found is None:
        return {"UTF-8": "ISO_IR 192", "UTF8": "ISO_IR 192"}.get(text.upper(), text)
    return f"ISO 2022 IR {found[2]}" if found[1] else f"ISO_IR {found[2]}"


def walk(path: Path) -> Iterator[Path]:
    """The file itself, or every file below a folder, in a stable order.

    Raises Retryable for a folder that cannot be listed: what lies there would be missed.
    """
    if path.is_dir():
        below = (
            Path(folder, name) for folder, _, names in os.walk(path, onerror=_unlisted) for name in names
        )
        yield from (file for file in sorted(below) if file.is_file())
    else:
        yield path


def _unlisted(error: OSError) -> None:
    raise Retryable(f"cannot list {error.filename}: {error.strerror}") from error


def _instance_or_reason(path: Path) -> Instance | str:
    try:
        return read_instance(path)
    except (Rejected, Retryable) as error:
        return str(error)


def _value(dataset: Dataset | elements.Facts, keyword: str) -> Any:
    try:
        return dataset.get(keyword)
    except BROKEN:
        return None


def _values(dataset: Dataset | elements.Facts, keyword: str) -> list[Any]:
    value = _value(dataset, keyword)
    if value is None or isinstance(value, pydicom.Sequence):  # what is no text is not made one
        return []
    return list(value) if isinstance(value, pydicom.multival.MultiValue | list) else [value]


def _texts(dataset: Dataset | elements.Facts, keyword: str) -> list[str]:
    """Without the escape sequence that pydicom leaves in text of ISO 2022 IR 58."""
    return [str(value).replace("\x1b$)A", "").strip("\0 ") for value in _values(dataset, keyword)]


def _text(dataset: Dataset | elements.Facts, keyword: str) -> str:
    return next(iter(_texts(dataset, keyword)), "")


def _uid(dataset: Dataset | elements.Facts, keyword: str) -> str:
    uid = _text(dataset, keyword)
    if not uid:
        raise Rejected(f"missing {keyword}")
    if not UID_NAME.fullmatch(uid):
        raise Rejected(f"{keyword} is not a UID")
    return uid


def _numbers(dataset: Dataset | elements.Facts, keyword: str, count: int) -> tuple[float, ...] | None:
    try:
        numbers = tuple(float(value) for value in _values(dataset, keyword))
    except BROKEN:
        return None
    finite = all(abs(number) < 1e9 for number in numbers)
    return numbers if len(numbers) == count and finite else None


def _number(dataset: Dataset | elements.Facts, keyword: str) -> float | None:
    numbers = _numbers(dataset, keyword, 1)
    return numbers[0] if numbers else None


def _whole(dataset: Dataset | elements.Facts, keyword: str) -> int | None:
    number = _number(dataset, keyword)
    return None if number is None else int(number)


def _position(dataset: Dataset | elements.Facts) -> Vector | None:
    numbers = _numbers(dataset, "ImagePositionPatient", 3)
    return None if numbers is None else (numbers[0], numbers[1], numbers[2])


def _pixel_spacing(dataset: Dataset | elements.Facts) -> tuple[float, float] | None:
    numbers = _numbers(dataset, "PixelSpacing", 2)
    return (numbers[0], numbers[1]) if numbers and min(numbers) > 0 else None


def _age_years(dataset: Dataset | elements.Facts) -> float | None:
    """PatientAge ("042Y", "018M"), else the time between birth and study."""
    match = re.fullmatch(r"(\d{1,3})([DWMY])", _text(dataset, "PatientAge").upper())
    if match:
        return int(match[1]) * DAYS[match[2]] / DAYS["Y"]
    try:
        born = datetime.strptime(_text(dataset, "PatientBirthDate"), "%Y%m%d")
        studied = datetime.strptime(_text(dataset, "StudyDate"), "%Y%m%d")
    except ValueError:
        return None
    days = (studied - born).days
    return days / DAYS["Y"] if days >= 0 else None


def _priority(dataset: Dataset | elements.Facts) -> str:
    """RequestedProcedurePriority (0040,1003), of the data set or of a request it answers."""
    requests = _value(dataset, "RequestAttributesSequence")
    items = list(requests) if isinstance(requests, pydicom.sequence.Sequence | list) else []
    texts = (_text(item, "RequestedProcedurePriority").upper() for item in (dataset, *items))
    return next((text for text in texts if text), "")
