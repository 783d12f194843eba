"""Audit messages to a collector: RFC 5424 over TLS (PS3.15 A.6), TCP (RFC 6587) or UDP (PS3.15 A.7)."""

from __future__ import annotations

import re
import socket
from collections.abc import Sequence

from triage.config import Syslog
from triage.errors import Retryable

NOTICE, WARNING = 10 * 8 + 5, 10 * 8 + 4
"""PRI: facility 10, security; severity notice, or warning for what failed or was refused."""


def send(messages: Sequence[str], collector: Syslog, timeout_seconds: float) -> None:
    """Hand over all messages, in order. Raises Retryable; the collector may then have some of them."""
    lines = [_line(message) for message in messages]
    try:
        if collector.protocol == "udp":
            _send_datagrams(lines, collector)
            return
        with socket.create_connection((collector.host, collector.port), timeout_seconds) as plain:
            if collector.protocol == "tcp":
                _send_stream(lines, plain)
                return
            with collector.tls.context().wrap_socket(plain, server_hostname=collector.host) as secured:
                _send_stream(lines, secured)
    except OSError as error:
        where = f"{collector.host}:{collector.port} over {collector.protocol}"
        raise Retryable(f"audit.syslog: {where}: {error}") from error


def _send_datagrams(lines: Sequence[bytes], collector: Syslog) -> None:
    family, kind, protocol, _, address = socket.getaddrinfo(
        collector.host, collector.port, type=socket.SOCK_DGRAM
    )[0]
    with socket.socket(family, kind, protocol) as datagrams:
        for line in lines:
            datagrams.sendto(line, address)


def _send_stream(lines: Sequence[bytes], stream: socket.socket) -> None:
    """Each with its length before it; names may hold what a line end would be mistaken for."""
    for line in lines:
        stream.sendall(b"%d %b" % (len(line), line))
    stream.shutdown(socket.SHUT_WR)


def _line(message: str) -> bytes:
    """Header and message, UTF-8 with its mark."""
    moment = re.search(r'EventDateTime="([^"]*)"', message)
    priority = NOTICE if 'EventOutcomeIndicator="0"' in message else WARNING
    header = f"<{priority}>1 {moment[1] if moment else '-'} {socket.gethostname()} triage - DICOM+RFC3881 - "
    return f"{header}\ufeff{message}".encode()
