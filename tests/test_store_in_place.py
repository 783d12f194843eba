"""Both ways of receiving answer alike and keep alike, whatever a peer sends."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import count, pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests import wire
from tests.objects import body, ct, save
from tests.peers import HOST, free_port
from triage import config
from triage.dicom.listener import Listener
from triage.dicom.store_in_place import Gate, decoded

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
"""pynetdicom's thread ends by an exception for a command that it cannot decode; its association ends then."""

CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
CONTEXTS = (*wire.CONTEXTS, wire.context(5, CAPTURE, wire.IMPLICIT))
QUIET, LONG_QUIET = 0.25, 3.0
"""Seconds without an answer after which none is expected; the longer where the two ways seem to differ."""

Message = tuple[dict[str, object], int, int, list[float], int]
"""A store: changes to its command, contexts of command and data, where its data is split, fragments a PDU."""

numbers = count(1)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[tuple[int, Path]]]:
    """Port and spool of a listener of each kind."""
    places = [tmp_path_factory.mktemp("spool") for _ in range(2)]
    common = {"host": HOST, "timeout_seconds": 20}
    listeners = [
        Listener(
            config.Listener.model_validate({**common, "port": free_port(), "fast": fast}),
            place,
            lambda _instance: None,
            lambda: True,
        )
        for fast, place in zip((True, False), places, strict=True)
    ]
    with listeners[0], listeners[1]:
        yield [(listener.port, place) for listener, place in zip(listeners, places, strict=True)]


def slice_of(folder: Path) -> tuple[str, bytes]:
    """SOP Instance UID and data set of a slice that was not sent before."""
    dataset = ct(number := next(numbers), PixelData=bytes([number % 256]) * 3000)
    return str(dataset.SOPInstanceUID), body(save(dataset, folder / "slice.dcm"))


def packed(fragments: list[tuple[int, int, bytes]], together: int) -> bytes:
    """P-DATA PDUs of so many fragments each."""
    pdvs = [wire.pdv(*one) for one in fragments]
    return b"".join(
        wire.pdu(wire.P_DATA, b"".join(pdvs[at : at + together])) for at in range(0, len(pdvs), together)
    )


def split(raw: bytes, places: list[float]) -> list[bytes]:
    cuts = [0, *sorted(int(place * len(raw)) for place in places), len(raw)]
    return [raw[start:end] for start, end in pairwise(cuts)]


@st.composite
def messages(draw: st.DrawFn, whole: bool) -> Message:
    if whole:
        return {}, 1, 1, draw(st.lists(st.floats(0, 1), max_size=4)), draw(st.integers(1, 3))
    changes = draw(
        st.fixed_dictionaries(
            {},
            optional={
                "sop_class": st.sampled_from([CAPTURE, wire.VERIFICATION, "1.2.3", "", None]),
                "field": st.sampled_from([0x30, 0x20, 0x8001, 0x7777, None]),
                "message": st.sampled_from([0, 65535, b"", b"\1\0\2\0", None]),
                "priority": st.sampled_from([2, 9, None]),
                "data_set": st.sampled_from([0x0101, 0x0102, None]),
                "sop_instance": st.sampled_from(["1.2.3 ", "../x", "01.2", "", "1" * 70, None]),
            },
        )
    )
    contexts = st.sampled_from([1, 1, 1, 3, 5, 7, 0])
    parts = draw(st.lists(st.floats(0, 1), max_size=4))
    return changes, draw(contexts), draw(contexts), parts, draw(st.integers(1, 9))


def encoded(message: Message, made: tuple[str, bytes]) -> bytes:
    changes, context, data_context, places, together = message
    said = wire.command(**{"sop_instance": made[0], **changes})
    parts = split(made[1], places)
    fragments = [(context, wire.COMMAND | wire.LAST, said)]
    fragments += [(data_context, 0, part) for part in parts[:-1]] + [(data_context, wire.LAST, parts[-1])]
    return packed(fragments, together)


ODD = st.sampled_from(
    [
        b"",
        wire.RELEASED,
        wire.ABORTED,
        wire.pdu(9, b"xxxx"),
        wire.pdu(wire.P_DATA, b""),
        wire.pdu(wire.P_DATA, b"\0\0\0\1\1"),
        wire.pdu(wire.P_DATA, wire.pdv(1, 2, b"data first")),
        wire.pdu(wire.P_DATA, wire.pdv(1, 3, wire.command())[:-4]),
        wire.pdu(wire.P_DATA, b"\0\0\xff\xff\1\3" + wire.command()),
        packed([(1, 1, wire.command()[:40]), (1, 3, wire.command()[40:]), (1, 2, b"x")], 1),
        packed([(1, 3, wire.command()), (1, 3, wire.command()), (1, 2, b"x")], 1),
        packed([(1, 3, wire.command()), (1, 0x82, b"x")], 2),
        packed([(3, 3, wire.command(**wire.ECHO, sop_instance=None))], 1),
        wire.pdu(wire.P_DATA, b"")[:3],
        b"\x04\x00\x7f\xff\xff\xff",
        b"\x04\x00\x00\x10\x00\x00" + bytes(100),
    ]
)


