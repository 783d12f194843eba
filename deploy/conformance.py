"""Writes the tables of CONFORMANCE.md anew from the code.

What stands between ``<!-- from the code: NAME -->`` and ``<!-- end -->`` is the answer of TABLES[NAME]. The
objects are described as they are written for a made-up study, with everything in config.yaml switched on.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from pydicom import dcmread
from pydicom.charset import python_encoding
from pydicom.datadict import keyword_for_tag
from pydicom.dataset import Dataset
from pydicom.sr.coding import Code
from pydicom.tag import Tag
from pydicom.uid import UID
from pynetdicom import AE, DEFAULT_TRANSFER_SYNTAXES, sop_class

from triage import analyze, config, priority
from triage.dicom import codes, lists, objects, phantom, query, seg, sender, series, source, status
from triage.dicom import listener as listening
from triage.dicom import storage_commitment as commitment
from triage.dicom.header import find_instances
from triage.dicom.uids import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME
from triage.dicom.upper_layer import LONGEST_PDU
from triage.dicom.volume import DECODERS
from triage.domain import (
    Band,
    Findings,
    ModelInfo,
    ResultKind,
    Study,
    StudyState,
    Volume,
    WorklistEntry,
)
from triage.incoming import messages, mllp
from triage.outgoing import hl7
from triage.outgoing.letters import Letter

PAGE = Path(__file__).with_name("CONFORMANCE.md")
PART = re.compile(r"(<!-- from the code: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
DICOM_APPLICATION = "1.2.840.10008.3.1.1.1"
NOON = datetime(2026, 3, 2, 12, 0, tzinfo=UTC)


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(rewritten(page), encoding="utf-8")


def rewritten(page: str) -> str:
    marked = [name for _, name, _ in PART.findall(page)]
    if sorted(marked) != sorted(TABLES):
        sys.exit(f"{PAGE.name} must have each table once: {', '.join(TABLES)}; it has {', '.join(marked)}")
    return PART.sub(lambda part: f"{part[1]}\n{TABLES[part[2]]()}\n\n{part[3]}", page)


# --- what is described: a made-up study, judged and written with every object there is ---------------


class Drawn:
    """Stands in for a network: a block for either lung, with two kinds of lesion in one of them."""

    info = ModelInfo(name="NETWORK", version="WEIGHTS", summary="", calibrated=False, card="")
    settings: Mapping[str, str | float] = {"lesion_threshold": 0.5}

    def predict(self, volume: Volume) -> Findings:
        lung, ground_glass, consolidation = (np.zeros(volume.array.shape, bool) for _ in range(3))
        lung[2:-2, 16:48, 8:28] = lung[2:-2, 16:48, 36:56] = True
        ground_glass[6:12, 20:40, 10:20] = True
        consolidation[6:12, 20:40, 20:26] = True
        return Findings(
            probability=0.97,
            probability_kind="classifier",
            calibrated=False,
            lung_mask=lung,
            lesion_mask=ground_glass | consolidation,
            lesion_classes={"ground_glass": ground_glass, "consolidation": consolidation},
        )

    def lesion_map(self, volume: Volume, lung_mask: Any) -> Any:
        raise NotImplementedError("nothing is evaluated here")


@dataclass(frozen=True)
class Sample:
    """The answer for the made-up study, and its objects as they are read back."""

    letter: Letter
    objects: Mapping[ResultKind, Dataset]


@cache
def sample() -> Sample:
    everything = {
        name: True for name, field in config.Results.model_fields.items() if field.annotation is bool
    }
    settings = config.Config(
        results=config.Results(**everything), analysis=config.Analysis(minimum_lung_ml=0, threads=1)
    )
    with tempfile.TemporaryDirectory() as folder:
        files = phantom.write_study(Path(folder) / "source", seed=7, slices=24, rows=64, slice_spacing=8.0)
        chosen = series.choose(find_instances(files)[0], settings.assemble)
        judged = analyze.judge(chosen, Drawn(), settings, Path(folder) / "results", NOON)
        written = {made.kind: dcmread(made.path) for made in judged.objects}
    study = Study(
        study_instance_uid="1.2.3",
        state=StudyState.ANALYZED,
        arrived_at=NOON,
        last_received_at=NOON,
        patient_id="4711",
        patient_name="Doe^Jane",
        accession_number="26-0815",
        study_date="20260302",
        study_description="CT Thorax",
    )
    place = priority.prioritise(judged.answer, NOON, False, settings.priority, settings.analysis)
    return Sample(Letter("CONTROL-ID", study, place, judged.answer, NOON), written)


# --- tables -----------------------------------------------------------------------------------------


def table(head: str, lines: Iterable[Iterable[object]]) -> str:
    """Markdown; ``head`` is the columns' names, parted by |."""
    columns = [name.strip() for name in head.split("|")]
    body = ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines]
    return "\n".join([f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *body])


