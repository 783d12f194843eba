"""Passwords: which will do, and their Argon2id hashes (RFC 9106)."""

from __future__ import annotations

import secrets
from functools import cache

from argon2 import PasswordHasher
from argon2.exceptions import VerificationError

SHORTEST, LONGEST = 12, 256
_hasher = PasswordHasher()


def objection(password: str, name: str) -> str | None:
    """Why this password will not do for this user; None when it will."""
    if len(password) < SHORTEST:
        return f"A password has at least {SHORTEST} characters; some words in a row are easy to remember."
    if len(password) > LONGEST:
        return f"A password has at most {LONGEST} characters."
    if name.lower() in password.lower() or len(set(password)) < 5:
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


@cache
def _nobodys() -> str:
    return hashed(secrets.token_urlsafe())
