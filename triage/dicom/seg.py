"""Masks as DICOM Segmentation objects (PS3.3 A.51): BINARY, or as label map with lossless compression."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from struct import pack
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from highdicom import AlgorithmIdentificationSequence
from highdicom.color import CIELabColor
from highdicom.frame import encode_frame
from highdicom.seg import SegmentAlgorithmTypeValues, Segmentation, SegmentationTypeValues, SegmentDescription
from highdicom.spatial import get_plane_sort_index, get_volume_positions
from highdicom.sr import CodedConcept
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.sr.coding import Code
from pydicom.uid import UID, ExplicitVRLittleEndian, JPEGLSLossless, RLELossless
from pydicom.valuerep import DS

from triage.dicom import codes, objects, source, stamp
from triage.dicom.uids import derive
from triage.domain import (
    Instance,
    LesionClass,
    Mask,
    ModelInfo,
    Result,
    ResultKind,
    ResultObject,
    Series,
    Vector,
)


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
    if classes and not _are_parts([part for _, part in parts], mask):
        raise ValueError("the classes are not the lesions in disjoint parts")
    segments = [
        (_segment(number, kind.label, CIELabColor.from_rgb(*kind.colour), result, info), part)
        for number, (kind, part) in enumerate(parts, 1)
    ]
    return _write(ResultKind.LESION_SEG, series, segments, result, info, folder, now, omit_empty_frames, form)


def _are_parts(parts: Sequence[Mask], mask: Mask) -> bool:
    """Whether each voxel of the mask, and no other, is in one of the parts."""
    union = np.zeros_like(mask)
    for part in parts:
        union |= part
    voxels = sum(np.count_nonzero(part) for part in parts)
    return voxels == np.count_nonzero(mask) and np.array_equal(union, mask)


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
    if any(np.logical_and(*planes).any() for planes in zip(left, right, strict=True)):
        raise ValueError("the lungs overlap")
    present = [(name, mask) for name, mask in zip(LUNGS, (right, left), strict=True) if mask.any()]
    segments = [
        (_segment(number, name, LUNGS[name][1], result, info), mask)
        for number, (name, mask) in enumerate(present, 1)
    ]
    return _write(ResultKind.LUNG_SEG, series, segments, result, info, folder, now, omit_empty_frames, form)


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
    segments: Sequence[tuple[SegmentDescription, Mask]],
    result: Result,
    info: ModelInfo,
    folder: Path,
    now: datetime,
    omit_empty_frames: bool,
    form: Form,
) -> ResultObject:
    """highdicom says, of one image, what such an object is; what each image and frame adds is stamped."""
    if not segments:
        raise ValueError("an empty mask makes no segmentation")
    described, masks = [one for one, _ in segments], [mask for _, mask in segments]
    if len(masks[0]) != len(series.instances):
        raise ValueError(f"{len(masks[0])} mask slices for {len(series.instances)} images")
    areas = np.array([[np.count_nonzero(plane) for plane in mask] for mask in masks])
    received = source.read(series)
    made = _of_one_image(kind, received.images, masks[0].shape[1:], described, result, info, now, form)
    layers = areas if made.SegmentationType == "BINARY" else areas.sum(axis=0, keepdims=True)
    frames = _frames(layers > 0 if omit_empty_frames else np.ones_like(layers), series)
    encoded = _repeat(made, series, frames, len(layers))
    if made.SegmentationType == "BINARY":
        made.PixelData = packed([masks[layer][plane] for layer, plane, _ in frames])
    else:
        made.PixelData = _label_maps(made, [[mask[plane] for mask in masks] for _, plane, _ in frames])
    written = objects.write(kind, made, received.patient, folder, now, encoded)
    voxel_ml = math.prod(series.spacing) / 1000
    return replace(
        written,
        segments=tuple(segment.segment_label for segment in described),
        volumes_ml=tuple(float(area * voxel_ml) for area in areas.sum(axis=1)),
    )


def _of_one_image(
    kind: ResultKind,
    images: Sequence[Dataset],
    shape: tuple[int, ...],
    segments: Sequence[SegmentDescription],
    result: Result,
    info: ModelInfo,
    now: datetime,
    form: Form,
) -> Segmentation:
    segmentation_type, transfer_syntax_uid = FORMS[form]
    identity = objects.identity(kind, result, info, now)
    made = Segmentation(
        source_images=images,
        pixel_array=np.zeros((1, *shape), np.uint8),
        segmentation_type=segmentation_type,
        transfer_syntax_uid=transfer_syntax_uid,
        segment_descriptions=segments,
        omit_empty_frames=False,
        content_label=kind.value.upper(),
        content_description=objects.DISCLAIMER,
        **identity,
    )
    dimensions = derive("dimensions", identity["sop_instance_uid"])  # highdicom draws one by chance
    for item in (*made.DimensionOrganizationSequence, *made.DimensionIndexSequence):
        item.DimensionOrganizationUID = dimensions
    return made


Frame = tuple[int, int, int]
"""Layer (a segment, or the label map) and slice that a frame shows, and the number of its place, from 1."""


def _frames(shown: NDArray[Any], series: Series) -> list[Frame]:
    """What is ``shown`` (layers, slices): one layer after the other, each along the normal."""
    order = get_plane_sort_index(_positions(series), series.orientation)
    places = list(enumerate((plane for plane in order if shown[:, plane].any()), 1))
    return [
        (layer, plane, place) for layer in range(len(shown)) for place, plane in places if shown[layer, plane]
    ]


def _positions(series: Series) -> list[Vector]:
    return [instance.image_position_patient or (0.0, 0.0, 0.0) for instance in series.instances]


def _repeat(made: Segmentation, series: Series, frames: Sequence[Frame], layers: int) -> list[stamp.Encoded]:
    """Give the object of one image all images and frames: highdicom's items, each with its own values."""
    binary = made.SegmentationType == "BINARY"
    images = [_image(instance) for instance in series.instances]
    reference = stamp.Stamp(made.SourceImageSequence[0], *stamp.REFERENCE)
    group = stamp.Stamp(made.PerFrameFunctionalGroupsSequence[0], *stamp.REFERENCE, *OF_A_FRAME)
    references = b"".join(map(reference, images))
    groups = b"".join(
        group(
            images[plane]
            | {
                "DimensionIndexValues": pack("<2L", layer + 1, place) if binary else pack("<L", place),
                "ReferencedSegmentNumber": pack("<H", layer + 1),
            }
        )
        for layer, plane, place in frames
    )
    made.NumberOfFrames = len(frames)
    if layers == 1 and _is_volume(series, frames):
        made.DimensionOrganizationType = "3D"
    return [
        stamp.Encoded(made, "SourceImageSequence", references),
        stamp.Encoded(made.ReferencedSeriesSequence[0], "ReferencedInstanceSequence", references),
        stamp.Encoded(made, "PerFrameFunctionalGroupsSequence", groups),
    ]


