"""The figures of many scores: each with its interval, what it was counted on, or why it has no value."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args

import numpy as np

from triage.domain import Grade, LesionClass, Status
from triage.training import instances, metrics
from triage.training.cases import Diagnosis
from triage.training.metrics import Figure
from triage.training.scores import BySlice, Overlap, Score

SMALL_FRACTION = 0.01
"""Below this share of the lungs a few voxels decide the Dice; figures for the cases above it stand beside."""


@dataclass(frozen=True, slots=True)
class Summary:
    """All figures of one evaluation; ``FIGURES`` gives their order and their names for people."""

    cases: int
    patients: int
    not_analysable: tuple[tuple[str, str], ...]
    """(case, reason): wrong answers to every question; a rejected one found nothing of what was drawn."""
    figures: Mapping[str, Figure]

    def named(self) -> dict[str, dict[str, Any]]:
        """Every figure by key, plain: name, value, low, high, n, patients, unit, where and reason."""
        return {key: {"name": FIGURES[key], **asdict(figure)} for key, figure in self.figures.items()}

    @property
    def applicable(self) -> Mapping[str, Figure]:
        """Without those that this kind of network never has: not what the data could not tell."""
        return {k: figure for k, figure in self.figures.items() if figure.reason not in NEVER}


FIGURES = {
    "auc_healthy": "ROC AUC, COVID-19 vs healthy",
    "auc_others": "ROC AUC, COVID-19 vs all others",
    "sensitivity": "Sensitivity at the working point",
    "specificity": "Specificity at the working point",
    "accuracy": "Accuracy at the working point",
    "average_accuracy": "Average accuracy of both groups at the working point",
    "spearman": "Spearman's ρ of the affected fraction",
    "lungs_dice": "Lungs, Dice",
    "lungs_dice_worst": "Lungs, Dice of the worst volume",
    "lungs_iou": "Lungs, IoU",
    "lungs_hd95": "Lungs, HD95",
    "lungs_volume_error": "Lungs, volume found − drawn",
    "lesions_dice": "Lesions, Dice",
    "lesions_dice_over_1_percent": "Lesions, Dice where over 1 % of the lungs",
    "lesions_iou": "Lesions, IoU",
    "lesions_hd95": "Lesions, HD95",
    "lesions_volume_error": "Lesions, volume found − drawn",
    "lungs_slices_accuracy": "Lungs, mean accuracy of slices",
    "lungs_slices_iou": "Lungs, mean IoU of slices (empty = 1)",
    "lungs_slices_dice": "Lungs, mean Dice of slices (empty = 1)",
    "lesions_slices_accuracy": "Lesions, mean accuracy of slices",
    "lesions_slices_iou": "Lesions, mean IoU of slices (empty = 1)",
    "lesions_slices_dice": "Lesions, mean Dice of slices (empty = 1)",
    "slices_accuracy": "Slices with and without lesions, accuracy",
    "slices_average_accuracy": "Slices, average accuracy of both",
    "slices_precision": "Slices, precision",
    "slices_sensitivity": "Slices, sensitivity",
    "slices_f1": "Slices, F1",
    "slices_specificity": "Slices, specificity",
    "slices_auc": "Slices, ROC AUC",
    "detected_ap": "Lesions one by one, AP (IoU 0.5 to 0.95)",
    "detected_ap_50": "Lesions one by one, AP at IoU 0.5",
    "detected_ap_75": "Lesions one by one, AP at IoU 0.75",
    "detected_slices_ap": "Lesions one by one, mean AP of slices (IoU 0.5 to 0.95; empty = 1)",
    "detected_slices_ap_50": "Lesions one by one, mean AP of slices at IoU 0.5 (empty = 1)",
    "detected_slices_ap_75": "Lesions one by one, mean AP of slices at IoU 0.75 (empty = 1)",
    "fraction_error": "Affected fraction, mean error",
    "fraction_error_worst": "Affected fraction, largest error of a volume",
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
    "pictures_ground_glass_dice": "Pictures, ground glass, Dice at the fixed threshold",
    "pictures_ground_glass_dice_threshold_averaged": "Pictures, ground glass, threshold-averaged Dice",
    "pictures_consolidation_dice": "Pictures, consolidation, Dice at the fixed threshold",
    "pictures_consolidation_dice_threshold_averaged": "Pictures, consolidation, threshold-averaged Dice",
    "pictures_loss_single": "Pictures, loss of Single Inf-Net",
    "pictures_loss_multi": "Pictures, loss of Multi Inf-Net",
    "seconds": "Seconds a volume",
}
"""Key → name for people, in the order in which they are printed."""

OWN = (
    *(f"{kind}_dice{how}" for kind in get_args(LesionClass) for how in ("", "_threshold_averaged")),
    "loss_single",
    "loss_multi",
)
"""Of ``Score.own``."""

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
            [s for s in volumes if not _is_small(s)],
            _lesions_dice,
            "no volume with lesions drawn over 1 % of its lungs",
        ),
        **_by_slice("lungs", volumes, lambda s: s.lungs_by_slice),
        **_by_slice("lesions", volumes, lambda s: s.lesions_by_slice),
        **_slices(scores),
        **_detected(scores),
        **_severity(volumes),
        "ece": _ece(volumes),
        "pictures_dice": _mean(pictures, _lesions_dice, NO_PICTURES),
        "pictures_dice_threshold_averaged": _mean(pictures, lambda s: s.threshold_averaged_dice, NO_PICTURES),
        "pictures_iou": _mean(pictures, lambda s: None if s.lesions is None else s.lesions.iou, NO_PICTURES),
        "pictures_ece": _ece(pictures),
        "pictures_auc": _pictures_auc(pictures),
        **{f"pictures_{name}": _mean(pictures, _own(name), NOT_TOLD) for name in OWN},
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
JUDGES_NO_SLICES = "the network judges no slices"
NOT_TOLD = "nobody told kinds of lesion apart in pictures: network, data or both"
DETECTS_NONE = "the network finds no lesions one by one"
NEVER = (JUDGES_NO_SLICES, DETECTS_NONE, NOT_TOLD)
NO_MILLIMETRES = "no volume of known spacing with both drawn and found"


def _lungs_dice(score: Score) -> float | None:
    return None if score.lungs is None else score.lungs.dice


def _lesions_dice(score: Score) -> float | None:
    return None if score.lesions is None else score.lesions.dice


def _own(name: str) -> _Of:
    return lambda score: score.own.get(name)


def _is_small(score: Score) -> bool:
    """Where neither reader nor network marked the lungs the share is unknown, and the zero counts."""
    return score.drawn is not None and score.drawn.both_lungs <= SMALL_FRACTION


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
    """The extreme over volumes: a mean over a patient's volumes would hide the one that failed."""
    known, values = _rows(scores, of)
    if not known:
        return Figure(value=None, reason=NO_MASKS)
    return Figure(
        value=pick(values),
        n=len(known),
        patients=len({s.patient for s in known}),
        unit=unit,
        where=_where(known),
        reason="an extreme: no interval",
    )


