"""Self-supervised Inf-Net (Fung et al.): where lesions are, which are ground glass, which consolidation.

Slices are the canonical ones, 2 mm a pixel, cut to the box of the lungs and then, as in the paper, stretched
to a square. Single Inf-Net says where lesions are. Multi Inf-Net, which sees what the first found, only says
of which kind they are: nothing becomes a lesion by it, and nothing ceases to be one.

The authors of Inf-Net stretch each map from its lowest to its highest value before they look at it. Here
nothing is stretched: that would find a lesion in every slice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from triage.config import Analysis
from triage.domain import LesionClass, Mask, ModelInfo, Vector, Volume
from triage.models import compute, weights
from triage.models.compute import Compute
from triage.models.infnet_networks import CLASSES, InfNet
from triage.models.packages import Package
from triage.models.pipeline import (
    BATCH,
    Conclusion,
    FindLungs,
    Found,
    Pipeline,
    from_fraction,
    lungs_network,
)
from triage.models.preprocessing import bounding_box, resample, restore, spread


def squared(layers: Tensor, side: int) -> Tensor:
    """Layers (n, c, h, w) at side × side, as the networks see them."""
    return resample(layers.flatten(0, 1), (side, side)).view(*layers.shape[:2], side, side)


def consolidated(logits: Tensor) -> Tensor:
    """Multi Inf-Net's logits (n, 3, h, w) → of what is lesion, the share of consolidation (n, 1, h, w)."""
    ground_glass, consolidation = CLASSES.index("ground_glass"), CLASSES.index("consolidation")
    return (logits[:, 1 + consolidation] - logits[:, 1 + ground_glass])[:, None].sigmoid()


class SelfSupervised(Pipeline):
    """Judges volumes slice by slice, and tells the two kinds of lesion apart."""

    def __init__(
        self,
        info: ModelInfo,
        running: Compute,
        find_lungs: FindLungs,
        network: InfNet,
        lesion_threshold: float,
    ) -> None:
        super().__init__(info, running, find_lungs, self._find, lesion_threshold, conclude=self._with_classes)
        self.network = network

    def class_maps(self, volume: Volume, lung_mask: Mask | None) -> Mapping[LesionClass, NDArray[np.float32]]:
        """Probability of each kind; together they are ``lesion_map``. For evaluation.

        As there, a picture comes without a lung mask.
        """
        with self.compute.running():
            slices = self._slices(volume)
            everywhere = np.ones(slices.shape, dtype=bool)
            lung = everywhere if lung_mask is None else self._shrunk(lung_mask, volume)
            lesions = self._lesions(slices, lung, volume)
            share = self._consolidation(slices, lung, lesions)
        whole, dense = spread(lesions, volume), spread(share, volume)
        return {"ground_glass": whole * (1 - dense), "consolidation": whole * dense}

    def _find(self, slices: Tensor, _lung: Mask, _spacing: Vector) -> Tensor:
        single = self.network.single
        return self._judge(lambda batch: single(batch).lesions, slices[:, None], torch.sigmoid)

    def _with_classes(self, found: Found) -> Conclusion:
        """Score from the affected fraction (see ``pipeline.score``), and each lesion's kind."""
        share = self._consolidation(found.slices, found.lung, found.probability)
        consolidation = restore(share, 0.5, found.volume) & found.lesion_mask
        classes: dict[LesionClass, Mask] = {
            "ground_glass": found.lesion_mask & ~consolidation,
            "consolidation": consolidation,
        }
        return Conclusion(from_fraction(found).probability, lesion_classes=classes)

    def _consolidation(self, slices: Tensor, lung: Mask, lesions: Tensor) -> Tensor:
        """Of what is lesion in canonical slices, the share of consolidation (z, h, w)."""
        share, box = torch.zeros_like(slices), bounding_box(lung, self.grid.margin)
        seen = torch.stack([slices[box], lesions[box]], dim=1)
        share[box] = self._judge(self.network.multi, seen, consolidated)
        return share

    def _judge(
        self,
        network: Callable[[Tensor], Tensor],
        layers: Tensor,
        activation: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Layers (z, c, h, w) → one value a pixel (z, h, w), by a network that sees squares."""
        size = (layers.shape[2], layers.shape[3])

        def kept(values: Tensor) -> Tensor:
            return resample(activation(values.float())[:, 0], size).to(layers.device)

        return torch.cat(self.compute.map(network, self._batches(layers), kept))

    def _batches(self, layers: Tensor) -> Iterator[Tensor]:
        for batch in layers.split(BATCH):
            seen = squared(batch, self.network.size).to(self.compute.device)
            yield seen.contiguous(memory_format=torch.channels_last)


def load(package: Package, analysis: Analysis) -> SelfSupervised:
    """From the files ``infnet`` and ``lungs`` of a package; the lungs may be those of another system.

    Raises ConfigError.
    """
    running = compute.choose(analysis)
    network, _ = weights.read(package.file("infnet"), InfNet)
    find_lungs = lungs_network(package.file("lungs"), running)
    threshold = package.lesion_threshold(analysis)
    return SelfSupervised(package.info, running, find_lungs, network.to(running.device), threshold)
