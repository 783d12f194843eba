"""The conformance statement: its tables are the code's; real associations hold its claims to it."""

from __future__ import annotations

import importlib.util
import re
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType

import httpx
import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian, UID_dictionary
from pynetdicom import AE, build_role, evt
from pynetdicom.association import Association
from pynetdicom.presentation import PresentationContext, build_context
from pynetdicom.transport import ThreadedAssociationServer
from urllib3.util.ssl_ import create_urllib3_context

from tests.objects import ct, save
from tests.peers import HOST, free_port
from tests.results import INFO, NOW, SEVERE, blob, positive, small_study
from triage.config import Destination, DicomSource, Peer, Tls
from triage.config import Listener as Settings
from triage.dicom import asking, lists, query, seg, sender, sr, storage_commitment
from triage.dicom.listener import Listener
from triage.dicom.lists import Lists
from triage.dicom.receiving import Receiver
from triage.dicom.status import FindStatus
from triage.dicom.storage_commitment import Reports
from triage.domain import Instance, ResultKind, ResultObject, WorklistEntry
from triage.errors import TriageError

DEPLOY = Path(__file__).parents[1] / "deploy"
PAGE = DEPLOY / "CONFORMANCE.md"
PATIENT_ROOT = "1.2.840.10008.5.1.4.1.2.1.1"
PRIVATE_CLASS = "1.3.12.2.1107.5.9.1"

pytestmark = pytest.mark.timeout(600)


def rows(name: str) -> list[dict[str, str]]:
    """A table of the page: each line under the names of its columns."""
    part = PAGE.read_text(encoding="utf-8").partition(f"<!-- from the code: {name} -->")[2]
    lines = [line for line in part.partition("<!-- end -->")[0].splitlines() if line.startswith("|")]
    head, _, *body = ([cell.strip() for cell in line.strip("|").split(" | ")] for line in lines)
    return [dict(zip(head, cells, strict=True)) for cells in body]


def claimed(role: str) -> set[str]:
    return {row["UID"] for row in rows("services") if row[role] == "yes"}


STORAGE = {row["UID"] for row in rows("storage_classes")}
SYNTAXES = [row["UID"] for row in rows("transfer_syntaxes")]
PLAIN = [row["UID"] for row in rows("plain_syntaxes")]


def test_the_tables_are_the_codes() -> None:
    """Emptied, they come back as they stand there."""
    page = PAGE.read_text(encoding="utf-8")
    first, *parts = page.split("<!-- from the code: ")
    emptied = [
        re.sub(r"\n.*?<!-- end -->", "\n<!-- end -->", part, count=1, flags=re.DOTALL) for part in parts
    ]
    written = conformance().rewritten("<!-- from the code: ".join([first, *emptied]))
    assert written.splitlines() == page.splitlines(), "run deploy/conformance.py"


# --- the listener -----------------------------------------------------------------------------------


@dataclass
class Running:
    port: int
    instances: list[Instance] = field(default_factory=list)


@contextmanager
def listening(
    folder: Path, *, everything: bool = True, entries: Sequence[WorklistEntry] = (), **settings: object
) -> Iterator[Running]:
    """The real listener, with all that can be switched on."""
    running = Running(free_port())
    with Listener(
        Settings(host=HOST, port=running.port, **settings),
        folder,
        on_received=running.instances.append,
        has_room=lambda: True,
        worklist=Lists(lambda _limit: entries, "TRIAGE", 10) if everything else None,
        commitments=Reports(lambda _report: True) if everything else None,
    ):
        yield running


@contextmanager
def associated(
    port: int, contexts: list[PresentationContext], called: str = "TRIAGE", scp: str = ""
) -> Iterator[Association]:
    roles = [build_role(UID(scp), scp_role=True)] if scp else None
    association = AE("PEER").associate(HOST, port, contexts, ae_title=called, ext_neg=roles)
    try:
        yield association
    finally:
        association.release()


