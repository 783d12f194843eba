"""The reading list: pages by key, filters, live changes, claims, verdicts and views; database and API."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import event

from tests.peers import free_port
from tests.test_web import Reader, row, text
from tests.web_studies import NOON, Ward, configured
from triage.db import Database
from triage.db.intake import OTHER_PATIENT_NOTE
from triage.db.reading import Claim
from triage.db.worklist import Chosen
from triage.domain import Band, Grade, Instance, Ordered, Priority, Role, Status, StudyState
from triage.errors import Rejected
from triage.passwords import token_hash
from triage.web.app import serve

DAYS = 7
ORDERINGS = ("deadline", "strict", "arrival")
API = "/api/v1"


@pytest.fixture
def ward(tmp_path: Path) -> Iterator[Ward]:
    ward = Ward(configured(tmp_path))
    yield ward
    ward.database.close()


class Caller(Reader):
    """A browser that also sends what scripts send."""

    def send(self, method: str, address: str, **asked: Any) -> httpx.Response:
        return asyncio.run(self._client.request(method, address, **asked))


def browse(ward: Ward) -> Caller:
    return Caller(ward)


def send(method: str, reader: Caller, address: str, body: Any = None) -> httpx.Response:
    return reader.send(method, f"{API}{address}", json=body)


def uids(answer: httpx.Response) -> list[str]:
    assert answer.status_code == 200, answer.text
    return [one["study_instance_uid"] for one in answer.json()["rows"]]


# --- pages by key ------------------------------------------------------------------------------

Place = tuple[Band, float, int]
PLACES = st.tuples(
    st.sampled_from(list(Band)),
    st.sampled_from([0.0, 0.25, 0.5, 1e-300]) | st.floats(0, 1),
    st.integers(1, 4),
)


class List:
    """A database whose studies have any places, and come and go."""

    def __init__(self, folder: Path) -> None:
        self.database = Database(f"sqlite:///{folder}/triage.db")
        self.database.migrate()
        self.count = 0

    def arrive(self, place: Place) -> str:
        band, score, minutes = place
        uid = f"1.{self.count}"
        due = Priority(band, score, NOON + timedelta(minutes=minutes), "")
        received = Instance(
            study_instance_uid=uid,
            series_instance_uid=f"{uid}.1",
            sop_instance_uid=f"{uid}.2",
            sop_class_uid="1.2",
            transfer_syntax_uid="1.2",
            path=Path("x"),
            digest="x",
            accession_number=f"A{self.count}",
        )
        at = NOON + timedelta(seconds=self.count // 2)  # some arrive at the same moment
        self.count += 1
        self.database.register(received, at, judgeable=True, stat=False, pending=lambda *_: due)
        return uid

    def order_stat(self, uid: str) -> None:
        critical = Priority(Band.CRITICAL, 0.0, NOON, "")
        (moved,) = self.database.hear([Ordered(f"A{uid[2:]}", True)], lambda *_: critical, NOON)
        assert moved == (uid, "was ordered STAT")

    def whole(self, ordering: str) -> list[str]:
        return [one.study.study_instance_uid for one in self.database.worklist(NOON, ordering, DAYS)]

    def pages(self, ordering: str, limit: int) -> Iterator[tuple[list[str], int]]:
        """The pages as a reader goes on, and the number of each one's first row."""
        after = None
        while True:
            page = self.database.reading.page(NOON, ordering, DAYS, Chosen(), after=after, limit=limit)
            yield [one.entry.study.study_instance_uid for one in page.rows], page.first_place
            if not page.more:
                return
            after = page.rows[-1].key


@settings(max_examples=15, deadline=None)
@given(st.lists(PLACES, max_size=12), st.sampled_from(ORDERINGS), st.integers(1, 5))
def test_pages_are_the_whole_list_in_order(
    tmp_path_factory: pytest.TempPathFactory, places: list[Place], ordering: str, limit: int
) -> None:
    listed = List(tmp_path_factory.mktemp("db"))
    for place in places:
        listed.arrive(place)
    pages = list(listed.pages(ordering, limit))
    assert list(itertools.chain(*(found for found, _ in pages))) == listed.whole(ordering)
    sizes = [len(found) for found, _ in pages]
    assert [first for _, first in pages] == [1 + sum(sizes[:number]) for number in range(len(pages))]
    assert all(size == limit for size in sizes[:-1])
    listed.database.close()


