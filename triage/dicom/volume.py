"""The chosen series → HU on one grid, whatever transfer syntax its slices came in."""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise, repeat
from pathlib import Path
from typing import Any, Literal

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from pydicom import uid
from pydicom.encaps import generate_frames

from triage.dicom import elements
from triage.dicom.header import BROKEN, parse, read_bytes, split
from triage.domain import Instance, Series, Volume
from triage.errors import Rejected, Retryable

AIR = -1024
"""HU of what was never scanned: padding, and whatever lies below the scale of a CT scanner."""
HIGHEST = int(np.iinfo(np.int16).max)
FEW = 16384
"""Of an intercept: stored values clipped to what gives HU then fit into sixteen bits."""
MOST_PIXELS = 4096 * 4096
"""Of one slice; no scanner makes more, and a header that claims more would fill the memory."""

PADDING = 0x00280120
KEYWORDS = (
    "SamplesPerPixel", "Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation",
    "PixelPaddingValue", "PixelPaddingRangeLimit", "PixelData",
)  # fmt: skip
WANTED = elements.wanted(("SpecificCharacterSet", *KEYWORDS), {}) | {
    elements.PIXEL_DATA: elements.Wanted("PixelData", b"OW", {}),
    PADDING: elements.Wanted("PixelPaddingValue", elements.US_OR_SS, {}),
    PADDING + 1: elements.Wanted("PixelPaddingRangeLimit", elements.US_OR_SS, {}),
}
Fields = dict[str, Any]
"""Keyword → value, of those that are there."""


@dataclass(frozen=True)
class Pixels:
    """How the stored values of one slice are written (Image Pixel module, PS3.3 C.7.6.3)."""

    rows: int
    columns: int
    bits_allocated: int
    bits_stored: int
    high_bit: int
    signed: bool

    @property
    def unsigned(self) -> np.dtype[Any]:
        """The type that holds a stored value before its sign is known."""
        return np.dtype(f"u{self.bits_allocated // 8}")


Decoder = Callable[[bytes, Pixels], NDArray[Any]]
Size = tuple[int, int, int]
"""Rows, columns and components."""
FRAME_HEADERS = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}
"""Markers of JPEG and JPEG-LS behind which the size stands."""
FILL = 0xFF
SIZ = b"\xff\x4f\xff\x51"
"""How a code stream of JPEG 2000 begins."""


def read(series: Series, threads: int = 0) -> Volume:
    """Decode every slice to HU: int16 (z, y, x), slice *k* being ``series.instances[k]``.

    Values are clipped to [-1024, 32767]; padding (PS3.3 C.7.5.1.1.2) becomes air.
    ``threads`` 0 takes all cores.
    Raises Rejected naming the slice that is gone or cannot be decoded, Retryable when a file cannot be read.
    """
    first = series.instances[0]
    array = _room_for(first, len(series.instances))
    numbers = range(1, len(array) + 1)
    with ThreadPoolExecutor(threads or len(os.sched_getaffinity(0))) as pool:
        for _ in pool.map(_read_slice, series.instances, numbers, array, repeat(array.shape[1:])):
            pass
    return Volume(array, series.spacing, series.orientation)


def read_image(instance: Instance) -> NDArray[np.int16]:
    """One image in HU, (rows, columns), as ``read`` gives it, and with the same errors."""
    image: NDArray[np.int16] = _room_for(instance, 1)[0]
    _read_slice(instance, 1, image, image.shape)
    return image


def _room_for(instance: Instance, slices: int) -> NDArray[np.int16]:
    """An array for so many slices like this one. Raises Rejected where no slice can be as large."""
    if instance.rows * instance.columns > MOST_PIXELS:
        raise Rejected(f"{instance.rows} × {instance.columns} pixels are too many for a CT slice")
    return np.empty((slices, instance.rows, instance.columns), np.int16)


