"""Random changes of slices and masks together, alike for all slices of one sub-volume.

They stand for what the few training patients do not show: other sizes and positions, kernels,
doses, slice thicknesses, and errors of the HU scale (the training pictures' window is estimated).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

HU = 1 / 1300
"""One Hounsfield unit on the networks' scale [0, 1]."""


def place(layers: Tensor, size: tuple[int, int], rng: np.random.Generator) -> Tensor:
    """Layers (n, c, h, w) on a canvas (n, c, *size), centred; turned, scaled, shifted and mirrored.

    Mirroring left and right is safe here: no network is asked for the side.
    """
    angle = math.radians(rng.normal(0, 7))
    scale = float(np.exp(rng.uniform(math.log(0.8), math.log(1.25))))
    mirror = float(rng.choice([-1.0, 1.0]))
    shift = rng.uniform(-0.1, 0.1, 2)
    h, w = layers.shape[-2:]
    cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
    # affine_grid works in units of half an image: x by w, y by h.
    theta = torch.tensor(
        [
            [mirror * cos * size[1] / w, mirror * -sin * size[0] / w, shift[1]],
            [sin * size[1] / h, cos * size[0] / h, shift[0]],
        ],
        dtype=torch.float32,
    )
    grid = F.affine_grid(theta[None], [1, 1, *size], align_corners=False)
    return F.grid_sample(layers, grid.expand(len(layers), -1, -1, -1), align_corners=False)


