"""The other systems that ship, on whole series from real scanners, by the command that a person types.

A smoke test of their order, not evidence: none of these series was trained on.
"""

import json
from pathlib import Path

import pytest
from pydicom import dcmread
from pydicom.uid import (
    Comprehensive3DSRStorage,
    SecondaryCaptureImageStorage,
    SegmentationStorage,
)
from typer.testing import CliRunner

from tests.needs import DATA, needs_data
from triage.cli import app
from triage.models import MODELS

pytestmark = needs_data

SERIES = {"covid_ricord_1012": "MIDRC", "lidc_0001": "LIDC"}
WRITTEN = {
    "lesion_seg": SegmentationStorage,
    "sr": Comprehensive3DSRStorage,
    "picture": SecondaryCaptureImageStorage,
    "key_slices": SecondaryCaptureImageStorage,
}


@pytest.fixture(scope="module", params=[name for name in MODELS if name != "multitask"])
def judged(request, tmp_path_factory):
    """The system's name, and the row of each series, by the first word of the patient's ID."""
    folder: Path = tmp_path_factory.mktemp(request.param)
    command = ["predict", *(str(DATA / "dicom" / s) for s in SERIES)]
    ended = CliRunner().invoke(
        app, [*command, "--model", request.param, "--output", str(folder / "out"), "--json"]
    )
    assert ended.exit_code == 0, ended.output
    return request.param, {row["patient_id"].partition("-")[0]: row for row in json.loads(ended.stdout)}


def test_covid_comes_before_nodules(judged):
    _, rows = judged
    covid, nodules = (rows[name] for name in SERIES.values())
    assert covid["status"] == "positive"
    assert covid["probability"] > nodules["probability"]
    assert covid["affected_fraction"] > nodules["affected_fraction"]
    if covid["positive_slices"] is not None:
        assert covid["positive_slices"] > nodules["positive_slices"]


def test_every_result_is_written(judged):
    system, rows = judged
    for row in rows.values():
        files = {kind: Path(path) for kind, path in row["files"].items()}
        of_lesions = () if row["lesion_volume_ml"] else ("lesion_seg", "key_slices")
        for kind in WRITTEN.keys() - of_lesions:
            assert dcmread(files[kind], stop_before_pixels=True).SOPClassUID == WRITTEN[kind]
        if row["lesion_volume_ml"]:
            segments = dcmread(files["lesion_seg"], stop_before_pixels=True).SegmentSequence
            told_apart = [row[kind] for kind in ("ground_glass_ml", "consolidation_ml") if row[kind]]
            assert len(segments) == (len(told_apart) or 1)
            assert bool(told_apart) == (system == "infnet")
        maps = list((files["sr"].parent / "attention").glob("slice_*.png"))
        assert bool(maps) == (system == "dcn")
