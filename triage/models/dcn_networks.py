"""The networks of the dual-branch system (Gao et al., sections 2.3 and 2.4, figure 1).

    slices (N, 1, H, W) ── U-Net ─────────────────────────────────────────── lesion logits (N, 1, H, W)
         │                  decoder H/4    decoder H/4    decoder H/8    bottleneck H/16
         │                      │ no gradient  │              │              │
         └── ResNet-50 stem ── join ─ stage ─ join ─ stage ─ join ─ stage ─ join ─ stage ── a logit a slice

    all slices of a study ── StudyNet ── one logit

H and W are multiples of ``DualBranchNet.stride``: preprocessing pads. Widths are the paper's times ``width``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from triage.models.networks import resized
from triage.models.resnet50 import EXPANSION, slice_features
from triage.models.resnet50 import PAPER_WIDTHS as RESNET_WIDTHS

UNET_WIDTHS = (64, 128, 256, 512, 1024)
CURVE = 100
"""Values that a study's slices are mapped to, however many there are (section 2.4)."""
HIDDEN = (256, 128)
LEAK = 0.1
"""Slope of the study network's units below 0. With none there, all studies below those that it learned from
are alike."""


class LesionAttention(nn.Module):
    """Where the classification branch shall look (section 2.3.2, equations 1 to 3).

    ``f_c`` and ``f_s`` are the channels of the classification's and the segmentation's features; F_int, which
    the paper does not give, is half of ``f_c``.
    """

    def __init__(self, f_c: int, f_s: int) -> None:
        super().__init__()
        f_int = f_c // 2
        self.of_classes = nn.Conv2d(f_c, f_int, 1)
        self.of_lesions = nn.Conv2d(f_s, f_int, 1)
        self.weigh = nn.Conv2d(2 * f_int, 1, 1)
        self.blend = nn.Sequential(
            nn.Conv2d(f_c + f_s, f_c, 1),
            nn.Conv2d(f_c, f_c, 1, bias=False),
            nn.BatchNorm2d(f_c),
            nn.ReLU(),
        )

    def forward(self, x_c: Tensor, x_s: Tensor) -> tuple[Tensor, Tensor]:
        """Features (N, f_c, h, w) and (N, f_s, ·, ·) → features (N, f_c, h, w) and the map (N, 1, h, w).

        Each map runs from 0 to 1: it tells where in its slice the network looked, not how much it saw.
        """
        x_s = resized(x_s, x_c.shape[-2:])
        both = torch.cat([self.of_classes(x_c), self.of_lesions(x_s)], dim=1)
        alpha = normalised(self.weigh(F.relu(both)).float().sigmoid())
        return self.blend(torch.cat([alpha * x_c, x_s], dim=1)), alpha


class Convolution(nn.Module):
    """What stands in the attention module's place in the ablation (section 3.4.4): a 1×1 convolution."""

    def __init__(self, f_c: int, f_s: int) -> None:
        super().__init__()
        self.blend = nn.Conv2d(f_c + f_s, f_c, 1)

    def forward(self, x_c: Tensor, x_s: Tensor) -> tuple[Tensor, None]:
        """As ``LesionAttention``, without a map."""
        return self.blend(torch.cat([x_c, resized(x_s, x_c.shape[-2:])], dim=1)), None


def normalised(alpha: Tensor) -> Tensor:
    """Maps (N, 1, h, w), each stretched to [0, 1]; one without any difference is 0 everywhere."""
    low, high = alpha.amin((2, 3), keepdim=True), alpha.amax((2, 3), keepdim=True)
    return (alpha - low) / (high - low).clamp(min=1e-6)


def _block(inputs: int, outputs: int) -> nn.Sequential:
    """Convolution, batch normalisation, ReLU, convolution (section 2.3.1)."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1),
    )


class UNet(nn.Module):
    """The segmentation branch: four 2×2 max-poolings down, four 2×2 up-samplings, concatenated skips."""

    def __init__(self, widths: Sequence[int] = UNET_WIDTHS) -> None:
        super().__init__()
        pairs = list(pairwise(widths))
        self.down = nn.ModuleList([_block(1, widths[0]), *(_block(a, b) for a, b in pairs)])
        self.widen = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, stride=2) for a, b in pairs)
        self.up = nn.ModuleList(_block(2 * a, a) for a, _ in pairs)
        self.head = nn.Conv2d(widths[0], 1, 1)

    def forward(self, slices: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Slices (N, 1, H, W) → lesion logits (N, 1, H, W), and features from the bottleneck up to H."""
        skips = [self.down[0](slices)]
        for block in self.down[1:]:
            skips.append(block(F.max_pool2d(skips[-1], 2)))
        features = [skips.pop()]
        for widen, block in zip(reversed(self.widen), reversed(self.up), strict=True):
            features.append(block(torch.cat([skips.pop(), widen(features[-1])], dim=1)))
        return self.head(features[-1]), features


