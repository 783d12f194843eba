"""What the paper's baselines learn from (Goncharov et al., sections 4.3 and 4.4).

Where the data at hand cannot train one, it says "not measurable here" and why, and nothing is trained.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from triage.config import Analysis
from triage.domain import Mask
from triage.errors import ConfigError
from triage.models import compute, packages, threshold
from triage.models.pipeline import FindLungs, lungs_network
from triage.models.preprocessing import MARGIN, SPACING_MM, bounding_box, prepare, shrink
from triage.models.resnet50 import SliceClassifier
from triage.models.unet2d import LesionsNet
from triage.models.unet3d import VolumeNet
from triage.training import augment
from triage.training.cases import Case, Diagnosis
from triage.training.scans import Scan
from triage.training.tasks import LesionsTask, dice, forward, on_canvas, segmentation_loss

WITHOUT_COVID = (Diagnosis.HEALTHY, Diagnosis.OTHER)


class Unet2dTask(LesionsTask):
    """Lesions slice by slice, from COVID-19 patients."""

    def __init__(self, scans: Sequence[Scan], widths: Sequence[int], **options: Any) -> None:
        super().__init__(scans, LesionsNet(widths), **options)


class Unet2dPlusTask(Unet2dTask):
    """The same network, which also sees patients without COVID-19: whatever they have is no lesion."""

    def __init__(self, scans: Sequence[Scan], widths: Sequence[int], **options: Any) -> None:
        others = with_lungs(s for s in scans if s.diagnosis in WITHOUT_COVID and not s.cropped)
        if not others:
            raise ConfigError(
                "not measurable here: unet2d_plus also learns from volumes of patients without COVID-19, and "
                "the data has none; give more, such as --data nsclc=PATH or --data luna16=PATH"
            )
        free = [replace(s, lesions=(torch.zeros_like(s.slices),)) for s in others]
        super().__init__([*(s for s in scans if s.diagnosis not in WITHOUT_COVID), *free], widths, **options)


class Unet3dTask(LesionsTask):
    """Lesions in sub-volumes: as for the 2D networks, but seen as a whole; no single pictures."""

    def __init__(self, scans: Sequence[Scan], widths: Sequence[int], **options: Any) -> None:
        network = VolumeNet(widths)
        super().__init__([s for s in scans if not s.cropped], network, **options)
        sizes = (self.windows.depth, *self.canvas)
        if any(size % network.stride for size in sizes):
            raise ConfigError(f"depth and canvas {sizes} must be multiples of {network.stride}")

    def loss(self, rng: np.random.Generator) -> Tensor:
        slices, truth, labels = self.batch(rng, self.windows, self.count)
        volumes = slices.unflatten(0, (len(labels), -1)).movedim(2, 1)
        logits = forward(self.network, volumes).float().movedim(1, 2).flatten(0, 1)
        return segmentation_loss(logits, truth.to(logits.device))

    def score(self, network: Any, scan: Scan) -> float | None:
        """Dice at 2 mm, mean over raters."""
        if not scan.lesions:
            return None
        scan = scan.to_lungs()
        beyond = [side for size in reversed(scan.slices.shape) for side in (0, -size % network.stride)]
        answer = forward(network, F.pad(scan.slices, beyond)[None, None])[0, 0].float().cpu()
        z, h, w = scan.slices.shape
        return float(np.mean([dice(answer[:z, :h, :w], lesion) for lesion in scan.lesions]))


class Resnet50Task:
    """COVID-19 or not, from whole volumes: evenly strided slices of as many ill as other patients."""

    def __init__(
        self,
        scans: Sequence[Scan],
        widths: Sequence[int],
        hidden: int,
        canvas: tuple[int, int] = (128, 160),
        slices: int = 32,
        batch: int = 2,
    ) -> None:
        self.network = SliceClassifier(widths, hidden)
        self.canvas, self.slices, self.batch = canvas, slices, batch
        self.by_label: dict[int, dict[str, list[Scan]]] = {0: defaultdict(list), 1: defaultdict(list)}
        for scan in with_lungs(s for s in scans if s.diagnosis and not s.cropped):
            self.by_label[_label(scan)][scan.patient].append(scan.to_lungs())
        without, having = (len(self.by_label[label]) for label in (0, 1))
        if not without or not having:
            raise ConfigError(
                "not measurable here: resnet50 learns from whole volumes of patients with and without "
                f"COVID-19, and the data has {having} with and {without} without; "
                "give more, such as --data mosmed=PATH"
            )

    def loss(self, rng: np.random.Generator) -> Tensor:
        labels = [int(k) for k in rng.permutation(self.batch) % 2]
        volumes = [self._volume(label, rng) for label in labels]
        # All together: normalised by itself, no volume would differ from another.
        features = forward(self.network.features, torch.cat(volumes)).float()
        parts = features.split([len(volume) for volume in volumes])
        logits = torch.stack([self.network.classify(part) for part in parts])
        return F.binary_cross_entropy_with_logits(logits, torch.tensor(labels, device=logits.device).float())

    def _volume(self, label: int, rng: np.random.Generator) -> Tensor:
        patients = self.by_label[label]
        scans = patients[rng.choice(list(patients))]
        scan = scans[rng.integers(len(scans))]
        placed = on_canvas(scan, _strided(len(scan.slices), self.slices, rng), self.canvas, rng)
        return augment.intensity(placed.slices, rng)

    def score(self, network: Any, scan: Scan) -> float | None:
        """Probability given to what the patient has."""
        if not scan.diagnosis or scan.cropped:
            return None
        (scan,) = with_lungs([scan]) or [scan]
        probability = float(forward(network, scan.to_lungs().slices[:, None]).float().sigmoid())
        return probability if _label(scan) else 1 - probability


def _label(scan: Scan) -> int:
    return int(scan.diagnosis == Diagnosis.COVID)


def _strided(count: int, wanted: int, rng: np.random.Generator) -> list[int]:
    """Every n-th slice, so that about as many as wanted are left, beginning anywhere."""
    stride = max(1, count // wanted)
    return list(range(int(rng.integers(stride)), count, stride))


def with_lungs(scans: Iterable[Scan]) -> list[Scan]:
    """Scans with lungs marked, else found by the network that ships; those without any are left out."""
    marked = (replace(scan, lung=_lung(scan) if scan.lung is None else scan.lung) for scan in scans)
    return [scan for scan in marked if scan.lung is not None and (scan.lung > 0.5).any()]


def _lung(scan: Scan) -> Tensor:
    """Lung probability (z, h, w)."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng():  # what is drawn here is not part of the run that a seed decides
        running, find = _shipped_lungs()
    with running.running():
        probability = find(scan.slices, scan.spacing_mm)
    torch.set_num_threads(threads)  # the networks that judge take one thread a layer
    return probability.clone()


