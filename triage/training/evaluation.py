"""How well the shipped pipeline judges patients it has not seen, one line a volume."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from triage.config import Analysis
from triage.domain import Findings, Mask, ModelInfo
from triage.models import weights
from triage.models.multitask import Multitask
from triage.models.networks import MultitaskNet
from triage.training.data import Case, cases

THRESHOLDS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)


@dataclass(frozen=True, slots=True)
class Score:
    """Of one volume: Dice of both masks, affected fraction of the lungs as drawn and as predicted."""

    name: str
    patient: str
    lungs: float
    lesions: float
    drawn_fraction: float
    predicted_fraction: float
    probability: float


def dice(answer: Mask, truth: Mask) -> float:
    """1 where both are empty."""
    total = int(answer.sum() + truth.sum())
    return 2 * int((answer & truth).sum()) / total if total else 1.0


def evaluate(
    data: Path, folder: Path, patients: Sequence[str], analysis: Analysis | None = None
) -> list[Score]:
    """Whole pipeline, on each volume's own grid, of these patients."""
    model = _load(folder, analysis or Analysis())
    scores = []
    for case in cases(data):
        if case.patient in patients:
            scores.append(_score(case, model.predict(case.volume)))
    return scores


def _score(case: Case, findings: Findings) -> Score:
    lesion_mask = np.zeros_like(case.lesion) if findings.lesion_mask is None else findings.lesion_mask
    return Score(
        case.name,
        case.patient,
        dice(findings.lung_mask, case.lung),
        dice(lesion_mask, case.lesion),
        float((case.lesion & case.lung).sum() / case.lung.sum()),
        float(lesion_mask.sum() / findings.lung_mask.sum()),
        findings.probability,
    )


def choose_threshold(data: Path, folder: Path, patients: Sequence[str]) -> float:
    """The lesion threshold of the best mean Dice on the validation patients, written into the weights."""
    means = {
        threshold: np.mean(
            [s.lesions for s in evaluate(data, folder, patients, Analysis(lesion_threshold=threshold))]
        )
        for threshold in THRESHOLDS
    }
    best = max(THRESHOLDS, key=means.__getitem__)
    path = folder / "multitask.safetensors"
    network, recipe = weights.read(path, MultitaskNet)
    weights.save(network, {**recipe, "lesion_threshold": str(best)}, path)
    return best


def _load(folder: Path, analysis: Analysis) -> Multitask:
    info = ModelInfo(name="multitask", version="in training", summary="", calibrated=False, card="")
    return Multitask(info, folder / "lungs.safetensors", folder / "multitask.safetensors", analysis)


def table(scores: Sequence[Score]) -> str:
    """Plain text, a line a volume: seven patients are too few for a mean alone."""
    head = f"{'volume':<16}{'patient':<9}{'lungs':>7}{'lesions':>9}{'drawn':>8}{'found':>8}{'P':>7}"
    lines = [
        f"{s.name:<16}{s.patient:<9}{s.lungs:>7.3f}{s.lesions:>9.3f}"
        f"{s.drawn_fraction:>8.4f}{s.predicted_fraction:>8.4f}{s.probability:>7.3f}"
        for s in scores
    ]
    return "\n".join([head, *lines])