CHANGES = st.one_of(
    st.tuples(st.just("arrive"), PLACES),
    st.tuples(st.just("close"), st.integers(0, 30)),
    st.tuples(st.just("stat"), st.integers(0, 30)),
)


@settings(max_examples=15, deadline=None)
@given(
    st.lists(PLACES, min_size=2, max_size=10),
    st.sampled_from(ORDERINGS),
    st.integers(1, 4),
    st.lists(st.lists(CHANGES, max_size=2), max_size=10),
)
def test_no_study_that_stays_is_lost_or_doubled_while_others_come_and_go(
    tmp_path_factory: pytest.TempPathFactory,
    places: list[Place],
    ordering: str,
    limit: int,
    between: list[list[tuple[str, Any]]],
) -> None:
    listed = List(tmp_path_factory.mktemp("db"))
    for place in places:
        listed.arrive(place)
    before, touched, ordered, shown = listed.whole(ordering), set(), set(), []
    changes = itertools.chain(between, itertools.repeat([]))
    for found, _ in listed.pages(ordering, limit):
        shown += found
        for what, which in next(changes):
            if what == "arrive":
                listed.arrive(which)
                continue
            uid = f"1.{which % listed.count}"
            if what == "close":
                listed.database.close_study(uid, "read", NOON)
            elif uid not in ordered:
                listed.order_stat(uid)
                ordered.add(uid)
            touched.add(uid)
    stayed = [uid for uid in before if uid not in touched]
    assert [uid for uid in shown if uid in stayed] == stayed
    listed.database.close()


def test_a_page_between_two_keys_holds_what_lies_there(tmp_path: Path) -> None:
    listed = List(tmp_path)
    for minutes in (1, 1, 2, 2, 3, 3):
        listed.arrive((Band.ROUTINE, 0.0, minutes))
    kept = listed.database.reading
    rows = kept.page(NOON, "deadline", DAYS, Chosen(), limit=6).rows
    listed.arrive((Band.ROUTINE, 0.0, 2))
    page = kept.page(NOON, "deadline", DAYS, Chosen(), after=rows[1].key, until=rows[3].key, limit=2)
    assert ([one.entry.study.study_instance_uid for one in page.rows], page.more) == (["1.2", "1.3"], False)
    page = kept.page(NOON, "deadline", DAYS, Chosen(), after=rows[1].key, until=rows[4].key, limit=2)
    assert (len(page.rows), page.more, page.first_place) == (2, True, 3)
    with pytest.raises(Rejected, match="as it is ordered now"):
        kept.page(NOON, "strict", DAYS, Chosen(), after=rows[1].key, limit=2)
    listed.database.close()


@settings(max_examples=40, deadline=None)
@given(
    st.text(max_size=40)
    | st.lists(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8), max_size=5).map(
        lambda values: base64.urlsafe_b64encode(json.dumps(["deadline", *values]).encode()).decode()
    )
)
def test_no_key_breaks_the_list(shared: Ward, key: str) -> None:
    for address in (f"{API}/worklist", "/list", "/"):
        answer = browse(shared).get(address, params={"after": key})
        assert answer.status_code in (200, 409, 422), answer.text


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ward]:
    ward = Ward(configured(tmp_path_factory.mktemp("shared")))
    ward.arrive("1.1")
    yield ward
    ward.database.close()


FILTERS = {
    "none": Chosen(),
    "bands": Chosen(bands=frozenset({Band.CRITICAL, Band.ROUTINE})),
    "states": Chosen(states=frozenset({StudyState.READY})),
    "answers": Chosen(statuses=frozenset({Status.NEGATIVE, None})),
    "unclaimed": Chosen(unclaimed=True),
    "text": Chosen(text="Doe"),
    "description": Chosen(description="thorax"),
    "scanner": Chosen(scanner="force"),
    "arrived": Chosen(arrived_since=NOON),
    "overdue": Chosen(overdue=True),
}


