"""One who works for all who wait: what takes as long for many as for one, as flushing to a disk does."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from triage.errors import Retryable

Item = TypeVar("Item")


class Together(Generic[Item]):
    """Whoever comes while nobody works does the work for all who came meanwhile; the others wait for it.

    ``work`` does all of its items or, when it raises, none. What fails together is tried one by one, unless
    it is to be tried again later in any case.
    """

    def __init__(self, work: Callable[[Sequence[Item]], None]) -> None:
        self._work = work
        self._changed = threading.Condition()
        self._waiting: list[_Turn[Item]] = []
        self._working = False

    def do(self, item: Item) -> None:
        """Returns when the item is done; raises what its work raised."""
        turn = _Turn(item)
        with self._changed:
            self._waiting.append(turn)
            self._changed.wait_for(lambda: turn.done or not self._working)
            if not turn.done:
                self._working = True
                group, self._waiting = self._waiting, []
        if not turn.done:
            self._lead(group)
        if turn.error is not None:
            raise turn.error

    def _lead(self, group: list[_Turn[Item]]) -> None:
        try:
            self._try(group)
        finally:
            with self._changed:
                self._working = False
                for turn in group:
                    turn.done = True
                self._changed.notify_all()

    def _try(self, group: list[_Turn[Item]]) -> None:
        try:
            self._work([turn.item for turn in group])
        except Exception as error:  # noqa: BLE001 - each raises it where it waits
            if len(group) > 1 and not isinstance(error, Retryable):
                for turn in group:
                    self._try([turn])
                return
            for turn in group:
                turn.error = error
        else:
            for turn in group:
                turn.error = None


class _Turn(Generic[Item]):
    """``error`` is what the others find where the one who worked for them was stopped in the middle."""

    def __init__(self, item: Item) -> None:
        self.item = item
        self.done = False
        self.error: Exception | None = Retryable("stopped in the middle of its work")
