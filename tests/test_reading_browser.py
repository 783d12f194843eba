"""The reading list in a real browser: keys, claims, what changes meanwhile, and lists without an end."""

from __future__ import annotations

from datetime import timedelta

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from tests.needs import needs_chromium
from tests.test_web_browser import Site, chromium, site
from triage.domain import Status

pytestmark = needs_chromium
__all__ = ["chromium", "site"]


def press(site: Site, *keys: str) -> None:
    webdriver.ActionChains(site.browser).send_keys(*keys).perform()


def selected(site: Site) -> str:
    uid: str = site.run("return document.activeElement.closest('tr')?.dataset.study ?? ''")
    return uid


def row(site: Site, uid: str) -> str:
    text: str = site.run(f"return document.getElementById('row-{uid}')?.innerText ?? ''")
    return text


def visible(site: Site, name: str) -> str:
    """The text of something that may be hidden."""
    text: str = site.run(
        f"const one = document.getElementById('{name}'); return one.hidden ? '' : one.innerText"
    )
    return text


def open_list(site: Site) -> None:
    site.browser.get(site.address)
    site.until(lambda: site.run("return document.documentElement.classList.contains('with-script')"))


def test_a_morning_with_the_keyboard(site: Site) -> None:
    ward = site.ward
    for number in range(6):
        ward.arrive(f"1.{number}", ago=60 - number, patient_name=f"PATIENT^{number}")
    ward.judge("1.0", affected_fraction=0.3)
    ward.database.reading.claim("1.3", "dr.lee", ward.now, ward.now + timedelta(minutes=60))
    open_list(site)
    press(site, "j", "j", "j", "k")
    assert selected(site) == "1.1"
    press(site, "c")
    site.until(lambda: "You read it" in row(site, "1.1"))
    assert selected(site) == "1.1"
    assert visible(site, "said") == "You read the study of PATIENT, 1."
    press(site, "c")
    site.until(lambda: "You read it" not in row(site, "1.1"))

    ward.arrive("2.0", ago=30, stat=True, patient_name="SECRET^NAME")
    site.until(lambda: "New critical study: STAT order; not judged yet" in visible(site, "news"))
    site.until(lambda: "2.0" in site.order())
    assert "SECRET" not in visible(site, "news")
    assert selected(site) == "1.1", "what comes in disturbs nobody"

    press(site, "r")
    site.until(lambda: "1.1" not in site.order())
    assert selected(site) == "1.2", "the one after it"
    assert ward.study("1.1").closed_reason == "read by local"
    site.browser.find_element(By.CSS_SELECTOR, "#said button").click()
    site.until(lambda: "1.1" in site.order())

    site.run("document.getElementById('study-1.3').focus()")
    press(site, "c")
    site.until(lambda: site.run("return document.getElementById('taken').open"))
    assert "dr.lee reads the study of PATIENT, 3." in site.text()
    press(site, Keys.ESCAPE)
    site.until(lambda: not site.run("return document.getElementById('taken').open"))
    assert "dr.lee reads it" in row(site, "1.3")
    press(site, Keys.ENTER)
    site.until(lambda: site.run("return document.getElementById('taken').open"))
    assert site.browser.current_url == site.address + "/", "it is not opened unknowing"
    site.browser.find_element(By.CSS_SELECTOR, "#taken [value=take]").click()
    site.until(lambda: site.browser.current_url.endswith("/studies/1.3"))
    site.until(lambda: "You read it" in site.text())
    assert [line for line in site.complaints() if "409 (Conflict)" not in line] == []


def test_opening_a_study_claims_it_and_a_verdict_takes_one_click(site: Site) -> None:
    ward = site.ward
    ward.arrive("1.1")
    ward.judge("1.1")
    open_list(site)
    press(site, "j", Keys.ENTER)
    site.until(lambda: "You read it" in site.text())
    site.browser.find_element(By.ID, "over_called-1.1").click()
    site.until(lambda: "Over-called (local)" in site.text())
    site.browser.find_element(By.ID, "other-1.1").click()
    site.run("document.getElementById('judge-grade').value = 'CT-1'")
    site.browser.find_element(By.ID, "judge-comment").send_keys("motion <b>only</b>")
    site.browser.find_element(By.CSS_SELECTOR, "#judge [value=save]").click()
    site.until(lambda: "Other (local), truly CT-1" in site.text())
    assert "motion <b>only</b>" in site.text()
    site.browser.get(site.address)
    site.until(lambda: "Other (local), truly CT-1" in row(site, "1.1"))
    site.run("document.getElementById('study-1.1').focus()")
    site.browser.find_element(By.ID, "agree-1.1").click()
    site.until(lambda: "Agree (local)" in row(site, "1.1"))
    assert [one.opinion for one in ward.database.reading.verdicts("1.1")] == ["agree", "other", "over_called"]
    assert [line for line in site.complaints() if "viewer.json" not in line] == [], "there are no images"


