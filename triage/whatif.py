"""What a policy would have done to the studies of the last days, before it counts (pure).

Waits come from a replay of the recorded days: studies arrive when they arrived and take their judged place
when they were judged; whenever a study was closed, somebody was free to read one, and reads the first of
the list as the policy orders it. So the readers' pace is the recorded one, and only the order differs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from heapq import heappop, heappush, nlargest
from math import sqrt
from typing import Annotated, Any

from pydantic import PlainSerializer, computed_field

from triage import priority
from triage.config import Config
from triage.domain import Band, Grade, Priority, Standing, Status

EXAMPLES = 10
"""Studies named of those that would move up, and of those that would move down."""
Z95 = 1.959964
BandName = Annotated[Band, PlainSerializer(lambda band: band.label, return_type=str)]
"""A band that JSON calls by its name."""


@dataclass(frozen=True, slots=True)
class Rate:
    """So many of so many, with the 95 % interval of Wilson (1927)."""

    count: int
    total: int

    @computed_field  # type: ignore[prop-decorator]
    @property
    def share(self) -> float:
        return self.count / self.total

    @computed_field  # type: ignore[prop-decorator]
    @property
    def interval(self) -> tuple[float, float]:
        n, p, z = self.total, self.share, Z95
        middle, half = p + z * z / (2 * n), z * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        low, high = (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)
        return max(low, 0.0), min(high, 1.0)


@dataclass(frozen=True, slots=True)
class Waits:
    """From arrival until somebody reads the study; of one not read yet, so far."""

    studies: int
    unread: int
    mean: timedelta
    median: timedelta
    p95: timedelta


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one policy makes of the days."""

    flagged: int
    bands: Mapping[BandName, int]
    sensitivity: Rate | None
    """Of the studies that readers' verdicts make positive, those flagged; None without any."""
    specificity: Rate | None
    flagged_waits: Waits | None
    other_waits: Waits | None


@dataclass(frozen=True, slots=True)
class Place:
    """``number`` on the list, the first is 1; None where the list is not what is looked at."""

    band: BandName
    due_at: datetime
    number: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Mover:
    """A study whose place would be another one, and the sentence that explains it."""

    study_instance_uid: str
    patient_name: str
    accession_number: str
    reason: str
    before: Place
    after: Place


@dataclass(frozen=True, slots=True)
class Moves:
    """How many would move, and the first examples: those that would move farthest."""

    up: int
    down: int
    examples_up: tuple[Mover, ...]
    examples_down: tuple[Mover, ...]


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """The present policy and another one over the same days."""

    days: float
    """What the studies came in: less than was asked for where there were none before, or where ``cut``."""
    cut: bool
    """Only the newest were looked at."""
    studies: int
    judged: int
    verdicts: int
    present: Outcome
    candidate: Outcome
    by_arrival: tuple[Waits | None, Waits | None]
    """Waits of flagged (as the present policy flags) and of others, were the list in order of arrival."""
    bands: Moves
    """Studies of the days that would have another band or due time."""
    places: Moves
    """Studies that stand on the list now and would have another place there."""


def rehearse(
    studies: Sequence[Standing],
    listed: Sequence[Standing],
    truths: Mapping[str, bool],
    present: Config,
    candidate: Config,
    now: datetime,
    days: float,
    *,
    cut: bool = False,
) -> Rehearsal:
    """Both policies over the studies that arrived in the last ``days``, and those that are ``listed`` now,
    from whenever they are; ``truths`` by Study Instance UID.
    """
    known = {study.study_instance_uid for study in studies if study.result is not None}
    return Rehearsal(
        days=days,
        cut=cut,
        studies=len(studies),
        judged=len(known),
        verdicts=len(known & truths.keys()),
        present=_outcome(studies, truths, present, present.priority.ordering, now),
        candidate=_outcome(studies, truths, candidate, candidate.priority.ordering, now),
        by_arrival=_waits(studies, present, "arrival", now),
        bands=_band_moves(studies, present, candidate),
        places=_place_moves(listed, present, candidate),
    )


def truth(opinion: str, status: Status | None, true_grade: Grade | None) -> bool | None:
    """Whether the patient had the disease, as far as a reader's verdict on an answer says so.

    The true grade says it; else the answer was right, or wrong in a known direction.
    """
    if true_grade is not None:
        return true_grade is not Grade.CT0
    if opinion == "agree":
        return None if status is None else {Status.POSITIVE: True, Status.NEGATIVE: False}.get(status)
    return {"over_called": False, "under_called": True}.get(opinion)


def order(ordering: str) -> Callable[[Standing, Priority], tuple[Any, ...]]:
    """The key by which a list is sorted; the database's ``ORDERINGS`` are the same."""
    return _ORDERS[ordering]


def _by_due_time(study: Standing, place: Priority) -> tuple[Any, ...]:
    return place.due_at, study.arrived_at, study.study_instance_uid


def _by_band(study: Standing, place: Priority) -> tuple[Any, ...]:
    rank = Band.INDETERMINATE if place.band is Band.NOT_JUDGED else place.band
    return int(rank), -place.score, study.arrived_at, study.study_instance_uid


def _by_arrival(study: Standing, _: Priority) -> tuple[Any, ...]:
    return study.arrived_at, study.study_instance_uid


_ORDERS = {"deadline": _by_due_time, "strict": _by_band, "arrival": _by_arrival}


def _places(studies: Sequence[Standing], config: Config) -> list[Priority]:
    return [priority.again(study, config.priority, config.analysis) for study in studies]


def _flagged(study: Standing, config: Config) -> bool:
    return study.result is not None and priority.flagged(study.result, config.priority, config.analysis)


