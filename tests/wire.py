"""DICOM on the wire, by hand (PS3.8 section 9.3, PS3.7 annex E): for peers quick or rude as no library is."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping, Sequence

ASSOCIATE_RQ, ASSOCIATE_AC, P_DATA, RELEASE_RQ, RELEASE_RP, ABORT = 1, 2, 4, 5, 6, 7
RELEASE = b"\x05\x00\x00\x00\x00\x04\x00\x00\x00\x00"
COMMAND, LAST = 1, 2
"""Bits of the message control header."""
CT = "1.2.840.10008.5.1.4.1.1.2"
EXPLICIT = "1.2.840.10008.1.2.1"


def pdu(kind: int, value: bytes) -> bytes:
    return bytes([kind, 0]) + len(value).to_bytes(4, "big") + value


def pdv(context: int, control: int, fragment: bytes) -> bytes:
    return (len(fragment) + 2).to_bytes(4, "big") + bytes([context, control]) + fragment


def item(kind: int, value: bytes) -> bytes:
    return bytes([kind, 0]) + len(value).to_bytes(2, "big") + value


def request(
    contexts: Mapping[int, tuple[str, Sequence[str]]], called: str = "TRIAGE", maximum: int = 131072
) -> bytes:
    """An A-ASSOCIATE-RQ; ``contexts``: abstract and transfer syntaxes by presentation context ID."""
    items = item(0x10, b"1.2.840.10008.3.1.1.1")
    for number, (abstract, transfers) in contexts.items():
        syntaxes = item(0x30, abstract.encode()) + b"".join(item(0x40, uid.encode()) for uid in transfers)
        items += item(0x20, bytes([number, 0, 0, 0]) + syntaxes)
    items += item(0x50, item(0x51, maximum.to_bytes(4, "big")) + item(0x52, b"1.2.3"))
    titles = called.encode().ljust(16) + b"WIRE".ljust(16)
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


def store(context: int, sop_instance: str, body: bytes, maximum: int = 131072, **changes: object) -> bytes:
    """All PDUs of one C-STORE-RQ: the command in one, the data set in as many as ``maximum`` makes."""
    said = command(sop_instance=sop_instance, **changes)
    parts = [pdu(P_DATA, pdv(context, COMMAND | LAST, said))]
    size = maximum - 6
    for at in range(0, len(body), size):
        last = LAST if at + size >= len(body) else 0
        parts.append(pdu(P_DATA, pdv(context, last, body[at : at + size])))
    return b"".join(parts)


def receive(connection: socket.socket, count: int) -> bytes:
    """Exactly so many bytes, or fewer where the peer hangs up."""
    data = b""
    while len(data) < count and (more := connection.recv(count - len(data))):
        data += more
    return data


def answers(connection: socket.socket) -> Iterator[bytes]:
    """Every PDU that comes until the peer hangs up."""
    while len(head := receive(connection, 6)) == 6:
        yield head + receive(connection, int.from_bytes(head[2:], "big"))


def maximum_of(accepted: bytes) -> int:
    """The longest P-DATA that whoever sent this A-ASSOCIATE-AC takes."""
    at = accepted.index(b"\x51\x00\x00\x04")
    return int.from_bytes(accepted[at + 4 : at + 8], "big") or 131072


def associate(
    port: int, called: str = "TRIAGE", connection: socket.socket | None = None
) -> tuple[socket.socket, int]:
    """A socket on which CT images may be stored in context 1, and the longest P-DATA to send on it."""
    connection = connection or socket.create_connection(("127.0.0.1", port), timeout=60)
    connection.sendall(request({1: (CT, [EXPLICIT])}, called))
    answer = next(answers(connection))
    assert answer[0] == ASSOCIATE_AC
    return connection, maximum_of(answer)
