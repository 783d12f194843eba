"""How attention maps lie on the lesions, and how large a lesion must be to be noticed (Gao et al., sections
3.4.1 and 3.4.5, figure 5).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from triage.domain import Mask, Volume
from triage.models.preprocessing import resample, shrink, stored_order
from triage.training import metrics

HIGH = 0.5
"""From here on a map counts as marked; the paper does not say."""
PIXEL_MM2 = (360 / 512) ** 2
"""Of the paper's slices, 512 pixels of a field of 360 mm: its sizes are in pixels."""
GROUPS = ("0–1k", "1–2k", "2–3k", "3–4k", "4–5k", "≥5k")
"""Sizes of figure 5, in thousands of those pixels: 494 mm² each."""


def dice(attention: Mapping[str, NDArray[np.uint8]], lesion: Mask, volume: Volume) -> dict[str, float]:
    """Dice of each map (see ``Findings.attention``) with the lesions drawn on the volume's own grid.

    Over the slices with lesions, together: in every slice a map is somewhere at its highest, so the others
    would only tell that nothing is drawn there. Maps are enlarged to 2 mm, as the paper's are to its slices.
    Empty where no lesion is drawn.
    """
    drawn = np.asarray(stored_order(shrink(lesion, volume), volume))
    chosen = np.flatnonzero(drawn.any(axis=(1, 2)))
    if not chosen.size:
        return {}
    truth = drawn[chosen]
    return {name: _dice(maps[chosen], truth) for name, maps in attention.items()}


def _dice(maps: NDArray[np.uint8], truth: Mask) -> float:
    large = resample(torch.from_numpy(maps.astype(np.float32)), truth.shape[1:]).numpy()
    return metrics.dice(large > HIGH * 255, truth)


def lesion_areas(lesion: Mask, volume: Volume) -> NDArray[np.float64]:
    """mm² of lesion in each slice (z,)."""
    _, y, x = volume.spacing
    areas: NDArray[np.float64] = np.count_nonzero(lesion, axis=(1, 2)) * (y * x)
    return areas


def size_group(area_mm2: float) -> str:
    """Which of ``GROUPS`` a slice belongs to, by the lesion in it."""
    return GROUPS[min(int(area_mm2 / PIXEL_MM2 / 1000), len(GROUPS) - 1)]
