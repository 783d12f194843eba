"""Database and spool put away while the daemon runs, and brought back, also at another place.

A file is in the spool before a row names it. So the database is copied first and the spool thereafter: every
row of the copy finds its file. Nothing in the spool is ever written again: a hard link is as good as a copy.
"""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory

from triage import __version__
from triage.config import Config
from triage.db import Database
from triage.dicom import files
from triage.dicom.spool import NO_STUDIES
from triage.errors import ConfigError, Retryable

DATABASE, SPOOL, FACTS = "triage.db", "spool", "backup.json"


@dataclass(frozen=True, slots=True)
class Saved:
    """What a back-up holds: ``missing`` files are named by rows, but were in the spool no more."""

    version: str
    made_at: str
    spool: str
    """Where the spool lay."""
    files: int = 0
    linked: int = 0
    bytes: int = 0
    missing: int = 0


def save(db: Database, config: Config, target: Path, now: datetime) -> Saved:
    """Put database and spool into a folder, or into one file whose name ends with ``.tar``.

    A folder may hold an earlier back-up: only what is new is added to its spool. Raises ConfigError or
    Retryable; what is then in the folder is the earlier back-up still.
    """
    spool = config.storage.spool
    if target.resolve().is_relative_to(spool.resolve()):
        raise ConfigError(f"{target} lies in the spool: name a folder elsewhere, best on another disk")
    saved = Saved(__version__, now.isoformat(), str(spool))
    try:
        with files.undisturbed(spool):  # nothing is deleted meanwhile
            if target.suffix == ".tar":
                return _save_file(db, spool, target, saved)
            return _save_folder(db, spool, target, saved)
    except OSError as error:
        raise Retryable(f"{error.filename or target}: {error.strerror}") from error


def restore(config: Config, source: Path) -> Saved:
    """Make a back-up the database and spool of these settings; ``source`` is as ``save`` left it.

    What the spool holds already stays: images that the back-up does not know are put on record at start.
    Raises ConfigError where there is a database.
    """
    database = config.database.file
    if database.exists():
        raise ConfigError(f"there is a database at {database}: stop the daemon and move it away first")
    spool = config.storage.spool
    try:
        files.make_folder(spool)
        files.make_folder(database.parent)
        if source.is_dir():
            return _restore_folder(config, source, spool, database)
        with TemporaryDirectory(prefix=".restore-", dir=spool.parent) as unpacked:
            with tarfile.open(source) as tar:
                tar.extractall(unpacked, filter="data")  # nothing outside of the folder, no device, no link
            return _restore_folder(config, Path(unpacked), spool, database)
    except (OSError, tarfile.TarError, ValueError) as error:
        raise ConfigError(f"{source} cannot be restored: {error}") from error


def _save_folder(db: Database, spool: Path, target: Path, saved: Saved) -> Saved:
    files.make_folder(target / SPOOL)
    part = target / f"{DATABASE}.part"
    db.copy(part)
    for path in _files(spool):
        saved = _counted(saved, *_bring(path, target / SPOOL / path.relative_to(spool)))
    os.sync()
    saved = replace(saved, missing=_missing(part, spool, target / SPOOL))
    os.replace(part, target / DATABASE)
    files.write_durably(target / FACTS, json.dumps(asdict(saved), indent=2).encode())
    return saved


def _save_file(db: Database, spool: Path, target: Path, saved: Saved) -> Saved:
    """The facts stand first; they are known last."""
    part = target.with_suffix(".tar.part")
    with TemporaryDirectory(prefix=".backup-", dir=target.parent) as folder:
        copied = Path(folder) / DATABASE
        db.copy(copied)
        with tarfile.open(part, "w") as tar:
            for path in _files(spool):
                try:
                    tar.add(path, f"{SPOOL}/{path.relative_to(spool)}", recursive=False)
                except FileNotFoundError:
                    continue  # of a judging that failed
                saved = _counted(saved, False, path.stat().st_size)
            tar.add(copied, DATABASE)
            saved = replace(saved, missing=_missing(copied, spool, spool))
            facts = Path(folder) / FACTS
            facts.write_text(json.dumps(asdict(saved), indent=2))
            tar.add(facts, FACTS)
    with part.open("rb") as whole:
        files.flush(whole.fileno())
    os.replace(part, target)
    files.sync_directory(target.parent)
    return saved


def _restore_folder(config: Config, source: Path, spool: Path, database: Path) -> Saved:
    saved = Saved(**json.loads((source / FACTS).read_text()))
    part = database.with_suffix(".part")
    shutil.copyfile(source / DATABASE, part)
    for path in _files(source / SPOOL):
        _bring(path, spool / path.relative_to(source / SPOOL))
    os.sync()
    copied = Database(f"sqlite:///{part}")
    try:
        copied.migrate()
        audit_file = config.audit.file is not None and config.audit.file.exists()
        copied.settle_copy(Path(saved.spool), spool, audit_file=audit_file)
    finally:
        copied.close()
    os.replace(part, database)
    files.sync_directory(database.parent)
    return saved


def _files(spool: Path) -> Iterator[Path]:
    """Whole files of studies. What is being written is no row's yet."""
    for name, folders, names in os.walk(spool):
        folder = Path(name)
        if folder == spool:
            folders[:] = [one for one in folders if one not in NO_STUDIES]
        whole = (folder / one for one in sorted(names) if not one.startswith("."))
        yield from (path for path in whole if not path.is_symlink())


def _bring(path: Path, to: Path) -> tuple[bool, int]:
    """Make ``to`` hold the file; whether it is a link, and how many bytes it has."""
    size = path.stat().st_size if path.exists() else 0
    if to.exists() and to.stat().st_size == size:
        return to.stat().st_nlink > 1, size
    to.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(path, to)
        return True, size
    except FileNotFoundError:
        return False, 0  # of a judging that failed
    except OSError:  # another disk, or one without links
        part = to.with_name(f".{to.name}.part")
        shutil.copyfile(path, part)
        with part.open("rb") as whole:
            os.fsync(whole.fileno())
        os.replace(part, to)
        return False, size


def _counted(saved: Saved, linked: bool, size: int) -> Saved:
    return replace(saved, files=saved.files + 1, linked=saved.linked + linked, bytes=saved.bytes + size)


def _missing(database: Path, spool: Path, to: Path) -> int:
    """How many files the rows name that are not there."""
    copied = Database(f"sqlite:///{database}")
    try:
        named = (path.relative_to(spool) for path in copied.paths() if path.is_relative_to(spool))
        return len({path for path in named if not (to / path).exists()})
    finally:
        copied.close()
