"""The JSON of the reading list: its rows, live changes, claims, verdicts and saved views."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import asdict
from datetime import datetime, timedelta
from typing import Annotated, Any

from fastapi import APIRouter, Header, Path, Query, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import QueryParams
from starlette.exceptions import HTTPException

from triage.audit import Event
from triage.db.reading import Changes, Claim, Opinion, Row, Verdict
from triage.domain import Grade, Permission, Person, Status, StudyState
from triage.errors import Retryable
from triage.rows import entry_row
from triage.web.access import audit
from triage.web.api import CONFLICT, NOT_FOUND, READER, WORKER, Uid
from triage.web.reading import LONGEST_PAGE, PIECE, Filters, ReadingList, filters_of

LONGEST_COMMENT = 2000
LIVE_SECONDS = 1.0
"""How soon a change is told to those who look."""
QUIET_ROUNDS = 15
"""After so many without a change a sign of life is sent, so that nobody in between cuts the line."""
STREAM_ROUNDS = 300
"""Then the stream ends: whoever still may see the list opens it again."""
LARGEST_NUMBER = 2**63 - 1


class EventStream(StreamingResponse):
    """Server-sent events (WHATWG HTML, section 9.2): each one's data is a ``ChangesOut``."""

    media_type = "text/event-stream"


_NOTHING: dict[str, Any] = {"status_code": 204, "response_class": Response, "responses": NOT_FOUND}
Since = Annotated[int, Query(ge=0, le=LARGEST_NUMBER)]
ViewName = Annotated[str, Path(min_length=1, max_length=64)]


class ClaimOut(BaseModel):
    """Who reads a study."""

    person: str
    claimed_at: datetime
    until: datetime

    @classmethod
    def of(cls, claim: Claim) -> ClaimOut:
        return cls(person=claim.person, claimed_at=claim.claimed_at, until=claim.until)


class Claimed(BaseModel):
    """Why it was not done: somebody else reads this study, or, without a claim, something else."""

    error: str
    claim: ClaimOut | None = None


class Said(BaseModel):
    """What a reader says of an answer."""

    model_config = ConfigDict(extra="forbid")

    opinion: Opinion
    comment: str = Field("", max_length=LONGEST_COMMENT)
    true_grade: Grade | None = None


class VerdictIn(Said):
    """What a reader says of the answer with this revision: the one that was looked at."""

    revision: int = Field(ge=1, le=LARGEST_NUMBER)


class VerdictOut(Said):
    """A verdict, beside the figures of the answer that it was said of."""

    person: str
    given_at: datetime
    revision: int | None
    status: Status | None
    probability: float | None
    band: str
    score: float
    model: str | None
    model_version: str | None
    policy_version: int | None

    @classmethod
    def of(cls, verdict: Verdict) -> VerdictOut:
        values = {name: getattr(verdict, name) for name in cls.model_fields}
        return cls(**{**values, "band": verdict.band.label})


class EntryOut(BaseModel):
    """One study of the list; figures are those of the newest answer, null where unknown."""

    study_instance_uid: str
    patient_id: str
    patient_name: str
    accession_number: str
    study_date: str
    study_description: str
    images: int
    state: StudyState
    status: Status | None
    band: str
    reason: str
    arrived_at: datetime
    waited_minutes: float
    due_at: datetime
    overdue: bool
    retry_at: datetime | None
    closed_at: datetime | None
    closed_reason: str
    probability: float | None
    probability_kind: str | None
    calibrated: bool
    affected_fraction: float | None
    affected_left: float | None
    affected_right: float | None
    grade: Grade | None
    grade_from: str
    model: str | None
    model_version: str | None
    revision: int | None
    notes: list[str]
    thumbnail: str | None
    deliveries: dict[str, int]
    claim: ClaimOut | None
    verdict: VerdictOut | None
    key: str


class WorklistAsked(Filters):
    """Which rows of the list."""

    after: str | None = Field(None, max_length=1024, description="``next`` of the rows before")
    limit: int = Field(PIECE, ge=1, le=LONGEST_PAGE)


