"""Versions of the policy: what orders, what another one would have done, and the way back."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from click.testing import Result
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from sqlalchemy import text
from typer.testing import CliRunner

from tests.test_reading import browse
from tests.web_studies import NOON, Ward, configured
from triage import analyze, check, cli, daemon, policies, priority, whatif
from triage.audit import Actor
from triage.cli import app
from triage.config import Config, PriorityPolicy, TargetWaits, load
from triage.db.policies import add, place
from triage.domain import Band, Figures, Grade, Priority, Standing, Status, StudyState
from triage.errors import ConfigError, Rejected
from triage.web import words

ANNA, BOB = Actor("anna"), Actor("bob")
UIDS = [f"1.2.{number}" for number in range(12)]
fractions = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.05, 0.2, 0.25, 0.5, 1.0]))
minutes = st.integers(1, 600).map(float)


@st.composite
def some_policy(draw: st.DrawFn) -> PriorityPolicy:
    low, flag, severe, critical = sorted(draw(st.tuples(*[fractions] * 4)))
    likely = sorted(draw(st.tuples(fractions, fractions)))
    waits = sorted(draw(st.lists(minutes, min_size=5, max_size=5)))
    names = ("critical", "severe", "positive", "indeterminate", "routine")
    return PriorityPolicy(
        ordering=draw(st.sampled_from(["deadline", "strict"])),
        policy=draw(st.sampled_from(["identification", "severity", "combined"])),
        positive_probability=likely[1],
        positive_fraction=flag,
        indeterminate_probability=likely[0],
        indeterminate_fraction=low,
        severe_fraction=severe,
        critical_fraction=critical,
        target_wait_minutes=TargetWaits(
            **dict(zip(names, waits, strict=True)), not_judged=draw(st.floats(1, waits[-1]))
        ),
    )


def result(probability: float | None, fraction: float | None, config: Config) -> Figures:
    analysis = config.analysis
    positive = (probability or 0) >= analysis.positive_probability or (
        fraction or 0
    ) >= analysis.positive_fraction
    status = Status.POSITIVE if positive else Status.NEGATIVE
    return Figures(status, probability, fraction)


@st.composite
def some_studies(draw: st.DrawFn) -> list[Standing]:
    """A history: studies that arrived, were judged or not, and were closed or not."""
    found = []
    for number in range(draw(st.integers(0, 12))):
        arrived = NOON + timedelta(minutes=draw(st.integers(0, 300)))
        answer, judged_at = None, None
        if draw(st.integers(0, 4)):
            answer = result(draw(st.none() | fractions), draw(st.none() | fractions), Config())
            judged_at = arrived + timedelta(minutes=draw(st.integers(0, 60)))
        closed_at = arrived + timedelta(minutes=draw(st.integers(0, 400))) if draw(st.booleans()) else None
        state = draw(st.sampled_from([StudyState.ANALYZED, StudyState.FAILED, StudyState.RECEIVING]))
        found.append(
            Standing(
                study_instance_uid=f"1.2.{number}",
                state=state if answer else StudyState.READY,
                arrived_at=arrived,
                stat=draw(st.integers(0, 9)) == 0,
                priority=Priority(Band.NOT_JUDGED, 0.0, arrived, "why"),
                result=answer,
                judged_at=judged_at,
                closed_at=closed_at,
            )
        )
    return found


# --- what-if ------------------------------------------------------------------------------------


@given(
    some_studies(),
    some_policy(),
    st.dictionaries(st.sampled_from(UIDS), st.booleans()),
)
def test_the_present_policy_changes_nothing(
    studies: list[Standing], policy: PriorityPolicy, truths: dict[str, bool]
) -> None:
    config = Config().under(policy)
    tried = whatif.rehearse(studies, studies, truths, config, config, NOON + timedelta(days=1), 1)
    assert tried.present == tried.candidate
    for moves in (tried.bands, tried.places):
        assert (moves.up, moves.down, moves.examples_up, moves.examples_down) == (0, 0, (), ())


@given(some_studies(), some_policy(), st.booleans())
def test_waits_are_those_of_a_brute_force_replay(
    studies: list[Standing], policy: PriorityPolicy, arrival: bool
) -> None:
    config, now = Config().under(policy), NOON + timedelta(days=2)
    tried = whatif.rehearse(studies, studies, {}, config, config, now, 2)
    ordering = "arrival" if arrival else policy.ordering
    waits = replayed(studies, config, ordering, now)
    flagged = [s.study_instance_uid for s in studies if s.result and is_flagged(s.result, policy)]
    found = tried.by_arrival if arrival else (tried.present.flagged_waits, tried.present.other_waits)
    for told, wanted in ((found[0], True), (found[1], False)):
        expected = sorted(wait for uid, wait in waits.items() if (uid in flagged) is wanted)
        assert (told is None) is (not expected)
        if told:
            assert told.studies == len(expected)
            assert told.mean == sum(expected, timedelta()) / len(expected)
            assert expected[(len(expected) - 1) // 2] == told.median
            assert told.p95 in expected
            assert sum(wait <= told.p95 for wait in expected) >= 0.95 * len(expected)
    assert tried.present.flagged == len(flagged)


def is_flagged(answer: Figures, policy: PriorityPolicy) -> bool:
    """Said anew, from the documentation alone."""
    assert policy.positive_probability is not None
    assert policy.positive_fraction is not None
    probability, fraction = answer.probability, answer.affected_fraction
    by_fraction = fraction is not None and (
        fraction >= policy.positive_fraction
        or (policy.policy != "identification" and fraction >= policy.severe_fraction)
    )
    return (probability is not None and probability >= policy.positive_probability) or by_fraction


def replayed(studies: list[Standing], config: Config, ordering: str, now: datetime) -> dict[str, timedelta]:
    """At each closing, look through everything that has arrived and is unread, and read the first."""
    read: dict[str, datetime] = {}
    for moment in sorted(s.closed_at for s in studies if s.closed_at):
        here = [s for s in studies if s.arrived_at <= moment and s.study_instance_uid not in read]
        if not here:
            continue

        def key(study: Standing, moment: datetime = moment) -> tuple[Any, ...]:
            known = study.judged_at is None or study.judged_at <= moment
            place = (
                priority.again(study, config.priority, config.analysis)
                if known
                else priority.pending(study.arrived_at, study.stat, config.priority)
            )
            rank = 4 if place.band is Band.NOT_JUDGED else int(place.band)
            return {
                "deadline": (place.due_at, study.arrived_at, study.study_instance_uid),
                "strict": (rank, -place.score, study.arrived_at, study.study_instance_uid),
                "arrival": (study.arrived_at, study.study_instance_uid),
            }[ordering]

        read[min(here, key=key).study_instance_uid] = moment
    return {s.study_instance_uid: read.get(s.study_instance_uid, now) - s.arrived_at for s in studies}


@given(
    some_studies(),
    some_studies(),
    st.tuples(some_policy(), some_policy()),
    st.dictionaries(st.sampled_from(UIDS), st.booleans()),
)
def test_what_differs_between_two_policies_is_counted_as_by_hand(
    studies: list[Standing],
    listed: list[Standing],
    tried: tuple[PriorityPolicy, PriorityPolicy],
    truths: dict[str, bool],
) -> None:
    """Every figure of both sides, said anew; the list of now is not the studies of these days."""
    configs = [Config().under(policy) for policy in tried]
    told = whatif.rehearse(studies, listed, truths, *configs, NOON + timedelta(days=1), 1)
    placed = []
    for config, found in zip(configs, (told.present, told.candidate), strict=True):
        flags = {
            s.study_instance_uid: bool(s.result and is_flagged(s.result, config.priority)) for s in studies
        }
        again = {s.study_instance_uid: priority.again(s, config.priority, config.analysis) for s in studies}
        known = [s.study_instance_uid for s in studies if s.result and s.study_instance_uid in truths]
        hits = [flags[uid] for uid in known if truths[uid]]
        passes = [not flags[uid] for uid in known if not truths[uid]]
        assert found.flagged == sum(flags.values())
        assert {band: sum(p.band is band for p in again.values()) for band in found.bands} == found.bands
        assert sum(found.bands.values()) == len(studies)
        assert found.sensitivity == (whatif.Rate(sum(hits), len(hits)) if hits else None)
        assert found.specificity == (whatif.Rate(sum(passes), len(passes)) if passes else None)
        placed.append(again)
    changed = [
        (placed[1][uid].band, placed[1][uid].due_at) < (was.band, was.due_at)
        for uid, was in placed[0].items()
        if (was.band, was.due_at) != (placed[1][uid].band, placed[1][uid].due_at)
    ]
    assert (told.bands.up, told.bands.down) == (sum(changed), len(changed) - sum(changed))
    was, new = (ranks(listed, config) for config in configs)
    assert told.places.up == sum(new[uid] < was[uid] for uid in was)
    assert told.places.down == sum(new[uid] > was[uid] for uid in was)
    for mover in (*told.places.examples_up, *told.places.examples_down):
        uid = mover.study_instance_uid
        assert (mover.before.number, mover.after.number) == (was[uid], new[uid])


def ranks(listed: list[Standing], config: Config) -> dict[str, int]:
    """How many stand before each study, itself counted."""

    def key(study: Standing) -> tuple[Any, ...]:
        place = priority.again(study, config.priority, config.analysis)
        band = Band.INDETERMINATE if place.band is Band.NOT_JUDGED else place.band
        first = (place.due_at,) if config.ordering == "deadline" else (band, -place.score)
        return (*first, study.arrived_at, study.study_instance_uid)

    return {one.study_instance_uid: sum(key(other) <= key(one) for other in listed) for one in listed}


@given(st.integers(1, 500).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total))))
def test_intervals_are_wilsons(counted: tuple[int, int]) -> None:
    known = binomtest(*counted).proportion_ci(method="wilson")
    assert whatif.Rate(*counted).interval == pytest.approx((known.low, known.high), abs=1e-6)


@pytest.mark.parametrize(
    ("opinion", "status", "grade", "sick"),
    [
        ("agree", Status.POSITIVE, None, True),
        ("agree", Status.NEGATIVE, None, False),
        ("over_called", Status.POSITIVE, None, False),
        ("over_called", Status.POSITIVE, Grade.CT1, True),
        ("under_called", Status.NEGATIVE, None, True),
        ("other", Status.POSITIVE, Grade.CT0, False),
        ("wrong_organ", Status.POSITIVE, None, None),
        ("agree", Status.NOT_ANALYSABLE, None, None),
        ("agree", Status.FAILED, None, None),
        ("agree", None, None, None),
    ],
)
def test_what_a_verdict_tells(opinion: str, status: Status, grade: Grade | None, sick: bool | None) -> None:
    assert whatif.truth(opinion, status, grade) is sick


# --- the list ------------------------------------------------------------------------------------


@pytest.fixture
def ward(tmp_path: Path) -> Iterator[Ward]:
    ward = Ward(configured(tmp_path))
    policies.adopt(ward.database, ward.config, ward.now)
    yield ward
    ward.database.close()


def a_day(ward: Ward) -> None:
    """Studies in every state, some seen before as another one."""
    ward.arrive("1.1", ago=300)
    ward.judge("1.1", probability=0.97, affected_fraction=0.6)
    ward.arrive("1.2", ago=250)
    ward.judge("1.2", Status.POSITIVE, probability=0.55, affected_fraction=0.02)
    ward.arrive("1.3", ago=200, stat=True)
    ward.judge("1.3", Status.NEGATIVE, probability=0.1, affected_fraction=0.0)
    ward.arrive("1.4", ago=150)
    ward.arrive("1.5", ago=120, stat=True)
    ward.arrive("1.6", ago=100)
    ward.refuse("1.6", "no axial CT series")
    ward.arrive("1.7", ago=90)
    ward.judge("1.7", Status.POSITIVE, probability=0.9, affected_fraction=0.3)
    ward.arrive("1.7", ago=10)  # new images: it is looked at again
    ward.arrive("1.8", ago=80)
    ward.judge("1.8", Status.NEGATIVE, probability=0.3, affected_fraction=0.02)
    ward.arrive("1.8", ago=5)
    ward.refuse("1.8", "no axial CT series")
    ward.arrive("1.9", ago=70)
    ward.fail("1.9", "disk", NOON + timedelta(hours=1))


def places(ward: Ward) -> dict[str, Priority]:
    now, days = ward.now, ward.config.retention.leave_list_after_days
    return {study.study_instance_uid: study.priority for study in ward.database.standing(now, days)}


def order(ward: Ward) -> list[str]:
    ordering = policies.in_force(ward.database, ward.config).ordering
    return [entry.study.study_instance_uid for entry in ward.database.worklist(ward.now, ordering, 7)]


def save(ward: Ward, policy: PriorityPolicy) -> None:
    newest = ward.database.policy()
    assert newest is not None
    policies.save(ward.database, ward.config, policy, ANNA, "to try", ward.now, newest.version)


@settings(max_examples=8, deadline=None)
@given(st.lists(some_policy(), min_size=1, max_size=3))
def test_a_new_order_is_the_one_from_scratch_and_the_way_back_the_earlier_one(
    tmp_path_factory: pytest.TempPathFactory, tried: list[PriorityPolicy]
) -> None:
    ward = Ward(configured(tmp_path_factory.mktemp("changed")))
    policies.adopt(ward.database, ward.config, ward.now)
    a_day(ward)
    before, in_order = places(ward), order(ward)
    for policy in tried:
        save(ward, policy)
    afresh = configured(tmp_path_factory.mktemp("afresh"))
    scratch = Ward(afresh.under(tried[-1]))
    a_day(scratch)
    assert places(ward) == places(scratch)
    assert [place.band for uid, place in places(ward).items() if ward.study(uid).stat] == [Band.CRITICAL] * 2
    policies.roll_back(ward.database, ward.config, 1, ANNA, "", ward.now, 1 + len(tried))
    assert (places(ward), order(ward)) == (before, in_order)
    ward.database.close()
    scratch.database.close()


@given(st.floats(0, 1), st.floats(0, 1), some_policy(), some_policy(), st.booleans())
def test_stat_is_never_lowered(
    probability: float, fraction: float, policy: PriorityPolicy, other: PriorityPolicy, judged: bool
) -> None:
    config = Config()
    study = Standing(
        study_instance_uid="1.2",
        state=StudyState.ANALYZED if judged else StudyState.READY,
        arrived_at=NOON,
        stat=True,
        priority=priority.pending(NOON, True, policy),
        result=result(probability, fraction, config) if judged else None,
    )
    place = priority.again(study, other, config.analysis)
    assert place.band is Band.CRITICAL
    plain = priority.again(dataclasses.replace(study, stat=False), other, config.analysis)
    assert place.due_at <= plain.due_at


def test_every_process_asks_for_the_newest_policy(ward: Ward) -> None:
    other = Ward(ward.config)  # another process, started before the change
    save(ward, ward.config.policy.model_copy(update={"ordering": "strict", "positive_probability": 0.9}))
    assert policies.in_force(other.database, other.config).ordering == "strict"
    assert policies.in_force(other.database, other.config).priority.positive_probability == 0.9
    other.database.close()


@pytest.mark.parametrize("ordering", ["deadline", "strict"])
def test_every_list_is_in_the_order_of_the_newest_policy(
    ward: Ward, ordering: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ward.now = datetime.now(UTC)  # of all lists, the terminal's knows no other
    ward.arrive("1.1", ago=600)
    ward.judge("1.1", Status.NEGATIVE)  # due by now, and routine
    ward.arrive("1.2", ago=1)
    ward.judge("1.2", probability=0.99, affected_fraction=0.6)
    save(ward, ward.config.policy.model_copy(update={"ordering": ordering}))
    monkeypatch.setattr(daemon, "now", ward.clock)
    page, api = browse(ward).get("/").text, browse(ward).get("/api/v1/worklist").json()
    lists = [
        [
            entry.study.study_instance_uid
            for entry in daemon._lists(ward.database, ward.config)._open_studies(9)
        ],
        [one["study_instance_uid"] for one in browse(ward).get("/api/worklist").json()],
        [one["study_instance_uid"] for one in api["rows"]],
        sorted(["1.1", "1.2"], key=lambda uid: page.index(f'data-study="{uid}"')),
        [entry.study.study_instance_uid for entry in cli._open_studies(ward.database, ward.config, set())[0]],
    ]
    assert lists == [{"deadline": ["1.1", "1.2"], "strict": ["1.2", "1.1"]}[ordering]] * len(lists)
    assert api["ordering"] == ordering
    words_of_page = words.ORDERINGS[ordering]
    assert words_of_page.capitalize() in page
    assert words_of_page in browse(ward).get("/studies/1.1").text


def test_nothing_is_judged_or_sent_again(ward: Ward) -> None:
    ward.arrive("1.1")
    ward.judge("1.1", to=("PACS",))
    results, owed = ward.database.results("1.1"), ward.database.deliveries("1.1")
    save(ward, ward.config.policy.model_copy(update={"policy": "severity", "critical_fraction": 0.3}))
    assert ward.database.results("1.1") == results
    assert ward.database.deliveries("1.1") == owed
    assert ward.study("1.1").state is StudyState.ANALYZED
    assert places(ward)["1.1"].band is Band.CRITICAL


def test_the_answer_and_its_objects_never_know_the_policy(ward: Ward) -> None:
    changed = ward.config.under(ward.config.policy.model_copy(update={"positive_probability": 0.9}))
    assert changed.analysis == ward.config.analysis

    known = SimpleNamespace(info=SimpleNamespace(name="n", version="v"), settings={})
    chosen = SimpleNamespace(content_digest="d", notes=())
    key = analyze.content_key(chosen, known, ward.config, None)  # type: ignore[arg-type]
    assert key == analyze.content_key(chosen, known, changed, None)  # type: ignore[arg-type]


def test_a_place_given_in_the_moment_of_the_change_is_set_right(ward: Ward) -> None:
    ward.arrive("1.1")
    save(ward, ward.config.policy.model_copy(update={"positive_probability": 0.99, "positive_fraction": 0.9}))
    ward.judge("1.1", probability=0.6, affected_fraction=0.1)  # by the policy before
    assert places(ward)["1.1"].band is Band.POSITIVE
    policies.settle(ward.database, ward.config, ward.now + timedelta(minutes=1))
    assert places(ward)["1.1"].band is Band.INDETERMINATE  # never routine: its report says positive


def test_a_raised_threshold_lowers_the_flag_but_not_below_what_the_report_says(ward: Ward) -> None:
    ward.arrive("1.1")
    ward.judge("1.1", Status.POSITIVE, probability=0.55, affected_fraction=0.0)
    assert places(ward)["1.1"].band is Band.POSITIVE
    save(ward, ward.config.policy.model_copy(update={"positive_probability": 0.6}))
    assert places(ward)["1.1"].band is Band.INDETERMINATE


def test_config_yaml_is_the_first_version_and_a_person_goes_before_it(ward: Ward) -> None:
    db, config = ward.database, ward.config
    assert [one.author for one in db.policies(9)] == [policies.FILE]
    policies.adopt(db, config, ward.now)  # a restart adds nothing
    assert [one.author for one in db.policies(9)] == [policies.FILE]
    policies.adopt(db, edited(config), ward.now)
    assert [one.version for one in db.policies(9)] == [2, 1]
    save(ward, config.policy)
    policies.adopt(db, edited(config), ward.now)
    newest = db.policy()
    assert newest is not None
    assert (newest.version, newest.author, newest.policy) == (3, "anna", config.policy)


def edited(config: Config) -> Config:
    """With another policy in config.yaml."""
    return config.under(config.priority.model_copy(update={"ordering": "strict", "severe_fraction": 0.3}))


def test_looking_never_changes_what_counts(ward: Ward, monkeypatch: pytest.MonkeyPatch) -> None:
    """config.yaml was edited: the daemon's next start makes it count, and moves the open studies at once."""
    ward.arrive("1.1")
    ward.judge("1.1", affected_fraction=0.27)
    changed = edited(ward.config)
    assert check._policy(changed).detail.endswith("priority in config.yaml counts from the next start on")
    cli._open_studies(daemon.open_database(changed), changed, set())
    assert len(ward.database.policies(9)) == 1
    assert policies.in_force(ward.database, changed).ordering == "deadline"
    assert places(ward)["1.1"].band is Band.SEVERE

    monkeypatch.setattr(daemon, "now", ward.clock)
    monkeypatch.setattr(daemon, "stopped_by_signals", Event)
    monkeypatch.setattr(daemon, "ROLES", {"web": lambda *_: None})
    daemon.run_role("web", changed, supervised=False)
    assert [one.reason for one in ward.database.policies(9)] == ["the file was changed", "the first version"]
    assert policies.in_force(ward.database, changed).ordering == "strict"
    assert places(ward)["1.1"].band is Band.POSITIVE


