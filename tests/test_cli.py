"""The commands, run as a person or a script runs them."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread

from tests import forked, peers
from tests.needs import DATA, needs_data
from tests.web_studies import Ward, configured
from triage.dicom import phantom

ROOT = Path(__file__).parents[1]
PROMISED = {
    *("study_instance_uid", "series_instance_uid", "patient_id", "status", "reason", "probability"),
    *("calibrated", "affected_fraction", "affected_left", "affected_right", "grade", "lung_volume_ml"),
    *("lesion_volume_ml", "percent_infection", "ct_severity_score", "ct_severity_left", "model"),
    *("ground_glass_ml", "consolidation_ml", "model_version", "seconds", "files"),
}


def triage(*arguments: str | Path, status: int = 0) -> subprocess.CompletedProcess[str]:
    ended = forked.command(*map(str, arguments))
    assert ended.returncode == status, ended.stderr
    return ended


def test_help_names_every_command() -> None:
    help_ = [sys.executable, "-m", "triage", "--help"]
    text = subprocess.run(help_, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    for command in ("serve", "predict", "worklist", "check", "models", "requeue", "close"):
        assert command in text


@needs_data
def test_predict_orders_the_real_studies_and_writes_everything(tmp_path: Path) -> None:
    folders = [DATA / "dicom" / name for name in ("lidc_0001", "covid_ricord_1012", "acrin_013_gap")]
    rows = json.loads(triage("predict", *folders, "--output", tmp_path / "out", "--json").stdout)
    assert all(row.keys() >= PROMISED for row in rows)
    lidc, ricord, acrin = rows
    assert ricord["status"] == "positive"
    assert lidc["status"] == "negative"
    assert ricord["affected_fraction"] > lidc["affected_fraction"]
    assert acrin["status"] == "not_analysable"
    assert "missing slices" in acrin["reason"]
    assert ricord["calibrated"] is False
    assert {"index", "read", "predict", "seg", "sr", "picture", "total"} <= ricord["seconds"].keys()
    files = {"lesion_seg", "lung_seg", "sr", "picture", "key_slices", "key_slices_png", "thumbnail"}
    assert files == ricord["files"].keys()
    assert all(Path(file).exists() for file in ricord["files"].values())
    with (tmp_path / "out" / "summary.csv").open() as file:
        assert [line["status"] for line in csv.DictReader(file)] == [row["status"] for row in rows]


def test_predict_passes_over_what_is_not_dicom_and_says_so(tmp_path: Path) -> None:
    phantom.write_study(tmp_path / "in", seed=2, slices=30, rows=128, slice_spacing=8)
    (tmp_path / "in" / "notes.txt").write_text("hello")
    ended = triage("predict", tmp_path / "in", "--output", tmp_path / "out")
    assert "notes.txt" in ended.stderr
    assert "PHANTOM" in ended.stdout


def test_predict_leaves_nothing_of_an_earlier_run(tmp_path: Path) -> None:
    phantom.write_study(tmp_path / "in", seed=2, slices=30, rows=128, slice_spacing=8)
    (row,) = json.loads(triage("predict", tmp_path / "in", "--output", tmp_path / "out", "--json").stdout)
    stale = Path(row["files"]["sr"]).with_name("view_3d.dcm")
    stale.write_bytes(b"of an earlier run")
    triage("predict", tmp_path / "in", "--output", tmp_path / "out")
    assert not stale.exists()


def test_predict_without_dicom_says_so(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    ended = triage("predict", tmp_path, "--output", tmp_path / "out", status=78)
    assert "no DICOM instance" in ended.stderr


def test_predict_with_an_unknown_network_names_those_there_are(tmp_path: Path) -> None:
    ended = triage("predict", tmp_path, "--output", tmp_path, "--model", "oracle", status=78)
    assert "multitask" in ended.stderr


@pytest.fixture
def ward(tmp_path: Path) -> Ward:
    ward = Ward(configured(tmp_path / "daemon"), now=peers.now())
    ward.arrive("1.2.3", slices=3)
    ward.database.close()
    peers.write_config(tmp_path / "daemon")
    return ward


def worklist(tmp_path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(
        triage("--config", tmp_path / "daemon" / "config.yaml", "worklist", "--json").stdout
    )
    return rows


@pytest.mark.usefixtures("ward")
def test_worklist_close_and_requeue(tmp_path: Path) -> None:
    settings = tmp_path / "daemon" / "config.yaml"
    (row,) = worklist(tmp_path)
    assert row.keys() >= PROMISED | {"band", "due_at", "state"}
    assert (row["state"], row["status"], row["band"]) == ("receiving", None, "not-judged")
    assert "1.2.3" in triage("-c", settings, "worklist").stdout
    triage("-c", settings, "close", "1.2.3", "--reason", "read elsewhere")
    assert worklist(tmp_path) == []
    triage("-c", settings, "requeue", "1.2.3")
    assert len(worklist(tmp_path)) == 1
    for command in ("close", "requeue"):
        assert "no study 9.9" in triage("-c", settings, command, "9.9", status=1).stderr


@pytest.mark.usefixtures("ward")
def test_resend_of_a_study_that_is_not_here_says_so(tmp_path: Path) -> None:
    settings = peers.write_config(tmp_path / "daemon", pacs_port=peers.free_port())
    assert "no study 9.9 here" in triage("-c", settings, "resend", "PACS", "--study", "9.9", status=1).stderr
    assert "0 results" in triage("-c", settings, "resend", "PACS", "--study", "1.2.3").stdout


def test_shadow_mode_is_said_and_holds_what_is_owed(tmp_path: Path, ward: Ward) -> None:
    ward.judge("1.2.3", to=("PACS",))
    ward.database.close()
    settings = peers.write_config(tmp_path / "daemon", pacs_port=peers.free_port(), shadow=True)
    assert "2 results for PACS held: shadow mode" in triage("-c", settings, "resend", "PACS").stdout
    assert "shadow mode: in order of arrival" in triage("-c", settings, "worklist").stdout
    checks = json.loads(triage("-c", settings, "check", "--json", status=1).stdout)
    assert "shadow mode: in order of arrival" in checks[0]["detail"]


def test_models_says_what_each_may_claim() -> None:
    (multitask,) = (m for m in json.loads(triage("models", "--json").stdout) if m["name"] == "multitask")
    assert multitask["calibrated"] is False
    assert "not a medical device" in multitask["card"]


def test_check_is_go_when_everything_answers_and_no_go_when_not(tmp_path: Path) -> None:
    with peers.pacs(tmp_path / "pacs") as (port, _):
        path = peers.write_config(tmp_path / "daemon", port)
        checks = json.loads(triage("-c", path, "check", "--json").stdout)
        assert {c["what"] for c in checks} >= {"settings", "spool", "database", "weights", "destination PACS"}
        assert all(c["go"] for c in checks)
    checks = json.loads(triage("-c", path, "check", "--json", status=1).stdout)
    assert [c["what"] for c in checks if not c["go"]] == ["destination PACS"]


def test_results_for_a_destination_that_is_not_configured_are_no_go(tmp_path: Path, ward: Ward) -> None:
    ward.judge("1.2.3", to=("OLD PACS",))
    ward.database.close()
    (tmp_path / "daemon" / "config.yaml").write_text("database: {url: 'sqlite:///triage.db'}\n")
    checks = json.loads(triage("-c", tmp_path / "daemon" / "config.yaml", "check", "--json", status=1).stdout)
    (wrong,) = (c for c in checks if not c["go"])
    assert "OLD PACS, which delivery.destinations does not name" in wrong["detail"]


def test_a_missing_settings_file_is_named(tmp_path: Path) -> None:
    assert "nowhere.yaml" in triage("-c", tmp_path / "nowhere.yaml", "check", status=78).stderr


def test_written_results_belong_to_the_patient(tmp_path: Path) -> None:
    phantom.write_study(tmp_path / "in", seed=2, slices=30, rows=128, slice_spacing=8)
    (row,) = json.loads(triage("predict", tmp_path / "in", "--output", tmp_path / "out", "--json").stdout)
    source = dcmread(next((tmp_path / "in").iterdir()))
    report = dcmread(row["files"]["sr"])
    assert (report.PatientID, report.PatientName) == (source.PatientID, source.PatientName)
    assert report.StudyInstanceUID == source.StudyInstanceUID


@needs_data
@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_missing_extra_is_named(command, tmp_path):
    hidden = "import sys; sys.modules.update(dict.fromkeys(('tensorboard', 'sklearn', 'matplotlib')))"
    options = ["multitask", "--output", str(tmp_path)] if command == "train" else ["--report", str(tmp_path)]
    arguments = [command, *options, "--data", f"semiseg={DATA / 'train' / 'semiseg50'}"]
    run = f"{hidden}; from triage.cli import app; app({arguments!r})"
    done = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, check=False)
    assert done.returncode == os.EX_CONFIG
    assert "triage[training]" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
