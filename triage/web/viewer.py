"""Images, masks and surfaces of one study for the viewer on its page: only of what lies in the spool."""

from __future__ import annotations

import gzip
import hashlib
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from triage.audit import Event
from triage.config import Config
from triage.db import Database
from triage.dicom import masks, mesh, series, volume
from triage.dicom.masks import Segmentation
from triage.domain import (
    Instance,
    Mask,
    Permission,
    Result,
    ResultKind,
    Series,
    WorklistEntry,
    content_digest,
)
from triage.errors import Rejected
from triage.web import words
from triage.web.access import Page, audit
from triage.web.studies import with_answer

LESION_SEG, LUNG_SEG, MESH = ResultKind.LESION_SEG, ResultKind.LUNG_SEG, ResultKind.MESH
BUNDLE = Path(__file__).parent / "static" / "built" / "view3d.js"
"""The 3D view, which is built from npm with the wheel and by deploy/install."""
LARGEST_IMAGE = 4096 * 4096
"""Pixels; larger ones are not sent, for the server's and the browser's sake."""
KEPT = 4
"""Studies whose masks stay in memory: some 10 MB each, for 300 images."""
FOREVER = {"cache-control": "private, max-age=3600, immutable"}
"""Of what is named by its content. In the reader's browser only, and no longer than a study is read."""
OBLIQUE = 0.25
"""The share of a direction from which on a second letter says that an image is turned."""


@dataclass(frozen=True)
class Scan:
    """The images that a study's page shows, in the order of their numbers, and where their masks are."""

    key: str
    """Names exactly these images and masks."""
    images: tuple[Instance, ...]
    stack: Series | None
    """The judged series, where the images still are one."""
    files: Mapping[ResultKind, Path]
    """Masks and surfaces that were written with the answer."""
    gone: tuple[ResultKind, ...]
    """Masks that were written, too, and are not there any more."""
    others: bool
    """There are images of another patient ID, too, which are left out."""


@dataclass(frozen=True)
class Marks:
    """What the network marked in the images of a scan."""

    lesions: Segmentation | None
    lungs: Segmentation | None
    notes: tuple[str, ...]


Value = TypeVar("Value")


class Kept(Generic[Value]):
    """The last few values by key; while one is made, those who want it as well wait for it."""

    def __init__(self) -> None:
        self._values: OrderedDict[str, Value] = OrderedDict()
        self._lock = threading.Lock()

    def known(self, key: str) -> Value | None:
        return self._values.get(key)

    def get(self, key: str, make: Callable[[], Value]) -> Value:
        with self._lock:
            if key not in self._values:
                self._values[key] = make()
            self._values.move_to_end(key)
            while len(self._values) > KEPT:
                self._values.popitem(last=False)
            return self._values[key]


