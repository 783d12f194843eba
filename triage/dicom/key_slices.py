"""The key slices: the few axial slices with most lesion, in lung window, with what was found drawn on them.

A picture of its own, turned as an axial CT is read and cut to the lungs: lesions are outlined, each kind
in its colour where the network tells kinds apart, and lesions that it detects one by one are outlined and
boxed one by one, with their score. The original images are never marked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from triage.dicom import objects, pictures, seg
from triage.dicom.pictures import BLACK, GREY, WHITE, Colour, Picture, Pixel, font
from triage.domain import (
    DetectedLesion,
    Findings,
    Mask,
    ModelInfo,
    Result,
    ResultKind,
    ResultObject,
    Series,
    Volume,
    percent,
    two_decimals,
)

MOST = 4
APART_MM = 25.0
"""Least distance between two key slices: neighbours show the same."""
LEAST_SHARE = 0.05
"""Of the lesion area of the first: slices with less show a speck."""
MARGIN_MM = 12.0
"""Around the lungs: the chest wall helps to find one's way."""
PANEL = (576, 448)
"""Width of a slice's panel, and the greatest height of the slice in it, in pixels."""
TITLE_HEIGHT, LEGEND_HEIGHT, GAP = 34, 72, 8
FINE = 2
"""Lines are drawn so much larger, and smooth when made smaller."""
BOXES: Colour = (255, 226, 84)

Line = list[tuple[float, float]]
"""Points (x, y) in pixels of a panel."""


@dataclass(frozen=True, slots=True)
class View:
    """How every panel shows its slice: turned so, this part of it, as large as that (width, height)."""

    orientation: tuple[float, ...]
    part: tuple[slice, slice]
    size: tuple[int, int]

    def of(self, plane: NDArray[Pixel]) -> NDArray[Pixel]:
        """What is shown of a slice of the volume."""
        return np.ascontiguousarray(pictures.upright(plane, self.orientation)[self.part])

    def lines(self, mask: Mask) -> Iterator[Line]:
        """Around everything in what is shown of a mask, along the edges of its pixels, corners cut."""
        from skimage.measure import find_contours  # a second to load, for studies with lesions

        height, width = mask.shape
        for points in find_contours(np.pad(mask, 1).astype(np.float32), 0.5):
            y, x = (points.T - 0.5) * np.array([[self.size[1] / height], [self.size[0] / width]])
            yield list(zip(x.tolist(), y.tolist(), strict=True))


def choose(volume: Volume, findings: Findings) -> list[int]:
    """Indices of up to ``MOST`` slices with most lesion, ``APART_MM`` apart, from head to feet.

    None where there is no lesion, or no lesion mask.
    """
    if findings.lesion_mask is None:
        return []
    areas = np.array([np.count_nonzero(plane) for plane in findings.lesion_mask])
    least = max(1, LEAST_SHARE * areas.max())
    chosen: list[int] = []
    for index in map(int, np.argsort(-areas, kind="stable")):
        near = any(abs(index - other) * volume.spacing[0] < APART_MM for other in chosen)
        if areas[index] >= least and not near and len(chosen) < MOST:
            chosen.append(index)
    _, (from_head, _, _) = pictures.patient_axes(volume.orientation)
    return [index for index in range(len(areas))[from_head] if index in chosen]


