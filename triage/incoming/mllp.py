"""MLLP: messages come over TCP one after the other, each is answered before the next is read."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections.abc import Callable
from ipaddress import ip_address, ip_network

from hl7.mllp import HL7StreamReader, HL7StreamWriter, InvalidBlockError, start_hl7_server

from triage.config import Orders

logger = logging.getLogger(__name__)

LONGEST_MESSAGE = 1024 * 1024
"""Bytes; an order or a report is some kilobytes."""
MAXIMUM_CONNECTIONS = 50
TURN_SECONDS = 5.0

Take = Callable[[bytes], bytes]
"""A message → its acknowledgment; called from a thread, returns when the message is stored."""


def serve(
    settings: Orders,
    port: int,
    take: Take,
    stop: threading.Event,
    on_ready: Callable[[], None] = lambda: None,
    on_turn: Callable[[], None] = lambda: None,
) -> None:
    """Receive until told to stop; a message that is being stored is answered first. Raises OSError.

    ``on_ready`` is called once we listen, ``on_turn`` every few seconds as long as all goes on.
    """
    asyncio.run(_serve(settings, port, take, stop, on_ready, on_turn))


async def _serve(
    settings: Orders,
    port: int,
    take: Take,
    stop: threading.Event,
    on_ready: Callable[[], None],
    on_turn: Callable[[], None],
) -> None:
    networks = [ip_network(peer) for peer in settings.peers]
    busy = asyncio.Lock()  # messages of one order over two connections are stored one after the other
    conversations: set[asyncio.Task[None]] = set()

    def connected(reader: HL7StreamReader, writer: HL7StreamWriter) -> None:
        address = writer.get_extra_info("peername")[0]
        if networks and not any(ip_address(address) in network for network in networks):
            logger.warning("turned away %s: not in orders.peers", address)
            writer.close()
        elif len(conversations) >= MAXIMUM_CONNECTIONS:
            logger.warning("turned away %s: %d connections are open", address, len(conversations))
            writer.close()
        else:
            # Connections stay open for days; one whose peer vanished must not hold its place for ever.
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            task = asyncio.create_task(_converse(reader, writer, take, busy))
            conversations.add(task)
            task.add_done_callback(conversations.discard)

    server = await start_hl7_server(connected, settings.host, port, limit=LONGEST_MESSAGE)
    logger.info("listening for HL7 on %s:%d", settings.host, port)
    await asyncio.to_thread(on_ready)
    while not await asyncio.to_thread(stop.wait, TURN_SECONDS):
        on_turn()
    server.close()
    async with busy:
        for task in conversations:
            task.cancel()
    await asyncio.gather(*conversations, return_exceptions=True)


async def _converse(reader: HL7StreamReader, writer: HL7StreamWriter, take: Take, busy: asyncio.Lock) -> None:
    address = writer.get_extra_info("peername")[0]
    try:
        while True:
            message = await reader.readblock()
            async with busy:
                writer.writeblock(await asyncio.to_thread(take, message))
            await writer.drain()  # a peer that does not read its answers holds up no other
    except asyncio.IncompleteReadError as error:
        if error.partial:
            logger.warning("%s left in the middle of a message", address)
    except (InvalidBlockError, ValueError):
        logger.warning("let go of %s: no MLLP, or over %d bytes", address, LONGEST_MESSAGE)
    except OSError as error:
        logger.warning("lost %s: %s", address, error.strerror)
    finally:
        writer.close()