def _read_slice(instance: Instance, place: int, out: NDArray[np.int16], shape: tuple[int, int]) -> None:
    number = place if instance.instance_number is None else instance.instance_number
    transfer_syntax_uid, body = split(_bytes_of(instance.path, number))
    decoder = DECODERS.get(transfer_syntax_uid)
    if decoder is None:
        name = uid.UID(transfer_syntax_uid).name
        raise Rejected(f"transfer syntax of slice {number} is not supported: {name}")
    try:
        fields = _fields(body, transfer_syntax_uid)
        pixels = _pixels(fields)
        values = _stored(decoder(fields["PixelData"], pixels), pixels)
        padding = _padding(fields, pixels)
    except (Rejected, RuntimeError, *BROKEN) as error:
        raise Rejected(f"pixel data of slice {number} cannot be decoded") from error
    if values.shape != shape:
        sizes = " × ".join(map(str, values.shape)), " × ".join(map(str, shape))
        raise Rejected(f"slice {number} has the wrong size: {sizes[0]}, not {sizes[1]}")
    _write_hu(values, padding, instance, out)


class _Kept(threading.local):
    """Room for a file, kept by each thread: fresh memory for every slice takes longer than reading it."""

    room = bytearray()


_kept = _Kept()


def _bytes_of(path: Path, number: int) -> bytes | bytearray:
    """Good until this thread reads the next slice.

    A disk may come back; a file that was deleted does not, until someone sends it again.
    """
    try:
        return _into_room(path) or read_bytes(path)
    except Retryable as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        reason = f"image file of slice {number} is gone from the spool; send the study again"
        raise Rejected(reason) from error


def _into_room(path: Path) -> bytearray | None:
    """None where it is not read at once, so that the error is told by ``read_bytes``."""
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        size = os.fstat(file).st_size
        if len(_kept.room) != size:
            _kept.room = bytearray(size)
        return _kept.room if os.readv(file, [_kept.room]) == size else None
    except OSError:
        return None
    finally:
        os.close(file)


def _fields(body: memoryview, transfer_syntax_uid: str) -> Fields:
    """What KEYWORDS name. Plain pixels stay where they are; raises one of BROKEN, or Rejected."""
    if transfer_syntax_uid in (uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian):
        explicit = transfer_syntax_uid == uid.ExplicitVRLittleEndian
        found = elements.find(body, WANTED, explicit=explicit)
        if found and found.get("PixelData"):
            start, end = found.pop("PixelData")
            return {keyword: values[0] for keyword, values in found.items() if values} | {
                "PixelData": body[start:end]
            }
    dataset = parse(body, transfer_syntax_uid, KEYWORDS, pixels=True)
    return {keyword: dataset[keyword].value for keyword in KEYWORDS if keyword in dataset}


def _pixels(fields: Fields) -> Pixels:
    """Raises one of BROKEN when an attribute that is required is missing or contradicts the others."""
    bits_allocated, bits_stored = int(fields["BitsAllocated"]), int(fields["BitsStored"])
    high_bit = int(fields.get("HighBit", bits_stored - 1))
    if bits_allocated not in (8, 16, 32) or not bits_stored <= high_bit + 1 <= bits_allocated:
        raise ValueError(f"{bits_stored} of {bits_allocated} bits, the highest at {high_bit}")
    if int(fields.get("SamplesPerPixel", 1)) != 1:
        raise ValueError("colour")
    signed = bool(fields["PixelRepresentation"])
    return Pixels(int(fields["Rows"]), int(fields["Columns"]), bits_allocated, bits_stored, high_bit, signed)


