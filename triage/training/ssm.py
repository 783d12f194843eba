"""What the single-shot model learns from (Ter-Sarkisov, sections 2 to 4; Mask R-CNN, He et al. 2017).

One step shows lesions, the next one the classes of slices. From scratch, the classification branch is given
the segmentation branch's weights whenever the mean loss over 100 steps is lower than ever before. With
``pretrain``, so many steps of lesions come first; then the weights are copied once, or shared by one branch.

Departures from the paper, for want of its data: several images a step, since batch normalisation needs them;
a higher learning rate, and far fewer steps; two classes where nobody has slices of other pneumonia, COVID-19
and all that is not. Slices are masked by the lungs and varied as for ``dcn``. Weight decay is AdamW's, apart
from the gradient, as of all our networks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from triage.errors import ConfigError
from triage.models import boxes as box
from triage.models.preprocessing import SPACING_MM, bounding_box, pad
from triage.models.ssm import Looked, SingleShot, lesion_probability
from triage.models.ssm_networks import BINS, MASK, MASK_BINS, PLAIN, SCALED, Seen, SsmNet
from triage.training.baselines import with_lungs
from triage.training.cases import Case, Diagnosis
from triage.training.dcn import Sample, inside, samples, varied
from triage.training.instances import LEAST_MM2, parts
from triage.training.paper import SSM_ORDER
from triage.training.scans import Scan
from triage.training.tasks import Draw, dice, forward, mixed

LEAST_PIXELS = round(LEAST_MM2 / SPACING_MM**2)
"""Of canonical slices, that an instance has: 12 stand for 100 of the paper's."""
RPN_OVERLAP, ROI_OVERLAP = (0.3, 0.7), (0.5, 0.5)
"""IoU with a lesion below which a box is background, and from which on it is the lesion."""
RPN_BATCH, ROI_BATCH = (256, 0.5), (128, 0.25)
"""Boxes of an image that count, and the share of lesions that is not exceeded (Ren et al., He et al.)."""
BACKGROUND, NEITHER = -1, -2
SMOOTH_BETA = 1 / 9


@dataclass(frozen=True, slots=True)
class Instances:
    """The lesions of one slice (h, w), one by one."""

    boxes: Tensor
    """(g, 4) in pixels of the slice."""
    masks: Tensor
    """(g, h, w), 0 or 1."""


def instances(lesion: Tensor) -> Instances:
    """Connected parts of a lesion mask (h, w) of at least ``LEAST_PIXELS`` (section 4)."""
    masks = parts((lesion > 0.5).numpy(), LEAST_PIXELS)
    places = [bounding_box(mask[None])[1:] for mask in masks]
    corners = [(y.start, x.start, y.stop, x.stop) for y, x in places]
    stacked = np.stack(masks) if masks else np.zeros((0, *lesion.shape))
    return Instances(
        torch.tensor(corners, dtype=torch.float32).reshape(-1, 4), torch.from_numpy(stacked).float()
    )


def matched(boxes: Tensor, truth: Tensor, overlap: tuple[float, float], best_too: bool = False) -> Tensor:
    """Which of the lesions (g, 4) each of the boxes (n, 4) is, else ``BACKGROUND`` or ``NEITHER``: (n,).

    With ``best_too`` no lesion that a box touches is without boxes: those that overlap it most are it.
    """
    if not len(truth):
        return torch.full((len(boxes),), BACKGROUND, device=boxes.device)
    shared = box.iou(truth, boxes)
    most, which = shared.max(0)
    low, high = overlap
    found = which.masked_fill(most < high, NEITHER).masked_fill(most < low, BACKGROUND)
    if best_too:
        best = ((shared == shared.amax(1, keepdim=True)) & (shared > 0)).any(0)
        found = torch.where(best, which, found)
    return found


def chosen(found: Tensor, batch: tuple[int, float]) -> tuple[Tensor, Tensor]:
    """Indices of boxes that are lesions, and of others that are background, drawn at random."""
    count, share = batch
    lesions, others = ((found >= 0).nonzero()[:, 0], (found == BACKGROUND).nonzero()[:, 0])
    lesions = lesions[_shuffled(lesions)[: int(count * share)]]
    return lesions, others[_shuffled(others)[: count - len(lesions)]]


def _shuffled(index: Tensor) -> Tensor:
    return torch.randperm(len(index)).to(index.device)


