"""axe-core finds no serious fault on any page, wide and narrow, dark and light; each leaves its picture."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from tests.browser import Browse, Site, browse, chromium, log_in, picture, served, views
from tests.needs import AXE, needs_chromium, needs_npm
from tests.study_page import judged_phantom
from tests.web_studies import Ward
from triage import first, passwords, policies
from triage.domain import Grade, Role, Status

pytestmark = [needs_chromium, needs_npm]
__all__ = ["browse", "chromium"]

PASSWORD = "correct horse battery"
SMALL = {"rows": 128, "slices": 24, "slice_spacing": 8.0}
SERIOUS = {"serious", "critical"}
PAGES = {
    "list": "/",
    "list-filtered": "/?band=routine&text=DOE",
    "study": "/studies/{judged}",
    "study-not-judged": "/studies/1.2",
    "search": "/search?q=DOE",
    "upload": "/upload",
    "policy": "/policy?positive_fraction=0.2",
    "monitoring": "/monitoring",
    "people": "/people",
    "account": "/account",
    "not-found": "/studies/none",
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    for site in served(tmp_path_factory.mktemp("site")):
        of_every_kind(site.ward)
        yield site


@pytest.fixture(scope="module")
def judged(site: Site) -> str:
    """The study that has images."""
    return judged_phantom(site.ward, seed=5, boxes=True, to=("PACS",), **SMALL).uid


def of_every_kind(ward: Ward) -> None:
    """Studies in every state, claimed, judged and said to be wrong."""
    policies.adopt(ward.database, ward.config, ward.now)
    reading = ward.database.reading
    ward.arrive("1.1", ago=300)
    ward.judge("1.1", Status.NEGATIVE, picture=ward.png(), to=("PACS",))
    ward.arrive("1.2", ago=200, study_description="CHEST")
    ward.refuse("1.2", "missing slices: 216 mm hole between slices 20 and 27")
    ward.arrive("1.3", ago=90)
    ward.fail("1.3", "out of memory", ward.now + timedelta(minutes=5))
    ward.arrive("1.4", ago=3, stat=True)
    for uid, fraction in (("1.5", 0.6), ("1.6", 0.1), ("1.7", 0.03)):
        ward.arrive(uid, ago=30)
        ward.judge(uid, affected_fraction=fraction)
    reading.claim("1.1", "dr.lee", ward.now, ward.now + timedelta(minutes=60))
    reading.claim("1.2", "boss", ward.now, ward.now + timedelta(minutes=60))
    reading.give_verdict("1.1", "dr.lee", ward.now, "under_called", comment="see base", true_grade=Grade.CT1)
    ward.database.people.add_user("boss", Role.ADMIN, passwords.hashed(PASSWORD), ward.now, [])


def faults(page: Page, *rules: str) -> list[str]:
    """What axe-core finds that keeps people out: rule and elements."""
    page.evaluate(AXE.read_text())
    found: list[dict[str, Any]] = page.evaluate(
        "async options => (await axe.run(document, options)).violations",
        {"resultTypes": ["violations"], **({"runOnly": rules} if rules else {})},
    )
    return [
        f"{one['id']}: {node['target']} {node['failureSummary']}"
        for one in found
        for node in one["nodes"]
        if one["impact"] in SERIOUS
    ]


def looked_at(page: Page, name: str) -> None:
    """In each size and scheme; what is dark differs in its colours alone."""
    for view in views(page):
        picture(page, f"page-{name}-{view}")
        assert faults(page, *(["color-contrast"] if "dark" in view else [])) == [], view
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), view


@pytest.mark.parametrize("name", PAGES)
def test_a_page_keeps_nobody_out(site: Site, browse: Browse, judged: str, name: str) -> None:
    page = browse(site.address, "viewer.json", "404 (Not Found)")  # made-up studies have no images
    log_in(page, "boss", PASSWORD)
    page.goto(PAGES[name].format(judged=judged))
    if name == "study":
        expect(page.locator("ct-viewer[data-place]:not([data-place=''])")).to_be_visible()
    for folded in page.locator("details > summary").all():
        folded.click()
    looked_at(page, name)


def test_nobody_is_kept_out_at_the_door(site: Site, browse: Browse) -> None:
    page = browse(site.address, "401 (Unauthorized)")
    page.goto("/")
    page.get_by_label("Name").fill("boss")
    page.get_by_label("Password").fill("a guess")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_be_visible()
    looked_at(page, "login")


def test_dialogs_and_news_keep_nobody_out(site: Site, browse: Browse) -> None:
    page = browse(site.address)
    log_in(page, "boss", PASSWORD)
    expect(page.locator("html.with-script")).to_be_attached()
    page.keyboard.press("?")
    expect(page.get_by_role("dialog")).to_be_visible()
    assert faults(page) == []
    page.keyboard.press("Escape")
    row = page.locator("[id='row-1.5']")
    row.hover()
    row.get_by_role("button", name="Other").click()
    expect(page.get_by_role("dialog")).to_be_visible()
    assert faults(page) == []
    page.keyboard.press("Escape")
    page.locator("[id='study-1.1']").click()
    expect(page.get_by_role("dialog")).to_contain_text("dr.lee reads")
    looked_at(page, "dialog")
    page.keyboard.press("Escape")
    site.ward.arrive("2.1", stat=True)
    expect(page.locator("#news")).to_be_visible()
    looked_at(page, "news")


def test_the_first_admin_is_not_kept_out(tmp_path_factory: pytest.TempPathFactory, browse: Browse) -> None:
    for site in served(tmp_path_factory.mktemp("new")):
        link = first.link(site.ward.database, site.ward.config, site.ward.now)
        assert link is not None
        page = browse(site.address)
        page.goto(link)
        looked_at(page, "first-admin")
        page.context.close()
