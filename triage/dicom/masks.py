"""Our segmentation objects read back: which pixels of which image belong to which segment.

Frames are placed by the image that they refer to, never by position: what is shown is what was written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import imagecodecs
import numpy as np
import pydicom
from highdicom.color import CIELabColor
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.encaps import generate_frames
from pydicom.errors import InvalidDicomError
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEGLSLossless, RLELossless

from triage.dicom.header import BROKEN
from triage.domain import Mask
from triage.errors import Rejected, Retryable

LARGEST_FILE = 256 * 1024**2
"""Bytes; a binary object of lungs and lesions of 1000 images has 130 MB."""
LARGEST_IMAGE = 4096 * 4096


@dataclass(frozen=True, slots=True)
class Segment:
    """What one segment is called, and the colour (RGB) that viewers are asked to give it."""

    label: str
    colour: tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Segmentation:
    """Masks of one object, one bit a pixel: small enough to be kept while a study is looked at."""

    shape: tuple[int, int]
    segments: Mapping[int, Segment]
    """By segment number."""
    frames: Mapping[str, Mapping[int, NDArray[np.uint8]]]
    """SOP Instance UID of the image → segment number → packed bits; without images that nothing marks."""
    areas: Mapping[str, Mapping[int, int]]
    """The same with pixels counted."""

    def labels(self, sop_instance_uid: str) -> NDArray[np.uint8]:
        """Of one image, uint8 (rows, columns): the number of the segment that each pixel belongs to, or 0."""
        labels = np.zeros(self.shape, np.uint8)
        for number, bits in self.frames.get(sop_instance_uid, {}).items():
            labels[_unpacked(bits, self.shape)] = number
        return labels

    def marked(self, sop_instance_uid: str) -> Mask:
        """Of one image, (rows, columns): what belongs to any segment."""
        return self.labels(sop_instance_uid) > 0


def read(path: Path) -> Segmentation:
    """Every mask of a segmentation, BINARY or label map.

    Raises Rejected for what is none, or larger than we would write; Retryable when it cannot be read.
    """
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise Rejected(f"{path.name} is too large to be shown")
        return _segmentation(pydicom.dcmread(path))
    except OSError as error:
        raise Retryable(f"cannot read {path.name}: {error.strerror}") from error
    except (InvalidDicomError, IndexError, RuntimeError, *BROKEN) as error:
        raise Rejected(f"{path.name} holds no masks that can be read") from error


def _segmentation(dataset: Dataset) -> Segmentation:
    shape = (int(dataset.Rows), int(dataset.Columns))
    if shape[0] * shape[1] > LARGEST_IMAGE:
        raise ValueError("the frames are too large")
    segments = {
        int(item.SegmentNumber): Segment(
            str(item.SegmentLabel),
            CIELabColor.from_dicom_value(tuple(item.RecommendedDisplayCIELabValue)).to_rgb(),
        )
        for item in dataset.SegmentSequence
        if item.SegmentNumber  # a label map also names what is no segment, as 0
    }
    frames: dict[str, dict[int, NDArray[np.uint8]]] = {}
    areas: dict[str, dict[int, int]] = {}
    for group, frame in zip(dataset.PerFrameFunctionalGroupsSequence, _frames(dataset, shape), strict=True):
        image = str(group.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID)
        for number in _numbers(dataset, group, segments):
            mask = frame == number if dataset.SegmentationType == "LABELMAP" else frame.view(bool)
            if area := int(np.count_nonzero(mask)):
                frames.setdefault(image, {})[number] = np.packbits(mask)
                areas.setdefault(image, {})[number] = area
    return Segmentation(shape, segments, frames, areas)


def _numbers(dataset: Dataset, group: Dataset, segments: Mapping[int, Segment]) -> list[int]:
    """The segments that a frame may show: one, or all in a label map."""
    if dataset.SegmentationType == "LABELMAP":
        return list(segments)
    shared = dataset.SharedFunctionalGroupsSequence[0]
    items = group.get("SegmentIdentificationSequence") or shared.SegmentIdentificationSequence
    return [int(items[0].ReferencedSegmentNumber)]


def _rle(data: bytes) -> bytes:
    return bytes(imagecodecs.dicomrle_decode(data, "u1"))


def _jpeg_ls(data: bytes) -> bytes:
    return bytes(imagecodecs.jpegls_decode(data).tobytes())


DECODERS: Mapping[str, Callable[[bytes], bytes]] = {RLELossless: _rle, JPEGLSLossless: _jpeg_ls}
"""Of the transfer syntaxes that label maps are written in."""


def _frames(dataset: Dataset, shape: tuple[int, int]) -> Iterator[NDArray[np.uint8]]:
    """One after the other: all at once would be a byte a pixel."""
    count, pixels = int(dataset.NumberOfFrames), shape[0] * shape[1]
    syntax = dataset.file_meta.TransferSyntaxUID
    if syntax in DECODERS:
        for data in generate_frames(dataset.PixelData, number_of_frames=count):
            yield np.frombuffer(DECODERS[syntax](data), np.uint8).reshape(shape)
    elif syntax not in (ExplicitVRLittleEndian, ImplicitVRLittleEndian):
        raise ValueError(f"masks in transfer syntax {syntax}")
    elif dataset.SegmentationType == "LABELMAP":
        values = np.frombuffer(dataset.PixelData, np.uint8, count * pixels)
        yield from values.reshape(count, *shape)
    else:
        stored = np.frombuffer(dataset.PixelData, np.uint8)
        for first in range(0, count * pixels, pixels):  # frames follow each other bit by bit (PS3.5, 8.1.1)
            bits = np.unpackbits(stored[first // 8 : (first + pixels + 7) // 8], bitorder="little")
            yield bits[first % 8 : first % 8 + pixels].reshape(shape)


def _unpacked(bits: NDArray[np.uint8], shape: tuple[int, int]) -> Mask:
    return np.unpackbits(bits, count=shape[0] * shape[1]).reshape(shape).astype(bool)
