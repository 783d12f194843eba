"""The page over a real database: what it shows, what it refuses, what it never mixes up."""

from __future__ import annotations

import asyncio
import html
import logging
import re
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from tests.peers import free_port
from tests.web_studies import NOON, Ward, configured
from triage.config import Delivery, Destination
from triage.domain import CtSeverityScore, Grade, ResultKind, Status
from triage.errors import ConfigError
from triage.rows import entry_row, result_row
from triage.web import words
from triage.web.app import STATIC, _listen, serve

TOKEN = "a-token-of-the-reading-room"
PAGES = (
    "/",
    "/search?q=DOE",
    "/studies/1.1",
    "/pictures/1.1.png",
    "/pictures/1.1/large.png",
    "/pictures/1.1/key_slices.png",
    "/api/worklist",
)


@pytest.fixture
def ward(tmp_path: Path) -> Iterator[Ward]:
    ward = Ward(configured(tmp_path))
    yield ward
    ward.database.close()


@pytest.fixture
def _berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "Europe/Berlin")
        time.tzset()
        yield
    time.tzset()


class Reader:
    """A browser's requests to the application, without scripts and without following redirects."""

    def __init__(self, ward: Ward, raise_errors: bool = True) -> None:
        app = ward.app()
        transport = httpx.ASGITransport(app, raise_app_exceptions=raise_errors)
        self._client = httpx.AsyncClient(
            transport=transport, base_url="http://127.0.0.1:8080", headers={"Origin": "http://127.0.0.1:8080"}
        )

    def get(self, address: str, **asked: Any) -> httpx.Response:
        return asyncio.run(self._client.get(address, **asked))

    def post(self, address: str, **asked: Any) -> httpx.Response:
        return asyncio.run(self._client.post(address, **asked))


def browse(ward: Ward, raise_errors: bool = True) -> Reader:
    return Reader(ward, raise_errors)


def guarded(ward: Ward) -> Reader:
    web = ward.config.web.model_copy(update={"token": TOKEN})
    ward.config = ward.config.model_copy(update={"web": web})
    return browse(ward)


def text(page: httpx.Response) -> str:
    """What a reader sees: the page without its tags."""
    return _seen(page.text)


def row(page: httpx.Response, uid: str) -> str:
    """What a reader sees in one row of the list."""
    found = re.search(rf'<tr id="row-{re.escape(uid)}".*?</tr>', page.text, re.DOTALL)
    assert found, f"no row of {uid}"
    return _seen(found[0])


def finding(page: httpx.Response, uid: str) -> str:
    found = re.search(rf'<tr id="row-{re.escape(uid)}".*?class="finding">(.*?)</td>', page.text, re.DOTALL)
    assert found, f"no finding of {uid}"
    return _seen(found[1])


def _seen(markup: str) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", markup)).split())


def order(page: httpx.Response) -> list[str]:
    return re.findall(r'<tr id="row-([\d.]+)"', page.text)


# --- the list --------------------------------------------------------------------------------


def test_an_empty_list_says_so(ward: Ward) -> None:
    page = browse(ward).get("/")
    assert page.status_code == 200
    assert "No open study" in text(page)
    assert "Research use, not a medical device. Read every study whatever this list says." in text(page)


@pytest.mark.parametrize("ordering", ["deadline", "strict"])
def test_the_list_is_in_reading_order(ward: Ward, ordering: str) -> None:
    policy = ward.config.priority.model_copy(update={"ordering": ordering})
    ward.config = ward.config.model_copy(update={"priority": policy})
    for uid, ago in (("1.1", 470), ("1.2", 10), ("1.3", 10)):
        ward.arrive(uid, ago=ago)
    ward.judge("1.1", Status.NEGATIVE)
    ward.judge("1.2", affected_fraction=0.62, affected_left=0.4, affected_right=0.8, grade=Grade.CT3)
    page = browse(ward).get("/")
    assert order(page) == {"deadline": ["1.2", "1.1", "1.3"], "strict": ["1.2", "1.3", "1.1"]}[ordering]
    assert [r["study_instance_uid"] for r in browse(ward).get("/api/worklist").json()] == order(page)
    assert "Critical" in row(page, "1.2")
    assert "right lung 80 % affected, score 0.97" in row(page, "1.2")


