"""What lets people and programs in: passwords, kept as Argon2id hashes (RFC 9106), and random tokens."""

from __future__ import annotations

import hashlib
import re
import secrets
from functools import cache

from argon2 import PasswordHasher
from argon2.exceptions import VerificationError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@\\-]{0,63}")
TAKEN = {"local", "nobody", "web.token", "config.yaml"}
"""What the audit trail and the history of the policy call those who are no users."""
SHORTEST, LONGEST = 12, 256
SHORT_NAME = 3
"""Letters; such a name is in many a good password."""
_hasher = PasswordHasher()


def objection_to_name(name: str) -> str | None:
    """Why nobody can have this name; None when somebody can."""
    if not NAME.fullmatch(name):
        return (
            "A name has up to 64 letters, digits and signs of . _ - @ \\ and begins with a letter or digit."
        )
    if name.lower() in TAKEN:
        return f"{name} is nobody's name: the audit trail says it where no user is meant."
    return None


def objection(password: str, name: str) -> str | None:
    """Why this password will not do for this user; None when it will."""
    if len(password) < SHORTEST:
        return f"A password has at least {SHORTEST} characters; some words in a row are easy to remember."
    if len(password) > LONGEST:
        return f"A password has at most {LONGEST} characters."
    holds_name = len(name) > SHORT_NAME and name.lower() in password.lower()
    if holds_name or len(set(password)) < 5:
        return "This password is too easy to guess."
    return None


def hashed(password: str) -> str:
    """What is kept instead of the password."""
    return _hasher.hash(password)


def is_right(kept: str | None, password: str) -> bool:
    """Compare; None, where there is no such user, takes as long as a wrong password."""
    try:
        return _hasher.verify(kept or _nobodys(), password[: LONGEST + 1]) and kept is not None
    except VerificationError:
        return False


def new_token() -> str:
    """A secret that nobody can guess."""
    return secrets.token_urlsafe(32)


def token_hash(token: str) -> str:
    """What is kept of a token: as it is long and random, a plain hash cannot be turned back."""
    return hashlib.sha256(token.encode(errors="replace")).hexdigest()


@cache
def _nobodys() -> str:
    return hashed(new_token())
