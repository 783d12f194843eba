"""Logging in and out, the first admin, one's own password, and the admin's page of users and tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from datetime import datetime, timedelta
from functools import partial
from typing import Any, TypeVar

from anyio import CapacityLimiter, to_thread
from jinja2 import Environment
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import BaseRoute

from triage import passwords
from triage.audit import Actor, Event, Outcome, messages
from triage.config import Config
from triage.db import Database
from triage.domain import Permission, Role, User
from triage.passwords import new_token, token_hash
from triage.web.access import MAY, NOBODY, SCOPES, Clock, Page, audit
from triage.web.forms import Form, posted
from triage.web.guard import COOKIE

TOKEN = re.compile(r"[^\W_][\w .-]{0,63}")
TOKEN_DAYS = {"30": "30 days", "90": "90 days", "365": "a year", "": "until it is revoked"}
MOST_WAITING = 50
"""Log-ins and new passwords; some seconds of work."""

T = TypeVar("T")


class People:
    """The pages and forms about who may come in."""

    def __init__(self, database: Database, config: Config, clock: Clock, templates: Environment) -> None:
        self.people, self.config, self.clock, self.templates = database.people, config, clock, templates
        self._turn, self._waiting = CapacityLimiter(1), 0

    async def in_turn(self, work: Callable[..., T], *given: Any) -> T:
        """What hashes passwords, one after the other: that takes memory, and nobody tries several at once.

        Who waits holds no thread that other pages could use. Raises HTTPException 503 when many wait.
        """
        if self._waiting >= MOST_WAITING:
            raise HTTPException(503, "Too many are logging in at this moment. Try again in some seconds.")
        self._waiting += 1
        try:
            return await to_thread.run_sync(work, *given, limiter=self._turn)
        finally:
            self._waiting -= 1

    def routes(self) -> Sequence[BaseRoute]:
        admin, own, anybody = Permission.ADMIN, Permission.SELF, Permission.OPEN
        hashing = partial(posted, in_thread=self.in_turn)
        return [
            Page("/login", self.login, anybody),
            Page("/login", hashing(self.log_in), anybody, ["POST"]),
            Page("/logout", self.log_out, anybody, ["POST"]),
            Page("/first-admin", self.first_admin, anybody),
            Page("/first-admin", hashing(self.make_first_admin), anybody, ["POST"]),
            Page("/account", self.account, own),
            Page("/account", hashing(self.change_password), own, ["POST"]),
            Page("/people", self.everybody, admin),
            Page("/people/users", hashing(self.add_user), admin, ["POST"]),
            Page("/people/users/{name}", hashing(self.change_user), admin, ["POST"]),
            Page("/people/tokens", posted(self.add_token), admin, ["POST"]),
            Page("/people/tokens/{token_id:int}/revoke", self.revoke_token, admin, ["POST"]),
        ]

    # --- in and out --------------------------------------------------------------------------

    def login(self, request: Request) -> Response:
        """Shown in place of a page that needs it, too; a right password leads there."""
        if request.url.path != "/login":
            wanted = request.url.path + (f"?{request.url.query}" if request.url.query else "")
            return self._login(request, wanted if request.method == "GET" else "/", 401)
        return self._login(request, "/", 200)

    def _login(self, request: Request, wanted: str, status_code: int, wrong: str = "") -> Response:
        header = self.config.web.proxy.user_header
        return self._page(
            request,
            "login.html",
            status_code,
            wanted=wanted,
            wrong=wrong,
            nobody_yet=not self.people.any_user(),
            through_proxy=bool(header and request.headers.get(header)),
        )

    def log_in(self, request: Request, form: Form) -> Response:
        name, wanted, now = form.one("name").strip()[:64], form.one("next"), self.clock()
        if wait := self._wait(request, name, now):
            return self._login(request, wanted, 429, wait)
        user = self.people.user(name)
        if not passwords.is_right(self.people.password(name), form.one("password")) or user is None:
            told = self._told(request, Event.LOGGED_IN, "wrong name or password", Outcome.FAILURE, name)
            self.people.failed(name, request.state.address, now, told)
            return self._login(request, wanted, 401, "Wrong name or password.")
        return self._begin(request, user, wanted)

    def _wait(self, request: Request, name: str, now: datetime) -> str | None:
        """That no password of this name is looked at now, which is recorded."""
        until = self.people.locked_until(name, request.state.address, now)
        if until is None:
            return None
        audit(request, Event.LOCKED, (), "too many wrong passwords", Outcome.FAILURE, name)
        minutes, seconds = divmod(int((until - now).total_seconds()) + 1, 60)
        span = f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
        return f"Too many wrong passwords. Try again in {span}."

    def _begin(self, request: Request, user: User, wanted: str) -> Response:
        """A session, in place of the one that this browser may have, and the page that was asked for."""
        token, before, now = new_token(), request.cookies.get(COOKIE, ""), self.clock()
        told = self._told(request, Event.LOGGED_IN, who=user.name)
        address = request.state.address
        self.people.log_in(user.name, address, token_hash(token), now, told, ends=token_hash(before))
        is_local = wanted.startswith("/") and not wanted.startswith(("//", "/\\"))
        response = RedirectResponse(wanted if is_local else "/", status_code=303)
        response.set_cookie(
            COOKIE,
            token,
            max_age=int(self.config.web.session.hours * 3600),
            httponly=True,
            samesite="lax",  # links in the RIS and the PACS lead here
            secure=request.url.scheme == "https",
        )
        return response

    def log_out(self, request: Request) -> Response:
        if request.state.person != NOBODY and (cookie := request.cookies.get(COOKIE)):
            self.people.log_out(token_hash(cookie), self._told(request, Event.LOGGED_OUT))
        response = RedirectResponse("/", status_code=303)
        response.delete_cookie(COOKIE, httponly=True, samesite="lax")
        response.headers["clear-site-data"] = '"cache"'  # images that were looked at
        return response

    # --- the first admin -----------------------------------------------------------------------

    def first_admin(self, request: Request) -> Response:
        """Where the link leads that `triage serve` and `triage check` print while there is no user."""
        return self._first_admin(request, request.query_params.get("key", ""))

    def _first_admin(self, request: Request, key: str, name: str = "", wrong: str = "") -> Response:
        self._check_link(key)
        return self._page(request, "first_admin.html", 422 if wrong else 200, key=key, name=name, wrong=wrong)

    def _check_link(self, key: str) -> None:
        if not self.people.is_link(token_hash(key), self.clock()):
            raise HTTPException(410, "This link was used, or is too old. `triage check` prints a new one.")

    def make_first_admin(self, request: Request, form: Form) -> Response:
        key, name = form.one("key"), form.one("name").strip()
        self._check_link(key)
        wrong = passwords.objection_to_name(name) or _differ(form)
        if wrong := wrong or passwords.objection(form.one("password"), name):
            return self._first_admin(request, key, name, wrong)
        told = self._told(request, Event.USER_CHANGED, f"first user {name}: admin", who=name)
        kept = passwords.hashed(form.one("password"))
        if not self.people.add_first_user(token_hash(key), name, kept, self.clock(), told):
            return self._first_admin(request, key)
        user = self.people.user(name)
        assert user is not None  # noqa: S101 - just made
        return self._begin(request, user, "/people")

    # --- one's own password --------------------------------------------------------------------

    def account(self, request: Request) -> Response:
        return self._account(request)

    def _account(self, request: Request, wrong: str = "", done: str = "") -> Response:
        return self._page(request, "account.html", 422 if wrong else 200, wrong=wrong, done=done)

    def change_password(self, request: Request, form: Form) -> Response:
        wrong = _differ(form) or self.new_password(request, form.one("current"), form.one("password"))
        if wrong:
            return self._account(request, wrong)
        return self._account(request, done="Your password is changed. You are logged out everywhere else.")

    def new_password(self, request: Request, current: str, password: str) -> str | None:
        """Change one's own password: needs the old one, ends all other sessions; why not, or None."""
        name, now = request.state.person.who, self.clock()
        if wait := self._wait(request, name, now):
            return wait
        if not passwords.is_right(self.people.password(name), current):
            told = self._told(request, Event.USER_CHANGED, "wrong current password", Outcome.FAILURE)
            self.people.failed(name, request.state.address, now, told)
            return "This is not your current password."
        if wrong := passwords.objection(password, name):
            return wrong
        self.people.change_user(
            name,
            self._told(request, Event.USER_CHANGED, f"user {name}: new password"),
            password=passwords.hashed(password),
            but_session=token_hash(request.cookies.get(COOKIE, "")),
        )
        return None

    # --- users and tokens ----------------------------------------------------------------------

    def everybody(self, request: Request) -> Response:
        return self._everybody(request)

    def _everybody(self, request: Request, wrong: str = "", **shown: Any) -> Response:
        users = self.people.users()
        return self._page(
            request,
            "people.html",
            422 if wrong else 200,
            users=users,
            tokens=self.people.tokens(),
            roles=list(Role),
            may=MAY,
            scopes=SCOPES,
            gone={user.name for user in users if user.disabled or user.role is not Role.ADMIN},
            days=TOKEN_DAYS,
            wrong=wrong,
            **{"new_token": "", **shown},
        )

    def add_user(self, request: Request, form: Form) -> Response:
        name, role = form.one("name").strip(), _role(form)
        return self._then(request, _differ(form) or self.new_user(request, name, role, form.one("password")))

    def new_user(self, request: Request, name: str, role: Role, password: str) -> str | None:
        """Make a user; why not, or None."""
        if wrong := passwords.objection_to_name(name) or passwords.objection(password, name):
            return wrong
        told = self._told(request, Event.USER_CHANGED, f"new user {name}: {role}")
        if not self.people.add_user(name, role, passwords.hashed(password), self.clock(), told):
            return f"There is a user {name} already."
        return None

    def change_user(self, request: Request, form: Form) -> Response:
        """Role, closing or opening the account, or a new password, whichever the form sends."""
        role = _role(form) if form.one("role") else None
        disabled = form.one("disabled") == "yes" if form.one("disabled") else None
        password = form.one("password") or None
        name = request.path_params["name"]
        return self._then(request, _differ(form) or self.alter_user(request, name, role, disabled, password))

    def alter_user(
        self, request: Request, name: str, role: Role | None, disabled: bool | None, password: str | None
    ) -> str | None:
        """Change what is given; why not, or None."""
        if password is not None and (wrong := passwords.objection(password, name)):
            return wrong
        what = [f"role {role}"] if role else []
        what += ["closed" if disabled else "open"] if disabled is not None else []
        what += ["new password"] if password is not None else []
        told = self._told(request, Event.USER_CHANGED, f"user {name}: {', '.join(what) or 'nothing'}")
        kept = None if password is None else passwords.hashed(password)
        if not self.people.change_user(name, told, role=role, disabled=disabled, password=kept):
            return "Not changed: there would be no admin left, or there is no such user."
        return None

    def add_token(self, request: Request, form: Form) -> Response:
        """The token is shown once, in the answer to this."""
        name, wanted, days = form.one("name").strip(), set(form.all("scope")), form.one("days")
        scopes = [scope for scope in SCOPES if scope in wanted]
        if days not in TOKEN_DAYS:
            raise HTTPException(422, "For how long is the token good?")
        token, wrong = self.new_token(request, name, scopes, int(days) if days else None)
        return self._everybody(request, wrong or "", new_token=token, new_name=name)

    def new_token(
        self, request: Request, name: str, scopes: Collection[Permission], days: int | None
    ) -> tuple[str, str | None]:
        """A token and None, or "" and why there is none."""
        if not TOKEN.fullmatch(name) or not scopes or not set(scopes) <= set(SCOPES):
            return "", "A token needs a name and at least one thing it may do."
        token, now = f"triage_{new_token()}", self.clock()
        expires_at = now + timedelta(days=days) if days else None
        told = self._told(request, Event.TOKEN_CHANGED, f"new token {name}: {', '.join(sorted(scopes))}")
        who = request.state.person.who
        if not self.people.add_token(name, token_hash(token), scopes, who, now, expires_at, told):
            return "", f"There is a token {name} already."
        return token, None

    def revoke_token(self, request: Request) -> Response:
        if not self.revoke(request, request.path_params["token_id"]):
            raise HTTPException(404, "There is no such token.")
        return RedirectResponse("/people", status_code=303)

    def revoke(self, request: Request, token_id: int) -> bool:
        """False where there is no such token."""
        name = next((one.name for one in self.people.tokens() if one.token_id == token_id), "")
        return self.people.revoke_token(
            token_id, self._told(request, Event.TOKEN_CHANGED, f"token {name} revoked")
        )

    def _then(self, request: Request, wrong: str | None) -> Response:
        return self._everybody(request, wrong) if wrong else RedirectResponse("/people", status_code=303)

    # -------------------------------------------------------------------------------------------

    def _told(
        self,
        request: Request,
        event: Event,
        detail: str = "",
        outcome: Outcome = Outcome.SUCCESS,
        who: str = "",
    ) -> list[str]:
        """Audit messages, to be written in the transaction of what they tell of."""
        actor = Actor(who or request.state.person.who, request.state.address)
        return messages(event, actor, self.clock(), (), detail, outcome)

    def _page(self, request: Request, template: str, status_code: int, **values: Any) -> Response:
        html = self.templates.get_template(template).render(
            now=self.clock(), person=request.state.person, **values
        )
        return HTMLResponse(html, status_code=status_code)


def _differ(form: Form) -> str | None:
    return None if form.one("password") == form.one("again") else "The two passwords differ."


def _role(form: Form) -> Role:
    try:
        return Role(form.one("role"))
    except ValueError:
        raise HTTPException(422, f"There is no role “{form.one('role')[:64]}”.") from None
