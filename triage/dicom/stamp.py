"""An item of a sequence as bytes, made once and repeated with other values: one item an image, or a frame.

The libraries build what an object is, with one image; for hundreds of them, and for as many frames, they
would spend a second on values that differ in a few bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from struct import pack

from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_data_element
from pydicom.tag import ItemTag

from triage.domain import Instance


@dataclass(frozen=True, slots=True)
class Encoded:
    """Encoded items of the sequence ``keyword`` of ``holder``, put there when the object is written."""

    holder: Dataset
    keyword: str
    items: bytes


@dataclass(frozen=True, slots=True)
class _Value:
    """An element of its own value in each item, after its tag and VR."""

    head: bytes
    keyword: str


@dataclass(frozen=True, slots=True)
class _Nested:
    """A sequence that holds such elements, or an item of it, after its tag and VR."""

    head: bytes
    parts: tuple[_Part, ...]


_Part = bytes | _Value | _Nested


class Stamp:
    """Repeats ``item``, explicit VR little endian (PS3.5 7.1.2 and 7.5), with other values of ``keywords``.

    Those are of VRs with a length of two bytes, and no text that a character set would matter to.
    """

    def __init__(self, item: Dataset, *keywords: str) -> None:
        self._item = _item(item, keywords)

    def __call__(self, values: Mapping[str, bytes]) -> bytes:
        """One item; the values are of even length."""
        return _filled(self._item, values)


REFERENCE = ("ReferencedSOPClassUID", "ReferencedSOPInstanceUID")


def reference(image: Instance) -> dict[str, bytes]:
    """The values of ``REFERENCE``."""
    return {
        "ReferencedSOPClassUID": uid(image.sop_class_uid),
        "ReferencedSOPInstanceUID": uid(image.sop_instance_uid),
    }


def uid(text: str) -> bytes:
    """A UID as value of an element."""
    return text.encode() + b"\0" * (len(text) % 2)


def decimals(texts: Iterable[str]) -> bytes:
    """Decimal Strings as value of an element."""
    text = "\\".join(texts)
    return text.encode() + b" " * (len(text) % 2)


def _item(dataset: Dataset, keywords: tuple[str, ...]) -> _Nested:
    return _Nested(pack("<HH", ItemTag.group, ItemTag.element), tuple(_parts(dataset, keywords)))


def _parts(dataset: Dataset, keywords: tuple[str, ...]) -> Iterable[_Part]:
    for element in dataset:
        head = pack("<HH2s", element.tag.group, element.tag.element, element.VR.encode())
        if element.keyword in keywords:
            yield _Value(head, element.keyword)
            continue
        items = [_item(one, keywords) for one in element.value] if element.VR == "SQ" else []
        if any(not isinstance(part, bytes) for one in items for part in one.parts):
            yield _Nested(head + b"\0\0", tuple(items))
        else:
            buffer = DicomBytesIO()
            buffer.is_little_endian, buffer.is_implicit_VR = True, False
            write_data_element(buffer, element)
            yield buffer.getvalue()


def _filled(nested: _Nested, values: Mapping[str, bytes]) -> bytes:
    filled = []
    for part in nested.parts:
        if isinstance(part, bytes):
            filled.append(part)
        elif isinstance(part, _Value):
            value = values[part.keyword]
            filled.append(part.head + pack("<H", len(value)) + value)
        else:
            filled.append(_filled(part, values))
    content = b"".join(filled)
    return nested.head + pack("<L", len(content)) + content
