"""The page of one study: why it stands where it stands, what was found, its images, and what came before."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING
from urllib.parse import quote

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from triage.audit import Event
from triage.db import Database
from triage.domain import DeliveryState, Permission, Study, WorklistEntry
from triage.web.access import Page, audit

if TYPE_CHECKING:
    from triage.web.app import Pages

MOST_PRIORS = 20
LEFT_OVER = (DeliveryState.PENDING, DeliveryState.GIVEN_UP, DeliveryState.NOT_COMMITTED)
"""What may be sent, or asked for, at once."""


class Studies:
    """One study, for one person."""

    def __init__(self, pages: Pages) -> None:
        self.pages = pages
        self.database = pages.database

    def routes(self) -> list[Route]:
        study = "/studies/{study_instance_uid}"
        return [
            Page(study, self.study, Permission.READ),
            Page(study + "/resend/{destination:path}", self.resend, Permission.ADMIN, ["POST"]),
        ]

    def study(self, request: Request) -> Response:
        uid, now = request.path_params["study_instance_uid"], self.pages.clock()
        entry = self.pages.entry(uid)
        shown = with_answer(self.database, entry, request)
        priors = self.priors(entry.study)
        audit(request, Event.STUDY_SEEN, [entry.study, *(prior.study for prior in priors)])
        deliveries = self.database.deliveries(uid)
        known = [one.name for one in self.pages.config.destinations]
        may = Permission.ADMIN in request.state.person.may
        left = {one.destination for one in deliveries if one.state in LEFT_OVER}
        return self.pages.render(
            request,
            "study.html",
            now,
            entry=entry,
            shown=shown,
            claim=self.database.reading.reader(uid, now),
            verdicts=self.database.reading.verdicts(uid),
            results=self.database.results(uid),
            deliveries=deliveries,
            resendable=[name for name in known if name in left] if may else [],
            priors=priors,
            viewer=viewer_address(self.pages.config.web.viewer_url, entry.study),
            ordering=self.pages.ordering,
        )

    def resend(self, request: Request) -> Response:
        uid = request.path_params["study_instance_uid"]
        self.send_again(request, uid, request.path_params["destination"])
        return RedirectResponse(f"/studies/{quote(uid, safe='')}#delivery", status_code=303)

    def send_again(self, request: Request, uid: str, destination: str) -> None:
        """Owe a destination at once what waits for its next try or was given up; never what it has taken."""
        entry = self.pages.entry(uid)
        if destination not in [one.name for one in self.pages.config.destinations]:
            raise HTTPException(404, "There is no such destination.")
        now = self.pages.clock()
        self.database.resend(destination, uid, now)
        self.database.ask_anew(destination, uid, now)
        audit(request, Event.RESENT, [entry.study], destination)

    def priors(self, study: Study) -> list[WorklistEntry]:
        return self.database.priors(study, MOST_PRIORS)


def with_answer(database: Database, entry: WorklistEntry, request: Request) -> WorklistEntry:
    """The study with the earlier answer whose ``revision`` the address names in place of the one that counts.

    That one is also meant without a revision, and by 0, of a study without an answer. Raises HTTPException
    where there is no such answer.
    """
    named, counts = request.query_params.get("revision", "0"), entry.result.revision if entry.result else 0
    if named in ("0", str(counts)):
        return entry
    for result in database.results(entry.study.study_instance_uid):
        if str(result.revision) == named and result.revision < counts:
            return replace(entry, result=result)
    raise HTTPException(404, "There is no such revision of this study's answer.")


def viewer_address(template: str, study: Study) -> str | None:
    """Of the study in the site's own viewer; None without a template, or where all it names is unknown."""
    values = {
        "study_instance_uid": study.study_instance_uid,
        "accession_number": study.accession_number,
        "patient_id": study.patient_id,
    }
    if not any(value and f"{{{name}}}" in template for name, value in values.items()):
        return None
    return template.format(**{name: quote(value, safe="") for name, value in values.items()})
