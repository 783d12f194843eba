"""Studies put into a real database through its own functions, for the tests of the page."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from PIL import Image
from starlette.applications import Starlette

from triage import assemble, priority
from triage import config as settings
from triage.config import Config
from triage.db import Database
from triage.domain import Grade, Instance, Owed, Priority, Result, ResultKind, ResultObject, Status, Study
from triage.web.app import create_app

SEG = "1.2.840.10008.5.1.4.1.1.66.4"
SR = "1.2.840.10008.5.1.4.1.1.88.34"
CT = "1.2.840.10008.5.1.4.1.1.2"
NOON = datetime(2026, 3, 2, 12, 0, tzinfo=UTC)


def configured(folder: Path, **web: Any) -> Config:
    return settings.parse(
        {
            "storage": {"spool": folder / "spool"},
            "database": {"url": f"sqlite:///{folder}/triage.db"},
            "web": web,
        }
    )


@dataclass
class Ward:
    """A database and a clock that tests turn by hand."""

    config: Config
    now: datetime = NOON
    database: Database = field(init=False)
    _served: tuple[Config, Starlette] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.database = Database(self.config.database.url)
        self.database.migrate()

    def app(self) -> Starlette:
        """What serves all who browse here; another only for other settings."""
        if self._served is None or self._served[0] is not self.config:
            self._served = self.config, create_app(self.database, self.config, self.clock)
        return self._served[1]

    def clock(self) -> datetime:
        return self.now

    def arrive(self, uid: str, slices: int = 1, *, stat: bool = False, ago: float = 0, **facts: Any) -> Study:
        """Images of a study come in, ``ago`` minutes before now; its state is then RECEIVING."""
        at = self.now - timedelta(minutes=ago)
        known = len(self.database.instances(uid))
        for number in range(known, known + slices):
            received = Instance(
                study_instance_uid=uid,
                series_instance_uid=f"{uid}.1",
                sop_instance_uid=f"{uid}.1.{number}",
                sop_class_uid=CT,
                transfer_syntax_uid="1.2.840.10008.1.2.1",
                path=self.config.storage.spool / uid / f"{number}.dcm",
                digest=f"{number}",
                **{"patient_id": f"P{uid}", "patient_name": "DOE^JANE", **facts},
            )
            self.database.register(received, at, judgeable=True, stat=stat, pending=self.waiting)
        return self.study(uid)

    def study(self, uid: str) -> Study:
        entry = self.database.entry(uid)
        assert entry is not None
        return entry.study

    def waiting(self, arrived_at: datetime, stat: bool) -> Priority:
        return priority.pending(arrived_at, stat, self.config.priority)

    def claim(self, uid: str) -> Study:
        self.database.mark_ready(self.study(uid))
        claimed = self.database.claim("tests", self.now, 900)
        assert claimed is not None
        assert claimed.study_instance_uid == uid
        return claimed

    def judge(
        self,
        uid: str,
        status: Status = Status.POSITIVE,
        *,
        picture: Path | None = None,
        to: tuple[str, ...] = (),
        **figures: Any,
    ) -> None:
        """The study is analysed; ``picture`` is a file that the result names."""
        claimed = self.claim(uid)
        objects = [
            ResultObject(
                kind, self.config.storage.spool / f"{kind}.dcm", f"{uid}.9.{number}.{claimed.attempts}", sop
            )
            for number, (kind, sop) in enumerate({ResultKind.LESION_SEG: SEG, ResultKind.SR: SR}.items())
        ]
        known = len(self.database.results(uid))
        answer = replace(
            self.answer(uid, status),
            content_key=f"{uid}-{known}",
            **{"files": {ResultKind.THUMBNAIL: picture} if picture else {}, **figures},
        )
        place = priority.prioritise(
            answer, claimed.arrived_at, claimed.stat, self.config.priority, self.config.analysis
        )
        assert self.database.finish(
            claimed, answer, [Owed(name, tuple(objects)) for name in to], place, self.now
        )

    def answer(self, uid: str, status: Status) -> Result:
        return Result(
            study_instance_uid=uid,
            patient_id=f"P{uid}",
            status=status,
            reason="",
            series_instance_uid=f"{uid}.1",
            probability=0.97 if status is Status.POSITIVE else 0.04,
            probability_kind="score",
            affected_fraction=0.47 if status is Status.POSITIVE else 0.0,
            affected_left=0.12 if status is Status.POSITIVE else 0.0,
            affected_right=0.47 if status is Status.POSITIVE else 0.0,
            grade=Grade.CT2 if status is Status.POSITIVE else Grade.CT0,
            lung_volume_ml=4210.4,
            lesion_volume_ml=1305.2 if status is Status.POSITIVE else 0.0,
            model="multitask",
            model_version="a1b2c3d4",
            seconds={"read": 1.2, "network": 5.1, "write": 0.6},
        )

    def refuse(self, uid: str, reason: str) -> None:
        """The study can never be judged."""
        study = self.study(uid)
        entry = self.database.entry(uid)
        assert entry is not None
        answer = Result(
            study_instance_uid=uid, patient_id=study.patient_id, status=Status.NOT_ANALYSABLE, reason=reason
        )
        place = priority.not_judged(
            entry.priority, study.arrived_at, study.stat, f"not analysable: {reason}", self.config.priority
        )
        assert self.database.mark_rejected(study, answer, place, self.now)

    def fail(self, uid: str, reason: str, retry_at: datetime | None) -> None:
        claimed = self.claim(uid)
        entry = self.database.entry(uid)
        assert entry is not None
        place = priority.not_judged(
            entry.priority,
            claimed.arrived_at,
            claimed.stat,
            f"analysis failed: {reason}",
            self.config.priority,
        )
        if retry_at is None:
            assert self.database.mark_given_up(claimed, assemble.given_up(claimed, reason), place, self.now)
        else:
            assert self.database.mark_failed(claimed, reason, place, retry_at, claimed.attempts)

    def png(self, name: str = "picture.png", colour: tuple[int, int, int] = (60, 90, 60)) -> Path:
        path = self.config.storage.spool / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (120, 160), colour).save(path)
        return path
