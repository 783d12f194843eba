"""Masks as DICOM Segmentation objects, BINARY, Explicit VR Little Endian (PS3.3 A.51)."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import numpy as np
from highdicom import AlgorithmIdentificationSequence
from highdicom.color import CIELabColor
from highdicom.seg import SegmentAlgorithmTypeValues, Segmentation, SegmentationTypeValues, SegmentDescription
from highdicom.sr import CodedConcept
from numpy.typing import NDArray
from pydicom.sr.coding import Code

from triage.dicom import codes, objects, source
from triage.dicom.uids import derive
from triage.domain import Mask, ModelInfo, Result, ResultKind, ResultObject, Series

RED = CIELabColor.from_rgb(220, 40, 40)
BLUES = {codes.RIGHT: CIELabColor.from_rgb(70, 130, 220), codes.LEFT: CIELabColor.from_rgb(120, 190, 240)}


def write_lesions(
    series: Series,
    mask: Mask,
    result: Result,
    info: ModelInfo,
    folder: Path,
    *,
    now: datetime,
    omit_empty_frames: bool = True,
) -> ResultObject:
    """Write the lesion mask (slices, rows, columns), slice k on ``series.instances[k]``.

    Raises ValueError for an empty mask (an empty segment hangs viewers: write none) and for another
    grid; Retryable when source or disk fail.
    """
    segment = _segment(1, "Lesions", codes.ABNORMAL_STRUCTURE, codes.LESION, result, info, RED)
    segment.AnatomicRegionSequence = [CodedConcept.from_code(codes.LUNG)]
    labels = mask.astype(np.uint8)
    return _write(
        ResultKind.LESION_SEG, series, labels, [segment], result, info, folder, now, omit_empty_frames
    )


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
    return objects.write(kind, segmentation, received.patient, folder, now)
