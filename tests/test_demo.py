"""The demo ends as the README says, on the real studies."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from pydicom import dcmread

from tests import peers
from tests.needs import DATA, needs_data, needs_dicom3tools
from triage.config import Analysis
from triage.db import Database
from triage.domain import Status, WorklistEntry
from triage.models import MODELS

DEMO = Path(__file__).parents[1] / "deploy" / "demo.py"
SEG, SR, PICTURE = (
    "1.2.840.10008.5.1.4.1.1.66.4",
    "1.2.840.10008.5.1.4.1.1.88.34",
    "1.2.840.10008.5.1.4.1.1.7",
)
VIEW_3D = "1.2.840.10008.5.1.4.1.1.7.4"
STUDIES = ("lidc_0001", "covid_ricord_1012", "acrin_013_gap")


def shown(folder: Path, studies: tuple[str, ...], *options: str) -> tuple[dict[str, WorklistEntry], str]:
    """The demo run to its end: its list by the patients' first letters, and what it said."""
    (folder / "triage").mkdir()  # the README's newcomer stands beside the clone
    inputs = [str(DATA / "dicom" / name) for name in studies]
    command = [sys.executable, str(DEMO), "--once", "--folder", str(folder / "demo"), *options, *inputs]
    ended = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "200"},
        cwd=folder,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    db = Database(f"sqlite:///{folder}/demo/triage.db")
    entries = db.worklist(peers.now(), "deadline", 7)
    db.close()
    return {entry.study.patient_id[:5]: entry for entry in entries}, ended.stdout


def check_delivered(pacs: Path, entry: WorklistEntry, also: dict[str, int]) -> None:
    """The PACS has every object that the answer asks for, each without an error."""
    assert entry.result is not None
    judged = entry.result.status is not Status.NOT_ANALYSABLE
    has_lesion = bool(entry.result.lesion_volume_ml)
    expected = {SR: 1, PICTURE: 1 + has_lesion, **also} if judged else {}
    delivered = list((pacs / entry.study.study_instance_uid).rglob("*.dcm"))
    classes = Counter(dcmread(path, stop_before_pixels=True).SOPClassUID for path in delivered)
    assert classes == {**expected, **({SEG: 1} if has_lesion else {})}
    for path in delivered:
        checked = subprocess.run(["dciodvfy", str(path)], capture_output=True, text=True, check=False)
        assert "Error" not in checked.stderr, checked.stderr


@needs_data
@needs_dicom3tools
@pytest.mark.timeout(600)
def test_the_real_studies_end_in_reading_order_and_their_results_in_the_pacs(tmp_path: Path) -> None:
    entries, said = shown(tmp_path, STUDIES)
    assert next(iter(entries)) == "MIDRC"
    answers = {name: entry.result for name, entry in entries.items() if entry.result}
    assert {name: answer.status.value for name, answer in answers.items()} == {
        "MIDRC": "positive",
        "LIDC-": "negative",
        "ACRIN": "not_analysable",
    }
    assert "missing slices" in answers["ACRIN"].reason
    assert "missing slices" in said
    for entry in entries.values():
        check_delivered(tmp_path / "demo" / "pacs", entry, {})


@needs_data
@needs_dicom3tools
@pytest.mark.timeout(600)
@pytest.mark.every_series
@pytest.mark.parametrize("model", [name for name in MODELS if name != Analysis().model])
def test_the_daemon_runs_with_every_network_that_ships(tmp_path: Path, model: str) -> None:
    """On a real study, with the 3D view among the results."""
    entries, _ = shown(tmp_path, ("lidc_0001",), "--model", model, "--view-3d")
    answer = entries["LIDC-"].result
    assert answer is not None
    assert answer.model == model
    assert answer.status is Status.NEGATIVE
    check_delivered(tmp_path / "demo" / "pacs", entries["LIDC-"], {VIEW_3D: 1})


@pytest.mark.parametrize("inputs", ["home", "home/study", "."])
def test_the_demo_never_empties_its_inputs(tmp_path: Path, inputs: str) -> None:
    (tmp_path / "home" / "study").mkdir(parents=True)
    (tmp_path / "home" / "study" / "image.dcm").write_text("precious")
    command = [
        sys.executable,
        str(DEMO),
        "--once",
        "--folder",
        str(tmp_path / "home"),
        str(tmp_path / inputs),
    ]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode != 0
    assert "overlap" in ended.stderr
    assert (tmp_path / "home" / "study" / "image.dcm").exists()


def test_the_demo_empties_only_folders_a_demo_made(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("precious")
    command = [sys.executable, str(DEMO), "--once", "--folder", str(tmp_path / "home")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert "no demo made" in ended.stderr
    assert (tmp_path / "home" / "thesis.txt").exists()


def test_a_second_demo_does_not_disturb_the_first(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    with (home / ".demo").open("w") as running:
        fcntl.flock(running, fcntl.LOCK_SH)
        command = [sys.executable, str(DEMO), "--once", "--folder", str(home)]
        ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert "a demo is running" in ended.stderr
    assert (home / ".demo").exists()
