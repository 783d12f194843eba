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
    whole = np.rint(values) if values.dtype.kind == "f" else values.astype(np.int32, copy=False)
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
        image = sitk.ReadImage(str(path))
        _check_length(path, image)
    if geometry != path:
        header = sitk.ImageFileReader()
        header.SetFileName(str(geometry))
        with readable(geometry, RuntimeError):
            header.ReadImageInformation()
        image.SetSpacing(header.GetSpacing())
        image.SetDirection(header.GetDirection())
    with readable(path, RuntimeError):
        return sitk.DICOMOrient(image, "LPS")


def _check_length(path: Path, image: Any) -> None:
    """SimpleITK fills up what is cut from a NIfTI file without a word. Raises EOFError, or as gzip does."""
    if image.HasMetaDataKey("vox_offset"):
        voxels = image.GetNumberOfPixels() * int(image.GetMetaData("bitpix")) // 8
        if _length(path) < float(image.GetMetaData("vox_offset")) + voxels:
            raise EOFError("its end is missing")


def _length(path: Path) -> int:
    if path.suffix != ".gz":
        return path.stat().st_size
    with gzip.open(path) as file:
        return sum(map(len, iter(lambda: file.read(CHUNK), b"")))


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
