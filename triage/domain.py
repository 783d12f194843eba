"""The nouns of the product. All are frozen; arrays inside them are never written to.

Names are DICOM keywords in snake_case, the papers' terms, and the reading room's words.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import IntEnum, StrEnum
from math import floor
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]
Vector = tuple[float, float, float]
GradeBasis = Literal["affected_fraction", "percent_infection"]
"""Which figure a grade is read from."""


TIP_SHARE = 0.05
"""Less of the fullest slice's lung is a tip: blurred with what lies beside it, it looks diseased."""


def areas(mask: Mask) -> NDArray[np.intp]:
    """Voxels of each slice, (z,); slice by slice is ten times faster than along two axes."""
    return np.array([np.count_nonzero(part) for part in mask], dtype=np.intp)


def judged_slices(lung_mask: Mask) -> NDArray[np.bool_]:
    """Which slices (z,) show lung, and more than a tip of it: what is said slice by slice counts these."""
    return _more_than_tips(areas(lung_mask))


def infected_shares(lung_mask: Mask, lesion_mask: Mask) -> NDArray[np.float64]:
    """Of each judged slice, how much of its lung is lesion, in [0, 1]; empty without any lung."""
    lung = areas(lung_mask)
    shown = _more_than_tips(lung)
    shares: NDArray[np.float64] = areas(lesion_mask & lung_mask)[shown] / lung[shown]
    return shares


def _more_than_tips(lung: NDArray[np.intp]) -> NDArray[np.bool_]:
    shown: NDArray[np.bool_] = (lung > 0) & (lung >= TIP_SHARE * lung.max(initial=0))
    return shown


def tenths_of_percent(fraction: float) -> float:
    """A fraction in percent, rounded down: no figure reaches a limit that the fraction has not reached."""
    return floor(1000 * fraction + 1e-6) / 10


def percent(fraction: float) -> str:
    """ "62 %"; small fractions keep one digit so that little is never shown as nothing."""
    value = tenths_of_percent(fraction)
    if value >= 10 or fraction == 0:
        return f"{floor(value)} %"
    return "<0.1 %" if value < 0.1 else f"{value:.1f} %"


def two_decimals(probability: float) -> str:
    """ "0.97", rounded down for the same reason."""
    return f"{floor(100 * probability + 1e-6) / 100:.2f}"


class StudyState(StrEnum):
    """Where a study stands on its one-way path."""

    RECEIVING = "receiving"
    READY = "ready"
    ANALYZING = "analyzing"
    ANALYZED = "analyzed"
    REJECTED = "rejected"
    FAILED = "failed"


class Status(StrEnum):
    """The four answers that are never mixed up."""

    POSITIVE = "positive"
    NEGATIVE = "negative"
    NOT_ANALYSABLE = "not_analysable"
    FAILED = "failed"


JUDGED = (Status.POSITIVE, Status.NEGATIVE)
"""Of the four, those that are said of the patient."""


class Band(IntEnum):
    """Urgency of a study on the worklist; a smaller number is read earlier."""

    CRITICAL = 1
    SEVERE = 2
    POSITIVE = 3
    INDETERMINATE = 4
    NOT_JUDGED = 5
    ROUTINE = 6

    @property
    def label(self) -> str:
        return self.name.lower().replace("_", "-")


class Grade(StrEnum):
    """CT-0…CT-4 by affected lung fraction (Goncharov et al., section 1; MosMedData)."""

    CT0 = "CT-0"
    CT1 = "CT-1"
    CT2 = "CT-2"
    CT3 = "CT-3"
    CT4 = "CT-4"


class DeliveryState(StrEnum):
    """Delivered and committed are two things: taken, and promised to be kept (DICOM PS3.4 annex J)."""

    PENDING = "pending"
    SENT = "sent"
    """Taken by a destination of which no commitment is asked."""
    COMMITTING = "committing"
    """Taken; the destination is asked to commit itself, and its answer is awaited."""
    COMMITTED = "committed"
    NOT_COMMITTED = "not_committed"
    """Taken; after days of asking in vain the commitment was given up."""
    GIVEN_UP = "given_up"

    @property
    def is_delivered(self) -> bool:
        return self not in (DeliveryState.PENDING, DeliveryState.GIVEN_UP)


