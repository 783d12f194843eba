"""Files that a person sends over the page: each is taken in as ``triage import`` does, once it is here."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

from triage import pull
from triage.config import Config
from triage.db import Database
from triage.dicom import files
from triage.errors import Retryable


class Intake:
    """Files of one upload, one after the other, piece by piece.

    A file waits on the disk of the spool, without a name there, so that nothing is left of it if we die.
    Whatever has been taken in stays, and the same again changes nothing. Raises Retryable when the disk takes
    no more.
    """

    def __init__(self, db: Database, config: Config, upload_id: int, clock: Callable[[], datetime]) -> None:
        self._db, self._storage, self._upload_id = db, config.storage, upload_id
        self._largest = int(config.web.upload_gb * files.GIGABYTE)
        self._take = pull.receiver(db, config, clock)
        self._path = Path()
        self._file: IO[bytes] | None = None
        self.read = pull.FilesRead()

    def begin(self, name: str) -> None:
        try:
            self._path = Path(name)
            self._file = TemporaryFile(dir=self._storage.spool)  # noqa: SIM115 - end and close close it
        except OSError as error:
            raise Retryable(f"cannot write to the spool: {error.strerror}") from error

    def write(self, piece: bytes) -> None:
        """More of the file that was begun."""
        assert self._file is not None  # noqa: S101 - begin comes first
        if not files.has_room(self._storage):
            raise Retryable("the disk is full: make room for the spool, see storage.minimum_free_gb")
        try:
            self._file.write(piece)
        except OSError as error:
            raise Retryable(f"cannot write to the spool: {error.strerror}") from error

    def end(self) -> None:
        """The file is here: take it in, or all that it holds. Afterwards it is kept, and on record."""
        assert self._file is not None  # noqa: S101 - begin comes first
        known = set(self.read.studies)
        for file, content in pull.streamed(self._path, self._file, self._largest):
            uid = pull.read_in(file, content, self._db, self._take, self.read)
            if uid is not None and uid not in known:
                self._db.uploads.add(self._upload_id, uid)
                known.add(uid)
        self.close()

    def close(self) -> None:
        """Leave what has not come to its end."""
        if self._file is not None:
            self._file.close()
            self._file = None

    @property
    def is_open(self) -> bool:
        """Whether a file was begun and has not ended."""
        return self._file is not None

    @property
    def passed_over(self) -> list[tuple[str, str]]:
        """Names of what was no image, each with the reason."""
        return [(str(file), reason) for file, reason in self.read.passed_over]