def test_a_requeued_study_stands_where_the_next_policy_would_put_it(ward: Ward) -> None:
    ward.arrive("1.1")
    ward.judge("1.1", Status.NEGATIVE)
    assert places(ward)["1.1"].band is Band.ROUTINE
    ward.database.requeue("1.1", ward.now, policies.pending(ward.database, ward.config))
    requeued = places(ward)
    assert (requeued["1.1"].band, requeued["1.1"].reason) == (
        Band.NOT_JUDGED,
        "looked at again on request, not judged yet",
    )
    policies.settle(ward.database, ward.config, ward.now, always=True)
    assert places(ward) == requeued


def test_who_saves_must_have_seen_the_newest_version_and_give_a_reason(ward: Ward) -> None:
    strict = ward.config.policy.model_copy(update={"ordering": "strict"})
    with pytest.raises(ConfigError, match="reason"):
        policies.save(ward.database, ward.config, strict, ANNA, " ", ward.now, 1)
    save(ward, strict)
    with pytest.raises(Rejected, match="version 2"):
        policies.save(ward.database, ward.config, ward.config.policy, BOB, "why", ward.now, 1)
    with pytest.raises(ConfigError, match="no version 9"):
        policies.roll_back(ward.database, ward.config, 9, BOB, "", ward.now, 2)
    assert len(ward.database.policies(9)) == 2


