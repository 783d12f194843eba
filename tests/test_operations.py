"""What operators watch: health, metrics, and that alert rules, dashboard and units fit what there is."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from tests.boxes import Boxes
from tests.test_web import TOKEN, browse, guarded
from tests.web_studies import Ward, configured
from triage import config, daemon, models
from triage.config import Storage
from triage.domain import Status
from triage.errors import ConfigError
from triage.web.health import disk

DEPLOY = Path(__file__).parents[1] / "deploy"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
BEARER = {"Authorization": f"Bearer {TOKEN}"}
NAME = re.compile(r"\btriage_[a-z_]+")


@pytest.fixture
def ward(tmp_path: Path) -> Iterator[Ward]:
    ward = Ward(configured(tmp_path))
    ward.config = ward.config.model_copy(
        update={"storage": Storage(spool=tmp_path / "spool", minimum_free_gb=0)}
    )
    yield ward
    ward.database.close()


def all_alive(ward: Ward) -> None:
    ward.config.storage.spool.mkdir(exist_ok=True)
    for role in ward.config.roles:
        ward.database.roles.started(role, ward.now)


class TestHealth:
    def test_ready_is_when_database_spool_and_roles_are(self, ward: Ward) -> None:
        reader = browse(ward)
        missing = reader.get("/health/ready")
        assert missing.status_code == 503
        assert len(missing.json()["problems"]) == 5, "the spool, and four roles"
        all_alive(ward)
        answer = reader.get("/health/ready")
        alive = dict.fromkeys(("listener", "clerk", "analyzer", "web"), "alive")
        assert (answer.status_code, answer.json()) == (
            200,
            {"ok": True, "problems": [], "warnings": [], "roles": alive},
        )

    def test_who_is_silent_is_named_and_who_stopped_in_order(self, ward: Ward) -> None:
        all_alive(ward)
        ward.now += timedelta(minutes=3)
        for role in ("clerk", "web"):
            ward.database.roles.beat(role, ward.now, {})
        ward.database.roles.beat("listener", None, {})
        reader = browse(ward)
        answer = reader.get("/health/ready").json()
        assert answer["problems"] == [
            "listener: stopped, nothing is received.",
            f"analyzer: {answer['roles']['analyzer']}, nothing is judged.",
        ]
        assert "silent since" in answer["roles"]["analyzer"]
        assert "The analyzer is silent since" in reader.get("/").text, "the page's banner"

    def test_warnings_come_early(self, ward: Ward, tmp_path: Path) -> None:
        all_alive(ward)
        free = disk(ward.config).free / 1024**3
        storage = Storage(spool=ward.config.storage.spool, minimum_free_gb=free / 2, warning_free_gb=free * 2)
        ward.config = ward.config.model_copy(update={"storage": storage})
        ward.arrive("1.1", ago=60)
        ward.claim("1.1")
        answer = browse(ward).get("/health/ready")
        assert answer.status_code == 200
        full, waiting = answer.json()["warnings"]
        assert "nearly full" in full
        assert "wait for analysis" in waiting
        with pytest.raises(ConfigError, match="warning_free_gb"):
            config.parse({"storage": {"minimum_free_gb": 10, "warning_free_gb": 5}})
        assert Storage(minimum_free_gb=10).warned_gb == 20

    def test_a_gpu_that_is_gone_is_said(self, ward: Ward, monkeypatch: pytest.MonkeyPatch) -> None:
        all_alive(ward)
        reader, stop = browse(ward), threading.Event()
        stop.set()
        monkeypatch.setattr(daemon, "open_database", lambda _: ward.database)

        def told_after_a_start_on(device: str, wanted: str = "auto") -> bool:
            monkeypatch.setattr(models, "load", lambda _: Boxes(settings={"device": device}))
            analysis = ward.config.analysis.model_copy(update={"device": wanted})
            daemon.run_analyzer(ward.config.model_copy(update={"analysis": analysis}), stop)
            said = "judged on the CPU" in "".join(reader.get("/health/ready").json()["warnings"])
            assert said == ("judged on the CPU" in reader.get("/").text), "the page's banner"
            return said

        assert not told_after_a_start_on("cpu"), "there never was one"
        assert not told_after_a_start_on("cuda")
        assert told_after_a_start_on("cpu")
        assert told_after_a_start_on("cpu"), "it still is gone"
        assert not told_after_a_start_on("cuda")
        assert told_after_a_start_on("cpu")
        assert not told_after_a_start_on("cpu", wanted="cpu")

    def test_without_a_database_it_lives_but_is_not_ready(self, ward: Ward) -> None:
        reader = browse(ward)
        with ward.database._write() as connection:
            connection.exec_driver_sql("DROP TABLE role")
        ready = reader.get("/health/ready")
        assert (ready.status_code, ready.json()["problems"]) == (503, ["The database does not answer."])
        ward.database.close()
        ward.config.database.file.write_bytes(b"no database" * 1000)
        assert reader.get("/health/ready").status_code == 503
        assert reader.get("/health/live").json() == {"ok": True}

    def test_nothing_of_a_patient_is_told(self, ward: Ward) -> None:
        guarded(ward)
        ward.arrive("1.1", patient_name="ROE^RICHARD", ago=300)
        reader = browse(ward)
        for address in ("/health/live", "/health/ready", "/healthz"):
            told = reader.get(address)
            assert "ROE" not in told.text
            assert told.status_code in (200, 503), "no log-in"


def scraped(answer: httpx.Response) -> dict[tuple[str, ...], float]:
    """Every sample by its name and the values of its labels."""
    assert answer.status_code == 200
    samples: list[Sample] = [s for f in text_string_to_metric_families(answer.text) for s in f.samples]
    return {(s.name, *s.labels.values()): s.value for s in samples}


def fill(ward: Ward) -> None:
    """One study in each queue, something owed in each state, and something refused."""
    all_alive(ward)
    for uid in ("1.1", "1.2", "1.3", "1.4"):
        ward.arrive(uid, ago=10)
    ward.judge("1.1", to=("PACS", "RIS"))
    ward.refuse("1.2", "too few slices")
    ward.fail("1.3", "an error", None)
    first, second, third, _ = ward.database.deliveries("1.1")
    ward.database.mark_sent(first.delivery_id, ward.now + timedelta(seconds=4))
    ward.database.give_up(second.delivery_id, "no")
    ward.database.postpone(third.delivery_id, "away", ward.now, away=True)
    ward.database.roles.beat("listener", ward.now, {("refused", "out of resources"): 2})
    ward.database.roles.beat("clerk", ward.now, {("step", "retried"): 1})


class TestMetrics:
    def test_they_are_for_who_may_read(self, ward: Ward) -> None:
        reader = guarded(ward)
        assert reader.get("/metrics").status_code == 401
        assert "form" not in reader.get("/metrics").text
        assert reader.get("/metrics", headers=BEARER).status_code == 200

    def test_every_queue_time_and_failure(self, ward: Ward) -> None:
        reader = browse(ward)
        assert ("triage_wait_seconds_count",) in scraped(reader.get("/metrics"))
        fill(ward)
        found = scraped(reader.get("/metrics"))
        expected = {
            ("triage_studies", "receiving"): 1,
            ("triage_studies", "analyzed"): 1,
            ("triage_studies", "rejected"): 1,
            ("triage_studies", "failed"): 1,
            ("triage_studies_given_up",): 1,
            ("triage_deliveries", "PACS", "given_up"): 1,
            ("triage_deliveries", "RIS", "pending"): 2,
            ("triage_deliveries_retried", "RIS"): 1,
            ("triage_results_total", "positive"): 1,
            ("triage_results_total", "negative"): 0,
            ("triage_results_total", "not_analysable"): 1,
            ("triage_results_total", "failed"): 1,
            ("triage_wait_seconds_count",): 3,
            ("triage_wait_seconds_sum",): 3 * 600,
            ("triage_receive_seconds_count",): 3,
            ("triage_judge_seconds_sum", "network"): 5.1,
            ("triage_delivery_seconds_sum", "PACS"): 4,
            ("triage_refused_objects_total", "out of resources"): 2,
            ("triage_step_failures_total", "retried"): 1,
            ("triage_role_up", "analyzer"): 1,
            ("triage_role_starts_total", "listener"): 1,
            ("triage_ready",): 1,
            ("triage_oldest_waiting_seconds",): 0,
        }
        assert {key: found.get(key) for key in expected} == expected
        assert found["triage_disk_free_bytes",] > 0
        assert found["triage_database_bytes",] > 0
        again = scraped(reader.get("/metrics"))
        assert again["triage_results_total", "positive"] == 1, "each answer counts once"
        assert again["triage_delivery_seconds_count", "PACS"] == 1
        ward.arrive("1.5", ago=1)
        ward.judge("1.5", Status.NEGATIVE)
        assert scraped(reader.get("/metrics"))["triage_results_total", "negative"] == 1

    def test_alerts_and_dashboard_name_what_there_is(self, ward: Ward) -> None:
        reader = browse(ward)
        reader.get("/metrics")
        fill(ward)
        answer = reader.get("/metrics")
        there = {key[0] for key in scraped(answer)}
        assert "DOE" not in answer.text
        rules = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())
        (group,) = rules["groups"]
        for rule in group["rules"]:
            assert rule["labels"]["severity"] in ("page", "ticket")
            assert {"summary", "description"} == set(rule["annotations"])
            assert "up{" in rule["expr"] or NAME.search(rule["expr"])
            assert set(NAME.findall(rule["expr"])) <= there, rule["alert"]
        dashboard = json.loads((DEPLOY / "grafana" / "triage.json").read_text())
        shown = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
        assert len(shown) > 20
        assert {name for expression in shown for name in NAME.findall(expression)} <= there
        for expression in (*shown, *(rule["expr"] for rule in group["rules"])):
            assert [expression.count(one) for one in "([{"] == [expression.count(one) for one in ")]}"]

    def test_prometheus_reads_the_rules(self) -> None:
        """Where its tool is at hand."""
        if promtool := shutil.which("promtool"):
            subprocess.run([promtool, "check", "rules", DEPLOY / "prometheus" / "alerts.yml"], check=True)


class TestUnits:
    @pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
    def test_they_are_watched_and_end_in_time(self, unit: Path) -> None:
        lines = unit.read_text().splitlines()
        assert {"Type=notify", "WatchdogSec=120", "TimeoutStopSec=35", "NotifyAccess=main"} <= set(lines)

    @pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
    def test_they_give_away_what_they_can(self, unit: Path) -> None:
        """Where systemd's tool is at hand: an exposure of 2.5 at most."""
        if analyze := shutil.which("systemd-analyze"):
            command = [analyze, "security", "--offline=true", "--threshold=25", unit]
            told = subprocess.run(command, capture_output=True, text=True, check=False)
            assert told.returncode == 0, told.stdout[-200:] + told.stderr
