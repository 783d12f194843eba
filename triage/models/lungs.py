"""Which parts of a predicted mask are the lungs."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from triage.domain import Mask
from triage.models.preprocessing import bounding_box

SMALLEST_PART = 0.05
"""A component below this share of the largest one is bowel gas, an airway or a cushion."""
IN_PLANE = np.array([[[0, 0, 0]] * 3, [[0, 1, 0], [1, 1, 1], [0, 1, 0]], [[0, 0, 0]] * 3], dtype=bool)


def plausible(mask: Mask) -> Mask:
    """Large components of the chest, holes filled slice by slice: dense tissue inside a lung is lung.

    Canonical mask (z, h, w) → the same shape; an empty mask stays empty.
    """
    if not mask.any():
        return mask
    result = np.zeros_like(mask)
    box = bounding_box(mask)
    result[box] = _filled(_large(mask[box]))
    return result


def _large(mask: Mask) -> Mask:
    """Components large enough, and in the slices of the largest one: both lungs lie side by side."""
    labels, _ = ndimage.label(mask)
    sizes = np.bincount(labels.ravel())[1:]
    extents = [place[0] for place in ndimage.find_objects(labels)]
    chest = extents[int(sizes.argmax())]
    beside = [_shared(extent, chest) >= 0.5 * (extent.stop - extent.start) for extent in extents]
    kept: Mask = np.concatenate([[False], (sizes >= SMALLEST_PART * sizes.max()) & beside])[labels]
    return kept


def _shared(a: slice, b: slice) -> int:
    """Slices in both ranges."""
    return max(0, int(min(a.stop, b.stop) - max(a.start, b.start)))


def _filled(mask: Mask) -> Mask:
    """Background that does not reach its slice's edge becomes mask."""
    outside = np.pad(~mask, ((0, 0), (1, 1), (1, 1)), constant_values=True)
    labels, count = ndimage.label(outside, IN_PLANE)
    reaches_edge = np.zeros(count + 1, dtype=bool)
    reaches_edge[labels[:, 0, 0]] = True
    filled: Mask = (~reaches_edge[labels])[:, 1:-1, 1:-1]
    return filled
