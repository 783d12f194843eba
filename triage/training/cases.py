"""What every data set is read into: volumes in HU with the marks that readers drew on them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from triage.domain import Grade, LesionClass, Mask, Volume


class Diagnosis(StrEnum):
    """What a data set says of the patient, the three groups of the paper (Goncharov et al., section 3)."""

    COVID = "covid"
    HEALTHY = "healthy"
    OTHER = "other"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One volume, or one picture as a volume of one slice; masks have exactly ``volume.array.shape``.

    ``volume.orientation`` is true: the networks turn it upright themselves.
    """

    name: str
    """Unique within its data set."""
    patient: str
    """Splits and bootstraps go by this, never by volume or slice."""
    volume: Volume
    lung: Mask | None = None
    """Both lungs; None where nobody marked them."""
    lesions: tuple[Mask, ...] = ()
    """Lesions of any kind, a mask for each rater; empty where nobody marked them."""
    lesion_classes: Mapping[LesionClass, Mask] = field(default_factory=dict)
    """The lesions in disjoint parts; empty where nobody told them apart."""
    diagnosis: Diagnosis | None = None
    grade: Grade | None = None
    """As a radiologist saw it, not computed from masks."""
    millimetres: bool = True
    """Whether the spacing is known; without it nothing may be given in mm or ml."""
    cropped: bool = False
    """A picture cut to the lungs: all of it counts as lung, none is searched."""

    @property
    def picture(self) -> bool:
        """A single slice, not a volume."""
        return len(self.volume.array) == 1

    @property
    def fingerprint(self) -> str:
        """16 hex digits of the images, whatever they are called and wherever they lie."""
        array = self.volume.array
        return hashlib.sha256(f"{array.shape}".encode() + array.tobytes()).hexdigest()[:16]
