"""The reading list in a real browser: keys, claims, what changes meanwhile, and lists without an end."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from playwright.sync_api import Locator, Page, expect

from tests.browser import Browse, Site, browse, chromium, order, selected, served, site, until
from tests.needs import needs_chromium
from triage.domain import Status

pytestmark = needs_chromium
__all__ = ["browse", "chromium", "site"]


def press(page: Page, *keys: str) -> None:
    for key in keys:
        page.keyboard.press(key)


def row(page: Page, uid: str) -> Locator:
    return page.locator(f"[id='row-{uid}']")


def open_list(page: Page) -> None:
    page.goto("/")
    expect(page.locator("html.with-script")).to_be_attached()


def test_a_morning_with_the_keyboard(site: Site, browse: Browse) -> None:
    ward, page = site.ward, browse(site.address, "409 (Conflict)", "viewer.json")
    for number in range(6):
        ward.arrive(f"1.{number}", ago=60 - number, patient_name=f"PATIENT^{number}")
    ward.judge("1.0", affected_fraction=0.3)
    ward.database.reading.claim("1.3", "dr.lee", ward.now, ward.now + timedelta(minutes=60))
    open_list(page)
    press(page, "j", "j", "j", "k")
    assert selected(page) == "1.1"
    press(page, "c")
    expect(row(page, "1.1")).to_contain_text("You read it")
    assert selected(page) == "1.1"
    expect(page.locator("#said")).to_have_text("You read the study of PATIENT, 1.")
    press(page, "c")
    expect(row(page, "1.1")).not_to_contain_text("You read it")

    ward.arrive("2.0", ago=30, stat=True, patient_name="SECRET^NAME")
    news = page.locator("#news")
    expect(news).to_contain_text("New critical study: STAT order; not judged yet")
    until(page, lambda: "2.0" in order(page))
    expect(news).not_to_contain_text("SECRET")
    assert selected(page) == "1.1", "what comes in disturbs nobody"

    press(page, "r")
    expect(row(page, "1.1")).to_have_count(0)
    assert selected(page) == "1.2", "the one after it"
    assert ward.study("1.1").closed_reason == "read by local"
    page.locator("#said button").click()
    expect(row(page, "1.1")).to_be_visible()

    taken = page.locator("#taken")
    page.locator("[id='study-1.3']").focus()
    press(page, "c")
    expect(taken).to_contain_text("dr.lee reads the study of PATIENT, 3.")
    press(page, "Escape")
    expect(taken).to_be_hidden()
    expect(row(page, "1.3")).to_contain_text("dr.lee reads it")
    press(page, "Enter")
    expect(taken).to_be_visible()
    assert page.url == site.address + "/", "it is not opened unknowing"
    taken.get_by_role("button", name="Take over").click()
    page.wait_for_url("**/studies/1.3")
    expect(page.locator(".reading")).to_contain_text("You read it")


def test_opening_a_study_claims_it_and_a_verdict_takes_one_click(site: Site, browse: Browse) -> None:
    ward, page = site.ward, browse(site.address, "viewer.json")  # there are no images
    ward.arrive("1.1")
    ward.judge("1.1")
    open_list(page)
    press(page, "j", "Enter")
    reading = page.locator(".reading")
    expect(reading).to_contain_text("You read it")
    reading.get_by_role("button", name="Over-called").click()
    expect(reading).to_contain_text("Over-called (local)")
    reading.get_by_role("button", name="Other").click()
    page.get_by_label("True grade").select_option("CT-1")
    page.get_by_label("Comment").fill("motion <b>only</b>")
    page.get_by_role("button", name="Record").click()
    expect(reading).to_contain_text("Other (local), truly CT-1")
    expect(reading).to_contain_text("motion <b>only</b>")
    page.goto("/")
    expect(row(page, "1.1")).to_contain_text("Other (local), truly CT-1")
    page.locator("[id='study-1.1']").focus()
    row(page, "1.1").get_by_role("button", name="Agree").click()
    expect(row(page, "1.1")).to_contain_text("Agree (local)")
    assert [one.opinion for one in ward.database.reading.verdicts("1.1")] == ["agree", "other", "over_called"]


def test_a_study_that_somebody_reads_says_so_before_anything_else(site: Site, browse: Browse) -> None:
    page = browse(site.address, "409 (Conflict)", "viewer.json")
    site.ward.arrive("1.1")
    site.ward.database.reading.claim("1.1", "dr.lee", site.ward.now, site.ward.now + timedelta(minutes=60))
    page.goto("/studies/1.1")
    taken, look = page.locator("#taken"), page.get_by_role("button", name="Only look")
    look.click()
    expect(taken).to_be_hidden()
    expect(page.locator(".reading")).to_contain_text("dr.lee reads it")
    page.goto("/studies/1.1")
    expect(taken).to_be_visible()
    press(page, "Escape")
    page.wait_for_url(site.address + "/")
    page.locator("[id='study-1.1']").click()
    look.click()
    page.wait_for_url("**/studies/1.1#look")
    expect(page.locator(".reading")).to_contain_text("dr.lee reads it")
    claim = site.ward.database.reading.reader("1.1", site.ward.now)
    assert claim is not None
    assert claim.person == "dr.lee"


def test_filters_views_and_help(site: Site, browse: Browse) -> None:
    ward, page = site.ward, browse(site.address)
    for number in range(4):
        ward.arrive(f"1.{number}", ago=60 - number, patient_name=f"PATIENT^{number}")
    ward.judge("1.0")
    ward.judge("1.1", Status.NEGATIVE)
    open_list(page)
    press(page, "?")
    expect(page.locator("#help")).to_be_visible()
    press(page, "Escape")
    expect(page.locator("#help")).to_be_hidden()
    press(page, "f")
    page.keyboard.type("patient^2")
    until(page, lambda: order(page) == ["1.2"])
    assert page.url == site.address + "/?text=patient%5E2"
    page.keyboard.type("00")
    expect(page.locator("#none")).to_have_text(
        "No open study is like this. Show all open studies", use_inner_text=True
    )
    press(page, "Backspace", "Backspace")
    until(page, lambda: order(page) == ["1.2"])
    press(page, "Escape", "j")
    assert selected(page) == "1.2"
    page.locator("[name=text]").evaluate("one => { one.value = ''; }")
    for band in ("severe", "routine"):
        page.locator(f"[name=band][value={band}]").check()
    until(page, lambda: order(page) == ["1.0", "1.1"])
    page.get_by_role("button", name="Save view").click()
    page.keyboard.type("Mine")
    press(page, "Enter")
    saved = page.locator("#views")
    expect(saved).to_contain_text("Mine")
    assert page.url == site.address + "/?band=severe&band=routine"
    expect(saved.locator("[aria-current]")).to_have_text("Mine")
    assert order(page) == ["1.0", "1.1"]
    ward.arrive("1.4", ago=100)
    ward.judge("1.4")
    until(page, lambda: order(page) == ["1.4", "1.0", "1.1"])
    page.get_by_role("button", name="Forget the view Mine").click()
    expect(saved).not_to_contain_text("Mine")
    assert ward.database.reading.views("local") == {}


def test_a_long_list_is_there_only_where_it_is_looked_at(site: Site, browse: Browse) -> None:
    page = browse(site.address)
    for number in range(230):
        site.ward.arrive(f"1.{number:03}", ago=300 - number)
    open_list(page)

    def at_the_end() -> bool:
        page.evaluate("scrollTo(0, document.body.scrollHeight)")
        return order(page)[-1:] == ["1.229"]

    until(page, at_the_end)
    until(page, lambda: len(order(page)) <= 150)
    expect(page.locator(".place").last).to_have_text("230")
    height = page.evaluate("document.body.scrollHeight")
    page.evaluate("scrollTo(0, 0)")
    until(page, lambda: order(page)[:2] == ["1.000", "1.001"])
    until(page, lambda: "1.229" not in order(page))
    assert abs(page.evaluate("document.body.scrollHeight") - height) < 40
    site.ward.database.close_study("1.100", "read", site.ward.now)
    expect(page.locator(".counts")).to_contain_text("229")


def test_without_a_stream_the_list_asks(site: Site, browse: Browse) -> None:
    page = browse(site.address, "net::ERR_FAILED")
    page.route("**/worklist/events*", lambda route: route.abort())
    open_list(page)
    site.ward.arrive("1.1")
    until(page, lambda: order(page) == ["1.1"])
    expect(page.locator("#lost")).to_be_hidden()


def test_keys_do_nothing_to_a_study_that_nobody_chose(site: Site, browse: Browse) -> None:
    ward, page = site.ward, browse(site.address)
    for number in range(5):
        ward.arrive(f"1.{number}", ago=60 - number, patient_name=f"PATIENT^{number}")
    open_list(page)
    press(page, "j")
    page.keyboard.down("r")
    expect(row(page, "1.0")).to_have_count(0)
    page.wait_for_timeout(1600)
    page.keyboard.down("r")  # it is still held
    page.keyboard.up("r")
    page.evaluate("""document.addEventListener("focusin", event => event.target.dispatchEvent(
        new KeyboardEvent("keydown", {key: "r", bubbles: true})), {once: true})""")
    ward.database.close_study("1.1", "read by dr.lee", ward.now)
    expect(page.locator("#said")).to_have_text("No longer here: PATIENT, 1.")
    assert selected(page) == "1.2"
    page.evaluate("document.activeElement.blur()")
    press(page, "r", "j")
    assert selected(page) == "1.3", "from where one was"
    press(page, "c")
    expect(row(page, "1.3")).to_contain_text("You read it")
    assert [ward.study(f"1.{number}").closed_at is None for number in range(5)] == [
        False,
        False,
        True,
        True,
        True,
    ]


def test_what_came_unseen_is_not_marked_read(site: Site, browse: Browse) -> None:
    ward, page = site.ward, browse(site.address, "409 (Conflict)", "net::ERR_FAILED", "Failed to fetch")
    ward.arrive("1.1", study_description="CT Thorax")
    open_list(page)
    ward.judge("1.1", Status.NEGATIVE)
    expect(row(page, "1.1")).to_have_attribute("data-revision", "1")
    expect(row(page, "1.1")).to_have_attribute("class", "routine")
    page.route("**/list?*", lambda route: route.abort())
    ward.arrive("1.1")
    press(page, "j", "r")
    expect(page.locator("#said")).to_contain_text("images have come that were not seen")
    assert ward.study("1.1").closed_at is None
    for width, beside in ((1280, ".study"), (900, ".narrow"), (400, ".study")):
        page.set_viewport_size({"width": width, "height": 800})
        for place in (".study", ".narrow"):
            shown = row(page, "1.1").locator(place).is_visible()
            assert shown is (place == beside), (width, place)


@pytest.fixture
def hasty(tmp_path: Path) -> Iterator[Site]:
    """Where a claim lasts three seconds."""
    yield from served(tmp_path, claim_minutes=0.05)


def test_a_claim_goes_with_who_only_opened_the_study(hasty: Site, browse: Browse) -> None:
    ward, page = hasty.ward, browse(hasty.address, "viewer.json", "net::ERR_FAILED")
    reader = ward.database.reading.reader
    for uid, date in (("1.1", "20200301"), ("1.2", "20200302")):
        ward.arrive(uid, patient_id="P1", study_date=date)
    page.goto("/studies/1.2")
    reading = page.locator(".reading")
    expect(reading).to_contain_text("You read it")
    ward.now += timedelta(seconds=2)
    page.keyboard.press("Shift")
    until(page, lambda: reader("1.2", ward.now + timedelta(seconds=2)))
    page.locator("#priors a").click()
    page.wait_for_url("**/studies/1.1#look")
    expect(reading.get_by_role("button", name="Claim")).to_be_visible()
    until(page, lambda: reader("1.2", ward.now) is None)
    assert reader("1.1", ward.now) is None, "an earlier study is only looked at"
    page.goto("/")
    press(page, "j", "c")
    expect(row(page, "1.1")).to_contain_text("You read it")
    page.goto("/studies/1.1")
    expect(reading.get_by_role("button", name="Release")).to_be_visible()
    page.goto("/")
    expect(row(page, "1.1")).to_contain_text("You read it")
    page.route("**/claim", lambda route: route.abort())
    page.goto("/studies/1.2")
    expect(page.locator("#said")).to_have_text("Not claimed: There is no connection: nothing was done.")


def test_the_alarm_is_for_what_is_new_and_says_when_it_cannot_sound(site: Site, browse: Browse) -> None:
    ward, page = site.ward, browse(site.address, "net::ERR_FAILED")
    ward.arrive("1.1", stat=True)
    page.add_init_script("localStorage.setItem('sound', 'true')")
    page.route("**/worklist/changes*", lambda route: route.abort(), times=1)
    page.clock.install()
    open_list(page)
    sound, news = page.locator("#sound"), page.locator("#news")
    expect(sound).to_have_text("Sound (click once)")
    page.locator("h1").dispatch_event("pointerup")
    press(page, "j")
    expect(sound).to_have_text("Sound")
    ward.arrive("1.2")
    until(page, lambda: order(page) == ["1.1", "1.2"])
    expect(news).to_be_hidden()
    ward.database.close_study("1.1", "read", ward.now)
    until(page, lambda: order(page) == ["1.2"])
    with page.expect_response("**/worklist/changes"):
        page.clock.fast_forward(31_000)
    ward.database.reading.mark_unread("1.1")
    expect(news).to_contain_text("New critical study: STAT order; not judged yet")


def test_a_busy_list_is_renewed_now_and_then_and_nobody_holds_a_line_unseen(
    site: Site, browse: Browse
) -> None:
    ward, page = site.ward, browse(site.address)
    page.add_init_script("""window.streams = [];
        window.EventSource = class extends EventSource {
            constructor(to) { super(to); streams.push(this); }
        }""")
    for number in range(120):
        ward.arrive(f"1.{number:03}", ago=300 - number)
    open_list(page)
    page.evaluate("scrollTo(0, 4500)")
    until(page, lambda: len(order(page)) == 100)
    for number in range(50):
        ward.database.close_study(f"1.{number:03}", "read", ward.now)
    until(page, lambda: order(page)[:1] == ["1.050"])
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    for number in range(8):
        ward.arrive(f"2.{number}", ago=400)
        page.wait_for_timeout(700)
    until(page, lambda: order(page)[:1] == ["2.0"])
    pieces = page.locator("#worklist tbody").count()
    assert sum("/list" in address for address in asked) <= 4 * pieces
    first = page.locator("#worklist tbody").first
    assert first.locator("tr[data-study]").count() > 1, "a piece that became empty has gone"
    page.evaluate("""Object.defineProperty(document, "hidden", {value: true, configurable: true});
        document.dispatchEvent(new Event("visibilitychange"))""")
    assert page.evaluate("streams.every(one => one.readyState === EventSource.CLOSED)")
    ward.arrive("3.0", ago=500)
    until(page, lambda: order(page)[:1] == ["3.0"])
    page.evaluate("delete document.hidden; document.dispatchEvent(new Event('visibilitychange'))")
    until(page, lambda: page.evaluate("streams.at(-1).readyState === EventSource.OPEN"))


def test_a_lost_connection_is_said_once(site: Site, browse: Browse) -> None:
    page = browse(site.address, "net::ERR_FAILED", "Failed to fetch")
    open_list(page)
    assert page.locator("#said").evaluate("one => getComputedStyle(one).display") != "none"
    asked: list[str] = []
    page.route("**/list?*", lambda route: (asked.append(route.request.url), route.abort()))
    page.route("**/list", lambda route: (asked.append(route.request.url), route.abort()))
    site.ward.arrive("1.1")
    expect(page.locator("#lost")).to_be_visible()
    page.evaluate("""window.said = 0;
        new MutationObserver(() => { said += 1; }).observe(lost, {childList: true, subtree: true})""")
    before = len(asked)
    until(page, lambda: len(asked) >= before + 2)
    assert page.evaluate("said") == 0
