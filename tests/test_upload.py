"""The served upload page and its API: what is taken in, what is refused, and what is left behind."""

from __future__ import annotations

import csv
import io
import re
import socket
import threading
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests import peers
from tests.hospital import Hospital, hospital
from tests.needs import DATA, needs_data
from tests.objects import SERIES, ct, save
from tests.test_import_command import zipped
from tests.test_web import text
from triage import analyze, assemble, passwords
from triage.dicom import phantom
from triage.domain import Role, StudyState
from triage.web import export, reading
from triage.web.app import serve

SMALL: dict[str, Any] = {"slices": 30, "rows": 64, "slice_spacing": 8.0}
ZIP, DICOM = "application/zip", "application/dicom"


@dataclass
class Site:
    """A served page with the daemon's steps behind it."""

    ward: Hospital
    address: str

    def client(self, **headers: str) -> httpx.Client:
        """A browser without scripts, or with ``authorization`` a program."""
        return httpx.Client(
            transport=httpx.HTTPTransport(retries=8),
            base_url=self.address,
            headers={"origin": self.address, **headers},
            timeout=60,
        )

    def judge(self) -> None:
        """Without letting any time pass."""
        while assemble.step(self.ward.db, self.ward.config, self.ward.now):
            pass
        while analyze.step(self.ward.db, self.ward.config, self.ward.model, "test", self.ward.now):
            pass

    def audited(self, code: str) -> list[str]:
        records = self.ward.db.trail.records()
        return [one.message for one in records if f'csd-code="{code}"' in one.message]


@contextmanager
def serving(folder: Path, **sections: Any) -> Iterator[Site]:
    with hospital(folder, **sections) as ward:
        stop = threading.Event()
        server = threading.Thread(target=serve, args=(ward.db, ward.config, lambda: ward.now, stop))
        server.start()
        try:
            yield Site(ward, f"http://127.0.0.1:{ward.config.web.port}")
        finally:
            stop.set()
            server.join(20)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with serving(tmp_path / "here") as built:
        yield built


def study(folder: Path, seed: int = 3) -> list[Path]:
    phantom.write_study(folder, seed=seed, **SMALL)
    return sorted(folder.iterdir())


def sent(*files: tuple[str, bytes]) -> list[tuple[str, tuple[str, bytes]]]:
    return [("files", file) for file in files]


def spooled(ward: Hospital) -> set[str]:
    """Names of all files below the spool that are no results."""
    found = (path for path in ward.config.storage.spool.rglob("*") if path.is_file())
    return {path.name for path in found if "results" not in path.parts}


# --- what comes in --------------------------------------------------------------------------------


def test_a_zip_of_several_studies_is_judged_at_once_without_a_script(site: Site, tmp_path: Path) -> None:
    members = {
        f"cd/{seed}/{path.name}": path.read_bytes()
        for seed in (3, 4)
        for path in study(tmp_path / str(seed), seed)
    }
    archive = zipped(tmp_path / "cd.zip", members | {"cd/README": b"hello"})
    with site.client() as reader:
        form = reader.get("/upload")
        assert 'enctype="multipart/form-data"' in form.text
        answer = reader.post("/upload", files=sent(("cd.zip", archive.read_bytes())))
        assert (answer.status_code, answer.headers["location"]) == (303, "/uploads/1")
        page = reader.get("/uploads/1")
        assert "2 studies 60 images 2 pending" in text(page)
        assert "1 file was passed over cd.zip/cd/README : not a DICOM file" in text(page)
        site.judge()
        page = reader.get("/uploads/1")
        assert "2 studies 60 images 2 positive" in text(page)
        assert len(re.findall(r'src="/pictures/[\d.]+\.png', page.text)) == 2
        assert len(re.findall(r'src="/pictures/[\d.]+/key_slices\.png', page.text)) == 2
        assert len(re.findall(r"● Positive R \d+ % L 0 %", text(page))) == 2
        for address in re.findall(r'src="(/pictures/[^"]+)"', page.text):
            assert reader.get(address).headers["content-type"] == "image/png"
        assert "Upload 1 , 12:00" in text(reader.get("/upload"))
    uploaded = site.audited("uploaded")
    assert len(uploaded) == 2
    assert all('UserID="local"' in one for one in uploaded)


