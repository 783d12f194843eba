"""Shared by all tests. Where nothing may be skipped (TRIAGE_NOTHING_SKIPPED), a skipped test fails."""

import os
from collections.abc import Generator, Iterator
from typing import Any

import pytest
from hypothesis import settings

settings.register_profile("triage", deadline=None)  # a busy machine is no failure
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
    if report.skipped and not hasattr(report, "wasxfail") and os.environ.get("TRIAGE_NOTHING_SKIPPED"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped where nothing may be: {report.longrepr}"
    return report


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Networks as small as the tests' only lose by waiting for a second thread."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
