"""Masks as DICOM Segmentation objects (PS3.3 A.51): BINARY, or as label map with lossless compression."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import numpy as np
from highdicom import AlgorithmIdentificationSequence
from highdicom.color import CIELabColor
from highdicom.seg import SegmentAlgorithmTypeValues, Segmentation, SegmentationTypeValues, SegmentDescription
from highdicom.sr import CodedConcept
from numpy.typing import NDArray
from pydicom.sr.coding import Code
from pydicom.uid import UID, ExplicitVRLittleEndian, JPEGLSLossless, RLELossless

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
LUNGS: Mapping[str, tuple[Code, CIELabColor]] = {
    "Right lung": (codes.RIGHT, CIELabColor.from_rgb(70, 130, 220)),
    "Left lung": (codes.LEFT, CIELabColor.from_rgb(120, 190, 240)),
}
MEANINGS: Mapping[str, tuple[Code, Code, Code | None]] = {
    **{kind.label: (kind.code, codes.ABNORMAL_STRUCTURE, None) for kind in (LESIONS, *CLASSES.values())},
    **{label: (codes.LUNG, codes.ANATOMICAL_STRUCTURE, side) for label, (side, _) in LUNGS.items()},
}
"""Of every segment by its label: property type, property category, side of the patient."""

Form = Literal["binary", "labelmap_rle", "labelmap_jpeg_ls"]
FORMS: Mapping[Form, tuple[SegmentationTypeValues, UID]] = {
    "binary": (SegmentationTypeValues.BINARY, ExplicitVRLittleEndian),
    "labelmap_rle": (SegmentationTypeValues.LABELMAP, RLELossless),
    "labelmap_jpeg_ls": (SegmentationTypeValues.LABELMAP, JPEGLSLossless),
}
"""A label map is 10 to 40 times smaller; few archives and viewers read it yet."""


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
    form: Form = "binary",
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
        segments.append(_segment(number, kind.label, CIELabColor.from_rgb(*kind.colour), result, info))
    voxels = sum(np.count_nonzero(part) for _, part in parts)
    if voxels != np.count_nonzero(mask) or not np.array_equal(labels > 0, mask):
        raise ValueError("the classes are not the lesions in disjoint parts")
    return _write(
        ResultKind.LESION_SEG, series, labels, segments, result, info, folder, now, omit_empty_frames, form
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
    form: Form = "binary",
) -> ResultObject:
    """Write the patient's right and left lung as segments of one object; an absent lung gets none.

    Both masks are (slices, rows, columns) and must not overlap. Raises as ``write_lesions``.
    """
    if np.logical_and(left, right).any():
        raise ValueError("the lungs overlap")
    labels = np.zeros(left.shape, np.uint8)
    segments: list[SegmentDescription] = []
    for name, mask in zip(LUNGS, (right, left), strict=True):
        if mask.any():
            number = len(segments) + 1
            labels[mask] = number
            segments.append(_segment(number, name, LUNGS[name][1], result, info))
    return _write(
        ResultKind.LUNG_SEG, series, labels, segments, result, info, folder, now, omit_empty_frames, form
    )


def _segment(
    number: int, label: str, colour: CIELabColor, result: Result, info: ModelInfo
) -> SegmentDescription:
    kind, category, side = MEANINGS[label]
    segment = SegmentDescription(
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
    if side is None:
        segment.AnatomicRegionSequence = [CodedConcept.from_code(codes.LUNG)]
    else:
        property_type = segment.SegmentedPropertyTypeCodeSequence[0]
        property_type.SegmentedPropertyTypeModifierCodeSequence = [CodedConcept.from_code(side)]
    return segment


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
    form: Form,
) -> ResultObject:
    if len(labels) != len(series.instances):
        raise ValueError(f"{len(labels)} mask slices for {len(series.instances)} images")
    if not labels.any():
        raise ValueError("an empty mask makes no segmentation")
    received = source.read(series)
    segmentation_type, transfer_syntax_uid = FORMS[form]
    segmentation = Segmentation(
        source_images=received.slices,
        pixel_array=labels,
        segmentation_type=segmentation_type,
        transfer_syntax_uid=transfer_syntax_uid,
        segment_descriptions=segments,
        omit_empty_frames=omit_empty_frames,
        content_label=kind.value.upper(),
        content_description=objects.DISCLAIMER,
        **objects.identity(kind, result, info, now),
    )
    written = objects.write(kind, segmentation, received.patient, folder, now)
    voxel_ml = math.prod(series.spacing) / 1000
    return replace(
        written,
        segments=tuple(segment.segment_label for segment in segments),
        volumes_ml=tuple(
            float(np.count_nonzero(labels == number) * voxel_ml) for number in range(1, len(segments) + 1)
        ),
    )
