"""The pages of the policy and of monitoring, and their JSON, over a real database."""

from __future__ import annotations

import re
import sqlite3
from base64 import b64encode
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2

from tests.test_reading import Caller, browse
from tests.test_web import text
from tests.web_studies import Ward, configured
from triage import drift, policies
from triage.domain import Band, Status
from triage.web.monitoring import bars, lines
from triage.web.policy import FIELDS, flat, read


@pytest.fixture
def ward(tmp_path: Path) -> Iterator[Ward]:
    ward = Ward(configured(tmp_path))
    policies.adopt(ward.database, ward.config, ward.now)
    yield ward
    ward.database.close()


def post(reader: Caller, address: str, **fields: Any) -> Any:
    return reader.send("POST", address, data=fields, follow_redirects=False)


def form(ward: Ward, **changed: Any) -> dict[str, Any]:
    newest = ward.database.policy()
    assert newest is not None
    return {**flat(newest.policy), "after": newest.version, **changed}


def band(ward: Ward, uid: str) -> Band:
    entry = ward.database.entry(uid)
    assert entry is not None
    return entry.priority.band


# --- the policy ------------------------------------------------------------------------------------


def test_the_threshold_is_tried_then_saved_then_taken_back(ward: Ward) -> None:
    ward.arrive("1.1", ago=120, accession_number="A77")
    ward.judge("1.1", Status.POSITIVE, probability=0.55, affected_fraction=0.0)
    reader = browse(ward)
    assert "What it would have done" not in text(reader.get("/policy"))

    tried = text(reader.get("/policy", params={"positive_probability": "0.7"}))  # the rest as it is
    assert "Flag from probability 0.5 → 0.7" in tried
    assert "Studies of these days filed less urgently: 1" in tried
    assert "A77" in tried
    assert band(ward, "1.1") is Band.POSITIVE  # nothing changes before it is saved

    saved = post(reader, "/policy", **form(ward, positive_probability="0.7", reason="too many flags"))
    assert (saved.status_code, saved.headers["location"]) == (303, "/policy")
    assert band(ward, "1.1") is Band.INDETERMINATE
    page = text(reader.get("/policy"))
    assert "Version 2 by local counts" in page
    assert "too many flags" in page

    back = post(reader, "/policy/roll-back", version=1, after=2)
    assert back.status_code == 303
    assert band(ward, "1.1") is Band.POSITIVE
    assert "back to version 1" in text(reader.get("/policy"))


def test_what_is_wrong_is_named_as_the_page_calls_it(ward: Ward) -> None:
    reader = browse(ward)
    for changed, said in (
        ({"positive_probability": "2"}, "Flag from probability: Input should be less than or equal to 1"),
        ({"severe_fraction": "0.9"}, "fractions must grow"),
        ({"target_wait_minutes.critical": "inf"}, "Critical: Input should be less than or equal to 525600"),
        ({"ordering": "newest"}, "Order: Input should be 'deadline' or 'strict'"),
    ):
        assert said in text(reader.get("/policy", params={**flat(ward.config.policy), **changed}))
        assert post(reader, "/policy", **form(ward, **changed, reason="why")).status_code == 400
    assert post(reader, "/policy", **form(ward, reason=" ")).status_code == 409
    assert post(reader, "/policy", **form(ward, reason="why", after="x")).status_code == 400
    assert post(reader, "/policy/roll-back", version=9, after=1).status_code == 409
    assert len(ward.database.policies(9)) == 1


def test_two_admins_do_not_overwrite_each_other(ward: Ward) -> None:
    reader, first = browse(ward), form(ward, ordering="strict", reason="one")
    assert post(reader, "/policy", **first).status_code == 303
    refused = post(reader, "/policy", **{**first, "reason": "two"})
    assert refused.status_code == 409
    assert "Version 2 was saved in the meantime" in text(refused)