def test_the_four_answers_and_pending_are_never_mixed_up(ward: Ward) -> None:
    for number in range(1, 9):
        ward.arrive(f"1.{number}", slices=2)
    ward.judge("1.1")
    ward.judge("1.2", Status.NEGATIVE)
    ward.refuse("1.3", "missing slices")
    ward.fail("1.4", "out of memory", None)
    ward.fail("1.5", "disk full", NOON + timedelta(minutes=1))
    ward.claim("1.6")
    ward.database.mark_ready(ward.study("1.7"))
    page, rows = browse(ward).get("/"), browse(ward).get("/api/worklist").json()
    expected = {
        "1.1": ("● Positive R", "positive", "analyzed"),
        "1.2": ("○ Negative R", "negative", "analyzed"),
        "1.3": ("⊘ Not analysable missing slices", "not_analysable", "rejected"),
        "1.4": ("✕ Failed, given up out of memory", "failed", "failed"),
        "1.5": ("↻ Failed, will be retried disk full", "failed", "failed"),
        "1.6": ("▸ Being analysed 2 images", None, "analyzing"),
        "1.7": ("… Waiting for analysis 2 images", None, "ready"),
        "1.8": ("↓ Receiving 2 images so far", None, "receiving"),
    }
    for uid, (said, _, _) in expected.items():
        assert finding(page, uid).startswith(said)
    assert {r["study_instance_uid"]: (r["status"], r["state"]) for r in rows} == {
        uid: (status, state) for uid, (_, status, state) in expected.items()
    }
    retried = {r["study_instance_uid"]: r["retry_at"] for r in rows if r["retry_at"]}
    assert retried == {"1.5": "2026-03-02T12:01:00+00:00"}
    counts = "8 open 3 pending 1 not analysable 2 failed"
    assert counts in text(page)


def test_a_reopened_study_is_pending_and_names_its_earlier_answer(ward: Ward) -> None:
    ward.arrive("1.1", slices=3)
    ward.judge("1.1")
    ward.arrive("1.1", slices=2)
    earlier = "Earlier answer, revision 1: positive"
    assert finding(browse(ward).get("/"), "1.1").startswith(f"↓ Receiving 5 images so far {earlier}")
    api = browse(ward).get("/api/worklist").json()[0]
    assert (api["status"], api["revision"], api["probability"]) == (None, 1, 0.97)
    ward.fail("1.1", "disk full", None)
    assert finding(browse(ward).get("/"), "1.1").startswith(f"✕ Failed, given up disk full {earlier}")


