"""Which parts of a predicted mask are the lungs."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from triage.domain import Mask
from triage.models.preprocessing import bounding_box

SMALLEST_PART = 0.05
"""A component below this share of the largest one is bowel gas, a sinus or air on the table."""
IN_PLANE = np.array([[[0, 0, 0]] * 3, [[0, 1, 0], [1, 1, 1], [0, 1, 0]], [[0, 0, 0]] * 3], dtype=bool)


def plausible(mask: Mask) -> Mask:
    """Large components only, with holes filled slice by slice: dense tissue inside a lung is lung.

    Canonical mask (z, h, w) → the same shape; an empty mask stays empty.
    """
    if not mask.any():
        return mask
    result = np.zeros_like(mask)
    box = bounding_box(mask)
    result[box] = _filled(_large(mask[box]))
    return result


def _large(mask: Mask) -> Mask:
    labels, _ = ndimage.label(mask)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    kept: Mask = (sizes >= SMALLEST_PART * sizes.max())[labels] & mask
    return kept


def _filled(mask: Mask) -> Mask:
    """Background that does not reach its slice's edge becomes mask."""
    outside = np.pad(~mask, ((0, 0), (1, 1), (1, 1)), constant_values=True)
    labels, count = ndimage.label(outside, IN_PLANE)
    reaches_edge = np.zeros(count + 1, dtype=bool)
    reaches_edge[labels[:, 0, 0]] = True
    filled: Mask = (~reaches_edge[labels])[:, 1:-1, 1:-1]
    return filled
