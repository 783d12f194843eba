"""UIDs of our own objects: the same content gives the same UID, on every machine and after every restart."""

from __future__ import annotations

from uuid import UUID, uuid5

NAMESPACE = UUID("5b0f5a3e-9c55-4f0b-8a56-3a1c6f0e7d21")
"""Drawn once for this product; changing it would give every resent study a second set of results."""


IMPLEMENTATION_VERSION_NAME = "TRIAGE"


def derive(kind: str, *parts: str) -> str:
    """UUID-derived UID (DICOM PS3.5 B.2) of one thing, for instance ("sr", study UID, content key)."""
    return f"2.25.{uuid5(NAMESPACE, chr(10).join((kind, *parts))).int}"


IMPLEMENTATION_CLASS_UID = derive("implementation")
"""Says on every association and in every file that it was this product (PS3.7 D.3.3.2, PS3.10 7.1)."""
