"""Studies that nobody sends: what lies in files, or in an archive, comes in on the way of all others.

Every object goes through the same ``Receiver`` as what the listener gets: it is judged, ordered and
delivered alike, and the same one again changes nothing.
"""

from __future__ import annotations

import logging
import lzma
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from time import monotonic
from typing import IO, Protocol

from triage import assemble
from triage.audit import Actor, Event, messages
from triage.config import Config, DicomSource
from triage.db import Database
from triage.dicom import files, header, spool
from triage.dicom.query import Offered, Pacs, Query
from triage.dicom.receiving import Receiver
from triage.dicom.wado import Web
from triage.domain import Instance, Study
from triage.errors import ConfigError, Rejected, Retryable, TriageError

log = logging.getLogger(__name__)

LARGEST_OBJECT = 2 * 1024**3
"""Bytes; what is larger is no image."""
BROKEN_ZIP = (
    zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError, zlib.error, lzma.LZMAError,
    ValueError, IndexError, struct.error, MemoryError,
)  # fmt: skip
"""What zipfile raises; RuntimeError is its word for an encrypted member."""
NO_ZIP = "not a readable zip file"
NOT_THERE = "not compared with the archive, which does not have this study: images may be missing"


def receiver(
    db: Database, config: Config, clock: Callable[[], datetime], importer: Actor | None = None
) -> Receiver:
    """Takes objects into the spool and onto the record. Raises Retryable when there can be no spool.

    With the first object of each study goes into the audit trail that ``importer`` brings it in.
    """
    files.make_folder(config.storage.spool)
    recorded: set[str] = set()

    def received(instance: Instance) -> None:
        assemble.register(db, config, instance, clock())
        uid = instance.study_instance_uid
        if importer and uid not in recorded and (entry := db.entry(uid)):
            db.trail.append(messages(Event.UPLOADED, importer, clock(), [entry.study], "import"))
            recorded.add(uid)

    return Receiver(
        config.storage.spool,
        on_received=received,
        has_room=lambda: files.has_room(config.storage),
        on_conflict=db.note_conflict,
    )


def check_user(spool: Path) -> None:
    """Raises ConfigError for root beside a daemon that is not: it could not read what root keeps."""
    owner = next(folder for folder in (spool, *spool.absolute().parents) if folder.exists()).stat().st_uid
    if os.geteuid() == 0 != owner:
        raise ConfigError(f"run this as the daemon's user: sudo -u '#{owner}' triage …")


@dataclass(kw_only=True)
class Coming:
    """A study that an import brings: its objects, and those of them that were here before, by UID."""

    study_instance_uid: str
    patient_id: str = ""
    study_date: str = ""
    study_description: str = ""
    objects: set[str] = field(default_factory=set)
    series: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Of an archive: series → its CT images, which are the objects."""
    here_before: frozenset[str] = frozenset()
    missing: int = 0
    error: str = ""
    """Why so many are still missing."""

    @property
    def new(self) -> int:
        """How many have come, or are to come."""
        return len(self.objects - self.here_before) - self.missing


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

    Raises Retryable when nothing can be kept now, and KeyboardInterrupt, with what has come: it stays, and
    again does no harm.
    """
    read = FilesRead()
    try:
        for file, content in _contents(found):
            read_in(file, content, db, take, read)
    except (Retryable, KeyboardInterrupt) as error:
        came = sum(study.new for study in read.studies.values()) if take else 0
        raise type(error)(f"{str(error) or 'stopped'}; {so_far(came)}") from error
    return read


def so_far(came: int) -> str:
    """What is said of an import that ends before its end."""
    return f"{came} objects have come and stay; start the same import again to go on"


def read_in(
    file: File, content: bytes | str, db: Database, take: Receiver | None, read: FilesRead
) -> str | None:
    """Take in one object: the Study Instance UID. None for what is no object, which is passed over.

    Raises Retryable when it cannot be kept now.
    """
    try:
        raw, instance = _object(content)
    except Rejected as reason:
        read.passed_over.append((file, str(reason)))
        return None
    uid = instance.study_instance_uid
    if uid not in read.studies:
        read.studies[uid] = _coming(instance, db.sop_instance_uids(uid))
    if take is not None:
        take.keep(raw, instance, source="")
    read.studies[uid].objects.add(instance.sop_instance_uid)
    return uid


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
            yield File(path), NO_ZIP


def streamed(path: Path, stream: IO[bytes], largest: int) -> Iterator[tuple[File, bytes | str]]:
    """As ``_contents``, of one file that was sent to us; a zip file may unpack to ``largest`` bytes."""
    if not _is_zip(path):
        yield File(path), _read(stream, stream.seek(0, os.SEEK_END))
        return
    try:
        with zipfile.ZipFile(stream) as archive:
            members = [member for member in archive.infolist() if not member.is_dir()]
            if sum(member.file_size for member in members) > largest:
                yield File(path), f"unpacks to more than {largest / files.GIGABYTE:g} GB"
                return
            yield from ((File(path, one.filename), _read_member(archive, one.filename)) for one in members)
    except BROKEN_ZIP:
        yield File(path), NO_ZIP


