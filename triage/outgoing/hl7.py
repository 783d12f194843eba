"""The answer as HL7 v2.5.1 ORU^R01 over MLLP, its priority in TQ1-9 and OBR-5 for the RIS's own list.

The package ``hl7`` escapes, frames and reads; what is here is which fact goes into which field.
"""

from __future__ import annotations

import asyncio
import re
from asyncio import IncompleteReadError
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from datetime import datetime
from unicodedata import category

import hl7
from hl7.mllp import HL7StreamReader, HL7StreamWriter, InvalidBlockError, open_hl7_connection

from triage.config import Hl7
from triage.domain import Band, Result, tenths_of_percent, two_decimals
from triage.outgoing.letters import SENT, Letter, Outcome, why, words

PRIORITY = {
    Band.CRITICAL: "S",
    Band.SEVERE: "A",
    Band.POSITIVE: "A",
    Band.INDETERMINATE: "R",
    Band.NOT_JUDGED: "R",
    Band.ROUTINE: "R",
}
"""Band → HL7 table 0485: stat, as soon as possible, routine."""
ACCEPTED = ("AA", "CA")
PERMANENT = ("AE", "CE")
"""The content is refused; AR and CR say that the same message may be taken later (HL7 2.5.1, 2.9.2.2)."""
CODING = "99TRIAGE"
KINDS = {"classifier": ("P", "Probability"), "score": ("SCORE", "Score, not a probability")}
"""Of ``probability_kind``: what only restates other figures is not called a probability."""


def send(letter: Letter, destination: Hl7, timeout_seconds: float) -> Outcome:
    """Send the letter; sent is only what was acknowledged under its own control ID."""
    try:
        code, said = asyncio.run(_exchange(letter, destination, timeout_seconds))
    except _Away as error:
        return Outcome(False, error=str(error), away=True)
    except (OSError, IncompleteReadError, InvalidBlockError, ValueError, hl7.HL7Exception) as error:
        return Outcome(False, error=f"{_named(destination)} {why(error, timeout_seconds)}: not acknowledged")
    if code in ACCEPTED:
        return SENT
    refused = f"{_named(destination)} refused: {words(code)}"
    return Outcome(False, code in PERMANENT, refused, said=words(said))


def reach(destination: Hl7, timeout_seconds: float) -> str | None:
    """None when something listens there and agrees on TLS; otherwise what is wrong."""
    try:
        asyncio.run(_knock(destination, timeout_seconds))
    except _Away as error:
        return str(error)
    return None


def message(letter: Letter, destination: Hl7) -> hl7.Message:
    """MSH, PID, OBR, TQ1 and one OBX for each figure that is known; P: no reader has verified it."""
    study, place = letter.study, letter.priority
    now, urgency = _time(letter.now), PRIORITY[place.band]
    receiver = (_text(destination.application), _text(destination.facility))
    accession = _text(study.accession_number)
    date = study.study_date if re.fullmatch("[0-9]{8}", study.study_date) else now
    service = f"CHESTCT^{_text(study.study_description) or 'Chest CT'}^{CODING}"
    segments = [
        ("MSH", "^~\\&", "TRIAGE", "", *receiver, now, "", "ORU^R01^ORU_R01", letter.identity, "P", "2.5.1")
        + ("",) * 5
        + ("UNICODE UTF-8",),
        ("PID", "1", "", _text(study.patient_id), "", _person(study.patient_name)),
        ("OBR", "1", "", accession, service, urgency, "", date)
        + ("",) * 10
        + (accession, "", "", "", now, "", "", "P"),
        ("TQ1", "1") + ("",) * 7 + (urgency,),
        *_observations(letter, now),
    ]
    return hl7.parse("\r".join("|".join(fields) for fields in segments) + "\r")


