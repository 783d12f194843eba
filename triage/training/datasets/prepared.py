"""Sets that were prepared as NumPy archives: ``medseg9_<volume>_<patient>.npz``."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from triage.domain import Volume
from triage.training.cases import Case, Diagnosis
from triage.training.datasets.files import existing, readable, same_shape

MEDSEG9 = "medseg9_<volume>_<patient>.npz with gray, hu_lo, hu_hi, lung, lesion, patient"
MEDSEG_SPACING = (5.0, 1.25, 1.25)
"""In plane about right; along z a guess from the lungs' height: nothing may be measured in ml or mm."""
BROKEN = (zipfile.BadZipFile, zlib.error, NotImplementedError, KeyError, ValueError, OSError, EOFError)
"""What NumPy raises on an archive that is cut, is none, or lacks an array."""


def medseg9(folder: Path) -> Iterator[Case]:
    """The nine Radiopaedia volumes of MedSeg (medicalsegmentation.com/covid19), on their own grid.

    HU are estimated from grey values (about ±50) and saturate at the window's ends. Volumes of one patient
    share ``patient``. Raises ConfigError.
    """
    for path in existing(folder, MEDSEG9, "medseg9_*.npz"):
        yield _medseg9(path)


def _medseg9(path: Path) -> Case:
    with readable(path, *BROKEN), path.open("rb") as file, np.load(file) as data:
        low, high = float(data["hu_lo"]), float(data["hu_hi"])
        hu = low + data["gray"].astype(np.float32) / 255 * (high - low)
        lung, lesion, patient = data["lung"] > 0, data["lesion"] > 0, str(data["patient"])
    for name, mask in (("lung", lung), ("lesion", lesion)):
        same_shape(mask, f"{path}: {name}", hu, f"{path}: gray")
    return Case(
        name=path.stem,
        patient=patient,
        volume=Volume(hu.astype(np.int16), MEDSEG_SPACING),
        lung=lung,
        lesions=(lesion,),
        diagnosis=Diagnosis.COVID,
        millimetres=False,
    )
