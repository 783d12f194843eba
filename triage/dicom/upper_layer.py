"""What pynetdicom's upper layer lacks: a peer that stalls in mid-PDU is let go; small packets go at once."""

from __future__ import annotations

import logging
import os
import select
import socket
import ssl
import threading
import time
from contextlib import suppress
from typing import cast

from pynetdicom import _config
from pynetdicom.association import Association
from pynetdicom.events import Event
from pynetdicom.pdu import P_DATA_TF
from pynetdicom.transport import AssociationSocket

logger = logging.getLogger(__name__)

# Its event loggers describe every message and data set, patients included, and cost time for each PDU.
_config.LOG_HANDLER_LEVEL = "none"
_config.LOG_REQUEST_IDENTIFIERS = False
_config.LOG_RESPONSE_IDENTIFIERS = False
logging.getLogger("pynetdicom").setLevel(logging.CRITICAL)  # we say what failed, with whom and what to do

LAST_FRAGMENT = 2
"""Bit of the message control header (PS3.8 annex E.2)."""
LONGEST_PDU = 8 * 1024 * 1024
"""Bytes; a peer that announces more is not speaking DICOM (we never offer more than 4 MiB)."""
LARGEST_OBJECT = 1024**3
"""Bytes; an object that goes on beyond this has no end, and would fill the memory."""
ENDLESS = "its object has no end"
PAUSE_SECONDS = 2.0
"""Longer than a reactor's round ever takes."""


class ClosingSocket(AssociationSocket):
    """Is really closed in the end; pynetdicom leaves a socket open when its peer was faster."""

    def _shutdown_socket(self) -> None:
        connection = self.socket
        super()._shutdown_socket()
        if connection is not None:
            connection.close()


class GuardedSocket(ClosingSocket):
    """Takes over an open connection: each PDU must have come whole within ``timeout`` seconds.

    What was read by somebody else, and is for pynetdicom after all, can be put back.
    """

    def __init__(self, plain: AssociationSocket, timeout: float) -> None:
        self.__dict__.update(vars(plain))
        self.timeout = timeout
        self.object_bytes = 0
        """Of the message that is coming, so far."""
        self.is_over = False
        """Set when nothing more is wanted of the peer; the next read ends the association."""
        self._connection = _tuned(plain.socket, timeout)
        self._peer = self._connection.getpeername()[0]
        self._encrypted = isinstance(self._connection, ssl.SSLSocket)
        self._back = b""
        self._poll = select.poll()
        self._poll.register(self._connection, select.POLLIN)

    @property
    def ready(self) -> bool:
        return bool(self._back) or super().ready

    def recv(self, nr_bytes: int) -> bytearray:
        """Exactly ``nr_bytes``; fewer, which ends the association, when the peer closes, stalls or drips."""
        if self.is_over:
            return bytearray()
        if nr_bytes > LONGEST_PDU:
            self.let_go(f"it announced a PDU of {nr_bytes} bytes")
            return bytearray()
        deadline = time.monotonic() + self.timeout
        buffer = bytearray(nr_bytes)
        view, filled = memoryview(buffer), min(nr_bytes, len(self._back))
        view[:filled], self._back = self._back[:filled], self._back[filled:]
        while filled < nr_bytes:
            try:
                received = self._connection.recv_into(view[filled:])
            except TimeoutError:
                received = 0
            filled += received
            late = time.monotonic() > deadline
            if late and filled < nr_bytes:
                self.let_go(self.stalled)
            if late or not received:
                break
            _acknowledge_at_once(self._connection)
        return bytearray(view[:filled])

    def put_back(self, data: bytes) -> None:
        """To be received again, before anything else."""
        self._back = data + self._back

    def take_back(self) -> bytes:
        """What was put back and nobody has received since."""
        data, self._back = self._back, b""
        return data

    def receive(self, room: memoryview) -> int | None:
        """As many bytes as have come and fit; 0 when the peer has closed, None when there are none.

        Raises OSError, of an encrypted connection also where a record does not come whole in time.
        """
        if self._encrypted:
            if not cast(ssl.SSLSocket, self._connection).pending() and not self.wait(0):
                return None
            count = self._connection.recv_into(room)
        else:
            try:
                count = os.readv(self._connection.fileno(), [room])
            except BlockingIOError:
                return None
        if count < len(room):
            _acknowledge_at_once(self._connection)
        return count

    def wait(self, seconds: float) -> bool:
        """Whether something came, or the peer hung up, within so many seconds."""
        return bool(self._poll.poll(seconds * 1000))

    def answer(self, pdu: bytes) -> bool:
        """False when the peer is gone, or takes nothing for too long."""
        try:
            sent = 0 if self._encrypted else os.write(self._connection.fileno(), pdu)
        except BlockingIOError:
            sent = 0
        except OSError:
            return False
        if sent < len(pdu):
            try:
                self._connection.sendall(pdu[sent:])
            except OSError:
                return False
        _acknowledge_at_once(self._connection)
        return True

    def let_go(self, why: str) -> None:
        """Of a peer that does not speak as it should."""
        logger.warning("let go of %s: %s", self._peer, why)
        self.is_over = True
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    @property
    def stalled(self) -> str:
        return f"it stalled for {self.timeout:g} s within a PDU"


