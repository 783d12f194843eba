"""The networks of the multitask system (Goncharov et al., sections 2.1.1, 2.3 and 4.2).

    slices (N, C, H, W) in [0, 1] ── Backbone ── features (N, widths[0], H, W)
                                                  ├── residual block, 1×1 ── lesion logits, slice by slice
                                                  └── pyramid max pooling ── 1024 ── 1: one logit a volume

H and W are multiples of ``stride``: preprocessing pads. C is 1 as in the paper, or 3: the slice between
two neighbours, without which the blurred dome of the diaphragm looks like ground glass.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PAPER_WIDTHS = (8, 16, 32, 64, 128, 256, 512)
PAPER_HIDDEN = 1024
BINS = 8
"""Finest level of the pyramid, per axis; the coarser ones have 4, 2 and 1 bins."""
PYRAMID = BINS**3 + 4**3 + 2**3 + 1


class ResidualBlock(nn.Module):
    """Pre-activation residual block: normalise, activate, convolve, twice (He et al., 2016b)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.norm1(x)))
        y = self.conv2(F.relu(self.norm2(y)))
        result: Tensor = y + self.shortcut(x)
        return result


def pixel_head(inputs: int) -> nn.Sequential:
    """Pre-activation 1×1 convolution to one logit a pixel."""
    return nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU(), nn.Conv2d(inputs, 1, 1))


def resized(values: Tensor, size: Sequence[int]) -> Tensor:
    """Values (N, C, h, w) at another size in plane, bilinear; the same where it is theirs."""
    same = tuple(values.shape[-2:]) == tuple(size)
    return values if same else F.interpolate(values, tuple(size), mode="bilinear", align_corners=False)


def stride(widths: Sequence[int]) -> int:
    """What height and width must be a multiple of: each level below the first halves them."""
    return 1 << (len(widths) - 1)


class Backbone(nn.Module):
    """2D U-Net of residual blocks: max-pool down, bilinear up, additive skips; (N, C, H, W) → features."""

    def __init__(self, widths: Sequence[int], inputs: int = 1) -> None:
        super().__init__()
        pairs = list(pairwise(widths))
        self.stem = nn.Conv2d(inputs, widths[0], 3, padding=1)
        self.down = nn.ModuleList([ResidualBlock(widths[0], widths[0])])
        self.down.extend(ResidualBlock(a, b) for a, b in pairs)
        self.narrow = nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in pairs)
        self.up = nn.ModuleList(ResidualBlock(a, a) for a, _ in pairs)

    def forward(self, slices: Tensor) -> Tensor:
        x = self.down[0](self.stem(slices))
        skips = []
        for block in self.down[1:]:
            skips.append(x)
            x = block(F.max_pool2d(x, 2))
        for skip, narrow, block in zip(
            reversed(skips), reversed(self.narrow), reversed(self.up), strict=True
        ):
            x = F.interpolate(narrow(x), scale_factor=2, mode="bilinear", align_corners=False)
            x = block(x + skip)
        features: Tensor = x
        return features


class LungsNet(nn.Module):
    """Both lungs as one mask: slices (N, C, H, W) → logits (N, 1, H, W)."""

    def __init__(self, widths: Sequence[int] = PAPER_WIDTHS, inputs: int = 1) -> None:
        super().__init__()
        self.backbone, self.inputs = Backbone(widths, inputs), inputs
        self.stride = stride(widths)
        self.head = pixel_head(widths[0])

    def forward(self, slices: Tensor) -> Tensor:
        logits: Tensor = self.head(self.backbone(slices))
        return logits


class MultitaskNet(nn.Module):
    """Lesions slice by slice and one answer a volume, from shared features."""

    def __init__(
        self, widths: Sequence[int] = PAPER_WIDTHS, hidden: int = PAPER_HIDDEN, inputs: int = 1
    ) -> None:
        super().__init__()
        self.backbone, self.inputs = Backbone(widths, inputs), inputs
        self.stride = stride(widths)
        self.lesions = nn.Sequential(ResidualBlock(widths[0], widths[0]), pixel_head(widths[0]))
        self.classifier = nn.Sequential(
            nn.Dropout(),
            nn.Linear(PYRAMID * widths[0], hidden),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(hidden, 1),
        )

    def forward(self, slices: Tensor) -> tuple[Tensor, Tensor]:
        """Slices (N, C, H, W) → lesion logits (N, 1, H, W), and features pooled in plane (N, C, 8, 8).

        Maxima over bins are separable, so a long volume goes through in batches: only the pooled
        features of its slices are kept for ``classify``.
        """
        features = self.backbone(slices)
        return self.lesions(features), F.adaptive_max_pool2d(features, BINS)

    def classify(self, pooled: Tensor) -> Tensor:
        """Pooled features of one volume's slices in order (Z, C, 8, 8) → its logit ()."""
        logit: Tensor = self.classifier(pyramid(pooled)).squeeze()
        return logit


def pyramid(pooled: Tensor) -> Tensor:
    """(Z, C, 8, 8) → (585·C,): maxima over 8³, 4³, 2³ and 1 bins of the volume.

    A bin of adaptive pooling is exactly the union of the two finer bins it covers.
    """
    level = F.adaptive_max_pool3d(pooled.movedim(0, 1), (BINS, BINS, BINS))
    levels = [level.flatten()]
    while level.shape[-1] > 1:
        level = F.max_pool3d(level, 2)
        levels.append(level.flatten())
    return torch.cat(levels)
