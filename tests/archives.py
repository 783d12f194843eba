"""Archives that are asked and fetched from: a real Orthanc, and ones of ours that fail as a test says."""

from __future__ import annotations

import json
import re
import ssl
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage
from pynetdicom import AE, evt

from tests import peers
from tests.objects import ct
from tests.test_orthanc import Orthanc, orthanc
from triage.config import Destination
from triage.dicom import phantom, sender
from triage.dicom.query import CT_CLASSES, FIND, GET, MOVE

SMALL = {"slices": 30, "rows": 64, "slice_spacing": 8.0}
Answers = Callable[[evt.Event], Iterator[Any]]


@contextmanager
def filled(folder: Path) -> Iterator[tuple[Orthanc, list[Path], int]]:
    """An Orthanc that holds two phantoms, the files of the first, and the port where it thinks we listen."""
    listener, port = peers.free_port(), peers.free_port()
    first = phantom.write_study(folder / "first", seed=3, **SMALL)
    second = phantom.write_study(folder / "second", seed=4, **SMALL)
    with orthanc(folder / "orthanc", listener, port, web=True) as running:
        peer = Destination(name="x", ae_title="PACS", host=peers.HOST, port=port)
        sent = sender.send([*first, *second], peer, calling_ae_title="TRIAGE", timeout_seconds=30)
        assert all(outcome.sent for outcome in sent)
        yield running, first, listener


def slices(*numbers: int, **changes: object) -> list[Dataset]:
    """Tiny CT images, as an archive keeps them."""
    made = []
    for number in numbers:
        image = ct(number, **changes)
        image.file_meta = FileMetaDataset()
        image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        made.append(image)
    return made


# --- by DIMSE ------------------------------------------------------------------------------------


@dataclass
class Scripted:
    """An archive that holds ``images`` and cannot send those in ``broken``."""

    images: list[Dataset]
    move_to: int = 0
    broken: set[str] = field(default_factory=set)
    ended: threading.Event = field(default_factory=threading.Event)
    """Set when the test is over: what hangs until then does not hang for ever."""

    def on_find(self, event: evt.Event) -> Iterator[Any]:
        keys = event.identifier
        level = keys.QueryRetrieveLevel
        own = {"STUDY": "StudyInstanceUID", "SERIES": "SeriesInstanceUID", "IMAGE": "SOPInstanceUID"}[level]
        told: dict[str, Dataset] = {}
        for image in self.images:
            if keys.get("StudyInstanceUID") in (None, "", image.StudyInstanceUID):
                answer = Dataset()
                answer.QueryRetrieveLevel = level
                for keyword in ("StudyInstanceUID", own):
                    setattr(answer, keyword, image[keyword].value)
                told[str(answer[own].value)] = answer
        for answer in told.values():
            yield 0xFF00, answer

    def on_get(self, event: evt.Event) -> Iterator[Any]:
        uids = event.identifier.SOPInstanceUID
        wanted = [image for image in self.images if image.SOPInstanceUID in uids]
        yield len(wanted)
        for image in wanted:
            yield 0xFF00, self._sent(image)

    def on_move(self, event: evt.Event) -> Iterator[Any]:
        yield (peers.HOST, self.move_to) if self.move_to else (None, None)
        yield from self.on_get(event)

    def _sent(self, image: Dataset) -> Dataset:
        if image.SOPInstanceUID not in self.broken:
            return image
        other = deepcopy(image)
        other.SOPClassUID = MRImageStorage  # of which the association knows nothing
        return other


@contextmanager
def archive(
    held: Scripted,
    *,
    port: int = 0,
    on_find: Answers | None = None,
    on_get: Answers | None = None,
    on_move: Answers | None = None,
    allowed: Iterable[str] = (),
    offers: Iterable[str] = (FIND, GET, MOVE),
    tls: ssl.SSLContext | None = None,
) -> Iterator[int]:
    """The port where ``held`` is asked, with other answers where they are given."""
    ae = AE("PACS")
    ae.require_calling_aet = list(allowed)
    for uid in offers:
        ae.add_supported_context(uid)
    for uid in CT_CLASSES:
        ae.add_supported_context(uid, scu_role=True, scp_role=True)
        ae.add_requested_context(uid)
    server = ae.start_server(
        (peers.HOST, port),
        block=False,
        ssl_context=tls,
        evt_handlers=[
            (evt.EVT_C_FIND, on_find or held.on_find),
            (evt.EVT_C_GET, on_get or held.on_get),
            (evt.EVT_C_MOVE, on_move or held.on_move),
        ],
    )
    assert server is not None
    try:
        yield server.server_address[1]
    finally:
        held.ended.set()
        server.shutdown()


# --- by DICOMweb ---------------------------------------------------------------------------------

Answer = tuple[int, str, bytes]
"""HTTP status, Content-Type, body."""


def part_10(image: Dataset) -> bytes:
    buffer = BytesIO()
    pydicom.dcmwrite(buffer, image, enforce_file_format=True)
    return buffer.getvalue()


def multipart(body: bytes) -> Answer:
    head = b"--limit\r\nContent-Type: application/dicom\r\n\r\n"
    kind = 'multipart/related; type="application/dicom"; boundary=limit'
    return 200, kind, head + body + b"\r\n--limit--\r\n"


@contextmanager
def web_archive(
    images: list[Dataset],
    faults: Mapping[str, Answer | threading.Event | Callable[[], Answer]] | None = None,
    tls: ssl.SSLContext | None = None,
) -> Iterator[str]:
    """The url of an archive of ``images``; ``faults`` says by pattern which paths are answered otherwise.

    An Event is waited for before anything is said.
    """

    def listed(keyword: str, path: str) -> bytes:
        uids = dict.fromkeys(str(image[keyword].value) for image in images if image.StudyInstanceUID in path)
        rows = []
        for uid in uids:
            row = Dataset()
            setattr(row, keyword, uid)
            rows.append(row.to_json_dict())
        return json.dumps(rows).encode()

    def answer(path: str) -> Answer:
        for pattern, fault in (faults or {}).items():
            if re.search(pattern, path):
                if callable(fault):
                    return fault()
                if not isinstance(fault, threading.Event):
                    return fault
                fault.wait(60)
        if "offset" in path:
            return 200, "application/dicom+json", b"[]"
        path = path.partition("?")[0]
        for image in images:
            if path.endswith(f"/instances/{image.SOPInstanceUID}"):
                return multipart(part_10(image))
        keyword = {"series": "SeriesInstanceUID", "instances": "SOPInstanceUID"}.get(path.split("/")[-1])
        return 200, "application/dicom+json", listed(keyword or "StudyInstanceUID", path)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, kind, body = answer(self.path)
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Nothing: the tests look at what we say."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: Any) -> None:
            """Nothing: a client that had enough of waiting is no error here."""

    server = Server((peers.HOST, 0), Handler)
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=[0.05])
    thread.start()
    try:
        yield f"http{'s' if tls else ''}://{peers.HOST}:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
