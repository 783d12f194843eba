"""What the dual-branch network and its study network learn from (Gao et al., sections 2.5 and 3.2.1).

Departures from the paper, for want of its data: most slices carry a label only (COVID-19 or another finding,
not lesion or none) and teach the classification branch alone, in batches of their own share, so that the
slices with lesions drawn are seen often enough; studies are made up of training slices (``DcnStudyTask``).

Slices are masked by the lungs, as in inference. Where nobody drew them, as in pictures, the network that
ships finds them: left whole, chest wall and heart would tell pictures from volumes, and where they are from.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from triage.domain import judged_slices
from triage.errors import ConfigError
from triage.models import weights
from triage.models.dcn import masked
from triage.models.dcn_networks import DualBranchNet, StudyNet
from triage.training import augment
from triage.training.baselines import with_lungs
from triage.training.cases import Diagnosis
from triage.training.scans import Scan
from triage.training.tasks import Draw, Placed, dice, forward, on_canvas, whole

SMOOTH = 1.0
"""s of equation 5."""
CLASSIFICATION_WEIGHT = 1.0
"""λ of equation 8."""


Judged = tuple[Tensor, Tensor]
"""Probabilities (n,) and features (n, C) of slices."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One slice with lung in it, and whether it is positive."""

    scan: Scan
    """Cut to the lungs."""
    index: int
    label: int


def samples(scans: Iterable[Scan]) -> Iterator[Sample]:
    """Every slice of which the data says whether it is positive (section 3.1.3); no tips of lungs."""
    for scan in with_lungs(s for s in scans if labels(s) is not None):
        positive, lung = labels(scan), inside(scan)
        if positive is not None:
            cut, shown = scan.to_lungs(), torch.from_numpy(judged_slices(lung.numpy()))
            first = int(lung.flatten(1).any(1).nonzero()[0])
            yield from (Sample(cut, int(z) - first, int(positive[z])) for z in shown.nonzero())


def varied(sample: Sample, canvas: tuple[int, int], rng: np.random.Generator) -> Placed:
    """A slice, changed at random, on a canvas; lesions outside the lungs are left out: nobody sees them."""
    placed = on_canvas(sample.scan, [sample.index], canvas, rng)
    slices, lesion = placed.slices, placed.lesion
    if not sample.scan.cropped:
        slices = augment.dependent(slices, placed.lung, rng)
    if sample.label and not sample.scan.cropped:
        slices, lesion = augment.opacities(slices, lesion, placed.lung, rng)
    slices = augment.intensity(slices, rng, picture=sample.scan.cropped)
    return Placed(slices, placed.lung, lesion * (placed.lung > 0.5))


def labels(scan: Scan) -> Tensor | None:
    """Of each slice (z,): by the lesions drawn in it, else by a diagnosis that holds for every slice.

    None where neither is known: not every slice of an ill patient shows the illness.
    """
    if scan.lesions:
        return torch.stack(scan.lesions).amax(0).flatten(1).gt(0.5).any(1)
    every = len(scan.slices) == 1 or scan.diagnosis is Diagnosis.HEALTHY
    if not every or scan.diagnosis is None:
        return None
    return torch.full((len(scan.slices),), scan.diagnosis is Diagnosis.COVID)


def inside(scan: Scan) -> Tensor:
    """Where lung is (z, h, w)."""
    return torch.zeros_like(scan.slices, dtype=torch.bool) if scan.lung is None else scan.lung > 0.5


class Epochs:
    """Every positive once an epoch and as many negatives, drawn afresh for each epoch (section 3.2.1).

    Where negatives are fewer than positives each is drawn once before any is drawn again. Raises ConfigError
    where one of them is missing.
    """

    def __init__(self, every: Sequence[Sample]) -> None:
        self.positives = [s for s in every if s.label]
        self.negatives = [s for s in every if not s.label]
        if not self.positives or not self.negatives:
            raise ConfigError(
                "not measurable here: dcn learns from slices with and without lesions, and the data has "
                f"{len(self.positives)} with and {len(self.negatives)} without"
            )

    def order(self, seed: int, epoch: int) -> list[Sample]:
        """The samples of one epoch, as they come."""
        rng = np.random.default_rng((seed, epoch))
        drawn = np.resize(rng.permutation(len(self.negatives)), len(self.positives))
        chosen = [*self.positives, *(self.negatives[k] for k in drawn)]
        return [chosen[k] for k in rng.permutation(len(chosen))]

    def batch(self, seed: int, step: int, size: int) -> list[Sample]:
        """The samples of one step: a step depends on nothing but its number."""
        length = 2 * len(self.positives)
        places = [divmod(place, length) for place in range(step * size, (step + 1) * size)]
        orders = {epoch: self.order(seed, epoch) for epoch, _ in places}
        return [orders[epoch][place] for epoch, place in places]


def weighted_dice(logits: Tensor, truth: Tensor) -> Tensor:
    """Equations 5 to 7, mean over slices (n, 1, h, w); those without a lesion drawn weigh nothing."""
    p, weight = logits.sigmoid(), (truth > 0.5).flatten(1).any(1)
    both, either = (p * truth).flatten(1).sum(1), (p + truth).flatten(1).sum(1)
    return (weight * (1 - (2 * both + SMOOTH) / (either + SMOOTH))).mean()


