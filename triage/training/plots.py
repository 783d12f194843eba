"""The plots of a report: each takes scores and gives a picture, or the sentence that stands in its place.

Colours are Okabe and Ito's, told apart by colour-blind readers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from triage.domain import Grade
from triage.training import metrics
from triage.training.cases import Diagnosis
from triage.training.evaluation import Evaluation
from triage.training.gallery import Sketch
from triage.training.scores import Score
from triage.training.summary import calibration_table, has_covid, ranking

BLUE, ORANGE, GREEN, GREY, SKY, YELLOW = "#0072B2", "#D55E00", "#009E73", "#767676", "#56B4E9", "#F0E442"
GROUPS = {
    Diagnosis.COVID: (ORANGE, "COVID-19"),
    Diagnosis.HEALTHY: (GREEN, "healthy"),
    Diagnosis.OTHER: (BLUE, "other findings"),
}
TICKS = (0, 0.5, 1, 2, 5, 10, 25, 50, 100)
GRADE_LIMITS = (25, 50, 75)
FEW = 30
"""Up to this many points each is named."""
LUNG_WINDOW = (-1000, 300)

Drawing = Figure | str
"""A picture, or why there is none."""


@dataclass(frozen=True, slots=True)
class Plot:
    """A plot of the report: its file's name, what it is called and how it is read."""

    name: str
    title: str
    words: str
    draw: Callable[[Evaluation], Drawing]


def _axes(width: float = 5.6, height: float = 4.4) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, _plain(figure.add_subplot())


def _plain(axes: Axes) -> Axes:
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _measured(evaluation: Evaluation) -> list[Score]:
    return [s for s in evaluation.scores if s.drawn and s.found and not s.picture]


def _percents(scores: Sequence[Score]) -> tuple[metrics.Numbers, metrics.Numbers]:
    drawn = np.array([100 * s.drawn.fraction for s in scores if s.drawn])
    found = np.array([100 * s.found.fraction for s in scores if s.found])
    return drawn, found


def _name(axes: Axes, scores: Sequence[Score], x: metrics.Numbers, y: metrics.Numbers) -> None:
    if len(scores) <= FEW:
        for place, k in enumerate(np.argsort(x)):  # by turns above and below: neighbours stay legible
            offset = (5, -9) if place % 2 else (5, 4)
            axes.annotate(scores[k].patient, (x[k], y[k]), offset, textcoords="offset points", fontsize=8)


AFFECTED = "affected, % of the worse lung"
NO_FRACTION = "No volume has its lesions both drawn and found: not measurable here."


def fractions(evaluation: Evaluation) -> Drawing:
    """Found against drawn affected fraction."""
    scores = _measured(evaluation)
    if not scores:
        return NO_FRACTION
    figure, axes = _axes(5.4, 5)
    drawn, found = _percents(scores)
    axes.plot([0, 100], [0, 100], color=GREY, linewidth=1)
    axes.scatter(drawn, found, color=BLUE, s=28, zorder=3)
    _name(axes, scores, drawn, found)
    for set_scale, set_ticks, set_limits in (
        (axes.set_xscale, axes.set_xticks, axes.set_xlim),
        (axes.set_yscale, axes.set_yticks, axes.set_ylim),
    ):
        set_scale("symlog", linthresh=1)
        set_ticks(TICKS, [f"{tick:g}" for tick in TICKS])
        set_limits(-0.15, 115)
    axes.minorticks_off()
    axes.set(xlabel="affected lung as drawn, % of the worse lung", ylabel="found, %", aspect="equal")
    return figure


