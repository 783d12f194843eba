"""What the page says: numbers, times and states in the reading room's words. Pure; no HTML is made here."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from triage.db.reading import Counts, Opinion, Verdict
from triage.domain import (
    LUNG_REGIONS,
    Band,
    Delivery,
    DeliveryState,
    Result,
    ResultKind,
    Status,
    StudyState,
    WorklistEntry,
    percent,
    two_decimals,
)
from triage.rows import status

BANDS = {
    Band.CRITICAL: ("▲▲", "Critical"),
    Band.SEVERE: ("▲", "Severe"),
    Band.POSITIVE: ("●", "Positive"),
    Band.INDETERMINATE: ("◆", "Indeterminate"),
    Band.NOT_JUDGED: ("□", "Not judged"),
    Band.ROUTINE: ("○", "Routine"),
}
"""A sign and a word for every band, so that no colour is needed to tell them apart."""

ORDERINGS = {
    "deadline": "in order of due time",
    "strict": "in order of band, then score, then arrival",
    "arrival": "in order of arrival, in shadow mode",
}
STATUSES = {
    Status.POSITIVE: "Positive",
    Status.NEGATIVE: "Negative",
    Status.NOT_ANALYSABLE: "Not analysable",
    Status.FAILED: "Failed",
}

OBJECTS: Mapping[str, str] = {
    ResultKind.LESION_SEG: "Segmentation",
    ResultKind.LUNG_SEG: "Segmentation of the lungs",
    ResultKind.SR: "Structured report",
    ResultKind.PICTURE: "Summary picture",
    ResultKind.KEY_SLICES: "Key slices",
    ResultKind.VIEW_3D: "3D view",
}
"""Names of the result objects. Their files are named by their kind; pictures share one SOP Class UID."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One of the four answers, or that it is pending: ``kind`` is the style, ``detail`` one short line."""

    kind: str
    sign: str
    title: str
    detail: str = ""


DELIVERIES = {
    DeliveryState.PENDING: Answer("pending", "…", "Waiting"),
    DeliveryState.SENT: Answer("sent", "✓", "Delivered"),
    DeliveryState.COMMITTING: Answer("pending", "…", "Delivered, not committed yet"),
    DeliveryState.COMMITTED: Answer("sent", "✓", "Delivered and committed"),
    DeliveryState.NOT_COMMITTED: Answer("failed", "✕", "Delivered, not committed"),
    DeliveryState.GIVEN_UP: Answer("failed", "✕", "Given up"),
}
"""That an archive has an object, and that it has promised to keep it, are two things."""


def answer(entry: WorklistEntry) -> Answer:
    study, stands = entry.study, status(entry)
    match stands:
        case Status.POSITIVE:
            return Answer("positive", "●", "Positive")
        case Status.NEGATIVE:
            return Answer("negative", "○", "Negative")
        case Status.NOT_ANALYSABLE:
            return Answer("not-analysable", "⊘", "Not analysable", study.reason)
        case Status.FAILED if study.not_before:
            return Answer("failed", "↻", "Failed, will be retried", study.reason)
        case Status.FAILED:
            return Answer("failed", "✕", "Failed, given up", study.reason)
        case None:
            return _pending(entry)


def _pending(entry: WorklistEntry) -> Answer:
    study = entry.study
    images = f"{entry.images} image{'' if entry.images == 1 else 's'}"
    if study.state is StudyState.RECEIVING:
        return Answer("pending", "↓", "Receiving", f"{images} so far")
    if study.state is StudyState.ANALYZING:
        return Answer("pending", "▸", "Being analysed", images)
    return Answer("pending", "…", "Waiting for analysis", images)


def earlier(entry: WorklistEntry) -> Result | None:
    """The answer that stood before the study was reopened or failed; it explains the place."""
    settled = entry.study.state in (StudyState.ANALYZED, StudyState.REJECTED)
    return None if settled else entry.result


def delivered(entry: WorklistEntry) -> Answer | None:
    """How far the results of a study have come; None when it has none to deliver."""
    counts = Counter(entry.deliveries)
    total = counts.total()
    sent = sum(count for state, count in counts.items() if state.is_delivered)
    committed, waiting = counts[DeliveryState.COMMITTED], counts[DeliveryState.COMMITTING]
    if not total:
        return None
    if given_up := counts[DeliveryState.GIVEN_UP]:
        return Answer("failed", "✕", f"{given_up} of {total} not delivered")
    if sent < total:
        return Answer("pending", "…", f"{sent} of {total} delivered")
    if refused := counts[DeliveryState.NOT_COMMITTED]:
        return Answer("failed", "✕", f"{total} delivered, {refused} not committed")
    said = f"{total} delivered" + (f", {committed} committed" if committed or waiting else "")
    return Answer("pending", "…", said) if waiting else Answer("sent", "✓", said)


def delivery_state(delivery: Delivery) -> Answer:
    if delivery.state is DeliveryState.PENDING and delivery.attempts:
        return Answer("pending", "↻", "Will be retried")
    return DELIVERIES[delivery.state]


def person(name: str) -> str:
    """A DICOM person name for reading: ``DOE^JANE^^DR=…`` → ``DOE, JANE`` (DICOM PS3.5, 6.2.1)."""
    groups = [_person_group(group) for group in name.split("=")[:2]]
    shown = list(dict.fromkeys(group for group in groups if group))
    return f"{shown[0]} ({shown[1]})" if len(shown) == 2 else "".join(shown)


def other_name(one: str, other: str) -> bool:
    """Whether two studies with one patient ID name two people: no way of writing one name is the other's."""
    ways = [{_person_group(group).casefold() for group in name.split("=")} - {""} for name in (one, other)]
    return all(ways) and not ways[0] & ways[1]