def named(uids: Iterable[str]) -> list[tuple[str, str]]:
    return [(name_of(uid), uid) for uid in uids]


def name_of(uid: str) -> str:
    """As PS3.6 has it; of classes that are too new for pydicom, the words of pynetdicom's keyword."""
    keywords = (key for key, value in vars(sop_class).items() if isinstance(value, UID) and value == uid)
    name = UID(uid).name
    return name if name != uid else re.sub(r"(?<=[a-z])(?=[A-Z])", " ", next(keywords, uid))


def services() -> str:
    written = sorted({uid for uids in objects.SOP_CLASSES.values() for uid in uids})
    roles = [
        ("Verification", [listening.VERIFICATION], "yes", "yes", ""),
        ("Storage", query.CT_CLASSES, "no", "yes", "SCP also by C-GET: `pull.sources`"),
        ("Storage", written, "yes", "yes", "SCU: `delivery.destinations`"),
        ("Storage Commitment", [commitment.PUSH_MODEL], "yes", "no", "`commitment` of a destination"),
        ("Query/Retrieve", [query.FIND], "yes", "yes", "SCU: `pull.sources`, commitment; SCP: `lists.serve`"),
        ("Query/Retrieve", [query.MOVE, query.GET], "yes", "no", "`pull.sources`"),
        ("Workflow", [lists.MODALITY_WORKLIST], "yes", "yes", "SCU: `orders.worklist`; SCP: `lists.serve`"),
    ]
    return table(
        "service | SOP class | UID | SCU | SCP | switched on by",
        [
            (service, name, uid, user, provider, when)
            for service, uids, user, provider, when in roles
            for name, uid in named(uids)
        ],
    )


def association() -> str:
    ours, theirs = config.Listener(), config.Delivery()
    return table(
        "| they call us | we call them",
        [
            ("application context", DICOM_APPLICATION, DICOM_APPLICATION),
            ("AE title", f"`{ours.ae_title}` (`listener.ae_title`)", "calling: the same; called: the peer's"),
            ("TCP port", f"{ours.port} (`listener.port`)", "the peer's"),
            ("associations at once", f"{ours.maximum_associations} (`listener.maximum_associations`)",
             "one a job: delivery to one destination, commitment by it, an import, the RIS's worklist"),
            ("longest PDU we take", f"{ours.maximum_pdu_bytes} (`listener.maximum_pdu_bytes`)",
             AE().maximum_pdu_size),
            ("a PDU announced longer than this ends it", LONGEST_PDU, LONGEST_PDU),
            ("silence after which it ends, s", f"{ours.timeout_seconds:g} (`listener.timeout_seconds`)",
             f"{theirs.timeout_seconds:g} (`delivery.timeout_seconds`, `pull.timeout_seconds`)"),
            ("asynchronous operations", "not negotiated: one at a time", "not negotiated: one at a time"),
            ("presentation contexts", "as proposed", f"at most {sender.MAXIMUM_CONTEXTS}"),
            ("slowest line, bytes a second", "", sender.SLOWEST_BYTES_PER_SECOND),
            ("wait for a commitment on its own association, s", "", f"{commitment.ANSWER_SECONDS:g}"),
            ("images in one request to retrieve", "", query.AT_ONCE),
            ("Implementation Class UID", IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_CLASS_UID),
            ("Implementation Version Name", IMPLEMENTATION_VERSION_NAME, IMPLEMENTATION_VERSION_NAME),
        ],
    )  # fmt: skip


def plain_syntaxes() -> str:
    return table("transfer syntax | UID", named(DEFAULT_TRANSFER_SYNTAXES))


def transfer_syntaxes() -> str:
    kept = sorted(listening.TRANSFER_SYNTAXES, key=lambda uid: [int(part) for part in uid.split(".")])
    return table(
        "transfer syntax | UID | judged | by C-GET",
        [(name, uid, yes(uid in DECODERS), yes(uid in query.SYNTAXES)) for name, uid in named(kept)],
    )


def yes(answer: bool) -> str:
    return "yes" if answer else "no"


def storage_classes() -> str:
    kept = listening.KNOWN_CLASSES | listening.RETIRED_CLASSES
    return table("SOP class | UID", sorted(named(kept)))


