"""The JSON of the policy: its versions, what another one would have done, saving and going back."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from triage import policies
from triage.config import PriorityPolicy
from triage.db.policies import PolicyVersion
from triage.domain import Permission, Person, Priority
from triage.errors import ConfigError
from triage.web.api import CONFLICT, NOT_FOUND, Needs
from triage.web.policy import DAYS, LONGEST_REASON, SHOWN, USUAL_DAYS, PolicyPages
from triage.whatif import Mover, Moves, Outcome, Rate, Rehearsal, Waits

TUNER = Depends(Needs(Permission.POLICY))
Version = Annotated[int, Field(ge=0, lt=2**31)]
Reason = Annotated[str, Field(max_length=LONGEST_REASON)]


class VersionOut(BaseModel):
    """A version of the policy; the newest counts."""

    version: int
    author: str
    reason: str
    created_at: datetime
    policy: PriorityPolicy

    @classmethod
    def of(cls, one: PolicyVersion) -> VersionOut:
        return cls(**{name: getattr(one, name) for name in cls.model_fields})


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


class RateOut(BaseModel):
    """So many of so many; ``low`` to ``high`` is the 95 % interval of Wilson."""

    count: int
    total: int
    share: float
    low: float
    high: float

    @classmethod
    def of(cls, rate: Rate | None) -> RateOut | None:
        if rate is None:
            return None
        low, high = rate.interval
        return cls(count=rate.count, total=rate.total, share=rate.share, low=low, high=high)


class WaitsOut(BaseModel):
    """From arrival until read; of studies that are not read yet, so far."""

    studies: int
    unread: int
    mean_minutes: float
    median_minutes: float
    p95_minutes: float

    @classmethod
    def of(cls, waits: Waits | None) -> WaitsOut | None:
        if waits is None:
            return None
        minute = timedelta(minutes=1)
        return cls(
            studies=waits.studies,
            unread=waits.unread,
            mean_minutes=waits.mean / minute,
            median_minutes=waits.median / minute,
            p95_minutes=waits.p95 / minute,
        )


class OutcomeOut(BaseModel):
    """What one policy makes of the days."""

    flagged: int
    flags_a_day: float
    bands: dict[str, int]
    sensitivity: RateOut | None
    specificity: RateOut | None
    wait_of_flagged: WaitsOut | None
    wait_of_others: WaitsOut | None

    @classmethod
    def of(cls, outcome: Outcome, days: float) -> OutcomeOut:
        return cls(
            flagged=outcome.flagged,
            flags_a_day=outcome.flagged / days,
            bands={band.label: count for band, count in outcome.bands.items()},
            sensitivity=RateOut.of(outcome.sensitivity),
            specificity=RateOut.of(outcome.specificity),
            wait_of_flagged=WaitsOut.of(outcome.flagged_waits),
            wait_of_others=WaitsOut.of(outcome.other_waits),
        )


class PlaceOut(BaseModel):
    """``place`` on the list, the first is 1; null for a study that is read."""

    band: str
    due_at: datetime
    place: int | None

    @classmethod
    def of(cls, priority: Priority, place: int | None) -> PlaceOut:
        return cls(band=priority.band.label, due_at=priority.due_at, place=place)


class MoverOut(BaseModel):
    """A study whose place would be another one."""

    study_instance_uid: str
    now: PlaceOut
    then: PlaceOut

    @classmethod
    def of(cls, mover: Mover) -> MoverOut:
        now, then = mover.places or (None, None)
        return cls(
            study_instance_uid=mover.study.study_instance_uid,
            now=PlaceOut.of(mover.before, now),
            then=PlaceOut.of(mover.after, then),
        )


class MovesOut(BaseModel):
    """How many would move, and those that would move farthest."""

    up: int
    down: int
    examples_up: list[MoverOut]
    examples_down: list[MoverOut]

    @classmethod
    def of(cls, moves: Moves) -> MovesOut:
        return cls(
            up=moves.up,
            down=moves.down,
            examples_up=[MoverOut.of(one) for one in moves.examples_up],
            examples_down=[MoverOut.of(one) for one in moves.examples_down],
        )


class WhatIfOut(BaseModel):
    """The policy that counts and another one over the same days."""

    days: float
    studies: int
    judged: int
    verdicts: int
    now: OutcomeOut
    then: OutcomeOut
    by_arrival_wait_of_flagged: WaitsOut | None
    by_arrival_wait_of_others: WaitsOut | None
    bands: MovesOut
    places: MovesOut

    @classmethod
    def of(cls, tried: Rehearsal) -> WhatIfOut:
        return cls(
            days=tried.days,
            studies=tried.studies,
            judged=tried.judged,
            verdicts=tried.verdicts,
            now=OutcomeOut.of(tried.present, tried.days),
            then=OutcomeOut.of(tried.candidate, tried.days),
            by_arrival_wait_of_flagged=WaitsOut.of(tried.by_arrival[0]),
            by_arrival_wait_of_others=WaitsOut.of(tried.by_arrival[1]),
            bands=MovesOut.of(tried.bands),
            places=MovesOut.of(tried.places),
        )


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

    def newest(self, person: Person = TUNER) -> VersionOut:  # noqa: ARG002 - asked for its permission
        """The version that counts."""
        found = self.database.policy()
        if found is None:
            raise HTTPException(404)
        return VersionOut.of(found)

    def versions(
        self,
        person: Person = TUNER,  # noqa: ARG002
        limit: Annotated[int, Query(ge=1, le=1000)] = SHOWN,
    ) -> list[VersionOut]:
        """The newest versions, the newest first."""
        return [VersionOut.of(one) for one in self.database.policies(limit)]

    def what_if(self, request: Request, asked: WhatIfIn, person: Person = TUNER) -> WhatIfOut:  # noqa: ARG002
        """What a policy would have done to the studies of the last days. Nothing is changed."""
        return WhatIfOut.of(self.page.rehearse(request, asked.policy, asked.days))

    def save(self, request: Request, wanted: PolicyIn, person: Person = TUNER) -> VersionOut:
        """A new version; open studies are put in its order at once, and nothing is judged again.

        409 when ``after`` is not the newest version.
        """
        config, now = self.page.config, self.page.pages.clock()
        policy = config.under(wanted.policy).policy
        try:
            new = policies.save(self.database, config, policy, person.who, wanted.reason, now, wanted.after)
        except ConfigError as error:
            raise HTTPException(422, str(error)) from error
        self.page.record(request, new)
        return VersionOut.of(new)

    def roll_back(self, request: Request, wanted: RollBackIn, person: Person = TUNER) -> VersionOut:
        """A new version that is equal to an old one."""
        config, now = self.page.config, self.page.pages.clock()
        who, reason = person.who, wanted.reason
        try:
            new = policies.roll_back(self.database, config, wanted.version, who, reason, now, wanted.after)
        except ConfigError as error:
            raise HTTPException(404, str(error)) from error
        self.page.record(request, new)
        return VersionOut.of(new)
