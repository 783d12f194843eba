"""Masks and spacing → Severity: how much of each lung is affected (pure functions).

The affected fraction is measured in each lung, and the larger one counts (Goncharov et al., section
2.1); beside it stand the percentage of infection of Qiblawey et al. (section 2.4) and the CT severity
score of Yang et al. 2020 over twenty regions (Fung et al., section III-C).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from triage.config import Analysis
from triage.domain import (
    LUNG_REGIONS,
    CtSeverityScore,
    Findings,
    Grade,
    GradeBasis,
    LesionClass,
    Mask,
    Severity,
    Status,
    Vector,
    Volume,
    areas,
    infected_shares,
)

PlaneMask = NDArray[np.bool_]

ONE_LUNG = "one lung only"
CUT_OFF = "the images end inside the lungs"
END_SHARE = 0.1
"""Lung on the first or last slice, as a share of the slice with most, above which lung lies outside."""
SMALLER_SHARE = 0.1
"""A lung below this share of both is a remnant: nothing can be said of that side."""
BIN_MM = 15.0
"""Wide enough that pixel columns fall evenly into the bins of the profile."""
VALLEY = 0.6
"""Two lungs leave a valley (the mediastinum) in the left–right profile at most this deep; one does not."""

FIRST = (0, 1, 3, 6)
"""Number of the first region of each band of a lung in ``LUNG_REGIONS``: one, two, three and four regions."""


@dataclass(frozen=True, slots=True)
class Sides:
    """Which in-plane columns (y, x) of the volume belong to the patient's left and right lung."""

    left: PlaneMask
    right: PlaneMask


def measure(volume: Volume, findings: Findings, ct0_tolerance: float) -> Severity:
    """Affected fraction (the larger of both lungs), volumes in ml, grade, and both papers' other scores.

    A network without a lesion mask leaves all but the lungs' volume unknown (None).
    """
    lung, lesion = findings.lung_mask, findings.lesion_mask
    lung_columns = _columns(lung)
    sides = split_lungs(lung_columns, volume.spacing, volume.orientation)
    lung_ml = float(lung_columns.sum()) * volume.voxel_ml
    doubts = tuple(doubt for doubt in ("" if sides else ONE_LUNG, _cut_off(lung)) if doubt)
    if lesion is None:
        return Severity(None, None, None, None, lung_ml, None, doubts)
    lesion = lesion & lung
    lesion_columns = _columns(lesion)
    left = _fraction(lesion_columns, lung_columns, sides.left) if sides else None
    right = _fraction(lesion_columns, lung_columns, sides.right) if sides else None
    whole = _fraction(lesion_columns, lung_columns, np.ones_like(lung_columns, dtype=bool))
    affected = whole if left is None or right is None else max(left, right)
    infection, basis = percent_infection(lung, lesion), findings.grade_from
    return Severity(
        affected_fraction=affected,
        affected_left=left,
        affected_right=right,
        grade=grade_from(basis, affected, infection, ct0_tolerance),
        lung_volume_ml=lung_ml,
        lesion_volume_ml=float(lesion_columns.sum()) * volume.voxel_ml,
        doubts=doubts,
        percent_infection=infection,
        ct_severity_score=ct_severity_score(volume, lung, lesion, sides, ct0_tolerance) if sides else None,
        grade_from=basis,
        ground_glass_ml=_class_ml(volume, findings, "ground_glass"),
        consolidation_ml=_class_ml(volume, findings, "consolidation"),
    )


def grade_from(
    basis: GradeBasis, affected_fraction: float, infection: float | None, ct0_tolerance: float
) -> Grade:
    """The grade by the basis that the network's paper has; by the affected fraction where PI is unknown."""
    if infection is None or basis == "affected_fraction":
        return grade(affected_fraction, ct0_tolerance)
    return grade(infection, ct0_tolerance)


def grade(affected_fraction: float, ct0_tolerance: float) -> Grade:
    """CT-0 up to the tolerance, then (0, 25], (25, 50], (50, 75) and [75, 100] percent."""
    if affected_fraction <= ct0_tolerance:
        return Grade.CT0
    if affected_fraction <= 0.25:
        return Grade.CT1
    if affected_fraction <= 0.5:
        return Grade.CT2
    if affected_fraction < 0.75:
        return Grade.CT3
    return Grade.CT4


def positive(probability: float, affected_fraction: float | None, analysis: Analysis) -> bool:
    """By probability or by affected fraction: neither alone may call a sick lung negative."""
    by_fraction = affected_fraction is not None and affected_fraction >= analysis.positive_fraction
    return by_fraction or probability >= analysis.positive_probability


def answer(
    probability: float, measured: Severity, analysis: Analysis, millimetres: bool = True
) -> tuple[Status, str]:
    """The answer at the working point, and why there is none where the lungs were not seen well enough.

    Too little lung is not judged, and nobody is negative in doubt: a lung that was not seen may be the sick
    one. ``millimetres``: whether the spacing, so the ml, is known.
    """
    found, needed = measured.lung_volume_ml, analysis.minimum_lung_ml
    if millimetres and found < needed:
        return Status.NOT_ANALYSABLE, f"only {found:.0f} ml of lung found, below {needed:.0f} ml"
    if positive(probability, measured.affected_fraction, analysis):
        return Status.POSITIVE, ""
    if measured.doubts:
        doubts = "; ".join(measured.doubts)
        return Status.NOT_ANALYSABLE, f"{doubts}: no lesion in what is seen, which is not the whole"
    return Status.NEGATIVE, ""