def ranking_plot(evaluation: Evaluation) -> Drawing:
    """The paper's figure 5: who is ill, and how ill."""
    volumes = [s for s in evaluation.scores if not s.picture]
    judged = [s for s in volumes if s.probability is not None]
    if not judged:
        return "No volume was judged: there is nothing to rank."
    figure = Figure(figsize=(9.6, 4.2), layout="constrained")
    left, right = (_plain(axes) for axes in figure.subplots(1, 2))
    _identification(left, sorted(judged, key=lambda s: s.probability or 0.0, reverse=True))
    ill = [s for s in volumes if has_covid(s) and ranking(s) is not None]
    _severity(right, sorted(ill, key=lambda s: ranking(s) or 0.0, reverse=True))
    return figure


def _identification(axes: Axes, scores: Sequence[Score]) -> None:
    for diagnosis, (colour, name) in GROUPS.items():
        places = [k for k, s in enumerate(scores) if s.diagnosis == diagnosis]
        if places:
            axes.bar(
                places, [scores[k].probability or 0.0 for k in places], color=colour, label=name, width=0.8
            )
    unknown = [k for k, s in enumerate(scores) if s.diagnosis is None]
    if unknown:
        axes.bar(
            unknown, [scores[k].probability or 0.0 for k in unknown], color=GREY, label="not told", width=0.8
        )
    axes.set(title="Identification", xlabel="volumes, most suspicious first", ylabel="P", ylim=(0, 1))
    _patients(axes, scores)
    axes.legend(frameon=False, fontsize=8)


def _severity(axes: Axes, scores: Sequence[Score]) -> None:
    """By fraction; for a network that finds none by P, with what was drawn on an axis of its own."""
    percents = any(s.found for s in scores)
    heights = [(100 if percents else 1) * (ranking(s) or 0.0) for s in scores]
    axes.bar(range(len(scores)), heights, color=SKY, width=0.8, label="found" if percents else "P")
    axes.set(
        title="Severity",
        xlabel=f"COVID-19 volumes, {'most affected' if percents else 'highest P'} first",
        ylabel=AFFECTED if percents else "P: the network finds no lesions",
    )
    known = [(k, 100 * s.drawn.fraction) for k, s in enumerate(scores) if s.drawn]
    if known:
        scale = axes if percents else axes.twinx()
        places, drawn = zip(*known, strict=True)
        scale.scatter(places, drawn, color="black", marker="_", s=90, label="drawn", zorder=3)
        if not percents:
            scale.set_ylim(bottom=0)
            scale.set_ylabel(f"drawn (dashes): {AFFECTED}")
            scale.spines["top"].set_visible(False)
    _patients(axes, scores)
    if percents:
        axes.legend(frameon=False, fontsize=8)


def _patients(axes: Axes, scores: Sequence[Score]) -> None:
    if len(scores) <= FEW:
        axes.set_xticks(range(len(scores)), [s.patient for s in scores], rotation=90, fontsize=8)


def bland_altman(evaluation: Evaluation) -> Drawing:
    """Difference against mean of found and drawn fraction, with the limits of agreement of patients."""
    scores = _measured(evaluation)
    if len({s.patient for s in scores}) < metrics.FEWEST_PATIENTS:
        return f"Limits of agreement need {metrics.FEWEST_PATIENTS} patients with lesions drawn and found."
    drawn, found = _percents(scores)
    middle, difference = (drawn + found) / 2, found - drawn
    each = list(metrics.patient_means(difference.tolist(), [s.patient for s in scores]).values())
    bias, spread = float(np.mean(each)), 1.96 * float(np.std(each, ddof=1))
    figure, axes = _axes(6.4, 4.2)
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.axhline(bias, color=BLUE, linewidth=1.2)
    for limit in (bias - spread, bias + spread):
        axes.axhline(limit, color=BLUE, linewidth=1.2, linestyle="--")
    for level in (bias, bias - spread, bias + spread):
        text = f"{level:+.1f}".replace("-", "−")
        axes.annotate(text, (1.01, level), xycoords=("axes fraction", "data"), va="center", color=BLUE)
    axes.scatter(middle, difference, color=ORANGE, s=28, zorder=3)
    _name(axes, scores, middle, difference)
    axes.margins(y=0.15)
    axes.set(xlabel="mean of drawn and found, % of the worse lung", ylabel="found − drawn, points")
    return figure


