"""Received bytes → spool/STUDY/SERIES/SOP.dcm, durable before anyone is told, and never overwritten."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from uuid import uuid4

from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.uid import DeflatedExplicitVRLittleEndian

from triage.dicom import header
from triage.dicom.files import flush, sync_directory
from triage.dicom.uids import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME
from triage.domain import Instance
from triage.errors import Rejected, Retryable
from triage.together import Together

logger = logging.getLogger(__name__)

INCOMING = "incoming"
"""Folder of files that are being written; what lies here after a restart was never acknowledged."""
QUARANTINE = "quarantine"
"""Folder of what lay in the spool and is no object that anybody can read."""
DELETED = "deleted"
"""Folder of images that retention is just deleting."""
NO_STUDIES = (INCOMING, QUARANTINE, DELETED)
CONFLICTS = "conflicts"
"""Folder, in a series, of objects that reused the SOP Instance UID of another one."""
RESULTS = "results"
"""Folder of our own objects."""

DESCRIPTORS = "/proc/self/fd/"
UNDEFINED_LENGTH = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Filed:
    """Where an object lies now; ``conflict``: its SOP Instance UID was taken by other bytes."""

    instance: Instance
    conflict: bool = False


def read(raw: bytes | memoryview, transfer_syntax_uid: str) -> Instance:
    """Header facts of a data set as received; its path is still to be given.

    Raises Rejected when it is not a data set, is cut off, or lacks a valid UID.
    """
    dataset = header.facts_of(raw, transfer_syntax_uid) or _parsed(raw, transfer_syntax_uid)
    return header.instance_of(dataset, transfer_syntax_uid, Path(), header.digest_of(raw))


def file(
    spool: Path, raw: bytes | memoryview, instance: Instance, source_ae_title: str, *, sync: bool = True
) -> Filed:
    """Write a received data set; afterwards file and folders are on the disk, unless not ``sync``.

    The same bytes again leave the first file as it is; other bytes under a known SOP Instance UID go to the
    series' conflicts. Raises Retryable when the disk does not take it.
    """
    folder = spool / instance.study_instance_uid / instance.series_instance_uid
    own = folder / f"{instance.sop_instance_uid}.dcm"
    beside = folder / CONFLICTS / f"{instance.sop_instance_uid}.{instance.digest[:12]}.dcm"
    try:
        for path in (own, beside):
            if _place(spool, path, raw, instance, source_ae_title, sync):
                return Filed(replace(instance, path=path), conflict=path is beside)
    except OSError as error:
        raise Retryable(f"cannot write to the spool: {error.strerror}") from error
    raise Retryable(f"{beside.name} holds other bytes")


def index_spool(
    spool: Path, recorded: Callable[[str], Container[str]] = lambda _study: ()
) -> Iterator[Instance]:
    """Received objects on the disk but not on record, for recovery at start; deletes unfinished files.

    ``recorded`` names the SOP Instance UIDs on record of a study. Our own results and conflicting duplicates
    are left out. What cannot be read is logged and passed over.
    """
    for leftover in (spool / INCOMING).glob("*"):
        leftover.unlink(missing_ok=True)
    for study in sorted(path for path in spool.glob("*") if path.name not in NO_STUDIES):
        known = recorded(study.name)
        for path in sorted(study.glob("*/*.dcm")):
            if path.parent.name == RESULTS or path.stem in known:
                continue
            try:
                yield header.read_instance(path)
            except (Rejected, Retryable) as error:
                logger.error("%s in the spool cannot be read: %s", path.relative_to(spool), error)


def _parsed(raw: bytes | memoryview, transfer_syntax_uid: str) -> Dataset:
    dataset = header.parse(raw, transfer_syntax_uid, pixels=True)
    if _is_cut_off(dataset, raw, transfer_syntax_uid):
        raise Rejected("data set is cut off")
    return dataset


def _is_cut_off(dataset: Dataset, raw: bytes | memoryview, transfer_syntax_uid: str) -> bool:
    """True when the bytes end within an element, which pydicom does not mind.

    What does not show here fails to parse: a torn sequence, fragments without an end, a torn deflated stream.
    """
    if not dataset:
        return True
    last = dataset.get_item(list(dataset.keys())[-1], keep_deferred=True)
    if not isinstance(last, RawDataElement) or last.length == UNDEFINED_LENGTH:
        return False
    if transfer_syntax_uid == DeflatedExplicitVRLittleEndian:
        return last.length > len(last.value or b"")
    end = last.value_tell + last.length
    return end > len(raw) or bool(bytes(raw[end:]).strip(b"\0"))  # some writers pad the end with zeros


def _place(
    spool: Path, path: Path, raw: bytes | memoryview, instance: Instance, source_ae_title: str, sync: bool
) -> bool:
    """Make ``path`` hold the object, durably; False when it holds other bytes already."""
    created = _create(spool, path, (_file_meta(instance, source_ae_title), raw), sync)
    if not created and _digest_at(path) != instance.digest:
        return False
    if sync:  # also for a name that was there: whoever gave it may not have come so far
        _folders.do(path.parent)
    return True


def _sync_files(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        flush(descriptor)


def _sync_folders(folders: Sequence[Path]) -> None:
    for folder in dict.fromkeys(folders):
        sync_directory(folder)


_files = Together(_sync_files)
_folders = Together(_sync_folders)
"""Files that come at the same time mostly lie in one folder. Of flushes one after the other, the later ones
find the journal of the file system written; at the same time each would wait for a piece of it.
"""


def _digest_at(path: Path) -> str:
    try:
        return header.digest_of(header.split(path.read_bytes())[1])
    except Rejected:
        return ""


def _create(spool: Path, path: Path, parts: Sequence[bytes | memoryview], sync: bool) -> bool:
    """Write aside, flush, then give the name; False when the name is taken, which a rename would not mind."""
    descriptor, aside = _aside(spool, path.parent, sync)
    try:
        _write(descriptor, parts)
        if sync:
            _files.do(descriptor)
        # Only with a descriptor for its folder, which here means nothing, does link follow the name in /proc.
        os.link(aside, path, src_dir_fd=descriptor, follow_symlinks=True)
    except FileExistsError:
        return False
    finally:
        os.close(descriptor)
        if not aside.startswith(DESCRIPTORS):
            os.unlink(aside)
    return True


def _aside(spool: Path, folder: Path, sync: bool) -> tuple[int, str]:
    """A new file without a name, or where the file system has none, one in the folder of unfinished files."""
    try:
        descriptor = os.open(folder, os.O_TMPFILE | os.O_WRONLY, 0o666)
    except FileNotFoundError:
        _sync_parents_once.cache_clear()
        folder.mkdir(parents=True, exist_ok=True)
        return _aside(spool, folder, sync)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR):
            raise
        temporary = spool / INCOMING / f"{uuid4().hex}.part"
        temporary.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, name = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666), str(temporary)
    else:
        name = f"{DESCRIPTORS}{descriptor}"
    if sync:
        _sync_parents_once(folder, spool)
    return descriptor, name


def _write(descriptor: int, parts: Sequence[bytes | memoryview]) -> None:
    left = [memoryview(part) for part in parts]
    while left:
        count = os.writev(descriptor, left)
        while left and count >= len(left[0]):
            count -= len(left.pop(0))
        if left:
            left[0] = left[0][count:]


def _sync_parents(folder: Path, spool: Path) -> None:
    while folder != spool:
        folder = folder.parent
        sync_directory(folder)


_sync_parents_once = lru_cache(maxsize=1024)(_sync_parents)
"""Who made the folder, here or in another process, may not have come so far; for each file it is too slow."""


def _file_meta(instance: Instance, source_ae_title: str) -> bytes:
    """Preamble and file meta information (PS3.10 section 7.1); the data set follows untouched."""
    body = b"".join(
        [
            b"\2\0\1\0OB\0\0\2\0\0\0\0\1",  # version
            _element(0x0002, b"UI", instance.sop_class_uid),
            _element(0x0003, b"UI", instance.sop_instance_uid),
            _element(0x0010, b"UI", instance.transfer_syntax_uid),
            _element(0x0012, b"UI", IMPLEMENTATION_CLASS_UID),
            _element(0x0013, b"SH", IMPLEMENTATION_VERSION_NAME),
            _element(0x0016, b"AE", source_ae_title),
        ]
    )
    return b"\0" * 128 + b"DICM" + b"\2\0\0\0UL\4\0" + len(body).to_bytes(4, "little") + body


def _element(number: int, vr: bytes, text: str) -> bytes:
    """Of group 0002: explicit VR little endian."""
    value = text.encode("iso8859")
    value += (b"\0" if vr == b"UI" else b" ") * (len(value) % 2)
    return b"\2\0" + number.to_bytes(2, "little") + vr + len(value).to_bytes(2, "little") + value
