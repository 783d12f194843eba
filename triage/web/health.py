"""What keeps the list from being complete or current, in sentences for those who look at it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from datetime import datetime, timedelta

from triage.config import Config
from triage.db import Database
from triage.web import words

GIGABYTE = 1024**3
LATE_DELIVERY = timedelta(hours=1)


def troubles(database: Database, config: Config, now: datetime) -> list[str]:
    """Empty when all is well. Quick enough to be asked for each page."""
    return [*_disk(config), *_analysis(database, config, now), *_delivery(database, config, now)]


def _disk(config: Config) -> Iterator[str]:
    needed = config.storage.minimum_free_gb
    try:
        free = shutil.disk_usage(config.storage.spool).free / GIGABYTE
    except OSError:
        return  # before the first start there is no spool
    if free < needed:
        yield f"New images are refused: {free:.1f} GB of disk are free, {needed:g} GB are needed."


def _analysis(database: Database, config: Config, now: datetime) -> Iterator[str]:
    since = database.waiting_for_analysis_since()
    patience = timedelta(seconds=config.assemble.quiet_seconds + config.analysis.lease_seconds)
    if since is not None and now - since > patience:
        yield f"Studies wait for analysis since {words.when(since, now)}: does the analyzer run?"


def _delivery(database: Database, config: Config, now: datetime) -> Iterator[str]:
    since = database.undelivered_since([one.name for one in config.destinations])
    if since is not None and now - since > LATE_DELIVERY:
        yield f"Results have not reached the PACS since {words.when(since, now)}; the studies' pages say why."
