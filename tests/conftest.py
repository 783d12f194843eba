"""Shared by all tests. Where nothing may be skipped (TRIAGE_NOTHING_SKIPPED), a skipped test fails."""

import os
import sqlite3
from collections.abc import Generator, Iterator
from contextlib import closing
from typing import Any, cast

import pytest
from hypothesis import settings
from sqlalchemy import Engine

from triage.db import database

NOTHING_SKIPPED = bool(os.environ.get("TRIAGE_NOTHING_SKIPPED"))
# A busy machine is no failure. Each run draws new cases; where a change is judged, always the same ones.
settings.register_profile("triage", deadline=None, derandomize=NOTHING_SKIPPED)
settings.load_profile("triage")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--every-series",
        action="store_true",
        help="try every network: on all series, in the daemon",
    )


SLOWEST = (
    "test_faults",
    "test_cli",
    "test_systems",
    "test_radiologist_day",
    "test_orthanc",
    "test_demo",
    "test_daemon",
    "test_gates",
    "test_admin_day",
    "test_reading_browser",
    "test_accessibility",
    "test_training",
)
"""A file is one worker's: those that take minutes begin first, so that no worker is left alone with one."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--every-series"):
        items[:] = [item for item in items if item.get_closest_marker("every_series") is None]
    first = {name: place for place, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: first.get(item.path.stem, len(SLOWEST)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[Any]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and NOTHING_SKIPPED:
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped where nothing may be: {report.longrepr}"
    return report


@pytest.fixture(scope="session", autouse=True)
def _migrated_once() -> Iterator[None]:
    """A new database is a copy of the first that this process migrated from nothing: that saves a minute."""
    migrate, kept = database.migrate, sqlite3.connect(":memory:", check_same_thread=False)

    def copied(new: Engine) -> None:
        with closing(new.raw_connection()) as pooled:
            connection = cast(sqlite3.Connection, pooled.driver_connection)
            if _has_tables(connection):
                migrate(new)
            elif _has_tables(kept):
                kept.backup(connection)
            else:
                migrate(new)
                connection.backup(kept)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(database, "migrate", copied)
        yield
    kept.close()


def _has_tables(connection: sqlite3.Connection) -> bool:
    return connection.execute("SELECT 1 FROM sqlite_master").fetchone() is not None


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Networks as small as the tests' only lose by waiting for a second thread."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
