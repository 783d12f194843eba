"""The network of the single-shot model (Ter-Sarkisov, section 3, figures 2 and 3).

    slices (N, 1, H, W) ── truncated ResNet ── one FPN level ──┬── RPN: 256 proposals a slice
                                                               │        │
                     segmentation branch: class, box ── RoIAlign 7 × 7 ─┤
                              │                                │        │
                         mask head ── RoIAlign 14 × 14 ────────┘        │
                     classification branch: class, encoded box ─ RoIAlign 7 × 7
                              │
                     128 ranked rows (encoded box, score) ── module S ── a logit a class

Boxes are those of ``boxes``. Numbers of channels are the paper's times ``width``; where it gives none they
are what its table 1 adds up to: 128 units a branch, a mask head of 128 channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from triage.models import boxes as box
from triage.models.encoders import RESNET_WIDTHS, check_known, of_resnet, resnet, scaled

LAYERS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3)}
"""Basic blocks of the four stages (He et al. 2016a, table 1); the last one or two are left out."""
FEATURES = 256
UNITS = 128
"""Of both layers of a RoI branch, and channels of the mask head."""
SIZES = (2, 4, 8, 16, 32)
RATIOS = (0.1, 0.25, 0.5, 1.0, 1.5, 2.0)
"""Of an anchor's height to its width; the paper says how many there are, not which."""
ANCHORS = len(SIZES) * len(RATIOS)
BEFORE, PROPOSALS = 512, 256
"""Best boxes of the RPN before and after overlapping ones are removed."""
OVERLAP = 0.75
"""IoU above which proposals, and rows for module S, are removed."""
SAME_LESION = 0.5
"""IoU above which two detections are one (He et al. 2017). At 0.75, the paper's for all that overlaps, one
lesion would often be shown twice."""
FAINTEST = 0.05
"""Score below which nothing is detected."""
DETECTIONS = 32
"""At most so many lesions a slice."""
BINS, MASK_BINS = 7, 14
MASK = 2 * MASK_BINS
"""Height and width of a mask in its box."""
PLAIN, SCALED = (1.0, 1.0), (10.0, 5.0)
"""Weights of encoded boxes, for the RPN and for RoI branches (Girshick 2015)."""
RANKS = 128
S_UNITS = 512
WINDOW = 100
"""Steps of the running mean of the segmentation's loss."""


class RegionProposals(nn.Module):
    """RPN: is there an object at this anchor, and where exactly is it?"""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.look = nn.Conv2d(channels, channels, 3, padding=1)
        self.objects = nn.Conv2d(channels, ANCHORS, 1)
        self.codes = nn.Conv2d(channels, 4 * ANCHORS, 1)
        for layer in (self.look, self.objects, self.codes):
            nn.init.normal_(layer.weight, std=0.01)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(N, C, h, w) → a logit (N, h · w · ANCHORS) and a code (…, 4) for each anchor."""
        seen = F.relu(self.look(features))
        logits, codes = (layer(seen).float().permute(0, 2, 3, 1) for layer in (self.objects, self.codes))
        return logits.flatten(1), codes.reshape(len(codes), -1, 4)


class RoiBranch(nn.Module):
    """Background or lesion, and the lesion's box, of aligned features."""

    def __init__(self, channels: int, units: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(),
            nn.Linear(channels * BINS * BINS, units),
            nn.ReLU(),
            nn.Linear(units, units),
            nn.ReLU(),
        )
        self.classes = nn.Linear(units, 2)
        self.codes = nn.Linear(units, 8)

    def forward(self, aligned: Tensor) -> tuple[Tensor, Tensor]:
        """(n, C, BINS, BINS) → logits (n, 2) and the code of the lesion's box (n, 4)."""
        seen = self.layers(aligned)
        with torch.autocast(seen.device.type, enabled=False):  # what is ranked is worth all its digits
            return self.classes(seen.float()), self.codes(seen.float())[:, 4:]


class CopiedBranch(RoiBranch):
    """The parallel branch: it learns nothing itself, but is given the weights of the one that does.

    It keeps the losses that this is decided by, so that a training that was stopped goes on alike.
    """

    losses: Tensor
    lowest: Tensor
    seen: Tensor

    def __init__(self, channels: int, units: int) -> None:
        super().__init__(channels, units)
        self.requires_grad_(False)
        self.register_buffer("losses", torch.zeros(WINDOW))
        self.register_buffer("lowest", torch.tensor(torch.finfo(torch.float32).max))
        self.register_buffer("seen", torch.tensor(0))

    @torch.no_grad()
    def copy(self, other: RoiBranch) -> None:
        """Take over its weights."""
        for mine, theirs in zip(self.parameters(), other.parameters(), strict=True):
            mine.copy_(theirs)

    @torch.no_grad()
    def follow(self, other: RoiBranch, loss: Tensor) -> bool:
        """Copy it where the mean of its last ``WINDOW`` losses has never been lower; says whether it did.

        Section 3.3 compares the losses of single images: the lowest is soon a lucky one that none reaches.
        """
        self.losses[int(self.seen) % WINDOW] = loss
        self.seen += 1
        mean = self.losses.sum() / self.seen.clamp(max=WINDOW)
        better = bool(mean < self.lowest)
        if better:
            self.lowest.copy_(mean)
            self.copy(other)
        return better


