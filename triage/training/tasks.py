"""What each network learns from: how a batch is drawn and what its loss is.

Departures from the paper, for want of its data (sections 3 and 4): soft Dice is added to the binary
cross-entropy, and negatives for the classification head are sub-volumes without any lesion of the
same patients, since no healthy volumes are at hand.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from triage.errors import ConfigError
from triage.models.networks import LungsNet, MultitaskNet
from triage.models.preprocessing import pad
from triage.training import augment
from triage.training.data import Scan

CLASSIFICATION_WEIGHT = 0.1
"""Share of the classification loss (section 4.5)."""
SMOOTH = 10.0
"""Pixels added to both sides of Dice, so that a slice with a speck of lesion does not dominate."""


class Task(Protocol):
    @property
    def network(self) -> nn.Module: ...

    def loss(self, rng: np.random.Generator) -> Tensor:
        """Draw one batch and return the loss of ``network`` on it."""
        ...

    def logits(self, network: Any, scan: Scan) -> tuple[Tensor, Tensor]:
        """Of a whole scan, for validation: (logits, truth), both (z, h, w)."""
        ...


def segmentation_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Binary cross-entropy plus soft Dice, (n, 1, h, w) each.

    Dice is taken slice by slice, where there is something to find: a small lesion counts as much as
    a large one, and slices without any are left to the cross-entropy.
    """
    p, shown = logits.sigmoid(), truth.flatten(1).any(1)
    both, either = (p * truth).flatten(1).sum(1), (p + truth).flatten(1).sum(1)
    missed = (1 - (2 * both + SMOOTH) / (either + SMOOTH)) * shown
    return F.binary_cross_entropy_with_logits(logits, truth) + missed.sum() / shown.sum().clamp(min=1)


