"""A radiologist's whole day: real studies, the running daemon, a real browser."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Locator, Page, expect

from tests.browser import Browse, browse, chromium, log_in, order, pictures, selected, until
from tests.clinic import COVID, GAP, NODULES, PASSWORD, Clinic, clinic, first_admin, new_user
from tests.needs import needs_chromium, needs_data, needs_npm

pytestmark = [needs_chromium, needs_data, needs_npm, pytest.mark.timeout(600)]
__all__ = ["browse", "chromium"]

OUTBREAK = {"severe_fraction": 0.05, "critical_fraction": 0.05}
REFUSED = ("401 (Unauthorized)", "429 (Too Many Requests)")


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clinic]:
    with clinic(tmp_path_factory.mktemp("clinic"), priority=OUTBREAK) as made, made.running():
        yield made


def test_a_radiologists_day(running: Clinic, browse: Browse) -> None:
    gap, nodules = running.scan(GAP), running.scan(NODULES)
    admin = browse(running.address)
    first_admin(admin, running.link())
    for name in ("jane", "lee"):
        new_user(admin, name, "radiologist")
    running.settled(gap, nodules)

    jane = browse(running.address, *REFUSED)
    log_in(jane, "jane", PASSWORD)
    the_list_is_in_order(jane, [gap, nodules])
    covid = a_critical_study_announces_itself(jane, running, [gap, nodules])
    lee = browse(running.address)
    log_in(lee, "lee", PASSWORD)
    she_claims_what_he_then_leaves_to_her(jane, lee, covid)
    she_looks_at_its_images(jane)
    she_says_it_is_wrong_and_marks_it_read(jane, covid)
    until(lee, lambda: order(lee) == [gap, nodules])
    filters_become_a_view(jane, [gap, nodules])
    she_leaves_and_a_guesser_is_locked_out(jane)
    assert {one.study_instance_uid for one in running.received} == {nodules, covid}


def row(page: Page, uid: str) -> Locator:
    return page.locator(f"[id='row-{uid}']")


def the_list_is_in_order(page: Page, uids: list[str]) -> None:
    """What could not be judged stands before what is negative, and says why."""
    gap, nodules = uids
    until(page, lambda: order(page) == uids)
    expect(row(page, gap)).to_contain_text("Not analysable")
    expect(row(page, gap)).to_contain_text("issing slices")
    expect(row(page, nodules)).to_contain_text("Negative")
    expect(row(page, nodules)).to_contain_text("delivered")


def a_critical_study_announces_itself(page: Page, running: Clinic, before: list[str]) -> str:
    """While the list is open, and without disturbing who reads it."""
    expect(page.locator("html.with-script")).to_be_attached()
    for _ in before:
        page.keyboard.press("j")
    assert selected(page) == before[-1]
    covid = running.scan(COVID, every=5)
    running.settled(covid)
    news = page.get_by_role("alert").filter(has_text="New critical study")
    expect(news).to_contain_text("affected")
    until(page, lambda: order(page) == [covid, *before])
    assert selected(page) == before[-1]
    expect(row(page, covid)).to_contain_text("Critical")
    expect(row(page, covid)).to_contain_text("Positive")
    expect(row(page, covid).locator("img")).to_be_visible()
    pictures(page, "list")
    page.get_by_role("button", name="Dismiss").click()
    return covid


def she_claims_what_he_then_leaves_to_her(jane: Page, lee: Page, covid: str) -> None:
    jane.locator(f"[id='row-{covid}'] a.open").focus()
    jane.keyboard.press("j")
    jane.keyboard.press("k")
    assert selected(jane) == covid
    jane.keyboard.press("c")
    expect(row(jane, covid)).to_contain_text("You read it")
    expect(row(lee, covid)).to_contain_text("jane reads it")
    lee.keyboard.press("j")
    lee.keyboard.press("Enter")
    expect(lee.get_by_role("dialog")).to_contain_text("jane reads the study of")
    lee.keyboard.press("Escape")
    expect(lee).to_have_url(jane.url)
    jane.keyboard.press("Enter")
    jane.wait_for_url(f"**/studies/{covid}")


def she_looks_at_its_images(page: Page) -> None:
    viewer, bar = page.locator("ct-viewer"), page.get_by_role("slider", name="area of lesion")
    shown = page.locator("ct-viewer[data-place]:not([data-place=''])")
    expect(shown).to_be_visible()
    expect(page.get_by_text("cm²")).to_be_visible()  # it opens where there is most lesion
    expect(page.get_by_text("Why it stands where it stands")).to_be_visible()
    expect(page.locator("#delivery")).to_contain_text("✓ Delivered")
    pictures(page, "study")
    place = int(viewer.get_attribute("data-place") or 0)
    viewer.locator(".screen").hover()
    page.mouse.wheel(0, 120)
    expect(viewer).to_have_attribute("data-place", str(place + 1))
    box = bar.bounding_box()
    assert box
    bar.click(position={"x": 5, "y": box["height"] / 2})
    expect(shown).to_be_visible()
    middle = int(viewer.get_attribute("data-place") or 0)
    assert abs(middle - int(bar.get_attribute("aria-valuemax") or 0) / 2) <= 1
    viewer.get_by_role("button", name="3D view").click()
    expect(page.locator(".space[data-shown]")).to_be_visible()
    pictures(page, "study-3d")


def she_says_it_is_wrong_and_marks_it_read(page: Page, covid: str) -> None:
    reading = page.locator(".reading")
    reading.get_by_role("button", name="Over-called").click()
    expect(reading).to_contain_text("Over-called (jane)")
    page.get_by_role("link", name="Back to the worklist").click()
    expect(row(page, covid)).to_contain_text("Over-called (jane)")
    expect(page.locator("html.with-script")).to_be_attached()
    page.keyboard.press("j")
    assert selected(page) == covid
    page.keyboard.press("r")
    expect(row(page, covid)).to_have_count(0)
    expect(page.locator("#said")).to_contain_text("Marked read")


def filters_become_a_view(page: Page, uids: list[str]) -> None:
    page.keyboard.press("f")
    page.keyboard.type("LIDC")
    until(page, lambda: order(page) == uids[1:])
    page.get_by_role("button", name="Save view").click()
    page.keyboard.type("Nodules")
    page.keyboard.press("Enter")
    views = page.get_by_role("navigation", name="Saved views")
    expect(views.locator("[aria-current]")).to_have_text("Nodules")
    views.get_by_role("link", name="All open").click()
    until(page, lambda: order(page) == uids)
    views.get_by_role("link", name="Nodules").click()
    until(page, lambda: order(page) == uids[1:])


def she_leaves_and_a_guesser_is_locked_out(page: Page) -> None:
    page.get_by_role("button", name="Log out").click()
    for password in [*["a guess"] * 5, PASSWORD]:
        page.get_by_label("Name").fill("jane")
        page.get_by_label("Password").fill(password)
        with page.expect_navigation():
            page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("Too many wrong passwords")
    page.goto("/")
    expect(page.get_by_role("heading", level=1)).to_have_text("Log in")
