"""What stands around the daemon in tests: a PACS, a scanner, the running daemon itself."""

from __future__ import annotations

import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from triage import config
from triage.config import Config, Destination
from triage.dicom import sender
from triage.dicom.header import find_instances
from triage.dicom.listener import Listener
from triage.domain import Instance

HOST = "127.0.0.1"
WAIT_SECONDS = 120


_ports = iter(random.SystemRandom().sample(range(20_000, 30_000), 10_000))


def free_port() -> int:
    """A port nobody listens on, never given twice, and below those that outgoing connections are given."""
    for port in _ports:
        with suppress(OSError), socket.create_server((HOST, port)):
            return port
    raise RuntimeError("every port has been given out")


def write_config(folder: Path, pacs_port: int | None = None, **sections: Any) -> Path:
    """A config.yaml below ``folder`` on free ports, quick to act, with one destination called PACS."""
    settings: dict[str, Any] = {
        "storage": {"spool": "spool", "minimum_free_gb": 0},
        "database": {"url": "sqlite:///triage.db"},
        "listener": {"host": HOST, "port": free_port()},
        "assemble": {"quiet_seconds": 1},
        "web": {"port": free_port()},
    }
    if pacs_port is not None:
        pacs = {"name": "PACS", "ae_title": "PACS", "host": HOST, "port": pacs_port}
        settings["delivery"] = {"destinations": [pacs], "first_retry_seconds": 0.5}
    for name, section in sections.items():
        settings[name] = {**settings.get(name, {}), **section} if isinstance(section, dict) else section
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@contextmanager
def pacs(folder: Path, port: int = 0) -> Iterator[tuple[int, list[Instance]]]:
    """A PACS that keeps what it gets; gives its port and every object in the order received."""
    received: list[Instance] = []
    settings = config.Listener(ae_title="PACS", host=HOST, port=port or free_port())
    with Listener(settings, folder, on_received=received.append, has_room=lambda: True) as listener:
        yield listener.port, received


def destination(settings: Config) -> Destination:
    """The daemon, as a scanner or PACS addresses it."""
    return Destination(
        name="TRIAGE", ae_title=settings.listener.ae_title, host=HOST, port=settings.listener.port
    )


def answers(peer: Destination) -> bool:
    """True when something listens there; quieter and quicker than a refused association."""
    try:
        socket.create_connection((peer.host, peer.port), timeout=1).close()
    except OSError:
        return False
    return True


def scan(folder: Path, settings: Config) -> None:
    """Send every object below ``folder`` as a scanner would; every one must be acknowledged."""
    instances, _ = find_instances([folder])
    outcomes = sender.send(
        [i.path for i in instances], destination(settings), calling_ae_title="SCANNER", timeout_seconds=30
    )
    assert [outcome.error for outcome in outcomes if not outcome.sent] == []


@contextmanager
def daemon(path: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """``triage serve``, up and answering; stopped by SIGTERM in the end."""
    with log.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "triage", "--config", str(path), "serve"], stderr=file
        )
    try:
        peer = destination(config.load(path))
        wait_until(lambda: answers(peer), process, log)
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(90)


def now() -> datetime:
    return datetime.now(UTC)


def wait_until(
    condition: Callable[[], bool],
    process: subprocess.Popen[bytes] | None = None,
    log: Path | None = None,
    seconds: float = WAIT_SECONDS,
) -> None:
    """Poll until the condition holds; fails with the daemon's log when it ended or takes too long."""
    deadline = time.monotonic() + seconds
    while not condition():
        ended = process is not None and process.poll() is not None
        if ended or time.monotonic() > deadline:
            raise AssertionError(f"{'ended' if ended else 'timed out'}:\n{log.read_text() if log else ''}")
        time.sleep(0.1)