class WorklistOut(BaseModel):
    """Some rows in reading order. ``next`` is the ``after`` of those that follow; null after the last."""

    ordering: str
    as_of: datetime
    first_place: int
    rows: list[EntryOut]
    next: str | None


class CountsOut(BaseModel):
    """Of open studies."""

    open: int
    overdue: int
    critical: int
    pending: int
    not_analysable: int
    failed: int


class ChangesOut(BaseModel):
    """``version`` is another one whenever anything on the list has changed. ``critical`` are UIDs alone: what
    there is to say of a study is said, and recorded, where it is shown.
    """

    version: int
    critical: list[str]

    @classmethod
    def of(cls, changes: Changes) -> ChangesOut:
        return cls(version=changes.version, critical=list(changes.critical))


class TakeOver(BaseModel):
    """``take_over``: also from this person, who was seen to read the study, and is then told by the list."""

    model_config = ConfigDict(extra="forbid")

    take_over: str = ""


class ReadIn(TakeOver):
    """What was seen of the study that was read: the revision of its answer, 0 for none, and its images."""

    revision: int | None = Field(None, ge=0, le=LARGEST_NUMBER)
    images: int | None = Field(None, ge=0, le=LARGEST_NUMBER)


class ViewIn(BaseModel):
    """Filters to come back to."""

    model_config = ConfigDict(extra="forbid")

    filters: Filters


class ViewOut(ViewIn):
    """A saved view; ``query`` is what the page's address has for it."""

    name: str
    query: str


