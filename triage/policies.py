"""The policy that counts: config.yaml's is the first version, and each one set by a person goes before it.

Every process asks for the newest version when it places a study, so none is started again for a new one.
A study that was placed in the very moment of the change is set right by ``settle``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

from triage import priority, whatif
from triage.audit import Actor, Event, messages
from triage.config import Config, PriorityPolicy
from triage.db import Database
from triage.db.orders import Pending
from triage.db.policies import Placed, PolicyVersion, placed
from triage.errors import ConfigError, Rejected
from triage.whatif import Rehearsal

log = logging.getLogger(__name__)

FILE = "config.yaml"
"""The author of the versions that come from the settings file."""
MOST = 20_000
"""Studies that a policy is tried on, the newest."""
SHORTEST = 1.0
"""Days: what less than a day has brought is not told as more a day."""
SETTLED = timedelta(minutes=2)
"""Whoever read the version before has written by then, or has failed: nobody waits longer for a database."""


def in_force(db: Database, config: Config) -> Config:
    """The settings with the policy that counts now."""
    newest = db.policy()
    return config.under(newest.policy if newest else config.policy)


def of_the_file(newest: PolicyVersion | None, config: Config) -> str:
    """What becomes of config.yaml's policy, where it is not the newest version; for people."""
    if newest is not None and newest.policy == config.policy:
        return ""
    if newest is None or newest.author == FILE:
        return "priority in config.yaml counts from the next start on"
    return "priority in config.yaml is another one and does not count"


def pending(db: Database, config: Config) -> Pending:
    """The place of a study that nobody has judged yet, under the policy that counts now."""
    policy = in_force(db, config).priority
    return lambda arrived_at, stat: priority.pending(arrived_at, stat, policy)


def adopt(db: Database, config: Config, now: datetime) -> None:
    """At a start of the daemon: config.yaml's policy counts, unless a person has set another one since."""
    newest = db.policy()
    if newest is not None and (newest.author != FILE or newest.policy == config.policy):
        return
    reason = "the first version" if newest is None else "the file was changed"
    try:
        _set(
            db,
            config,
            config.policy,
            Actor(FILE, process="triage"),
            reason,
            now,
            newest.version if newest else 0,
        )
    except Rejected:  # another process, started at the same moment, was quicker
        adopt(db, config, now)


def save(
    db: Database,
    config: Config,
    policy: PriorityPolicy,
    author: Actor,
    reason: str,
    now: datetime,
    after: int,
) -> PolicyVersion:
    """Set a new version, put the open studies in its order and record it, all at once; nothing is judged
    again.

    ``after`` is the newest version that the author has seen. Raises ConfigError without a reason, Rejected
    when there is a newer one.
    """
    if not reason.strip():
        raise ConfigError("a new policy needs a reason: who reads the history wants to know")
    return _set(db, config, policy, author, reason.strip(), now, after)


def roll_back(
    db: Database, config: Config, number: int, author: Actor, reason: str, now: datetime, after: int
) -> PolicyVersion:
    """Set a new version that is equal to an old one. Raises ConfigError when there is no such version."""
    old = db.policy_version(number)
    if old is None:
        raise ConfigError(f"there is no version {number} of the policy")
    return save(db, config, old.policy, author, reason.strip() or f"back to version {number}", now, after)


def _set(
    db: Database,
    config: Config,
    policy: PriorityPolicy,
    author: Actor,
    reason: str,
    now: datetime,
    after: int,
) -> PolicyVersion:
    places = list(moved(db, config.under(policy), now))
    told = messages(Event.POLICY_CHANGED, author, now, (), f"policy version {after + 1}: {reason}")
    new = db.add_policy(policy, author.who, reason, now, after, places, told)
    log.info("policy version %d counts; %d open studies have another place", new.version, len(places))
    return new


def settle(db: Database, config: Config, now: datetime, always: bool = False) -> bool:
    """Set right the places of studies that were given one while the newest version was being saved."""
    newest = db.policy()
    if always or (newest is not None and now - newest.created_at < SETTLED):
        db.place(list(moved(db, in_force(db, config), now)))
    return False


def rehearse(db: Database, config: Config, candidate: PriorityPolicy, now: datetime, days: int) -> Rehearsal:
    """What another policy would have done to the studies of the last days; see ``whatif``."""
    since = now - timedelta(days=days)
    studies = db.arrived_since(since, MOST)
    cut = len(studies) == MOST
    first = studies[-1].arrived_at if cut else db.first_arrival()
    looked_at = (now - max(since, first or since)) / timedelta(days=1)
    truths = {
        one.study_instance_uid: is_sick
        for one in db.opinions(since)
        if (is_sick := whatif.truth(one.opinion, one.status, one.true_grade)) is not None
    }
    return whatif.rehearse(
        studies,
        list(db.standing(now, config.retention.leave_list_after_days)),
        truths,
        in_force(db, config),
        config.under(candidate),
        now,
        max(looked_at, SHORTEST),
        cut=cut,
    )


def row(version: PolicyVersion) -> dict[str, Any]:
    """One version for machines."""
    return {
        "version": version.version,
        "author": version.author,
        "reason": version.reason,
        "created_at": version.created_at.isoformat(),
        "policy": version.policy.model_dump(mode="json"),
    }


def moved(db: Database, config: Config, now: datetime) -> Iterator[Placed]:
    """Open studies whose place is another one under the policy of ``config``, with that place."""
    for study in db.standing(now, config.retention.leave_list_after_days):
        place = priority.again(study, config.priority, config.analysis)
        if place != study.priority:
            yield placed(study, place)
