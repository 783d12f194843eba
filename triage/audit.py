"""Audit messages as PS3.15 A.5 has them: one line of XML for each thing that somebody saw or did."""

from __future__ import annotations

import base64
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum, IntEnum
from itertools import groupby
from typing import Literal
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from triage.domain import Study

Code = tuple[str, str, str]
"""Value, coding scheme, meaning."""


def _dcm(value: str, meaning: str) -> Code:
    return value, "DCM", meaning


def _ours(value: str, meaning: str) -> Code:
    return value, "99TRIAGE", meaning


ACTIVITY = _dcm("110100", "Application Activity")
LOG_USED = _dcm("110101", "Audit Log Used")
ACCESSED = _dcm("110103", "DICOM Instances Accessed")
TRANSFERRED = _dcm("110104", "DICOM Instances Transferred")
QUERY = _dcm("110112", "Query")
ALERT = _dcm("110113", "Security Alert")
AUTHENTICATION = _dcm("110114", "User Authentication")

APPLICATION = _dcm("110150", "Application")
LAUNCHER = _dcm("110151", "Application Launcher")
DESTINATION = _dcm("110152", "Destination Role ID")
SOURCE = _dcm("110153", "Source Role ID")
ROLES: dict[Code, tuple[Code | None, Code | None]] = {
    ACTIVITY: (LAUNCHER, APPLICATION),
    QUERY: (SOURCE, DESTINATION),
    TRANSFERRED: (SOURCE, DESTINATION),
}
"""Of the person and of our process, where a message asks for them."""


@dataclass(frozen=True, slots=True)
class Kind:
    """EventID, EventTypeCode and EventActionCode of a message."""

    event_id: Code
    type: Code
    action: Literal["C", "R", "U", "D", "E"]


class Event(Enum):
    """What is recorded, and as which message of PS3.15 A.5.3."""

    STARTED = Kind(ACTIVITY, _dcm("110120", "Application Start"), "E")
    STOPPED = Kind(ACTIVITY, _dcm("110121", "Application Stop"), "E")
    LOGGED_IN = Kind(AUTHENTICATION, _dcm("110122", "Login"), "E")
    LET_IN = Kind(AUTHENTICATION, _ours("proxy", "Let in by the proxy"), "E")
    TOKEN_REFUSED = Kind(AUTHENTICATION, _ours("token", "Token refused"), "E")
    LOCKED = Kind(AUTHENTICATION, _ours("locked", "Log-in refused"), "E")
    LOGGED_OUT = Kind(AUTHENTICATION, _dcm("110123", "Logout"), "E")
    AUDIT_USED = Kind(LOG_USED, _ours("audit-used", "Audit trail used"), "R")

    LISTED = Kind(ACCESSED, _ours("listed", "Seen on a list"), "R")
    STUDY_SEEN = Kind(ACCESSED, _ours("study", "Study seen"), "R")
    PICTURES_SEEN = Kind(ACCESSED, _ours("pictures", "Pictures seen"), "R")
    EXPORTED = Kind(ACCESSED, _ours("exported", "Figures taken as a file"), "R")
    SEARCHED = Kind(QUERY, _ours("searched", "Searched"), "E")

    UPLOADED = Kind(TRANSFERRED, _ours("uploaded", "Images brought in"), "C")
    CLAIMED = Kind(ACCESSED, _ours("claimed", "Claimed for reading"), "U")
    RELEASED = Kind(ACCESSED, _ours("released", "Released"), "U")
    MARKED_READ = Kind(ACCESSED, _ours("read", "Marked read"), "U")
    VERDICT_GIVEN = Kind(ACCESSED, _ours("verdict", "Verdict recorded"), "U")
    REQUEUED = Kind(ACCESSED, _ours("requeued", "To be judged again"), "U")
    RESENT = Kind(ACCESSED, _ours("resent", "To be delivered again"), "U")

    POLICY_CHANGED = Kind(ALERT, _dcm("110131", "Software Configuration"), "E")
    USER_CHANGED = Kind(ALERT, _dcm("110137", "User Security Attributes Changed"), "E")
    TOKEN_CHANGED = Kind(ALERT, _dcm("110129", "Security Configuration"), "E")
    REFUSED = Kind(ALERT, _dcm("110132", "Use of Restricted Function"), "E")


class Outcome(IntEnum):
    """EventOutcomeIndicator."""

    SUCCESS = 0
    FAILURE = 4


@dataclass(frozen=True, slots=True)
class Actor:
    """Who did it, from which address, by which process of ours."""

    who: str
    address: str = ""
    process: str = "triage/web"