STORED: Mapping[status.StoreStatus, str] = {
    status.StoreStatus.SUCCESS: "The object is on the disk and on record; it may have been so before",
    status.StoreStatus.OUT_OF_RESOURCES: "The disk is full (`storage.minimum_free_gb`) or refuses, or the "
    "database is busy: send it again",
    status.StoreStatus.DATA_SET_DOES_NOT_MATCH: "SOP class or instance of command and data set differ",
    status.StoreStatus.CANNOT_UNDERSTAND: "The data set cannot be parsed or is cut off, or the UID of its "
    "study, series, class or instance is missing or no UID",
    status.StoreStatus.SOP_CLASS_NOT_SUPPORTED: "The command's SOP class is not its presentation context's",
    status.StoreStatus.PROCESSING_FAILURE: "Anything else went wrong; the log says what",
}
FOUND: Mapping[status.FindStatus, str] = {
    status.FindStatus.PENDING: "A match",
    status.FindStatus.PENDING_UNSUPPORTED_KEYS: "A match, and some key is not supported or never known",
    status.FindStatus.CANCELLED: "The peer sent C-CANCEL",
    status.FindStatus.OUT_OF_RESOURCES: "More match than are told or looked at, the most urgent first; or "
    "the database is busy",
    status.FindStatus.IDENTIFIER_DOES_NOT_MATCH: "Study Root at another level than STUDY, or keys too long",
    status.FindStatus.UNABLE_TO_PROCESS: "The keys cannot be understood",
}
REPORTED: Mapping[status.ReportStatus, str] = {
    status.ReportStatus.SUCCESS: "The report is on record",
    status.ReportStatus.NO_SUCH_EVENT_TYPE: "An event type other than 1 and 2",
    status.ReportStatus.NO_SUCH_OBJECT_INSTANCE: "Not the well-known instance",
    status.ReportStatus.NO_SUCH_SOP_CLASS: "Not the Storage Commitment Push Model",
    status.ReportStatus.INVALID_ARGUMENT_VALUE: "A transaction that this AE title was not asked for",
    status.ReportStatus.RESOURCE_LIMITATION: "The database is busy: report it again",
    status.ReportStatus.PROCESSING_FAILURE: "Anything else went wrong; the log says what",
}


def answered(said: type[IntEnum], meaning: Mapping[Any, str]) -> str:
    return table("status | | when", [(f"{one:04X}", words(one), meaning[one]) for one in said])


def words(member: IntEnum) -> str:
    return member.name.lower().replace("_", " ")


def understood() -> str:
    again, rarely = "again, soon", "again, rarely: someone must act"
    return table(
        "status | meaning | what we do",
        [
            ("0000", "success", "taken for stored"),
            *((f"{code:04X}", text, "taken for stored; logged") for code, text in status.WARNINGS.items()),
            *(
                (f"{code:04X}", text, rarely if permanent else again)
                for code, (permanent, text) in status.REFUSALS.items()
            ),
            *(
                ("Cxxx" if family == 0xC0 else f"{family:02X}xx", text, rarely if permanent else again)
                for family, (permanent, text) in status.REFUSAL_FAMILIES.items()
            ),
            ("other", "unknown status", again),
        ],
    )


def rejections() -> str:
    return table("source | reason | meaning", [(*key, text) for key, text in status.REJECTIONS.items()])


def search_limits() -> str:
    return table(
        "of one query | at most",
        [
            ("matches told", f"{config.Lists().maximum_answers} (`lists.maximum_answers`)"),
            ("open studies looked at, the most urgent", lists.LONGEST_SEARCH),
            ("bytes of keys", lists.LONGEST_IDENTIFIER),
        ],
    )


def worklist_keys() -> str:
    return keys(lists.procedure_step(entry(), "TRIAGE"))


def study_keys() -> str:
    return keys(lists.study(entry()))


def entry() -> WorklistEntry:
    letter = sample().letter
    return WorklistEntry(letter.study, letter.priority, letter.result, 24, {})


def keys(row: Dataset) -> str:
    return table("attribute | tag | VR | matched", _keys(row))


def _keys(row: Dataset, inside: str = "") -> Iterator[tuple[str, ...]]:
    for element in row:
        unknown = element.keyword in lists.NEVER_KNOWN
        if element.keyword == "QueryRetrieveLevel":
            matched = "must be STUDY"
        elif unknown:
            matched = "never: returned empty"
        else:
            matched = "its items" if element.VR == "SQ" else "yes"
        yield f"{inside}{element.keyword}", tag(element.keyword), element.VR, matched
        if element.VR == "SQ":
            for item in element.value[:1]:
                yield from _keys(item, f"{inside}> ")


def tag(keyword: str) -> str:
    return str(Tag(keyword)).upper().replace(" ", "")


