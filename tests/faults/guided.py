"""Broken images that a fuzzer makes, which sees what of our code and of pydicom's each of them reaches.

Atheris watches modules from when they are imported: hence a program of its own.
"""

from __future__ import annotations

import base64
import re
import subprocess
import sys
import warnings
import zlib
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.faults.table import Context, Row

MOST_MEGABYTES = 2048
LONGEST_INPUT = 16384
MISSING = "atheris is not installed"
WATCHED = ["triage.dicom", "pydicom"]
UNWATCHED = [
    f"pydicom.{name}"
    for name in ("_dicom_dict", "_private_dict", "_uid_dict", "_storage_sopclass_uids", "sr")
]
"""Tables: they branch nowhere, and take long to watch."""


def images(context: Context) -> Row:
    """Beginning with the good images, their headers above all."""
    row = Row()
    if find_spec("atheris") is None:
        row.missing = MISSING
        row.expect(not context.long, MISSING)
        return row
    with TemporaryDirectory() as name:
        folder = Path(name)
        options = [f"-runs={context.number(500, 2_000_000)}", f"-seed={context.seed}"]
        options += [f"-max_total_time={context.seconds:.0f}"] if context.seconds is not None else []
        command = [sys.executable, "-m", "tests.faults.guided", str(folder), *options]
        done = subprocess.run(command, capture_output=True, check=False)
        log = done.stderr.decode(errors="replace")
        wrong = folder / "wrong"
        row.wrong += wrong.read_text().splitlines() if wrong.exists() else []
        row.expect(done.returncode == 0, f"ended with {done.returncode}: {log[-1500:]}")
    runs, reached = re.findall(r"Done (\d+) runs", log), re.findall(r"cov: (\d+)", log)
    row.tries = int(runs[-1]) if runs else 0
    row.figure = f"reaches {reached[-1]} branches, {reached[0]} at first" if reached else ""
    return row


def main(folder: Path, options: list[str]) -> None:
    """What is wrong with an input is told once in ``folder``, and the fuzzer goes on."""
    import atheris

    warnings.simplefilter("ignore")
    with atheris.instrument_imports(include=WATCHED, exclude=UNWATCHED):
        from tests.faults.inputs import samples
        from tests.faults.readers import STUCK, attempted, limit_memory, read_image
    corpus, path, seen = folder / "corpus", folder / "input.dcm", set[str]()
    corpus.mkdir()
    for number, sample in enumerate(samples()):
        if len(sample.raw) <= LONGEST_INPUT:
            (corpus / str(number)).write_bytes(sample.raw)
    limit_memory()

    def one(raw: bytes) -> None:
        _, complaint = attempted(read_image, raw, path)
        if complaint and complaint not in seen:
            seen.add(complaint)
            packed = base64.b64encode(zlib.compress(raw)).decode()
            with (folder / "wrong").open("a") as told:
                told.write(f"{complaint}; base64 of the deflated input: {packed}\n")

    limits = [f"-max_len={LONGEST_INPUT}", f"-timeout={STUCK}", f"-rss_limit_mb={MOST_MEGABYTES}"]
    atheris.Setup([sys.argv[0], str(corpus), f"-artifact_prefix={folder}/", *limits, *options], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
