"""Bytes that survive a power cut: written aside, flushed to the disk, then given their name."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from triage.config import Storage
from triage.errors import Retryable

GIGABYTE = 1024**3
NOT_DURABLE = "storage.sync is false: a power cut loses images that were acknowledged; set it to true"


def has_room(storage: Storage) -> bool:
    """True while the disk of the spool has ``minimum_free_gb`` to spare."""
    return free_gigabytes(storage.spool) >= storage.minimum_free_gb


def free_gigabytes(folder: Path) -> float:
    return shutil.disk_usage(folder).free / GIGABYTE


@contextmanager
def undisturbed(spool: Path) -> Iterator[None]:
    """Nobody deletes what the spool holds meanwhile; several may be undisturbed at once."""
    with _locked(spool, fcntl.LOCK_SH):
        yield


@contextmanager
def may_delete(spool: Path) -> Iterator[bool]:
    """False while somebody must be undisturbed, who otherwise waits."""
    try:
        with _locked(spool, fcntl.LOCK_EX | fcntl.LOCK_NB):
            yield True
    except BlockingIOError:
        yield False


@contextmanager
def _locked(folder: Path, how: int) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, how)
        yield
    finally:
        os.close(descriptor)  # which also lets go


def write_durably(path: Path, data: bytes | memoryview) -> None:
    """Put ``data`` at ``path``; afterwards file and directory entry are on the disk, or nothing changed.

    The folder must exist. A file already there is replaced whole. Raises Retryable when the disk refuses.
    """
    try:
        descriptor, name = tempfile.mkstemp(prefix=".", suffix=".part", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                flush(file.fileno())
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        sync_directory(path.parent)
    except OSError as error:
        raise Retryable(f"cannot write {path.name}: {error.strerror}") from error


def make_folder(folder: Path) -> None:
    """Make the folder and its parents, durably. Raises Retryable when the disk refuses."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in missing:
            sync_directory(path.parent)
    except OSError as error:
        raise Retryable(f"cannot make {folder.name}: {error.strerror}") from error


def sync_directory(folder: Path) -> None:
    """Make the names in ``folder`` durable (a rename is only a change of its directory).

    Raises OSError when there is no such folder, Retryable when the disk refuses.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        flush(descriptor)
    finally:
        os.close(descriptor)


def flush(descriptor: int) -> None:
    """Raises Retryable: a second flush would say that all is well (Linux tells of an error once)."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise Retryable(f"cannot write to the disk: {error.strerror}") from error
