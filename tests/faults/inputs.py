"""Good inputs to be made wrong, and wrong ones made by hand."""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from pydicom import Dataset, dcmread, dcmwrite
from pydicom.dataelem import RawDataElement
from pydicom.filereader import data_element_generator
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from tests.faults.mutations import Sample
from tests.needs import DATA
from tests.objects import ct, save
from triage.dicom import header
from triage.dicom.phantom import ENCODERS

PLAIN = (ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian)
SIDE = 32
"""Rows and columns of made-up images: small ones are read quickly."""
LARGEST_REAL = 90_000


@cache
def samples() -> tuple[Sample, ...]:
    """Images in every kind of encoding; headers and a few code streams of real ones where there are any."""
    made = [*_made(), *_real()]
    return tuple(Sample(name, raw, _marks(raw)) for name, raw in made)


def _made() -> Iterator[tuple[str, bytes]]:
    with TemporaryDirectory() as folder:
        for syntax in (*PLAIN, *ENCODERS):
            path = Path(folder) / "one.dcm"
            yield syntax, save(image(syntax), path, syntax).read_bytes()


def image(syntax: str = ExplicitVRLittleEndian, **changes: object) -> Dataset:
    """A slice that can be judged but for its size."""
    values = (np.add.outer(np.arange(SIDE), np.arange(SIDE)) * 20 - 1000).astype(np.int16)
    place = {"ImagePositionPatient": [0, 0, 7], "ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}
    scale = {"RescaleSlope": 1, "RescaleIntercept": 0, "PixelSpacing": [1, 1], "SliceThickness": 1}
    known = {"PatientAge": "050Y", "StudyDate": "20260101", "SpecificCharacterSet": "ISO_IR 192"}
    one = ct(7, **{**place, **scale, **known, "Rows": SIDE, "Columns": SIDE})
    request = Dataset()
    request.RequestedProcedurePriority = "HIGH"
    one.RequestAttributesSequence = [request]
    one.PixelData = values.tobytes()
    if syntax in ENCODERS:
        from pydicom.encaps import encapsulate

        one.PixelData = encapsulate([ENCODERS[syntax](values)])
        one["PixelData"].VR = "OB"
        one["PixelData"].is_undefined_length = True
    for keyword, value in changes.items():
        setattr(one, keyword, value)
    return one


def _real() -> Iterator[tuple[str, bytes]]:
    """Read in place; all but the smallest lose their pixels, so that mutations are likely to hit headers."""
    folders = [*(DATA / "dicom").glob("*"), *(DATA / "dicom" / "odd").glob("*")]
    for folder in sorted(folders):
        files = sorted(path for path in folder.glob("*") if path.is_file())
        for path in files if folder.name == "codecs_chest_ge" else files[:1]:
            raw = path.read_bytes()
            if len(raw) < LARGEST_REAL:
                yield path.name, raw
            elif header.split(raw)[0] != ExplicitVRBigEndian:
                yield path.name, _without_pixels(path)


def _without_pixels(path: Path) -> bytes:
    one = dcmread(path, stop_before_pixels=True)
    implicit = one.original_encoding[0]
    one.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
    one.Rows = one.Columns = 8
    one.BitsAllocated = 16
    one.add_new("PixelData", "OW", bytes(128))
    buffer = BytesIO()
    dcmwrite(buffer, one, enforce_file_format=False)
    return buffer.getvalue()


def _marks(raw: bytes) -> tuple[int, ...]:
    syntax, body = header.split(raw)
    start = len(raw) - len(body)
    if syntax == DeflatedExplicitVRLittleEndian:
        return (start,)
    little = syntax != ExplicitVRBigEndian
    implicit = little and not bytes(body[4:6]).isalpha()
    elements = data_element_generator(BytesIO(body), implicit, little)
    return tuple(start + one.value_tell for one in elements if isinstance(one, RawDataElement))


# --- made wrong by hand ---------------------------------------------------------------------------


def _file(syntax: str = ExplicitVRLittleEndian, body: bytes | None = None, **changes: object) -> bytes:
    with TemporaryDirectory() as folder:
        raw = save(image(syntax, **changes), Path(folder) / "one.dcm", syntax).read_bytes()
    return raw if body is None else raw[: len(raw) - len(header.split(raw)[1])] + body


def _nested(levels: int, syntax: str = ExplicitVRLittleEndian) -> bytes:
    body = bytes(header.split(_file())[1])
    if syntax == ImplicitVRLittleEndian:
        body = bytes(header.split(_file(syntax))[1])
        level = struct.pack("<HHI", 0x0040, 0x0275, 0xFFFFFFFF)
    else:
        level = struct.pack("<HH2sHI", 0x0040, 0x0275, b"SQ", 0, 0xFFFFFFFF)
    level += struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF)
    ends = struct.pack("<HHI", 0xFFFE, 0xE00D, 0) + struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    at = body.index(b"\x40\x00\x75\x02")
    return _file(syntax, body[:at] + level * levels + ends * levels)


def _bomb(size: int) -> bytes:
    packer = zlib.compressobj(9, wbits=-15)
    body = bytes(header.split(_file())[1])
    packed = packer.compress(body + struct.pack("<HH2sHI", 0x7FE1, 0x0010, b"OB", 0, size))
    packed += packer.flush(zlib.Z_FULL_FLUSH)
    piece = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return _file(DeflatedExplicitVRLittleEndian, packed + piece * (size >> 20) + packer.flush())


def _claims(syntax: str, find: bytes, offset: int, put: bytes, **changes: object) -> bytes:
    """A code stream whose own header says another size than it has."""
    raw = bytearray(_file(syntax, **changes))
    at = raw.index(find) + offset
    raw[at : at + len(put)] = put
    return bytes(raw)


