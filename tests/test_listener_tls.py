"""TLS at the listener: who is let in, who is not, and what the log tells then."""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.certificates import Pair, authority, issued
from tests.objects import ct, save
from tests.peers import HOST, free_port
from tests.wire import associate
from triage import config
from triage.config import Destination, Tls
from triage.dicom import sender
from triage.dicom.listener import Listener
from triage.errors import ConfigError


@dataclass
class Place:
    """A listener that insists on mutual authentication."""

    port: int
    ca: Path
    client: Pair
    stranger: Pair
    expired: Pair
    received: list[object]

    def peer(self, pair: Pair | None, ca: Path | None = None) -> Destination:
        certificate, key = pair or (None, None)
        tls = Tls(ca=ca or self.ca, certificate=certificate, key=key)
        return Destination(name="us", ae_title="TRIAGE", host=HOST, port=self.port, tls=tls)


@pytest.fixture(scope="module", params=[True, False], ids=["fast", "pynetdicom's"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("tls")
    ca, other = authority(folder, "ca"), authority(folder, "other")
    server, client = issued(folder, ca, "server"), issued(folder, ca, "client")
    stranger, expired = issued(folder, other, "stranger"), issued(folder, ca, "expired", expired=True)
    tls = {"ca": ca[0], "certificate": server[0], "key": server[1]}
    section = config.Listener.model_validate(
        {"host": HOST, "port": free_port(), "tls": tls, "fast": request.param, "timeout_seconds": 2}
    )
    received: list[object] = []
    with Listener(section, folder / "spool", received.append, lambda: True) as listener:
        yield Place(listener.port, ca[0], client, stranger, expired, received)


def test_objects_come_in_over_mutual_tls(place: Place, tmp_path: Path) -> None:
    files = [save(ct(n, PixelData=bytes(300_000)), tmp_path / f"{n}.dcm") for n in range(1, 4)]
    before = len(place.received)
    outcomes = sender.send(files, place.peer(place.client), calling_ae_title="S", timeout_seconds=20)
    assert [outcome.error for outcome in outcomes] == ["", "", ""]
    assert len(place.received) == before + 3


@pytest.mark.parametrize(
    ("who", "said"),
    [
        ("stranger", "put its authority into listener.tls.ca"),
        ("expired", "(certificate has expired): renew it"),
        ("nobody", "it showed no certificate"),
    ],
)
def test_who_cannot_prove_himself_is_refused(
    who: str, said: str, place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    pair = {"stranger": place.stranger, "expired": place.expired, "nobody": None}[who]
    assert sender.echo(place.peer(pair), "S", 5) is not None
    logged(caplog, f"refused the connection from {HOST}: ", said)
    assert sender.echo(place.peer(place.client), "S", 5) is None


def test_a_plain_sender_is_told_to_switch_tls_on(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    plain = place.peer(None).model_copy(update={"tls": None})
    assert sender.echo(plain, "S", 5) is not None
    logged(caplog, "it does not speak TLS: switch TLS on at the sender")


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion")
def test_an_old_protocol_is_refused(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    old.set_ciphers("ALL:@SECLEVEL=0")
    old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
    with socket.create_connection((HOST, place.port), 5) as plain, pytest.raises(ssl.SSLError):
        old.wrap_socket(plain)
    logged(caplog, "it offers nothing as new as TLS 1.2")


def test_silent_clients_stop_nobody(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    silent = [socket.create_connection((HOST, place.port)) for _ in range(20)]
    start = time.monotonic()
    assert sender.echo(place.peer(place.client), "S", 5) is None
    assert time.monotonic() - start < 2
    logged(caplog, "no TLS handshake within 2 s")
    assert [connection.recv(1) for connection in silent] == [b""] * 20
    for connection in silent:
        connection.close()


def test_a_peer_that_stalls_in_mid_pdu_is_let_go(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    context = place.peer(place.client).tls.context()  # type: ignore[union-attr]
    plain = socket.create_connection((HOST, place.port), 10)
    connection, _ = associate(place.port, connection=context.wrap_socket(plain, server_hostname=HOST))
    with connection:
        connection.sendall(b"\x04\x00\x00\x00\x10\x00" + b"x" * 100)
        start = time.monotonic()
        assert connection.recv(1) == b""
        assert time.monotonic() - start < 9
    logged(caplog, "stalled for 2 s within a PDU")


def logged(caplog: pytest.LogCaptureFixture, *said: str) -> None:
    """A moment after the peer has seen the end."""
    deadline = time.monotonic() + 10
    while not all(part in caplog.text for part in said):
        assert time.monotonic() < deadline, caplog.text
        time.sleep(0.02)


def test_a_certificate_that_is_not_there_ends_the_start(tmp_path: Path) -> None:
    tls = {"certificate": tmp_path / "none.pem", "key": tmp_path / "none.key"}
    section = config.Listener.model_validate({"host": HOST, "port": free_port(), "tls": tls})
    with pytest.raises(ConfigError, match=r"listener\.tls: .*none\.pem"):
        Listener(section, tmp_path, lambda _instance: None, lambda: True).start()
