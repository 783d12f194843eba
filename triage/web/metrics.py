"""``/metrics`` in Prometheus's format: every queue, time and failure, and never anything of a patient.

What all processes do stands in the database, and is read from it when somebody asks: counts by an index, and
the answers and deliveries of the last hour, each of which is observed once, from the first request on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable, Iterator
from datetime import datetime, timedelta
from typing import Protocol, TypeVar

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from triage import __version__
from triage.config import Config
from triage.db import Database
from triage.domain import Permission, Status, StudyState
from triage.web.access import Clock, Page
from triage.web.health import GIGABYTE, disk, health

LATEST = timedelta(hours=1)
"""What is judged or sent is on record within this, counted from when that began."""
SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600, 1800, 3600, 4 * 3600, 24 * 3600)
"""Bounds of the histograms, from one stage of judging to a destination that was away for a day."""


class Seen(Protocol):
    """What has a key that is its own."""

    @property
    def key(self) -> Hashable: ...


What = TypeVar("What", bound=Seen)


class Once(Iterable[What]):
    """Gives each item that ``read(since)`` finds once; those that are there at first never."""

    def __init__(self, read: Callable[[datetime], list[What]], clock: Clock) -> None:
        self._read, self._clock = read, clock
        self._seen: set[Hashable] | None = None

    def __iter__(self) -> Iterator[What]:
        found = self._read(self._clock() - LATEST)
        known, self._seen = self._seen, {one.key for one in found}
        return iter(() if known is None else [one for one in found if one.key not in known])


class Metrics(Collector):
    """Collected anew for each request, under a lock: each answer is counted once."""

    def __init__(self, database: Database, config: Config, clock: Clock) -> None:
        self._database, self._config, self._clock = database, config, clock
        self._lock = threading.Lock()
        figures = database.monitoring
        self._answers = Once(figures.answered, clock)
        self._taken = Once(figures.taken, clock)
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self._results = self._counter("triage_results", "Answers on the list, by what they are.", "status")
        for status in Status:
            self._results.labels(status.value)
        self._received = self._histogram("receive", "From a study's first image to its last.")
        self._waited = self._histogram("wait", "From a study's last image until its judging begins.")
        self._judged = self._histogram("judge", "Judging one study, by stage; total is all of them.", "stage")
        self._delivered = self._histogram(
            "delivery", "From being owed to a destination until taken.", "destination"
        )

    def routes(self) -> list[Route]:
        return [Page("/metrics", self.answer, Permission.READ)]

    def answer(self, _: Request) -> Response:
        with self._lock:
            self._observe()
            body = generate_latest(self._registry)
        return Response(body, media_type=CONTENT_TYPE_LATEST)

    def _counter(self, name: str, what: str, *labels: str) -> Counter:
        return Counter(name, what, labels, registry=self._registry)

    def _histogram(self, name: str, what: str, *labels: str) -> Histogram:
        return Histogram(f"triage_{name}_seconds", what, labels, buckets=SECONDS, registry=self._registry)

    def _observe(self) -> None:
        for one in self._answers:
            self._results.labels(one.status.value).inc()
            self._received.observe(_length(one.first_image_at, one.last_image_at))
            self._waited.observe(_length(one.last_image_at, one.judged_at))
            for stage, seconds in one.seconds.items():
                self._judged.labels(stage).observe(seconds)
        for taken in self._taken:
            self._delivered.labels(taken.destination).observe(_length(taken.owed_at, taken.taken_at))

    def describe(self) -> list[Metric]:
        """Nothing: else registering would collect."""
        return []

    def collect(self) -> Iterator[Metric]:
        now = self._clock()
        yield _gauge("triage_info", "The version that runs.", {__version__: 1}, "version")
        yield from self._queues(now)
        yield from self._disk()
        yield from self._roles(now)

    def _queues(self, now: datetime) -> Iterator[Metric]:
        counts = self._database.counts(now, self._config.retention.leave_list_after_days)
        states = {state.value: counts.get(state, 0) for state in StudyState}
        yield _gauge("triage_studies", "Open studies: ready ones wait to be judged.", states, "state")
        given_up = {"": self._database.monitoring.given_up()}
        yield _gauge("triage_studies_given_up", "Open studies whose judging was given up.", given_up)
        since = self._database.waiting_for_analysis_since()
        waited = {"": 0.0 if since is None else _length(since, now)}
        yield _gauge("triage_oldest_waiting_seconds", "Age of the study longest unjudged.", waited)
        yield from self._outbox(now)

    def _outbox(self, now: datetime) -> Iterator[Metric]:
        """``given_up`` are the dead letters."""
        name = "triage_deliveries"
        owed = GaugeMetricFamily(name, "What is not taken or committed.", labels=["destination", "state"])
        tried = GaugeMetricFamily(f"{name}_retried", "Pending, tried in vain.", labels=["destination"])
        oldest = GaugeMetricFamily(
            "triage_oldest_delivery_seconds", "Age of the oldest pending.", labels=["destination"]
        )
        for one in self._database.monitoring.waiting():
            owed.add_metric([one.destination, one.state.value], one.count)
            if one.state.value == "pending":
                tried.add_metric([one.destination], one.tried)
                oldest.add_metric([one.destination], _length(one.since, now))
        yield from (owed, tried, oldest)

    def _disk(self) -> Iterator[Metric]:
        storage = self._config.storage
        if (found := disk(self._config)) is not None:
            yield _gauge("triage_disk_free_bytes", "Of the spool's disk.", {"": found.free})
            yield _gauge("triage_disk_size_bytes", "Of the spool's disk.", {"": found.total})
        limits = {
            "refuse": storage.minimum_free_gb * GIGABYTE,
            "warn": storage.warned_gb * GIGABYTE,
        }
        yield _gauge("triage_disk_limit_bytes", "Free space below which this happens.", limits, "then")
        database = self._config.database.file
        if database.is_file():
            size = {"": database.stat().st_size}
            yield _gauge("triage_database_bytes", "Size of the database.", size)

    def _roles(self, now: datetime) -> Iterator[Metric]:
        found = health(self._database, self._config, now)
        ready = {"": float(not found.problems)}
        yield _gauge("triage_ready", "1 while /health/ready says that nothing is missing.", ready)
        yield _gauge("triage_warnings", "What /health/ready warns of.", {"": len(found.warnings)})
        up = {role: float(how == "alive") for role, how in found.roles.items()}
        yield _gauge("triage_role_up", "1 while the role is alive.", up, "role")
        starts = {state.name: state.starts for state in self._database.roles.all()}
        yield _counter("triage_role_starts", "How often the role was started.", starts, "role")
        tallies = self._database.roles.tallies()
        refused = {kind: count for (what, kind), count in tallies.items() if what == "refused"}
        yield _counter("triage_refused_objects", "Objects refused, by status.", refused, "status")
        failed = {kind: count for (what, kind), count in tallies.items() if what == "step"}
        yield _counter("triage_step_failures", "Steps that failed and are done again.", failed, "kind")


def _gauge(name: str, what: str, values: dict[str, float] | dict[str, int], label: str = "") -> Metric:
    """One sample for each value; without ``label`` there is one, under the empty name."""
    made = GaugeMetricFamily(name, what, labels=[label] if label else [])
    for of, value in values.items():
        made.add_metric([of] if label else [], value)
    return made


def _counter(name: str, what: str, values: dict[str, int], label: str) -> Metric:
    made = CounterMetricFamily(name, what, labels=[label])
    for of, value in values.items():
        made.add_metric([of], value)
    return made


def _length(begin: datetime, end: datetime) -> float:
    """Seconds; none where a clock was set back."""
    return max((end - begin).total_seconds(), 0.0)
