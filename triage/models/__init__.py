"""Networks behind one contract, and the written list of them. Importing this does not import torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from triage.config import Analysis
from triage.domain import Findings, Mask, ModelInfo, Volume
from triage.models import packages
from triage.models.packages import MODELS as MODELS
from triage.models.packages import Package


class Model(Protocol):
    """One loaded network."""

    @property
    def info(self) -> ModelInfo:
        """Name, hash of the weights and limits."""
        ...

    @property
    def settings(self) -> Mapping[str, str | float]:
        """What changes its answer beside the weights."""
        ...

    def predict(self, volume: Volume) -> Findings:
        """Judge a volume in HU; masks have exactly ``volume.array.shape``.

        Raises Rejected where the volume shows no lungs, Retryable where memory or a device failed.
        """
        ...

    def lesion_map(self, volume: Volume, lung_mask: Mask) -> NDArray[np.float32] | None:
        """Lesion probability before any threshold, ``volume.array.shape``, 0 outside the lungs' box.

        For evaluation. A picture cut to the lungs comes with a mask that is True everywhere. None for
        a network that only classifies.
        """
        ...


def _multitask(package: Package, analysis: Analysis) -> Model:
    from triage.models import multitask

    return multitask.load(package, analysis)


def _exported(package: Package, analysis: Analysis) -> Model:
    from triage.models import exported

    return exported.load(package, analysis)


def _threshold(package: Package, analysis: Analysis) -> Model:
    from triage.models import threshold

    return threshold.load(package, analysis)


def _unet2d(package: Package, analysis: Analysis) -> Model:
    from triage.models import unet2d

    return unet2d.load(package, analysis)


def _unet3d(package: Package, analysis: Analysis) -> Model:
    from triage.models import unet3d

    return unet3d.load(package, analysis)


def _resnet50(package: Package, analysis: Analysis) -> Model:
    from triage.models import resnet50

    return resnet50.load(package, analysis)


SYSTEMS: dict[str, Callable[[Package, Analysis], Model]] = {
    "multitask": _multitask,
    "exported": _exported,
    "threshold": _threshold,
    "unet2d": _unet2d,
    "unet2d_plus": _unet2d,
    "unet3d": _unet3d,
    "resnet50": _resnet50,
}
"""What the code can build, by the card's ``system``: turns a package into a Model."""


def load(analysis: Analysis) -> Model:
    """The network that config.yaml names, ready to judge.

    Raises ConfigError for an unknown name, missing or damaged files, or a device that is not there.
    """
    package = packages.read(packages.find(analysis.model))
    system = SYSTEMS.get(package.card.system)
    if system is None:
        raise package.wrong(f"system = {package.card.system!r}: there are {', '.join(sorted(SYSTEMS))}")
    return system(package, analysis)


def describe() -> list[Package]:
    """Every network that ships; compares its files with its card, but loads no network."""
    return [packages.read(folder) for folder in MODELS.values()]
