"""What each network learns from: how a batch is drawn and what its loss is.

Departures from the paper, for want of its data (sections 3 and 4): soft Dice is added to the binary
cross-entropy, and negatives for the classification head are sub-volumes without any lesion of the
same patients, since no healthy volumes are at hand.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from triage.errors import ConfigError
from triage.models.compute import fast_bfloat16
from triage.models.networks import LungsNet, MultitaskNet
from triage.models.preprocessing import context, neighbour_step, pad
from triage.training import augment
from triage.training.scans import Scan

CLASSIFICATION_WEIGHT = 0.1
"""Share of the classification loss (section 4.5)."""
SMOOTH = 10.0
"""Pixels added to both sides of Dice, so that a slice with a speck of lesion does not dominate."""


class Draw(np.random.Generator):
    """What is random in one step. It knows the step, for those who go through their data in epochs."""

    def __init__(self, seed: int, step: int) -> None:
        super().__init__(np.random.PCG64((seed, step)))
        self.seed, self.step = seed, step


class Task(Protocol):
    @property
    def network(self) -> nn.Module: ...

    def loss(self, rng: Draw) -> Tensor:
        """Draw one batch and return the loss of ``network`` on it."""
        ...

    def score(self, network: Any, scan: Scan) -> float | None:
        """How well the network does on a whole scan, 1 at best; None where the scan cannot tell."""
        ...


Loss = Callable[[Tensor, Tensor], Tensor]
"""Logits (n, ·, h, w) and truth (n, 1, h, w), the share of each pixel → loss ()."""


def segmentation_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Binary cross-entropy plus soft Dice, (n, 1, h, w) each; truth is the share of each pixel.

    Dice is taken slice by slice, where there is something to find: a small lesion counts as much as
    a large one, and slices without any are left to the cross-entropy.
    """
    p, shown = logits.sigmoid(), (truth > 0.5).flatten(1).any(1)
    both, either = (p * truth).flatten(1).sum(1), (p + truth).flatten(1).sum(1)
    missed = (1 - (2 * both + SMOOTH) / (either + SMOOTH)) * shown
    return F.binary_cross_entropy_with_logits(logits, truth) + missed.sum() / shown.sum().clamp(min=1)


def dice(logits: Tensor, truth: Tensor) -> float:
    """Of the pixels with a logit above 0; 1 where both masks are empty."""
    answer, drawn = logits > 0, truth > 0.5
    total = int(answer.sum() + drawn.sum())
    return 2 * int((answer & drawn).sum()) / total if total else 1.0


@dataclass(frozen=True, slots=True)
class Placed:
    """Some slices with what was drawn on them, all moved alike."""

    slices: Tensor
    """(n, c, h, w): c is 1, or 3 with the neighbours below and above."""
    lung: Tensor
    """(n, c, h, w)."""
    lesion: Tensor
    """(n, 1, h, w), of the slice itself, by one rater."""


def on_canvas(
    scan: Scan,
    index: Sequence[int],
    size: tuple[int, int],
    rng: np.random.Generator,
    inputs: int = 1,
    varied: bool = True,
) -> Placed:
    """Some slices on a canvas of this size, as a network with so many inputs sees them.

    A mark that the scan lacks is empty. Where nothing is ``varied`` they only come to its middle.
    """
    chosen, step = torch.tensor(list(index)), _step(scan, rng) if varied else neighbour_step(scan.spacing_mm)
    slices = context(scan.slices, chosen, step, inputs)
    lung = torch.zeros_like(slices) if scan.lung is None else context(scan.lung, chosen, step, inputs)
    drawn = scan.lesions[int(rng.integers(len(scan.lesions)))][chosen] if scan.lesions else None
    lesion = torch.zeros_like(slices[:, :1]) if drawn is None else drawn[:, None]
    layers = torch.cat([slices, lung, lesion], dim=1)
    placed = augment.place(layers, size, rng) if varied else augment.centre(layers, size)
    slices, lung, lesion = torch.split(placed, [inputs, inputs, 1], dim=1)
    return Placed(augment.thicken(slices, rng) if varied else slices, lung, lesion)


def _step(scan: Scan, rng: np.random.Generator) -> int:
    """To the neighbours: now and then the slice itself, as at a volume's end, or twice as far."""
    step = neighbour_step(scan.spacing_mm)
    return int(rng.choice([0, step, 2 * step], p=[0.15, 0.7, 0.15]))


def forward(network: nn.Module, slices: Tensor) -> Any:
    """The network's own answer, in mixed precision where the processor is made for it: half the time."""
    device = next(network.parameters()).device
    layout = torch.channels_last if slices.dim() == 4 else torch.channels_last_3d
    with torch.autocast(device.type, torch.bfloat16, enabled=mixed(device, slices.dim())):
        return network(slices.to(device).contiguous(memory_format=layout))