def test_a_refused_version_moves_no_study(ward: Ward) -> None:
    a_day(ward)
    before = places(ward)
    with pytest.raises(Rejected):
        policies.save(
            ward.database,
            ward.config,
            ward.config.policy.model_copy(update={"policy": "severity", "critical_fraction": 0.9}),
            BOB,
            "why",
            ward.now,
            7,
        )
    assert places(ward) == before


def test_verdicts_count_once_a_study_the_newest_one(ward: Ward) -> None:
    for number, (probability, said) in enumerate([(0.9, "agree"), (0.7, "over_called"), (0.1, "agree")]):
        uid = f"1.{number}"
        ward.arrive(uid)
        status = Status.POSITIVE if probability >= 0.5 else Status.NEGATIVE
        ward.judge(uid, status, probability=probability, affected_fraction=0.0)
        ward.database.reading.give_verdict(uid, "lee", ward.now, "other")
        ward.database.reading.give_verdict(uid, "lee", ward.now, said)  # type: ignore[arg-type]
    higher = ward.config.policy.model_copy(update={"positive_probability": 0.8})
    tried = policies.rehearse(ward.database, ward.config, higher, ward.now, 7)
    assert tried.verdicts == 3
    assert tried.present.sensitivity == tried.candidate.sensitivity == whatif.Rate(1, 1)
    assert tried.present.specificity == whatif.Rate(1, 2)
    assert tried.candidate.specificity == whatif.Rate(2, 2)


