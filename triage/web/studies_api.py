"""The JSON of one study's page: every answer, every delivery, earlier studies, and sending again."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel

from triage.audit import Event
from triage.domain import Delivery, DeliveryState, Grade, Permission, Person, Result, Status, WorklistEntry
from triage.rows import status
from triage.web.access import audit
from triage.web.api import NOT_FOUND, READER, Needs, Uid
from triage.web.studies import Studies
from triage.web.words import object_name, other_name

ADMIN = Depends(Needs(Permission.ADMIN))


class RevisionOut(BaseModel):
    """One answer; fractions in [0, 1], volumes in ml, seconds by stage; null is unknown, never 0."""

    revision: int
    status: Status
    reason: str
    probability: float | None
    probability_kind: str | None
    calibrated: bool
    affected_fraction: float | None
    affected_left: float | None
    affected_right: float | None
    grade: Grade | None
    lung_volume_ml: float | None
    lesion_volume_ml: float | None
    model: str | None
    model_version: str | None
    seconds: dict[str, float]

    @classmethod
    def of(cls, result: Result) -> RevisionOut:
        return cls(**{name: getattr(result, name) for name in cls.model_fields})


class DeliveryOut(BaseModel):
    """One thing owed to one destination."""

    destination: str
    what: str
    sop_instance_uid: str
    state: DeliveryState
    attempts: int
    owed_since: datetime
    sent_at: datetime | None
    last_error: str

    @classmethod
    def of(cls, delivery: Delivery) -> DeliveryOut:
        return cls(
            destination=delivery.destination,
            what=object_name(delivery),
            sop_instance_uid=delivery.sop_instance_uid,
            state=delivery.state,
            attempts=delivery.attempts,
            owed_since=delivery.created_at,
            sent_at=delivery.sent_at,
            last_error=delivery.last_error,
        )


class PriorOut(BaseModel):
    """An earlier study with the same patient ID; ``change`` is from it to the one asked for; null is unknown,
    and always so of one with ``other_name``.
    """

    study_instance_uid: str
    study_date: str
    study_description: str
    status: Status | None
    affected_fraction: float | None
    other_name: bool
    change: float | None
    model: str | None

    @classmethod
    def of(cls, prior: WorklistEntry, shown: WorklistEntry) -> PriorOut:
        before = prior.result.affected_fraction if prior.result else None
        now = shown.result.affected_fraction if shown.result else None
        other = other_name(shown.study.patient_name, prior.study.patient_name)
        return cls(
            study_instance_uid=prior.study.study_instance_uid,
            study_date=prior.study.study_date,
            study_description=prior.study.study_description,
            status=status(prior),
            affected_fraction=before,
            other_name=other,
            change=None if now is None or before is None or other else now - before,
            model=prior.result.model if prior.result else None,
        )


class StudiesApi:
    """What the page of a study shows and does, for programs."""

    def __init__(self, studies: Studies) -> None:
        self.studies = studies

    def router(self) -> APIRouter:
        made = APIRouter(tags=["study"])
        one = "/studies/{study_instance_uid}"
        told: dict[str, Any] = {"responses": NOT_FOUND}
        made.add_api_route(f"{one}/revisions", self.revisions, **told)
        made.add_api_route(f"{one}/deliveries", self.deliveries, **told)
        made.add_api_route(f"{one}/priors", self.priors, **told)
        made.add_api_route(
            f"{one}/resend/{{destination:path}}",
            self.resend,
            methods=["POST"],
            status_code=204,
            response_class=Response,
            **told,
        )
        return made

    def revisions(self, request: Request, study_instance_uid: Uid, _: Person = READER) -> list[RevisionOut]:
        """Every answer given for a study, the newest first."""
        self._seen(request, study_instance_uid)
        return [RevisionOut.of(one) for one in self.studies.database.results(study_instance_uid)]

    def deliveries(self, request: Request, study_instance_uid: Uid, _: Person = READER) -> list[DeliveryOut]:
        """What each destination was owed of it, and what became of that."""
        self._seen(request, study_instance_uid)
        return [DeliveryOut.of(one) for one in self.studies.database.deliveries(study_instance_uid)]

    def priors(self, request: Request, study_instance_uid: Uid, _: Person = READER) -> list[PriorOut]:
        """Earlier studies of the same patient, the latest first."""
        shown = self.studies.pages.entry(study_instance_uid)
        priors = self.studies.priors(shown.study)
        audit(request, Event.STUDY_SEEN, [shown.study, *(prior.study for prior in priors)])
        return [PriorOut.of(prior, shown) for prior in priors]

    def resend(self, request: Request, study_instance_uid: Uid, destination: str, _: Person = ADMIN) -> None:
        """Send a destination now what waits for its next try or was given up; never what it has taken."""
        self.studies.send_again(request, study_instance_uid, destination)

    def _seen(self, request: Request, study_instance_uid: str) -> None:
        audit(request, Event.STUDY_SEEN, [self.studies.pages.entry(study_instance_uid).study])
