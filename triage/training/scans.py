"""Cases as the networks see them: canonical slices with their marks, and splits by patient."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from triage.domain import LesionClass, Mask, Volume
from triage.errors import ConfigError
from triage.models.preprocessing import (
    CANONICAL,
    MARGIN,
    NEIGHBOUR_MM,
    Box,
    Grid,
    Layout,
    bounding_box,
    prepare,
    resample,
)
from triage.training.cases import Case, Diagnosis


@dataclass(frozen=True, slots=True)
class Scan:
    """One volume or picture: slices (z, h, w) in [0, 1]; marks as the share of each pixel, same shape.

    Shares, not yes or no: where a border runs through a pixel is known, and is learned.
    """

    name: str
    patient: str
    slices: Tensor
    lung: Tensor | None
    lesions: tuple[Tensor, ...] = ()
    """A mask for each rater; training draws one (Goncharov et al., section 4.5)."""
    lesion_classes: Mapping[LesionClass, Tensor] = field(default_factory=dict)
    """The lesions in disjoint parts; empty where nobody told them apart."""
    spacing_mm: float = NEIGHBOUR_MM
    """Distance of the slices."""
    diagnosis: Diagnosis | None = None
    cropped: bool = False
    data: str = ""
    """Kind of data set."""

    def cut(self, box: Box) -> Scan:
        return replace(
            self,
            slices=self.slices[box],
            lung=None if self.lung is None else self.lung[box],
            lesions=tuple(lesion[box] for lesion in self.lesions),
            lesion_classes={kind: part[box] for kind, part in self.lesion_classes.items()},
        )

    def to_lungs(self) -> Scan:
        """Cut to the lungs' bounding box, as inference does before the multitask network."""
        if self.lung is None or not (self.lung > 0.5).any():
            return self
        return self.cut(bounding_box((self.lung > 0.5).numpy(), MARGIN))


@dataclass(frozen=True, slots=True)
class Split:
    """Scans by patient: no patient is in two parts."""

    train: tuple[Scan, ...]
    validation: tuple[Scan, ...]
    test: tuple[Scan, ...]

    def counts(self) -> dict[str, dict[str, int]]:
        """Scans and patients that are trained on, by kind of data."""
        kinds = dict.fromkeys(scan.data for scan in self.train)
        parts = {kind: [scan.patient for scan in self.train if scan.data == kind] for kind in kinds}
        return {k: {"scans": len(names), "patients": len(set(names))} for k, names in parts.items()}


def scan(case: Case, grid: Grid = CANONICAL) -> Scan:
    """The case as a network with this grid sees it."""
    slices = prepare(case.volume, grid)

    def share(mask: Mask) -> Tensor:
        return _shares(mask, case.volume, slices)

    return Scan(
        case.name,
        case.patient,
        slices,
        None if case.lung is None else share(case.lung),
        tuple(share(lesion) for lesion in case.lesions),
        {kind: share(part) for kind, part in case.lesion_classes.items()},
        case.volume.spacing[0],
        case.diagnosis,
        case.cropped,
    )


def _shares(mask: Mask, volume: Volume, like: Tensor) -> Tensor:
    canonical = Layout.of(volume.orientation).canonical(mask)
    return resample(torch.from_numpy(canonical.astype(np.float32)), (like.shape[1], like.shape[2]))


def split(scans: Iterable[Scan], validation: Sequence[str], test: Sequence[str]) -> Split:
    """Every scan of a named patient goes to that part, all others are trained on.

    Raises ConfigError for a patient who is named twice or has no scan.
    """
    scans = tuple(scans)
    both = set(validation) & set(test)
    missing = {*validation, *test} - {s.patient for s in scans}
    if both or missing:
        names = ", ".join(sorted({s.patient for s in scans if not s.cropped}))
        raise ConfigError(
            f"patients {sorted(both | missing)}: each must exist, in one part only; there are {names}"
        )
    held_out = {*validation, *test}
    return Split(
        tuple(s for s in scans if s.patient not in held_out),
        tuple(s for s in scans if s.patient in validation),
        tuple(s for s in scans if s.patient in test),
    )
