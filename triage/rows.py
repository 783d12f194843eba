"""Plain rows for machines: the objects of ``predict --json``, ``worklist --json`` and ``/api/worklist``."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from triage.domain import LUNG_REGIONS, Delivery, DeliveryState, Result, Status, StudyState, WorklistEntry


def result_row(result: Result) -> dict[str, Any]:
    """One judgement. Fractions in [0, 1], volumes in ml, seconds by stage; null is unknown, never 0."""
    score = result.ct_severity_score
    return {
        "study_instance_uid": result.study_instance_uid,
        "series_instance_uid": result.series_instance_uid,
        "patient_id": result.patient_id,
        "status": result.status.value,
        "reason": result.reason,
        "probability": result.probability,
        "probability_kind": result.probability_kind,
        "calibrated": result.calibrated,
        "affected_fraction": result.affected_fraction,
        "affected_left": result.affected_left,
        "affected_right": result.affected_right,
        "grade": result.grade.value if result.grade else None,
        "grade_from": result.grade_from,
        "lung_volume_ml": result.lung_volume_ml,
        "lesion_volume_ml": result.lesion_volume_ml,
        "ground_glass_ml": result.ground_glass_ml,
        "consolidation_ml": result.consolidation_ml,
        "percent_infection": result.percent_infection,
        "ct_severity_score": score.total if score else None,
        "ct_severity_left": dict(zip(LUNG_REGIONS, score.left, strict=True)) if score else None,
        "ct_severity_right": dict(zip(LUNG_REGIONS, score.right, strict=True)) if score else None,
        "positive_slices": result.positive_slices,
        "model": result.model,
        "model_version": result.model_version,
        "revision": result.revision,
        "notes": list(result.notes),
        "seconds": dict(result.seconds),
        "files": {kind.value: str(path) for kind, path in result.files.items()},
    }


def status(entry: WorklistEntry) -> Status | None:
    """The answer that stands now: None while a study is received, waits or is analysed (again)."""
    match entry.study.state:
        case StudyState.RECEIVING | StudyState.READY | StudyState.ANALYZING:
            return None
        case StudyState.REJECTED:
            return Status.NOT_ANALYSABLE
        case StudyState.FAILED:
            return Status.FAILED
        case StudyState.ANALYZED:
            return entry.result.status if entry.result else None


def entry_row(entry: WorklistEntry, now: datetime) -> dict[str, Any]:
    """One study of the worklist; the figures are those of its latest revision, null when there is none.

    ``reason`` is the sentence that explains the place; ``status`` is null while an answer is pending, also
    when an earlier revision has figures. ``overdue``: its ``due_at`` has come while it is open. A failed
    study is tried again at ``retry_at``; null there means that it was given up.
    """
    study = entry.study
    nothing = Result(
        study_instance_uid=study.study_instance_uid,
        patient_id=study.patient_id,
        status=Status.FAILED,
        reason="",
    )
    row = result_row(entry.result or nothing)
    stands = status(entry)
    return {
        **row,
        "patient_id": study.patient_id,
        "status": stands.value if stands else None,
        "revision": entry.result.revision if entry.result else None,
        "state": study.state.value,
        "retry_at": _iso(study.not_before) if study.state is StudyState.FAILED else None,
        "band": entry.priority.band.label,
        "due_at": _iso(entry.priority.due_at),
        "overdue": study.closed_at is None and entry.priority.due_at <= now,
        "reason": entry.priority.reason,
        "arrived_at": _iso(study.arrived_at),
        "accession_number": study.accession_number,
        "study_date": study.study_date,
        "study_description": study.study_description,
        "images": entry.images,
        "notes": [*study.remarks, *row["notes"]],
        "deliveries": {state.value: entry.deliveries.get(state, 0) for state in DeliveryState},
    }


def delivery_row(delivery: Delivery) -> dict[str, Any]:
    """One thing owed to a destination: an object, or revision ``revision`` of an answer."""
    return {
        "destination": delivery.destination,
        "study_instance_uid": delivery.study_instance_uid,
        "revision": delivery.revision,
        "sop_instance_uid": delivery.sop_instance_uid or None,
        "path": str(delivery.path) if delivery.path else None,
        "state": delivery.state.value,
        "attempts": delivery.attempts,
        "owed_since": _iso(delivery.created_at),
        "last_error": delivery.last_error,
    }


FORMULA = ("=", "+", "-", "@", "\t", "\r", "＝", "＋", "－", "＠")
"""What a spreadsheet takes for the beginning of a formula (OWASP: CSV injection)."""


def harmless(value: Any) -> Any:
    """A cell of a CSV file. Names come from scanners, and from whoever made the file: none is a formula."""
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value


def _iso(moment: datetime | None) -> str | None:
    return moment.isoformat() if moment else None
