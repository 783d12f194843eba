"""From HU on the series' grid to the networks' slices, and masks back: one piece of code for training
and inference (Goncharov et al., section 4.1).

The networks see canonical slices: columns run to the patient's left, rows to the back, slices to
the head, as an axial CT is read. Slices are 2 × 2 mm in plane; along z they stay where they are, each the
mean of 5 mm where they lie closer. A network sees each alone, as in the paper, or between a neighbour below
and one above (``context``).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from triage.domain import Mask, Vector, Volume

SPACING_MM = 2.0
HU_WINDOW = (-1000, 300)
MARGIN = 8
"""Pixels kept around the lungs' box before the network that finds lesions."""
CPU = torch.device("cpu")
NEIGHBOUR_MM = 6.0
"""Distance of the slices that a network with three inputs sees below and above: the usual thick slice."""
THICKNESS_MM = 5.0
"""About that of the training volumes."""
CHUNK = 32
"""Slices resampled at once: small enough for the cache, large enough for the vector units."""


@dataclass(frozen=True, slots=True)
class Grid:
    """What a network's slices are: mm a pixel in plane, the HU that become 0 and 1, and mm of thickness.

    With a ``size`` (h, w) every whole slice is resized to it, however many mm it shows, as in the papers that
    resize pictures. One that is not square is stretched: axial CT hardly ever is, and air beside it would be
    one more thing to undo on the way back.

    Where slices lie closer than ``thickness_mm``, each becomes the mean of so many mm around it: a network
    that learned from thick slices sees what it knows, and thin and thick series of one scan alike.
    """

    spacing_mm: float = SPACING_MM
    window: tuple[int, int] = HU_WINDOW
    thickness_mm: float = THICKNESS_MM
    size: tuple[int, int] | None = None

    @property
    def margin(self) -> int:
        """``MARGIN`` in pixels of this grid; all of a slice of fixed size."""
        return max(self.size) if self.size else round(MARGIN * SPACING_MM / self.spacing_mm)

    def slice_size(self, volume: Volume) -> tuple[int, int]:
        """(h, w) of a canonical slice of this volume; never empty."""
        down, across = _extent_mm(volume)
        pixel = self.spacing_mm
        return self.size or (max(1, round(down / pixel)), max(1, round(across / pixel)))

    def millimetres(self, volume: Volume) -> Vector:
        """(z, y, x) of a voxel of canonical slices of this volume."""
        if self.size is None:
            return volume.spacing[0], self.spacing_mm, self.spacing_mm
        down, across = _extent_mm(volume)
        return volume.spacing[0], down / self.size[0], across / self.size[1]


CANONICAL = Grid()


@dataclass(frozen=True, slots=True)
class Layout:
    """How an array's axes lie in the patient: which are reversed, whether rows and columns are swapped."""

    swapped: bool
    reversed_axes: tuple[int, ...]

    @classmethod
    def of(cls, orientation: tuple[float, ...]) -> Layout:
        """From ImageOrientationPatient, by the main direction of rows and columns (LPS)."""
        row, column = np.array(orientation[:3]), np.array(orientation[3:])
        swapped = bool(abs(row[0]) < abs(column[0]))
        across, back = (column, row) if swapped else (row, column)
        signs = (np.cross(row, column)[2], back[1], across[0])
        return cls(swapped, tuple(axis for axis, sign in enumerate(signs) if sign < 0))

    def canonical(self, array: NDArray[Any]) -> NDArray[Any]:
        """(z, y, x) as stored → (head, back, left); a view."""
        return np.flip(array.swapaxes(1, 2) if self.swapped else array, self.reversed_axes)

    def stored(self, array: NDArray[Any]) -> NDArray[Any]:
        """The inverse of ``canonical``; a view."""
        array = np.flip(array, self.reversed_axes)
        return array.swapaxes(1, 2) if self.swapped else array

    def stored_box(self, box: Box, shape: Sequence[int]) -> Box:
        """Where a box of a canonical array of this shape lies in the array as stored."""
        z, y, x = (
            slice(n - part.stop, n - part.start) if axis in self.reversed_axes else part
            for axis, (n, part) in enumerate(zip(shape, box, strict=True))
        )
        return (z, x, y) if self.swapped else (z, y, x)


def _extent_mm(volume: Volume) -> tuple[float, float]:
    """Height and width of a canonical slice."""
    _, y, x = (n * mm for n, mm in zip(volume.array.shape, volume.spacing, strict=True))
    return (x, y) if Layout.of(volume.orientation).swapped else (y, x)


def prepare(volume: Volume, grid: Grid = CANONICAL, device: torch.device = CPU) -> Tensor:
    """Volume in HU → canonical slices (z, h, w), float32 in [0, 1], 2 × 2 mm in plane or as the grid says.

    They are made, and lie, on the device.
    """
    array = Layout.of(volume.orientation).canonical(volume.array)
    size = grid.slice_size(volume)
    low, high = grid.window
    slices = torch.empty((len(array), *size), device=device)

    def fill(chunk: slice) -> None:
        part = np.clip(array[chunk], low, high)
        slices[chunk] = resample(torch.from_numpy(part).to(device).float(), size)

    _in_chunks(fill, len(array))
    return thicken(slices.sub_(low).div_(high - low), volume.spacing[0], grid.thickness_mm)


