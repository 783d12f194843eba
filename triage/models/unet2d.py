"""The 2D U-Net baselines (Goncharov et al., sections 2.1.2 and 4.3): lesions slice by slice, nothing else.

``unet2d`` learns from COVID-19 volumes only, ``unet2d_plus`` from volumes of other patients too: the
network is the same.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from triage.config import Analysis
from triage.models import compute, weights
from triage.models.networks import PAPER_WIDTHS, Backbone, ResidualBlock, pixel_head, stride
from triage.models.packages import Package
from triage.models.pipeline import Pipeline, assemble, in_each_slice, slice_by_slice


class LesionsNet(nn.Module):
    """The multitask network without its classification head: slices (N, 1, H, W) → logits (N, 1, H, W)."""

    def __init__(self, widths: Sequence[int] = PAPER_WIDTHS) -> None:
        super().__init__()
        self.backbone, self.inputs = Backbone(widths), 1
        self.stride = stride(widths)
        self.lesions = nn.Sequential(ResidualBlock(widths[0], widths[0]), pixel_head(widths[0]))

    def forward(self, slices: Tensor) -> Tensor:
        logits: Tensor = self.lesions(self.backbone(slices))
        return logits


def load(package: Package, analysis: Analysis) -> Pipeline:
    """From the file ``lungs`` and the one named like its system of a package. Raises ConfigError."""
    running = compute.choose(analysis)
    network, _ = weights.read(package.file(package.card.system), LesionsNet)
    lesions = slice_by_slice(running.ready(network, network.inputs), network.stride, running)
    return assemble(package, analysis, running, in_each_slice(lesions))
