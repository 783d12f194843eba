"""The JSON of users and tokens, and of one's own password."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from triage.domain import ApiToken, Permission, Person, Role, User
from triage.passwords import LONGEST
from triage.web.access import SCOPES
from triage.web.api import CONFLICT, NOT_FOUND, Needs
from triage.web.people import People

ADMIN = Depends(Needs(Permission.ADMIN))
OWNER = Depends(Needs(Permission.SELF))
LARGEST_NUMBER = 2**63 - 1
Name = Annotated[str, Path(min_length=1, max_length=64)]
Password = Annotated[str, Field(max_length=LONGEST)]


class UserOut(BaseModel):
    """Somebody who can log in, unless the account is closed (``disabled``)."""

    name: str
    role: Role
    disabled: bool
    created_at: datetime
    last_login_at: datetime | None

    @classmethod
    def of(cls, user: User) -> UserOut:
        return cls(**{name: getattr(user, name) for name in cls.model_fields})


class UserIn(BaseModel):
    """A new user."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(max_length=64)]
    role: Role
    password: Password


class UserChange(BaseModel):
    """What is not given stays as it is; a new password or a closed account ends the user's sessions."""

    model_config = ConfigDict(extra="forbid")

    role: Role | None = None
    disabled: bool | None = None
    password: Password | None = None


class PasswordChange(BaseModel):
    """One's own password; all other sessions end."""

    model_config = ConfigDict(extra="forbid")

    current: Password
    password: Password


class TokenOut(BaseModel):
    """What lets a program in."""

    token_id: int
    name: str
    scopes: list[Permission]
    created_by: str
    created_at: datetime
    expires_at: datetime | None
    last_used_at: datetime | None

    @classmethod
    def of(cls, token: ApiToken) -> TokenOut:
        values = {name: getattr(token, name) for name in cls.model_fields}
        return cls(**{**values, "scopes": [one for one in SCOPES if one in token.scopes]})


class TokenIn(BaseModel):
    """A new token; without ``days`` it is good until it is revoked."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(max_length=64)]
    scopes: list[Permission]
    days: Annotated[int, Field(ge=1, le=3650)] | None = None


class TokenMade(TokenOut):
    """With the token itself, which is never told again."""

    token: str


class PeopleApi:
    """The routes; what they do is ``People``'s."""

    def __init__(self, people: People) -> None:
        self.people = people

    def router(self) -> APIRouter:
        made = APIRouter(tags=["people"])
        nothing: dict[str, Any] = {"status_code": 204, "response_class": Response}
        made.add_api_route("/users", self.users)
        made.add_api_route("/users", self.add_user, methods=["POST"], status_code=201, responses=CONFLICT)
        made.add_api_route(
            "/users/{name}", self.change_user, methods=["PATCH"], responses=NOT_FOUND | CONFLICT
        )
        made.add_api_route(
            "/account/password", self.change_password, methods=["PUT"], responses=CONFLICT, **nothing
        )
        made.add_api_route("/tokens", self.tokens)
        made.add_api_route("/tokens", self.add_token, methods=["POST"], status_code=201, responses=CONFLICT)
        made.add_api_route(
            "/tokens/{token_id}", self.revoke_token, methods=["DELETE"], responses=NOT_FOUND, **nothing
        )
        return made

    def users(self, _: Person = ADMIN) -> list[UserOut]:
        return [UserOut.of(user) for user in self.people.people.users()]

    async def add_user(self, request: Request, given: UserIn, _: Person = ADMIN) -> UserOut:
        return await self.people.in_turn(self._add_user, request, given)

    def _add_user(self, request: Request, given: UserIn) -> UserOut:
        _unless(self.people.new_user(request, given.name, given.role, given.password))
        return self._user(given.name)

    async def change_user(
        self, request: Request, name: Name, change: UserChange, _: Person = ADMIN
    ) -> UserOut:
        return await self.people.in_turn(self._change_user, request, name, change)

    def _change_user(self, request: Request, name: str, change: UserChange) -> UserOut:
        self._user(name)
        _unless(self.people.alter_user(request, name, change.role, change.disabled, change.password))
        return self._user(name)

    async def change_password(self, request: Request, change: PasswordChange, _: Person = OWNER) -> Response:
        _unless(await self.people.in_turn(self.people.new_password, request, change.current, change.password))
        return Response(status_code=204)

    def tokens(self, _: Person = ADMIN) -> list[TokenOut]:
        return [TokenOut.of(token) for token in self.people.people.tokens()]

    def add_token(self, request: Request, given: TokenIn, _: Person = ADMIN) -> TokenMade:
        token, wrong = self.people.new_token(request, given.name, given.scopes, given.days)
        _unless(wrong)
        made = next(one for one in self.people.people.tokens() if one.name == given.name)
        return TokenMade(**TokenOut.of(made).model_dump(), token=token)

    def revoke_token(
        self, request: Request, token_id: Annotated[int, Path(ge=0, le=LARGEST_NUMBER)], _: Person = ADMIN
    ) -> Response:
        if not self.people.revoke(request, token_id):
            raise HTTPException(404)
        return Response(status_code=204)

    def _user(self, name: str) -> UserOut:
        user = self.people.people.user(name)
        if user is None:
            raise HTTPException(404)
        return UserOut.of(user)


def _unless(wrong: str | None) -> None:
    if wrong:
        raise HTTPException(409, wrong)