def test_places_are_those_of_the_list_and_bands_those_of_the_days(ward: Ward) -> None:
    ward.arrive("1.1", ago=5 * 1440)  # stands on the list since before these days
    ward.judge("1.1", Status.NEGATIVE)
    for uid, ago in (("1.2", 600), ("1.3", 400), ("1.4", 20)):
        ward.arrive(uid, ago=ago)
        ward.judge(uid, probability=0.6, affected_fraction=0.0)
    ward.database.close_study("1.3", "read", ward.now)
    assert order(ward) == ["1.1", "1.2", "1.4"]
    strict = ward.config.policy.model_copy(update={"ordering": "strict", "positive_probability": 0.7})
    tried = policies.rehearse(ward.database, ward.config, strict, ward.now, 1)
    (down,) = tried.places.examples_down
    assert (down.study_instance_uid, down.before.number, down.after.number) == ("1.1", 1, 3)
    assert (tried.places.up, tried.places.down) == (2, 1)
    assert tried.studies == tried.bands.down == 3
    save(ward, strict)
    assert order(ward) == ["1.2", "1.4", "1.1"]


def test_what_left_the_list_has_no_place(ward: Ward) -> None:
    ward.arrive("1.1", ago=20 * 1440)
    ward.judge("1.1", Status.NEGATIVE)
    for uid, ago in (("1.2", 600), ("1.3", 20)):
        ward.arrive(uid, ago=ago)
        ward.judge(uid, Status.NEGATIVE)
    strict = ward.config.policy.model_copy(update={"ordering": "strict"})
    tried = policies.rehearse(ward.database, ward.config, strict, ward.now, 30)
    assert tried.studies == 3
    assert (tried.places.up, tried.places.down) == (0, 0)


