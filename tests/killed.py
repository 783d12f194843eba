"""The daemon's roles in one process that kills itself, hard, at a named point of a study's way."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests import peers
from tests.boxes import Boxes
from triage import analyze, assemble, config, daemon, deliver, models
from triage.db import Database
from triage.dicom import key_slices, pictures, seg, sender, spool, sr, volume

POINTS: dict[str, tuple[Any, str, str, int]] = {
    "before a slice is on the disk": (spool, "file", "before", 12),
    "after a slice is on the disk, before it is on record": (Database, "register", "before", 12),
    "after a slice is on record, before it is acknowledged": (Database, "register", "after", 12),
    "after the last slice": (Database, "register", "after", 30),
    "quiet, before the series is chosen": (assemble.series, "choose", "before", 1),
    "ready": (Database, "mark_ready", "after", 1),
    "claimed": (Database, "claim", "after a find", 1),
    "reading": (volume, "read", "after", 1),
    "before the SEG": (seg, "write_lesions", "before", 1),
    "after the SEG": (seg, "write_lesions", "after", 1),
    "after the SR": (sr, "write", "after", 1),
    "after the picture": (pictures, "write_thumbnail", "after", 1),
    "after the key slices": (key_slices, "write", "after", 1),
    "before the result is on record": (Database, "finish", "before", 1),
    "after the result is on record": (Database, "finish", "after", 1),
    "before sending": (sender, "send", "before", 1),
    "after sending, before it is marked": (sender, "send", "after", 1),
    "one of four marked": (Database, "mark_sent", "after", 1),
    "all marked": (Database, "mark_sent", "after", 4),
}
"""{point: (where, function, when, at which call)}"""


def kill_at(point: str) -> None:
    """Make the function of the point kill this process, as kill -9 and a power cut do."""
    where, name, when, calls_left = POINTS[point]
    function: Callable[..., Any] = getattr(where, name)
    remaining = [calls_left]

    def killing(*args: Any, **kwargs: Any) -> Any:
        if when == "before":
            remaining[0] -= 1
            if remaining[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        result = function(*args, **kwargs)
        if when == "after" or (when == "after a find" and result):
            remaining[0] -= 1
            if remaining[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(where, name, killing)


def work(path: Path, log: Path, point: str | None) -> None:
    """In a process of its own. Without a point it works until it is told to stop."""
    with log.open("ab") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    settings = config.load(path, {})
    models.load = lambda _analysis: Boxes()
    if point is not None:
        kill_at(point)
    threading.excepthook = lambda _arguments: os._exit(1)
    stop = daemon.stopped_by_signals()
    listener, *others = (
        threading.Thread(target=role, args=(settings, stop))
        for role in (daemon.run_listener, daemon.run_clerk, daemon.run_analyzer)
    )
    listener.start()
    # The quiet period of this test is shorter than a slow start: nothing is complete before it can arrive.
    peers.wait_until(lambda: peers.answers(peers.destination(settings)))
    for thread in others:
        thread.start()
    for thread in (listener, *others):
        thread.join()


assert analyze.seg is seg  # the patched modules are the ones the steps look into
assert deliver.sender is sender
