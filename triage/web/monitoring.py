"""The page that shows how the daemon has done in the last days, and whether scores still are as they were."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated

from fastapi import APIRouter, Query
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from triage import drift
from triage.db.monitoring import Failure, Scored
from triage.domain import DeliveryState, Permission, Person, StudyState
from triage.drift import Drift
from triage.web import words
from triage.web.access import Page
from triage.web.api import READER
from triage.web.forms import days_of
from triage.web.health import GIGABYTE, disk
from triage.whatif import quantile

if TYPE_CHECKING:
    from triage.web.app import Pages

DAYS = (7, 14, 28)
"""How many days the page can tell of."""
BASELINE = 4
"""The baseline period is so many times as long, and lies before."""
GROUPS = 6
"""Scanners, kernels and thicknesses that are looked at one by one, the most frequent."""
GPU_SECONDS = 3
GPU_FIGURES = "name,utilization.gpu,memory.used,memory.total,temperature.gpu"


@dataclass(frozen=True, slots=True)
class Times:
    """How long something took, in half and in nineteen of twenty cases."""

    count: int
    p50: timedelta
    p95: timedelta


@dataclass(frozen=True, slots=True)
class Day:
    """Studies that arrived on a day, how many got no answer, and how fast the answers were on the list."""

    date: str
    arrived: int
    judged: int
    failed: int
    times: Times | None


@dataclass(frozen=True, slots=True)
class Destination:
    """What one destination was owed."""

    name: str
    taken: int
    waiting: int
    given_up: int
    times: Times | None


class Monitored(BaseModel):
    """The last days. Times are ISO 8601 durations; ``drifts`` are by what the images were made with."""

    days: int
    baseline_days: int
    history: list[Day]
    queue: dict[StudyState, int]
    waiting_since: datetime | None
    failures: list[Failure]
    retried: list[Failure]
    destinations: list[Destination]
    model: str
    """Name and version of the network that judged last: ``drifts`` are of its answers alone."""
    drifts: dict[str, list[Drift]]
    machine: list[tuple[str, str]]


class MonitoringPage:
    """Everything is read from the database when the page is asked for."""

    def __init__(self, pages: Pages) -> None:
        self.pages, self.config = pages, pages.config
        self.database, self.figures = pages.database, pages.database.monitoring

    def routes(self) -> list[Route]:
        return [Page("/monitoring", self.monitoring, Permission.READ)]

    def router(self) -> APIRouter:
        made = APIRouter(tags=["monitoring"])
        made.add_api_route("/monitoring", self.monitored)
        return made

    def monitoring(self, request: Request) -> Response:
        days = days_of(request.query_params.get("days", ""), DAYS, DAYS[0])
        found = self.monitored(days=days)
        slowest = max([timedelta(seconds=1), *(day.times.p95 for day in found.history if day.times)])
        return self.pages.render(
            request,
            "monitoring.html",
            self.pages.clock(),
            found=found,
            all_days=DAYS,
            arrived=bars([(f"{day.date}: {day.arrived}", day.arrived) for day in found.history]),
            half=lines([day.times.p50 / slowest if day.times else None for day in found.history]),
            most=lines([day.times.p95 / slowest if day.times else None for day in found.history]),
            slowest=slowest,
            quiet=timedelta(seconds=self.config.assemble.quiet_seconds),
            took=seconds,
            spread=spread,
            alarm=drift.ALARM,
            states=list(StudyState),
        )

    def monitored(
        self,
        person: Person = READER,  # noqa: ARG002 - asked for its permission
        days: Annotated[int, Query(ge=1, le=max(DAYS))] = DAYS[0],
    ) -> Monitored:
        """How the daemon has done in the last days, and whether scores are still spread as they were."""
        now = self.pages.clock()
        midnight = now.astimezone().replace(hour=0, minute=0, second=0, microsecond=0)
        since = midnight - timedelta(days=days - 1)
        baseline = since - timedelta(days=days * BASELINE)
        model = self.figures.newest_model()
        return Monitored(
            days=days,
            baseline_days=days * BASELINE,
            history=self._days(since, now),
            queue=self.database.counts(now, self.config.retention.leave_list_after_days),
            waiting_since=self.database.waiting_for_analysis_since(),
            failures=self.figures.failures(since),
            retried=self.figures.retried(),
            destinations=self._destinations(since),
            model=" ".join(model),
            drifts=_drifts(
                self.figures.scores(baseline, since, *model), self.figures.scores(since, now, *model)
            ),
            machine=list(self._machine()),
        )

    def _days(self, since: datetime, now: datetime) -> list[Day]:
        """One a day, today last."""
        arrivals = self.figures.arrivals(since, now.astimezone().utcoffset() or timedelta())
        times: dict[str, list[timedelta]] = {}
        for listed, took in self.figures.times_to_list(since):
            times.setdefault(f"{listed.astimezone():%Y-%m-%d}", []).append(took)
        first, last = since.astimezone().date(), now.astimezone().date()
        dates = [str(first + timedelta(days=number)) for number in range((last - first).days + 1)]
        return [_day(date, Counter(arrivals.get(date, {})), times.get(date, [])) for date in dates]

    def _destinations(self, since: datetime) -> list[Destination]:
        times = self.figures.delivery_times(since)
        return [
            Destination(
                name,
                sum(count for state, count in counts.items() if state.is_delivered),
                counts.get(DeliveryState.PENDING, 0),
                counts.get(DeliveryState.GIVEN_UP, 0),
                _times(times.get(name, [])),
            )
            for name, counts in self.figures.deliveries(since).items()
        ]

    def _machine(self) -> Iterator[tuple[str, str]]:
        """What the machine of this page has: name and figure."""
        if (found := disk(self.config)) is None:
            yield "Disk of the spool", "there is no spool yet"
        else:
            needed = self.config.storage.minimum_free_gb
            free, total = found.free / GIGABYTE, found.total / GIGABYTE
            yield "Disk of the spool", f"{free:.0f} of {total:.0f} GB free, {needed:g} are needed"
        database = self.config.database.file
        if database.exists():
            yield "Database", f"{database.stat().st_size / 1024**2:.1f} MB"
        minutes = os.getloadavg()
        yield (
            "Processor",
            f"load {minutes[0]:.1f} of {os.cpu_count()} cores, {minutes[2]:.1f} in the last 15 min",
        )
        gpus = _gpus()
        for gpu in gpus:
            yield "GPU", gpu
        if not gpus:
            yield "GPU", "none is seen from here"


def _day(date: str, counts: Counter[StudyState], times: Sequence[timedelta]) -> Day:
    failed = counts[StudyState.REJECTED] + counts[StudyState.FAILED]
    return Day(date, counts.total(), counts[StudyState.ANALYZED], failed, _times(times))


def _times(lengths: Sequence[timedelta]) -> Times | None:
    if not lengths:
        return None
    ordered = sorted(lengths)
    return Times(len(ordered), quantile(ordered, 0.5), quantile(ordered, 0.95))


def _drifts(baseline: Sequence[Scored], recent: Sequence[Scored]) -> dict[str, list[Drift]]:
    """All scores, then by what images were made with."""
    kinds: dict[str, Callable[[Scored], str]] = {
        "scanner": lambda one: one.scanner,
        "kernel": lambda one: one.kernel,
        "slice thickness": lambda one: "" if one.thickness is None else f"{one.thickness:g} mm",
    }
    found = {"all studies": [_drift("all", baseline, recent)]}
    for kind, name_of in kinds.items():
        counts = Counter(name_of(one) for one in (*baseline, *recent))
        groups = [
            _drift(
                name or "not said",
                [one for one in baseline if name_of(one) == name],
                [one for one in recent if name_of(one) == name],
            )
            for name, _ in counts.most_common(GROUPS)
        ]
        found[kind] = groups
    return found


def _drift(name: str, baseline: Sequence[Scored], recent: Sequence[Scored]) -> Drift:
    return drift.measure(name, (one.probability for one in baseline), (one.probability for one in recent))


def _gpus() -> list[str]:
    """A line for each, as the driver's own program tells; none where there is no such program."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    ask = [program, f"--query-gpu={GPU_FIGURES}", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(ask, capture_output=True, text=True, timeout=GPU_SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ["does not answer"]
    return [
        _gpu(*(part.strip() for part in line.split(",")))
        for line in told.splitlines()
        if line.count(",") == 4
    ]


