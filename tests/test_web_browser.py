"""The page in a real browser: it keeps up by itself, says when it cannot, and disturbs nobody."""

from __future__ import annotations

from datetime import timedelta

import pytest
from playwright.sync_api import Page, expect

from tests.browser import Browse, Site, browse, chromium, log_in, order, selected, site, until
from tests.needs import needs_chromium
from triage import first, passwords
from triage.domain import Role, Status

pytestmark = needs_chromium
__all__ = ["browse", "chromium", "site"]

PASSWORD = "correct horse battery"


def test_the_list_updates_by_itself_and_disturbs_nobody(site: Site, browse: Browse) -> None:
    ward, page = site.ward, browse(site.address)
    for number in range(40):
        ward.arrive(f"1.{number}", ago=30 - number / 4, patient_name=f"PATIENT^{number}")
    ward.judge("1.0", Status.NEGATIVE, picture=ward.png())
    page.goto("/")
    before = order(page)
    assert before[-1] == "1.0"
    page.evaluate("""() => {
        window.scrollTo(0, 700); window.untouched = true;
        const name = document.getElementById("study-1.20"); name.focus({preventScroll: true});
        getSelection().selectAllChildren(name); window.kept = document.querySelector("img");
    }""")
    seen_at = "document.getElementById('row-1.20').getBoundingClientRect().top"
    top = page.evaluate(seen_at)
    ward.now += timedelta(minutes=1)
    ward.arrive("2.1", patient_name="NEW^ONE", ago=20)
    ward.judge("2.1")
    until(page, lambda: order(page) == ["2.1", *before])
    expect(page.locator("#worklist")).to_contain_text("NEW, ONE")
    expect(page.locator("#as-of")).to_have_text("12:01")
    expect(page).to_have_title("41 open · Worklist")
    assert page.evaluate("window.untouched"), "the page was not loaded anew"
    assert page.evaluate("document.activeElement.id") == "study-1.20"
    assert page.evaluate("getSelection().toString()") == "PATIENT, 20"
    assert page.evaluate("document.querySelector('img') === window.kept"), "nor was the picture"
    assert abs(page.evaluate(seen_at) - top) < 3
    lines = page.evaluate("""() => {
        const number = new Range();
        number.selectNodeContents(document.querySelector("#worklist tbody tr:last-child .place"));
        return [number.toString(), number.getClientRects().length];
    }""")
    assert lines == ["41", 1], "a long number stays on one line"


def test_a_study_walks_through_its_states_before_the_eyes(site: Site, browse: Browse) -> None:
    ward, page = site.ward, browse(site.address)
    page.goto("/")
    nothing = page.get_by_text("No open study.")
    expect(nothing).to_be_visible()
    ward.arrive("1.1", slices=3)
    expect(page.locator("#worklist")).to_contain_text("3 images so far")
    ward.arrive("1.2", ago=5)
    until(page, lambda: order(page) == ["1.2", "1.1"])
    ward.judge("1.1", picture=ward.png())
    until(page, lambda: order(page) == ["1.1", "1.2"])
    expect(page.locator("#row-1\\.1 img")).to_have_js_property("naturalWidth", 120)
    ward.database.close_study("1.2", "read", ward.now)
    ward.database.close_study("1.1", "read", ward.now)
    expect(nothing).to_be_visible()


def test_a_lost_connection_is_shouted_and_recovered_from(site: Site, browse: Browse) -> None:
    page = browse(site.address, "net::ERR", "Failed to fetch")
    site.ward.arrive("1.1")
    page.goto("/")
    lost = page.locator("#lost")
    expect(lost).to_be_hidden()
    site.end()
    expect(lost).to_have_text("Connection lost since 12:00. This page may be out of date.")
    expect(page).to_have_title("⚠ Connection lost")
    assert order(page) == ["1.1"], "the last list stays readable"
    site.ward.arrive("1.2", ago=5)
    site.start()
    expect(lost).to_be_hidden()
    assert order(page) == ["1.2", "1.1"]
    expect(page).to_have_title("2 open · Worklist")