def test_what_a_score_is_and_is_not(ward: Ward) -> None:
    for uid in ("1.1", "1.2", "1.3"):
        ward.arrive(uid)
    ward.judge("1.1")
    ward.judge("1.2", probability_kind="classifier", calibrated=True)
    unknown = dict.fromkeys(("affected_fraction", "affected_left", "affected_right", "grade"))
    ward.judge("1.3", probability_kind="classifier", **unknown)
    page = browse(ward).get("/")
    assert (
        finding(page, "1.1") == "● Positive R 47 % L 12 % Score 0.97, not calibrated Worse lung 47 % · CT-2"
    )
    assert "P 0.97, calibrated" in finding(page, "1.2")
    assert finding(page, "1.3") == "● Positive P 0.97, not calibrated"
    assert "Affected lungs unknown" in text(browse(ward).get("/studies/1.3"))
    assert "Slice mean unknown CT severity score unknown" in text(browse(ward).get("/studies/1.3"))
    score = CtSeverityScore((1,) * 6 + (0,) * 4, (2, 2, 2, 2, 2, 2, 1, 1, 1, 0))
    ward.judge("1.2", percent_infection=0.31, ct_severity_score=score)
    shown = text(browse(ward).get("/studies/1.2"))
    assert "Slice mean 31 % CT severity score 21 of 40 (left 6, right 15)" in shown
    assert "Grade CT-2 Slice mean" in shown
    assert "Region Right Left Apical 2 1 Upper anterior 2 1" in shown
    assert "Lower posterior medial 1 0 Lower posterior lateral 0 0" in shown
    assert "by region" not in text(browse(ward).get("/studies/1.3"))
    assert "Ground glass" not in shown
    ward.judge("1.3", ground_glass_ml=812.4, consolidation_ml=0.0)
    assert "Ground glass 812 ml Consolidation 0 ml" in text(browse(ward).get("/studies/1.3"))
    ward.judge("1.3", ground_glass_ml=812.4, consolidation_ml=0.4)
    assert "Consolidation below 1 ml" in text(browse(ward).get("/studies/1.3"))
    ward.judge("1.2", percent_infection=0.31, ct_severity_score=score, grade_from="percent_infection")
    assert "Worse lung 47 % · CT-2 by slice mean" in finding(browse(ward).get("/"), "1.2")
    assert "Grade CT-2 by slice mean Slice mean 31 %" in text(browse(ward).get("/studies/1.2"))
    rows = {r["study_instance_uid"]: r for r in browse(ward).get("/api/worklist").json()}
    assert (rows["1.2"]["ct_severity_score"], rows["1.2"]["ct_severity_left"]["apical"]) == (21, 1)
    assert rows["1.3"]["ct_severity_score"] is rows["1.3"]["ct_severity_left"] is None


@pytest.mark.usefixtures("_berlin")
def test_due_times_are_absolute_and_relative_in_the_zone_of_the_server(ward: Ward) -> None:
    for uid, ago in (("1.1", 120 + 5), ("1.2", 120 - 12), ("1.3", 3 * 1440)):
        ward.arrive(uid, ago=ago)
    page = browse(ward).get("/")
    assert "12:55 overdue 5 min" in row(page, "1.1")
    assert "13:12 due in 12 min" in row(page, "1.2")
    assert "27 Feb 15:00 overdue 2 days" in row(page, "1.3")
    assert "3 open 2 overdue" in text(page)
    assert "Times are this server's (CET, UTC+01:00)" in text(page)
    assert [r["overdue"] for r in browse(ward).get("/api/worklist").json()] == [True, True, False]


def test_a_closed_study_leaves_the_list_and_is_found(ward: Ward) -> None:
    ward.arrive("1.1", patient_name="Żółć^Łukasz")
    ward.database.close_study("1.1", "read by Dr. Ä", NOON)
    assert order(browse(ward).get("/")) == []
    found = browse(ward).get("/search", params={"q": "Żółć"})
    assert "Closed 12:00" in row(found, "1.1")
    assert "overdue" not in row(found, "1.1")
    assert "Closed 12:00 : read by Dr. Ä" in text(browse(ward).get("/studies/1.1"))


def test_search_finds_what_a_reader_types(ward: Ward) -> None:
    ward.arrive("1.1", patient_id="4711", accession_number="ACC-9")
    ward.arrive("1.2", patient_id="4712", patient_name="Müller^Eva Maria", ago=5)
    searched = {
        "4711": ["1.1"],
        "acc-9": ["1.1"],
        "471": ["1.1", "1.2"],
        "Müller, Eva": ["1.2"],
        "doe jane": ["1.1"],
        "1.2": ["1.2"],
        "%": [],
        "nobody": [],
        "": [],
    }
    for typed, uids in searched.items():
        assert order(browse(ward).get("/search", params={"q": typed})) == uids, typed
    assert "No study matches" in text(browse(ward).get("/search?q=nobody"))


# --- one study -------------------------------------------------------------------------------