def _gpu(name: str, busy: str, used: str, total: str, degrees: str) -> str:
    return f"{name}: {busy} % busy, {used} of {total} MB in use, {degrees} °C"


# --- charts: numbers → shapes of an SVG of WIDE by HIGH ---------------------------------------------

WIDE, HIGH = 600.0, 120.0


@dataclass(frozen=True, slots=True)
class Bar:
    """A rectangle, and what it stands for."""

    x: float
    y: float
    width: float
    height: float
    label: str


def bars(values: Sequence[tuple[str, float]], share: float = 0.8) -> list[Bar]:
    """One bar a value, as high as the chart for the largest."""
    largest, step = max((value for _, value in values), default=0) or 1, WIDE / max(len(values), 1)
    return [
        Bar(
            round(step * (number + (1 - share) / 2), 1),
            round(HIGH - HIGH * value / largest, 1),
            round(step * share, 1),
            round(HIGH * value / largest, 1),
            label,
        )
        for number, (label, value) in enumerate(values)
    ]


def spread(found: Drift) -> tuple[list[Bar], list[Bar]]:
    """Shares of the recent and of the baseline studies by tenth of the score, side by side in one scale."""
    shares = [[count / max(sum(counts), 1) for count in counts] for counts in (found.recent, found.baseline)]
    largest, step = max(map(max, shares)) or 1, WIDE / drift.BINS

    def row(number: int) -> list[Bar]:
        return [
            Bar(
                step * (place + 0.1 + 0.4 * number),
                round(HIGH - HIGH * share / largest, 1),
                step * 0.4,
                round(HIGH * share / largest, 1),
                f"{place / drift.BINS:.1f}: {100 * share:.0f} %",
            )
            for place, share in enumerate(shares[number])
        ]

    return row(0), row(1)


def lines(shares: Sequence[float | None]) -> list[str]:
    """The points of each unbroken part of a line, shares of its height; one point alone is a short dash."""
    step = WIDE / max(len(shares), 1)
    placed = [
        None if share is None else (step * (number + 0.5), HIGH * (1 - share))
        for number, share in enumerate(shares)
    ]
    parts: list[list[tuple[float, float]]] = [[]]
    for before, point in pairwise([None, *placed]):
        if point is None:
            parts.append([])
        elif before is None:
            parts[-1] += [(point[0] - 4, point[1]), point]
        else:
            parts[-1].append(point)
    return [" ".join(f"{x:.1f},{y:.1f}" for x, y in part) for part in parts if part]


def seconds(length: timedelta) -> str:
    """``48 s``, ``3.2 min``; longer ones as everywhere on the page."""
    total = length.total_seconds()
    if total < 100:
        return f"{total:.0f} s"
    return f"{total / 60:.1f} min" if total < 3600 else words.span(length)