def test_only_what_is_complete_is_judged_before_the_quiet_time(site: Site, tmp_path: Path) -> None:
    first, *others, last = study(tmp_path / "in")
    with site.client() as program:
        made = program.post("/api/v1/uploads")
        assert (made.status_code, made.json()["upload_id"]) == (201, 1)
        files = "/api/v1/uploads/1/files"
        taken = program.post(files, files=sent(*((path.name, path.read_bytes()) for path in others))).json()
        assert (taken["new"], taken["here_before"], taken["passed_over"]) == (28, 0, 0)
        assert not assemble.step(site.ward.db, site.ward.config, site.ward.now)
        assert "Not all has come yet" in text(program.get("/uploads/1"))
        program.post(files, files=sent((first.name, first.read_bytes())))
        done = program.put("/api/v1/uploads/1/complete").json()
        assert (done["studies"], done["images"], done["rows"][0]["status"]) == (1, 29, None)
        site.judge()
        seen = program.get("/api/v1/uploads/1").json()
        assert seen["rows"][0]["status"] == "positive"
        assert "Not all has come yet" not in text(program.get("/uploads/1"))
        site.ward.pass_time(0.5)
        program.post(files, files=sent((last.name, last.read_bytes())))
        (uid,) = taken["studies"]
        assert not assemble.step(site.ward.db, site.ward.config, site.ward.now)
        assert site.ward.entry(uid).study.state is StudyState.RECEIVING
        site.ward.work()
        again = site.ward.entry(uid).result
        assert again is not None
        assert again.revision == 2


def test_a_study_that_came_before_and_was_made_whole_earlier_waits_for_silence(
    site: Site, tmp_path: Path
) -> None:
    """That an upload is complete says nothing of images that a scanner sends thereafter."""
    paths = study(tmp_path / "in")
    with site.client() as reader:
        reader.post("/upload", files=sent((paths[0].name, paths[0].read_bytes())))
    site.ward.pass_time(0.1)
    peers.scan(tmp_path / "in", site.ward.config)
    assert not assemble.step(site.ward.db, site.ward.config, site.ward.now)


@needs_data
def test_real_series_in_a_zip_and_as_files(site: Site, tmp_path: Path) -> None:
    series = [DATA / "dicom" / "lidc_0001", DATA / "dicom" / "lungdx_a0001_two_kernels"]
    files = [sorted(path for path in one.rglob("*") if path.is_file()) for one in series]
    archive = zipped(tmp_path / "one.zip", {f"a/{n}": path.read_bytes() for n, path in enumerate(files[0])})
    with site.client() as program:
        program.post("/api/v1/uploads")
        plain = [(f"folder/{path.name}", path.read_bytes()) for path in files[1]]
        for batch in (plain[:100], plain[100:]):
            program.post("/api/v1/uploads/1/files", files=sent(*batch))
        one = sent(("one.zip", archive.read_bytes()))
        (first, again) = (program.post("/api/v1/uploads/1/files", files=one).json() for _ in range(2))
        assert (first["new"], first["here_before"]) == (67, 0)
        assert (again["new"], again["here_before"]) == (0, 67)
        program.put("/api/v1/uploads/1/complete")
        site.judge()
        seen = program.get("/api/v1/uploads/1").json()
        assert (seen["studies"], seen["images"]) == (2, 67 + 128)
        assert {row["status"] for row in seen["rows"]} == {"positive"}
        lines = list(csv.DictReader(io.StringIO(program.get("/uploads/1.csv").text)))
        assert [line["study_instance_uid"] for line in lines] == [
            row["study_instance_uid"] for row in seen["rows"]
        ]
        assert {line["grade"] for line in lines} == {row["grade"] for row in seen["rows"]}


# --- what does not --------------------------------------------------------------------------------


def test_what_is_no_image_is_named_and_leaves_nothing_behind(tmp_path: Path) -> None:
    image = save(ct(1), tmp_path / "1.dcm").read_bytes()
    good = {"../../../escaped.dcm": image, "/etc/absolute.dcm": save(ct(2), tmp_path / "2.dcm").read_bytes()}
    slip = zipped(tmp_path / "slip.zip", good)
    bomb = zipped(tmp_path / "bomb.zip", {str(n): image + bytes(2 * 2**20) for n in range(6)})
    files = [
        ("notes.txt", b"hello, this is not an image at all" * 10),
        ("torn.zip", slip.read_bytes()[:500]),
        ("bomb.zip", bomb.read_bytes()),
        ("no.zip", image),
        ("empty", b""),
        ("cut.dcm", image[:-40]),
        ("../../slip.zip", slip.read_bytes()),
    ]
    with serving(tmp_path / "here", web={"upload_gb": 0.01}) as site, site.client() as reader:
        reader.post("/upload", files=sent(*files))
        seen = reader.get("/api/v1/uploads/1").json()
        assert {one["file"]: one["reason"] for one in seen["examples"]} == {
            "notes.txt": "not a DICOM file",
            "torn.zip": "not a readable zip file",
            "bomb.zip": "unpacks to more than 0.01 GB",
            "no.zip": "not a readable zip file",
            "empty": "not a DICOM file",
            "cut.dcm": "data set is cut off",
        }
        assert (seen["studies"], seen["images"]) == (1, 2)
        assert spooled(site.ward) == {f"{SERIES}.1.dcm", f"{SERIES}.2.dcm"}
    assert not list(tmp_path.parent.rglob("escaped*"))


