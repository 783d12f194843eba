"""Which roles are alive, and what their processes have counted: one truth for all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, insert, select, update

from triage.db.tables import role, tally

LOST = "lost"
"""It computed on a GPU, and now on the CPU instead."""


@dataclass(frozen=True, slots=True)
class RoleState:
    """``beat_at`` is the last sign of life; None: it has stopped in order. ``starts`` counts all.

    ``device`` is cuda, cpu, or LOST; None for a role that computes nothing.
    """

    name: str
    started_at: datetime
    beat_at: datetime | None
    starts: int
    device: str | None = None


class Roles:
    """Safe to share between threads."""

    def __init__(
        self,
        read: Callable[[], AbstractContextManager[Connection]],
        write: Callable[[], AbstractContextManager[Connection]],
    ) -> None:
        self._read, self._write = read, write

    def started(self, name: str, now: datetime) -> None:
        """A process of this role begins."""
        with self._write() as connection:
            again = update(role).where(role.c.name == name)
            values = {"started_at": now, "beat_at": now}
            if not connection.execute(again.values(**values, starts=role.c.starts + 1)).rowcount:
                connection.execute(insert(role).values(name=name, **values, starts=1))

    def beat(self, name: str, now: datetime | None, counts: Mapping[tuple[str, str], int]) -> None:
        """It lives, or with None: it has stopped. ``counts`` by (what, kind) are added to those on record."""
        with self._write() as connection:
            connection.execute(update(role).where(role.c.name == name).values(beat_at=now))
            for (what, kind), count in counts.items():
                same = (tally.c.what == what) & (tally.c.kind == kind)
                more = update(tally).where(same).values(count=tally.c.count + count)
                if not connection.execute(more).rowcount:
                    connection.execute(insert(tally).values(what=what, kind=kind, count=count))

    def computes_on(self, name: str, device: str, *, chosen: bool) -> None:
        """``chosen``: by the settings, which do not want a GPU that may be there."""
        with self._write() as connection:
            had = connection.scalar(select(role.c.device).where(role.c.name == name))
            if device == "cpu" and had in ("cuda", LOST) and not chosen:
                device = LOST
            connection.execute(update(role).where(role.c.name == name).values(device=device))

    def all(self) -> list[RoleState]:
        with self._read() as connection:
            return [RoleState(**row) for row in connection.execute(select(role)).mappings()]

    def tallies(self) -> dict[tuple[str, str], int]:
        """What was counted, by (what, kind)."""
        with self._read() as connection:
            found = connection.execute(select(tally.c.what, tally.c.kind, tally.c.count))
            return {(what, kind): count for what, kind, count in found}
