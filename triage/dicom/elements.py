"""A short walk over the elements of a data set: the few values that are wanted, the others passed over.

It answers only where it is sure to say what pydicom would, and ``None`` otherwise: little endian, tags in
order, every length as the standard has it, the end where the last element ends. Whoever asks then reads the
data set with pydicom, which knows the oddities and says what is broken.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pydicom.datadict import dictionary_VR, tag_for_keyword

Facts = dict[str, list[Any]]
"""Keyword → its values: str, int, or Facts of the items of a sequence."""

UNDEFINED = 0xFFFFFFFF
ITEM, ITEM_END, SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
ITEM_GROUP = 0xFFFE
CHARACTER_SET, PIXEL_DATA = 0x00080005, 0x7FE00010
DEEPEST = 16

SHORT = frozenset(
    b"AE AS AT CS DA DS DT FD FL IS LO LT PN SH SL SS ST TM UI UL US".split()
)  # PS3.5 section 7.1.2: 16 bits of length; the others have 32
LONG = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())

EXPLICIT = struct.Struct("<HH2sH").unpack_from
IMPLICIT = struct.Struct("<HHI").unpack_from
LENGTH = struct.Struct("<I").unpack_from

UID = re.compile(rb"[0-9.]*")
DECIMAL = re.compile(rb" *[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,2})? *")
WHOLE = re.compile(rb" *[+-]?\d{1,9} *")
PLAIN = re.compile(rb"[ -~]*")
US_OR_SS = b"US or SS"
"""Of an attribute that may be either: told as its sixteen bits."""
SIGNED = {(b"SS", US_OR_SS), (b"US", US_OR_SS)}
PLAIN_IN_ALL_BUT = b"13"
"""Printable ASCII says the same in every character set of DICOM but the Japanese ISO_IR 13."""
DECODED_HERE = {b"": "latin-1", b"ISO_IR 100": "latin-1", b"ISO_IR 192": "utf-8"}


class Wanted(NamedTuple):
    """An attribute to look for; ``items``: those of a sequence's items. Of OW is told where it lies."""

    keyword: str
    vr: bytes
    items: Mapping[int, Wanted]


def wanted(keywords: Sequence[str], items: Mapping[str, Sequence[str]]) -> dict[int, Wanted]:
    """What to look for, by tag; ``items`` says what is wanted of a sequence's items."""
    tags = [(tag, keyword) for keyword in keywords if (tag := tag_for_keyword(keyword)) is not None]
    return {
        tag: Wanted(keyword, dictionary_VR(tag).encode(), wanted(items.get(keyword, ()), {}))
        for tag, keyword in tags
    }


class _Unsure(Exception):
    """This is for pydicom."""


def find(body: bytes | bytearray | memoryview, tags: Mapping[int, Wanted], *, explicit: bool) -> Facts | None:
    """The values of ``tags`` in a whole data set, or None where pydicom is to be asked."""
    try:
        facts, end = _Walk(body, explicit).elements(0, len(body), tags)
    except (_Unsure, struct.error, UnicodeDecodeError):
        return None
    return facts if facts and end == len(body) else None


