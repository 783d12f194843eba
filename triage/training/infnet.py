"""What Inf-Net learns from, first by reconstructing, then by what was drawn (Fung et al., section IV).

The paper's ways are the defaults: L_seg and the outline's cross-entropy, three scales, pictures turned over,
cropped and cut out. ``varied`` adds the changes that our other networks learn with, since there are few
patients. Departures, where the papers are silent or contradict themselves:

- Both networks are trained at once. The second sees what the first finds so far, and teaches it nothing.
- Each batch is seen at one of the scales, not at all three in turn.
- What is cut out of a picture is cut out of the drawing, too: nobody can find a lesion in nothing.
- Reconstruction is judged by the mean squared error: cross-entropy does not go with linear last layers.
- One coach masks for both networks. It has some steps and then they have some, in turn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from triage.domain import Mask
from triage.errors import ConfigError
from triage.models import weights
from triage.models.infnet import SelfSupervised, squared
from triage.models.infnet_networks import CLASSES, RES2NET, SIZE, InfNet, Inpainting, Seen
from triage.models.preprocessing import resample
from triage.training import augment, metrics
from triage.training.cases import Case
from triage.training.scans import Scan, scan
from triage.training.tasks import Draw, Window, Windows, dice, forward

SCALES = (0.75, 1.0, 1.25)
"""Of the size (Fan et al., section IV-B)."""
NEAR, STRESS = 31, 5
"""Pixels around which an outline is near, and how much more such pixels count (Fan et al.'s code)."""
DRAWN = [0, *range(2, 3 + len(CLASSES))]
"""Of ``layers_of``: all but the lung."""
LEAST_CROP = 0.75
"""Of a side; the paper does not say how much its random crops leave."""


def segmentation_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Equation 1: weighted IoU, where pixels near an outline count more, plus λ = 1 times cross-entropy.

    (n, 1, h, w) each; truth is the share of each pixel.
    """
    around = F.avg_pool2d(truth, NEAR, stride=1, padding=NEAR // 2)
    weight, p = 1 + STRESS * (around - truth).abs(), logits.sigmoid()
    both, either = ((weight * part).flatten(1).sum(1) for part in (p * truth, p + truth))
    iou = (both + 1) / (either - both + 1)
    return (1 - iou).mean() + F.binary_cross_entropy_with_logits(logits, truth)


def outline(lesion: Tensor) -> Tensor:
    """Pixels (n, 1, h, w) on either side of where a lesion ends: what ``Edge`` of COVID-SemiSeg marks."""
    drawn = (lesion > 0.5).float()
    return F.max_pool2d(drawn, 3, 1, 1) + F.max_pool2d(-drawn, 3, 1, 1)


def single_loss(seen: Seen, lesion: Tensor) -> Tensor:
    """Equation 2: L_edge and L_seg of S_g, S_5, S_4 and S_3."""
    edge = F.binary_cross_entropy_with_logits(seen.edge, outline(lesion))
    return edge + torch.stack([segmentation_loss(s, lesion) for s in seen.maps.split(1, dim=1)]).sum()


def multi_loss(logits: Tensor, classes: Tensor) -> Tensor:
    """Cross-entropy of background, ground glass, consolidation: logits and shares of a pixel (n, 3, h, w)."""
    return F.cross_entropy(logits, classes)


def edges(slices: Tensor) -> Tensor:
    """How steep slices (n, 1, h, w) in [0, 1] are (Sobel), in [0, 1]: what the edge branch reconstructs."""
    across = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]], device=slices.device) / 4
    steps = F.conv2d(F.pad(slices, (1, 1, 1, 1), mode="replicate"), torch.stack([across, across.T])[:, None])
    return steps.square().sum(1, keepdim=True).sqrt().clamp(max=1)


def cut_out(layers: Tensor, share: float, rng: np.random.Generator) -> Tensor:
    """Layers (c, h, w) with a box of this share of their area, of their proportions, somewhere set to 0."""
    _, h, w = layers.shape
    tall, wide = (round(side * sqrt(share)) for side in (h, w))
    y, x = (int(rng.integers(side - part + 1)) for side, part in ((h, tall), (w, wide)))
    result = layers.clone()
    result[:, y : y + tall, x : x + wide] = 0
    return result


def turned_and_cropped(layers: Tensor, rng: np.random.Generator) -> Tensor:
    """Layers (n, c, h, w) turned over, left and right or up and down or neither, and cropped at random."""
    axes = [axis for axis in (2, 3) if rng.random() < 0.5]
    for axis in (2, 3):
        side = layers.shape[axis]
        length = max(1, round(side * rng.uniform(LEAST_CROP, 1)))
        layers = layers.narrow(axis, int(rng.integers(side - length + 1)), length)
    return layers.flip(axes)


@dataclass(frozen=True, slots=True)
class Ways:
    """How slices are varied; see the module."""

    augmented: bool = True
    cut_out: float = 0.0
    varied: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.cut_out < 1:
            raise ConfigError(f"cut_out {self.cut_out}: must be a share of the picture, below 1")


@dataclass(frozen=True, slots=True)
class Batch:
    """Slices as the networks see them, and what was drawn on them, as shares of a pixel."""

    slices: Tensor
    """(n, 1, h, w)."""
    lesion: Tensor
    """(n, 1, h, w)."""
    classes: Tensor
    """Background, ground glass and consolidation (m, 3, h, w) of those slices that are ``told``."""
    told: Tensor
    """Whether ground glass and consolidation were told apart (n,)."""


class Slices:
    """Slices with lesions drawn: pictures, and of volumes as many with lesions as without.

    ``pictures`` of a batch are pictures, where there are volumes, too. Raises ConfigError where neither is.
    """

    def __init__(self, scans: Sequence[Scan], batch: int, pictures: int, ways: Ways) -> None:
        self.ways = ways
        self.singles = [s for s in scans if s.cropped and s.lesions]
        self.windows = Windows(depth=1)
        for each in scans:
            self.windows.add(each.to_lungs())
        volumes = all(self.windows.by_label.values())
        if not self.singles and not volumes:
            raise ConfigError("infnet learns from pictures or volumes with lesions drawn: there are none")
        self.pictures = (min(pictures, batch) if volumes else batch) if self.singles else 0
        self.count = batch - self.pictures

    def draw(self, rng: np.random.Generator, side: int) -> Batch:
        """A batch of side × side."""
        chosen = [self.windows.draw(k % 2, rng) for k in range(self.count)]
        chosen += [Window(self.singles[rng.integers(len(self.singles))], (0,)) for _ in range(self.pictures)]
        layers = torch.stack([self._layers(window, side, rng) for window in chosen])
        told = torch.tensor([bool(window.scan.lesion_classes) for window in chosen])
        return _batch(layers, told)

    def _layers(self, window: Window, side: int, rng: np.random.Generator) -> Tensor:
        """Slice, lesion and each of ``CLASSES``, (2 + n, side, side)."""
        drawn = window.scan
        layers = layers_of(drawn, window.index[0], int(rng.integers(len(drawn.lesions))))
        if self.ways.varied:
            layers = _varied(layers, drawn, rng)
        if self.ways.augmented:
            layers = turned_and_cropped(layers, rng)
        seen = squared(layers, side)[0, DRAWN]
        return cut_out(seen, self.ways.cut_out, rng) if self.ways.cut_out else seen


def layers_of(drawn: Scan, index: int, rater: int) -> Tensor:
    """Of one slice: itself, lung, lesion and each of ``CLASSES``, (1, 3 + n, h, w); 0 what nobody drew."""
    empty = torch.zeros_like(drawn.slices[index])
    lung = empty if drawn.lung is None else drawn.lung[index]
    classes = [drawn.lesion_classes[kind][index] if drawn.lesion_classes else empty for kind in CLASSES]
    return torch.stack([drawn.slices[index], lung, drawn.lesions[rater][index], *classes])[None]


def _varied(layers: Tensor, drawn: Scan, rng: np.random.Generator) -> Tensor:
    """As our other networks see slices: moved, and with other HU."""
    h, w = layers.shape[2:]
    slices, lung, lesion, classes = augment.place(layers, (h, w), rng).split([1, 1, 1, len(CLASSES)], dim=1)
    if not drawn.cropped:
        slices = augment.dependent(slices, lung, rng)
    if not drawn.cropped and (lesion > 0.5).any():
        slices, lesion = augment.opacities(slices, lesion, lung, rng)
    slices = augment.intensity(slices, rng, picture=drawn.cropped)
    return torch.cat([slices, lung, lesion, classes], dim=1)


def _batch(layers: Tensor, told: Tensor) -> Batch:
    """Of layers (n, 2 + …, h, w): slice, lesion, and each of ``CLASSES``."""
    slices, lesion, classes = layers.split([1, 1, len(CLASSES)], dim=1)
    background = (1 - classes.sum(1, keepdim=True)).clamp(min=0)
    return Batch(slices, lesion, torch.cat([background, classes], dim=1)[told], told)


def _on(batch: Batch, device: torch.device) -> Batch:
    return Batch(*(part.to(device) for part in (batch.slices, batch.lesion, batch.classes, batch.told)))


def losses(network: InfNet, batch: Batch) -> tuple[Tensor, Tensor]:
    """Of Single and of Multi Inf-Net; the latter is 0 where nobody told the kinds of lesion apart."""
    batch = _on(batch, next(network.parameters()).device)
    edge, maps = forward(network.single, batch.slices)
    seen = Seen(edge.float(), maps.float())
    single = single_loss(seen, batch.lesion)
    if not batch.told.any():
        return single, torch.zeros_like(single)
    prior = seen.lesions.detach().sigmoid()
    logits = forward(network.multi, torch.cat([batch.slices, prior], dim=1)[batch.told])
    return single, multi_loss(logits.float(), batch.classes)


def side_of(network: InfNet, step: int) -> int:
    """Height and width of a batch: the scales in turn, to the next size that goes through the network."""
    return max(1, int(network.size * SCALES[step % len(SCALES)] / network.stride + 0.5)) * network.stride


class InfNetTask:
    """Lesions, and of pictures in which they were told apart, their kinds."""

    def __init__(
        self,
        scans: Sequence[Scan],
        encoder: str = RES2NET,
        width: float = 1.0,
        multi_width: float = 1.0,
        size: int = SIZE,
        encoder_weights: str | None = None,
        start: Path | None = None,
        batch: int = 6,
        pictures: int = 3,
        **ways: Any,
    ) -> None:
        """``start``: weights of the networks that learned to reconstruct."""
        self.untrained = InfNet(encoder, width, multi_width, size, encoder_weights=encoder_weights)
        self.start = start
        self.slices = Slices(scans, batch, pictures, Ways(**ways))

    @cached_property
    def network(self) -> InfNet:
        """With what was learned before, which is there once that training has ended."""
        if self.start is not None:
            before, _ = weights.read(self.start, Inpainting)
            self.untrained.start_from(before.infnet.state_dict())
        return self.untrained

    def loss(self, rng: Draw) -> Tensor:
        """Equation 2, and the cross-entropy of Multi Inf-Net, which reaches nothing of the first."""
        single, multi = losses(self.network, self.slices.draw(rng, side_of(self.network, rng.step)))
        return single + multi

    def score(self, network: Any, scan: Scan) -> float | None:
        """Dice of S_3 at 2 mm, mean over raters."""
        if not scan.lesions:
            return None
        scan = scan.to_lungs()
        h, w = scan.slices.shape[1:]
        parts = [forward(network.single, squared(s, network.size)).lesions for s in _parts(scan)]
        logits = resample(torch.cat(parts)[:, 0].float().cpu(), (h, w))
        return float(np.mean([dice(logits, lesion) for lesion in scan.lesions]))


def _parts(scan: Scan) -> Iterator[Tensor]:
    """All slices (n, 1, h, w), some at a time."""
    yield from scan.slices[:, None].split(16)


class InpaintingTask:
    """To reconstruct slices of which a coach erases what is hardest (algorithm 2, equations 3 to 5)."""

    def __init__(
        self,
        scans: Sequence[Scan],
        encoder: str = RES2NET,
        width: float = 1.0,
        multi_width: float = 1.0,
        size: int = SIZE,
        coach_width: float = 1.0,
        encoder_weights: str | None = None,
        batch: int = 6,
        pictures: int = 3,
        coach_steps: int = 10,
        network_steps: int = 10,
        **ways: Any,
    ) -> None:
        """``coach_steps`` and ``network_steps`` in turn, the coach's first. Raises ConfigError for none."""
        if coach_steps + network_steps < 1:
            raise ConfigError("coach_steps and network_steps: at least one of them must be 1 or more")
        self.network = Inpainting(encoder, width, multi_width, size, coach_width, encoder_weights)
        self.slices = Slices(scans, batch, pictures, Ways(**ways))
        self.coach_steps, self.network_steps = coach_steps, network_steps

    def loss(self, rng: Draw) -> Tensor:
        """Of the coach, 1 − L_rec, or of the networks, L_rec: the other's weights are fixed."""
        slices = self.slices.draw(rng, side_of(self.network.infnet, rng.step)).slices
        slices = slices.to(next(self.network.parameters()).device)
        if rng.step % (self.coach_steps + self.network_steps) < self.coach_steps:
            with fixed(self.network.infnet):
                return 1 - reconstruction_loss(self.network, slices)
        with fixed(self.network.coach):
            return reconstruction_loss(self.network, slices)

    def score(self, network: Any, scan: Scan) -> float:
        """1 − L_rec of the slices, as the coach masks them."""
        device = next(network.parameters()).device
        parts = [squared(part, network.infnet.size).to(device) for part in _parts(scan.to_lungs())]
        return 1 - float(np.mean([reconstruction_loss(network, part).item() for part in parts]))


def reconstruction_loss(network: Inpainting, slices: Tensor) -> Tensor:
    """L_rec(x ⊙ M): mean squared error of all that is reconstructed from masked slices (n, 1, h, w)."""
    edge, images = forward(network, slices * forward(network.coach, slices))
    errors = [F.mse_loss(image, slices) for image in images.float().split(1, dim=1)]
    return torch.stack([F.mse_loss(edge.float(), edges(slices)), *errors]).mean()


@contextmanager
def fixed(network: nn.Module) -> Iterator[None]:
    """Whatever is computed in here teaches the network nothing."""
    network.requires_grad_(False)
    try:
        yield
    finally:
        network.requires_grad_(True)


def measured(model: SelfSupervised, case: Case) -> dict[str, float]:
    """Of a picture: the loss of both networks, and each kind's Dice, as ``Score.own`` has them.

    A kind that was neither drawn nor found has no Dice, and a threshold-averaged one only where it was drawn.
    """
    drawn = scan(case)
    with model.compute.running():
        parts = [squared(layers_of(drawn, 0, k), model.network.size) for k in range(len(drawn.lesions))]
        layers = torch.cat(parts)[:, DRAWN]
        told = torch.full((len(layers),), bool(drawn.lesion_classes))
        single, multi = losses(model.network, _batch(layers, told))
    found = {"loss_single": single.item()}
    return found | {"loss_multi": multi.item(), **_by_kind(model, case)} if case.lesion_classes else found


def _by_kind(model: SelfSupervised, case: Case) -> dict[str, float]:
    maps = model.class_maps(case.volume, None)
    lesion = sum(maps.values()) > model.lesion_threshold
    found: dict[str, float] = {}
    for kind, probability in maps.items():
        drawn = case.lesion_classes[kind]
        others = [other for name, other in maps.items() if name != kind]
        mask: Mask = lesion & np.all([probability > other for other in others], axis=0)
        if drawn.any() or mask.any():
            found[f"{kind}_dice"] = metrics.dice(mask, drawn)
        if drawn.any():
            averaged = metrics.threshold_averaged_dice(probability, drawn)
            found[f"{kind}_dice_threshold_averaged"] = averaged
    return found
