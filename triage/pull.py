"""Studies that nobody sends: what lies in files, or in an archive, comes in on the way of all others.

Every object goes through the same ``Receiver`` as what the listener gets: it is judged, ordered and
delivered alike, and the same one again changes nothing.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from itertools import groupby
from operator import attrgetter
from pathlib import Path

from triage import assemble
from triage.config import Config
from triage.db import Database
from triage.dicom import files, header, spool
from triage.dicom.receiving import Receiver
from triage.domain import Instance
from triage.errors import Rejected, Retryable

LARGEST_OBJECT = 2 * 1024**3
"""Bytes; what a zip file makes larger is no image."""
BROKEN_ZIP = (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError, zlib.error)
"""What zipfile raises; RuntimeError is its word for an encrypted member."""


def receiver(db: Database, config: Config, clock: Callable[[], datetime]) -> Receiver:
    """Takes objects into the spool and onto the record. Raises Retryable when there can be no spool."""
    files.make_folder(config.storage.spool)
    return Receiver(
        config.storage.spool,
        on_received=lambda instance: assemble.register(db, config, instance, clock()),
        has_room=lambda: files.has_room(config.storage),
        on_conflict=db.note_conflict,
    )


@dataclass(kw_only=True)
class Coming:
    """A study that an import brings: its objects, and those of them that were here before, by UID."""

    study_instance_uid: str
    patient_id: str = ""
    study_date: str = ""
    study_description: str = ""
    objects: set[str] = field(default_factory=set)
    here_before: frozenset[str] = frozenset()
    error: str = ""
    """Why some of it did not come."""

    @property
    def new(self) -> int:
        return len(self.objects - self.here_before)


# --- files ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class File:
    """A file, or a member of a zip file."""

    path: Path
    member: str = ""

    def __str__(self) -> str:
        return f"{self.path}/{self.member}" if self.member else str(self.path)


@dataclass
class FilesRead:
    """The studies found, in the order found, and the files that are none of theirs, with the reason."""

    studies: dict[str, Coming] = field(default_factory=dict)
    passed_over: list[tuple[File, str]] = field(default_factory=list)


def find(paths: Iterable[Path]) -> list[File]:
    """Every file below ``paths`` and every member of their zip files, in a stable order."""
    found = dict.fromkeys(file for path in paths for file in header.walk(path))
    return [file for path in found for file in _members(path)]


def read_files(found: Iterable[File], db: Database, take: Receiver | None) -> FilesRead:
    """Take in what the files hold; without ``take``, only look.

    Raises Retryable when nothing can be kept now; what has come stays, and again does no harm.
    """
    read = FilesRead()
    for file, content in _contents(found):
        try:
            raw, instance = _object(content)
        except Rejected as reason:
            read.passed_over.append((file, str(reason)))
            continue
        uid = instance.study_instance_uid
        if uid not in read.studies:
            read.studies[uid] = _coming(instance, db.sop_instance_uids(uid))
        read.studies[uid].objects.add(instance.sop_instance_uid)
        if take is not None:
            take.keep(raw, instance, source="")
    return read


def _object(content: bytes | str) -> tuple[bytes, Instance]:
    if isinstance(content, str):
        raise Rejected(content)
    transfer_syntax_uid, body = header.split(content)
    raw = bytes(body)
    return raw, spool.read(raw, transfer_syntax_uid)


def _coming(instance: Instance, here_before: Iterable[str]) -> Coming:
    return Coming(
        study_instance_uid=instance.study_instance_uid,
        patient_id=instance.patient_id,
        study_date=instance.study_date,
        study_description=instance.study_description,
        here_before=frozenset(here_before),
    )


def _is_zip(path: Path) -> bool:
    return path.suffix.lower() == ".zip"


def _members(path: Path) -> list[File]:
    """A zip file that cannot be read is one file, and passed over as such."""
    if not _is_zip(path):
        return [File(path)]
    try:
        with zipfile.ZipFile(path) as archive:
            return [File(path, member.filename) for member in archive.infolist() if not member.is_dir()]
    except BROKEN_ZIP:
        return [File(path)]


def _contents(found: Iterable[File]) -> Iterator[tuple[File, bytes | str]]:
    """Each file with its bytes, or with the reason why there are none; a zip file is opened once."""
    for path, same in groupby(found, attrgetter("path")):
        if not _is_zip(path):
            yield from ((file, _read_plain(file)) for file in same)
            continue
        try:
            with zipfile.ZipFile(path) as archive:
                yield from ((file, _read_member(archive, file.member)) for file in same)
        except BROKEN_ZIP:
            yield File(path), "not a readable zip file"


def _read_plain(file: File) -> bytes | str:
    try:
        return header.read_bytes(file.path)
    except Retryable as error:
        return str(error)


def _read_member(archive: zipfile.ZipFile, name: str) -> bytes | str:
    """Never more than LARGEST_OBJECT, whatever the zip file says of itself; nothing goes to the disk."""
    try:
        with archive.open(name) as stream:
            content = stream.read(LARGEST_OBJECT + 1)
    except BROKEN_ZIP as error:
        return f"cannot be unpacked: {error}"
    return content if len(content) <= LARGEST_OBJECT else "too large for an image"
