"""The link that makes the first admin, printed where only who runs the daemon can see it."""

from __future__ import annotations

from datetime import datetime

from triage.config import Config
from triage.db import Database
from triage.passwords import new_token, token_hash


def link(db: Database, config: Config, now: datetime) -> str | None:
    """An address that is good once, for a day; None where there is a user already."""
    token = new_token()
    if not db.people.offer_link(token_hash(token), now):
        return None
    host = "localhost" if config.web.host in ("0.0.0.0", "::") else config.web.host  # noqa: S104
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{config.web.port}/first-admin?key={token}"