def _observations(letter: Letter, now: str) -> Iterator[tuple[str, ...]]:
    result = letter.result
    facts = [
        ("ST", "STATUS", "Answer", result.status.value, ""),
        ("ST", "BAND", "Band on the worklist", letter.priority.band.label, ""),
        ("ST", "REASON", "Reason", letter.priority.reason, ""),
        ("ST", "DUE", "To be read by", letter.priority.due_at.isoformat(), ""),
        *_figures(result),
        ("ST", "UID", "Study Instance UID", letter.study.study_instance_uid, ""),
    ]
    for number, (kind, code, name, value, unit) in enumerate(facts, 1):
        yield (
            ("OBX", str(number), kind, f"{code}^{name}^{CODING}", "", _text(value), unit)
            + ("",) * 4
            + ("P", "", "", now)
        )


def _figures(result: Result) -> Iterator[tuple[str, str, str, str, str]]:
    if result.probability is not None and result.probability_kind is not None:
        code, name = KINDS[result.probability_kind]
        calibrated = "" if result.calibrated else ", not calibrated"
        yield "NM", code, f"{name}{calibrated}", two_decimals(result.probability), "1^^UCUM"
    if result.affected_fraction is not None:
        percent = f"{tenths_of_percent(result.affected_fraction):g}"
        yield "NM", "AFFECTED", "Affected lung", percent, "%^^UCUM"
    if result.grade is not None:
        yield "ST", "GRADE", "Grade", result.grade.value, ""
    if result.model is not None:
        yield "ST", "MODEL", "Network", f"{result.model} {result.model_version}", ""
    yield "NM", "REVISION", "Revision of the answer", str(result.revision), ""


class _Away(Exception):
    """Nobody is there, or nobody that we may trust; the text says why."""


@asynccontextmanager
async def _connection(
    destination: Hl7, timeout: float
) -> AsyncIterator[tuple[HL7StreamReader, HL7StreamWriter]]:
    try:
        context = destination.tls.context() if destination.tls else None
        opening = open_hl7_connection(destination.host, destination.port, encoding="utf-8", ssl=context)
        reader, writer = await asyncio.wait_for(opening, timeout)
    except OSError as error:
        raise _Away(f"{_named(destination)} {why(error, timeout)}") from error
    reader.encoding_errors = "replace"
    try:
        yield reader, writer
    finally:
        writer.transport.abort()
        with suppress(OSError):
            await writer.wait_closed()


async def _knock(destination: Hl7, timeout: float) -> None:
    async with _connection(destination, timeout):
        return


async def _exchange(letter: Letter, destination: Hl7, timeout: float) -> tuple[str, str]:
    """What the peer acknowledged, and its words. ValueError where that is no word on this letter."""
    async with _connection(destination, timeout) as (reader, writer):
        writer.writemessage(message(letter, destination))
        await asyncio.wait_for(writer.drain(), timeout)
        answer = await asyncio.wait_for(reader.readmessage(), timeout)
    try:
        acknowledged = answer.segment("MSA")
        code, identity = str(acknowledged(1)), str(acknowledged(2))
    except LookupError as error:
        raise ValueError("no acknowledgement") from error
    if identity != letter.identity:
        raise ValueError("acknowledges another message")
    return code, str(acknowledged(3)) if len(acknowledged) > 3 else ""


def _text(value: str) -> str:
    """Separators escaped, control characters left out; other letters as they are, for MSH-18 says UTF-8."""
    plain = (c for c in value if category(c) not in _CONTROLS)
    return "".join(c if ord(c) > 0x7E else str(_EMPTY.escape(c)) for c in plain)


def _person(name: str) -> str:
    """A DICOM person name's first component group as XPN; the two order their components alike (prefix and
    suffix apart, PS3.5 6.2.1.2, HL7 2.A.88).
    """
    parts = [_text(part) for part in name.partition("=")[0].split("^")] + [""] * 5
    family, given, middle, prefix, suffix = parts[:5]
    return f"{family}^{given}^{middle}^{suffix}^{prefix}".rstrip("^")


def _time(moment: datetime) -> str:
    return moment.strftime("%Y%m%d%H%M%S%z")


def _named(destination: Hl7) -> str:
    return f"destination {destination.name} at {destination.host}:{destination.port}"


_EMPTY = hl7.parse("MSH|^~\\&|\r")
_CONTROLS = ("Cc", "Cs", "Zl", "Zp")
"""Unicode categories of what begins a new line, steers a device or cannot be written in UTF-8."""
