"""Every request passes here: which host names are answered, who asks, and the headers of every answer."""

from __future__ import annotations

import hmac
import logging
import re
from collections.abc import Sequence
from functools import partial
from ipaddress import ip_address, ip_network
from urllib.parse import urlsplit

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from triage.audit import Event, Outcome
from triage.config import Web, is_loopback
from triage.db import Database
from triage.domain import Permission, Person, User
from triage.errors import Retryable
from triage.passwords import token_hash
from triage.web.access import AT_THIS_MACHINE, MAY, NOBODY, Auditor, Clock, audit

log = logging.getLogger(__name__)

HEADERS = {
    "content-security-policy": (
        "default-src 'none'; img-src 'self'; style-src 'self'; script-src 'self'; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",  # with less, browsers would not say where a form comes from
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
LOOPBACK_NAMES = {"localhost", "127.0.0.1", "[::1]"}
SAFE = {"GET", "HEAD", "OPTIONS"}
LIVE = "/health/live"
"""Answered whatever the database does."""
COOKIE = "triage_session"
FORWARDED = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-real-ip")
"""Headers of which at least one comes from a reverse proxy."""
BACKGROUND = "x-background"
"""A header of requests that the page makes by itself: they do not keep a session alive."""


class Guard:
    """Finds out who asks and puts it into ``request.state``; routes then ask for permissions.

    While anybody at this machine is let in, a page elsewhere could still reach it under a name of its own
    that it points at 127.0.0.1 (DNS rebinding): hence the host names. Who must log in has no cookie under
    that name, so a reverse proxy may use any.
    """

    def __init__(self, app: ASGIApp, database: Database, web: Web, clock: Clock, auditor: Auditor) -> None:
        self.app, self.people, self.web, self.clock, self.auditor = app, database.people, web, clock, auditor
        self.hosts = LOOPBACK_NAMES | {web.host}
        self.proxies = [ip_network(network) for network in web.proxy.networks]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    if name != "cache-control" or name not in headers:
                        headers[name] = value
            await send(message)

        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope)
        if scope["path"] == LIVE:
            request.state.person = NOBODY
            await self.app(scope, receive, send_guarded)
            return
        try:
            answer = await run_in_threadpool(self._refusal, request) or self.app
        except Retryable as error:
            log.warning("who asks cannot be found out: %s", error)
            answer = PlainTextResponse("The database does not answer now.\n", status_code=503)
        await answer(scope, receive, send_guarded)

    def _refusal(self, request: Request) -> Response | None:
        """Fill ``request.state``; an answer where this request goes no further."""
        peer = request.client.host if request.client else ""
        from_proxy = self._is_proxy(peer)
        if from_proxy:
            _take_forwarded(request)
        request.state.auditor = self.auditor
        request.state.address = request.client.host if request.client else ""
        request.state.person = NOBODY
        request.state.who_asks = partial(self._who_asks, request, peer, from_proxy)
        request.state.person = request.state.who_asks()
        if request.state.person == AT_THIS_MACHINE and not self._is_known_host(request):
            return _unknown_host()
        if _bearer(request) is None and request.method not in SAFE and not _same_origin(request):
            return PlainTextResponse("This was asked for by another site's page: refused.\n", status_code=403)
        return None

    def _who_asks(self, request: Request, peer: str, from_proxy: bool) -> Person:
        """As of now: an answer that goes on for minutes asks again."""
        bearer, header = _bearer(request), self.web.proxy.user_header
        told = request.headers.getlist(header) if header and from_proxy else []
        if bearer is not None:
            return self._program(request, bearer) or NOBODY
        if any(told):
            return self._told(request, told) or NOBODY
        return self._logged_in(request) or (AT_THIS_MACHINE if self._is_open(request, peer) else NOBODY)

    def _is_proxy(self, address: str) -> bool:
        return _is_address(address) and any(ip_address(address) in network for network in self.proxies)

    def _is_open(self, request: Request, peer: str) -> bool:
        """Nobody need log in: as long as there is nobody who could, and only this machine can ask.

        Through a proxy at this machine, anybody could.
        """
        if self.web.proxy.user_header or any(name in request.headers for name in FORWARDED):
            return False
        here = is_loopback(self.web.host) and is_loopback(peer)
        return here and not self.web.token and not self.people.any_user()

    def _is_known_host(self, request: Request) -> bool:
        host = request.headers.get("host", "").lower()
        return re.sub(r":\d+$", "", host) in self.hosts

    def _program(self, request: Request, bearer: str) -> Person | None:
        """Whose token this is. ``web.token`` may read, tokens made on the page what their scopes say."""
        if self.web.token and hmac.compare_digest(bearer.encode(errors="replace"), self.web.token.encode()):
            return Person("web.token", frozenset({Permission.OPEN, Permission.READ}))
        token = self.people.use_token(token_hash(bearer), self.clock())
        if token is None:
            audit(request, Event.TOKEN_REFUSED, (), "unknown or expired", Outcome.FAILURE)
            return None
        return Person(f"token {token.name}", frozenset({Permission.OPEN}) | token.scopes)

    def _told(self, request: Request, names: Sequence[str]) -> Person | None:
        """Whom a trusted proxy has let in, if there is such a user; of two names one is the browser's."""
        user = self.people.user(names[0]) if len(names) == 1 else None
        if user is None or user.disabled:
            audit(request, Event.LET_IN, (), "no such user", Outcome.FAILURE, ", ".join(names))
            return None
        audit(request, Event.LET_IN, who=user.name)
        return _person(user)

    def _logged_in(self, request: Request) -> Person | None:
        cookie = request.cookies.get(COOKIE)
        if cookie is None:
            return None
        user = self.people.user_of_session(
            token_hash(cookie), self.clock(), self.web.session, stays=_is_background(request)
        )
        return _person(user) if user else None


def _person(user: User) -> Person:
    return Person(user.name, MAY[user.role], user.role)


def _bearer(request: Request) -> str | None:
    """The token of a program. Other schemes, such as what a proxy asked the browser for, are not ours."""
    scheme, _, value = request.headers.get("authorization", "").partition(" ")
    return value.strip() if scheme.lower() == "bearer" else None


def _is_background(request: Request) -> bool:
    return BACKGROUND in request.headers or request.headers.get("accept") == "text/event-stream"


def _same_origin(request: Request) -> bool:
    """Browsers say where a form or a script's request comes from; who says nothing is not believed.

    No secret in each form is needed then (OWASP: Fetch Metadata, Origin).
    """
    site = request.headers.get("sec-fetch-site")
    if site is not None:
        return site == "same-origin"
    return urlsplit(request.headers.get("origin", "")).netloc == request.headers.get("host", "") != ""


def _is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


def _take_forwarded(request: Request) -> None:
    """The browser's address and scheme as the proxy in between gives them: what it adds stands last."""
    forwarded, scheme = _last(request, "x-forwarded-for"), _last(request, "x-forwarded-proto")
    if _is_address(forwarded):
        request.scope["client"] = (forwarded, 0)
    if scheme == "https":
        request.scope["scheme"] = "https"


def _last(request: Request, header: str) -> str:
    return ",".join(request.headers.getlist(header)).rpartition(",")[2].strip()


def _unknown_host() -> Response:
    return PlainTextResponse(
        "This page answers only to localhost as long as it has no users. "
        "Make the first one with the link that `triage check` prints.\n",
        status_code=400,
    )
