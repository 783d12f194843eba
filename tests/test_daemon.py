"""The supervised daemon as it is installed: real processes, real weights, real signals."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import urllib.request
from pathlib import Path

import pytest

from tests import peers
from tests.forked import command
from triage import config, daemon
from triage.config import Destination
from triage.db import Database
from triage.dicom import phantom
from triage.domain import StudyState

ROOT = Path(__file__).parents[1]


def children(pid: int) -> dict[str, int]:
    """Role → pid of the daemon's processes."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            arguments = Path(f"/proc/{child}/cmdline").read_text().split("\0")
            if "--role" in arguments:  # a child that has just been forked is still a copy of its parent
                found[arguments[arguments.index("--role") + 1]] = int(child)
    return found


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def states(settings: config.Config) -> list[StudyState]:
    db = Database(settings.database.url)
    try:
        return [entry.study.state for entry in db.worklist(peers.now(), "deadline", 7)]
    finally:
        db.close()


def test_a_killed_role_is_started_again_and_the_study_is_judged(tmp_path: Path) -> None:
    """The analyzer is killed before the study comes; the page shows the answer in the end."""
    path = peers.write_config(tmp_path / "daemon", analysis={"minimum_lung_ml": 0})
    settings, log = config.load(path, {}), tmp_path / "log"
    phantom.write_study(tmp_path / "study", seed=1, slices=30, rows=128, slice_spacing=8)
    with peers.daemon(path, log) as process:
        peers.wait_until(lambda: "analyzer" in children(process.pid), process, log)
        first = children(process.pid)["analyzer"]
        os.kill(first, signal.SIGKILL)
        peers.scan(tmp_path / "study", settings)
        peers.wait_until(lambda: states(settings) == [StudyState.ANALYZED], process, log)
        assert children(process.pid)["analyzer"] != first
        with urllib.request.urlopen(f"http://127.0.0.1:{settings.web.port}/api/worklist", timeout=5) as page:
            (row,) = json.load(page)
        assert row["status"] in ("positive", "negative")
        assert row["calibrated"] is False
    assert process.returncode == 0
    assert "Traceback" not in log.read_text()


def test_no_role_outlives_a_killed_supervisor(tmp_path: Path) -> None:
    path = peers.write_config(tmp_path / "daemon")
    with peers.daemon(path, tmp_path / "log") as process:
        peers.wait_until(lambda: set(children(process.pid)) == {"listener", "clerk", "analyzer", "web"})
        roles = children(process.pid)
        process.kill()
        process.wait()
        peers.wait_until(lambda: not any(map(is_alive, roles.values())))


def test_a_role_that_has_worked_is_tried_again_whatever_stops_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page's port is taken after a crash: the listener must go on receiving meanwhile."""
    monkeypatch.setattr(daemon, "PROVEN_SECONDS", 0.1)
    monkeypatch.setattr(daemon, "RESTART_SECONDS", 0.5)
    path = peers.write_config(tmp_path / "daemon")
    settings = config.load(path, {})
    page = Destination(name="page", ae_title="X", host="127.0.0.1", port=settings.web.port)
    stop = threading.Event()
    thread = threading.Thread(target=daemon.supervise, args=(path, ["listener", "web"], stop))
    thread.start()
    try:
        peers.wait_until(lambda: peers.answers(page) and peers.answers(peers.destination(settings)))
        first = children(os.getpid())["web"]
        os.kill(first, signal.SIGKILL)
        os.waitid(os.P_PID, first, os.WEXITED | os.WNOWAIT)
        with socket.create_server(("127.0.0.1", settings.web.port)):
            seen: set[int] = set()

            def tried_twice() -> bool:
                seen.add(children(os.getpid()).get("web", first))
                return len(seen - {first}) >= 2

            peers.wait_until(tried_twice)
            assert peers.answers(peers.destination(settings))
        peers.wait_until(lambda: peers.answers(page))
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"analysis": {"model": "nonsense"}}, ["analysis.model", "nonsense", "multitask"]),
        ({"listener": {"port": 0}}, ["listener.port", "0"]),
        ({"database": {"url": "nonsense://x"}}, ["database.url"]),
    ],
)
def test_what_is_wrong_is_wrong_at_start(
    tmp_path: Path, section: dict[str, dict[str, object]], words: list[str]
) -> None:
    path = peers.write_config(tmp_path / "daemon", **section)
    ended = command("--config", str(path), "serve")
    assert ended.returncode == 78
    for word in words:
        assert word in ended.stderr


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with peers.pacs(tmp_path / "pacs") as (port, _):
        path = peers.write_config(tmp_path / "daemon", listener={"port": port})
        ended = command("--config", str(path), "serve")
    assert ended.returncode == 78
    assert f"listener.port = {port}" in ended.stderr
