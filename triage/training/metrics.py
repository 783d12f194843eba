"""What is measured, as pure functions of masks and numbers, and the interval that belongs to each figure.

An interval covers 95 %. Patients are what is sampled: two volumes of one patient are no two witnesses,
so shares are Wilson intervals over patients and all other intervals are bootstraps of patients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, stats

from triage.domain import Grade, Mask, Vector

Numbers = NDArray[np.float64]

Z = 1.959963984540054
"""Standard normal quantile of a two-sided 95 % interval."""
RESAMPLES = 2000
FEWEST_PATIENTS = 3
"""Below this a bootstrap only repeats the values themselves."""
SAME = 1e-9
"""Values of resamples that differ less do not differ."""
BINS = 100
"""Of probability, each 0.01 wide: thresholds are chosen in steps of 0.01."""
LEVELS = 256
"""Thresholds of the threshold-averaged Dice: 0, 1/255 … 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A value with its 95 % interval, what it was counted on and where.

    ``reason`` says why there is no value ("not measurable here") or, beside a value, why no interval, and
    what was left out.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    n: int = 0
    """Cases: volumes or pictures."""
    patients: int = 0
    unit: str = ""
    where: str = ""
    """Names of the data sets."""
    reason: str = ""


def wilson(successes: float, n: int) -> tuple[float, float]:
    """Wilson's interval of a share without continuity correction; (0, 1) where n is 0."""
    if n == 0:
        return 0.0, 1.0
    share = successes / n
    middle = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap(
    values: NDArray[Any],
    patients: Sequence[str],
    statistic: Callable[[NDArray[Any]], float],
    seed: int = 1,
    unit: str = "",
) -> Figure:
    """``statistic(values)`` and its expanded percentile interval over resampled patients.

    Plain percentiles are too narrow for few patients: of seven they cover 85 to 89 %, not 95 %. The levels
    are therefore those that make them as wide as Student's t (Hesterberg 2015, section 5.3).

    values: (cases, …), one row a case; a patient is drawn with all of his or her cases. Resamples in
    which the statistic is undefined (nan) are left out. No interval for fewer than three patients, nor
    where no resample differs: it would pretend certainty.
    """
    value = statistic(values)
    names, owner = np.unique(np.asarray(patients, dtype=str), return_inverse=True)
    figure = Figure(value=float(value), n=len(values), patients=len(names), unit=unit)
    if not isfinite(value):
        return replace(figure, value=None, reason="undefined on these values")
    if len(names) < FEWEST_PATIENTS:
        return replace(figure, reason=f"no interval from fewer than {FEWEST_PATIENTS} patients")
    rows = [np.flatnonzero(owner == k) for k in range(len(names))]
    rng = np.random.default_rng(seed)
    draws = rng.integers(len(names), size=(RESAMPLES, len(names)))
    found = np.array([statistic(values[np.concatenate([rows[k] for k in draw])]) for draw in draws])
    level = expanded_level(len(names))
    low, high = np.quantile(found[np.isfinite(found)], [level, 1 - level])
    if high - low < SAME:
        return replace(figure, reason="no interval: every resample gives this value")
    return replace(figure, low=float(low), high=float(high))


def expanded_level(n: int) -> float:
    """Lower quantile of the resamples of n patients that stands for 2.5 % (Hesterberg 2015, section 5.3)."""
    return float(stats.norm.cdf(np.sqrt(n / (n - 1)) * stats.t.ppf(0.025, n - 1)))


def mean(values: Sequence[float], patients: Sequence[str], seed: int = 1, unit: str = "") -> Figure:
    """Mean over patients of each patient's mean over cases, so that every patient counts once."""
    by_patient = patient_means(values, patients)
    figure = bootstrap(np.array(list(by_patient.values())), list(by_patient), np.mean, seed, unit)
    return replace(figure, n=len(values))


def patient_means(values: Sequence[float], patients: Sequence[str]) -> dict[str, float]:
    """Each patient's mean over cases."""
    rows: dict[str, list[float]] = {}
    for value, patient in zip(values, patients, strict=True):
        rows.setdefault(patient, []).append(value)
    return {patient: float(np.mean(row)) for patient, row in rows.items()}


def share(hits: Sequence[bool], patients: Sequence[str]) -> Figure:
    """Share of hits with Wilson's interval over patients; several cases of a patient share his or her weight.

    Sensitivity: of the ill, those called positive. Specificity: of the others, those called negative.
    """
    by_patient = patient_means([float(hit) for hit in hits], patients)
    total = sum(by_patient.values())
    low, high = wilson(total, len(by_patient))
    return Figure(value=total / len(by_patient), low=low, high=high, n=len(hits), patients=len(by_patient))


