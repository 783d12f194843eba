"""Whether scores are still spread as they were: population stability index, told with its numbers (pure)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import log

BINS = 10
"""Tenths of the score, from 0 to 1."""
ALARM = 0.2
"""From here on a distribution counts as changed, as is usual in credit scoring, where the index is from."""
BY_CHANCE = 0.1
"""An index that chance alone makes as large as this says nothing: there are too few studies."""


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

    Without any change it is expected at (tenths − 1)(1/n + 1/m), the mean of the chi-squared distribution
    that it then follows.
    """
    used = [(a, b) for a, b in zip(baseline, recent, strict=True) if a or b]
    n, m = sum(baseline), sum(recent)
    if not n or not m or (len(used) - 1) * (1 / n + 1 / m) > BY_CHANCE:
        return None
    half = len(used) / 2
    shares = [((a + 0.5) / (n + half), (b + 0.5) / (m + half)) for a, b in used]
    return sum((q - p) * log(q / p) for p, q in shares)
