"""What some tests need beside Python, and the marks that skip them by name where it is missing."""

import os
import shutil
import sys
from pathlib import Path

import pytest

DATA = Path(os.environ.get("TRIAGE_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
"""Real series and masks; see the README, "Tests"."""


WEB = Path(__file__).parents[1] / "triage" / "web"
AXE, BUNDLE = WEB / "node_modules" / "axe-core" / "axe.min.js", WEB / "static" / "built" / "view3d.js"
"""What deploy/install leaves of npm's packages."""


def dcmtk(tool: str) -> str | None:
    """Where dcmtk's ``tool`` is; pynetdicom puts tools of the same names beside the interpreter."""
    beside = os.path.dirname(sys.executable)
    folders = [x for x in os.environ["PATH"].split(os.pathsep) if x != beside]
    return shutil.which(tool, path=os.pathsep.join(folders))


def _needs(what: str, present: bool) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not present, reason=f"needs {what}")


needs_data = _needs(f"real data at {DATA}", (DATA / "dicom").is_dir())
needs_dcmtk = _needs("dcmtk (storescu, dcmsend, dsrdump)", bool(dcmtk("storescu") and dcmtk("dsrdump")))
needs_dicom3tools = _needs("dicom3tools (dciodvfy, dcsrdump)", bool(shutil.which("dciodvfy")))
needs_orthanc = _needs("orthanc", bool(shutil.which("Orthanc")))
needs_chromium = _needs("chromium", bool(shutil.which("chromium")))
needs_npm = _needs("npm (deploy/install builds the 3D view with it)", AXE.is_file() and BUNDLE.is_file())
