"""Training data as the networks see it: canonical slices at 2 mm, with masks, by patient.

Layouts read (the folder is given, nothing is downloaded):

    medseg9_<volume>_<patient>.npz   gray uint8 (z, y, x) with hu_lo, hu_hi; lung; lesion; patient
    semiseg50/Imgs/N.jpg, GT/N.png   one picture a slice, cropped to the lungs and turned by 90°
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from triage.domain import Mask, Volume
from triage.errors import ConfigError
from triage.models.preprocessing import HU_WINDOW, MARGIN, bounding_box, prepare, resample

MEDSEG_SPACING = (1.0, 1.25, 1.25)
"""In plane about right; along z unknown, so nothing may be measured in ml or mm on this set."""
SEMISEG_WINDOW = (-1400.0, 200.0)
"""Assumed: the pictures carry none. Augmentation varies it."""
SEMISEG_WIDTH = 145
"""Pixels of 2 mm across a picture: it is cropped to both lungs, about 290 mm."""


@dataclass(frozen=True, slots=True)
class Case:
    """One volume with the masks that were drawn on it, as an evaluation needs it."""

    name: str
    patient: str
    volume: Volume
    lung: Mask
    lesion: Mask


@dataclass(frozen=True, slots=True)
class Scan:
    """One volume or picture: slices (z, h, w) in [0, 1]; masks of the same shape."""

    name: str
    patient: str
    slices: Tensor
    lesion: Tensor
    lung: Tensor

    @property
    def has_lung(self) -> bool:
        """Pictures come without a lung mask: theirs is empty."""
        return bool(self.lung.any())

    def cropped(self) -> Scan:
        """To the lungs' bounding box, as inference does before the multitask network."""
        box = bounding_box(self.lung.numpy(), MARGIN)
        return Scan(self.name, self.patient, self.slices[box], self.lesion[box], self.lung[box])


@dataclass(frozen=True, slots=True)
class Split:
    """Scans by patient: no patient is in two parts."""

    train: tuple[Scan, ...]
    validation: tuple[Scan, ...]
    test: tuple[Scan, ...]


def split(scans: Iterable[Scan], validation: Sequence[str], test: Sequence[str]) -> Split:
    """Every scan of a named patient goes to that part, all others are trained on.

    Raises ConfigError for a patient who is named twice or has no scan.
    """
    scans = tuple(scans)
    both = set(validation) & set(test)
    missing = {*validation, *test} - {s.patient for s in scans}
    if both or missing:
        names = ", ".join(sorted({s.patient for s in scans if s.has_lung}))
        raise ConfigError(
            f"patients {sorted(both | missing)}: each must exist, in one part only; there are {names}"
        )
    held_out = {*validation, *test}
    return Split(
        tuple(s for s in scans if s.patient not in held_out),
        tuple(s for s in scans if s.patient in validation),
        tuple(s for s in scans if s.patient in test),
    )


def read(folder: Path) -> tuple[Scan, ...]:
    """Every scan of a data folder. Raises ConfigError where there is none."""
    scans = (*medseg9(folder), *semiseg50(folder / "semiseg50"))
    if not scans:
        raise ConfigError(f"{folder} holds no medseg9_*.npz and no semiseg50/: see triage/training/data.py")
    return scans


def medseg9(folder: Path) -> list[Scan]:
    return [_scan(case) for case in cases(folder)]


def cases(folder: Path) -> Iterator[Case]:
    """The volumes with both masks, one at a time, on their own grid."""
    for path in sorted(folder.glob("medseg9_*.npz")):
        with np.load(path) as data:
            low, high = float(data["hu_lo"]), float(data["hu_hi"])
            hu = low + data["gray"].astype(np.float32) / 255 * (high - low)
            volume = Volume(hu.astype(np.int16), MEDSEG_SPACING)
            yield Case(path.stem, str(data["patient"]), volume, data["lung"] > 0, data["lesion"] > 0)


def _scan(case: Case) -> Scan:
    slices = prepare(case.volume)
    return Scan(case.name, case.patient, slices, _mask(case.lesion, slices), _mask(case.lung, slices))


def _mask(mask: Mask, like: Tensor) -> Tensor:
    size = (like.shape[1], like.shape[2])
    return resample(torch.from_numpy(mask.astype(np.float32)), size) > 0.5


def semiseg50(folder: Path) -> list[Scan]:
    return [_picture(path, folder / "GT" / f"{path.stem}.png") for path in sorted(folder.glob("Imgs/*.jpg"))]


def _picture(image: Path, mask: Path) -> Scan:
    low, high = SEMISEG_WINDOW
    hu = low + _upright(image) / 255 * (high - low)
    size = (max(1, round(hu.shape[0] * SEMISEG_WIDTH / hu.shape[1])), SEMISEG_WIDTH)
    window = (np.clip(hu, *HU_WINDOW) - HU_WINDOW[0]) / (HU_WINDOW[1] - HU_WINDOW[0])
    slices = resample(torch.from_numpy(window)[None], size)
    lesion = resample(torch.from_numpy(_upright(mask) / 255)[None], size) > 0.5
    return Scan(
        f"semiseg50_{image.stem}", f"semiseg50_{image.stem}", slices, lesion, torch.zeros_like(lesion)
    )


def _upright(path: Path) -> NDArray[np.float32]:
    """The pictures are stored with the front at the left: turned clockwise the spine lies below."""
    with Image.open(path) as picture:
        return np.rot90(np.asarray(picture.convert("L"), dtype=np.float32), -1).copy()