def test_a_study_page_tells_everything(ward: Ward) -> None:
    ward.arrive("1.1", slices=2, ago=20, stat=True, accession_number="ACC-9", study_description="CT Thorax")
    ward.judge("1.1", to=("pacs", "archive"), notes=("uneven spacing",))
    ward.arrive("1.1")
    ward.judge("1.1", Status.NEGATIVE)
    sent, given_up, *_ = ward.database.due_deliveries("pacs", NOON)
    ward.database.mark_sent(sent.delivery_id, NOON)
    ward.database.give_up(given_up.delivery_id, "called AE title not recognised")
    later = ward.database.due_deliveries("archive", NOON)[0]
    ward.database.postpone(later.delivery_id, "connection refused", NOON + timedelta(minutes=1))
    page = text(browse(ward).get("/studies/1.1"))
    for told in (
        "DOE, JANE",
        "P1.1 · Acc. ACC-9",
        "CT Thorax",
        "STAT order; ",
        "target wait 15 min; ordered STAT at the scanner",
        "Lung volume 4 210 ml",
        "pacs Segmentation 1.1.9.0.1 ✓ Delivered 1 –",
        "pacs Structured report 1.1.9.1.1 ✕ Given up 1 called AE title not recognised",
        "archive Segmentation 1.1.9.0.1 ↻ Will be retried 1 connection refused",
        "archive Structured report 1.1.9.1.1 … Waiting 0 –",
        "2, shown Negative",
        "1 Positive",
        "read 1.2 network 5.1 write 0.6",
        "Study Instance UID 1.1 · 3 images · state analyzed",
    ):
        assert told in page
    assert "✕ 1 of 4 not delivered" in row(browse(ward).get("/"), "1.1")


@pytest.mark.parametrize("path", ["/studies/9.9", "/pictures/9.9.png", "/nothing", "/static/nothing.js"])
def test_what_is_not_there_is_said_plainly(ward: Ward, path: str) -> None:
    page = browse(ward).get(path)
    assert page.status_code == 404
    assert "There is no such page or study" in text(page)


# --- pictures --------------------------------------------------------------------------------


def test_the_picture_of_a_study(ward: Ward) -> None:
    ward.arrive("1.1")
    ward.judge("1.1", picture=ward.png())
    assert '<img src="/pictures/1.1.png?revision=1" alt="' in browse(ward).get("/").text
    small, large = browse(ward).get("/pictures/1.1.png"), browse(ward).get("/pictures/1.1/large.png")
    assert small.headers["content-type"] == "image/png"
    assert small.content == large.content == (ward.config.storage.spool / "picture.png").read_bytes()


def test_the_large_picture_is_the_one_in_the_pacs(ward: Ward) -> None:
    pixels = np.random.default_rng(3).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    capture = Dataset()
    capture.file_meta = FileMetaDataset()
    capture.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    capture.file_meta.MediaStorageSOPClassUID = capture.SOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    capture.file_meta.MediaStorageSOPInstanceUID = capture.SOPInstanceUID = "1.5"
    capture.Rows, capture.Columns, capture.SamplesPerPixel, capture.PlanarConfiguration = 24, 32, 3, 0
    capture.BitsAllocated, capture.BitsStored, capture.HighBit, capture.PixelRepresentation = 8, 8, 7, 0
    capture.PhotometricInterpretation, capture.PixelData = "RGB", pixels.tobytes()
    thumbnail, path = ward.png(), ward.config.storage.spool / "picture.dcm"
    capture.save_as(path, enforce_file_format=True)
    ward.arrive("1.1")
    ward.judge("1.1", files={ResultKind.THUMBNAIL: thumbnail, ResultKind.PICTURE: path})
    shown = browse(ward).get("/pictures/1.1/large.png")
    assert np.array_equal(np.asarray(Image.open(BytesIO(shown.content))), pixels)
    path.write_bytes(b"not DICOM")
    assert browse(ward).get("/pictures/1.1/large.png").status_code == 503


