"""The networks of self-supervised Inf-Net (Fung et al., section IV; Fan et al. 2020, section III).

    slice ── encoder ── f1, f2, f3, f4, f5
                            f2 ── edge attention ── edge map, and features e_att
                    f3, f4, f5 ── parallel partial decoder ── S_g
       f5, e_att and 1 − σ(S_g) ── reverse attention ── S_5
       f4, e_att and 1 − σ(S_5) ── reverse attention ── S_4
       f3, e_att and 1 − σ(S_4) ── reverse attention ── S_3: where lesions are
    slice and σ(S_3) ── U-Net ── background, ground glass, consolidation

    slice ── coach ── mask M; slice ⊙ M ── either network ── the slice again (self-supervision)

For the last line each network has other last layers, whose values stand as they are. Widths are the papers'
times ``width``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from triage.domain import LesionClass
from triage.errors import ConfigError
from triage.models import encoders
from triage.models.decoders import UNetDecoder
from triage.models.encoders import PLAIN, channels, check_known, scaled
from triage.models.networks import resized

RES2NET = "res2net50"
ENCODERS = (RES2NET, *encoders.ENCODERS)
SIZE = 352
"""Height and width of a slice (Fan et al., section IV-B)."""

RES2NET_LAYERS = (3, 4, 6, 3)
RES2NET_PART, RES2NET_SCALE = 26 / 64, 4
"""Channels of each part of a block's middle, as a share of its width, and how many parts there are: 26w × 4s
(Gao et al. 2019, table 1)."""
EXPANSION = 4
STEM = (32, 32, 64)
"""The three 3×3 convolutions that stand for the first 7×7, as in the encoder that Inf-Net takes (v1b)."""

REDUCED, GUIDED, EDGE = 32, 64, 64
"""Channels of the partial decoder, of the reverse attention and of the edge attention."""

CLASSES: tuple[LesionClass, ...] = ("ground_glass", "consolidation")
"""What the U-Net's channels mean after the first, which is background."""
KEPT = 0.75
"""k: the share of a slice that the coach keeps."""
ALPHA = 1.0
"""α of equation 5."""


class Res2NetBlock(nn.Module):
    """A bottleneck whose middle passes from one part of its channels to the next (Gao et al. 2019, figure 2).

    The first block of a stage, which changes the size, leaves the parts apart.
    """

    def __init__(self, inputs: int, width: int, stride: int, first: bool) -> None:
        super().__init__()
        self.part, self.first = max(1, int(width * RES2NET_PART)), first
        middle, outputs = self.part * RES2NET_SCALE, width * EXPANSION
        convolved = range(RES2NET_SCALE - 1)
        self.downsample = _shortcut(inputs, outputs, stride) if first else nn.Identity()
        self.pool = nn.AvgPool2d(3, stride, padding=1) if first else nn.Identity()
        self.conv1 = nn.Conv2d(inputs, middle, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(middle)
        self.convs = nn.ModuleList(
            nn.Conv2d(self.part, self.part, 3, stride, padding=1, bias=False) for _ in convolved
        )
        self.bns = nn.ModuleList(nn.BatchNorm2d(self.part) for _ in convolved)
        self.conv3 = nn.Conv2d(middle, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        *parts, last = F.relu(self.bn1(self.conv1(x))).split(self.part, dim=1)
        done: list[Tensor] = []
        for part, conv, bn in zip(parts, self.convs, self.bns, strict=True):
            joined = part if self.first or not done else part + done[-1]
            done.append(F.relu(bn(conv(joined))))
        y = self.bn3(self.conv3(torch.cat([*done, self.pool(last)], dim=1)))
        return F.relu(y + self.downsample(x))


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False),
        nn.Conv2d(inputs, outputs, 1, bias=False),
        nn.BatchNorm2d(outputs),
    )


class Res2Net(nn.Module):
    """Res2Net-50 without its last layer; its tensors are named as in published files."""

    def __init__(self, width: float = 1.0, inputs: int = 1) -> None:
        super().__init__()
        stem = [inputs, *(scaled(c, width) for c in STEM)]
        layers: list[nn.Module] = []
        for number, (a, b) in enumerate(pairwise(stem)):
            layers += [nn.BatchNorm2d(a), nn.ReLU()] if number else []
            layers.append(nn.Conv2d(a, b, 3, 1 if number else 2, padding=1, bias=False))
        self.conv1 = nn.Sequential(*layers)
        self.bn1 = nn.BatchNorm2d(stem[-1])
        widths = [scaled(c, width) for c in encoders.RESNET_WIDTHS]
        before = [stem[-1], *(w * EXPANSION for w in widths)]
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            nn.Sequential(*(Res2NetBlock(*_of_block(n, a, w, stride)) for n in range(blocks)))
            for a, w, blocks, stride in zip(before, widths, RES2NET_LAYERS, (1, 2, 2, 2), strict=False)
        )

    def stages(self) -> list[nn.Sequential]:
        """As ``encoders.stages``."""
        return [
            nn.Sequential(self.conv1, self.bn1, nn.ReLU()),
            nn.Sequential(nn.MaxPool2d(3, 2, padding=1), *self.layer1),
            self.layer2,
            self.layer3,
            self.layer4,
        ]


