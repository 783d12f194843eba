"""What some tests need beside Python, and the marks that skip them by name where it is missing."""

import os
import shutil
from pathlib import Path

import pytest

DATA = Path(os.environ.get("TRIAGE_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
"""Real series and masks; see the README, "Tests"."""


def _needs(what: str, present: bool) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not present, reason=f"needs {what}")


needs_data = _needs(f"real data at {DATA}", (DATA / "dicom").is_dir())
needs_dcmtk = _needs(
    "dcmtk (storescu, dcmsend, dsrdump)", bool(shutil.which("storescu") and shutil.which("dsrdump"))
)
needs_dicom3tools = _needs("dicom3tools (dciodvfy, dcsrdump)", bool(shutil.which("dciodvfy")))
needs_orthanc = _needs("orthanc", bool(shutil.which("Orthanc")))
needs_chromium = _needs(
    "chromium and chromedriver", bool(shutil.which("chromium") and shutil.which("chromedriver"))
)