def test_the_key_slices_of_a_study(ward: Ward) -> None:
    ward.arrive("1.1")
    ward.judge("1.1", Status.NEGATIVE)
    assert "Key slices" not in text(browse(ward).get("/studies/1.1"))
    assert browse(ward).get("/pictures/1.1/key_slices.png").status_code == 404
    ward.arrive("1.1")
    ward.judge("1.1", files={ResultKind.KEY_SLICES_PNG: ward.png("key.png")})
    page = browse(ward).get("/studies/1.1")
    assert "Key slices The slices with most lesion, outlined" in text(page)
    assert '<img src="/pictures/1.1/key_slices.png?revision=2"' in page.text
    shown = browse(ward).get("/pictures/1.1/key_slices.png?revision=2")
    assert shown.headers["content-type"] == "image/png"
    assert shown.content == (ward.config.storage.spool / "key.png").read_bytes()


def test_only_pictures_in_the_spool_are_served(ward: Ward, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"secret")
    link = ward.png("link.png")
    link.unlink()
    link.symlink_to(secret)
    files = {"1.1": secret, "1.2": link, "1.3": ward.config.storage.spool / "gone.png"}
    for uid, path in files.items():
        ward.arrive(uid)
        ward.judge(uid, picture=path)
        assert browse(ward).get(f"/pictures/{uid}.png").status_code == 404
        assert "no picture" in row(browse(ward).get("/"), uid)
    for attempt in ("..%2f..%2fsecret.png", "%2e%2e/secret.png", f"{secret}", "1.1%00.png"):
        answer = browse(ward).get(f"/pictures/{attempt}")
        assert answer.status_code == 404, attempt


# --- untrusted names ---------------------------------------------------------------------------

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</title></table><script src=//evil.example></script>",
    "{{ 7*7 }}{% raw %}",
    "javascript:alert(1)",
    "山田 太郎",
    "محمد علي",
)