class MaskHead(nn.Module):
    """Lesion logits (n, MASK, MASK) in boxes, of aligned features (n, C, MASK_BINS, MASK_BINS)."""

    def __init__(self, channels: int, units: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, units, 3, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(units, units, 2, stride=2),
            nn.ReLU(),
            nn.Conv2d(units, 2, 1),
        )

    def forward(self, aligned: Tensor) -> Tensor:
        logits: Tensor = self.layers(aligned)[:, 1]
        return logits


class ModuleS(nn.Module):
    """Ranked rows (N, RANKS, 5) → a logit for each class of slice (N, classes)."""

    def __init__(self, units: int, classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(),
            nn.Linear(5 * RANKS, units),
            nn.ReLU(),
            nn.Linear(units, units),
            nn.ReLU(),
            nn.Linear(units, classes),
        )

    def forward(self, ranked: Tensor) -> Tensor:
        with torch.autocast(ranked.device.type, enabled=False):
            logits: Tensor = self.layers(ranked.float())
            return logits


def balanced(count: int, wanted: int = RANKS) -> Tensor:
    """Which of so many ranks make a batch of fixed size: half of it the highest, half the lowest.

    Where there are fewer, each is repeated as often as another, but for one time, and the order is kept.
    """
    if count < wanted:
        return torch.arange(wanted) * count // wanted
    high = wanted // 2
    return torch.cat([torch.arange(wanted - high), torch.arange(count - high, count)])


def ranked(logits: Tensor, codes: Tensor, boxes: Tensor) -> Tensor:
    """The batch that module S is given (section 3.3, figure 3b): rows (RANKS, 5) of encoded box and score.

    Of a slice's proposals with their logits (n, 2) and codes (n, 4), which are ``boxes`` when decoded.
    """
    scores = logits.softmax(1)[:, 1]
    kept = box.nms(boxes.detach(), scores.detach(), OVERLAP)
    return torch.cat([codes, scores[:, None]], dim=1)[kept[balanced(len(kept)).to(kept.device)]]


class Seen(NamedTuple):
    """What the network says of slices; ``DETECTIONS`` a slice, those that are not there with a score of 0."""

    classes: Tensor
    """Logits (N, classes), COVID-19 the last."""
    scores: Tensor
    """(N, DETECTIONS) in [0, 1], descending."""
    boxes: Tensor
    """(N, DETECTIONS, 4)."""
    masks: Tensor
    """Lesion probability in the boxes (N, DETECTIONS, MASK, MASK)."""


