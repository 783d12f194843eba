"""The worklist for machines: C-FIND SCP for Modality Worklist and Study Root (PS3.4 annexes K and C).

The open studies are answered in reading order, each with a Requested Procedure Priority. It lists and serves
no images: those are in the PACS. What is not known of a study is returned empty and never excludes it.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from fnmatch import fnmatchcase
from itertools import zip_longest
from typing import cast

from pydicom.datadict import keyword_for_tag
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.sequence import Sequence as Items
from pydicom.uid import UID
from pynetdicom import evt
from pynetdicom.dimse_primitives import C_FIND

from triage.dicom.status import FindStatus
from triage.domain import Band, WorklistEntry
from triage.errors import Retryable, traced

logger = logging.getLogger(__name__)

MODALITY_WORKLIST = UID("1.2.840.10008.5.1.4.31")
STUDY_ROOT = UID("1.2.840.10008.5.1.4.1.2.2.1")
SOP_CLASSES = (MODALITY_WORKLIST, STUDY_ROOT)

REQUESTED_PROCEDURE_PRIORITY: Mapping[Band, str] = {
    Band.CRITICAL: "STAT",
    Band.SEVERE: "HIGH",
    Band.POSITIVE: "HIGH",
    Band.INDETERMINATE: "ROUTINE",
    Band.NOT_JUDGED: "ROUTINE",
    Band.ROUTINE: "ROUTINE",
}
"""Band → Requested Procedure Priority (0040,1003): STAT, HIGH, ROUTINE, MEDIUM or LOW.

MEDIUM and LOW are never said. The standard lists MEDIUM after ROUTINE, many systems sort it before: an
indeterminate study could sink below the routine ones. LOW would sink a study below the orders of others.
"""

OpenStudies = Callable[[int], Sequence[WorklistEntry]]
"""So many of the open studies, in reading order; may raise Retryable."""
LONGEST_SEARCH = 5000
"""Open studies that one query looks at: the most urgent ones."""
LONGEST_IDENTIFIER = 64 * 1024
"""Bytes of a query's keys; a thousand UIDs fit in."""


Answer = tuple[Dataset | int, Dataset | None]
"""A status, and the match that goes with it."""


class Lists:
    """Answers C-FIND from what ``open_studies`` gives; it never sees the database."""

    def __init__(self, open_studies: OpenStudies, ae_title: str, maximum_answers: int) -> None:
        self._open_studies = open_studies
        self._ae_title = ae_title
        self._maximum = maximum_answers

    def on_find(self, event: evt.Event) -> Iterator[Answer]:
        """Handler of EVT_C_FIND: match after match until all are told, or the peer cancels."""
        try:
            yield from self._answers(event)
        except _Mismatch as error:
            yield _failure(FindStatus.IDENTIFIER_DOES_NOT_MATCH, str(error)), None
        except Retryable as error:
            logger.warning("a C-FIND was not answered: %s", error)
            yield _failure(FindStatus.OUT_OF_RESOURCES, "the database is busy; ask again"), None
        except Exception as error:  # noqa: BLE001 - one query must not end the answering of others
            logger.warning("a C-FIND cannot be answered: %s", traced(error))
            yield _failure(FindStatus.UNABLE_TO_PROCESS, "the keys cannot be understood"), None

    def _answers(self, event: evt.Event) -> Iterator[Answer]:
        keys = _keys(event)
        row_of = self._row_of(event.context.abstract_syntax, keys)
        entries = self._open_studies(LONGEST_SEARCH + 1)
        told = 0
        for entry in entries[:LONGEST_SEARCH]:
            if event.is_cancelled:
                yield int(FindStatus.CANCELLED), None
                return
            row = row_of(entry)
            if not matches(keys, row):
                continue
            if told == self._maximum:
                comment = f"more studies match; only the first {told} are listed"
                yield _failure(FindStatus.OUT_OF_RESOURCES, comment), None
                return
            told += 1
            yield int(_pending(keys, row)), returned(keys, row)
        if len(entries) > LONGEST_SEARCH:
            comment = f"only the first {LONGEST_SEARCH} studies were looked at"
            yield _failure(FindStatus.OUT_OF_RESOURCES, comment), None

    def _row_of(self, sop_class: UID, keys: Dataset) -> Callable[[WorklistEntry], Dataset]:
        if sop_class == MODALITY_WORKLIST:
            return lambda entry: procedure_step(entry, self._ae_title)
        if keys.get("QueryRetrieveLevel") != "STUDY":
            raise _Mismatch("Query/Retrieve Level must be STUDY: open studies are listed")
        return study


