"""What a case is given, what it tells, and how all of them are printed."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from triage import config

COLUMNS = ("case", "tries", "lost", "wrong", "recovered in", "figure")
EXAMPLES = 3
"""So many failures of a case are told in words."""


@dataclass(frozen=True)
class Context:
    """How much of it, and where. ``listener`` chooses one of the ways of receiving."""

    folder: Path
    long: bool = False
    seconds: float | None = None
    """Ends what could go on for ever; None: the number of tries does."""
    listener: dict[str, Any] = field(default_factory=dict)
    seed: int = 1

    def number(self, quick: int, long: int) -> int:
        return long if self.long else quick

    @property
    def random(self) -> random.Random:
        return random.Random(self.seed)

    def ends(self) -> Callable[[], bool]:
        """Says whether the seconds are over, counted from now."""
        deadline = None if self.seconds is None else time.monotonic() + self.seconds
        return lambda: deadline is not None and time.monotonic() > deadline


@dataclass
class Row:
    """One case. ``lost``: what was acknowledged or decided and is gone; ``wrong``: anything else amiss."""

    tries: int = 0
    lost: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    recovered: list[float] = field(default_factory=list)
    """Seconds until it worked again, each time."""
    figure: str = ""
    missing: str = ""
    """What is not installed, for want of which it was not tried."""

    @property
    def is_clean(self) -> bool:
        return bool(self.tries > 0 or self.missing) and not self.lost and not self.wrong

    def keep(self, is_there: bool, what: str) -> None:
        if not is_there:
            self.lost.append(what)

    def expect(self, holds: bool, what: str) -> None:
        if not holds:
            self.wrong.append(what)

    @contextmanager
    def recovering(self) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.recovered.append(time.monotonic() - start)


Case = Callable[[Context], Row | dict[str, Row]]
"""Gives a row, or several with their names."""


def ways_of_receiving() -> dict[str, dict[str, Any]]:
    """Settings of the listener under which everything that arrives is tried; the first is the default."""
    if "fast" not in config.Listener.model_fields:
        return {"": {}}
    return {"": {}, ", other path": {"fast": not config.Listener.model_fields["fast"].default}}


def cells(name: str, row: Row) -> tuple[str, ...]:
    recovered = f"{max(row.recovered):.1f} s" if row.recovered else ""
    return (
        name,
        f"{row.tries:,}",
        str(len(row.lost)),
        str(len(row.wrong)),
        recovered,
        row.figure or row.missing,
    )


def markdown(rows: Iterable[tuple[str, ...]]) -> str:
    """A table whose columns are aligned for those who read it as text."""
    table = [COLUMNS, *rows]
    widths = [max(len(row[n]) for row in table) for n in range(len(COLUMNS))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in table
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])
