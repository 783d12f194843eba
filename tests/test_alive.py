"""Roles say that they live; who hangs is killed; who is told to stop does so in time, and loses nothing."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests import peers
from tests.boxes import Boxes
from tests.forked import PROCESSES
from tests.test_daemon import children, is_alive
from tests.test_db import NOW, an_instance, judged, register
from triage import alive, config, daemon, models
from triage.alive import Ear, Pulse, notify
from triage.config import Config
from triage.db import Database
from triage.dicom import phantom
from triage.dicom.header import find_instances
from triage.domain import DeliveryState, StudyState

ROOT = Path(__file__).parents[1]


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{tmp_path}/triage.db")
    database.migrate()
    yield database
    database.close()


@pytest.fixture
def ear(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ear]:
    ear = Ear()
    monkeypatch.setenv("NOTIFY_SOCKET", ear.address)
    yield ear
    ear.close()


def test_systemd_is_told_as_its_manual_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notify("READY=1")  # nobody asked
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        notify("READY=1", "STATUS=well")
        assert systemd.recv(100) == b"READY=1\nSTATUS=well"


def test_a_role_beats_as_long_as_its_loops_turn(
    db: Database, ear: Ear, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(alive, "BEAT_SECONDS", 0.02)
    pulse = Pulse("clerk", db, lambda: NOW)

    def heard() -> set[str]:
        said = list(ear.heard())
        assert {process for process, _ in said} <= {os.getpid()}
        return {state for _, states in said for state in states}

    with pulse.beating():
        turn = pulse.loop("tidying", patience=0.3)
        pulse.count("refused", "out of resources")
        pulse.ready()
        assert {"READY=1", "WATCHDOG=1"} <= heard()
        peers.wait_until(lambda: "WATCHDOG=1" in heard())
        peers.wait_until(lambda: pulse.hung() == ["tidying"])
        with caplog.at_level(logging.ERROR):
            peers.wait_until(lambda: "clerk hangs: no turn of tidying" in caplog.text)
        heard()
        time.sleep(0.1)
        assert heard() == set()
        turn()
        peers.wait_until(lambda: "WATCHDOG=1" in heard())
        (state,) = db.roles.all()
        assert (state.name, state.beat_at, state.starts) == ("clerk", NOW, 1)
    assert "STOPPING=1" in heard()
    with Pulse("clerk", db, lambda: NOW).beating():
        assert db.roles.all()[0].starts == 2
    assert db.roles.all()[0].beat_at is None
    assert db.roles.tallies() == {("refused", "out of resources"): 1}


def test_a_hung_role_is_killed_and_started_again(
    tmp_path: Path, ear: Ear, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And our own supervisor says that all are ready."""
    monkeypatch.setattr(daemon, "HUNG_SECONDS", 2)
    monkeypatch.setattr(daemon, "RESTART_SECONDS", 0.5)
    monkeypatch.setattr(daemon, "NOTIFY_SECONDS", 0.5)
    said: set[str] = set()

    def told(state: str) -> bool:
        said.update(state for _, states in ear.heard() for state in states)
        return state in said

    path, stop = peers.write_config(tmp_path / "daemon"), threading.Event()
    thread = threading.Thread(target=daemon.supervise, args=(path, ["listener"], stop))
    thread.start()
    try:
        peers.wait_until(lambda: told("READY=1"))
        first = children(os.getpid())["listener"]
        assert told("STATUS=all roles are ready")
        os.kill(first, signal.SIGSTOP)
        peers.wait_until(lambda: not is_alive(first))
        peers.wait_until(lambda: children(os.getpid()).get("listener", first) != first)
    finally:
        stop.set()
        thread.join()
    assert told("STOPPING=1")


class Slow(Boxes):
    """Says that it is at a study, and takes longer than anybody waits."""

    def __init__(self, sign: Path) -> None:
        super().__init__()
        self.sign = sign

    def predict(self, volume):
        self.sign.touch()
        for _ in range(10_000):
            time.sleep(0.01)
        raise AssertionError("nobody waits so long")