class ResultKind(StrEnum):
    """The files one judgement leaves; all but the thumbnail, the PNG and the mesh are DICOM objects."""

    LESION_SEG = "lesion_seg"
    LUNG_SEG = "lung_seg"
    SR = "sr"
    PICTURE = "picture"
    KEY_SLICES = "key_slices"
    VIEW_3D = "view_3d"
    THUMBNAIL = "thumbnail"
    KEY_SLICES_PNG = "key_slices_png"
    MESH = "mesh"


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """One received DICOM object: where its bytes lie, and the header facts kept at arrival."""

    study_instance_uid: str
    series_instance_uid: str
    sop_instance_uid: str
    sop_class_uid: str
    transfer_syntax_uid: str
    path: Path
    digest: str
    """SHA-256 (hex) of the data set as received, file meta information left out."""
    modality: str = ""
    image_type: tuple[str, ...] = ()
    rows: int = 0
    columns: int = 0
    number_of_frames: int = 1
    instance_number: int | None = None
    image_position_patient: Vector | None = None
    image_orientation_patient: tuple[float, ...] | None = None
    pixel_spacing: tuple[float, float] | None = None
    slice_thickness: float | None = None
    gantry_detector_tilt: float | None = None
    rescale_slope: float | None = None
    rescale_intercept: float | None = None
    convolution_kernel: str = ""
    scanner: str = ""
    """Manufacturer and model."""
    body_part_examined: str = ""
    series_description: str = ""
    patient_id: str = ""
    patient_name: str = ""
    patient_age_years: float | None = None
    accession_number: str = ""
    study_date: str = ""
    study_description: str = ""
    requested_procedure_priority: str = ""


def content_digest(instances: Iterable[Instance]) -> str:
    """Same instances with the same bytes give the same digest, in whatever order they came."""
    parts = sorted(f"{i.sop_instance_uid}:{i.digest}" for i in instances)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Series:
    """The chosen axial lung series, slices ordered along the normal of the slice plane.

    ``spacing`` is (z, y, x) in mm; ``orientation`` is ImageOrientationPatient.
    """

    instances: tuple[Instance, ...]
    spacing: Vector
    orientation: tuple[float, ...]
    notes: tuple[str, ...] = ()

    @property
    def study_instance_uid(self) -> str:
        return self.instances[0].study_instance_uid

    @property
    def series_instance_uid(self) -> str:
        return self.instances[0].series_instance_uid

    @property
    def content_digest(self) -> str:
        return content_digest(self.instances)


@dataclass(frozen=True, slots=True)
class Volume:
    """HU on the series' own grid: ``array[k]`` is ``series.instances[k]``.

    array: int16 (z, y, x) in HU; spacing: (z, y, x) in mm; orientation: ImageOrientationPatient
    (direction of a row's growing column index, then of a column's growing row index, LPS).
    """

    array: NDArray[np.int16]
    spacing: Vector
    orientation: tuple[float, ...] = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)

    @property
    def voxel_ml(self) -> float:
        z, y, x = self.spacing
        return z * y * x / 1000.0


LesionClass = Literal["ground_glass", "consolidation"]


@dataclass(frozen=True, slots=True)
class DetectedLesion:
    """One lesion of one slice; indices are the volume's own."""

    slice_index: int
    box: tuple[int, int, int, int]
    """First row and column, and the row and column after the last."""
    score: float
    """In [0, 1]."""
    mask: Mask
    """(rows, columns) of the box."""


@dataclass(frozen=True, slots=True)
class LesionBox:
    """Where a network found one lesion: what is kept of a ``DetectedLesion`` beside the masks."""

    sop_instance_uid: str
    """Of the image."""
    box: tuple[int, int, int, int]
    score: float


@dataclass(frozen=True, slots=True)
class Findings:
    """What a network says of a volume; masks have exactly ``volume.array.shape``.

    ``probability`` is in [0, 1]. ``probability_kind`` is "classifier" for a network's own output and
    "score" for a documented monotone rule. ``lesion_mask`` is None for a network that only
    classifies: its affected fraction is unknown, never 0.
    """

    probability: float
    probability_kind: str
    calibrated: bool
    lung_mask: Mask
    lesion_mask: Mask | None
    grade_from: GradeBasis = "affected_fraction"
    """What of the severity the grade is read from, as the network's paper has it."""
    slice_scores: NDArray[np.float32] | None = None
    """Of each slice (z,) in [0, 1], above 0.5 positive; None where the network judges no slices."""
    attention: Mapping[str, NDArray[np.uint8]] = field(default_factory=dict)
    """Name → where the network looked, 0 to 255, (z, h, w): slice by slice as the volume's, coarser in
    plane, and turned as an axial CT is read."""
    detected: tuple[DetectedLesion, ...] | None = None
    """Lesions one by one; None where the network does not look for them so."""
    lesion_classes: Mapping[LesionClass, Mask] = field(default_factory=dict)
    """The lesion mask in disjoint parts, of a network that tells them apart; empty for the others."""

    @property
    def positive_slices(self) -> int | None:
        """How many slices score above 0.5; None where none is judged."""
        return None if self.slice_scores is None else int(np.count_nonzero(self.slice_scores > 0.5))


