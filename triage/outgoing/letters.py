"""What is sent, and what becomes of it; the same for every transport."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from datetime import datetime

from triage.domain import Priority, Result, Study


@dataclass(frozen=True, slots=True)
class Letter:
    """The answer for a study and its place on the list, under an identity that every try keeps."""

    identity: str
    study: Study
    priority: Priority
    result: Result
    now: datetime


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a letter.

    ``permanent``: it will be refused again until someone acts. ``away``: the peer took no letter at all,
    which says nothing of this one. ``said``: the peer's own words, which may name a patient: never for a
    log. ``retry_after``: that HTTP header, as it came.
    """

    sent: bool
    permanent: bool = False
    error: str = ""
    away: bool = False
    said: str = ""
    retry_after: str = ""


SENT = Outcome(True)
LONGEST_WORDS = 200


def words(said: str) -> str:
    """A peer's words, fit for one line of a list: neither long nor able to steer a terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in said).split())[:LONGEST_WORDS]


def why(error: Exception, timeout: float) -> str:
    """In plain words why a connection failed; a library's error is judged by what caused it."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, TimeoutError):
        return f"did not answer within {timeout:g} s"
    if isinstance(cause, ssl.SSLCertVerificationError):
        return f"cannot be trusted: {cause.verify_message}; see its tls.ca"
    if isinstance(cause, ssl.SSLError):
        return f"does not agree on TLS with us: {cause.reason or cause}; see its tls"
    if isinstance(cause, FileNotFoundError):
        return "was not called: a file that its tls names is not there"
    if isinstance(cause, OSError):
        refused = isinstance(cause, ConnectionRefusedError)  # its own text names no more than the address
        return f"cannot be reached: {'connection refused' if refused else cause.strerror or cause}"
    return "ended the connection, or did not keep to the protocol"
