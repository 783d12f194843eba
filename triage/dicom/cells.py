"""Masks on coarse cubic cells, where surfaces are smooth: what the 3D view and the mesh are made of."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from triage.domain import Mask

Cells = NDArray[np.float32]

MARGIN = 5
"""Empty cells around the box, so that every surface is closed, also where the scan cuts a lung."""


def box(mask: Mask) -> tuple[slice, ...]:
    """The smallest box that holds the mask. Raises ValueError when it is empty."""
    spans = []
    for axis in range(mask.ndim):
        rest = tuple(other for other in range(mask.ndim) if other != axis)
        filled = np.flatnonzero(mask.any(axis=rest))
        if not filled.size:
            raise ValueError("no lungs to draw")
        spans.append(slice(int(filled[0]), int(filled[-1]) + 1))
    return tuple(spans)


def shares(mask: Mask, spacing: Sequence[float], cell_mm: float) -> Cells:
    """Share of each cubic cell that is filled, in [0, 1]; the cells' middle is the mask's.

    A share keeps what voting would lose: a lesion thinner than a cell, and the mask's volume.
    """
    slices, rows, columns = (
        _overlaps(size, mm, cell_mm) for size, mm in zip(mask.shape, spacing, strict=True)
    )
    planes = np.stack([(columns @ (rows @ plane.astype(np.float32)).T).T for plane in mask])
    cells: Cells = slices @ planes.reshape(len(mask), -1)
    return cells.reshape(-1, *planes.shape[1:])


def _overlaps(size: int, mm: float, cell_mm: float) -> csr_array:
    """(cells, size): how much of each cell each of ``size`` voxels of ``mm`` covers along one axis."""
    count = int(np.ceil(size * mm / cell_mm)) + 2 * MARGIN
    cell = (np.arange(count + 1) - count / 2) * cell_mm
    voxel = (np.arange(size + 1) - size / 2) * mm
    upper = np.minimum(cell[1:, None], voxel[None, 1:])
    lower = np.maximum(cell[:-1, None], voxel[None, :-1])
    return csr_array((np.clip(upper - lower, 0, None) / cell_mm).astype(np.float32))