@dataclass(frozen=True, slots=True)
class Counts:
    """Right and wrong answers to yes-or-no questions; the measures are nan where nothing was asked."""

    tp: float
    fp: float
    fn: float
    tn: float

    @property
    def accuracy(self) -> float:
        return _ratio(self.tp + self.tn, self.tp + self.fp + self.fn + self.tn)

    @property
    def sensitivity(self) -> float:
        return _ratio(self.tp, self.tp + self.fn)

    @property
    def specificity(self) -> float:
        return _ratio(self.tn, self.tn + self.fp)

    @property
    def precision(self) -> float:
        return _ratio(self.tp, self.tp + self.fp)

    @property
    def f1(self) -> float:
        return _ratio(2 * self.tp, 2 * self.tp + self.fp + self.fn)

    @property
    def average_accuracy(self) -> float:
        """Of both groups alike, however many are in each (Gao et al., equation 15)."""
        return (self.sensitivity + self.specificity) / 2


MEASURES = ("accuracy", "average_accuracy", "precision", "sensitivity", "f1", "specificity")
"""Of ``Counts``."""


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")


def measures(
    found: Sequence[bool], truth: Sequence[bool], patients: Sequence[str], seed: int = 1
) -> dict[str, Figure]:
    """Each of ``MEASURES`` over all answers together, bootstrapped by patient."""
    kinds = ((True, True), (True, False), (False, True), (False, False))
    totals = {patient: np.zeros(len(kinds)) for patient in patients}
    for patient, answer in zip(patients, zip(found, truth, strict=True), strict=True):
        totals[patient][kinds.index(answer)] += 1
    table = np.stack(list(totals.values()))

    def figure(name: str) -> Figure:
        return bootstrap(table, list(totals), lambda rows: getattr(Counts(*rows.sum(axis=0)), name), seed)

    return {name: replace(figure(name), n=len(found)) for name in MEASURES}


def weighted_f1(
    found: Sequence[int], truth: Sequence[int], patients: Sequence[str], weights: Mapping[int, float]
) -> Figure:
    """Mean of the F1 of each class that is there, so weighted, over all answers, bootstrapped by patient."""
    pairs = np.array([found, truth]).T

    def statistic(rows: NDArray[Any]) -> float:
        classes = [c for c in weights if (rows == c).any()]
        f1 = [Counts(*_counts(rows[:, 0] == c, rows[:, 1] == c)).f1 for c in classes]
        return float(np.average(f1, weights=[weights[c] for c in classes]))

    return bootstrap(pairs, patients, statistic)


def _counts(found: NDArray[np.bool_], truth: NDArray[np.bool_]) -> tuple[float, float, float, float]:
    """Of ``Counts``."""
    tp, fp, fn = _overlap(found, truth)
    return tp, fp, fn, len(found) - tp - fp - fn


def slice_mean(values: Sequence[float], slices: Sequence[int], patients: Sequence[str]) -> Figure:
    """Mean over all slices of all cases from each case's mean and number, bootstrapped by patient."""
    rows = np.array([values, slices], dtype=np.float64).T
    figure = bootstrap(rows, patients, lambda r: float(np.average(r[:, 0], weights=r[:, 1])))
    return replace(figure, n=sum(slices))


def dice(answer: Mask, truth: Mask) -> float:
    """2 |A ∩ B| / (|A| + |B|); 1 where both masks are empty, 0 where one is."""
    tp, fp, fn = _overlap(answer, truth)
    return 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 1.0


def iou(answer: Mask, truth: Mask) -> float:
    """|A ∩ B| / |A ∪ B| (Jaccard); 1 where both masks are empty, 0 where one is."""
    tp, fp, fn = _overlap(answer, truth)
    return tp / (tp + fp + fn) if tp + fp + fn else 1.0


def _overlap(answer: Mask, truth: Mask) -> tuple[int, int, int]:
    both = int(np.count_nonzero(answer & truth))
    return both, int(np.count_nonzero(answer)) - both, int(np.count_nonzero(truth)) - both


def hd95(answer: Mask, truth: Mask, spacing: Vector) -> float | None:
    """95th percentile of the distances between both surfaces in mm, the larger of both directions.

    Masks (z, y, x), spacing (z, y, x) in mm; a single slice is measured in its plane. None where a mask
    is empty: there is no surface to be far from. MONAI's definition: a surface voxel is one of the mask
    with a neighbour (sharing a face) outside of it. MONAI's function warns of itself at each call.
    """
    if not (answer.any() and truth.any()):
        return None
    box = ndimage.find_objects((answer | truth).astype(np.int8))[0]
    axes = slice(1, None) if len(answer) == 1 else slice(None)
    surfaces = [_surface(mask[box].squeeze(0) if len(answer) == 1 else mask[box]) for mask in (answer, truth)]
    farthest = [
        np.percentile(ndimage.distance_transform_edt(~to, sampling=spacing[axes])[of], 95)
        for of, to in (surfaces, surfaces[::-1])
    ]
    return float(max(farthest))


