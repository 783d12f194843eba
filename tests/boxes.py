"""A network that needs no weights: two boxes are the lungs, a part of one is the lesion.

For tests of what happens around the network; the real ones are tested with their own weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from triage.domain import DetectedLesion, Findings, ModelInfo, Volume


@dataclass
class Boxes:
    """Says that ``affected`` of the patient's right lung is diseased, whatever the volume shows."""

    affected: float = 0.4
    lungs: int = 2
    tells_apart: bool = False
    """Calls the lowest four tenths of the lesion consolidation, and detects its front half in each slice."""
    margin: int = 2
    """Slices above and below the lungs."""
    settings: Mapping[str, str | float] = field(default_factory=dict)
    info: ModelInfo = field(
        default_factory=lambda: ModelInfo(
            name="boxes", version="0", summary="two boxes", calibrated=False, card="for tests"
        )
    )

    def predict(self, volume: Volume) -> Findings:
        slices, rows, columns = volume.array.shape
        lung = np.zeros(volume.array.shape, dtype=bool)
        span = slice(rows // 4, 3 * rows // 4)
        right = slice(columns // 8, 3 * columns // 8)
        inner = slice(self.margin, slices - self.margin)
        lung[inner, span, right] = True
        if self.lungs == 2:
            lung[inner, span, 5 * columns // 8 : 7 * columns // 8] = True
        lesion = np.zeros_like(lung)
        diseased = round((slices - 2 * self.margin) * self.affected)
        lesion[self.margin : self.margin + diseased, span, right] = True
        findings = Findings(min(1.0, 2 * self.affected), "score", False, lung, lesion)
        if not self.tells_apart:
            return findings
        consolidation = lesion.copy()
        consolidation[self.margin + 4 * diseased // 10 :] = False
        box = (rows // 4, right.start, rows // 2, right.stop)
        filled = np.ones((box[2] - box[0], box[3] - box[1]), dtype=bool)
        return replace(
            findings,
            detected=tuple(
                DetectedLesion(index, box, 0.75, filled)
                for index in range(self.margin, self.margin + diseased)
            ),
            lesion_classes={"ground_glass": lesion & ~consolidation, "consolidation": consolidation},
        )
