"""Lesions found one by one against those drawn: average precision by COCO's rules and by Ter-Sarkisov's.

An instance is a connected part of what was drawn in a slice, of at least 100 of the paper's pixels. A found
lesion hits one that was drawn where the IoU of their masks reaches a threshold; the best score chooses first.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from triage.domain import DetectedLesion, Findings, Mask
from triage.training import metrics
from triage.training.attention import PIXEL_MM2
from triage.training.cases import Case
from triage.training.metrics import Figure, Numbers
from triage.training.scores import SliceLesions

LEAST_MM2 = 100 * PIXEL_MM2
"""49 mm², of a pixel spacing that may be a guess."""
THRESHOLDS = tuple(round(0.5 + 0.05 * k, 2) for k in range(10))
"""IoU 0.5 to 0.95, the main criterion of COCO."""
MOST = 100
"""Lesions of a slice that count, the best ones."""
RECALLS = np.linspace(0, 1, 101)


def by_slice(case: Case, findings: Findings) -> tuple[SliceLesions, ...]:
    """Of each slice that shows lung or a lesion; what half of the raters drew is drawn.

    Empty where nobody drew lesions, or the network does not find them one by one.
    """
    if not case.lesions or findings.detected is None:
        return ()
    drawn = np.mean(case.lesions, axis=0) >= 0.5
    _, y, x = case.volume.spacing
    found: dict[int, list[DetectedLesion]] = {}
    for one in findings.detected:
        found.setdefault(one.slice_index, []).append(one)
    shown = np.flatnonzero((findings.lung_mask | drawn).any(axis=(1, 2)))
    return tuple(_compared(parts(drawn[z], LEAST_MM2 / (y * x)), found.get(z, [])) for z in shown.tolist())


def parts(lesion: Mask, least: float) -> list[Mask]:
    """Connected parts of a mask (h, w) of at least so many pixels."""
    labels, count = ndimage.label(lesion)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    return [labels == k for k in range(1, count + 1) if sizes[k] >= least]


def _compared(drawn: Sequence[Mask], found: Sequence[DetectedLesion]) -> SliceLesions:
    best = sorted(found, key=lambda one: -one.score)[:MOST]
    ious = tuple(tuple(_iou(one, mask) for mask in drawn) for one in best)
    return SliceLesions(len(drawn), tuple(one.score for one in best), ious)


def _iou(found: DetectedLesion, drawn: Mask) -> float:
    top, left, bottom, right = found.box
    both = int(np.count_nonzero(drawn[top:bottom, left:right] & found.mask))
    return both / (int(np.count_nonzero(drawn)) + int(np.count_nonzero(found.mask)) - both)


def hits(one: SliceLesions, threshold: float) -> list[bool]:
    """Of each lesion found in a slice, the best first: whether it hits one that no better one has hit."""
    free = set(range(one.drawn))
    answer = []
    for ious in one.ious:
        best = max(free, key=lambda k: ious[k], default=None)
        hit = best is not None and ious[best] >= threshold
        free -= {best} if hit else set()
        answer.append(hit)
    return answer


def coco(
    slices: Sequence[SliceLesions], patients: Sequence[str], thresholds: Sequence[float] = THRESHOLDS
) -> Figure:
    """Average precision of all slices together, mean over IoU thresholds, bootstrapped by patient.

    Precision is that of the highest recall at least as large, at 101 recalls (COCO's 101-point rule).
    """
    owner = np.repeat(np.arange(len(slices)), [len(one.scores) for one in slices])
    order = np.argsort([-score for one in slices for score in one.scores], kind="stable")
    table = np.array([[hit for one in slices for hit in hits(one, t)] for t in thresholds], dtype=bool)
    drawn = np.array([one.drawn for one in slices])

    def statistic(rows: NDArray[np.int64]) -> float:
        weights = np.bincount(rows, minlength=len(slices))
        total = float(weights @ drawn)
        if not total:
            return float("nan")
        found = weights[owner[order]]
        return float(np.mean([average_precision(row[order], found, total) for row in table]))

    return metrics.bootstrap(np.arange(len(slices)), patients, statistic)


def average_precision(hit: NDArray[np.bool_], weight: NDArray[np.int64], total: float) -> float:
    """Of lesions found, the best first, each so many times; ``total`` were drawn."""
    right, every = np.cumsum(hit * weight), np.cumsum(weight)
    precision = _from_behind(right / np.maximum(every, 1))
    place = np.searchsorted(right / total, RECALLS, side="left")
    return float(np.append(precision, 0.0)[place].mean())


def _from_behind(precision: Numbers) -> Numbers:
    """The highest precision from each place on."""
    highest: Numbers = np.maximum.accumulate(precision[::-1])[::-1]
    return highest


def of_slices(
    slices: Sequence[SliceLesions], patients: Sequence[str], thresholds: Sequence[float] = THRESHOLDS
) -> Figure:
    """The authors' figure: the mean over slices of each slice's own average precision.

    A slice in which nothing is drawn is one negative observation (section 2): 1 where nothing is found in it,
    else 0.
    """
    values = [np.mean([_of_slice(one, t) for t in thresholds]) for one in slices]
    return metrics.bootstrap(np.array(values), patients, np.mean)


def _of_slice(one: SliceLesions, threshold: float) -> float:
    """Area below precision over recall."""
    if not one.drawn:
        return float(not one.scores)
    hit = np.array(hits(one, threshold), dtype=bool)
    precision = _from_behind(np.cumsum(hit) / np.arange(1, len(hit) + 1))
    return float(precision[hit].sum() / one.drawn)
