"""The page and its JSON: the worklist, one study, search, put together from the modules of its parts."""

from __future__ import annotations

import hashlib
import logging
import re
import socket
import threading
from collections.abc import Callable
from datetime import datetime, timedelta
from io import BytesIO
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import quote

import uvicorn
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from PIL import Image
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Mount
from starlette.staticfiles import StaticFiles

from triage import policies
from triage.audit import Event
from triage.config import Config
from triage.db import Database
from triage.db.worklist import Chosen
from triage.dicom.capture import read_capture
from triage.domain import Permission, ResultKind, StudyState, WorklistEntry
from triage.errors import ConfigError, Retryable
from triage.rows import entry_row
from triage.web import api, words
from triage.web.access import Auditor, Clock, Page, audit
from triage.web.guard import HEADERS, LIVE, Guard
from triage.web.health import health, troubles
from triage.web.metrics import Metrics
from triage.web.monitoring import MonitoringPage
from triage.web.people import People
from triage.web.people_api import PeopleApi
from triage.web.policy import PolicyPages
from triage.web.policy_api import PolicyApi
from triage.web.reading import ReadingList
from triage.web.reading_api import ReadingApi
from triage.web.studies import Studies, with_answer
from triage.web.studies_api import StudiesApi
from triage.web.upload import UploadPages
from triage.web.upload_api import UploadApi
from triage.web.viewer import Viewer

log = logging.getLogger(__name__)

STATIC = Path(__file__).parent / "static"
LONGEST_LIST = 1000
"""Rows of /api/worklist; when more studies are open, a link leads on."""
LONGEST_SEARCH = 100
PROGRAMS = ("/api/", "/health", "/metrics")
"""Addresses that programs ask: they get JSON, and no form to log in with."""
NEEDS_TOKEN = "this needs the header 'Authorization: Bearer TOKEN'"  # noqa: S105 - no token, a sentence


def serve(
    database: Database,
    config: Config,
    clock: Clock,
    stop: threading.Event,
    on_ready: Callable[[], None] = lambda: None,
    on_turn: Callable[[], None] = lambda: None,
) -> None:
    """Answer on ``config.web`` until ``stop`` is set (or a signal comes, in the main thread).

    ``on_ready`` is called once we listen, ``on_turn`` every few seconds as long as the loop turns.
    Raises ConfigError when the address cannot be listened on.
    """

    async def turned() -> None:
        on_turn()

    settings = uvicorn.Config(
        create_app(database, config, clock, stop),
        log_config=None,
        log_level="warning",
        access_log=False,  # addresses hold study UIDs and searched names
        proxy_headers=False,  # the guard reads them, from the proxies that the settings name
        server_header=False,
        ws="none",
        timeout_graceful_shutdown=5,
        callback_notify=turned,
        timeout_notify=5,
    )
    server = _Server(settings, stop)

    def end_with_stop() -> None:
        stop.wait()
        server.should_exit = True

    with _listen(config.web.host, config.web.port) as listening:
        threading.Thread(target=end_with_stop, name="web-stop", daemon=True).start()
        log.info("worklist on http://%s:%d/", config.web.host, config.web.port)
        on_ready()
        server.run(sockets=[listening])


class _Server(uvicorn.Server):
    """A signal also ends the live streams: the server would wait for them."""

    def __init__(self, settings: uvicorn.Config, stop: threading.Event) -> None:
        super().__init__(settings)
        self._stop = stop

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._stop.set()
        super().handle_exit(sig, frame)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.create_server((host, port), family=family)
        # Inherited by its connections: else a small answer waits 40 ms for the peer to acknowledge.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listening
    except OSError as error:
        raise ConfigError(
            f"web: cannot listen on {host}:{port}: {error.strerror}; choose another web.port"
        ) from error


