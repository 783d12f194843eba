"""The worklist for machines: dcmtk's findscu asks, a pynetdicom peer cancels."""

from __future__ import annotations

import dataclasses
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom import dcmread
from pydicom.dataset import Dataset
from pynetdicom import AE

from tests.needs import dcmtk, needs_dcmtk
from tests.objects import ct, save
from tests.peers import free_port
from triage import config, daemon
from triage.config import Destination
from triage.dicom import lists, sender
from triage.dicom.listener import Listener
from triage.dicom.lists import (
    LONGEST_SEARCH,
    MODALITY_WORKLIST,
    STUDY_ROOT,
    Lists,
    matches,
    procedure_step,
    study,
)
from triage.domain import Band, Priority, Study, StudyState, WorklistEntry
from triage.errors import Retryable

HOST = "127.0.0.1"
NOW = datetime(2021, 3, 4, 5, 6, 7, tzinfo=UTC)
WORKLIST = ["-W", "-k", "ScheduledProcedureStepSequence"]
STUDIES = ["-S", "-k", "QueryRetrieveLevel=STUDY"]


def entry(number: int, band: Band = Band.ROUTINE, **facts: str) -> WorklistEntry:
    known = {
        "patient_id": f"P{number}",
        "patient_name": f"Doe^Number{number}",
        "accession_number": f"A{number}",
        "study_date": f"2021030{number}",
        "study_description": "CT Thorax",
    }
    return WorklistEntry(
        study=Study(
            study_instance_uid=f"1.2.3.{number}",
            state=StudyState.ANALYZED,
            arrived_at=NOW,
            last_received_at=NOW,
            **{**known, **facts},
        ),
        priority=Priority(band, 0.5, NOW + timedelta(minutes=number), f"reason {number}"),
        result=None,
        images=10 * number,
        deliveries={},
    )


OPEN = [
    entry(1, Band.CRITICAL, patient_name="Müller^Jörg", study_description="Lunge ü"),
    entry(2, Band.SEVERE, patient_name="山田^太郎", accession_number="A2/7"),
    entry(3, Band.NOT_JUDGED),
    entry(4, Band.ROUTINE, accession_number="", study_date=""),
]


@contextmanager
def served(folder: Path, entries: object = OPEN, maximum: int = 100) -> Iterator[int]:
    def open_studies(limit: int) -> list[WorklistEntry]:
        if isinstance(entries, Exception):
            raise entries
        return list(entries)[:limit]

    settings = config.Listener.model_validate({"host": HOST, "port": free_port()})
    worklist = Lists(open_studies, "TRIAGE", maximum)
    with Listener(settings, folder, lambda _: None, lambda: True, worklist=worklist) as listener:
        yield listener.port


def findscu(folder: Path, port: int, *arguments: str) -> tuple[list[Dataset], str]:
    """The answers, as findscu wrote them to files, and what it said."""
    program = dcmtk("findscu")
    assert program
    into = folder / "answers"
    into.mkdir(parents=True, exist_ok=True)
    command = [program, "-v", "-aec", "TRIAGE", "-X", "-od", str(into), *arguments, HOST, str(port)]
    done = subprocess.run(command, capture_output=True, timeout=60, check=False)
    return [dcmread(file, force=True) for file in sorted(into.iterdir())], (done.stdout + done.stderr).decode(
        errors="replace"
    )


