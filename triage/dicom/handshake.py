"""TLS for those who connect: hands are shaken in the connection's own thread, so that nobody waits for it."""

from __future__ import annotations

import logging
import select
import socket
import ssl
import threading
from contextlib import suppress
from time import monotonic
from typing import Any

from pynetdicom.transport import RequestHandler

logger = logging.getLogger(__name__)

AT_ONCE = threading.BoundedSemaphore(100)
"""Handshakes under way; whoever comes then is hung up on, and may come again."""

CERTIFICATE = "its certificate was not accepted ({}): renew it, or put its authority into listener.tls.ca"
NOT_TLS = "it does not speak TLS: switch TLS on at the sender, or off here (listener.tls)"
TOO_OLD = "it offers nothing as new as TLS 1.2 with its ciphers: update the sender"
DISTRUSTS = "it does not accept our certificate: give it the authority of listener.tls.certificate"
NAMELESS = "it showed no certificate: give it one of an authority in listener.tls.ca"
REASONS = {
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": NAMELESS,
    **dict.fromkeys(("HTTP_REQUEST", "HTTPS_PROXY_REQUEST", "WRONG_VERSION_NUMBER"), NOT_TLS),
    **dict.fromkeys(("RECORD_TOO_SMALL", "BAD_RECORD_TYPE", "PACKET_LENGTH_TOO_LONG"), NOT_TLS),
    **dict.fromkeys(("UNSUPPORTED_PROTOCOL", "NO_SHARED_CIPHER", "VERSION_TOO_LOW"), TOO_OLD),
    **dict.fromkeys(("TLSV1_ALERT_UNKNOWN_CA", "SSLV3_ALERT_BAD_CERTIFICATE"), DISTRUSTS),
    **dict.fromkeys(("SSLV3_ALERT_CERTIFICATE_EXPIRED", "SSLV3_ALERT_CERTIFICATE_UNKNOWN"), DISTRUSTS),
}


class Encrypted(RequestHandler):
    """Shakes hands before there is an association, where ``tls`` is set."""

    tls: ssl.SSLContext | None = None
    seconds: float = 30.0

    def handle(self) -> None:
        if self.tls is not None:
            plain: Any = self.request
            connection = _shaken(plain, self.tls, self.seconds)
            if connection is None:
                plain.close()
                return
            self.request = connection
        super().handle()


def _shaken(plain: socket.socket, tls: ssl.SSLContext, seconds: float) -> ssl.SSLSocket | None:
    """The encrypted connection, or None, and the log says why."""
    peer = plain.getpeername()[0]
    if not AT_ONCE.acquire(blocking=False):
        logger.warning("hung up on %s: too many connections wait for their TLS handshake", peer)
        return None
    try:
        connection = tls.wrap_socket(plain, server_side=True, do_handshake_on_connect=False)
        with suppress(OSError):
            peer = connection.getpeername()[0]
        try:
            _shake(connection, seconds)
        except OSError as error:
            connection.close()
            logger.warning("refused the connection from %s: %s", peer, explained(error, seconds))
            return None
        return connection
    finally:
        AT_ONCE.release()


def _shake(connection: ssl.SSLSocket, seconds: float) -> None:
    """Raises OSError, TimeoutError also for a peer that drips."""
    deadline = monotonic() + seconds
    connection.setblocking(False)
    while True:
        try:
            connection.do_handshake()
            break
        except ssl.SSLWantReadError:
            readable, writable = [connection], []
        except ssl.SSLWantWriteError:
            readable, writable = [], [connection]
        if not any(select.select(readable, writable, [], max(0, deadline - monotonic()))):
            raise TimeoutError
    connection.settimeout(seconds)


def explained(error: OSError, seconds: float) -> str:
    """What went wrong, and what to do."""
    match error:
        case TimeoutError():
            return f"no TLS handshake within {seconds:g} s"
        case ssl.SSLCertVerificationError():
            return CERTIFICATE.format(error.verify_message)
        case ssl.SSLEOFError() | ConnectionError():
            return "it hung up in the TLS handshake; it may not accept our certificate"
        case ssl.SSLError():
            return REASONS.get(error.reason or "", f"TLS handshake failed: {error.reason or error}")
    return f"TLS handshake failed: {error.strerror}"
