"""The database as a file to put away, and such a file made the database again, also at another place."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from sqlalchemy import Connection, Engine, or_, select, text

from triage.db.tables import delivery, instance, result, study
from triage.errors import Retryable

PIECE = 10_000
"""Rows read at once."""
MOVED = (
    "UPDATE instance SET path = :new || substr(path, :rest) WHERE substr(path, 1, :length) = :old",
    "UPDATE delivery SET path = :new || substr(path, :rest) WHERE substr(path, 1, :length) = :old",
    "UPDATE result SET document = replace(document, :old_json, :new_json)",
)


def copy(engine: Engine, path: Path) -> None:
    """The whole database as of one moment, at ``path``, while others read and write (SQLite's backup API).

    Raises Retryable when it cannot be read or written, or is damaged.
    """
    path.unlink(missing_ok=True)
    connection = engine.raw_connection()
    try:
        with closing(sqlite3.connect(path)) as made:
            connection.driver_connection.backup(made)  # type: ignore[union-attr]
            made.execute("PRAGMA journal_mode = DELETE")  # one file, whatever becomes of those beside it
            (said,) = made.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.Error as error:
        raise Retryable(f"the database cannot be copied: {error}") from error
    finally:
        connection.close()
    if said != "ok":
        raise Retryable(f"the database is damaged: {said}")


def paths(connection: Connection) -> Iterator[Path]:
    """Every file that the rows name, but images that were deleted on purpose."""
    deleted = study.c.images_deleted_at
    there = or_(deleted.is_(None), deleted < instance.c.received_at)
    images = select(instance.c.path).join(study).where(there)
    owed = select(delivery.c.path).where(delivery.c.path.is_not(None))
    for query in (images, owed):
        for path in connection.execution_options(yield_per=PIECE).execute(query).scalars():
            yield Path(path)
    for document in connection.execute(select(result.c.document)).scalars():
        yield from map(Path, document.get("files", {}).values())


def move(connection: Connection, old: Path, new: Path) -> None:
    """The files of the spool lie elsewhere now."""
    before, after = f"{old}/", f"{new}/"
    values = {
        "old": before,
        "new": after,
        "length": len(before),
        "rest": len(before) + 1,
        "old_json": json.dumps(before)[:-1],
        "new_json": json.dumps(after)[:-1],
    }
    for statement in MOVED:
        connection.execute(text(statement), values)


def forget_processes(connection: Connection, *, audit_file: bool) -> None:
    """Nobody who was alive then is now; without ``audit_file`` the trail is written to a new one, whole."""
    connection.execute(text("UPDATE role SET beat_at = NULL, device = NULL"))
    if not audit_file:
        connection.execute(text("DELETE FROM audit_sent WHERE sink = 'file'"))
