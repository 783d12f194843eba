"""A scripted archive for storage commitment: what it takes, how and when it answers, what it lists."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

from pydicom.dataset import Dataset
from pydicom.uid import CTImageStorage
from pynetdicom import AE, build_role, evt

from tests.peers import HOST, free_port
from triage.dicom.lists import STUDY_ROOT
from triage.dicom.sender import VERIFICATION
from triage.dicom.storage_commitment import PUSH_MODEL, WELL_KNOWN_INSTANCE
from triage.domain import Reference

NO_SUCH_INSTANCE = 0x0112


@dataclass
class Archive:
    """An archive at ``port``; everything it is asked is kept in the order it came."""

    answers: bool = True
    """On the association of the request, at once; else it ends that, and answers when it is told to."""
    status: int = 0x0000
    """Of its N-ACTION response."""
    hangs_up: bool = False
    """Instead of responding."""
    meanwhile: Callable[[], object] = bool
    """Happens before it responds to a N-ACTION or C-FIND."""
    refuses: set[str] = field(default_factory=set)
    """SOP Instance UIDs of which it takes no object."""
    fails: set[str] = field(default_factory=set)
    """SOP Instance UIDs to which it does not commit itself."""
    lists: set[str] = field(default_factory=set)
    lists_everything: bool = False
    stored: list[str] = field(default_factory=list)
    asked: list[tuple[str, list[Reference]]] = field(default_factory=list)
    found: list[Dataset] = field(default_factory=list)
    """The keys of each C-FIND."""
    told: list[int | None] = field(default_factory=list)
    """What each of its reports was answered with; None: not at all."""
    port: int = 0
    _due: threading.Event = field(default_factory=threading.Event)

    def on_store(self, event: evt.Event) -> int:
        uid = str(event.request.AffectedSOPInstanceUID)
        self.stored.append(uid)
        return 0xA700 if uid in self.refuses else 0x0000

    def on_action(self, event: evt.Event) -> tuple[int, None]:
        said = event.action_information
        items = [(i.ReferencedSOPClassUID, i.ReferencedSOPInstanceUID) for i in said.ReferencedSOPSequence]
        self.asked.append((str(said.TransactionUID), [(str(c), str(i)) for c, i in items]))
        self.meanwhile()
        if self.hangs_up:
            event.assoc.abort()
        else:
            self._due.set()
        return self.status, None

    def on_sent(self, event: evt.Event) -> None:
        """What is sent first after the N-ACTION is its response; the report must not overtake it."""
        if self._due.is_set():
            self._due.clear()
            threading.Thread(target=self._go_on, args=[event.assoc], daemon=True).start()

    def on_find(self, event: evt.Event) -> Iterator[tuple[int, Dataset | None]]:
        keys = event.identifier
        self.found.append(keys)
        self.meanwhile()
        for uid in sorted(self.lists):
            if self.lists_everything or uid == keys.SOPInstanceUID:
                match = Dataset()
                match.QueryRetrieveLevel = "IMAGE"
                match.SOPInstanceUID = uid
                yield 0xFF00, match

    def report(self) -> Dataset:
        """The answer to the last request."""
        transaction_uid, references = self.asked[-1]
        said = Dataset()
        said.TransactionUID = transaction_uid
        said.ReferencedSOPSequence = [item(r) for r in references if r[1] not in self.fails]
        said.FailedSOPSequence = [item(r, NO_SUCH_INSTANCE) for r in references if r[1] in self.fails]
        return said

    def call(
        self, port: int, said: Dataset | None = None, *, ae_title: str = "PACS", **changes: Any
    ) -> int | None:
        """Answer on an association of its own; the status that it is answered with.

        ``changes``: event_type, class_uid, instance_uid, or role=False for an archive that negotiates none.
        """
        role = [build_role(PUSH_MODEL, scp_role=True)] if changes.pop("role", True) else []
        ae = AE(ae_title)
        ae.add_requested_context(PUSH_MODEL)
        link = ae.associate(HOST, port, ae_title="TRIAGE", ext_neg=role)
        assert link.is_established
        if not role:  # pynetdicom keeps to its role; such archives do not
            (context,) = link.accepted_contexts
            context._as_scp = True
        try:
            return self._tell(link, said or self.report(), **changes)
        finally:
            link.release()

    def _go_on(self, link: Any) -> None:
        if self.status == 0 and self.answers:
            self.told.append(self._tell(link, self.report()))
        elif self.status == 0:
            link.abort()

    def _tell(self, link: Any, said: Dataset, **changes: Any) -> int | None:
        failed = bool(said.get("FailedSOPSequence"))
        event = {
            "event_type": 2 if failed else 1,
            "class_uid": PUSH_MODEL,
            "instance_uid": WELL_KNOWN_INSTANCE,
        }
        status, _ = link.send_n_event_report(said, **{**event, **changes})
        return cast(int | None, status.get("Status"))


def item(reference: Reference, failure: int | None = None) -> Dataset:
    referenced = Dataset()
    referenced.ReferencedSOPClassUID, referenced.ReferencedSOPInstanceUID = reference
    if failure is not None:
        referenced.FailureReason = failure
    return referenced


@contextmanager
def archive(
    *, commits: bool = True, finds: bool = True, port: int = 0, **behaviour: Any
) -> Iterator[Archive]:
    """It is called PACS. ``commits`` and ``finds``: whether it offers the service at all."""
    played = Archive(**behaviour)
    ae = AE("PACS")
    ae.add_supported_context(CTImageStorage)
    ae.add_supported_context(VERIFICATION)
    if commits:
        ae.add_supported_context(PUSH_MODEL)
    if finds:
        ae.add_supported_context(STUDY_ROOT)
    played.port = port or free_port()
    server = ae.start_server(
        (HOST, played.port),
        block=False,
        evt_handlers=[
            (evt.EVT_C_STORE, played.on_store),
            (evt.EVT_N_ACTION, played.on_action),
            (evt.EVT_PDU_SENT, played.on_sent),
            (evt.EVT_C_FIND, played.on_find),
        ],
    )
    assert server is not None
    try:
        yield played
    finally:
        ae.shutdown()
