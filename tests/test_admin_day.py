"""An admin's whole day: from shadow mode to a policy of one's own, with real studies and a real browser."""

from __future__ import annotations

import re
import subprocess
import sys
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Page, expect

from tests import peers
from tests.browser import Browse, browse, chromium, log_in, order, pictures, until
from tests.clinic import COVID, NODULES, PASSWORD, Clinic, clinic, first_admin, new_user
from tests.needs import needs_chromium, needs_data

pytestmark = [needs_chromium, needs_data, pytest.mark.timeout(600)]
__all__ = ["browse", "chromium"]

ROOT = Path(__file__).parents[1]
THRESHOLDS = (
    *("Flag from probability", "Flag from affected fraction", "Severe from affected fraction"),
    *("Critical from affected fraction", "Indeterminate from probability"),
    "Indeterminate from affected fraction",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clinic]:
    with clinic(tmp_path_factory.mktemp("clinic")) as made:
        yield made


def test_an_admins_day(made: Clinic, browse: Browse) -> None:
    admin = browse(made.address)
    with made.running(shadow=True):
        nodules = made.scan(NODULES)
        covid = made.scan(COVID, every=5)
        first_admin(admin, made.link())
        new_user(admin, "jane", "radiologist")
        made.settled(nodules, covid)
        nothing_is_sent_or_reordered_in_shadow_mode(admin, made, [nodules, covid])
        admin.goto("about:blank")
    with made.running(shadow=False):
        jane = browse(made.address, "403 (Forbidden)")
        log_in(jane, "jane", PASSWORD)
        until(jane, lambda: order(jane) == [covid, nodules])
        admin.goto(made.address)
        thresholds_are_raised_after_a_look_at_what_that_does(admin)
        until(jane, lambda: order(jane) == [nodules, covid])
        the_old_policy_is_one_click_away(admin)
        until(jane, lambda: order(jane) == [covid, nodules])
        monitoring_tells_of_the_day(admin)
        a_program_is_let_in_and_out(admin, made, [covid, nodules])
        others_may_not(jane)
        everything_is_on_record(made)


def nothing_is_sent_or_reordered_in_shadow_mode(page: Page, made: Clinic, uids: list[str]) -> None:
    page.goto("/")
    until(page, lambda: order(page) == uids)
    expect(page.locator("#bar")).to_contain_text("in shadow mode")
    expect(page.locator("#worklist")).to_contain_text("nothing to deliver")
    assert made.received == []
    page.get_by_role("link", name="Policy").click()
    expect(page.locator("main")).to_contain_text("Shadow mode is on")


def thresholds_are_raised_after_a_look_at_what_that_does(page: Page) -> None:
    page.get_by_role("link", name="Policy").click()
    expect(page.locator("main")).not_to_contain_text("Shadow mode is on")
    for name in THRESHOLDS:
        page.get_by_label(name).fill("1")
    page.get_by_label("Indeterminate", exact=True).fill("480")
    page.get_by_role("button", name="What if?").click()
    tried = page.locator("#what-if")
    expect(tried).to_contain_text("Critical from affected fraction 0.5 → 1")
    expect(tried).to_contain_text("Unread studies that move down the list: 1")
    flagged = tried.get_by_role("row", name=re.compile("^Flagged")).get_by_role("cell")
    assert [cell.partition("stud")[0].split()[-1] for cell in flagged.all_inner_texts()[:2]] == ["1", "0"]
    pictures(page, "policy")
    page.get_by_label("Why?").fill("too many flags")
    page.get_by_role("button", name="Save as the new policy").click()
    expect(page.locator(".bar")).to_contain_text("Version 2 by boss counts")


def the_old_policy_is_one_click_away(page: Page) -> None:
    page.get_by_role("button", name="Back to 1").click()
    expect(page.locator(".bar")).to_contain_text("Version 3 by boss counts")
    expect(page.locator(".versions")).to_contain_text("too many flags")


def monitoring_tells_of_the_day(page: Page) -> None:
    page.get_by_role("link", name="Monitoring").click()
    today = page.locator("section", has_text="Studies a day").locator("tbody tr").first.get_by_role("cell")
    assert today.all_inner_texts()[:3] == ["2", "2", "0"]
    expect(page.locator(".drifts")).to_contain_text("too few studies")
    pictures(page, "monitoring")


def a_program_is_let_in_and_out(page: Page, made: Clinic, uids: list[str]) -> None:
    page.get_by_role("link", name="Users").click()
    page.get_by_text("New token", exact=True).click()
    page.get_by_label("Name: the program").fill("RIS")
    page.get_by_role("button", name="Make this token").click()
    bearer = {"Authorization": f"Bearer {page.locator('.secret').inner_text()}"}
    with httpx.Client(base_url=f"{made.address}/api/v1", headers=bearer) as program:
        rows = program.get("/worklist").json()["rows"]
        assert [row["study_instance_uid"] for row in rows] == uids
        assert program.get("/policy").status_code == 403
        page.goto("/people")
        page.get_by_role("button", name="Revoke RIS").click()
        expect(page.get_by_role("button", name="Revoke RIS")).to_have_count(0)
        assert program.get("/worklist").status_code == 401


def others_may_not(page: Page) -> None:
    expect(page.get_by_role("link", name="Policy")).to_have_count(0)
    page.goto("/policy")
    expect(page.get_by_role("heading", level=1)).to_contain_text("needs the permission “policy”")


def everything_is_on_record(made: Clinic) -> None:
    """In the file, in order; and the chain of the database is whole."""
    told = (
        *("first user boss: admin", "new user jane: radiologist", "policy version 2: too many flags"),
        *("policy version 3: back to version 1", "new token RIS: read", "token RIS revoked"),
        "/policy needs policy",
    )
    trail = made.folder / "audit.log"
    coded = [b64encode(one.encode()).decode() for one in told]
    peers.wait_until(lambda: trail.exists() and coded[-1] in trail.read_text())
    text = trail.read_text()
    places = [text.find(f'"{one}"') for one in coded]
    assert -1 not in places
    assert places == sorted(places)
    command = [sys.executable, "-m", "triage", "--config", str(made.path), "audit", "verify"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, cwd=ROOT)
    assert (ended.returncode, ended.stdout.strip()) == (0, "the audit trail is whole"), ended.stderr