def _read_plain(file: File) -> bytes | str:
    try:
        with file.path.open("rb") as stream:
            return _read(stream, file.path.stat().st_size)
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _read_member(archive: zipfile.ZipFile, name: str) -> bytes | str:
    """Nothing goes to the disk; zipfile gives no more than the size that the zip file says."""
    try:
        with archive.open(name) as stream:
            return _read(stream, archive.getinfo(name).file_size)
    except BROKEN_ZIP as error:
        return f"cannot be unpacked: {error}"


def _read(stream: IO[bytes], size: int) -> bytes | str:
    """The bytes, or why they are no image: films and what blows up are not read to the end."""
    stream.seek(0)
    if not header.may_be_dicom(stream.read(header.HEAD)):
        return "not a DICOM file"
    if size > LARGEST_OBJECT:
        return "too large for an image"
    stream.seek(0)
    return stream.read()


# --- archives ------------------------------------------------------------------------------------


class Archive(Protocol):
    """Something that can be asked and fetched from; a fault is a TriageError that says what to do."""

    def reach(self) -> str:
        """How it answers."""

    def studies(self, query: Query) -> list[Offered]:
        """The studies with CT images that match."""

    def images(self, study_instance_uid: str) -> dict[str, list[str]]:
        """Series → SOP Instance UIDs of its CT images."""

    def fetch(
        self, study_instance_uid: str, wanted: Mapping[str, Sequence[str]], take: Receiver
    ) -> Iterator[int]:
        """Let images of these series come; yields how many more have."""


def archive(config: Config, name: str) -> Archive:
    """The source of that name. Raises ConfigError when there is none."""
    for source in config.pull.sources:
        if source.name == name:
            timeout = config.pull.timeout_seconds
            if isinstance(source, DicomSource):
                return Pacs(source, config.listener.ae_title, timeout)
            return Web(source, timeout)
    known = ", ".join(source.name for source in config.pull.sources) or "none"
    raise ConfigError(f"no source {name}; pull.sources names {known}")


def look(db: Database, asked: Archive, query: Query) -> Iterator[Coming]:
    """Every study that matches, with its CT images and those of them that are here."""
    if query == Query():
        raise ConfigError("say what to fetch: a day or range, a description, a patient, an accession number")
    for study in asked.studies(query):
        coming = Coming(
            study_instance_uid=study.study_instance_uid,
            patient_id=study.patient_id,
            study_date=study.study_date,
            study_description=study.study_description,
        )
        yield _compared(db, asked, coming)


def _compared(db: Database, asked: Archive, study: Coming) -> Coming:
    """With what the archive has of it and what is here; what the archive fails at is the ``error``."""
    try:
        study.series = asked.images(study.study_instance_uid)
    except ConfigError:
        raise
    except TriageError as error:
        study.error = str(error)
    study.objects = {uid for uids in study.series.values() for uid in uids}
    study.here_before = frozenset(db.sop_instance_uids(study.study_instance_uid))
    return study


def fetch(db: Database, asked: Archive, study: Coming, take: Receiver) -> Iterator[int]:
    """Let come what is not here yet; yields how many more have come.

    What the archive fails at is the study's ``error``: it holds up no other. Raises ConfigError.
    """
    missing = {name: [x for x in uids if x not in study.here_before] for name, uids in study.series.items()}
    if wanted := {name: uids for name, uids in missing.items() if uids}:
        try:
            yield from asked.fetch(study.study_instance_uid, wanted, take)
        except ConfigError:
            raise
        except TriageError as error:
            study.error = str(error)
    study.missing = len(study.objects - db.sop_instance_uids(study.study_instance_uid))
    if study.missing and not study.error:
        study.error = "the archive said that it sent all, yet some did not come; see the log here and there"


# --- before a study is judged --------------------------------------------------------------------


def step(db: Database, config: Config, asked: Archive, take: Receiver, now: datetime) -> bool:
    """Compare one quiet study with the archive and let come what is missing; False when none waits for that.

    What comes reopens the study, which is compared again; else it is asked for again until the assembly
    waits no longer. An archive that is away, or has no such study, keeps no study waiting.
    """
    study = db.study_to_compare(now - timedelta(seconds=config.assemble.quiet_seconds), now)
    if study is None:
        return False
    there = Coming(study_instance_uid=study.study_instance_uid)
    try:
        _compared(db, asked, there)
    except ConfigError as error:
        there.error = str(error)
    if there.error:
        log.warning("study %s is not compared with the archive: %s", study.study_instance_uid, there.error)
        db.mark_compared(study, study.completeness or assemble.NOT_COMPARED)
    elif not there.objects:
        db.mark_compared(study, NOT_THERE)
    elif not there.new:
        db.mark_compared(study, "")
    else:
        _complete(db, config, asked, take, study, there, now)
    return True


def _complete(
    db: Database,
    config: Config,
    asked: Archive,
    take: Receiver,
    study: Study,
    there: Coming,
    now: datetime,
) -> None:
    """Let come what is missing, for a while: then it is the next study's turn."""
    total = len(there.objects)
    said = f"{total - there.new} of {total} images: the archive has more than came here"
    log.info("study %s: %s", study.study_instance_uid, said)
    db.mark_compared(study, said, now + timedelta(seconds=config.pull.retry_seconds))
    ends = monotonic() + config.pull.reconcile_seconds
    try:
        for _ in fetch(db, asked, there, take):
            if monotonic() > ends:
                break
    except ConfigError as error:
        there.error = str(error)
    if there.error:
        log.warning("study %s: %s", study.study_instance_uid, there.error)
