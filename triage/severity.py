"""Masks and spacing → Severity: how much of each lung is affected (pure functions).

Goncharov et al., section 3.4: the fraction is measured in each lung, and the larger one counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from triage.domain import Findings, Grade, Mask, Severity, Vector, Volume

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


@dataclass(frozen=True, slots=True)
class Sides:
    """Which in-plane columns (y, x) of the volume belong to the patient's left and right lung."""

    left: PlaneMask
    right: PlaneMask


def measure(volume: Volume, findings: Findings, ct0_tolerance: float) -> Severity:
    """Affected fraction (the larger of both lungs), volumes in ml, and the grade.

    A network without a lesion mask leaves fraction, lesion volume and grade unknown (None).
    """
    lung = findings.lung_mask
    lung_columns = np.count_nonzero(lung, axis=0)
    sides = split_lungs(lung_columns, volume.spacing, volume.orientation)
    lung_ml = float(lung_columns.sum()) * volume.voxel_ml
    doubts = tuple(doubt for doubt in ("" if sides else ONE_LUNG, _cut_off(lung)) if doubt)
    if findings.lesion_mask is None:
        return Severity(None, None, None, None, lung_ml, None, doubts)
    lesion_columns = np.count_nonzero(findings.lesion_mask & lung, axis=0)
    left = _fraction(lesion_columns, lung_columns, sides.left) if sides else None
    right = _fraction(lesion_columns, lung_columns, sides.right) if sides else None
    whole = _fraction(lesion_columns, lung_columns, np.ones_like(lung_columns, dtype=bool))
    affected = whole if left is None or right is None else max(left, right)
    return Severity(
        affected_fraction=affected,
        affected_left=left,
        affected_right=right,
        grade=grade(affected, ct0_tolerance),
        lung_volume_ml=lung_ml,
        lesion_volume_ml=float(lesion_columns.sum()) * volume.voxel_ml,
        doubts=doubts,
    )


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


def side_masks(lung_mask: Mask, volume: Volume) -> tuple[Mask, Mask] | None:
    """The patient's (left, right) lung as masks on the volume's grid, or None for one lung only."""
    sides = split_lungs(np.count_nonzero(lung_mask, axis=0), volume.spacing, volume.orientation)
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


def _cut_off(lung: Mask) -> str:
    area = np.count_nonzero(lung, axis=(1, 2))
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
