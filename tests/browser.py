"""A real browser for the tests of the page: the system's Chromium, driven by Playwright."""

from __future__ import annotations

import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, expect, sync_playwright

from tests.peers import free_port, wait_until
from tests.web_studies import Ward, configured
from triage.web.app import serve

ARGUMENTS = ("--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader")  # 3D without a card
PICTURES = Path(os.environ.get("TRIAGE_SCREENSHOTS", Path(__file__).parents[1] / ".pytest-screenshots"))
"""What the pages look like, for people to look at."""
SIZES = {1280: 900, 400: 800}
WAIT_SECONDS = 60
Browse = Callable[..., Page]

expect.set_options(timeout=1000 * WAIT_SECONDS)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """One for a file of tests: while it lives, ``asyncio.run`` is taken in this thread."""
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def browse(chromium: Browser) -> Iterator[Browse]:
    """``browse(address)`` gives a page of somebody new, with cookies of their own.

    What a page complains of in the console, where failed requests are told, too, fails the test; not so lines
    that have one of ``but`` in them.
    """
    contexts: list[BrowserContext] = []
    complaints: list[str] = []

    def somebody(address: str, *but: str, **options: Any) -> Page:
        def note(line: str) -> None:
            if not any(known in line for known in but):
                complaints.append(line)

        def said(message: ConsoleMessage) -> None:
            if message.type in ("error", "warning"):
                note(f"{message.text} {message.location['url']}")

        context = chromium.new_context(
            **{"base_url": address, "viewport": {"width": 1280, "height": 900}, **options}
        )
        context.set_default_timeout(1000 * WAIT_SECONDS)
        context.on("console", said)
        context.on("weberror", lambda thrown: note(str(thrown.error)))
        contexts.append(context)
        return context.new_page()

    yield somebody
    for context in contexts:
        context.close()
    assert not complaints, "\n".join(complaints)


def views(page: Page) -> Iterator[str]:
    """The page in each size and in dark and light, by name; then as it was."""
    before = page.viewport_size
    for width, height in SIZES.items():
        page.set_viewport_size({"width": width, "height": height})
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
            yield f"{width}-{scheme}"
    if before:
        page.set_viewport_size(before)


def pictures(page: Page, name: str) -> None:
    for view in views(page):
        picture(page, f"{name}-{view}")


def picture(page: Page, name: str) -> None:
    page.screenshot(path=PICTURES / f"{name}.png", full_page=True)


def until(page: Page, holds: Callable[[], Any]) -> None:
    """Where ``expect`` has no words for it."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not holds():
        assert time.monotonic() < deadline, page.locator("body").inner_text()
        page.wait_for_timeout(50)


def order(page: Page) -> list[str]:
    """The studies of the list that is shown, from the top."""
    rows: list[str] = page.locator("#worklist tbody tr[data-study]").evaluate_all(
        "rows => rows.map(row => row.dataset.study)"
    )
    return rows


def selected(page: Page) -> str:
    uid: str = page.evaluate("document.activeElement.closest('tr')?.dataset.study ?? ''")
    return uid


def log_in(page: Page, name: str, password: str) -> None:
    page.goto("/login")
    page.get_by_label("Name").fill(name)
    page.get_by_label("Password").fill(password)
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Log out")).to_be_visible()


class Site:
    """The page of one ward, served as the daemon serves it."""

    def __init__(self, ward: Ward) -> None:
        self.ward = ward
        self.address = f"http://127.0.0.1:{ward.config.web.port}"
        self.start()

    def start(self) -> None:
        self.stop = threading.Event()
        ward = self.ward
        self.server = threading.Thread(target=serve, args=(ward.database, ward.config, ward.clock, self.stop))
        self.server.start()
        wait_until(self._answers)

    def _answers(self) -> bool:
        with socket.socket() as tried:
            return tried.connect_ex(("127.0.0.1", self.ward.config.web.port)) == 0

    def end(self) -> None:
        self.stop.set()
        self.server.join(WAIT_SECONDS)
        assert not self.server.is_alive()


def served(folder: Path, **web: Any) -> Iterator[Site]:
    ward = Ward(configured(folder, **{"port": free_port(), "refresh_seconds": 1, **web}))
    site = Site(ward)
    yield site
    site.end()
    ward.database.close()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    yield from served(tmp_path)
