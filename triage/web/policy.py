"""The page on which the policy is changed: what it is, what another one would have done, every version."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from triage import policies
from triage.audit import Actor, Event
from triage.config import PriorityPolicy
from triage.db.policies import PolicyVersion
from triage.domain import Band, Permission
from triage.errors import ConfigError, Rejected
from triage.web import words
from triage.web.access import Page, audit
from triage.web.forms import Form, days_of, posted
from triage.whatif import Outcome, Rate, Rehearsal, Waits

if TYPE_CHECKING:
    from triage.web.app import Pages

DAYS = (1, 7, 14, 30, 90)
"""How far back a policy can be tried on."""
USUAL_DAYS = 30
SHOWN = 50
"""Versions on the page, the newest."""
LONGEST_REASON = 500


@dataclass(frozen=True, slots=True)
class Field:
    """One setting of a policy: its name in the form, and how people call it."""

    name: str
    label: str
    hint: str
    choices: Mapping[str, str] | None = None
    limits: tuple[float, float] | None = (0, 1)


FIELDS = (
    Field(
        "ordering",
        "Order",
        "How the list is sorted",
        {"deadline": "by due time, nobody starves", "strict": "by band, then score, then arrival"},
    ),
    Field(
        "policy",
        "Policy",
        "What makes a study urgent",
        {
            "identification": "identification: the probability",
            "severity": "severity: the affected fraction",
            "combined": "combined: both, for an outbreak",
        },
    ),
    Field("positive_probability", "Flag from probability", "P from which a study is flagged"),
    Field("positive_fraction", "Flag from affected fraction", "of the worse lung; flagged whatever P says"),
    Field("severe_fraction", "Severe from affected fraction", "of the worse lung"),
    Field("critical_fraction", "Critical from affected fraction", "of the worse lung"),
    Field("indeterminate_probability", "Indeterminate from probability", "below the flag, above routine"),
    Field("indeterminate_fraction", "Indeterminate from affected fraction", "below the flag, above routine"),
    *(
        Field(f"target_wait_minutes.{band.name.lower()}", words.BANDS[band][1], "minutes", None, None)
        for band in Band
    ),
)


class PolicyPages:
    """The page and its forms; saving and going back change the list for everybody at once."""

    def __init__(self, pages: Pages) -> None:
        self.pages, self.database, self.config = pages, pages.database, pages.config

    def routes(self) -> list[Route]:
        return [
            Page("/policy", self.policy, Permission.POLICY),
            Page("/policy", posted(self.save), Permission.POLICY, ["POST"]),
            Page("/policy/roll-back", posted(self.roll_back), Permission.POLICY, ["POST"]),
        ]

    def policy(self, request: Request) -> Response:
        """Without settings in the address the present policy; with some, also what they would have done."""
        asked = {name: text.strip() for name, text in request.query_params.items()}
        given = {field.name: asked[field.name] for field in FIELDS if field.name in asked}
        days = days_of(asked.get("days", ""), DAYS, USUAL_DAYS)
        now, versions = self.pages.clock(), self.database.policies(SHOWN + 1)
        present = versions[0].policy if versions else self.config.policy
        wrong, tried, candidate = "", None, present
        if given:
            try:
                candidate = read({**flat(present), **given})
                tried = self.rehearse(request, candidate, days)
            except ConfigError as error:
                wrong = str(error)
        return self.pages.render(
            request,
            "policy.html",
            now,
            fields=FIELDS,
            values={**flat(present), **flat(candidate), **given},
            present=flat(present),
            versions=versions,
            history=_history(versions)[:SHOWN],
            days=days,
            all_days=DAYS,
            tried=tried,
            most=policies.MOST,
            table=_table(tried) if tried else [],
            changes=changes(present, candidate),
            wrong=wrong,
            shadow=self.config.shadow,
            longest_reason=LONGEST_REASON,
        )

    def rehearse(self, request: Request, candidate: PriorityPolicy, days: int) -> Rehearsal:
        """What a policy would have done; that its examples are seen is recorded before they are shown."""
        complete = self.config.under(candidate).policy
        tried = policies.rehearse(self.database, self.config, complete, self.pages.clock(), days)
        shown = {
            mover.study_instance_uid
            for moves in (tried.bands, tried.places)
            for mover in (*moves.examples_up, *moves.examples_down)
        }
        entries = [self.database.entry(uid) for uid in sorted(shown)]
        audit(request, Event.LISTED, [entry.study for entry in entries if entry], "what-if of a policy")
        return tried

    def save(self, request: Request, form: Form) -> Response:
        """A new version, in force from this moment."""
        policy = _understood({field.name: form.one(field.name) for field in FIELDS})
        return self._then(request, form, policy)

    def roll_back(self, request: Request, form: Form) -> Response:
        """A new version that is equal to an old one."""
        return self._then(request, form, _number(form, "version"))

    def _then(self, request: Request, form: Form, wanted: PriorityPolicy | int) -> Response:
        try:
            self.keep(request, wanted, form.one("reason")[:LONGEST_REASON], _number(form, "after"))
        except (ConfigError, Rejected) as error:
            raise HTTPException(409, words.sentence(str(error))) from error
        return RedirectResponse("/policy", status_code=303)

    def keep(self, request: Request, wanted: PriorityPolicy | int, reason: str, after: int) -> PolicyVersion:
        """Let a policy count from now on, or the version of this number; raises as ``policies`` does."""
        author = Actor(request.state.person.who, request.state.address)
        rest = (author, reason, self.pages.clock(), after)
        if isinstance(wanted, int):
            return policies.roll_back(self.database, self.config, wanted, *rest)
        return policies.save(self.database, self.config, wanted, *rest)


def read(given: Mapping[str, str]) -> PriorityPolicy:
    """Fields of a form → a policy; raises ConfigError that names each field that is wrong."""
    plain: dict[str, Any] = {name: text for name, text in given.items() if "." not in name}
    prefix = "target_wait_minutes."
    plain["target_wait_minutes"] = {
        name.removeprefix(prefix): text for name, text in given.items() if name.startswith(prefix)
    }
    try:
        return PriorityPolicy.model_validate(plain)
    except ValidationError as error:
        labels = {field.name: field.label for field in FIELDS}
        said = []
        for one in error.errors():
            where = ".".join(map(str, one["loc"]))
            message = str(one["msg"]).removeprefix("Value error, ")
            said.append(f"{labels[where]}: {message}" if where in labels else message)
        raise ConfigError("; ".join(said)) from error


def flat(policy: PriorityPolicy) -> dict[str, str]:
    """A policy as the fields of a form."""
    plain = policy.model_dump(mode="json")
    waits = plain.pop("target_wait_minutes")
    values = {**plain, **{f"target_wait_minutes.{name}": minutes for name, minutes in waits.items()}}
    return {
        name: f"{value:.12g}" if isinstance(value, float) else str(value) for name, value in values.items()
    }


def changes(before: PriorityPolicy, after: PriorityPolicy) -> list[str]:
    """``Flag from probability 0.5 → 0.6`` for each setting that differs."""
    was, new = flat(before), flat(after)
    return [
        f"{'Wait, ' if '.' in field.name else ''}{field.label} {was[field.name]} → {new[field.name]}"
        for field in FIELDS
        if was[field.name] != new[field.name]
    ]


def _history(versions: Sequence[PolicyVersion]) -> list[tuple[PolicyVersion, list[str]]]:
    """Each version with what it changed; the oldest that there is has nothing to differ from."""
    changed = [changes(older.policy, newer.policy) for newer, older in pairwise(versions)]
    return list(zip(versions, [*changed, []], strict=False))  # there may be none yet


def _number(form: Form, name: str) -> int:
    text = form.one(name)
    if not text.isdecimal() or len(text) > 9:
        raise HTTPException(400, "The form does not say which version it is about. Load the page again.")
    return int(text)


def _understood(given: Mapping[str, str]) -> PriorityPolicy:
    try:
        return read(given)
    except ConfigError as error:
        raise HTTPException(400, f"{error}.") from error


# --- what the what-if says, as rows of a table ------------------------------------------------------


Cell = tuple[str, str]
"""A figure, and what must be known of it."""


@dataclass(frozen=True, slots=True)
class Line:
    """One row: what it is about, as it is now, with the change, and were the list in order of arrival."""

    name: str
    now: Cell
    then: Cell
    by_arrival: Cell = ("", "")


def _table(tried: Rehearsal) -> list[Line]:
    now, then = tried.present, tried.candidate
    lines = [Line("Flagged", _flags(now, tried), _flags(then, tried))]
    for band, (_, name) in words.BANDS.items():
        was, new = now.bands.get(band, 0), then.bands.get(band, 0)
        lines.append(Line(name, _share(was, tried), _share(new, tried)))
    flagged, others = tried.by_arrival
    return [
        *lines,
        Line("Sensitivity", rate(now.sensitivity), rate(then.sensitivity)),
        Line("Specificity", rate(now.specificity), rate(then.specificity)),
        Line("Wait of flagged", waits(now.flagged_waits), waits(then.flagged_waits), waits(flagged)),
        Line("Wait of others", waits(now.other_waits), waits(then.other_waits), waits(others)),
    ]


def _flags(outcome: Outcome, tried: Rehearsal) -> Cell:
    return f"{outcome.flagged / tried.days:.1f} a day", _studies(outcome.flagged)


def _share(count: int, tried: Rehearsal) -> Cell:
    return f"{100 * count / max(tried.studies, 1):.0f} %", _studies(count)


def _studies(count: int) -> str:
    return f"{count} stud{'y' if count == 1 else 'ies'}"


def rate(found: Rate | None) -> Cell:
    """``92 %`` with ``85–96 %, 46 of 50``."""
    if found is None:
        return "unknown", "no verdict tells"
    low, high = (round(100 * bound) for bound in found.interval)
    return f"{100 * found.share:.0f} %", f"{low}–{high} %, {found.count} of {found.total}"


def waits(found: Waits | None) -> Cell:
    """The mean, with median, p95 and how many are not read yet."""
    if found is None:
        return "none", ""
    mean, median, late = (words.span(one) for one in (found.mean, found.median, found.p95))
    unread = f", {found.unread} not read yet" if found.unread else ""
    return mean, f"median {median}, p95 {late}{unread}"