def messages(
    event: Event,
    actor: Actor,
    now: datetime,
    studies: Iterable[Study] = (),
    detail: str = "",
    outcome: Outcome = Outcome.SUCCESS,
) -> list[str]:
    """One message for each patient, as A.5.3.6 has it; one in all where no studies are concerned.

    ``detail`` is what the codes cannot say: the searched text, what was changed, why it failed.
    """
    by_patient = [list(group) for _, group in groupby(sorted(studies, key=_patient), key=_patient)]
    return [_message(event, actor, now, group, detail, outcome) for group in by_patient or [[]]]


def _patient(study: Study) -> tuple[str, str]:
    """Where no patient ID came, the study stands alone."""
    return study.patient_id, "" if study.patient_id else study.study_instance_uid


def _message(
    event: Event, actor: Actor, now: datetime, studies: Sequence[Study], detail: str, outcome: Outcome
) -> str:
    kind, root = event.value, Element("AuditMessage")
    identification = SubElement(
        root,
        "EventIdentification",
        EventActionCode=kind.action,
        EventDateTime=now.astimezone(UTC).isoformat(timespec="milliseconds"),
        EventOutcomeIndicator=str(int(outcome)),
    )
    _code(identification, "EventID", kind.event_id)
    _code(identification, "EventTypeCode", kind.type)
    if detail and (outcome is not Outcome.SUCCESS or kind.event_id in (ACTIVITY, AUTHENTICATION)):
        SubElement(identification, "EventOutcomeDescription").text = _clean(detail)
    _participants(root, kind, actor)
    source = SubElement(root, "AuditSourceIdentification", AuditSourceID=socket.gethostname())
    SubElement(source, "AuditSourceTypeCode", {"csd-code": "3" if actor.process.endswith("web") else "4"})
    _objects(root, kind, studies, _clean(detail))
    return ElementTree.tostring(root, encoding="unicode")


def _participants(root: Element, kind: Kind, actor: Actor) -> None:
    person_role, process_role = ROLES.get(kind.event_id, (None, None))
    person = SubElement(root, "ActiveParticipant", UserID=_clean(actor.who), UserIsRequestor="true")
    if person_role:
        _code(person, "RoleIDCode", person_role)
    if actor.address:
        person.attrib.update(NetworkAccessPointID=actor.address, NetworkAccessPointTypeCode="2")
    process = SubElement(root, "ActiveParticipant", UserID=actor.process, UserIsRequestor="false")
    if process_role:
        _code(process, "RoleIDCode", process_role)


def _objects(root: Element, kind: Kind, studies: Sequence[Study], detail: str) -> None:
    for study in studies:
        one = _object(root, "2", "3", study.study_instance_uid, _dcm("110180", "Study Instance UID"))
        SubElement(one, "ParticipantObjectName").text = _clean(study.study_description)
        _detail(one, "Detail", detail)
    if studies:
        number = ("2", "RFC-3881", "Patient Number")
        patient = _object(root, "1", "1", _clean(studies[0].patient_id), number)
        SubElement(patient, "ParticipantObjectName").text = _clean(studies[0].patient_name)
    elif kind.event_id == QUERY:
        criteria = _object(root, "2", "24", "worklist", ("10", "RFC-3881", "Search Criteria"))
        SubElement(criteria, "ParticipantObjectQuery").text = _base64(detail)
    elif kind.event_id == LOG_USED:
        log = _object(root, "2", "13", "triage:audit", ("12", "RFC-3881", "URI"))
        SubElement(log, "ParticipantObjectName").text = "Security Audit Log"
        _detail(log, "Detail", detail)
    elif kind.event_id == ALERT:
        subject = _object(root, "2", "13", socket.gethostname(), _dcm("110182", "Node ID"))
        SubElement(subject, "ParticipantObjectName").text = kind.type[2]
        _detail(subject, "Alert Description", detail)


def _object(root: Element, type_code: str, role: str, identifier: str, id_type: Code) -> Element:
    one = SubElement(
        root,
        "ParticipantObjectIdentification",
        ParticipantObjectID=identifier,
        ParticipantObjectTypeCode=type_code,
        ParticipantObjectTypeCodeRole=role,
    )
    _code(one, "ParticipantObjectIDTypeCode", id_type)
    return one


def _code(parent: Element, name: str, code: Code) -> None:
    value, scheme, meaning = code
    SubElement(parent, name, {"csd-code": value, "codeSystemName": scheme, "originalText": meaning})


def _detail(parent: Element, name: str, text: str) -> None:
    if text:
        SubElement(parent, "ParticipantObjectDetail", type=name, value=_base64(text))


def _base64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _clean(text: str) -> str:
    """What XML can hold, on one line: names come from scanners, searched text from anybody."""
    return "".join(sign if sign.isprintable() else " " for sign in text)
