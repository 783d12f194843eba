"""The JSON of the upload page: begin one, send files, say that it is complete, and see what became of it."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request
from pydantic import BaseModel

from triage.db.uploads import EXAMPLES, Upload
from triage.domain import Person
from triage.web.api import NOT_FOUND, READER, WORKER, Problem
from triage.web.reading_api import EntryOut, ReadingApi
from triage.web.upload import LARGEST_NUMBER, UploadPages

UploadId = Annotated[int, Path(ge=1, le=LARGEST_NUMBER, description="Number of the upload")]
_FILES = {"type": "array", "items": {"type": "string", "format": "binary"}}
FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["files"],
                    "properties": {"files": _FILES},
                }
            }
        },
    }
}
SENT: dict[int | str, dict[str, Any]] = NOT_FOUND | {
    400: {"model": Problem, "description": "What was sent is no form with files, or was cut off"},
    413: {"model": Problem, "description": "More than web.upload_gb"},
}


class PassedOver(BaseModel):
    """A file that was no image."""

    file: str
    reason: str


class TakenIn(BaseModel):
    """What became of some files. All that counts as ``new`` is kept and on record."""

    new: int
    here_before: int
    studies: list[str]
    passed_over: int
    examples: list[PassedOver]


class UploadOut(BaseModel):
    """An upload; its studies in reading order, at most so many as the page shows."""

    upload_id: int
    person: str
    started_at: datetime
    completed_at: datetime | None
    passed_over: int
    examples: list[PassedOver]
    studies: int
    images: int
    rows: list[EntryOut]


class UploadApi:
    """The routes; every one names the permission that it needs."""

    def __init__(self, uploads: UploadPages, reading: ReadingApi) -> None:
        self.uploads, self.reading = uploads, reading

    def router(self) -> APIRouter:
        made, one = APIRouter(tags=["upload"]), "/uploads/{upload_id}"
        made.add_api_route("/uploads", self.begin, methods=["POST"], status_code=201)
        made.add_api_route(one, self.upload, responses=NOT_FOUND)
        made.add_api_route(f"{one}/files", self.send, methods=["POST"], responses=SENT, openapi_extra=FORM)
        made.add_api_route(f"{one}/complete", self.complete, methods=["PUT"], responses=NOT_FOUND)
        return made

    def begin(self, request: Request, _: Person = WORKER) -> UploadOut:
        """Begin to bring studies in."""
        return self._out(request, self.uploads.upload(self.uploads.begin(request)))

    def upload(self, request: Request, upload_id: UploadId, _: Person = READER) -> UploadOut:
        """What came, and what became of it."""
        return self._out(request, self.uploads.upload(upload_id))

    async def send(self, request: Request, upload_id: UploadId, _: Person = WORKER) -> TakenIn:
        """Send files: DICOM files or zip files of them, any number. Once this is answered, images are kept.

        What has come stays, also when the answer is an error; the same again changes nothing.
        """
        intake = await self.uploads.take_in(request, upload_id)
        studies, passed_over = intake.read.studies, intake.passed_over
        return TakenIn(
            new=sum(study.new for study in studies.values()),
            here_before=sum(len(study.objects & study.here_before) for study in studies.values()),
            studies=list(studies),
            passed_over=len(passed_over),
            examples=[PassedOver(file=file, reason=reason) for file, reason in passed_over[:EXAMPLES]],
        )

    def complete(self, request: Request, upload_id: UploadId, _: Person = WORKER) -> UploadOut:
        """All has been sent: its studies are judged at once, without waiting for more images."""
        self.uploads.complete(request, upload_id)
        return self._out(request, self.uploads.upload(upload_id))

    def _out(self, request: Request, upload: Upload) -> UploadOut:
        entries, now = self.uploads.entries(request, upload.upload_id), self.uploads.pages.clock()
        progress = self.uploads.kept.progress(upload.upload_id)
        rows = self.uploads.database.reading.beside(entries, now)
        examples = [PassedOver(file=file, reason=reason) for file, reason in upload.examples]
        return UploadOut(
            **{**asdict(upload), "examples": examples},
            studies=progress.studies,
            images=progress.images,
            rows=[self.reading.entry(row, now) for row in rows],
        )
