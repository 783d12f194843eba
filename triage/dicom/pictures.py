"""The glance picture: an X-ray-like coronal view with the lungs coloured by local severity.

Companion of figure 1 of Goncharov et al.: seen from the front, head up, the patient's right on the left
of the picture; each ray from chest to back is coloured by the affected share of the lung it crosses.
And what it shares with other pictures: how a chest is turned and shown, and how a picture is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from io import BytesIO
from pathlib import Path
from typing import TypeVar

import numpy as np
from highdicom.sc import ConversionTypeValues, SCImage
from highdicom.sr import CodedConcept
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from pydicom.dataset import Dataset
from scipy.ndimage import gaussian_filter

from triage.dicom import codes, objects, source
from triage.dicom.files import write_durably
from triage.domain import (
    Findings,
    Grade,
    Instance,
    Mask,
    ModelInfo,
    Result,
    ResultKind,
    ResultObject,
    Series,
    Severity,
    Status,
    Volume,
    percent,
    two_decimals,
)

Picture = NDArray[np.uint8]
Plane = NDArray[np.float32]
Colour = tuple[int, int, int]
Pixel = TypeVar("Pixel", bound=np.generic)

WIDTH, VIEW_HEIGHT, BAND_HEIGHT = 768, 576, 192
MARGIN_MM = 12.0
SMOOTHING_MM = 4.0
FULL_RED = 0.5
"""From this affected share of a ray on, the lung is drawn red."""
OPAQUE_MM = 70.0
"""Lung depth from which on the colour is at its strongest; thinner lung fades into the X-ray."""

WINDOW = (-1350, 150)
"""HU of black and of white: the usual window for lungs."""
BLACK: Colour = (10, 12, 16)
WHITE: Colour = (238, 240, 244)
GREY: Colour = (150, 156, 166)
UNKNOWN: Colour = (92, 132, 190)
RAMP: tuple[Colour, ...] = ((46, 184, 92), (242, 201, 46), (226, 44, 44))
GRADE_COLOURS: dict[Grade | None, Colour] = {
    None: (84, 92, 106),
    Grade.CT0: (38, 132, 70),
    Grade.CT1: (140, 134, 30),
    Grade.CT2: (196, 126, 20),
    Grade.CT3: (208, 72, 28),
    Grade.CT4: (184, 24, 32),
}


SHOWN: Mapping[ResultKind, tuple[tuple[str, str], str]] = {
    ResultKind.PICTURE: (("L", "F"), "Lungs coloured by affected share along each ray."),
    ResultKind.KEY_SLICES: (("L", "P"), "Slices with most lesion in lung window, lesions outlined."),
}
"""Where rows and columns of each picture run, and what it shows."""


@dataclass(frozen=True, slots=True)
class Rays:
    """What the rays from front to back cross, as (rows from head to feet, columns from right to left).

    attenuation: water-equivalent depth in mm; lung: depth of lung in mm; affected: share of that depth
    in [0, 1], or None when no mask says; spacing: (row, column) in mm.
    """

    attenuation: Plane
    lung: Plane
    affected: Plane | None
    spacing: tuple[float, float]


def summary(volume: Volume, findings: Findings, severity: Severity, result: Result) -> Picture:
    """Draw the picture, uint8 (768, 768, 3); it never carries patient data.

    Raises ValueError without a lung mask: there is nothing to look at.
    """
    rays = project(volume, findings)
    canvas = Image.new("RGB", (WIDTH, VIEW_HEIGHT + BAND_HEIGHT), BLACK)
    view = _fit(Image.fromarray(_coloured(rays)), rays.spacing)
    canvas.paste(view, ((WIDTH - view.width) // 2, (VIEW_HEIGHT - view.height) // 2))
    _caption(ImageDraw.Draw(canvas), severity, result)
    return np.asarray(canvas)


def project(volume: Volume, findings: Findings) -> Rays:
    """Sum along the patient's antero-posterior axis, over the box of the lungs and a margin.

    Leaving out what lies before and behind the lungs takes the table away.
    """
    order, flips = patient_axes(volume.orientation)
    spacing = tuple(volume.spacing[axis] for axis in order)
    array = volume.array.transpose(order)[flips]
    lung = findings.lung_mask.transpose(order)[flips]
    box = _box(lung, spacing)
    depth = _depth(lung[box], spacing[1])
    affected = None
    if findings.lesion_mask is not None:
        lesion = findings.lesion_mask.transpose(order)[flips][box] & lung[box]
        affected = _share(_depth(lesion, spacing[1]), depth, (spacing[0], spacing[2]))
    water = (
        np.clip(array[box], -1000, 1000).sum(axis=1, dtype=np.int32) / np.float32(1000) + array[box].shape[1]
    )
    return Rays((water * spacing[1]).astype(np.float32), depth, affected, (spacing[0], spacing[2]))


def patient_axes(orientation: tuple[float, ...]) -> tuple[tuple[int, int, int], tuple[slice, slice, slice]]:
    """Which array axis runs feet–head, front–back and right–left, and how to turn them.

    Returns the axes in that order and slices that make them run from head to feet, from front to back and
    from the patient's right to left. Array axes are (slices along the normal, rows, columns) and
    ``orientation`` is ImageOrientationPatient (PS3.3 C.7.6.2.1.1, LPS).
    """
    row, column = np.array(orientation[:3]), np.array(orientation[3:])
    directions = np.array([np.cross(row, column), column, row])
    head = int(np.abs(directions[:, 2]).argmax())
    left = max({0, 1, 2} - {head}, key=lambda axis: abs(directions[axis, 0]))
    (back,) = {0, 1, 2} - {head, left}
    as_stored, turned = slice(None), slice(None, None, -1)
    from_head = turned if directions[head, 2] > 0 else as_stored
    from_front = as_stored if directions[back, 1] > 0 else turned
    from_right = as_stored if directions[left, 0] > 0 else turned
    return (head, back, left), (from_head, from_front, from_right)


def upright(plane: NDArray[Pixel], orientation: tuple[float, ...]) -> NDArray[Pixel]:
    """An axial slice (rows, columns) as it is read: rows run to the back, columns to the patient's left."""
    (_, back, _), (_, rows, columns) = patient_axes(orientation)
    return (plane if back == 1 else plane.T)[rows, columns]


