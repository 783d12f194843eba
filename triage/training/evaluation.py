"""How well a network judges cases it has not seen: the whole pipeline, case by case, and the summary.

``evaluate`` gives one Score a case, plain data that can be stored; ``summarise`` makes the figures, each
with its interval, what it was counted on, and "not measurable here" where the cases cannot tell.
"""

from __future__ import annotations

import heapq
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from triage import models, severity
from triage.config import Analysis
from triage.domain import Findings, Grade, Mask, ModelInfo, Severity, Status
from triage.errors import ConfigError, Rejected
from triage.models import Model
from triage.models.preprocessing import Layout
from triage.training import metrics
from triage.training.cases import Case, Diagnosis
from triage.training.datasets import DATASETS
from triage.training.metrics import Figure, Histogram

SMALL_FRACTION = 0.01
"""Below this share of the lungs a few voxels decide the Dice; figures for the cases above it stand beside."""
FALLBACK_THRESHOLD = 0.5
"""For a network whose settings name no lesion threshold."""


@dataclass(frozen=True, slots=True)
class Overlap:
    """A mask found against the one drawn (mean over raters); mm and ml only where the spacing is known."""

    dice: float
    iou: float
    hd95_mm: float | None = None
    volume_error_ml: float | None = None


@dataclass(frozen=True, slots=True)
class Extent:
    """How much of the lungs is affected, by one pair of masks; fractions in [0, 1]."""

    fraction: float
    """Of the worse lung."""
    both_lungs: float
    grade: Grade
    percent_infection: float | None
    ct_severity_score: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What one case showed. None is unknown: nobody drew it, or the network does not give it."""

    data: str
    name: str
    patient: str
    picture: bool
    """A single slice, not a volume."""
    diagnosis: Diagnosis | None = None
    grade_read: Grade | None = None
    """As a radiologist saw it."""
    status: Status | None = None
    """At the working point; None for a cropped picture, which has no lungs to judge."""
    reason: str = ""
    """Why it was not analysable."""
    probability: float | None = None
    lungs: Overlap | None = None
    lesions: Overlap | None = None
    threshold_averaged_dice: float | None = None
    """Pictures only: Inf-Net's measure."""
    drawn: Extent | None = None
    found: Extent | None = None
    histograms: tuple[Histogram, ...] = ()
    """One a rater."""
    seconds: float | None = None
    """Of the network, preprocessing included, reading not."""

    def dice_at(self, threshold: float) -> float | None:
        """Lesion Dice at another lesion threshold, a multiple of 0.01; mean over raters."""
        return float(np.mean([h.dice(threshold) for h in self.histograms])) if self.histograms else None


_SCORES = TypeAdapter(list[Score])


def to_json(scores: Sequence[Score]) -> str:
    """Scores as text that ``from_json`` reads back."""
    return _SCORES.dump_json(list(scores)).decode()


def from_json(text: str) -> list[Score]:
    """Scores as ``to_json`` wrote them."""
    return _SCORES.validate_json(text)


@dataclass(frozen=True, slots=True)
class Sketch:
    """The slice of a case in which the drawn and the found lesions differ most, upright as it is read."""

    score: Score
    slice_index: int
    image: NDArray[np.int16]
    """HU (y, x)."""
    drawn: Mask
    found: Mask

    @classmethod
    def of(cls, score: Score, case: Case, found: Mask) -> Sketch:
        """Of the first rater's drawing."""
        drawn = case.lesions[0]
        k = int(np.count_nonzero(found ^ drawn, axis=(1, 2)).argmax())
        layout = Layout.of(case.volume.orientation)
        image, truth, answer = (layout.canonical(a[k : k + 1])[0] for a in (case.volume.array, drawn, found))
        return cls(score, k, image.copy(), truth.copy(), answer.copy())


@dataclass
class Gallery:
    """Keeps the sketches of the cases with the lowest lesion Dice, whatever the number of cases."""

    size: int = 6
    _heap: list[tuple[float, int, Sketch]] = field(default_factory=list)
    _seen: int = 0

    def show(self, score: Score, case: Case, found: Mask) -> None:
        """Keep the case if it is among the worst."""
        if score.lesions is None:
            return
        self._seen += 1
        heapq.heappush(self._heap, (-score.lesions.dice, self._seen, Sketch.of(score, case, found)))
        if len(self._heap) > self.size:
            heapq.heappop(self._heap)

    def worst(self) -> list[Sketch]:
        """Worst first."""
        return [sketch for _, _, sketch in sorted(self._heap, reverse=True)]


