"""Networks behind one contract, and the written list of them. Importing this does not import torch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from triage.config import Analysis
from triage.domain import Findings, Mask, ModelInfo, Volume
from triage.errors import ConfigError

HERE = Path(__file__).parent
CARDS = HERE / "cards"
WEIGHTS = HERE / "weights"


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


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the registry: where the weights lie and what turns them into a Model."""

    summary: str
    weights: tuple[str, ...]
    load: Callable[[ModelInfo, Mapping[str, Path], Analysis], Model]
    calibrated: bool = False


def _multitask(info: ModelInfo, weights: Mapping[str, Path], analysis: Analysis) -> Model:
    from triage.models.multitask import Multitask

    return Multitask(info, weights["lungs"], weights["multitask"], analysis)


MODELS: dict[str, Entry] = {
    "multitask": Entry(
        "lungs, lesions and one score from a 2D residual U-Net with two heads (Goncharov et al.)",
        ("lungs", "multitask"),
        _multitask,
    ),
}


def load(analysis: Analysis) -> Model:
    """The network that config.yaml names, ready to judge.

    Raises ConfigError for an unknown name, missing or damaged weights, or a device that is not there.
    """
    entry = MODELS.get(analysis.model)
    if entry is None:
        names = ", ".join(sorted(MODELS))
        raise ConfigError(f"analysis.model = {analysis.model!r}: unknown network; there are {names}")
    return entry.load(_info(analysis.model, entry), _paths(entry), analysis)


def describe() -> list[ModelInfo]:
    """Every network that can be chosen; reads the weights' bytes, but loads no network."""
    return [_info(name, entry) for name, entry in MODELS.items()]


def _paths(entry: Entry) -> dict[str, Path]:
    return {name: WEIGHTS / f"{name}.safetensors" for name in entry.weights}


def _info(name: str, entry: Entry) -> ModelInfo:
    digest = hashlib.sha256()
    for path in _paths(entry).values():
        try:
            digest.update(path.read_bytes())
        except OSError as error:
            raise ConfigError(
                f"{name}: cannot read weights {path}: {error.strerror}; reinstall the package"
            ) from error
    return ModelInfo(
        name=name,
        version=digest.hexdigest()[:12],
        summary=entry.summary,
        calibrated=entry.calibrated,
        card=(CARDS / f"{name}.md").read_text(encoding="utf-8"),
    )
