"""The answer as JSON to a program, signed as the Standard Webhooks specification has it.

Headers ``webhook-id``, ``webhook-timestamp`` and ``webhook-signature``: ``v1,`` and the Base64 of the
HMAC-SHA256 of ``id.timestamp.body`` (https://www.standardwebhooks.com, specification 1.0.0).
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import ssl
from typing import Any

import httpx

from triage import rows
from triage.config import Webhook
from triage.outgoing.letters import SENT, Letter, Outcome, why, words

TRY_AGAIN = (408, 425, 429)
"""Besides 5xx: statuses with which a server says that the same request may succeed later."""
AWAY = (401, 403, 404, 502, 503, 504)
"""Statuses of a program that is not there or does not let us in: they say nothing of this letter."""


def send(letter: Letter, destination: Webhook, timeout_seconds: float) -> Outcome:
    """POST the letter; sent is only what was answered with 2xx. Redirects are not followed."""
    body = json.dumps(document(letter), ensure_ascii=False).encode()
    timestamp = str(int(letter.now.timestamp()))
    headers = {
        "content-type": "application/json",
        "webhook-id": letter.identity,
        "webhook-timestamp": timestamp,
        "webhook-signature": signature(destination.secret, letter.identity, timestamp, body),
    }
    try:
        with (
            _client(destination, timeout_seconds) as client,
            client.stream("POST", destination.url, content=body, headers=headers) as answer,
        ):
            return _outcome(answer, destination)
    except (httpx.HTTPError, OSError) as error:
        away = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | OSError)
        return Outcome(False, error=f"{_named(destination)} {why(error, timeout_seconds)}", away=away)


def _outcome(answer: httpx.Response, destination: Webhook) -> Outcome:
    code = answer.status_code
    if 200 <= code < 300:
        return SENT
    return Outcome(
        False,
        permanent=code < 500 and code not in TRY_AGAIN,
        error=f"{_named(destination)} refused: HTTP {code}",
        away=code in AWAY,
        said=words(answer.reason_phrase),
        retry_after=answer.headers.get("retry-after", ""),
    )


def reach(destination: Webhook, timeout_seconds: float) -> str | None:
    """None when something answers there, whatever it says to a GET; otherwise what is wrong."""
    try:
        with _client(destination, timeout_seconds) as client, client.stream("GET", destination.url):
            return None
    except (httpx.HTTPError, OSError) as error:
        return f"{_named(destination)} {why(error, timeout_seconds)}"


def document(letter: Letter) -> dict[str, Any]:
    """The answer as ``triage predict --json`` has it, without paths; and the study's place on the list."""
    row = rows.result_row(letter.result)
    del row["files"]
    return {
        **row,
        "accession_number": letter.study.accession_number,
        "study_date": letter.study.study_date,
        "study_description": letter.study.study_description,
        "band": letter.priority.band.label,
        "due_at": letter.priority.due_at.isoformat(),
        "arrived_at": letter.study.arrived_at.isoformat(),
        "closed": letter.study.closed_at is not None,
    }


def signature(secret: str, identity: str, timestamp: str, body: bytes) -> str:
    signed = b".".join((identity.encode(), timestamp.encode(), body))
    return "v1," + base64.b64encode(hmac.digest(secret.encode(), signed, hashlib.sha256)).decode()


def _client(destination: Webhook, timeout: float) -> httpx.Client:
    verify: ssl.SSLContext | bool = destination.tls.context() if destination.tls else True
    return httpx.Client(verify=verify, timeout=timeout, trust_env=False)


def _named(destination: Webhook) -> str:
    return f"destination {destination.name}"
