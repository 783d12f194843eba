"""Lists as CSV files for spreadsheets: the same figures as the page has."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from datetime import datetime
from io import StringIO
from itertools import chain
from typing import Any

from starlette.responses import StreamingResponse

from triage.domain import WorklistEntry
from triage.rows import entry_row, harmless

COLUMNS = (
    "study_instance_uid",
    "patient_id",
    "patient_name",
    "accession_number",
    "study_date",
    "study_description",
    "images",
    "arrived_at",
    "state",
    "status",
    "band",
    "reason",
    "due_at",
    "overdue",
    "probability",
    "probability_kind",
    "calibrated",
    "affected_fraction",
    "affected_left",
    "affected_right",
    "grade",
    "grade_from",
    "lung_volume_ml",
    "lesion_volume_ml",
    "ground_glass_ml",
    "consolidation_ml",
    "percent_infection",
    "ct_severity_score",
    "model",
    "model_version",
    "revision",
    "notes",
)


def as_csv(name: str, pieces: Iterator[Iterable[WorklistEntry]], now: datetime) -> StreamingResponse:
    """A file of that name, written piece by piece. The first is read before the answer begins."""
    first = next(pieces, ())
    lines = ("".join(_lines(piece, now)) for piece in chain([first], pieces))
    return StreamingResponse(
        chain([_line(COLUMNS)], lines),
        media_type="text/csv; charset=utf-8",
        headers={"content-disposition": f'attachment; filename="{name}"'},
    )


def _lines(entries: Iterable[WorklistEntry], now: datetime) -> Iterator[str]:
    for entry in entries:
        row = {**entry_row(entry, now), "patient_name": entry.study.patient_name}
        row["notes"] = "; ".join(row["notes"])
        yield _line([row[name] for name in COLUMNS])


def _line(values: Iterable[Any]) -> str:
    line = StringIO()
    csv.writer(line).writerow([harmless(value) for value in values])
    return line.getvalue()