def rpn_loss(logits: Tensor, codes: Tensor, anchors: Tensor, truth: Tensor) -> Tensor:
    """Equation 1, L_RPN, of one slice: each of its anchors (n, 4), its lesions (g, 4)."""
    found = matched(anchors, truth, RPN_OVERLAP, best_too=True)
    lesions, others = chosen(found, RPN_BATCH)
    every = torch.cat([lesions, others])
    objects = F.binary_cross_entropy_with_logits(logits[every], (found[every] >= 0).float())
    wanted = box.encode(truth[found[lesions]], anchors[lesions], PLAIN)
    return objects + (codes[lesions] - wanted).abs().sum() / len(every)


def roi_loss(logits: Tensor, codes: Tensor, boxes: Tensor, which: Tensor, truth: Tensor) -> Tensor:
    """Equation 1, L_RoI, of boxes (n, 4) of one slice that are the lesion ``which`` (n,) or background."""
    is_lesion = which >= 0
    classes = F.cross_entropy(logits, is_lesion.long())
    wanted = box.encode(truth[which[is_lesion]], boxes[is_lesion], SCALED)
    moved = F.smooth_l1_loss(codes[is_lesion], wanted, reduction="sum", beta=SMOOTH_BETA)
    return classes + moved / len(boxes)


def mask_loss(logits: Tensor, boxes: Tensor, masks: Tensor, which: Tensor) -> Tensor:
    """Equation 1, L_Mask: logits (n, MASK, MASK) in boxes (n, 4) of lesions with masks (g, h, w)."""
    if not len(boxes):
        return logits.sum()
    seen = box.roi_align(masks, boxes, MASK)
    wanted = seen[torch.arange(len(boxes), device=boxes.device), which]
    return F.binary_cross_entropy_with_logits(logits, wanted)


