"""Bytes made wrong: a few blind ways, and some that know where lengths, tags and VRs stand."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pydicom.datadict import DicomDictionary

LENGTHS = (0, 1, 0x7F, 0xFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)
VRS = b"AEASATCSDADSDTFDFLISLOLTOBODOFOLOVOWPNSHSLSQSSSTSVTMUCUIULUNURUSUTUVXX??\0\0"
TEXTS = (
    b"\\" * 40,
    b"1e400",
    b"-0",
    b"nan",
    b"9" * 70,
    b"..",
    b"\x1b$)C\xb1\xe8",
    b"\xff" * 9,
    b"ISO 2022 IR 87",
)
TAGS = tuple(sorted(DicomDictionary))


@dataclass(frozen=True)
class Sample:
    """A good input. ``marks`` are the offsets behind the length of each of its parts."""

    name: str
    raw: bytes
    marks: Sequence[int] = ()


Mutation = Callable[[bytearray, Sequence[int], random.Random], None]


def flip(raw: bytearray, marks: Sequence[int], chance: random.Random) -> None:
    raw[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)


def overwrite(raw: bytearray, marks: Sequence[int], chance: random.Random) -> None:
    at = chance.randrange(len(raw))
    raw[at : at + chance.randrange(1, 9)] = chance.randbytes(chance.randrange(1, 9))


def cut(raw: bytearray, marks: Sequence[int], chance: random.Random) -> None:
    del raw[chance.randrange(1, len(raw) + 1) :]


def drop(raw: bytearray, marks: Sequence[int], chance: random.Random) -> None:
    at = chance.randrange(len(raw))
    del raw[at : at + chance.randrange(1, 64)]


def repeat(raw: bytearray, marks: Sequence[int], chance: random.Random) -> None:
    at = chance.randrange(len(raw))
    raw[at:at] = raw[at : at + chance.randrange(1, 256)] * chance.choice((1, 1, 2, 50))


def move(raw: bytearray, marks: Sequence[int], chance: random.Random) -> None:
    at, to = chance.randrange(len(raw)), chance.randrange(len(raw))
    part = raw[at : at + chance.randrange(1, 256)]
    del raw[at : at + len(part)]
    raw[to:to] = part


def length(raw: bytearray, marks: Sequence[int], chance: random.Random) -> None:
    at, width = _mark(raw, marks, chance), chance.choice((2, 4))
    value = chance.choice((*LENGTHS, chance.randrange(1 << 16), len(raw)))
    order = chance.choice("<>")
    raw[max(at - width, 0) : at] = struct.pack(f"{order}Q", value)[:width] if order == "<" else (
        value & ((1 << 8 * width) - 1)
    ).to_bytes(width, "big")  # fmt: skip


def vr(raw: bytearray, marks: Sequence[int], chance: random.Random) -> None:
    at, which = _mark(raw, marks, chance), 2 * chance.randrange(len(VRS) // 2)
    raw[max(at - 4, 0) : max(at - 2, 0)] = VRS[which : which + 2]


def tag(raw: bytearray, marks: Sequence[int], chance: random.Random) -> None:
    at, number = _mark(raw, marks, chance), chance.choice(TAGS)
    raw[max(at - 8, 0) : max(at - 4, 0)] = struct.pack("<HH", number >> 16, number & 0xFFFF)


def value(raw: bytearray, marks: Sequence[int], chance: random.Random) -> None:
    at, text = _mark(raw, marks, chance), chance.choice(TEXTS)
    raw[at : at + len(text)] = text


def insert(raw: bytearray, marks: Sequence[int], chance: random.Random) -> None:
    """An element between two others: private ones and sequences, with and without an end."""
    number = chance.choice((*chance.choices(TAGS, k=3), 0x00091001, 0x00290010, 0xFFFEE000, 0xFFFEE00D))
    kind = 2 * chance.randrange(len(VRS) // 2)
    size = chance.choice((0, 2, 8, 0xFFFFFFFF))
    element = struct.pack("<HH2sHI", number >> 16, number & 0xFFFF, VRS[kind : kind + 2], size & 0xFFFF, size)
    at = _mark(raw, marks, chance)
    raw[at:at] = element + chance.choice(TEXTS) * chance.choice((0, 1, 3))


def nest(raw: bytearray, marks: Sequence[int], chance: random.Random) -> None:
    """Sequences in sequences, open at the end."""
    at = _mark(raw, marks, chance)
    level = struct.pack("<HH2sHI", 0x0040, 0x0275, b"SQ", 0, 0xFFFFFFFF)
    level += struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF)
    raw[at:at] = level * chance.choice((1, 3, 30, 300))


MUTATIONS: dict[Mutation, int] = {
    flip: 3, value: 5, length: 3, vr: 2, tag: 2, insert: 2,
    overwrite: 1, cut: 1, drop: 1, repeat: 1, move: 1, nest: 1,
}  # fmt: skip
"""{mutation: how often}: most of those that leave the rest readable."""


def mutated(sample: Sample, chance: random.Random) -> bytes:
    """One to six things are wrong with it."""
    raw = bytearray(sample.raw)
    for mutate in chance.choices(
        tuple(MUTATIONS), tuple(MUTATIONS.values()), k=chance.choice((1, 1, 1, 2, 3, 6))
    ):
        if raw:
            mutate(raw, sample.marks, chance)
    return bytes(raw)


def _mark(raw: bytearray, marks: Sequence[int], chance: random.Random) -> int:
    return min(chance.choice(marks), len(raw)) if marks else chance.randrange(len(raw) + 1)