@needs_dcmtk
def test_the_worklist_comes_in_reading_order_with_a_priority_from_the_band(tmp_path: Path) -> None:
    keys = ["PatientName", "PatientID", "AccessionNumber", "RequestedProcedurePriority", "PatientBirthDate"]
    asked = [
        part for key in (*keys, "StudyInstanceUID", "RequestedProcedureComments") for part in ("-k", key)
    ]
    with served(tmp_path) as port:
        answers, said = findscu(tmp_path, port, *WORKLIST, *asked)
    assert [a.StudyInstanceUID for a in answers] == [e.study.study_instance_uid for e in OPEN]
    assert [a.RequestedProcedurePriority for a in answers] == ["STAT", "HIGH", "ROUTINE", "ROUTINE"]
    assert [a.PatientName for a in answers] == [e.study.patient_name for e in OPEN]
    assert [a.get("SpecificCharacterSet", "") for a in answers] == ["ISO_IR 192", "ISO_IR 192", "", ""]
    assert answers[0].RequestedProcedureComments == "reason 1"
    assert answers[0].PatientBirthDate == ""
    step = answers[1].ScheduledProcedureStepSequence[0]
    due = (NOW + timedelta(minutes=2)).astimezone()
    assert (step.Modality, step.ScheduledStationAETitle) == ("CT", "TRIAGE")
    assert (step.ScheduledProcedureStepStartDate, step.ScheduledProcedureStepStartTime) == (
        due.strftime("%Y%m%d"),
        due.strftime("%H%M%S"),
    )
    assert "Success" in said
    assert "0xff01" not in said.lower()


@needs_dcmtk
@pytest.mark.parametrize(
    ("keys", "found"),
    [
        (["StudyInstanceUID"], [1, 2, 3, 4]),
        (["AccessionNumber=A3"], [3, 4]),  # 4 has none that could speak against it
        (["PatientID=P2"], [2]),
        (["PatientID=P?"], [1, 2, 3, 4]),
        (["PatientID=[P]2"], []),
        (["PatientName=doe*"], [3, 4]),
        (["SpecificCharacterSet=ISO_IR 192", "PatientName=müller^*"], [1]),
        (["StudyDate=20210302-"], [2, 3, 4]),
        (["StudyDate=20210301-20210302"], [1, 2, 4]),
        (["StudyDate=20210303"], [3, 4]),
        (["StudyInstanceUID=1.2.3.4\\1.2.3.2"], [2, 4]),
        (["StudyInstanceUID=1.2.3.*"], []),
        (["ModalitiesInStudy=MR"], []),
        (["ModalitiesInStudy=CT", "NumberOfStudyRelatedInstances"], [1, 2, 3, 4]),
    ],
)
def test_keys_match_as_the_standard_says(keys: list[str], found: list[int], tmp_path: Path) -> None:
    arguments = [part for key in keys for part in ("-k", key)]
    with served(tmp_path) as port:
        answers, said = findscu(
            tmp_path, port, *STUDIES, "-k", "PatientSex", "-k", "StudyInstanceUID", *arguments
        )
    assert "Success" in said, said
    assert [int(a.StudyInstanceUID[-1]) for a in answers] == found
    assert all(a.QueryRetrieveLevel == "STUDY" for a in answers)


@needs_dcmtk
def test_keys_inside_a_step_match_and_choose_what_comes_back(tmp_path: Path) -> None:
    due = (NOW + timedelta(minutes=1)).astimezone()
    day = f"{due:%Y%m%d}"
    wanted = "ScheduledProcedureStepSequence[0]."
    keys = ["-k", f"{wanted}Modality=CT", "-k", f"{wanted}ScheduledProcedureStepStartDate={day}-"]
    with served(tmp_path) as port:
        answers, _ = findscu(
            tmp_path, port, "-W", *keys, "-k", f"{wanted}ScheduledProcedureStepStartTime={due:%H%M}"
        )
    assert len(answers) == 1
    (step,) = answers[0].ScheduledProcedureStepSequence
    assert {e.keyword for e in step} == {
        "Modality",
        "ScheduledProcedureStepStartDate",
        "ScheduledProcedureStepStartTime",
    }


@needs_dcmtk
@pytest.mark.parametrize("keys", [["StationName"], ["PatientBirthDate=19700101"]])
def test_a_key_that_is_not_supported_is_said_to_be_so_and_hides_nothing(
    keys: list[str], tmp_path: Path
) -> None:
    with served(tmp_path) as port:
        answers, said = findscu(tmp_path, port, "-d", *STUDIES, *(p for k in keys for p in ("-k", k)))
    assert len(answers) == len(OPEN)
    assert "0xff01" in said.lower()
    assert all("StationName" not in answer for answer in answers)