def on_canvas(
    scan: Scan, index: Sequence[int], size: tuple[int, int], rng: np.random.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Some slices with their lung and lesion masks, placed alike, each (n, 1, *size)."""
    chosen = list(index)
    layers = [scan.slices[chosen], scan.lung[chosen].float(), scan.lesion[chosen].float()]
    slices, lung, lesion = torch.split(augment.place(torch.stack(layers, dim=1), size, rng), 1, dim=1)
    return augment.blend_neighbours(slices, rng), (lung > 0.5).float(), (lesion > 0.5).float()


def forward(network: nn.Module, slices: Tensor) -> Any:
    """The network's own answer, computed in bfloat16: half the time on processors made for it."""
    with torch.autocast("cpu", torch.bfloat16):
        return network(slices.contiguous(memory_format=torch.channels_last))


def whole(network: LungsNet | MultitaskNet, slices: Tensor) -> Tensor:
    """Logits (z, h, w) of all slices of a scan, in batches."""
    padded = pad(slices, network.stride)[:, None]
    parts = [forward(network, padded[start : start + 16]) for start in range(0, len(padded), 16)]
    logits = torch.cat([part if isinstance(part, Tensor) else part[0] for part in parts])
    return logits[:, 0, : slices.shape[1], : slices.shape[2]].float()


class LungsTask:
    """Both lungs as one mask, from slices drawn evenly over patients."""

    canvas = (192, 192)
    batch = 24

    def __init__(self, scans: Sequence[Scan], widths: Sequence[int]) -> None:
        self.network = LungsNet(widths)
        self.by_patient = defaultdict(list)
        for scan in scans:
            if scan.has_lung:
                self.by_patient[scan.patient].append(scan)

    def loss(self, rng: np.random.Generator) -> Tensor:
        parts = [self._slice(rng) for _ in range(self.batch)]
        slices, truth = (torch.cat(part) for part in zip(*parts, strict=True))
        logits = forward(self.network, slices)
        return segmentation_loss(logits.float(), truth)

    def _slice(self, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        scans = self.by_patient[rng.choice(list(self.by_patient))]
        scan = scans[rng.integers(len(scans))]
        index = [int(rng.integers(len(scan.slices)))]
        slices, lung, _ = on_canvas(scan, index, self.canvas, rng)
        return augment.intensity(augment.surroundings(slices, lung, rng), rng), lung

    def logits(self, network: Any, scan: Scan) -> tuple[Tensor, Tensor]:
        return whole(network, scan.slices), scan.lung


@dataclass(frozen=True, slots=True)
class Window:
    """Slices of one scan that make one sub-volume."""

    scan: Scan
    index: tuple[int, ...]


class MultitaskTask:
    """Lesions slice by slice and "any lesion?" a sub-volume, half of the sub-volumes without one."""

    canvas = (128, 176)
    windows = 2
    """Sub-volumes a batch."""
    depth = 12
    """Slices a sub-volume, every first, second or third one."""
    pictures = 4
    least_lesion = 20
    """Pixels of lesion that make a sub-volume positive; fewer, but some, are left out."""

    def __init__(self, scans: Sequence[Scan], widths: Sequence[int], hidden: int) -> None:
        self.network = MultitaskNet(widths, hidden)
        self.singles = [s for s in scans if not s.has_lung]
        self.by_label: dict[int, dict[str, list[Window]]] = {0: defaultdict(list), 1: defaultdict(list)}
        for scan in (s.cropped() for s in scans if s.has_lung):
            self._add(scan)
            for half in _halves(scan):
                self._add(half)
        if not all(self.by_label.values()):
            raise ConfigError("training needs sub-volumes with and without lesions: give more patients")

    def _add(self, scan: Scan) -> None:
        """Every window of the scan with enough lung, under its label."""
        lesion = scan.lesion.sum((1, 2)).numpy()
        lung = scan.lung.sum((1, 2)).numpy()
        for stride in (1, 2, 3):
            for start in range(len(lesion) - stride * (self.depth - 1)):
                index = tuple(range(start, start + stride * self.depth, stride))
                amount = int(lesion[list(index)].sum())
                if (lung[list(index)] > 200).mean() > 0.7 and (amount == 0 or amount >= self.least_lesion):
                    self.by_label[int(amount > 0)][scan.patient].append(Window(scan, index))

    def loss(self, rng: np.random.Generator) -> Tensor:
        labels = [int(k) for k in rng.permutation(self.windows) % 2]
        parts = [self._window(label, rng) for label in labels]
        parts += [self._picture(rng) for _ in range(self.pictures if self.singles else 0)]
        slices, truth = (torch.cat(part) for part in zip(*parts, strict=True))
        logits, pooled = forward(self.network, slices)
        volumes = pooled.float()[: self.depth * len(labels)].split(self.depth)
        answers = torch.stack([self.network.classify(v) for v in volumes])
        classification = F.binary_cross_entropy_with_logits(answers, torch.tensor(labels).float())
        return segmentation_loss(logits.float(), truth) + CLASSIFICATION_WEIGHT * classification

    def _window(self, label: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        patients = self.by_label[label]
        windows = patients[rng.choice(list(patients))]
        window = windows[rng.integers(len(windows))]
        slices, lung, lesion = on_canvas(window.scan, window.index, self.canvas, rng)
        if label:
            slices, lesion = augment.consolidations(slices, lesion, lung, rng)
        return augment.intensity(slices, rng), lesion

    def _picture(self, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        scan = self.singles[rng.integers(len(self.singles))]
        slices, _, lesion = on_canvas(scan, [0], self.canvas, rng)
        return augment.intensity(slices, rng), lesion

    def logits(self, network: Any, scan: Scan) -> tuple[Tensor, Tensor]:
        scan = scan.cropped()
        return whole(network, scan.slices), scan.lesion


def _halves(scan: Scan) -> list[Scan]:
    """Left and right half as scans of their own: many patients have lesions on one side only."""
    middle = scan.slices.shape[2] // 2
    return [
        Scan(scan.name, scan.patient, scan.slices[:, :, part], scan.lesion[:, :, part], scan.lung[:, :, part])
        for part in (slice(None, middle), slice(middle, None))
    ]