def _in_chunks(fill: Callable[[slice], None], count: int) -> None:
    """Each chunk of so many slices, a thread for each core."""

    def alone(start: int) -> None:
        with torch.inference_mode():  # which a thread does not inherit
            fill(slice(start, start + CHUNK))

    cores = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for _ in pool.map(alone, range(0, count, CHUNK)):
            pass


def thicken(slices: Tensor, spacing_mm: float, thickness_mm: float) -> Tensor:
    """Each slice (z, h, w) as the mean over so many mm around it; the last ones are repeated beyond the ends.

    Each slice stands for ``spacing_mm`` and counts as far as it lies in that slab.
    """
    reach = round(thickness_mm / spacing_mm) / 2
    if reach <= 0.5:
        return slices
    far = int(np.ceil(reach - 0.5))
    share = [max(0.0, min(k + 0.5, reach) - max(k - 0.5, -reach)) / (2 * reach) for k in range(-far, far + 1)]
    index = torch.arange(len(slices), device=slices.device)
    result = torch.zeros_like(slices)
    for k, weight in zip(range(-far, far + 1), share, strict=True):
        result.add_(slices[(index + k).clamp(0, len(slices) - 1)], alpha=weight)
    return result


def resample(slices: Tensor, size: tuple[int, int]) -> Tensor:
    """(n, y, x) → (n, *size), bilinear, averaging where it shrinks."""
    shrinks = size[0] < slices.shape[1] or size[1] < slices.shape[2]
    return F.interpolate(slices[:, None], size, mode="bilinear", antialias=shrinks)[:, 0]


def restore(values: Tensor, threshold: float, volume: Volume) -> Mask:
    """Canonical values (z, h, w) on any grid → mask of those above the threshold on the volume's own grid."""
    layout = Layout.of(volume.orientation)
    mask = np.empty(volume.array.shape, dtype=bool)
    canonical = layout.canonical(mask)

    def fill(chunk: slice) -> None:
        above = resample(values[chunk].float(), canonical.shape[1:]) > threshold
        canonical[chunk] = above.cpu().numpy()

    _in_chunks(fill, len(canonical))
    return mask


def spread(values: Tensor, volume: Volume) -> NDArray[np.float32]:
    """Canonical values (z, h, w) on any grid → the same on the volume's own grid."""
    result = np.empty(volume.array.shape, dtype=np.float32)
    canonical = Layout.of(volume.orientation).canonical(result)
    for start in range(0, len(canonical), CHUNK):
        part = values[start : start + CHUNK].float()
        canonical[start : start + CHUNK] = resample(part, canonical.shape[1:]).cpu().numpy()
    return result


def stored_order(values: NDArray[Any], volume: Volume) -> NDArray[Any]:
    """Values of canonical slices, (z,) or (z, …) → the same in the order of the volume's slices."""
    return values[::-1] if 0 in Layout.of(volume.orientation).reversed_axes else values


def shrink(mask: Mask, volume: Volume, grid: Grid = CANONICAL, device: torch.device = CPU) -> Mask:
    """A mask on the volume's own grid → canonical slices: the share of a pixel's area counts."""
    canonical, size = Layout.of(volume.orientation).canonical(mask), grid.slice_size(volume)
    answer = np.empty((len(canonical), *size), dtype=bool)

    def fill(chunk: slice) -> None:
        part = torch.from_numpy(np.ascontiguousarray(canonical[chunk])).to(device).float()
        answer[chunk] = (resample(part, size) > 0.5).cpu().numpy()

    _in_chunks(fill, len(canonical))
    return answer


def neighbour_step(spacing_mm: float) -> int:
    """How many slices away a slice's neighbours lie, as seen by networks with three inputs."""
    return max(1, round(NEIGHBOUR_MM / spacing_mm))


def context(slices: Tensor, index: Tensor, step: int, inputs: int) -> Tensor:
    """Some of the slices (z, h, w) as a network's input (n, inputs, h, w): with three, each between the slice
    ``step`` below it and the one above; at the ends the last slice is repeated.
    """
    if inputs == 1:
        return slices[index][:, None]
    around = torch.stack([index - step, index, index + step], dim=1).clamp(0, len(slices) - 1)
    return slices[around]


def pad(slices: Tensor, stride: int) -> Tensor:
    """Air below and to the right of (…, h, w) until both are multiples of the networks' stride."""
    h, w = slices.shape[-2:]
    return F.pad(slices, (0, -w % stride, 0, -h % stride))


Box = tuple[slice, slice, slice]


def bounding_box(mask: NDArray[np.bool_], margin: int = 0) -> Box:
    """Smallest box around a mask that is not empty, grown by ``margin`` pixels in plane."""
    z, y, x = (np.flatnonzero(mask.any(axis=axes)) for axes in ((1, 2), (0, 2), (0, 1)))
    return (
        slice(int(z[0]), int(z[-1]) + 1),
        slice(max(0, int(y[0]) - margin), min(mask.shape[1], int(y[-1]) + 1 + margin)),
        slice(max(0, int(x[0]) - margin), min(mask.shape[2], int(x[-1]) + 1 + margin)),
    )
