"""The turning 3D view: translucent lungs with the infection in solid red, as colour frames of one object.

Rendered from the masks alone, on the processor and without a display: cells are turned about the patient's
head-feet axis and laid over one another from front to back, each with an opacity and a shade (volume
rendering after Levoy, IEEE CG&A 8(3), 1988; parallel rays, Lambert's law). Lungs are drawn where their
border is, and more opaque where it is seen edge-on, as glass is; lesions are drawn filled.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
from highdicom.base import SOPClass
from highdicom.sc import ConversionTypeValues
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from pydicom.tag import Tag
from pydicom.uid import ExplicitVRLittleEndian, MultiFrameTrueColorSecondaryCaptureImageStorage
from scipy.ndimage import gaussian_filter
from scipy.sparse import csr_array

from triage.dicom import objects, source
from triage.dicom.cells import Cells, box, shares
from triage.dicom.pictures import BLACK, GREY, WHITE, Colour, Picture, patient_axes
from triage.domain import Findings, Mask, ModelInfo, Result, ResultKind, ResultObject, Series, Vector, Volume

Frames = NDArray[np.uint8]
Angle = float
"""Degrees from the front, growing to the patient's left."""

FRAMES = 36
SIZE = 320
BAND_HEIGHT = 24
"""Below the view, for the disclaimer."""
CELL_MM = 2.0
LUNG_BLUR_MM, LESION_BLUR_MM = 2.5, 1.5
STEEPEST = 2.5
"""Brings the slope of a flat border, blurred so, to about 1."""
FRAME_TIME_MS = 125
"""One turn in four and a half seconds."""

LUNGS: Colour = (168, 206, 236)
LESIONS: Colour = (255, 44, 36)
LIGHT = np.array([-0.60, -0.60, -0.53])
"""From the patient to the lamp, as (depth, down, right in the picture): over the viewer's left shoulder."""
AMBIENT = 0.32
WALL, RIM = 0.03, 0.18
"""Opacity of a cell of the lungs' border seen face-on, and what is added where it is seen edge-on."""
FULL_SHARE = 0.35
"""A cell filled this far with lesion is as opaque as a full one: specks are seen too."""
SOLID = 0.8
GLASS_GAIN, SOLID_GAIN = 1.3, 1.2
"""How bright what little light such thin layers send is drawn."""
FARTHEST = 0.6
"""What is left of the light at the far end of the view, so that near and far are told apart."""


@dataclass(frozen=True, slots=True)
class Body:
    """One mask in cells of ``CELL_MM``: axes (front to back, right to left, head to feet).

    share: how far each cell is filled; border: 1 where that changes sharply; normals: unit vectors that
    point out of the body, (3, …) in the order of the axes.
    """

    share: Cells
    border: Cells
    normals: Cells


def render(volume: Volume, findings: Findings) -> Frames:
    """Frames of one whole turn, uint8 (36, 320, 320, 3), 10° apart, from the front to the patient's left.

    Head up. No patient data: letters say what lies on either side. Without lesions, or without a lesion
    mask, only the lungs are drawn. Raises ValueError when there is nothing to draw.
    """
    lungs, lesions = _bodies(volume, findings)
    reach = _reach(lungs.share + lesions.share)
    angles = np.linspace(0, 360, FRAMES, endpoint=False)
    return np.stack([_framed(_seen(lungs, lesions, angle, reach), angle) for angle in angles])


def _bodies(volume: Volume, findings: Findings) -> tuple[Body, Body]:
    """Lungs and lesions, cut to the box of both."""
    order, flips = patient_axes(volume.orientation)
    head, back, left = (volume.spacing[axis] for axis in order)
    lung = findings.lung_mask.transpose(order)[flips]
    lesion = np.zeros_like(lung)
    if findings.lesion_mask is not None:
        lesion = findings.lesion_mask.transpose(order)[flips]
    here = box(lung | lesion)
    sizes = (head, back, left)
    return _body(lung[here], sizes, LUNG_BLUR_MM), _body(lesion[here], sizes, LESION_BLUR_MM)


