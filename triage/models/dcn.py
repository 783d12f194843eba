"""The dual-branch system (Gao et al., figure 1A): lungs, then lesions and one answer in each slice, then one
answer from all of them, and maps of where the network looked.

Slices are the canonical ones, not the paper's 512 × 512: 2 mm a pixel, cut to the box of the lungs. Like the
paper's they show −900 to 100 HU in 8 bits, and nothing but the lungs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from triage.config import Analysis
from triage.domain import Findings, Mask, ModelInfo, Vector, Volume, judged_slices
from triage.models import compute, weights
from triage.models.compute import Compute
from triage.models.dcn_networks import DualBranchNet, StudyNet
from triage.models.packages import Package
from triage.models.pipeline import BATCH, FindLungs, InLungs, lungs_network
from triage.models.preprocessing import (
    CHUNK,
    HU_WINDOW,
    Box,
    pad,
    resample,
    restore,
    stored_order,
)

WINDOW = (-900, 100)
"""HU of black and of white (section 3.1.2)."""


def masked(slices: Tensor, lung: Tensor) -> Tensor:
    """Canonical slices and where in them lung is, one shape → what the network sees, in [0, 1]."""
    (low, high), (black, white) = HU_WINDOW, WINDOW
    hu = slices * (high - low) + low
    return ((hu - black) / (white - black) * 255).clamp(0, 255).round() / 255 * lung


@dataclass(frozen=True, slots=True)
class Looked:
    """What the slice network says of slices (z, h, w); n of them show lung."""

    index: Tensor
    """Those n, ascending."""
    lesions: Tensor
    """Probability (z, h, w), 0 in slices without lung."""
    positive: Tensor
    """Probability of a positive slice (n,)."""
    judged: Tensor
    """Whether a slice shows more than a tip of the lungs (n,): the study is judged by these."""
    attention: tuple[Tensor, ...]
    """Maps in [0, 1], as coarse as they were made; none of a network without attention."""
    features: Tensor
    """(n, C)."""


class DualBranch(InLungs):
    """Judges volumes slice by slice, and the study by the curve of its slices' probabilities."""

    def __init__(
        self,
        info: ModelInfo,
        running: Compute,
        find_lungs: FindLungs,
        networks: tuple[DualBranchNet, StudyNet],
        lesion_threshold: float,
    ) -> None:
        super().__init__(info, running, find_lungs, self._find, lesion_threshold)
        self.network, self.study = networks

    def predict(self, volume: Volume) -> Findings:
        """See ``triage.models.Model``. The probability is the study network's own output."""
        with self.compute.running():
            slices, lung, lung_mask, box = self._prepared(volume)
            looked = self._look(slices[box], lung[box])
            probability = self._study(looked)
            lesions = torch.zeros_like(slices)
            lesions[box] = looked.lesions
            lesion_mask = restore(lesions, self.lesion_threshold, volume) & lung_mask
            scores, attention = self._scores(looked, box, slices), self._attention(looked, box, slices)
        return Findings(
            probability,
            "classifier",
            self.info.calibrated,
            lung_mask,
            lesion_mask,
            slice_scores=stored_order(scores, volume),
            attention={name: stored_order(maps, volume) for name, maps in attention.items()},
        )

    def _study(self, looked: Looked) -> float:
        features = looked.features[looked.judged]
        (logit,) = self.compute.map(lambda p: self.study(p, features), [looked.positive[looked.judged]])
        return float(logit.float().sigmoid())

    def _find(self, slices: Tensor, lung: Mask, _spacing: Vector) -> Tensor:
        return self._look(slices, lung).lesions

    def _look(self, slices: Tensor, lung: Mask) -> Looked:
        index = torch.from_numpy(np.flatnonzero(lung.any(axis=(1, 2))))
        seen = masked(slices[index], torch.from_numpy(lung)[index].to(slices.device))
        told = torch.cat(self.compute.map(self._packed, self._batches(seen))).float().cpu()
        _, h, w = slices.shape
        padded = pad(seen[:1], self.network.stride).shape[1:]
        sizes = [(padded[0] // s, padded[1] // s) for s in (1, *self.network.scales)]
        areas = [height * width for height, width in sizes]
        *planes, logits, features = told.split([*areas, 1, told.shape[1] - sum(areas) - 1], dim=1)
        logit_map, *maps = (p.unflatten(1, size) for p, size in zip(planes, sizes, strict=True))
        lesions = torch.zeros(slices.shape)
        lesions[index] = logit_map[:, :h, :w].sigmoid()
        judged = torch.from_numpy(judged_slices(lung))[index]
        return Looked(index, lesions, logits[:, 0].sigmoid(), judged, tuple(maps), features)

    def _scores(self, looked: Looked, box: Box, slices: Tensor) -> NDArray[np.float32]:
        """Of all canonical slices (z,); 0 where no lung is, or only a tip."""
        scores = np.zeros(len(slices), np.float32)
        scores[looked.index + box[0].start] = looked.positive * looked.judged
        return scores

    def _attention(self, looked: Looked, box: Box, slices: Tensor) -> dict[str, NDArray[np.uint8]]:
        """Maps of all canonical slices (z, h/2, w/2), 0 to 255; 0 outside the lungs' box and without lung.

        That is 4 mm a pixel: the finest maps are made at 8.
        """
        z, h, w = slices.shape
        half, index = (-(-h // 2), -(-w // 2)), looked.index + box[0].start
        height, width = (side.stop - side.start for side in box[1:])
        attention = {}
        for number, (maps, scale) in enumerate(zip(looked.attention, self.network.scales, strict=True), 1):
            halved = torch.zeros(z, *half, dtype=torch.uint8)
            for chosen, part in zip(index.split(CHUNK), maps.split(CHUNK), strict=True):
                whole = torch.zeros(len(part), h, w)
                large = F.interpolate(part[:, None], scale_factor=scale, mode="bilinear")[:, 0]
                whole[:, box[1], box[2]] = large[:, :height, :width]
                halved[chosen] = resample(whole, half).mul(255).round().byte()
            attention[f"attention {number}"] = halved.numpy()
        return attention

    def _packed(self, batch: Tensor) -> Tensor:
        """All that the network says of a slice in one row."""
        seen = self.network(batch)
        planes = [plane.flatten(1).float() for plane in (seen.lesions, *seen.attention)]
        return torch.cat([*planes, seen.logits[:, None].float(), seen.features.float()], dim=1)

    def _batches(self, slices: Tensor) -> Iterator[Tensor]:
        for batch in slices.split(BATCH):
            padded = pad(batch[:, None], self.network.stride).to(self.compute.device)
            yield padded.contiguous(memory_format=torch.channels_last)


def load(package: Package, analysis: Analysis) -> DualBranch:
    """From the files ``lungs``, ``dcn_slices`` and ``dcn_study`` of a package. Raises ConfigError."""
    running = compute.choose(analysis)
    network, _ = weights.read(package.file("dcn_slices"), DualBranchNet)
    study, _ = weights.read(package.file("dcn_study"), StudyNet)
    find_lungs = lungs_network(package.file("lungs"), running)
    networks = network.to(running.device), study
    return DualBranch(package.info, running, find_lungs, networks, package.lesion_threshold(analysis))