def test_a_study_that_somebody_reads_says_so_before_anything_else(site: Site) -> None:
    site.ward.arrive("1.1")
    site.ward.database.reading.claim("1.1", "dr.lee", site.ward.now, site.ward.now + timedelta(minutes=60))
    site.browser.get(site.address + "/studies/1.1")
    site.until(lambda: site.run("return document.getElementById('taken').open"))
    site.browser.find_element(By.ID, "taken-look").click()
    site.until(lambda: not site.run("return document.getElementById('taken').open"))
    assert "dr.lee reads it" in site.text()
    site.browser.get("about:blank")
    site.browser.get(site.address + "/studies/1.1")
    site.until(lambda: site.run("return document.getElementById('taken').open"))
    press(site, Keys.ESCAPE)
    site.until(lambda: site.browser.current_url == site.address + "/")
    site.browser.find_element(By.ID, "study-1.1").click()
    site.until(lambda: site.run("return document.getElementById('taken').open"))
    site.browser.find_element(By.ID, "taken-look").click()
    site.until(lambda: site.browser.current_url.endswith("/studies/1.1#look"))
    assert "dr.lee reads it" in site.text()
    claim = site.ward.database.reading.reader("1.1", site.ward.now)
    assert claim is not None
    assert claim.person == "dr.lee"


def test_filters_views_and_help(site: Site) -> None:
    ward = site.ward
    for number in range(4):
        ward.arrive(f"1.{number}", ago=60 - number, patient_name=f"PATIENT^{number}")
    ward.judge("1.0")
    ward.judge("1.1", Status.NEGATIVE)
    open_list(site)
    press(site, "?")
    site.until(lambda: site.run("return document.getElementById('help').open"))
    press(site, Keys.ESCAPE)
    site.until(lambda: not site.run("return document.getElementById('help').open"))
    press(site, "f", "patient^2")
    site.until(lambda: site.order() == ["1.2"])
    assert site.browser.current_url == site.address + "/?text=patient%5E2"
    press(site, Keys.ESCAPE, "j")
    assert selected(site) == "1.2"
    site.run("document.querySelector('[name=text]').value = ''")
    for band in ("severe", "routine"):
        site.browser.find_element(By.CSS_SELECTOR, f"[name=band][value={band}]").click()
    site.until(lambda: site.order() == ["1.0", "1.1"])
    site.browser.find_element(By.ID, "save-view").click()
    press(site, "Mine", Keys.ENTER)
    site.until(lambda: "Mine" in visible(site, "views"))
    assert site.browser.current_url == site.address + "/?band=severe&band=routine"
    assert site.run("return document.querySelector('#views [aria-current]').innerText") == "Mine"
    assert site.order() == ["1.0", "1.1"]
    ward.arrive("1.4", ago=100)
    ward.judge("1.4")
    site.until(lambda: site.order() == ["1.4", "1.0", "1.1"])
    site.browser.find_element(By.CSS_SELECTOR, "[data-forget=Mine]").click()
    site.until(lambda: "Mine" not in visible(site, "views"))
    assert ward.database.reading.views("local") == {}
    assert site.complaints() == []


def test_a_long_list_is_there_only_where_it_is_looked_at(site: Site) -> None:
    for number in range(230):
        site.ward.arrive(f"1.{number:03}", ago=300 - number)
    open_list(site)
    last = "document.querySelector('#worklist tbody:last-of-type tr:last-child')?.dataset.study"
    for _ in range(60):
        site.run("window.scrollTo(0, document.body.scrollHeight)")
        if site.run(f"return {last}") == "1.229":
            break
        site.run("return new Promise(done => setTimeout(done, 100))")
    assert site.run(f"return {last}") == "1.229"
    site.until(lambda: len(site.run("return [...document.querySelectorAll('tr[data-study]')]")) <= 150)
    assert site.run("return [...document.querySelectorAll('.place')].at(-1).innerText") == "230"
    height = site.run("return document.body.scrollHeight")
    site.run("window.scrollTo(0, 0)")
    site.until(lambda: site.order()[:2] == ["1.000", "1.001"])
    site.until(lambda: "1.229" not in site.order())
    assert abs(site.run("return document.body.scrollHeight") - height) < 40
    site.ward.database.close_study("1.100", "read", site.ward.now)
    site.until(lambda: "229" in site.run("return document.querySelector('.counts').innerText"))
    assert site.complaints() == []


@pytest.mark.parametrize("site", [{"refresh_seconds": 1}], indirect=True)
def test_without_a_stream_the_list_asks(site: Site) -> None:
    site.browser.execute_cdp_cmd("Network.enable", {})
    site.browser.execute_cdp_cmd("Network.setBlockedURLs", {"urls": ["*worklist/events*"]})
    try:
        open_list(site)
        site.ward.arrive("1.1")
        site.until(lambda: site.order() == ["1.1"])
        assert site.lost() == ""
    finally:
        site.browser.execute_cdp_cmd("Network.setBlockedURLs", {"urls": []})
        site.browser.execute_cdp_cmd("Network.disable", {})
        site.complaints()