def _masks(what: str, volumes: Sequence[Score], of: Callable[[Score], Overlap | None]) -> dict[str, Figure]:
    def part(name: str) -> _Of:
        return lambda s: None if (overlap := of(s)) is None else getattr(overlap, name)

    return {
        f"{what}_dice": _mean(volumes, part("dice"), NO_MASKS),
        f"{what}_iou": _mean(volumes, part("iou"), NO_MASKS),
        f"{what}_hd95": _mean(volumes, part("hd95_mm"), NO_MILLIMETRES, "mm"),
        f"{what}_volume_error": _mean(volumes, part("volume_error_ml"), NO_MILLIMETRES, "ml"),
    }


def _by_slice(
    what: str, volumes: Sequence[Score], of: Callable[[Score], BySlice | None]
) -> dict[str, Figure]:
    known = [(s, means) for s in volumes if (means := of(s)) is not None]

    def figure(name: str) -> Figure:
        values, n = [getattr(means, name) for _, means in known], [means.n for _, means in known]
        return replace(metrics.slice_mean(values, n, [s.patient for s, _ in known]), where=where)

    where = _where(s for s, _ in known)
    return {
        f"{what}_slices_{name}": figure(name) if known else Figure(value=None, reason=NO_MASKS)
        for name in ("accuracy", "iou", "dice")
    }