LUNG_REGIONS = (
    "apical",
    "upper anterior",
    "upper posterior",
    "middle anterior medial",
    "middle anterior lateral",
    "middle posterior",
    "lower anterior medial",
    "lower anterior lateral",
    "lower posterior medial",
    "lower posterior lateral",
)
"""Ten parts of each lung, from the apex down; ``severity.ct_severity_score`` says how they are cut."""


@dataclass(frozen=True, slots=True)
class CtSeverityScore:
    """Of each of ``LUNG_REGIONS``, on either side: 0 none, 1 below half, 2 half or more opacified."""

    left: tuple[int, ...]
    right: tuple[int, ...]

    @property
    def total(self) -> int:
        """Over the twenty regions, 0 to 40."""
        return sum(self.left) + sum(self.right)


@dataclass(frozen=True, slots=True)
class Severity:
    """How much of the lungs is affected. Fractions in [0, 1], volumes in ml; None is unknown."""

    affected_fraction: float | None
    affected_left: float | None
    affected_right: float | None
    grade: Grade | None
    lung_volume_ml: float
    lesion_volume_ml: float | None
    doubts: tuple[str, ...] = ()
    """Why the lungs may not have been seen whole; nobody is called negative in doubt."""
    percent_infection: float | None = None
    """Mean over slices of their affected fraction (PI), in [0, 1] like the other fractions."""
    ct_severity_score: CtSeverityScore | None = None
    grade_from: GradeBasis = "affected_fraction"
    ground_glass_ml: float | None = None
    """Of the lesion volume; None where the network does not tell the two apart."""
    consolidation_ml: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """The network that judged: its name in the registry, the hash of its weights, its limits."""

    name: str
    version: str
    summary: str
    calibrated: bool
    card: str
    system: str = ""
    """The method that it is one of, as the card says it: several networks may share it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One revision of the answer for one study: the object that the API, SR and page speak of."""

    study_instance_uid: str
    patient_id: str
    status: Status
    reason: str
    series_instance_uid: str | None = None
    probability: float | None = None
    probability_kind: str | None = None
    calibrated: bool = False
    affected_fraction: float | None = None
    affected_left: float | None = None
    affected_right: float | None = None
    grade: Grade | None = None
    lung_volume_ml: float | None = None
    lesion_volume_ml: float | None = None
    ground_glass_ml: float | None = None
    """Of the lesion volume; None where the network does not tell the two apart."""
    consolidation_ml: float | None = None
    percent_infection: float | None = None
    ct_severity_score: CtSeverityScore | None = None
    positive_slices: int | None = None
    grade_from: GradeBasis = "affected_fraction"
    model: str | None = None
    model_version: str | None = None
    content_key: str = ""
    """Same series content, weights and analysis settings give the same key: nothing is redone."""
    revision: int = 1
    supersedes: str | None = None
    """SOP Instance UID of the structured report that this revision replaces."""
    sr_sop_instance_uid: str | None = None
    """SOP Instance UID of this revision's own structured report."""
    notes: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    files: Mapping[ResultKind, Path] = field(default_factory=dict)
    boxes: tuple[LesionBox, ...] = ()
    """Of a network that finds lesions one by one."""


@dataclass(frozen=True, slots=True)
class ResultObject:
    """One written DICOM result: the bytes at ``path`` are what every destination gets."""

    kind: ResultKind
    path: Path
    sop_instance_uid: str
    sop_class_uid: str
    segments: tuple[str, ...] = ()
    """Labels of a segmentation's segments; the first one's number is 1."""
    volumes_ml: tuple[float, ...] = ()
    """Volume of each segment: its voxels, counted."""


