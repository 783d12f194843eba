"""Processes that begin with the libraries read: what takes seconds is done once for all of them."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.faults.children", "triage.cli", "triage.predict"])
PATIENCE = 120


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """``triage ARGUMENTS…`` as in a terminal."""
    with TemporaryDirectory() as folder:
        said = [Path(folder) / name for name in ("stdout", "stderr")]
        process = PROCESSES.Process(target=_run, args=(arguments, said))
        process.start()
        process.join(PATIENCE)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(arguments, PATIENCE)
        out, err = (path.read_text() for path in said)
    return subprocess.CompletedProcess(arguments, process.exitcode, out, err)


def _run(arguments: tuple[str, ...], said: list[Path]) -> None:
    for path, stream in zip(said, (sys.stdout, sys.stderr), strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream.fileno())
    sys.argv = ["triage", *arguments]
    runpy.run_module("triage", run_name="__main__")