def grades(evaluation: Evaluation) -> Drawing:
    """Confusion of grades: against the drawn masks, and against a radiologist's eye."""
    volumes = [s for s in evaluation.scores if not s.picture]
    found = [(s, s.found.grade) for s in volumes if s.found and s.found.grade]
    tables = {
        "drawn masks": [(s.drawn.grade, grade) for s, grade in found if s.drawn and s.drawn.grade],
        "radiologist": [(s.grade_read, grade) for s, grade in found if s.grade_read],
    }
    shown = {name: pairs for name, pairs in tables.items() if pairs}
    if not shown:
        return "No volume has a grade to compare with: not measurable here."
    figure = Figure(figsize=(4.4 * len(shown), 4.2), layout="constrained")
    for axes, (name, pairs) in zip(
        figure.subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True
    ):
        truth, answer = zip(*pairs, strict=True)
        _confusion(axes, metrics.grade_confusion(truth, answer), name)
    return figure


def _confusion(axes: Axes, table: NDArray[np.int64], truth: str) -> None:
    axes.imshow(table, cmap="Blues", vmin=0, vmax=max(1, table.max()))
    for (row, column), count in np.ndenumerate(table):
        if count:
            dark = count > table.max() / 2
            axes.text(column, row, str(count), ha="center", va="center", color="white" if dark else "black")
    names = [grade.value for grade in Grade]
    axes.set_xticks(range(5), names)
    axes.set_yticks(range(5), names)
    axes.set(xlabel="found", ylabel=f"by {truth}")


def fractions_by_grade(evaluation: Evaluation) -> Drawing:
    """The paper's figure 6a: fraction found, by the grade that a radiologist saw."""
    scores = [s for s in evaluation.scores if s.grade_read and s.found and s.found.grade]
    if not scores:
        return "No volume was graded by a radiologist's eye: not measurable here."
    figure, axes = _axes(5.6, 4.2)
    for limit in GRADE_LIMITS:
        axes.axhline(limit, color=GREY, linewidth=0.8, linestyle=":")
    order = list(Grade)
    rows = [[100 * s.found.fraction for s in scores if s.grade_read == grade and s.found] for grade in order]
    rng = np.random.default_rng(1)
    for place, row in enumerate(rows):
        axes.scatter(place + rng.uniform(-0.15, 0.15, len(row)), row, color=BLUE, s=14, alpha=0.6)
        if row:
            axes.plot([place - 0.25, place + 0.25], [np.median(row)] * 2, color=ORANGE, linewidth=2)
    axes.set_xticks(range(5), [f"{g.value}\nn={len(r)}" for g, r in zip(order, rows, strict=True)])
    axes.set(xlabel="grade as a radiologist saw it", ylabel="affected lung found, %", ylim=(-2, 102))
    return figure


def roc(evaluation: Evaluation) -> Drawing:
    """ROC of COVID-19 against healthy, and against all others."""
    known = [s for s in evaluation.scores if s.probability is not None and s.diagnosis and not s.picture]
    groups = {"healthy": (Diagnosis.HEALTHY,), "all others": (Diagnosis.HEALTHY, Diagnosis.OTHER)}
    curves = {
        name: [s for s in known if s.diagnosis in (Diagnosis.COVID, *group)]
        for name, group in groups.items()
        if {s.diagnosis for s in known} & set(group) and any(s.diagnosis == Diagnosis.COVID for s in known)
    }
    if not curves:
        return "A ROC curve needs volumes of patients with and without COVID-19: not measurable here."
    figure, axes = _axes(5, 4.8)
    for (name, scores), colour in zip(curves.items(), (GREEN, BLUE), strict=False):
        positive = [s.diagnosis == Diagnosis.COVID for s in scores]
        curve = metrics.roc_curve(
            [s.probability or 0.0 for s in scores], positive, [s.patient for s in scores]
        )
        if curve.low is not None and curve.high is not None:
            axes.fill_between(
                curve.false_positive_rate, curve.low, curve.high, color=colour, alpha=0.15, step="post"
            )
        axes.step(
            curve.false_positive_rate, curve.sensitivity, where="post", color=colour, label=f"against {name}"
        )
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle=":")
    axes.set(xlabel="1 − specificity", ylabel="sensitivity", xlim=(0, 1), ylim=(0, 1.01), aspect="equal")
    axes.legend(frameon=False, loc="lower right")
    return figure