def create_app(
    database: Database, config: Config, clock: Clock, stop: threading.Event | None = None
) -> Starlette:
    """The ASGI application. ``clock`` gives the aware ``now`` of each request; ``stop`` ends live streams."""
    pages = Pages(database, config, clock)
    people = People(database, config, clock, pages.templates)
    reading = ReadingList(pages, stop or threading.Event())
    policy, monitoring = PolicyPages(pages), MonitoringPage(pages)
    auditor = Auditor(database.trail, clock, timedelta(minutes=config.audit.repeat_minutes))
    studies, uploads, reading_api = Studies(pages), UploadPages(pages), ReadingApi(reading)
    routes: list[BaseRoute] = [
        *reading.routes(),
        Page("/search", pages.search, Permission.READ),
        *studies.routes(),
        *Viewer(database, config).routes(),
        Page("/pictures/{study_instance_uid}.png", pages.picture, Permission.READ),
        Page("/pictures/{study_instance_uid}/large.png", pages.large_picture, Permission.READ),
        Page("/pictures/{study_instance_uid}/key_slices.png", pages.key_slices, Permission.READ),
        Page("/meshes/{study_instance_uid}.glb", pages.mesh, Permission.READ),
        Page("/api/worklist", pages.api_worklist, Permission.READ),
        Page("/healthz", pages.health, Permission.OPEN),
        Page(LIVE, pages.live, Permission.OPEN),
        Page("/health/ready", pages.ready, Permission.OPEN),
        *Metrics(database, config, clock).routes(),
        *people.routes(),
        *policy.routes(),
        *monitoring.routes(),
        *uploads.routes(),
        Mount(
            api.PATH,
            api.create_api(
                reading_api.router(),
                PeopleApi(people).router(),
                PolicyApi(policy).router(),
                monitoring.router(),
                StudiesApi(studies).router(),
                UploadApi(uploads, reading_api).router(),
            ),
        ),
        Mount("/static", StaticFiles(directory=STATIC)),
    ]
    return Starlette(
        routes=routes,
        middleware=[
            Middleware(Guard, database=database, web=config.web, clock=clock, auditor=auditor),
        ],
        exception_handlers={
            HTTPException: lambda request, error: pages.refused(request, error, people.login),
            Retryable: pages.unavailable,
            Exception: pages.broken,
        },
    )