def _body(mask: Mask, spacing: Vector, blur_mm: float) -> Body:
    """Thick slices leave steps; they are smoothed away with half their own height."""
    sigma = [max(blur_mm, mm / 2) / CELL_MM for mm in spacing]
    share: Cells = gaussian_filter(shares(mask, spacing, CELL_MM), sigma).transpose(1, 2, 0)
    slope = -np.asarray(np.gradient(share))
    steep = np.sqrt((slope**2).sum(axis=0))
    return Body(share, np.clip(STEEPEST * steep, 0, 1), slope / np.maximum(steep, 1e-4))


def _reach(share: Cells) -> int:
    """Cells from the axis of the turn to the farthest one that is filled: no view needs more."""
    rows, columns = np.nonzero((share > 0.01).any(axis=2))
    middle = (np.array(share.shape[:2]) - 1) / 2
    return int(np.ceil(np.hypot(rows - middle[0], columns - middle[1]).max())) + 1


def _seen(lungs: Body, lesions: Body, angle: Angle, reach: int) -> Picture:
    """One view as it falls on the cells: uint8 (head to feet, left to right in the picture, 3)."""
    cosine, sine = np.float32(np.cos(np.radians(angle))), np.float32(np.sin(np.radians(angle)))
    depth = np.array([cosine, -sine, 0], np.float32)  # in the cells' axes: front-back, right-left, head-feet
    right = np.array([sine, cosine, 0], np.float32)
    lamp = LIGHT[0] * depth + LIGHT[1] * np.array([0, 0, 1]) + LIGHT[2] * right
    lamp = (lamp / np.linalg.norm(lamp)).astype(np.float32)

    edge_on = 1 - np.abs(_along(lungs.normals, depth))
    glass = lungs.border * (WALL + RIM * edge_on**2)
    solid = SOLID * np.clip(lesions.share / FULL_SHARE, 0, 1)
    glass_light = AMBIENT + (1 - AMBIENT) * np.abs(_along(lungs.normals, lamp))
    solid_light = AMBIENT + (1 - AMBIENT) * np.clip(_along(lesions.normals, lamp), 0, 1)
    layers = np.stack(
        [1 - (1 - glass) * (1 - solid), glass * (1 - solid) * glass_light, solid * solid_light], axis=2
    )
    columns, feet = 2 * reach + 1, lungs.share.shape[2]
    turned = _turn(cosine, sine, reach, lungs.share.shape[:2]) @ layers.reshape(-1, 3 * feet)
    return _laid_over(turned.reshape(columns, columns, 3, feet))


def _along(normals: Cells, direction: NDArray[np.float32]) -> Cells:
    y, x, z = direction
    along: Cells = normals[0] * y + normals[1] * x
    return along + normals[2] * z if z else along


def _turn(cosine: np.float32, sine: np.float32, reach: int, shape: tuple[int, int]) -> csr_array:
    """The matrix that reads turned cells (depth, column) from those at rest, linearly between four."""
    steps = np.arange(-reach, reach + 1)
    depth, column = (grid.ravel() for grid in np.meshgrid(steps, steps, indexing="ij"))
    y = depth * cosine + column * sine + (shape[0] - 1) / 2
    x = column * cosine - depth * sine + (shape[1] - 1) / 2
    rows, places, weights = [], [], []
    for near_y in (np.floor(y), np.floor(y) + 1):
        for near_x in (np.floor(x), np.floor(x) + 1):
            inside = (near_y >= 0) & (near_y < shape[0]) & (near_x >= 0) & (near_x < shape[1])
            weight = (1 - np.abs(y - near_y)) * (1 - np.abs(x - near_x))
            rows.append(np.flatnonzero(inside))
            places.append((near_y * shape[1] + near_x)[inside].astype(int))
            weights.append(weight[inside].astype(np.float32))
    entries = (np.concatenate(weights), (np.concatenate(rows), np.concatenate(places)))
    return csr_array(entries, shape=(depth.size, shape[0] * shape[1]))


def _laid_over(turned: Cells) -> Picture:
    """Front to back: (depth, columns, [opacity, light of the lungs, light of the lesions], head to feet)."""
    clear = np.ones_like(turned[0, :, 0])
    light = np.zeros_like(turned[0, :, 1:])
    fog = np.linspace(1, FARTHEST, len(turned), dtype=np.float32)
    for layer, brightness in zip(turned, fog, strict=True):
        light += (brightness * clear)[:, None] * layer[:, 1:]
        clear *= 1 - layer[:, 0]
    colours = np.array([BLACK, LUNGS, LESIONS], np.float32)
    amounts = np.stack([clear, GLASS_GAIN * light[:, 0], SOLID_GAIN * light[:, 1]])
    picture: Picture = np.einsum("mcz,mk->zck", amounts, colours).clip(0, 255).astype(np.uint8)
    return picture