@needs_dcmtk
@pytest.mark.parametrize(
    ("arguments", "entries", "words"),
    [
        (["-S", "-k", "QueryRetrieveLevel=SERIES"], OPEN, ["0xa900", "STUDY"]),
        (["-S", "-k", "PatientName"], OPEN, ["0xa900"]),
        (STUDIES, Retryable("database: locked"), ["0xa700", "ask again"]),
        (STUDIES, KeyError("bug"), ["0xc000"]),
    ],
)
def test_what_cannot_be_answered_says_why(
    arguments: list[str], entries: object, words: list[str], tmp_path: Path
) -> None:
    with served(tmp_path, entries) as port:
        answers, said = findscu(tmp_path, port, "-d", *arguments)
        assert not answers
        for word in words:
            assert word.lower() in said.lower(), said


@needs_dcmtk
def test_the_most_urgent_come_when_there_are_too_many(tmp_path: Path) -> None:
    with served(tmp_path, maximum=2) as port:
        answers, said = findscu(tmp_path, port, "-d", *STUDIES, "-k", "StudyInstanceUID")
        assert [a.StudyInstanceUID for a in answers] == ["1.2.3.1", "1.2.3.2"]
        assert "0xa700" in said.lower()
        assert "only the first 2" in said
    with served(tmp_path, maximum=len(OPEN)) as port:
        assert "Success" in findscu(tmp_path, port, *STUDIES)[1]


@needs_dcmtk
def test_a_query_looks_at_so_many_studies_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lists, "LONGEST_SEARCH", 3)
    with served(tmp_path) as port:
        answers, said = findscu(tmp_path, port, "-d", *STUDIES, "-k", "PatientID=P4")
        assert (answers, "only the first 3 studies" in said, "0xa700" in said.lower()) == ([], True, True)


def test_keys_without_end_are_not_looked_for(tmp_path: Path) -> None:
    keys = Dataset()
    keys.QueryRetrieveLevel = "STUDY"
    keys.TextValue = "x" * lists.LONGEST_IDENTIFIER
    assert asked(tmp_path, OPEN, keys) == [0xA900]


@needs_dcmtk
def test_a_peer_that_cancels_is_heard(tmp_path: Path) -> None:
    with served(tmp_path, [entry(1)] * LONGEST_SEARCH, maximum=30_000) as port:
        answers, said = findscu(tmp_path, port, "-d", "--cancel", "3", *STUDIES)
    assert 3 <= len(answers) < LONGEST_SEARCH
    assert "0xfe00" in said.lower()


def test_values_that_scanners_should_not_send_do_not_end_the_list(tmp_path: Path) -> None:
    odd = dataclasses.asdict(OPEN[0].study) | {
        "patient_id": "x" * 200,
        "study_date": "March",
        "patient_name": "=\\^^",
    }
    entries = [dataclasses.replace(OPEN[0], study=Study(**odd)), OPEN[1]]
    keys = Dataset()
    keys.QueryRetrieveLevel = "STUDY"
    keys.PatientID = keys.StudyDate = keys.PatientName = ""
    assert asked(tmp_path, entries, keys) == [0xFF00, 0xFF00, 0]


def asked(folder: Path, entries: object, keys: Dataset) -> list[int]:
    """The statuses that a peer of pynetdicom gets."""
    ae = AE("PEER")
    ae.add_requested_context(STUDY_ROOT)
    with served(folder, entries) as port:
        association = ae.associate(HOST, port, ae_title="TRIAGE")
        statuses = [int(status.Status) for status, _ in association.send_c_find(keys, STUDY_ROOT)]
        association.release()
    return statuses


