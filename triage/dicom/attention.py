"""Where a network looked, as pictures for a person: of each slice the CT, and beside it each map over it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from triage.dicom.files import make_folder
from triage.dicom.pictures import upright, windowed
from triage.domain import Findings, Volume, two_decimals
from triage.errors import Retryable

WIDTH = 256
"""Of one panel; the height follows from the slice."""
HEAT = (255, 90, 0)
OPAQUE = 0.7
"""Share of ``HEAT`` where a map is at its highest."""

Grey = NDArray[np.uint8]


def write(volume: Volume, findings: Findings, folder: Path) -> None:
    """``slice_0001.png``… for every slice that shows lung, numbered as in ``volume``; turned as CT is read.

    Nothing where the network has no attention maps. Raises Retryable when the disk refuses.
    """
    if not findings.attention:
        return
    make_folder(folder)
    for index in map(int, np.flatnonzero(findings.lung_mask.any(axis=(1, 2)))):
        try:
            _panels(volume, findings, index).save(folder / f"slice_{index + 1:04}.png")
        except OSError as error:
            raise Retryable(f"cannot write to {folder}: {error.strerror or error}") from error


def _panels(volume: Volume, findings: Findings, index: int) -> Image.Image:
    maps = {name: map_[index] for name, map_ in findings.attention.items()}
    height, width = next(iter(maps.values())).shape
    size = (WIDTH, round(WIDTH * height / width))
    plane = np.ascontiguousarray(windowed(upright(volume.array[index], volume.orientation)))
    ct = Image.fromarray(plane).resize(size, Image.Resampling.BILINEAR)
    score = "" if findings.slice_scores is None else f"  P {two_decimals(findings.slice_scores[index])}"
    panels = [_titled(ct.convert("RGB"), f"slice {index + 1}{score}")]
    panels += [_titled(_heated(ct, map_), name) for name, map_ in maps.items()]
    row = Image.new("RGB", (len(panels) * WIDTH, size[1]))
    for number, panel in enumerate(panels):
        row.paste(panel, (number * WIDTH, 0))
    return row


def _heated(ct: Image.Image, map_: Grey) -> Image.Image:
    large = Image.fromarray(np.ascontiguousarray(map_)).resize(ct.size, Image.Resampling.BILINEAR)
    return Image.composite(
        Image.new("RGB", ct.size, HEAT), ct.convert("RGB"), large.point(lambda value: OPAQUE * value)
    )


def _titled(panel: Image.Image, title: str) -> Image.Image:
    ImageDraw.Draw(panel).text((6, 4), title, (238, 240, 244), ImageFont.load_default(size=14))
    return panel