class _Mismatch(Exception):
    """The identifier is not one that its SOP class has; the text is for the peer (64 characters)."""


def _keys(event: evt.Event) -> Dataset:
    sent = cast(C_FIND, event.request).Identifier
    if sent is not None and len(sent.getvalue()) > LONGEST_IDENTIFIER:
        raise _Mismatch("the keys are too long")
    return event.identifier


def _failure(status: FindStatus, comment: str) -> Dataset:
    failure = Dataset()
    failure.Status = int(status)
    failure.ErrorComment = comment
    return failure


# --- rows ----------------------------------------------------------------------------------------


def study(entry: WorklistEntry) -> Dataset:
    """One open study at the STUDY level of the Study Root model (PS3.4 table C.6-5)."""
    row = _common(entry)
    row.QueryRetrieveLevel = "STUDY"
    row.StudyDate = entry.study.study_date
    row.StudyTime = ""
    row.StudyID = ""
    row.StudyDescription = entry.study.study_description
    row.ModalitiesInStudy = "CT"
    row.NumberOfStudyRelatedInstances = str(entry.images)
    return row


def procedure_step(entry: WorklistEntry, ae_title: str) -> Dataset:
    """One open study as a step that is to be done: read by its due time (PS3.4 table K.6-1)."""
    due = _local(entry.priority.due_at)
    step = Dataset()
    step.ScheduledStationAETitle = ae_title
    step.ScheduledProcedureStepStartDate = due.strftime("%Y%m%d")
    step.ScheduledProcedureStepStartTime = due.strftime("%H%M%S")
    step.Modality = "CT"
    step.ScheduledPerformingPhysicianName = ""
    step.ScheduledProcedureStepDescription = entry.study.study_description or "Reading"
    step.ScheduledProcedureStepID = _short_id(entry)
    step.ScheduledStationName = ""
    step.ScheduledProcedureStepLocation = ""
    row = _common(entry)
    row.ScheduledProcedureStepSequence = [step]
    row.RequestedProcedureID = _short_id(entry)
    row.RequestedProcedureDescription = entry.study.study_description or "Reading"
    for keyword in _UNKNOWN_TO_THE_WORKLIST:
        setattr(row, keyword, None)
    return row


_UNKNOWN_TO_THE_WORKLIST = (
    "ReferencedStudySequence", "PatientTransportArrangements", "RequestingPhysician", "AdmissionID",
    "CurrentPatientLocation", "ReferencedPatientSequence", "PatientWeight", "MedicalAlerts", "Allergies",
    "PregnancyStatus", "SpecialNeeds", "PatientState", "ConfidentialityConstraintOnPatientDataDescription",
)  # fmt: skip
"""Attributes that a worklist must return (type 2) and that images do not tell us."""


def _common(entry: WorklistEntry) -> Dataset:
    row = Dataset()
    row.PatientName = entry.study.patient_name
    row.PatientID = entry.study.patient_id
    row.PatientBirthDate = ""
    row.PatientSex = ""
    row.AccessionNumber = entry.study.accession_number
    row.ReferringPhysicianName = ""
    row.StudyInstanceUID = entry.study.study_instance_uid
    row.RequestedProcedurePriority = REQUESTED_PROCEDURE_PRIORITY[entry.priority.band]
    row.RequestedProcedureComments = entry.priority.reason
    return row


def _local(when: datetime) -> datetime:
    """Dates and times in DICOM are the local ones where nothing else is said (PS3.3 section C.12.1.1.8)."""
    return when.astimezone()


def _short_id(entry: WorklistEntry) -> str:
    """An ID of at most 16 characters that stays the same; several studies may share an accession number."""
    return hashlib.sha256(entry.study.study_instance_uid.encode()).hexdigest()[:16]


# --- matching (PS3.4 section C.2.2.2) ------------------------------------------------------------