class Viewer:
    """Answers the viewer's requests; what was read of a study's masks is kept for the next ones."""

    def __init__(self, database: Database, config: Config) -> None:
        self.database = database
        self.config = config
        self.spool = config.storage.spool.resolve()
        self._scans: Kept[Scan] = Kept()
        self._marks: Kept[Marks] = Kept()
        self._surfaces: Kept[bytes] = Kept()

    def routes(self) -> list[Route]:
        study = "/studies/{study_instance_uid}/viewer"
        return [
            Page(f"{study}.json", self.description, Permission.READ),
            Page(study + "/{key}/marks.json", self.marks, Permission.READ),
            Page(study + "/{key}/images/{place:int}", self.image, Permission.READ),
            Page(study + "/{key}/labels/{place:int}", self.labels, Permission.READ),
            Page(study + "/{key}/surfaces.glb", self.surfaces, Permission.READ),
        ]

    def description(self, request: Request) -> Response:
        """What images there are, and where they are found: soon, for it waits for no mask."""
        entry = self._entry(request)
        audit(request, Event.PICTURES_SEEN, [entry.study])
        uid = entry.study.study_instance_uid
        scan = self._scan(uid, entry.result)
        told = description(scan, entry.result, f"/studies/{quote(uid, safe='')}/viewer/{scan.key}")
        return JSONResponse({**told, "built": BUNDLE.is_file()})

    def marks(self, request: Request) -> Response:
        """What is marked in them."""
        scan, _ = self._shown(request)
        return JSONResponse(marked(scan, self._marks_of(scan)), headers=FOREVER)

    def image(self, request: Request) -> Response:
        """HU of one image: int16, little endian, row by row."""
        scan, place = self._shown(request)
        try:
            hu = volume.read_image(scan.images[place])
        except Rejected as error:
            raise HTTPException(404, str(error)) from error
        return _bytes(request, hu.astype("<i2", copy=False).tobytes())

    def labels(self, request: Request) -> Response:
        """Of each pixel of one image, a byte: the segment of the lesions, and 16 times that of the lungs."""
        scan, place = self._shown(request)
        return _bytes(request, labels(scan.images[place], self._marks_of(scan)).tobytes())

    def surfaces(self, request: Request) -> Response:
        """Lungs and infection as glTF: as they were written with the answer, else made of its masks."""
        scan, _ = self._shown(request)
        glb = self._surfaces.get(scan.key, lambda: _glb(scan, self._marks_of(scan)))
        return Response(glb, media_type="model/gltf-binary", headers=FOREVER)

    def _shown(self, request: Request) -> tuple[Scan, int]:
        """The scan that an address names, and which of its images; 404 once there are other ones."""
        uid, key = request.path_params["study_instance_uid"], request.path_params["key"]
        place = request.path_params.get("place", 0)
        scan = self._scans.known(f"{uid} {key}") or self._found_again(uid, key)
        if scan is None or place >= len(scan.images):
            raise HTTPException(404, "There is no such image of this study any more.")
        return scan, place

    def _entry(self, request: Request) -> WorklistEntry:
        entry = self.database.entry(request.path_params["study_instance_uid"])
        if entry is None:
            raise HTTPException(404)
        return with_answer(self.database, entry, request)

    def _found_again(self, uid: str, key: str) -> Scan | None:
        """One that was let go, whichever of the study's answers it is of, or of the time before any."""
        scans = (self._scan(uid, result) for result in (*self.database.results(uid), None))
        return next((scan for scan in scans if scan.key == key), None)

    def _scan(self, uid: str, result: Result | None) -> Scan:
        found, others = self._found(uid)
        images, stack = self._images(found, result)
        wanted = {kind: self._file(result, kind) for kind in (LESION_SEG, LUNG_SEG, MESH)}
        files = {kind: path for kind, path in wanted.items() if path is not None}
        gone = [one for one in (LESION_SEG, LUNG_SEG) if result and one in result.files and one not in files]
        answer = result.content_key if result else ""
        facts = f"{content_digest(images)} {sorted(files.items())} {answer} {others}"
        key = hashlib.sha256(facts.encode()).hexdigest()[:24]
        return self._scans.get(f"{uid} {key}", lambda: Scan(key, images, stack, files, tuple(gone), others))

    def _marks_of(self, scan: Scan) -> Marks:
        return self._marks.get(scan.key, lambda: _marks(scan))

    def _found(self, uid: str) -> tuple[list[Instance], bool]:
        """The images that can be shown, and whether there are others whose patient ID is not the study's."""
        found = [
            one for one in self.database.instances(uid) if _may_be_shown(one) and self._is_ours(one.path)
        ]
        entry = self.database.entry(uid)
        patient = entry.study.patient_id if entry else ""
        same = [one for one in found if not (one.patient_id and patient) or one.patient_id == patient]
        others = len(same) < len(found)
        if entry is not None and entry.study.images_deleted_at is not None:
            same = [one for one in same if one.path.exists()]
        if not same:
            raise HTTPException(404, "There are no images of this study to show.")
        return same, others

    def _images(
        self, found: list[Instance], result: Result | None
    ) -> tuple[tuple[Instance, ...], Series | None]:
        """Those of the judged series, or of the longest one, as a viewer numbers them."""
        judged = result.series_instance_uid if result else None
        chosen = judged or Counter(one.series_instance_uid for one in found).most_common(1)[0][0]
        images = [one for one in found if one.series_instance_uid == chosen] or found
        try:
            stack = series.choose(images, self.config.assemble)
        except Rejected:
            size = Counter((one.rows, one.columns) for one in images).most_common(1)[0][0]
            return _numbered([one for one in images if (one.rows, one.columns) == size]), None
        return _numbered(stack.instances), stack

    def _file(self, result: Result | None, kind: ResultKind) -> Path | None:
        path = result.files.get(kind) if result else None
        return path if path is not None and path.is_file() and self._is_ours(path) else None

    def _is_ours(self, path: Path) -> bool:
        """Whatever the database says: no other file than the spool's is read."""
        return path.resolve().is_relative_to(self.spool)


