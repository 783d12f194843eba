"""Files → HU: one series of 300 slices, and the same in every kind of compression, beside other readers.

    python -m tests.bench.reading

Warm files, in turn, medians. SimpleITK, pydicom and MONAI read as they come; the floor reads known bytes
into one array with two threads, and turns nothing into HU.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pydicom
import SimpleITK as sitk
from monai.data import PydicomReader
from monai.transforms import LoadImage
from pydicom import uid
from pydicom.encaps import encapsulate
from pydicom.pixels import apply_rescale

from tests.bench.results import ROUNDS, SLICES, study, timed
from tests.bench.table import Line, show
from triage.config import Assemble
from triage.dicom.header import find_instances
from triage.dicom.phantom import ENCODERS
from triage.dicom.series import choose
from triage.dicom.volume import read

MEMORY = """
import sys
from pathlib import Path
from tests.bench.reading import chosen
from triage.dicom.volume import read
series = chosen(Path(sys.argv[1]))
def highest():
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
before = highest()
array = read(series, 2).array
print((highest() - before) / 1024, array.nbytes / 1024**2)
"""


def chosen(folder: Path):
    return choose(find_instances([folder])[0], Assemble())


def compressed(folder: Path, series, transfer_syntax_uid: str):
    """The same slices in another transfer syntax."""
    folder.mkdir()
    for number, instance in enumerate(series.instances):
        dataset = pydicom.dcmread(instance.path)
        dataset.PixelData = encapsulate([ENCODERS[transfer_syntax_uid](dataset.pixel_array)])
        dataset["PixelData"].VR, dataset["PixelData"].is_undefined_length = "OB", True
        dataset.file_meta.TransferSyntaxUID = uid.UID(transfer_syntax_uid)
        dataset.save_as(folder / f"{number:04}.dcm")
    return chosen(folder)


def by_simpleitk(files: list[str]):
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(files)
    return sitk.GetArrayFromImage(reader.Execute())


def by_pydicom(files: list[str]):
    slices = (pydicom.dcmread(file) for file in files)
    return np.stack([apply_rescale(one.pixel_array, one) for one in slices])


def by_monai(files: list[str]):
    """Of a folder, for a list of files is to it one of channels."""
    return LoadImage(reader=PydicomReader(), image_only=True)(str(Path(files[0]).parent))


def floor(places: list[tuple[str, int]], shape):
    array = np.empty((len(places), *shape), np.int16)

    def one(place, out):
        descriptor = os.open(place[0], os.O_RDONLY)
        os.preadv(descriptor, [out], place[1])
        os.close(descriptor)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(one, places, array))
    return array


def able(act) -> bool:
    """Whether a peer can read these files at all."""
    try:
        act()
    except RuntimeError:
        return False
    return True


def compared(what, series, rounds, goals):
    files = [str(instance.path) for instance in series.instances]
    acts = {
        "ours": lambda: read(series, 2),
        "SimpleITK": lambda: by_simpleitk(files),
        "pydicom": lambda: by_pydicom(files),
        "MONAI": lambda: by_monai(files),
    }
    if "floor" in goals:
        shape = read(series).array.shape[1:]
        size = 2 * int(np.prod(shape))
        places = [(file, os.path.getsize(file) - size) for file in files]
        acts["floor"] = lambda: floor(places, shape)
    acts = {name: act for name, act in acts.items() if name == "ours" or (name in goals and able(act))}
    taken = timed(acts, rounds)
    for peer, goal in goals.items():
        if peer not in taken:
            yield Line(f"{what}, beside {peer}", f"{taken['ours']:.3f} s, {peer} has no decoder for it here")
            continue
        ratio = taken[peer] / taken["ours"]
        said = f"≥ {goal:g} × as fast" if goal > 0 else f"≤ {-goal:g} × as long"
        met = ratio >= goal if goal > 0 else 1 / ratio <= -goal
        yield Line(f"{what}, beside {peer}", f"{taken['ours']:.3f} s, {taken[peer]:.3f} s", ratio, said, met)


def memory(folder: Path, slices: int) -> Line:
    """Of a process that reads nothing else: what it holds beyond the array it gives."""
    series = study(folder, slices)
    command = [sys.executable, "-c", MEMORY, str(series.instances[0].path.parent)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    grown, array = map(float, said.split())
    beside = grown - array
    return Line(
        f"memory for {slices} slices",
        f"{array:.0f} MB of HU and {beside:.0f} MB beside",
        goal="≤ 100 MB beside",
        met=beside <= 100,
    )


def lines(quick: bool) -> list[Line]:
    slices, rounds, many = (40, 1, 100) if quick else (SLICES, ROUNDS, 2000)
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "raw").mkdir()
        series = study(folder / "raw", slices)
        found = list(compared("raw", series, rounds, {"SimpleITK": 4, "pydicom": 1, "MONAI": 1, "floor": -3}))
        for syntax in ENCODERS:
            same = compressed(folder / syntax, series, syntax)
            found += compared(uid.UID(syntax).name, same, min(rounds, 2), {"SimpleITK": 1, "pydicom": 1})
        (folder / "many").mkdir()
        return [*found, memory(folder / "many", many)]


if __name__ == "__main__":
    show(lines(quick="--quick" in sys.argv))
