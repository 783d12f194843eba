"""The page in a real browser: it keeps up by itself, says when it cannot, and disturbs nobody."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

from tests.needs import needs_chromium
from tests.peers import free_port
from tests.web_studies import Ward, configured
from triage import first, passwords
from triage.domain import Role, Status
from triage.web.app import serve

pytestmark = needs_chromium

PASSWORD = "correct horse battery"


@pytest.fixture(scope="module")
def chromium() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1400,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options, Service("/usr/bin/chromedriver"))
    yield browser
    browser.quit()


def answers(port: int) -> bool:
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", port)) == 0


class Site:
    """The served page of one ward, and what a reader sees of it in the browser."""

    def __init__(self, ward: Ward, browser: webdriver.Chrome) -> None:
        self.ward, self.browser = ward, browser
        self.address = f"http://127.0.0.1:{ward.config.web.port}"
        self.start()

    def start(self) -> None:
        self.stop = threading.Event()
        arguments = (self.ward.database, self.ward.config, self.ward.clock, self.stop)
        self.server = threading.Thread(target=serve, args=arguments)
        self.server.start()
        WebDriverWait(None, 20, poll_frequency=0.05).until(lambda _: answers(self.ward.config.web.port))

    def end(self) -> None:
        self.stop.set()
        self.server.join(20)
        assert not self.server.is_alive()

    def order(self) -> list[str]:
        rows: list[str] = self.run(
            "return [...document.querySelectorAll('#worklist tbody tr')].map(row => row.id.slice(4))"
        )
        return rows

    def text(self) -> str:
        shown: str = self.run("return document.body?.innerText ?? ''")
        return shown

    def lost(self) -> str:
        shown: str = self.run(
            "const lost = document.getElementById('lost'); return lost.hidden ? '' : lost.innerText"
        )
        return shown

    def run(self, script: str) -> Any:
        return self.browser.execute_script(script)

    def until(self, holds: Callable[[], bool]) -> None:
        WebDriverWait(self.browser, 15, poll_frequency=0.05).until(lambda _: holds())

    def complaints(self) -> list[str]:
        return [entry["message"] for entry in self.browser.get_log("browser")]


@pytest.fixture
def site(tmp_path: Path, chromium: webdriver.Chrome, request: pytest.FixtureRequest) -> Iterator[Site]:
    web = {"port": free_port(), "refresh_seconds": 1, **getattr(request, "param", {})}
    ward = Ward(configured(tmp_path, **web))
    site = Site(ward, chromium)
    site.complaints()  # of the test before
    yield site
    chromium.get("about:blank")
    site.end()
    ward.database.close()


def test_the_list_updates_by_itself_and_disturbs_nobody(site: Site) -> None:
    ward = site.ward
    for number in range(40):
        ward.arrive(f"1.{number}", ago=30 - number / 4, patient_name=f"PATIENT^{number}")
    ward.judge("1.0", Status.NEGATIVE, picture=ward.png())
    site.browser.get(site.address)
    before = site.order()
    assert before[-1] == "1.0"
    assert site.run("return document.querySelector('img').naturalWidth || true")
    site.run("""
        window.scrollTo(0, 700); window.untouched = true;
        const name = document.getElementById("study-1.20"); name.focus({preventScroll: true});
        getSelection().selectAllChildren(name); window.kept = document.querySelector("img");
    """)
    seen_at = "return document.getElementById('row-1.20').getBoundingClientRect().top"
    top = site.run(seen_at)
    ward.now += timedelta(minutes=1)
    ward.arrive("2.1", patient_name="NEW^ONE", ago=20)
    ward.judge("2.1")
    site.until(lambda: site.order() == ["2.1", *before])
    assert "NEW, ONE" in site.text()
    assert "as of 12:01" in site.text()
    assert site.browser.title == "41 open · Worklist"
    assert site.run("return window.untouched"), "the page was not loaded anew"
    assert site.run("return document.activeElement.id") == "study-1.20"
    assert site.run("return getSelection().toString()") == "PATIENT, 20"
    assert site.run("return document.querySelector('img') === window.kept"), "the picture was not loaded anew"
    assert abs(site.run(seen_at) - top) < 3
    lines = site.run("""
        const number = new Range();
        number.selectNodeContents(document.querySelector("#worklist tbody tr:last-child .place"));
        return [number.toString(), number.getClientRects().length];
    """)
    assert lines == ["41", 1], "a long number stays on one line"
    assert site.complaints() == []


def test_a_study_walks_through_its_states_before_the_eyes(site: Site) -> None:
    ward = site.ward
    site.browser.get(site.address)
    assert "No open study" in site.text()
    ward.arrive("1.1", slices=3)
    site.until(lambda: "3 images so far" in site.text())
    ward.arrive("1.2", ago=5)
    site.until(lambda: site.order() == ["1.2", "1.1"])
    ward.judge("1.1", picture=ward.png())
    site.until(lambda: site.order() == ["1.1", "1.2"])
    site.until(lambda: site.run("return document.querySelector('#row-1\\\\.1 img').naturalWidth") == 120)
    ward.database.close_study("1.2", "read", ward.now)
    ward.database.close_study("1.1", "read", ward.now)
    site.until(lambda: "No open study" in site.text())
    assert site.complaints() == []


def test_a_lost_connection_is_shouted_and_recovered_from(site: Site) -> None:
    site.ward.arrive("1.1")
    site.browser.get(site.address)
    assert site.lost() == ""
    site.end()
    site.until(lambda: site.lost() != "")
    assert site.lost() == "Connection lost since 12:00. This page may be out of date."
    assert site.browser.title == "⚠ Connection lost"
    assert site.order() == ["1.1"], "the last list stays readable"
    site.ward.arrive("1.2", ago=5)
    site.start()
    site.until(lambda: site.lost() == "")
    assert site.order() == ["1.2", "1.1"]
    assert site.browser.title == "2 open · Worklist"


def test_a_reader_gets_around_with_the_keyboard(site: Site) -> None:
    site.ward.arrive("1.1", patient_name="<script>alert(1)</script>^Żółć")
    site.ward.judge("1.1", picture=site.ward.png(), to=("pacs",))
    site.browser.get(site.address)
    site.run("document.getElementById('q').focus()")
    keys = webdriver.ActionChains(site.browser)
    keys.send_keys("Żółć", Keys.ENTER).perform()
    site.until(lambda: "Studies matching “Żółć”" in site.text())
    assert site.order() == ["1.1"]
    site.run("document.getElementById('q').focus()")
    keys.send_keys(*[Keys.TAB] * 4, Keys.ENTER).perform()
    site.until(lambda: site.browser.current_url.endswith("/studies/1.1"))
    assert "<script>alert(1)</script>, Żółć" in site.text()
    assert site.run("return document.querySelector('.large img').naturalWidth") == 120
    site.ward.database.give_up(1, "called AE title not recognised")
    site.until(lambda: "called AE title not recognised" in site.text())
    assert [line for line in site.complaints() if "viewer.json" not in line] == [], "there are no images"


def test_logging_in_and_out(site: Site) -> None:
    site.ward.database.people.add_user("jane", Role.VIEWER, passwords.hashed(PASSWORD), site.ward.now, [])
    site.ward.arrive("1.1")
    site.browser.get(site.address + "/search?q=DOE")
    assert "JANE" not in site.text()

    def log_in(password: str) -> None:
        site.browser.find_element(By.ID, "name").send_keys("jane")
        site.browser.find_element(By.ID, "password").send_keys(password, Keys.ENTER)

    log_in("wrong")
    site.until(lambda: "Wrong name or password" in site.text())
    log_in(PASSWORD)
    site.until(lambda: "DOE, JANE" in site.text())
    assert site.browser.current_url == site.address + "/search?q=DOE"
    assert site.run("return document.cookie") == ""
    tabs = site.browser.current_window_handle
    site.browser.switch_to.new_window("tab")
    site.browser.get(site.address)
    site.browser.find_element(By.CSS_SELECTOR, "form[action='/logout'] button").click()
    site.until(lambda: "Password" in site.text())
    site.browser.close()
    site.browser.switch_to.window(tabs)
    site.until(lambda: "Password" in site.text())
    assert [complaint for complaint in site.complaints() if "401 (Unauthorized)" not in complaint] == []


def test_the_first_admin_makes_a_user_who_changes_the_password(site: Site) -> None:
    def fill(**fields: str) -> None:
        for name, value in fields.items():
            site.browser.find_element(By.ID, name.replace("_", "-")).send_keys(value)
        site.browser.switch_to.active_element.send_keys(Keys.ENTER)

    def open_part(name: str) -> None:
        site.run(f"[...document.querySelectorAll('summary')].find(s => s.innerText === '{name}').click()")

    link = first.link(site.ward.database, site.ward.config, site.ward.now)
    assert link is not None
    site.browser.get(link)
    fill(name="boss", password=PASSWORD, again=PASSWORD)
    site.until(lambda: "Users and tokens" in site.text())
    open_part("New user")
    fill(new_name="jane", new_password="a first password", new_again="a first password")
    site.until(lambda: "never" in site.text())
    open_part("New token")
    fill(token_name="RIS")
    site.until(lambda: "it is not shown again" in site.text())
    site.browser.find_element(By.CSS_SELECTOR, "form[action='/logout'] button").click()
    site.until(lambda: "Password" in site.text())
    fill(name="jane", password="a first password")
    site.until(lambda: "Log out" in site.text())
    assert "Users" not in site.text()
    site.browser.find_element(By.LINK_TEXT, "jane").click()
    fill(current="a first password", password=PASSWORD, again=PASSWORD)
    site.until(lambda: "Your password is changed" in site.text())
    assert [one for one in site.complaints() if "401 (Unauthorized)" not in one] == []


@pytest.mark.parametrize("width", [700, 1000, 1400, 2200])
def test_nothing_sticks_out(site: Site, width: int) -> None:
    long = "Wolkenstein-Habsburg-Lothringen^" + "X" * 60
    site.ward.arrive("1.1", patient_name=long, patient_id="9" * 64, study_description="Y" * 64)
    site.ward.judge("1.1")
    site.ward.arrive("1.2", accession_number="Z" * 16)
    site.ward.arrive("1.3", ago=120 + 23 * 60 + 59)
    site.ward.refuse("1.2", "missing slices " * 12)
    for path in ("/", "/studies/1.1", "/studies/1.2", "/search?q=" + "Q" * 200):
        site.browser.set_window_size(width, 900)
        site.browser.get(site.address + path)
        assert site.run("return document.documentElement.scrollWidth <= innerWidth"), path
        sticking = site.run("""
            return [...document.querySelectorAll("td, th")]
                .filter(cell => cell.scrollWidth > cell.clientWidth + 1)
                .map(cell => cell.className + cell.textContent.trim())
        """)
        assert sticking == [], path
    site.browser.set_window_size(1400, 900)
