"""DICOMweb client (PS3.18 chapter 10): QIDO-RS says what an archive has, WADO-RS fetches it; as ``query``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from email.message import Message
from functools import partial
from time import monotonic
from typing import Any

import requests
from dicomweb_client.web import DICOMwebClient
from pydicom.dataset import Dataset

from triage.config import WebSource
from triage.dicom import header, spool
from triage.dicom.query import LONGEST, NO_STUDY, Offered, Query, is_ct_image, offered, told
from triage.dicom.receiving import Receiver
from triage.dicom.stow import TRY_AGAIN, client_of, session_of, why
from triage.domain import Instance
from triage.errors import ConfigError, Rejected, Retryable, TriageError

AS_STORED = 'multipart/related; type="application/dicom"; transfer-syntax=*'
LARGEST_ANSWER = 2 * 1024**3
"""Bytes; what an archive sends beyond that is no image."""
MOST_ANSWERS = 100_000
"""To one query; an archive that pages on and on is no better than a silent one."""


class Web:
    """An archive that speaks DICOMweb."""

    def __init__(self, source: WebSource, timeout_seconds: float) -> None:
        self._source = source
        self._timeout = timeout_seconds
        self._named = f"source {source.name} at {source.url}"

    def reach(self) -> str:
        """How it answers; a fault of it is raised as always."""
        with self._client() as client:
            client.search_for_studies(search_filters={"StudyInstanceUID": NO_STUDY}, limit=1)
        return f"DICOMweb at {self._source.url} answers QIDO-RS"

    def studies(self, query: Query) -> list[Offered]:
        """The studies with CT images that match."""
        asked = replace(query, study_description="")  # archives differ on wildcards: compared here
        filters = {keyword: value for keyword, value in asked.keys().items() if value}
        with self._client() as client:
            fields = ["StudyDescription", "ModalitiesInStudy"]
            search = partial(client.search_for_studies, search_filters=filters, fields=fields)
            found = self._all(search, "StudyInstanceUID")
            return [offered(answer) for answer in found if query.admits(answer)]

    def images(self, study_instance_uid: str) -> dict[str, list[str]]:
        """Series → SOP Instance UIDs of the study's CT images; empty when the archive does not have it."""
        images = {}
        with self._client() as client:
            only = {"Modality": "CT"}
            search = partial(client.search_for_series, study_instance_uid, search_filters=only)
            for series in (
                told(answer, "SeriesInstanceUID") for answer in self._all(search, "SeriesInstanceUID")
            ):
                search = partial(client.search_for_instances, study_instance_uid, series)
                listed = self._all(search, "SOPInstanceUID")
                images[series] = [told(image, "SOPInstanceUID") for image in listed if is_ct_image(image)]
        return images

    def fetch(
        self, study_instance_uid: str, wanted: Mapping[str, Sequence[str]], take: Receiver
    ) -> Iterator[int]:
        """Fetch the images one by one into ``take``; yields 1 for each.

        An image that the archive cannot give holds up no other; raises the first such fault in the end.
        """
        first: Rejected | None = None
        with session_of(self._source) as session:
            for series, uid in ((series, uid) for series, uids in wanted.items() for uid in uids):
                try:
                    raw, instance = self._image(session, study_instance_uid, series, uid)
                except Rejected as fault:
                    first = first or fault
                    continue
                take.keep(raw, instance, source="")
                yield 1
        if first is not None:
            raise first

    def _image(self, session: requests.Session, study: str, series: str, uid: str) -> tuple[bytes, Instance]:
        """As the archive keeps it, byte for byte: the same image by C-STORE is then known for the same."""
        path = f"studies/{study}/series/{series}/instances/{uid}"
        with self._plain_faults():
            content = _read(session, f"{self._source.url.rstrip('/')}/{path}", self._timeout)
        try:
            transfer_syntax_uid, body = header.split(content)
            raw = bytes(body)
            instance = spool.read(raw, transfer_syntax_uid)
        except Rejected as fault:
            raise Rejected(f"{self._named} sent for {uid} what is no image: {fault}") from fault
        if (instance.study_instance_uid, instance.sop_instance_uid) != (study, uid):
            raise Rejected(f"{self._named} sent {instance.sop_instance_uid} where {uid} was asked for")
        return raw, instance

    def _all(self, search: Callable[..., Sequence[Mapping[str, Any]]], key: str) -> list[Dataset]:
        """Page after page, until one brings nothing new: some archives ignore the offset."""
        found: dict[str, Dataset] = {}
        ends = monotonic() + LONGEST * self._timeout
        while True:
            before = len(found)
            for answer in search(offset=before) if before else search():
                dataset = Dataset.from_json(dict(answer))
                found.setdefault(told(dataset, key), dataset)
            if len(found) == before:
                return list(found.values())
            if len(found) > MOST_ANSWERS:
                raise Retryable(f"{self._named} has more than {MOST_ANSWERS} answers; ask for less at once")
            if monotonic() > ends:
                raise Retryable(f"{self._named} is too slow: its answers took {LONGEST * self._timeout:g} s")

    @contextmanager
    def _client(self) -> Iterator[DICOMwebClient]:
        with self._plain_faults(), client_of(self._source, self._timeout) as client:
            yield client

    @contextmanager
    def _plain_faults(self) -> Iterator[None]:
        try:
            yield
        except requests.HTTPError as error:
            raise self._fault(0 if error.response is None else error.response.status_code) from error
        except requests.exceptions.InvalidJSONError as error:
            raise Retryable(f"{self._named} did not answer well: no JSON") from error
        except requests.RequestException as error:
            raise Retryable(f"{self._named} {why(error, self._timeout)}") from error
        except OSError as error:
            raise ConfigError(f"{self._named}: a file of its tls cannot be used: {error}") from error
        except header.BROKEN as error:  # not its text, which may quote what the archive said
            raise Retryable(f"{self._named} did not answer well: {type(error).__name__}") from error

    def _fault(self, status: int) -> TriageError:
        if status in (401, 403):
            return ConfigError(f"{self._named} does not let us in (HTTP {status}): see its user and secret")
        if status in TRY_AGAIN or status > 500:
            return Retryable(f"{self._named} is busy or broken (HTTP {status})")
        if status == 500:
            return Rejected(f"{self._named} failed (HTTP 500); see its log")
        return Rejected(f"{self._named} refused (HTTP {status}); is the url right?")