def _outcome(
    studies: Sequence[Standing], truths: Mapping[str, bool], config: Config, ordering: str, now: datetime
) -> Outcome:
    flagged = {study.study_instance_uid for study in studies if _flagged(study, config)}
    known = [uid for study in studies if study.result and (uid := study.study_instance_uid) in truths]
    sick = [uid for uid in known if truths[uid]]
    well = [uid for uid in known if not truths[uid]]
    waits = _waits(studies, config, ordering, now)
    return Outcome(
        flagged=len(flagged),
        bands=Counter(place.band for place in _places(studies, config)),
        sensitivity=_rate(sum(uid in flagged for uid in sick), len(sick)),
        specificity=_rate(sum(uid not in flagged for uid in well), len(well)),
        flagged_waits=waits[0],
        other_waits=waits[1],
    )


def _rate(count: int, total: int) -> Rate | None:
    return Rate(count, total) if total else None


def _waits(
    studies: Sequence[Standing], config: Config, ordering: str, now: datetime
) -> tuple[Waits | None, Waits | None]:
    """Of flagged and of other studies."""
    read_at = _replay(studies, config, ordering)
    waits: dict[bool, list[tuple[timedelta, bool]]] = {True: [], False: []}
    for number, study in enumerate(studies):
        until = read_at.get(number)
        waits[_flagged(study, config)].append(((until or now) - study.arrived_at, until is None))
    return _summary(waits[True]), _summary(waits[False])


def _summary(waits: Sequence[tuple[timedelta, bool]]) -> Waits | None:
    if not waits:
        return None
    lengths = sorted(length for length, _ in waits)
    return Waits(
        studies=len(waits),
        unread=sum(unread for _, unread in waits),
        mean=sum(lengths, timedelta()) / len(lengths),
        median=quantile(lengths, 0.5),
        p95=quantile(lengths, 0.95),
    )


def quantile(ordered: Sequence[Any], share: float) -> Any:
    """The smallest value that ``share`` of all do not exceed."""
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]


def _replay(studies: Sequence[Standing], config: Config, ordering: str) -> dict[int, datetime]:
    """When each study (by its index) is read; see the top of the page."""
    key, places = order(ordering), _places(studies, config)
    waiting: list[tuple[tuple[Any, ...], int]] = []
    newest: dict[int, tuple[Any, ...]] = {}
    read_at: dict[int, datetime] = {}
    for moment, kind, number in _events(studies):
        study = studies[number]
        if kind == _READER_FREE:
            while waiting:
                found, first = heappop(waiting)
                if first not in read_at and newest[first] == found:
                    read_at[first] = moment
                    break
            continue
        place = places[number]
        if kind == _ARRIVES and study.result is not None:
            place = priority.pending(study.arrived_at, study.stat, config.priority)
        newest[number] = key(study, place)
        heappush(waiting, (newest[number], number))
    return read_at


_ARRIVES, _IS_JUDGED, _READER_FREE = range(3)
"""At the same moment, in this order."""


def _events(studies: Sequence[Standing]) -> list[tuple[datetime, int, int]]:
    events = []
    for number, study in enumerate(studies):
        events.append((study.arrived_at, _ARRIVES, number))
        if study.judged_at is not None:
            events.append((max(study.judged_at, study.arrived_at), _IS_JUDGED, number))
        if study.closed_at is not None:
            events.append((max(study.closed_at, study.arrived_at), _READER_FREE, number))
    return sorted(events)


def _band_moves(studies: Sequence[Standing], present: Config, candidate: Config) -> Moves:
    moved: list[Mover] = []
    for study, was, new in zip(studies, _places(studies, present), _places(studies, candidate), strict=True):
        if (new.band, new.due_at) != (was.band, was.due_at):
            moved.append(_mover(study, Place(was.band, was.due_at), Place(new.band, new.due_at)))
    return _moves(
        moved,
        is_up=lambda one: (one.after.band, one.after.due_at) < (one.before.band, one.before.due_at),
        distance=lambda one: (
            abs(one.after.band - one.before.band),
            abs(one.after.due_at - one.before.due_at),
        ),
    )


def _place_moves(listed: Sequence[Standing], present: Config, candidate: Config) -> Moves:
    moved: list[Mover] = []
    for study, was, new in zip(listed, _numbered(listed, present), _numbered(listed, candidate), strict=True):
        if new.number != was.number:
            moved.append(_mover(study, was, new))
    return _moves(
        moved,
        is_up=lambda one: (one.after.number or 0) < (one.before.number or 0),
        distance=lambda one: abs((one.after.number or 0) - (one.before.number or 0)),
    )


def _numbered(listed: Sequence[Standing], config: Config) -> list[Place]:
    """The place of each study on the list as this policy orders it."""
    places, key = _places(listed, config), order(config.priority.ordering)
    in_order = sorted(range(len(listed)), key=lambda index: key(listed[index], places[index]))
    numbers = {index: number for number, index in enumerate(in_order, 1)}
    return [Place(place.band, place.due_at, numbers[index]) for index, place in enumerate(places)]


def _mover(study: Standing, before: Place, after: Place) -> Mover:
    return Mover(
        study_instance_uid=study.study_instance_uid,
        patient_name=study.patient_name,
        accession_number=study.accession_number,
        reason=study.priority.reason,
        before=before,
        after=after,
    )


def _moves(moved: Sequence[Mover], is_up: Callable[[Mover], bool], distance: Callable[[Mover], Any]) -> Moves:
    def examples(movers: Sequence[Mover]) -> tuple[Mover, ...]:
        return tuple(nlargest(EXAMPLES, movers, key=distance))

    up, down = [one for one in moved if is_up(one)], [one for one in moved if not is_up(one)]
    return Moves(len(up), len(down), examples(up), examples(down))