def _surface(mask: Mask) -> Mask:
    surface: Mask = mask & ~ndimage.binary_erosion(mask)
    return surface


def volume_error(answer: Mask, truth: Mask, voxel_ml: float) -> float:
    """Volume found minus volume drawn, in ml."""
    return float(int(np.count_nonzero(answer)) - int(np.count_nonzero(truth))) * voxel_ml


def auc(scores: Numbers, positive: NDArray[np.bool_]) -> float:
    """Area under the ROC curve by ranks (Mann–Whitney), nan without both groups.

    scikit-learn's value; a bootstrap asks thousands of times, and ranks are much faster.
    """
    ill = int(positive.sum())
    well = len(positive) - ill
    if not ill or not well:
        return float("nan")
    ranks = stats.rankdata(scores)
    return float((ranks[positive].sum() - ill * (ill + 1) / 2) / (ill * well))


def roc_auc(
    scores: Sequence[float], positive: Sequence[bool], patients: Sequence[str], seed: int = 1
) -> Figure:
    """Area under the ROC curve, bootstrapped by patient where both groups have enough of them."""
    pairs = np.array([scores, positive], dtype=np.float64).T
    figure = bootstrap(pairs, patients, lambda rows: auc(rows[:, 0], rows[:, 1] > 0), seed)
    if figure.value is None or _smaller_group(positive, patients) >= FEWEST_PATIENTS:
        return figure
    reason = f"no interval from fewer than {FEWEST_PATIENTS} patients in a group"
    return replace(figure, low=None, high=None, reason=reason)


def _smaller_group(positive: Sequence[bool], patients: Sequence[str]) -> int:
    """Patients in the smaller of both groups."""
    groups = ({p for p, ill in zip(patients, positive, strict=True) if ill == one} for one in (True, False))
    return min(len(group) for group in groups)


@dataclass(frozen=True, slots=True)
class RocCurve:
    """Sensitivity at each false positive rate of a common grid, and its 95 % band where there can be one."""

    false_positive_rate: Numbers
    sensitivity: Numbers
    low: Numbers | None = None
    high: Numbers | None = None