@pytest.mark.parametrize("ordering", ORDERINGS)
def test_lists_are_read_from_indices_alone(tmp_path: Path, ordering: str) -> None:
    listed = List(tmp_path)
    for _ in range(3):
        listed.arrive((Band.ROUTINE, 0.0, 1))
    database = listed.database
    page = partial(database.reading.page, NOON, ordering, DAYS, limit=1)
    key = page(Chosen()).rows[0].key
    for name, chosen in FILTERS.items():
        (first,) = plans(database, partial(page, chosen))
        on, before = plans(database, partial(page, chosen, after=key, until=key))
        for plan in (first, on):
            assert f"USING INDEX study_by_{ordering}" in plan.steps, name
            assert "B-TREE" not in plan.steps, name
        assert not before.reads_rows, name
    (whole,) = plans(database, lambda: listed.whole(ordering))
    assert whole.steps == f"SCAN study USING INDEX study_by_{ordering}"
    (counts,) = plans(database, lambda: database.reading.counts(NOON, DAYS))
    assert not counts.reads_rows
    (by_state,) = plans(database, lambda: database.counts(NOON, DAYS))
    assert not by_state.reads_rows
    _, changes = plans(database, lambda: database.reading.changes(1, NOON, DAYS))
    assert "USING INDEX study_by_change (changed>?)" in changes.steps
    (found,) = plans(database, lambda: database.search("doe"))
    assert found.steps == "SCAN study USING INDEX study_by_day"
    database.close()


class Plan(NamedTuple):
    """How SQLite goes about a question to the table of studies."""

    steps: str
    reads_rows: bool
    """Or the index alone, where all that is asked for stands."""


def plans(database: Database, ask: Callable[[], object]) -> list[Plan]:
    asked: list[tuple[str, Any]] = []

    def note(_c: Any, _cursor: Any, statement: str, values: Any, _x: Any, _many: bool) -> None:
        asked.append((statement, values))

    event.listen(database._engine, "before_cursor_execute", note)
    ask()
    event.remove(database._engine, "before_cursor_execute", note)
    found = []
    with database._engine.connect() as connection:
        run = connection.exec_driver_sql
        table = run("SELECT rootpage FROM sqlite_master WHERE name = 'study'").scalar()
        for statement, values in asked:
            if "FROM study" in statement:
                steps = " ".join(str(row[-1]) for row in run(f"EXPLAIN QUERY PLAN {statement}", values))
                code = [row[1:4] for row in run(f"EXPLAIN {statement}", values)]
                rows = {first for name, first, second in code if (name, second) == ("OpenRead", table)}
                reads = any(name == "Column" and first in rows for name, first, _ in code)
                found.append(Plan(steps, reads))
    return found


# --- filters -------------------------------------------------------------------------------------


def test_filters_leave_the_order_and_everything_else_out(ward: Ward) -> None:
    for number in range(1, 8):
        ward.arrive(f"1.{number}", ago=60 * number, study_description="HRCT" if number < 3 else "CT Thorax")
    ward.judge("1.1")
    ward.judge("1.2", Status.NEGATIVE)
    ward.refuse("1.3", "missing slices")
    ward.fail("1.4", "out of memory", None)
    ward.arrive("1.8", patient_name="MÜLLER^EVA", accession_number="ACC-9", scanner="SIEMENS Force")
    until = NOON + timedelta(minutes=60)
    ward.database.reading.claim("1.5", "dr.lee", NOON, until)
    ward.database.reading.claim("1.6", "local", NOON, until)
    reader = browse(ward)
    expected = {
        "band=severe": {"1.1"},
        "band=severe&band=routine": {"1.1", "1.2"},
        "status=positive": {"1.1"},
        "status=negative": {"1.2"},
        "status=not_analysable&status=failed": {"1.3", "1.4"},
        "status=pending": {"1.5", "1.6", "1.7", "1.8"},
        "state=rejected": {"1.3"},
        "claimed=me": {"1.6"},
        "claimed=nobody": {"1.1", "1.2", "1.3", "1.4", "1.7", "1.8"},
        "text=eva": {"1.8"},
        "text=acc-9": {"1.8"},
        "description=hrct": {"1.1", "1.2"},
        "scanner=siemens": {"1.8"},
        "hours=2.5": {"1.1", "1.2", "1.8"},
        "overdue=true": {"1.1", "1.2", "1.3", "1.4", "1.5", "1.6", "1.7"} - {"1.2"},
        "text=%25": set(),
    }
    whole = uids(reader.get(f"{API}/worklist"))
    for query, wanted in expected.items():
        found = uids(reader.get(f"{API}/worklist?{query}"))
        assert set(found) == wanted, query
        assert found == [uid for uid in whole if uid in wanted], query
        page = reader.get(f"/?{query}")
        assert all((f'id="row-{uid}"' in page.text) is (uid in wanted) for uid in whole), query
    nobody = reader.get("/?text=nobody").text
    assert 'id="none-like-this">No open study is like this' in nobody
    assert 'id="none-at-all" hidden' in nobody
    assert reader.get(f"{API}/worklist?band=green").status_code == 422
    assert reader.get("/?band=green").status_code == 400


