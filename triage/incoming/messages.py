"""HL7 v2 messages → what they tell of a study, and the acknowledgment with its reason (HL7 v2.5.1 chapter 2).

    ORM^O01   an order: is it STAT? Or an order status that closes the study
    ORU^R01   a report: final or corrected closes the study

Every ORC/OBR group is looked at, and nothing is stored of a message that cannot be read to its end. What it
tells of an order is harmless when it comes again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from uuid import uuid4

import hl7

from triage.config import Orders
from triage.domain import News, Ordered, Reported
from triage.errors import Rejected

Group = Mapping[str, hl7.Segment]
"""Segments that belong to one order, by name; the first of each name."""

PLACED = ("NW", "XO", "XX", "SN", "RP", "RU")
"""ORC-1 of orders placed or changed (table 0119); others tell nothing of the priority."""
CANCELLED = ("CA", "DC", "OC", "OD")
FINAL = ("F", "C")
"""OBR-25 of a final report, or of a correction of one (table 0123)."""
PRIORITY = (("TQ1", 9, 1), ("OBR", 27, 6), ("ORC", 7, 6), ("OBR", 5, 1))
"""Where versions 2.1 to 2.8 put the priority: (segment, field, component)."""

ACCEPTED, ERROR, REJECTED = "AA", "AE", "AR"
"""Stored; the content is wrong, sending it again does not help; not taken, for reasons that may pass."""
MISSING, BAD_TYPE, BAD_EVENT, UNKNOWN_KEY, INTERNAL = "101", "200", "201", "204", "207"
"""Error codes of ERR-3 (table 0357)."""


class NotTaken(Rejected):
    """A message that is answered by a NAK with this text."""

    def __init__(self, acknowledgment: str, code: str, text: str) -> None:
        super().__init__(text)
        self.acknowledgment = acknowledgment
        self.code = code


def parse(raw: bytes) -> hl7.Message:
    """The message; UTF-8, else Latin-1, which loses no byte. Raises NotTaken for what is no message."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        text = raw.decode("latin-1")
    try:
        message = hl7.parse(text.replace("\r\n", "\r").replace("\n", "\r"))
    except (hl7.HL7Exception, IndexError, ValueError, KeyError) as error:
        raise NotTaken(REJECTED, BAD_TYPE, "not an HL7 v2 message that begins with MSH") from error
    if not isinstance(message, hl7.Message) or not _text(message, message[0], 10):
        raise NotTaken(REJECTED, MISSING, "MSH-10, the message control ID, is missing")
    return message


def news(message: hl7.Message, settings: Orders) -> list[News]:
    """What the message tells, order by order; empty when nothing of it matters here. Raises NotTaken."""
    kind, event = (_text(message, message[0], 9, part)[:16] for part in (1, 2))
    if kind not in _READERS:
        raise NotTaken(
            REJECTED, BAD_TYPE, f"message type {kind or '(none)'}: only ORM^O01 and ORU^R01 are read"
        )
    expected, reader = _READERS[kind]
    if event not in ("", expected):
        raise NotTaken(REJECTED, BAD_EVENT, f"{kind}^{event}: only {kind}^{expected} is read")
    told = (reader(message, group, settings) for group in _groups(message))
    return [one for one in told if one is not None]


def acknowledgment(message: hl7.Message | None, refusal: NotTaken | None, now: datetime) -> bytes:
    """ACK, or NAK with its reason in MSA-3 and ERR; without a message one that names nobody."""
    source = hl7.parse("MSH|^~\\&||||||||") if message is None else message
    header = [_raw(source[0], number) for number in range(19)]
    separator = str(source[0][1])

    def line(*fields: str) -> str:
        return separator.join(fields) + "\r"

    kind = source.separators[3].join(("ACK", _text(source, source[0], 9, 2) or "O01", "ACK"))
    answer = line(
        *("MSH", str(source[0][2]), header[5], header[6], header[3], header[4]),
        *(now.strftime("%Y%m%d%H%M%S%z"), "", kind, uuid4().hex[:20], header[11] or "P", header[12] or "2.3"),
    )
    if refusal is None:
        return (answer + line("MSA", ACCEPTED, header[10])).encode()
    text = str(source.escape(str(refusal)))
    answer += line("MSA", refusal.acknowledgment, header[10], text)
    code = source.separators[3].join((refusal.code, "", "HL70357"))
    return (answer + line("ERR", "", "", code, "E", "", "", "", text)).encode()


# --- what the messages tell ----------------------------------------------------------------------


def _ordered(message: hl7.Message, group: Group, settings: Orders) -> News | None:
    control = _of(message, group, "ORC", 1)
    accession_number = _accession_number(message, group, settings)
    if _of(message, group, "ORC", 5) in settings.closing_statuses:
        return Reported(accession_number, _patient_ids(message), "order completed")
    if control in CANCELLED:
        return Ordered(accession_number, stat=False)
    if control not in PLACED:
        return None
    priority = next(filter(None, (_of(message, group, *where) for where in PRIORITY)), "")
    return Ordered(accession_number, stat=priority.upper() in settings.stat)


def _reported(message: hl7.Message, group: Group, settings: Orders) -> News | None:
    if _of(message, group, "OBR", 25) not in FINAL:
        return None
    return Reported(_accession_number(message, group, settings), _patient_ids(message), "final report")


_READERS = {"ORM": ("O01", _ordered), "ORU": ("R01", _reported)}


def _accession_number(message: hl7.Message, group: Group, settings: Orders) -> str:
    for field in settings.accession_number:
        segment, _, number = field.partition("-")
        if text := _of(message, group, segment, int(number)):
            return text
    raise NotTaken(
        ERROR, MISSING, f"no accession number: {' and '.join(settings.accession_number)} are empty"
    )


def _patient_ids(message: hl7.Message) -> frozenset[str]:
    pid = next((segment for segment in message if str(segment[0]) == "PID"), None)
    if pid is None:
        return frozenset()
    repeated = _raw(pid, 3).split(message.separators[2])
    ids = [text.split(message.separators[3])[0] for text in (*repeated, _raw(pid, 2))]
    return frozenset(message.unescape(text).strip() for text in ids) - {""}


def _groups(message: hl7.Message) -> Iterator[Group]:
    """ORC, or OBR without one, begins a new order."""
    group: dict[str, hl7.Segment] = {}
    for segment in message[1:]:
        name = str(segment[0])
        if name in ("ORC", "OBR") and (name in group or (name == "ORC" and "OBR" in group)):
            yield group
            group = {}
        group.setdefault(name, segment)
    if "ORC" in group or "OBR" in group:
        yield group
    else:
        raise NotTaken(ERROR, "100", "neither ORC nor OBR: the message has no order")


def _of(message: hl7.Message, group: Group, name: str, number: int, component: int = 1) -> str:
    return _text(message, group[name], number, component) if name in group else ""


def _text(message: hl7.Message, segment: Sequence[object], number: int, component: int = 1) -> str:
    """One component of a field's first repetition, in one line; "" where there is none."""
    _, _, repetition, part, _ = message.separators
    parts = _raw(segment, number).split(repetition)[0].split(part)
    text = str(message.unescape(parts[component - 1])) if len(parts) >= component else ""
    return "".join(filter(str.isprintable, text)).strip()  # an escape may hide a new line of the log


def _raw(segment: Sequence[object], number: int) -> str:
    return str(segment[number]) if len(segment) > number else ""
