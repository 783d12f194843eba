"""Forms of the page: small, urlencoded, read before the work begins in a thread."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from urllib.parse import parse_qs

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

InThread = Callable[..., Awaitable[Response]]
LONGEST_FORM = 8192


class Form:
    """The fields of a posted form."""

    def __init__(self, fields: dict[str, list[str]]) -> None:
        self._fields = fields

    def one(self, name: str) -> str:
        """The field's text; "" when it was not sent."""
        return self._fields.get(name, [""])[0]

    def all(self, name: str) -> list[str]:
        """Every value, as of ticked boxes."""
        return self._fields.get(name, [])


def posted(
    answer: Callable[[Request, Form], Response], in_thread: InThread = run_in_threadpool
) -> Callable[[Request], Awaitable[Response]]:
    """An endpoint that reads the form and lets ``answer`` work on it in a thread."""

    async def endpoint(request: Request) -> Response:
        form = await _read(request)
        return await in_thread(answer, request, form)

    return endpoint


def days_of(text: str, choices: Collection[int], usual: int) -> int:
    """The number of days that an address asks for, where it is one that the page offers."""
    return int(text) if text.isdecimal() and int(text) in choices else usual


async def _read(request: Request) -> Form:
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > LONGEST_FORM:
            raise HTTPException(413, "This is more than the form can hold.")
    return Form(parse_qs(body.decode(errors="replace")))
