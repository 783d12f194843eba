"""Slices on disk → HU, beside SimpleITK, pydicom and the bare reading of bytes.

    python -m tests.bench.reading

Made-up slices of 512 × 512 that lie in the file cache: 300 plain ones, 24 of each compressed transfer syntax.
The floor is one thread's pread of the pixels, whose places are known, into a new array. All in turn, medians.
"""

import os
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter

import numpy as np
import SimpleITK as sitk
from pydicom import dcmread, uid

from tests.bench.results import study
from tests.bench.table import Line, show
from triage.config import Assemble
from triage.dicom.header import find_instances
from triage.dicom.phantom import write_study
from triage.dicom.series import choose
from triage.dicom.volume import read

SLICES, CODED, ROUNDS = 300, 24, 7
SYNTAXES = {
    "JPEG-LS": uid.JPEGLSLossless,
    "JPEG Lossless": uid.JPEGLosslessSV1,
    "JPEG 2000": uid.JPEG2000Lossless,
    "RLE": uid.RLELossless,
}
BYTES = 2 * 512 * 512


def by_pydicom(paths):
    """Its default decoder, as a tutorial does it."""
    slices = [dcmread(path) for path in paths]
    return np.stack([one.pixel_array * one.RescaleSlope + one.RescaleIntercept for one in slices])


def by_simpleitk(paths):
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames([str(path) for path in paths])
    return sitk.GetArrayFromImage(reader.Execute())


def floor(paths, offsets):
    array = np.empty((len(paths), 512, 512), np.int16)
    for path, offset, out in zip(paths, offsets, array, strict=True):
        descriptor = os.open(path, os.O_RDONLY)
        os.preadv(descriptor, [out], offset)
        os.close(descriptor)
    return array


def in_turn(ways, rounds):
    """Name → median seconds; a way that cannot read these files is left out."""
    taken = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            start = perf_counter()
            try:
                way()
            except (RuntimeError, AttributeError, NotImplementedError):
                continue
            taken[name].append(perf_counter() - start)
    return {name: median(times[1:]) for name, times in taken.items() if times}


def told(taken):
    return ", ".join(f"{name} {seconds * 1e3:.0f} ms" for name, seconds in taken.items())


def plain(chosen, rounds):
    paths = [one.path for one in chosen.instances]
    offsets = [path.stat().st_size - BYTES for path in paths]
    ways = {
        "ours": lambda: read(chosen),
        "SimpleITK": lambda: by_simpleitk(paths),
        "pydicom": lambda: by_pydicom(paths),
        "pread": lambda: floor(paths, offsets),
    }
    taken = in_turn(ways, rounds)
    what, ours = f"{len(paths)} plain slices", taken["ours"]
    ahead, over = taken["SimpleITK"] / ours, ours / taken["pread"]
    yield Line(f"{what}: SimpleITK over ours", told(taken), ahead, "≥ 4", ahead >= 4)
    yield Line(f"{what}: ours over pread", "", over, "≤ 3", over <= 3)


def coded(name, transfer_syntax_uid, folder, slices, rounds):
    write_study(
        folder, seed=7, slices=slices, rows=512, slice_spacing=10, transfer_syntax_uid=transfer_syntax_uid
    )
    chosen = choose(find_instances([folder])[0], Assemble())
    paths = [one.path for one in chosen.instances]
    ways = {
        "ours": lambda: read(chosen),
        "SimpleITK": lambda: by_simpleitk(paths),
        "pydicom": lambda: by_pydicom(paths),
    }
    taken = in_turn(ways, rounds)
    ahead = min((seconds for way, seconds in taken.items() if way != "ours"), default=0) / taken["ours"]
    yield Line(f"{slices} slices in {name}: the faster peer over ours", told(taken), ahead, "> 1", ahead > 1)


def lines(quick=False):
    slices, few, rounds = (30, 4, 1) if quick else (SLICES, CODED, ROUNDS)
    with TemporaryDirectory() as folder:
        yield from plain(study(Path(folder), slices), rounds)
    for name, transfer_syntax_uid in SYNTAXES.items():
        with TemporaryDirectory() as folder:
            yield from coded(name, transfer_syntax_uid, Path(folder), few, rounds)


if __name__ == "__main__":
    show(lines())