class Elements(HTMLParser):
    """The tags with their attributes' names as a browser would see them, and the text between them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, ...]] = []
        self.words = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, *(name for name, _ in attrs)))

    def handle_data(self, data: str) -> None:
        self.words += data


@pytest.mark.parametrize("name", HOSTILE)
def test_names_from_the_scanner_are_only_ever_text(tmp_path: Path, name: str) -> None:
    facts = ("patient_name", "patient_id", "accession_number", "study_description")
    skeletons = []
    for number, called in enumerate((name, "plain")):
        ward = Ward(configured(tmp_path / str(number)))
        ward.arrive("1.1", **dict.fromkeys(facts, called))
        ward.refuse("1.1", called)
        shown = [
            Elements(browse(ward).get(address, params=asked).text)
            for address, asked in (("/", {}), ("/studies/1.1", {}), ("/search", {"q": called}))
        ]
        assert all(called in page.words for page in shown)
        skeletons.append([page.tags for page in shown])
        ward.database.close()
    assert skeletons[0] == skeletons[1]


# --- keeping up ------------------------------------------------------------------------------


def test_an_unchanged_page_costs_nothing(ward: Ward) -> None:
    ward.arrive("1.1")
    for address in ("/", "/studies/1.1", "/api/worklist", "/search?q=DOE"):
        first = browse(ward).get(address)
        known = {"If-None-Match": first.headers["etag"]}
        again = browse(ward).get(address, headers=known)
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == first.headers["etag"]
        ward.arrive("1.1")
        assert browse(ward).get(address, headers=known).status_code == 200


def test_the_page_moves_on_with_the_clock(ward: Ward) -> None:
    ward.arrive("1.1")
    known = {"If-None-Match": browse(ward).get("/").headers["etag"]}
    ward.now += timedelta(minutes=1)
    page = browse(ward).get("/", headers=known)
    assert "due in 1 h 59 min" in row(page, "1.1")
    assert "as of 12:01" in text(page)


def test_a_page_without_scripts_reloads_itself(ward: Ward) -> None:
    assert '<noscript><meta http-equiv="refresh" content="5"></noscript>' in browse(ward).get("/").text


# --- machines --------------------------------------------------------------------------------


def test_the_api_gives_the_rows_of_the_terminal(ward: Ward) -> None:
    ward.arrive("1.1", slices=2, accession_number="ACC-9")
    ward.arrive("1.2")
    ward.judge("1.1", to=("pacs",), picture=ward.png())
    rows = browse(ward).get("/api/worklist").json()
    entry = ward.database.entry("1.1")
    assert entry is not None
    assert entry.result is not None
    assert rows[0] == entry_row(entry, NOON)
    assert result_row(entry.result).items() <= {**rows[0], "reason": ""}.items()
    assert rows[0]["band"] == "severe"
    assert rows[0]["due_at"] == "2026-03-02T12:30:00+00:00"
    assert rows[0]["reason"] == "right lung 47 % affected, score 0.97"
    assert rows[0]["files"] == {"thumbnail": str(ward.config.storage.spool / "picture.png")}
    assert {state: n for state, n in rows[0]["deliveries"].items() if n} == {"pending": 2}
    assert rows[1].keys() == rows[0].keys()
    unknown = {"status", "probability", "affected_fraction", "grade", "lesion_volume_ml", "model", "revision"}
    assert {rows[1][key] for key in unknown} == {None}


def free_disk_left_out(words: str) -> str:
    """What is free may change between two looks: others use the disk too."""
    return re.sub(r"[\d.]+ GB of disk are free", "some GB of disk are free", words)


def troubles_on_every_page(ward: Ward) -> list[str]:
    """What the page and the health check both say is wrong."""
    client = browse(ward)
    health = client.get("/healthz").json()
    assert health["ok"] is (not health["troubles"])
    for address in ("/", "/search"):
        page = free_disk_left_out(text(client.get(address)))
        assert all(free_disk_left_out(trouble) in page for trouble in health["troubles"])
    return list(health["troubles"])


def test_a_full_disk_is_said_on_the_page(tmp_path: Path) -> None:
    config = configured(tmp_path)
    full = config.storage.model_copy(update={"minimum_free_gb": 1e9})
    config.storage.spool.mkdir(parents=True)
    (trouble,) = troubles_on_every_page(Ward(config.model_copy(update={"storage": full})))
    assert trouble.startswith("New images are refused")


def test_an_analyzer_that_does_nothing_is_said_on_the_page(ward: Ward) -> None:
    ward.arrive("1.1")
    ward.database.mark_ready(ward.study("1.1"))
    assert troubles_on_every_page(ward) == []
    ward.now += timedelta(seconds=ward.config.analysis.lease_seconds + ward.config.assemble.quiet_seconds + 1)
    assert troubles_on_every_page(ward) == ["Studies wait for analysis since 12:00: does the analyzer run?"]


@pytest.mark.parametrize("shadow", [False, True])
def test_results_that_do_not_arrive_are_said_on_the_page(shadow: bool, tmp_path: Path) -> None:
    pacs = Destination(name="PACS", ae_title="PACS", host="127.0.0.1", port=104)
    delivery = Delivery(destinations=(pacs,))
    ward = Ward(configured(tmp_path).model_copy(update={"delivery": delivery, "shadow": shadow}))
    ward.arrive("1.1")
    ward.judge("1.1", to=("PACS", "renamed since"))
    assert troubles_on_every_page(ward) == []
    ward.now += timedelta(minutes=61)
    if shadow:  # nothing is sent to the PACS, and that is meant
        assert troubles_on_every_page(ward) == []
        return
    (trouble,) = troubles_on_every_page(ward)
    assert trouble.startswith("Results have not reached the PACS since 12:00")


def test_health_counts_open_studies_by_state(ward: Ward) -> None:
    for uid in ("1.1", "1.2", "1.3"):
        ward.arrive(uid)
    ward.judge("1.1")
    ward.database.close_study("1.2", "", NOON)
    answer = browse(ward).get("/healthz")
    assert answer.json()["ok"] is True
    assert {state: count for state, count in answer.json()["open"].items() if count} == {
        "analyzed": 1,
        "receiving": 1,
    }


def test_a_lost_database_is_said_and_not_taken_for_an_empty_list(ward: Ward) -> None:
    ward.arrive("1.1", patient_name="SECRET^NAME")
    with sqlite3.connect(ward.config.database.file) as connection:
        connection.execute("ALTER TABLE study RENAME TO lost")
    connection.close()
    assert browse(ward).get("/").status_code == 503
    assert "The list could not be read" in text(browse(ward).get("/"))
    for address in ("/healthz", "/api/worklist"):
        answer = browse(ward).get(address)
        assert (answer.status_code, answer.json()["ok"]) == (503, False)


# --- who may see it ----------------------------------------------------------------------------


def test_every_page_needs_the_token(ward: Ward) -> None:
    ward.arrive("1.1")
    ward.judge(
        "1.1", files={ResultKind.THUMBNAIL: ward.png(), ResultKind.KEY_SLICES_PNG: ward.png("key.png")}
    )
    client = guarded(ward)
    for address in PAGES:
        refused = client.get(address)
        assert refused.status_code == 401, address
        assert "DOE" not in refused.text.replace("/search?q=DOE", "")
        assert client.get(address, headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 200
        for wrong in ("Bearer wrong", f"Basic {TOKEN}", "Bearer", f"Bearer {TOKEN}é", TOKEN):
            asked = {"Authorization": wrong.encode("latin-1")}
            assert client.get(address, headers=asked).status_code == 401, wrong
    assert client.get("/api/worklist").json() == {
        "ok": False,
        "error": "this needs the header 'Authorization: Bearer TOKEN'",
    }
    assert client.get("/healthz").status_code == client.get("/static/page.css").status_code == 200


@pytest.mark.parametrize(
    ("host", "code"),
    [
        ("localhost", 200),
        ("LOCALHOST:8080", 200),
        ("127.0.0.1:8080", 200),
        ("[::1]:8080", 200),
        ("evil.example", 400),
        ("evil.example:8080", 400),
        ("127.0.0.1.evil.example", 400),
        ("localhost.evil.example:80", 400),
        ("", 400),
    ],
)
def test_a_foreign_name_for_this_machine_is_refused(ward: Ward, host: str, code: int) -> None:
    for address in ("/", "/healthz", "/static/page.css"):
        assert browse(ward).get(address, headers={"host": host}).status_code == code


def test_behind_a_proxy_the_token_guards_and_any_name_serves(ward: Ward) -> None:
    asked = {"host": "triage.hospital.example", "Authorization": f"Bearer {TOKEN}"}
    assert guarded(ward).get("/", headers=asked).status_code == 200


def test_every_answer_carries_the_guarding_headers(ward: Ward, monkeypatch: pytest.MonkeyPatch) -> None:
    client = browse(ward, raise_errors=False)
    answers = [
        client.get(address) for address in ("/", "/nothing", "/static/page.css", "/api/worklist", "/healthz")
    ]
    answers.append(client.get("/", headers={"host": "evil.example"}))
    answers.append(guarded(ward).get("/"))

    def break_down() -> datetime:
        raise ZeroDivisionError("DOE^JANE")

    monkeypatch.setattr(ward, "clock", break_down)
    ward.config = configured(ward.config.storage.spool.parent)
    broken = browse(ward, raise_errors=False).get("/")
    assert (broken.status_code, "DOE" in broken.text) == (500, False)
    for answer in (*answers, broken):
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
        assert "unsafe" not in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["referrer-policy"] == "same-origin"


# --- the server ------------------------------------------------------------------------------


def test_the_server_answers_and_ends_when_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    ward, stop = Ward(configured(tmp_path, port=free_port())), threading.Event()
    ward.arrive("1.1", patient_name="SECRET^NAME")
    server = threading.Thread(target=serve, args=(ward.database, ward.config, ward.clock, stop))
    server.start()
    address = f"http://127.0.0.1:{ward.config.web.port}"
    try:
        retrying = httpx.HTTPTransport(retries=8)
        with httpx.Client(transport=retrying, base_url=address) as client:
            assert order(client.get("/")) == ["1.1"]
            assert client.get("/search?q=SECRET").status_code == 200
        with pytest.raises(ConfigError, match=r"cannot listen on 127.0.0.1:\d+: .*choose another web.port"):
            serve(ward.database, ward.config, ward.clock, stop)
    finally:
        stop.set()
        server.join(20)
    assert not server.is_alive()
    told = [record.getMessage() for record in caplog.records if record.name.startswith(("triage", "uvicorn"))]
    assert told == [f"worklist on {address}/"]
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", ward.config.web.port))
    ward.database.close()


# --- words -----------------------------------------------------------------------------------


def test_person_names_are_read_as_a_reader_writes_them() -> None:
    names = {
        "DOE^JANE": "DOE, JANE",
        "DOE^JANE^M^DR": "DOE, JANE M",
        "DOE": "DOE",
        "^JANE": "JANE",
        "Yamada^Tarou=山田^太郎=やまだ^たろう": "Yamada, Tarou (山田, 太郎)",
        "=山田^太郎": "山田, 太郎",
        "": "",
        "^^": "",
    }
    assert {name: words.person(name) for name in names} == names


@given(st.text(max_size=64))
def test_no_person_name_stops_the_page(name: str) -> None:
    assert set(words.person(name)) <= {*name, ",", " ", "(", ")"}


@given(st.integers(-10_000, 10_000), st.integers(0, 59))
def test_a_passed_due_time_is_never_called_due_in(minutes: int, seconds: int) -> None:
    left = timedelta(minutes=minutes, seconds=seconds)
    said = words.due(NOON + left, NOON)
    if left >= timedelta(minutes=1):
        assert said.startswith("due in ")
    elif left <= timedelta(minutes=-1):
        assert said.startswith("overdue ")
    else:
        assert said == "due now"


@pytest.mark.parametrize(
    ("minutes", "said"),
    [
        (1, "1 min"),
        (59, "59 min"),
        (60, "1 h 00 min"),
        (125, "2 h 05 min"),
        (2879, "47 h 59 min"),
        (2880, "2 days"),
    ],
)
def test_lengths_of_time(minutes: int, said: str) -> None:
    assert words.span(timedelta(minutes=minutes, seconds=30)) == said


@pytest.mark.usefixtures("_berlin")
def test_days_are_named_when_they_are_not_today() -> None:
    now = datetime(2026, 7, 1, 22, 30, tzinfo=UTC)  # already the 2nd of July in Berlin
    assert words.when(now, now) == "00:30"
    assert words.when(now - timedelta(hours=2), now) == "1 Jul 22:30"
    assert words.when(now - timedelta(days=365), now) == "2025-07-02 00:30"
    assert words.zone(now) == "CEST, UTC+02:00"


# --- the eye ---------------------------------------------------------------------------------


def _themes() -> list[dict[str, str]]:
    css = (STATIC / "page.css").read_text(encoding="utf-8")
    blocks = re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    return [dict(re.findall(r"--([\w-]+): (#\w+)", block)) for block in blocks]


def _luminance(colour: str) -> float:
    """Relative luminance (WCAG 2.2, section 1.4.3)."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    channels = np.array([int(digits[i : i + 2], 16) for i in (0, 2, 4)]) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def _contrast(one: str, other: str) -> float:
    light, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", _themes(), ids=["dark", "light"])
def test_text_is_readable_in_both_themes(theme: dict[str, str]) -> None:
    surfaces = {"ground", "panel"}
    inks = theme.keys() - surfaces - {"line", "lost", "lost-text"}
    assert len(inks) >= 11
    for ink in inks:
        for surface in surfaces:
            assert _contrast(theme[ink], theme[surface]) >= 4.5, f"{ink} on {surface}"
    assert _contrast(theme["lost-text"], theme["lost"]) >= 7


def test_a_small_answer_does_not_wait_for_an_acknowledgement() -> None:
    with _listen("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname()):
        connection, _ = listening.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
