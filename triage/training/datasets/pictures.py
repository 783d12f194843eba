"""Sets of 8-bit pictures: each becomes a volume of one slice, in HU by an assumed window.

Pictures carry neither window nor pixel spacing. What is assumed for a set is said beside it; nothing may be
given in mm or ml.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from triage.domain import Volume
from triage.training.cases import Case, Diagnosis
from triage.training.datasets.files import existing, partner, readable, same_shape, wrong_folder

SEMISEG = "Imgs/<n>.jpg and GT/<n>.png, as COVID-SemiSeg's LungInfection-Train and -Test"
SARSCOV2 = "covid/ and non-covid/ with .jpg or .png, as folders or in one .zip"

LUNG_WINDOW = (-1400.0, 200.0)
"""HU of black and of white, assumed: the usual window for lungs. Augmentation varies it."""
SEMISEG_WINDOW = (-1080.0, 250.0)
"""Median over COVID-SemiSeg's first 40 slices, were clear lung -860 HU and muscle 40 HU."""
LUNGS_MM = 290.0
"""Width of a picture that is cropped to both lungs, assumed."""
SUFFIXES = (".jpg", ".jpeg", ".png")
BROKEN = (UnidentifiedImageError, OSError, zipfile.BadZipFile, zlib.error)
"""What Pillow and zipfile raise on what is cut or no picture."""

Grey = NDArray[np.uint8]
Entry = Path | zipfile.Path
"""A file or folder, on the disk or in an archive."""


def semiseg(folder: Path) -> Iterator[Case]:
    """COVID-SemiSeg (Fan et al., "Inf-Net", doi:10.1109/TMI.2020.2996645): slices cropped to the lungs.

    ``GT`` marks lesions of any kind; ``Edge`` and ``GT-multi`` may lie beside it. The pictures are stored
    with the front at the left: turned clockwise the spine lies below. No patient is known, so each picture
    counts as its own. Raises ConfigError.
    """
    for path in existing(folder, SEMISEG, *(f"Imgs/*{suffix}" for suffix in SUFFIXES)):
        mask_path = partner(folder / "GT" / f"{path.stem}.png", path)
        image, mask = grey(path), grey(mask_path)
        same_shape(mask, mask_path, image, path)
        yield Case(
            name=f"semiseg_{path.stem}",
            patient=f"semiseg_{path.stem}",
            volume=one_slice(np.rot90(image, -1), LUNGS_MM, SEMISEG_WINDOW),
            lesions=(np.rot90(mask, -1)[None] > 127,),
            diagnosis=Diagnosis.COVID,
            millimetres=False,
            cropped=True,
        )


def sarscov2(path: Path) -> Iterator[Case]:
    """The SARS-CoV-2 CT-scan set (Soares et al., doi:10.1101/2020.04.24.20078584): slices, no masks.

    ``non-covid`` are patients with other findings, not healthy ones. No patient is known, so each picture
    counts as its own: a split of this set shows nothing about patients. Raises ConfigError.
    """
    if path.is_file() or any(path.glob("*.zip")):
        archive = path if path.is_file() else existing(path, SARSCOV2, "*.zip")[0]
        with readable(archive, *BROKEN), zipfile.ZipFile(archive) as opened:
            yield from _sarscov2(zipfile.Path(opened), path)
    else:
        yield from _sarscov2(path, path)


def _sarscov2(root: Entry, path: Path) -> Iterator[Case]:
    folders = {entry.name.lower(): entry for entry in _entries(root)}
    groups = {"covid": Diagnosis.COVID, "non-covid": Diagnosis.OTHER}
    if not groups.keys() <= folders.keys():
        raise wrong_folder(path, SARSCOV2)
    for group, diagnosis in groups.items():
        for picture in _entries(folders[group]):
            if picture.suffix.lower() in SUFFIXES:
                name = f"sarscov2_{picture.stem}"
                yield Case(
                    name=name,
                    patient=name,
                    volume=one_slice(grey(picture), LUNGS_MM),
                    diagnosis=diagnosis,
                    millimetres=False,
                    cropped=True,
                )


def _entries(folder: Entry) -> list[Entry]:
    return sorted(folder.iterdir(), key=lambda entry: entry.name) if folder.is_dir() else []


def grey(path: Entry) -> Grey:
    """The brightness of a picture, (rows, columns). Raises ConfigError."""
    with readable(path, *BROKEN), path.open("rb") as file, Image.open(file) as picture:
        return np.asarray(picture.convert("L"))


def one_slice(image: Grey, width_mm: float, window: tuple[float, float] = LUNG_WINDOW) -> Volume:
    """A picture of this width as a volume (1, rows, columns) in HU, an axial slice as it is read."""
    low, high = window
    hu = np.rint(low + image[None].astype(np.float32) / 255 * (high - low))
    pixel = width_mm / image.shape[1]
    return Volume(hu.astype(np.int16), (1.0, pixel, pixel))
