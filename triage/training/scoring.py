"""The whole pipeline on one case after the other, each answer against what readers drew."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from triage import severity
from triage.config import Analysis
from triage.domain import Findings, Mask, Severity, Status
from triage.errors import Rejected
from triage.models import Model, pipeline
from triage.models.infnet import SelfSupervised
from triage.models.ssm import SingleShot
from triage.training import attention, infnet, instances, metrics, ssm
from triage.training.cases import Case
from triage.training.gallery import Gallery
from triage.training.scores import BySlice, Extent, Overlap, Score, SliceAnswer


def evaluate(
    model: Model,
    cases: Iterable[Case],
    data: str = "",
    analysis: Analysis | None = None,
    gallery: Gallery | None = None,
) -> list[Score]:
    """One Score a case, read one at a time. ``data`` names the data set; ``analysis`` is the working point.

    A case that the network rejects is a Score with the reason, and with zeros against what was drawn: left
    out, the lungs that are hardest to find would raise every mean. Retryable goes through.
    """
    judge = _Judge(model, data, analysis or Analysis(), gallery)
    return [judge.score(case) for case in cases]


@dataclass(frozen=True, slots=True)
class _Judge:
    model: Model
    data: str
    analysis: Analysis
    gallery: Gallery | None

    def score(self, case: Case) -> Score:
        score = Score(
            data=self.data,
            name=case.name,
            patient=case.patient,
            picture=case.picture,
            diagnosis=case.diagnosis,
            grade_read=case.grade,
        )
        try:
            return self._picture(case, score) if case.cropped else self._volume(case, score)
        except Rejected as rejection:
            rejected = replace(score, status=Status.NOT_ANALYSABLE, reason=str(rejection))
            return self._nothing_found(case, rejected)

    @property
    def lesion_threshold(self) -> float | None:
        """None for a network that finds no lesions: its settings name none."""
        threshold = self.model.settings.get("lesion_threshold")
        return None if threshold is None else float(threshold)

    def _nothing_found(self, case: Case, score: Score) -> Score:
        """Of a rejected case: no mask was given, so nothing that was drawn is in it."""
        nothing = np.zeros(case.volume.array.shape, dtype=bool)
        if case.lung is not None:
            drawn = self._drawn(case, Findings(0.0, "drawn", False, case.lung, None))
            lungs, by_slice = _missed(case, case.lung), _missed_slices(case)
            score = replace(score, lungs=lungs, lungs_by_slice=by_slice, drawn=drawn)
        if self.lesion_threshold is None:
            return score
        if not case.cropped:
            score = replace(score, found=Extent(0.0, 0.0, None, 0.0, 0.0))
        if not case.lesions:
            return score
        averaged = 0.0 if score.picture else None
        detected = () if isinstance(self.model, SingleShot) else None
        rejected = Findings(0.0, "score", False, nothing, nothing, detected=detected)
        missed = _mean_overlap([_missed(case, drawn) for drawn in case.lesions])
        score = replace(
            score,
            instances=instances.by_slice(case, rejected),
            lesions=missed,
            lesions_by_slice=_missed_slices(case),
            threshold_averaged_dice=averaged,
        )
        if self.gallery is not None:
            self.gallery.show(score, case, nothing)
        return score

    def _picture(self, case: Case, score: Score) -> Score:
        """A picture cut to the lungs: its lesions, and their share of all of it by the rule of volumes.

        The share counts chest wall and heart as lung, so that no fraction, grade or answer is given for it;
        in sets of pictures cut alike it still orders them, which is what the AUC slice by slice asks.
        """
        threshold = self.lesion_threshold
        if threshold is None:
            return score
        everywhere = np.ones(case.volume.array.shape, dtype=bool)
        start = time.perf_counter()
        probability = self.model.lesion_map(case.volume, None)
        score = replace(score, seconds=time.perf_counter() - start)
        if probability is None:
            return score
        found = probability > threshold
        score = replace(score, probability=pipeline.score(float(found.mean())))
        if isinstance(self.model, SelfSupervised) and case.lesions:
            score = replace(score, own=infnet.measured(self.model, case))
        if isinstance(self.model, SingleShot) and case.diagnosis:
            score = replace(score, own=ssm.measured(self.model, case))
        return self._lesions(case, score, found, probability, everywhere)

    def _volume(self, case: Case, score: Score) -> Score:
        start = time.perf_counter()
        findings = self.model.predict(case.volume)
        seconds = time.perf_counter() - start
        measured = severity.measure(case.volume, findings, self.analysis.ct0_tolerance)
        if not score.picture:  # one slice shows no whole lungs: there is no answer
            status, reason = severity.answer(findings.probability, measured, self.analysis, case.millimetres)
            score = replace(score, status=status, reason=reason)
        score = replace(
            score,
            seconds=seconds,
            probability=findings.probability,
            lungs=None if case.lung is None else _overlap(case, findings.lung_mask, case.lung),
            lungs_by_slice=None if case.lung is None else _by_slice(findings.lung_mask, [case.lung]),
            slices=_slices(case, findings),
            instances=instances.by_slice(case, findings),
            attention=_attention(case, findings),
            found=_extent([_both(measured, findings)], self.analysis, findings),
            drawn=self._drawn(
                case, findings if case.lung is None else replace(findings, lung_mask=case.lung)
            ),
        )
        if findings.lesion_mask is None:
            return score
        probability = self.model.lesion_map(case.volume, findings.lung_mask) if case.lesions else None
        return self._lesions(case, score, findings.lesion_mask, probability, findings.lung_mask)

    def _lesions(
        self, case: Case, score: Score, found: Mask, probability: NDArray[np.float32] | None, lungs: Mask
    ) -> Score:
        if not case.lesions:
            return score
        score = replace(
            score,
            lesions=_mean_overlap([_overlap(case, found, m) for m in case.lesions]),
            lesions_by_slice=_by_slice(found, case.lesions),
        )
        if probability is not None:
            histograms = tuple(metrics.histogram(probability, m, lungs) for m in case.lesions)
            score = replace(score, histograms=histograms)
        if probability is not None and score.picture:
            averaged = [metrics.threshold_averaged_dice(probability, m) for m in case.lesions]
            score = replace(score, threshold_averaged_dice=float(np.mean(averaged)))
        if self.gallery is not None:
            self.gallery.show(score, case, found)
        return score

    def _drawn(self, case: Case, findings: Findings) -> Extent | None:
        """The truth of the affected fraction; where nobody drew the lungs the network's serve.

        As in the paper's test set (Goncharov et al., section 4.2). Graded as the network grades.
        """
        if not findings.lung_mask.any():
            return None
        rows = []
        for lesion in case.lesions:
            truth = replace(findings, lesion_mask=lesion)
            measured = severity.measure(case.volume, truth, self.analysis.ct0_tolerance)
            rows.append(_both(measured, truth))
        return _extent(rows, self.analysis, findings)


def _overlap(case: Case, found: Mask, drawn: Mask) -> Overlap:
    known = case.millimetres
    return Overlap(
        metrics.dice(found, drawn),
        metrics.iou(found, drawn),
        metrics.hd95(found, drawn, case.volume.spacing) if known else None,
        metrics.volume_error(found, drawn, case.volume.voxel_ml) if known else None,
    )


def _missed(case: Case, drawn: Mask) -> Overlap:
    """Of a mask that was not given, against an empty drawing too."""
    return replace(_overlap(case, np.zeros_like(drawn), drawn), dice=0.0, iou=0.0)


def _by_slice(found: Mask, raters: Sequence[Mask]) -> BySlice:
    """Mean over slices and raters."""
    pairs = [(one, other) for drawn in raters for one, other in zip(found, drawn, strict=True)]
    return BySlice(
        n=len(found),
        accuracy=float(np.mean([np.mean(one == other) for one, other in pairs])),
        iou=float(np.mean([metrics.iou(one, other) for one, other in pairs])),
        dice=float(np.mean([metrics.dice(one, other) for one, other in pairs])),
    )


def _missed_slices(case: Case) -> BySlice:
    """Of a mask that was not given: not even an empty slice is right."""
    return BySlice(len(case.volume.array), 0.0, 0.0, 0.0)


def _slices(case: Case, findings: Findings) -> tuple[SliceAnswer, ...]:
    """Of a network that judges slices, against slices in which lesions were drawn or not."""
    if findings.slice_scores is None or not case.lesions:
        return ()
    drawn = np.mean([lesion.any(axis=(1, 2)) for lesion in case.lesions], axis=0) >= 0.5
    areas = np.mean([attention.lesion_areas(lesion, case.volume) for lesion in case.lesions], axis=0)
    rows = zip(findings.slice_scores.tolist(), drawn.tolist(), areas.tolist(), strict=True)
    return tuple(SliceAnswer(*row) for row in rows)


def _attention(case: Case, findings: Findings) -> dict[str, float]:
    """Dice of each map, mean over raters."""
    raters = [attention.dice(findings.attention, lesion, case.volume) for lesion in case.lesions]
    known = [rater for rater in raters if rater]
    return {name: float(np.mean([rater[name] for rater in known])) for name in findings.attention if known}


def _mean_overlap(raters: Sequence[Overlap]) -> Overlap:
    """Several raters: each is compared with, and the comparisons averaged."""
    return Overlap(
        float(np.mean([r.dice for r in raters])),
        float(np.mean([r.iou for r in raters])),
        _mean_known([r.hd95_mm for r in raters]),
        _mean_known([r.volume_error_ml for r in raters]),
    )


def _mean_known(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _both(measured: Severity, findings: Findings) -> tuple[Severity, float]:
    """With the affected fraction of both lungs together."""
    if findings.lesion_mask is None:
        return measured, 0.0
    lung = int(np.count_nonzero(findings.lung_mask))
    lesion = int(np.count_nonzero(findings.lesion_mask & findings.lung_mask))
    return measured, lesion / lung if lung else 0.0


def _extent(rows: Sequence[tuple[Severity, float]], analysis: Analysis, findings: Findings) -> Extent | None:
    """Mean over raters; the grade is that of the mean. None where nobody marked lesions."""
    fractions = [m.affected_fraction for m, _ in rows if m.affected_fraction is not None]
    if not fractions:
        return None
    fraction = float(np.mean(fractions))
    infection = _mean_known([m.percent_infection for m, _ in rows])
    scores = [None if m.ct_severity_score is None else float(m.ct_severity_score.total) for m, _ in rows]
    return Extent(
        fraction=fraction,
        both_lungs=float(np.mean([both for _, both in rows])),
        grade=severity.grade_from(findings.grade_from, fraction, infection, analysis.ct0_tolerance),
        percent_infection=infection,
        ct_severity_score=_mean_known(scores),
    )
