"""DIMSE statuses and association rejections by name: the only table of them."""

from __future__ import annotations

from enum import IntEnum


class StoreStatus(IntEnum):
    """What we answer to a C-STORE request (PS3.4 table B.2-1, PS3.7 annex C)."""

    SUCCESS = 0x0000
    PROCESSING_FAILURE = 0x0110
    SOP_CLASS_NOT_SUPPORTED = 0x0122
    OUT_OF_RESOURCES = 0xA700
    DATA_SET_DOES_NOT_MATCH = 0xA900
    CANNOT_UNDERSTAND = 0xC000

    @property
    def label(self) -> str:
        return self.name.lower().replace("_", " ")


class FindStatus(IntEnum):
    """What we answer to a C-FIND request (PS3.4 tables C.4-1 and K.4-1)."""

    PENDING = 0xFF00
    PENDING_UNSUPPORTED_KEYS = 0xFF01
    CANCELLED = 0xFE00
    OUT_OF_RESOURCES = 0xA700
    IDENTIFIER_DOES_NOT_MATCH = 0xA900
    UNABLE_TO_PROCESS = 0xC000


class ReportStatus(IntEnum):
    """What we answer to an N-EVENT-REPORT request (PS3.7 section 10.1.1.1.8)."""

    SUCCESS = 0x0000
    PROCESSING_FAILURE = 0x0110
    NO_SUCH_OBJECT_INSTANCE = 0x0112
    NO_SUCH_EVENT_TYPE = 0x0113
    INVALID_ARGUMENT_VALUE = 0x0115
    NO_SUCH_SOP_CLASS = 0x0118
    RESOURCE_LIMITATION = 0x0213

    @property
    def label(self) -> str:
        return self.name.lower().replace("_", " ")


WARNINGS = {
    0x0001: "stored with a warning",
    0x0107: "attribute list error",
    0x0116: "attribute value out of range",
    0xB000: "stored, elements coerced",
    0xB006: "stored, elements discarded",
    0xB007: "stored, data set does not match its SOP class",
}
"""Statuses with which a peer says that it did store the object."""

REFUSALS = {
    0x0105: (False, "no such attribute"),
    0x0110: (False, "processing failure"),
    0x0112: (False, "no such object instance"),
    0x0114: (True, "no such argument"),
    0x0115: (True, "invalid argument value"),
    0x0117: (True, "invalid SOP Instance UID"),
    0x0118: (True, "no such SOP class"),
    0x0119: (True, "class and instance do not match"),
    0x0122: (True, "SOP class not supported; allow it at the destination"),
    0x0123: (True, "no such action"),
    0x0124: (True, "not authorised; allow our AE title at the destination"),
    0x0131: (False, "duplicate transaction UID"),
    0x0210: (False, "duplicate invocation"),
    0x0211: (True, "unrecognised operation; is this a storage service?"),
    0x0212: (True, "mistyped argument"),
    0x0213: (False, "resource limitation"),
}
"""Failures of which the whole status counts: (permanent, plain text)."""
REFUSAL_FAMILIES = {
    0xA7: (False, "out of resources"),
    0xA9: (True, "data set does not match its SOP class"),
    0xC0: (True, "cannot understand the object"),
}
"""Failures of which only the beginning counts: the first two digits, of Cxxx the first."""


def explain_refusal(code: int) -> tuple[bool, str]:
    """(permanent, plain text) of a failure status; permanent: the same bytes will be refused again."""
    family = 0xC0 if code >> 12 == 0xC else code >> 8
    permanent, text = REFUSALS.get(code) or REFUSAL_FAMILIES.get(family) or (False, "unknown status")
    return permanent, f"{text} (0x{code:04X})"


CALLED_AE_TITLE = (1, 1, 7)
CALLING_AE_TITLE = (1, 1, 3)
NO_REASON = (1, 1, 1)

REJECTIONS = {
    NO_REASON[1:]: "no reason given",
    (1, 2): "application context not supported",
    CALLING_AE_TITLE[1:]: "calling AE title not recognised",
    CALLED_AE_TITLE[1:]: "called AE title not recognised",
    (2, 1): "no reason given",
    (2, 2): "protocol version not supported",
    (3, 1): "temporary congestion",
    (3, 2): "too many associations",
}
"""(source, diagnostic) of an A-ASSOCIATE-RJ (PS3.8 table 9-21)."""


def explain_rejection(source: int | None, diagnostic: int | None) -> str:
    """Plain text of an association rejection."""
    return REJECTIONS.get((source or 0, diagnostic or 0), f"source {source}, reason {diagnostic}")