def test_a_reader_gets_around_with_the_keyboard(site: Site, browse: Browse) -> None:
    page = browse(site.address, "viewer.json")  # there are no images
    site.ward.arrive("1.1", patient_name="<script>alert(1)</script>^Żółć")
    site.ward.judge("1.1", picture=site.ward.png(), to=("pacs",))
    page.goto("/")
    find = page.get_by_label("Find a study")
    find.fill("Żółć")
    find.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text("Studies matching “Żółć”")
    assert order(page) == ["1.1"]
    find.focus()
    tabs = 0
    while selected(page) != "1.1":
        page.keyboard.press("Tab")
        assert (tabs := tabs + 1) < 10
    page.keyboard.press("Enter")
    page.wait_for_url("**/studies/1.1")
    expect(page.get_by_role("heading", level=1)).to_have_text("<script>alert(1)</script>, Żółć")
    expect(page.locator(".large img")).to_have_js_property("naturalWidth", 120)
    site.ward.database.give_up(1, "called AE title not recognised")
    expect(page.locator("#delivery")).to_contain_text("called AE title not recognised")


def test_logging_in_and_out(site: Site, browse: Browse) -> None:
    page = browse(site.address, "401 (Unauthorized)")
    site.ward.database.people.add_user("jane", Role.VIEWER, passwords.hashed(PASSWORD), site.ward.now, [])
    site.ward.arrive("1.1")
    page.goto("/search?q=DOE")
    expect(page.locator("body")).not_to_contain_text("JANE")
    for password, then in (("wrong", "Wrong name or password"), (PASSWORD, "DOE, JANE")):
        page.get_by_label("Name").fill("jane")
        page.get_by_label("Password").fill(password)
        page.keyboard.press("Enter")
        expect(page.locator("main")).to_contain_text(then)
    assert page.url == site.address + "/search?q=DOE"
    assert page.evaluate("document.cookie") == ""
    other = page.context.new_page()
    other.goto("/")
    other.get_by_role("button", name="Log out").click()
    for left in (other, page):
        expect(left.get_by_label("Password")).to_be_visible()


def test_the_first_admin_makes_a_user_who_changes_the_password(site: Site, browse: Browse) -> None:
    page = browse(site.address, "401 (Unauthorized)")

    def fill(form: str, **fields: str) -> None:
        for name, value in fields.items():
            page.locator(f"form[action='{form}'] [name={name}]").fill(value)
        page.keyboard.press("Enter")

    link = first.link(site.ward.database, site.ward.config, site.ward.now)
    assert link is not None
    page.goto(link)
    fill("/first-admin", name="boss", password=PASSWORD, again=PASSWORD)
    page.get_by_text("New user").click()
    fill("/people/users", name="jane", password="a first password", again="a first password")
    expect(page.locator("main")).to_contain_text("never")
    page.get_by_text("New token").click()
    fill("/people/tokens", name="RIS")
    expect(page.get_by_role("status")).to_contain_text("it is not shown again")
    page.get_by_role("button", name="Log out").click()
    log_in(page, "jane", "a first password")
    expect(page.get_by_role("link", name="Users")).to_be_hidden()
    page.get_by_role("link", name="jane").click()
    fill("/account", current="a first password", password=PASSWORD, again=PASSWORD)
    expect(page.get_by_role("status")).to_contain_text("Your password is changed")


@pytest.mark.parametrize("width", [400, 1000, 1400, 2200])
def test_nothing_sticks_out(site: Site, browse: Browse, width: int) -> None:
    page: Page = browse(site.address, "viewer.json", viewport={"width": width, "height": 900})
    long = "Wolkenstein-Habsburg-Lothringen^" + "X" * 60
    site.ward.arrive("1.1", patient_name=long, patient_id="9" * 64, study_description="Y" * 64)
    site.ward.judge("1.1")
    site.ward.arrive("1.2", accession_number="Z" * 16)
    site.ward.arrive("1.3", ago=120 + 23 * 60 + 59)
    site.ward.refuse("1.2", "missing slices " * 12)
    for path in ("/", "/studies/1.1", "/studies/1.2", "/search?q=" + "Q" * 200):
        page.goto(path)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), path
        sticking = page.locator("td, th").evaluate_all("""cells => cells
            .filter(cell => cell.scrollWidth > cell.clientWidth + 1)
            .map(cell => cell.className + cell.textContent.trim())""")
        assert sticking == [], path