def _of_block(number: int, inputs: int, width: int, stride: int) -> tuple[int, int, int, bool]:
    first = number == 0
    return (inputs, width, stride, True) if first else (width * EXPANSION, width, 1, False)


def stages(encoder: str, width: float, weights: str | Path | None = None) -> list[nn.Sequential]:
    """The encoder in five parts, f1 to f5. Raises ConfigError for weights that are not the encoder's."""
    if encoder != RES2NET:
        return encoders.stages(encoder, width, 1, weights)
    network = Res2Net(width)
    if weights is not None:
        encoders.load_classifier(network, Path(weights))
    return network.stages()


def _unit(inputs: int, outputs: int, kernel: int = 3) -> nn.Sequential:
    """Convolution, batch normalisation, ReLU."""
    convolution = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


class EdgeAttention(nn.Module):
    """From f2, still fine, what shows where lesions end: features e_att (Fan et al., section III-B.1)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(_unit(inputs, outputs, 1), _unit(outputs, outputs))

    def forward(self, f2: Tensor) -> Tensor:
        features: Tensor = self.layers(f2)
        return features


class PartialDecoder(nn.Module):
    """The three coarse maps as one, at the size of the finest of them (Fan et al., section III-B.2).

    Each, reduced, is multiplied with all coarser ones, and the products are joined from coarse to fine (Wu et
    al. 2019, section 3.3).
    """

    def __init__(self, inputs: Sequence[int], width: int) -> None:
        super().__init__()
        self.reduce = nn.ModuleList(nn.Sequential(_unit(c, width, 1), _unit(width, width)) for c in inputs)
        self.weigh = nn.ModuleList(_unit(width, width) for _ in range(3))
        self.join = nn.ModuleList(_unit((n + 2) * width, (n + 2) * width) for n in range(2))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """f3, f4, f5 → features (N, 3 × width, h, w) as fine as f3."""
        x3, x4, x5 = (reduce(f) for reduce, f in zip(self.reduce, maps, strict=True))
        of_5, of_5_for_3, of_4 = self.weigh
        y4 = x4 * of_5(resized(x5, x4.shape[2:]))
        y3 = x3 * of_5_for_3(resized(x5, x3.shape[2:])) * of_4(resized(x4, x3.shape[2:]))
        y = self.join[0](torch.cat([y4, resized(x5, x4.shape[2:])], dim=1))
        joined: Tensor = self.join[1](torch.cat([y3, resized(y, x3.shape[2:])], dim=1))
        return joined


class ReverseAttention(nn.Module):
    """What the coarser map has not found yet: R = C(f, e_att) ⊙ (1 − σ(S)) (Fan et al., III-B.3)."""

    def __init__(self, inputs: int, edge: int, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(_unit(inputs + edge, width, 1), _unit(width, width), _unit(width, width))

    def forward(self, f: Tensor, e_att: Tensor, found: Tensor) -> Tensor:
        """Features (N, ·, h, w), edge features and the coarser map's logits, both of any size."""
        size = f.shape[2:]
        attention = 1 - resized(found, size).sigmoid()
        features: Tensor = self.layers(torch.cat([f, resized(e_att, size)], dim=1) * attention)
        return features


class Seen(NamedTuple):
    """What Single Inf-Net says of slices, as large as they are: logits, or what it reconstructs."""

    edge: Tensor
    """(N, 1, H, W)."""
    maps: Tensor
    """S_g, S_5, S_4 and S_3, (N, 4, H, W)."""

    @property
    def lesions(self) -> Tensor:
        """S_3, (N, 1, H, W): the answer."""
        return self.maps[:, -1:]


class SingleInfNet(nn.Module):
    """Lesions of any kind in slices (N, 1, H, W); H and W are multiples of ``stride``."""

    def __init__(
        self, encoder: str = RES2NET, width: float = 1.0, encoder_weights: str | Path | None = None
    ) -> None:
        super().__init__()
        check_known("encoder", encoder, ENCODERS)
        self.stages = nn.ModuleList(stages(encoder, width, encoder_weights))
        self.stride = (1 if encoder == PLAIN else 2) << (len(self.stages) - 1)
        _, f2, *coarse = (channels(stage) for stage in self.stages)
        reduced, guided, edge = (scaled(c, width) for c in (REDUCED, GUIDED, EDGE))
        self.edge = EdgeAttention(f2, edge)
        self.decoder = PartialDecoder(coarse, reduced)
        self.reverse = nn.ModuleList(ReverseAttention(f, edge, guided) for f in reversed(coarse))
        self.last = nn.ModuleDict(
            {
                "edge": nn.Conv2d(edge, 1, 3, padding=1),
                "global": nn.Conv2d(3 * reduced, 1, 1),
                **{f"level{n}": nn.Conv2d(guided, 1, 3, padding=1) for n in (5, 4, 3)},
            }
        )

    def forward(self, slices: Tensor) -> Seen:
        """Slices (N, 1, H, W) in [0, 1]."""
        maps = [slices]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        _, _, f2, *coarse = maps
        e_att = self.edge(f2)
        found = [self.last["global"](self.decoder(coarse))]
        for level, f, reverse in zip((5, 4, 3), reversed(coarse), self.reverse, strict=True):
            added = self.last[f"level{level}"](reverse(f, e_att, found[-1]))
            found.append(added + resized(found[-1], f.shape[2:]))
        size = slices.shape[2:]
        return Seen(
            resized(self.last["edge"](e_att), size), torch.cat([resized(s, size) for s in found], dim=1)
        )


