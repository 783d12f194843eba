"""Which parts of a predicted mask are the lungs."""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from triage.domain import Mask
from triage.models.preprocessing import SPACING_MM, bounding_box, neighbour_step

SMALLEST_PART = 0.05
"""A component below this share of the largest one is bowel gas, an airway or a cushion."""
LEAP_MM = 16.0
"""Lungs do not grow by so wide a disk from one slice to the next and back."""


def plausible(probability: Tensor, spacing_mm: float, pixel_mm: float = SPACING_MM) -> Tensor:
    """Large components of the chest with holes filled: dense tissue inside a lung is lung.

    Probability of lung (z, h, w) on slices so far apart, with pixels of so many mm → the same, 0 in what is
    dropped and 1 in what is filled; elsewhere it stays soft, so that the border keeps its place between
    pixels when it is resampled.
    """
    mask = (probability > 0.5).cpu().numpy()
    if not mask.any():
        return probability
    kept = np.zeros_like(mask)
    box = bounding_box(mask)
    kept[box] = _filled(_large(_continuous(mask[box], neighbour_step(spacing_mm), pixel_mm)))
    changed = (torch.from_numpy(one).to(probability.device) for one in (mask & ~kept, kept & ~mask))
    dropped, filled = changed
    return probability.masked_fill(dropped, 0).masked_fill_(filled, 1)


def _continuous(mask: Mask, step: int, pixel_mm: float) -> Mask:
    """Without what is wide and in one slice only: the stomach where it touches the base of a lung."""
    index, last = np.arange(len(mask)), len(mask) - 1
    alone = mask & ~mask[np.maximum(index - step, 0)] & ~mask[np.minimum(index + step, last)]
    radius = LEAP_MM / 2 // pixel_mm
    reach = np.arange(-radius, radius + 1)
    disk = np.hypot(reach[:, None], reach) <= radius
    result = mask.copy()
    for z in np.flatnonzero(alone.sum(axis=(1, 2)) >= disk.sum()):
        labels, _ = ndimage.label(alone[z])
        for number, place in enumerate(ndimage.find_objects(labels), 1):
            part = labels[place] == number
            if min(part.shape) >= len(disk) and ndimage.binary_erosion(part, disk).any():
                result[z][place] &= ~part
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
    """Background that is shut in on all sides becomes mask; the diaphragm's dome is open below."""
    labels, _ = ndimage.label(np.pad(~mask, 1, constant_values=True))
    filled: Mask = (labels != labels[0, 0, 0])[1:-1, 1:-1, 1:-1]
    return filled
