"""The single-shot model (Ter-Sarkisov): lesions one by one, and the class of each slice, from one network.

Slices are the canonical ones, not the paper's 512 × 512: 2 mm a pixel, cut to the box of the lungs and black
outside them; the network enlarges them, three times at full size, to about the paper's pixels. Instance masks
give the lesion mask; the study's score is the mean of the upper half of its slices' scores for COVID-19, tips
of lungs left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, fsum

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from triage.config import Analysis
from triage.domain import DetectedLesion, Findings, Mask, ModelInfo, Vector, Volume, judged_slices
from triage.models import compute, weights
from triage.models.boxes import Place, paste
from triage.models.compute import Compute
from triage.models.packages import Package
from triage.models.pipeline import BATCH, FindLungs, InLungs, lungs_network
from triage.models.preprocessing import Box, Layout, pad, restore, stored_order
from triage.models.ssm_networks import DETECTIONS, MASK, Seen, SsmNet

UPPER = 0.5
"""Share of a study's slices, the highest, whose scores are averaged: disease need not be everywhere, and one
slice that is mistaken for ill decides nothing."""


@dataclass(frozen=True, slots=True)
class Looked:
    """What the network says of slices; those that show lung, in order."""

    index: Tensor
    """Which they are (n,)."""
    seen: Seen
    """Of each of them, the classes as probabilities (n, classes)."""


class SingleShot(InLungs):
    """Judges volumes slice by slice, and the study by its slices."""

    def __init__(
        self,
        info: ModelInfo,
        running: Compute,
        find_lungs: FindLungs,
        network: SsmNet,
        lesion_threshold: float,
    ) -> None:
        super().__init__(info, running, find_lungs, self._find, lesion_threshold)
        self.network = network

    def predict(self, volume: Volume) -> Findings:
        """See ``triage.models.Model``. The probability is ``pooled`` from the scores of judged slices."""
        with self.compute.running():
            slices, lung, lung_mask, box = self._prepared(volume)
            looked = self._look(slices[box], lung[box])
            lesions, scores = torch.zeros_like(slices), np.zeros(len(slices), np.float32)
            lesions[box] = lesion_probability(looked, lung[box].shape)
            lesion_mask = restore(lesions, self.lesion_threshold, volume) & lung_mask
            scores[looked.index + box[0].start] = looked.seen.classes[:, -1].numpy()
            judged = judged_slices(lung)
            detected = self._detected(looked, box, lesion_mask, volume, slices)
        return Findings(
            pooled(scores[judged]),
            "score",
            self.info.calibrated,
            lung_mask,
            lesion_mask,
            slice_scores=stored_order(scores * judged, volume),
            detected=tuple(sorted(detected, key=lambda one: (one.slice_index, -one.score))),
        )

    def class_scores(self, volume: Volume) -> NDArray[np.float32]:
        """Of each class (n, classes), in the n slices that show lung. For evaluation.

        Raises Rejected where none does.
        """
        with self.compute.running():
            slices, lung, _, box = self._prepared(volume)
            scores: NDArray[np.float32] = self._look(slices[box], lung[box]).seen.classes.numpy()
        return scores

    def _find(self, slices: Tensor, lung: Mask, _spacing: Vector) -> Tensor:
        return lesion_probability(self._look(slices, lung), lung.shape)

    def _look(self, slices: Tensor, lung: Mask) -> Looked:
        index = torch.from_numpy(np.flatnonzero(lung.any(axis=(1, 2))))
        masked = slices[index] * torch.from_numpy(lung)[index].to(slices.device)
        told = torch.cat(self.compute.map(self._packed, self._batches(masked))).cpu()
        areas = (self.network.classes, DETECTIONS, 4 * DETECTIONS, DETECTIONS * MASK * MASK)
        classes, scores, boxes, masks = told.split(areas, dim=1)
        shapes = (DETECTIONS, 4), (DETECTIONS, MASK, MASK)
        boxes, masks = (part.unflatten(1, shape) for part, shape in zip((boxes, masks), shapes, strict=True))
        return Looked(index, Seen(classes.sigmoid(), scores, boxes, masks))

    def _packed(self, batch: Tensor) -> Tensor:
        """All that the network says of a slice in one row."""
        return torch.cat([part.flatten(1).float() for part in self.network(batch)], dim=1)

    def _batches(self, slices: Tensor) -> Iterator[Tensor]:
        for batch in slices.split(BATCH):
            padded = pad(batch[:, None], self.network.stride).to(self.compute.device)
            yield padded.contiguous(memory_format=torch.channels_last)

    def _detected(
        self, looked: Looked, box: Box, lesion_mask: Mask, volume: Volume, slices: Tensor
    ) -> Iterator[DetectedLesion]:
        """The lesions of which the lesion mask shows anything, on the volume's own grid.

        ``box``: what was looked at of the canonical slices (z, h, w).
        """
        layout = Layout.of(volume.orientation)
        shown = layout.canonical(lesion_mask)
        (_, height, width), threshold = shown.shape, self.lesion_threshold
        pixels = torch.tensor([height / slices.shape[1], width / slices.shape[2]] * 2)
        corner = torch.tensor([box[1].start, box[2].start] * 2)
        for k, score, place, mask in detections(looked.seen, threshold):
            z = int(looked.index[k]) + box[0].start
            (rows, columns), values = drawn(mask, (place + corner) * pixels, (height, width))
            inside = (score * values > threshold).numpy() & shown[z, rows, columns]
            if inside.any():
                index, *sides = layout.stored_box((slice(z, z + 1), rows, columns), shown.shape)
                (top, bottom), (left, right) = ((side.start, side.stop) for side in sides)
                stored = np.ascontiguousarray(layout.stored(inside[None])[0])
                yield DetectedLesion(index.start, (top, left, bottom, right), score, stored)


def detections(seen: Seen, above: float) -> Iterator[tuple[int, float, Tensor, Tensor]]:
    """Which slice, score, box (4,) and mask (MASK, MASK) of each lesion with a score above this."""
    for k, rank in (seen.scores > above).nonzero().tolist():
        yield k, float(seen.scores[k, rank]), seen.boxes[k, rank], seen.masks[k, rank]


def drawn(mask: Tensor, place: Tensor, shape: tuple[int, int]) -> tuple[Place, Tensor]:
    """Where in a slice a mask (MASK, MASK) lies, and its values there; 0 where it is below one half.

    Mask R-CNN cuts masks at one half (He et al. 2017, section 3.1): a large box that is sure of itself and
    unsure of each of its pixels draws nothing.
    """
    place_in_slice, values = paste(mask, place.tolist(), shape)
    return place_in_slice, values * (values >= 0.5)


def lesion_probability(looked: Looked, shape: tuple[int, ...]) -> Tensor:
    """Of each pixel of slices of this shape (z, h, w): the highest product of score and mask of its boxes.

    A box's mask counts where it is ``drawn``.
    """
    lesions = torch.zeros(shape)
    for k, score, place, mask in detections(looked.seen, 0.0):
        (rows, columns), values = drawn(mask, place, (shape[1], shape[2]))
        part = lesions[looked.index[k], rows, columns]
        torch.maximum(part, score * values, out=part)
    return lesions


def pooled(covid: NDArray[np.float32]) -> float:
    """The study's score in [0, 1] from its slices' scores for COVID-19 (n,): the mean of the ``UPPER`` ones.

    It never falls where one of them rises, and hardly depends on how thick the slices are.
    """
    highest = np.sort(covid)[::-1][: ceil(UPPER * len(covid))]
    return fsum(highest.tolist()) / len(highest)


def load(package: Package, analysis: Analysis) -> SingleShot:
    """From the files ``lungs`` and ``ssm`` of a package. Raises ConfigError."""
    running = compute.choose(analysis)
    network, _ = weights.read(package.file("ssm"), SsmNet)
    find_lungs = lungs_network(package.file("lungs"), running)
    return SingleShot(
        package.info, running, find_lungs, network.to(running.device), package.lesion_threshold(analysis)
    )