def test_the_form_has_every_setting_of_a_policy(ward: Ward) -> None:
    assert {field.name for field in FIELDS} == set(flat(ward.config.policy))
    page = reader_page(ward)
    for field in FIELDS:
        assert re.search(rf'name="{re.escape(field.name)}"', page)


def reader_page(ward: Ward) -> str:
    return str(browse(ward).get("/policy").text)


def test_shadow_mode_is_told(ward: Ward) -> None:
    assert "Shadow mode is on" not in text(browse(ward).get("/policy"))
    ward.config = ward.config.model_copy(update={"shadow": True})
    told = text(browse(ward).get("/policy"))
    assert "in order of arrival and nothing is sent" in told


def test_in_shadow_mode_no_critical_study_calls(ward: Ward) -> None:
    ward.arrive("1.1")
    ward.judge("1.1", affected_fraction=0.6)
    assert band(ward, "1.1") is Band.CRITICAL
    address = "/api/v1/worklist/changes"
    live = browse(ward).get(address).json()
    assert len(live["critical"]) == 1
    ward.config = ward.config.model_copy(update={"shadow": True})
    assert browse(ward).get(address).json() == {**live, "critical": []}


def test_the_list_follows_a_new_ordering_at_once(ward: Ward) -> None:
    for uid, ago, probability in (("1.1", 500, 0.1), ("1.2", 5, 0.97)):
        ward.arrive(uid, ago=ago)
        ward.judge(
            uid,
            Status.POSITIVE if probability > 0.5 else Status.NEGATIVE,
            probability=probability,
            affected_fraction=0.0,
        )
    reader = browse(ward)
    assert re.findall(r'id="row-([\d.]+)"', reader.get("/").text) == ["1.1", "1.2"]
    post(reader, "/policy", **form(ward, ordering="strict", reason="as the papers draw it"))
    assert re.findall(r'id="row-([\d.]+)"', reader.get("/").text) == ["1.2", "1.1"]


def test_the_api_does_what_the_page_does(ward: Ward) -> None:
    ward.arrive("1.1", ago=60)
    ward.judge("1.1", Status.POSITIVE, probability=0.55, affected_fraction=0.0)
    reader = browse(ward)

    def send(method: str, address: str, body: Any = None) -> Any:
        return reader.send(method, f"/api/v1/policy{address}", json=body)

    assert send("GET", "").json()["version"] == 1
    raised = {"positive_probability": 0.7}
    tried = send("POST", "/what-if", {"policy": raised, "days": 7}).json()
    assert (tried["present"]["flagged"], tried["candidate"]["flagged"]) == (1, 0)
    assert tried["present"]["bands"] == {"positive": 1}
    (down,) = tried["bands"]["examples_down"]
    assert (down["study_instance_uid"], down["after"]["band"]) == ("1.1", "indeterminate")
    saved = send("PUT", "", {"policy": raised, "reason": "quieter", "after": 1})
    assert (saved.status_code, saved.json()["version"], saved.json()["author"]) == (200, 2, "local")
    assert band(ward, "1.1") is Band.INDETERMINATE
    assert send("PUT", "", {"policy": raised, "reason": "again", "after": 1}).status_code == 409
    assert send("PUT", "", {"policy": raised, "reason": " ", "after": 2}).status_code == 422
    assert send("PUT", "", {"policy": {"flag": 1}, "reason": "x", "after": 2}).status_code == 422
    assert send("POST", "/roll-back", {"version": 7, "after": 2}).status_code == 404
    assert send("POST", "/roll-back", {"version": 1, "after": 2}).json()["version"] == 3
    assert [one["version"] for one in send("GET", "/versions").json()] == [3, 2, 1]
    described = reader.get("/api/v1/openapi.json").json()["paths"]
    assert {"/policy", "/policy/versions", "/policy/what-if", "/policy/roll-back"} <= set(described)