def reliability(evaluation: Evaluation) -> Drawing:
    """Share drawn as lesion among voxels of the same lesion probability."""
    parts = {
        "volumes": [s for s in evaluation.scores if s.histograms and not s.picture],
        "pictures": [s for s in evaluation.scores if s.histograms and s.picture],
    }
    shown = {name: scores for name, scores in parts.items() if scores}
    if not shown:
        return "There is no lesion probability to compare with a drawing: not measurable here."
    figure = Figure(figsize=(5.2, 5.4), layout="constrained")
    upper, lower = (_plain(axes) for axes in figure.subplots(2, 1, sharex=True, height_ratios=[3, 1]))
    upper.plot([0, 1], [0, 1], color=GREY, linewidth=1)
    for (name, scores), colour in zip(shown.items(), (BLUE, ORANGE), strict=False):
        bins = metrics.reliability(np.sum([calibration_table(s) for s in scores], axis=0))
        upper.plot(bins.predicted, bins.observed, "o-", color=colour, label=f"{name}: ECE {bins.ece:.3f}")
        lower.plot(bins.predicted, bins.n, "o-", color=colour)
    upper.legend(frameon=False)
    upper.set(ylabel="share drawn as lesion", xlim=(0, 1), ylim=(0, 1))
    lower.set(xlabel="lesion probability", ylabel="voxels", yscale="log")
    return figure


PLOTS = (
    Plot(
        "ranking", "Ranking",
        "After figure 5 of the paper. Left: volumes by P. Right: volumes of COVID-19 patients by the "
        "fraction found (by P where none is), and the drawn one as a dash; in a good ranking the dashes fall "
        "from left to right.",
        ranking_plot,
    ),
    Plot(
        "fractions", "Affected fraction: found against drawn",
        "On the line, both agree. Small fractions are drawn wider apart, to be told from one another.",
        fractions,
    ),
    Plot(
        "bland_altman", "Agreement of the fractions (Bland–Altman)",
        "Difference against mean. Solid: mean difference; dashed: where 95 % of differences are expected.",
        bland_altman,
    ),
    Plot("grades", "Grades", "Volumes by grade. On the diagonal, both agree.", grades),
    Plot(
        "fractions_by_grade", "Fraction found by the radiologist's grade",
        "After figure 6a of the paper. Dotted: limits of the grades; orange: median.",
        fractions_by_grade,
    ),
    Plot(
        "roc", "Identification (ROC)",
        "With 95 % bands over resampled patients where the AUC has an interval.",
        roc,
    ),
    Plot(
        "reliability", "Reliability of the lesion map",
        "Of voxels inside the lungs. Below the line the network promises too much, above it too little.",
        reliability,
    ),
)  # fmt: skip
"""In the order of the report."""


def sketch(case: Sketch) -> Figure:
    """One slice with the lesions' contours: drawn blue, found orange."""
    height, width = case.image.shape
    figure = Figure(figsize=(4, 4 * height / width))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(case.image, cmap="gray", vmin=LUNG_WINDOW[0], vmax=LUNG_WINDOW[1], aspect="auto")
    for mask, colour, style in ((case.drawn, SKY, "solid"), (case.found, ORANGE, "solid")):
        if mask.any():
            axes.contour(mask, [0.5], colors=colour, linewidths=1.1, linestyles=style)
    axes.axis("off")
    return figure
