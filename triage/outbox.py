"""What each destination is owed of an answer: its kind, its list of objects and its filter decide."""

from __future__ import annotations

from collections.abc import Sequence

from triage.config import AnyDestination, Destination, DicomWeb, Only
from triage.domain import JUDGED, Band, Owed, Priority, Result, ResultObject, Status

AT_LEAST: dict[Only, Band] = {
    "positive": Band.ROUTINE,
    "severe": Band.SEVERE,
    "critical": Band.CRITICAL,
}
"""Of ``only``: the least urgent band in which a positive study passes."""


def owed(
    destinations: Sequence[AnyDestination], answer: Result, place: Priority, objects: Sequence[ResultObject]
) -> list[Owed]:
    """For the archives the objects they list, for all others the answer itself."""
    return [
        Owed(
            destination.name,
            _listed(destination, objects) if isinstance(destination, Destination | DicomWeb) else None,
            _wants(destination, answer, place),
        )
        for destination in destinations
    ]


def _wants(destination: AnyDestination, answer: Result, place: Priority) -> bool:
    """Of judged answers ``only`` decides, of others ``also``; an archive gets what objects there are."""
    if isinstance(destination, Destination | DicomWeb) or answer.status in JUDGED:
        return passes(destination.only, answer, place)
    return answer.status.value in destination.also


def passes(only: Only, answer: Result, place: Priority) -> bool:
    """Whether this filter lets the answer through."""
    return only == "all" or (answer.status is Status.POSITIVE and place.band <= AT_LEAST[only])


def _listed(destination: Destination | DicomWeb, objects: Sequence[ResultObject]) -> tuple[ResultObject, ...]:
    return tuple(item for item in objects if item.kind.value in destination.objects)