def work(role: str, path: Path, log: Path, sign: Path) -> None:
    with log.open("ab") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    models.load = lambda _analysis: Slow(sign)
    daemon.OVERTIME_SECONDS = 0.5
    daemon.run_role(role, config.load(path, {}), supervised=False)


@contextmanager
def told_to_stop(role: str, path: Path, when: Callable[[], bool], sign: Path) -> Iterator[str]:
    """One role until it is at its work; gives its log once it has stopped as SIGTERM asks."""
    log = path.parent / "log"
    process = PROCESSES.Process(target=work, args=(role, path, log, sign))
    process.start()
    try:
        peers.wait_until(lambda: process.is_alive() and when(), log=log)
        process.terminate()
        began = time.monotonic()
        process.join(20)
        assert process.exitcode == 0, log.read_text()
        assert time.monotonic() - began < 10
        yield log.read_text()
    finally:
        process.kill()


def prepared(tmp_path: Path, pacs_port: int | None = None) -> tuple[Path, Config, Database]:
    path = peers.write_config(tmp_path / "daemon", pacs_port)
    settings = config.load(path, {})
    database = daemon.open_database(settings)
    return path, settings, database


def test_an_analyzer_hands_back_what_takes_too_long(tmp_path: Path) -> None:
    path, settings, database = prepared(tmp_path)
    phantom.write_study(tmp_path / "study", seed=1, slices=30, rows=64, slice_spacing=8)
    found, _ = find_instances([tmp_path / "study"])
    (settings.storage.spool / found[0].study_instance_uid).mkdir(parents=True)
    for one in found:
        register(database, one, peers.now())
    seen = database.quiet_study(peers.now())
    assert seen is not None
    assert database.mark_ready(seen)
    sign = tmp_path / "judging"
    with told_to_stop("analyzer", path, sign.exists, sign) as log:
        assert "analyzer stops in the middle of its work" in log
        assert "Traceback" not in log
    entry = database.entry(seen.study_instance_uid)
    assert entry is not None
    assert entry.study.state is StudyState.READY
    assert database.claim("another", peers.now(), 60) is not None
    assert [state.beat_at for state in database.roles.all()] == [None]
    database.close()


def test_a_clerk_leaves_a_peer_that_holds_it_up(tmp_path: Path) -> None:
    """The PACS takes the connection and says nothing: the result is owed as before."""
    with socket.create_server((peers.HOST, 0)) as silent:
        path, _, database = prepared(tmp_path, silent.getsockname()[1])
        register(database, an_instance())
        judged(database)
        (file,) = phantom.write_study(tmp_path / "study", seed=1, slices=1, rows=64)
        with database._write() as connection:
            connection.exec_driver_sql("UPDATE delivery SET path = ?", (str(file),))
        silent.settimeout(60)
        caught: list[socket.socket] = []
        accepting = threading.Thread(target=lambda: caught.append(silent.accept()[0]))
        accepting.start()
        with told_to_stop("clerk", path, lambda: bool(caught), tmp_path / "sign") as log:
            assert "clerk stops in the middle of its work" in log
        accepting.join()
        caught[0].close()
    (owed,) = database.deliveries("1.2")
    assert owed.state is DeliveryState.PENDING
    database.close()


BEGUN = {
    "listener": b"\x01\x00\x00\x00\x01\x00",
    "web": b"GET / HTTP/1.1\r\n",
    "orders": b"\x0bMSH|^~\\&|",
}
"""What a peer has said that says no more."""


@pytest.mark.parametrize("role", BEGUN)
def test_who_has_open_connections_stops_in_time(tmp_path: Path, role: str) -> None:
    section = {"port": peers.free_port(), "host": peers.HOST}
    if role == "orders":
        section["peers"] = [peers.HOST]
    path = peers.write_config(tmp_path / "daemon", **{role: section})
    opened: list[socket.socket] = []

    def connected() -> bool:
        try:
            opened.append(socket.create_connection((peers.HOST, section["port"]), timeout=5))
        except OSError:
            return False
        opened[0].sendall(BEGUN[role])
        return True

    with told_to_stop(role, path, connected, tmp_path / "sign") as log:
        assert "Traceback" not in log
    opened[0].close()