def test_many_files_that_are_no_images_are_counted(site: Site) -> None:
    with site.client() as reader:
        files = sent(*((f"<b>{number}</b>", b"no image") for number in range(100)))
        assert reader.post("/api/v1/uploads").status_code == 201
        taken = [reader.post("/api/v1/uploads/1/files", files=files).json() for _ in range(2)]
        assert [(one["passed_over"], len(one["examples"])) for one in taken] == [(100, 20)] * 2
        page = reader.get("/uploads/1")
        assert "200 files were passed over" in text(page)
        assert "and 180 more" in text(page)
        assert "<b>1</b>" not in page.text


def test_what_is_too_large_is_refused_before_it_is_read(tmp_path: Path) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(1000):
            yield bytes(2**20)

    with serving(tmp_path / "here", web={"upload_gb": 0.01}) as site, site.client() as reader:
        begun = reader.post("/api/v1/uploads").json()["upload_id"]
        address = f"/api/v1/uploads/{begun}/files"
        said = "This is more than 0.01 GB (web.upload_gb): send it in parts."
        kind = "multipart/form-data; boundary=x"
        host = ("127.0.0.1", site.ward.config.web.port)
        with socket.create_connection(host) as line:
            asked = f"POST {address} HTTP/1.1\r\nHost: 127.0.0.1\r\nSec-Fetch-Site: same-origin\r\n"
            line.sendall(f"{asked}Content-Type: {kind}\r\nContent-Length: {2**30}\r\n\r\n".encode())
            answer = b"".join(iter(lambda: line.recv(65536), b"")).decode()
        assert answer.startswith("HTTP/1.1 413")
        assert said in answer
        with suppress(httpx.TransportError):  # who goes on sending may find the line cut before the answer
            answered = reader.post(address, headers={"content-type": kind}, content=endless())
            assert answered.status_code in (400, 413)
        assert spooled(site.ward) == set()


