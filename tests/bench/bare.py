"""The least that a receiver can do: bytes from the socket into files, flushed or not, and an answer.

    python -m tests.bench.bare PORT FOLDER SYNC

It understands just enough for the benchmark's senders: nothing is read, hashed, put on record or refused.
"""

import os
import socket
import sys

from tests import wire

ACCEPTED = wire.pdu(
    wire.ASSOCIATE_AC,
    b"\0\1\0\0"
    + bytes(64)
    + wire.item(0x10, b"1.2.840.10008.3.1.1.1")
    + wire.item(0x21, b"\1\0\0\0" + wire.item(0x40, wire.EXPLICIT.encode()))
    + wire.item(0x50, wire.item(0x51, (131072).to_bytes(4, "big"))),
)
STORED = b"".join(wire.element(tag, value) for tag, value in ((0x0100, 0x8001), (0x0120, 1), (0x0900, 0)))
ANSWER = wire.pdu(wire.P_DATA, wire.pdv(1, wire.COMMAND | wire.LAST, STORED))
LARGEST = 1 << 20


def message(connection: socket.socket, room: memoryview) -> int:
    """Bytes of the packets up to the last one of a data set; 0 when no other comes."""
    filled = start = 0
    while True:
        while filled < start + 12 or filled < start + 6 + int.from_bytes(room[start + 2 : start + 6], "big"):
            if room[start] == wire.RELEASE_RQ or not (count := connection.recv_into(room[filled:])):
                return 0
            filled += count
        end = start + 6 + int.from_bytes(room[start + 2 : start + 6], "big")
        if room[start + 11] == wire.LAST:
            return end
        start = end


def serve(connection: socket.socket, place: str, sync: bool) -> None:
    wire.receive(connection, int.from_bytes(wire.receive(connection, 6)[2:], "big"))
    connection.sendall(ACCEPTED)
    folder, room, number = os.open(place, os.O_RDONLY), memoryview(bytearray(LARGEST)), 0
    while size := message(connection, room):
        file = os.open(f"{place}/{os.getpid()}-{number}", os.O_CREAT | os.O_WRONLY)
        os.write(file, room[:size])
        if sync:
            os.fsync(file)
            os.fsync(folder)
        os.close(file)
        number += 1
        room[0] = 0
        connection.sendall(ANSWER)
    connection.sendall(wire.pdu(wire.RELEASE_RP, bytes(4)))


def main(port: int, place: str, sync: bool) -> None:
    server = socket.create_server(("127.0.0.1", port), backlog=100)
    while True:
        connection, _ = server.accept()
        if not os.fork():
            serve(connection, place, sync)
            os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3] == "True")