def description(scan: Scan, result: Result | None, address: str) -> dict[str, Any]:
    """The images of a scan, as plain data: lengths in mm, boxes in pixels; places count from 0."""
    first = scan.images[0]
    return {
        "address": address,
        "rows": first.rows,
        "columns": first.columns,
        "spacing": list(first.pixel_spacing or (1.0, 1.0)),
        "edges": edges(first.image_orientation_patient),
        "numbers": numbers(scan.images),
        "boxes": boxes(scan.images, result),
    }


def marked(scan: Scan, marks: Marks) -> dict[str, Any]:
    """What is marked in the images of a scan, as plain data; areas, of each image and segment, in mm²."""
    row_spacing, column_spacing = scan.images[0].pixel_spacing or (1.0, 1.0)
    pixel = row_spacing * column_spacing
    segments = list(_segments(scan, marks))
    areas = [[round(pixel * one["pixels"][k], 1) for one in segments] for k in range(len(scan.images))]
    lesion = [n for n, one in enumerate(segments) if one["kind"] == "lesion"]
    sums = [sum(area[n] for n in lesion) for area in areas]
    return {
        "segments": [{name: one[name] for name in ("kind", "label", "value", "colour")} for one in segments],
        "areas": areas,
        "start": int(np.argmax(sums)) if any(sums) else len(scan.images) // 2,
        "surfaces": MESH in scan.files or (scan.stack is not None and any(map(sum, areas))),
        "notes": list(marks.notes),
    }


def labels(image: Instance, marks: Marks) -> NDArray[np.uint8]:
    """(rows, columns): the number of the lesions' segment, and 16 times that of the lungs' one."""
    both = np.zeros((image.rows, image.columns), np.uint8)
    for found, factor in ((marks.lesions, 1), (marks.lungs, 16)):
        if found is not None:
            both += factor * found.labels(image.sop_instance_uid)
    return both


def numbers(images: Sequence[Instance]) -> list[int]:
    """The number that viewers show of each image; counted where the scanner gave none, or one twice."""
    given = [image.instance_number for image in images]
    if len(set(given)) == len(given) and None not in given:
        return [number for number in given if number is not None]
    return list(range(1, len(images) + 1))


def boxes(images: Sequence[Instance], result: Result | None) -> list[list[float]]:
    """Place of the image, then first row and column and those after the last, then the score."""
    places = {image.sop_instance_uid: k for k, image in enumerate(images)}
    return [
        [places[one.sop_instance_uid], *one.box, round(one.score, 3)]
        for one in (result.boxes if result else ())
        if one.sop_instance_uid in places
    ]


def edges(orientation: tuple[float, ...] | None) -> dict[str, str]:
    """The patient's direction at each edge of an image (PS3.3 C.7.6.2.1.1): at most two letters of L, R, A,
    P, H and F, the stronger one first.
    """
    if orientation is None or len(orientation) != 6:
        return {"left": "", "right": "", "top": "", "bottom": ""}
    row, column = np.array(orientation[:3]), np.array(orientation[3:])
    return {
        "left": _letters(-row), "right": _letters(row), "top": _letters(-column), "bottom": _letters(column),
    }  # fmt: skip


