"""Whether scores are still spread as they were: population stability index, told with its numbers (pure)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import log, sqrt

BINS = 10
"""Tenths of the score, from 0 to 1."""
ALARM = 0.2
"""From here on a distribution counts as changed, as is usual in credit scoring, where the index is from."""
Z99 = 2.326348
"""Of a hundred indices without any change, chance alone makes one as large as the 99 % quantile."""


@dataclass(frozen=True, slots=True)
class Drift:
    """Scores of a recent and of a baseline period; counts in tenths of the score."""

    name: str
    baseline: tuple[int, ...]
    recent: tuple[int, ...]
    index: float | None
    """None: too few studies to say."""

    @property
    def counts(self) -> tuple[int, int]:
        return sum(self.baseline), sum(self.recent)

    @property
    def alarm(self) -> bool:
        return self.index is not None and self.index >= ALARM


def measure(name: str, baseline: Iterable[float], recent: Iterable[float]) -> Drift:
    """The drift of scores in [0, 1]."""
    a, b = _histogram(baseline), _histogram(recent)
    return Drift(name, a, b, _index(a, b))


def _histogram(scores: Iterable[float]) -> tuple[int, ...]:
    counts = Counter(min(int(score * BINS), BINS - 1) for score in scores)
    return tuple(counts[number] for number in range(BINS))


def _index(baseline: Sequence[int], recent: Sequence[int]) -> float | None:
    """Sum of (q − p) ln(q / p) over the tenths that hold any study; half a study is added to each.

    Without any change it follows 1/n + 1/m times chi squared with tenths − 1 degrees of freedom. Where
    chance alone might reach the alarm, only an index that is larger than chance makes it says anything.
    """
    used = [(a, b) for a, b in zip(baseline, recent, strict=True) if a or b]
    n, m = sum(baseline), sum(recent)
    if not n or not m:
        return None
    half = len(used) / 2
    shares = [((a + 0.5) / (n + half), (b + 0.5) / (m + half)) for a, b in used]
    index = sum((q - p) * log(q / p) for p, q in shares)
    by_chance = _chi_squared(len(used) - 1) * (1 / n + 1 / m)
    return None if by_chance > ALARM and index <= by_chance else index


def _chi_squared(degrees: int) -> float:
    """The 99 % quantile, as Wilson and Hilferty (1931) have it."""
    part = 2 / (9 * max(degrees, 1))
    return degrees * (1 - part + Z99 * sqrt(part)) ** 3
