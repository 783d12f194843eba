"""The worst cases, kept as one slice each to be drawn in the report."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from triage.domain import Mask
from triage.models.preprocessing import Layout
from triage.training.cases import Case
from triage.training.scores import Score


@dataclass(frozen=True, slots=True)
class Sketch:
    """The slice of a case in which the drawn and the found lesions differ most, upright as it is read."""

    score: Score
    slice_index: int
    image: NDArray[np.int16]
    """HU (y, x)."""
    drawn: Mask
    found: Mask

    @classmethod
    def of(cls, score: Score, case: Case, found: Mask) -> Sketch:
        """Of the first rater's drawing."""
        drawn = case.lesions[0]
        k = int(np.count_nonzero(found ^ drawn, axis=(1, 2)).argmax())
        layout = Layout.of(case.volume.orientation)
        image, truth, answer = (layout.canonical(a[k : k + 1])[0] for a in (case.volume.array, drawn, found))
        return cls(score, k, image.copy(), truth.copy(), answer.copy())


@dataclass
class Gallery:
    """Keeps the sketches of the cases with the lowest lesion Dice, whatever the number of cases."""

    size: int = 6
    _heap: list[tuple[float, int, Sketch]] = field(default_factory=list)
    _seen: int = 0

    def show(self, score: Score, case: Case, found: Mask) -> None:
        """Keep the case if it is among the worst."""
        if score.lesions is None:
            return
        self._seen += 1
        heapq.heappush(self._heap, (-score.lesions.dice, self._seen, Sketch.of(score, case, found)))
        if len(self._heap) > self.size:
            heapq.heappop(self._heap)

    def worst(self) -> list[Sketch]:
        """Worst first."""
        return [sketch for _, _, sketch in sorted(self._heap, reverse=True)]
