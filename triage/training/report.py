"""A folder that a person can read and keep: report.html with its pictures beside it; no host is asked."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import jinja2
from matplotlib.figure import Figure

from triage.training import paper, plots, published, tables
from triage.training.datasets import DATASETS
from triage.training.evaluation import Evaluation
from triage.training.scores import to_json
from triage.training.wording import NOT_MEASURABLE

PAGE = "report.html"
DOTS_PER_INCH = 140


def write(evaluation: Evaluation, folder: Path, date: datetime, others: Sequence[Evaluation] = ()) -> Path:
    """Write the report of one network into a folder, made where it is missing; returns the page.

    Beside the page lie its pictures and ``scores.json`` (``evaluation.from_json``). ``others``: networks
    evaluated on the same data, for the common table. No patient data but the data sets' own pseudonyms.
    """
    folder.mkdir(parents=True, exist_ok=True)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("triage.training", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    drawn = [(plot, _save(plot.draw(evaluation), folder / f"{plot.name}.png")) for plot in plots.PLOTS]
    page = environment.get_template(PAGE).render(
        evaluation=evaluation,
        info=evaluation.info,
        settings=evaluation.settings,
        date=f"{date:%Y-%m-%d}",
        figure_rows=tables.figure_rows(evaluation),
        paper_headings=["method", *paper.COLUMNS.values()],
        paper_rows=tables.paper_rows([evaluation, *others]),
        published=published.tables([evaluation, *others]),
        fit_only=tables.fit_only(evaluation),
        other_patients=tables.OTHER_PATIENTS,
        published_rows=tables.published_rows([evaluation, *others])
        if tables.has_pictures([evaluation])
        else [],
        plots=[(plot, *shown) for plot, shown in drawn],
        worst=[
            (sketch, _save(plots.sketch(sketch), folder / f"worst_{place}.png")[0])
            for place, sketch in enumerate(evaluation.worst, 1)
        ],
        volume_columns=tables.VOLUME_COLUMNS,
        volume_rows=tables.volume_rows(evaluation),
        picture_columns=tables.PICTURE_COLUMNS,
        picture_rows=tables.picture_rows(evaluation),
        data=[(kind, DATASETS[kind].summary, DATASETS[kind].notes) for kind in evaluation.sources],
        faint=(NOT_MEASURABLE, tables.NOT_RUN),
    )
    (folder / PAGE).write_text(page, encoding="utf-8")
    (folder / "scores.json").write_text(to_json(evaluation.scores), encoding="utf-8")
    return folder / PAGE


def _save(drawing: plots.Drawing, path: Path) -> tuple[str, str]:
    """(file's name, "") or ("", the sentence in its place)."""
    if not isinstance(drawing, Figure):
        return "", drawing
    drawing.savefig(path, dpi=DOTS_PER_INCH)
    return path.name, ""