def draw(series: Series, volume: Volume, findings: Findings, shown: Sequence[int]) -> Picture:
    """The slices ``shown``, two in a row, uint8 (height, width, 3); it never carries patient data."""
    view = _view(volume, findings)
    columns = min(len(shown), 2)
    rows = -(-len(shown) // columns)
    width, height = PANEL[0] + GAP, TITLE_HEIGHT + view.size[1]
    canvas = Image.new("RGB", (columns * width - GAP, rows * height + LEGEND_HEIGHT), BLACK)
    for number, index in enumerate(shown):
        place = (number % columns * width, number // columns * height)
        canvas.paste(_panel(series, volume, findings, index, view), place)
    _legend(canvas, rows * height, findings, shown)
    return np.asarray(canvas)


def _view(volume: Volume, findings: Findings) -> View:
    """Lungs and lesions of all slices, and a margin."""
    inside: Mask = np.asarray(findings.lung_mask.any(axis=0))
    if findings.lesion_mask is not None:
        inside |= findings.lesion_mask.any(axis=0)
    inside = pictures.upright(inside, volume.orientation)
    (_, back, left), _ = pictures.patient_axes(volume.orientation)
    spacing = volume.spacing[back], volume.spacing[left]
    rows, columns = (
        pictures.span(places, round(MARGIN_MM / mm))
        for places, mm in zip(np.nonzero(inside), spacing, strict=True)
    )
    height, width = (n * mm for n, mm in zip(inside[rows, columns].shape, spacing, strict=True))
    scale = min(PANEL[0] / width, PANEL[1] / height)
    return View(volume.orientation, (rows, columns), (round(width * scale), round(height * scale)))


def _panel(series: Series, volume: Volume, findings: Findings, index: int, view: View) -> Image.Image:
    """One slice with what was found in it, below a line that says which one it is."""
    drawn = _slice(volume, findings, index, view)
    panel = Image.new("RGB", (PANEL[0], TITLE_HEIGHT + drawn.height), BLACK)
    left = (PANEL[0] - drawn.width) // 2
    panel.paste(drawn, (left, TITLE_HEIGHT))
    pen = ImageDraw.Draw(panel)
    for lesion in _detected(findings, index):
        for line in view.lines(view.of(_box(lesion, findings))):
            x, y = left + min(x for x, _ in line), TITLE_HEIGHT + min(y for _, y in line)
            score = two_decimals(lesion.score)
            pen.text((x, y - 3), score, BOXES, font(16), "ls", stroke_width=2, stroke_fill=BLACK)
    pen.text((PANEL[0] // 2, TITLE_HEIGHT // 2), _title(series, findings, index), WHITE, font(19), "mm")
    for letter, x, anchor in (("R", 8, "la"), ("L", PANEL[0] - 8, "ra")):
        pen.text((x, TITLE_HEIGHT + 4), letter, WHITE, font(30), anchor, stroke_width=2, stroke_fill=BLACK)
    return panel


def _slice(volume: Volume, findings: Findings, index: int, view: View) -> Image.Image:
    grey = Image.fromarray(pictures.windowed(view.of(volume.array[index])))
    large = (FINE * view.size[0], FINE * view.size[1])
    drawn = grey.resize(large, Image.Resampling.BICUBIC).convert("RGB")
    pen = ImageDraw.Draw(drawn)

    def outline(mask: Mask, colour: Colour, width: int) -> None:
        for line in view.lines(view.of(mask)):
            pen.line([(FINE * x, FINE * y) for x, y in line], colour, width * FINE, "curve")

    detected = _detected(findings, index)
    for lesion in detected:  # below the outline of all, where they part one lesion from the next
        outline(_placed(lesion, lesion.mask, findings), BOXES, 1)
    for kind, mask in _parts(findings, index):
        outline(mask, kind.colour, 2)
    for lesion in detected:
        outline(_box(lesion, findings), BOXES, 1)
    return drawn.reduce(FINE)


def _parts(findings: Findings, index: int) -> list[tuple[seg.LesionKind, Mask]]:
    """The kinds of lesion that one slice shows."""
    if findings.lesion_mask is None:
        return []
    classes = {name: mask[index] for name, mask in findings.lesion_classes.items()}
    return seg.lesion_parts(findings.lesion_mask[index], classes)


def _detected(findings: Findings, index: int) -> list[DetectedLesion]:
    return [lesion for lesion in findings.detected or () if lesion.slice_index == index]


def _box(lesion: DetectedLesion, findings: Findings) -> Mask:
    return _placed(lesion, np.ones_like(lesion.mask), findings)


def _placed(lesion: DetectedLesion, mask: Mask, findings: Findings) -> Mask:
    """A mask of the lesion's box on a slice of the volume."""
    top, left, bottom, right = lesion.box
    plane = np.zeros(findings.lung_mask.shape[1:], dtype=bool)
    plane[top:bottom, left:right] = mask
    return plane


def _title(series: Series, findings: Findings, index: int) -> str:
    """Which slice it is, by the number that viewers show, and how much of its lung is affected."""
    numbers = [instance.instance_number for instance in series.instances]
    known = numbers[index] is not None and numbers.count(numbers[index]) == 1
    name = f"image {numbers[index]}" if known else f"slice {_from_head(series, index)} from the head"
    lung = findings.lung_mask[index]
    lesion = sum(int(np.count_nonzero(mask & lung)) for _, mask in _parts(findings, index))
    return f"{name}: {percent(lesion / max(1, int(np.count_nonzero(lung))))} of its lung affected"


def _from_head(series: Series, index: int) -> int:
    """Counted from 1, whichever way the series is stored."""
    _, (from_head, _, _) = pictures.patient_axes(series.orientation)
    return range(len(series.instances))[from_head].index(index) + 1


def _legend(canvas: Image.Image, top: int, findings: Findings, shown: Sequence[int]) -> None:
    """What the colours are, and what this is not."""
    found = {kind for index in shown for kind, _ in _parts(findings, index)}
    colours = {kind.label: kind.colour for kind in (seg.LESIONS, *seg.CLASSES.values()) if kind in found}
    if any(lesion.slice_index in shown for lesion in findings.detected or ()):
        colours["Detected, score"] = BOXES
    pen = ImageDraw.Draw(canvas)
    x = 16.0
    for label, colour in colours.items():
        pen.line((x, top + 24, x + 28, top + 24), colour, 4)
        pen.text((x + 38, top + 24), label, WHITE, font(19), "lm")
        x += 62 + pen.textlength(label, font(19))
    pen.text((canvas.width // 2, top + 54), objects.DISCLAIMER, GREY, font(18), "mm")


def write(
    picture: Picture,
    series: Series,
    shown: Sequence[int],
    result: Result,
    info: ModelInfo,
    folder: Path,
    *,
    now: datetime,
) -> ResultObject:
    """Write the picture as Secondary Capture that names the slices ``shown``; raises Retryable."""
    images = [series.instances[index] for index in shown]
    return pictures.write_secondary_capture(
        picture, series, result, info, folder, now=now, kind=ResultKind.KEY_SLICES, images=images
    )