class ReadingApi:
    """The routes; every one names the permission that it needs."""

    def __init__(self, reading: ReadingList) -> None:
        self.reading = reading
        self.kept = reading.database.reading

    def router(self) -> APIRouter:
        made = APIRouter()
        add = made.add_api_route
        claimed: dict[int | str, dict[str, Any]] = {409: {"model": Claimed, "description": "Taken, or read"}}
        add("/worklist", self.worklist, tags=["worklist"], responses=CONFLICT)
        add("/worklist/counts", self.counts, tags=["worklist"])
        add("/worklist/changes", self.changes, tags=["worklist"])
        add("/worklist/events", self.events, tags=["worklist"], response_class=EventStream)
        one = "/studies/{study_instance_uid}"
        add(one, self.study, tags=["studies"], responses=NOT_FOUND)
        add(
            f"{one}/claim",
            self.claim,
            methods=["PUT"],
            response_model=ClaimOut,
            tags=["reading"],
            responses=NOT_FOUND | claimed,
        )
        add(f"{one}/claim", self.release, methods=["DELETE"], tags=["reading"], **_NOTHING)
        read = {**_NOTHING, "responses": NOT_FOUND | claimed}
        add(f"{one}/read", self.read, methods=["PUT"], tags=["reading"], **read)
        add(f"{one}/read", self.unread, methods=["DELETE"], tags=["reading"], **_NOTHING)
        add(f"{one}/verdicts", self.verdicts, tags=["reading"], responses=NOT_FOUND)
        add(
            f"{one}/verdicts",
            self.give_verdict,
            methods=["POST"],
            status_code=201,
            tags=["reading"],
            responses=NOT_FOUND | CONFLICT,
        )
        add("/views", self.views, tags=["views"])
        add("/views/{name:path}", self.save_view, methods=["PUT"], tags=["views"])
        add("/views/{name:path}", self.forget_view, methods=["DELETE"], tags=["views"], **_NOTHING)
        return made

    # --- the list ------------------------------------------------------------------------------

    def worklist(
        self, request: Request, asked: Annotated[WorklistAsked, Query()], _: Person = READER
    ) -> WorklistOut:
        """Open studies in reading order. 409 when the ordering has changed since ``after``: begin again."""
        now = self.reading.now()
        found = self.reading.page(request, asked, now, after=asked.after, until=None, limit=asked.limit)
        return WorklistOut(
            ordering=self.reading.ordering,
            as_of=now,
            first_place=found.first_place,
            rows=[self.entry(row, now) for row in found.rows],
            next=found.rows[-1].key if found.more else None,
        )

    def counts(self, _: Person = READER) -> CountsOut:
        return CountsOut(**asdict(self.reading.counts(self.reading.now())))

    def changes(self, since: Since = 0, _: Person = READER) -> ChangesOut:
        """Whether anything has changed since a version, and which critical studies have; 0 names them all."""
        return self._changes(since)

    async def events(
        self,
        request: Request,
        since: Since = 0,
        last_event_id: Annotated[str, Header(max_length=20)] = "",
        _: Person = READER,
    ) -> StreamingResponse:
        """The same as ``changes``, as it happens. The stream ends by itself after minutes: open it again."""
        if last_event_id.isascii() and last_event_id.isdigit():
            since = min(max(since, int(last_event_id)), LARGEST_NUMBER)
        first = await run_in_threadpool(self._changes, since)  # an error here still is an answer
        return EventStream(self._told(request, since, first), headers={"x-accel-buffering": "no"})

    async def _told(self, request: Request, since: int, changes: ChangesOut | None) -> AsyncIterator[str]:
        quiet = 0
        for _ in range(STREAM_ROUNDS):
            if changes is None:
                return
            if changes.version != since:
                yield f"id: {changes.version}\ndata: {changes.model_dump_json()}\n\n"
                since, quiet = changes.version, 0
            elif quiet % QUIET_ROUNDS == 0:
                yield ": nothing new\n\n"
            quiet += 1
            await asyncio.sleep(LIVE_SECONDS)
            if self.reading.stop.is_set():
                return
            try:
                changes = await run_in_threadpool(self._further, request, since)
            except Retryable:
                return  # whoever opens the stream again is told why

    def _further(self, request: Request, since: int) -> ChangesOut | None:
        """None for who may not see the list any more: has logged out, or may less than before."""
        return self._changes(since) if Permission.READ in request.state.who_asks().may else None

    def _changes(self, since: int) -> ChangesOut:
        reading = self.reading
        told = ChangesOut.of(self.kept.changes(since, reading.now(), reading.leave_after_days))
        if reading.pages.config.shadow:  # nobody's work changes: nothing calls
            told.critical = []
        return told

    def study(self, request: Request, study_instance_uid: Uid, _: Person = READER) -> EntryOut:
        """One study, on the list or off it."""
        row = self._row(study_instance_uid)
        audit(request, Event.STUDY_SEEN, [row.entry.study])
        return self.entry(row, self.reading.now())

    # --- who reads what --------------------------------------------------------------------------

    def claim(
        self, request: Request, study_instance_uid: Uid, wish: TakeOver, person: Person = WORKER
    ) -> Any:
        """Begin to read a study, or go on with it. 409 says who reads it already, also when that is not whom
        it was to be taken over from.
        """
        row, now = self._row(study_instance_uid), self.reading.now()
        until = now + self.reading.claim_time
        claim = self.kept.claim(study_instance_uid, person.who, now, until, take_over=wish.take_over)
        if claim is None:
            raise HTTPException(404)
        if claim.person != person.who:
            return _taken(claim)
        if claim.claimed_at == now:
            audit(request, Event.CLAIMED, [row.entry.study], _taken_over(row, person))
        return ClaimOut.of(claim)

    def release(self, request: Request, study_instance_uid: Uid, person: Person = WORKER) -> None:
        """Leave the study to others. 404 when this person does not read it."""
        study = self._row(study_instance_uid).entry.study
        if not self.kept.release(study_instance_uid, person.who):
            raise HTTPException(404, f"{person.who} does not read this study.")
        audit(request, Event.RELEASED, [study])

    def read(
        self, request: Request, study_instance_uid: Uid, wish: ReadIn, person: Person = WORKER
    ) -> Response:
        """The study was read: it leaves the list. 409 says who reads it, or what came since it was seen."""
        row, now = self._row(study_instance_uid), self.reading.now()
        done = self.kept.mark_read(study_instance_uid, person.who, now, **wish.model_dump())
        if isinstance(done, Claim):
            return _taken(done)
        audit(request, Event.MARKED_READ, [row.entry.study], _taken_over(row, person))
        return Response(status_code=204)

    def unread(self, request: Request, study_instance_uid: Uid, _: Person = WORKER) -> None:
        """Put a study that is off the list back at its place. 404 when it is on the list."""
        study = self._row(study_instance_uid).entry.study
        if not self.kept.mark_unread(study_instance_uid):
            raise HTTPException(404, "This study is on the list.")
        audit(request, Event.MARKED_READ, [study], "taken back")

    # --- what readers say ------------------------------------------------------------------------

    def verdicts(self, request: Request, study_instance_uid: Uid, _: Person = READER) -> list[VerdictOut]:
        """The newest first; of one person's on one revision, the newest counts."""
        audit(request, Event.STUDY_SEEN, [self._row(study_instance_uid).entry.study])
        return [VerdictOut.of(one) for one in self.kept.verdicts(study_instance_uid)]

    def give_verdict(
        self, request: Request, study_instance_uid: Uid, said: VerdictIn, person: Person = WORKER
    ) -> VerdictOut:
        """Say whether an answer is right. 409 while there is none, or once there is a newer one."""
        study, now = self._row(study_instance_uid).entry.study, self.reading.now()
        given = self.kept.give_verdict(
            study_instance_uid,
            person.who,
            now,
            said.opinion,
            comment=said.comment.strip(),
            true_grade=said.true_grade,
            revision=said.revision,
        )
        if given is None:
            raise HTTPException(404)
        audit(request, Event.VERDICT_GIVEN, [study], said.opinion)
        return VerdictOut.of(given)

    # --- views -----------------------------------------------------------------------------------

    def views(self, person: Person = READER) -> list[ViewOut]:
        """The views that this person has saved."""
        found = self.kept.views(person.who).items()
        return [_view(name, filters_of(QueryParams(query))) for name, query in found]

    def save_view(self, name: ViewName, view: ViewIn, person: Person = READER) -> ViewOut:
        """Keep filters under a name, for this person; the earlier ones of that name are replaced."""
        self.kept.save_view(person.who, name, view.filters.query())
        return _view(name, view.filters)

    def forget_view(self, name: ViewName, person: Person = READER) -> None:
        if not self.kept.forget_view(person.who, name):
            raise HTTPException(404, "There is no view of this name.")

    # --- rows ------------------------------------------------------------------------------------

    def _row(self, study_instance_uid: str) -> Row:
        row = self.reading.row(study_instance_uid, self.reading.now())
        if row is None:
            raise HTTPException(404)
        return row

    def entry(self, row: Row, now: datetime) -> EntryOut:
        study = row.entry.study
        return EntryOut.model_validate(
            {
                **entry_row(row.entry, now),
                "patient_name": study.patient_name,
                "waited_minutes": max((now - study.arrived_at) / timedelta(minutes=1), 0),
                "closed_at": study.closed_at,
                "closed_reason": study.closed_reason,
                "thumbnail": self.reading.pages.picture_address(row.entry),
                "claim": ClaimOut.of(row.claim) if row.claim else None,
                "verdict": VerdictOut.of(row.verdict) if row.verdict else None,
                "key": row.key,
            }
        )


def _taken(claim: Claim) -> JSONResponse:
    taken = Claimed(error=f"{claim.person} reads this study", claim=ClaimOut.of(claim))
    return JSONResponse(taken.model_dump(mode="json"), status_code=409)


def _taken_over(row: Row, person: Person) -> str:
    return f"taken over from {row.claim.person}" if row.claim and row.claim.person != person.who else ""


def _view(name: str, filters: Filters) -> ViewOut:
    return ViewOut(name=name, query=filters.query(), filters=filters)
