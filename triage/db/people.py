"""Users, their sessions and failed log-ins, and the tokens of programs. Of secrets only hashes are kept."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from datetime import datetime, timedelta

from sqlalchemy import (
    ColumnElement,
    Connection,
    RowMapping,
    and_,
    delete,
    exists,
    func,
    insert,
    or_,
    select,
    update,
)
from sqlalchemy.dialects.sqlite import insert as upsert

from triage.config import Session
from triage.db.audit import append
from triage.db.tables import api_token, first_link, login_failure, session, user
from triage.domain import ApiToken, Permission, Role, User

Transaction = Callable[[], AbstractContextManager[Connection]]
LINK_HOURS = 24
"""For so long the link that makes the first user is good."""
FREE_FAILURES = 4
"""Wrong passwords after which nobody has to wait yet."""
FIRST_WAIT_SECONDS = 30
LONGEST_WAIT = timedelta(hours=1)
"""Of one address."""
LONGEST_WAIT_OF_ALL = timedelta(minutes=1)
"""Of a name, wherever its wrong passwords come from: else anybody could keep its owner out for hours."""
ANYWHERE = ""
"""In place of the address, where failures from all of them are counted."""
FORGET_FAILURES = timedelta(days=1)
TOUCH = timedelta(minutes=1)
"""That a session or token is in use is written down so often, not at each request."""


class People:
    """Who may log in. ``messages`` are audit messages, written in the transaction of what they tell of."""

    def __init__(self, read: Transaction, write: Transaction) -> None:
        self._read, self._write = read, write

    # --- users -------------------------------------------------------------------------------

    def any_user(self) -> bool:
        with self._read() as connection:
            return _any_user(connection)

    def user(self, name: str) -> User | None:
        """By name, as it was made or in other capitals."""
        query = select(user).where(_named(name))
        with self._read() as connection:
            return _user(connection.execute(query).mappings().first())

    def users(self) -> list[User]:
        with self._read() as connection:
            rows = connection.execute(select(user).order_by(func.lower(user.c.name))).mappings()
            return [one for row in rows if (one := _user(row))]

    def password(self, name: str) -> str | None:
        """The hash of a user's password; None where nobody of this name may log in."""
        query = select(user.c.password).where(_named(name), user.c.disabled.is_(False))
        with self._read() as connection:
            found: str | None = connection.execute(query).scalar()
            return found

    def add_user(
        self, name: str, role: Role, password: str, now: datetime, messages: Collection[str]
    ) -> bool:
        """False when there is one of this name already."""
        with self._write() as connection:
            if connection.execute(select(user.c.name).where(_named(name))).first():
                return False
            _add(connection, name, role, password, now)
            append(connection, list(messages))
            return True

    def change_user(
        self,
        name: str,
        messages: Collection[str],
        *,
        role: Role | None = None,
        password: str | None = None,
        disabled: bool | None = None,
        but_session: str = "",
    ) -> bool:
        """Change what is given; a new password or a closed account ends the user's sessions.

        ``but_session`` is the hash of the one that goes on. False, and nothing changed, where there is no
        such user, or no admin who may log in would be left.
        """
        given = {"role": role, "password": password, "disabled": disabled}
        values = {key: value for key, value in given.items() if value is not None}
        with self._write() as connection:
            known = connection.execute(select(user.c.name).where(_named(name))).scalar()
            if values:
                connection.execute(update(user).where(user.c.name == known).values(**values))
            if known is None or ((role is not None or disabled) and not _any_admin(connection)):
                connection.rollback()
                return False
            if password is not None or disabled:
                ended = delete(session).where(session.c.name == known, session.c.token_hash != but_session)
                connection.execute(ended)
            if password is not None:
                connection.execute(delete(login_failure).where(login_failure.c.name == name.lower()))
            append(connection, list(messages))
            return True

    # --- the first user ----------------------------------------------------------------------

    def offer_link(self, token_hash: str, now: datetime) -> bool:
        """Let whoever has this token make the first user; False where there is one."""
        with self._write() as connection:
            if _any_user(connection):
                return False
            connection.execute(delete(first_link).where(first_link.c.expires_at < now))
            until = now + timedelta(hours=LINK_HOURS)
            connection.execute(insert(first_link).values(token_hash=token_hash, expires_at=until))
            return True

    def is_link(self, token_hash: str, now: datetime) -> bool:
        with self._read() as connection:
            return _is_link(connection, token_hash, now)

    def add_first_user(
        self, token_hash: str, name: str, password: str, now: datetime, messages: Collection[str]
    ) -> bool:
        """The first admin; all links are used up by it. False where this one is not good any more."""
        with self._write() as connection:
            if not _is_link(connection, token_hash, now):
                return False
            connection.execute(delete(first_link))
            _add(connection, name, Role.ADMIN, password, now)
            append(connection, list(messages))
            return True

    # --- logging in --------------------------------------------------------------------------

    def locked_until(self, name: str, address: str, now: datetime) -> datetime | None:
        """Until when no password of this name that comes from there is looked at, after wrong ones."""
        query = select(func.max(login_failure.c.locked_until)).where(_failures(name, address))
        with self._read() as connection:
            until: datetime | None = connection.execute(query).scalar()
            return until if until and until > now else None

    def failed(self, name: str, address: str, now: datetime, messages: Collection[str]) -> None:
        """A wrong password: from the fifth on the next has to wait, twice as long each time, at the same
        address an hour at most, at any other a minute.

        Names nobody has are counted too, so that the answer does not tell which there are.
        """
        with self._write() as connection:
            connection.execute(delete(login_failure).where(login_failure.c.last_at < now - FORGET_FAILURES))
            _count_failure(connection, name, address, now, LONGEST_WAIT)
            _count_failure(connection, name, ANYWHERE, now, LONGEST_WAIT_OF_ALL)
            append(connection, list(messages))

    def log_in(
        self,
        name: str,
        address: str,
        token_hash: str,
        now: datetime,
        messages: Collection[str],
        *,
        ends: str = "",
    ) -> None:
        """Begin a session and end another one; wrong passwords from there are forgotten."""
        with self._write() as connection:
            connection.execute(delete(login_failure).where(_failures(name, address)))
            connection.execute(delete(session).where(session.c.token_hash == ends))
            connection.execute(update(user).where(user.c.name == name).values(last_login_at=now))
            connection.execute(
                insert(session).values(token_hash=token_hash, name=name, created_at=now, last_seen_at=now)
            )
            append(connection, list(messages))

    def user_of_session(self, token_hash: str, now: datetime, limits: Session, *, stays: bool) -> User | None:
        """Whose session this is, as long as it lasts. ``stays``: looking at it now does not prolong it."""
        query = (
            select(user, session.c.last_seen_at)
            .join(session, session.c.name == user.c.name)
            .where(
                session.c.token_hash == token_hash,
                session.c.last_seen_at > now - timedelta(minutes=limits.idle_minutes),
                session.c.created_at > now - timedelta(hours=limits.hours),
                user.c.disabled.is_(False),
            )
        )
        with self._read() as connection:
            row = connection.execute(query).mappings().first()
        if row is not None and not stays and now - row["last_seen_at"] >= TOUCH:
            with self._write() as connection:
                touched = update(session).where(session.c.token_hash == token_hash).values(last_seen_at=now)
                connection.execute(touched)
        return _user(row)

    def log_out(self, token_hash: str, messages: Collection[str]) -> None:
        with self._write() as connection:
            connection.execute(delete(session).where(session.c.token_hash == token_hash))
            append(connection, list(messages))

    def end_old_sessions(self, now: datetime, limits: Session) -> bool:
        """Forget sessions that are over; whether there were any."""
        idle = session.c.last_seen_at <= now - timedelta(minutes=limits.idle_minutes)
        over = session.c.created_at <= now - timedelta(hours=limits.hours)
        with self._write() as connection:
            return connection.execute(delete(session).where(or_(idle, over))).rowcount > 0

    # --- tokens of programs ------------------------------------------------------------------

    def tokens(self) -> list[ApiToken]:
        with self._read() as connection:
            rows = connection.execute(select(api_token).order_by(api_token.c.name)).mappings()
            return [_token(row) for row in rows]

    def add_token(
        self,
        name: str,
        token_hash: str,
        scopes: Collection[Permission],
        created_by: str,
        now: datetime,
        expires_at: datetime | None,
        messages: Collection[str],
    ) -> bool:
        """False when there is one of this name already."""
        with self._write() as connection:
            if connection.execute(select(api_token.c.name).where(api_token.c.name == name)).first():
                return False
            connection.execute(
                insert(api_token).values(
                    name=name,
                    token_hash=token_hash,
                    scopes=sorted(scopes),
                    created_by=created_by,
                    created_at=now,
                    expires_at=expires_at,
                )
            )
            append(connection, list(messages))
            return True

    def revoke_token(self, token_id: int, messages: Collection[str]) -> bool:
        with self._write() as connection:
            gone = connection.execute(delete(api_token).where(api_token.c.token_id == token_id)).rowcount
            if gone:
                append(connection, list(messages))
            return gone > 0

    def use_token(self, token_hash: str, now: datetime) -> ApiToken | None:
        """The token with this hash, unless it has expired, or who made it is no admin any more."""
        lasts = or_(api_token.c.expires_at.is_(None), api_token.c.expires_at > now)
        gone = exists().where(user.c.name == api_token.c.created_by, ~_is_admin())
        query = select(api_token).where(api_token.c.token_hash == token_hash, lasts, ~gone)
        with self._read() as connection:
            row = connection.execute(query).mappings().first()
        if row is None:
            return None
        if row["last_used_at"] is None or now - row["last_used_at"] >= TOUCH:
            with self._write() as connection:
                used = update(api_token).where(api_token.c.token_id == row["token_id"])
                connection.execute(used.values(last_used_at=now))
        return _token(row)


