"""Storage SCP: takes every object a PACS or scanner sends, byte for byte, and answers by name.

An object is acknowledged only when its file and folder are on the disk and ``on_received`` has returned.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from ipaddress import ip_address, ip_network
from pathlib import Path
from socketserver import BaseServer
from types import TracebackType
from typing import Self, cast

from pydicom.uid import UID, ExplicitVRLittleEndian
from pynetdicom import (
    AE,
    AllStoragePresentationContexts,
    StoragePresentationContexts,
    evt,
)
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.pdu_primitives import SOPClassCommonExtendedNegotiation
from pynetdicom.presentation import PresentationContext, build_context
from pynetdicom.transport import ThreadedAssociationServer

from triage import config
from triage.dicom import header
from triage.dicom import spool as spooling
from triage.dicom.spool import index_spool
from triage.dicom.status import NO_REASON, StoreStatus, explain_rejection
from triage.dicom.upper_layer import forget, guard, hang_up
from triage.domain import Instance
from triage.errors import Rejected, Retryable

__all__ = ["Listener", "index_spool"]

logger = logging.getLogger(__name__)

STORAGE_SERVICE_CLASS = "1.2.840.10008.4.2"
VERIFICATION = "1.2.840.10008.1.1"
KNOWN_CLASSES = frozenset(str(context.abstract_syntax) for context in AllStoragePresentationContexts)
RETIRED_CLASSES = frozenset(str(context.abstract_syntax) for context in StoragePresentationContexts)


class _Refused(Exception):
    """Ends the handling of one object with a status and a reason for the log."""

    def __init__(self, status: StoreStatus, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class _Server(ThreadedAssociationServer):
    """As pynetdicom's, but it belongs to the Listener and not to the AE's list of servers."""

    request_queue_size = 64

    def shutdown(self) -> None:
        BaseServer.shutdown(self)
        self.server_close()


class Listener:
    """A storage SCP on one port; it never sees the database.

    ``on_received(instance)`` is called for every object on the disk, also when it comes again: it must be
    idempotent. It may raise Retryable, and the sender is asked to send again. ``on_conflict(instance)`` is
    called for other bytes under a known SOP Instance UID, after ``on_received`` for the first ones.
    ``has_room()`` says whether the disk takes more. All are called from the threads of several associations.
    """

    def __init__(
        self,
        settings: config.Listener,
        spool: Path,
        on_received: Callable[[Instance], None],
        has_room: Callable[[], bool],
        on_conflict: Callable[[Instance], None] = lambda _instance: None,
    ) -> None:
        self.port = settings.port
        self._settings = settings
        self._spool = spool
        self._on_received = on_received
        self._on_conflict = on_conflict
        self._has_room = has_room
        self._peers = [ip_network(peer) for peer in settings.peers]
        self._ae = _application_entity(settings)
        self._server: ThreadedAssociationServer | None = None

    def start(self) -> None:
        """Bind and listen in the background; afterwards ``port`` is the real one. Raises OSError."""
        server = self._ae.make_server(
            (self._settings.host, self._settings.port),
            evt_handlers=[
                (evt.EVT_CONN_OPEN, guard, [self._settings.timeout_seconds]),
                (evt.EVT_CONN_CLOSE, forget),
                (evt.EVT_REQUESTED, self._on_requested),
                (evt.EVT_SOP_COMMON, _storage_services),
                (evt.EVT_REJECTED, _log_rejection),
                (evt.EVT_C_STORE, self._on_store),
            ],
            server_class=_Server,
        )
        self._server = server
        self.port = int(server.server_address[1])
        threading.Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
        logger.info("listening as %s on %s:%d", self._settings.ae_title, self._settings.host, self.port)

    def stop(self) -> None:
        """Stop listening and end every association; what was not acknowledged will be sent again."""
        if self._server is None:
            return
        self._server.shutdown()
        self._server = None
        associations = self._ae.active_associations
        for association in associations:
            hang_up(association)
        for association in associations:
            association.join(self._settings.timeout_seconds)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _on_requested(self, event: evt.Event) -> None:
        """Turn away peers at unknown addresses; offer the others exactly what they propose to store."""
        association = event.assoc
        address = ip_address(association.requestor.address)
        if self._peers and not any(address in network for network in self._peers):
            association.acse.send_reject(*NO_REASON)
            _log_rejection(event)
            association.kill()
            return
        association.acceptor.supported_contexts = _contexts_for(_proposed(event))

    def _on_store(self, event: evt.Event) -> int:
        request = cast(C_STORE, event.request)
        try:
            self._store(event, request)
        except _Refused as refusal:
            _log_refusal(event, request, refusal.status, str(refusal))
            return int(refusal.status)
        except Exception as error:  # noqa: BLE001 - one object must not end the receiving of others
            failure = StoreStatus.PROCESSING_FAILURE
            _log_refusal(event, request, failure, type(error).__name__, exc_info=True)
            return int(failure)
        return int(StoreStatus.SUCCESS)

    def _store(self, event: evt.Event, request: C_STORE) -> None:
        if not self._has_room():
            raise _Refused(StoreStatus.OUT_OF_RESOURCES, "the disk is full")
        raw = request.DataSet.getvalue() if request.DataSet else b""
        instance = _read(event, request, raw)
        try:
            filed = spooling.file(self._spool, raw, instance, event.assoc.requestor.ae_title)
            if filed.conflict:
                self._conflict(filed.instance)
            else:
                self._on_received(filed.instance)
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


def _application_entity(settings: config.Listener) -> AE:
    ae = AE(settings.ae_title)
    ae.require_called_aet = True
    ae.require_calling_aet = list(settings.calling_ae_titles)
    ae.maximum_associations = settings.maximum_associations
    ae.maximum_pdu_size = settings.maximum_pdu_bytes
    ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = settings.timeout_seconds
    ae.add_supported_context(VERIFICATION)
    return ae


def _proposed(event: evt.Event) -> list[PresentationContext]:
    primitive = event.assoc.requestor.primitive
    return list(primitive.presentation_context_definition_list) if primitive else []


def _is_storage(abstract_syntax: UID) -> bool:
    """Private classes count: scanners store them beside images, and one refusal may fail a PACS's job."""
    return abstract_syntax in KNOWN_CLASSES | RETIRED_CLASSES or abstract_syntax.is_private


