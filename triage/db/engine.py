"""Opening the database: SQLite in WAL mode that really syncs, migrated to the newest shape."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import alembic.command
import alembic.config
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError

from triage.errors import ConfigError, Retryable

MIGRATIONS = Path(__file__).parent / "migrations"
BUSY_SECONDS = 30


def connect(url: str, *, sync: bool = True) -> Engine:
    """An engine for the URL; without ``sync`` nothing is flushed to the disk.

    Raises ConfigError for a URL that no database can have.
    """
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise ConfigError(f"database.url = {url!r}: {error}; use sqlite:///path/to/triage.db") from error
    if parsed.get_backend_name() != "sqlite" or not parsed.database:
        raise ConfigError("database.url: only SQLite files are supported; use sqlite:///path/to/triage.db")
    _make(Path(parsed.database))
    engine = create_engine(parsed, connect_args={"timeout": BUSY_SECONDS})
    event.listen(engine, "connect", partial(_tune_sqlite, sync))
    event.listen(engine, "begin", _begin)
    return engine


def _make(path: Path) -> None:
    """Patients' names are for nobody else; SQLite gives the files beside it the same mode."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.touch(0o600)
    except OSError as error:
        raise ConfigError(f"database.url: cannot make {path}: {error.strerror}") from error


def migrate(engine: Engine) -> None:
    """Bring the tables to the newest shape; harmless when they already are."""
    config = alembic.config.Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    with translated(), engine.execution_options(writes=True).begin() as connection:
        config.attributes["connection"] = connection
        alembic.command.upgrade(config, "head")


@contextmanager
def translated() -> Iterator[None]:
    """A database that is locked, full or away is a reason to try again, not to lose a study."""
    try:
        yield
    except DBAPIError as error:
        raise Retryable(f"database: {error.orig}") from error
    except sqlite3.Error as error:  # of a statement that went to the driver itself
        raise Retryable(f"database: {error}") from error


def _tune_sqlite(sync: bool, connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # transactions begin where _begin says, not where the driver guesses
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode = WAL")
    # A committed row must survive a power cut.
    cursor.execute("PRAGMA synchronous = FULL" if sync else "PRAGMA synchronous = OFF")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()


def _begin(connection: Connection) -> None:
    """A transaction that will write takes the lock at once: two of them queue instead of failing."""
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