def test_an_upload_takes_the_memory_of_a_piece_not_of_the_file(site: Site, tmp_path: Path) -> None:
    size = 48 * 2**20

    def body() -> Iterator[bytes]:
        yield b'--x\r\ncontent-disposition: form-data; name="files"; filename="film"\r\n\r\n'
        for _ in range(size // 2**16):
            yield bytes(2**16)
        yield b"\r\n--x--\r\n"

    with site.client() as program:
        program.post("/api/v1/uploads")
        tracemalloc.start()
        headers = {"content-type": "multipart/form-data; boundary=x"}
        answer = program.post("/api/v1/uploads/1/files", content=body(), headers=headers)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert answer.json()["examples"] == [{"file": "film", "reason": "not a DICOM file"}]
    assert most < size / 4


@pytest.mark.parametrize(
    ("kind", "content", "code"),
    [
        ("application/json", b"{}", 422),
        ("multipart/form-data", b"", 422),
        ("multipart/form-data; boundary=x", b"hello", 400),
        (
            "multipart/form-data; boundary=x",
            b'--x\r\ncontent-disposition: form-data; filename="a"\r\n\r\nDI',
            400,
        ),
        ("multipart/form-data; boundary=" + "x" * 5000, b"hello", 400),
        (
            "multipart/form-data; boundary=x",
            b'--x\r\ncontent-disposition: form-data; name="a"\r\n\r\nb\r\n--x--',
            200,
        ),
        ("multipart/form-data; boundary=x", b"", 200),
    ],
)
def test_what_is_no_form_with_files(site: Site, kind: str, content: bytes, code: int) -> None:
    with site.client() as program:
        program.post("/api/v1/uploads")
        headers = {"content-type": kind}
        answer = program.post("/api/v1/uploads/1/files", content=content, headers=headers)
        assert answer.status_code == code
        assert program.get("/api/v1/uploads/1").json()["studies"] == 0


def test_a_full_disk_refuses_and_what_came_stays(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = [True, True, True, False]
    monkeypatch.setattr("triage.dicom.files.has_room", lambda _: room.pop(0) if len(room) > 1 else room[0])
    files = [(f"{n}.dcm", save(ct(n), tmp_path / f"{n}.dcm").read_bytes()) for n in (1, 2, 3)]
    with site.client() as program:
        program.post("/api/v1/uploads")
        full = program.post("/api/v1/uploads/1/files", files=sent(*files))
        assert (full.status_code, "disk is full" in full.json()["error"]) == (503, True)
        came = program.get("/api/v1/uploads/1").json()["images"]
        assert came in (1, 2)
        room[0] = True
        again = program.post("/api/v1/uploads/1/files", files=sent(*files)).json()
        assert (again["new"], again["here_before"]) == (3 - came, came)
    assert len(site.audited("uploaded")) == 2


# --- who may --------------------------------------------------------------------------------------


def test_who_works_on_the_list_uploads_and_others_see_it(site: Site) -> None:
    for name, role in {"boss": Role.ADMIN, "jane": Role.RADIOLOGIST, "joe": Role.VIEWER}.items():
        hashed = passwords.hashed(f"{name}'s long password")
        site.ward.db.people.add_user(name, role, hashed, site.ward.now, [])

    @contextmanager
    def entered(name: str) -> Iterator[httpx.Client]:
        with site.client() as client:
            form = {"name": name, "password": f"{name}'s long password", "next": "/"}
            assert client.post("/login", data=form).status_code == 303
            yield client

    with entered("jane") as jane, entered("joe") as joe, entered("boss") as boss:
        assert "/upload" in jane.get("/").text
        assert "/upload" not in joe.get("/").text
        jane.post("/upload", files=sent(("a", b"no image")))
        assert joe.get("/uploads/1").status_code == joe.get("/uploads/1.csv").status_code == 200
        assert "upload-box" not in joe.get("/uploads/1").text
        for may_not in (joe.get("/upload"), joe.post("/upload"), joe.post("/api/v1/uploads")):
            assert may_not.status_code == 403
        theirs = boss.post("/api/v1/uploads/1/files", files=sent(("a", b"no image")))
        assert (theirs.status_code, boss.put("/api/v1/uploads/1/complete").status_code) == (403, 403)
        assert "jane has begun this upload" in theirs.json()["error"]
        for nowhere in ("/uploads/9", f"/uploads/{2**80}", "/uploads/9.csv", "/api/v1/uploads/9"):
            assert boss.get(nowhere).status_code == 404
        foreign = {"origin": "http://evil.example"}
        assert jane.post("/upload", files=sent(("a", b"")), headers=foreign).status_code == 403


# --- CSV ------------------------------------------------------------------------------------------


def test_no_cell_is_a_formula_and_every_export_is_on_record(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "CSV_PIECE", 2)
    names = ['=cmd|"/c calc"!A1', "+1", "-1", "@SUM(A1)", "Müller^Eva"]
    for number, name in enumerate(names):
        one = ct(1, StudyInstanceUID=f"1.{number}", PatientName=name, PatientID=f"P{number}")
        one.SpecificCharacterSet = "ISO_IR 192"
        save(one, tmp_path / "in" / f"{number}.dcm")
    files = [(path.name, path.read_bytes()) for path in sorted((tmp_path / "in").iterdir())]
    with site.client() as reader:
        reader.post("/upload", files=sent(*files))
        for address, detail in (("/uploads/1.csv", "upload-1.csv"), ("/list.csv", "worklist.csv")):
            answer = reader.get(address)
            assert answer.headers["content-type"] == "text/csv; charset=utf-8"
            assert detail in answer.headers["content-disposition"]
            lines = list(csv.DictReader(io.StringIO(answer.text)))
            assert [tuple(line) for line in lines] == [export.COLUMNS] * 5
            assert {line["patient_name"] for line in lines} == {*(f"'{name}" for name in names[:4]), names[4]}
        assert len(site.audited("exported")) == 2 * 5
        some = list(csv.DictReader(io.StringIO(reader.get("/list.csv?text=M%C3%BCller").text)))
        assert [line["study_instance_uid"] for line in some] == ["1.4"]
        assert reader.get("/list.csv?hours=-1").status_code == 400