def accepted(port: int, pairs: list[tuple[str, str]], scp: str = "") -> set[tuple[str, str]]:
    """Of these classes, each in this transfer syntax: which are accepted."""
    found = set()
    for some in (pairs[at : at + 128] for at in range(0, len(pairs), 128)):
        with associated(port, [build_context(*pair) for pair in some], scp=scp) as association:
            found |= {
                (str(c.abstract_syntax), str(c.transfer_syntax[0])) for c in association.accepted_contexts
            }
    return found


@pytest.fixture(scope="module")
def listener(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with listening(tmp_path_factory.mktemp("spool")) as running:
        yield running


def test_every_storage_class_is_accepted_in_every_transfer_syntax(listener: Running) -> None:
    pairs = [(uid, syntax) for uid in sorted({*STORAGE, PRIVATE_CLASS}) for syntax in SYNTAXES]
    assert len(pairs) > 10_000
    assert set(pairs) - accepted(listener.port, pairs) == set()


def test_every_other_service_claimed_is_accepted_in_the_plain_transfer_syntaxes(listener: Running) -> None:
    others = claimed("SCP") - STORAGE
    assert len(others) == 3
    pairs = [(uid, syntax) for uid in others for syntax in PLAIN]
    assert accepted(listener.port, pairs) == set(pairs)


def test_an_archive_may_call_to_report_on_a_commitment(listener: Running) -> None:
    uid = str(storage_commitment.PUSH_MODEL)
    assert accepted(listener.port, [(uid, syntax) for syntax in PLAIN], scp=uid)


def test_no_other_class_and_no_other_transfer_syntax_is_accepted(listener: Running) -> None:
    known = {uid for uid, (_, kind, *_) in UID_dictionary.items() if "SOP Class" in kind}
    others = known - STORAGE - claimed("SCP") - {storage_commitment.PUSH_MODEL}
    assert PATIENT_ROOT in others
    assert accepted(listener.port, [(uid, ImplicitVRLittleEndian) for uid in sorted(others)]) == set()
    syntaxes = {uid for uid, (_, kind, *_) in UID_dictionary.items() if kind == "Transfer Syntax"}
    strange = [*sorted(syntaxes - {*SYNTAXES}), "1.2.840.113619.5.2"]
    images = str(query.CT_CLASSES[0])
    assert accepted(listener.port, [(images, syntax) for syntax in strange]) == set()


def test_what_needs_a_setting_is_refused_without_it(tmp_path: Path) -> None:
    with listening(tmp_path, everything=False) as running:
        pairs = [
            (uid, ImplicitVRLittleEndian) for uid in claimed("SCP") | {str(storage_commitment.PUSH_MODEL)}
        ]
        refused = {uid for uid, _ in pairs} - {uid for uid, _ in accepted(running.port, pairs)}
    told = {row["UID"] for row in rows("services") if "`lists.serve`" in row["switched on by"]}
    assert refused == told | {storage_commitment.PUSH_MODEL}


def test_an_object_in_every_transfer_syntax_is_kept(tmp_path: Path) -> None:
    def image(number: int, syntax: str) -> Path:
        dataset = ct(number)
        if UID(syntax).is_compressed:
            del dataset.PixelData  # no matter what would be in it
        return save(dataset, tmp_path / f"{number}.dcm", syntax)

    files = [image(number, syntax) for number, syntax in enumerate(SYNTAXES, 1)]
    with listening(tmp_path / "spool") as running:
        peer = Destination(name="us", ae_title="TRIAGE", host=HOST, port=running.port)
        outcomes = sender.send(files, peer, calling_ae_title="SCANNER", timeout_seconds=20)
    assert [outcome.error for outcome in outcomes if not outcome.sent] == []
    assert [instance.transfer_syntax_uid for instance in running.instances] == SYNTAXES


def test_the_listener_says_who_it_is_and_what_it_takes(listener: Running) -> None:
    told = {row[""]: row["they call us"] for row in rows("association")}
    with associated(listener.port, [build_context(PRIVATE_CLASS)]) as association:
        acceptor = association.acceptor
        assert str(acceptor.maximum_length) == told["longest PDU we take"].split()[0]
        assert str(acceptor.implementation_class_uid) == told["Implementation Class UID"]
        assert acceptor.implementation_version_name == told["Implementation Version Name"]
        assert acceptor.asynchronous_operations == (1, 1)


REJECTED = [  # result, source, reason (PS3.8 table 9-21)
    ({"peers": ["10.0.0.0/8"]}, "TRIAGE", (1, 1, 1)),
    ({}, "SOMEONE", (1, 1, 7)),
    ({"calling_ae_titles": ["CT1"]}, "TRIAGE", (1, 1, 3)),
    ({"maximum_associations": 1}, "TRIAGE", (2, 3, 2)),
]
REJECTION = {1: "permanent, service user", 2: "transient, service provider"}


@pytest.mark.parametrize(("number", "case"), list(enumerate(REJECTED)))
def test_who_is_turned_away_is_told_so(number: int, case: tuple, tmp_path: Path) -> None:
    settings, called, expected = case
    with (
        listening(tmp_path, **settings) as running,
        associated(running.port, [build_context(PRIVATE_CLASS)]),
        associated(running.port, [build_context(PRIVATE_CLASS)], called) as association,
    ):
        answer = association.acceptor.primitive
        assert (answer.result, answer.result_source, answer.diagnostic) == expected
    table = PAGE.read_text().partition("A-ASSOCIATE-RJ: result, source, reason")[2].splitlines()[2:6]
    assert REJECTION[expected[0]] in table[number]


WRONG = {"DA": "19000101", "TM": "000001", "IS": "999", "DS": "999", "US": 999, "UI": "1.999"}


@pytest.mark.parametrize(
    ("table", "model"), [("worklist_keys", lists.MODALITY_WORKLIST), ("study_keys", lists.STUDY_ROOT)]
)
def test_every_key_matches_as_claimed(table: str, model: UID, tmp_path: Path) -> None:
    """An open study is found by its own value and not by another; what is never known excludes nothing."""
    entry = conformance().entry()
    worklist = model == lists.MODALITY_WORKLIST
    row = lists.procedure_step(entry, "TRIAGE") if worklist else lists.study(entry)
    with (
        listening(tmp_path, entries=[entry]) as running,
        associated(running.port, [build_context(model)]) as link,
    ):

        def found(keyword: str, value: object, inside: bool) -> list[int]:
            keys, step = Dataset(), Dataset()
            setattr(step if inside else keys, keyword, value)
            if inside:
                keys.ScheduledProcedureStepSequence = [step]
            if not worklist:
                keys.QueryRetrieveLevel = "STUDY"
            *matches, last = [int(status.Status) for status, _ in link.send_c_find(keys, model)]
            assert last == 0
            return matches

        for told in rows(table):
            inside, keyword = told["attribute"].startswith("> "), told["attribute"].removeprefix("> ")
            wrong = WRONG.get(told["VR"], "X")
            if told["matched"] == "yes":
                own = str((row.ScheduledProcedureStepSequence[0] if inside else row)[keyword].value)
                assert found(keyword, own, inside) == [FindStatus.PENDING], keyword
                assert found(keyword, wrong, inside) == [], keyword
            elif told["VR"] != "SQ" and told["matched"].startswith("never"):
                assert found(keyword, wrong, inside) == [FindStatus.PENDING_UNSUPPORTED_KEYS], keyword


# --- what we ask ------------------------------------------------------------------------------------


@dataclass
class Heard:
    """A peer that grants nothing but verification, and what was proposed to it."""

    port: int
    contexts: set[tuple[str, str]] = field(default_factory=set)
    roles: set[str] = field(default_factory=set)
    who: set[tuple[str, str, int]] = field(default_factory=set)

    def hear(self, event: evt.Event) -> None:
        requestor = event.assoc.requestor
        for context in requestor.primitive.presentation_context_definition_list:
            self.contexts |= {
                (str(context.abstract_syntax), str(syntax)) for syntax in context.transfer_syntax
            }
        self.roles |= {str(uid) for uid in requestor.role_selection}
        uid, version = requestor.implementation_class_uid, requestor.implementation_version_name
        self.who.add((str(uid), str(version), requestor.maximum_length))


@pytest.fixture
def heard() -> Iterator[Heard]:
    peer = AE("PACS")
    peer.add_supported_context("1.2.840.10008.1.1")
    heard = Heard(free_port())
    handlers = [(evt.EVT_REQUESTED, heard.hear)]
    server = peer.start_server((HOST, heard.port), block=False, evt_handlers=handlers)
    assert isinstance(server, ThreadedAssociationServer)
    yield heard
    server.shutdown()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[ResultKind, list[Path]]:
    """Every kind of object, in every form that the settings have: the page's sample, and what it is not."""
    folder = tmp_path_factory.mktemp("objects")
    study = small_study(folder / "source")
    result, mask = positive(study), blob(study)
    left = mask.copy()
    left[..., 32:] = False
    found: dict[ResultKind, list[ResultObject]] = {}

    def into(name: str) -> Path:
        (folder / name).mkdir()
        return folder / name

    for form in seg.FORMS:
        where = into(form)
        lesions = seg.write_lesions(study, mask, result, INFO, where, now=NOW, form=form)
        lungs = seg.write_lungs(study, left, mask & ~left, result, INFO, where, now=NOW, form=form)
        found.setdefault(ResultKind.LESION_SEG, []).append(lesions)
        found.setdefault(ResultKind.LUNG_SEG, []).append(lungs)
    for name in sr.SOP_CLASSES:
        report = sr.write(study, result, SEVERE, INFO, {}, into(name), now=NOW, sop_class=name)
        found.setdefault(ResultKind.SR, []).append(report)
    paths = {kind: [one.path for one in ones] for kind, ones in found.items()}
    for kind, dataset in conformance().sample().objects.items():
        if kind not in paths:
            path = folder / f"{kind.value}.dcm"
            dataset.save_as(path)
            paths[kind] = [path]
    return paths


@cache
def conformance() -> ModuleType:
    specification = importlib.util.spec_from_file_location("conformance", DEPLOY / "conformance.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["conformance"] = module
    specification.loader.exec_module(module)
    return module


def test_the_objects_are_of_the_classes_and_transfer_syntaxes_claimed(
    written: dict[ResultKind, list[Path]],
) -> None:
    told = {
        row["`objects`"].strip("`"): (
            set(row["SOP class"].split(" or ")),
            set(row["transfer syntax"].split(" or ")),
        )
        for row in rows("object_kinds")
    }
    name_of = conformance().name_of
    made = {}
    for kind, paths in written.items():
        datasets = [dcmread(path) for path in paths]
        classes = {name_of(dataset.SOPClassUID) for dataset in datasets}
        made[kind.value] = classes, {dataset.file_meta.TransferSyntaxUID.name for dataset in datasets}
        assert not [element for dataset in datasets for element in dataset if element.tag.is_private]
    assert made == told


def test_results_are_proposed_as_claimed(written: dict[ResultKind, list[Path]], heard: Heard) -> None:
    files = [path for paths in written.values() for path in paths]
    pacs = Destination(name="PACS", ae_title="PACS", host=HOST, port=heard.port)
    assert not any(o.sent for o in sender.send(files, pacs, calling_ae_title="TRIAGE", timeout_seconds=20))
    expected = {(d.SOPClassUID, d.file_meta.TransferSyntaxUID) for d in map(dcmread, files)}
    implicit = {(uid, ImplicitVRLittleEndian) for uid, syntax in expected if syntax == ExplicitVRLittleEndian}
    assert heard.contexts == expected | implicit
    assert {uid for uid, _ in heard.contexts} <= claimed("SCU")


def test_every_service_that_we_use_is_claimed_and_no_other(
    written: dict[ResultKind, list[Path]], heard: Heard, tmp_path: Path
) -> None:
    take = Receiver(tmp_path, lambda _instance: None, lambda: True)
    where = {"host": HOST, "port": heard.port, "ae_title": "PACS"}
    us = {"calling_ae_title": "TRIAGE", "timeout_seconds": 20}
    pacs = Destination(name="PACS", **where)
    archive = query.Pacs(DicomSource(name="PACS", **where), "TRIAGE", 20)
    assert sender.echo(pacs, "TRIAGE", 20) is None
    sender.send([path for paths in written.values() for path in paths], pacs, **us)
    assert storage_commitment.offered(pacs, "TRIAGE", 20)
    for ask in (
        archive.reach,
        lambda: archive.studies(query.Query()),
        lambda: list(archive.fetch("1.2.3", {"1.2.3.4": ["1.2.3.4.5"]}, take)),
        lambda: asking.ordered_priority("A1", Peer(**where), **us),
        lambda: storage_commitment.listed(pacs, [], **us),
    ):
        with pytest.raises(TriageError):
            ask()
    images = set(query.CT_CLASSES)
    assert {uid for uid, _ in heard.contexts} - images == claimed("SCU")
    assert heard.roles == images
    by_get = {row["UID"] for row in rows("transfer_syntaxes") if row["by C-GET"] == "yes"}
    assert {pair for pair in heard.contexts if pair[0] in images} == {(i, s) for i in images for s in by_get}
    told = {row[""]: row["we call them"] for row in rows("association")}
    who = (
        told["Implementation Class UID"],
        told["Implementation Version Name"],
        int(told["longest PDU we take"]),
    )
    assert heard.who == {who}


# --- TLS --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("made", [Tls().context, httpx.create_ssl_context, create_urllib3_context])
def test_versions_and_cipher_suites_are_as_claimed(made: Callable[[], ssl.SSLContext]) -> None:
    """Ours, and those of the libraries where an address is https and no ``tls`` is set."""
    context = made()
    assert context.minimum_version >= ssl.TLSVersion.TLSv1_2
    names = [suite["name"] for suite in context.get_ciphers()]
    assert names
    assert [name for name in names if not name.startswith(("TLS_", "ECDHE-", "DHE-"))] == []
    assert [
        name for name in names if name.endswith(("-SHA", "-MD5")) or "RC4" in name or "3DES" in name
    ] == []


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion")
@pytest.mark.parametrize(
    ("version", "spoken"),
    [(ssl.TLSVersion.TLSv1_1, False), (ssl.TLSVersion.TLSv1_2, True), (ssl.TLSVersion.TLSv1_3, True)],
)
def test_no_tls_older_than_claimed(version: ssl.TLSVersion, spoken: bool, tmp_path: Path) -> None:
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=test"]
    made += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "key.pem", "-out", "cert.pem"]
    subprocess.run(made, cwd=tmp_path, check=True, capture_output=True)
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_side.set_ciphers("ALL:@SECLEVEL=0")
    server_side.minimum_version = server_side.maximum_version = version
    server_side.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    peer = AE("PACS")
    peer.add_supported_context("1.2.840.10008.1.1")
    port = free_port()
    server = peer.start_server((HOST, port), block=False, ssl_context=server_side)
    try:
        pacs = Destination(
            name="PACS", ae_title="PACS", host=HOST, port=port, tls=Tls(ca=tmp_path / "cert.pem")
        )
        assert (sender.echo(pacs, "TRIAGE", 20) is None) is spoken
    finally:
        server.shutdown()
