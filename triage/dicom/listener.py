"""Storage SCP: takes every object a PACS or scanner sends, byte for byte, and answers by name.

An object is acknowledged only when its file and folder are on the disk and ``on_received`` has returned.
"""

from __future__ import annotations

import logging
import ssl
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from ipaddress import ip_address, ip_network
from pathlib import Path
from socketserver import BaseServer
from types import TracebackType
from typing import Self

from pydicom._uid_dict import UID_dictionary
from pydicom.uid import UID, ExplicitVRLittleEndian
from pynetdicom import (
    AE,
    AllStoragePresentationContexts,
    StoragePresentationContexts,
    evt,
)
from pynetdicom.association import Association
from pynetdicom.pdu_primitives import SOPClassCommonExtendedNegotiation
from pynetdicom.presentation import PresentationContext, build_context
from pynetdicom.transport import ThreadedAssociationServer

from triage import config
from triage.dicom import lists, storage_commitment
from triage.dicom.handshake import Encrypted
from triage.dicom.receiving import Receiver
from triage.dicom.spool import index_spool
from triage.dicom.status import NO_REASON, explain_rejection
from triage.dicom.storage_commitment import Reports
from triage.dicom.store_in_place import in_place
from triage.dicom.uids import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME
from triage.dicom.upper_layer import close, forget, guard, hang_up, watch_size
from triage.domain import Instance
from triage.errors import ConfigError, traced

__all__ = ["Listener", "index_spool"]

logger = logging.getLogger(__name__)

STORAGE_SERVICE_CLASS = "1.2.840.10008.4.2"
VERIFICATION = "1.2.840.10008.1.1"
KNOWN_CLASSES = frozenset(str(context.abstract_syntax) for context in AllStoragePresentationContexts)
RETIRED_CLASSES = frozenset(str(context.abstract_syntax) for context in StoragePresentationContexts)
NO_DATA_SETS = frozenset(
    {
        *("1.2.840.10008.1.2.4.95", "1.2.840.10008.1.2.4.205"),  # JPIP, deflated
        *("1.2.840.10008.1.2.6.1", "1.2.840.10008.1.2.6.2"),  # MIME, XML
        *("1.2.840.10008.1.2.7.1", "1.2.840.10008.1.2.7.2", "1.2.840.10008.1.2.7.3"),  # SMPTE streams
        "1.2.840.10008.1.20",  # Papyrus 3
    }
)
"""Transfer syntaxes that we could accept, but not read: every object would be refused thereafter."""
TRANSFER_SYNTAXES = (
    frozenset(uid for uid, (_, kind, *_) in UID_dictionary.items() if kind == "Transfer Syntax")
    - NO_DATA_SETS
)
"""Every other one that DICOM has defined, retired ones too: objects are kept as they come."""


class _Server(ThreadedAssociationServer):
    """As pynetdicom's, but it belongs to the Listener and not to the AE's list of servers."""

    request_queue_size = 64
    daemon_threads = True  # one that shakes hands with nobody keeps nobody from stopping

    def shutdown(self) -> None:
        BaseServer.shutdown(self)
        self.server_close()