def _framed(view: Picture, angle: Angle) -> Picture:
    """The view in the middle of a square, with its sides and what it is not."""
    room = SIZE - BAND_HEIGHT
    scale = min(SIZE / view.shape[1], room / view.shape[0])
    size = round(view.shape[1] * scale), round(view.shape[0] * scale)
    image = Image.fromarray(view).resize(size, Image.Resampling.BICUBIC)
    canvas = Image.new("RGB", (SIZE, SIZE), BLACK)
    canvas.paste(image, ((SIZE - image.width) // 2, (room - image.height) // 2))
    draw = ImageDraw.Draw(canvas)
    right, left = sides(angle)
    draw.text((8, 4), right, WHITE, _font(24))
    draw.text((SIZE - 8, 4), left, WHITE, _font(24), anchor="ra")
    draw.text((SIZE // 2, SIZE - 12), objects.DISCLAIMER, GREY, _font(13), anchor="mm")
    return np.asarray(canvas)


def sides(angle: Angle) -> tuple[str, str]:
    """Which side of the patient lies left and right in the picture: ("R", "L") from the front.

    Between two sides both are named, the nearer one first, as PS3.3 C.7.6.1.1.1 has it.
    """
    to_left, to_back = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    return _letters(-to_left, -to_back), _letters(to_left, to_back)


def _letters(to_left: float, to_back: float) -> str:
    parts = {("L" if to_left > 0 else "R"): abs(to_left), ("P" if to_back > 0 else "A"): abs(to_back)}
    return "".join(sorted((letter for letter in parts if parts[letter] > 0.38), key=lambda x: -parts[x]))


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def write(
    frames: Frames, series: Series, result: Result, info: ModelInfo, folder: Path, *, now: datetime
) -> ResultObject:
    """Write the frames as a Multi-frame True Color Secondary Capture (PS3.3 A.8.5) that plays by itself.

    Uncompressed: every archive has to take that, and the lossless packing that old viewers know too (RLE)
    only halves it. Raises Retryable when source or disk fail.
    """
    patient = source.patient(series)
    capture = SOPClass(
        sop_class_uid=MultiFrameTrueColorSecondaryCaptureImageStorage,
        transfer_syntax_uid=ExplicitVRLittleEndian,
        modality="OT",
        study_instance_uid=result.study_instance_uid,
        **objects.identity(ResultKind.VIEW_3D, result, info, now),
    )
    _describe(capture)
    _set_frames(capture, frames)
    return objects.write(ResultKind.VIEW_3D, capture, patient, folder, now)


def _describe(capture: SOPClass) -> None:
    """What viewers and archives should know: nothing in it identifies the patient."""
    capture.ImageType = ["DERIVED", "SECONDARY"]
    capture.ConversionType = ConversionTypeValues.WSD.value
    capture.BodyPartExamined = "CHEST"  # without it, Laterality would be demanded
    capture.PatientOrientation = ""  # another one in each frame
    capture.BurnedInAnnotation = "NO"
    capture.RecognizableVisualFeatures = "NO"
    capture.DerivationDescription = "Lungs translucent, lesions red, one whole turn. " + objects.DISCLAIMER


def _set_frames(capture: SOPClass, frames: Frames) -> None:
    """Pixels, and how long each is shown (PS3.3 C.7.6.5, C.7.6.6, C.8.6.3)."""
    capture.NumberOfFrames, capture.Rows, capture.Columns, capture.SamplesPerPixel = frames.shape
    capture.PhotometricInterpretation = "RGB"
    capture.PlanarConfiguration = 0
    capture.BitsAllocated = capture.BitsStored = 8
    capture.HighBit = 7
    capture.PixelRepresentation = 0
    capture.FrameIncrementPointer = Tag("FrameTime")
    capture.FrameTime = FRAME_TIME_MS
    capture.RecommendedDisplayFrameRate = capture.CineRate = round(1000 / FRAME_TIME_MS)
    capture.PreferredPlaybackSequencing = 0  # round and round
    capture.PixelData = frames.tobytes()
    capture["PixelData"].VR = "OB"
