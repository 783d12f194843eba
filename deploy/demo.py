"""The whole way of a study on one machine: scanner → daemon → PACS → worklist.

The PACS is this product's own storage SCP writing to a folder; the daemon is the real one, on free ports,
with a database and a spool of its own in a folder that is emptied first (var/demo). Nothing else is touched.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.live import Live
from rich.table import Table

from triage.config import Analysis, Destination
from triage.config import Listener as ListenerSettings
from triage.dicom import phantom, sender
from triage.dicom.header import find_instances
from triage.dicom.listener import Listener
from triage.domain import Instance

DEFAULT_FOLDER = Path(__file__).parents[1] / "var" / "demo"
MARK = ".demo"
"""A file that says: a demo made this folder, and the next one may empty it."""
START_SECONDS = 120
ONCE_SECONDS = 1800
SETTLED = {"analyzed", "rejected", "failed"}
console = Console()


def main() -> int:
    arguments = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    home: Path = arguments.folder
    _empty(home, arguments.folders)
    lock = (home / MARK).open()
    fcntl.flock(lock, fcntl.LOCK_SH)  # another demo must not empty the folder under this one
    studies = _studies(arguments.folders or _made_up_studies(home / "scanner"))
    pacs_port, listener_port, web_port = _free_ports(3)
    chosen = {"analysis": {"model": arguments.model}, "results": {"view_3d": arguments.view_3d}}
    settings = _write_settings(home, pacs_port, listener_port, web_port, chosen)
    page = f"http://127.0.0.1:{web_port}/"
    pacs = ListenerSettings(ae_title="PACS", host="127.0.0.1", port=pacs_port)
    log = home / "daemon.log"
    with _pacs(pacs, home / "pacs"), _daemon(settings, log) as daemon:
        scanner_peer = Destination(name="TRIAGE", ae_title="TRIAGE", host="127.0.0.1", port=listener_port)
        _wait_until_up(daemon, scanner_peer, page, log)
        console.print(f"The worklist: [bold]{page}[/]")
        _send(studies, scanner_peer)
        settled = _watch(daemon, page, len(studies), log)
        console.print("The worklist in reading order:\n")
        subprocess.run(
            [sys.executable, "-P", "-m", "triage", "--config", str(settings), "worklist"], check=True
        )
        console.print(f"Images and results lie in {home}; the PACS's in {home / 'pacs'}")
        if not arguments.once:
            console.print(f"The worklist stays at [bold]{page}[/] until Ctrl-C")
            _until_interrupted(daemon)
    return 0 if settled else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="deploy/demo", description="Show the way of a study.")
    parser.add_argument(
        "folders", nargs="*", type=Path, metavar="DIR", help="real studies instead of made-up ones"
    )
    parser.add_argument("--once", action="store_true", help="end when everything is delivered")
    parser.add_argument("--model", default=Analysis().model, help="the network; triage models lists them")
    parser.add_argument("--view-3d", action="store_true", help="with the 3D view among the results")
    parser.add_argument(
        "--folder", type=Path, default=DEFAULT_FOLDER, help="emptied, then everything lies here"
    )
    arguments = parser.parse_args()
    for folder in arguments.folders:
        if not folder.exists():
            parser.error(f"{folder} does not exist")
    return arguments


def _empty(home: Path, inputs: Sequence[Path]) -> None:
    """Start from nothing, but empty only a folder that an earlier demo made, and never one with inputs."""
    own = home.resolve()
    for folder in (path.resolve() for path in inputs):
        if own == folder or own in folder.parents or folder in own.parents:
            sys.exit(f"{folder} and the demo's own folder {own} overlap; give another --folder")
    if home.exists() and any(home.iterdir()) and not (home / MARK).exists():
        sys.exit(f"{home} holds something that no demo made; give another --folder")
    if (home / MARK).exists():
        with (home / MARK).open() as mark:
            try:
                fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                sys.exit(f"a demo is running in {home}; stop it, or give another --folder")
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    (home / MARK).touch()


def _made_up_studies(folder: Path) -> list[Path]:
    """Three phantoms and one with a hole. Nothing is promised about their order."""
    console.print("Drawing made-up studies: they show the way of a study, not what the network is worth")
    folders = []
    for number, fraction in enumerate((0.0, 0.12, 0.55, 0.2), 1):
        folders.append(folder / f"study{number}")
        phantom.write_study(folders[-1], seed=number, lesion_fraction=fraction)
    for path in sorted(folders[-1].iterdir())[20:26]:
        path.unlink()
    return folders


def _studies(folders: Sequence[Path]) -> dict[str, list[Instance]]:
    instances, unreadable = find_instances(folders)
    for path, reason in unreadable:
        console.print(f"passed over {path}: {reason}", style="yellow")
    studies: dict[str, list[Instance]] = {}
    for instance in instances:
        studies.setdefault(instance.study_instance_uid, []).append(instance)
    if not studies:
        sys.exit(f"no DICOM images in {', '.join(map(str, folders))}")
    return studies


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def _write_settings(
    home: Path, pacs_port: int, listener_port: int, web_port: int, chosen: dict[str, Any]
) -> Path:
    settings = {
        **chosen,
        "storage": {"spool": "spool", "minimum_free_gb": 1},
        "database": {"url": "sqlite:///triage.db"},
        "listener": {"host": "127.0.0.1", "port": listener_port},
        "assemble": {"quiet_seconds": 3},
        "delivery": {
            "destinations": [{"name": "PACS", "ae_title": "PACS", "host": "127.0.0.1", "port": pacs_port}]
        },
        "web": {"port": web_port, "refresh_seconds": 1},
    }
    path = home / "config.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path


@contextmanager
def _pacs(settings: ListenerSettings, folder: Path) -> Iterator[None]:
    with Listener(settings, folder, on_received=lambda _: None, has_room=lambda: True):
        yield


@contextmanager
def _daemon(settings: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as file:
        command = [sys.executable, "-P", "-m", "triage", "--config", str(settings), "serve"]
        daemon = subprocess.Popen(command, stderr=file)
    try:
        yield daemon
    finally:
        daemon.terminate()
        daemon.wait()


def _wait_until_up(daemon: subprocess.Popen[bytes], peer: Destination, page: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    with console.status("Starting the daemon"):
        while sender.echo(peer, "SCANNER", 2) is not None or not _answers(page):
            if daemon.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"the daemon did not start:\n{log.read_text()}")
            time.sleep(0.2)


def _answers(page: str) -> bool:
    try:
        with urllib.request.urlopen(page + "healthz", timeout=2):
            return True
    except OSError:
        return False


def _send(studies: dict[str, list[Instance]], peer: Destination) -> None:
    for uid, instances in studies.items():
        with console.status(f"Sending {len(instances)} images of study {uid}"):
            outcomes = sender.send(
                [i.path for i in instances], peer, calling_ae_title="SCANNER", timeout_seconds=60
            )
        refused = [outcome for outcome in outcomes if not outcome.sent]
        console.print(f"Sent {len(instances) - len(refused)} of {len(instances)} images of study {uid}")
        for outcome in refused[:3]:
            console.print(f"  refused: {outcome.path.name}: {outcome.error}", style="yellow")


def _watch(daemon: subprocess.Popen[bytes], page: str, count: int, log: Path) -> bool:
    """Show the worklist until every study has its answer and every result is delivered."""
    deadline = time.monotonic() + ONCE_SECONDS
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while True:
            with urllib.request.urlopen(page + "api/worklist", timeout=10) as answer:
                rows = json.load(answer)
            live.update(_table(rows), refresh=True)
            if len(rows) >= count and all(map(_is_settled, rows)):
                return all(row["deliveries"]["given_up"] == 0 for row in rows)
            if daemon.poll() is not None or time.monotonic() > deadline:
                console.print(f"not finished; see {log}", style="red")
                return False
            time.sleep(0.5)


def _is_settled(row: dict[str, Any]) -> bool:
    return row["state"] in SETTLED and row["retry_at"] is None and row["deliveries"]["pending"] == 0


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table("#", "answer", "band", "why", "grade", "patient", "images", "delivered", box=None)
    table.title = "Worklist in reading order"
    for place, row in enumerate(rows, 1):
        owed = sum(row["deliveries"].values())
        table.add_row(
            str(place),
            (row["status"] or f"({row['state']})").replace("_", " "),
            row["band"],
            row["reason"],
            row["grade"] or "",
            row["patient_id"],
            str(row["images"]),
            f"{row['deliveries']['sent']}/{owed}" if owed else "",
        )
    return table


def _until_interrupted(daemon: subprocess.Popen[bytes]) -> None:
    try:
        daemon.wait()
    except KeyboardInterrupt:
        console.print("Stopping")


if __name__ == "__main__":
    sys.exit(main())
