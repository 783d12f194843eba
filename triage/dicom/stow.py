"""STOW-RS (PS3.18 section 10.5): files as they lie on the disk → a DICOMweb archive, one request for each.

An archive that refuses, stalls or is not there never raises: what it did not acknowledge is not sent.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import cast

import pydicom
import requests
from dicomweb_client.web import DICOMwebClient
from urllib3.exceptions import MaxRetryError

from triage.config import DicomWeb, WebSource
from triage.dicom.sender import UNREADABLE, SendOutcome, unreadable
from triage.dicom.status import explain_refusal

for _library in ("dicomweb_client", "retrying"):
    logging.getLogger(_library).setLevel(logging.CRITICAL)  # we say what failed, and with whom

TRY_AGAIN = (408, 425, 429)
"""Besides 5xx: statuses with which a server says that the same request may succeed later."""
AWAY = (401, 403, 404, 502, 503, 504)
"""Statuses of an archive that is not there or does not let us in: they say nothing of this object."""
CONFLICT = 409
UNUSABLE = (requests.RequestException, OSError, ValueError, LookupError, SyntaxError)
"""What the client raises without a connection, and for an answer that is no DICOMweb."""


class _Bearer(requests.auth.AuthBase):
    def __init__(self, token: str) -> None:
        self._token = token

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {self._token}"
        return request


def send(objects: Sequence[Path], destination: DicomWeb, timeout_seconds: float) -> list[SendOutcome]:
    """Store each file; one outcome for each, in the order given.

    Where the connection ends at one file, or it is refused for now, only that one has failed, and what comes
    after it is not tried.
    """
    outcomes: list[SendOutcome] = []
    ended = ""
    with client_of(destination, timeout_seconds) as client:
        for path in objects:
            if ended:
                outcomes.append(SendOutcome(path, False, error=ended, tried=False))
                continue
            try:
                outcome = _store(client, path, destination)
            except UNUSABLE as error:
                reason = f"{_named(destination)} {why(error, timeout_seconds)}"
                outcome = SendOutcome(path, False, error=reason, away=_is_away(error))
            if not outcome.sent and (outcome.away or not outcome.permanent):
                ended = outcome.error
            outcomes.append(outcome)
    return outcomes


def reach(destination: DicomWeb, timeout_seconds: float) -> str | None:
    """None when the archive answers a search of one study, otherwise what is wrong."""
    try:
        with client_of(destination, timeout_seconds) as client:
            client.search_for_studies(limit=1)
    except requests.HTTPError as error:
        return _refusal(Path(), error, destination).error
    except UNUSABLE as error:
        return f"{_named(destination)} {why(error, timeout_seconds)}"
    return None


def _store(client: DICOMwebClient, path: Path, destination: DicomWeb) -> SendOutcome:
    try:
        dataset = pydicom.dcmread(path)
        uid = dataset.SOPInstanceUID
    except UNREADABLE as error:
        return unreadable(path, error)
    try:
        answer = client.store_instances([dataset])
    except requests.HTTPError as error:
        return _refusal(path, error, destination)
    if any(item.get("ReferencedSOPInstanceUID") == uid for item in answer.get("ReferencedSOPSequence") or ()):
        return SendOutcome(path, True)
    return _failed(path, answer, destination)


def _failed(path: Path, answer: pydicom.Dataset, destination: DicomWeb) -> SendOutcome:
    """What is neither stored nor failed was not acknowledged: a proxy may have answered."""
    failed = answer.get("FailedSOPSequence") or ()
    if not failed:
        text = f"{_named(destination)} did not say that it stored {path.name}; is its url right?"
        return SendOutcome(path, False, error=text)
    permanent, text = explain_refusal(int(failed[0].get("FailureReason") or 0x0110))
    return SendOutcome(path, False, permanent, f"{_named(destination)} refused: {text}")


def _refusal(path: Path, error: requests.HTTPError, destination: DicomWeb) -> SendOutcome:
    """An error status; 409 says that nothing was stored, and its body why (PS3.18 table 10.5.3-1)."""
    answer = cast(requests.Response, error.response)  # the client raises it for an answer
    code = answer.status_code
    if code == CONFLICT:
        with suppress(*UNUSABLE):
            said = pydicom.Dataset.from_json(answer.json())
            if said.get("FailedSOPSequence"):
                return _failed(path, said, destination)
    return SendOutcome(
        path,
        False,
        permanent=code < 500 and code not in TRY_AGAIN,
        error=f"{_named(destination)} refused: HTTP {code}",
        away=code in AWAY,
        said="".join(c for c in str(answer.reason) if c.isprintable())[:200],
        retry_after=answer.headers.get("Retry-After", ""),
    )


@contextmanager
def client_of(peer: DicomWeb | WebSource, timeout: float) -> Iterator[DICOMwebClient]:
    """Tries once, and says when it failed: who asks knows when to try again."""
    with session_of(peer) as session:
        client = DICOMwebClient(peer.url, session, timeout=timeout)
        client.set_http_retry_params(retry=False)
        yield client


@contextmanager
def session_of(peer: DicomWeb | WebSource) -> Iterator[requests.Session]:
    """Lets itself in as the settings say, over TLS that checks who answers."""
    with requests.Session() as session:
        session.max_redirects = 0  # nobody but the settings says where patients' data go
        session.trust_env = False  # what stands in a .netrc would replace our own credentials
        if peer.user:
            session.auth = (peer.user, peer.secret)
        elif peer.secret:
            session.auth = _Bearer(peer.secret)
        if peer.tls is not None:
            ca, certificate, key = peer.tls.ca, peer.tls.certificate, peer.tls.key
            session.verify = str(ca) if ca else True
            session.cert = (str(certificate), str(key)) if certificate and key else None
        yield session


def _is_away(error: Exception) -> bool:
    """True where there was no connection; one that broke says nothing of what comes next."""
    return isinstance(error, requests.ConnectionError) and isinstance(error.args[0], MaxRetryError)


def why(error: Exception, timeout: float) -> str:
    """What UNUSABLE means for the peer."""
    if isinstance(error, requests.Timeout):
        return f"did not answer within {timeout:g} s"
    if isinstance(error, requests.exceptions.SSLError):
        return "does not agree on TLS with us, or cannot be trusted; see its tls"
    if isinstance(error, requests.ConnectionError):
        return "cannot be reached, or ended the connection"
    return f"cannot be used: {error}"


def _named(destination: DicomWeb) -> str:
    return f"destination {destination.name} at {destination.url}"
