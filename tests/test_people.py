"""Who may come in, what they may do there, and how they are kept out."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Collection, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute
from hypothesis import given
from hypothesis import strategies as st
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from tests.test_web import Reader, text
from tests.web_studies import NOON, Ward, configured
from triage import first, passwords, policies
from triage.audit import Event
from triage.db.people import FIRST_WAIT_SECONDS, LONGEST_WAIT, LONGEST_WAIT_OF_ALL, _locked
from triage.domain import Permission, Role
from triage.passwords import token_hash
from triage.web import people
from triage.web.access import AT_THIS_MACHINE, MAY, NOBODY, SCOPES, Page
from triage.web.api import Needs

PASSWORD = "correct horse battery"
KEPT = passwords.hashed(PASSWORD)
TOKEN = "a-token-of-the-reading-room"
HERE = "127.0.0.1"


@pytest.fixture
def ward(tmp_path: Path) -> Iterator[Ward]:
    ward = Ward(configured(tmp_path))
    yield ward
    ward.database.close()


def user(ward: Ward, name: str, role: Role = Role.RADIOLOGIST) -> None:
    assert ward.database.people.add_user(name, role, KEPT, ward.now, [])


def entered(ward: Ward, name: str) -> Reader:
    """A browser in which this user is logged in."""
    reader = Reader(ward)
    answer = log_in(reader, name)
    assert answer.status_code == 303
    return reader


def log_in(reader: Reader, name: str, password: str = PASSWORD, wanted: str = "/") -> httpx.Response:
    return reader.post("/login", data={"name": name, "password": password, "next": wanted})


def asked(ward: Ward, **web: Any) -> None:
    """The same ward with other settings of the page."""
    ward.config = ward.config.model_copy(
        update={"web": ward.config.web.model_validate({**ward.config.web.model_dump(), **web})}
    )


# --- the table of roles, and every route ------------------------------------------------------


def needs(route: BaseRoute) -> Permission | None:
    """What a route asks for; None when it does not say."""
    if isinstance(route, APIRoute):
        found = [one.call.needs for one in route.dependant.dependencies if isinstance(one.call, Needs)]
        return found[0] if found else None
    return route.needs if isinstance(route, Page) else None


def walk(routes: list[BaseRoute], above: str = "") -> Iterator[tuple[str, str, BaseRoute]]:
    """(method, address, route) of every address there is, with made-up values in it."""
    for route in routes:
        if isinstance(route, Mount):
            if not isinstance(route.app, StaticFiles):
                yield from walk(list(route.routes), above + route.path)
        elif (included := getattr(route, "original_router", None)) is not None:
            yield from walk(included.routes, above)
        else:
            assert isinstance(route, Route), f"a route of an unknown kind: {route}"
            path = re.sub(r"\{[^}]*:int\}", "7", above + route.path)
            path = re.sub(r"\{[^}]*\}", "1.1", path)
            for method in sorted((route.methods or {"GET"}) - {"HEAD"}):
                yield method, path, route


def everything(ward: Ward) -> list[tuple[str, str, BaseRoute]]:
    return list(walk(list(ward.app().routes)))


def send(reader: Reader, method: str, path: str, **asked: Any) -> int:
    """The status of the answer; of an endless one, as soon as it begins."""

    async def first_line() -> int:
        async with reader._client.stream(method, path, **asked) as answer:
            return answer.status_code

    return asyncio.run(asyncio.wait_for(first_line(), 20))


def test_every_route_names_what_it_needs(ward: Ward) -> None:
    silent = [f"{method} {path}" for method, path, route in everything(ward) if needs(route) is None]
    assert silent == ["GET /api/v1/openapi.json"]
    assert len(everything(ward)) > 20


def test_only_these_addresses_are_open_to_everybody(ward: Ward) -> None:
    routes = everything(ward)
    open_ = {f"{method} {path}" for method, path, route in routes if needs(route) is Permission.OPEN}
    assert open_ == {
        "GET /first-admin",
        "GET /health/live",
        "GET /health/ready",
        "GET /healthz",
        "GET /login",
        "POST /first-admin",
        "POST /login",
        "POST /logout",
    }


def test_roles_may_what_the_table_says(ward: Ward) -> None:
    assert {role: {one.value for one in may} for role, may in MAY.items()} == {
        Role.VIEWER: {"open", "self", "read"},
        Role.RADIOLOGIST: {"open", "self", "read", "worklist"},
        Role.ADMIN: {"open", "self", "read", "worklist", "policy", "admin"},
    }


ENDLESS = "/api/v1/worklist/events"


def check_routes(ward: Ward, reader: Reader, may: Collection[Permission], refused: int, **sent: Any) -> None:
    """Every route says ``refused`` to who may not; to who may, whatever else it says of a made-up address."""
    for method, path, route in everything(ward):
        need = needs(route)
        if need is None or path == "/logout" or (method, path) == ("POST", "/login"):
            continue  # open to all; these end who asks, and refuse who has no password
        if path == ENDLESS and need in may:
            continue  # tests of the list open it
        status = send(reader, method, path, **sent)
        assert (status == refused) is (need not in may), f"{method} {path}: {status}"
        assert status < 500 or path == "/health/ready", f"{method} {path}"


CHANGES = {
    Permission.OPEN: {"POST /first-admin", "POST /login", "POST /logout"},
    Permission.SELF: {"POST /account", "PUT /api/v1/account/password"},
    Permission.READ: {"DELETE /api/v1/views/1.1", "PUT /api/v1/views/1.1"},
    Permission.WORKLIST: {
        "DELETE /api/v1/studies/1.1/claim",
        "DELETE /api/v1/studies/1.1/read",
        "POST /api/v1/studies/1.1/verdicts",
        "POST /api/v1/uploads",
        "POST /api/v1/uploads/1.1/files",
        "POST /upload",
        "PUT /api/v1/studies/1.1/claim",
        "PUT /api/v1/studies/1.1/read",
        "PUT /api/v1/uploads/1.1/complete",
    },
    Permission.POLICY: {
        "POST /api/v1/policy/roll-back",
        "POST /api/v1/policy/what-if",
        "POST /policy",
        "POST /policy/roll-back",
        "PUT /api/v1/policy",
    },
    Permission.ADMIN: {
        "DELETE /api/v1/tokens/1.1",
        "PATCH /api/v1/users/1.1",
        "POST /api/v1/studies/1.1/resend/1.1",
        "POST /api/v1/tokens",
        "POST /api/v1/users",
        "POST /people/tokens",
        "POST /people/tokens/7/revoke",
        "POST /people/users",
        "POST /people/users/1.1",
        "POST /studies/1.1/resend/1.1",
    },
}
"""Whatever is no mere look, by the permission it has to ask for."""


def test_whatever_changes_something_needs_what_is_written_here(ward: Ward) -> None:
    found: dict[Permission, set[str]] = {}
    for method, path, route in everything(ward):
        if method != "GET" and (need := needs(route)):
            found.setdefault(need, set()).add(f"{method} {path}")
    assert found == CHANGES


@pytest.mark.parametrize("role", [None, *Role])
def test_each_route_lets_in_whom_it_names_and_nobody_else(ward: Ward, role: Role | None) -> None:
    user(ward, "boss", Role.ADMIN)
    if role is None:
        check_routes(ward, Reader(ward), {Permission.OPEN}, 401)
    else:
        user(ward, "somebody", role)
        check_routes(ward, entered(ward, "somebody"), MAY[role], 403)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_token_is_good_for_its_scope_alone(ward: Ward, scope: Permission) -> None:
    user(ward, "boss", Role.ADMIN)
    bearer = {"Authorization": f"Bearer {token(ward, 't', {scope})}"}
    check_routes(ward, Reader(ward), {Permission.OPEN, scope}, 403, headers=bearer)


def token(ward: Ward, name: str, scopes: set[Permission], until: timedelta | None = None) -> str:
    secret = name + "x" * 20
    expires_at = ward.now + until if until else None
    kept = token_hash(secret)
    assert ward.database.people.add_token(name, kept, scopes, "boss", ward.now, expires_at, [])
    return secret


# --- before there is a user ---------------------------------------------------------------------


def test_without_users_whoever_sits_at_this_machine_reads_and_works_but_makes_no_users(ward: Ward) -> None:
    ward.arrive("1.1")
    assert Reader(ward).get("/studies/1.1").status_code == 200
    assert Reader(ward).get("/people").status_code == 403


@pytest.mark.parametrize("web", [{"host": "0.0.0.0"}, {"token": TOKEN}])
def test_without_users_nobody_else_is_let_in(ward: Ward, web: dict[str, str]) -> None:
    asked(ward, **web)
    page = Reader(ward).get("/")
    assert page.status_code == 401
    assert "There is no user here yet" in text(page)
    assert Reader(ward).get("/api/worklist").status_code == 401


@pytest.mark.parametrize("header", ["X-Forwarded-For", "X-Forwarded-Proto", "Forwarded", "X-Real-IP"])
def test_without_users_nobody_is_let_in_through_a_proxy(ward: Ward, header: str) -> None:
    ward.arrive("1.1")
    assert Reader(ward).get("/api/worklist", headers={header: "10.9.8.7"}).status_code == 401
    assert Reader(ward).get("/studies/1.1", headers={header: ""}).status_code == 401


def test_without_users_nobody_is_let_in_from_another_machine(ward: Ward) -> None:
    app = ward.app()
    transport = httpx.ASGITransport(app, client=("10.1.2.3", 4711))
    client = httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8080")
    assert asyncio.run(client.get("/api/worklist")).status_code == 401


@pytest.mark.parametrize("told", [{}, {"X-Remote-User": ""}, {"X-Remote-User": "jane"}])
def test_without_users_nobody_is_let_in_by_a_proxy_that_names_them(ward: Ward, told: dict[str, str]) -> None:
    asked(ward, proxy={"user_header": "X-Remote-User"})
    assert Reader(ward).get("/api/worklist", headers=told).status_code == 401


def test_the_first_link_makes_one_admin_and_is_used_up(ward: Ward) -> None:
    link = first.link(ward.database, ward.config, ward.now)
    other = first.link(ward.database, ward.config, ward.now)
    assert link is not None
    assert other is not None
    assert link.startswith("http://127.0.0.1:8080/first-admin?key=")
    reader, key = Reader(ward), link.partition("key=")[2]
    assert reader.get(link).status_code == 200
    form = {"key": key, "name": "jane", "password": PASSWORD, "again": PASSWORD}
    for wrong, said in (
        ({"again": "something else"}, "differ"),
        ({"password": "short", "again": "short"}, "at least 12"),
        ({"password": "jane jane jane", "again": "jane jane jane"}, "easy to guess"),
        ({"name": "<b>"}, "A name has"),
    ):
        answer = reader.post("/first-admin", data={**form, **wrong})
        assert (answer.status_code, said in text(answer)) == (422, True), wrong
    made = reader.post("/first-admin", data=form)
    assert (made.status_code, made.headers["location"]) == (303, "/people")
    assert reader.get("/people").status_code == 200
    for used in (link, other):
        assert Reader(ward).get(used).status_code == 410
    assert Reader(ward).post("/first-admin", data={**form, "name": "eve"}).status_code == 410
    assert [one.name for one in ward.database.people.users()] == ["jane"]
    assert first.link(ward.database, ward.config, ward.now) is None


def test_the_first_link_ends_with_the_first_user_whoever_made_it(ward: Ward) -> None:
    link = first.link(ward.database, ward.config, ward.now)
    assert link is not None
    user(ward, "jane", Role.ADMIN)
    form = {"key": link.partition("key=")[2], "name": "eve", "password": PASSWORD, "again": PASSWORD}
    assert Reader(ward).get(link).status_code == 410
    assert Reader(ward).post("/first-admin", data=form).status_code == 410


def test_without_the_link_no_password_is_hashed(ward: Ward, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    monkeypatch.setattr(passwords, "hashed", hashed.append)
    form = {"key": "guess", "name": "eve", "password": PASSWORD, "again": PASSWORD}
    assert Reader(ward).post("/first-admin", data=form).status_code == 410
    assert Reader(ward).post("/first-admin", data={**form, "name": "<b>"}).status_code == 410
    assert hashed == []


def test_the_first_link_is_good_for_a_day(ward: Ward) -> None:
    link = first.link(ward.database, ward.config, ward.now)
    assert link is not None
    ward.now += timedelta(hours=25)
    assert Reader(ward).get(link).status_code == 410
    assert Reader(ward).get("/first-admin").status_code == 410


# --- logging in ---------------------------------------------------------------------------------


def test_with_users_everybody_logs_in_and_comes_where_they_wanted(ward: Ward) -> None:
    user(ward, "jane")
    ward.arrive("1.1", patient_name="SECRET^NAME")
    reader = Reader(ward)
    asked_for = reader.get("/search?q=SECRET&x=%22")
    assert (asked_for.status_code, "Log in" in text(asked_for)) == (401, True)
    answer = log_in(reader, "JANE", wanted="/search?q=SECRET&x=%22")
    assert (answer.status_code, answer.headers["location"]) == (303, "/search?q=SECRET&x=%22")
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=lax" in cookie
    assert "Secure" not in cookie
    assert reader.get("/search?q=SECRET").status_code == 200
    reader.post("/logout")
    assert reader.get("/").status_code == 401


def test_a_cookie_of_a_session_that_ended_lets_nobody_in(ward: Ward) -> None:
    user(ward, "jane")
    reader = entered(ward, "jane")
    cookie = {"Cookie": f"triage_session={reader._client.cookies['triage_session']}"}
    assert Reader(ward).get("/", headers=cookie).status_code == 200
    reader.post("/logout")
    assert Reader(ward).get("/", headers=cookie).status_code == 401


def test_logging_in_again_ends_the_session_before(ward: Ward) -> None:
    user(ward, "jane")
    reader = entered(ward, "jane")
    cookie = {"Cookie": f"triage_session={reader._client.cookies['triage_session']}"}
    assert log_in(reader, "jane").status_code == 303
    assert reader.get("/search").status_code == 200
    assert Reader(ward).get("/search", headers=cookie).status_code == 401


@pytest.mark.parametrize(
    "name", ["web.token", "Local", NOBODY.who, AT_THIS_MACHINE.who, policies.FILE, "a b", "-a", "", "ä"]
)
def test_nobody_gets_a_name_that_means_somebody_else(name: str) -> None:
    assert passwords.objection_to_name(name) is not None


def test_names_of_windows_and_mail_are_names() -> None:
    for name in ("CLINIC\\jane", "jane@clinic.example", "j"):
        assert passwords.objection_to_name(name) is None


def test_a_password_holds_no_name_but_may_hold_its_few_letters() -> None:
    assert passwords.objection("my name is jane", "Jane") is not None
    assert passwords.objection(PASSWORD, "a") is None


def test_the_database_holds_no_secret(ward: Ward) -> None:
    user(ward, "jane", Role.ADMIN)
    reader = entered(ward, "jane")
    made = reader.post("/people/tokens", data={"name": "RIS", "scope": "read", "days": ""})
    shown = re.search(r"triage_[\w-]{43}", made.text)
    assert shown
    kept = b"".join(path.read_bytes() for path in Path(ward.config.storage.spool).parent.glob("triage.db*"))
    for secret in (PASSWORD, reader._client.cookies["triage_session"], shown[0]):
        assert secret.encode() not in kept


@pytest.mark.parametrize("wanted", ["https://evil.example/", "//evil.example", "/\\evil.example", "evil", ""])
def test_logging_in_never_leads_elsewhere(ward: Ward, wanted: str) -> None:
    user(ward, "jane")
    assert log_in(Reader(ward), "jane", wanted=wanted).headers["location"] == "/"


WRONG = ({}, {"name": "jane"}, {"name": "jane", "password": "x"}, {"name": "nobody", "password": PASSWORD})


@pytest.mark.parametrize("form", WRONG)
def test_who_is_wrong_is_not_told_which_half(ward: Ward, form: dict[str, str]) -> None:
    user(ward, "jane")
    answer = Reader(ward).post("/login", data=form)
    assert (answer.status_code, "set-cookie" in answer.headers) == (401, False)
    assert "Wrong name or password" in text(answer)


def test_a_form_that_is_too_large_is_not_read(ward: Ward) -> None:
    user(ward, "jane")
    assert log_in(Reader(ward), "jane", wanted="x" * 10_000).status_code == 413


def test_after_wrong_passwords_the_waits_grow(ward: Ward) -> None:
    user(ward, "jane")
    reader, waits = Reader(ward), []
    for _ in range(4):
        assert log_in(reader, "jane", "wrong").status_code == 401
    for _ in range(4):
        assert log_in(reader, "jane", "wrong").status_code == 401
        locked = log_in(reader, "jane")
        assert (locked.status_code, "Too many wrong passwords" in text(locked)) == (429, True)
        until = ward.database.people.locked_until("jane", HERE, ward.now)
        assert until is not None
        waits.append((until - ward.now).total_seconds())
        ward.now = until
    assert waits == [30, 60, 120, 240]
    assert log_in(reader, "jane").status_code == 303
    assert log_in(reader, "jane", "wrong").status_code == 401
    assert ward.database.people.locked_until("jane", HERE, ward.now) is None


def test_nobody_locks_out_a_colleague_for_long(ward: Ward) -> None:
    """At the address of the wrong passwords the wait grows to an hour, elsewhere never above a minute."""
    user(ward, "jane")
    stranger, jane = "10.6.6.6", "10.1.2.3"
    failed, locked_until = ward.database.people.failed, ward.database.people.locked_until
    for _ in range(30):
        failed("jane", stranger, ward.now, [])
    assert locked_until("JANE", stranger, ward.now) == ward.now + LONGEST_WAIT
    assert locked_until("jane", jane, ward.now) == ward.now + LONGEST_WAIT_OF_ALL
    ward.now += LONGEST_WAIT_OF_ALL
    reader = Reader(ward)
    assert log_in(reader, "jane").status_code == 303
    assert locked_until("jane", stranger, ward.now) is not None


def test_what_is_not_even_tried_is_on_record_once_an_hour(ward: Ward) -> None:
    user(ward, "jane")
    reader = Reader(ward)
    for _ in range(5):
        log_in(reader, "jane", "wrong")
    for _ in range(7):
        assert log_in(reader, "jane").status_code == 429
    messages = [record.message for record in ward.database.trail.records()]
    assert ['"locked"' in one for one in messages] == [False] * 5 + [True]
    assert 'UserID="jane"' in messages[-1]


def test_who_logs_in_holds_nobody_else_up(ward: Ward, monkeypatch: pytest.MonkeyPatch) -> None:
    """Passwords are compared one after the other; who waits takes no thread, and too many are sent away."""
    user(ward, "jane")
    monkeypatch.setattr(people, "MOST_WAITING", 45)
    looking = threading.Event()
    monkeypatch.setattr(passwords, "is_right", lambda *_: not looking.wait(20))
    client = Reader(ward)._client

    async def crowd() -> tuple[list[int], int]:
        form = {"name": "jane", "password": "x"}
        tries = [asyncio.create_task(client.post("/login", data=form)) for _ in range(60)]
        while sum(one.done() for one in tries) < 15:
            await asyncio.sleep(0.01)
        other = await asyncio.wait_for(client.get("/healthz"), 10)
        looking.set()
        return sorted([(await one).status_code for one in tries]), other.status_code

    statuses, other = asyncio.run(crowd())
    assert other == 200
    assert statuses == [401] * 5 + [429] * 40 + [503] * 15


def test_names_nobody_has_are_locked_alike(ward: Ward) -> None:
    user(ward, "jane")
    reader = Reader(ward)
    for name in ("jane", "nobody"):
        answers = [log_in(reader, name, "wrong") for _ in range(6)]
        assert [answer.status_code for answer in answers] == [401] * 5 + [429]
        assert text(answers[0]).replace(name, "") == text(log_in(Reader(ward), "other", "wrong"))


@given(st.integers(1, 10_000))
def test_no_wait_is_longer_than_an_hour(failures: int) -> None:
    until, sooner = _locked(failures, NOON, LONGEST_WAIT), _locked(failures - 1, NOON, LONGEST_WAIT)
    assert until is None or NOON + timedelta(seconds=FIRST_WAIT_SECONDS) <= until <= NOON + LONGEST_WAIT
    assert sooner is None or (until is not None and sooner <= until)


# --- sessions -----------------------------------------------------------------------------------


def test_a_session_that_is_not_touched_ends(ward: Ward) -> None:
    user(ward, "jane")
    reader = entered(ward, "jane")
    for _ in range(3):
        ward.now += timedelta(minutes=50)
        assert reader.get("/search").status_code == 200
    ward.now += timedelta(minutes=61)
    assert reader.get("/search").status_code == 401


def test_the_page_alone_does_not_keep_a_session_alive(ward: Ward) -> None:
    user(ward, "jane")
    for header in ({"X-Background": "1"}, {"Accept": "text/event-stream"}):
        reader = entered(ward, "jane")
        ward.now += timedelta(minutes=50)
        assert reader.get("/search", headers=header).status_code == 200
        ward.now += timedelta(minutes=50)
        assert reader.get("/search", headers=header).status_code == 401


def test_no_session_is_longer_than_a_shift(ward: Ward) -> None:
    user(ward, "jane")
    reader = entered(ward, "jane")
    for _ in range(24):
        assert reader.get("/search").status_code == 200
        ward.now += timedelta(minutes=30)
    assert reader.get("/search").status_code == 401
    assert ward.database.people.end_old_sessions(ward.now, ward.config.web.session)
    assert not ward.database.people.end_old_sessions(ward.now, ward.config.web.session)


# --- other sites' forms -------------------------------------------------------------------------


FOREIGN = (
    {"Origin": "https://evil.example"},
    {"Origin": "null"},
    {"Origin": "http://127.0.0.1:9090"},
    {"Origin": "http://127.0.0.1:8080", "Sec-Fetch-Site": "cross-site"},
    {"Origin": "http://127.0.0.1:8080", "Sec-Fetch-Site": "same-site"},
    {"Origin": ""},
)


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
def test_nothing_is_changed_for_another_site(ward: Ward, headers: dict[str, str]) -> None:
    user(ward, "boss", Role.ADMIN)
    reader = entered(ward, "boss")
    for method, path, _ in everything(ward):
        if method not in ("GET", "OPTIONS"):
            assert send(reader, method, path, headers=headers) == 403, f"{method} {path}"
    assert reader.get("/people", headers=headers).status_code == 200


def test_a_program_with_a_token_needs_no_origin(ward: Ward) -> None:
    user(ward, "boss", Role.ADMIN)
    sent = {"Authorization": f"Bearer {token(ward, 't', {Permission.ADMIN})}", "Origin": ""}
    form = {"name": "x", "role": "viewer", "password": PASSWORD, "again": PASSWORD}
    assert Reader(ward).post("/people/users", data=form, headers=sent).status_code == 303


# --- the proxy before the page ------------------------------------------------------------------


def test_only_a_trusted_proxy_says_who_asks(ward: Ward) -> None:
    user(ward, "jane")
    told = {"X-Remote-User": "jane"}
    assert Reader(ward).get("/search", headers=told).status_code == 401
    asked(ward, proxy={"networks": ["127.0.0.1"], "user_header": "X-Remote-User"})
    assert Reader(ward).get("/search", headers=told).status_code == 200
    asked_by_proxy = {**told, "Authorization": "Basic amFuZTpzZWNyZXQ="}
    assert Reader(ward).get("/search", headers=asked_by_proxy).status_code == 200
    foreign = {**asked_by_proxy, "Origin": "https://evil.example"}
    assert Reader(ward).post("/account", headers=foreign).status_code == 403
    for other in ("nobody", "", "jane, boss"):
        assert Reader(ward).get("/search", headers={"X-Remote-User": other}).status_code == 401
    assert "no open account" in text(Reader(ward).get("/", headers={"X-Remote-User": "nobody"}))
    asked(ward, proxy={"networks": ["10.1.2.0/24"], "user_header": "X-Remote-User"})
    assert Reader(ward).get("/search", headers=told).status_code == 401


def test_of_two_headers_the_proxy_wrote_the_last(ward: Ward) -> None:
    user(ward, "jane")
    user(ward, "boss", Role.ADMIN)
    asked(ward, proxy={"user_header": "X-Remote-User"})
    for names in (["boss", "jane"], ["jane", "jane"], ["", "jane"]):
        told = [("X-Remote-User", name) for name in names]
        assert entered(ward, "boss").get("/search", headers=told).status_code == 401
    twice = [("X-Forwarded-For", "6.6.6.6"), ("X-Forwarded-For", "7.7.7.7, 10.9.8.7")]
    Reader(ward).post("/login", data={"name": "jane", "password": "x"}, headers=twice)
    (last,) = list(ward.database.trail.records())[-1:]
    assert 'NetworkAccessPointID="10.9.8.7"' in last.message


def test_the_proxy_says_from_where_and_whether_over_tls(ward: Ward) -> None:
    user(ward, "jane")
    forwarded = {"X-Forwarded-For": "6.6.6.6, 10.9.8.7", "X-Forwarded-Proto": "https"}
    reader = Reader(ward)
    form = {"name": "jane", "password": PASSWORD}
    assert "Secure" in reader.post("/login", data=form, headers=forwarded).headers["set-cookie"]
    (last,) = list(ward.database.trail.records())[-1:]
    assert 'NetworkAccessPointID="10.9.8.7"' in last.message
    asked(ward, proxy={"networks": []})
    assert "Secure" not in Reader(ward).post("/login", data=form, headers=forwarded).headers["set-cookie"]
    (last,) = list(ward.database.trail.records())[-1:]
    assert 'NetworkAccessPointID="127.0.0.1"' in last.message


# --- tokens -------------------------------------------------------------------------------------


def test_an_admin_makes_and_revokes_tokens(ward: Ward) -> None:
    user(ward, "boss", Role.ADMIN)
    ward.arrive("1.1")
    reader = entered(ward, "boss")
    assert reader.post("/people/tokens", data={"name": "RIS"}).status_code == 422
    made = reader.post("/people/tokens", data={"name": "RIS", "scope": "read", "days": "30"})
    secret = re.search(r"triage_[\w-]{43}", made.text)
    assert secret
    assert secret[0] not in reader.get("/people").text
    assert reader.post("/people/tokens", data={"name": "RIS", "scope": "read"}).status_code == 422
    sent = {"Authorization": f"Bearer {secret[0]}"}
    assert Reader(ward).get("/api/worklist", headers=sent).json()[0]["study_instance_uid"] == "1.1"
    (kept,) = ward.database.people.tokens()
    assert (kept.created_by, kept.last_used_at, kept.scopes) == ("boss", ward.now, {Permission.READ})
    ward.now += timedelta(days=31)
    assert Reader(ward).get("/api/worklist", headers=sent).status_code == 401
    assert entered(ward, "boss").post(f"/people/tokens/{kept.token_id}/revoke").status_code == 303
    assert ward.database.people.tokens() == []
    assert entered(ward, "boss").post(f"/people/tokens/{kept.token_id}/revoke").status_code == 404


def test_a_token_rests_while_its_maker_is_no_admin(ward: Ward) -> None:
    user(ward, "boss", Role.ADMIN)
    user(ward, "chief", Role.ADMIN)
    sent = {"Authorization": f"Bearer {token(ward, 't', {Permission.READ})}"}
    chief = entered(ward, "chief")
    for change, status in (
        ({"disabled": "yes"}, 401),
        ({"disabled": "no"}, 200),
        ({"role": "viewer"}, 401),
        ({"role": "admin"}, 200),
    ):
        assert chief.post("/people/users/boss", data=change).status_code == 303
        assert Reader(ward).get("/api/worklist", headers=sent).status_code == status, change
        assert ("boss is no admin any more" in text(chief.get("/people"))) is (status == 401)


@pytest.mark.parametrize("days", ["31", "-1", "never", "٣٠"])
def test_no_token_lasts_for_another_time_than_is_offered(ward: Ward, days: str) -> None:
    user(ward, "boss", Role.ADMIN)
    form = {"name": "RIS", "scope": "read", "days": days}
    assert entered(ward, "boss").post("/people/tokens", data=form).status_code == 422
    assert ward.database.people.tokens() == []


def test_the_token_of_the_settings_may_read_and_nothing_else(ward: Ward) -> None:
    ward.arrive("1.1")
    asked(ward, token=TOKEN)
    for method, path, route in everything(ward):
        if needs(route) in (Permission.WORKLIST, Permission.POLICY, Permission.ADMIN, Permission.SELF):
            sent = {"Authorization": f"Bearer {TOKEN}"}
            assert send(Reader(ward), method, path, headers=sent) == 403, f"{method} {path}"


# --- managing users -----------------------------------------------------------------------------


def test_an_admin_makes_changes_and_closes_users(ward: Ward) -> None:
    user(ward, "boss", Role.ADMIN)
    admin = entered(ward, "boss")
    form = {"name": "jane", "role": "viewer", "password": PASSWORD, "again": PASSWORD}
    assert admin.post("/people/users", data=form).status_code == 303
    assert "There is a user jane already" in text(admin.post("/people/users", data=form))
    assert admin.post("/people/users", data={**form, "name": "joe", "role": "king"}).status_code == 422
    jane = entered(ward, "jane")
    assert admin.post("/people/users/jane", data={"role": "radiologist"}).status_code == 303
    found = ward.database.people.user("jane")
    assert found is not None
    assert found.role is Role.RADIOLOGIST
    assert jane.get("/search").status_code == 200
    assert admin.post("/people/users/jane", data={"disabled": "yes"}).status_code == 303
    assert jane.get("/search").status_code == 401
    assert log_in(jane, "jane").status_code == 401
    assert admin.post("/people/users/jane", data={"disabled": "no"}).status_code == 303
    assert log_in(jane, "jane").status_code == 303
    changed = {"password": "another long password", "again": "another long password"}
    assert admin.post("/people/users/jane", data=changed).status_code == 303
    assert jane.get("/search").status_code == 401
    assert log_in(jane, "jane", "another long password").status_code == 303
    assert admin.post("/people/users/nobody", data={"role": "viewer"}).status_code == 422


NEW = {"password": "another long password", "again": "another long password"}


@pytest.mark.parametrize(
    "change", [{"role": "viewer"}, {"disabled": "yes"}, {"role": "viewer", **NEW}, {"disabled": "yes", **NEW}]
)
def test_the_last_admin_stays(ward: Ward, change: dict[str, str]) -> None:
    user(ward, "boss", Role.ADMIN)
    admin = entered(ward, "boss")
    assert "no admin left" in text(admin.post("/people/users/boss", data=change))
    user(ward, "second", Role.ADMIN)
    assert admin.post("/people/users/boss", data=change).status_code == 303


def test_everybody_changes_their_own_password_and_is_logged_out_elsewhere(ward: Ward) -> None:
    user(ward, "jane", Role.VIEWER)
    here, there = entered(ward, "jane"), entered(ward, "jane")
    new = {"password": "another long password", "again": "another long password"}
    assert "not your current password" in text(here.post("/account", data={"current": "x", **new}))
    assert "differ" in text(here.post("/account", data={"current": PASSWORD, **new, "again": "y"}))
    done = here.post("/account", data={"current": PASSWORD, **new})
    assert (done.status_code, "Your password is changed" in text(done)) == (200, True)
    assert (here.get("/search").status_code, there.get("/search").status_code) == (200, 401)
    assert log_in(Reader(ward), "jane").status_code == 401


def test_guessing_the_current_password_locks_like_logging_in(ward: Ward) -> None:
    user(ward, "jane")
    here = entered(ward, "jane")
    for _ in range(5):
        here.post("/account", data={"current": "guess"})
    assert "Too many wrong passwords" in text(here.post("/account", data={"current": PASSWORD}))


def test_what_is_done_with_users_is_on_record(ward: Ward) -> None:
    user(ward, "boss", Role.ADMIN)
    admin = entered(ward, "boss")
    form = {"name": "jane", "role": "viewer", "password": PASSWORD, "again": PASSWORD}
    admin.post("/people/users", data=form)
    admin.post("/people/users/jane", data={"disabled": "yes"})
    admin.post("/people/tokens", data={"name": "RIS", "scope": "read"})
    log_in(Reader(ward), "jane")
    admin.post("/logout")
    codes = [record.message.split('csd-code="')[2].split('"')[0] for record in ward.database.trail.records()]
    expected = (
        Event.LOGGED_IN,
        Event.USER_CHANGED,
        Event.USER_CHANGED,
        Event.TOKEN_CHANGED,
        Event.LOGGED_IN,
        Event.LOGGED_OUT,
    )
    assert codes == [event.value.type[0] for event in expected]
    assert not any(PASSWORD in record.message for record in ward.database.trail.records())


# --- the same for programs ----------------------------------------------------------------------


def test_the_api_does_what_the_page_does(ward: Ward) -> None:
    user(ward, "boss", Role.ADMIN)
    sent = {"Authorization": f"Bearer {token(ward, 't', {Permission.ADMIN})}"}

    def call(method: str, path: str, body: Any = None) -> httpx.Response:
        reader = Reader(ward)
        return asyncio.run(reader._client.request(method, f"/api/v1{path}", json=body, headers=sent))

    jane = {"name": "jane", "role": "viewer", "password": PASSWORD}
    assert call("POST", "/users", jane).status_code == 201
    assert call("POST", "/users", jane).json() == {"error": "There is a user jane already."}
    assert call("POST", "/users", {**jane, "name": "joe", "password": "short"}).status_code == 409
    assert call("POST", "/users", {**jane, "role": "king"}).status_code == 422
    assert [(one["name"], one["role"]) for one in call("GET", "/users").json()] == [
        ("boss", "admin"),
        ("jane", "viewer"),
    ]
    assert "password" not in call("GET", "/users").text
    assert call("PATCH", "/users/jane", {"role": "radiologist", "disabled": True}).json()["disabled"] is True
    assert call("PATCH", "/users/nobody", {"disabled": True}).status_code == 404
    assert call("PATCH", "/users/boss", {"disabled": True}).status_code == 409
    made = call("POST", "/tokens", {"name": "RIS", "scopes": ["read"], "days": 7})
    assert made.status_code == 201
    assert call("POST", "/tokens", {"name": "all", "scopes": ["self"]}).status_code == 409
    bearer = {"Authorization": f"Bearer {made.json()['token']}"}
    assert Reader(ward).get("/api/worklist", headers=bearer).status_code == 200
    assert [one["name"] for one in call("GET", "/tokens").json()] == ["RIS", "t"]
    assert call("DELETE", f"/tokens/{made.json()['token_id']}").status_code == 204
    assert call("DELETE", f"/tokens/{made.json()['token_id']}").status_code == 404
    assert Reader(ward).get("/api/worklist", headers=bearer).status_code == 401


def test_one_changes_the_own_password_by_the_api(ward: Ward) -> None:
    user(ward, "jane")
    reader = entered(ward, "jane")

    def change(current: str) -> int:
        body = {"current": current, "password": "another long password"}
        return asyncio.run(reader._client.put("/api/v1/account/password", json=body)).status_code

    assert (change("wrong"), change(PASSWORD)) == (409, 204)
    assert log_in(Reader(ward), "jane", "another long password").status_code == 303
