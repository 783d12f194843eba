"""What becomes of an object that comes, whichever way: byte for byte into the spool, then on record.

It is acknowledged only when its file and folder are on the disk and ``on_received`` has returned.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, cast

from pynetdicom import evt
from pynetdicom.dimse_primitives import C_STORE

from triage.dicom import header
from triage.dicom import spool as spooling
from triage.dicom.status import StoreStatus
from triage.domain import Instance
from triage.errors import Rejected, Retryable, traced
from triage.logs import about

logger = logging.getLogger(__name__)


class _Refused(Exception):
    """Ends the handling of one object with a status and a reason for the log."""

    def __init__(self, status: StoreStatus, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Request(NamedTuple):
    """What a C-STORE-RQ says, in which presentation context, and who sent it from where."""

    sop_class_uid: str
    sop_instance_uid: str
    abstract_syntax: str
    transfer_syntax: str
    ae_title: str
    address: str


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
        *,
        sync: bool = True,
    ) -> None:
        self._sync = sync
        self._spool = spool
        self._on_received = on_received
        self._on_conflict = on_conflict
        self._has_room = has_room
        self._on_refused = on_refused

    def keep(self, raw: bytes | memoryview, instance: Instance, source: str) -> None:
        """File a data set and put it on record; ``spool.read`` gave ``instance``.

        ``source`` is the AE title that sent it, or "". Raises Retryable when it cannot be kept now.
        """
        if not self._has_room():
            raise Retryable("the disk is full: make room for the spool, see storage.minimum_free_gb")
        filed = spooling.file(self._spool, raw, instance, source, sync=self._sync)
        if filed.conflict:
            self._conflict(filed.instance)
        else:
            self._on_received(filed.instance)

    def on_store(self, event: evt.Event) -> int:
        """Handler of EVT_C_STORE, on either side of an association: the status to answer with."""
        try:
            request, raw = _said(event)
        except Exception as error:  # noqa: BLE001 - as in store
            failure = StoreStatus.PROCESSING_FAILURE
            logger.warning("a store request cannot be understood: %s", traced(error))
            self._on_refused(failure.label)
            return int(failure)
        return self.store(request, raw)

    def store(self, request: Request, raw: bytes | memoryview) -> int:
        """Keep the data set of a C-STORE-RQ: the status; ``raw`` is not used thereafter."""
        try:
            self._store(request, raw)
        except _Refused as refusal:
            _log_refusal(request, refusal.status, str(refusal))
            self._on_refused(refusal.status.label)
            return int(refusal.status)
        except Exception as error:  # noqa: BLE001 - one object must not end the receiving of others
            failure = StoreStatus.PROCESSING_FAILURE
            _log_refusal(request, failure, traced(error))
            self._on_refused(failure.label)
            return int(failure)
        return int(StoreStatus.SUCCESS)

    def _store(self, request: Request, raw: bytes | memoryview) -> None:
        about("")
        instance = _read(request, raw)
        about(instance.study_instance_uid)
        try:
            self.keep(raw, instance, request.ae_title)
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


def _said(event: evt.Event) -> tuple[Request, bytes | memoryview]:
    said, peer = cast(C_STORE, event.request), event.assoc.remote
    request = Request(
        sop_class_uid=str(said.AffectedSOPClassUID),
        sop_instance_uid=str(said.AffectedSOPInstanceUID),
        abstract_syntax=str(event.context.abstract_syntax),
        transfer_syntax=str(event.context.transfer_syntax),
        ae_title=peer["ae_title"],
        address=peer["address"],
    )
    return request, said.DataSet.getbuffer() if said.DataSet else b""


def _read(request: Request, raw: bytes | memoryview) -> Instance:
    """The data set's header facts; refused when it is unreadable or is not what the command announces."""
    if request.sop_class_uid != request.abstract_syntax:
        raise _Refused(StoreStatus.SOP_CLASS_NOT_SUPPORTED, "not the SOP class of its presentation context")
    try:
        instance = spooling.read(raw, request.transfer_syntax)
    except Rejected as error:
        raise _Refused(StoreStatus.CANNOT_UNDERSTAND, str(error)) from error
    if instance.sop_class_uid != request.sop_class_uid:
        raise _Refused(StoreStatus.DATA_SET_DOES_NOT_MATCH, "SOP Class UID of command and data set differ")
    if instance.sop_instance_uid != request.sop_instance_uid:
        raise _Refused(StoreStatus.DATA_SET_DOES_NOT_MATCH, "SOP Instance UID of command and data set differ")
    return instance


def _log_refusal(request: Request, status: StoreStatus, reason: str) -> None:
    logger.warning(
        "refused SOP instance %s from %s at %s: %s (0x%04X): %s",
        request.sop_instance_uid,
        request.ae_title,
        request.address,
        status.label,
        status,
        reason,
    )