def _named(name: str) -> ColumnElement[bool]:
    return func.lower(user.c.name) == name.lower()


def _any_user(connection: Connection) -> bool:
    return connection.execute(select(user.c.name).limit(1)).first() is not None


def _any_admin(connection: Connection) -> bool:
    return connection.execute(select(user.c.name).where(_is_admin()).limit(1)).first() is not None


def _is_admin() -> ColumnElement[bool]:
    """Who may log in as one."""
    return and_(user.c.role == Role.ADMIN, user.c.disabled.is_(False))


def _is_link(connection: Connection, token_hash: str, now: datetime) -> bool:
    query = select(first_link).where(first_link.c.token_hash == token_hash, first_link.c.expires_at > now)
    return connection.execute(query).first() is not None and not _any_user(connection)


def _add(connection: Connection, name: str, role: Role, password: str, now: datetime) -> None:
    connection.execute(
        insert(user).values(name=name, role=role, password=password, disabled=False, created_at=now)
    )


def _failures(name: str, address: str) -> ColumnElement[bool]:
    """Those that make this name wait at this address."""
    return and_(login_failure.c.name == name.lower(), login_failure.c.address.in_((address, ANYWHERE)))


def _count_failure(
    connection: Connection, name: str, address: str, now: datetime, longest: timedelta
) -> None:
    this = {"name": name.lower(), "address": address}
    before = select(login_failure.c.failures).filter_by(**this)
    failures = (connection.execute(before).scalar() or 0) + 1
    values = {"failures": failures, "last_at": now, "locked_until": _locked(failures, now, longest)}
    row = upsert(login_failure).values(**this, **values)
    connection.execute(row.on_conflict_do_update(index_elements=list(this), set_=values))


def _locked(failures: int, now: datetime, longest: timedelta) -> datetime | None:
    over = failures - FREE_FAILURES - 1
    if over < 0:
        return None
    return now + min(timedelta(seconds=FIRST_WAIT_SECONDS << min(over, 20)), longest)


def _user(row: RowMapping | None) -> User | None:
    if row is None:
        return None
    return User(
        name=row["name"],
        role=Role(row["role"]),
        disabled=row["disabled"],
        created_at=row["created_at"],
        last_login_at=row["last_login_at"],
    )


def _token(row: RowMapping) -> ApiToken:
    return ApiToken(
        token_id=row["token_id"],
        name=row["name"],
        scopes=frozenset(map(Permission, row["scopes"])),
        created_by=row["created_by"],
        created_at=row["created_at"],
        expires_at=row["expires_at"],
        last_used_at=row["last_used_at"],
    )
