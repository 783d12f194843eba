"""The decoders of Qiblawey et al. (section 2.3): U-Net and feature pyramid network.

Each is made of the channels of the encoder's maps, from fine to coarse, the stride of the finest, and the
width. The paper gives no widths: those of the U-Net are common, those of the FPN follow Lin et al. 2017, with
one finer level, for small lesions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from monai.networks.blocks import Convolution
from monai.networks.nets.basic_unet import UpCat
from torch import Tensor, nn
from torch.nn import functional as F

from triage.models.encoders import scaled
from triage.models.networks import resized

DECODER_WIDTHS = (256, 128, 64, 32, 16)
"""Of the U-Net's way up from an encoder, to the full size."""
PYRAMID, LEVEL = 256, 64
"""Channels of the FPN's top-down way (Lin et al., section 4), and of each map that is concatenated."""


class UNetDecoder(nn.Module):
    """Up by two, beside the encoder's map, two convolutions, level by level; then 1×1 (Ronneberger et al.).

    To the full size, where the encoder's finest map has half of it. The plain U-Net mirrors its encoder and
    learns how to go up.
    """

    def __init__(self, channels: Sequence[int], finest: int, width: float, classes: int = 2) -> None:
        super().__init__()
        plain = finest == 1
        skips = [*reversed(channels[:-1]), *([] if plain else [0])]
        widths = skips if plain else [scaled(c, width) for c in DECODER_WIDTHS]
        ups = pairwise([channels[-1], *widths])
        self.up = nn.ModuleList(
            UpCat(
                *(2, below, skip, here),
                act="RELU",
                norm="BATCH",
                bias=False,
                upsample="deconv" if plain else "nontrainable",
                pre_conv=None,
                align_corners=False,
            )
            for (below, here), skip in zip(ups, skips, strict=True)
        )
        self.head = nn.Conv2d(widths[-1], classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps from fine to coarse → logits (N, classes, H, W)."""
        *skips, x = maps
        for up in self.up:
            x = up(x, skips.pop() if skips else None)
        logits: Tensor = self.head(x)
        return logits


class FPNDecoder(nn.Module):
    """1×1 beside each map, summed from the top down; all levels at one size, concatenated, 3×3.

    As section 2.3 says: "predicted feature maps are up-sampled to the same size, concatenated, convolved with
    a 3×3 convolutional kernel".
    """

    def __init__(self, channels: Sequence[int], finest: int, width: float) -> None:
        super().__init__()
        pyramid, level = scaled(PYRAMID, width), scaled(LEVEL, width)
        self.finest = finest
        self.lateral = nn.ModuleList(nn.Conv2d(c, pyramid, 1) for c in channels)
        self.levels = nn.ModuleList(
            Convolution(2, pyramid, level, act="RELU", norm="BATCH", bias=False) for _ in channels
        )
        self.head = nn.Conv2d(level * len(channels), 2, 3, padding=1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps from fine to coarse → logits (N, 2, H, W)."""
        steps = [lateral(each) for lateral, each in zip(self.lateral, maps, strict=True)]
        for coarse, fine in pairwise(reversed(range(len(steps)))):
            steps[fine] = steps[fine] + F.interpolate(steps[coarse], scale_factor=2.0)
        size = maps[0].shape[2:]
        levels = [resized(level(step), size) for level, step in zip(self.levels, steps, strict=True)]
        logits: Tensor = self.head(torch.cat(levels, dim=1))
        return resized(logits, [side * self.finest for side in size])


DECODERS: dict[str, Callable[[Sequence[int], int, float], nn.Module]] = {
    "unet": UNetDecoder,
    "fpn": FPNDecoder,
}
