"""DICOMweb client (PS3.18 chapter 10): QIDO-RS says what an archive has, WADO-RS fetches it; as ``query``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from io import BytesIO
from typing import Any

import pydicom
import requests
from dicomweb_client.web import DICOMwebClient
from pydicom.dataset import Dataset

from triage.config import WebSource
from triage.dicom import header, spool
from triage.dicom.query import Offered, Query, is_ct_image, offered
from triage.dicom.receiving import Receiver
from triage.errors import ConfigError, Rejected, Retryable, TriageError

logging.getLogger("dicomweb_client").setLevel(logging.CRITICAL)  # we say what failed, and with whom

AS_STORED = (("application/dicom", "*"),)
TRY_AGAIN = (408, 425, 429)


class Web:
    """An archive that speaks DICOMweb."""

    def __init__(self, source: WebSource, timeout_seconds: float) -> None:
        session = requests.Session()
        if source.user:
            session.auth = (source.user, source.secret)
        elif source.secret:
            session.headers["Authorization"] = f"Bearer {source.secret}"
        self._client = DICOMwebClient(source.url, session=session, timeout=timeout_seconds)
        self._client.set_http_retry_params(retry=False)
        self._named = f"source {source.name} at {source.url}"

    def studies(self, query: Query) -> list[Offered]:
        """The studies with CT images that match."""
        asked = replace(query, study_description="")  # archives differ on wildcards: compared here
        filters = {keyword: value for keyword, value in asked.keys().items() if value}
        with self._plain_faults():
            fields = ["StudyDescription", "ModalitiesInStudy"]
            search = partial(self._client.search_for_studies, search_filters=filters, fields=fields)
            found = _all(search, "StudyInstanceUID")
            return [offered(answer) for answer in found if query.admits(answer)]

    def images(self, study_instance_uid: str) -> dict[str, list[str]]:
        """Series → SOP Instance UIDs of the study's CT images; empty when the archive does not have it."""
        images = {}
        with self._plain_faults():
            only = {"Modality": "CT"}
            search = partial(self._client.search_for_series, study_instance_uid, search_filters=only)
            for series in (str(answer.SeriesInstanceUID) for answer in _all(search, "SeriesInstanceUID")):
                search = partial(self._client.search_for_instances, study_instance_uid, series)
                listed = _all(search, "SOPInstanceUID")
                images[series] = [str(x.SOPInstanceUID) for x in listed if is_ct_image(x)]
        return images

    def fetch(
        self, study_instance_uid: str, wanted: Mapping[str, Sequence[str]], take: Receiver
    ) -> Iterator[int]:
        """Fetch the images one by one into ``take``; yields 1 for each."""
        for series, uids in wanted.items():
            for uid in uids:
                with self._plain_faults():
                    image = self._client.retrieve_instance(study_instance_uid, series, uid, AS_STORED)
                    raw, transfer_syntax_uid = _bytes(image)
                take.keep(raw, spool.read(raw, transfer_syntax_uid), source="")
                yield 1

    @contextmanager
    def _plain_faults(self) -> Iterator[None]:
        try:
            yield
        except requests.HTTPError as error:
            raise self._fault(0 if error.response is None else error.response.status_code) from error
        except (requests.RequestException, *header.BROKEN) as error:
            what = (
                "cannot be reached" if isinstance(error, requests.ConnectionError) else "did not answer well"
            )
            raise Retryable(f"{self._named} {what}: {type(error).__name__}") from error

    def _fault(self, status: int) -> TriageError:
        if status in (401, 403):
            return ConfigError(f"{self._named} does not let us in (HTTP {status}): see its user and secret")
        if status in TRY_AGAIN or status >= 500:
            return Retryable(f"{self._named} is busy or broken (HTTP {status})")
        return Rejected(f"{self._named} refused (HTTP {status}); is the url right?")


def _all(search: Callable[..., Sequence[Mapping[str, Any]]], key: str) -> list[Dataset]:
    """Page after page, until one brings nothing new: some archives ignore the offset."""
    found: dict[str, Dataset] = {}
    while True:
        before = len(found)
        for answer in search(offset=before) if before else search():
            dataset = Dataset.from_json(dict(answer))
            found.setdefault(str(dataset[key].value), dataset)
        if len(found) == before:
            return list(found.values())


def _bytes(image: Dataset) -> tuple[bytes, str]:
    """The data set without file meta information, and its transfer syntax."""
    buffer = BytesIO()
    pydicom.dcmwrite(buffer, image, enforce_file_format=True)
    transfer_syntax_uid, body = header.split(buffer.getvalue())
    return bytes(body), transfer_syntax_uid