OF_A_FRAME = ("ImagePositionPatient", "DimensionIndexValues", "ReferencedSegmentNumber")
"""What differs in the functional groups of one frame and the next, beside the image."""


def _image(instance: Instance) -> dict[str, bytes]:
    position = [str(DS(value, auto_format=True)) for value in instance.image_position_patient or ()]
    return stamp.reference(instance) | {"ImagePositionPatient": stamp.decimals(position)}


def _is_volume(series: Series, frames: Sequence[Frame]) -> bool:
    """Whether the frames are planes of one volume, evenly apart (PS3.3 C.7.6.17, 3D)."""
    positions = _positions(series)
    planes = sorted(plane for _, plane, _ in frames)
    spacing, _ = get_volume_positions([positions[plane] for plane in planes], series.orientation, sort=False)
    return len(planes) > 1 and bool(spacing)


def packed(frames: Sequence[Mask]) -> bytes:
    """Frames follow each other bit by bit (PS3.5 8.1.1): those of eight are whole bytes, of any size."""
    pieces = (np.stack(frames[first : first + 8]) for first in range(0, len(frames), 8))
    return b"".join(np.packbits(piece, bitorder="little").tobytes() for piece in pieces)


def _label_maps(made: Segmentation, frames: Iterable[Sequence[Mask]]) -> bytes:
    """Each frame is given as the masks of its segments."""
    return encapsulate([_label_map(made, masks) for masks in frames])


def _label_map(made: Segmentation, masks: Sequence[Mask]) -> bytes:
    labels = np.zeros(masks[0].shape, np.uint8)
    for number, mask in enumerate(masks, 1):
        labels += number * mask.view(np.uint8)
    return bytes(encode_frame(labels, made.file_meta.TransferSyntaxUID, 8, 8, made.PhotometricInterpretation))
