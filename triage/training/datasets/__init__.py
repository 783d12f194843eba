"""The data sets that training and evaluation can read, by kind: nothing is downloaded, nothing is changed.

``--data KIND=PATH`` names one; ``PATH`` is laid out as the set's own authors publish it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from triage.training.cases import Case
from triage.training.datasets import pictures, prepared


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """One kind of data set: how it lies on the disk, and how it becomes cases."""

    summary: str
    layout: str
    """What ``read`` expects below the given path."""
    read: Callable[[Path], Iterator[Case]]
    """Cases one at a time, always in the same order. Raises ConfigError where path or file is not right."""
    source: str
    licence: str
    notes: str = ""
    """What must be known before anything is claimed with it."""


DATASETS: dict[str, Dataset] = {
    "medseg9": Dataset(
        summary="9 COVID-19 volumes of 7 patients with lungs and lesions, as NumPy archives",
        layout=prepared.MEDSEG9,
        read=prepared.medseg9,
        source="MedSeg, COVID-19 CT segmentation dataset, medicalsegmentation.com/covid19",
        licence="CC0; the scans are from Radiopaedia, non-commercial",
        notes="HU estimated from grey values (±50), true spacing unknown: no ml, no mm",
    ),
    "semiseg": Dataset(
        summary="COVID-19 slices with lesions, pictures cropped to the lungs",
        layout=pictures.SEMISEG,
        read=pictures.semiseg,
        source="Fan et al., Inf-Net, doi:10.1109/TMI.2020.2996645 (COVID-SemiSeg)",
        licence="research use",
        notes="window, spacing and patients unknown; the 48 test slices are for testing only",
    ),
    "sarscov2": Dataset(
        summary="2,481 single slices, COVID-19 or other findings, without masks",
        layout=pictures.SARSCOV2,
        read=pictures.sarscov2,
        source="Soares et al., doi:10.1101/2020.04.24.20078584 (SARS-CoV-2 CT-scan)",
        licence="CC BY-NC-SA 4.0",
        notes="patients unknown: never evidence of accuracy by patient",
    ),
}
"""The kinds a recipe or ``--data`` may name."""