def _padding(fields: Fields, pixels: Pixels) -> tuple[int, int] | None:
    """The range of padding values, as stored values; scanners write it signed, unsigned, or as junk."""
    limits = [fields.get(keyword) for keyword in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
    whole = [limit for limit in limits if isinstance(limit, int)]
    if not isinstance(limits[0], int):
        return None
    modulo = 1 << pixels.bits_allocated
    values = _stored(np.array([limit % modulo for limit in whole], pixels.unsigned), pixels)
    return int(values.min()), int(values.max())


def _stored(values: NDArray[Any], pixels: Pixels) -> NDArray[Any]:
    """Stored values with their sign: bits above HighBit (old overlays) go, BitsStored tells the sign bit.

    Codecs know nothing of PixelRepresentation, so every decoder hands over bits, not numbers.
    """
    bits = values.astype(pixels.unsigned, copy=False)
    above = pixels.bits_allocated - 1 - pixels.high_bit
    spare = pixels.bits_allocated - pixels.bits_stored
    left = bits << bits.dtype.type(above) if above else bits
    numbers = left.view(f"i{left.itemsize}") if pixels.signed else left
    return numbers >> numbers.dtype.type(spare) if spare else numbers


def _write_hu(
    values: NDArray[Any], padding: tuple[int, int] | None, instance: Instance, out: NDArray[np.int16]
) -> None:
    """HU = slope · stored value + intercept (PS3.3 C.7.6.16.2.9), rounded, clipped, padding set to air."""
    slope, intercept = instance.rescale_slope, instance.rescale_intercept
    if not slope or intercept is None:
        raise Rejected("missing RescaleSlope")
    if slope == 1 and intercept == int(intercept) and values.itemsize == 2 and abs(intercept) <= FEW:
        _add(values, int(intercept), out)
        if padding is not None and padding[1] + intercept <= AIR:
            return  # it was clipped
    elif slope == 1 and intercept == int(intercept):
        hu: NDArray[Any] = np.add(values, int(intercept), dtype=np.int64 if values.itemsize > 2 else np.int32)
        np.clip(hu, AIR, HIGHEST, out=out, casting="unsafe")
    else:
        hu = np.rint(values * np.float64(slope) + intercept)
        np.clip(hu, AIR, HIGHEST, out=out, casting="unsafe")
    if padding is not None:
        out[(values >= padding[0]) & (values <= padding[1])] = AIR


def _add(values: NDArray[Any], intercept: int, out: NDArray[np.int16]) -> None:
    """The same in sixteen bits and one pass less: clipped first, so that the sum cannot leave int16."""
    limits, clipped = np.iinfo(values.dtype), out.view(values.dtype)
    low, high = max(AIR - intercept, limits.min), min(HIGHEST - intercept, limits.max)
    np.maximum(values, low, out=clipped)
    if high < limits.max:
        np.minimum(clipped, high, out=clipped)
    if intercept:
        np.add(out, np.int16(intercept), out=out)


def _plain(byte_order: Literal["<", ">"]) -> Decoder:
    def decode(data: bytes, pixels: Pixels) -> NDArray[Any]:
        count = pixels.rows * pixels.columns
        values = np.frombuffer(data, pixels.unsigned.newbyteorder(byte_order), count)
        return values.reshape(pixels.rows, pixels.columns)

    return decode


def _rle(data: bytes, pixels: Pixels) -> NDArray[Any]:
    frame = _frame(data)
    _check_segments(frame, pixels.bits_allocated // 8)
    decoded = imagecodecs.dicomrle_decode(frame, pixels.unsigned.newbyteorder("<"))
    return np.frombuffer(decoded, pixels.unsigned.newbyteorder("<")).reshape(pixels.rows, pixels.columns)


def _check_segments(frame: bytes, count: int) -> None:
    """One for each byte of a sample, in ascending order (PS3.5 G.5): the codec reads where it is told to."""
    told, *starts = struct.unpack_from("<16I", frame)
    starts = [*starts[:count], len(frame)]
    if told != count or starts[0] < 64 or any(begin >= end for begin, end in pairwise(starts)):
        raise ValueError("the RLE segments are not where they should be")


def _coded(codec: Callable[[bytes], NDArray[Any]], declared: Callable[[bytes], Size]) -> Decoder:
    def decode(data: bytes, pixels: Pixels) -> NDArray[Any]:
        frame = _frame(data)
        # Codecs make room for what the stream says of itself: a few bytes would ask for all our memory.
        if (said := declared(frame)) != (pixels.rows, pixels.columns, 1):
            raise ValueError(f"the code stream says that it has {said} rows, columns and components")
        # libjpeg and OpenJPEG fill the missing end of a cut stream with grey and report success.
        if b"\xff\xd9" not in frame[-4:]:
            raise ValueError("the code stream has no end marker")
        return codec(frame)

    return decode


def _frame(data: bytes) -> bytes:
    return next(generate_frames(data, number_of_frames=1))


def _in_jpeg(stream: bytes) -> Size:
    """The frame header's (ISO/IEC 10918-1 B.2.2; JPEG-LS has the same)."""
    at = 2
    while stream[at : at + 1] == b"\xff":
        marker = stream[at + 1]
        if marker in FRAME_HEADERS:
            rows, columns, components = struct.unpack_from(">HHB", stream, at + 5)
            return rows, columns, components
        at += 1 if marker == FILL else 2 + int.from_bytes(stream[at + 2 : at + 4], "big")
    raise ValueError("the code stream has no frame header")


def _in_jpeg_2000(stream: bytes) -> Size:
    """The SIZ marker's (ISO/IEC 15444-1 A.5.1)."""
    at = _code_stream(stream)
    if stream[at : at + 4] != SIZ:
        raise ValueError("no code stream of JPEG 2000")
    right, bottom, left, top = struct.unpack_from(">4I", stream, at + 8)
    (components,) = struct.unpack_from(">H", stream, at + 40)
    return bottom - top, right - left, components


def _code_stream(stream: bytes) -> int:
    """Where it begins: some writers leave the boxes of a file around it (ISO/IEC 15444-1 I.4)."""
    at, kind, length, head = 0, b"", 0, 0
    while stream[:4] != SIZ and kind != b"jp2c":
        at += length
        length, kind = struct.unpack_from(">I4s", stream, at)
        head = 8
        if length == 1:
            (length,), head = struct.unpack_from(">Q", stream, at + 8), 16
        if length < head and kind != b"jp2c":
            raise ValueError("a box of JPEG 2000 without an end")
    return at + head


_jpeg = _coded(imagecodecs.jpeg8_decode, _in_jpeg)
_jpeg_ls = _coded(imagecodecs.jpegls_decode, _in_jpeg)
_jpeg_2000 = _coded(imagecodecs.jpeg2k_decode, _in_jpeg_2000)
_htj2k = _coded(imagecodecs.htj2k_decode, _in_jpeg_2000)

DECODERS: dict[str, Decoder] = {
    uid.ImplicitVRLittleEndian: _plain("<"),
    uid.ExplicitVRLittleEndian: _plain("<"),
    uid.DeflatedExplicitVRLittleEndian: _plain("<"),
    uid.ExplicitVRBigEndian: _plain(">"),
    uid.RLELossless: _rle,
    uid.JPEGBaseline8Bit: _jpeg,
    uid.JPEGExtended12Bit: _jpeg,
    "1.2.840.10008.1.2.4.53": _jpeg,  # spectral selection, retired
    "1.2.840.10008.1.2.4.55": _jpeg,  # full progression, retired
    uid.JPEGLossless: _jpeg,
    uid.JPEGLosslessSV1: _jpeg,
    uid.JPEGLSLossless: _jpeg_ls,
    uid.JPEGLSNearLossless: _jpeg_ls,
    uid.JPEG2000Lossless: _jpeg_2000,
    uid.JPEG2000: _jpeg_2000,
    uid.HTJ2KLossless: _htj2k,
    uid.HTJ2KLosslessRPCL: _htj2k,
    uid.HTJ2K: _htj2k,
}
"""One decoder for each transfer syntax (PS3.5 annex A): bytes of Pixel Data → bits of one frame."""