def mixed(device: torch.device, dimensions: int) -> bool:
    """Whether to train in bfloat16: not volumes (N, C, Z, H, W) on a processor.

    There the gradients of small 3D convolutions are now and then no numbers (seen with PyTorch 2.13).
    """
    return fast_bfloat16(device.type == "cuda") and (device.type == "cuda" or dimensions == 4)


def first(answer: Any) -> Tensor:
    """Logits (n, 1, h, w) of a network's answer: the first of those that a network with two heads gives."""
    logits: Tensor = answer if isinstance(answer, Tensor) else answer[0]
    return logits


def whole(network: Any, scan: Scan, logits: Callable[[Any], Tensor] = first) -> Tensor:
    """Logits (z, h, w) of all slices of a scan, in batches; ``logits`` are those of a network's answer."""
    step = neighbour_step(scan.spacing_mm)
    parts = []
    for index in torch.arange(len(scan.slices)).split(16):
        batch = pad(context(scan.slices, index, step, network.inputs), network.stride)
        parts.append(logits(forward(network, batch)))
    return torch.cat(parts)[:, 0, : scan.slices.shape[1], : scan.slices.shape[2]].float().cpu()


class LungsOf:
    """Both lungs as one mask by any network, from slices drawn evenly over patients."""

    def __init__(
        self,
        scans: Sequence[Scan],
        network: Any,
        canvas: tuple[int, int],
        batch: int,
        criterion: Loss = segmentation_loss,
    ) -> None:
        self.network, self.criterion = network, criterion
        self.canvas, self.batch = canvas, batch
        self.by_patient = defaultdict(list)
        for scan in scans:
            if scan.lung is not None:
                self.by_patient[scan.patient].append(scan)
        if not self.by_patient:
            raise ConfigError("nothing to learn lungs from: no volume has a lung mask")

    def loss(self, rng: np.random.Generator) -> Tensor:
        slices, truth = self.drawn(rng)
        logits = forward(self.network, slices)
        return self.criterion(logits.float(), truth.to(logits.device))

    def drawn(self, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """A batch of slices (n, ·, h, w) and lungs (n, 1, h, w)."""
        parts = [self._slice(rng) for _ in range(self.batch)]
        slices, truth = (torch.cat(part) for part in zip(*parts, strict=True))
        return slices, truth

    def _slice(self, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        scans = self.by_patient[rng.choice(list(self.by_patient))]
        scan = scans[rng.integers(len(scans))]
        return self._pair(scan, int(rng.integers(len(scan.slices))), rng)

    def _pair(self, scan: Scan, index: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        placed = on_canvas(scan, [index], self.canvas, rng, self.network.inputs)
        slices = augment.surroundings(placed.slices, placed.lung, rng)
        middle = self.network.inputs // 2
        return augment.intensity(slices, rng), placed.lung[:, middle : middle + 1]

    def score(self, network: Any, scan: Scan) -> float | None:
        """Dice at 2 mm."""
        return None if scan.lung is None else dice(whole(network, scan), scan.lung)


class LungsTask(LungsOf):
    """By the network of the multitask system."""

    def __init__(
        self,
        scans: Sequence[Scan],
        widths: Sequence[int],
        inputs: int = 1,
        canvas: tuple[int, int] = (192, 192),
        batch: int = 16,
    ) -> None:
        super().__init__(scans, LungsNet(widths, inputs), canvas, batch)


@dataclass(frozen=True, slots=True)
class Window:
    """Slices of one scan that make one sub-volume."""

    scan: Scan
    index: tuple[int, ...]


@dataclass
class Windows:
    """Sub-volumes by label (any lesion?) and patient, each patient drawn as often as the others."""

    depth: int
    """Slices a sub-volume, every first, second or third one."""
    least_lesion: int = 20
    """Pixels of lesion that make a sub-volume positive; fewer, but some, are left out."""
    by_label: dict[int, dict[str, list[Window]]] = field(
        default_factory=lambda: {0: defaultdict(list), 1: defaultdict(list)}
    )

    def add(self, scan: Scan) -> None:
        """Every window of the scan with enough lung, and of its left and right half, under its label.

        Halves, because many patients have lesions on one side only.
        """
        if scan.cropped or scan.lung is None or not scan.lesions:
            return
        for part in (scan, *_halves(scan)):
            self._add(part)

    def _add(self, scan: Scan) -> None:
        lesion = torch.stack([(mask > 0.5).sum((1, 2)) for mask in scan.lesions]).amax(0).numpy()
        lung = np.zeros(len(lesion)) if scan.lung is None else (scan.lung > 0.5).sum((1, 2)).numpy()
        for stride in (1, 2, 3) if self.depth > 1 else (1,):
            for start in range(len(lesion) - stride * (self.depth - 1)):
                index = tuple(range(start, start + stride * self.depth, stride))
                amount = int(lesion[list(index)].sum())
                if (lung[list(index)] > 200).mean() > 0.7 and (amount == 0 or amount >= self.least_lesion):
                    self.by_label[int(amount > 0)][scan.patient].append(Window(scan, index))

    def draw(self, label: int, rng: np.random.Generator) -> Window:
        patients = self.by_label[label]
        windows = patients[rng.choice(list(patients))]
        return windows[rng.integers(len(windows))]

    def check(self) -> None:
        """Raises ConfigError where one of the labels has no sub-volume."""
        if not all(self.by_label.values()):
            raise ConfigError("training needs sub-volumes with and without lesions: give more patients")


class LesionsTask:
    """Lesions slice by slice: half of the sub-volumes without any, and single pictures beside them.

    Sub-volumes of one slice show a batch the most patients.
    """

    def __init__(
        self,
        scans: Sequence[Scan],
        network: Any,
        canvas: tuple[int, int] = (128, 176),
        windows: int = 12,
        depth: int = 1,
        pictures: int = 6,
        criterion: Loss = segmentation_loss,
    ) -> None:
        self.network, self.criterion = network, criterion
        self.canvas, self.count, self.pictures = canvas, windows, pictures
        self.singles = [s for s in scans if s.cropped and s.lesions]
        self.scans = [s.to_lungs() for s in scans if not s.cropped]
        self.windows = self._windows(depth)

    def _windows(self, depth: int) -> Windows:
        windows = Windows(depth)
        for scan in self.scans:
            windows.add(scan)
        windows.check()
        return windows

    def loss(self, rng: np.random.Generator) -> Tensor:
        slices, truth, _ = self.batch(rng, self.windows, self.count)
        logits = forward(self.network, slices)
        return self.criterion(logits.float(), truth.to(logits.device))

    def batch(
        self, rng: np.random.Generator, windows: Windows, count: int
    ) -> tuple[Tensor, Tensor, list[int]]:
        """Slices and lesions (n, ·, h, w): so many sub-volumes, whose labels are told, then pictures."""
        labels = [int(k) for k in rng.permutation(count) % 2]
        parts = [self._window(windows.draw(label, rng), label, rng) for label in labels]
        parts += [self._picture(rng) for _ in range(self.pictures if self.singles else 0)]
        slices, truth = (torch.cat(part) for part in zip(*parts, strict=True))
        return slices, truth, labels

    def _window(self, window: Window, label: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        placed = on_canvas(window.scan, window.index, self.canvas, rng, self.network.inputs)
        slices, lesion = augment.dependent(placed.slices, placed.lung, rng), placed.lesion
        if label:
            slices, lesion = augment.opacities(slices, lesion, placed.lung, rng)
        return augment.intensity(slices, rng), lesion

    def _picture(self, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        scan = self.singles[rng.integers(len(self.singles))]
        placed = on_canvas(scan, [0], self.canvas, rng, self.network.inputs)
        return augment.intensity(placed.slices, rng, picture=True), placed.lesion

    def score(self, network: Any, scan: Scan) -> float | None:
        """Dice at 2 mm, mean over raters."""
        if not scan.lesions:
            return None
        scan = scan.to_lungs()
        logits = whole(network, scan)
        return float(np.mean([dice(logits, lesion) for lesion in scan.lesions]))


class MultitaskTask(LesionsTask):
    """Lesions, and now and then a batch of sub-volumes that also teaches "any lesion?"."""

    def __init__(
        self,
        scans: Sequence[Scan],
        widths: Sequence[int],
        hidden: int,
        inputs: int = 1,
        volumes: int = 2,
        slices: int = 12,
        share: float = 0.15,
        **options: Any,
    ) -> None:
        super().__init__(scans, MultitaskNet(widths, hidden, inputs), **options)
        self.volumes, self.share = volumes, share
        self.deep = self._windows(slices)

    def loss(self, rng: np.random.Generator) -> Tensor:
        deep = rng.random() < self.share
        windows, count = (self.deep, self.volumes) if deep else (self.windows, self.count)
        slices, truth, labels = self.batch(rng, windows, count)
        logits, pooled = forward(self.network, slices)
        loss = segmentation_loss(logits.float(), truth.to(logits.device))
        return loss + CLASSIFICATION_WEIGHT * self._classification(pooled.float(), labels) if deep else loss

    def _classification(self, pooled: Tensor, labels: list[int]) -> Tensor:
        depth = self.deep.depth
        volumes = pooled[: depth * len(labels)].split(depth)
        answers = torch.stack([self.network.classify(volume) for volume in volumes])
        return F.binary_cross_entropy_with_logits(answers, torch.tensor(labels).to(answers))


def _halves(scan: Scan) -> list[Scan]:
    """Left and right half as scans of their own: many patients have lesions on one side only."""
    middle = scan.slices.shape[2] // 2
    every = slice(None)
    return [scan.cut((every, every, part)) for part in (slice(None, middle), slice(middle, None))]
