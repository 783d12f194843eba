"""A system's own paper, table by table, with our figures beside the row of the same network."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from typing import Any, NamedTuple, TypeVar

import numpy as np

from triage.domain import Grade
from triage.training import metrics, paper
from triage.training.attention import GROUPS, size_group
from triage.training.cases import Diagnosis
from triage.training.evaluation import Evaluation
from triage.training.metrics import Figure
from triage.training.scores import Score
from triage.training.wording import NOT_MEASURABLE, value

Key = TypeVar("Key")
Row = tuple[str, tuple[tuple[str, str], ...]]
"""Name, and for each column the paper's figure and ours, which is empty in a row of another network."""

NOTHING = "–"
"""What a paper does not give."""
BY_PATIENT = "Dice by patient"
PLUS_MINUS = (
    "± is the paper's r = 1.96·√(m(1−m)/N), N slices (table 8: patients of the grade): it takes neighbouring "
    "slices for witnesses of their own. In brackets ours: 95 % of patients."
)
SLICE_MEANS = (
    "The paper's IoU and DSC are means over slices in which an empty mask found empty counts 1, and most are "
    f"empty; pooled over a volume, {BY_PATIENT} is the figure to go by."
)
COPIED = (
    "Two printed figures look like copies of their neighbours: of DenseNet201 UNet the accuracy in table 5, "
    "94.88, and its ± in table 6, 0.73, are those of its IoU."
)
CONTROLS = (
    "The paper's controls are healthy; ours are all patients without COVID-19. AA is the mean of sensitivity "
    "and specificity. Accuracy is (TP + TN)/N: the TP + FP of the paper's equation 12 is a misprint."
)