@dataclass(frozen=True, slots=True)
class Priority:
    """Place of a study on the worklist and the sentence that explains it."""

    band: Band
    score: float
    due_at: datetime
    reason: str

    def or_sooner(self, other: Priority) -> Priority:
        """The more urgent band (with its score) and the earlier due time of both, with the other's reason."""
        first = self if self.band <= other.band else other
        return Priority(first.band, first.score, min(self.due_at, other.due_at), other.reason)

    def ordered_stat(self, due_at: datetime) -> Priority:
        """The place of the same study once it is known to be a STAT order, due by then at the latest."""
        return Priority(Band.CRITICAL, self.score, min(self.due_at, due_at), f"STAT order; {self.reason}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """One study as the database keeps it."""

    study_instance_uid: str
    state: StudyState
    arrived_at: datetime
    last_received_at: datetime
    patient_id: str = ""
    patient_name: str = ""
    accession_number: str = ""
    study_date: str = ""
    study_description: str = ""
    stat: bool = False
    reason: str = ""
    attempts: int = 0
    not_before: datetime | None = None
    """When a failed study is tried again (without it: given up), or missing images are asked for again."""
    notes: tuple[str, ...] = ()
    completeness: str | None = None
    """What the archive said of images missing here, "" when none is; None where it was not asked (yet)."""
    closed_at: datetime | None = None
    closed_reason: str = ""
    images_deleted_at: datetime | None = None
    """When its images were deleted here, long after its results were delivered."""

    @property
    def remarks(self) -> tuple[str, ...]:
        """What the reader must know beside the answer."""
        deleted = self.images_deleted_at
        gone = f"images deleted here on {deleted:%Y-%m-%d}; the archive has them" if deleted else None
        return (*self.notes, *filter(None, [self.completeness, gone]))


@dataclass(frozen=True, slots=True)
class Figures:
    """Of an answer that is positive or negative, what orders."""

    status: Status
    probability: float | None
    affected_fraction: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What decides the place of a study, and what became of it."""

    study_instance_uid: str
    state: StudyState
    arrived_at: datetime
    stat: bool
    priority: Priority
    """Its place as the database has it."""
    result: Figures | None = None
    """Of the newest answer that is positive or negative."""
    judged_at: datetime | None = None
    closed_at: datetime | None = None
    patient_name: str = ""
    accession_number: str = ""


@dataclass(frozen=True, slots=True)
class Owed:
    """What one destination is to get of a judgement: DICOM objects, or, where None, the answer itself.

    ``wanted`` is False where its filter passes this answer over: then it is owed only to a destination that
    was owed an earlier answer for the study, because who was told is told of the correction.
    """

    destination: str
    objects: tuple[ResultObject, ...] | None
    wanted: bool = True


Reference = tuple[str, str]
"""SOP Class UID and SOP Instance UID of an object."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """One thing owed to one destination: an object, or revision ``revision`` of the study's answer."""

    delivery_id: int
    study_instance_uid: str
    destination: str
    revision: int | None = None
    sop_instance_uid: str = ""
    sop_class_uid: str = ""
    path: Path | None = None
    state: DeliveryState
    created_at: datetime
    sent_at: datetime | None = None
    transaction_uid: str | None = None
    """Of the storage commitment that was asked for last."""
    superseded: bool = False
    """The destination is owed newer objects of the study, or has them."""
    attempts: int = 0
    last_error: str = ""

    @property
    def uncommitted_since(self) -> datetime:
        """Of what was taken: when that was, or when the destination was to be asked anew."""
        return max(self.sent_at or self.created_at, self.created_at)

    @property
    def reference(self) -> Reference:
        return self.sop_class_uid, self.sop_instance_uid

    @property
    def name(self) -> str:
        """Without anything of the patient: the object's UID, or the revision of the study's answer."""
        if self.revision is None:
            return self.sop_instance_uid
        return f"revision {self.revision} of {self.study_instance_uid}"


@dataclass(frozen=True, slots=True)
class WorklistEntry:
    """One row of the worklist: the study, why it stands where it stands, and what was found.

    ``images`` counts CT images; reports and other objects filed with them are left out.
    """

    study: Study
    priority: Priority
    result: Result | None
    images: int
    deliveries: Mapping[DeliveryState, int]


class Permission(StrEnum):
    """What a page or an address asks of whoever opens it. A program's token names the last four."""

    OPEN = "open"
    """Of nobody: it shows nothing of patients and changes nothing."""
    SELF = "self"
    """Of anybody with a password of their own."""
    READ = "read"
    """See studies, pictures, lists and figures."""
    WORKLIST = "worklist"
    """Change what is on the list: claim, mark read, record a verdict, bring studies in."""
    POLICY = "policy"
    """Change how studies are ordered."""
    ADMIN = "admin"
    """Manage users and tokens."""


class Role(StrEnum):
    """What somebody is here; the page has one table of what each may do."""

    VIEWER = "viewer"
    RADIOLOGIST = "radiologist"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class Person:
    """Who asks: a user, a program with a token, or, where there are no users, whoever sits at this machine.

    ``who`` is the name that audit, verdicts and policies keep. ``role`` is None for who is no user.
    """

    who: str
    may: frozenset[Permission]
    role: Role | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class User:
    """Somebody with a password here."""

    name: str
    role: Role
    disabled: bool = False
    created_at: datetime
    last_login_at: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiToken:
    """What lets a program in; of the token itself only a hash is kept."""

    token_id: int
    name: str
    scopes: frozenset[Permission]
    created_by: str
    created_at: datetime
    expires_at: datetime | None = None
    last_used_at: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditRecord:
    """One row of the audit trail: a message, and the hash that chains it to all before it."""

    number: int
    message: str
    hash: str


# --- what other systems say of a study -----------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ordered:
    """An order was placed or changed: STAT, or not."""

    accession_number: str
    stat: bool


@dataclass(frozen=True, slots=True)
class Reported:
    """A study has been read; ``patient_ids`` are the patient's, to be sure of it."""

    accession_number: str
    patient_ids: frozenset[str]
    reason: str


News = Ordered | Reported