class SsmNet(nn.Module):
    """The single-shot model: ``blocks`` of the ``encoder``, ``classes`` of slices.

    With two ``branches`` the classification has its own (SSM²), with one it shares the segmentation's. Slices
    are enlarged ``zoom`` times. Raises ConfigError.
    """

    inputs = 1
    stride = 8

    def __init__(
        self,
        encoder: str = "resnet18",
        blocks: int = 3,
        branches: int = 2,
        classes: int = 3,
        width: float = 1.0,
        zoom: int = 3,
    ) -> None:
        super().__init__()
        check_known("encoder", encoder, LAYERS)
        for what, number, known in (
            ("blocks", blocks, (2, 3)), ("branches", branches, (1, 2)), ("classes", classes, (2, 3)),
            ("zoom", zoom, (1, 2, 3, 4)),
        ):  # fmt: skip
            check_known(what, number, known)
        self.classes, self.zoom = classes, zoom
        widths = [scaled(channels, width) for channels in RESNET_WIDTHS]
        channels, units = scaled(FEATURES, width), scaled(UNITS, width)
        parts = of_resnet(resnet("basic", LAYERS[encoder], widths, 1, feed_forward=False))
        self.cell = 2 << blocks
        self.backbone = nn.Sequential(
            *parts[: blocks + 1],
            nn.Conv2d(widths[blocks - 1], channels, 1),
            nn.Conv2d(channels, channels, 3, padding=1),
        )
        self.rpn = RegionProposals(channels)
        self.segmentation = RoiBranch(channels, units)
        self.classification = CopiedBranch(channels, units) if branches == 2 else None
        self.masks = MaskHead(channels, units)
        self.s = ModuleS(scaled(S_UNITS, width), classes)

    def forward(self, slices: Tensor) -> Seen:
        """Slices (N, 1, H, W) in [0, 1], masked by the lungs."""
        features, proposals, size, certain = self.propose(slices)
        rows, found = [], []
        for one, boxes in zip(features, proposals, strict=True):
            aligned = self.aligned(one, boxes, BINS)
            logits, codes = self.segmentation(aligned)
            found.append(self._detected(one, logits, box.cut(box.decode(codes, boxes, SCALED), size)))
            rows.append(self._ranked(aligned, boxes, size))
        scores, places, masks = (torch.stack(part) for part in zip(*found, strict=True))
        return Seen(self.s(torch.stack(rows)) + certain, scores, places / self.zoom, masks)

    def classify(self, slices: Tensor) -> Tensor:
        """The logits of the classes alone (N, classes)."""
        features, proposals, size, _ = self.propose(slices)
        pairs = zip(features, proposals, strict=True)
        rows = [self._ranked(self.aligned(one, boxes, BINS), boxes, size) for one, boxes in pairs]
        logits: Tensor = self.s(torch.stack(rows))
        return logits

    def propose(self, slices: Tensor) -> tuple[Tensor, list[Tensor], tuple[int, int], Tensor]:
        """Features, proposals (n, 4) of each slice, the enlarged size that these are in, and zeros (N, 1).

        In place of a zero stands no number where the RPN gave none: boxes are chosen in spite of that.
        """
        features, size = self.features(slices)
        logits, codes = self.rpn(features)
        certain = (0 * logits).sum(1, keepdim=True) + (0 * codes).sum((1, 2))[:, None]
        return features, list(self.proposals(logits, codes, self.anchors(features), size)), size, certain

    def features(self, slices: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Slices (N, 1, H, W) → (N, C, h, w), and the size to which they were enlarged."""
        large = F.interpolate(slices, scale_factor=self.zoom, mode="bilinear")
        return self.backbone(large), (large.shape[2], large.shape[3])

    def anchors(self, features: Tensor) -> Tensor:
        """Of features (N, C, h, w): (h · w · ANCHORS, 4)."""
        return box.anchors(features.shape[2:], self.cell, SIZES, RATIOS).to(features.device)

    @torch.no_grad()
    def proposals(
        self, logits: Tensor, codes: Tensor, anchors: Tensor, size: tuple[int, int]
    ) -> Iterator[Tensor]:
        """Boxes (n, 4) of each slice, at least one."""
        for scores, code in zip(logits, codes, strict=True):
            best = scores.topk(min(BEFORE, len(scores)))
            boxes = box.cut(box.decode(code[best.indices], anchors[best.indices], PLAIN), size)
            yield boxes[box.nms(boxes, best.values, OVERLAP)[:PROPOSALS]]

    def aligned(self, features: Tensor, boxes: Tensor, bins: int) -> Tensor:
        """Features (C, h, w) of one slice in boxes (n, 4): (n, C, bins, bins)."""
        return box.roi_align(features, box.in_cells(boxes, self.cell), bins)

    def learning(self, classes: bool) -> list[nn.Module]:
        """What is updated by images that show the class of a slice, or else by those that show lesions.

        Section 4, rule 2: module S and the whole backbone; all but S and the copied branch (section 3.2).
        """
        return [self.backbone, self.s] if classes else [
            self.backbone, self.rpn, self.segmentation, self.masks,
        ]  # fmt: skip

    def _ranked(self, aligned: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
        logits, codes = (self.classification or self.segmentation)(aligned)
        return ranked(logits, codes, box.cut(box.decode(codes, boxes, SCALED), size))

    def _detected(self, features: Tensor, logits: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The lesions of one slice: scores, boxes and masks."""
        scores = logits.softmax(1)[:, 1]
        kept = box.nms(boxes, scores, SAME_LESION)
        kept = kept[~(scores[kept] <= FAINTEST)][:DETECTIONS]  # what is no number stays, and is noticed
        masks = self.masks(self.aligned(features, boxes[kept], MASK_BINS)).float().sigmoid()
        return _filled(scores[kept]), _filled(boxes[kept]), _filled(masks)


def _filled(values: Tensor) -> Tensor:
    """(n, …) → (DETECTIONS, …), zeros behind."""
    filled = values.new_zeros(DETECTIONS, *values.shape[1:])
    filled[: len(values)] = values
    return filled