LOSSES = (
    "The paper's losses are of other pictures, and of sums that it does not spell out; ours are its equation "
    "2 and the cross-entropy of three classes. Compare the order of rows, not the numbers."
)
THRESHOLDS = (
    "Threshold-averaged: each map stretched to 0…1 and the Dice averaged over 256 thresholds, as Inf-Net's "
    "authors do; beside it Dice at the fixed threshold, as the product decides."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """One table of a paper and ours beside."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()


def tables(evaluations: Sequence[Evaluation]) -> list[Published]:
    """Those of ``TABLES`` for the systems that were evaluated."""
    found: list[Published] = []
    for system, make in TABLES.items():
        ours = [e for e in evaluations if e.info.system == system]
        found += make(ours) if ours else []
    return found


def r(metric: float, n: int) -> float:
    """Half of the interval that Qiblawey et al. print (equation 2): 1.96·√(m(1−m)/N)."""
    return 1.96 * sqrt(metric * (1 - metric) / n)


def who(evaluation: Evaluation) -> str:
    """Two versions of one network are two networks."""
    return f"{evaluation.info.name} {evaluation.info.version}"


def qiblawey(ours: Sequence[Evaluation]) -> list[Published]:
    """Tables 5 to 8 of Qiblawey et al."""
    return [
        _overlaps("5, lungs", paper.CASCADE_LUNGS, ours, "lungs"),
        _overlaps("6, lesions", paper.CASCADE_LESIONS, ours, "cascade"),
        _detection(ours),
        *map(_severity, ours),
    ]


def _overlaps(
    which: str, rows: Mapping[tuple[str, str], paper.Cells], ours: Sequence[Evaluation], role: str
) -> Published:
    what = which.rpartition(" ")[2]

    def cells(evaluation: Evaluation) -> list[str]:
        figures = evaluation.summary.figures
        means = [_percent_r(figures[f"{what}_slices_{name}"]) for name in ("accuracy", "iou", "dice")]
        return [*means, value(figures[f"{what}_dice"])]

    known = {key: (_encoder_decoder(*key), (*theirs, NOTHING)) for key, theirs in rows.items()}
    return Published(
        title=f"Qiblawey et al., table {which}",
        columns=("accuracy of pixels, %", "IoU, %", "DSC, %", BY_PATIENT),
        rows=tuple(_beside(known, ours, _network(role), cells)),
        notes=(SLICE_MEANS, PLUS_MINUS, COPIED),
    )


def _detection(ours: Sequence[Evaluation]) -> Published:
    def cells(evaluation: Evaluation) -> list[str]:
        names = ("accuracy", "precision", "sensitivity", "f1", "specificity")
        return [_percent_r(evaluation.summary.figures[f"slices_{name}"]) for name in names]

    known = {key: (_encoder_decoder(*key), theirs) for key, theirs in paper.CASCADE_DETECTION.items()}
    return Published(
        title="Qiblawey et al., table 7, slices with lesions",
        columns=("accuracy, %", "precision, %", "sensitivity, %", "F1, %", "specificity, %"),
        rows=tuple(_beside(known, ours, _network("cascade"), cells)),
        notes=(PLUS_MINUS,),
    )


def _severity(evaluation: Evaluation) -> Published:
    rows = []
    for grade, theirs in paper.CASCADE_SEVERITY.items():
        figures, n = graded(evaluation.scores, Grade(grade))
        mine = [_percent_r(figure, n) for figure in figures]
        rows.append((grade, tuple(zip(theirs, mine, strict=True))))
    return Published(
        title=f"Qiblawey et al., table 8, grades as radiologists saw them, ours: {who(evaluation)}",
        columns=("accuracy, %", "precision, %", "sensitivity, %", "F1, %", "specificity, %"),
        rows=tuple(rows),
        notes=(PLUS_MINUS,),
    )


def graded(scores: Sequence[Score], grade: Grade) -> tuple[list[Figure], int]:
    """Accuracy, precision, sensitivity, F1 and specificity of one grade, and how many patients have it.

    A volume that was not analysable has another grade than any. Intervals are Wilson's, F1's a bootstrap.
    """
    known = [s for s in scores if s.grade_read is not None and not s.picture and s.found is not None]
    patients = [s.patient for s in known]
    truth = [s.grade_read == grade for s in known]
    found = [s.found is not None and s.found.grade == grade for s in known]
    right = [t == f for t, f in zip(truth, found, strict=True)]
    figures = [
        _share(right, [True] * len(known), patients),
        _share(right, found, patients),
        _share(right, truth, patients),
        metrics.measures(found, truth, patients)["f1"] if known else Figure(value=None),
        _share(right, [not t for t in truth], patients),
    ]
    of_grade = len({p for p, t in zip(patients, truth, strict=True) if t})
    return (figures if of_grade else [Figure(value=None)] * len(figures)), of_grade


def _share(right: Sequence[bool], asked: Sequence[bool], patients: Sequence[str]) -> Figure:
    """Of those who are asked about."""
    chosen = [(hit, p) for hit, one, p in zip(right, asked, patients, strict=True) if one]
    return metrics.share([hit for hit, _ in chosen], [p for _, p in chosen]) if chosen else Figure(value=None)


def gao(ours: Sequence[Evaluation]) -> list[Published]:
    """Tables 2 to 4 of Gao et al., and what the text and figure 5 tell."""
    tables = [_masks(ours), _judged_slices(ours), _judged_studies(ours), _ablation(ours)]
    return [*tables, _attention(ours), _by_size(ours)]


def _masks(ours: Sequence[Evaluation]) -> Published:
    rows = []
    for what, theirs in paper.DCN_MASKS.items():
        for evaluation in ours:
            figures = evaluation.summary.figures
            means = _percent(figures[f"{what}_slices_dice"])
            cells = ((theirs, _percent(figures[f"{what}_dice"])), (NOTHING, means))
            rows.append((f"{what}, ours: {who(evaluation)}", cells))
    return Published(
        title="Gao et al., table 2, masks",
        columns=("DSC, %", "DSC as mean of slices (empty = 1), %"),
        rows=tuple(rows),
    )


def _attention(ours: Sequence[Evaluation]) -> Published:
    def cell(evaluation: Evaluation, name: str) -> str:
        known = [s for s in evaluation.scores if name in s.attention]
        if not known:
            return NOT_MEASURABLE
        return value(metrics.mean([s.attention[name] for s in known], [s.patient for s in known]))

    return Published(
        title="Gao et al., section 3.4.5, DSC of the attention maps",
        columns=tuple(paper.DCN_ATTENTION),
        rows=tuple(
            (
                f"DCN, ours: {who(e)}",
                tuple((theirs, cell(e, name)) for name, theirs in paper.DCN_ATTENTION.items()),
            )
            for e in ours
        ),
        notes=("Ours over slices with lesions drawn, above half of a map's height; the paper does not say.",),
    )


def _by_size(ours: Sequence[Evaluation]) -> Published:
    def cell(evaluation: Evaluation, group: str) -> str:
        known = [
            (answer.score > 0.5, s.patient)
            for s in evaluation.scores
            for answer in s.slices
            if answer.drawn and size_group(answer.area_mm2) == group
        ]
        return _percent(metrics.share(*zip(*known, strict=True))) if known else NOT_MEASURABLE

    return Published(
        title="Gao et al., figure 5, sensitivity by pixels of lesion in a slice, %",
        columns=GROUPS,
        rows=tuple((f"DCN, ours: {who(e)}", tuple((NOTHING, cell(e, g)) for g in GROUPS)) for e in ours),
        notes=("The paper draws its figures only. A thousand of its pixels are 494 mm².",),
    )


MEASURES = ("accuracy, %", "AA, %", "sensitivity, %", "specificity, %")


def _judged_slices(ours: Sequence[Evaluation]) -> Published:
    known = {name: (name, theirs) for name, theirs in paper.DCN_SLICES.items()}
    return Published(
        title="Gao et al., table 3, slices",
        columns=(*MEASURES, "AUC"),
        rows=tuple(_beside(known, ours, lambda _: "DCN", lambda e: [*_of_slices(e), _auc(e, "slices_auc")])),
        notes=(CONTROLS,),
    )


def _judged_studies(ours: Sequence[Evaluation]) -> Published:
    """Ours stand in the last row: whether they are internal or external only who evaluates knows."""
    rows: list[Row] = [
        (f"{method}, {patients}", tuple((cell, "") for cell in theirs))
        for (method, patients), theirs in paper.DCN_STUDIES.items()
    ]
    for evaluation in ours:
        mine = [*_of_studies(evaluation), _auc(evaluation, "auc_others")]
        rows.append((f"DCN, ours: {who(evaluation)}", tuple((NOTHING, cell) for cell in mine)))
    return Published(
        title="Gao et al., table 3, studies",
        columns=(*MEASURES, "AUC"),
        rows=tuple(rows),
        notes=(CONTROLS,),
    )


def _ablation(ours: Sequence[Evaluation]) -> Published:
    levels = (("slices", _of_slices), ("studies", _of_studies))
    rows: list[Row] = []
    for key, (*theirs, external) in paper.DCN_ABLATION.items():
        name = ", ".join(f"{'with' if on else 'no'} {what}" for what, on in zip(MODULES, key, strict=True))
        for (level, of), cells in zip(levels, theirs, strict=True):
            rows += _beside({key: (f"{name}: {level}", cells)}, _alike(ours, key), _modules, of)
        rows.append((f"{name}: studies of other hospitals", tuple((cell, "") for cell in external)))
    return Published(
        title="Gao et al., table 4, what attention and the mapping of slices to studies are worth",
        columns=MEASURES,
        rows=tuple(rows),
        notes=(paper.DCN_CORRECTED, CONTROLS),
    )


MODULES = ("attention", "mapping")
"""Of a recipe's ``dcn_slices`` and ``dcn_study`` networks."""


def _modules(evaluation: Evaluation) -> tuple[bool, bool]:
    """Which of ``MODULES`` a network has; on unless its recipe says otherwise."""
    slices, study = (evaluation.networks.get(f"dcn_{part}", {}) for part in ("slices", "study"))
    return slices.get("attention", "True") == "True", study.get("mapping", "True") == "True"


def _alike(ours: Iterable[Evaluation], key: tuple[bool, bool]) -> list[Evaluation]:
    return [evaluation for evaluation in ours if _modules(evaluation) == key]


def _of_slices(evaluation: Evaluation) -> list[str]:
    return _of_studies(evaluation, "slices_")


def _of_studies(evaluation: Evaluation, what: str = "") -> list[str]:
    names = ("accuracy", "average_accuracy", "sensitivity", "specificity")
    return [_percent(evaluation.summary.figures[f"{what}{name}"]) for name in names]


def _auc(evaluation: Evaluation, name: str) -> str:
    return value(evaluation.summary.figures[name])


def fung(ours: Sequence[Evaluation]) -> list[Published]:
    """Table I of Fung et al., also its rows that were left empty."""

    def cells(evaluation: Evaluation) -> list[str]:
        figures = evaluation.summary.figures
        return [value(figures[f"pictures_{name}"]) for name in INFNET]

    known = {
        key: (_infnet_row(*key), (*theirs, *(NOTHING,) * (len(INFNET) - len(theirs))))
        for key, theirs in paper.INFNET.items()
    }
    return [
        Published(
            title="Fung et al., table I, what cut-out and self-supervision are worth",
            columns=tuple(INFNET.values()),
            rows=tuple(_beside(known, ours, _infnet_ways, cells)),
            notes=(LOSSES, THRESHOLDS),
        )
    ]


INFNET = {
    "loss_single": "single, test loss",
    "loss_multi": "multi, test loss",
    "dice": "lesions, Dice",
    "dice_threshold_averaged": "lesions, threshold-averaged",
    "ground_glass_dice": "ground glass, Dice",
    "ground_glass_dice_threshold_averaged": "ground glass, threshold-averaged",
    "consolidation_dice": "consolidation, Dice",
    "consolidation_dice_threshold_averaged": "consolidation, threshold-averaged",
}
"""Figure of pictures → heading."""


def _infnet_row(self_supervised: bool, cut: float) -> str:
    augmented = f" + data aug ({cut:g})" if cut else ""
    return ("Self-super" if self_supervised else "SInfNet") + augmented


def _infnet_ways(evaluation: Evaluation) -> tuple[bool, float] | None:
    """How a network learned; None where it was shown changes that the paper does not have."""
    recipe = json.loads(evaluation.networks.get("infnet", {}).get("recipe", "{}"))
    options = recipe.get("options", {})
    cut = float(options.get("cut_out", 0))
    plain = bool(options.get("augmented", True)) == bool(cut) and not options.get("varied", False)
    return (bool(recipe.get("start")), cut) if plain else None


AP_RULES = (
    "First the authors' AP, beside which the paper's stand: the mean over slices of each slice's own; where "
    "nothing is drawn 1 if nothing is found, else 0. Then COCO's, of all slices together. Lesions of less "
    "than 49 mm², about 100 of the paper's pixels, are left out. Ours are found where their score is above "
    "the lesion threshold: no fainter one adds to either AP."
)
CLASSES_MEASURED = (
    "Ours: labelled pictures, where there are any; else slices in which lesions were drawn, and the other "
    "slices of the same patients, as normal. A network of two classes knows COVID-19 and all else, which "
    "stands under normal. F1 is the mean over those classes that there are, weighted 0.45 (normal), 0.35 and "
    "0.2 (COVID-19)."
)


NORMAL, PNEUMONIA, COVID = paper.SSM_ORDER.values()


def ter_sarkisov(ours: Sequence[Evaluation]) -> list[Published]:
    """Tables 2 and 3 of Ter-Sarkisov."""
    return [_instances(ours), _classes(ours)]


def _instances(ours: Sequence[Evaluation]) -> Published:
    ends = ("_50", "_75", "")

    def cells(evaluation: Evaluation) -> list[str]:
        names = [f"{name}{end}" for name in ("detected_slices_ap", "detected_ap") for end in ends]
        return [value(evaluation.summary.figures[name]) for name in names]

    headings = ("AP@0.5", "AP@0.75", "AP@0.5:0.95")
    known = {key: (_ssm_row(*key), (*theirs, *[NOTHING] * 3)) for key, theirs in paper.SSM_LESIONS.items()}
    return Published(
        title="Ter-Sarkisov, table 2, lesions one by one",
        columns=(*headings, *(f"{name}, COCO" for name in headings)),
        rows=tuple(_beside(known, ours, _ssm, cells)),
        notes=(AP_RULES,),
    )


def _classes(ours: Sequence[Evaluation]) -> Published:
    def cells(evaluation: Evaluation) -> list[str]:
        answers = _class_answers(evaluation)
        columns = ((COVID,), (PNEUMONIA,), (NORMAL,), paper.SSM_ORDER.values())
        right = [_percent(_right(answers, classes)) for classes in columns]
        return [*right, value(_by_whom(answers, weighted_f1(answers)))]

    known = {key: (_ssm_row(*key), theirs) for key, theirs in paper.SSM_CLASSES.items()}
    return Published(
        title="Ter-Sarkisov, table 3, classes of slices",
        columns=("COVID-19, %", "common pneumonia, %", "normal, %", "overall, %", "F1"),
        rows=tuple(_beside(known, ours, _ssm, cells)),
        notes=(CLASSES_MEASURED,),
    )


class ClassAnswer(NamedTuple):
    """The class that a slice was given, None where it was rejected, and its own (``SSM_ORDER``)."""

    patient: str
    found: int | None
    truth: int
    known: bool
    """Whether that is a patient, and not a slice of nobody knows whom."""


def _class_answers(evaluation: Evaluation) -> list[ClassAnswer]:
    """Of labelled pictures, else of the slices of volumes with lesions drawn."""
    two = evaluation.networks.get("ssm", {}).get("classes") == "2"
    labelled = [(s, s.diagnosis) for s in evaluation.scores if s.picture and s.diagnosis]
    if labelled:
        return [
            ClassAnswer(
                s.patient,
                int(s.own["class"]) if "class" in s.own else None,
                NORMAL if two and diagnosis != Diagnosis.COVID else paper.SSM_ORDER[diagnosis],
                s.patient != s.name,
            )
            for s, diagnosis in labelled
        ]
    return [
        ClassAnswer(s.patient, COVID if a.score > 0.5 else NORMAL, COVID if a.drawn else NORMAL, True)
        for s in evaluation.scores
        for a in s.slices
    ]


def _right(answers: Sequence[ClassAnswer], classes: Collection[int]) -> Figure:
    """Share of the slices of these classes that were given their own."""
    asked = [a for a in answers if a.truth in classes]
    if not asked:
        return Figure(value=None)
    hits = np.array([a.found == a.truth for a in asked], dtype=np.float64)
    return _by_whom(asked, metrics.bootstrap(hits, [a.patient for a in asked], np.mean))


def _by_whom(answers: Sequence[ClassAnswer], figure: Figure) -> Figure:
    """No interval where no patient is known: it would take each slice for a patient."""
    return figure if any(a.known for a in answers) else replace(figure, low=None, high=None)


def weighted_f1(answers: Sequence[ClassAnswer]) -> Figure:
    """Weighted as the paper's."""
    if not answers:
        return Figure(value=None)
    patients, found, truth, _ = zip(*answers, strict=True)
    given = [-1 if one is None else one for one in found]
    return metrics.weighted_f1(given, truth, patients, paper.SSM_WEIGHTS)


def _ssm_row(way: str, encoder: str, blocks: int) -> str:
    return f"{paper.SSM_WAYS[way]} ({encoder.replace('resnet', 'ResNet')}+FPN), {blocks} blocks"


def _ssm(evaluation: Evaluation) -> paper.Ssm:
    """Way of training, encoder and blocks of a network."""
    facts = evaluation.networks.get("ssm", {})
    options = json.loads(facts.get("recipe", "{}")).get("options", {})
    pretrained = "single" if facts.get("branches") == "1" else "parallel"
    way = pretrained if options.get("pretrain") else "scratch"
    return way, facts.get("encoder", ""), int(facts.get("blocks", "0"))


def _beside(
    known: Mapping[Key, tuple[str, Sequence[str]]],
    ours: Sequence[Evaluation],
    key_of: Callable[[Evaluation], Any],
    cells: Callable[[Evaluation], Sequence[str]],
) -> Iterator[Row]:
    """The paper's rows, each once for every network of ours like it; those that are like none stand below."""
    for key, (name, theirs) in known.items():
        mine = [e for e in ours if key_of(e) == key]
        for evaluation in mine:
            yield f"{name}, ours: {who(evaluation)}", tuple(zip(theirs, cells(evaluation), strict=True))
        if not mine:
            yield name, tuple((cell, "") for cell in theirs)
    for evaluation in ours:
        if key_of(evaluation) not in known:
            yield f"ours: {who(evaluation)}", tuple((NOTHING, cell) for cell in cells(evaluation))


def _encoder_decoder(encoder: str, decoder: str) -> str:
    return f"{paper.ENCODERS[encoder]} {paper.DECODERS[decoder]}".strip()


def _network(role: str) -> Callable[[Evaluation], tuple[str | None, str | None]]:
    """(encoder, decoder) of the network in a package's file of this role."""

    def of(evaluation: Evaluation) -> tuple[str | None, str | None]:
        facts = evaluation.networks.get(role, {})
        return facts.get("encoder"), facts.get("decoder")

    return of


def _percent(figure: Figure) -> str:
    """ "93.6 (90.1 to 96.2)"."""
    return value(figure, digits=1, scale=100)


def _percent_r(figure: Figure, n: int | None = None) -> str:
    """ "93.60 ± 0.71 (90.1 to 96.2)": with the paper's r of so many slices or patients, then by patient."""
    if figure.value is None:
        return NOT_MEASURABLE
    half = r(figure.value, n or figure.n)
    _, _, interval = _percent(figure).partition(" ")
    return f"{100 * figure.value:.2f} ± {100 * half:.2f} {interval}".strip()


TABLES: dict[str, Callable[[Sequence[Evaluation]], list[Published]]] = {
    "cascade": qiblawey,
    "dcn": gao,
    "ssm": ter_sarkisov,
    "infnet": fung,
}
"""The card's ``system`` → the tables of its paper, beside which such networks are printed."""