def centre(layers: Tensor, size: tuple[int, int]) -> Tensor:
    """Layers (n, c, h, w) as they are in the middle of a canvas (n, c, *size); what lies beyond it is cut."""
    down, across = (whole - part for whole, part in zip(size, layers.shape[-2:], strict=True))
    return F.pad(layers, (across // 2, across - across // 2, down // 2, down - down // 2))


def thicken(slices: Tensor, rng: np.random.Generator) -> Tensor:
    """Now and then thicker slices: each (n, c, h, w) averaged with its neighbours.

    Those of its own where it has them, else the slices before and after it. With one of them only, lung
    over the dome of the diaphragm becomes hazy, as breathing does it: that is no ground glass.
    """
    draw = rng.random()
    if draw > 0.5:
        return slices
    before, after = (0.0, rng.uniform(0.1, 0.45)) if draw > 0.3 else (rng.uniform(0.1, 0.33),) * 2
    if rng.random() < 0.5:
        before, after = after, before
    if slices.shape[1] == 3:
        below, middle, above = slices.split(1, dim=1)
        return torch.cat([below, _mix(middle, below, above, before, after), above], dim=1)
    if len(slices) < 3:
        return slices
    earlier, later = slices[[0, *range(len(slices) - 1)]], slices[[*range(1, len(slices)), -1]]
    return _mix(slices, earlier, later, before, after)


def _mix(middle: Tensor, below: Tensor, above: Tensor, before: float, after: float) -> Tensor:
    return (1 - before - after) * middle + before * below + after * above


def intensity(slices: Tensor, rng: np.random.Generator, picture: bool = False) -> Tensor:
    """Window, contrast medium, kernel and noise; (n, c, h, w) in [0, 1].

    A picture's window is a guess, so it is varied much; a scanner's HU are right to some tens.
    """
    x = _window(slices, rng, wide=picture or rng.random() < 0.25)
    if rng.random() < 0.5:  # bright tissue varies with contrast medium and with the pictures' ceiling
        x = torch.where(x > 0.72, 0.72 + (x - 0.72) * rng.uniform(0.5, 1.6), x)
    return _noise(_kernel(x, rng), rng).clamp(0, 1)


def _window(x: Tensor, rng: np.random.Generator, wide: bool) -> Tensor:
    """Shift, scale and bend of the scale of HU."""
    shift, scale, bend = (80, 0.15, 0.22) if wide else (30, 0.06, 0.08)
    x = x * rng.uniform(1 - scale, 1 + scale) + rng.uniform(-shift, shift) * HU
    return x.clamp(0, 1) ** float(np.exp(rng.uniform(-bend, bend)))


def _kernel(x: Tensor, rng: np.random.Generator) -> Tensor:
    """Softer or sharper reconstruction."""
    draw = rng.random()
    if draw < 0.3:
        return blur(x, rng.uniform(0.3, 1.0))
    return x + rng.uniform(0.2, 1.0) * (x - blur(x, 1.0)) if draw < 0.5 else x


def _noise(x: Tensor, rng: np.random.Generator) -> Tensor:
    """Up to 70 HU, with or without the grain of a soft kernel."""
    if rng.random() > 0.6:
        return x
    noise = torch.randn(x.shape)
    return x + rng.uniform(0, 70) * HU * (noise if rng.random() < 0.5 else blur(noise, 0.7) * 1.8)


def blur(x: Tensor, sigma: float) -> Tensor:
    """Gaussian over five pixels in plane; (n, c, h, w)."""
    taps = torch.exp(-(torch.arange(-2.0, 3.0) ** 2) / (2 * sigma**2))
    taps = taps / taps.sum()
    n, c, h, w = x.shape
    x = F.conv2d(F.pad(x.reshape(n * c, 1, h, w), (2, 2, 0, 0), mode="replicate"), taps.view(1, 1, 1, 5))
    return F.conv2d(F.pad(x, (0, 0, 2, 2), mode="replicate"), taps.view(1, 1, 5, 1)).view(n, c, h, w)


def surroundings(slices: Tensor, lung: Tensor, rng: np.random.Generator) -> Tensor:
    """What the training pictures lack and scanners show; slices and lung mask are (n, c, h, w).

    Cushions on tables and gas in the bowel are dark as lung and are not lung; dense lung is lung.
    """
    result = slices.clone()
    for image, keep in zip(result, lung > 0.5, strict=True):
        if rng.random() < 0.6:
            _table(image, keep, rng)
        if rng.random() < 0.4:
            _gas(image, keep, rng)
        if rng.random() < 0.35:
            _consolidation(image, keep, rng)
    return result


def dependent(slices: Tensor, lung: Tensor, rng: np.random.Generator) -> Tensor:
    """Lung denser by up to 130 HU towards the back, as gravity makes it in a shallow breath: no lesion.

    Slices and lungs (n, c, h, w), of one sub-volume.
    """
    inside = lung > 0.5
    rows = torch.nonzero(inside.any(dim=3).flatten(0, 1).any(dim=0)).flatten()
    if rng.random() > 0.4 or len(rows) == 0:
        return slices
    first, last = float(rows[0]), float(rows[-1])
    start = first + (last - first) * rng.uniform(0.4, 0.85)
    share = ((torch.arange(slices.shape[2]) - start) / (last - start + 1)).clamp(0, 1) ** rng.uniform(0.5, 2)
    rough = 1 + 0.25 * blur(torch.randn(slices.flatten(0, 1)[:, None].shape), 1.0).view_as(slices)
    rise = rng.uniform(20, 130) * HU * rough * ((0.6 - slices) / 0.5).clamp(0, 1)
    return (slices + share[:, None] * lung * rise).clamp(0, 1)


def opacities(
    slices: Tensor, lesion: Tensor, lung: Tensor, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Ground glass over some or nearly all of the lungs, and dense consolidations: few patients show it.

    Slices and lungs (n, c, h, w), lesions (n, 1, h, w), with some added; all slices are of one sub-volume.
    """
    slices, lesion = slices.clone(), lesion.clone()
    if rng.random() < 0.35:
        slices, lesion = _ground_glass(slices, lesion, lung, rng)
    for image, mask, keep in zip(slices, lesion[:, 0], lung > 0.5, strict=True):
        if rng.random() < 0.2:
            mask[_consolidation(image, keep, rng)] = 1
    return slices, lesion


def _ground_glass(
    slices: Tensor, lesion: Tensor, lung: Tensor, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Lung denser by 150 to 380 HU, as drawn lesions mostly are, where a smooth random field is high.

    Vessels stay visible.
    """
    n, c, h, w = slices.shape
    coarse = torch.randn(1, 1, max(2, n // 6), max(2, h // 28), max(2, w // 28))
    field = F.interpolate(coarse, (n, h, w), mode="trilinear", align_corners=True)[0, 0][:, None]
    field = field + 0.25 * blur(torch.randn(n, 1, h, w), 2.0) * rng.uniform(0, 4)
    field = field.expand(n, c, h, w)
    inside = lung > 0.5
    if not inside.any():
        return slices, lesion
    limit = torch.quantile(field[inside][:: max(1, int(inside.sum()) // 10_000)], rng.uniform(0.05, 0.95))
    share = ((field - limit) / rng.uniform(0.05, 0.5) + 0.5).clamp(0, 1) * lung
    rough = 1 + 0.25 * blur(torch.randn(n * c, 1, h, w), 0.8).view(n, c, h, w)
    rise = rng.uniform(150, 380) * HU * rough * ((0.8 - slices) / 0.7).clamp(0, 1)
    middle = share[:, c // 2 : c // 2 + 1]
    return (slices + share * rise).clamp(0, 1), torch.maximum(lesion, (middle > 0.5).float())


def _table(image: Tensor, keep: Tensor, rng: np.random.Generator) -> None:
    """A cushion of foam or air under the body, and a bar below it that may be bent."""
    c, h, w = image.shape
    body = -F.max_pool2d(-F.max_pool2d((image[c // 2] > 0.5).float()[None], 9, 1, 4), 9, 1, 4)
    body = -F.max_pool2d(-body, 11, 1, 5)  # closed, then opened: without the lungs' gaps and tables
    body = F.max_pool2d(body, 11, 1, 5)[0]
    rows, columns = torch.arange(h)[:, None].float(), torch.arange(w)[None].float()
    last = torch.where(body.any(0), (body * rows).amax(0), h * 0.6)
    bend = rng.uniform(-5, 40) * (columns / w - rng.uniform(0.4, 0.6)) ** 2 * 4
    bar = last.max() + rng.uniform(1, 30) - bend
    below = (rows > last) & ~keep.any(0)
    foam = rng.uniform(0, 0.14) + rng.uniform(0, 0.05) * blur(torch.randn(1, 1, h, w), 1.0)[0, 0]
    painted = torch.where(rows < bar, foam.clamp(0, 1), torch.zeros(h, w))
    painted = torch.where((rows - bar).abs() < rng.uniform(0.5, 3), rng.uniform(0.2, 1), painted)
    image[:, below] = painted[below]


def _consolidation(image: Tensor, keep: Tensor, rng: np.random.Generator) -> Tensor:
    """Part of a lung as dense as tissue, most often at its back; returns where in the middle slice (h, w)."""
    c, h, w = image.shape
    inside = torch.nonzero(keep[c // 2])
    if len(inside) == 0:
        return torch.zeros_like(keep[0])
    places = inside[torch.from_numpy(rng.integers(len(inside), size=3))]
    y, x = places[places[:, 0].argmax()].tolist()
    rows, columns = torch.arange(h)[:, None] - y, torch.arange(w)[None] - x
    rough = blur(torch.randn(1, 1, h, w), 2.0)[0, 0]
    oval = (rows / rng.uniform(5, 25)) ** 2 + (columns / rng.uniform(5, 30)) ** 2 + rough < 1
    dense = (rng.uniform(0.55, 0.85) + 0.04 * rough).clamp(0, 1)
    share = blur((oval & keep).float()[:, None], 1.0)[:, 0] * keep
    image.copy_(torch.maximum(image, share * dense + (1 - share) * image))
    where: Tensor = oval & keep[c // 2]
    return where


def _gas(image: Tensor, keep: Tensor, rng: np.random.Generator) -> None:
    """An oval of air within the tissue, sometimes over a level of fluid."""
    c, h, w = image.shape
    tissue = torch.nonzero((image[c // 2] > 0.55) & ~keep[c // 2])
    if len(tissue) == 0:
        return
    y, x = tissue[rng.integers(len(tissue))].tolist()
    rows, columns = torch.arange(h)[:, None] - y, torch.arange(w)[None] - x
    tall, wide = rng.uniform(4, 22), rng.uniform(4, 35)
    oval = (rows / tall) ** 2 + (columns / wide) ** 2 < 1
    level = rows < rng.uniform(-0.2, 1.5) * tall
    image[(oval & level) & (image > 0.45) & ~keep] = rng.uniform(0, 0.04)