def windowed(hu: NDArray[np.int16]) -> NDArray[np.uint8]:
    """Grey values, from black to white over ``WINDOW``."""
    low, high = WINDOW
    grey: NDArray[np.uint8] = ((np.clip(hu, low, high) - low) * (255 / (high - low))).astype(np.uint8)
    return grey


def _box(lung: Mask, spacing: tuple[float, ...]) -> tuple[slice, slice, slice]:
    rows, columns = np.nonzero(lung.any(axis=1))
    if not rows.size:
        raise ValueError("no lungs to draw")
    depths = np.flatnonzero(lung.any(axis=(0, 2)))
    return (
        span(rows, round(MARGIN_MM / spacing[0])),
        span(depths, 0),
        span(columns, round(MARGIN_MM / spacing[2])),
    )


def span(indices: NDArray[np.intp], margin: int) -> slice:
    return slice(max(0, int(indices.min()) - margin), int(indices.max()) + 1 + margin)


def _depth(mask: Mask, spacing: float) -> Plane:
    depth: Plane = mask.sum(axis=1, dtype=np.uint16).astype(np.float32) * np.float32(spacing)
    return depth


def _share(lesion: Plane, lung: Plane, spacing: tuple[float, float]) -> Plane:
    sigma = [SMOOTHING_MM / mm for mm in spacing]
    smooth_lung = gaussian_filter(lung, sigma)
    return np.divide(
        gaussian_filter(lesion, sigma), smooth_lung, out=np.zeros_like(lung), where=smooth_lung > 1
    ).clip(0, 1)


def _coloured(rays: Rays) -> Picture:
    low, high = np.percentile(rays.attenuation, (2, 99.5))
    gray = np.clip((rays.attenuation - low) / max(high - low, 1e-3), 0, 1)[..., None]
    xray = 235 * gray**0.9
    opacity = 0.8 * np.clip(rays.lung / OPAQUE_MM, 0, 1)[..., None] ** 0.6
    tint = np.asarray(UNKNOWN) if rays.affected is None else _ramp(rays.affected)
    lungs = tint * (0.75 + 0.4 * gray)
    mixed: Picture = (xray * (1 - opacity) + lungs * opacity).clip(0, 255).astype(np.uint8)
    return mixed


def _ramp(affected: Plane) -> NDArray[np.float64]:
    stops = np.linspace(0, FULL_RED, len(RAMP))
    return np.stack([np.interp(affected, stops, channel) for channel in zip(*RAMP, strict=True)], axis=-1)


def _fit(image: Image.Image, spacing: tuple[float, float]) -> Image.Image:
    height, width = image.height * spacing[0], image.width * spacing[1]
    scale = min(VIEW_HEIGHT / height, WIDTH / width)
    return image.resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC)