def test_changes_and_examples_seen_are_on_record(ward: Ward) -> None:
    ward.arrive("1.1", ago=60)
    ward.judge("1.1", Status.POSITIVE, probability=0.55, affected_fraction=0.0)
    reader = browse(ward)
    reader.get("/policy", params={**flat(ward.config.policy), "positive_probability": "0.7"})
    post(reader, "/policy", **form(ward, positive_probability="0.7", reason="quieter"))
    trail = " ".join(record.message for record in ward.database.trail.records())
    assert "P1.1" in trail
    assert b64encode(b"policy version 2: quieter").decode() in trail


@pytest.mark.parametrize("json", [False, True])
def test_a_change_that_cannot_be_recorded_is_not_made(ward: Ward, json: bool) -> None:
    ward.arrive("1.1", ago=60)
    ward.judge("1.1", Status.POSITIVE, probability=0.55, affected_fraction=0.0)
    reader = browse(ward)
    with closing(sqlite3.connect(ward.config.database.file)) as file, file:
        file.execute("CREATE TRIGGER full BEFORE INSERT ON audit BEGIN SELECT RAISE(ABORT, 'full'); END")
    if json:
        wanted = {"policy": {"positive_probability": 0.7}, "reason": "quieter", "after": 1}
        answer = reader.send("PUT", "/api/v1/policy", json=wanted)
    else:
        answer = post(reader, "/policy", **form(ward, positive_probability="0.7", reason="quieter"))
    assert answer.status_code == 503
    assert len(ward.database.policies(9)) == 1
    assert band(ward, "1.1") is Band.POSITIVE