def matches(keys: Dataset, row: Dataset) -> bool:
    """True when every key that we know a value of matches; an unknown value never excludes a study."""
    return all(_matches(key, row.get(key.tag)) for key in keys if key.keyword not in _NO_KEYS)


_NO_KEYS = ("SpecificCharacterSet", "QueryRetrieveLevel", "TimezoneOffsetFromUTC")


def _matches(key: DataElement, known: DataElement | None) -> bool:
    if known is None or known.is_empty or key.is_empty:
        return True
    if key.VR == "SQ":
        return any(all(matches(item, step) for item in key.value) for step in known.value)
    wanted = [str(value) for value in key.value] if isinstance(key.value, MultiValue) else [str(key.value)]
    if key.VR == "UI":
        return str(known.value) in wanted
    return any(_one_matches(key.VR, text, str(known.value)) for text in wanted)


def _one_matches(vr: str, wanted: str, known: str) -> bool:
    if vr in ("DA", "TM"):
        return _in_range(vr, wanted.strip(), known)
    return _name_matches(wanted, known) if vr == "PN" else _wildcards(wanted, known)


def _name_matches(wanted: str, known: str) -> bool:
    """Without regard to case and trailing empty components; a name in one script is looked for in all."""
    groups, scripts = (
        [part.rstrip("^").casefold() for part in name.split("=")] for name in (wanted.strip(), known)
    )
    if len(groups) == 1:
        return any(_wildcards(groups[0], script) for script in scripts)
    pairs = zip_longest(groups, scripts, fillvalue="")
    return all(_wildcards(group, script) for group, script in pairs if group)


def _wildcards(wanted: str, known: str) -> bool:
    return fnmatchcase(known, _SQUARE.sub(r"[\g<0>]", wanted.strip()))


_SQUARE = re.compile(r"\[")
"""fnmatch knows more than * and ?: what it would take for a set of characters is taken as written."""


def _in_range(vr: str, wanted: str, known: str) -> bool:
    """A date or time, or a range of them with either end open; a shorter time stands for all it begins."""
    first, dash, last = (part.replace(":", "").replace(".", "") for part in wanted.partition("-"))
    if vr == "DA" and not dash:
        return known == first
    last = last if dash else first
    known = known.replace(".", "")
    return first <= known[: len(first)] and (not last or known[: len(last)] <= last)


# --- answers -------------------------------------------------------------------------------------


def returned(keys: Dataset, row: Dataset) -> Dataset:
    """What was asked for and is supported; without keys inside a sequence, its items whole."""
    told = Dataset()
    for key in keys:
        known = row.get(key.tag)
        if known is None:
            continue
        if key.VR == "SQ" and known.value and key.value and len(key.value[0]):
            known = DataElement(key.tag, "SQ", Items([returned(key.value[0], item) for item in known.value]))
        told.add(known)
    if "QueryRetrieveLevel" in row:
        told.QueryRetrieveLevel = row.QueryRetrieveLevel
    if not _is_ascii(told):
        told.SpecificCharacterSet = "ISO_IR 192"
    return told


def _is_ascii(row: Dataset) -> bool:
    return all(
        all(_is_ascii(item) for item in element.value) if element.VR == "SQ" else str(element.value).isascii()
        for element in row
    )


def _pending(keys: Dataset, row: Dataset) -> FindStatus:
    return FindStatus.PENDING_UNSUPPORTED_KEYS if _unsupported(keys, row) else FindStatus.PENDING


def _unsupported(keys: Dataset, row: Dataset) -> bool:
    """True when a key is asked for that we do not return, or matched that we do not know."""
    for key in keys:
        known = row.get(key.tag)
        if keyword_for_tag(key.tag) in _NO_KEYS:
            continue
        if known is None or (not key.is_empty and key.VR != "SQ" and known.keyword in NEVER_KNOWN):
            return True
        if key.VR == "SQ" and known.value and any(_unsupported(item, known.value[0]) for item in key.value):
            return True
    return False


NEVER_KNOWN = {
    *_UNKNOWN_TO_THE_WORKLIST, "PatientBirthDate", "PatientSex", "ReferringPhysicianName", "StudyTime",
    "StudyID", "ScheduledPerformingPhysicianName", "ScheduledStationName", "ScheduledProcedureStepLocation",
}  # fmt: skip
"""Attributes returned empty; a value asked for cannot be matched."""
