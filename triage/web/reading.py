"""The reading list as a page: pieces of it by key, filters, saved views."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import urlencode

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import QueryParams
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from triage.audit import Event
from triage.db.reading import Counts, Page, Row
from triage.db.worklist import Chosen
from triage.domain import Band, Permission, Person, Status, StudyState, WorklistEntry
from triage.errors import Rejected
from triage.web import words
from triage.web.access import Page as Guarded
from triage.web.access import audit
from triage.web.export import as_csv

if TYPE_CHECKING:
    from triage.web.app import Pages

PIECE = 50
"""Rows that the page asks for at once."""
LONGEST_PAGE = 200
CSV_PIECE = 1000
COUNTS_SECONDS = 5
LONGEST_TEXT = 256

BandName = Literal["critical", "severe", "positive", "indeterminate", "not-judged", "routine"]
StatusName = Literal["positive", "negative", "not_analysable", "failed", "pending"]
BANDS = {band.label: band for band in Band}


class Filters(BaseModel):
    """Which open studies are wanted; what is left out leaves nothing out."""

    model_config = ConfigDict(frozen=True)

    band: Annotated[list[BandName], Field(max_length=6)] = []
    status: Annotated[list[StatusName], Field(max_length=5)] = []
    state: Annotated[list[StudyState], Field(max_length=6)] = []
    claimed: Literal["me", "nobody"] | None = None
    text: str = Field("", max_length=LONGEST_TEXT, description="A part of name, ID, accession number or UID")
    description: str = Field("", max_length=LONGEST_TEXT, description="A part of the study description")
    scanner: str = Field("", max_length=LONGEST_TEXT, description="A part of the scanner's maker or model")
    hours: float | None = Field(None, gt=0, le=24 * 366, description="Arrived within so many hours")
    overdue: bool = False

    def chosen(self, person: Person, now: datetime) -> Chosen:
        return Chosen(
            bands=frozenset(BANDS[name] for name in self.band),
            states=frozenset(self.state),
            statuses=frozenset(None if name == "pending" else Status(name) for name in self.status),
            claimed_by=person.who if self.claimed == "me" else None,
            unclaimed=self.claimed == "nobody",
            text=self.text.strip(),
            description=self.description.strip(),
            scanner=self.scanner.strip(),
            arrived_since=None if self.hours is None else now - timedelta(hours=self.hours),
            overdue=self.overdue,
        )

    def query(self) -> str:
        """What stands in an address for these filters; empty for none."""
        values = self.model_dump(mode="json", exclude_defaults=True)
        if self.hours is not None:
            values["hours"] = f"{self.hours:g}"
        return urlencode(values | ({"overdue": "true"} if self.overdue else {}), doseq=True)


def filters_of(asked: QueryParams) -> Filters:
    """The filters in the address of a page; 400 with the reason when one is wrong."""
    many = {"band", "status", "state"}
    given = {name: asked.getlist(name) if name in many else asked[name] for name in asked if asked[name]}
    known = {name: value for name, value in given.items() if name in Filters.model_fields}
    try:
        return Filters.model_validate(known)
    except ValidationError as error:
        first = error.errors()[0]
        raise HTTPException(400, f"The filter “{first['loc'][0]}” is wrong: {first['msg']}.") from error


class ReadingList:
    """What the page and the API both read, at one ``now``, for one person."""

    def __init__(self, pages: Pages, stop: threading.Event) -> None:
        self.pages, self.stop = pages, stop
        self.database = pages.database
        self._counted: tuple[tuple[int, float], Counts] | None = None

    def routes(self) -> list[Route]:
        return [
            Guarded("/", self.worklist, Permission.READ),
            Guarded("/list", self.piece, Permission.READ),
            Guarded("/list.csv", self.file, Permission.READ),
        ]

    def now(self) -> datetime:
        return self.pages.clock()

    @property
    def ordering(self) -> str:
        """Of the policy that counts now: it may change while the page is open."""
        return self.pages.ordering

    @property
    def claim_time(self) -> timedelta:
        return timedelta(minutes=self.pages.config.web.claim_minutes)

    @property
    def leave_after_days(self) -> float:
        return self.pages.config.retention.leave_list_after_days

    def page(
        self,
        request: Request,
        filters: Filters,
        now: datetime,
        *,
        after: str | None,
        until: str | None,
        limit: int,
    ) -> Page:
        """Some rows; that they are seen is put on record before they are shown."""
        found = self.database.reading.page(
            now,
            self.ordering,
            self.leave_after_days,
            filters.chosen(request.state.person, now),
            after=after,
            until=until,
            limit=limit,
        )
        studies = [row.entry.study for row in found.rows]
        if filters.text.strip():
            audit(request, Event.SEARCHED, detail=filters.text.strip())
        audit(request, Event.LISTED, studies)
        return found

    def row(self, study_instance_uid: str, now: datetime) -> Row | None:
        return self.database.reading.row(study_instance_uid, now, self.ordering)

    def counts(self, now: datetime) -> Counts:
        """Counted once for all who look, until something changes, or some seconds are over."""
        kept = self.database.reading
        asked = (kept.version(), now.timestamp() // COUNTS_SECONDS)
        known = self._counted
        if known is None or known[0] != asked:
            known = self._counted = (asked, kept.counts(now, self.leave_after_days))
        return known[1]

    def worklist(self, request: Request) -> Response:
        """The first piece, ready to be read; the script then asks for the others where they are looked at."""
        now, filters = self.now(), filters_of(request.query_params)
        counts = self.counts(now)
        views = self.database.reading.views(request.state.person.who)
        return self.pages.render(
            request,
            "worklist.html",
            now,
            **self._piece(request, filters, now),
            filters=filters,
            views=views,
            counts=words.summary(counts),
            title=words.title(counts),
        )

    def piece(self, request: Request) -> Response:
        """Rows from one key to another, as the page has them."""
        now, filters = self.now(), filters_of(request.query_params)
        counts = self.counts(now)
        return self.pages.render(
            request,
            "piece.html",
            now,
            **self._piece(request, filters, now),
            counts=words.summary(counts),
            title=words.title(counts),
        )

    def file(self, request: Request) -> Response:
        """All rows that the filters let through, as CSV; that each is taken is put on record before."""
        now, filters = self.now(), filters_of(request.query_params)
        chosen = filters.chosen(request.state.person, now)

        def pieces() -> Iterator[list[WorklistEntry]]:
            after, more, ordering = None, True, self.ordering
            while more:
                found = self.database.reading.page(
                    now, ordering, self.leave_after_days, chosen, after=after, until=None, limit=CSV_PIECE
                )
                entries = [row.entry for row in found.rows]
                audit(request, Event.EXPORTED, [entry.study for entry in entries], "list")
                yield entries
                more = found.more
                after = found.rows[-1].key if more else None

        return as_csv("worklist.csv", pieces(), now)

    def _piece(self, request: Request, filters: Filters, now: datetime) -> dict[str, Any]:
        after, until = (request.query_params.get(name) or None for name in ("after", "until"))
        try:
            found = self.page(request, filters, now, after=after, until=until, limit=PIECE)
        except Rejected as error:
            raise HTTPException(409, f"{words.sentence(str(error))} Load the page again.") from error
        following = found.rows[-1].key if found.more else None
        return {"page": found, "following": following, "query": filters.query(), "ordering": self.ordering}
