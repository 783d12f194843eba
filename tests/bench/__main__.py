"""Every benchmark in turn, as one table of what was measured beside its peers and goals.

    python -m tests.bench [--quick] [--markdown] [NAME …]

``--quick`` measures less, to see that all runs; ``--markdown`` prints sections for deploy/PERFORMANCE.md. The
peers are looked for by name, and named where they are missing.
"""

import os
import platform
import shutil
import sys
from datetime import UTC, datetime
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path

from tests.bench.results import dcmqi
from tests.bench.table import show
from tests.needs import dcmtk

BENCHMARKS = {
    "receiving": "Receiving",
    "reading": "Reading",
    "judging": "Judging",
    "results": "Results",
    "worklist": "Worklist",
    "scale": "Scale with work, and the start",
}
"""Modules beside this one, each with ``lines(quick) -> list[Line]``, and their headings."""
LIBRARIES = ("SimpleITK", "monai", "highdicom", "pydicom", "pynetdicom", "openvino", "onnxruntime")


def peers():
    """Name → where it is, or its version; empty where it is missing."""
    return {
        "Orthanc": shutil.which("Orthanc") or "",
        "dcmtk": dcmtk("storescp") or "",
        "dcmqi": str(dcmqi() or ""),
        **{name: metadata.version(name) if find_spec(name) else "" for name in LIBRARIES},
    }


def machine():
    cpus = Path("/proc/cpuinfo")
    names = [
        line.partition(": ")[2] for line in cpus.read_text().splitlines() if line.startswith("model name")
    ]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1024**3
    name = names[0] if names else platform.machine()
    return f"{name}, {os.cpu_count()} processors, {memory:.0f} GB; Python {platform.python_version()}"


def main(names, quick, markdown):
    unknown = set(names) - set(BENCHMARKS)
    if unknown:
        sys.exit(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")
    found = peers()
    print(f"{datetime.now(UTC):%Y-%m-%d}, {machine()}" + (" (quick: figures say little)" if quick else ""))
    missing = [name for name, where in found.items() if not where]
    print(f"Peers missing: {', '.join(missing)}." if missing else "All peers are there.")
    for name in names or BENCHMARKS:
        print(f"\n{'## ' if markdown else ''}{BENCHMARKS[name]}\n", flush=True)
        show(import_module(f"tests.bench.{name}").lines(quick))


if __name__ == "__main__":
    options = {one for one in sys.argv[1:] if one.startswith("--")}
    if options - {"--quick", "--markdown"}:
        sys.exit(__doc__)
    main([one for one in sys.argv[1:] if one not in options], "--quick" in options, "--markdown" in options)