def _read(session: requests.Session, url: str, timeout: float) -> bytes:
    """The one object of an answer; an archive that drips or never ends is let go."""
    content = bytearray()
    ends = monotonic() + LONGEST * timeout
    # Images hardly shrink, and an Orthanc that packs them is eight times slower.
    headers = {"Accept": AS_STORED, "Accept-Encoding": "identity"}
    with session.get(url, headers=headers, timeout=timeout, stream=True) as answer:
        answer.raise_for_status()
        for piece in answer.iter_content(1024**2):
            content += piece
            if len(content) > LARGEST_ANSWER or monotonic() > ends:
                raise Retryable(f"an answer of {url} is too long, or too slow")
    return _only_part(answer.headers.get("Content-Type", ""), bytes(content))


def _only_part(content_type: str, content: bytes) -> bytes:
    """What a multipart/related message carries (RFC 2387); some servers send the object as it is."""
    message = Message()
    message["Content-Type"] = content_type
    boundary = message.get_boundary()
    if boundary is None:
        return content
    delimiter = b"--" + boundary.encode("latin-1")
    part, end, _ = content.partition(delimiter)[2].partition(b"\r\n" + delimiter)
    _, blank_line, body = part.partition(b"\r\n\r\n")
    if not (end and blank_line):
        raise Rejected("the answer is cut off")
    return body
