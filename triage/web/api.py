"""The JSON API under /api/v1: one FastAPI application; each part of the page brings its routes.

What it can do is described by /api/v1/openapi.json. Errors are ``{"error": sentence}``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Path, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from triage import __version__
from triage.domain import Permission, Person
from triage.errors import Rejected, Retryable
from triage.web.access import permit

PATH = "/api/v1"


class Problem(BaseModel):
    """Why it was not done."""

    error: str


PROBLEMS: dict[int | str, dict[str, Any]] = {
    400: {"model": Problem, "description": "What was sent cannot be read"},
    401: {"model": Problem, "description": "Log in, or send a token"},
    403: {"model": Problem, "description": "This person or token may not do this"},
    422: {"model": Problem, "description": "Something that was sent is wrong"},
    503: {"model": Problem, "description": "The database does not answer now"},
}
NOT_FOUND: dict[int | str, dict[str, Any]] = {404: {"model": Problem, "description": "There is none"}}
CONFLICT: dict[int | str, dict[str, Any]] = {
    409: {"model": Problem, "description": "Something speaks against it"}
}


class Needs:
    """A dependency: whoever asks, who must have this permission. Tests walk all routes by ``needs``."""

    def __init__(self, needs: Permission) -> None:
        self.needs = needs

    async def __call__(self, request: Request) -> Person:
        await permit(request, self.needs)
        person: Person = request.state.person
        return person


READER = Depends(Needs(Permission.READ))
WORKER = Depends(Needs(Permission.WORKLIST))
Uid = Annotated[str, Path(description="Study Instance UID", min_length=1, max_length=64)]


def create_api(*routers: APIRouter) -> FastAPI:
    api = FastAPI(
        title="triage",
        version=__version__,
        description="What the page of the worklist does, for programs. Times are ISO 8601 with their zone.",
        docs_url=None,  # its page would load scripts from another host
        redoc_url=None,
        responses=PROBLEMS,
    )
    for error, answer in ANSWERS.items():
        api.add_exception_handler(error, answer)
    for router in routers:
        api.include_router(router)
    return api


def _answer(status_code: int, error: str) -> JSONResponse:
    return JSONResponse({"error": error}, status_code=status_code)


def _refused(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)  # noqa: S101 - the handler is registered for it alone
    said = {401: "Log in, or send the header 'Authorization: Bearer TOKEN'.", 404: "There is none."}
    plain = error.detail in ("Unauthorized", "Not Found")
    answer = _answer(error.status_code, said[error.status_code] if plain else error.detail)
    answer.headers.update(error.headers or {})
    return answer


def _not_understood(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)  # noqa: S101 - the handler is registered for it alone
    wrong = ("{}: {}".format(".".join(map(str, one["loc"][1:])), one["msg"]) for one in error.errors())
    return _answer(422, "; ".join(wrong))


def _rejected(_: Request, error: Exception) -> JSONResponse:
    return _answer(409, str(error))


def _unavailable(_: Request, error: Exception) -> JSONResponse:
    return _answer(503, str(error))


ANSWERS: Mapping[type[Exception], Callable[[Request, Exception], JSONResponse]] = {
    HTTPException: _refused,
    RequestValidationError: _not_understood,
    Rejected: _rejected,
    Retryable: _unavailable,
}
