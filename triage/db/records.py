"""Rows ↔ domain objects."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sqlalchemy import RowMapping

from triage.domain import (
    Band,
    CtSeverityScore,
    Delivery,
    DeliveryState,
    Grade,
    Instance,
    LesionBox,
    Priority,
    Result,
    ResultKind,
    Status,
    Study,
    StudyState,
)

_KEY_COLUMNS = frozenset(
    {
        "study_instance_uid",
        "series_instance_uid",
        "sop_instance_uid",
        "sop_class_uid",
        "transfer_syntax_uid",
        "path",
        "digest",
    }
)
_INSTANCE_FIELDS = [f.name for f in dataclasses.fields(Instance)]
_STUDY_FIELDS = [f.name for f in dataclasses.fields(Study)]


def instance_values(instance: Instance) -> dict[str, Any]:
    """Column values of a received instance; header facts go into one JSON document."""
    values = {name: getattr(instance, name) for name in _INSTANCE_FIELDS}
    keys = {name: values.pop(name) for name in _KEY_COLUMNS}
    return {**keys, "path": str(instance.path), "facts": values}


def instance_of(row: RowMapping) -> Instance:
    facts: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in row["facts"].items()
    }
    keys: dict[str, Any] = {name: row[name] for name in _KEY_COLUMNS - {"path"}}
    return Instance(**keys, path=Path(row["path"]), **facts)


def study_of(row: RowMapping) -> Study:
    values = {name: row[name] for name in _STUDY_FIELDS}
    return Study(**{**values, "state": StudyState(row["state"]), "notes": tuple(row["notes"])})


def priority_of(row: RowMapping) -> Priority:
    return Priority(Band(row["band"]), row["score"], row["due_at"], row["priority_reason"])


def priority_values(priority: Priority) -> dict[str, Any]:
    return {
        "band": int(priority.band),
        "score": priority.score,
        "due_at": priority.due_at,
        "priority_reason": priority.reason,
    }


def result_document(result: Result) -> dict[str, Any]:
    document = dataclasses.asdict(result)
    document["files"] = {kind.value: str(path) for kind, path in result.files.items()}
    return document


def result_of(document: Mapping[str, Any]) -> Result:
    grade, score = document["grade"], document.get("ct_severity_score")
    changed = {
        "status": Status(document["status"]),
        "grade": Grade(grade) if grade is not None else None,
        "ct_severity_score": CtSeverityScore(tuple(score["left"]), tuple(score["right"])) if score else None,
        "notes": tuple(document["notes"]),
        "boxes": tuple(
            LesionBox(one["sop_instance_uid"], tuple(one["box"]), one["score"])
            for one in document.get("boxes", ())
        ),
        "files": {ResultKind(kind): Path(path) for kind, path in document["files"].items()},
    }
    return Result(**{**document, **changed})


def delivery_of(row: RowMapping) -> Delivery:
    return Delivery(
        delivery_id=row["delivery_id"],
        study_instance_uid=row["study_instance_uid"],
        destination=row["destination"],
        revision=row["revision"],
        sop_instance_uid=row["sop_instance_uid"] or "",
        sop_class_uid=row["sop_class_uid"] or "",
        path=Path(row["path"]) if row["path"] else None,
        state=DeliveryState(row["state"]),
        created_at=row["created_at"],
        sent_at=row["sent_at"],
        transaction_uid=row["transaction_uid"],
        superseded=row["superseded"],
        attempts=row["attempts"],
        last_error=row["last_error"],
    )
