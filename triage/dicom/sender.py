"""Storage SCU: files as they lie on the disk → a PACS, one association for many, and one outcome for each.

A peer that refuses, stalls or is not there never raises: what was not acknowledged is simply not sent.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from ssl import SSLContext

import pydicom
from pydicom.errors import InvalidDicomError
from pydicom.filereader import read_file_meta_info
from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import AE, _config, evt
from pynetdicom.association import Association
from pynetdicom.pdu_primitives import SCP_SCU_RoleSelectionNegotiation
from pynetdicom.presentation import PresentationContext, build_context
from pynetdicom.transport import AddressInformation, AssociationSocket

from triage.config import Destination, DicomSource, Peer
from triage.dicom.status import WARNINGS, StoreStatus, explain_refusal, explain_rejection
from triage.dicom.uids import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME
from triage.dicom.upper_layer import ClosingSocket, close, guard

logger = logging.getLogger(__name__)

# A file goes out byte for byte, unread, where the peer takes its transfer syntax.
_config.STORE_SEND_CHUNKED_DATASET = True

VERIFICATION = "1.2.840.10008.1.1"
PERMANENT = 1
"""Result of an A-ASSOCIATE-RJ that will be given again (PS3.8 table 9-21)."""
MAXIMUM_CONTEXTS = 128
"""Presentation contexts of one association (PS3.8 section 9.3.2.2: odd numbers up to 255)."""
UNREADABLE = (OSError, InvalidDicomError, AttributeError)
"""What reading a file of ours raises that is not there, or no DICOM."""
SLOWEST_BYTES_PER_SECOND = 64 * 1024
"""A slow line may take longer than the timeout for a large object; a line slower than this is broken."""


@dataclass(frozen=True, slots=True)
class SendOutcome:
    """What became of one file.

    ``permanent``: these bytes will be refused again until someone acts. ``tried`` is False where the
    sending ended at an earlier file: that says nothing of this one, which may be sent at once. ``away``:
    the peer took no file at all, which says nothing of this one either. ``said``: the peer's own words, which
    may name a patient: never for a log. ``retry_after``: that HTTP header, as it came.
    """

    path: Path
    sent: bool
    permanent: bool = False
    error: str = ""
    tried: bool = True
    away: bool = False
    said: str = ""
    retry_after: str = ""


@dataclass(frozen=True, slots=True)
class _Object:
    path: Path
    sop_class_uid: UID
    transfer_syntax_uid: UID
    size: int


class Gone(Exception):
    """There is no association with the peer, or none any longer; the text says why.

    ``refused``: it said no, and will again until someone acts.
    """

    def __init__(self, text: str, *, refused: bool = False) -> None:
        super().__init__(text)
        self.refused = refused


class _Caller(AE):
    def _create_socket(
        self,
        assoc: Association,
        address: AddressInformation,
        tls_args: tuple[SSLContext, str] | None,
    ) -> AssociationSocket:
        made = ClosingSocket(assoc, address=address)
        made.tls_args = tls_args
        return made


def send(
    objects: Sequence[Path], destination: Destination, *, calling_ae_title: str, timeout_seconds: float
) -> list[SendOutcome]:
    """C-STORE every file over one association; one outcome for each, in the order given.

    ``sent`` is only said after the peer's success (or a warning, with which it stored the object as well).
    Where a file is refused for now, or the association ends at it, only that one has failed and what comes
    after it is not tried; without any association, all have failed. So each call tries at least one, and who
    sends the untried ones again comes to an end.
    """
    outcomes: dict[Path, SendOutcome] = {}
    readable = []
    for path in objects:
        try:
            readable.append(_object_at(path))
        except UNREADABLE as error:
            outcomes[path] = unreadable(path, error)
    if readable:
        outcomes.update(_send_all(readable, destination, calling_ae_title, timeout_seconds))
    return [outcomes[path] for path in objects]


def echo(destination: Destination | Peer, calling_ae_title: str, timeout_seconds: float) -> str | None:
    """C-ECHO; None when the destination answers, otherwise what is wrong."""
    contexts = [build_context(VERIFICATION)]
    try:
        with associated(destination, contexts, calling_ae_title, timeout_seconds) as association:
            status = association.send_c_echo()
    except (Gone, RuntimeError, ValueError) as error:
        return str(error)
    if "Status" not in status:
        return f"{_named(destination)} did not answer within {timeout_seconds:g} s"
    code = int(status.Status)
    return None if code == StoreStatus.SUCCESS else f"{_named(destination)}: {explain_refusal(code)[1]}"


def unreadable(path: Path, error: Exception) -> SendOutcome:
    """A disk may come back; a file that is no DICOM stays so."""
    lost = isinstance(error, OSError)
    reason = (error.strerror if isinstance(error, OSError) else None) or error
    return SendOutcome(path, False, not lost, f"{path.name} cannot be read: {reason}")


def _object_at(path: Path) -> _Object:
    meta = read_file_meta_info(path)
    if not meta.MediaStorageSOPInstanceUID:
        raise AttributeError("no Media Storage SOP Instance UID")
    return _Object(path, meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID, path.stat().st_size)


def _send_all(
    objects: Sequence[_Object], destination: Destination, calling_ae_title: str, timeout: float
) -> dict[Path, SendOutcome]:
    try:
        with associated(destination, _contexts(objects), calling_ae_title, timeout) as association:
            return _store_all(association, objects, destination, timeout)
    except Gone as error:
        return {item.path: SendOutcome(item.path, False, error=str(error), away=True) for item in objects}


def _store_all(
    association: Association, objects: Sequence[_Object], destination: Destination, timeout: float
) -> dict[Path, SendOutcome]:
    outcomes: dict[Path, SendOutcome] = {}
    ended = ""
    for item in objects:
        if ended:
            untried = f"{item.path.name} was not tried: {ended}"
            outcomes[item.path] = SendOutcome(item.path, False, False, untried, tried=False)
            continue
        try:
            outcome = _store(association, item, destination, timeout)
        except Gone as error:
            outcome = SendOutcome(item.path, False, False, str(error))
        if not outcome.sent and not outcome.permanent:
            ended = outcome.error
        outcomes[item.path] = outcome
    return outcomes


def _contexts(objects: Sequence[_Object]) -> list[PresentationContext]:
    """Each class in the transfer syntax of its files; uncompressed ones also in the default syntax."""
    pairs: dict[tuple[UID, UID], None] = {}
    for item in objects:
        pairs[item.sop_class_uid, item.transfer_syntax_uid] = None
    for item in objects:
        if item.transfer_syntax_uid == ExplicitVRLittleEndian:
            pairs[item.sop_class_uid, ImplicitVRLittleEndian] = None
    return [build_context(*pair) for pair in pairs][:MAXIMUM_CONTEXTS]


@contextmanager
def associated(
    destination: Destination | Peer | DicomSource,
    contexts: list[PresentationContext],
    calling_ae_title: str,
    timeout: float,
    roles: Sequence[SCP_SCU_RoleSelectionNegotiation] = (),
    handlers: Sequence[evt.EventHandlerType] = (),
) -> Iterator[Association]:
    """An established association, released in the end; raises Gone with the reason where there is none.

    ``roles`` and ``handlers`` are for what the peer may send us over it.
    """
    ae = _Caller(calling_ae_title)
    ae.implementation_class_uid = IMPLEMENTATION_CLASS_UID
    ae.implementation_version_name = IMPLEMENTATION_VERSION_NAME
    ae.connection_timeout = ae.acse_timeout = ae.dimse_timeout = timeout
    ae.network_timeout = None  # the guarded socket and the timeouts above bound every wait
    connected: list[evt.Event] = []
    try:
        tls = None if destination.tls is None else (destination.tls.context(), destination.host)
    except OSError as error:
        text = f"{_named(destination)}: a file of its tls cannot be used: {error}"
        raise Gone(text, refused=True) from error
    try:
        association = ae.associate(
            destination.host,
            destination.port,
            contexts,
            ae_title=destination.ae_title,
            tls_args=tls,
            ext_neg=list(roles) or None,
            evt_handlers=[
                (evt.EVT_CONN_OPEN, guard, [timeout]),
                (evt.EVT_CONN_OPEN, connected.append),
                *handlers,
            ],
        )
    except OSError as error:
        raise Gone(f"{_named(destination)} cannot be found: {error.strerror or error}") from error
    try:
        if not association.is_established:
            why = _why_not(association, bool(connected), timeout, tls is not None)
            raise Gone(f"{_named(destination)} {why}", refused=_is_refused(association))
        yield association
    finally:
        association.release()
        close(association)


def _why_not(association: Association, connected: bool, timeout: float, tls: bool) -> str:
    if not connected and tls:
        return (
            f"cannot be reached, does not agree on TLS with us (see its tls), or no answer in {timeout:g} s"
        )
    if not connected:
        return f"cannot be reached: connection refused, or no answer within {timeout:g} s"
    answer = association.acceptor.primitive
    if association.is_rejected and answer is not None:
        reason = explain_rejection(answer.result_source, answer.diagnostic)
        return f"refused the association: {reason}"
    if association.rejected_contexts:
        classes = {str(context.abstract_syntax) for context in association.rejected_contexts}
        return f"accepts none of the SOP classes {', '.join(sorted(classes))}; allow them there"
    return f"ended the association before it began, or did not answer within {timeout:g} s"


def _is_refused(association: Association) -> bool:
    answer = association.acceptor.primitive
    if association.is_rejected and answer is not None:
        return int(answer.result or 0) == PERMANENT
    return bool(association.rejected_contexts)


def _store(association: Association, item: _Object, destination: Destination, timeout: float) -> SendOutcome:
    name = _named(destination)
    payload = _payload(association, item)
    if payload is None:
        text = f"does not accept {item.sop_class_uid.name} in {item.transfer_syntax_uid.name}; allow it there"
        return SendOutcome(item.path, False, True, f"{name} {text}")
    association.dimse_timeout = timeout + item.size / SLOWEST_BYTES_PER_SECOND
    try:
        status = association.send_c_store(payload)
    except (OSError, ValueError) as error:
        return SendOutcome(item.path, False, False, f"{item.path.name} was not sent: {error}")
    except RuntimeError as error:
        raise Gone(f"{name} ended the association") from error
    if "Status" not in status:
        raise Gone(f"{name} did not acknowledge {item.path.name}, or ended the association")
    return _outcome(item, int(status.Status), destination)


def _payload(association: Association, item: _Object) -> Path | pydicom.Dataset | None:
    """The file as it lies there; decoded for a peer that takes only implicit VR; None when it takes none."""
    accepted = {
        context.transfer_syntax[0]
        for context in association.accepted_contexts
        if context.abstract_syntax == item.sop_class_uid
    }
    if item.transfer_syntax_uid in accepted:
        return item.path
    if item.transfer_syntax_uid == ExplicitVRLittleEndian and ImplicitVRLittleEndian in accepted:
        return pydicom.dcmread(item.path)
    return None


def _outcome(item: _Object, code: int, destination: Destination) -> SendOutcome:
    if code in WARNINGS:
        logger.warning("%s answered for %s: %s", _named(destination), item.path.name, WARNINGS[code])
    if code == StoreStatus.SUCCESS or code in WARNINGS:
        return SendOutcome(item.path, True)
    permanent, text = explain_refusal(code)
    return SendOutcome(item.path, False, permanent, f"{_named(destination)} refused: {text}")


def _named(peer: Destination | Peer | DicomSource) -> str:
    kind = "source" if isinstance(peer, DicomSource) else "destination"
    return f"{kind} {peer.name} at {peer.host}:{peer.port}"