class Pause:
    """Stands in for the event at which an association's reactor pauses; knows whether it waits there."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._shut = self._waiting = False

    def wait(self, _timeout: float | None = None) -> bool:
        """Called by the reactor, in each of its rounds."""
        with self._changed:
            self._waiting = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._shut)
            self._waiting = False
        return True

    def open(self) -> None:
        """The reactor goes on."""
        with self._changed:
            self._shut = False
            self._changed.notify_all()


class Checkpoint(Pause):
    """Where the reactor of an association that we ask for pauses while we wait for an answer.

    pynetdicom's own event can be passed once more after it was cleared; in that round the reactor may take
    the answer, which is then waited for in vain.
    """

    def __init__(self, association: Association) -> None:
        super().__init__()
        self._reactor = association

    def clear(self) -> None:
        """Returns once the reactor waits."""
        deadline = time.monotonic() + PAUSE_SECONDS
        with self._changed:
            self._shut = True
            while not self._waiting and self._is_running() and time.monotonic() < deadline:
                self._changed.wait(0.01)

    def set(self) -> None:
        """pynetdicom has its answer."""
        self.open()

    def _is_running(self) -> bool:
        return self._reactor.is_alive() and threading.current_thread() is not self._reactor


def guard(event: Event, timeout: float) -> None:
    """Handler of EVT_CONN_OPEN, on either side; no reactor reads the socket yet."""
    if event.assoc.is_requestor:
        event.assoc._reactor_checkpoint = cast(threading.Event, Checkpoint(event.assoc))
    dul = event.assoc.dul
    if dul.socket is not None:
        dul.socket = GuardedSocket(dul.socket, timeout)


def watch_size(event: Event) -> None:
    """Handler of EVT_PDU_RECV, in the thread that reads: a peer whose object has no end is let go."""
    connection = event.assoc.dul.socket
    if not isinstance(event.pdu, P_DATA_TF) or not isinstance(connection, GuardedSocket):
        return
    for value in event.pdu.presentation_data_value_items:
        data = value.presentation_data_value or b""
        ends = bool(data) and bool(data[0] & LAST_FRAGMENT)
        connection.object_bytes = 0 if ends else connection.object_bytes + len(data)
    if connection.object_bytes > LARGEST_OBJECT:
        connection.let_go(ENDLESS)


def hang_up(association: Association) -> None:
    """Close from any thread; whoever reads or writes finds the connection closed."""
    wrapper = association.dul.socket
    if wrapper is not None and wrapper.socket is not None:
        with suppress(OSError):
            wrapper.socket.shutdown(socket.SHUT_RDWR)


def close(association: Association) -> None:
    """Close the connection of an ended association; pynetdicom forgets to when a peer aborts early."""
    wrapper = association.dul.socket
    if wrapper is not None and wrapper.socket is not None:
        wrapper.socket.close()


def forget(event: Event) -> None:
    """Handler of EVT_CONN_CLOSE: a peer that left without a request holds no association slot any longer.

    pynetdicom would wait its whole ACSE timeout for the request: a port scan or a load balancer's health
    check could use up the limit. None is what that wait gives when it ends.
    """
    if event.assoc.requestor.primitive is None:
        event.assoc.dul.to_user_queue.put(None)


def _tuned(connection: socket.socket | None, timeout: float) -> socket.socket:
    if connection is None:
        raise OSError("the connection is closed")
    connection.settimeout(timeout)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    _acknowledge_at_once(connection)
    return connection


def _acknowledge_at_once(connection: socket.socket) -> None:
    """Untuned senders wait for our TCP acknowledgement (Nagle); Linux forgets this option after each use."""
    if hasattr(socket, "TCP_QUICKACK"):
        with suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
