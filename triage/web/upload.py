"""Bringing studies in over the page: a zip file, files or folders, and what became of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from triage.audit import Event
from triage.db.uploads import Upload
from triage.domain import Permission, WorklistEntry
from triage.upload import Intake
from triage.web.access import Page, audit
from triage.web.export import as_csv
from triage.web.health import GIGABYTE

if TYPE_CHECKING:
    from triage.web.app import Pages

MOST_SHOWN = 200
LATEST = 5
LARGEST_NUMBER = 2**63 - 1


class UploadPages:
    """Whoever works on the list may bring studies to it; whoever sees it sees what came.

    Bringing in changes what others read next, and sends results to the PACS: so it is no viewer's.
    """

    def __init__(self, pages: Pages) -> None:
        self.pages, self.config = pages, pages.config
        self.database, self.kept = pages.database, pages.database.uploads

    def routes(self) -> list[Route]:
        one = "/uploads/{upload_id:int}"
        return [
            Page("/upload", self.new, Permission.WORKLIST),
            Page("/upload", self.posted, Permission.WORKLIST, ["POST"]),
            Page(one, self.shown, Permission.READ),
            Page(f"{one}.csv", self.file, Permission.READ),
        ]

    # --- pages ---------------------------------------------------------------------------------

    def new(self, request: Request) -> Response:
        return self._render(request, None)

    async def posted(self, request: Request) -> Response:
        """The form without a script: everything at once."""
        upload_id = await run_in_threadpool(self.begin, request)
        await self.take_in(request, upload_id)
        await run_in_threadpool(self.complete, request, upload_id)
        return RedirectResponse(f"/uploads/{upload_id}", status_code=303)

    def shown(self, request: Request) -> Response:
        return self._render(request, self.upload(request.path_params["upload_id"]))

    def file(self, request: Request) -> Response:
        """Every study of the upload as CSV."""
        upload_id = self.upload(request.path_params["upload_id"]).upload_id
        entries = self.kept.entries(upload_id, self.pages.ordering)
        audit(request, Event.EXPORTED, [entry.study for entry in entries], f"upload {upload_id}")
        return as_csv(f"upload-{upload_id}.csv", iter([entries]), self.pages.clock())

    def _render(self, request: Request, upload: Upload | None) -> Response:
        now, person = self.pages.clock(), request.state.person.who
        entries = self.entries(request, upload.upload_id) if upload else []
        progress = self.kept.progress(upload.upload_id) if upload else None
        return self.pages.render(
            request,
            "upload.html",
            now,
            upload=upload,
            rows=self.database.reading.beside(entries, now),
            progress=progress,
            latest=[] if upload else self.kept.latest(person, LATEST),
            largest=int(self.config.web.upload_gb * GIGABYTE),
            quiet=self.config.assemble.quiet_seconds,
        )

    # --- what page and API share -----------------------------------------------------------------

    def upload(self, upload_id: int) -> Upload:
        found = self.kept.one(upload_id) if upload_id <= LARGEST_NUMBER else None
        if found is None:
            raise HTTPException(404, "There is no such upload.")
        return found

    def own(self, request: Request, upload_id: int) -> Upload:
        """Raises HTTPException for an upload that somebody else has begun."""
        found = self.upload(upload_id)
        if found.person != request.state.person.who:
            raise HTTPException(403, f"{found.person} has begun this upload: begin one of your own.")
        return found

    def entries(self, request: Request, upload_id: int) -> list[WorklistEntry]:
        """The first studies of the upload in reading order; that they are seen is put on record."""
        found = self.kept.entries(upload_id, self.pages.ordering, MOST_SHOWN)
        audit(request, Event.LISTED, [entry.study for entry in found])
        return found

    def begin(self, request: Request) -> int:
        return self.kept.begin(request.state.person.who, self.pages.clock())

    def complete(self, request: Request, upload_id: int) -> None:
        self.own(request, upload_id)
        self.kept.complete(upload_id, self.pages.clock())

    async def take_in(self, request: Request, upload_id: int) -> Intake:
        """Take in the files of a posted form as they come; what has come stays, whatever becomes of the rest.

        Raises HTTPException for what is no such form or too large, Retryable when the disk takes no more.
        """
        await run_in_threadpool(self.own, request, upload_id)
        boundary = _boundary(request)
        limit = self.config.web.upload_gb * GIGABYTE
        too_large = f"This is more than {self.config.web.upload_gb:g} GB (web.upload_gb): send it in parts."
        if int(request.headers.get("content-length", 0)) > limit:
            raise HTTPException(413, too_large)
        intake = await run_in_threadpool(Intake, self.database, self.config, upload_id, self.pages.clock)
        try:
            came, form = 0, _Form(boundary, intake)
            async for piece in request.stream():
                came += len(piece)
                if came > limit:
                    raise HTTPException(413, too_large)
                await run_in_threadpool(form.write, piece)
        except (FormParserError, ClientDisconnect) as error:
            raise HTTPException(400, "What was sent is no form with files, or was cut off.") from error
        finally:
            cut_off = intake.is_open
            await run_in_threadpool(self._record, request, upload_id, intake)
        if cut_off:
            raise HTTPException(400, "What was sent ends within a file: send it again.")
        return intake

    def _record(self, request: Request, upload_id: int, intake: Intake) -> None:
        intake.close()
        if intake.passed_over:
            self.kept.pass_over(upload_id, intake.passed_over)
        found = [self.database.entry(uid) for uid, study in intake.read.studies.items() if study.objects]
        if studies := [entry.study for entry in found if entry]:
            audit(request, Event.UPLOADED, studies, f"upload {upload_id}")


def _boundary(request: Request) -> bytes:
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise HTTPException(422, "Send the files as multipart/form-data.")
    return options[b"boundary"]


class _Form:
    """The files of a posted form (RFC 7578), handed on piece by piece; other fields are passed by."""

    def __init__(self, boundary: bytes, intake: Intake) -> None:
        self._intake = intake
        self._name = self._value = self._disposition = b""
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": self._header_name,
                "on_header_value": self._header_value,
                "on_header_end": self._header_end,
                "on_headers_finished": self._headers_end,
                "on_part_data": self._data,
                "on_part_end": self._end,
            },
        )

    def write(self, piece: bytes) -> None:
        self._parser.write(piece)

    def _begin(self) -> None:
        self._disposition = b""

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        if self._name.lower() == b"content-disposition":
            self._disposition = self._value
        self._name = self._value = b""

    def _headers_end(self) -> None:
        name = parse_options_header(self._disposition)[1].get(b"filename")
        if name:  # a file field that was left empty has none
            self._intake.begin(name.decode(errors="replace"))

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._intake.is_open:
            self._intake.write(data[start:end])

    def _end(self) -> None:
        if self._intake.is_open:
            self._intake.end()