class _Walk:
    def __init__(self, body: bytes | bytearray | memoryview, explicit: bool) -> None:
        self._body = body
        self._explicit = explicit
        self._character_set = b""

    def elements(
        self, at: int, end: int, tags: Mapping[int, Wanted], depth: int = 0, *, open_end: bool = False
    ) -> tuple[Facts, int]:
        """The wanted ones from ``at`` to ``end``, or to the item's delimiter where its end is open."""
        before, facts = -1, Facts()
        while at < end:
            tag, vr, length, at = self._head(at)
            if open_end and tag == ITEM_END and length == 0:
                return facts, at
            if tag <= before or tag >> 16 == ITEM_GROUP:
                raise _Unsure
            before, found = tag, tags.get(tag)
            if found is None and tag == CHARACTER_SET:
                raise _Unsure  # an item's own
            if length == UNDEFINED:
                items, at = self._undefined(tag, vr, at, end, found, depth)
            elif at + length > end:
                raise _Unsure
            else:
                items = self._values(found, vr, at, at + length, depth) if found else []
                at += length
            if found is not None:
                facts[found.keyword] = items
        if open_end:
            raise _Unsure
        return facts, at

    def _head(self, at: int) -> tuple[int, bytes, int, int]:
        """Tag, VR, length of the element at ``at``, and where its value begins."""
        if not self._explicit:
            group, element, length = IMPLICIT(self._body, at)
            return group << 16 | element, b"", length, at + 8
        group, element, vr, length = EXPLICIT(self._body, at)
        if vr in LONG:
            return group << 16 | element, vr, LENGTH(self._body, at + 8)[0], at + 12
        if vr not in SHORT and (group != ITEM_GROUP or vr != b"\0\0"):
            raise _Unsure
        return group << 16 | element, vr, length, at + 8

    def _undefined(
        self, tag: int, vr: bytes, at: int, end: int, found: Wanted | None, depth: int
    ) -> tuple[list[Any], int]:
        if tag == PIXEL_DATA and vr in (b"OB", b"OW"):
            return [], self._fragments(at, end)
        if vr not in (b"SQ", b"") or not (vr or _is_sequence(tag)) or (found and found.vr != b"SQ"):
            raise _Unsure
        return self._items(at, end, found, depth + 1, open_end=True)

    def _fragments(self, at: int, end: int) -> int:
        while at + 8 <= end:
            group, element, length = IMPLICIT(self._body, at)
            tag, at = group << 16 | element, at + 8
            if tag == SEQUENCE_END and length == 0:
                return at
            if tag != ITEM:
                break
            at += length
        raise _Unsure

    def _items(
        self, at: int, end: int, found: Wanted | None, depth: int, *, open_end: bool
    ) -> tuple[list[Any], int]:
        if depth > DEEPEST:
            raise _Unsure
        tags = found.items if found else {}
        items: list[Any] = []
        while at < end:
            group, element, length = IMPLICIT(self._body, at)
            tag, at = group << 16 | element, at + 8
            if open_end and tag == SEQUENCE_END and length == 0:
                return items, at
            if tag != ITEM or (length != UNDEFINED and at + length > end):
                raise _Unsure
            last = end if length == UNDEFINED else at + length
            item, at = self.elements(at, last, tags, depth, open_end=length == UNDEFINED)
            items.append(item)
        if open_end:
            raise _Unsure
        return items, at

    def _values(self, found: Wanted, vr: bytes, start: int, end: int, depth: int) -> list[Any]:
        if vr not in (found.vr, b"") and (vr, found.vr) not in SIGNED:
            raise _Unsure
        if found.vr == b"OW":
            return [start, end]
        if found.vr == b"SQ":
            return self._items(start, end, found, depth + 1, open_end=False)[0]
        raw = bytes(self._body[start:end])
        if found.vr in (b"US", US_OR_SS):
            if len(raw) > 2:
                raise _Unsure
            return [int.from_bytes(raw, "little")] if len(raw) == 2 else []
        raw = raw.rstrip(b"\0 ")
        if found.keyword == "SpecificCharacterSet":
            if PLAIN_IN_ALL_BUT in raw or not PLAIN.fullmatch(raw):
                raise _Unsure
            self._character_set = raw
        return self._texts(found.vr, raw)

    def _texts(self, vr: bytes, raw: bytes) -> list[str]:
        strict = {b"UI": UID, b"DS": DECIMAL, b"IS": WHOLE}.get(vr, PLAIN)
        parts = raw.split(b"\\")
        if all(strict.fullmatch(part) for part in parts) or not raw:
            if vr == b"PN" and b"=" in raw:
                raise _Unsure
            return [part.decode("ascii") for part in parts]
        codec = DECODED_HERE.get(self._character_set)
        if vr not in (b"LO", b"SH", b"PN") or codec is None:
            raise _Unsure
        text = raw.decode(codec)
        if not text.isprintable() or (vr == b"PN" and "=" in text):
            raise _Unsure
        return text.split("\\")


def _is_sequence(tag: int) -> bool:
    try:
        return dictionary_VR(tag) == "SQ"
    except KeyError:
        return False
