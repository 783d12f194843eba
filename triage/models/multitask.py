"""The multitask system (Goncharov et al., figure 3): lungs network, crop, two-headed network.

The answer is a score from the affected fraction. The classification head is trained with the rest,
as in the paper, but not asked: without healthy patients to learn from it calls clear lungs of an
unknown scanner positive (the card has the figures).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from triage.config import Analysis
from triage.domain import Findings, Mask, ModelInfo, Volume
from triage.errors import Rejected
from triage.models import compute, lungs, weights
from triage.models.networks import LungsNet, MultitaskNet
from triage.models.preprocessing import MARGIN, bounding_box, pad, prepare, restore, shrink, spread

BATCH = 16
"""Slices a forward pass: more gains nothing on two cores and costs memory."""
EVEN_FRACTION = 0.03
"""Affected fraction that scores 0.5: well above what vessels and dependent lung are mistaken for."""


class Multitask:
    """Judges volumes with the lungs network and the multitask network."""

    def __init__(self, info: ModelInfo, lungs_path: Path, multitask_path: Path, analysis: Analysis) -> None:
        self.info = info
        self.compute = compute.choose(analysis)
        lungs_net, _ = weights.read(lungs_path, LungsNet)
        multitask_net, recipe = weights.read(multitask_path, MultitaskNet)
        self.lungs_net = lungs_net.to(self.compute.device)
        self.multitask_net = multitask_net.to(self.compute.device)
        self.lesion_threshold = analysis.lesion_threshold or float(recipe["lesion_threshold"])

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
            slices = prepare(volume)
            probability = self._lungs(slices)
            lung_mask = restore(probability, 0.5, volume)
            lesion = self._lesions(slices, (probability > 0.5).numpy())
            lesion_mask = restore(lesion, self.lesion_threshold, volume) & lung_mask
        fraction = float(lesion_mask.sum() / max(1, lung_mask.sum()))
        return Findings(score(fraction), "score", self.info.calibrated, lung_mask, lesion_mask)

    def lesion_map(self, volume: Volume, lung_mask: Mask) -> NDArray[np.float32]:
        """See ``triage.models.Model``."""
        with self.compute.running():
            slices = prepare(volume)
            return spread(self._lesions(slices, shrink(lung_mask, volume)), volume)

    def _lungs(self, slices: Tensor) -> Tensor:
        """Canonical slices → lung probability at 2 mm, (z, h, w). Raises Rejected where no lungs are."""
        logits = self.compute.map(self.lungs_net, self._batches(slices, self.lungs_net.stride))
        probability = torch.cat(logits)[:, 0, : slices.shape[1], : slices.shape[2]].float().sigmoid().cpu()
        if not (probability > 0.5).any():
            raise Rejected("no lungs found")
        return lungs.plausible(probability)

    def _lesions(self, slices: Tensor, lung: Mask) -> Tensor:
        """Lesion probability at 2 mm, (z, h, w), 0 outside the lungs' box."""
        box = bounding_box(lung, MARGIN)
        cropped = slices[box]
        _, h, w = cropped.shape
        batches = self._batches(cropped, self.multitask_net.stride)
        logits = self.compute.map(lambda batch: self.multitask_net(batch)[0], batches)
        probability = torch.zeros_like(slices)
        probability[box] = torch.cat(logits)[:, 0, :h, :w].float().sigmoid().cpu()
        return probability

    def _batches(self, slices: Tensor, stride: int) -> Iterator[Tensor]:
        """(z, h, w) → (n, 1, H, W) on the device, padded to the network's stride."""
        for start in range(0, len(slices), BATCH):
            padded = pad(slices[start : start + BATCH], stride)[:, None].to(self.compute.device)
            yield padded.contiguous(memory_format=torch.channels_last)


def score(fraction: float) -> float:
    """Affected fraction of both lungs → [0, 1): 0 without lesion, 0.5 at ``EVEN_FRACTION``, rising."""
    return fraction / (fraction + EVEN_FRACTION)
