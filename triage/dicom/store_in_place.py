"""C-STORE without pynetdicom's queues, copies and polling: served where its packets are read.

pynetdicom negotiates, and serves whatever is not a plain C-STORE. Once an association is established,
``StoreInPlace`` reads the socket itself: a store request that is as the standard has it is answered here;
every other packet goes to pynetdicom as it came. Its reactor, which would ask its queues a thousand times a
second, meanwhile waits at a ``Gate``.
"""

from __future__ import annotations

import mmap
import re
import struct
import threading
from collections.abc import Callable
from time import monotonic
from typing import NamedTuple, cast

from pynetdicom.association import Association
from pynetdicom.dul import DULServiceProvider
from pynetdicom.pdu_primitives import P_DATA

from triage.dicom import upper_layer
from triage.dicom.receiving import Request
from triage.dicom.upper_layer import ENDLESS, LONGEST_PDU, GuardedSocket, Pause

Store = Callable[[Request, memoryview], int]
"""What becomes of a data set; gives the status to answer with."""

P_DATA_TF = 4
COMMAND, LAST = 1, 2
"""Bits of a message control header (PS3.8 annex E.2)."""
C_STORE_RQ, C_STORE_RSP = 0x0001, 0x8001
NO_DATA_SET = 0x0101
HEAD = struct.Struct(">BxI").unpack_from
FRAGMENT = struct.Struct(">IBB").unpack_from
ELEMENT = struct.Struct("<HHI").unpack_from

AT_ONCE = 256 * 1024
"""Bytes that are read at once, and a buffer begins with four times as many."""
KEPT = 16 * 1024 * 1024
"""A buffer that has grown longer than this is given back after its object."""
LEAST_PDU = 512
"""A peer that takes less at once would need its answer in pieces."""
IDLE_SECONDS = 0.5
"""After which a waiting thread looks whether it is to end."""
ALERT_SECONDS, ALERT_PAUSE = 1.0, 0.002
"""How long, and how often, pynetdicom's own answers are looked for after a packet that was left to it."""
GATE_SECONDS = 0.005
INCOMPLETE, NOT_OURS = -1, -2


class Gate(Pause):
    """Of an association that a peer asks for: shut while we read, until pynetdicom pauses there itself."""

    def __init__(self) -> None:
        super().__init__()
        self._taken = False

    def shut(self, seconds: float) -> bool:
        """True once the reactor waits here, and it then waits until ``open``."""
        with self._changed:
            if self._taken:
                return False
            self._shut = True
            return self._changed.wait_for(lambda: self._waiting, seconds)

    def clear(self) -> None:
        """pynetdicom pauses its reactor itself, to release or to ask: from then on all is left to it."""
        with self._changed:
            self._taken = self._shut = True

    def set(self) -> None:
        """pynetdicom goes on, or ends the association."""
        with self._changed:
            self._taken = True
        self.open()


class Command(NamedTuple):
    """Of a C-STORE-RQ (PS3.7 section 9.3.1.1)."""

    context_id: int
    message_id: int
    sop_class_uid: str
    sop_instance_uid: str
    raw: bytes


def decoded(raw: bytes, context_id: int) -> Command | None:
    """None for what is not a C-STORE-RQ with a data set, exactly as the standard has it."""
    values, at, before = {}, 0, -1
    try:
        while at < len(raw):
            group, element, length = ELEMENT(raw, at)
            at += 8 + length
            value = raw[at - length : at]
            known = ELEMENTS.get(element)
            if group or element <= before or len(value) != length or not (known and known.fullmatch(value)):
                return None
            values[element] = value
            before = element
    except struct.error:
        return None
    if not values.keys() >= NEEDED or int.from_bytes(values[0x0000], "little") != len(raw) - 12:
        return None
    if values[0x0100] != b"\x01\x00" or values[0x0800] == b"\x01\x01":
        return None
    sop_class_uid, sop_instance_uid = (values[one].rstrip(b"\0").decode() for one in (0x0002, 0x1000))
    return Command(
        context_id, int.from_bytes(values[0x0110], "little"), sop_class_uid, sop_instance_uid, bytes(raw)
    )


_UID = re.compile(rb"(?=.{1,64}\Z)(0|[1-9]\d*)(\.(0|[1-9]\d*))*\0?", re.ASCII)
_TWO, _FOUR = re.compile(rb".{2}", re.DOTALL), re.compile(rb".{4}", re.DOTALL)
ELEMENTS = {
    0x0000: _FOUR,
    **dict.fromkeys((0x0002, 0x1000), _UID),
    **dict.fromkeys((0x0100, 0x0110, 0x0800, 0x1031), _TWO),
    0x0700: re.compile(rb"[\0-\2]\0"),
    0x1030: re.compile(rb"[!-\[\]-~]{1,16} ?"),
}
NEEDED = {0x0000, 0x0002, 0x0100, 0x0110, 0x0700, 0x0800, 0x1000}


