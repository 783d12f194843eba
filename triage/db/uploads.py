"""What people bring in over the page: which studies came with which upload, and what was no image."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import ColumnElement, Connection, RowMapping, Select, func, insert, select, update
from sqlalchemy.dialects.sqlite import insert as upsert

from triage.db.tables import instance, study, upload, upload_study
from triage.db.worklist import ORDERINGS, entries
from triage.domain import Status, WorklistEntry

Connecting = Callable[[], AbstractContextManager[Connection]]
EXAMPLES = 20
"""Files that were no images are named so far; of more, the number is enough."""
PIECE = 1000


@dataclass(frozen=True, slots=True)
class Upload:
    """One upload; it is complete when whoever sends it has said so."""

    upload_id: int
    person: str
    started_at: datetime
    completed_at: datetime | None
    passed_over: int
    """Files that were no images."""
    examples: tuple[tuple[str, str], ...]
    """Names of some of them, each with the reason."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the studies of an upload have come."""

    studies: int
    images: int
    answers: Mapping[Status | None, int]
    """How many have which answer; None is pending."""


class Uploads:
    """Each public method is one transaction."""

    def __init__(self, read: Connecting, write: Connecting) -> None:
        self._read, self._write = read, write

    def begin(self, person: str, now: datetime) -> int:
        """The number of a new upload."""
        with self._write() as connection:
            values = insert(upload).values(person=person, started_at=now)
            upload_id: int = connection.execute(values.returning(upload.c.upload_id)).scalar_one()
            return upload_id

    def one(self, upload_id: int) -> Upload | None:
        query = select(upload).where(upload.c.upload_id == upload_id)
        with self._read() as connection:
            row = connection.execute(query).mappings().first()
            return _upload_of(row) if row else None

    def latest(self, person: str, limit: int) -> list[Upload]:
        """Of one person, the newest first."""
        query = (
            select(upload).where(upload.c.person == person).order_by(upload.c.upload_id.desc()).limit(limit)
        )
        with self._read() as connection:
            return [_upload_of(row) for row in connection.execute(query).mappings()]

    def add(self, upload_id: int, study_instance_uid: str) -> None:
        """Images of this study came with it."""
        values = {"upload_id": upload_id, "study_instance_uid": study_instance_uid}
        with self._write() as connection:
            connection.execute(upsert(upload_study).values(**values).on_conflict_do_nothing())

    def pass_over(self, upload_id: int, files: Sequence[tuple[str, str]]) -> None:
        """These files, each with the reason, were no images."""
        mine = upload.c.upload_id == upload_id
        with self._write() as connection:
            known: list[list[str]] = connection.execute(select(upload.c.examples).where(mine)).scalar_one()
            examples = [*known, *map(list, files[: EXAMPLES - len(known)])]
            count = upload.c.passed_over + len(files)
            connection.execute(update(upload).where(mine).values(passed_over=count, examples=examples))

    def complete(self, upload_id: int, now: datetime) -> None:
        """All has come: its studies need not wait for more."""
        with self._write() as connection:
            connection.execute(update(upload).where(upload.c.upload_id == upload_id).values(completed_at=now))

    def progress(self, upload_id: int) -> Progress:
        answers = (
            select(study.c.status, func.count())
            .where(study.c.study_instance_uid.in_(_came(upload_id)))
            .group_by(study.c.status)
        )
        images = (
            select(func.count())
            .select_from(instance)
            .where(instance.c.study_instance_uid.in_(_came(upload_id)), instance.c.judgeable)
        )
        with self._read() as connection:
            found = {Status(said) if said else None: count for said, count in connection.execute(answers)}
            return Progress(sum(found.values()), connection.execute(images).scalar_one(), found)

    def entries(self, upload_id: int, ordering: str, limit: int | None = None) -> list[WorklistEntry]:
        """Its studies, open or closed, in reading order."""
        query = (
            select(study)
            .where(study.c.study_instance_uid.in_(_came(upload_id)))
            .order_by(*ORDERINGS[ordering])
            .limit(limit)
        )
        with self._read() as connection:
            found = connection.execute(query).mappings().all()
            pieces = (found[begin : begin + PIECE] for begin in range(0, len(found), PIECE))
            return [entry for piece in pieces for entry in entries(connection, piece)]


def _came(upload_id: int) -> Select[tuple[str]]:
    return select(upload_study.c.study_instance_uid).where(upload_study.c.upload_id == upload_id)


def is_whole() -> ColumnElement[bool]:
    """An upload that brought the study was completed, and no image has come since."""
    return (
        select(upload_study.c.upload_id)
        .join(upload, upload.c.upload_id == upload_study.c.upload_id)
        .where(
            upload_study.c.study_instance_uid == study.c.study_instance_uid,
            upload.c.completed_at >= study.c.last_received_at,
        )
        .exists()
    )


def _upload_of(row: RowMapping) -> Upload:
    values = {name: row[name] for name in Upload.__slots__}
    return Upload(**{**values, "examples": tuple((name, reason) for name, reason in row["examples"])})
