"""Lines that programs can read, with the study that they are about; and no patient in any of them."""

from __future__ import annotations

import io
import json
import logging
import sys
import threading
from pathlib import Path

import pytest
from pydicom import dcmread

from tests import peers
from tests.hospital import hospital
from tests.results import change
from triage import analyze, daemon, logs, orders, trail, upkeep
from triage.dicom import phantom, sender
from triage.dicom.header import find_instances
from triage.web.app import create_app

SECRETS = {
    "PatientName": "ZWETSCHGENBAUM^ADELHEID",
    "PatientID": "QX-4711-8",
    "AccessionNumber": "ACC-90210-7",
    "PatientBirthDate": "19370401",
    "ReferringPhysicianName": "HOLZAPFEL^EGON",
    "StudyDescription": "KONTROLLE FRAU Z",
}
ORDER = (
    "MSH|^~\\&|RIS|H|TRIAGE|H|20260302||ORM^O01|77|P|2.5\rPID|||QX-4711-8||ZWETSCHGENBAUM^ADELHEID\r"
    "ORC|NW\rOBR|1|ACC-90210-7|ACC-90210-7|||||||||||||||||||||||S\r"
)


def test_each_line_is_an_object_that_names_its_study(monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    monkeypatch.setattr(sys, "stderr", written := io.StringIO())
    try:
        logs.use("json", "analyzer")
        log = logging.getLogger("triage.analyze")
        stop = threading.Event()

        def step() -> bool:
            logs.about("1.2.3")
            log.info("one\nline of %s", "it")
            raise ZeroDivisionError("ZWETSCHGENBAUM")

        assert not daemon.drain(step, stop)
        logs.about("")
        log.warning("no study")
    finally:
        for handler in before:
            root.addHandler(handler)
        root.setLevel(level)
        root.handlers = before
    first, second, third = map(json.loads, written.getvalue().splitlines())
    time = first.pop("time")
    assert time.endswith("+00:00")
    assert first == {
        "level": "INFO", "role": "analyzer", "logger": "triage.analyze", "study": "1.2.3",
        "message": "one\nline of it",
    }  # fmt: skip
    assert (second["level"], second["study"]) == ("ERROR", "1.2.3"), (
        "what failed is told of the study it was at"
    )
    assert "ZWETSCHGENBAUM" not in second["message"]
    assert "study" not in third


def test_a_whole_day_names_no_patient(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Received, refused, sent twice, judged, failed, delivered, ordered, searched for, tidied up."""
    caplog.set_level(logging.INFO)
    phantom.write_study(tmp_path / "study", seed=1, slices=30, rows=64, slice_spacing=8)
    found, _ = find_instances([tmp_path / "study"])
    for one in found:
        dataset = dcmread(one.path)
        for keyword, value in SECRETS.items():
            change(dataset, keyword, value)
        dataset.save_as(one.path)
    port = peers.free_port()
    with hospital(tmp_path / "here", port) as here:
        daemon_of = peers.destination(here.config)
        peers.scan(tmp_path / "study", here.config)
        dataset = dcmread(found[0].path)
        dataset.PatientName = "ZWETSCHGENBAUM^ANNA"
        dataset.save_as(found[0].path)
        cut = tmp_path / "cut.dcm"
        cut.write_bytes(found[1].path.read_bytes()[:-100])
        sender.send([found[0].path, cut], daemon_of, calling_ae_title="CT", timeout_seconds=10)
        with monkeypatch.context() as patch:
            patch.setattr(analyze.volume, "read", lambda *_: 1 / 0)
            daemon.drain(lambda: here.work() or False, threading.Event())
        here.requeue(found[0].study_instance_uid)
        here.work()  # nobody takes it
        with peers.pacs(tmp_path / "pacs", port):
            here.pass_time(3600)
            here.deliver()
        orders.receive(here.db, here.config, ORDER.encode(), here.now)
        orders.receive(here.db, here.config, ORDER.replace("|ORM^O01", "|XXX^O01").encode(), here.now)
        upkeep.delete_images(here.db, here.config, here.now)
        sweep = upkeep.Quarantine(here.db, here.config)
        (here.config.storage.spool / found[0].study_instance_uid / "stray").write_bytes(b"")
        while sweep.step(peers.now().replace(year=2099)):
            pass
        list(trail.faults(here.db, here.config.audit))
        create_app(here.db, here.config, lambda: here.now)
    told = [record for record in caplog.records if record.levelno >= logging.INFO]
    assert {record.name for record in told} >= {
        "triage.dicom.receiving", "triage.analyze", "triage.deliver", "triage.assemble", "triage.upkeep",
        "triage.orders",
    }  # fmt: skip
    parts = {part for value in SECRETS.values() for part in value.split("^")}
    for record in told:
        line = logging.Formatter().format(record)
        assert not [part for part in parts if part in line], line