def test_a_claim_that_ran_out_is_no_claim(ward: Ward) -> None:
    ward.arrive("1.1")
    ward.database.reading.claim("1.1", "dr.lee", NOON, NOON + timedelta(minutes=60))
    assert "dr.lee reads it" in row(browse(ward).get("/"), "1.1")
    ward.now += timedelta(minutes=60)
    assert "dr.lee" not in row(browse(ward).get("/"), "1.1")
    assert uids(browse(ward).get(f"{API}/worklist?claimed=nobody")) == ["1.1"]


# --- claims --------------------------------------------------------------------------------------


def test_the_second_reader_sees_who_reads_and_takes_over_only_knowingly(ward: Ward) -> None:
    ward.arrive("1.1")
    ward.database.reading.claim("1.1", "dr.lee", NOON, NOON + timedelta(minutes=60))
    reader = browse(ward)
    for what in ("claim", "read"):
        refused = send("PUT", reader, f"/studies/1.1/{what}", {})
        assert refused.status_code == 409
        assert refused.json()["error"] == "dr.lee reads this study"
        assert refused.json()["claim"]["until"] == "2026-03-02T13:00:00Z"
    assert send("DELETE", reader, "/studies/1.1/claim").status_code == 404, "another's claim stays"
    for what in ("claim", "read"):
        other = send("PUT", reader, f"/studies/1.1/{what}", {"take_over": "dr.who"})
        assert (other.status_code, other.json()["claim"]["person"]) == (409, "dr.lee"), "not whom was shown"
    taken = send("PUT", reader, "/studies/1.1/claim", {"take_over": "dr.lee"})
    assert (taken.status_code, taken.json()["person"]) == (200, "local")
    standing = ward.database.reading.claim("1.1", "dr.lee", NOON, NOON + timedelta(minutes=60))
    assert standing is not None
    assert standing.person == "local", "whoever had it is told in turn"
    assert send("DELETE", reader, "/studies/1.1/claim").status_code == 204
    assert reader.get(f"{API}/studies/1.1").json()["claim"] is None


def test_claiming_again_goes_on(ward: Ward) -> None:
    ward.arrive("1.1")
    send("PUT", browse(ward), "/studies/1.1/claim", {})
    ward.now += timedelta(minutes=30)
    claim = send("PUT", browse(ward), "/studies/1.1/claim", {}).json()
    assert (claim["claimed_at"], claim["until"]) == ("2026-03-02T12:00:00Z", "2026-03-02T13:30:00Z")


