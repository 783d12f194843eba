"""The way of every slice-wise system (Goncharov et al., figure 3): lungs, crop, lesions, masks.

Systems differ in one function, from slices to lesion probability.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from triage.config import Analysis
from triage.domain import Findings, GradeBasis, LesionClass, Mask, ModelInfo, Vector, Volume
from triage.errors import Rejected
from triage.models import engine, lungs, weights
from triage.models.compute import Compute
from triage.models.networks import LungsNet
from triage.models.packages import Package
from triage.models.preprocessing import (
    CANONICAL,
    SPACING_MM,
    Box,
    Grid,
    bounding_box,
    context,
    neighbour_step,
    pad,
    prepare,
    restore,
    shrink,
    spread,
)

BATCH = engine.RECORDED
"""Slices a forward pass: more gains nothing on two cores and costs memory."""
EVEN_FRACTION = 0.03
"""Affected fraction that scores 0.5: well above what vessels and dependent lung are mistaken for."""

Slicewise = Callable[[Tensor, float], Tensor]
"""Slices (z, h, w) in [0, 1] and their distance in mm → probability (z, h, w)."""


class FindLungs(Protocol):
    def __call__(self, slices: Tensor, spacing_mm: float, pixel_mm: float = SPACING_MM, /) -> Tensor:
        """Slices (z, h, w), their distance, and mm a pixel → probability of what can be lungs (z, h, w)."""
        ...


Lesions = Callable[[Tensor, Mask, Vector], Tensor]
"""Slices cut to the lungs' box, where in them lung is, and mm a voxel → lesion probability (z, h, w)."""


@dataclass(frozen=True, slots=True)
class Found:
    """What was found, on the volume's own grid and in the slices (z, h, w) searched for lesions."""

    volume: Volume
    lung_mask: Mask
    lesion_mask: Mask
    slices: Tensor
    lung: Mask
    probability: Tensor
    """Of lesion, in the slices."""


@dataclass(frozen=True, slots=True)
class Conclusion:
    """What follows from it: the fields of Findings of these names."""

    probability: float
    grade_from: GradeBasis = "affected_fraction"
    slice_scores: NDArray[np.float32] | None = None
    lesion_classes: Mapping[LesionClass, Mask] = field(default_factory=dict)


Conclude = Callable[[Found], Conclusion]


def from_fraction(found: Found) -> Conclusion:
    """A score from the affected fraction of both lungs."""
    lesion, lung = (int(np.count_nonzero(mask)) for mask in (found.lesion_mask, found.lung_mask))
    return Conclusion(score(lesion / max(1, lung)))


