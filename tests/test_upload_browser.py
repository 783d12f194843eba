"""The upload page in a real browser: dropped folders, chosen files, and what it says when a line is cut."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.browser import Browse, browse, chromium, pictures  # noqa: F401 - fixtures
from tests.needs import needs_chromium
from tests.test_import_command import zipped
from tests.test_upload import Site, serving, study

pytestmark = needs_chromium


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with serving(tmp_path / "here", web={"refresh_seconds": 60, "upload_gb": 0.01}) as built:
        yield built


def drop(page: Page, *paths: Path) -> None:
    """As from the desktop: files and folders."""
    box = page.locator("upload-box").bounding_box()
    assert box is not None
    devtools = page.context.new_cdp_session(page)
    data = {"items": [], "files": [str(path) for path in paths], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        where = {"x": box["x"] + 20, "y": box["y"] + 20}
        devtools.send("Input.dispatchDragEvent", {"type": kind, "data": data, **where})


def choose(page: Page, *paths: Path) -> None:
    """By keyboard."""
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Choose files…").press("Enter")
    chooser.value.set_files([str(path) for path in paths])


def test_dropped_folders_are_judged_before_the_eyes(site: Site, browse: Browse, tmp_path: Path) -> None:  # noqa: F811
    for seed in (3, 4):
        study(tmp_path / "in" / "deep" / str(seed), seed)
    (tmp_path / "in" / "notes.txt").write_text("hello")
    page = browse(site.address)
    page.goto("/upload")
    drop(page, tmp_path / "in")
    expect(page.locator("#told")).to_have_text("All has come.")
    expect(page).to_have_url(f"{site.address}/uploads/1")
    expect(page.get_by_role("heading", level=1)).to_have_text("Upload 1")
    counts = page.locator("#so-far .counts")
    expect(counts).to_have_text("2 studies60 images2 pending")
    page.get_by_text("1 file was passed over").click()
    expect(page.locator("#passed-over li")).to_have_text("in/notes.txt: not a DICOM file")
    site.judge()
    expect(counts).to_have_text("2 studies60 images2 positive")
    rows = page.locator("#studies tr")
    expect(rows).to_have_count(2)
    expect(rows.first).to_contain_text("Score")
    for image in page.locator("main img").all():
        image.scroll_into_view_if_needed()
        expect(image).not_to_have_js_property("naturalWidth", 0)
    pictures(page, "upload")
    with page.expect_download() as download:
        page.get_by_role("link", name="CSV of this upload").click()
    lines = list(csv.DictReader(download.value.path().read_text(encoding="utf-8").splitlines()))
    assert [line["status"] for line in lines] == ["positive"] * 2
    page.locator(".lesions a").first.click()
    expect(page.get_by_role("heading", level=1)).to_contain_text("PHANTOM")


def test_what_did_not_arrive_is_sent_again(site: Site, browse: Browse, tmp_path: Path) -> None:  # noqa: F811
    paths = study(tmp_path / "in")
    members = {path.name: path.read_bytes() for path in paths}
    archive = zipped(tmp_path / "cd.zip", members)
    page = browse(site.address, "net::ERR_FAILED")
    page.on("filechooser", lambda _: None)  # from now on: one that opens before it is expected is missed
    page.goto("/upload")
    page.route("**/files", lambda route: route.abort(), times=1)
    choose(page, archive)
    expect(page.get_by_role("alert").last).to_contain_text("There is no connection.")
    expect(page.locator("#told")).to_have_text("1 file did not arrive. What came stays.")
    page.get_by_role("button", name="Send again").press("Enter")
    expect(page.locator("#told")).to_have_text("All has come.")
    expect(page.locator("#wrong")).to_be_hidden()
    expect(page.locator("#so-far .counts")).to_have_text("1 study30 images1 pending")
    site.judge()
    expect(page.locator("#so-far .counts")).to_have_text("1 study30 images1 positive")
    large = tmp_path / "large.zip"
    large.write_bytes(bytes(11 * 2**20))
    choose(page, large)
    expect(page.locator("#wrong")).to_contain_text("large.zip: more than 10 MB (web.upload_gb).")
    expect(page.locator("#so-far .counts")).to_have_text("1 study30 images1 positive")
