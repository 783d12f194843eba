"""Modality Worklist C-FIND SCU (PS3.4 annex K): with what priority was a study ordered?"""

from __future__ import annotations

import logging
from time import monotonic

from pydicom.dataset import Dataset
from pynetdicom.presentation import build_context

from triage.config import Peer
from triage.dicom.lists import MODALITY_WORKLIST
from triage.dicom.query import LONGEST
from triage.dicom.sender import Gone, associated
from triage.dicom.status import FindStatus, explain_refusal
from triage.errors import Rejected, Retryable

logger = logging.getLogger(__name__)

MATCHES = (FindStatus.PENDING, FindStatus.PENDING_UNSUPPORTED_KEYS)


def ordered_priority(
    accession_number: str, ris: Peer, *, calling_ae_title: str, timeout_seconds: float
) -> set[str]:
    """Requested Procedure Priority of every order with this accession number; empty where none is known.

    Raises Retryable when the RIS is away, busy or silent, Rejected when it refuses the question.
    """
    if set(accession_number) & set("*?\\"):
        raise Rejected("the accession number has a wildcard in it")
    contexts = [build_context(MODALITY_WORKLIST)]
    ends = monotonic() + LONGEST * timeout_seconds
    try:
        with associated(ris, contexts, calling_ae_title, timeout_seconds) as link:
            priorities = set()
            for status, match in link.send_c_find(_question(accession_number), MODALITY_WORKLIST):
                if status.get("Status") not in MATCHES:
                    _check(status, ris)
                # A RIS that does not match by accession number answers with everything it has.
                elif match is not None and str(match.get("AccessionNumber", "")).strip() == accession_number:
                    priorities.add(str(match.get("RequestedProcedurePriority", "")).strip().upper())
                if monotonic() > ends:
                    raise Retryable(
                        f"{ris.name} is too slow: its answers took {LONGEST * timeout_seconds:g} s"
                    )
    except (Gone, RuntimeError, ValueError, OSError) as error:
        raise Retryable(f"the priorities of orders are not known: {error}") from error
    return priorities - {""}


def _question(accession_number: str) -> Dataset:
    step = Dataset()
    step.Modality = ""
    keys = Dataset()
    if not accession_number.isascii():
        keys.SpecificCharacterSet = "ISO_IR 192"
    keys.AccessionNumber = accession_number
    keys.RequestedProcedurePriority = ""
    keys.ScheduledProcedureStepSequence = [step]
    return keys


def _check(status: Dataset, ris: Peer) -> None:
    where = f"{ris.name} at {ris.host}:{ris.port}"
    if "Status" not in status:
        raise Retryable(f"{where} did not answer the query for a priority")
    code = int(status.Status)
    if code == FindStatus.OUT_OF_RESOURCES:
        raise Retryable(f"{where} is out of resources")
    if code:
        raise Rejected(f"{where} refused the query for a priority: {explain_refusal(code)[1]}")