def _contexts_for(proposed: list[PresentationContext]) -> list[PresentationContext]:
    """C-ECHO, and every storage class that the peer proposes, in the transfer syntax it names first.

    Among uncompressed ones explicit VR little endian is preferred: it keeps the VR of private elements.
    """
    syntaxes: dict[UID, list[UID]] = {}
    for context in proposed:
        if context.abstract_syntax is not None and _is_storage(context.abstract_syntax):
            known = [uid for uid in context.transfer_syntax if uid.type == "Transfer Syntax"]
            if ExplicitVRLittleEndian in known and not known[0].is_compressed:
                known.insert(0, ExplicitVRLittleEndian)
            syntaxes.setdefault(context.abstract_syntax, []).extend(known)
    storage = [build_context(uid, list(dict.fromkeys(known))) for uid, known in syntaxes.items() if known]
    return [build_context(VERIFICATION), *storage]


def _storage_services(event: evt.Event) -> dict[UID, SOPClassCommonExtendedNegotiation]:
    """Tell pynetdicom that the private and retired classes we accepted belong to the storage service."""
    services = {}
    for context in event.assoc.acceptor.supported_contexts:
        uid = context.abstract_syntax
        if uid is not None and uid not in KNOWN_CLASSES and uid != VERIFICATION:
            item = SOPClassCommonExtendedNegotiation()
            item.sop_class_uid = uid
            item.service_class_uid = UID(STORAGE_SERVICE_CLASS)
            services[uid] = item
    return services


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


def _log_refusal(
    event: evt.Event, request: C_STORE, status: StoreStatus, reason: str, *, exc_info: bool = False
) -> None:
    requestor = event.assoc.requestor
    logger.warning(
        "refused SOP instance %s from %s at %s: %s (0x%04X): %s",
        request.AffectedSOPInstanceUID,
        requestor.ae_title,
        requestor.address,
        status.label,
        status,
        reason,
        exc_info=exc_info,
    )


def _log_rejection(event: evt.Event) -> None:
    requestor, answer = event.assoc.requestor, event.assoc.acceptor.primitive
    calling = requestor.primitive.calling_ae_title if requestor.primitive else ""
    why = explain_rejection(answer.result_source, answer.diagnostic) if answer else ""
    logger.warning("rejected the association of %s at %s: %s", calling, requestor.address, why)
