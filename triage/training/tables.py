"""An evaluation in words and numbers: for the terminal, for programs, and for the report's tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from triage.training import paper, published
from triage.training.evaluation import Evaluation
from triage.training.published import Published, who
from triage.training.scores import Extent, Overlap, Score
from triage.training.summary import FIGURES
from triage.training.wording import counted, measured_on, value

NOT_RUN = "not run"


def _noun(key: str) -> str:
    """What a figure counts."""
    if key.startswith("pictures_"):
        return "picture"
    return "slice" if "slices_" in key or key.startswith("detected_") else "volume"


VOLUME_COLUMNS = ("volume", "patient", "lungs", "lesions", "drawn", "found", "CT", "P", "answer")
PICTURE_COLUMNS = ("picture", "Dice", "IoU", "threshold-averaged Dice")


def figure_rows(evaluation: Evaluation) -> list[tuple[str, str, str]]:
    """(name, value with interval, measured on) of every figure."""
    figures = evaluation.summary.applicable
    return [(FIGURES[key], value(figure), measured_on(figure, _noun(key))) for key, figure in figures.items()]


def paper_rows(evaluations: Sequence[Evaluation]) -> list[tuple[str, list[tuple[str, str]]]]:
    """(method, the paper's figure and ours for each of ``paper.COLUMNS``).

    A row for each evaluation, beside the paper's of its card's ``system``; methods that were not run and
    networks of a method that the paper has not stand alone.
    """
    rows: list[tuple[str, list[tuple[str, str]]]] = []
    for system, row in paper.TABLE.items():
        ours = [e for e in evaluations if e.info.system == system]
        rows += [(f"{row.name}, ours: {who(e)}", _cells(row, e)) for e in ours]
        rows += [] if ours else [(row.name, _cells(row, None))]
    others = (e for e in evaluations if e.info.system not in paper.TABLE)
    return rows + [(f"ours: {who(e)}", _cells(None, e)) for e in others]


def _cells(row: paper.Published | None, ours: Evaluation | None) -> list[tuple[str, str]]:
    cells = []
    for column in paper.COLUMNS:
        theirs = getattr(row, column, None)
        digits = 3 if column.startswith("auc") else 2
        mine = NOT_RUN if ours is None else value(ours.summary.figures[column])
        cells.append(("–" if theirs is None else f"{theirs:.{digits}f}", mine))
    return cells


def published_rows(evaluations: Sequence[Evaluation]) -> list[tuple[str, str, str]]:
    """(method, threshold-averaged Dice, measured on): published, then ours."""
    theirs = [
        (name, f"{dice:.3f}", "48 test slices of COVID-SemiSeg") for name, dice in paper.PICTURES.items()
    ]
    ours = [(who(e), e.summary.figures["pictures_dice_threshold_averaged"]) for e in evaluations]
    return [*theirs, *((f"ours: {name}", value(f), measured_on(f, "picture")) for name, f in ours)]


def volume_rows(evaluation: Evaluation) -> list[tuple[str, ...]]:
    """One line a volume, in the order of ``VOLUME_COLUMNS``."""
    return [
        (
            score.name,
            score.patient,
            _dice(score.lungs),
            _dice(score.lesions),
            _fraction(score.drawn),
            _fraction(score.found),
            " → ".join(_grade(extent) for extent in (score.drawn, score.found) if extent),
            "" if score.probability is None else f"{score.probability:.2f}",
            score.status.value.replace("_", " ") if score.status else "",
        )
        for score in evaluation.scores
        if not score.picture
    ]


def picture_rows(evaluation: Evaluation) -> list[tuple[str, ...]]:
    """One line a picture, in the order of ``PICTURE_COLUMNS``, the lowest Dice first."""
    known = [(s, s.lesions) for s in evaluation.scores if s.picture and s.lesions]
    return [
        (score.name, f"{lesions.dice:.3f}", f"{lesions.iou:.3f}", _number(score.threshold_averaged_dice))
        for score, lesions in sorted(known, key=lambda pair: pair[1].dice)
    ]


def _number(number: float | None) -> str:
    return "" if number is None else f"{number:.3f}"


def _dice(overlap: Overlap | None) -> str:
    return "" if overlap is None else f"{overlap.dice:.3f}"


def _fraction(extent: Extent | None) -> str:
    return "" if extent is None else f"{100 * extent.fraction:.1f} %"


def _grade(extent: Extent) -> str:
    return "–" if extent.grade is None else extent.grade[-1]


def as_json(evaluation: Evaluation) -> dict[str, Any]:
    """For programs: the headline, every figure, the published ones, and a row for each case.

    The headline is of the pictures where there are any, else of the volumes' lesions.
    """
    figures = evaluation.summary.figures
    dice = figures["pictures_dice"]
    if not dice.n:
        dice = figures["lesions_dice"]
    return {
        "model": evaluation.info.name,
        "version": evaluation.info.version,
        "system": evaluation.info.system,
        "dice": dice.value,
        "dice_threshold_averaged": figures["pictures_dice_threshold_averaged"].value,
        "n": dice.n,
        "patients": evaluation.summary.patients,
        "cases": evaluation.summary.cases,
        "trained_on": list(evaluation.trained_on),
        "not_analysable": dict(evaluation.summary.not_analysable),
        "settings": dict(evaluation.settings),
        "data": {kind: str(path) for kind, path in evaluation.sources.items()},
        "figures": evaluation.summary.named(),
        "paper": {name: asdict(row) for name, row in paper.TABLE.items()},
        "tables": [_plain(one) for one in published.tables([evaluation])],
        "scores": [_score(score) for score in evaluation.scores],
    }


def _plain(one: Published) -> dict[str, Any]:
    rows = {
        name: {
            column: {"paper": theirs, "ours": mine or None}
            for column, (theirs, mine) in zip(one.columns, cells, strict=True)
        }
        for name, cells in one.rows
    }
    return {"title": one.title, "rows": rows, "notes": list(one.notes)}


def _score(score: Score) -> dict[str, Any]:
    row = asdict(score)
    del row["histograms"]
    return row


def for_people(evaluations: Sequence[Evaluation]) -> Group:
    """What `triage evaluate` prints."""
    parts: list[Table | Text] = []
    for evaluation in evaluations:
        parts += _one(evaluation)
    parts += [_heading("Goncharov et al., table 2, and ours"), _paper(evaluations)]
    notes: dict[str, None] = {}
    for one in published.tables(evaluations):
        parts += [_heading(f"{one.title}, and ours"), _published(one)]
        notes.update(dict.fromkeys(one.notes))
    parts += map(Text, (*notes, OTHER_PATIENTS))
    if has_pictures(evaluations):
        parts += [
            _heading("Threshold-averaged Dice of pictures (Fan et al. 2020), and ours"),
            table(("method", "Dice", "measured on"), published_rows(evaluations)),
        ]
    return Group(*parts)


OTHER_PATIENTS = (
    "The papers' figures were measured on other patients than ours: neither better nor worse follows from "
    "a difference."
)
FEW_PICTURES = 10
"""The terminal shows these; JSON and the report have all."""


def has_pictures(evaluations: Sequence[Evaluation]) -> bool:
    """Whether there are any to compare with published figures."""
    return any(score.threshold_averaged_dice is not None for e in evaluations for score in e.scores)


def fit_only(evaluation: Evaluation) -> str:
    """What a reader has to know where the network learned from some of the cases, else nothing."""
    seen, cases = len(evaluation.trained_on), evaluation.summary.cases
    if not seen:
        return ""
    return (
        f"{seen} of these {counted(cases, 'case')} belong to what this network was trained on, or may "
        "be of the same patients: the figures show its fit, not its quality. "
        "Those of patients it never saw are on its card."
    )


def _one(evaluation: Evaluation) -> Iterator[Table | Text]:
    yield _heading(f"{who(evaluation)} on {evaluation.described_data}")
    if evaluation.trained_on:
        yield Text(fit_only(evaluation), style="bold yellow")
    if volumes := volume_rows(evaluation):
        yield table(VOLUME_COLUMNS, volumes)
    for case, reason in evaluation.summary.not_analysable:
        yield Text(f"not analysable: {case}: {reason}")
    if pictures := picture_rows(evaluation):
        yield _heading("Pictures with the lowest lesion Dice")
        yield table(PICTURE_COLUMNS, pictures[:FEW_PICTURES])
    yield _heading("Figures")
    yield table(("figure", "value (95 % interval)", "measured on"), figure_rows(evaluation))


def _heading(text: str) -> Text:
    return Text(f"\n{text}", style="bold")


def _paper(evaluations: Sequence[Evaluation]) -> Table:
    rows = paper_rows(evaluations)
    cells = [(method, *(f"{theirs}\nours {mine}" for theirs, mine in row)) for method, row in rows]
    return table(("method", *paper.COLUMNS.values()), cells)


def _published(one: Published) -> Table:
    """Ours below the paper's, in the rows that are of our networks."""
    rows = [(name, *(_both(*cell) for cell in cells)) for name, cells in one.rows]
    return table(("network", *one.columns), rows)


def _both(theirs: str, mine: str) -> str:
    return f"{theirs}\nours {mine}" if mine else theirs


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """For the terminal; long cells are folded."""
    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in headings:
        drawn.add_column(heading, overflow="fold")
    for row in rows:
        drawn.add_row(*map(Text, row))
    return drawn
