"""The answer as a letter to the on-call, by SMTP. Mail is readable on its way: no name, no patient ID."""

from __future__ import annotations

import smtplib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from email.message import EmailMessage

from triage.config import Email
from triage.outgoing.letters import SENT, Letter, Outcome, why, words

UNAVAILABLE = 421


def send(letter: Letter, destination: Email, timeout_seconds: float) -> Outcome:
    """Hand the letter to the mail server; sent is only what it took in charge."""
    try:
        with _server(destination, timeout_seconds) as server:
            server.send_message(compose(letter, destination))
    except (smtplib.SMTPException, OSError) as error:
        return _failure(error, destination, timeout_seconds)
    return SENT


def reach(destination: Email, timeout_seconds: float) -> str | None:
    """None when the mail server answers and lets us in; otherwise what is wrong."""
    try:
        with _server(destination, timeout_seconds):
            return None
    except (smtplib.SMTPException, OSError) as error:
        return _failure(error, destination, timeout_seconds).error


def compose(letter: Letter, destination: Email) -> EmailMessage:
    """Urgency first; the reader finds the study by its accession number."""
    study, result, place = letter.study, letter.result, letter.priority
    accession_number = words(study.accession_number)
    which = accession_number or study.study_instance_uid
    again = f", revision {result.revision}: earlier answers are out of date" if result.revision > 1 else ""
    message = EmailMessage()
    message["Subject"] = f"{place.band.label}: chest CT {which}"
    message["From"] = destination.sender
    message["To"] = destination.to
    message["Date"] = letter.now
    message["Message-ID"] = f"<{letter.identity}@{destination.sender.rpartition('@')[2]}>"
    message["Auto-Submitted"] = "auto-generated"
    if place.band.label in ("critical", "severe"):
        message["X-Priority"] = "1"
    message.set_content(
        f"{result.status.value.replace('_', ' ')}{again}\n"
        f"{place.reason}\n\n"
        f"Accession number: {accession_number or 'none'}\n"
        f"Study date: {words(study.study_date) or 'unknown'}\n"
        f"Study Instance UID: {study.study_instance_uid}\n"
        f"To be read by: {place.due_at:%Y-%m-%d %H:%M} UTC\n\n"
        "Written by triage, research use, not a medical device. Read the study whatever this says.\n"
    )
    return message


@contextmanager
def _server(destination: Email, timeout: float) -> Iterator[smtplib.SMTP]:
    """A mail server that has let us in. What it says to our goodbye changes nothing of what it took."""
    server = smtplib.SMTP(destination.host, destination.port, timeout=timeout)
    try:
        if destination.tls is not None:
            server.starttls(context=destination.tls.context())
        if destination.user:
            server.login(destination.user, destination.secret)
        yield server
        with suppress(smtplib.SMTPException, OSError):
            server.quit()
    finally:
        server.close()


def _failure(error: Exception, destination: Email, timeout: float) -> Outcome:
    """4yz is said to be for now, 5yz for good; 421: the service is not there (RFC 5321, section 4.2).

    Who does not let us in says nothing of this letter.
    """
    name = _named(destination)
    match error:
        case smtplib.SMTPRecipientsRefused():
            ((code, _),) = error.recipients.values()
            return Outcome(False, code >= 500, f"{name} refused the address: SMTP {code}")
        case smtplib.SMTPResponseException(smtp_code=code, smtp_error=said):
            text = said.decode(errors="replace") if isinstance(said, bytes) else said
            refused = f"{name} refused: SMTP {code}"
            away = code == UNAVAILABLE or isinstance(error, smtplib.SMTPAuthenticationError)
            return Outcome(False, code >= 500, refused, away=away, said=words(text))
        case smtplib.SMTPServerDisconnected():
            return Outcome(
                False, error=f"{name} ended the connection, or did not answer within {timeout:g} s"
            )
        case smtplib.SMTPNotSupportedError():
            return Outcome(False, True, f"{name}: {error}; see its tls and user", away=True)
    return Outcome(False, error=f"{name} {why(error, timeout)}", away=True)


def _named(destination: Email) -> str:
    return f"destination {destination.name} at {destination.host}:{destination.port}"