def test_two_who_claim_at_once_do_not_both_have_it(ward: Ward) -> None:
    ward.arrive("1.1")
    until, together, got = NOON + timedelta(minutes=60), threading.Barrier(4), []

    def claim(person: str) -> None:
        together.wait(10)
        got.append((person, ward.database.reading.claim("1.1", person, NOON, until)))

    readers = [threading.Thread(target=claim, args=(f"dr.{number}",)) for number in range(4)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(20)
    winners = {claim.person for _, claim in got if isinstance(claim, Claim)}
    assert len(got) == 4
    assert len(winners) == 1
    assert sum(person in winners for person, _ in got) == 1


def test_what_was_read_leaves_the_list_and_can_come_back_to_its_place(ward: Ward) -> None:
    ward.arrive("1.1", stat=True)
    ward.arrive("1.2", ago=5)
    before = ward.database.entry("1.1")
    reader = browse(ward)
    send("PUT", reader, "/studies/1.1/claim", {})
    assert send("PUT", reader, "/studies/1.1/read", {}).status_code == 204
    assert uids(reader.get(f"{API}/worklist")) == ["1.2"]
    assert ward.study("1.1").closed_reason == "read by local"
    for what in ("claim", "read"):
        again = send("PUT", reader, f"/studies/1.1/{what}", {})
        assert (again.status_code, again.json()["error"]) == (
            409,
            "this study is off the list: read by local",
        )
    assert send("DELETE", reader, "/studies/1.1/read").status_code == 204
    assert send("DELETE", reader, "/studies/1.1/read").status_code == 404
    after = ward.database.entry("1.1")
    assert before is not None
    assert after is not None
    assert after.priority == before.priority, "a STAT order is never lowered"
    assert after.study == before.study
    assert reader.get(f"{API}/studies/1.1").json()["claim"] is None


def test_what_is_not_there_is_said(ward: Ward) -> None:
    reader = browse(ward)
    for method, address, body in (
        ("GET", "/studies/9.9", None),
        ("PUT", "/studies/9.9/claim", {}),
        ("DELETE", "/studies/9.9/claim", None),
        ("PUT", "/studies/9.9/read", {}),
        ("DELETE", "/studies/9.9/read", None),
        ("POST", "/studies/9.9/verdicts", {"opinion": "agree", "revision": 1}),
        ("GET", "/studies/9.9/verdicts", None),
        ("DELETE", "/views/mine", None),
        ("GET", "/nothing", None),
    ):
        answer = send(method, reader, address, body)
        assert answer.status_code == 404, address
        assert answer.json().keys() == {"error"}


def test_what_nobody_has_seen_is_not_marked_read(ward: Ward) -> None:
    ward.arrive("1.1", slices=2)
    ward.judge("1.1", Status.NEGATIVE)
    reader = browse(ward)
    assert 'data-revision="1" data-images="2"' in reader.get("/").text
    seen = {"revision": 1, "images": 2}
    ward.arrive("1.1")
    late = send("PUT", reader, "/studies/1.1/read", seen)
    assert (late.status_code, "images have come" in late.json()["error"]) == (409, True)
    ward.judge("1.1")
    late = send("PUT", reader, "/studies/1.1/read", {**seen, "images": 3})
    assert (late.status_code, "there is a newer answer" in late.json()["error"]) == (409, True)
    assert ward.study("1.1").closed_at is None
    assert send("PUT", reader, "/studies/1.1/read", {"revision": 2, "images": 3}).status_code == 204
    ward.arrive("1.2")
    assert 'data-revision="0" data-images="1"' in reader.get("/").text
    assert send("PUT", reader, "/studies/1.2/read", {"revision": 0, "images": 1}).status_code == 204


def test_a_closed_study_whose_answer_is_more_urgent_comes_back(ward: Ward) -> None:
    ward.arrive("1.1")
    ward.judge("1.1", Status.NEGATIVE)
    for status, fraction in ((Status.NEGATIVE, 0.0), (Status.POSITIVE, 0.8)):
        ward.arrive("1.1")
        ward.database.reading.mark_read("1.1", "dr.lee", NOON)
        ward.judge("1.1", status, affected_fraction=fraction, affected_right=fraction)
        is_open = ward.study("1.1").closed_at is None
        assert is_open is (status is Status.POSITIVE)
    assert "closed before this answer came, right lung 80 % affected" in row(browse(ward).get("/"), "1.1")
    assert ward.study("1.1").closed_reason == ""


def test_that_somebody_had_a_study_is_on_record_where_it_was_so(ward: Ward) -> None:
    reader, until = browse(ward), NOON + timedelta(minutes=60)
    for uid in ("1.1", "1.2", "1.3"):
        ward.arrive(uid)
    ward.database.reading.claim("1.1", "dr.lee", NOON, until)
    ward.database.reading.claim("1.2", "dr.lee", NOON, until)
    send("PUT", reader, "/studies/1.1/claim", {"take_over": "dr.lee"})
    ward.now += timedelta(minutes=5)
    send("PUT", reader, "/studies/1.1/claim", {"take_over": "dr.lee"})
    send("PUT", reader, "/studies/1.2/read", {"take_over": "dr.lee"})
    send("PUT", reader, "/studies/1.3/read", {"take_over": "dr.lee"})
    taken = base64.b64encode(b"taken over from dr.lee").decode()
    done = [one.message for one in ward.database.trail.records()]
    assert [
        ("claimed" in one, taken in one) for one in done if "claimed" in one or 'csd-code="read"' in one
    ] == [
        (True, True),
        (False, True),
        (False, False),
    ]


def test_images_of_another_patient_are_told(ward: Ward) -> None:
    ward.arrive("1.1")
    ward.arrive("1.1", patient_id="")
    assert ward.study("1.1").notes == ()
    for _ in range(2):
        ward.arrive("1.1", patient_id="SOMEBODY ELSE")
    assert ward.study("1.1").notes == (OTHER_PATIENT_NOTE,)
    assert OTHER_PATIENT_NOTE in text(browse(ward).get("/"))


# --- verdicts ------------------------------------------------------------------------------------


def test_a_verdict_keeps_what_it_was_said_of(ward: Ward) -> None:
    ward.arrive("1.1")
    reader = browse(ward)
    early = send("POST", reader, "/studies/1.1/verdicts", {"opinion": "agree", "revision": 1})
    assert (early.status_code, "no answer yet" in early.json()["error"]) == (409, True)
    ward.judge("1.1")
    given = send(
        "POST",
        reader,
        "/studies/1.1/verdicts",
        {"opinion": "over_called", "comment": " motion ", "true_grade": "CT-1", "revision": 1},
    )
    assert given.status_code == 201
    assert given.json() == {
        "opinion": "over_called",
        "comment": "motion",
        "true_grade": "CT-1",
        "person": "local",
        "given_at": "2026-03-02T12:00:00Z",
        "revision": 1,
        "status": "positive",
        "probability": 0.97,
        "band": "severe",
        "score": 0.72,
        "model": "multitask",
        "model_version": "a1b2c3d4",
        "policy_version": None,
    }
    send("POST", reader, "/studies/1.1/verdicts", {"opinion": "agree", "revision": 1})
    assert [one["opinion"] for one in reader.get(f"{API}/studies/1.1/verdicts").json()] == [
        "agree",
        "over_called",
    ]
    (kept, first) = ward.database.reading.verdicts("1.1")
    assert (kept.opinion, first.true_grade) == ("agree", Grade.CT1)
    assert "✓ Agree (local)" in row(reader.get("/"), "1.1")
    page = reader.get("/studies/1.1").text
    assert "↓ Over-called (local), truly CT-1" in page
    assert "motion" in page
    ward.arrive("1.1")
    ward.judge("1.1", Status.NEGATIVE)
    assert "✓ Agree (local), of an earlier answer" in row(reader.get("/"), "1.1")
    late = send("POST", reader, "/studies/1.1/verdicts", {"opinion": "agree", "revision": 1})
    assert (late.status_code, "there is a newer answer" in late.json()["error"]) == (409, True)
    assert len(ward.database.reading.verdicts("1.1")) == 2


def test_a_verdict_names_the_policy_that_ordered(ward: Ward) -> None:
    ward.arrive("1.1")
    ward.judge("1.1")
    version = ward.database.add_policy(ward.config.policy, "ada", "first", NOON, 0, (), ())
    given = send(
        "POST", browse(ward), "/studies/1.1/verdicts", {"opinion": "wrong_organ", "revision": 1}
    ).json()
    assert given["policy_version"] == version.version


@pytest.mark.parametrize(
    "said",
    [
        {"revision": 1},
        {"opinion": "agree"},
        {"opinion": "maybe", "revision": 1},
        {"opinion": "agree", "revision": 1, "true_grade": "CT-9"},
        {"opinion": "agree", "revision": 1, "x": 1},
    ],
)
def test_a_verdict_that_says_nothing_known_is_refused(ward: Ward, said: dict[str, Any]) -> None:
    ward.arrive("1.1")
    ward.judge("1.1")
    answer = send("POST", browse(ward), "/studies/1.1/verdicts", said)
    assert (answer.status_code, list(answer.json())) == (422, ["error"])
    assert ward.database.reading.verdicts("1.1") == []


# --- views ---------------------------------------------------------------------------------------


def test_views_are_a_persons_own(ward: Ward) -> None:
    reader, filters = browse(ward), {"band": ["critical", "severe"], "text": "Żółć & Co", "hours": 12}
    saved = send("PUT", reader, "/views/Night%20%26%20day", {"filters": filters}).json()
    assert saved["query"] == "band=critical&band=severe&text=%C5%BB%C3%B3%C5%82%C4%87+%26+Co&hours=12"
    ward.database.reading.save_view("dr.lee", "mine", "claimed=me")
    (view,) = reader.get(f"{API}/views").json()
    assert (view["name"], view["filters"]["text"]) == ("Night & day", "Żółć & Co")
    page = reader.get(f"/?{saved['query']}").text
    assert 'aria-current="page"><bdi>Night &amp; day</bdi>' in page
    assert "mine" not in page.split('id="views"')[1].split("</nav>")[0]
    send("PUT", reader, "/views/Night%20%26%20day", {"filters": {}})
    assert [one["query"] for one in reader.get(f"{API}/views").json()] == [""]
    assert send("DELETE", reader, "/views/Night%20%26%20day").status_code == 204
    assert ward.database.reading.views("dr.lee") == {"mine": "claimed=me"}


# --- live ----------------------------------------------------------------------------------------


def test_every_change_that_the_list_shows_has_a_new_version(ward: Ward) -> None:
    kept, until = ward.database.reading, NOON + timedelta(minutes=60)
    steps = [
        lambda: ward.arrive("1.1"),
        lambda: ward.judge("1.1", to=("PACS",)),
        lambda: ward.database.mark_sent(1, NOON),
        lambda: kept.claim("1.1", "dr.lee", NOON, until),
        lambda: kept.release("1.1", "dr.lee"),
        lambda: kept.give_verdict("1.1", "dr.lee", NOON, "agree"),
        lambda: kept.mark_read("1.1", "dr.lee", NOON),
        lambda: kept.mark_unread("1.1"),
        lambda: ward.database.requeue("1.1", NOON, ward.waiting),
    ]
    versions = [kept.changes(0, NOON, DAYS).version]
    for step in steps:
        step()
        versions.append(kept.changes(0, NOON, DAYS).version)
    assert versions == sorted(set(versions))
    kept.save_view("dr.lee", "mine", "")
    assert kept.changes(0, NOON, DAYS).version == versions[-1], "what nobody sees is no change"


def test_changes_name_the_critical_studies_that_changed(ward: Ward) -> None:
    ward.arrive("1.1", stat=True)
    ward.arrive("1.2")
    first = browse(ward).get(f"{API}/worklist/changes").json()
    assert first["critical"] == ["1.1"], "no word of why: that is read, and recorded, on the list"
    ward.judge("1.2", affected_fraction=0.8, affected_right=0.8)
    then = browse(ward).get(f"{API}/worklist/changes?since={first['version']}").json()
    assert then["critical"] == ["1.2"]
    assert browse(ward).get(f"{API}/worklist/changes?since={then['version']}").json()["critical"] == []


def test_changes_are_told_as_they_happen_and_the_stream_ends_with_the_server(tmp_path: Path) -> None:
    ward, stop = Ward(configured(tmp_path, port=free_port())), threading.Event()
    server = threading.Thread(target=serve, args=(ward.database, ward.config, ward.clock, stop))
    server.start()
    address = f"http://127.0.0.1:{ward.config.web.port}{API}/worklist/events"
    with (
        httpx.Client(transport=httpx.HTTPTransport(retries=8), timeout=20) as client,
        client.stream("GET", address, headers={"Last-Event-ID": "0"}) as stream,
    ):
        assert stream.headers["content-type"] == "text/event-stream; charset=utf-8"
        lines = stream.iter_lines()
        assert next(lines) == ": nothing new"
        ward.arrive("1.1", stat=True)
        told = next(line for line in lines if line.startswith("data: "))
        assert json.loads(told[6:])["critical"] == ["1.1"]
        stop.set()
        assert all(not line.startswith("data: ") for line in lines)
    server.join(20)
    assert not server.is_alive()
    ward.database.close()


def test_the_stream_ends_when_its_reader_logs_out(tmp_path: Path) -> None:
    ward, stop = Ward(configured(tmp_path, port=free_port())), threading.Event()
    assert ward.database.people.add_user("jane", Role.VIEWER, "", ward.now, [])
    ward.database.people.log_in("jane", "", token_hash("secret"), ward.now, [])
    server = threading.Thread(target=serve, args=(ward.database, ward.config, ward.clock, stop))
    server.start()
    address = f"http://127.0.0.1:{ward.config.web.port}{API}/worklist/events"
    headers = {"Accept": "text/event-stream", "Cookie": "triage_session=secret"}
    with httpx.Client(transport=httpx.HTTPTransport(retries=8), timeout=20) as client:
        with client.stream("GET", address, headers=headers) as stream:
            lines = stream.iter_lines()
            assert next(lines) == ": nothing new"
            ward.database.people.log_out(token_hash("secret"), [])
            assert [line for line in lines if line] == []
        assert client.get(address, headers=headers).status_code == 401
    stop.set()
    server.join(20)
    ward.database.close()


# --- the API as a whole --------------------------------------------------------------------------


def test_the_api_describes_itself_and_has_no_page_of_other_hosts(ward: Ward) -> None:
    described = browse(ward).get(f"{API}/openapi.json").json()
    assert {"/worklist", "/studies/{study_instance_uid}/claim", "/views/{name}"} <= described["paths"].keys()
    assert browse(ward).get(f"{API}/docs").status_code == 404


def test_the_api_gives_the_list_with_what_its_page_shows(ward: Ward) -> None:
    ward.arrive("1.1", ago=30, accession_number="ACC-9")
    ward.judge("1.1", picture=ward.png(), to=("PACS",))
    found = browse(ward).get(f"{API}/worklist").json()
    assert (found["ordering"], found["first_place"], found["next"]) == ("deadline", 1, None)
    (one,) = found["rows"]
    expected = {
        "band": "severe",
        "waited_minutes": 30.0,
        "overdue": True,
        "due_at": "2026-03-02T12:00:00Z",
        "patient_name": "DOE^JANE",
        "accession_number": "ACC-9",
        "affected_left": 0.12,
        "affected_right": 0.47,
        "grade": "CT-2",
        "reason": "right lung 47 % affected, score 0.97",
        "thumbnail": "/pictures/1.1.png?revision=1",
        "claim": None,
    }
    assert expected.items() <= one.items()
    assert one["deliveries"]["pending"] == 2


def test_the_list_goes_on_where_the_page_ends(ward: Ward, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triage.web.reading.PIECE", 2)
    for number in range(5):
        ward.arrive(f"1.{number}", ago=10 - number)
    reader, address, seen = browse(ward), "/", []
    while address:
        page = reader.get(address).text
        seen.append([f"1.{number}" for number in range(5) if f'id="row-1.{number}"' in page])
        following = page.split('rel="next" href="')[1].split('"')[0]
        address = following if 'id="more" class="more" hidden' not in page else ""
    assert seen == [["1.0", "1.1"], ["1.2", "1.3"], ["1.4"]]


def test_the_plain_list_says_where_it_goes_on(ward: Ward, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triage.web.app.LONGEST_LIST", 2)
    for number in range(3):
        ward.arrive(f"1.{number}", ago=10 - number)
    head = browse(ward).get("/api/worklist")
    assert [one["study_instance_uid"] for one in head.json()] == ["1.0", "1.1"]
    assert uids(browse(ward).get(head.links["next"]["url"])) == ["1.2"]
    ward.database.close_study("1.2", "read", NOON)
    assert browse(ward).get("/api/worklist").links == {}


def test_what_is_overdue_is_so_everywhere(ward: Ward) -> None:
    ward.arrive("1.1")
    ward.now = ward.study("1.1").arrived_at + timedelta(
        minutes=ward.config.priority.target_wait_minutes.not_judged
    )
    reader = browse(ward)
    assert uids(reader.get(f"{API}/worklist?overdue=true")) == ["1.1"]
    assert reader.get(f"{API}/studies/1.1").json()["overdue"] is True
    ward.database.close_study("1.1", "read", ward.now)
    assert reader.get(f"{API}/studies/1.1").json()["overdue"] is False