def evaluate(
    model: Model,
    cases: Iterable[Case],
    data: str = "",
    analysis: Analysis | None = None,
    gallery: Gallery | None = None,
) -> list[Score]:
    """One Score a case, read one at a time. ``data`` names the data set; ``analysis`` is the working point.

    A case that the network rejects is a Score with the reason. Retryable goes through.
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
            picture=len(case.volume.array) == 1,
            diagnosis=case.diagnosis,
            grade_read=case.grade,
        )
        try:
            return self._picture(case, score) if case.cropped else self._volume(case, score)
        except Rejected as rejection:
            return replace(score, status=Status.NOT_ANALYSABLE, reason=str(rejection))

    def _picture(self, case: Case, score: Score) -> Score:
        """A picture cut to the lungs: its lesions only, all of it being lung."""
        if not case.lesions:
            return score
        everywhere = np.ones(case.volume.array.shape, dtype=bool)
        start = time.perf_counter()
        probability = self.model.lesion_map(case.volume, everywhere)
        score = replace(score, seconds=time.perf_counter() - start)
        if probability is None:
            return score
        threshold = float(self.model.settings.get("lesion_threshold", FALLBACK_THRESHOLD))
        return self._lesions(case, score, probability > threshold, probability, everywhere)

    def _volume(self, case: Case, score: Score) -> Score:
        start = time.perf_counter()
        findings = self.model.predict(case.volume)
        seconds = time.perf_counter() - start
        measured = severity.measure(case.volume, findings, self.analysis.ct0_tolerance)
        status, reason = self._status(case, findings, measured)
        score = replace(
            score,
            seconds=seconds,
            probability=findings.probability,
            status=status,
            reason=reason,
            lungs=None if case.lung is None else _overlap(case, findings.lung_mask, case.lung),
            found=_extent([_both(measured, findings)], self.analysis),
            drawn=self._drawn(case, findings),
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
        score = replace(score, lesions=_mean_overlap([_overlap(case, found, m) for m in case.lesions]))
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

        As in the paper's test set (Goncharov et al., section 4.2).
        """
        lung = findings.lung_mask if case.lung is None else case.lung
        if not lung.any():
            return None
        rows = []
        for lesion in case.lesions:
            truth = replace(findings, lung_mask=lung, lesion_mask=lesion)
            measured = severity.measure(case.volume, truth, self.analysis.ct0_tolerance)
            rows.append(_both(measured, truth))
        return _extent(rows, self.analysis)

    def _status(self, case: Case, findings: Findings, measured: Severity) -> tuple[Status, str]:
        """As the daemon answers: too little lung is not judged, and nobody is negative in doubt."""
        if case.millimetres and measured.lung_volume_ml < self.analysis.minimum_lung_ml:
            return Status.NOT_ANALYSABLE, f"only {measured.lung_volume_ml:.0f} ml of lung found"
        if severity.positive(findings.probability, measured.affected_fraction, self.analysis):
            return Status.POSITIVE, ""
        if measured.doubts:
            return Status.NOT_ANALYSABLE, "; ".join(measured.doubts)
        return Status.NEGATIVE, ""


def _overlap(case: Case, found: Mask, drawn: Mask) -> Overlap:
    known = case.millimetres
    return Overlap(
        metrics.dice(found, drawn),
        metrics.iou(found, drawn),
        metrics.hd95(found, drawn, case.volume.spacing) if known else None,
        metrics.volume_error(found, drawn, case.volume.voxel_ml) if known else None,
    )


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


def _extent(rows: Sequence[tuple[Severity, float]], analysis: Analysis) -> Extent | None:
    """Mean over raters; the grade is that of the mean. None where nobody marked lesions."""
    fractions = [m.affected_fraction for m, _ in rows if m.affected_fraction is not None]
    if not fractions:
        return None
    fraction = float(np.mean(fractions))
    scores = [None if m.ct_severity_score is None else float(m.ct_severity_score.total) for m, _ in rows]
    return Extent(
        fraction=fraction,
        both_lungs=float(np.mean([both for _, both in rows])),
        grade=severity.grade(fraction, analysis.ct0_tolerance),
        percent_infection=_mean_known([m.percent_infection for m, _ in rows]),
        ct_severity_score=_mean_known(scores),
    )


