"""The ResNet-50 baseline (Goncharov et al., sections 2.2 and 4.4): one probability a volume, no lesions.

A feature vector of each slice, maxima over the slices, one answer. The text takes the maximum over all
slices; the authors' code a pyramid of 8, 4, 2 and 1 stretches of slices, as here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from monai.networks.nets import ResNet
from torch import Tensor, nn
from torch.nn import functional as F

from triage.config import Analysis
from triage.domain import Findings, Mask, ModelInfo, Volume
from triage.errors import Rejected
from triage.models import compute, weights
from triage.models.compute import Compute
from triage.models.encoders import RESNET_WIDTHS, resnet
from triage.models.packages import Package
from triage.models.pipeline import BATCH, FindLungs, lungs_network
from triage.models.preprocessing import MARGIN, bounding_box, prepare, restore

PAPER_WIDTHS = RESNET_WIDTHS
PAPER_HIDDEN = 1024
LAYERS = (3, 4, 6, 3)
"""Bottleneck blocks of the four stages (He et al., 2016a, table 1)."""
EXPANSION = 4
"""A bottleneck block gives this many times its width."""
STRETCHES = (8, 4, 2, 1)


def slice_features(widths: Sequence[int] = PAPER_WIDTHS) -> ResNet:
    """ResNet-50 without its last layer: slices (N, 1, H, W) → features (N, EXPANSION × widths[-1])."""
    return resnet("bottleneck", LAYERS, widths, 1, feed_forward=False)


class SliceClassifier(nn.Module):
    """ResNet-50 on slices of one channel, then one logit for all of them together."""

    def __init__(self, widths: Sequence[int] = PAPER_WIDTHS, hidden: int = PAPER_HIDDEN) -> None:
        super().__init__()
        self.features = slice_features(widths)
        self.classifier = nn.Sequential(
            nn.Dropout(),
            nn.Linear(sum(STRETCHES) * EXPANSION * widths[-1], hidden),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(hidden, 1),
        )

    def forward(self, slices: Tensor) -> Tensor:
        """Slices of one volume in order (Z, 1, H, W) → its logit ()."""
        return self.classify(self.features(slices))

    def classify(self, features: Tensor) -> Tensor:
        """Features of one volume's slices in order (Z, C) → its logit ()."""
        levels = [F.adaptive_max_pool1d(features.T[None], bins).flatten() for bins in STRETCHES]
        logit: Tensor = self.classifier(torch.cat(levels)).squeeze()
        return logit


class Classifier:
    """Judges volumes with a network for the lungs and one that classifies what lies in their box."""

    def __init__(
        self, info: ModelInfo, running: Compute, find_lungs: FindLungs, network: SliceClassifier
    ) -> None:
        self.info, self.compute = info, running
        self.find_lungs, self.network = find_lungs, network

    @property
    def settings(self) -> Mapping[str, str | float]:
        """Precision, kind of device and engine."""
        return {**self.compute.settings}

    def predict(self, volume: Volume) -> Findings:
        """See ``triage.models.Model``. No lesion mask: the affected fraction is unknown."""
        with self.compute.running():
            slices = prepare(volume, device=self.compute.device)
            lung = self.find_lungs(slices, volume.spacing[0])
            if not (lung > 0.5).any():
                raise Rejected("no lungs found")
            lung_mask = restore(lung, 0.5, volume)
            probability = self._probability(slices[bounding_box((lung > 0.5).cpu().numpy(), MARGIN)])
        return Findings(probability, "classifier", self.info.calibrated, lung_mask, None)

    def lesion_map(self, volume: Volume, lung_mask: Mask | None) -> None:  # noqa: ARG002 - the contract's
        """See ``triage.models.Model``."""
        return

    def _probability(self, slices: Tensor) -> float:
        features = torch.cat(self.compute.map(self.network.features, self._batches(slices)))
        (logit,) = self.compute.map(self.network.classify, [features.float()])
        return float(logit.float().sigmoid())

    def _batches(self, slices: Tensor) -> Iterator[Tensor]:
        for start in range(0, len(slices), BATCH):
            batch = slices[start : start + BATCH, None].to(self.compute.device)
            yield batch.contiguous(memory_format=torch.channels_last)


def load(package: Package, analysis: Analysis) -> Classifier:
    """From the files ``lungs`` and ``resnet50`` of a package. Raises ConfigError."""
    running = compute.choose(analysis)
    network, _ = weights.read(package.file("resnet50"), SliceClassifier)
    find_lungs = lungs_network(package.file("lungs"), running)
    return Classifier(package.info, running, find_lungs, network.to(running.device))
