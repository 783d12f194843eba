"""kill -9 at any point between the first slice and the last delivery: nothing is lost, nothing doubled."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

from tests import peers
from tests.forked import PROCESSES
from tests.killed import POINTS, work
from triage import config
from triage.config import Config
from triage.db import Database
from triage.dicom import phantom, sender
from triage.domain import DeliveryState, StudyState, WorklistEntry

SLICES = 30
SEG, SR, PICTURE = (
    "1.2.840.10008.5.1.4.1.1.66.4",
    "1.2.840.10008.5.1.4.1.1.88.34",
    "1.2.840.10008.5.1.4.1.1.7",
)


@contextmanager
def roles(path: Path, log: Path, point: str | None = None) -> Iterator[ForkServerProcess]:
    process = PROCESSES.Process(target=work, args=(path, log, point))
    process.start()
    try:
        yield process
    finally:
        process.terminate()
        process.join(60)


def send_as_often_as_it_takes(study: Path, settings: Config, process: ForkServerProcess) -> None:
    """A scanner keeps sending what was not acknowledged; here until all is, or the daemon is dead."""
    files = sorted(study.iterdir())
    peer = peers.destination(settings)
    while files and process.is_alive():
        peers.wait_until(lambda: not process.is_alive() or peers.answers(peer))
        outcomes = sender.send(files, peer, calling_ae_title="SCANNER", timeout_seconds=5)
        files = [outcome.path for outcome in outcomes if not outcome.sent]


def entry_of(settings: Config) -> WorklistEntry | None:
    db = Database(settings.database.url)
    db.migrate()
    try:
        found = db.search("")
        return found[0] if found else None
    finally:
        db.close()


def is_delivered(settings: Config) -> bool:
    entry = entry_of(settings)
    return (
        entry is not None
        and entry.study.state is StudyState.ANALYZED
        and entry.deliveries == {DeliveryState.SENT: 4}
    )


@pytest.mark.parametrize("point", POINTS)
def test_the_list_and_the_pacs_end_the_same(tmp_path: Path, point: str) -> None:
    study = tmp_path / "study"
    phantom.write_study(study, seed=7, slices=SLICES, rows=64, slice_spacing=8)
    log = tmp_path / "daemon.log"
    with peers.pacs(tmp_path / "pacs") as (port, received):
        path = peers.write_config(tmp_path / "daemon", port, assemble={"quiet_seconds": 2.5})
        settings = config.load(path, {})
        with roles(path, log, point) as process:
            send_as_often_as_it_takes(study, settings, process)
            process.join(60)
            assert process.exitcode == -signal.SIGKILL, log.read_text()
        with roles(path, log) as process:
            send_as_often_as_it_takes(study, settings, process)
            peers.wait_until(lambda: is_delivered(settings), log=log)
    entry = entry_of(settings)
    assert entry is not None
    assert entry.images == SLICES
    assert entry.result is not None
    assert entry.result.revision == 1
    assert entry.priority.reason == "right lung 38 % affected, score 0.80"
    delivered = {instance.sop_instance_uid: instance for instance in received}
    classes = Counter(instance.sop_class_uid for instance in delivered.values())
    assert classes == {SEG: 1, SR: 1, PICTURE: 2}
    assert (
        len({(i.sop_instance_uid, i.digest) for i in received}) == 4
    )  # sent again, if at all, byte for byte