def _caption(draw: ImageDraw.ImageDraw, severity: Severity, result: Result) -> None:
    """Sides on the view; below it the figures, the grade, the answer, the scale and what this is not."""
    middle, edge, top = WIDTH // 2, 20, VIEW_HEIGHT
    draw.text((edge, 12), "R", WHITE, font(44))
    draw.text((WIDTH - edge, 12), "L", WHITE, font(44), anchor="ra")
    for name, fraction, x, anchor in (
        ("R", severity.affected_right, edge, "lm"),
        ("L", severity.affected_left, WIDTH - edge, "rm"),
    ):
        if fraction is not None:
            draw.text((x, top + 44), f"{name} {percent(fraction)}", WHITE, font(56), anchor=anchor)
    draw.rounded_rectangle((middle - 100, top + 8, middle + 100, top + 80), 16, GRADE_COLOURS[severity.grade])
    grade = severity.grade.value if severity.grade else "CT ?"
    draw.text((middle, top + 44), grade, WHITE, font(56), anchor="mm")
    draw.text((middle, top + 110), _answer(result), WHITE, font(34), anchor="mm")
    _scale(draw, edge, top + 146, severity)
    draw.text((middle, top + 176), objects.DISCLAIMER, GREY, font(22), anchor="mm")


def _scale(draw: ImageDraw.ImageDraw, x: int, y: int, severity: Severity) -> None:
    if severity.affected_fraction is None:
        draw.text((WIDTH // 2, y), "affected lung: not measured", GREY, font(22), anchor="mm")
        return
    which = "lung" if severity.affected_left is None or severity.affected_right is None else "worse lung"
    draw.text((x, y), f"{which} {percent(severity.affected_fraction)}", WHITE, font(24), anchor="lm")
    draw.text((x + 400, y), "share of ray  0 %", GREY, font(20), anchor="rm")
    for i, colour in enumerate(_ramp(np.linspace(0, FULL_RED, 220, dtype=np.float32))):
        red, green, blue = (int(channel) for channel in colour)
        draw.line((x + 410 + i, y - 9, x + 410 + i, y + 9), (red, green, blue))
    draw.text((x + 640, y), f"{100 * FULL_RED:.0f} % +", GREY, font(20), anchor="lm")


def _answer(result: Result) -> str:
    answer = {Status.POSITIVE: "POSITIVE", Status.NEGATIVE: "negative"}[result.status]
    if result.probability is None:
        return answer
    kind = "score" if result.probability_kind == "score" else "P"
    calibration = "" if result.calibrated else ", not calibrated"
    return f"{answer}   {kind} {two_decimals(result.probability)}{calibration}"


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def write_secondary_capture(
    picture: Picture,
    series: Series,
    result: Result,
    info: ModelInfo,
    folder: Path,
    *,
    now: datetime,
    kind: ResultKind = ResultKind.PICTURE,
    images: Sequence[Instance] = (),
) -> ResultObject:
    """Write the picture as a colour Secondary Capture (PS3.3 A.8.1) of the study.

    ``images`` are the slices that a picture of a few shows. Raises Retryable when source or disk fail.
    """
    patient = source.patient(series)
    patient_orientation, description = SHOWN[kind]
    image = SCImage(
        pixel_array=picture,
        photometric_interpretation="RGB",
        bits_allocated=8,
        coordinate_system="PATIENT",
        patient_orientation=patient_orientation,
        study_instance_uid=result.study_instance_uid,
        **objects.identity(kind, result, info, now),
    )
    _describe(image, description)
    if images:
        image.SourceImageSequence = [_source_image(instance) for instance in images]
    return objects.write(kind, image, patient, folder, now)


def _describe(image: Dataset, description: str) -> None:
    """What viewers and archives should know: nothing in it identifies the patient."""
    image.ImageType = ["DERIVED", "SECONDARY"]
    image.ConversionType = ConversionTypeValues.WSD.value
    image.BodyPartExamined = "CHEST"  # without it, Laterality would be demanded
    image.BurnedInAnnotation = "NO"
    image.RecognizableVisualFeatures = "NO"
    image.DerivationDescription = f"{description} {objects.DISCLAIMER}"


def _source_image(instance: Instance) -> Dataset:
    """Lets a viewer go from the picture to the slice (General Reference, PS3.3 C.12.4)."""
    item = Dataset()
    item.ReferencedSOPClassUID = instance.sop_class_uid
    item.ReferencedSOPInstanceUID = instance.sop_instance_uid
    item.PurposeOfReferenceCodeSequence = [CodedConcept.from_code(codes.SOURCE_IMAGE)]
    return item


def write_thumbnail(picture: Picture, path: Path) -> None:
    """Write the picture as PNG of 256 pixels' width. Raises Retryable when the disk refuses."""
    image = Image.fromarray(picture)
    size = (256, round(256 * image.height / image.width))
    write_png(np.asarray(image.resize(size, Image.Resampling.LANCZOS)), path)


def write_png(picture: Picture, path: Path) -> None:
    """Write the picture as it is. Raises Retryable when the disk refuses."""
    buffer = BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", compress_level=3)  # as small as 6, in half the time
    write_durably(path, buffer.getbuffer())
