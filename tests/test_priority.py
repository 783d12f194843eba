"""The rules of the list: nobody starves, nothing is lowered by a failure, more disease is never later."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triage.config import Analysis, PriorityPolicy
from triage.domain import Band, Priority, Result, Status, percent, two_decimals
from triage.priority import not_judged, pending, prioritise

NOW = datetime(2026, 3, 1, 8, 0, tzinfo=UTC)
ANALYSIS = Analysis()
POLICIES = [PriorityPolicy(policy=p) for p in ("identification", "severity", "combined")]  # type: ignore[arg-type]
COMBINED = POLICIES[2]
fractions = st.floats(0, 1)
policies = st.sampled_from(POLICIES)
arrivals = st.integers(0, 100_000).map(lambda s: NOW + timedelta(seconds=s))


def result(probability: float | None, fraction: float | None) -> Result:
    positive = (probability or 0) >= 0.5 or (fraction or 0) >= 0.05
    return Result(
        study_instance_uid="1.2",
        patient_id="P",
        status=Status.POSITIVE if positive else Status.NEGATIVE,
        reason="",
        probability=probability,
        affected_fraction=fraction,
        affected_right=fraction,
        affected_left=None if fraction is None else fraction / 2,
    )


def place(
    r: Result, policy: PriorityPolicy = COMBINED, arrived: datetime = NOW, stat: bool = False
) -> Priority:
    return prioritise(r, arrived, stat, policy, ANALYSIS)


@pytest.mark.parametrize(
    ("policy", "probability", "fraction", "band"),
    [
        ("combined", 0.97, 0.62, Band.CRITICAL),
        ("combined", 0.97, 0.30, Band.SEVERE),
        ("combined", 0.97, 0.02, Band.POSITIVE),
        ("combined", 0.10, 0.62, Band.CRITICAL),
        ("combined", 0.30, 0.0, Band.INDETERMINATE),
        ("combined", 0.05, 0.02, Band.INDETERMINATE),
        ("combined", 0.05, 0.0, Band.ROUTINE),
        ("combined", 0.97, None, Band.POSITIVE),
        ("identification", 0.97, 0.9, Band.POSITIVE),
        ("identification", 0.05, 0.04, Band.ROUTINE),
        ("severity", 0.05, 0.62, Band.CRITICAL),
        ("severity", 0.97, 0.0, Band.POSITIVE),
        ("severity", 0.3, None, Band.INDETERMINATE),
    ],
)
def test_bands(policy: str, probability: float, fraction: float | None, band: Band) -> None:
    rules = PriorityPolicy(policy=policy)  # type: ignore[arg-type]
    assert place(result(probability, fraction), rules).band is band


def test_the_sentence_says_why() -> None:
    assert place(result(0.97, 0.62)).reason == "right lung 62 % affected, P 0.97"
    assert place(result(0.97, None)).reason == "P 0.97"
    assert place(result(0.02, 0.0)).reason == "no lesion found, P 0.02"
    assert place(result(0.97, 0.62), stat=True).reason.startswith("STAT order; ")


@pytest.mark.parametrize(
    ("fraction", "text"),
    [
        (0, "0 %"),
        (0.0004, "<0.1 %"),
        (0.0123, "1.2 %"),
        (0.0499, "4.9 %"),
        (0.2499, "24 %"),
        (0.25, "25 %"),
        (0.29, "29 %"),
        (0.62, "62 %"),
        (1, "100 %"),
    ],
)
def test_little_is_never_shown_as_nothing_and_no_limit_is_reached_by_rounding(
    fraction: float, text: str
) -> None:
    assert percent(fraction) == text


@pytest.mark.parametrize(
    ("probability", "text"), [(0.4999, "0.49"), (0.5, "0.50"), (0.29, "0.29"), (1, "1.00")]
)
def test_no_limit_of_the_probability_is_reached_by_rounding(probability: float, text: str) -> None:
    assert two_decimals(probability) == text


@given(policies, fractions, fractions, fractions, fractions)
def test_more_disease_is_never_due_later(
    policy: PriorityPolicy, p1: float, p2: float, f1: float, f2: float
) -> None:
    less = place(result(min(p1, p2), min(f1, f2)), policy)
    more = place(result(max(p1, p2), max(f1, f2)), policy)
    assert more.band <= less.band
    assert more.due_at <= less.due_at
    assert more.score >= less.score


@given(st.lists(st.tuples(arrivals, fractions, fractions), min_size=2, max_size=20), policies)
def test_nobody_is_overtaken_for_ever(
    studies: list[tuple[datetime, float, float]], policy: PriorityPolicy
) -> None:
    """No study is overtaken by one arriving later than its due time minus the smallest target wait."""
    smallest = timedelta(minutes=policy.target_wait_minutes.critical)
    placed = [(arrived, place(result(p, f), policy, arrived)) for arrived, p, f in studies]
    for _, one in placed:
        for later_arrival, other in placed:
            if later_arrival > one.due_at - smallest:
                assert other.due_at > one.due_at


@given(policies, fractions, fractions, arrivals)
def test_a_failure_never_lowers_and_never_hides(
    policy: PriorityPolicy, probability: float, fraction: float, arrived: datetime
) -> None:
    before = place(result(probability, fraction), policy, arrived)
    after = not_judged(before, arrived, False, "missing slices", policy)
    assert after.due_at <= before.due_at
    assert after.reason == "missing slices"
    routine = arrived + timedelta(minutes=policy.target_wait_minutes.routine)
    assert after.due_at <= routine


@given(policies, fractions, fractions, arrivals)
def test_a_stat_order_is_never_lowered(
    policy: PriorityPolicy, probability: float, fraction: float, arrived: datetime
) -> None:
    judged = place(result(probability, fraction), policy, arrived, stat=True)
    waiting = pending(arrived, True, policy)
    failed = not_judged(waiting, arrived, True, "no axial CT series", policy)
    assert judged.band is waiting.band is failed.band is Band.CRITICAL
    assert judged.due_at == waiting.due_at == failed.due_at


@given(policies, fractions, fractions)
def test_what_is_called_positive_is_never_filed_below_the_positives(
    policy: PriorityPolicy, probability: float, fraction: float
) -> None:
    r = result(probability, fraction)
    if r.status is Status.POSITIVE:
        assert place(r, policy).band <= Band.POSITIVE
