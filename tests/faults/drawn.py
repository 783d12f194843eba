"""Data sets drawn by structure: sequences in sequences, private elements, wrong lengths, character sets."""

from __future__ import annotations

import json
import struct
import time
import warnings
import zlib
from datetime import timedelta
from functools import cache
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from pydicom.dataelem import RawDataElement
from pydicom.filereader import data_element_generator
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from tests.faults.children import running
from tests.faults.inputs import image
from tests.faults.mutations import LENGTHS, TAGS, TEXTS, VRS
from tests.faults.readers import STUCK, attempted, limit_memory, read_image
from tests.faults.table import Context, Row
from tests.objects import save
from triage.dicom import header
from triage.dicom.elements import LONG

SYNTAXES = (ExplicitVRLittleEndian, ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian)
CHARSETS = (
    b"",
    b"ISO_IR 100",
    b"ISO_IR 192",
    b"GB18030",
    b"\\ISO 2022 IR 87",
    b"ISO 2022 IR 6\\ISO 2022 IR 149",
    b"ISO 2022 IR 58\\GBK",
    b"\\" * 20,
    b"ISO_IR 999",
    b"rot13",
    b"\xff\0",
)
KNOWN = (0x00080016, 0x00080018, 0x0020000D, 0x0020000E, 0x00100010, 0x00101010, 0x00280010, 0x00280030)
KNOWN += (0x00200032, 0x00200037, 0x00281052, 0x00400275, 0x00401003, 0x00280008, 0x7FE00010)
PRIVATE = (0x00090010, 0x00091001, 0x00091002, 0x00290010, 0x00291010, 0x7FE11010)
UNDEFINED = 0xFFFFFFFF
BATCH = 1000
"""Between these it is looked whether the time is over."""


class Element(NamedTuple):
    """``items`` make it a sequence; ``length`` is said instead of the true one."""

    tag: int
    vr: bytes
    value: bytes
    items: tuple[tuple[Element, ...], ...] | None = None
    length: int | None = None

    def encoded(self, explicit: bool) -> bytes:
        value, length = self.value, self.length
        if self.items is not None:
            value = b"".join(_item(b"".join(one.encoded(explicit) for one in item)) for item in self.items)
            if length == UNDEFINED:
                value += struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
        length = len(value) if length is None else length
        head = struct.pack("<HH", self.tag >> 16, self.tag & 0xFFFF)
        if not explicit:
            return head + struct.pack("<I", length) + value
        if self.vr in LONG:
            return head + self.vr + struct.pack("<HI", 0, length) + value
        return head + self.vr + struct.pack("<H", length & 0xFFFF) + value


def _item(content: bytes) -> bytes:
    return struct.pack("<HHI", 0xFFFE, 0xE000, len(content)) + content


tags = st.sampled_from(KNOWN) | st.sampled_from(PRIVATE) | st.sampled_from(TAGS)
vrs = st.sampled_from([VRS[at : at + 2] for at in range(0, len(VRS), 2)])
lengths = st.none() | st.none() | st.sampled_from(LENGTHS) | st.integers(0, 300)
values = st.sampled_from(TEXTS) | st.binary(max_size=24)
leaves = st.builds(Element, tags, vrs, values, st.none(), lengths)
elements = st.recursive(
    leaves,
    lambda inner: st.builds(
        Element,
        tags,
        st.sampled_from([b"SQ", b"UN"]),
        st.just(b""),
        st.lists(st.lists(inner, max_size=3).map(tuple), max_size=3).map(tuple),
        st.none() | st.just(UNDEFINED) | lengths,
    ),
    max_leaves=8,
)
charsets = st.sampled_from([Element(0x00080005, b"CS", one) for one in CHARSETS])


@cache
def _good(syntax: str) -> tuple[bytes, tuple[Element, ...]]:
    """What stands before the data set of a good image, and its elements but sequences."""
    with TemporaryDirectory() as folder:
        raw = save(image(), Path(folder) / "one.dcm").read_bytes()
        other = save(image(), Path(folder) / "one.dcm", syntax).read_bytes()
    found = data_element_generator(BytesIO(header.split(raw)[1]), False, True)
    raws = (one for one in found if isinstance(one, RawDataElement))
    kept = (Element(int(one.tag), str(one.VR).encode(), one.value or b"") for one in raws)
    return other[: len(other) - len(header.split(other)[1])], tuple(kept)


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """A good image with other elements among its own, or in place of them, mostly in their order."""
    syntax = draw(st.sampled_from(SYNTAXES))
    head, good = _good(syntax)
    drawn = [*draw(st.lists(elements, min_size=1, max_size=5)), *draw(st.lists(charsets, max_size=1))]
    replaced = {one.tag for one in drawn} if draw(st.booleans()) else set()
    whole = [*(one for one in good if one.tag not in replaced), *drawn]
    if draw(st.integers(0, 9)):
        whole.sort(key=lambda one: one.tag)
    body = b"".join(one.encoded(syntax != ImplicitVRLittleEndian) for one in whole)
    if syntax == DeflatedExplicitVRLittleEndian:
        packer = zlib.compressobj(wbits=-15)
        body = packer.compress(body) + packer.flush()
    return head + body


def images(context: Context) -> Row:
    """In a process of its own; what goes wrong is made as small as it can be."""
    row, count = Row(), context.number(300, 100_000)
    with TemporaryDirectory() as name:
        folder = Path(name)
        with running(work, folder, context.seed, count, context.seconds) as process:
            process.join()
            row.expect(process.exitcode == 0, f"the process ended with {process.exitcode}")
        report = folder / "report"
        told = json.loads(report.read_text()) if report.exists() else {}
    row.tries = told.get("done", 0)
    row.wrong += told.get("wrong", [])
    row.figure = f"{100 * told.get('taken', 0) // max(row.tries, 1)} % readable nonetheless"
    return row


def work(folder: Path, number: int, count: int, seconds: float | None) -> None:
    """In a process of its own."""
    warnings.simplefilter("ignore")
    limit_memory()
    told: dict[str, Any] = {"done": 0, "taken": 0, "wrong": []}
    start, path = time.monotonic(), folder / "input.dcm"

    @settings(
        max_examples=min(count, BATCH),
        database=None,
        deadline=timedelta(seconds=STUCK),
        suppress_health_check=list(HealthCheck),
    )
    @given(files())
    def read(raw: bytes) -> None:
        answer, complaint = attempted(read_image, raw, path)
        told["done"] += 1
        told["taken"] += answer == "taken"
        assert not complaint, f"{complaint}: {raw[300:].hex()}"

    try:
        while told["done"] < count and (seconds is None or time.monotonic() - start < seconds):
            seed(f"{number} {told['done']}")(read)()
    except Exception as error:  # noqa: BLE001 - whatever it is goes into the table
        told["wrong"].append(f"{type(error).__name__}: {error}"[:2000])
    (folder / "report").write_text(json.dumps(told))