def _person_group(group: str) -> str:
    family, *given = (part.strip() for part in group.split("^")[:3])
    return ", ".join(part for part in (family, " ".join(filter(None, given))) if part)


def day(date: str) -> str:
    """A DICOM date (DA) with dashes; anything else as it stands."""
    return f"{date[:4]}-{date[4:6]}-{date[6:]}" if len(date) == 8 and date.isdigit() else date


def sentence(reason: str) -> str:
    """A reason as a sentence: "bad key" → "Bad key."; the rest stays as it is."""
    return f"{reason[:1].upper()}{reason[1:]}."


def when(moment: datetime, now: datetime) -> str:
    """Hour and minute in the server's zone, with the day where it is not today."""
    local, today = moment.astimezone(), now.astimezone()
    if local.date() == today.date():
        return f"{local:%H:%M}"
    return f"{local.day} {local:%b %H:%M}" if local.year == today.year else f"{local:%Y-%m-%d %H:%M}"


def zone(now: datetime) -> str:
    """The server's time zone, such as ``CET, UTC+01:00``."""
    local = now.astimezone()
    offset = local.strftime("%z")
    return f"{local.tzname()}, UTC{offset[:3]}:{offset[3:5]}"


def span(length: timedelta) -> str:
    """A length of time in whole minutes, short enough for a column."""
    minutes = int(abs(length).total_seconds() // 60)
    days, hours = minutes // 1440, minutes // 60
    if days >= 2:
        return f"{days} days"
    return f"{hours} h {minutes % 60:02d} min" if hours else f"{minutes} min"


def due(moment: datetime, now: datetime) -> str:
    left = moment - now
    if abs(left) < timedelta(minutes=1):
        return "due now"
    return f"due in {span(left)}" if left > timedelta(0) else f"overdue {span(left)}"


def share(fraction: float | None) -> str:
    return "unknown" if fraction is None else percent(fraction)


def probability(result: Result) -> str:
    """``P 0.97, not calibrated``; a documented rule's number is called a score."""
    if result.probability is None:
        return ""
    word = "Score" if result.probability_kind == "score" else "P"
    calibrated = "calibrated" if result.calibrated else "not calibrated"
    return f"{word} {two_decimals(result.probability)}, {calibrated}"


def extent(result: Result) -> str:
    """``worse lung 31 %``: the affected fraction is the larger of both lungs; ``lungs …`` without sides."""
    sides = result.affected_left is not None and result.affected_right is not None
    return f"{'worse lung' if sides else 'lungs'} {share(result.affected_fraction)}"


def grade(result: Result) -> str:
    """``CT-2``, by the affected fraction; else it is said by what."""
    if result.grade is None:
        return "unknown"
    return f"{result.grade.value}{' by slice mean' if result.grade_from == 'percent_infection' else ''}"


def object_name(delivery: Delivery) -> str:
    if delivery.path is None:
        return f"Answer, revision {delivery.revision}"
    return OBJECTS.get(delivery.path.stem, delivery.sop_class_uid)


def severity_score(result: Result) -> str:
    """``14 of 40 (left 6, right 8)``."""
    score = result.ct_severity_score
    if score is None:
        return "unknown"
    return f"{score.total} of 40 (left {sum(score.left)}, right {sum(score.right)})"


def regions(result: Result) -> list[tuple[str, int, int]]:
    """Each region of a lung with the score of the right and of the left one; none where they are unknown."""
    score = result.ct_severity_score
    return [] if score is None else list(zip(LUNG_REGIONS, score.right, score.left, strict=True))


def change(now: Result | None, before: Result | None) -> str:
    """``12 points more affected``, from an earlier study or revision to this one; empty where unknown."""
    if now is None or before is None or now.affected_fraction is None or before.affected_fraction is None:
        return ""
    points = round(100 * (now.affected_fraction - before.affected_fraction), 1)
    other = "" if now.model == before.model else ", by another network"
    if abs(points) < 0.1:
        return f"as much affected{other}"
    size = f"{abs(points):.0f}" if abs(points) >= 10 else f"{abs(points):.1f}"
    sign, word = ("▲", "more") if points > 0 else ("▼", "less")
    return f"{sign} {size} points {word} affected{other}"


def millilitres(volume: float | None) -> str:
    """A speck that is outlined is not "0 ml"."""
    if volume is None:
        return "unknown"
    return "below 1 ml" if 0 < volume < 1 else f"{volume:,.0f} ml".replace(",", " ")


def title(counts: Counts) -> str:
    """What the browser's tab says while another window is in front."""
    return f"{counts.overdue} overdue · Worklist" if counts.overdue else f"{counts.open} open · Worklist"


def summary(counts: Counts) -> list[tuple[str, int]]:
    """Counts for the line above the list, without the zeros."""
    named = [(name.replace("_", " "), count) for name, count in dataclasses.asdict(counts).items()]
    return [(name, count) for name, count in named if count or name == "open"]


OPINIONS: Mapping[Opinion, tuple[str, str]] = {
    "agree": ("✓", "Agree"),
    "over_called": ("↓", "Over-called"),
    "under_called": ("↑", "Under-called"),
    "wrong_organ": ("⊘", "Wrong organ"),
    "other": ("✎", "Other"),
}
"""What a reader can say of an answer: a sign and words for each."""


def verdict(given: Verdict, newest: Result | None) -> str:
    """``Over-called (Dr. Lee), truly CT-1``; of an earlier answer it says so."""
    sign, name = OPINIONS[given.opinion]
    said = f"{sign} {name} ({given.person})"
    if given.true_grade:
        said += f", truly {given.true_grade.value}"
    return said if newest and newest.revision == given.revision else f"{said}, of an earlier answer"