def threshold_curve(scores: Iterable[Score], thresholds: Sequence[float]) -> dict[float, float]:
    """Mean lesion Dice over patients at each threshold, from the stored histograms; nothing is run again."""
    known = [s for s in scores if s.histograms]
    patients = [s.patient for s in known]
    return {
        t: float(
            np.mean(list(metrics.patient_means([s.dice_at(t) or 0.0 for s in known], patients).values()))
        )
        for t in thresholds
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One network on some data sets: what the tables, the JSON and the report are made of."""

    info: ModelInfo
    settings: Mapping[str, str | float]
    sources: Mapping[str, Path]
    patients_chosen: tuple[str, ...]
    """Only these patients were asked for; empty for all."""
    scores: tuple[Score, ...]
    summary: Summary
    worst: tuple[Sketch, ...]

    @property
    def described_data(self) -> str:
        """ "medseg9 (9 cases), semiseg (50 cases)"."""
        counts = Counter(s.data for s in self.scores)
        chosen = f", patients {', '.join(self.patients_chosen)}" if self.patients_chosen else ""
        return ", ".join(f"{data} ({n} cases)" for data, n in counts.items()) + chosen


def run(
    analysis: Analysis,
    sources: Mapping[str, Path],
    patients: Sequence[str] = (),
    track: Callable[[Iterable[Case]], Iterable[Case]] = iter,
) -> Evaluation:
    """Evaluate the network that ``analysis`` names on data sets, of all patients or of some.

    ``sources``: kind of data (``datasets.DATASETS``) → folder. ``track`` watches the cases go by. Raises
    ConfigError for an unknown kind, a folder that is not laid out so, or a patient who is not there.
    """
    model = models.load(analysis)
    scores: list[Score] = []
    worst: list[Sketch] = []
    for kind, path in sources.items():
        if kind not in DATASETS:
            raise ConfigError(f"--data {kind}=…: unknown kind of data; there are {', '.join(DATASETS)}")
        cases = (case for case in DATASETS[kind].read(path) if not patients or case.patient in patients)
        gallery = Gallery()
        scores += evaluate(model, track(cases), kind, analysis, gallery)
        worst += gallery.worst()
    missing = set(patients) - {s.patient for s in scores}
    if missing or not scores:
        raise ConfigError(
            f"no case of patient {', '.join(sorted(missing))}" if missing else "no case to judge"
        )
    return Evaluation(
        info=model.info,
        settings=model.settings,
        sources=sources,
        patients_chosen=tuple(patients),
        scores=tuple(scores),
        summary=summarise(scores),
        worst=tuple(worst),
    )


@dataclass(frozen=True, slots=True)
class Summary:
    """All figures of one evaluation; ``FIGURES`` gives their order and their names for people."""

    cases: int
    patients: int
    not_analysable: tuple[tuple[str, str], ...]
    """(case, reason): they are in no Dice and no fraction, and count as wrong answers."""
    figures: Mapping[str, Figure]


FIGURES = {
    "auc_healthy": "ROC AUC, COVID-19 vs healthy",
    "auc_others": "ROC AUC, COVID-19 vs all others",
    "sensitivity": "Sensitivity at the working point",
    "specificity": "Specificity at the working point",
    "spearman": "Spearman's ρ of the affected fraction",
    "lungs_dice": "Lungs, Dice",
    "lungs_dice_worst": "Lungs, Dice of the worst patient",
    "lungs_iou": "Lungs, IoU",
    "lungs_hd95": "Lungs, HD95",
    "lungs_volume_error": "Lungs, volume found − drawn",
    "lesions_dice": "Lesions, Dice",
    "lesions_dice_over_1_percent": "Lesions, Dice where over 1 % of the lungs",
    "lesions_iou": "Lesions, IoU",
    "lesions_hd95": "Lesions, HD95",
    "lesions_volume_error": "Lesions, volume found − drawn",
    "fraction_error": "Affected fraction, mean error",
    "fraction_error_worst": "Affected fraction, largest error",
    "fraction_bias": "Affected fraction, found − drawn",
    "percent_infection_error": "Percentage of infection (PI), mean error",
    "ct_severity_score_error": "CT severity score (0–40), mean error",
    "grade_agreement": "Same grade as by the drawn masks",
    "grade_agreement_read": "Same grade as the radiologist's",
    "ece": "Calibration error of the lesion map (ECE)",
    "pictures_dice": "Pictures, lesion Dice at the fixed threshold",
    "pictures_dice_threshold_averaged": "Pictures, threshold-averaged Dice",
    "pictures_iou": "Pictures, IoU",
    "pictures_ece": "Pictures, calibration error (ECE)",
    "pictures_auc": "Pictures, ROC AUC slice by slice",
    "seconds": "Seconds a volume",
}
"""Key → name for people, in the order in which they are printed."""

_Of = Callable[[Score], float | None]


def summarise(scores: Sequence[Score]) -> Summary:
    """Every figure of ``FIGURES``, measured or "not measurable here" with the reason."""
    volumes = [s for s in scores if not s.picture]
    pictures = [s for s in scores if s.picture]
    figures = {
        **_identification(volumes),
        **_masks("lungs", volumes, lambda s: s.lungs),
        "lungs_dice_worst": _worst(volumes, _lungs_dice, min),
        **_masks("lesions", volumes, lambda s: s.lesions),
        "lesions_dice_over_1_percent": _mean(
            [s for s in volumes if s.drawn and s.drawn.both_lungs > SMALL_FRACTION],
            _lesions_dice,
            "no volume with lesions drawn over 1 % of its lungs",
        ),
        **_severity(volumes),
        "ece": _ece(volumes),
        "pictures_dice": _mean(pictures, _lesions_dice, NO_PICTURES),
        "pictures_dice_threshold_averaged": _mean(pictures, lambda s: s.threshold_averaged_dice, NO_PICTURES),
        "pictures_iou": _mean(pictures, lambda s: None if s.lesions is None else s.lesions.iou, NO_PICTURES),
        "pictures_ece": _ece(pictures),
        "pictures_auc": _auc(pictures, (Diagnosis.HEALTHY, Diagnosis.OTHER), "others"),
        "seconds": _mean(volumes, lambda s: s.seconds, "no volume was judged", "s"),
    }
    return Summary(
        len(scores),
        len({s.patient for s in scores}),
        tuple((s.name, s.reason) for s in scores if s.status == Status.NOT_ANALYSABLE),
        {key: figures[key] for key in FIGURES},
    )


NO_PICTURES = "no picture with lesions drawn and found"
NO_MASKS = "no volume with both drawn and found"
NO_MILLIMETRES = "no volume of known spacing with both drawn and found"


def _lungs_dice(score: Score) -> float | None:
    return None if score.lungs is None else score.lungs.dice


def _lesions_dice(score: Score) -> float | None:
    return None if score.lesions is None else score.lesions.dice


def _where(scores: Iterable[Score]) -> str:
    return ", ".join(sorted({s.data for s in scores}))


def _rows(scores: Sequence[Score], of: _Of) -> tuple[list[Score], list[float]]:
    pairs = [(s, value) for s in scores if (value := of(s)) is not None]
    return [s for s, _ in pairs], [value for _, value in pairs]


def _mean(scores: Sequence[Score], of: _Of, why_not: str, unit: str = "") -> Figure:
    known, values = _rows(scores, of)
    if not known:
        return Figure(value=None, reason=why_not)
    return replace(metrics.mean(values, [s.patient for s in known], unit=unit), where=_where(known))


def _worst(
    scores: Sequence[Score], of: _Of, pick: Callable[[Iterable[float]], float], unit: str = ""
) -> Figure:
    known, values = _rows(scores, of)
    if not known:
        return Figure(value=None, reason=NO_MASKS)
    means = metrics.patient_means(values, [s.patient for s in known])
    return Figure(
        value=pick(means.values()), n=len(known), patients=len(means), unit=unit, where=_where(known),
        reason="one patient: no interval",
    )  # fmt: skip


def _masks(what: str, volumes: Sequence[Score], of: Callable[[Score], Overlap | None]) -> dict[str, Figure]:
    def part(name: str) -> _Of:
        return lambda s: None if (overlap := of(s)) is None else getattr(overlap, name)

    return {
        f"{what}_dice": _mean(volumes, part("dice"), NO_MASKS),
        f"{what}_iou": _mean(volumes, part("iou"), NO_MASKS),
        f"{what}_hd95": _mean(volumes, part("hd95_mm"), NO_MILLIMETRES, "mm"),
        f"{what}_volume_error": _mean(volumes, part("volume_error_ml"), NO_MILLIMETRES, "ml"),
    }


def _identification(volumes: Sequence[Score]) -> dict[str, Figure]:
    others = (Diagnosis.HEALTHY, Diagnosis.OTHER)
    return {
        "auc_healthy": _auc(volumes, (Diagnosis.HEALTHY,), "healthy"),
        "auc_others": _auc(volumes, others, "others"),
        "sensitivity": _share(
            volumes, (Diagnosis.COVID,), Status.POSITIVE, "no volume of a COVID-19 patient"
        ),
        "specificity": _share(volumes, others, Status.NEGATIVE, "no volume of a patient without COVID-19"),
        "spearman": _spearman(volumes),
    }


def _auc(scores: Sequence[Score], against: tuple[Diagnosis, ...], name: str) -> Figure:
    """COVID-19 against these groups, by probability (Goncharov et al., section 5.1)."""
    groups = [s for s in scores if s.diagnosis in (Diagnosis.COVID, *against)]
    known = [s for s in groups if s.probability is not None]
    if groups and not known:
        return Figure(value=None, reason="the network gives no probability for these")
    positive = [s.diagnosis == Diagnosis.COVID for s in known]
    ill, well = (
        len({s.patient for s in known if (s.diagnosis == Diagnosis.COVID) == p}) for p in (True, False)
    )
    if not ill or not well:
        return Figure(
            value=None, reason=f"needs patients of both groups; here {ill} with COVID-19 and {well} {name}"
        )
    figure = metrics.roc_auc([s.probability or 0.0 for s in known], positive, [s.patient for s in known])
    return replace(figure, where=_where(known))


def _share(scores: Sequence[Score], group: tuple[Diagnosis, ...], right: Status, why_not: str) -> Figure:
    """A case that was not analysable is no right answer, to either question."""
    known = [s for s in scores if s.diagnosis in group and s.status is not None]
    if not known:
        return Figure(value=None, reason=why_not)
    figure = metrics.share([s.status == right for s in known], [s.patient for s in known])
    return replace(figure, where=_where(known))


def _spearman(volumes: Sequence[Score]) -> Figure:
    """Over COVID-19 volumes; a network without lesion masks is ranked by its probability (section 5.1)."""
    known = [s for s in volumes if s.drawn and ranking(s) is not None and has_covid(s)]
    if len({s.patient for s in known}) < metrics.FEWEST_PATIENTS:
        return Figure(
            value=None, reason=f"needs {metrics.FEWEST_PATIENTS} COVID-19 patients with lesions drawn"
        )
    drawn = [s.drawn.fraction for s in known if s.drawn]
    found = [ranking(s) or 0.0 for s in known]
    return replace(metrics.spearman(drawn, found, [s.patient for s in known]), where=_where(known))


def has_covid(score: Score) -> bool:
    """By the data set's word; where it says nothing, by lesions drawn."""
    if score.diagnosis is None:
        return score.drawn is not None and score.drawn.fraction > 0
    return score.diagnosis == Diagnosis.COVID


def ranking(score: Score) -> float | None:
    """What orders patients by severity: the fraction, else the probability."""
    return score.found.fraction if score.found else score.probability


def _severity(volumes: Sequence[Score]) -> dict[str, Figure]:
    def error(s: Score) -> float | None:
        return 100 * (s.found.fraction - s.drawn.fraction) if s.found and s.drawn else None

    def distance(s: Score) -> float | None:
        return None if (e := error(s)) is None else abs(e)

    return {
        "fraction_error": _mean(volumes, distance, NO_MASKS, "points"),
        "fraction_error_worst": _worst(volumes, distance, max, "points"),
        "fraction_bias": _mean(volumes, error, NO_MASKS, "points"),
        "percent_infection_error": _mean(volumes, _distance("percent_infection", 100), NO_MASKS, "points"),
        "ct_severity_score_error": _mean(volumes, _distance("ct_severity_score"), NO_MASKS, "of 40"),
        "grade_agreement": _same_grade([(s, s.drawn.grade) for s in volumes if s.drawn], NO_MASKS),
        "grade_agreement_read": _same_grade(
            [(s, s.grade_read) for s in volumes if s.grade_read], "no volume graded by a radiologist"
        ),
    }


def _distance(name: str, scale: float = 1) -> _Of:
    def distance(s: Score) -> float | None:
        found, drawn = (getattr(extent, name, None) for extent in (s.found, s.drawn))
        return None if found is None or drawn is None else float(scale * abs(found - drawn))

    return distance


def _same_grade(graded: Sequence[tuple[Score, Grade]], why_not: str) -> Figure:
    known = [(s, s.found.grade == grade) for s, grade in graded if s.found]
    if not known:
        return Figure(value=None, reason=why_not)
    figure = metrics.share([same for _, same in known], [s.patient for s, _ in known])
    return replace(figure, where=_where(s for s, _ in known))


def _ece(scores: Sequence[Score]) -> Figure:
    known = [s for s in scores if s.histograms]
    if not known:
        return Figure(value=None, reason="no lesion probability to compare with a drawing")
    tables = np.stack([calibration_table(s) for s in known])
    return replace(metrics.ece(tables, [s.patient for s in known]), where=_where(known))


def calibration_table(score: Score) -> metrics.Numbers:
    """The case's histogram, (lesion, other, sums) × bins, mean over raters."""
    table: metrics.Numbers = np.mean([h.table() for h in score.histograms], axis=0)
    return table
