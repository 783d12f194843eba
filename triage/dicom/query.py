"""Query/Retrieve SCU, Study Root (PS3.4 annex C): C-FIND says what an archive has; C-GET or C-MOVE fetch it.

Only CT images: nothing else is judged. An archive that is not there raises Retryable; what somebody must set
first, here or there, ConfigError; what it will refuse again, Rejected.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from fnmatch import fnmatchcase
from time import monotonic
from typing import Any

from pydicom.dataset import Dataset
from pydicom.uid import (
    HTJ2K,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    JPEG2000TransferSyntaxes,
    JPEGLSTransferSyntaxes,
    JPEGTransferSyntaxes,
    RLETransferSyntaxes,
    UncompressedTransferSyntaxes,
)
from pynetdicom import build_role, evt
from pynetdicom.association import Association
from pynetdicom.presentation import PresentationContext, build_context

from triage.config import DicomSource
from triage.dicom import header
from triage.dicom.receiving import Receiver
from triage.dicom.sender import Gone, associated
from triage.dicom.series import CT_IMAGE, MULTI_FRAME_CT
from triage.dicom.status import explain_refusal
from triage.errors import ConfigError, Rejected, Retryable, TriageError

FIND = "1.2.840.10008.5.1.4.1.2.2.1"
MOVE = "1.2.840.10008.5.1.4.1.2.2.2"
GET = "1.2.840.10008.5.1.4.1.2.2.3"
CT_CLASSES = (CT_IMAGE, *MULTI_FRAME_CT)
SYNTAXES = [
    *UncompressedTransferSyntaxes,
    *JPEGTransferSyntaxes,
    *JPEGLSTransferSyntaxes,
    *JPEG2000TransferSyntaxes,
    *RLETransferSyntaxes,
    *(HTJ2K, HTJ2KLossless, HTJ2KLosslessRPCL),
]
"""Every image comes as the archive keeps it; with three classes well below 128 presentation contexts."""
AT_ONCE = 100
"""Images asked for in one request."""

LONGEST = 10
"""Timeouts that all answers to one query may take; an archive that drips is no better than a silent one."""
NO_STUDY = "2.25.0"
"""A valid UID (PS3.5 section B.2) that nobody gave a study."""

SUCCESS, PENDING, SOME_FAILED = 0x0000, (0xFF00, 0xFF01), 0xB000
NOT_ALLOWED = (0x0122, 0x0124)
UNKNOWN_DESTINATION = 0xA801


@dataclass(frozen=True, slots=True)
class Query:
    """What to look for; "" is any. ``description`` may contain * and ?, and is otherwise a part of it.

    Raises ConfigError for a ``study_date`` that is none: an archive would only find nothing.
    """

    study_date: str = ""
    """A day or a range (PS3.4 C.2.2.2.5): 20260301, 20260301-20260331, 20260301-."""
    study_description: str = ""
    patient_id: str = ""
    accession_number: str = ""
    study_instance_uid: str = ""

    def __post_init__(self) -> None:
        if self.study_date and not _is_range(self.study_date):
            raise ConfigError(
                f"{self.study_date} is no study date or range: write 20260301, "
                "or from the earlier to the later day 20260301-20260331, 20260301-, -20260331"
            )

    def keys(self) -> dict[str, str]:
        """Attribute → value to match; "" only asks for the value."""
        return {
            "StudyDate": self.study_date,
            "StudyDescription": self._pattern(),
            "PatientID": self.patient_id,
            "AccessionNumber": self.accession_number,
            "StudyInstanceUID": self.study_instance_uid,
            "ModalitiesInStudy": "CT",
        }

    def admits(self, answer: Dataset) -> bool:
        """Archives may ignore keys that are optional for them (PS3.4 table C.6-5)."""
        modalities = str(answer.get("ModalitiesInStudy") or "CT")
        description = str(answer.get("StudyDescription") or "").casefold()
        return "CT" in modalities and fnmatchcase(description, self._pattern().casefold() or "*")

    def _pattern(self) -> str:
        text = self.study_description
        return f"*{text}*" if text and not {"*", "?"} & set(text) else text


def _is_range(text: str) -> bool:
    """One or two existing days, the earlier first; of two one may be left out."""
    days = list(filter(None, text.split("-", 1)))
    try:
        real = [f"{datetime.strptime(day, '%Y%m%d'):%Y%m%d}" for day in days]
    except ValueError:
        return False
    return bool(days) and days == sorted(real)


@dataclass(frozen=True, slots=True)
class Offered:
    """A study that an archive has."""

    study_instance_uid: str
    patient_id: str
    study_date: str
    study_description: str


def offered(answer: Dataset) -> Offered:
    texts = (str(answer.get(keyword) or "") for keyword in ("PatientID", "StudyDate", "StudyDescription"))
    return Offered(told(answer, "StudyInstanceUID"), *texts)


def is_ct_image(answer: Dataset) -> bool:
    """True also where the archive does not say the SOP class."""
    return str(answer.get("SOPClassUID") or CT_IMAGE) in CT_CLASSES


class Pacs:
    """An archive that speaks DIMSE; ``ae_title`` is ours."""

    def __init__(self, source: DicomSource, ae_title: str, timeout_seconds: float) -> None:
        self._source = source
        self._ae_title = ae_title
        self._timeout = timeout_seconds
        self._named = f"source {source.name} at {source.host}:{source.port}"

    def reach(self) -> str:
        """How it answers and how images would come; a fault of it is raised as always."""
        nothing = {"StudyInstanceUID": NO_STUDY}
        with self._associated([build_context(uid) for uid in (FIND, *self._ways)]) as link:
            self._find(link, "STUDY", **nothing)
            way = self._way(link)
            if way == MOVE:  # an archive that does not know us says so before it looks for the study
                for status, _ in link.send_c_move(_request("STUDY", **nothing), self._ae_title, MOVE):
                    if status.get("Status", UNKNOWN_DESTINATION) == UNKNOWN_DESTINATION:  # or it just leaves
                        raise self._fault(UNKNOWN_DESTINATION)
        where = f"{self._source.ae_title} at {self._source.host}:{self._source.port}"
        return f"{where} answers C-FIND and offers {'C-GET' if way == GET else 'C-MOVE'}"

    def studies(self, query: Query) -> list[Offered]:
        """The studies with CT images that match."""
        with self._associated([build_context(FIND)]) as link:
            found = self._find(link, "STUDY", **query.keys())
        return [offered(answer) for answer in found if query.admits(answer)]

    def images(self, study_instance_uid: str) -> dict[str, list[str]]:
        """Series → SOP Instance UIDs of the study's CT images; empty when the archive does not have it."""
        study = {"StudyInstanceUID": study_instance_uid}
        found = {}
        with self._associated([build_context(FIND)]) as link:
            for series in self._find(link, "SERIES", **study, SeriesInstanceUID="", Modality="CT"):
                if series.get("Modality", "CT") == "CT":
                    uid = told(series, "SeriesInstanceUID")
                    keys = {**study, "SeriesInstanceUID": uid, "SOPInstanceUID": "", "SOPClassUID": ""}
                    images = self._find(link, "IMAGE", **keys)
                    found[uid] = [told(image, "SOPInstanceUID") for image in images if is_ct_image(image)]
        return found

    def fetch(
        self, study_instance_uid: str, wanted: Mapping[str, Sequence[str]], take: Receiver
    ) -> Iterator[int]:
        """Let the images come; yields how many more have. C-GET where the archive offers it, else C-MOVE.

        By C-GET they go to ``take``; by C-MOVE the archive sends them to our listener, which must run.
        Raises Retryable in the end when some did not come.
        """
        study = {"StudyInstanceUID": study_instance_uid}
        requests = [
            _request("IMAGE", **study, SeriesInstanceUID=series, SOPInstanceUID=list(uids[at : at + AT_ONCE]))
            for series, uids in wanted.items()
            for at in range(0, len(uids), AT_ONCE)
        ]
        contexts = [build_context(uid) for uid in self._ways]
        if GET in self._ways:
            contexts += [build_context(uid, syntax) for uid in CT_CLASSES for syntax in SYNTAXES]
        failed = 0
        with self._associated(contexts, take) as link:
            way = self._way(link)
            for request in requests:
                if way == GET:
                    responses, doubt = link.send_c_get(request, GET), ""
                else:
                    responses = link.send_c_move(request, self._ae_title, MOVE)
                    doubt = (
                        "; does `triage serve` run, and does the archive know "
                        f"{self._ae_title} at our address and port?"
                    )
                failed += yield from self._until_done(responses, doubt)
        if failed:
            images = f"{failed} image{'s' if failed > 1 else ''}"
            raise Retryable(f"{self._named} could not send {images}{doubt or '; see its log'}")

    @property
    def _ways(self) -> tuple[str, ...]:
        """How images may come, the best first."""
        return {"get": (GET,), "move": (MOVE,), "auto": (GET, MOVE)}[self._source.retrieve]

    def _way(self, link: Association) -> str:
        accepted = {context.abstract_syntax for context in link.accepted_contexts}
        for way in self._ways:
            if way in accepted:
                return way
        names = " or ".join("C-GET" if way == GET else "C-MOVE" for way in self._ways)
        raise ConfigError(f"{self._named} does not offer {names} to {self._ae_title}; allow it there")

    def _find(self, link: Association, level: str, **keys: str) -> list[Dataset]:
        answers = []
        ends = monotonic() + LONGEST * self._timeout
        for status, answer in link.send_c_find(_request(level, **keys), FIND):
            code = self._code(status)
            if code in PENDING:
                answers.append(Dataset() if answer is None else answer)
            elif code != SUCCESS:
                raise self._fault(code)
            if monotonic() > ends:
                raise Retryable(f"{self._named} is too slow: its answers took {LONGEST * self._timeout:g} s")
        return answers

    def _until_done(
        self, responses: Iterator[tuple[Dataset, Dataset | None]], doubt: str
    ) -> Generator[int, None, int]:
        """Yields how many more images have come; returns how many failed. A refusal tells the ``doubt``."""
        done = failed = 0
        for status, _ in responses:
            code = self._code(status)
            completed = _number(status, "NumberOfCompletedSuboperations")
            yield max(completed - done, 0)
            done = max(completed, done)
            failed = _number(status, "NumberOfFailedSuboperations")
            if code not in (*PENDING, SUCCESS, SOME_FAILED) and not failed:
                raise self._fault(code, doubt)
        return failed

    def _code(self, status: Dataset) -> int:
        if "Status" not in status:
            ended = f"ended the association, or did not answer in {self._timeout:g} s"
            raise Retryable(f"{self._named} {ended}; does it know {self._ae_title} with our address?")
        return int(status.Status)

    def _fault(self, code: int, doubt: str = "") -> TriageError:
        if code == UNKNOWN_DESTINATION:
            return ConfigError(
                f"{self._named} does not know {self._ae_title} as a C-MOVE destination (0x{code:04X}): "
                "add it there, with our address and listener.port"
            )
        permanent, text = explain_refusal(code)
        kind = ConfigError if code in NOT_ALLOWED else Rejected if permanent else Retryable
        return kind(f"{self._named} refused: {text}{doubt}")

    @contextmanager
    def _associated(
        self, contexts: list[PresentationContext], take: Receiver | None = None
    ) -> Iterator[Association]:
        roles = [build_role(uid, scp_role=True) for uid in CT_CLASSES] if take and GET in self._ways else ()
        handlers = [(evt.EVT_C_STORE, take.on_store)] if take else ()
        try:
            with associated(self._source, contexts, self._ae_title, self._timeout, roles, handlers) as link:
                yield link
        except Gone as error:
            raise (ConfigError if error.refused else Retryable)(str(error)) from error
        except (
            RuntimeError,
            *header.BROKEN,
        ) as error:  # pynetdicom's words for a peer that left, or for noise
            raise Retryable(
                f"{self._named} left, or does not speak DICOM well: {type(error).__name__}"
            ) from error


def told(answer: Dataset, keyword: str) -> str:
    """A UID that an answer must have. Raises Retryable where it has none."""
    uid = str(answer.get(keyword) or "")
    if not header.UID_NAME.fullmatch(uid):
        raise Retryable(f"an archive's answer has no {keyword}: it cannot be used")
    return uid


def _number(status: Dataset, keyword: str) -> int:
    return int(status.get(keyword) or 0)


def _request(level: str, **keys: Any) -> Dataset:
    request = Dataset()
    request.QueryRetrieveLevel = level
    if not str(keys).isascii():
        request.SpecificCharacterSet = "ISO_IR 192"
    for keyword, value in keys.items():
        setattr(request, keyword, value)
    return request