def percent_infection(lung_mask: Mask, lesion_mask: Mask) -> float | None:
    """PI: infected over lung pixels of a slice, averaged over the slices that contain lung; in [0, 1].

    Qiblawey et al., section 2.4 and figure 3. Every slice counts the same, unlike theirs without the tips of
    the lungs: a few pixels of one would count as much as a whole slice. None where no slice shows any lung.
    """
    shares = infected_shares(lung_mask, lesion_mask)
    return float(np.mean(shares)) if len(shares) else None


def ct_severity_score(
    volume: Volume, lung_mask: Mask, lesion_mask: Mask, sides: Sides, ct0_tolerance: float
) -> CtSeverityScore | None:
    """0 (none), 1 (below half) or 2 (half or more opacified) for each of twenty regions.

    Yang et al. 2020 (Fung et al., section III-C) take the eighteen segments of the lungs, two of them on
    the left divided once more. Without a lobe model we cut each lung by its own geometry into ten parts
    of equal volume, an approximation that keeps the order of the segments and their equal weight:

        top tenth            apical                                        (segment 1)
        next two tenths      front | back                                  (3 | 2)
        next three tenths    front two thirds: medial, lateral | back      (middle lobe or lingula | 6)
        lower four tenths    front: medial, lateral | back: medial, lateral  (7, 8 | 10, 9)

    Top, front and lateral are the patient's, from the image orientation. "None" is up to the CT-0
    tolerance, as for the grade. None where there are too few slices to show every region.
    """
    left = _ten_fractions(volume, lung_mask, lesion_mask, sides.left, lateral=1)
    right = _ten_fractions(volume, lung_mask, lesion_mask, sides.right, lateral=-1)
    if left is None or right is None:
        return None
    steps = (np.nextafter(ct0_tolerance, 1), 0.5)
    return CtSeverityScore(*(tuple(np.digitize(part, steps).tolist()) for part in (left, right)))


def side_masks(lung_mask: Mask, volume: Volume) -> tuple[Mask, Mask] | None:
    """The patient's (left, right) lung as masks on the volume's grid, or None for one lung only."""
    sides = split_lungs(_columns(lung_mask), volume.spacing, volume.orientation)
    return (lung_mask & sides.left, lung_mask & sides.right) if sides else None


def split_lungs(
    lung_columns: NDArray[np.integer], spacing: Vector, orientation: tuple[float, ...]
) -> Sides | None:
    """Tell left from right by k-means, k = 2, on in-plane position; None when there is one lung only.

    ``lung_columns`` (y, x) counts lung voxels along z: with z among the features a tall lung would be
    split into top and bottom. Sides are named by the image orientation (+x is the patient's left in
    DICOM PS3.3 C.7.6.2.1.1), never by size.
    """
    y, x = np.nonzero(lung_columns)
    if len(y) < 2:
        return None
    weights = lung_columns[y, x].astype(np.float64)
    to_left, to_back = _patient_axes(y, x, spacing, orientation)
    cut = _two_means(np.stack([to_left, to_back], axis=1), weights)
    if cut is None or not _has_valley(to_left, weights, cut):
        return None
    left, right = (np.zeros(lung_columns.shape, dtype=bool) for _ in range(2))
    share = float(np.average(cut.is_left, weights=weights))
    if min(share, 1 - share) < SMALLER_SHARE:
        return None
    left[y[cut.is_left], x[cut.is_left]] = True
    right[y[~cut.is_left], x[~cut.is_left]] = True
    return Sides(left, right)


def _columns(mask: Mask) -> NDArray[np.uint16]:
    """Voxels along z, (y, x)."""
    columns: NDArray[np.uint16] = mask.view(np.uint8).sum(axis=0, dtype=np.uint16)
    return columns


def _ten_fractions(
    volume: Volume, lung: Mask, lesion: Mask, side: PlaneMask, lateral: int
) -> NDArray[np.float64] | None:
    """Affected fraction of each of ``LUNG_REGIONS`` of one lung; None where one holds no voxel."""
    rows, columns = (np.flatnonzero(side.any(axis=axis)) for axis in (1, 0))
    box = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
    lung = lung[:, *box] & side[box]
    lesion = lesion[:, *box] & lung
    shown, affected = np.zeros((2, len(LUNG_REGIONS)))
    for band, chosen in enumerate(_bands(areas(lung), volume.orientation)):
        lung_columns, lesion_columns = _columns(lung[chosen]), _columns(lesion[chosen])
        y, x = np.nonzero(lung_columns)
        mass = lung_columns[y, x]
        to_left, to_back = _patient_axes(y, x, volume.spacing, volume.orientation)
        region = FIRST[band] + _within(band, to_back, lateral * to_left, mass)
        shown += np.bincount(region, mass, len(LUNG_REGIONS))
        affected += np.bincount(region, lesion_columns[y, x], len(LUNG_REGIONS))
    return affected / shown if shown.all() else None