class SsmTask:
    """Lesions of slices with lesions drawn, and the classes of slices, in turn; ``batch`` images a step."""

    def __init__(
        self,
        scans: Sequence[Scan],
        encoder: str,
        blocks: int,
        branches: int,
        classes: int,
        width: float,
        zoom: int,
        canvas: tuple[int, int] = (128, 176),
        batch: int = 2,
        pretrain: int = 0,
    ) -> None:
        self.network = SsmNet(encoder, blocks, branches, classes, width, zoom)
        self.canvas, self.batch, self.pretrain = canvas, batch, pretrain
        every = list(samples(scans))
        self.lesions = by_patient(s for s in every if s.label and s.scan.lesions)
        self.classes = by_class(every, classes)
        if not self.lesions:
            raise ConfigError("not measurable here: ssm learns from lesions drawn in slices with lungs")

    def loss(self, rng: Draw) -> Tensor:
        """Equation 1 or 2, in turn; see the module."""
        step = rng.step - self.pretrain
        classes = step >= 0 and step % 2 == 1
        self.network.requires_grad_(False)
        for module in self.network.learning(classes):
            module.requires_grad_(True)
        if classes:
            return self._classes(rng)
        copied, loss = self.network.classification, self._segmentation(rng)
        if copied and not self.pretrain:
            copied.follow(self.network.segmentation, loss.detach())
        elif copied and step == 0:
            copied.copy(self.network.segmentation)
        return loss

    def _classes(self, rng: Draw) -> Tensor:
        """Equation 2: as many images of each class as of another, from any kind of data that has all."""
        count = self.network.classes
        labels = (rng.permutation(self.batch) + rng.integers(count)) % count
        kinds = [self.classes[rng.choice(list(self.classes))] for _ in labels]
        drawn = [_any(kind[int(label)], rng) for kind, label in zip(kinds, labels, strict=True)]
        slices = torch.cat([self._slice(sample, rng)[0] for sample in drawn])
        device = next(self.network.parameters()).device
        with torch.autocast(device.type, torch.bfloat16, enabled=mixed(device, 4)):
            logits = self.network.classify(slices.to(device))
        wanted = F.one_hot(torch.from_numpy(labels), count).to(logits)
        return F.binary_cross_entropy_with_logits(logits, wanted)

    def _segmentation(self, rng: Draw) -> Tensor:
        """Equation 1: patients alike within a kind of data, and kinds alike."""
        drawn = [
            _any(_any(list(_any(list(self.lesions.values()), rng).values()), rng), rng)
            for _ in range(self.batch)
        ]
        slices, lesions = zip(*(self._slice(sample, rng) for sample in drawn), strict=True)
        device = next(self.network.parameters()).device
        found = [instances(lesion[0, 0]) for lesion in lesions]
        with torch.autocast(device.type, torch.bfloat16, enabled=mixed(device, 4)):
            return self._of_lesions(torch.cat(slices).to(device), found)

    def _of_lesions(self, slices: Tensor, found: Sequence[Instances]) -> Tensor:
        network = self.network
        features, size = network.features(slices)
        logits, codes = network.rpn(features)
        anchors = network.anchors(features)
        proposed = network.proposals(logits, codes, anchors, size)
        losses = []
        for k, (lesions, proposals) in enumerate(zip(found, proposed, strict=True)):
            truth = lesions.boxes.to(slices.device) * network.zoom
            losses.append(rpn_loss(logits[k], codes[k], anchors, truth))
            losses.append(self._of_boxes(features[k], torch.cat([truth, proposals]), truth, lesions))
        return torch.stack(losses).sum() / len(found)

    def _of_boxes(self, features: Tensor, boxes: Tensor, truth: Tensor, lesions: Instances) -> Tensor:
        """L_RoI and L_Mask of one slice, of some of these boxes."""
        network, which = self.network, matched(boxes, truth, ROI_OVERLAP)
        positive, negative = chosen(which, ROI_BATCH)
        every = torch.cat([positive, negative])
        logits, codes = network.segmentation(network.aligned(features, boxes[every], BINS))
        masks = network.masks(network.aligned(features, boxes[positive], MASK_BINS)).float()
        drawn = lesions.masks.to(boxes.device)
        return roi_loss(logits, codes, boxes[every], which[every], truth) + mask_loss(
            masks, boxes[positive] / network.zoom, drawn, which[positive]
        )

    def _slice(self, sample: Sample, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """What the network sees and what it shall find."""
        placed = varied(sample, self.canvas, rng)
        return placed.slices * (placed.lung > 0.5), placed.lesion

    def score(self, network: Any, scan: Scan) -> float | None:
        """Dice at 2 mm, mean over raters; None where no lesions were drawn or no lungs are found."""
        found = with_lungs([scan]) if scan.lesions else []
        if not found:
            return None
        cut = found[0].to_lungs()
        masked = cut.slices * inside(cut)
        told = [forward(network, pad(some[:, None], network.stride)) for some in masked.split(16)]
        seen = Seen(*(torch.cat(part).float().cpu() for part in zip(*told, strict=True)))
        probability = lesion_probability(Looked(torch.arange(len(masked)), seen), tuple(masked.shape))
        return float(np.mean([dice(probability - 0.5, lesion) for lesion in cut.lesions]))


def by_patient(drawn: Iterable[Sample]) -> dict[str, dict[str, list[Sample]]]:
    """Kind of data → patient → samples."""
    kinds: dict[str, dict[str, list[Sample]]] = {}
    for sample in drawn:
        kinds.setdefault(sample.scan.data, defaultdict(list))[sample.scan.patient].append(sample)
    return kinds


def by_class(every: Iterable[Sample], classes: int) -> Mapping[str, list[list[Sample]]]:
    """Kind of data → the samples of each class; only kinds that have all.

    A kind that lacks one would be told by its looks. Raises ConfigError where none is left.
    """
    kinds: dict[str, list[list[Sample]]] = defaultdict(lambda: [[] for _ in range(classes)])
    for sample in every:
        kinds[sample.scan.data][class_of(sample, classes)].append(sample)
    complete = {kind: each for kind, each in kinds.items() if all(each)}
    if not complete:
        had = ", ".join(f"{kind} {'/'.join(str(len(one)) for one in each)}" for kind, each in kinds.items())
        raise ConfigError(
            f"not measurable here: ssm learns {classes} classes of slices from data that shows all of them; "
            f"slices of each: {had or 'none'}; covidxct has three"
        )
    return complete


def measured(model: SingleShot, case: Case) -> dict[str, float]:
    """Of a labelled picture: its class as ``SSM_ORDER`` numbers them, as ``Score.own`` has it."""
    scores = model.class_scores(case.volume).mean(0)
    return {"class": float(np.linspace(0, 2, len(scores))[scores.argmax()])}


def class_of(sample: Sample, classes: int) -> int:
    """0 for a slice without lesions, the last for COVID-19, between them common pneumonia.

    Of two classes the first is all that is not COVID-19.
    """
    if classes == 2:
        return sample.label
    diagnosis = sample.scan.diagnosis
    if sample.scan.lesions or diagnosis is None:
        return SSM_ORDER[Diagnosis.COVID] if sample.label else SSM_ORDER[Diagnosis.HEALTHY]
    return SSM_ORDER[diagnosis]


def _any(choices: Sequence[Any], rng: np.random.Generator) -> Any:
    return choices[int(rng.integers(len(choices)))]
