"""Networks behind one contract, and the written list of them. Importing this does not import torch."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
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

    def lesion_map(self, volume: Volume, lung_mask: Mask | None) -> NDArray[np.float32] | None:
        """Lesion probability before any threshold, ``volume.array.shape``, 0 outside the lungs' box.

        For evaluation. A picture cut to the lungs comes without a mask: lesions may be anywhere in it. None
        for a network that only classifies.
        """
        ...


SYSTEMS = {
    "multitask": "multitask",
    "exported": "exported",
    "threshold": "threshold",
    "unet2d": "unet2d",
    "unet2d_plus": "unet2d",
    "unet3d": "unet3d",
    "resnet50": "resnet50",
    "cascade": "cascade",
    "dcn": "dcn",
    "infnet": "infnet",
    "ssm": "ssm",
}
"""What the code can build: the card's ``system`` → the module whose ``load`` makes a Model of a package."""


def load(analysis: Analysis) -> Model:
    """The network that config.yaml names, ready to judge.

    Raises ConfigError for an unknown name, missing or damaged files, or a device that is not there.
    """
    package = packages.read(packages.find(analysis.model))
    system = package.card.system
    if system not in SYSTEMS:
        raise package.wrong(f"system = {system!r}: there are {', '.join(sorted(SYSTEMS))}")
    model: Model = import_module(f"{__name__}.{SYSTEMS[system]}").load(package, analysis)
    return model


def speeds(analysis: Analysis) -> Mapping[str, float] | None:
    """Milliseconds a slice of a small network by each engine that can run here; None where a GPU judges."""
    from triage.models import compute

    return compute.speeds(analysis)


def describe() -> list[Package]:
    """Every network that ships; compares its files with its card, but loads no network."""
    return [packages.read(folder) for folder in MODELS.values()]
