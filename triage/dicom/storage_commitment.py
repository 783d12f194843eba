"""Storage Commitment Push Model SCU (PS3.4 annex J): an archive is asked to keep what it took, and answers.

It is asked by N-ACTION. Its answer, an N-EVENT-REPORT, comes soon and on the same association, or later on
one that the archive opens to our listener. Where it stays silent, C-FIND tells whether it has the objects.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import pydicom
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.uid import UID
from pynetdicom import evt
from pynetdicom.association import Association
from pynetdicom.dimse_primitives import N_EVENT_REPORT
from pynetdicom.presentation import PresentationContext, build_context

from triage.config import Destination
from triage.dicom.asking import MATCHES
from triage.dicom.lists import STUDY_ROOT
from triage.dicom.query import LONGEST
from triage.dicom.sender import Gone, associated
from triage.dicom.status import WARNINGS, ReportStatus, explain_refusal
from triage.domain import Delivery, Reference
from triage.errors import Rejected, Retryable, traced

logger = logging.getLogger(__name__)

PUSH_MODEL = UID("1.2.840.10008.1.20.1")
WELL_KNOWN_INSTANCE = UID("1.2.840.10008.1.20.1.1")
REQUEST = 1
"""The one action type."""
ALL_COMMITTED, SOME_FAILED = 1, 2
"""The event types."""
ANSWER_SECONDS = 5.0
"""So long the association of the request is kept open for the answer; a later one comes on its own."""


@dataclass(frozen=True, slots=True)
class Report:
    """What the archive with this AE title says of one transaction; of each object that failed also why."""

    transaction_uid: str
    ae_title: str
    committed: Collection[Reference]
    failed: Mapping[Reference, str]


Take = Callable[[Report], bool]
"""Puts a report on record; False where it answers nothing that was asked. May raise Retryable."""


class Reports:
    """Hears the answers of archives, on either side of an association; it never sees the database."""

    def __init__(self, take: Take) -> None:
        self._take = take

    def on_event_report(self, event: evt.Event) -> tuple[int, None]:
        """Handler of EVT_N_EVENT_REPORT: the status to answer with."""
        try:
            known = self._take(_read(event))
            status = ReportStatus.SUCCESS if known else ReportStatus.INVALID_ARGUMENT_VALUE
        except _Refused as refusal:
            status = refusal.status
        except Retryable as error:
            logger.warning("a storage commitment is not on record: %s", error)
            status = ReportStatus.RESOURCE_LIMITATION
        except Exception as error:  # noqa: BLE001 - one report must not end the hearing of others
            logger.warning("a storage commitment cannot be understood: %s", traced(error))
            status = ReportStatus.PROCESSING_FAILURE
        if status is not ReportStatus.SUCCESS:
            peer = event.assoc.remote
            logger.warning(
                "refused the report of %s at %s: %s (0x%04X)",
                *(peer["ae_title"], peer["address"], status.label, status),
            )
        return int(status), None


class _Refused(Exception):
    def __init__(self, status: ReportStatus) -> None:
        super().__init__(status.label)
        self.status = status


def request(
    destination: Destination,
    transaction_uid: str,
    objects: Sequence[Delivery],
    take: Take,
    *,
    calling_ae_title: str,
    timeout_seconds: float,
) -> None:
    """Ask for the commitment to keep these objects; an answer on the same association goes to ``take``.

    Raises Retryable where the archive could not be asked, Rejected where it refuses. Returns where the answer
    is still to come, and also where the archive may or may not have heard the question.
    """
    heard, acknowledged = threading.Event(), threading.Event()

    def hear(report: Report) -> bool:
        known = take(report)
        if report.transaction_uid == transaction_uid:
            heard.set()
        return known

    def on_sent(_event: evt.Event) -> None:
        if heard.is_set():  # what is sent after the report was heard is our acknowledgement
            acknowledged.set()

    handlers: list[evt.EventHandlerType] = [
        (evt.EVT_N_EVENT_REPORT, Reports(hear).on_event_report),
        (evt.EVT_PDU_SENT, on_sent),
    ]
    try:
        with associated(
            destination, [build_context(PUSH_MODEL)], calling_ae_title, timeout_seconds, handlers=handlers
        ) as link:
            question = _question(transaction_uid, objects)
            status, _ = link.send_n_action(question, REQUEST, PUSH_MODEL, WELL_KNOWN_INSTANCE)
            if "Status" not in status:
                where = destination.name
                logger.warning("destination %s did not say whether it heard of %s", where, transaction_uid)
                return
            _check(status, destination)
            _wait(link, acknowledged)
    except Gone as error:
        raise _explained(error) from error
    except (RuntimeError, ValueError, OSError) as error:
        raise Retryable(f"storage commitment: {error}") from error


def answering() -> PresentationContext:
    """For an archive that calls us to answer: it is still the provider of the service, we its user."""
    context = build_context(PUSH_MODEL)
    context.scu_role, context.scp_role = False, True
    return context


def offered(destination: Destination, calling_ae_title: str, timeout_seconds: float) -> str | None:
    """None when the destination offers storage commitment, otherwise what is wrong."""
    try:
        with associated(destination, [build_context(PUSH_MODEL)], calling_ae_title, timeout_seconds):
            return None
    except Gone as error:
        return str(_explained(error))


def listed(
    destination: Destination, objects: Sequence[Delivery], *, calling_ae_title: str, timeout_seconds: float
) -> set[Reference]:
    """Those of the objects that the archive lists (C-FIND, Study Root, IMAGE level).

    Raises Retryable where it could not be asked, Rejected where it refuses.
    """
    try:
        with associated(destination, [build_context(STUDY_ROOT)], calling_ae_title, timeout_seconds) as link:
            patience = LONGEST * timeout_seconds
            return {one.reference for one in objects if _is_listed(link, one, destination, patience)}
    except Gone as error:
        kind = Rejected if error.refused else Retryable
        raise kind(f"whether it keeps the objects is not known: {error}") from error
    except (RuntimeError, ValueError, OSError) as error:
        raise Retryable(f"whether {destination.name} keeps the objects is not known: {error}") from error


def _question(transaction_uid: str, objects: Sequence[Delivery]) -> Dataset:
    question = Dataset()
    question.TransactionUID = transaction_uid
    question.ReferencedSOPSequence = []
    for one in objects:
        item = Dataset()
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = one.reference
        question.ReferencedSOPSequence.append(item)
    return question


def _wait(association: Association, acknowledged: threading.Event) -> None:
    deadline = time.monotonic() + ANSWER_SECONDS
    while association.is_established and time.monotonic() < deadline:
        if acknowledged.wait(0.05):
            return


def _read(event: evt.Event) -> Report:
    """Raises _Refused for what is no report on a storage commitment."""
    request = cast(N_EVENT_REPORT, event.request)
    if event.context.abstract_syntax != PUSH_MODEL or request.AffectedSOPClassUID != PUSH_MODEL:
        raise _Refused(ReportStatus.NO_SUCH_SOP_CLASS)
    if request.AffectedSOPInstanceUID != WELL_KNOWN_INSTANCE:
        raise _Refused(ReportStatus.NO_SUCH_OBJECT_INSTANCE)
    if event.event_type not in (ALL_COMMITTED, SOME_FAILED):
        raise _Refused(ReportStatus.NO_SUCH_EVENT_TYPE)
    said = event.event_information
    failed = {
        _reference(item): explain_refusal(int(item.get("FailureReason") or ReportStatus.PROCESSING_FAILURE))[
            1
        ]
        for item in said.get("FailedSOPSequence") or ()
    }
    committed = {_reference(item) for item in said.get("ReferencedSOPSequence") or ()} - failed.keys()
    ae_title = event.assoc.remote["ae_title"].strip()
    return Report(str(said.get("TransactionUID") or ""), ae_title, committed, failed)


def _reference(item: Dataset) -> Reference:
    return str(item.get("ReferencedSOPClassUID")), str(item.get("ReferencedSOPInstanceUID"))


def _is_listed(link: Association, one: Delivery, destination: Destination, patience: float) -> bool:
    keys = Dataset()
    keys.QueryRetrieveLevel = "IMAGE"
    keys.StudyInstanceUID = one.study_instance_uid
    keys.SeriesInstanceUID = _series_of(one)
    keys.SOPInstanceUID = one.sop_instance_uid
    found, ends = False, time.monotonic() + patience
    for status, match in link.send_c_find(keys, STUDY_ROOT):
        if status.get("Status") in MATCHES:
            # An archive that does not match by this key answers with everything it has.
            found = found or (match is not None and match.get("SOPInstanceUID") == one.sop_instance_uid)
        else:
            _check(status, destination)
        if time.monotonic() > ends:
            raise Retryable(f"destination {destination.name} is too slow: its answers took {patience:g} s")
    return found


def _series_of(one: Delivery) -> str:
    """Archives want it at the IMAGE level; "" where the file is gone, and any series will do."""
    try:
        file = pydicom.dcmread(one.path or "", specific_tags=["SeriesInstanceUID"], stop_before_pixels=True)
    except (OSError, InvalidDicomError):
        return ""
    return str(file.get("SeriesInstanceUID") or "")


def _check(status: Dataset, destination: Destination) -> None:
    where = f"destination {destination.name} at {destination.host}:{destination.port}"
    if "Status" not in status:
        raise Retryable(f"{where} did not answer, or ended the association: does it know us?")
    code = int(status.Status)
    if code != ReportStatus.SUCCESS and code not in WARNINGS:
        permanent, text = explain_refusal(code)
        raise (Rejected if permanent else Retryable)(f"{where} refused: {text}")


def _explained(error: Gone) -> Rejected | Retryable:
    if error.refused:
        return Rejected(f"storage commitment: {error}, or set its commitment to false")
    return Retryable(f"storage commitment: {error}")
