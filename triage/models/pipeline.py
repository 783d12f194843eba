"""The way of every slice-wise system (Goncharov et al., figure 3): lungs, crop, lesions, masks.

Systems differ in one function, from slices to lesion probability.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from triage.config import Analysis
from triage.domain import Findings, Mask, ModelInfo, Vector, Volume
from triage.errors import Rejected
from triage.models import lungs, weights
from triage.models.compute import Compute
from triage.models.networks import LungsNet
from triage.models.packages import Package
from triage.models.preprocessing import (
    CANONICAL,
    SPACING_MM,
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

BATCH = 16
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


class Pipeline:
    """Judges volumes with a network for the lungs and a function for the lesions in them.

    The answer is a score from the affected fraction.
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
    ) -> None:
        self.info, self.compute = info, running
        self.find_lungs, self.find_lesions = find_lungs, find_lesions
        self.lesion_threshold = lesion_threshold
        self.grid, self.lungs_grid = grid, lungs_grid
        """What ``find_lesions`` and ``find_lungs`` see."""

    @property
    def settings(self) -> Mapping[str, str | float]:
        """Lesion threshold, precision and kind of device."""
        return {
            "lesion_threshold": self.lesion_threshold,
            "precision": self.compute.precision,
            "device": self.compute.device.type,
        }

    def predict(self, volume: Volume) -> Findings:
        """See ``triage.models.Model``. The lesion mask lies within the lung mask."""
        with self.compute.running():
            slices = prepare(volume, self.lungs_grid)
            lung, lung_mask = self._lungs(slices, volume)
            if self.grid != self.lungs_grid:
                slices, lung = prepare(volume, self.grid), shrink(lung_mask, volume, self.grid)
            probability = self._lesions(slices, lung, volume)
            lesion_mask = restore(probability, self.lesion_threshold, volume)
            lesion_mask &= lung_mask
            concluded = self.conclusions(lung_mask, lesion_mask, lung, probability, volume)
        return Findings(
            probability_kind="score",
            calibrated=self.info.calibrated,
            lung_mask=lung_mask,
            lesion_mask=lesion_mask,
            **concluded,
        )

    def conclusions(
        self,
        lung_mask: Mask,
        lesion_mask: Mask,
        lung: Mask,  # noqa: ARG002 - for systems that conclude more
        probability: Tensor,  # noqa: ARG002
        volume: Volume,  # noqa: ARG002
    ) -> dict[str, Any]:
        """What follows from the masks of the volume, and from where in the slices (z, h, w) what was found.

        By the name of a field of Findings.
        """
        return {"probability": score(float(lesion_mask.sum() / max(1, lung_mask.sum())))}

    def lesion_map(self, volume: Volume, lung_mask: Mask) -> NDArray[np.float32]:
        """See ``triage.models.Model``."""
        with self.compute.running():
            slices = prepare(volume, self.grid)
            return spread(self._lesions(slices, shrink(lung_mask, volume, self.grid), volume), volume)

    def _lungs(self, slices: Tensor, volume: Volume) -> tuple[Mask, Mask]:
        """Of these slices and of the volume."""
        z, y, x = self.lungs_grid.millimetres(volume)
        probability = self.find_lungs(slices, z, (y * x) ** 0.5)
        return (probability > 0.5).numpy(), restore(probability, 0.5, volume)

    def _lesions(self, slices: Tensor, lung: Mask, volume: Volume) -> Tensor:
        """Lesion probability (z, h, w), 0 outside the lungs' box. Raises Rejected where no lungs are."""
        if not lung.any():
            raise Rejected("no lungs found")
        box = bounding_box(lung, self.grid.margin)
        probability = torch.zeros_like(slices)
        probability[box] = self.find_lesions(slices[box], lung[box], self.grid.millimetres(volume))
        return probability


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
    network = network.to(running.device)
    return plausible_lungs(slice_by_slice(network, network.stride, running, inputs=network.inputs))


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
    Raises Retryable where it gives no numbers: they are looked at before ``activation``, which is given
    a batch of values as float32 and may choose a channel of several.
    """

    def batches(slices: Tensor, step: int) -> Iterator[Tensor]:
        for start in range(0, len(slices), BATCH):
            index = torch.arange(start, min(start + BATCH, len(slices)))
            padded = pad(context(slices, index, step, inputs), stride).to(running.device)
            yield padded.contiguous(memory_format=torch.channels_last)

    def probability(slices: Tensor, spacing_mm: float) -> Tensor:
        _, h, w = slices.shape

        def kept(values: Tensor) -> Tensor:
            return activation(values[:, :, :h, :w].float())[:, 0].contiguous().cpu()

        return torch.cat(running.map(network, batches(slices, neighbour_step(spacing_mm)), kept))

    return probability


def score(fraction: float) -> float:
    """Affected fraction of both lungs → [0, 1): 0 without lesion, 0.5 at ``EVEN_FRACTION``, rising."""
    return fraction / (fraction + EVEN_FRACTION)
