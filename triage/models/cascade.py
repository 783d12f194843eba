"""The cascade (Qiblawey et al., figure 1): two encoder–decoders in series on whole slices.

The first finds the lungs, the second the infection in slices of which all but the lungs is black. Where the
second finds a pixel of infection the slice is positive; the mean share of infected lung over the slices (PI,
section 2.4) gives the grade and, by a rule that only rises, the score.
"""

from __future__ import annotations

from functools import partial
from math import fsum
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from triage.config import Analysis
from triage.domain import Mask, Vector, infected_shares, judged_slices
from triage.models import compute, weights
from triage.models.compute import Compute
from triage.models.decoders import DECODERS
from triage.models.encoders import ENCODERS, PLAIN, channels, check_known, stages
from triage.models.packages import Package
from triage.models.pipeline import (
    Conclusion,
    FindLungs,
    Found,
    Pipeline,
    Slicewise,
    lungs_network,
    plausible_lungs,
    score,
    slice_by_slice,
)
from triage.models.preprocessing import CANONICAL, Grid, stored_order

SIZE = (256, 256)
GRID = Grid(size=SIZE)
"""Section 2.2; the window of HU, -1000 to 300, is that of the canonical grid."""
AREA = "minimum_area_pixels"
"""Parameter of the card: infected pixels, of 256 × 256, that make a slice positive; the paper's is 1."""


class EncoderDecoder(nn.Module):
    """Background and foreground of each pixel: slices (N, C, H, W) → logits (N, 2, H, W).

    H and W are multiples of ``stride``. ``width`` scales every number of channels. Raises ConfigError for a
    name that is not there, or weights that are not the encoder's.
    """

    def __init__(
        self,
        encoder: str,
        decoder: str,
        width: float = 1.0,
        inputs: int = 1,
        encoder_weights: str | Path | None = None,
    ) -> None:
        super().__init__()
        check_known("encoder", encoder, ENCODERS)
        check_known("decoder", decoder, DECODERS)
        self.inputs = inputs
        self.stages = nn.ModuleList(stages(encoder, width, inputs, encoder_weights))
        finest = 1 if encoder == PLAIN else 2
        self.stride = finest << (len(self.stages) - 1)
        self.decoder = DECODERS[decoder]([channels(stage) for stage in self.stages], finest, width)

    def forward(self, slices: Tensor) -> Tensor:
        maps = [slices]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        logits: Tensor = self.decoder(maps[1:])
        return logits


def conclude(found: Found, minimum_area: int) -> Conclusion:
    """Score and grade from PI, and the slices' scores."""
    scores = slice_scores(found.probability, found.lung, minimum_area)
    return Conclusion(
        score(percent_infection(found.lung_mask, found.lesion_mask)),
        "percent_infection",
        stored_order(scores, found.volume),
    )


def percent_infection(lung_mask: Mask, lesion_mask: Mask) -> float:
    """PI, section 2.4: infected over lung pixels, mean over the slices (z, y, x) that are judged.

    In [0, 1]; 0 without any lung. ``triage.severity`` reports the same figure.
    """
    shares = infected_shares(lung_mask, lesion_mask)
    return fsum(shares) / max(1, len(shares))  # exact, so that their order does not matter


def slice_scores(probability: Tensor, lung: Mask, minimum_area: int) -> NDArray[np.float32]:
    """Above 0.5 where so many pixels of lung are above 0.5, the paper's rule (section 2.4) with an area.

    Of each slice (z, h, w) the probability that so many pixels of its lung reach; 0 where less lung is, and
    where only a tip is.
    """
    inside = (probability.float() * torch.from_numpy(lung).to(probability.device)).flatten(1)
    scores: NDArray[np.float32] = inside.topk(minimum_area, dim=1).values[:, -1].cpu().numpy()
    return scores * judged_slices(lung)


def load(package: Package, analysis: Analysis) -> Pipeline:
    """From the files ``cascade`` and ``lungs`` of a package; the lungs may be those of another system.

    Raises ConfigError.
    """
    running = compute.choose(analysis)
    network, _ = weights.read(package.file("cascade"), EncoderDecoder)
    judge = foreground(network, running)

    def find_lesions(slices: Tensor, lung: Mask, spacing: Vector) -> Tensor:
        return judge(slices * torch.from_numpy(lung).to(slices.device), spacing[0])

    find_lungs, lungs_grid = _lungs(package.file("lungs"), running)
    area = _minimum_area(package)
    return Pipeline(
        package.info,
        running,
        find_lungs,
        find_lesions,
        package.lesion_threshold(analysis),
        grid=GRID,
        lungs_grid=lungs_grid,
        conclude=partial(conclude, minimum_area=area),
        parameters={AREA: float(area)},
    )


def foreground(network: EncoderDecoder, running: Compute) -> Slicewise:
    """Slices → probability of the second of the two channels."""
    ready = running.ready(network, network.inputs)
    return slice_by_slice(
        ready, network.stride, running, lambda logits: logits.softmax(1)[:, 1:], network.inputs
    )


def _lungs(path: Path, running: Compute) -> tuple[FindLungs, Grid]:
    network, _ = weights.read(path, nn.Module)
    if isinstance(network, EncoderDecoder):
        return plausible_lungs(foreground(network, running)), GRID
    return lungs_network(path, running), CANONICAL


def _minimum_area(package: Package) -> int:
    area = package.card.parameters.get(AREA, 1)
    if isinstance(area, bool) or not isinstance(area, int) or not 1 <= area <= SIZE[0] * SIZE[1]:
        raise package.wrong(f"parameters.{AREA} = {area!r}: must be a number of pixels, 1 or more")
    return area
