"""Masks as DICOM Segmentation objects, BINARY, Explicit VR Little Endian (PS3.3 A.51)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from types import MappingProxyType

import numpy as np
from highdicom import AlgorithmIdentificationSequence
from highdicom.color import CIELabColor
from highdicom.seg import SegmentAlgorithmTypeValues, Segmentation, SegmentationTypeValues, SegmentDescription
from highdicom.sr import CodedConcept
from numpy.typing import NDArray
from pydicom.sr.coding import Code

from triage.dicom import codes, objects, source
from triage.dicom.uids import derive
from triage.domain import LesionClass, Mask, ModelInfo, Result, ResultKind, ResultObject, Series


@dataclass(frozen=True, slots=True)
class LesionKind:
    """What one segment of the lesions is: its name, what it is called in code, and its colour (RGB)."""

    label: str
    code: Code
    colour: tuple[int, int, int]


LESIONS = LesionKind("Lesions", codes.LESION, (255, 72, 60))
"""Of a network that does not tell them apart."""
CLASSES: Mapping[LesionClass, LesionKind] = {
    "ground_glass": LesionKind("Ground glass", codes.GROUND_GLASS, (86, 196, 255)),
    "consolidation": LesionKind("Consolidation", codes.CONSOLIDATION, (255, 146, 40)),
}
BLUES = {codes.RIGHT: CIELabColor.from_rgb(70, 130, 220), codes.LEFT: CIELabColor.from_rgb(120, 190, 240)}


def write_lesions(
    series: Series,
    mask: Mask,
    result: Result,
    info: ModelInfo,
    folder: Path,
    *,
    now: datetime,
    classes: Mapping[LesionClass, Mask] = MappingProxyType({}),
    omit_empty_frames: bool = True,
) -> ResultObject:
    """Write the lesion mask (slices, rows, columns), slice k on ``series.instances[k]``.

    Where ``classes`` tell its parts apart, each that has voxels is a segment of its own. Raises ValueError
    for an empty mask (an empty segment hangs viewers: write none), for classes that are not the mask in
    disjoint parts, and for another grid; Retryable when source or disk fail.
    """
    parts = lesion_parts(mask, classes)
    labels, segments = np.zeros(mask.shape, np.uint8), []
    for number, (kind, part) in enumerate(parts, 1):
        labels[part] = number
        segments.append(_lesion(number, kind, result, info))
    voxels = sum(np.count_nonzero(part) for _, part in parts)
    if voxels != np.count_nonzero(mask) or not np.array_equal(labels > 0, mask):
        raise ValueError("the classes are not the lesions in disjoint parts")
    return _write(
        ResultKind.LESION_SEG, series, labels, segments, result, info, folder, now, omit_empty_frames
    )


def lesion_parts(mask: Mask, classes: Mapping[LesionClass, Mask]) -> list[tuple[LesionKind, Mask]]:
    """The lesion mask in what a network tells apart, as segments are written and pictures drawn.

    Parts without a voxel are left out; masks have any shape.
    """
    parts = [(kind, classes[name]) for name, kind in CLASSES.items() if name in classes] or [(LESIONS, mask)]
    return [(kind, part) for kind, part in parts if part.any()]


def write_lungs(
    series: Series,
    left: Mask,
    right: Mask,
    result: Result,
    info: ModelInfo,
    folder: Path,
    *,
    now: datetime,
    omit_empty_frames: bool = True,
) -> ResultObject:
    """Write the patient's right and left lung as segments of one object; an absent lung gets none.

    Both masks are (slices, rows, columns) and must not overlap. Raises as ``write_lesions``.
    """
    if np.logical_and(left, right).any():
        raise ValueError("the lungs overlap")
    labels = np.zeros(left.shape, np.uint8)
    segments: list[SegmentDescription] = []
    for name, side, mask in (("Right lung", codes.RIGHT, right), ("Left lung", codes.LEFT, left)):
        if mask.any():
            number = len(segments) + 1
            labels[mask] = number
            segments.append(_lung(number, name, side, result, info))
    return _write(ResultKind.LUNG_SEG, series, labels, segments, result, info, folder, now, omit_empty_frames)


def _lesion(number: int, kind: LesionKind, result: Result, info: ModelInfo) -> SegmentDescription:
    colour = CIELabColor.from_rgb(*kind.colour)
    segment = _segment(number, kind.label, codes.ABNORMAL_STRUCTURE, kind.code, result, info, colour)
    segment.AnatomicRegionSequence = [CodedConcept.from_code(codes.LUNG)]
    return segment


def _lung(number: int, name: str, side: Code, result: Result, info: ModelInfo) -> SegmentDescription:
    segment = _segment(number, name, codes.ANATOMICAL_STRUCTURE, codes.LUNG, result, info, BLUES[side])
    property_type = segment.SegmentedPropertyTypeCodeSequence[0]
    property_type.SegmentedPropertyTypeModifierCodeSequence = [CodedConcept.from_code(side)]
    return segment


def _segment(
    number: int, label: str, category: Code, kind: Code, result: Result, info: ModelInfo, colour: CIELabColor
) -> SegmentDescription:
    return SegmentDescription(
        segment_number=number,
        segment_label=label,
        segmented_property_category=category,
        segmented_property_type=kind,
        algorithm_type=SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=AlgorithmIdentificationSequence(
            name=info.name, family=codes.ARTIFICIAL_INTELLIGENCE, version=info.version[:64]
        ),
        tracking_uid=tracking_uid(label, result),
        tracking_id=label,
        display_color=colour,
    )


def tracking_uid(label: str, result: Result) -> str:
    """UID under which segment and report speak of the same thing."""
    return derive(f"tracking {label}", result.study_instance_uid, result.content_key)


def _write(
    kind: ResultKind,
    series: Series,
    labels: NDArray[np.uint8],
    segments: list[SegmentDescription],
    result: Result,
    info: ModelInfo,
    folder: Path,
    now: datetime,
    omit_empty_frames: bool,
) -> ResultObject:
    if len(labels) != len(series.instances):
        raise ValueError(f"{len(labels)} mask slices for {len(series.instances)} images")
    if not labels.any():
        raise ValueError("an empty mask makes no segmentation")
    received = source.read(series)
    segmentation = Segmentation(
        source_images=received.slices,
        pixel_array=labels,
        segmentation_type=SegmentationTypeValues.BINARY,
        segment_descriptions=segments,
        omit_empty_frames=omit_empty_frames,
        content_label=kind.value.upper(),
        content_description=objects.DISCLAIMER,
        **objects.identity(kind, result, info, now),
    )
    written = objects.write(kind, segmentation, received.patient, folder, now)
    return replace(written, segments=tuple(segment.segment_label for segment in segments))