def test_the_page_says_over_what_its_rates_are(ward: Ward, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(4):
        ward.arrive(f"1.{number}", ago=2 * 1440)
        ward.judge(f"1.{number}")
    reader, changed = browse(ward), {"positive_probability": "0.7"}
    tried = text(reader.get("/policy", params=changed))
    assert "2.0 a day 4 studies" in tried
    assert "There were none before: rates are over 2.0 days." in tried
    monkeypatch.setattr(policies, "MOST", 4)
    assert "only the newest 4 are looked at, those of 2.0 days." in text(
        reader.get("/policy", params=changed)
    )


def test_a_form_keeps_every_figure(ward: Ward) -> None:
    fine = ward.config.policy.model_copy(update={"positive_probability": 0.51234567})
    assert read(flat(fine)) == fine


# --- monitoring ------------------------------------------------------------------------------------


def test_monitoring_tells_what_happened(ward: Ward) -> None:
    reader = browse(ward)
    assert "Every study got one." in text(reader.get("/monitoring"))
    for number in range(4):
        ward.arrive(f"1.{number}", ago=10)
    ward.judge("1.0", to=("PACS",))
    ward.judge("1.1", to=("PACS",))
    ward.refuse("1.2", "no axial CT series")
    ward.arrive("1.4", ago=5)
    ward.database.mark_ready(ward.study("1.4"))
    page = text(reader.get("/monitoring"))
    assert re.search(r"ready 1 .*oldest that waits since", page)
    assert re.search(r"2026-03-02 5 2 1 10\.0 min p95 10\.0 min, of 3", page)
    assert re.search(r"no axial CT series ⊘ not analysable 1", page)
    assert re.search(r"PACS 0 4 0 –", page)
    assert re.search(r"receiving 1 ", page)
    assert "too few studies" in page
    told = reader.get("/api/v1/monitoring", params={"days": 7}).json()
    assert told["history"][-1]["arrived"] == 5
    assert told["history"][-1]["times"]["p50"] == "PT10M"
    assert told["failures"] == [{"status": "not_analysable", "reason": "no axial CT series", "count": 1}]
    assert told["drifts"]["all studies"][0]["index"] is None
    assert reader.get("/api/v1/monitoring", params={"days": 99}).status_code == 422


def test_drift_by_scanner_alarms_where_scores_moved(ward: Ward) -> None:
    now = ward.now
    for number in range(88):
        ward.now = now - timedelta(days=20 if number < 44 else 2)
        scanner = "GE Revolution" if number % 2 else "SIEMENS Force"
        score = 0.85 if number >= 44 and scanner == "GE Revolution" else 0.15
        ward.arrive(f"1.{number}", scanner=scanner, convolution_kernel="B70f", slice_thickness=1.0)
        ward.judge(f"1.{number}", Status.POSITIVE, probability=score, affected_fraction=0.0)
    ward.now = now
    page = text(browse(ward).get("/monitoring"))
    assert re.search(r"GE Revolution 22, 22 ⚠ [\d.]+ changed", page)
    assert re.search(r"SIEMENS Force 22, 22 ✓ 0\.00 ", page)


@given(st.lists(st.floats(0, 1), max_size=300))
def test_the_same_scores_have_not_drifted(scores: list[float]) -> None:
    found = drift.measure("all", scores, scores)
    assert found.index is None or found.index == pytest.approx(0)
    assert not found.alarm


def test_the_index_is_the_textbooks() -> None:
    """Two bins of 400 and 600 studies that became 600 and 400: (0.6 − 0.4) ln(0.6 / 0.4) twice."""
    found = drift.measure("all", [0.1] * 400 + [0.9] * 600, [0.1] * 600 + [0.9] * 400)
    assert found.index == pytest.approx(0.1622, abs=5e-4)
    assert not found.alarm
    assert drift.measure("all", [0.1] * 2, [0.9] * 2).index is None  # chance alone could do that
    assert drift.measure("all", [], [0.9] * 100).index is None


@pytest.mark.parametrize("spread", [(1, 1), (0.5, 0.5), (0.4, 2), (2, 5), (0.1, 0.1)])
@pytest.mark.parametrize("count", [20, 30, 50, 75, 100])
def test_chance_alone_seldom_alarms(count: int, spread: tuple[float, float]) -> None:
    """Scores of both periods from one distribution, two thousand times: at most 2 % alarms."""
    chance = np.random.default_rng(7)
    periods = chance.beta(*spread, size=(2000, 2, count))
    assert sum(drift.measure("all", before, now).alarm for before, now in periods) <= 40


@given(st.integers(1, 9))
def test_the_limit_of_chance_is_the_quantile_of_chi_squared(degrees: int) -> None:
    assert drift._chi_squared(degrees) == pytest.approx(chi2.ppf(0.99, degrees), rel=0.01)


def test_only_one_network_and_the_newest_answers_are_compared(ward: Ward) -> None:
    """Another network before, and studies judged again, are no drift of this network's scores."""
    now = ward.now
    for number in range(24):
        ward.now = now - timedelta(days=20)
        ward.arrive(f"1.{number}")
        ward.judge(f"1.{number}", probability=0.95, model_version="older")
        if number < 12:
            ward.judge(f"1.{number}", probability=0.15, model_version="newer")
        ward.now = now - timedelta(days=2)
        if number < 4:
            ward.arrive(f"1.{number}", 2)
            ward.judge(f"1.{number}", probability=0.15, model_version="newer")
        ward.arrive(f"2.{number}")
        ward.judge(f"2.{number}", probability=0.15, model_version="newer")
    ward.now = now
    reader = browse(ward)
    told = reader.get("/api/v1/monitoring", params={"days": 7}).json()
    (found,) = told["drifts"]["all studies"]
    assert told["model"] == "multitask newer"
    assert (sum(found["baseline"]), sum(found["recent"])) == (8, 28)
    assert found["baseline"][9] == 0
    assert "Only answers of multitask newer, which judged last, are compared" in text(
        reader.get("/monitoring")
    )


def test_shapes_of_charts() -> None:
    assert [bar.height for bar in bars([("a", 0), ("b", 2), ("c", 4)])] == [0, 60, 120]
    assert bars([("a", 0)])[0].height == 0
    assert [part.count(",") for part in lines([0.5, 0.5, None, 1.0])] == [3, 2]
    assert lines([None, None]) == []
