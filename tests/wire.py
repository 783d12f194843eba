"""DICOM's upper layer by hand (PS3.8 section 9.3, PS3.7 annex E): for peers quick or rude as none else is."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress

from tests.peers import HOST

ASSOCIATE_RQ, ASSOCIATE_AC, P_DATA, RELEASE_RQ, RELEASE_RP, ABORT = 1, 2, 4, 5, 6, 7
COMMAND, LAST = 1, 2
"""Bits of the message control header."""
CT, VERIFICATION = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.1.1"
IMPLICIT, EXPLICIT = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1"
C_ECHO, NO_DATA_SET = 0x0030, 0x0101


def pdu(kind: int, value: bytes) -> bytes:
    return bytes([kind, 0]) + len(value).to_bytes(4, "big") + value


def pdv(context: int, control: int, fragment: bytes) -> bytes:
    return (len(fragment) + 2).to_bytes(4, "big") + bytes([context, control]) + fragment


def item(kind: int, value: bytes) -> bytes:
    return bytes([kind, 0]) + len(value).to_bytes(2, "big") + value


def context(number: int, abstract: str, *transfers: str) -> bytes:
    """A presentation context that is proposed."""
    syntaxes = item(0x30, abstract.encode()) + b"".join(item(0x40, uid.encode()) for uid in transfers)
    return item(0x20, bytes([number, 0, 0, 0]) + syntaxes)


RELEASED, ABORTED = pdu(RELEASE_RQ, bytes(4)), pdu(ABORT, bytes(4))
CONTEXTS = context(1, CT, EXPLICIT), context(3, VERIFICATION, IMPLICIT)


def request(
    contexts: Iterable[bytes] = CONTEXTS,
    *,
    called: str = "TRIAGE",
    calling: str = "SCANNER",
    maximum: int = 131072,
    user: bytes = b"",
) -> bytes:
    """An A-ASSOCIATE-RQ; ``user``: further items of user information."""
    about = item(0x51, maximum.to_bytes(4, "big")) + item(0x52, b"1.2.3") + user
    items = item(0x10, b"1.2.840.10008.3.1.1.1") + b"".join(contexts) + item(0x50, about)
    titles = called.encode().ljust(16) + calling.encode().ljust(16)
    return pdu(ASSOCIATE_RQ, b"\x00\x01\x00\x00" + titles + bytes(32) + items)


def element(number: int, value: bytes | str | int) -> bytes:
    """One of group 0000: a UID, or a number of 16 bits."""
    match value:
        case int():
            value = value.to_bytes(2, "little")
        case str():
            value = value.encode() + b"\0" * (len(value) % 2)
    return b"\0\0" + number.to_bytes(2, "little") + len(value).to_bytes(4, "little") + value


def command(**changes: bytes | str | int | None) -> bytes:
    """A C-STORE-RQ's; ``changes`` by the names below, None leaves one out."""
    known = {"sop_class": 0x0002, "field": 0x0100, "message": 0x0110, "priority": 0x0700}
    known |= {"data_set": 0x0800, "sop_instance": 0x1000}
    values = {"sop_class": CT, "field": 1, "message": 1, "priority": 0, "data_set": 0, "sop_instance": "1.2"}
    values |= changes
    body = b"".join(element(known[name], value) for name, value in values.items() if value is not None)
    return element(0, len(body).to_bytes(4, "little")) + body


def store(context: int, sop_instance: str, body: bytes, maximum: int = 131072) -> list[bytes]:
    """The PDUs of one C-STORE-RQ: the command in one, the data set in as many as ``maximum`` makes."""
    parts = [pdu(P_DATA, pdv(context, COMMAND | LAST, command(sop_instance=sop_instance)))]
    size = maximum - 6
    for at in range(0, len(body), size):
        last = LAST if at + size >= len(body) else 0
        parts.append(pdu(P_DATA, pdv(context, last, body[at : at + size])))
    return parts


ECHO = {"sop_class": VERIFICATION, "field": C_ECHO, "data_set": NO_DATA_SET}
"""Changes that make a command a C-ECHO-RQ."""


def echo(context: int = 3) -> bytes:
    said = command(**ECHO, priority=None, sop_instance=None)
    return pdu(P_DATA, pdv(context, COMMAND | LAST, said))


def connect(port: int, seconds: float = 10) -> socket.socket:
    return socket.create_connection((HOST, port), timeout=seconds)


def receive(connection: socket.socket, count: int) -> bytes:
    """Exactly so many bytes, or fewer where the peer hangs up."""
    data = b""
    while len(data) < count and (more := connection.recv(count - len(data))):
        data += more
    return data


def answered(connection: socket.socket) -> bytes:
    """The next PDU; b"" where the peer hung up instead."""
    with suppress(ConnectionError):
        if len(head := receive(connection, 6)) == 6:
            return head + receive(connection, int.from_bytes(head[2:], "big"))
    return b""


def answers(connection: socket.socket) -> Iterator[bytes]:
    """Every PDU that comes until the peer hangs up."""
    while answer := answered(connection):
        yield answer


def associate(port: int, connection: socket.socket | None = None) -> tuple[socket.socket, int]:
    """A socket on which CT images may be stored in context 1, and the longest P-DATA to send on it.

    Raises ConnectionError where the association is not accepted.
    """
    connection = connection or connect(port)
    connection.sendall(request())
    answer = answered(connection)
    if answer[:1] != bytes([ASSOCIATE_AC]):
        connection.close()
        raise ConnectionError(f"not accepted: {answer[:10]!r}")
    at = answer.index(b"\x51\x00\x00\x04")
    return connection, int.from_bytes(answer[at + 4 : at + 8], "big") or 131072


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