HUGE = 0xFFFF
SIZ = b"\xff\x4f\xff\x51"
SIZE = struct.pack(">HH", HUGE, HUGE)
WRONG: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "nothing but a preamble": lambda: bytes(128) + b"DICM",
    "sequences 500 deep": lambda: _nested(500),
    "sequences 50 000 deep": lambda: _nested(50_000),
    "implicit sequences 50 000 deep": lambda: _nested(50_000, ImplicitVRLittleEndian),
    "deflated zeros, 1 GiB": lambda: _bomb(1 << 30),
    "deflated zeros, 3 GiB": lambda: _bomb(3 << 30),
    "65 535 × 65 535 pixels": lambda: _file(Rows=HUGE, Columns=HUGE),
    "65 535 × 65 535 in RLE": lambda: _file(RLELossless, Rows=HUGE, Columns=HUGE),
    "RLE segments out of reach": lambda: _claims(
        RLELossless, b"\x02\0\0\0\x40\0\0\0", 4, struct.pack("<II", 0x40, 0x7FFFFFFF)
    ),
    "15 RLE segments": lambda: _claims(RLELossless, b"\x02\0\0\0\x40\0\0\0", 0, b"\x0f"),
    "65 535 × 65 535 in JPEG Lossless": lambda: _claims(JPEGLosslessSV1, b"\xff\xc3", 5, SIZE),
    "65 535 × 65 535 in JPEG-LS": lambda: _claims(JPEGLSLossless, b"\xff\xf7", 5, SIZE),
    "65 535 × 65 535 in JPEG 2000": lambda: _claims(JPEG2000Lossless, SIZ, 8, struct.pack(">II", HUGE, HUGE)),
    "4 billion × 4 billion in JPEG 2000": lambda: _claims(JPEG2000Lossless, SIZ, 8, b"\xff" * 8),
    "16 384 components in JPEG 2000": lambda: _claims(JPEG2000Lossless, SIZ, 40, b"\x40\0"),
    "16 million pixels of nothing": lambda: _claims(
        JPEG2000Lossless, SIZ, 8, struct.pack(">II", 4096, 4096), Rows=4096, Columns=4096
    ),
    "64 MB of padding": lambda: _file() + bytes(64 << 20),
    "8 million empty elements": lambda: _file() + struct.pack("<HH2sH", 0x9999, 1, b"LO", 0) * (8 << 20),
    "a million frames": lambda: _file(NumberOfFrames=1_000_000),
    "an element of 4 GB": lambda: _file(body=struct.pack("<HH2sHI", 8, 5, b"UT", 0, 0xFFFFFFFE) + b"x" * 99),
    "a character set nobody knows": lambda: _file(
        SpecificCharacterSet="ISO 2022 IR 9999", PatientName="\xe9"
    ),
    "a name of 60 000 letters": lambda: _file(PatientName="x" * 60_000),
    "thousands of values": lambda: _file(ImageType=["A"] * 30_000),
    "sizes out of reach": lambda: _file(InstanceNumber=2**31 - 1, PixelSpacing=["1e-300", "1e300"]),
}
"""Images that others have been brought down with."""


# --- archives -------------------------------------------------------------------------------------

NAMES = (
    "../../../../tmp/slipped.dcm",
    "/tmp/slipped.dcm",
    "..\\..\\slipped.dcm",
    "a/../../slipped.dcm",
    "a\nb.dcm",
)


def archive(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as made:
        for name, content in members.items():
            made.writestr(name, content)
    return buffer.getvalue()


def archives() -> list[Sample]:
    """Zip files whose members are images, named as nobody should."""
    good = _file()
    one = archive(dict.fromkeys(NAMES, good))
    two = archive({"a.dcm": good, "b.zip": one, "c.txt": b"hello"}, zipfile.ZIP_STORED)
    three = archive({"a.dcm": good}, zipfile.ZIP_LZMA)
    return [Sample(f"zip {number}", raw, _parts(raw)) for number, raw in enumerate((one, two, three))]


def _parts(raw: bytes) -> tuple[int, ...]:
    """Behind the sizes of local headers and of directory entries."""
    found = [
        at for at in range(len(raw)) if raw[at : at + 4] in (b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06")
    ]
    return tuple(at + offset for at in found for offset in (8, 18, 22, 26, 30) if at + offset <= len(raw))


def _bombs() -> bytes:
    big = _file() + bytes(64 << 20)
    return archive({f"{n}.dcm": big for n in range(4)})


def _patched(content: bytes, local: int, listed: int, put: bytes) -> bytes:
    """A zip file of one member, with other bytes in its local header and in its directory entry."""
    raw = bytearray(archive({"a.dcm": content}))
    for signature, offset in ((b"PK\x03\x04", local), (b"PK\x01\x02", listed)):
        at = raw.index(signature) + offset
        raw[at : at + len(put)] = put
    return bytes(raw)


def _in_each_other(levels: int) -> bytes:
    inner = archive({"a.dcm": _file()})
    for _ in range(levels):
        inner = archive({"a.zip": inner})
    return inner


WRONG_ARCHIVES: dict[str, Callable[[], bytes]] = {
    "names that lead elsewhere": lambda: archive(dict.fromkeys(NAMES, _file())),
    "256 MB in 300 kB": _bombs,
    "says 200 bytes, holds 64 MB": lambda: _patched(
        _file() + bytes(64 << 20), 22, 24, struct.pack("<I", 200)
    ),
    "encrypted": lambda: _patched(_file(), 6, 8, b"\1"),
    "zip files in zip files": lambda: _in_each_other(20),
    "60 000 empty members": lambda: archive({str(n): b"" for n in range(60_000)}, zipfile.ZIP_STORED),
    "no zip file": lambda: b"PK\x05\x06 not at all",
}
