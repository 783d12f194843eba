"""The JSON of the policy: its versions, what another one would have done, saving and going back."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from triage.config import PriorityPolicy
from triage.db.policies import PolicyVersion
from triage.domain import Permission, Person
from triage.errors import ConfigError
from triage.web.api import CONFLICT, NOT_FOUND, Needs
from triage.web.policy import DAYS, LONGEST_REASON, SHOWN, USUAL_DAYS, PolicyPages
from triage.whatif import Rehearsal

TUNER = Depends(Needs(Permission.POLICY))
Version = Annotated[int, Field(ge=0, lt=2**31)]
Reason = Annotated[str, Field(max_length=LONGEST_REASON)]


class PolicyIn(BaseModel):
    """``after`` is the newest version that its author knows; what ``policy`` leaves out is default."""

    model_config = ConfigDict(extra="forbid")

    policy: PriorityPolicy
    reason: Annotated[Reason, Field(min_length=1)]
    after: Version


class RollBackIn(BaseModel):
    """Back to ``version``."""

    model_config = ConfigDict(extra="forbid")

    version: Version
    after: Version
    reason: Reason = ""


class WhatIfIn(BaseModel):
    """A policy to try on the last days."""

    model_config = ConfigDict(extra="forbid")

    policy: PriorityPolicy
    days: int = Field(USUAL_DAYS, ge=1, le=max(DAYS))


class PolicyApi:
    """The routes; all need the permission to change the policy."""

    def __init__(self, page: PolicyPages) -> None:
        self.page, self.database = page, page.database

    def router(self) -> APIRouter:
        made = APIRouter(tags=["policy"])
        made.add_api_route("/policy", self.newest, responses=NOT_FOUND)
        made.add_api_route("/policy", self.save, methods=["PUT"], responses=CONFLICT)
        made.add_api_route("/policy/versions", self.versions)
        made.add_api_route("/policy/what-if", self.what_if, methods=["POST"])
        back: dict[int | str, dict[str, Any]] = NOT_FOUND | CONFLICT
        made.add_api_route("/policy/roll-back", self.roll_back, methods=["POST"], responses=back)
        return made

    def newest(self, person: Person = TUNER) -> PolicyVersion:  # noqa: ARG002 - asked for its permission
        """The version that counts."""
        found = self.database.policy()
        if found is None:
            raise HTTPException(404)
        return found

    def versions(
        self,
        person: Person = TUNER,  # noqa: ARG002
        limit: Annotated[int, Query(ge=1, le=1000)] = SHOWN,
    ) -> list[PolicyVersion]:
        """The newest versions, the newest first."""
        return self.database.policies(limit)

    def what_if(self, request: Request, asked: WhatIfIn, person: Person = TUNER) -> Rehearsal:  # noqa: ARG002
        """What a policy would have done to the studies of the last days. Nothing is changed.

        Waits are ISO 8601 durations.
        """
        return self.page.rehearse(request, asked.policy, asked.days)

    def save(self, request: Request, wanted: PolicyIn, person: Person = TUNER) -> PolicyVersion:  # noqa: ARG002
        """A new version; open studies are put in its order at once, and nothing is judged again.

        409 when ``after`` is not the newest version.
        """
        return self._kept(request, self.page.config.under(wanted.policy).policy, wanted, 422)

    def roll_back(self, request: Request, wanted: RollBackIn, person: Person = TUNER) -> PolicyVersion:  # noqa: ARG002
        """A new version that is equal to an old one."""
        return self._kept(request, wanted.version, wanted, 404)

    def _kept(
        self, request: Request, what: PriorityPolicy | int, given: PolicyIn | RollBackIn, otherwise: int
    ) -> PolicyVersion:
        try:
            return self.page.keep(request, what, given.reason, given.after)
        except ConfigError as error:
            raise HTTPException(otherwise, str(error)) from error
