"""What becomes of an object that comes, whichever way: byte for byte into the spool, then on record.

It is acknowledged only when its file and folder are on the disk and ``on_received`` has returned.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import cast

from pynetdicom import evt
from pynetdicom.dimse_primitives import C_STORE

from triage.dicom import header
from triage.dicom import spool as spooling
from triage.dicom.status import StoreStatus
from triage.domain import Instance
from triage.errors import Rejected, Retryable, traced

logger = logging.getLogger(__name__)


class _Refused(Exception):
    """Ends the handling of one object with a status and a reason for the log."""

    def __init__(self, status: StoreStatus, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Receiver:
    """Takes objects in; it never sees the database.

    ``on_received(instance)`` is called for every object on the disk, also when it comes again: it must be
    idempotent. It may raise Retryable, and the object is to be sent again. ``on_conflict(instance)`` is
    called for other bytes under a known SOP Instance UID, after ``on_received`` for the first ones.
    ``has_room()`` says whether the disk takes more. ``on_refused(status)`` is told of each object that is not
    taken. All are called from the threads of several associations.
    """

    def __init__(
        self,
        spool: Path,
        on_received: Callable[[Instance], None],
        has_room: Callable[[], bool],
        on_conflict: Callable[[Instance], None] = lambda _instance: None,
        on_refused: Callable[[str], None] = lambda _status: None,
    ) -> None:
        self._spool = spool
        self._on_received = on_received
        self._on_conflict = on_conflict
        self._has_room = has_room
        self._on_refused = on_refused

    def keep(self, raw: bytes, instance: Instance, source: str) -> None:
        """File a data set and put it on record; ``spool.read`` gave ``instance``.

        ``source`` is the AE title that sent it, or "". Raises Retryable when it cannot be kept now.
        """
        if not self._has_room():
            raise Retryable("the disk is full: make room for the spool, see storage.minimum_free_gb")
        filed = spooling.file(self._spool, raw, instance, source)
        if filed.conflict:
            self._conflict(filed.instance)
        else:
            self._on_received(filed.instance)

    def on_store(self, event: evt.Event) -> int:
        """Handler of EVT_C_STORE, on either side of an association: the status to answer with."""
        request = cast(C_STORE, event.request)
        try:
            self._store(event, request)
        except _Refused as refusal:
            _log_refusal(event, request, refusal.status, str(refusal))
            self._on_refused(refusal.status.label)
            return int(refusal.status)
        except Exception as error:  # noqa: BLE001 - one object must not end the receiving of others
            failure = StoreStatus.PROCESSING_FAILURE
            _log_refusal(event, request, failure, traced(error))
            self._on_refused(failure.label)
            return int(failure)
        return int(StoreStatus.SUCCESS)

    def _store(self, event: evt.Event, request: C_STORE) -> None:
        raw = request.DataSet.getvalue() if request.DataSet else b""
        instance = _read(event, request, raw)
        try:
            self.keep(raw, instance, event.assoc.remote["ae_title"])
        except Retryable as error:
            raise _Refused(StoreStatus.OUT_OF_RESOURCES, str(error)) from error

    def _conflict(self, instance: Instance) -> None:
        """The first bytes come on record as well: the attempt that filed them may have failed thereafter."""
        logger.warning("SOP instance %s came again with other bytes", instance.sop_instance_uid)
        own = instance.path.parents[1] / f"{instance.sop_instance_uid}.dcm"
        try:
            self._on_received(header.read_instance(own))
        except Rejected as error:
            logger.error("%s in the spool cannot be read: %s", own.relative_to(self._spool), error)
        self._on_conflict(instance)


def _read(event: evt.Event, request: C_STORE, raw: bytes) -> Instance:
    """The data set's header facts; refused when it is unreadable or is not what the command announces."""
    if request.AffectedSOPClassUID != event.context.abstract_syntax:
        raise _Refused(StoreStatus.SOP_CLASS_NOT_SUPPORTED, "not the SOP class of its presentation context")
    try:
        instance = spooling.read(raw, str(event.context.transfer_syntax))
    except Rejected as error:
        raise _Refused(StoreStatus.CANNOT_UNDERSTAND, str(error)) from error
    if instance.sop_class_uid != request.AffectedSOPClassUID:
        raise _Refused(StoreStatus.DATA_SET_DOES_NOT_MATCH, "SOP Class UID of command and data set differ")
    if instance.sop_instance_uid != request.AffectedSOPInstanceUID:
        raise _Refused(StoreStatus.DATA_SET_DOES_NOT_MATCH, "SOP Instance UID of command and data set differ")
    return instance


def _log_refusal(event: evt.Event, request: C_STORE, status: StoreStatus, reason: str) -> None:
    peer = event.assoc.remote
    logger.warning(
        "refused SOP instance %s from %s at %s: %s (0x%04X): %s",
        request.AffectedSOPInstanceUID,
        peer["ae_title"],
        peer["address"],
        status.label,
        status,
        reason,
    )