def test_rates_are_over_the_days_that_there_are(ward: Ward, monkeypatch: pytest.MonkeyPatch) -> None:
    def tried(days: int) -> whatif.Rehearsal:
        return policies.rehearse(ward.database, ward.config, ward.config.policy, ward.now, days)

    assert (tried(30).days, tried(30).cut) == (30, False)
    ward.arrive("1.1", ago=60)
    assert tried(30).days == 1  # an hour tells of no more than a day
    ward.arrive("1.2", ago=4 * 1440)
    assert (tried(30).days, tried(1).days) == (4, 1)
    ward.arrive("1.3", ago=40 * 1440)
    assert tried(30).days == 30  # few came, but they could have
    monkeypatch.setattr(policies, "MOST", 2)
    assert (tried(90).days, tried(90).studies, tried(90).cut) == (4, 2, True)


def copied(ward: Ward, count: int) -> None:
    """So many copies of a judged study, made inside the database."""
    ward.arrive("1.1")
    ward.judge("1.1")
    numbers = "WITH RECURSIVE counter(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM counter WHERE n < :count)"
    with ward.database._write() as connection:
        for table in ("study", "result"):
            names = [row[1] for row in connection.execute(text(f"PRAGMA table_info({table})"))]
            columns = ", ".join(names)
            values = columns.replace("study_instance_uid", "study_instance_uid || '.' || n")
            copy = f"{numbers} INSERT INTO {table} ({columns}) SELECT {values} FROM {table}, counter"
            connection.execute(text(f"{copy} WHERE study_instance_uid = '1.1'"), {"count": count})


