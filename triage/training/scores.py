"""What one judged case showed, as plain data that can be stored and read back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pydantic import TypeAdapter

from triage.domain import Grade, Status
from triage.training.cases import Diagnosis
from triage.training.metrics import Histogram


@dataclass(frozen=True, slots=True)
class Overlap:
    """A mask found against the one drawn (mean over raters); mm and ml only where the spacing is known."""

    dice: float
    iou: float
    hd95_mm: float | None = None
    volume_error_ml: float | None = None


@dataclass(frozen=True, slots=True)
class BySlice:
    """Means over a case's slices, as Qiblawey et al. count (equations 3 to 5); an empty one found empty is 1.

    Most slices are empty, so these are far above the Dice of the volume.
    """

    n: int
    """Slices."""
    accuracy: float
    """Share of pixels rightly called one or the other."""
    iou: float
    dice: float


@dataclass(frozen=True, slots=True)
class SliceAnswer:
    """What the network says of a slice, above 0.5 positive, and whether half of the raters drew lesions."""

    score: float
    drawn: bool
    area_mm2: float = 0.0
    """Of lesion, mean over raters; a guess where the spacing is unknown."""


@dataclass(frozen=True, slots=True)
class SliceLesions:
    """The lesions that were found in a slice one by one, the best first, and how they lie on those drawn."""

    drawn: int
    """How many."""
    scores: tuple[float, ...] = ()
    ious: tuple[tuple[float, ...], ...] = ()
    """Of each found with each drawn."""


@dataclass(frozen=True, slots=True)
class Extent:
    """How much of the lungs is affected, by one pair of masks; fractions in [0, 1]."""

    fraction: float
    """Of the worse lung."""
    both_lungs: float
    grade: Grade | None
    """None for what was found in a case that the network rejected: no answer is no CT-0."""
    percent_infection: float | None
    ct_severity_score: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What one case showed. None is unknown: nobody drew it, or the network does not give it.

    A case that the network rejected found nothing of what was drawn, which is known: Dice, IoU and
    fraction are 0.
    """

    data: str
    name: str
    patient: str
    picture: bool
    """A single slice, not a volume."""
    diagnosis: Diagnosis | None = None
    grade_read: Grade | None = None
    """As a radiologist saw it."""
    status: Status | None = None
    """At the working point; None for a picture that was judged: it shows no whole lungs."""
    reason: str = ""
    """Why it was not analysable."""
    probability: float | None = None
    """Of a cropped picture the score of the share of lesions in all of it: only its order means anything."""
    lungs: Overlap | None = None
    lesions: Overlap | None = None
    lungs_by_slice: BySlice | None = None
    lesions_by_slice: BySlice | None = None
    slices: tuple[SliceAnswer, ...] = ()
    """Of a network that judges slices, where lesions were drawn."""
    instances: tuple[SliceLesions, ...] = ()
    """Of slices with lung, where lesions were drawn; of a network that looks for them one by one."""
    attention: Mapping[str, float] = field(default_factory=dict)
    """Map → its Dice with the lesions drawn, of a network that tells where it looked (see ``attention``)."""
    threshold_averaged_dice: float | None = None
    """Pictures only: Inf-Net's measure."""
    own: Mapping[str, float] = field(default_factory=dict)
    """Pictures only: figures of one system alone (see ``infnet.measured``, ``ssm.measured``)."""
    drawn: Extent | None = None
    found: Extent | None = None
    histograms: tuple[Histogram, ...] = ()
    """One a rater."""
    seconds: float | None = None
    """Of the network, preprocessing included, reading not."""

    def fraction_error_at(self, threshold: float) -> float | None:
        """Affected fraction of both lungs, found − drawn, at another lesion threshold, a multiple of 0.01."""
        if not self.histograms or self.drawn is None:
            return None
        return self.histograms[0].fraction(threshold) - self.drawn.both_lungs


_SCORES = TypeAdapter(list[Score])


def to_json(scores: Sequence[Score]) -> str:
    """Scores as text that ``from_json`` reads back."""
    return _SCORES.dump_json(list(scores)).decode()


def from_json(text: str) -> list[Score]:
    """Scores as ``to_json`` wrote them."""
    return _SCORES.validate_json(text)
