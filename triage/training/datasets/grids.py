"""NIfTI and MetaImage files → volumes and masks whose orientation is true.

SimpleITK gives directions in LPS, as DICOM has them, whatever the file's own convention (NIfTI: RAS). Axes
are put in order, never resampled: slices to the head, rows to the back, columns to the patient's left.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from triage.dicom.volume import AIR, HIGHEST
from triage.domain import Mask, Volume
from triage.training.datasets.files import readable, same_shape

GREY_LEVELS = 255
CHUNK = 1 << 22


def volume(path: Path, geometry: Path | None = None, window: tuple[float, float] | None = None) -> Volume:
    """HU of a file, on its own grid, lowest slice first.

    ``geometry`` is a file of the same voxels whose header is to be believed. With a ``window``, values that
    all lie in 0…255 are grey levels of it. Raises ConfigError.
    """
    image = _read(path, geometry or path)
    values = _array(image)
    if window and values.min() >= 0 and values.max() <= GREY_LEVELS:
        values = window[0] + values / GREY_LEVELS * (window[1] - window[0])
    whole = values if values.dtype.kind in "iu" else np.rint(values)
    x, y, z = image.GetSpacing()
    directions = np.reshape(image.GetDirection(), (3, 3))
    orientation = tuple(float(value) for value in (*directions[:, 0], *directions[:, 1]))
    return Volume(np.clip(whole, AIR, HIGHEST).astype(np.int16), (z, y, x), orientation)


def mask(
    path: Path, of: Volume, image_path: Path, labels: Sequence[int] = (), geometry: Path | None = None
) -> Mask:
    """Voxels with one of the labels (any but 0 where none are given). Raises ConfigError."""
    values = _array(_read(path, geometry or path))
    same_shape(values, path, of.array, image_path)
    return np.isin(values, labels) if labels else values > 0


def canonical(path: Path) -> Mask:
    """Voxels that are not 0, as (head, back, left). Raises ConfigError."""
    values = _array(_read(path, path))
    return values > 0


def _read(path: Path, geometry: Path) -> Any:
    sitk = _sitk()
    with readable(path, RuntimeError, EOFError, OSError, zlib.error):
        _check(path)
        image = sitk.ReadImage(str(path))
    if geometry != path:
        header = sitk.ImageFileReader()
        header.SetFileName(str(geometry))
        with readable(geometry, RuntimeError):
            header.ReadImageInformation()
        image.SetSpacing(header.GetSpacing())
        image.SetDirection(header.GetDirection())
    with readable(path, RuntimeError):
        return sitk.DICOMOrient(image, "LPS")


def _check(path: Path) -> None:
    """To the last byte, for SimpleITK fills up what was cut from a compressed file without a word."""
    if path.suffix == ".gz":
        with gzip.open(path) as file:
            while file.read(CHUNK):
                pass


def _array(image: Any) -> NDArray[Any]:
    values: NDArray[Any] = _sitk().GetArrayFromImage(image)
    return values


def _sitk() -> Any:
    """Loaded with the first file: most of training does without it."""
    import SimpleITK

    return SimpleITK


def stem(path: Path) -> str:
    """ "study_0001" of study_0001.nii.gz."""
    return path.name.removesuffix(".gz").removesuffix(".nii")