class Listener:
    """A storage SCP on one port; it never sees the database.

    What becomes of an object, and when the three callables are called, ``Receiver`` says. With ``worklist``
    it also answers C-FIND, under the same AE title; with ``commitments`` it also hears what archives report.
    ``on_turn`` is called again and again as long as new associations are accepted.
    Without ``sync`` nothing is flushed to the disk, which is only for measuring.
    """

    def __init__(
        self,
        settings: config.Listener,
        spool: Path,
        on_received: Callable[[Instance], None],
        has_room: Callable[[], bool],
        on_conflict: Callable[[Instance], None] = lambda _instance: None,
        worklist: lists.Lists | None = None,
        commitments: Reports | None = None,
        on_refused: Callable[[str], None] = lambda _kind: None,
        on_turn: Callable[[], None] = lambda: None,
        *,
        sync: bool = True,
    ) -> None:
        self._on_turn = on_turn
        self.port = settings.port
        self._worklist = worklist
        self._commitments = commitments
        self._settings = settings
        self._receiver = Receiver(spool, on_received, has_room, on_conflict, on_refused, sync=sync)
        self._peers = [ip_network(peer) for peer in settings.peers]
        self._ae = _application_entity(settings)
        self._server: ThreadedAssociationServer | None = None

    def start(self) -> None:
        """Bind and listen in the background; afterwards ``port`` is the real one.

        Raises OSError, or ConfigError for a certificate that cannot be used.
        """
        also: list[evt.EventHandlerType] = []
        if self._worklist is not None:
            also.append((evt.EVT_C_FIND, self._worklist.on_find))
        if self._commitments is not None:
            also.append((evt.EVT_N_EVENT_REPORT, self._commitments.on_event_report))
        server = self._ae.make_server(
            (self._settings.host, self._settings.port),
            evt_handlers=[
                *also,
                (evt.EVT_CONN_OPEN, guard, [self._settings.timeout_seconds]),
                (evt.EVT_CONN_CLOSE, forget),
                (evt.EVT_PDU_RECV, watch_size),
                (evt.EVT_REQUESTED, self._on_requested),
                (evt.EVT_SOP_COMMON, _storage_services),
                (evt.EVT_REJECTED, _log_rejection),
                (evt.EVT_C_STORE, self._receiver.on_store),
            ],
            server_class=_Server,
            request_handler=self._request_handler(),
        )
        server.service_actions = self._on_turn  # type: ignore[method-assign]  # of socketserver, at each turn
        self._server = server
        self.port = int(server.server_address[1])
        threading.Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
        logger.info("listening as %s on %s:%d", self._settings.ae_title, self._settings.host, self.port)

    def _request_handler(self) -> type[Encrypted]:
        """Makes the association of each who connects."""
        settings, receiver = self._settings, self._receiver

        def stopped() -> bool:
            return self._server is None

        class Handler(Encrypted):
            tls = _tls(settings)
            seconds = settings.timeout_seconds

            def _create_association(self) -> Association:
                association = super()._create_association()
                if settings.fast:
                    in_place(association, receiver.store, _is_storage)
                association.run = partial(_run, association, stopped)  # type: ignore[method-assign]
                association.dul.daemon = True  # it must not hold up the end of the process
                return association

        return Handler

    def stop(self) -> None:
        """Stop listening and end every association; what was not acknowledged will be sent again."""
        if self._server is None:
            return
        server, self._server = self._server, None
        server.shutdown()
        associations = self._ae.active_associations
        for association in associations:
            hang_up(association)
        for association in associations:
            with suppress(RuntimeError):  # its thread is just beginning, and will hang up itself
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
        also = [build_context(uid) for uid in lists.SOP_CLASSES] if self._worklist else []
        if self._commitments is not None:
            also.append(storage_commitment.answering())
        association.acceptor.supported_contexts = [*_contexts_for(_proposed(event)), *also]


def _run(association: Association, stopped: Callable[[], bool]) -> None:
    """What pynetdicom cannot read ends its thread, and would leave the peer without an answer.

    Who connected at the last moment is not among those that ``stop`` hangs up.
    """
    if stopped():
        hang_up(association)
    try:
        Association.run(association)
    except Exception as error:  # noqa: BLE001 - one association must not end, or stay, for ever
        peer = association.requestor.address
        logger.warning("aborted the association of %s: what it sent cannot be read (%s)", peer, traced(error))
        association.abort()
        close(association)


def _tls(settings: config.Listener) -> ssl.SSLContext | None:
    try:
        return settings.tls.context() if settings.tls else None
    except OSError as error:
        raise ConfigError(f"listener.tls: {error.filename or 'certificate, key or ca'}: {error}") from error


def _application_entity(settings: config.Listener) -> AE:
    ae = AE(settings.ae_title)
    ae.require_called_aet = True
    ae.require_calling_aet = list(settings.calling_ae_titles)
    ae.implementation_class_uid = IMPLEMENTATION_CLASS_UID
    ae.implementation_version_name = IMPLEMENTATION_VERSION_NAME
    ae.maximum_associations = settings.maximum_associations
    ae.maximum_pdu_size = settings.maximum_pdu_bytes
    ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = settings.timeout_seconds
    ae.add_supported_context(VERIFICATION)
    return ae


def _proposed(event: evt.Event) -> list[PresentationContext]:
    primitive = event.assoc.requestor.primitive
    return list(primitive.presentation_context_definition_list) if primitive else []


def _is_storage(abstract_syntax: str) -> bool:
    """Private classes count: scanners store them beside images, and one refusal may fail a PACS's job."""
    return abstract_syntax in KNOWN_CLASSES | RETIRED_CLASSES or UID(abstract_syntax).is_private


def _contexts_for(proposed: list[PresentationContext]) -> list[PresentationContext]:
    """C-ECHO, and every storage class that the peer proposes, in the transfer syntax it names first.

    Among uncompressed ones explicit VR little endian is preferred: it keeps the VR of private elements.
    """
    syntaxes: dict[UID, list[UID]] = {}
    for context in proposed:
        if context.abstract_syntax is not None and _is_storage(context.abstract_syntax):
            known = [uid for uid in context.transfer_syntax if uid in TRANSFER_SYNTAXES]
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
        if uid is not None and uid not in KNOWN_CLASSES and _is_storage(uid):
            item = SOPClassCommonExtendedNegotiation()
            item.sop_class_uid = uid
            item.service_class_uid = UID(STORAGE_SERVICE_CLASS)
            services[uid] = item
    return services


def _log_rejection(event: evt.Event) -> None:
    requestor, answer = event.assoc.requestor, event.assoc.acceptor.primitive
    calling = requestor.primitive.calling_ae_title if requestor.primitive else ""
    why = explain_rejection(answer.result_source, answer.diagnostic) if answer else ""
    logger.warning("rejected the association of %s at %s: %s", calling, requestor.address, why)
