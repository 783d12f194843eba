"""Query/Retrieve SCU, Study Root (PS3.4 annex C): C-FIND says what an archive has; C-GET or C-MOVE fetch it.

Only CT images: nothing else is judged. An archive that is not there raises Retryable; what somebody must set
first, here or there, ConfigError; what it will refuse again, Rejected.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
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
from pynetdicom import AE, build_role, evt
from pynetdicom.association import Association
from pynetdicom.presentation import PresentationContext, build_context
from pynetdicom.transport import AddressInformation, AssociationSocket

from triage.config import DicomSource
from triage.dicom.receiving import Receiver
from triage.dicom.series import CT_IMAGE, MULTI_FRAME_CT
from triage.dicom.status import explain_refusal, explain_rejection
from triage.dicom.upper_layer import ClosingSocket, close, guard
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

SUCCESS, PENDING, SOME_FAILED = 0x0000, (0xFF00, 0xFF01), 0xB000
NOT_ALLOWED = (0x0122, 0x0124)
UNKNOWN_DESTINATION = 0xA801


@dataclass(frozen=True, slots=True)
class Query:
    """What to look for; "" is any. ``description`` may contain * and ?, and is otherwise a part of it."""

    study_date: str = ""
    """A day or a range (PS3.4 C.2.2.2.5): 20260301, 20260301-20260331, 20260301-."""
    study_description: str = ""
    patient_id: str = ""
    accession_number: str = ""
    study_instance_uid: str = ""

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


@dataclass(frozen=True, slots=True)
class Offered:
    """A study that an archive has."""

    study_instance_uid: str
    patient_id: str
    study_date: str
    study_description: str


def offered(answer: Dataset) -> Offered:
    texts = (
        str(answer.get(keyword) or "")
        for keyword in ("StudyInstanceUID", "PatientID", "StudyDate", "StudyDescription")
    )
    return Offered(*texts)


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

    def studies(self, query: Query) -> list[Offered]:
        """The studies with CT images that match."""
        return [offered(answer) for answer in self._find("STUDY", **query.keys()) if query.admits(answer)]

    def images(self, study_instance_uid: str) -> dict[str, list[str]]:
        """Series → SOP Instance UIDs of the study's CT images; empty when the archive does not have it."""
        study = {"StudyInstanceUID": study_instance_uid}
        found = {}
        for series in self._find("SERIES", **study, SeriesInstanceUID="", Modality="CT"):
            if series.get("Modality", "CT") == "CT":
                uid = str(series.SeriesInstanceUID)
                keys = {**study, "SeriesInstanceUID": uid, "SOPInstanceUID": "", "SOPClassUID": ""}
                found[uid] = [str(x.SOPInstanceUID) for x in self._find("IMAGE", **keys) if is_ct_image(x)]
        return found

    def fetch(
        self, study_instance_uid: str, wanted: Mapping[str, Sequence[str]], take: Receiver
    ) -> Iterator[int]:
        """Let the images come; yields how many more have. C-GET where the archive offers it, else C-MOVE.

        By C-GET they go to ``take``; by C-MOVE the archive sends them to our listener, which must run.
        """
        study = {"StudyInstanceUID": study_instance_uid}
        requests = [
            _request("IMAGE", **study, SeriesInstanceUID=series, SOPInstanceUID=list(uids[at : at + AT_ONCE]))
            for series, uids in wanted.items()
            for at in range(0, len(uids), AT_ONCE)
        ]
        retrieve = self._source.retrieve
        contexts = [build_context(MOVE)] if retrieve != "get" else []
        if retrieve != "move":
            contexts += [build_context(GET)]
            contexts += [build_context(uid, syntax) for uid in CT_CLASSES for syntax in SYNTAXES]
        with self._associated(contexts, take) as association:
            accepted = {context.abstract_syntax for context in association.accepted_contexts}
            for request in requests:
                if GET in accepted:
                    yield from self._until_done(association.send_c_get(request, GET))
                elif MOVE in accepted:
                    yield from self._until_done(association.send_c_move(request, self._ae_title, MOVE))
                else:
                    raise ConfigError(f"{self._named} offers neither C-GET nor C-MOVE to {self._ae_title}")

    def _find(self, level: str, **keys: str) -> list[Dataset]:
        answers = []
        with self._associated([build_context(FIND)]) as association:
            for status, answer in association.send_c_find(_request(level, **keys), FIND):
                code = self._code(status)
                if code in PENDING and answer is not None:
                    answers.append(answer)
                elif code != SUCCESS:
                    raise self._fault(code)
        return answers

    def _until_done(self, responses: Iterator[tuple[Dataset, Dataset | None]]) -> Iterator[int]:
        done = 0
        for status, _ in responses:
            code = self._code(status)
            completed = int(status.get("NumberOfCompletedSuboperations") or 0)
            yield max(completed - done, 0)
            done = max(completed, done)
            failed = int(status.get("NumberOfFailedSuboperations") or 0)
            if code == SOME_FAILED or (failed and code not in PENDING):
                raise Retryable(
                    f"{self._named} could not send {failed} images: by C-MOVE our listener must run, and "
                    f"the archive know {self._ae_title} with our address and listener.port; else see its log"
                )
            if code not in (*PENDING, SUCCESS):
                raise self._fault(code)

    def _code(self, status: Dataset) -> int:
        if "Status" not in status:
            raise Retryable(f"{self._named} ended the association, or did not answer in {self._timeout:g} s")
        return int(status.Status)

    def _fault(self, code: int) -> TriageError:
        if code == UNKNOWN_DESTINATION:
            return ConfigError(
                f"{self._named} does not know {self._ae_title} as a C-MOVE destination (0x{code:04X}): "
                "add it there, with our address and listener.port"
            )
        permanent, text = explain_refusal(code)
        kind = ConfigError if code in NOT_ALLOWED else Rejected if permanent else Retryable
        return kind(f"{self._named} refused: {text}")

    @contextmanager
    def _associated(
        self, contexts: list[PresentationContext], take: Receiver | None = None
    ) -> Iterator[Association]:
        ae = _Caller(self._ae_title)
        ae.connection_timeout = ae.acse_timeout = ae.dimse_timeout = self._timeout
        ae.network_timeout = None  # the guarded socket and the timeouts above bound every wait
        handlers: list[Any] = [(evt.EVT_CONN_OPEN, guard, [self._timeout])]
        if take is not None:
            handlers.append((evt.EVT_C_STORE, take.on_store))
        try:
            association = ae.associate(
                self._source.host,
                self._source.port,
                contexts,
                ae_title=self._source.ae_title,
                ext_neg=[build_role(uid, scp_role=True) for uid in CT_CLASSES] if take is not None else None,
                evt_handlers=handlers,
            )
        except OSError as error:
            raise Retryable(f"{self._named} cannot be found: {error}") from error
        try:
            if not association.is_established:
                raise self._why_not(association)
            yield association
        finally:
            association.release()
            close(association)

    def _why_not(self, association: Association) -> TriageError:
        answer = association.acceptor.primitive
        if association.is_rejected and answer is not None:
            reason = explain_rejection(answer.result_source, answer.diagnostic)
            kind = Retryable if answer.result_source == 3 else ConfigError
            return kind(f"{self._named} refused the association of {self._ae_title}: {reason}")
        if association.rejected_contexts:
            return ConfigError(f"{self._named} allows {self._ae_title} no query or retrieval; allow it there")
        return Retryable(f"{self._named} cannot be reached, or did not answer in {self._timeout:g} s")


class _Caller(AE):
    def _create_socket(
        self,
        assoc: Association,
        address: AddressInformation,
        tls_args: Any,  # noqa: ARG002 - no TLS yet
    ) -> AssociationSocket:
        return ClosingSocket(assoc, address=address)


def _request(level: str, **keys: Any) -> Dataset:
    request = Dataset()
    request.QueryRetrieveLevel = level
    if not str(keys).isascii():
        request.SpecificCharacterSet = "ISO_IR 192"
    for keyword, value in keys.items():
        setattr(request, keyword, value)
    return request
