"""Who may do what: the table of roles, routes that name what they need, and the record of what was done."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from triage.audit import ACCESSED, Actor, Event, Outcome, messages
from triage.db.audit import Trail
from triage.domain import Permission, Person, Role, Study

Clock = Callable[[], datetime]

MAY: Mapping[Role, frozenset[Permission]] = {
    Role.VIEWER: frozenset({Permission.OPEN, Permission.SELF, Permission.READ}),
    Role.RADIOLOGIST: frozenset({Permission.OPEN, Permission.SELF, Permission.READ, Permission.WORKLIST}),
    Role.ADMIN: frozenset(Permission),
}
"""What each role may do."""
SCOPES = (Permission.READ, Permission.WORKLIST, Permission.POLICY, Permission.ADMIN)
"""What a token can be good for."""
NOBODY = Person("nobody", frozenset({Permission.OPEN}))
AT_THIS_MACHINE = Person(
    "local", frozenset({Permission.OPEN, Permission.READ, Permission.WORKLIST, Permission.POLICY})
)
"""Whoever sits at this machine while there are no users, no token, and the page listens here only."""

REPEATED = {Event.SEARCHED, Event.LET_IN, Event.TOKEN_REFUSED, Event.LOCKED}
"""What happens at each request, or as often as somebody likes, besides sights."""
MOST_REMEMBERED = 100_000
"""Sights in memory; what is forgotten is only recorded once more."""


class Page(Route):
    """A route that names the permission it needs; tests walk all routes by ``needs``."""

    def __init__(
        self,
        path: str,
        endpoint: Callable[..., Any],
        needs: Permission,
        methods: Sequence[str] | None = None,
    ) -> None:
        super().__init__(path, endpoint, methods=methods)
        self.needs = needs

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        await permit(HTTPConnection(scope), self.needs)
        await super().handle(scope, receive, send)


async def permit(connection: HTTPConnection, needs: Permission) -> None:
    """Raises HTTPException: 401 where one should log in, 403 where that would not help, which is recorded."""
    person: Person = connection.state.person
    if needs in person.may:
        return
    if person == NOBODY:
        raise HTTPException(401)
    await run_in_threadpool(
        audit, connection, Event.REFUSED, (), f"{connection.url.path} needs {needs}", Outcome.FAILURE
    )
    raise HTTPException(403, f"This needs the permission “{needs}”, which {person.who} does not have.")


class Auditor:
    """Puts on record what people saw and did.

    The page renews itself every few seconds: that a person sees a study again within ``repeat`` is not
    recorded. What was seen is only remembered here; a restart makes the record longer, never shorter.
    """

    def __init__(self, trail: Trail, clock: Clock, repeat: timedelta) -> None:
        self._trail, self._clock, self._repeat = trail, clock, repeat
        self._seen: dict[tuple[str, ...], datetime] = {}
        self._lock = threading.Lock()

    def record(
        self, event: Event, actor: Actor, studies: Iterable[Study], detail: str, outcome: Outcome
    ) -> None:
        """Raises Retryable when it cannot be recorded; then it must not be shown or done either.

        A list without studies shows nothing of anybody.
        """
        now, concerned = self._clock(), list(studies)
        if event.value.event_id == ACCESSED and not concerned:
            return
        fresh: list[tuple[str, ...]] = []
        if event.value.action == "R" or event in REPEATED:
            who = (event.name, actor.who, actor.address, detail)
            sights: dict[tuple[str, ...], Study | None]
            sights = {(*who, one.study_instance_uid): one for one in concerned} or {who: None}
            fresh = self._fresh(sights, now)
            if not fresh:
                return
            concerned = [one for key in fresh if (one := sights[key]) is not None]
        self._trail.append(messages(event, actor, now, concerned, detail, outcome))
        with self._lock:
            self._seen.update(dict.fromkeys(fresh, now))

    def _fresh(self, keys: Iterable[tuple[str, ...]], now: datetime) -> list[tuple[str, ...]]:
        with self._lock:
            if len(self._seen) > MOST_REMEMBERED:
                self._seen.clear()
            return [key for key in keys if key not in self._seen or now - self._seen[key] >= self._repeat]


def audit(
    connection: HTTPConnection,
    event: Event,
    studies: Iterable[Study] = (),
    detail: str = "",
    outcome: Outcome = Outcome.SUCCESS,
    who: str | None = None,
) -> None:
    """Record that the person of this request did or saw this: before it is shown, after it is done.

    Writes to the database: where a route is ``async``, call it in a thread. ``detail`` is what the event does
    not say: the searched text, the verdict, what was changed. ``who`` is given where nobody is logged in yet.
    """
    state = connection.state
    actor = Actor(who or state.person.who, state.address)
    state.auditor.record(event, actor, studies, detail, outcome)
