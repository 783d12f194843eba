"""The 3D U-Net baseline (Goncharov et al., sections 2.1.2 and 4.3): lesions from the whole volume.

Slices are 2 × 2 mm in plane and stay where they are along z, as for every network here. The paper gives no
more than that: levels and widths are those of its 2D network, and the U-Net of residual units is MONAI's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from monai.inferers import SlidingWindowInferer
from monai.networks.nets import UNet
from torch import Tensor, nn

from triage.config import Analysis
from triage.models import compute, weights
from triage.models.compute import Compute
from triage.models.networks import PAPER_WIDTHS, stride
from triage.models.packages import Package
from triage.models.pipeline import Pipeline, assemble

DEPTH = 32
"""Slices judged at once, whole in plane, or more where the network's stride is larger: bounds the memory."""
OVERLAP = 0.25


class VolumeNet(nn.Module):
    """Volumes (N, 1, Z, H, W), each a multiple of ``stride``, → lesion logits of the same shape."""

    def __init__(self, widths: Sequence[int] = PAPER_WIDTHS) -> None:
        super().__init__()
        self.stride, self.inputs = stride(widths), 1
        self.unet = UNet(
            spatial_dims=3,
            in_channels=1,
            out_channels=1,
            channels=widths,
            strides=[2] * (len(widths) - 1),
            num_res_units=2,
            act="RELU",
            norm="BATCH",
        )

    def forward(self, volumes: Tensor) -> Tensor:
        logits: Tensor = self.unet(volumes)
        return logits


def load(package: Package, analysis: Analysis) -> Pipeline:
    """From the files ``lungs`` and ``unet3d`` of a package. Raises ConfigError."""
    running = compute.choose(analysis)
    network, _ = weights.read(package.file("unet3d"), VolumeNet)
    lesions = window_by_window(network.to(running.device), running)
    return assemble(package, analysis, running, lambda slices, *_: lesions(slices))


def window_by_window(network: VolumeNet, running: Compute) -> Callable[[Tensor], Tensor]:
    """Slices (z, h, w) of any number and size → probability, from windows that overlap along z."""

    def logits(windows: Tensor) -> Tensor:
        windows = windows.contiguous(memory_format=torch.channels_last_3d)
        return torch.cat(running.map(network, windows.tensor_split(len(windows)))).float()

    def probability(slices: Tensor) -> Tensor:
        window = [-(-size // network.stride) * network.stride for size in (DEPTH, *slices.shape[1:])]
        inferer = SlidingWindowInferer(
            window, sw_batch_size=running.threads, overlap=OVERLAP, mode="gaussian"
        )
        answer = torch.as_tensor(inferer(slices[None, None].to(running.device), logits))
        return answer[0, 0].sigmoid().to(slices.device)

    return probability
