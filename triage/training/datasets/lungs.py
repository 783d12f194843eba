"""Sets that were marked for the lungs; nobody in them has COVID-19."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from triage.config import Assemble
from triage.dicom import header, series
from triage.dicom import volume as pixels
from triage.domain import Mask, Volume
from triage.errors import ConfigError, Rejected, Retryable
from triage.models.preprocessing import Layout
from triage.training.cases import Case, Diagnosis
from triage.training.datasets.files import existing, partner, readable, same_shape
from triage.training.datasets.grids import canonical, mask, volume
from triage.training.datasets.pictures import BROKEN, FIELD_MM

logger = logging.getLogger(__name__)

LUNA16 = "subset0…subset9/<series>.mhd with .raw and seg-lungs-LUNA16/<series>.mhd with .zraw"
NSCLC = "NSCLC-Radiomics/LUNG1-<n>/ with DICOM and Thoracic_Cavities/LUNG1-<n>/*_primary_reviewer.nii.gz"
KAGGLE = "2d_images/ and 2d_masks/, each with ID_<n>_Z_<n>.tif"

LUNA16_LABELS = (3, 4)
"""Left and right lung; 5 is the trachea."""
GATES = {"1.3.6.1.4.1.14519.5.2.1.6279.6001.179049373636438705059720603192"}
"""LIDC-IDRI-0001, part of LUNA16: the order of worklists is tested with it, so nothing may learn from it."""
ANY_LENGTH = Assemble(minimum_age_years=0, minimum_slices=2, minimum_coverage_mm=1)


def luna16(folder: Path) -> Iterator[Case]:
    """LUNA16 (luna16.grand-challenge.org, from LIDC-IDRI): lungs by an algorithm, patients with nodules.

    No patient is known: each series counts as its own, though a few patients of LIDC-IDRI have two. Raises
    ConfigError.
    """
    for path in existing(folder, LUNA16, "subset[0-9]/*.mhd"):
        if path.stem not in GATES:
            scan = volume(path)
            lungs = partner(folder / "seg-lungs-LUNA16" / path.name, path)
            yield Case(
                name=path.stem,
                patient=path.stem,
                volume=scan,
                lung=mask(lungs, scan, path, LUNA16_LABELS),
                diagnosis=Diagnosis.OTHER,
            )


def nsclc(folder: Path) -> Iterator[Case]:
    """NSCLC-Radiomics (Aerts et al., doi:10.7937/K9/TCIA.2015.PF0M9REI) with lungs by PleThora (Kiser et al.,
    doi:10.1002/mp.14424): tumours, atelectasis and effusion belong to the lungs; some patients have no mask.

    A patient whose slices make no even axial series is left out with a warning. Raises ConfigError.
    """
    existing(folder, NSCLC, "Thoracic_Cavities/*/*_primary_reviewer.nii*")
    for patient in existing(folder, NSCLC, "NSCLC-Radiomics/LUNG1-*"):
        scan = _scan(patient)
        if scan is None:
            continue
        masks = sorted((folder / "Thoracic_Cavities" / patient.name).glob("*_primary_reviewer.nii*"))
        yield Case(
            name=patient.name,
            patient=patient.name,
            volume=scan,
            lung=_stored(masks[0], scan, patient) if masks else None,
            diagnosis=Diagnosis.OTHER,
        )


def _scan(patient: Path) -> Volume | None:
    found, refused = header.find_instances([patient])
    for path, reason in refused:
        if path.suffix.lower() == ".dcm":
            raise ConfigError(f"{path} cannot be read, unpack the data set again: {reason}")
    try:
        chosen = series.choose(found, ANY_LENGTH)
    except Rejected as reason:
        logger.warning("%s is left out: %s", patient.name, reason)
        return None
    with readable(patient, Rejected, Retryable):
        return pixels.read(chosen)


def _stored(path: Path, of: Volume, image_path: Path) -> Mask:
    lungs = np.ascontiguousarray(Layout.of(of.orientation).stored(canonical(path)))
    same_shape(lungs, path, of.array, image_path)
    return lungs


def kaggle_lungs(folder: Path) -> Iterator[Case]:
    """Finding and Measuring Lungs in CT Data (Mader, kaggle.com/kmader/finding-lungs-in-ct-data): 267 slices.

    The set tells neither spacing nor diagnosis. Its few volumes (3d_images) are left out: their headers do
    not say how they lie. Raises ConfigError.
    """
    for path in existing(folder, KAGGLE, "2d_images/*.tif"):
        mask_path = partner(folder / "2d_masks" / path.name, path)
        image, lungs = _tiff(path), _tiff(mask_path)
        same_shape(lungs, mask_path, image, path)
        pixel = FIELD_MM / image.shape[1]
        yield Case(
            name=path.stem,
            patient=_kaggle_patient(path),
            volume=Volume(_hu(image, path)[None], (1.0, pixel, pixel)),
            lung=lungs[None] > 0,
            millimetres=False,
        )


def _kaggle_patient(path: Path) -> str:
    """ "kaggle_2" of ID_0002_Z_0162.tif."""
    with readable(f"{path}, a name without a number,", ValueError, IndexError):
        return f"kaggle_{int(path.stem.split('_')[1])}"


def _tiff(path: Path) -> NDArray[Any]:
    with readable(path, *BROKEN), Image.open(path) as picture:
        return np.asarray(picture)


def _hu(values: NDArray[Any], path: Path) -> NDArray[np.int16]:
    """As stored; where no value is negative 1024 was added, for every slice shows air."""
    if values.dtype == np.uint8:
        raise ConfigError(f"{path} is a picture with 8 bits, not HU: use the files as published")
    offset = 1024 if values.min() >= 0 else 0
    hu: NDArray[np.int16] = np.clip(np.rint(values) - offset, pixels.AIR, pixels.HIGHEST).astype(np.int16)
    return hu
