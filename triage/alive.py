"""The pulse of a role: that its loops turn, told to systemd and to the database; what it counts, too.

The supervisor hears its roles as systemd hears a unit (sd_notify(3)): so a role says the same in both places.
"""

from __future__ import annotations

import logging
import os
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from time import monotonic

from triage.db import Database
from triage.errors import Retryable

log = logging.getLogger(__name__)

BEAT_SECONDS = 15.0
PATIENCE_SECONDS = 60.0
"""A loop that has not turned for so long hangs, where it names no other patience."""
MORE_TIME = f"EXTEND_TIMEOUT_USEC={int(4e6 * BEAT_SECONDS)}"
"""To a service manager that waits for us to be ready: we are at it."""
CREDENTIALS = struct.Struct("3i")
"""Process, user and group of who sent a message (unix(7), SCM_CREDENTIALS)."""


def notify(*states: str) -> None:
    """Tell whoever started us, where they listen (NOTIFY_SOCKET); what they miss is told again."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    path = "\0" + address[1:] if address.startswith("@") else address
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as speaker:
        try:
            speaker.sendto("\n".join(states).encode(), path)
        except OSError as error:
            log.warning("nobody listens at NOTIFY_SOCKET: %s", error.strerror)


class Silent:
    """Of a role that nobody watches."""

    def loop(self, name: str, patience: float = PATIENCE_SECONDS) -> Callable[[], None]:  # noqa: ARG002
        return lambda: None

    def count(self, what: str, kind: str) -> None:
        """Not kept."""

    def ready(self) -> None:
        """Not told."""


SILENT = Silent()


class Pulse(Silent):
    """Of one role. Loops report each turn; as long as all turn, the role beats."""

    def __init__(self, role: str, database: Database, clock: Callable[[], datetime]) -> None:
        self._role, self._roles, self._clock = role, database.roles, clock
        self._turned: dict[str, tuple[float, float]] = {}
        self._counts: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()
        self._is_ready = False

    def loop(self, name: str, patience: float = PATIENCE_SECONDS) -> Callable[[], None]:
        """What a loop calls at each turn. After ``patience`` seconds without, it is taken for hung."""

        def turn() -> None:
            self._turned[name] = monotonic(), patience

        turn()
        return turn

    def count(self, what: str, kind: str) -> None:
        """Count what happened; the sums of all processes are in the database."""
        with self._lock:
            self._counts[what, kind] += 1

    def ready(self) -> None:
        """The role does its work from now on."""
        self._is_ready = True
        notify("READY=1", f"STATUS={self._role} is ready")
        self._beat()

    def hung(self) -> list[str]:
        """Loops that do not turn."""
        now = monotonic()
        return [name for name, (last, patience) in list(self._turned.items()) if now - last > patience]

    @contextmanager
    def beating(self) -> Iterator[None]:
        """Beat in the background; afterwards it is on record that the role has stopped."""
        self._roles.started(self._role, self._clock())
        done = threading.Event()

        def beat() -> None:
            while not done.wait(BEAT_SECONDS):
                self._beat()

        thread = threading.Thread(target=beat, name="pulse", daemon=True)
        thread.start()
        try:
            yield
        finally:
            notify("STOPPING=1")
            done.set()
            thread.join(BEAT_SECONDS)
            self._write(None)

    def _beat(self) -> None:
        if hung := self.hung():
            log.error("%s hangs: no turn of %s", self._role, ", ".join(hung))
            return
        notify("WATCHDOG=1" if self._is_ready else MORE_TIME)
        self._write(self._clock())

    def _write(self, now: datetime | None) -> None:
        """A database that does not answer is no fault of the role: its counts go on record later."""
        with self._lock:
            counts, self._counts = self._counts, Counter()
        try:
            self._roles.beat(self._role, now, counts)
        except Retryable as error:
            log.warning("the pulse of %s is not on record: %s", self._role, error)
            with self._lock:
                self._counts.update(counts)


class Ear:
    """Hears what roles notify; who said it is known by the process, which the kernel names."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._socket.bind("")  # the kernel chooses a name that is no file, and frees it when we die
        self.address = "@" + self._socket.getsockname()[1:].decode()

    def heard(self) -> Iterator[tuple[int, list[str]]]:
        """Process and states of each message since the last call."""
        while True:
            try:
                said, ancillary, _, _ = self._socket.recvmsg(4096, socket.CMSG_SPACE(CREDENTIALS.size))
            except BlockingIOError:
                return
            for _, kind, data in ancillary:
                if kind == socket.SCM_CREDENTIALS:
                    yield CREDENTIALS.unpack(data)[0], said.decode(errors="replace").split("\n")

    def close(self) -> None:
        self._socket.close()