def _slices(scores: Sequence[Score]) -> dict[str, Figure]:
    """All slices together, as both papers count, in which a reader drew lesions or found none."""
    known = [(s, answer) for s in scores for answer in s.slices]
    names = [*metrics.MEASURES, "auc"]
    drawn, patients = [answer.drawn for _, answer in known], [s.patient for s, _ in known]
    if not known:
        why_not = JUDGES_NO_SLICES if any(s.lesions for s in scores) else NO_MASKS
    elif len({*drawn}) < 2:
        why_not = "needs slices with and without lesions drawn"
    else:
        given = [answer.score for _, answer in known]
        figures = metrics.measures([score > 0.5 for score in given], drawn, patients)
        figures["auc"] = metrics.roc_auc(given, drawn, patients)
        where, silent = _where(s for s, _ in known), sum(bool(s.lesions and not s.slices) for s in scores)
        left_out = f"{silent} cases without an answer left out" if silent else ""
        return {
            f"slices_{name}": replace(
                figures[name], where=where, reason="; ".join(filter(None, (figures[name].reason, left_out)))
            )
            for name in names
        }
    return {f"slices_{name}": Figure(value=None, reason=why_not) for name in names}


def _detected(scores: Sequence[Score]) -> dict[str, Figure]:
    """Average precision over all slices together and slice by slice; see ``instances``."""
    known = [(s, one) for s in scores for one in s.instances]
    slices, patients = [one for _, one in known], [s.patient for s, _ in known]
    at = {"": instances.THRESHOLDS, "_50": (0.5,), "_75": (0.75,)}
    ways = {"detected_ap": instances.coco, "detected_slices_ap": instances.of_slices}
    if not slices:
        why_not = DETECTS_NONE if any(s.lesions for s in scores) else NO_MASKS
        return {f"{name}{end}": Figure(value=None, reason=why_not) for name in ways for end in at}
    where = _where(s for s, _ in known)
    return {
        f"{name}{end}": replace(way(slices, patients, thresholds), where=where)
        for name, way in ways.items()
        for end, thresholds in at.items()
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
        **_both_groups(volumes),
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
    silent = len(groups) - len(known)
    reasons = (figure.reason, f"{silent} without an answer left out" if silent else "")
    return replace(figure, where=_where(known), reason="; ".join(filter(None, reasons)))


def _pictures_auc(pictures: Sequence[Score]) -> Figure:
    """Slice by slice; where no patient is known an interval would take each slice for a patient."""
    figure = _auc(pictures, (Diagnosis.HEALTHY, Diagnosis.OTHER), "others")
    asked = [s for s in pictures if s.diagnosis is not None]
    if asked and all(s.probability is None for s in asked):
        return replace(figure, reason="the network finds no lesions, and is not asked about cropped pictures")
    if figure.value is None or all(s.patient != s.name for s in asked):
        return figure
    return replace(figure, low=None, high=None, reason="patients unknown: no interval")


def _share(scores: Sequence[Score], group: tuple[Diagnosis, ...], right: Status, why_not: str) -> Figure:
    """A case that was not analysable is no right answer, to either question."""
    known = [s for s in scores if s.diagnosis in group and s.status is not None]
    if not known:
        return Figure(value=None, reason=why_not)
    figure = metrics.share([s.status == right for s in known], [s.patient for s in known])
    return replace(figure, where=_where(known))


def _both_groups(volumes: Sequence[Score]) -> dict[str, Figure]:
    """Right answers over both groups; what was not analysable is wrong, whoever the patient is."""
    known = [s for s in volumes if s.diagnosis is not None and s.status is not None]
    ill = [s.diagnosis == Diagnosis.COVID for s in known]
    names = ("accuracy", "average_accuracy")
    if len({*ill}) < 2:
        why_not = "needs volumes of patients with and without COVID-19"
        return dict.fromkeys(names, Figure(value=None, reason=why_not))
    right = [s.status == (Status.POSITIVE if i else Status.NEGATIVE) for s, i in zip(known, ill, strict=True)]
    found = [i == r for i, r in zip(ill, right, strict=True)]
    figures = metrics.measures(found, ill, [s.patient for s in known])
    return {name: replace(figures[name], where=_where(known)) for name in names}


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
        "grade_agreement": _same_grade(
            [(s, s.drawn.grade) for s in volumes if s.drawn and s.drawn.grade], NO_MASKS
        ),
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


def threshold_curve(scores: Iterable[Score], thresholds: Sequence[float]) -> dict[float, float]:
    """Mean distance of the affected fraction from the drawn one, over patients, at each threshold.

    From the stored histograms: nothing is run again.
    """
    known = [s for s in scores if s.histograms and s.drawn]
    patients = [s.patient for s in known]

    def mean(t: float) -> float:
        each = metrics.patient_means([abs(s.fraction_error_at(t) or 0.0) for s in known], patients)
        return float(np.mean(list(each.values())))

    return {t: mean(t) for t in thresholds}
