"""Sets of pictures with 8 bits: each becomes a volume of one slice, in HU by an assumed window.

Pictures carry neither window nor pixel spacing. What is assumed for a set is said beside it; nothing may be
given in mm or ml.
"""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from scipy import ndimage

from triage.domain import LesionClass, Mask, Volume
from triage.training.cases import Case, Diagnosis
from triage.training.datasets.files import counted, existing, partner, readable, same_shape, wrong_folder

SEMISEG = "Imgs/<n>.jpg and GT/<n>.png, as COVID-SemiSeg's LungInfection-Train and -Test"
SARSCOV2 = "covid/ and non-covid/ with .jpg or .png, as folders or in one .zip"
CNCB = "image/<patient>/<slice>.jpg and mask/<patient>/<slice>.png, as in ct_lesion_seg.zip"
COVIDXCT = "<part>_COVIDx*.txt with lines 'file class xmin ymin xmax ymax', the files in a folder beside it"

LUNG_WINDOW = (-1400.0, 200.0)
"""HU of black and of white, assumed: the usual window for lungs. Augmentation varies it."""
SEMISEG_CLASSES: Mapping[LesionClass, tuple[int, int]] = {"ground_glass": (1, 38), "consolidation": (2, 75)}
"""Numbers of ``GT-multi``: as they are, or as the brightness of their colours."""
SEMISEG_WINDOW = (-1080.0, 250.0)
"""Where a picture does not show it: the median over COVID-SemiSeg's first 40 training slices."""
CLEAR_LUNG, MUSCLE = -860.0, 40.0
"""HU of a picture's dark and bright peak."""
PLAUSIBLE = ((-1450.0, -950.0), (1000.0, 1850.0))
"""Limits of the lower end and of the width of a window that was found so."""
LUNGS_MM = 290.0
"""Width of a picture that is cropped to both lungs, assumed."""
FIELD_MM = 360.0
"""Width of a picture of the whole slice, assumed."""
SUFFIXES = (".jpg", ".jpeg", ".png")
BROKEN = (
    UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, OSError, zipfile.BadZipFile,
    zlib.error,
)  # fmt: skip
"""What Pillow and zipfile raise on what is cut or no picture."""
CNCB_LUNG, CNCB_GROUND_GLASS = 1, 2
"""Labels of CC-CCII: 0 background, 1 lung field, 2 ground glass, 3 consolidation."""
COVIDX_CLASSES = {"0": Diagnosis.HEALTHY, "1": Diagnosis.OTHER, "2": Diagnosis.COVID}
COVIDX_PATIENT = re.compile(
    r"^(?:N?CP|Normal)_\d+|^LIDC-IDRI-\d+|patient\d+(?=_)|^volume-covid19-A-\d+|^radiopaedia_\d+|^A\d+"
)
"""Patients in the file names of the sources; of the other sources everything before the last hyphen."""
GATE_PATIENTS = ("LIDC-IDRI-0001",)
"""The order of worklists is tested with them, so nothing may learn from them."""

Grey = NDArray[np.uint8]
Entry = Path | zipfile.Path
"""A file or folder, on the disk or in an archive."""


def semiseg(folder: Path) -> Iterator[Case]:
    """COVID-SemiSeg (Fan et al., "Inf-Net", doi:10.1109/TMI.2020.2996645): slices cropped to the lungs.

    ``GT`` marks lesions of any kind; ``GT-multi``, which may lie beside it, ground glass and consolidation.
    ``Edge`` is the outline of ``GT`` and not read. The pictures are stored with the front at the left:
    turned clockwise the spine lies below. No patient is known, so each picture counts as its own. Raises
    ConfigError.
    """
    for path in existing(folder, SEMISEG, *(f"Imgs/*{suffix}" for suffix in SUFFIXES)):
        mask_path = partner(folder / "GT" / f"{path.stem}.png", path)
        image, mask = grey(path), grey(mask_path)
        same_shape(mask, mask_path, image, path)
        yield Case(
            name=f"semiseg_{path.stem}",
            patient=f"semiseg_{path.stem}",
            volume=one_slice(np.rot90(image, -1), LUNGS_MM, shown_window(image)),
            lesions=(np.rot90(mask, -1)[None] > 127,),
            lesion_classes=_semiseg_classes(folder / "GT-multi" / f"{path.stem}.png", image, path),
            diagnosis=Diagnosis.COVID,
            millimetres=False,
            cropped=True,
        )


def _semiseg_classes(path: Path, image: Grey, image_path: Path) -> dict[LesionClass, Mask]:
    """Upright; none where the file is not there."""
    if not path.exists():
        return {}
    labels = _labels(path)
    same_shape(labels, path, image, image_path)
    return {kind: np.isin(np.rot90(labels, -1)[None], known) for kind, known in SEMISEG_CLASSES.items()}


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
    return sorted(folder.iterdir(), key=counted) if folder.is_dir() else []