class Pipeline:
    """Judges volumes with a network for the lungs and a function for the lesions in them.

    ``conclude`` gives the answer, a score; ``parameters`` are what else changes it.
    """

    def __init__(
        self,
        info: ModelInfo,
        running: Compute,
        find_lungs: FindLungs,
        find_lesions: Lesions,
        lesion_threshold: float,
        grid: Grid = CANONICAL,
        lungs_grid: Grid = CANONICAL,
        conclude: Conclude = from_fraction,
        parameters: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        self.info, self.compute = info, running
        self.find_lungs, self.find_lesions = find_lungs, find_lesions
        self.lesion_threshold = lesion_threshold
        self.grid, self.lungs_grid = grid, lungs_grid
        """What ``find_lesions`` and ``find_lungs`` see."""
        self.conclude, self.parameters = conclude, parameters

    @property
    def settings(self) -> Mapping[str, str | float]:
        """Lesion threshold, precision, kind of device, engine, and the system's own parameters."""
        return {
            "lesion_threshold": self.lesion_threshold,
            **self.compute.settings,
            **self.parameters,
        }

    def predict(self, volume: Volume) -> Findings:
        """See ``triage.models.Model``. The lesion mask lies within the lung mask."""
        with self.compute.running():
            slices = prepare(volume, self.lungs_grid, self.compute.device)
            lung, lung_mask = self._lungs(slices, volume)
            if self.grid != self.lungs_grid:
                slices, lung = self._slices(volume), self._shrunk(lung_mask, volume)
            probability = self._lesions(slices, lung, volume)
            lesion_mask = restore(probability, self.lesion_threshold, volume)
            lesion_mask &= lung_mask
            concluded = self.conclude(Found(volume, lung_mask, lesion_mask, slices, lung, probability))
        return Findings(
            concluded.probability,
            "score",
            self.info.calibrated,
            lung_mask,
            lesion_mask,
            grade_from=concluded.grade_from,
            slice_scores=concluded.slice_scores,
            lesion_classes=concluded.lesion_classes,
        )

    def lesion_map(self, volume: Volume, lung_mask: Mask | None) -> NDArray[np.float32]:
        """See ``triage.models.Model``."""
        with self.compute.running():
            slices = self._slices(volume)
            everywhere = np.ones(slices.shape, dtype=bool)
            lung = everywhere if lung_mask is None else self._shrunk(lung_mask, volume)
            return spread(self._lesions(slices, lung, volume), volume)

    def _slices(self, volume: Volume) -> Tensor:
        return prepare(volume, self.grid, self.compute.device)

    def _shrunk(self, lung_mask: Mask, volume: Volume) -> Mask:
        return shrink(lung_mask, volume, self.grid, self.compute.device)

    def _lungs(self, slices: Tensor, volume: Volume) -> tuple[Mask, Mask]:
        """Of these slices and of the volume."""
        z, y, x = self.lungs_grid.millimetres(volume)
        probability = self.find_lungs(slices, z, (y * x) ** 0.5)
        return (probability > 0.5).cpu().numpy(), restore(probability, 0.5, volume)

    def _lesions(self, slices: Tensor, lung: Mask, volume: Volume) -> Tensor:
        """Lesion probability (z, h, w), 0 outside the lungs' box. Raises Rejected where no lungs are."""
        if not lung.any():
            raise Rejected("no lungs found")
        box = bounding_box(lung, self.grid.margin)
        probability = torch.zeros_like(slices)
        probability[box] = self.find_lesions(slices[box], lung[box], self.grid.millimetres(volume))
        return probability


class InLungs(Pipeline):
    """The way of networks that know slices without what surrounds the lungs."""

    def lesion_map(self, volume: Volume, lung_mask: Mask | None) -> NDArray[np.float32]:
        """See ``triage.models.Model``. In a picture the lungs are found first.

        Raises Rejected where it shows none.
        """
        if lung_mask is None:
            with self.compute.running():
                _, lung_mask = self._lungs(self._slices(volume), volume)
        return super().lesion_map(volume, lung_mask)

    def _prepared(self, volume: Volume) -> tuple[Tensor, Mask, Mask, Box]:
        """Canonical slices and where lung is in them (z, h, w), the lung mask as stored, the box to look at.

        Raises Rejected where there is no lung.
        """
        slices = self._slices(volume)
        lung, lung_mask = self._lungs(slices, volume)
        if not lung.any():
            raise Rejected("no lungs found")
        return slices, lung, lung_mask, bounding_box(lung, self.grid.margin)


def assemble(
    package: Package, analysis: Analysis, running: Compute, find_lesions: Lesions, grid: Grid = CANONICAL
) -> Pipeline:
    """The pipeline of a package: its lungs network, its threshold, and this way to find lesions.

    Raises ConfigError.
    """
    find_lungs = lungs_network(package.file("lungs"), running)
    threshold = package.lesion_threshold(analysis)
    return Pipeline(package.info, running, find_lungs, find_lesions, threshold, grid)


def in_each_slice(find: Slicewise) -> Lesions:
    """Lesions from the slices alone: where in them lung is does not matter."""
    return lambda slices, _, spacing: find(slices, spacing[0])


def lungs_network(path: Path, running: Compute) -> FindLungs:
    """Canonical slices → lung probability, only what can be lungs, from weights in a file."""
    network, _ = weights.read(path, LungsNet)
    ready = running.ready(network, network.inputs)
    return plausible_lungs(slice_by_slice(ready, network.stride, running, inputs=network.inputs))


def plausible_lungs(found: Slicewise) -> FindLungs:
    """Only what can be lungs of what a network finds."""

    def find(slices: Tensor, spacing_mm: float, pixel_mm: float = SPACING_MM, /) -> Tensor:
        return lungs.plausible(found(slices, spacing_mm), spacing_mm, pixel_mm)

    return find


def slice_by_slice(
    network: Callable[[Tensor], Tensor],
    stride: int,
    running: Compute,
    activation: Callable[[Tensor], Tensor] = torch.sigmoid,
    inputs: int = 1,
) -> Slicewise:
    """A network of slices (n, inputs, H, W) → values (n, 1, H, W), for any number and size of slices.

    With one input it sees the slice alone, with three the slice between its neighbours (see ``context``).
    The answer lies where the slices do. Raises Retryable where it gives no numbers: they are looked at before
    ``activation``, which is given a batch of values as float32 and may choose a channel of several.
    """

    def batches(slices: Tensor, step: int) -> Iterator[Tensor]:
        for start in range(0, len(slices), BATCH):
            index = torch.arange(start, min(start + BATCH, len(slices)), device=slices.device)
            padded = pad(context(slices, index, step, inputs), stride).to(running.device)
            yield padded.contiguous(memory_format=torch.channels_last)

    def probability(slices: Tensor, spacing_mm: float) -> Tensor:
        _, h, w = slices.shape

        def kept(values: Tensor) -> Tensor:
            return activation(values[:, :, :h, :w].float())[:, 0].contiguous().to(slices.device)

        return torch.cat(running.map(network, batches(slices, neighbour_step(spacing_mm)), kept))

    return probability


def score(fraction: float) -> float:
    """Affected fraction of both lungs → [0, 1): 0 without lesion, 0.5 at ``EVEN_FRACTION``, rising."""
    return fraction / (fraction + EVEN_FRACTION)
