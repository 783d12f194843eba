"""The daemon's steps in one process, with a clock turned by hand: a scanner in front, a PACS behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from tests import peers
from tests.boxes import Boxes
from triage import analyze, assemble, commitment, config, deliver, policies
from triage.config import Config
from triage.db import Database
from triage.dicom.listener import Listener
from triage.dicom.storage_commitment import Reports
from triage.domain import Instance, WorklistEntry
from triage.models import Model

NOON = datetime(2026, 3, 2, 12, 0, tzinfo=UTC)


@dataclass
class Hospital:
    """A listener that really listens; everything else happens when the test says so."""

    config: Config
    db: Database
    model: Model = field(default_factory=Boxes)
    now: datetime = NOON
    errors: list[str] = field(default_factory=list)

    def receive(self, instance: Instance) -> None:
        assemble.register(self.db, self.config, instance, self.now)

    def pass_time(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)

    def work(self) -> None:
        """Let the quiet period pass, then assemble, judge and deliver all there is."""
        self.pass_time(self.config.assemble.quiet_seconds)
        while assemble.step(self.db, self.config, self.now):
            pass
        while analyze.step(self.db, self.config, self.model, "test", self.now):
            pass
        self.deliver()

    def deliver(self) -> None:
        for destination in self.config.destinations:
            while deliver.step(self.db, self.config, destination, self.now):
                pass

    def commit(self) -> None:
        for destination in commitment.asked(self.config):
            while commitment.step(self.db, self.config, destination, self.now):
                pass

    def requeue(self, study_instance_uid: str) -> None:
        assert self.db.requeue(study_instance_uid, self.now, policies.pending(self.db, self.config))

    def entry(self, study_instance_uid: str) -> WorklistEntry:
        entry = self.db.entry(study_instance_uid)
        assert entry is not None, f"{study_instance_uid} is not on record"
        return entry


@contextmanager
def hospital(folder: Path, pacs_port: int | None = None, **sections: Any) -> Iterator[Hospital]:
    """Everything set up below ``folder`` on free ports of this machine."""
    settings = config.load(peers.write_config(folder, pacs_port, **sections), {})
    db = Database(settings.database.url)
    db.migrate()
    built = Hospital(settings, db)
    with Listener(
        settings.listener,
        settings.storage.spool,
        on_received=built.receive,
        has_room=lambda: True,
        on_conflict=db.note_conflict,
        commitments=Reports(lambda report: commitment.take(db, settings, report, built.now)),
    ):
        yield built
    db.close()
