"""DICOM's upper layer spoken by hand (PS3.8 section 9.3), rightly and wrongly."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterable
from contextlib import suppress

from pydicom import Dataset
from pydicom.uid import CTImageStorage, ImplicitVRLittleEndian

from tests.peers import HOST

VERIFICATION = "1.2.840.10008.1.1"
STORE, ECHO = 0x0001, 0x0030
ABORT = b"\x07\x00\x00\x00\x00\x04\x00\x00\x00\x00"
RELEASE = b"\x05\x00\x00\x00\x00\x04\x00\x00\x00\x00"


def pdu(kind: int, content: bytes) -> bytes:
    return bytes([kind, 0]) + len(content).to_bytes(4, "big") + content


def item(kind: int, value: bytes) -> bytes:
    return bytes([kind, 0]) + len(value).to_bytes(2, "big") + value


def context(number: int, abstract: str, *syntaxes: str) -> bytes:
    names = item(0x30, abstract.encode()) + b"".join(item(0x40, one.encode()) for one in syntaxes)
    return item(0x20, bytes([number, 0, 0, 0]) + names)


CONTEXTS = (
    context(1, CTImageStorage, ImplicitVRLittleEndian),
    context(3, VERIFICATION, ImplicitVRLittleEndian),
)


def request(
    contexts: Iterable[bytes] = CONTEXTS,
    *,
    calling: str = "SCANNER",
    called: str = "TRIAGE",
    user: bytes = b"",
) -> bytes:
    """A-ASSOCIATE-RQ."""
    about = item(0x51, (16384).to_bytes(4, "big")) + item(0x52, b"1.2.3") + user
    items = item(0x10, b"1.2.840.10008.3.1.1.1") + b"".join(contexts) + item(0x50, about)
    titles = b"TRIAGE".ljust(16) + b"SCANNER".ljust(16)
    return pdu(1, b"\x00\x01\x00\x00" + titles + bytes(32) + items)


def fragment(number: int, content: bytes, *, command: bool, last: bool) -> bytes:
    """P-DATA-TF with one value."""
    return pdu(4, (len(content) + 2).to_bytes(4, "big") + bytes([number, command | last << 1]) + content)


def element(tag: int, value: bytes) -> bytes:
    value += b"\0" * (len(value) % 2)
    return struct.pack("<HHI", tag >> 16, tag & 0xFFFF, len(value)) + value


def command(kind: int, sop_class: str, instance: str = "", data: bool = False) -> bytes:
    """A command set (PS3.7 annex E)."""
    said = element(0x00000002, sop_class.encode()) + element(0x00000100, struct.pack("<H", kind))
    said += element(0x00000110, b"\1\0")
    if kind == STORE:
        said += element(0x00000700, b"\0\0")
    said += element(0x00000800, struct.pack("<H", 0x0001 if data else 0x0101))
    if instance:
        said += element(0x00001000, instance.encode())
    return element(0x00000000, struct.pack("<I", len(said))) + said


def store(one: Dataset, data: bytes, number: int = 1, piece: int = 16000) -> list[bytes]:
    """C-STORE-RQ of a data set, encoded already."""
    pieces = [data[at : at + piece] for at in range(0, len(data), piece)] or [b""]
    sent = [command(STORE, one.SOPClassUID, one.SOPInstanceUID, data=True)]
    return [
        fragment(number, sent[0], command=True, last=True),
        *(fragment(number, part, command=False, last=part is pieces[-1]) for part in pieces),
    ]


def echo(number: int = 3) -> bytes:
    return fragment(number, command(ECHO, VERIFICATION), command=True, last=True)


def connect(port: int, seconds: float = 10) -> socket.socket:
    return socket.create_connection((HOST, port), timeout=seconds)


def associated(port: int, said: bytes | None = None) -> socket.socket:
    """A connection on which the association was accepted."""
    connection = connect(port)
    connection.sendall(request() if said is None else said)
    answer = answered(connection)
    if answer[:1] != b"\x02":
        connection.close()
        raise ConnectionError(f"not accepted: {answer[:10]!r}")
    return connection


def answered(connection: socket.socket) -> bytes:
    """The next PDU; b"" when the peer closed instead."""
    head = _exactly(connection, 6)
    return head and head + _exactly(connection, int.from_bytes(head[2:6], "big"))


def _exactly(connection: socket.socket, count: int) -> bytes:
    got = b""
    while len(got) < count:
        try:
            part = connection.recv(count - len(got))
        except ConnectionError:
            return b""
        if not part:
            return b""
        got += part
    return got


def closed_within(connection: socket.socket, seconds: float, drip: bytes = b"") -> bool:
    """Whether the peer closes in time; meanwhile ``drip`` is sent, byte by byte."""
    deadline = time.monotonic() + seconds
    connection.settimeout(0.1 if drip else seconds)
    while time.monotonic() < deadline:
        try:
            if drip:
                connection.send(drip)
            if not connection.recv(65536):
                return True
        except TimeoutError:
            continue
        except OSError:
            return True
    return False


def hang_up(connection: socket.socket, *, rudely: bool = False) -> None:
    """With FIN, or with RST as a crashed peer."""
    if rudely:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    with suppress(OSError):
        connection.close()