class DcnSlicesTask:
    """Lesions and labels of single slices.

    ``batch`` of them from scans with lesions drawn, ``pictures`` from those with a label only.
    """

    def __init__(
        self,
        scans: Sequence[Scan],
        width: float = 1.0,
        attention: bool = True,
        canvas: tuple[int, int] = (128, 176),
        batch: int = 8,
        pictures: int = 4,
    ) -> None:
        self.network = DualBranchNet(width, attention)
        self.canvas = canvas
        every = list(samples(scans))
        told = [s for s in every if not s.scan.lesions]
        self.parts = [(Epochs([s for s in every if s.scan.lesions]), batch)]
        self.parts += [(Epochs(told), pictures)] if told else []

    def loss(self, rng: Draw) -> Tensor:
        """Equation 8."""
        batch = [s for epochs, size in self.parts for s in epochs.batch(rng.seed, rng.step, size)]
        slices, truth = (torch.cat(part) for part in zip(*(self._slice(s, rng) for s in batch), strict=True))
        seen = forward(self.network, slices)
        label = torch.tensor([float(s.label) for s in batch], device=seen.logits.device)
        segmentation = weighted_dice(seen.lesions.float(), truth.to(label.device))
        return segmentation + CLASSIFICATION_WEIGHT * F.binary_cross_entropy_with_logits(
            seen.logits.float(), label
        )

    def _slice(self, sample: Sample, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """What the network sees and what it shall find."""
        placed = varied(sample, self.canvas, rng)
        return masked(placed.slices, placed.lung > 0.5), placed.lesion

    def score(self, network: Any, scan: Scan) -> float | None:
        """Dice at 2 mm, mean over raters; None where no lesions were drawn or no lungs are found."""
        found = with_lungs([scan]) if scan.lesions else []
        if not found:
            return None
        cut = found[0].to_lungs()
        logits = whole(network, replace(cut, slices=masked(cut.slices, inside(cut))))
        return float(np.mean([dice(logits, lesion) for lesion in cut.lesions]))


class DcnStudyTask:
    """Studies of single slices, drawn at random: no data set at hand has enough studies of either kind.

    A positive study has some share of positive slices, a negative one few or none: of unknown patients the
    slice network will take some slices for positive that are not. A trained slice network, which is not
    changed, judges the slices, varied as it learned from them. They are the same ones, so that the study
    network knows probabilities more certain than those of unknown patients. Nothing can validate it.
    """

    def __init__(
        self,
        scans: Sequence[Scan],
        after: Path,
        width: float = 1.0,
        mapping: bool = True,
        canvas: tuple[int, int] = (128, 176),
        batch: int = 16,
        slices: tuple[int, int] = (20, 120),
        share: tuple[float, float] = (0.2, 1.0),
        mistaken: tuple[float, float] = (0.0, 0.1),
    ) -> None:
        """``after``: weights of the slice network; ``slices``: of a study.

        ``share`` of them is positive in a positive study, ``mistaken`` in a negative one.
        """
        self.network = StudyNet(width, mapping)
        self.scans, self.after, self.canvas = scans, after, canvas
        self.batch, self.slices, self.shares = batch, slices, (mistaken, share)

    def loss(self, rng: np.random.Generator) -> Tensor:
        """Binary cross-entropy (section 2.5)."""
        label = [int(k) for k in rng.permutation(self.batch) % 2]
        logits = torch.stack([self.network(*self._study(k, rng)) for k in label])
        return F.binary_cross_entropy_with_logits(logits, torch.tensor(label).to(logits))

    def _study(self, label: int, rng: np.random.Generator) -> Judged:
        count = int(rng.integers(*self.slices, endpoint=True))
        positive = max(label, round(count * rng.uniform(*self.shares[label])))
        parts = []
        for (p, features), wanted in zip(self._judged, (count - positive, positive), strict=True):
            index = torch.from_numpy(rng.integers(len(p), size=wanted)).to(p.device)
            parts.append((p[index], features[index]))
        return _joined(parts)

    @cached_property
    def _judged(self) -> tuple[Judged, Judged]:
        """All negative, and all positive slices."""
        device = next(self.network.parameters()).device
        network, _ = weights.read(self.after, DualBranchNet)
        network = network.to(device)
        rows: tuple[list[Judged], list[Judged]] = ([], [])
        with torch.inference_mode(), torch.random.fork_rng():
            for number, sample in enumerate(samples(self.scans)):
                torch.manual_seed(number)  # whatever step asks first, the slices are varied alike
                placed = varied(sample, self.canvas, np.random.default_rng(number))
                seen = forward(network, masked(placed.slices, placed.lung > 0.5))
                rows[sample.label].append((seen.logits.float().sigmoid(), seen.features.float()))
        negative, positive = (_joined(row) for row in rows)
        return negative, positive

    def score(self, network: Any, scan: Scan) -> None:  # noqa: ARG002 - the contract's
        """No study is known to be positive or negative but those that were made up."""
        return


def _joined(parts: Sequence[Judged]) -> Judged:
    return torch.cat([p for p, _ in parts]), torch.cat([features for _, features in parts])