class UNet(nn.Module):
    """The plain U-Net of 64 to 1024 channels (Ronneberger et al. 2015), with as many in and out as asked."""

    def __init__(self, inputs: int, outputs: int, width: float = 1.0) -> None:
        super().__init__()
        self.stages = nn.ModuleList(encoders.stages(PLAIN, width, inputs))
        self.stride = 1 << (len(self.stages) - 1)
        self.decoder = UNetDecoder([channels(stage) for stage in self.stages], 1, width, outputs)

    def forward(self, slices: Tensor) -> Tensor:
        """(N, inputs, H, W) → (N, outputs, H, W)."""
        maps = [slices]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        values: Tensor = self.decoder(maps[1:])
        return values


LAST = ("single.last.", "multi.decoder.head.")
"""The last layers of both networks: other ones reconstruct, and are not taken over."""


class InfNet(nn.Module):
    """Single and Multi Inf-Net, for slices of ``size`` × ``size``; the second does not teach the first.

    Raises ConfigError for an encoder that is not there, weights that are not its own, or a size that does not
    go through it.
    """

    def __init__(
        self,
        encoder: str = RES2NET,
        width: float = 1.0,
        multi_width: float = 1.0,
        size: int = SIZE,
        outputs: int = 1 + len(CLASSES),
        encoder_weights: str | Path | None = None,
    ) -> None:
        super().__init__()
        self.single = SingleInfNet(encoder, width, encoder_weights)
        self.multi = UNet(2, outputs, multi_width)
        self.size, self.stride = size, max(self.single.stride, self.multi.stride)
        if size < self.stride or size % self.stride:
            raise ConfigError(f"size {size}: must be a multiple of {self.stride}")

    def start_from(self, state: Mapping[str, Tensor]) -> None:
        """Take over what was learned by reconstructing, all but the last layers (figures 1 and 2).

        Raises ConfigError for a network of another make.
        """
        mine = self.state_dict()
        taken = {name: value for name, value in state.items() if not name.startswith(LAST)}
        unlike = {name for name in mine if not name.startswith(LAST)} ^ taken.keys()
        unlike |= {name for name in taken.keys() & mine.keys() if taken[name].shape != mine[name].shape}
        if unlike:
            raise ConfigError(
                f"start: the network before has another encoder or width, {len(unlike)} tensors differ, "
                f"the first is {min(unlike)}: change it alike under parts"
            )
        self.load_state_dict(taken, strict=False)


class Coach(nn.Module):
    """Which part of a slice is hard to reconstruct from the others (Fung et al., section IV-B)."""

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        self.backbone = UNet(1, 1, width)

    def forward(self, slices: Tensor) -> Tensor:
        """Slices (N, 1, H, W) → masks M of the same shape in (0, 1): above a half, a pixel is kept."""
        return constrained(self.backbone(slices).float())


def constrained(scores: Tensor, kept: float = KEPT, alpha: float = ALPHA) -> Tensor:
    """Equations 4 and 5: scores B(x) (N, 1, H, W) → M = σ(α(B − the k-th largest of each slice)).

    At least so many pixels are a half or more, whatever the scores: a coach cannot erase everything. More are
    where scores are equal, as in air.
    """
    flat = scores.flatten(1)
    count = flat.shape[1]
    largest = max(1, round(kept * count))
    threshold = flat.kthvalue(count - largest + 1, dim=1).values
    return (alpha * (scores - threshold[:, None, None, None])).sigmoid()


class Inpainting(nn.Module):
    """Both networks with last layers that reconstruct, and the coach that masks what they see."""

    def __init__(
        self,
        encoder: str = RES2NET,
        width: float = 1.0,
        multi_width: float = 1.0,
        size: int = SIZE,
        coach_width: float = 1.0,
        encoder_weights: str | Path | None = None,
    ) -> None:
        super().__init__()
        self.infnet = InfNet(encoder, width, multi_width, size, 1, encoder_weights)
        self.coach = Coach(coach_width)

    def forward(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Masked slices (N, 1, H, W) → their edges (N, 1, H, W), and the slices (N, 5, H, W) five times.

        S_g, S_5, S_4, S_3 and the U-Net's. Nobody has found lesions yet: the U-Net sees an empty map.
        """
        edge, maps = self.infnet.single(seen)
        multi = self.infnet.multi(torch.cat([seen, torch.zeros_like(seen)], dim=1))
        return edge, torch.cat([maps, multi], dim=1)
