"""STOW-RS (PS3.18 section 10.5): files as they lie on the disk → a DICOMweb archive, one request for each.

An archive that refuses, stalls or is not there never raises: what it did not acknowledge is not sent.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pydicom
import requests
from dicomweb_client.web import DICOMwebClient
from pydicom.errors import InvalidDicomError

from triage.config import DicomWeb
from triage.dicom.sender import SendOutcome
from triage.dicom.status import explain_refusal

for _library in ("dicomweb_client", "retrying"):
    logging.getLogger(_library).setLevel(logging.CRITICAL)  # we say what failed, and with whom

TRY_AGAIN = (408, 425, 429)
"""Besides 5xx: statuses with which a server says that the same request may succeed later."""
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

    Without a connection all have failed; where it ends at one file, only that one has, and what comes after
    it is not tried.
    """
    outcomes: list[SendOutcome] = []
    ended = ""
    with _client(destination, timeout_seconds) as client:
        for path in objects:
            if ended:
                outcomes.append(SendOutcome(path, False, error=ended, tried=False))
                continue
            try:
                outcomes.append(_store(client, path, destination))
            except UNUSABLE as error:
                ended = f"{_named(destination)} {_why(error, timeout_seconds)}"
                outcomes.append(SendOutcome(path, False, error=ended))
    return outcomes


def reach(destination: DicomWeb, timeout_seconds: float) -> str | None:
    """None when the archive answers a search of one study, otherwise what is wrong."""
    try:
        with _client(destination, timeout_seconds) as client:
            client.search_for_studies(limit=1)
    except requests.HTTPError as error:
        return _refusal(Path(), error, destination).error
    except UNUSABLE as error:
        return f"{_named(destination)} {_why(error, timeout_seconds)}"
    return None


def _store(client: DICOMwebClient, path: Path, destination: DicomWeb) -> SendOutcome:
    try:
        dataset = pydicom.dcmread(path)
    except (OSError, InvalidDicomError) as error:
        return SendOutcome(path, False, True, f"{path.name} cannot be read: {error}")
    try:
        answer = client.store_instances([dataset])
    except requests.HTTPError as error:
        return _refusal(path, error, destination)
    failed = answer.get("FailedSOPSequence") or ()  # Orthanc writes it empty when nothing failed
    if not failed:
        return SendOutcome(path, True)
    permanent, text = explain_refusal(int(failed[0].get("FailureReason") or 0x0110))
    return SendOutcome(path, False, permanent, f"{_named(destination)} refused: {text}")


def _refusal(path: Path, error: requests.HTTPError, destination: DicomWeb) -> SendOutcome:
    answer = error.response
    code = answer.status_code if answer is not None else 0
    transient = code >= 500 or code in TRY_AGAIN
    text = f"{_named(destination)} refused: {error}"
    return SendOutcome(path, False, not transient, text)


@contextmanager
def _client(destination: DicomWeb, timeout: float) -> Iterator[DICOMwebClient]:
    with requests.Session() as session:
        session.trust_env = False  # what stands in a .netrc would replace our own credentials
        if destination.user:
            session.auth = (destination.user, destination.secret)
        elif destination.secret:
            session.auth = _Bearer(destination.secret)
        if destination.tls is not None:
            ca, certificate, key = destination.tls.ca, destination.tls.certificate, destination.tls.key
            session.verify = str(ca) if ca else True
            session.cert = (str(certificate), str(key)) if certificate and key else None
        client = DICOMwebClient(destination.url, session, timeout=timeout)
        client.set_http_retry_params(retry=False)  # the outbox tries again, and knows when
        yield client


def _why(error: Exception, timeout: float) -> str:
    if isinstance(error, requests.Timeout):
        return f"did not answer within {timeout:g} s"
    if isinstance(error, requests.exceptions.SSLError):
        return "does not agree on TLS with us, or cannot be trusted; see its tls"
    if isinstance(error, requests.ConnectionError):
        return "cannot be reached, or ended the connection"
    return f"cannot be used: {error}"


def _named(destination: DicomWeb) -> str:
    return f"destination {destination.name} at {destination.url}"
