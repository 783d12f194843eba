"""The rules of the list: nobody starves, nothing is lowered by a failure, more disease is never later."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import delete

from tests.test_policies import some_policy
from tests.web_studies import NOON, Ward, configured
from triage.config import Analysis, PriorityPolicy
from triage.db.tables import delivery, study
from triage.db.tables import instance as instances
from triage.db.tables import result as results
from triage.domain import Band, Priority, Result, Status, WorklistEntry, percent, two_decimals
from triage.policies import settle
from triage.priority import flagged, not_judged, pending, prioritise

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


@dataclass(frozen=True)
class Came:
    """One study of a random history, and what became of it."""

    minute: int
    fate: str
    stat: bool
    probability: float | None
    fraction: float | None


FATES = (
    *("judged", "reopened", "requeued", "refused", "refused later", "retried", "given up", "receiving"),
    *("analyzing", "ready"),
)
"""In this order: whoever claims one to judge gets the most urgent that is ready."""
histories = st.lists(
    st.builds(
        Came,
        st.integers(0, 1500),
        st.sampled_from(FATES),
        st.sampled_from([False, False, False, True]),
        st.none() | fractions,
        st.none() | fractions,
    ),
    min_size=2,
    max_size=6,
)


@pytest.fixture(scope="module")
def ward(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ward]:
    ward = Ward(configured(tmp_path_factory.mktemp("list")))
    yield ward
    ward.database.close()


def live(ward: Ward, came: Sequence[Came], policy: PriorityPolicy) -> None:
    """Nothing but this history stands in the database, each study where the real steps put it."""
    with ward.database._write() as connection:
        for table in (delivery, instances, results, study):
            connection.execute(delete(table))
    ward.config, ward.now = ward.config.under(policy), NOON + timedelta(minutes=1500)
    for number, one in enumerate(sorted(came, key=lambda one: FATES.index(one.fate))):
        befall(ward, f"1.{number}", one)


def befall(ward: Ward, uid: str, came: Came) -> None:
    ward.arrive(uid, stat=came.stat, ago=1500 - came.minute)
    if came.fate in ("judged", "reopened", "requeued", "refused later"):
        said = result(came.probability, came.fraction).status
        ward.judge(uid, said, probability=came.probability, affected_fraction=came.fraction)
    if came.fate in ("reopened", "refused later"):
        ward.arrive(uid)
    match came.fate:
        case "requeued":
            ward.database.requeue(uid, ward.now, ward.waiting)
        case "refused" | "refused later":
            ward.refuse(uid, "no axial CT series")
        case "retried":
            ward.fail(uid, "disk", ward.now + timedelta(days=1000))
        case "given up":
            ward.fail(uid, "disk", None)
        case "analyzing":
            ward.claim(uid)
        case "ready":
            ward.database.mark_ready(ward.study(uid))


def listed(ward: Ward, now: datetime, ordering: str) -> list[WorklistEntry]:
    return ward.database.worklist(now, ordering, leave_after_days=100)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(came=histories, policy=some_policy(), later=st.integers(1, 60_000))
def test_nobody_starves_and_no_order_changes_as_time_passes(
    ward: Ward, came: list[Came], policy: PriorityPolicy, later: int
) -> None:
    """No study is overtaken by one that arrives later than its due time minus the smallest target wait; and
    while nothing becomes known the list stays as it is, whatever is done to it in passing.
    """
    live(ward, came, policy)
    then = ward.now + timedelta(minutes=later)
    before = listed(ward, ward.now, "deadline")
    settle(ward.database, ward.config, then, always=True)
    after = listed(ward, then, "deadline")
    assert [(one.study.study_instance_uid, one.priority) for one in before] == [
        (one.study.study_instance_uid, one.priority) for one in after
    ]
    assert len(after) == len(came)
    smallest = timedelta(minutes=min(policy.target_wait_minutes.model_dump().values()))
    for first, other in pairwise(after):
        assert other.priority.due_at >= first.priority.due_at
    for place, other in enumerate(after):
        for one in after[place + 1 :]:
            assert other.study.arrived_at <= one.priority.due_at - smallest


@pytest.mark.parametrize(
    ("policy", "figure"), [("identification", "probability"), ("severity", "affected_fraction")]
)
@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(scores=st.lists(st.tuples(st.integers(0, 1500), fractions), min_size=2, max_size=6))
def test_strict_is_the_order_that_the_paper_draws(
    ward: Ward, policy: str, figure: str, scores: list[tuple[int, float]]
) -> None:
    """Goncharov et al., figure 1, centre: the studies of the left, in order of arrival, re-ordered by the
    score of the scenario alone, the highest on top; section 1 names the score of each scenario.
    """
    came = [
        Came(minute, "judged", False, *((score, None) if figure == "probability" else (None, score)))
        for minute, score in scores
    ]
    live(ward, came, PriorityPolicy(ordering="strict", policy=policy))  # type: ignore[arg-type]
    told = [(one.study, one.result) for one in listed(ward, ward.now, "strict")]
    in_order = [(getattr(answer, figure), study.arrived_at) for study, answer in told]
    assert in_order == sorted(in_order, key=lambda one: (-one[0], one[1]))
    assert len(in_order) == len(scores)


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


@pytest.mark.parametrize(("probability", "fraction"), [(0.1, None), (None, 0.02)])
def test_what_is_unknown_reaches_no_limit(probability: float | None, fraction: float | None) -> None:
    anything = PriorityPolicy(
        positive_probability=0 if probability is None else 0.5,
        positive_fraction=0 if fraction is None else 0.5,
        indeterminate_probability=0,
        indeterminate_fraction=0,
    )
    assert not flagged(result(probability, fraction), anything, ANALYSIS)
    assert flagged(result(probability or 0.0, fraction or 0.0), anything, ANALYSIS)


@given(policies, fractions, fractions)
def test_what_is_called_positive_is_never_filed_below_the_positives(
    policy: PriorityPolicy, probability: float, fraction: float
) -> None:
    r = result(probability, fraction)
    if r.status is Status.POSITIVE:
        assert place(r, policy).band <= Band.POSITIVE
