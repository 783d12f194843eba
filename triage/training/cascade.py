"""What the cascade's two networks learn from (Qiblawey et al., sections 2.3 and 3).

The paper's ways are the defaults: cross-entropy alone, batches of four, turns by quarters. ``varied`` adds
the changes that our other networks learn with, since there are few patients, and ``soft_dice`` their loss.
Both networks learn from what was drawn, each by itself. AdamW stands for the paper's Adam.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from triage.errors import ConfigError
from triage.models.cascade import SIZE, EncoderDecoder
from triage.training import augment
from triage.training.scans import Scan
from triage.training.tasks import (
    LesionsTask,
    Loss,
    LungsOf,
    Placed,
    Window,
    dice,
    on_canvas,
    segmentation_loss,
    whole,
)

DENSE = 750 / 1300
"""-250 HU on the networks' scale: lung above it is what networks for lungs miss."""


def cross_entropy(logits: Tensor, truth: Tensor) -> Tensor:
    """Equation 1: of two channels (n, 2, h, w), background and foreground; truth (n, 1, h, w) is the share
    of foreground in each pixel."""
    return F.cross_entropy(logits, torch.cat([1 - truth, truth], dim=1))


def log_odds(logits: Tensor) -> Tensor:
    """Two channels (n, 2, h, w) as the one logit (n, 1, h, w) that says the same."""
    return logits[:, 1:] - logits[:, :1]


def both_losses(logits: Tensor, truth: Tensor) -> Tensor:
    """Equation 1, plus the soft Dice of our other networks: for lesions that are small beside the slice."""
    return segmentation_loss(log_odds(logits), truth)


@dataclass(frozen=True, slots=True)
class Ways:
    """How slices are varied and learned from; see the module."""

    turns: bool = True
    varied: bool = False
    soft_dice: bool = False

    @property
    def loss(self) -> Loss:
        return both_losses if self.soft_dice else cross_entropy

    def check(self, canvas: Sequence[int]) -> None:
        """Raises ConfigError where turned slices would not fit."""
        if self.turns and canvas[0] != canvas[1]:
            raise ConfigError(f"canvas {tuple(canvas)}: must be square for turns; or set turns to false")

    def placed(
        self, scan: Scan, index: Sequence[int], size: tuple[int, int], rng: np.random.Generator, inputs: int
    ) -> Placed:
        """Some slices on a canvas, turned by 0, ±90 or 180 degrees (section 3.1)."""
        placed = on_canvas(scan, index, size, rng, inputs, self.varied)
        quarters = int(rng.integers(4)) if self.turns else 0
        parts = (placed.slices, placed.lung, placed.lesion)
        return Placed(*(torch.rot90(part, quarters, (2, 3)) for part in parts))


class CascadeLungsTask(LungsOf):
    """Both lungs as one mask, from whole slices drawn evenly over patients."""

    def __init__(
        self,
        scans: Sequence[Scan],
        encoder: str,
        decoder: str,
        width: float = 1.0,
        inputs: int = 1,
        encoder_weights: str | None = None,
        canvas: tuple[int, int] = SIZE,
        batch: int = 4,
        **ways: bool,
    ) -> None:
        network = EncoderDecoder(encoder, decoder, width, inputs, encoder_weights)
        self.ways = Ways(**ways)
        self.ways.check(canvas)
        super().__init__(scans, network, canvas, batch, self.ways.loss)

    def _pair(self, scan: Scan, index: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        placed = self.ways.placed(scan, [index], self.canvas, rng, self.network.inputs)
        slices = placed.slices
        if self.ways.varied:
            slices = augment.intensity(augment.surroundings(slices, placed.lung, rng), rng)
        middle = self.network.inputs // 2
        return slices, placed.lung[:, middle : middle + 1]

    def score(self, network: Any, scan: Scan) -> float | None:
        """Dice at 256 × 256."""
        return None if scan.lung is None else dice(whole(network, scan, log_odds), scan.lung)


class CascadeTask(LesionsTask):
    """Lesions in slices that are black outside the lungs: half of those drawn show none.

    Lungs are cut out and laid on a canvas, whose rest is as black as what is masked away. Each lung alone is
    drawn too. Where slices are varied, the mask is now and then as a network for the lungs might give it.
    """

    def __init__(
        self,
        scans: Sequence[Scan],
        encoder: str,
        decoder: str,
        width: float = 1.0,
        inputs: int = 1,
        encoder_weights: str | None = None,
        canvas: tuple[int, int] = SIZE,
        batch: int = 4,
        pictures: int = 0,
        **ways: bool,
    ) -> None:
        network = EncoderDecoder(encoder, decoder, width, inputs, encoder_weights)
        self.ways = Ways(**ways)
        self.ways.check(canvas)
        super().__init__(scans, network, canvas, windows=batch, pictures=pictures, criterion=self.ways.loss)

    def _window(self, window: Window, label: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        placed = self.ways.placed(window.scan, window.index, self.canvas, rng, self.network.inputs)
        slices, lesion, lung = placed.slices, placed.lesion, placed.lung
        if self.ways.varied:
            slices = augment.dependent(slices, lung, rng)
            if label:
                slices, lesion = augment.opacities(slices, lesion, lung, rng)
            slices, lung = augment.intensity(slices, rng), as_found(lung, slices, rng)
        seen = (lung > 0.5).float()
        middle = self.network.inputs // 2
        return slices * seen, lesion * seen[:, middle : middle + 1]

    def score(self, network: Any, scan: Scan) -> float | None:
        """Dice at 256 × 256 in the lungs as drawn, mean over raters."""
        if not scan.lesions:
            return None
        scan = scan.to_lungs()
        seen = scan.slices if scan.lung is None else scan.slices * (scan.lung > 0.5)
        logits = whole(network, replace(scan, slices=seen), log_odds)
        return float(np.mean([dice(logits, lesion) for lesion in scan.lesions]))


def as_found(lung: Tensor, slices: Tensor, rng: np.random.Generator) -> Tensor:
    """Drawn lungs (n, c, h, w) as a network may find them.

    Now and then a little wide or narrow, or without what is dense: the second stage must bear with the first.
    """
    draw, reach = rng.random(), int(rng.integers(1, 3))
    if draw < 0.2:
        return F.max_pool2d(lung, 2 * reach + 1, 1, reach)
    if draw < 0.4:
        return -F.max_pool2d(-lung, 2 * reach + 1, 1, reach)
    return lung * (augment.blur(slices, 1.0) < DENSE) if draw < 0.5 else lung
