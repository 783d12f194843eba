"""Boxes of one picture, and what detectors do with them (Girshick 2015; Ren et al. 2015; He et al. 2017).

A box is a row (top, left, bottom, right) in pixels from the picture's corner: pixel k reaches from k to
k + 1. Boxes are float32 (n, 4).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

LARGEST_CHANGE = math.log(1000 / 16)
"""Of the logarithm of a side: an untrained network does not ask for boxes beyond all numbers."""
SMALLEST_SIDE = 1.0
"""Pixels of a box that was cut to the picture: there are no empty boxes."""
SAMPLES = 2
"""Points along each side of a bin that RoIAlign averages (He et al., section 3)."""


def areas(boxes: Tensor) -> Tensor:
    """(n,)."""
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Shared over joint area of each of the boxes (n, 4) with each of (m, 4): (n, m)."""
    first = torch.maximum(a[:, None, :2], b[:, :2])
    last = torch.minimum(a[:, None, 2:], b[:, 2:])
    shared = (last - first).clamp(min=0).prod(2)
    return shared / (areas(a)[:, None] + areas(b) - shared).clamp(min=1e-9)


def nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Indices of the boxes that no better one overlaps by more than this IoU, the best first.

    Of equal scores the first is the better one.
    """
    order = scores.argsort(descending=True, stable=True)
    overlaps = (iou(boxes[order], boxes[order]) > threshold).cpu().numpy()
    dropped = np.zeros(len(order), dtype=bool)
    kept = []
    for rank, overlapped in enumerate(overlaps):
        if not dropped[rank]:
            kept.append(rank)
            dropped |= overlapped
    return order[kept]


def cut(boxes: Tensor, size: Sequence[int]) -> Tensor:
    """Boxes cut to a picture of this height and width, ``SMALLEST_SIDE`` left of each side."""
    limit = boxes.new_tensor(list(size))
    first = boxes[:, :2].clamp(min=0).minimum(limit - SMALLEST_SIDE)
    last = boxes[:, 2:].minimum(limit).maximum(first + SMALLEST_SIDE)
    return torch.cat([first, last], dim=1)


def encode(boxes: Tensor, anchors: Tensor, weights: tuple[float, float]) -> Tensor:
    """Boxes (n, 4) as seen from anchors (n, 4): moves of the centre, and logarithms of the sides' ratios.

    As in Ren et al. (equation 2), each pair times its weight.
    """
    centres, sides = _centred(boxes)
    origins, units = _centred(anchors)
    moves, ratios = (centres - origins) / units, (sides / units).log()
    return torch.cat([moves * weights[0], ratios * weights[1]], dim=1)


def decode(codes: Tensor, anchors: Tensor, weights: tuple[float, float]) -> Tensor:
    """The inverse of ``encode``; sides grow at most by ``LARGEST_CHANGE``."""
    origins, units = _centred(anchors)
    centres = codes[:, :2] / weights[0] * units + origins
    half = (codes[:, 2:] / weights[1]).clamp(max=LARGEST_CHANGE).exp() * units / 2
    return torch.cat([centres - half, centres + half], dim=1)


def _centred(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Centres and sides (n, 2)."""
    return (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]


def anchors(cells: Sequence[int], stride: int, sizes: Sequence[float], ratios: Sequence[float]) -> Tensor:
    """A box of each size and ratio (height over width) around each cell: (h · w · sizes · ratios, 4).

    Sizes are roots of areas in pixels. A cell looks at the middle of pixel ``stride`` × its index, as
    convolutions with half their kernel as padding do.
    """
    size, root = torch.tensor(sizes)[:, None], torch.tensor(ratios).sqrt()
    half = torch.stack([size * root, size / root], dim=-1).flatten(0, 1) / 2
    rows, columns = (torch.arange(n) * stride + 0.5 for n in cells)
    centres = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)[:, :, None]
    return torch.cat([centres - half, centres + half], dim=-1).flatten(0, 2)


def in_cells(boxes: Tensor, stride: int) -> Tensor:
    """Boxes in pixels of the picture → in cells of a map whose cells lie as ``anchors`` says."""
    return (boxes - 0.5) / stride + 0.5


def roi_align(features: Tensor, boxes: Tensor, size: int) -> Tensor:
    """What a map (C, h, w) shows in boxes, in its own cells: (n, C, size, size) (He et al., section 3).

    Each bin is the mean of ``SAMPLES`` × ``SAMPLES`` points, bilinear between cells; beyond the map is its
    border.
    """
    h, w = features.shape[-2:]
    rows, columns = _shares(boxes[:, 0], boxes[:, 2], size, h), _shares(boxes[:, 1], boxes[:, 3], size, w)
    of_rows = (rows.flatten(0, 1) @ features.transpose(0, 1).flatten(1)).unflatten(0, (len(boxes), size))
    bins = of_rows.unflatten(2, (-1, w)).flatten(1, 2) @ columns.transpose(1, 2)
    aligned: Tensor = bins.unflatten(1, (size, -1)).transpose(1, 2)
    return aligned


def _shares(first: Tensor, last: Tensor, bins: int, cells: int) -> Tensor:
    """Of each row (or column) of cells in each bin between two borders (n,): (n, bins, cells).

    What a bin shows is a sum over its rows' shares times its columns': bilinear weights are such products.
    """
    steps = (torch.arange(bins * SAMPLES, device=first.device) + 0.5) / (bins * SAMPLES)
    points = (first[:, None] + steps * (last - first)[:, None] - 0.5).clamp(0, cells - 1)
    near = 1 - (points[:, :, None] - torch.arange(cells, device=first.device)).abs()
    shares: Tensor = near.clamp(min=0).unflatten(1, (bins, SAMPLES)).mean(2)
    return shares


Place = tuple[slice, slice]


def paste(values: Tensor, box: Sequence[float], size: tuple[int, int]) -> tuple[Place, Tensor]:
    """Values (s, s) that fill a box → which rows and columns of a picture of this size it touches, and there
    the values (rows, columns): bilinear, fading to 0 at the box's border.
    """
    top, left, bottom, right = box
    rows, columns = (
        torch.arange(limit)[max(0, math.floor(first)) : max(0, math.ceil(last))]
        for first, last, limit in ((top, bottom, size[0]), (left, right, size[1]))
    )
    if not len(rows) or not len(columns):
        return (slice(0), slice(0)), values.new_zeros(0, 0)
    y = 2 * (rows + 0.5 - top) / (bottom - top) - 1
    x = 2 * (columns + 0.5 - left) / (right - left) - 1
    grid = torch.stack([x.expand(len(y), -1), y[:, None].expand(-1, len(x))], dim=-1)
    pasted = F.grid_sample(
        values[None, None], grid[None].to(values), "bilinear", "zeros", align_corners=False
    )
    return (_range(rows), _range(columns)), pasted[0, 0]


def _range(index: Tensor) -> slice:
    """Of consecutive numbers."""
    return slice(int(index[0]), int(index[-1]) + 1)