def test_nobody_who_reads_the_list_waits_for_a_new_order(ward: Ward) -> None:
    copied(ward, 12_000)  # more than are read at once
    raised = ward.config.policy.model_copy(update={"severe_fraction": 0.48})
    reader = Ward(ward.config)
    with ward.database._write() as connection:  # the order is being written
        placed = list(policies.moved(reader.database, ward.config.under(raised), ward.now))
        add(connection, raised, "anna", "why", ward.now, 1)
        place(connection, placed)
        assert {p.band for p in places(reader).values()} == {Band.SEVERE}
        assert len(reader.database.worklist(ward.now, "deadline", 7, limit=50)) == 50
    assert {p.band for p in places(reader).values()} == {Band.POSITIVE}
    assert len(places(reader)) == 12_001
    reader.database.close()


def test_the_terminal_sets_and_goes_back(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("priority: {severe_fraction: 0.3}\n")

    def typed(*arguments: str) -> Result:
        return CliRunner().invoke(app, ["--config", str(tmp_path / "config.yaml"), "policy", *arguments])

    assert "# priority in config.yaml counts from the next start on" in typed("show").stdout
    settings = load(tmp_path / "config.yaml")
    policies.adopt(daemon.open_database(settings), settings, NOON)
    shown = typed("show").stdout
    assert "version 1 by config.yaml" in shown
    assert yaml.safe_load(shown)["severe_fraction"] == 0.3
    (tmp_path / "policy.yaml").write_text(shown.replace("ordering: deadline", "ordering: strict"))
    assert typed("set", str(tmp_path / "policy.yaml"), "--reason", "as the papers").exit_code == 0
    assert "ordering: strict" in typed("show").stdout
    (tmp_path / "wrong.yaml").write_text("severe_fraction: 3\n")
    wrong = typed("set", str(tmp_path / "wrong.yaml"), "--reason", "why")
    assert (wrong.exit_code, "severe_fraction = 3" in wrong.stderr) == (78, True)
    assert typed("rollback", "1").exit_code == 0
    versions = json.loads(typed("show", "--history", "--json").stdout)
    assert [one["reason"] for one in versions] == ["back to version 1", "as the papers", "the first version"]
    assert versions[0]["policy"] == versions[2]["policy"]


def test_check_says_which_version_counts(ward: Ward) -> None:
    assert check._policy(ward.config).detail.startswith("version 1 by config.yaml counts")
    save(ward, ward.config.policy.model_copy(update={"ordering": "strict"}))
    said = check._policy(ward.config)
    assert said.go
    assert "version 2 by anna counts: to try" in said.detail
    assert "does not count" in said.detail