def priorities() -> str:
    return table(
        "band | Requested Procedure Priority (0040,1003) | HL7 TQ1-9, OBR-5",
        [(band.label, lists.REQUESTED_PROCEDURE_PRIORITY[band], hl7.PRIORITY[band]) for band in Band],
    )


def query_keys() -> str:
    asked = query.Query().keys()
    return table(
        "attribute at level STUDY | tag | value",
        [
            (name, tag(name), f"`{value}`" if value else "as asked for, or empty")
            for name, value in asked.items()
        ],
    )


def settings() -> str:
    sections = ("listener", "lists", "delivery", "pull", "orders", "results")
    defaults = config.Config()
    return table(
        "setting | default",
        [
            (f"`{name}.{key}`", f"`{shown(value)}`")
            for name in sections
            for key, value in getattr(defaults, name).model_dump(mode="json").items()
        ],
    )


def shown(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case float():
            return f"{value:g}"
        case list():
            return f"[{', '.join(map(str, value))}]"
    return str(value)


def tls() -> str:
    context = config.Tls().context()
    return table(
        "| of each TLS connection that we open",
        [
            ("oldest version", context.minimum_version.name.replace("v1_", " 1.")),
            (
                "certificate of the peer",
                f"`{context.verify_mode.name}`: without a valid one there is no connection",
            ),
            ("its name", "checked" if context.check_hostname else "not checked"),
        ],
    )


def character_sets() -> str:
    terms = sorted(term for term in python_encoding if term)
    return ", ".join(f"`{term}`" for term in terms) + "."


def object_kinds() -> str:
    written = sample().objects
    return table(
        "`objects` | SOP class | Modality | Series Number | Series Description | transfer syntax",
        [
            (
                f"`{kind.value}`",
                " or ".join(map(name_of, objects.SOP_CLASSES[kind])),
                written[kind].Modality,
                written[kind].SeriesNumber,
                written[kind].SeriesDescription,
                " or ".join(uid.name for uid in syntaxes(kind)),
            )
            for kind in objects.SOP_CLASSES
        ],
    )


def syntaxes(kind: ResultKind) -> list[UID]:
    if kind in (ResultKind.LESION_SEG, ResultKind.LUNG_SEG):
        return [uid for _, uid in seg.FORMS.values()]
    return [sample().objects[kind].file_meta.TransferSyntaxUID]


def attributes() -> str:
    """Top-level attributes of every object; a value where it is the same for every study."""
    written = sample().objects
    found = sorted({element.tag for dataset in written.values() for element in dataset})
    return table(
        " | ".join(["attribute | tag", *(kind.value for kind in written), "value"]),
        [
            (
                keyword_for_tag(at),
                tag(keyword_for_tag(at)),
                *("x" if at in dataset else "" for dataset in written.values()),
                _value(at, written.values()),
            )
            for at in found
        ],
    )


def _value(at: Any, written: Iterable[Dataset]) -> str:
    keyword = keyword_for_tag(at)
    if keyword in (*source.COPIED, "SpecificCharacterSet"):
        return "of the source"
    elements = [dataset[at] for dataset in written if at in dataset]
    if elements[0].VR not in ("CS", "LO", "SH", "ST", "LT"):
        return ""
    values = dict.fromkeys("\\".join(_texts(element.value)) for element in elements)
    return " or ".join(f"`{value}`" for value in values if value) or "empty"


def _texts(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else [str(part) for part in value or ()]


def copied() -> str:
    return table(
        "attribute | tag | taken | where it is not sound",
        [
            (keyword, tag(keyword), rule.words, "empty" if keyword in source.TYPE_2 else "left out")
            for keyword, rule in source.COPIED.items()
        ],
    )


def report_tree() -> str:
    """The content of the report: what stands side by side and means the same is told once."""
    report = sample().objects[ResultKind.SR]
    return "\n".join(f"    {line}" for line in _tree([report], 0))


def _tree(items: list[Dataset], depth: int) -> Iterator[str]:
    alike: dict[tuple[str, ...], list[Dataset]] = {}
    for item in items:
        alike.setdefault(_meaning(item), []).append(item)
    for meaning, same in alike.items():
        values = list(dict.fromkeys(filter(None, map(_said, same))))
        shown = " or ".join(values[:3]) + (" …" if len(values) > 3 else "")
        yield "  " * depth + " ".join(filter(None, [*meaning, shown]))
        yield from _tree([child for item in same for child in item.get("ContentSequence") or ()], depth + 1)


def _meaning(item: Dataset) -> tuple[str, ...]:
    """Relationship, value type, concept and template of a content item."""
    name, template = item.get("ConceptNameCodeSequence"), item.get("ContentTemplateSequence")
    concept = _code(name[0]) if name else ""
    tid = f"[TID {template[0].TemplateIdentifier}]" if template else ""
    return (str(item.get("RelationshipType", "")), f"{item.ValueType}:", concept, tid)


def _said(item: Dataset) -> str:
    if "ConceptCodeSequence" in item:
        return f"= {_code(item.ConceptCodeSequence[0])}"
    if item.get("MeasuredValueSequence"):
        return f"in {_code(item.MeasuredValueSequence[0].MeasurementUnitsCodeSequence[0])}"
    if item.get("ReferencedSOPSequence"):
        return name_of(item.ReferencedSOPSequence[0].ReferencedSOPClassUID)
    return ""


def _code(item: Dataset) -> str:
    value = next(item.get(k) for k in ("CodeValue", "LongCodeValue", "URNCodeValue") if item.get(k))
    return f'({value}, {item.CodingSchemeDesignator}, "{item.CodeMeaning}")'


def standard_codes() -> str:
    return coded(lambda code: code.scheme_designator != codes.PRIVATE)


def private_codes() -> str:
    return coded(lambda code: code.scheme_designator == codes.PRIVATE)


def coded(wanted: Callable[[Code], bool]) -> str:
    found = {code for value in vars(codes).values() for code in _codes(value)}
    lines = sorted((c.scheme_designator, c.value, c.meaning) for c in found if wanted(c))
    return table("scheme | value | meaning", lines)


def _codes(value: object) -> Iterator[Code]:
    match value:
        case Code():
            yield value
        case Mapping():
            yield from (code for one in value.values() for code in _codes(one))
        case tuple():
            yield from (code for one in value for code in _codes(one))


def message() -> str:
    destination = config.Hl7(
        kind="hl7", name="RIS", host="10.1.2.4", port=2575, application="RIS", facility="HOSPITAL"
    )
    lines = str(hl7.message(sample().letter, destination)).split("\r")
    return "\n".join(f"    {line}" for line in lines if line)


def acknowledged() -> str:
    received, refused = ", ".join(hl7.ACCEPTED), ", ".join(hl7.PERMANENT)
    return table(
        "MSA-1 | what we do",
        [
            (received, "taken for received"),
            (refused, "refused: tried again rarely"),
            ("other, or none", "tried again soon"),
        ],
    )


def orders() -> str:
    listed = {
        "ORC-1 of orders placed or changed": messages.PLACED,
        "ORC-1 of orders cancelled": messages.CANCELLED,
        "OBR-25 of reports that close a study": messages.FINAL,
        "where the priority stands, the first that is filled": [
            f"{segment}-{field}.{part}" for segment, field, part in messages.PRIORITY
        ],
        "where the accession number stands (`orders.accession_number`)": config.Orders().accession_number,
        "priorities that are STAT (`orders.stat`)": config.Orders().stat,
        "ORC-5 that closes a study (`orders.closing_statuses`)": config.Orders().closing_statuses
        or ["none by default"],
        "MSA-1: taken": [messages.ACCEPTED],
        "MSA-1: the content is wrong; sending it again does not help": [messages.ERROR],
        "MSA-1: another message, or not taken for reasons that may pass": [messages.REJECTED],
        "longest message, bytes": [str(mllp.LONGEST_MESSAGE)],
        "connections at once": [str(mllp.MAXIMUM_CONNECTIONS)],
    }
    return table("| values", [(what, ", ".join(values)) for what, values in listed.items()])


TABLES: Mapping[str, Callable[[], str]] = {
    "services": services,
    "association": association,
    "plain_syntaxes": plain_syntaxes,
    "rejections": rejections,
    "stored": lambda: answered(status.StoreStatus, STORED),
    "search_limits": search_limits,
    "found": lambda: answered(status.FindStatus, FOUND),
    "reported": lambda: answered(status.ReportStatus, REPORTED),
    "worklist_keys": worklist_keys,
    "study_keys": study_keys,
    "priorities": priorities,
    "understood": understood,
    "query_keys": query_keys,
    "settings": settings,
    "character_sets": character_sets,
    "tls": tls,
    "message": message,
    "acknowledged": acknowledged,
    "orders": orders,
    "object_kinds": object_kinds,
    "copied": copied,
    "attributes": attributes,
    "report_tree": report_tree,
    "standard_codes": standard_codes,
    "private_codes": private_codes,
    "storage_classes": storage_classes,
    "transfer_syntaxes": transfer_syntaxes,
}


if __name__ == "__main__":
    main()
