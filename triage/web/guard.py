"""Who may see the page: host names, the token, and the headers that every answer carries."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Callable
from urllib.parse import parse_qs

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from triage.config import Web

HEADERS = {
    "content-security-policy": (
        "default-src 'none'; img-src 'self'; style-src 'self'; script-src 'self'; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
COOKIE = "triage_session"
ONE_SHIFT_SECONDS = 12 * 3600
LONGEST_FORM = 4096
LOOPBACK_NAMES = {"localhost", "127.0.0.1", "[::1]"}
OPEN_PATHS = ("/static/", "/login", "/healthz")
"""Reachable without a token: they hold no patient data."""


class Guard:
    """Refuses foreign host names and callers without the token; adds HEADERS to every answer.

    Without a token the server listens on this machine only, and a page elsewhere could still reach it
    under a name of its own that it points at 127.0.0.1 (DNS rebinding): hence the host names. With a
    token that page has no cookie, so a reverse proxy may use any name.
    """

    def __init__(self, app: ASGIApp, web: Web, login: Callable[[Request], Response]) -> None:
        self.app = app
        self.token = web.token.encode()
        self.hosts = LOOPBACK_NAMES | {web.host}
        self.login = login

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
            await send(message)

        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        answer = self._refusal(Request(scope)) or self.app
        await answer(scope, receive, send_guarded)

    def _refusal(self, request: Request) -> Response | None:
        if not self.token:
            return None if self._is_known_host(request) else _unknown_host()
        if request.url.path.startswith(OPEN_PATHS) or self._has_token(request):
            return None
        if request.url.path.startswith("/api/"):
            return JSONResponse(
                {"error": "this needs the header 'Authorization: Bearer TOKEN'"},
                status_code=401,
                headers={"www-authenticate": "Bearer"},
            )
        return self.login(request)

    def _is_known_host(self, request: Request) -> bool:
        host = request.headers.get("host", "").lower()
        return re.sub(r":\d+$", "", host) in self.hosts

    def _has_token(self, request: Request) -> bool:
        scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            return hmac.compare_digest(bearer.strip().encode("latin-1"), self.token)
        cookie = request.cookies.get(COOKIE, "")
        return hmac.compare_digest(cookie.encode("latin-1", "replace"), session(self.token).encode())


def session(token: bytes) -> str:
    """What the cookie holds: derived from the token, so that a leaked cookie is not the token."""
    return hmac.new(token, b"triage web session", hashlib.sha256).hexdigest()


async def log_in(request: Request, web: Web, refuse: Callable[[Request], Response]) -> Response:
    """Compare the posted token; on success set the cookie and go where the reader wanted to go."""
    form = await _posted(request)
    if not web.token or not hmac.compare_digest(form.get("token", "").encode(), web.token.encode()):
        return refuse(request)
    wanted = form.get("next", "/")
    is_local = wanted.startswith("/") and not wanted.startswith(("//", "/\\"))
    response = RedirectResponse(wanted if is_local else "/", status_code=303)
    response.set_cookie(
        COOKIE,
        session(web.token.encode()),
        max_age=ONE_SHIFT_SECONDS,
        httponly=True,
        samesite="strict",
        secure=request.url.scheme == "https",
    )
    return response


async def _posted(request: Request) -> dict[str, str]:
    """The fields of a small form; a larger body is not read, and has no fields."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > LONGEST_FORM:
            return {}
    return {key: values[0] for key, values in parse_qs(body.decode(errors="replace")).items()}


def log_out(_: Request) -> Response:
    response = RedirectResponse("/", status_code=303)
    response.delete_cookie(COOKIE, httponly=True, samesite="strict")
    return response


def _unknown_host() -> Response:
    return PlainTextResponse(
        "This page answers only to localhost. To serve it under another name, set web.token.\n",
        status_code=400,
    )