def _bands(areas: NDArray[np.intp], orientation: tuple[float, ...]) -> list[NDArray[np.intp]]:
    """The slices of the top tenth of a lung, of the next two, the next three, and the lower four."""
    shown = np.flatnonzero(areas)
    to_head = np.cross(orientation[:3], orientation[3:])[2]
    band = _cut(-np.sign(to_head) * shown, areas[shown], (0.1, 0.3, 0.6))
    return [shown[band == number] for number in range(len(FIRST))]


def _within(
    band: int, to_back: NDArray[np.float64], to_side: NDArray[np.float64], mass: NDArray[np.integer]
) -> NDArray[np.intp]:
    """Which region of its band each column (point in plane) belongs to."""
    region = np.zeros(len(mass), dtype=np.intp)
    if band == 0:
        return region
    back = _cut(to_back, mass, (2 / 3 if band == 2 else 1 / 2,)) == 1
    for part, divided in ((~back, band >= 2), (back, band == 3)):
        if divided:
            region[part] = _cut(to_side[part], mass[part], (1 / 2,))
    region[back] += 1 if band == 1 else 2
    return region


def _cut(
    position: NDArray[np.floating], mass: NDArray[np.integer], shares: tuple[float, ...]
) -> NDArray[np.intp]:
    """Points lined up by position and cut at these shares of their mass: the number of each one's part.

    Points at one position stay together, in the part that holds their middle, so the order in which
    they are stored changes nothing.
    """
    places, place = np.unique(position, return_inverse=True)
    line = np.bincount(place, mass, len(places))
    middle = (np.cumsum(line) - line / 2) / line.sum()
    part: NDArray[np.intp] = np.searchsorted(shares, middle)[place]
    return part


def _class_ml(volume: Volume, findings: Findings, name: LesionClass) -> float | None:
    """Volume of one kind of lesion inside the lungs."""
    mask = findings.lesion_classes.get(name)
    return None if mask is None else float(np.count_nonzero(mask & findings.lung_mask)) * volume.voxel_ml


def _cut_off(lung: Mask) -> str:
    area = areas(lung)
    return CUT_OFF if max(area[0], area[-1]) > END_SHARE * area.max(initial=0) else ""


def _fraction(
    lesion_columns: NDArray[np.integer], lung_columns: NDArray[np.integer], side: PlaneMask
) -> float:
    lung = int(lung_columns[side].sum())
    return float(lesion_columns[side].sum()) / lung if lung else 0.0


def _patient_axes(
    y: NDArray[np.integer], x: NDArray[np.integer], spacing: Vector, orientation: tuple[float, ...]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """In-plane position in mm along the patient's left and back (LPS x and y)."""
    row, column = orientation[:3], orientation[3:]
    along_row, along_column = x * spacing[2], y * spacing[1]
    return along_row * row[0] + along_column * column[0], along_row * row[1] + along_column * column[1]


@dataclass(frozen=True, slots=True)
class _Cut:
    is_left: NDArray[np.bool_]
    left_centre: NDArray[np.float64]
    right_centre: NDArray[np.float64]


def _two_means(points: NDArray[np.float64], weights: NDArray[np.float64]) -> _Cut | None:
    """Lloyd's algorithm from the outer left and right; None unless the centres differ mainly sideways."""
    middle = np.average(points, axis=0, weights=weights)
    left = np.array([points[:, 0].max(), middle[1]])
    right = np.array([points[:, 0].min(), middle[1]])
    is_left = np.zeros(len(points), dtype=bool)
    for _ in range(50):
        nearer = ((points - left) ** 2).sum(axis=1) < ((points - right) ** 2).sum(axis=1)
        if nearer.all() or not nearer.any():
            return None
        if (nearer == is_left).all():
            break
        is_left = nearer
        left = np.average(points[is_left], axis=0, weights=weights[is_left])
        right = np.average(points[~is_left], axis=0, weights=weights[~is_left])
    sideways, front_to_back = np.abs(left - right)
    return _Cut(is_left, left, right) if sideways > front_to_back else None


def _has_valley(to_left: NDArray[np.float64], weights: NDArray[np.float64], cut: _Cut) -> bool:
    """Between two lungs the left–right profile of lung volume sinks; inside one lung it does not."""
    bins = max(8, int(np.ptp(to_left) / BIN_MM))
    profile, edges = np.histogram(to_left, bins=bins, weights=weights)
    centres = (edges[:-1] + edges[1:]) / 2
    between = (centres > cut.right_centre[0]) & (centres < cut.left_centre[0])
    if not between.any():
        return False
    middle = np.flatnonzero(between)[np.argmin(profile[between])]
    lower_peak = min(profile[:middle].max(initial=0.0), profile[middle:].max(initial=0.0))
    return bool(profile[middle] <= VALLEY * lower_peak)