@cache
def _shipped_lungs() -> tuple[compute.Compute, FindLungs]:
    running = compute.choose(Analysis())
    return running, lungs_network(packages.read(packages.MODELS["multitask"]).file("lungs"), running)


def best_blur(cases: Iterable[Case], sigmas_mm: Sequence[float]) -> dict[str, float]:
    """The threshold baseline's ``sigma_mm`` of the best lesion Dice, mean over patients (section 4.3).

    The paper's best, 4, has no unit. Dice is at 2 mm, inside the lungs as drawn. Raises ConfigError where
    no volume has both drawn.
    """
    by_patient: dict[str, list[list[float]]] = defaultdict(list)
    for case in cases:
        if case.lung is not None and case.lesions:
            by_patient[case.patient].append(_dice_by_blur(case, shrink(case.lung, case.volume), sigmas_mm))
    if not by_patient:
        raise ConfigError("not measurable here: no volume has lungs and lesions drawn")
    means = np.mean([np.mean(rows, axis=0) for rows in by_patient.values()], axis=0)
    return {"sigma_mm": float(sigmas_mm[int(np.argmax(means))])}


def _dice_by_blur(case: Case, lung: Mask, sigmas_mm: Sequence[float]) -> list[float]:
    box = bounding_box(lung, MARGIN)
    slices, lung = prepare(case.volume)[box], lung[box]
    drawn = [torch.from_numpy(shrink(lesion, case.volume)[box]).float() for lesion in case.lesions]
    spacing = (case.volume.spacing[0], SPACING_MM, SPACING_MM)
    found = (threshold.find(slices, lung, spacing, sigma) - 0.5 for sigma in sigmas_mm)
    return [float(np.mean([dice(torch.from_numpy(f), d) for d in drawn])) for f in found]