def outcome(
    place: tuple[int, Path], sound: list[bytes], last: bytes, pieces: list[float], quiet: float
) -> tuple[list[bytes], dict[str, bytes]]:
    """What a peer gets that waits for each answer, and the files that it leaves."""
    port, spool = place
    answers = []
    with socket.create_connection((HOST, port), timeout=20) as connection:
        connection.sendall(wire.request(CONTEXTS))
        coming = wire.answers(connection)
        next(coming)
        for message in sound:
            connection.sendall(message)
            answers.append(next(coming))
        with suppress(OSError):
            for piece in split(last, pieces):
                connection.sendall(piece)
            connection.settimeout(quiet)
            answers += coming
        with suppress(OSError):
            connection.shutdown(socket.SHUT_WR)
            connection.settimeout(20)
            answers += wire.answers(connection)
    files = {str(path.relative_to(spool)): path.read_bytes() for path in spool.rglob("*.dcm")}
    aborted = next((number for number, one in enumerate(answers, 1) if one[:1] == b"\x07"), len(answers))
    return answers[:aborted], files  # how often more is aborted in what follows is a matter of time


def test_what_begins_here_and_goes_on_oddly_is_finished_by_pynetdicom(
    both: list[tuple[int, Path]], tmp_path: Path
) -> None:
    """A reserved bit of the message control header is set, in the last fragment."""
    sop_instance, data = slice_of(tmp_path)
    command = (1, wire.COMMAND | wire.LAST, wire.command(sop_instance=sop_instance))
    for begun in (b"", data[:1000]):
        fragments = [command, *([(1, 0, begun)] if begun else []), (1, 0x80 | wire.LAST, data[len(begun) :])]
        outcomes = [outcome(place, [], packed(fragments, 1), [0.3, 0.6], QUIET) for place in both]
        for answers, files in outcomes:
            assert [answer[:1] for answer in answers] == [b"\x04"]
            assert any(file.endswith(data) for file in files.values())


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sound=st.lists(messages(whole=True), max_size=2),
    last=messages(whole=False) | ODD,
    noise=st.lists(st.tuples(st.floats(0, 0.99), st.integers(0, 255)), max_size=2),
    end=st.just(1.0) | st.floats(0, 1),
    pieces=st.lists(st.floats(0, 1), max_size=3),
)
@example(sound=[], last=({}, 1, 1, [], 1), noise=[], end=0.5, pieces=[])
def test_both_ways_answer_and_keep_alike(
    sound: list[Message],
    last: bytes | Message,
    noise: list[tuple[float, int]],
    end: float,
    pieces: list[float],
    both: list[tuple[int, Path]],
    tmp_path: Path,
) -> None:
    whole = [encoded(message, slice_of(tmp_path)) for message in sound]
    odd = bytearray(last if isinstance(last, bytes) else encoded(last, slice_of(tmp_path)))
    for place, byte in noise:
        if odd:
            odd[int(place * len(odd))] = byte
    raw = bytes(odd[: int(end * len(odd))])
    with ThreadPoolExecutor(2) as pool:
        for quiet in (QUIET, LONG_QUIET):
            ours, theirs = pool.map(lambda place, q=quiet: outcome(place, whole, raw, pieces, q), both)
            if ours == theirs:
                return
    assert ours == theirs


@given(noise=st.lists(st.tuples(st.floats(0, 0.99), st.integers(0, 255)), max_size=2))
def test_only_a_sound_command_is_served_in_place(noise: list[tuple[float, int]]) -> None:
    raw = bytearray(wire.command(sop_instance="1.2.3", message=7))
    assert decoded(bytes(raw), 1) is not None
    for place, byte in noise:
        raw[int(place * len(raw))] = byte
    command = decoded(bytes(raw), 1)
    assert command is None or len(wire.command(sop_instance=command.sop_instance_uid)) <= len(raw) + 1


def test_the_gate_is_shut_only_when_somebody_waits_there() -> None:
    gate = Gate()
    assert not gate.shut(0.001)
    with ThreadPoolExecutor(1) as pool:
        passed = pool.submit(gate.wait)
        assert gate.shut(5)
        assert not passed.done()
        gate.open()
        assert passed.result(5)
        gate.clear()  # pynetdicom's own pause
        assert not gate.shut(0.001)
        passed = pool.submit(gate.wait)
        gate.set()
        assert passed.result(5)