def cncb(folder: Path) -> Iterator[Case]:
    """The 750 segmented slices of CC-CCII (Zhang et al., doi:10.1016/j.cell.2020.04.045): lungs and lesions
    of 150 COVID-19 patients, from which Ter-Sarkisov's single-shot network learns. Raises ConfigError.
    """
    for path in existing(folder, CNCB, *(f"image/*/*{suffix}" for suffix in SUFFIXES)):
        patient = path.parent.name
        mask_path = partner(folder / "mask" / patient / f"{path.stem}.png", path)
        image, marks = grey(path), _labels(mask_path)
        same_shape(marks, mask_path, image, path)
        yield Case(
            name=f"cncb_{patient}_{path.stem}",
            patient=f"cncb_{patient}",
            volume=one_slice(image, FIELD_MM),
            lung=marks[None] >= CNCB_LUNG,
            lesions=(marks[None] >= CNCB_GROUND_GLASS,),
            diagnosis=Diagnosis.COVID,
            millimetres=False,
        )


def covidxct(path: Path) -> Iterator[Case]:
    """COVIDx CT (Gunraj et al., doi:10.3389/fmed.2020.608525): slices cut to the body's box, without masks.

    ``path`` is one split file, or the folder of all; a slice that is named twice is read once. The windows of
    its many sources are unknown and differ. Raises ConfigError.
    """
    splits = [path] if path.is_file() else existing(path, COVIDXCT, "*_COVIDx*.txt")
    rows: dict[str, tuple[Path, str]] = {}
    for split in splits:
        for line in _lines(split):
            rows.setdefault(line.split()[0], (split, line))
    folder = _holding(splits[0].parent, next(iter(rows), ""))
    for name, (split, line) in rows.items():
        patient = _covidx_patient(Path(name).stem)
        if patient in GATE_PATIENTS:
            continue
        with readable(f"{split}: {line!r}", ValueError, KeyError):
            group, *box = line.split()[1:]
            diagnosis = COVIDX_CLASSES[group]
            x, y, x_end, y_end = (max(0, int(edge)) for edge in box)
        yield Case(
            name=f"covidxct_{Path(name).stem}",
            patient=f"covidxct_{patient}",
            volume=_cut(one_slice(grey(folder / name), FIELD_MM), slice(y, y_end), slice(x, x_end)),
            diagnosis=diagnosis,
            millimetres=False,
        )


def _lines(split: Path) -> list[str]:
    with readable(split, OSError, UnicodeDecodeError):
        return [line for line in split.read_text(encoding="utf-8").splitlines() if line.strip()]


def _holding(folder: Path, name: str) -> Path:
    """``folder`` or the one below it that has the file: it is 2A_images, 3A_images or another."""
    below = sorted(entry for entry in folder.iterdir() if entry.is_dir())
    place = next((entry for entry in (folder, *below) if name and (entry / name).is_file()), None)
    if place is None:
        raise wrong_folder(folder, f"{COVIDXCT} ({name or 'no line in the split file'})")
    return place


def _covidx_patient(name: str) -> str:
    match = COVIDX_PATIENT.search(name)
    return match[0] if match else name.rpartition("-")[0] or name


def _cut(volume: Volume, rows: slice, columns: slice) -> Volume:
    """To the box; one that lies outside the picture leaves the whole."""
    inside = volume.array[:, rows, columns]
    return replace(volume, array=inside) if inside.size else volume


def _labels(path: Path) -> Grey:
    """The numbers of a label picture, not its colours: the index where it has a palette."""
    with readable(path, *BROKEN), Image.open(path) as picture:
        values = np.asarray(picture)
    return values if values.ndim == 2 else values[..., 0]


def grey(path: Entry) -> Grey:
    """The brightness of a picture, (rows, columns). Raises ConfigError."""
    with readable(path, *BROKEN), path.open("rb") as file, Image.open(file) as picture:
        return np.asarray(picture.convert("L"))


def shown_window(image: Grey) -> tuple[float, float]:
    """HU of black and of white, from the grey of clear lung and of muscle: the peaks of the histogram.

    Lungs without a clear part have no dark peak: then ``SEMISEG_WINDOW``.
    """
    counts = ndimage.gaussian_filter1d(np.bincount(image.ravel(), minlength=256).astype(float), 3)
    lung, muscle = 5 + int(np.argmax(counts[5:135])), 150 + int(np.argmax(counts[150:245]))
    width = (MUSCLE - CLEAR_LUNG) / (muscle - lung) * 255
    low = CLEAR_LUNG - lung / 255 * width
    within = all(a <= value <= b for value, (a, b) in zip((low, width), PLAUSIBLE, strict=True))
    return (low, low + width) if within else SEMISEG_WINDOW


def one_slice(image: Grey, width_mm: float, window: tuple[float, float] = LUNG_WINDOW) -> Volume:
    """A picture of this width as a volume (1, rows, columns) in HU, an axial slice as it is read."""
    low, high = window
    hu = np.rint(low + image[None].astype(np.float32) / 255 * (high - low))
    pixel = width_mm / image.shape[1]
    return Volume(hu.astype(np.int16), (1.0, pixel, pixel))