def roc_curve(
    scores: Sequence[float], positive: Sequence[bool], patients: Sequence[str], seed: int = 1
) -> RocCurve:
    """The curve and its band over resampled patients; both groups must be there.

    As for the AUC: no band from fewer than three patients in a group, nor where every resample gives the same
    curve.
    """
    grid = np.linspace(0, 1, 101)
    pairs = np.array([scores, positive], dtype=np.float64).T
    curve = RocCurve(grid, _sensitivity(pairs, grid))
    names, owner = np.unique(np.asarray(patients, dtype=str), return_inverse=True)
    if _smaller_group(positive, patients) < FEWEST_PATIENTS:
        return curve
    rng = np.random.default_rng(seed)
    curves = []
    for draw in rng.integers(len(names), size=(RESAMPLES // 4, len(names))):
        rows = pairs[np.concatenate([np.flatnonzero(owner == k) for k in draw])]
        if 0 < rows[:, 1].sum() < len(rows):
            curves.append(_sensitivity(rows, grid))
    low, high = np.percentile(curves, [2.5, 97.5], axis=0)
    return curve if np.ptp(curves, axis=0).max() < SAME else replace(curve, low=low, high=high)


def _sensitivity(rows: Numbers, grid: Numbers) -> Numbers:
    """Highest sensitivity at each false positive rate: the step below the curve's points."""
    from sklearn.metrics import roc_curve as points

    false_positive_rate, sensitivity, _ = points(rows[:, 1] > 0, rows[:, 0], drop_intermediate=False)
    last = np.searchsorted(false_positive_rate, grid, side="right") - 1
    steps: Numbers = np.asarray(sensitivity, dtype=np.float64)[last]
    return steps


def spearman(
    drawn: Sequence[float], found: Sequence[float], patients: Sequence[str], seed: int = 1
) -> Figure:
    """Spearman's rank correlation (Goncharov et al., section 5.1), bootstrapped by patient."""
    return bootstrap(np.array([drawn, found], dtype=np.float64).T, patients, _rank_correlation, seed)


def _rank_correlation(pairs: Numbers) -> float:
    """SciPy's spearmanr; nan where either column is constant."""
    if len(pairs) < 2 or np.ptp(pairs, axis=0).min() == 0:
        return float("nan")
    return float(stats.spearmanr(pairs[:, 0], pairs[:, 1]).statistic)


def grade_confusion(drawn: Sequence[Grade], found: Sequence[Grade]) -> NDArray[np.int64]:
    """Cases by grade, (5, 5): rows CT-0…CT-4 as drawn or read, columns as found."""
    order = list(Grade)
    table = np.zeros((len(order), len(order)), dtype=np.int64)
    for truth, answer in zip(drawn, found, strict=True):
        table[order.index(truth), order.index(answer)] += 1
    return table


@dataclass(frozen=True, slots=True)
class Histogram:
    """Lesion probability of the voxels inside the lungs, against one rater's drawing.

    Enough for volumes at any threshold and for calibration, in place of the map. Bin k holds
    probabilities from k/100 up to (k + 1)/100, the last one 1 too.
    """

    lesion: tuple[int, ...]
    """Voxels drawn as lesion, per bin."""
    other: tuple[int, ...]
    """Voxels not drawn as lesion, per bin."""
    sums: tuple[float, ...]
    """Sum of the probabilities, per bin."""
    missed: int
    """Voxels drawn as lesion outside the lungs found: missed at every threshold."""

    def counts(self, threshold: float) -> tuple[int, int, int]:
        """(found rightly, found wrongly, missed) where lesion is what is above the threshold."""
        first = round(threshold * BINS)
        found = sum(self.lesion[first:])
        return found, sum(self.other[first:]), sum(self.lesion[:first]) + self.missed

    def fraction(self, threshold: float) -> float:
        """Share of the lungs' voxels that are lesion at a threshold, a multiple of 0.01; 0 without lungs."""
        right, wrong, _ = self.counts(threshold)
        lungs = sum(self.lesion) + sum(self.other)
        return (right + wrong) / lungs if lungs else 0.0

    def table(self) -> Numbers:
        """(lesion, other, sums) × bins; tables add up over cases."""
        return np.array([self.lesion, self.other, self.sums], dtype=np.float64)


def histogram(probability: NDArray[np.float32], truth: Mask, lungs: Mask) -> Histogram:
    """Of a lesion map and one drawing within the lungs found, all (z, y, x)."""
    inside, drawn = probability[lungs], truth[lungs]
    bins = np.clip((inside * BINS).astype(np.intp), 0, BINS - 1)
    return Histogram(
        lesion=tuple(np.bincount(bins[drawn], minlength=BINS).tolist()),
        other=tuple(np.bincount(bins[~drawn], minlength=BINS).tolist()),
        sums=tuple(np.bincount(bins, weights=inside, minlength=BINS).tolist()),
        missed=int(np.count_nonzero(truth & ~lungs)),
    )


@dataclass(frozen=True, slots=True)
class Reliability:
    """Calibration bins that hold anything: mean probability, share drawn as lesion, and how many."""

    predicted: Numbers
    observed: Numbers
    n: Numbers

    @property
    def ece(self) -> float:
        """Expected calibration error: mean distance of both, weighted by n; nan where nothing was counted."""
        if not self.n.sum():
            return float("nan")
        return float((np.abs(self.predicted - self.observed) * self.n).sum() / self.n.sum())


def reliability(table: Numbers, bins: int = 10) -> Reliability:
    """``Histogram.table()``, or a sum of them, in bins of equal width."""
    lesion, other, sums = table.reshape(3, bins, -1).sum(axis=2)
    n = lesion + other
    full = n > 0
    return Reliability(sums[full] / n[full], lesion[full] / n[full], n[full])


def ece(tables: NDArray[np.float64], patients: Sequence[str], seed: int = 1) -> Figure:
    """Expected calibration error over the voxels of all cases, (cases, 3, 100), bootstrapped by patient."""
    return bootstrap(tables, patients, lambda rows: reliability(rows.sum(axis=0)).ece, seed)


def threshold_averaged_dice(probability: NDArray[np.float32], truth: Mask) -> float:
    """Of one picture: the map is stretched to 0…1, cut at 256 thresholds, and the Dice averaged.

    What Inf-Net and its rivals publish as Dice (Fan et al. 2020, their evaluation tool: mean over
    thresholds and pictures, lesion where the stretched map is at least the threshold, Dice 0 where
    nothing overlaps, so 0 for an empty drawing). A constant map is not stretched. Only for comparison
    with those figures: stretching forces a lesion into every picture.
    """
    stretched = probability.astype(np.float64)
    if np.ptp(stretched) > 0:
        stretched = (stretched - stretched.min()) / np.ptp(stretched)
    level = np.clip(stretched * (LEVELS - 1) + 1e-9, 0, LEVELS - 1).astype(np.intp)
    found, hit = (_at_least(level[mask]) for mask in (np.ones_like(truth), truth))
    return float(np.mean(2 * hit / np.maximum(found + np.count_nonzero(truth), 1)))


def _at_least(level: NDArray[np.intp]) -> Numbers:
    """How many reach each level."""
    reached: Numbers = np.bincount(level, minlength=LEVELS)[::-1].cumsum()[::-1].astype(np.float64)
    return reached