def test_without_lists_the_classes_are_not_offered(tmp_path: Path) -> None:
    settings = config.Listener.model_validate({"host": HOST, "port": free_port()})
    ae = AE("PEER")
    ae.add_requested_context(MODALITY_WORKLIST)
    with Listener(settings, tmp_path, lambda _: None, lambda: True) as listener:
        association = ae.associate(HOST, listener.port, ae_title="TRIAGE")
        assert not association.accepted_contexts
        association.abort()


def key(keyword: str, value: str) -> Dataset:
    keys = Dataset()
    setattr(keys, keyword, value)
    return keys


@given(st.dates(), st.dates(), st.dates())
def test_a_range_holds_what_lies_in_it(day: date, first: date, last: date) -> None:
    row = key("StudyDate", f"{day:%Y%m%d}".zfill(8))
    asked = f"{first:%Y%m%d}".zfill(8) + "-" + f"{last:%Y%m%d}".zfill(8)
    assert matches(key("StudyDate", asked), row) == (first <= day <= last)


@given(st.text(st.characters(exclude_characters="*?\\^=", exclude_categories=["C", "Z"]), min_size=1))
def test_a_value_matches_itself_and_only_itself(text: str) -> None:
    row = key("AccessionNumber", text)
    assert matches(key("AccessionNumber", text), row)
    assert matches(key("AccessionNumber", f"{text[:1]}*"), row)
    assert not matches(key("AccessionNumber", f"{text}x"), row)


@pytest.mark.parametrize("wanted", ["yamada^tarou", "山田*", "Yamada^Tarou=山田^太郎", "YAM*=山田^太郎"])
def test_a_name_is_found_in_any_of_its_scripts(wanted: str) -> None:
    row = key("PatientName", "Yamada^Tarou=山田^太郎=やまだ^たろう")
    assert matches(key("PatientName", wanted), row)
    assert not matches(key("PatientName", "Yamada"), row)


def test_every_band_has_a_priority_and_a_study_has_the_same_id_each_time() -> None:
    for band in Band:
        assert study(entry(1, band)).RequestedProcedurePriority in {"STAT", "HIGH", "ROUTINE"}
    first, again, other = (
        procedure_step(entry(number), "TRIAGE").RequestedProcedureID for number in (1, 1, 2)
    )
    assert first == again != other
    assert len(first) == 16


@needs_dcmtk
def test_the_running_listener_answers_from_the_database(tmp_path: Path) -> None:
    spool, port = tmp_path / "spool", free_port()
    settings = config.parse(
        {
            "storage": {"spool": str(spool), "minimum_free_gb": 0},
            "database": {"url": f"sqlite:///{tmp_path}/triage.db"},
            "listener": {"host": HOST, "port": port},
            "lists": {"serve": True},
        }
    )
    sent = [ct(1, StudyInstanceUID="1.2.3.1"), ct(2, StudyInstanceUID="1.2.3.2")]
    sent[1].RequestedProcedurePriority = "STAT"
    stop = threading.Event()
    role = threading.Thread(target=daemon.run_listener, args=[settings, stop])
    role.start()
    try:
        us = Destination(name="us", ae_title="TRIAGE", host=HOST, port=port)
        while sender.echo(us, "SCANNER", 5):
            assert role.is_alive()
        for number, dataset in enumerate(sent):
            (outcome,) = sender.send(
                [save(dataset, tmp_path / f"{number}.dcm")], us, calling_ae_title="CT", timeout_seconds=5
            )
            assert outcome.sent, outcome
        asked = [part for key in ("StudyInstanceUID", "RequestedProcedurePriority") for part in ("-k", key)]
        answers, said = findscu(tmp_path, port, *WORKLIST, *asked)
        studies, _ = findscu(tmp_path / "studies", port, *STUDIES, "-k", "StudyInstanceUID")
    finally:
        stop.set()
        role.join(20)
    assert [(a.StudyInstanceUID, a.RequestedProcedurePriority) for a in answers] == [
        ("1.2.3.2", "STAT"),
        ("1.2.3.1", "ROUTINE"),
    ], said
    assert [study.StudyInstanceUID for study in studies] == ["1.2.3.2", "1.2.3.1"]