class Pages:
    """Every page is rendered here, from one read of the database, at one ``now``."""

    def __init__(self, database: Database, config: Config, clock: Clock) -> None:
        self.database = database
        self.config = config
        self.clock = clock
        self.templates = _templates(config)

    def search(self, request: Request) -> Response:
        now, text = self.clock(), request.query_params.get("q", "").strip()[:256]
        spelled = dict.fromkeys((text, re.sub(r"[,\s]+", "^", text)))  # "Doe, Jane" is kept as DOE^JANE
        found = (self.database.search(one, LONGEST_SEARCH) for one in spelled if one)
        entries: list[WorklistEntry] = next(filter(None, found), [])
        audit(request, Event.SEARCHED, detail=text)
        audit(request, Event.LISTED, [entry.study for entry in entries])
        return self.render(
            request,
            "search.html",
            now,
            text=text,
            rows=self.database.reading.beside(entries, now),
            more=len(entries) == LONGEST_SEARCH,
        )

    def picture(self, request: Request) -> Response:
        """The thumbnail the database names for this study, and no other file."""
        return FileResponse(self._file_of(request, ResultKind.THUMBNAIL), media_type="image/png")

    def large_picture(self, request: Request) -> Response:
        """The summary picture as the PACS has it; a study may have only the thumbnail."""
        try:
            path = self._file_of(request, ResultKind.PICTURE)
        except HTTPException:
            return self.picture(request)
        png = BytesIO()
        Image.fromarray(read_capture(path)).save(png, "PNG", compress_level=1)
        return Response(png.getvalue(), media_type="image/png")

    def key_slices(self, request: Request) -> Response:
        """The slices with most lesion, where ``results.key_slices`` was on and there was a lesion."""
        return FileResponse(self._file_of(request, ResultKind.KEY_SLICES_PNG), media_type="image/png")

    def mesh(self, request: Request) -> Response:
        """Surfaces of lungs and infection, where ``results.view_3d`` was on."""
        return FileResponse(self._file_of(request, ResultKind.MESH), media_type="model/gltf-binary")

    def api_worklist(self, request: Request) -> Response:
        """The head of the list; the header ``Link`` says where it goes on (RFC 8288)."""
        now, days = self.clock(), self.config.retention.leave_list_after_days
        found = self.database.reading.page(now, self.ordering, days, Chosen(), limit=LONGEST_LIST)
        audit(request, Event.LISTED, [row.entry.study for row in found.rows])
        answer = JSONResponse([entry_row(row.entry, now) for row in found.rows])
        if found.more:
            answer.headers["link"] = f'<{api.PATH}/worklist?after={found.rows[-1].key}>; rel="next"'
        return _unless_known(request, answer)

    def health(self, _: Request) -> Response:
        now = self.clock()
        counts = self.database.counts(now, self.config.retention.leave_list_after_days)
        found = troubles(self.database, self.config, now)
        states = {state.value: counts.get(state, 0) for state in StudyState}
        return JSONResponse({"ok": not found, "troubles": found, "open": states})

    def live(self, _: Request) -> Response:
        """This process answers; it asks nobody else."""
        return JSONResponse({"ok": True})

    def ready(self, _: Request) -> Response:
        """Whether everything is here that the daemon needs: 200, else 503; and what it warns of."""
        found = health(self.database, self.config, self.clock())
        answer = {
            "ok": not found.problems,
            "problems": found.problems,
            "warnings": found.warnings,
            "roles": found.roles,
        }
        return JSONResponse(answer, status_code=503 if found.problems else 200)

    def refused(self, request: Request, error: Exception, login: Callable[[Request], Response]) -> Response:
        """Who has to log in first is shown ``login`` in place of the page."""
        assert isinstance(error, HTTPException)  # noqa: S101 - the handler is registered for it alone
        if error.status_code == 401 and not request.url.path.startswith(PROGRAMS):
            return login(request)
        plain = {"Not Found": "There is no such page or study.", "Unauthorized": NEEDS_TOKEN}
        detail = plain.get(error.detail, error.detail)
        return self._plain(request, error.status_code, detail)

    def unavailable(self, request: Request, error: Exception) -> Response:
        log.warning("worklist page: %s", error)
        return self._plain(request, 503, "The database does not answer now. The list could not be read.")

    def broken(self, request: Request, _: Exception) -> Response:
        response = self._plain(request, 500, "The page could not be made; the log says why.")
        response.headers.update(HEADERS)  # this answer passes outside of the guard
        return response

    def _plain(self, request: Request, status_code: int, detail: str) -> Response:
        if request.url.path.startswith(PROGRAMS):
            return JSONResponse({"ok": False, "error": detail}, status_code=status_code)
        html = self.templates.get_template("message.html").render(status_code=status_code, detail=detail)
        return HTMLResponse(html, status_code=status_code)

    def entry(self, study_instance_uid: str) -> WorklistEntry:
        entry = self.database.entry(study_instance_uid)
        if entry is None:
            raise HTTPException(404)
        return entry

    @property
    def ordering(self) -> str:
        """The order of every list, by the policy that counts now."""
        return policies.in_force(self.database, self.config).ordering

    def render(self, request: Request, template: str, now: datetime, **values: Any) -> Response:
        html = self.templates.get_template(template).render(
            now=now,
            picture=self.picture_address,
            key_slices=self._key_slices_address,
            refresh=self.config.web.refresh_seconds,
            troubles=troubles(self.database, self.config, now),
            person=request.state.person,
            **values,
        )
        return _unless_known(request, HTMLResponse(html))

    def _file_of(self, request: Request, kind: ResultKind) -> Path:
        entry = with_answer(self.database, self.entry(request.path_params["study_instance_uid"]), request)
        path = self._file(entry, kind)
        if path is None:
            raise HTTPException(404, "There is no such picture of this study.")
        audit(request, Event.PICTURES_SEEN, [entry.study])
        return path

    def _file(self, entry: WorklistEntry, kind: ResultKind) -> Path | None:
        """A file of the entry's answer, if it is there and really lies in the spool."""
        path = entry.result.files.get(kind) if entry.result else None
        if path is None or not path.is_file():
            return None
        return path if path.resolve().is_relative_to(self.config.storage.spool.resolve()) else None

    def picture_address(self, entry: WorklistEntry, large: bool = False) -> str | None:
        return self._address(entry, ResultKind.THUMBNAIL, "/large.png" if large else ".png")

    def _key_slices_address(self, entry: WorklistEntry) -> str | None:
        return self._address(entry, ResultKind.KEY_SLICES_PNG, "/key_slices.png")

    def _address(self, entry: WorklistEntry, kind: ResultKind, name: str) -> str | None:
        """Of a picture, where its file is; a new revision has a new one, which an open page then loads."""
        if entry.result is None or self._file(entry, kind) is None:
            return None
        uid = quote(entry.study.study_instance_uid, safe="")
        return f"/pictures/{uid}{name}?revision={entry.result.revision}"


def _unless_known(request: Request, response: Response) -> Response:
    """304 without a body when the browser already shows exactly this."""
    etag = f'"{hashlib.sha256(bytes(response.body)).hexdigest()[:32]}"'
    if request.headers.get("if-none-match") == etag:
        return Response(status_code=304, headers={"etag": etag})
    response.headers["etag"] = etag
    return response


def _templates(config: Config) -> Environment:
    environment = Environment(
        loader=PackageLoader("triage.web"),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(words=words, notice=config.web.notice)
    return environment