class Seen(NamedTuple):
    """What the dual-branch network says of slices."""

    lesions: Tensor
    """Logits (N, 1, H, W)."""
    logits: Tensor
    """Of a positive slice, (N,)."""
    attention: list[Tensor]
    """Maps (N, 1, H/s, W/s) in [0, 1], s as in ``DualBranchNet.scales``; none without attention."""
    features: Tensor
    """Of the last residual stage, averaged in plane, (N, C)."""


class DualBranchNet(nn.Module):
    """Lesions and one answer a slice; neither branch's loss reaches the other branch."""

    inputs = 1
    stride = 16

    def __init__(self, width: float = 1.0, attention: bool = True) -> None:
        super().__init__()
        unet, resnet = ([round(width * w) for w in widths] for widths in (UNET_WIDTHS, RESNET_WIDTHS))
        self.scales = (4, 4, 8, 16) if attention else ()
        self.segmentation = UNet(unet)
        self.classification = slice_features(resnet)
        join = LesionAttention if attention else Convolution
        self.joins = nn.ModuleList(
            join(f_c, f_s)
            for f_c, f_s in zip(
                (resnet[0], *(EXPANSION * w for w in resnet[:3])), (unet[2], *unet[2:]), strict=True
            )
        )
        self.classifier = nn.Linear(EXPANSION * resnet[3], 1)

    def forward(self, slices: Tensor) -> Seen:
        """Slices (N, 1, H, W) in [0, 1], masked by the lungs."""
        lesions, (bottleneck, eighth, quarter, *_) = self.segmentation(slices)
        resnet, maps = self.classification, []
        x = resnet.maxpool(resnet.act(resnet.bn1(resnet.conv1(slices))))
        stages = (resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4)
        for join, x_s, stage in zip(self.joins, (quarter, quarter, eighth, bottleneck), stages, strict=True):
            x, alpha = join(x, x_s.detach())
            x = stage(x)
            maps += [] if alpha is None else [alpha]
        with torch.autocast(x.device.type, enabled=False):  # one answer a slice: worth all its digits
            features = x.float().mean((2, 3))
            return Seen(lesions, self.classifier(features)[:, 0], maps, features)


def probability_mapping(p: Tensor) -> Tensor:
    """Probabilities of a study's slices (z,) → their descending curve at equal intervals (100,).

    Section 2.4. Both ends are kept, values between two slices lie on the line that joins them.
    """
    curve = p.sort(descending=True).values[None, None]
    return F.interpolate(curve, CURVE, mode="linear", align_corners=True)[0, 0]


class Rising(nn.Linear):
    """Never lower where an input is higher: the weights count by their size alone.

    They are the smaller the more there are, for they cannot cancel one another.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.abs() / sqrt(self.in_features), self.bias)


class StudyNet(nn.Module):
    """From all slices of a study to its logit: by their mapped probabilities (section 2.4).

    Unlike the paper's it rises wherever a slice's probability does: the curves of unknown patients are not
    those that it learned from, and free weights gave a hazy lung less than a clear one. Without
    ``mapping``, the ablation: by the maxima of their features over the slices (section 3.4.4).
    """

    def __init__(self, width: float = 1.0, mapping: bool = True) -> None:
        super().__init__()
        self.mapping = mapping
        features = EXPANSION * round(width * RESNET_WIDTHS[-1])
        sizes = (CURVE, *HIDDEN) if mapping else (features,)
        linear = Rising if mapping else nn.Linear
        layers = [layer for a, b in pairwise(sizes) for layer in (linear(a, b), nn.LeakyReLU(LEAK))]
        self.layers = nn.Sequential(*layers, linear(sizes[-1], 1))

    def forward(self, p: Tensor, features: Tensor) -> Tensor:
        """Probabilities (z,) and features (z, C) of a study's slices → its logit ()."""
        with torch.autocast(p.device.type, enabled=False):
            seen = probability_mapping(p) if self.mapping else features.amax(0)
            logit: Tensor = self.layers(seen.float())[0]
        return logit
