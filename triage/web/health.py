"""What keeps the list from being complete or current, in sentences for those who look at it; and, for who
watches over machines, whether all that is needed is here, and what will be missing soon.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import NamedTuple

from triage.config import Config
from triage.db import Database
from triage.db.roles import LOST
from triage.errors import Retryable
from triage.web import words

GIGABYTE = 1024**3
LATE_DELIVERY = timedelta(hours=1)
SILENT = timedelta(minutes=2)
"""A role that has given no sign of life for this long is not alive."""
WITHOUT = {
    "listener": "nothing is received",
    "clerk": "nothing is assembled or delivered",
    "analyzer": "nothing is judged",
    "web": "the page is not served",
    "orders": "no orders are taken",
}


@dataclass(frozen=True, slots=True)
class Health:
    """``problems`` keep the daemon from its work now, ``warnings`` soon; ``roles`` says how each is."""

    problems: tuple[str, ...]
    warnings: tuple[str, ...]
    roles: dict[str, str]


def troubles(database: Database, config: Config, now: datetime) -> list[str]:
    """Empty when all is well. Quick enough to be asked for each page."""
    return [
        *_disk(config),
        *_silent(database, config, now),
        *_device(database),
        *_analysis(database, config, now),
        *_delivery(database, config, now),
    ]


def health(database: Database, config: Config, now: datetime) -> Health:
    """Whether everything that the daemon needs is here: database, spool with room, every role."""
    try:
        roles = role_states(database, config, now)
        soon = [*_device(database), *_analysis(database, config, now), *_delivery(database, config, now)]
    except Retryable:
        return Health(("The database does not answer.",), (), {})
    missing = [f"{role}: {how}, {WITHOUT[role]}." for role, how in roles.items() if how != "alive"]
    return Health((*_spool(config), *missing), (*_early(config), *soon), roles)


def role_states(database: Database, config: Config, now: datetime) -> dict[str, str]:
    """How each role is that these settings need: alive, or since when it is not."""
    known = {state.name: state for state in database.roles.all()}
    found = {}
    for role in config.roles:
        state = known.get(role)
        if state is None:
            found[role] = "never started"
        elif state.beat_at is None:
            found[role] = "stopped"
        else:
            silent = now - state.beat_at > SILENT
            found[role] = f"silent since {words.when(state.beat_at, now)}" if silent else "alive"
    return found


def _silent(database: Database, config: Config, now: datetime) -> Iterator[str]:
    """Roles that died or hang; of those that nobody has started yet, or stopped in order, nobody is told."""
    for role, how in role_states(database, config, now).items():
        if how.startswith("silent"):
            yield f"The {role} is {how}: {WITHOUT[role]}."


def _device(database: Database) -> Iterator[str]:
    if any(state.device == LOST for state in database.roles.all()):
        yield (
            "The GPU cannot be used any more: studies are judged on the CPU, which takes longer. "
            "Mend it and start the analyzer again, or set analysis.device to cpu."
        )


def _spool(config: Config) -> Iterator[str]:
    spool = config.storage.spool
    if not os.access(spool, os.W_OK | os.X_OK):
        yield f"{spool} cannot be written to."
    yield from _disk(config)


def _early(config: Config) -> Iterator[str]:
    free = _free_gigabytes(config)
    if config.storage.minimum_free_gb <= free < config.storage.warned_gb:
        yield (
            f"The disk is nearly full: {free:.1f} GB are free, "
            f"below {config.storage.minimum_free_gb:g} GB new images are refused."
        )


class Disk(NamedTuple):
    """Bytes."""

    free: int
    total: int


def disk(config: Config) -> Disk | None:
    """Of the spool; None before the first start, when there is no spool."""
    try:
        usage = shutil.disk_usage(config.storage.spool)
    except OSError:
        return None
    return Disk(usage.free, usage.total)


def _free_gigabytes(config: Config) -> float:
    found = disk(config)
    return math.inf if found is None else found.free / GIGABYTE


def _disk(config: Config) -> Iterator[str]:
    free, needed = _free_gigabytes(config), config.storage.minimum_free_gb
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
