"""The threshold baseline (Goncharov et al., sections 2.1.2 and 4.3): dense tissue inside the lungs.

It takes vessels, bronchi and dependent lung for lesions, by nature: it is there to be compared with.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from triage.config import Analysis
from triage.domain import Mask, Vector
from triage.models import compute
from triage.models.packages import Package
from triage.models.pipeline import Pipeline, assemble
from triage.models.preprocessing import HU_WINDOW

LOWEST_HU = -700
"""Above this it is not air; at the upper end of the networks' window, 300 HU, bone and metal begin."""
SMALLEST_SHARE = 0.001
"""Components below this share of the lungs are dropped."""


def load(package: Package, analysis: Analysis) -> Pipeline:
    """From the file ``lungs`` and the parameter ``sigma_mm`` of a package. Raises ConfigError."""
    running = compute.choose(analysis)
    threshold = package.lesion_threshold(analysis)
    sigma_mm = package.card.parameters.get("sigma_mm")
    if not isinstance(sigma_mm, int | float) or sigma_mm < 0:
        raise package.wrong(f"parameters.sigma_mm = {sigma_mm!r}: must be a number of mm, 0 or more")

    def lesions(slices: Tensor, lung: Mask, spacing: Vector) -> Tensor:
        return torch.from_numpy(find(slices.cpu(), lung, spacing, sigma_mm, threshold))

    return assemble(package, analysis, running, lesions)


def find(
    slices: Tensor, lung: Mask, spacing: Vector, sigma_mm: float, threshold: float = 0.5
) -> NDArray[np.float32]:
    """Slices in [0, 1] and lung (z, h, w), spacing in mm → share of dense lung around each voxel, in [0, 1].

    It is 0 in components above ``threshold`` that are too small to be kept.
    """
    low, high = HU_WINDOW
    dense = ((slices > (LOWEST_HU - low) / (high - low)) & (slices < 1)).numpy() & lung
    blurred = ndimage.gaussian_filter(dense.astype(np.float32), [sigma_mm / mm for mm in spacing], truncate=3)
    shares: NDArray[np.float32] = np.where(_specks(blurred > threshold, lung), 0, blurred)
    return shares


def _specks(mask: Mask, lung: Mask) -> Mask:
    labels, _ = ndimage.label(mask)
    small = np.bincount(labels.ravel()) < SMALLEST_SHARE * np.count_nonzero(lung)
    small[0] = False
    specks: Mask = small[labels]
    return specks
