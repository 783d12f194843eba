"""The short walk says what pydicom says, or leaves it to pydicom."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import pydicom
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_file_meta_info
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

from tests.needs import DATA, needs_data
from tests.objects import ct
from triage.dicom import header, spool
from triage.domain import Instance
from triage.errors import Rejected

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

SYNTAXES = {True: ExplicitVRLittleEndian, False: ImplicitVRLittleEndian}
RAW = [
    *(b"", b" ", b"\0\0", b"1.2.3\0", b"1.2 ", b"..", b"1.2\n", b" 7 ", b"+7", b"-1.5E3", b"1_0", b"nan"),
    *(b"1\\2\\3", b"\\", b"\\\\1", b"0.5\\0.5", b"1\\0\\0\\0\\1\\0", b"1\\\\2", b"ORIGINAL\\PRIMARY"),
    *(b"M\xfcller^J", "Müller^J".encode(), b"A=B", b"A^B^^ ", b"\x1b$B;3ED\x1b(B", b"\xff\xfe\xfd"),
    *(b"ISO_IR 100", b"ISO_IR 192", b"UTF-8", b"ISO_IR 13", b"\\ISO 2022 IR 87", b"GB18030", b"no such"),
    *(b"042Y", b"19800230", b"20200101", b"\x01\x00", b"\x00\x02\x00\x02", b"\x07", b"1e400", b"a\tb", b" x"),
]  # fmt: skip
KEYWORDS = [keyword for keyword in header.KEYWORDS if keyword != "RequestAttributesSequence"]


def encoded(dataset: Dataset, *, explicit: bool) -> bytes:
    buffer = BytesIO()
    pydicom.dcmwrite(buffer, dataset, implicit_vr=not explicit, little_endian=True)
    return buffer.getvalue()


def slice_of(*, explicit: bool, open_ends: bool, values: dict[str, bytes]) -> bytes:
    """A CT slice with requests in a sequence, and ``values`` as they would never be written."""
    dataset = ct(1, ImageType=["ORIGINAL", "PRIMARY"], PixelSpacing=[0.5, 0.5], SliceThickness="1.25")
    for keyword in ("ReferencedImageSequence", "RequestAttributesSequence"):
        item = Dataset()
        item.ReferencedSOPInstanceUID, item.RequestedProcedurePriority = "1.2.3", "STAT"
        item.is_undefined_length_sequence_item = open_ends
        setattr(dataset, keyword, Sequence([Dataset(), item]))
        dataset[keyword].is_undefined_length = open_ends
    for number, keyword in enumerate(values):
        dataset[keyword] = pydicom.DataElement(keyword, "UT", f"@{number:<11}")
    raw = encoded(dataset, explicit=explicit)
    for number, (keyword, value) in enumerate(values.items()):
        tag = pydicom.tag.Tag(keyword)
        at = raw.index(b"@%-11d" % number)
        key = tag.group.to_bytes(2, "little") + tag.element.to_bytes(2, "little")
        vr = pydicom.datadict.dictionary_VR(tag).encode()
        head = (
            key + vr + len(value).to_bytes(2, "little")
            if explicit
            else key + len(value).to_bytes(4, "little")
        )
        raw = raw[: at - (12 if explicit else 8)] + head + value + raw[at + 12 :]
    return raw


def slowly(raw: bytes, syntax: str) -> Instance | str:
    try:
        return header.instance_of(spool._parsed(raw, syntax), syntax, Path(), "")
    except Rejected as refusal:
        return str(refusal)


def quickly(raw: bytes, syntax: str) -> Instance | str | None:
    facts = header.facts_of(raw, syntax)
    try:
        return facts and header.instance_of(facts, syntax, Path(), "")
    except Rejected as refusal:
        return str(refusal)


@settings(max_examples=250)
@given(
    explicit=st.booleans(),
    open_ends=st.booleans(),
    values=st.dictionaries(
        st.sampled_from(KEYWORDS), st.sampled_from(RAW) | st.binary(max_size=6), max_size=4
    ),
    noise=st.lists(st.tuples(st.floats(0, 0.999), st.binary(min_size=1, max_size=4)), max_size=3),
    end=st.none() | st.floats(0, 1) | st.binary(max_size=12),
)
@example(explicit=True, open_ends=True, values={}, noise=[], end=None)
def test_the_walk_agrees_with_pydicom(
    explicit: bool,
    open_ends: bool,
    values: dict[str, bytes],
    noise: list[tuple[float, bytes]],
    end: float | bytes | None,
) -> None:
    raw = slice_of(explicit=explicit, open_ends=open_ends, values=values)
    for share, wrong in noise:
        at = int(share * len(raw))
        raw = raw[:at] + wrong + raw[at + len(wrong) :]
    if end is not None:
        raw = raw + end if isinstance(end, bytes) else raw[: int(end * len(raw))]
    answer = quickly(raw, SYNTAXES[explicit])
    assert answer in (None, slowly(raw, SYNTAXES[explicit]))
    if not (values or noise) and end in (None, b""):
        assert isinstance(answer, Instance)
        assert answer.requested_procedure_priority == "STAT"


@needs_data
def test_the_walk_reads_real_series_as_pydicom_does() -> None:
    files = sorted((DATA / "dicom").rglob("*.dcm"))
    sure = 0
    for file in files[::3]:
        syntax, body = header.split(file.read_bytes())
        answer = quickly(bytes(body), syntax)
        sure += isinstance(answer, Instance)
        assert answer in (None, slowly(bytes(body), syntax)), file
    assert sure > 0.8 * len(files[::3])


@given(title=st.text(st.sampled_from("ABC 1_"), max_size=16), number=st.integers(0, 10**30))
def test_the_file_meta_information_is_pydicoms(title: str, number: int) -> None:
    instance = header.instance_of(
        header.parse(encoded(ct(1, SOPInstanceUID=f"1.{number}"), explicit=True), ExplicitVRLittleEndian),
        ExplicitVRLittleEndian,
        Path(),
        "",
    )
    raw = spool._file_meta(instance, title)
    meta = pydicom.filereader.read_partial(BytesIO(raw)).file_meta
    buffer = DicomBytesIO()
    write_file_meta_info(buffer, meta)
    assert raw == b"\0" * 128 + b"DICM" + buffer.getvalue()
    assert meta.MediaStorageSOPInstanceUID == f"1.{number}"
    assert meta.SourceApplicationEntityTitle == title.strip()
