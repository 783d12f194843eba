"""A running daemon that is fed real studies, and the people who work with its page: for whole days."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from playwright.sync_api import Page, expect

from tests import peers
from tests.needs import DATA
from triage import config
from triage.config import Config, Destination
from triage.db import Database
from triage.dicom import sender
from triage.dicom.header import find_instances
from triage.domain import Instance, StudyState

PASSWORD = "correct horse battery"
COVID, NODULES, GAP = "covid_ricord_1012", "lidc_0001", "acrin_013_gap"
SETTLED = {StudyState.ANALYZED, StudyState.REJECTED}
JUDGED_SECONDS = 240


@dataclass(frozen=True)
class Clinic:
    """The daemon's folder, what its PACS has got, and what the scanner can send it."""

    folder: Path
    received: list[Instance]

    @property
    def path(self) -> Path:
        return self.folder / "config.yaml"

    @property
    def settings(self) -> Config:
        return config.load(self.path, {})

    @property
    def address(self) -> str:
        return f"http://{peers.HOST}:{self.settings.web.port}"

    @contextmanager
    def running(self, **changed: Any) -> Iterator[None]:
        """The daemon, with these settings changed, until the page is no longer needed."""
        self.path.write_text(yaml.safe_dump({**yaml.safe_load(self.path.read_text()), **changed}))
        page = Destination(name="page", ae_title="X", host=peers.HOST, port=self.settings.web.port)
        with peers.daemon(self.path, self.folder / "log"):
            peers.wait_until(lambda: peers.answers(page))
            yield

    def link(self) -> str:
        """Where the first admin is made, as `triage serve` said."""
        found = re.search(r"http://\S+/first-admin\?key=\S+", (self.folder / "log").read_text())
        assert found
        return found[0]

    def scan(self, name: str, every: int = 1) -> str:
        """The scanner sends every so manieth slice of a real study; its UID."""
        found, _ = find_instances([DATA / "dicom" / name])
        slices = sorted(found, key=lambda one: one.instance_number or 0)[::every]
        outcomes = sender.send(
            [one.path for one in slices],
            peers.destination(self.settings),
            calling_ae_title="SCANNER",
            timeout_seconds=60,
        )
        wrong = {one.error for one in outcomes if not one.sent}
        assert not wrong, wrong
        return found[0].study_instance_uid

    def settled(self, *uids: str) -> None:
        """Until each of these studies has its answer."""
        db = Database(self.settings.database.url)

        def all_settled() -> bool:
            entries = [db.entry(uid) for uid in uids]
            return all(entry and entry.study.state in SETTLED for entry in entries)

        peers.wait_until(all_settled, log=self.folder / "log", seconds=JUDGED_SECONDS)
        db.close()


@contextmanager
def clinic(folder: Path, **sections: Any) -> Iterator[Clinic]:
    """Not yet running."""
    with peers.pacs(folder / "pacs") as (port, received):
        settings = {"web": {"refresh_seconds": 1}, "storage": {"minimum_free_gb": 0}, **sections}
        peers.write_config(folder, port, **settings)
        yield Clinic(folder, received)


def first_admin(page: Page, link: str) -> None:
    page.goto(link)
    page.get_by_label("Name").fill("boss")
    page.get_by_label("Password, at least").fill(PASSWORD)
    page.get_by_label("The same once more").fill(PASSWORD)
    page.get_by_role("button", name="Make this admin").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Users and tokens")


def new_user(page: Page, name: str, role: str) -> None:
    """An admin makes somebody a user."""
    page.get_by_role("link", name="Users").click()
    page.get_by_text("New user", exact=True).click()
    form = page.locator("form[action='/people/users']")
    form.get_by_label("Name").fill(name)
    form.get_by_label("Role").select_option(role)
    form.get_by_label("Password, at least").fill(PASSWORD)
    form.get_by_label("The same once more").fill(PASSWORD)
    form.get_by_role("button").click()
    expect(page.get_by_role("rowheader", name=name, exact=True)).to_have_count(2 if name == role else 1)
