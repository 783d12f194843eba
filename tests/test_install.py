"""deploy/install, with stand-ins for the tools that it calls."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_an_installation_without_its_3d_view_is_tried_again(tmp_path: Path) -> None:
    for name in ("deploy/install", "deploy/constraints.txt", "pyproject.toml", "triage/web/package.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    view = tmp_path / "triage/web/static/built/view3d.js"
    view.parent.mkdir(parents=True)
    view.touch()  # of an earlier version
    bundle = tmp_path / "triage/web/scripts/bundle.py"
    bundle.parent.mkdir()
    bundle.touch()
    tools, stamp = tmp_path / ".venv/bin", tmp_path / ".venv/installed"
    tools.mkdir(parents=True)
    for name, does in (("pip", "true"), ("python", "echo built >> builds; test -e registry")):
        (tools / name).write_text(f"#!/bin/sh\n{does}\n")
        (tools / name).chmod(0o755)

    def install() -> int:
        command = ["bash", str(tmp_path / "deploy/install"), "test"]
        subprocess.run(
            command, check=True, capture_output=True, env={"PYTHON": sys.executable, "PATH": "/bin:/usr/bin"}
        )
        return (tmp_path / "builds").read_text().count("built")

    assert (install(), stamp.exists()) == (1, False)
    (tmp_path / "registry").touch()
    assert (install(), stamp.exists()) == (2, True)
    assert install() == 2, "all is installed"
    view.unlink()
    assert install() == 3