def answer(command: Command, status: int) -> bytes:
    """The P-DATA-TF of a C-STORE-RSP."""
    numbers = [(0x0100, C_STORE_RSP), (0x0120, command.message_id), (0x0800, NO_DATA_SET), (0x0900, status)]
    parts = [
        _element(0x0002, _padded(command.sop_class_uid)),
        *(_element(element, number.to_bytes(2, "little")) for element, number in numbers),
        _element(0x1000, _padded(command.sop_instance_uid)),
    ]
    body = b"".join(parts)
    said = _element(0x0000, len(body).to_bytes(4, "little")) + body
    fragment = struct.pack(">IBB", len(said) + 2, command.context_id, COMMAND | LAST) + said
    return struct.pack(">BxI", P_DATA_TF, len(fragment)) + fragment


def _element(element: int, value: bytes) -> bytes:
    return struct.pack("<HHI", 0, element, len(value)) + value


def _padded(uid: str) -> bytes:
    return uid.encode() + b"\0" * (len(uid) % 2)


def _memory(size: int) -> memoryview:
    """That goes back to the system with its last user; what malloc has, each thread's arena would keep."""
    return memoryview(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


class _Buffer:
    """A data set so far, ``[0:filled]``, and behind it what the peer sent and nobody has read yet."""

    def __init__(self) -> None:
        self._bytes = _memory(4 * AT_ONCE)
        self._filled = self._start = self._end = 0

    def room(self) -> memoryview:
        """Where more may be received; ``received`` says how much was."""
        if self._start == self._end:
            self._start = self._end = self._filled
        if self._end + AT_ONCE > len(self._bytes):
            self._make_room()
        return self._bytes[self._end : self._end + AT_ONCE]

    def _make_room(self) -> None:
        old, start, end = self._bytes, self._start, self._end
        self._start, self._end = self._filled, self._filled + end - start
        if self._end + AT_ONCE > len(old):
            self._bytes = _memory(2 * len(old) + AT_ONCE)
            self._bytes[: self._filled] = old[: self._filled]
        self._bytes[self._start : self._end] = old[start:end]

    def received(self, count: int) -> None:
        self._end += count

    def put(self, data: bytes) -> None:
        for at in range(0, len(data), AT_ONCE):
            piece = data[at : at + AT_ONCE]
            self.room()[: len(piece)] = piece
            self.received(len(piece))

    def unread(self) -> memoryview:
        return self._bytes[self._start : self._end]

    def take(self, start: int, end: int) -> None:
        """Bytes of ``unread`` belong to the data set."""
        count = end - start
        self._bytes[self._filled : self._filled + count] = self.unread()[start:end]
        self._filled += count

    def read(self, count: int) -> None:
        """So many of ``unread`` are done with."""
        self._start += count

    def data(self) -> memoryview:
        return self._bytes[: self._filled]

    def forget(self) -> None:
        """The data set is done with."""
        self._filled = 0
        if len(self._bytes) > KEPT and self._start == self._end:
            self.__init__()  # type: ignore[misc]


class StoreInPlace(DULServiceProvider):
    """The upper layer of an association that a peer asks for."""

    def __init__(self, association: Association, store: Store, stores: Callable[[str], bool]) -> None:
        super().__init__(association)
        self._store, self._stores = store, stores
        self._gate = Gate()
        association._reactor_checkpoint = cast(threading.Event, self._gate)
        self._buffer = _Buffer()
        self._command: Command | None = None
        self._whole_command: Command | None = None
        self._gone = False
        self._begun: float | None = None
        self._alert_until = 0.0

    def run_reactor(self) -> None:
        try:
            super().run_reactor()
        finally:
            self._gate.set()

    def _is_transport_event(self) -> bool:
        guarded = self.socket
        if isinstance(guarded, GuardedSocket) and self._is_ours(guarded):
            self._run_loop_delay = 0.0
            return self._serve(guarded)
        self._run_loop_delay = 0.001
        if isinstance(guarded, GuardedSocket) and (self._command is not None or self._buffer.unread()):
            return self._hand_over(guarded)
        self._gate.open()
        return super()._is_transport_event()

    def _is_ours(self, guarded: GuardedSocket) -> bool:
        """Whether nothing is under way that pynetdicom has to finish."""
        dimse = self.assoc.dimse
        queues = (self.event_queue, self.to_user_queue, self.to_provider_queue, dimse.msg_queue)
        if self.state_machine.current_state != "Sta6" or guarded.socket is None or self._gone:
            return False
        if dimse.message is not None or not all(queue.empty() for queue in queues):
            return False
        if self.idle_timer_expired() and not self._buffer.unread():
            return False
        if not self._gate.shut(0 if monotonic() < self._alert_until else GATE_SECONDS):
            return False
        return all(queue.empty() for queue in queues)  # before it paused it may have answered

    def _serve(self, guarded: GuardedSocket) -> bool:
        """Read and store until nothing comes for a while; True when something was for pynetdicom."""
        buffer = self._buffer
        buffer.put(guarded.take_back())
        while not self._gone:
            unread = buffer.unread()
            length = self._length(unread)
            if length == INCOMPLETE:
                if not self._receive(guarded):
                    return False
                continue
            if length == NOT_OURS or not self._take(unread[:length]):
                break
            if len(buffer.data()) > upper_layer.LARGEST_OBJECT:
                guarded.let_go(ENDLESS)
                self._buffer, self._command, self._gone = _Buffer(), None, True
                break
            buffer.read(length)
            self._begun = None
            self._idle_timer.restart()
            if self._whole_command is not None:
                self._finish(guarded, self._whole_command)
        return self._hand_over(guarded)

    def _hand_over(self, guarded: GuardedSocket) -> bool:
        """What has come and is not answered goes to pynetdicom, as if nobody had read it."""
        if (command := self._command) is not None:
            begun, fragments = P_DATA(), [bytes([COMMAND | LAST]) + command.raw]
            if data := self._buffer.data():
                fragments.append(bytes([0]) + data)
                guarded.object_bytes = len(data)
            # It asks for lists, though it says tuples.
            begun.presentation_data_value_list = [[command.context_id, one] for one in fragments]  # type: ignore[misc]
            self.assoc.dimse.receive_primitive(begun)
        guarded.put_back(bytes(self._buffer.unread()))
        self._buffer, self._command, self._begun = _Buffer(), None, None
        self._alert_until = monotonic() + ALERT_SECONDS
        self._gate.open()
        return super()._is_transport_event()

    @staticmethod
    def _length(unread: memoryview) -> int:
        """Bytes of the P-DATA that has come whole, INCOMPLETE or NOT_OURS."""
        if not unread:
            return INCOMPLETE
        if unread[0] != P_DATA_TF:
            return NOT_OURS
        if len(unread) < 6:
            return INCOMPLETE
        length = 6 + int(HEAD(unread)[1])
        if length > LONGEST_PDU:
            return NOT_OURS
        return length if length <= len(unread) else INCOMPLETE

    def _take(self, pdu: memoryview) -> bool:
        """Add its fragments to the message; False, with nothing done, where it is no store as we know it."""
        command, complete, at = self._command, False, 6
        fragments: list[tuple[int, int]] = []
        while at < len(pdu):
            if complete or at + 6 > len(pdu):
                return False
            length, context_id, control = FRAGMENT(pdu, at)
            start, at = at + 6, at + 4 + length
            if length < 2 or at > len(pdu):
                return False
            if command is None and control == COMMAND | LAST:
                command = self._expected(decoded(bytes(pdu[start:at]), context_id))
                if command is None:
                    return False
            elif command is None or control & ~LAST or context_id != command.context_id:
                return False
            else:
                fragments.append((start, at))
                complete = control == LAST
        for start, end in fragments:
            self._buffer.take(start, end)
        self._command, self._whole_command = command, command if complete else None
        return len(pdu) > 6

    def _expected(self, command: Command | None) -> Command | None:
        """None for a store that pynetdicom is to refuse, or to answer in pieces."""
        if command is None or 0 < (self.assoc.requestor.maximum_length or 0) < LEAST_PDU:
            return None
        context = self.assoc._accepted_cx.get(command.context_id)
        if context is None or context.abstract_syntax != command.sop_class_uid:
            return None
        return command if self._stores(command.sop_class_uid) else None

    def _finish(self, guarded: GuardedSocket, command: Command) -> None:
        """Store and answer."""
        context, peer = self.assoc._accepted_cx[command.context_id], self.assoc.requestor
        request = Request(
            sop_class_uid=command.sop_class_uid,
            sop_instance_uid=command.sop_instance_uid,
            abstract_syntax=str(context.abstract_syntax),
            transfer_syntax=str(context.transfer_syntax[0]),
            ae_title=peer.ae_title,
            address=peer.address,
        )
        status = self._store(request, self._buffer.data())
        self._buffer.forget()
        self._command = self._whole_command = None
        self._gone = not guarded.answer(answer(command, status))
        self._idle_timer.restart()

    def _receive(self, guarded: GuardedSocket) -> bool:
        """False after a while of silence; else more has come, or the peer is gone."""
        room = self._buffer.room()
        try:
            count = guarded.receive(room)
            if count is None and self._wait(guarded):
                count = guarded.receive(room)
        except OSError:
            count = 0
        self._gone = count == 0
        self._buffer.received(count or 0)
        return count is not None

    def _wait(self, guarded: GuardedSocket) -> bool:
        """Whether anything can be received; raises OSError when the peer stalled within a packet."""
        now = monotonic()
        seconds = ALERT_PAUSE if now < self._alert_until else IDLE_SECONDS
        if self._buffer.unread():
            self._begun = self._begun or now
            left = self._begun + guarded.timeout - now
            if left <= 0:
                guarded.let_go(guarded.stalled)
                raise TimeoutError
            seconds = min(seconds, left)
        return guarded.wait(seconds)


def in_place(association: Association, store: Store, stores: Callable[[str], bool]) -> None:
    """Give a new association this upper layer; ``stores``: whether a SOP class is one of storage."""
    made, plain = StoreInPlace(association, store, stores), association.dul
    made.socket, made.event_queue = plain.socket, plain.event_queue
    association.dul = made
    association.acse_timeout = association.acse_timeout  # each sets a timer of the new one
    association.network_timeout = association.network_timeout
