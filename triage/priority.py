"""Result + policy → band, due time and a sentence (pure). See README, "How the list is ordered".

The policies are the clinical scenarios of Goncharov et al., section 1: *identification* ranks by the
probability, *severity* by the affected lung fraction, *combined* by both (an outbreak).
"""

from __future__ import annotations

from datetime import datetime, timedelta

from triage.config import Analysis, PriorityPolicy
from triage.domain import (
    Band,
    Figures,
    Priority,
    Result,
    Standing,
    Status,
    StudyState,
    percent,
    two_decimals,
)

STAT = "STAT"
"""RequestedProcedurePriority (0040,1003) of an order that is never lowered."""


Judged = Result | Figures


def pending(arrived_at: datetime, stat: bool, policy: PriorityPolicy) -> Priority:
    """Place of a study nobody has judged yet."""
    return _place(Band.NOT_JUDGED, 0.0, "not judged yet", arrived_at, stat, policy)


def not_judged(
    before: Priority, arrived_at: datetime, stat: bool, reason: str, policy: PriorityPolicy
) -> Priority:
    """Place of a study that could not be judged: a failure never lowers it, and never hides it."""
    return before.or_sooner(_place(Band.NOT_JUDGED, 0.0, reason, arrived_at, stat, policy))


def prioritise(
    result: Result, arrived_at: datetime, stat: bool, policy: PriorityPolicy, analysis: Analysis
) -> Priority:
    """Place of a judged study (positive or negative)."""
    band, score = _by_findings(result, policy, analysis)
    return _place(band, score, sentence(result), arrived_at, stat, policy)


def flagged(result: Judged, policy: PriorityPolicy, analysis: Analysis) -> bool:
    """Whether the findings alone, STAT or not, move the study up among the positives."""
    return _by_findings(result, policy, analysis)[0] <= Band.POSITIVE


def again(study: Standing, policy: PriorityPolicy, analysis: Analysis) -> Priority:
    """The place of a study as if this policy had always counted; the sentence that explains it stays."""
    band, score = Band.NOT_JUDGED, 0.0
    if study.result is not None:
        band, score = _by_findings(study.result, policy, analysis)
    due_at = _due(band, study.arrived_at, study.stat, policy)
    if study.stat:
        band = Band.CRITICAL
    if study.state is not StudyState.ANALYZED and not study.stat:  # what was found before still counts
        due_at = min(due_at, _due(Band.NOT_JUDGED, study.arrived_at, study.stat, policy))
        if band > Band.NOT_JUDGED:
            band, score = Band.NOT_JUDGED, 0.0
    return Priority(band, score, due_at, study.priority.reason)


def _by_findings(result: Judged, policy: PriorityPolicy, analysis: Analysis) -> tuple[Band, float]:
    """A study that is positive by either figure is never filed below the positives, and one that its report
    calls positive never with the routine ones, wherever the policy draws the line.
    """
    band, score = _RULES[policy.policy](result, policy, analysis)
    by_probability, by_fraction = _positive_from(policy, analysis)
    if _reaches(result.probability, by_probability) or _reaches(result.affected_fraction, by_fraction):
        return min(band, Band.POSITIVE), score
    return (min(band, Band.INDETERMINATE) if result.status is Status.POSITIVE else band), score


def _reaches(figure: float | None, limit: float) -> bool:
    """What is unknown reaches no limit, not even 0."""
    return figure is not None and figure >= limit


def _positive_from(policy: PriorityPolicy, analysis: Analysis) -> tuple[float, float]:
    """Probability and affected fraction from which a study is flagged."""
    probability, fraction = policy.positive_probability, policy.positive_fraction
    return (
        analysis.positive_probability if probability is None else probability,
        analysis.positive_fraction if fraction is None else fraction,
    )


def _place(
    band: Band, score: float, reason: str, arrived_at: datetime, stat: bool, policy: PriorityPolicy
) -> Priority:
    due_at = _due(band, arrived_at, stat, policy)
    return (
        Priority(Band.CRITICAL, score, due_at, f"STAT order; {reason}")
        if stat
        else Priority(band, score, due_at, reason)
    )


def _due(band: Band, arrived_at: datetime, stat: bool, policy: PriorityPolicy) -> datetime:
    """Neither waiting for a judgement nor getting one delays a STAT order."""
    waits = policy.target_wait_minutes
    minutes = min(waits.critical, waits.not_judged) if stat else getattr(waits, _WAITS[band])
    return arrived_at + timedelta(minutes=minutes)


_WAITS = {band: band.name.lower() for band in Band}
"""What the settings call each band's target wait."""


def _by_probability(result: Judged, policy: PriorityPolicy, analysis: Analysis) -> tuple[Band, float]:
    probability = result.probability
    if probability is None:
        return Band.INDETERMINATE, 0.0
    if probability >= _positive_from(policy, analysis)[0]:
        return Band.POSITIVE, probability
    if probability >= policy.indeterminate_probability:
        return Band.INDETERMINATE, probability
    return Band.ROUTINE, probability


def _by_fraction(result: Judged, policy: PriorityPolicy, analysis: Analysis) -> tuple[Band, float]:
    fraction = result.affected_fraction
    if fraction is None:  # a network that only classifies: unknown is never 0
        return Band.INDETERMINATE, 0.0
    if fraction >= policy.critical_fraction:
        return Band.CRITICAL, fraction
    if fraction >= policy.severe_fraction:
        return Band.SEVERE, fraction
    if fraction >= _positive_from(policy, analysis)[1]:
        return Band.POSITIVE, fraction
    return (Band.INDETERMINATE if fraction >= policy.indeterminate_fraction else Band.ROUTINE), fraction


def _by_both(result: Judged, policy: PriorityPolicy, analysis: Analysis) -> tuple[Band, float]:
    """The more urgent band of the two; inside a band the mean of fraction and probability."""
    band_p, probability = _by_probability(result, policy, analysis)
    if result.affected_fraction is None:
        return band_p, probability
    band_f, fraction = _by_fraction(result, policy, analysis)
    return min(band_p, band_f), (probability + fraction) / 2


_RULES = {"identification": _by_probability, "severity": _by_fraction, "combined": _by_both}


def sentence(result: Result) -> str:
    """Why the study stands where it stands, e.g. "right lung 62 % affected, P 0.97"."""
    parts = []
    sides = {"left lung": result.affected_left, "right lung": result.affected_right}
    known = {name: value for name, value in sides.items() if value is not None}
    if result.affected_fraction == 0:
        parts.append("no lesion found")
    elif known:
        name, value = max(known.items(), key=lambda item: item[1])
        parts.append(f"{name} {percent(value)} affected")
    elif result.affected_fraction is not None:
        parts.append(f"lungs {percent(result.affected_fraction)} affected")
    if result.probability is not None:
        word = "score" if result.probability_kind == "score" else "P"
        parts.append(f"{word} {two_decimals(result.probability)}")
    return ", ".join(parts)