def _letters(direction: NDArray[np.float64]) -> str:
    pairs = zip(direction, ("LR", "PA", "HF"), strict=True)
    strong = sorted(((abs(part), pair[int(part < 0)]) for part, pair in pairs), reverse=True)
    return "".join(letter for part, letter in strong[:2] if part > OBLIQUE)


def _segments(scan: Scan, marks: Marks) -> Iterator[dict[str, Any]]:
    kinds = (("lesion", marks.lesions, 1), ("lung", marks.lungs, 16))
    for kind, found, factor in kinds:
        if found is None:
            continue
        for number, segment in found.segments.items():
            yield {
                "kind": kind,
                "label": segment.label,
                "value": factor * number,
                "colour": list(segment.colour),
                "pixels": [found.areas.get(i.sop_instance_uid, {}).get(number, 0) for i in scan.images],
            }


def _glb(scan: Scan, marks: Marks) -> bytes:
    """Raises HTTPException where there is nothing to draw."""
    if MESH in scan.files:
        return scan.files[MESH].read_bytes()
    if scan.stack is None or (marks.lesions is None and marks.lungs is None):
        raise HTTPException(404, "There are no masks to draw surfaces of.")
    lungs, lesions = (_whole(one, scan.stack) for one in (marks.lungs, marks.lesions))
    try:
        return mesh.glb(mesh.surfaces_of(scan.stack, lungs, lesions))
    except (ValueError, RuntimeError, MemoryError) as error:
        raise HTTPException(404, "The surfaces of this study cannot be drawn.") from error


def _marks(scan: Scan) -> Marks:
    """The masks that can be read, and why others cannot. Raises Retryable when the disk does not answer."""
    found: dict[ResultKind, Segmentation] = {}
    notes = [f"{words.OBJECTS[kind]}: not here any more." for kind in scan.gone]
    if scan.others:
        notes.insert(0, "Images of another patient ID came with this study's UID: they are left out.")
    for kind in (LESION_SEG, LUNG_SEG):
        try:
            read = masks.read(scan.files[kind]) if kind in scan.files else None
        except Rejected as error:
            notes.append(f"Without an overlay: {error}.")
            continue
        if read is not None and read.shape != (scan.images[0].rows, scan.images[0].columns):
            notes.append("Without an overlay: the masks are of other images.")
        elif read is not None:
            found[kind] = read
    return Marks(found.get(LESION_SEG), found.get(LUNG_SEG), tuple(notes))


def _may_be_shown(instance: Instance) -> bool:
    size = instance.rows * instance.columns
    return series.is_ct_image(instance) and instance.number_of_frames == 1 and 0 < size <= LARGEST_IMAGE


def _numbered(images: Sequence[Instance]) -> tuple[Instance, ...]:
    """By InstanceNumber, as viewers sort; those without one, or with one twice, from the head down."""
    given = [image.instance_number for image in images]
    if len(set(given)) == len(given) and None not in given:
        return tuple(sorted(images, key=lambda image: image.instance_number or 0))
    return tuple(sorted(images, key=lambda image: -(image.image_position_patient or (0, 0, 0))[2]))


def _whole(found: Segmentation | None, stack: Series) -> Mask | None:
    return None if found is None else np.stack([found.marked(i.sop_instance_uid) for i in stack.instances])


def _bytes(request: Request, body: bytes) -> Response:
    """Packed where the browser unpacks: half of an image, and next to nothing of a mask."""
    headers = {**FOREVER, "vary": "accept-encoding"}
    if "gzip" in request.headers.get("accept-encoding", ""):
        body, headers["content-encoding"] = gzip.compress(body, 1, mtime=0), "gzip"
    return Response(body, media_type="application/octet-stream", headers=headers)
