"""Result objects of one study: SEG beside dcmqi and highdicom, and the report with its pictures.

    python -m tests.bench.results

Three segments on 300 slices of 512 × 512: both lungs in 280, lesions in 120. dcmqi's ``itkimage2segimage``
(``pip install dcmqi``) is looked for beside the interpreter, on PATH and in DCMQI; it writes one object of
the three from raw NRRD, highdicom and the product two, the product's synced to the disk. In turn, medians.
"""

import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter

import numpy as np
import SimpleITK as sitk
from highdicom.seg import Segmentation
from pydicom import dcmread

from tests.bench.table import Line, show
from tests.results import INFO, NOW, SEVERE, positive
from triage.analyze import Case, Stopwatch, _write
from triage.config import Assemble, Results
from triage.dicom import objects, seg, source
from triage.dicom.header import find_instances
from triage.dicom.phantom import write_study
from triage.dicom.series import choose
from triage.dicom.volume import read
from triage.domain import Findings, ResultKind

SLICES, ROUNDS = 300, 5
PIECE = {"seed": 7, "slices": 12, "rows": 512, "slice_spacing": 1.25, "slice_thickness": 1.25}


def study(folder, slices):
    """Drawn once for a few slices, which are repeated further up: drawing all takes a minute."""
    drawn = [dcmread(path) for path in write_study(folder / "drawn", **PIECE)]
    below = folder / "source"
    below.mkdir()
    for number in range(slices):
        dataset = drawn[number % len(drawn)]
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.{number + 1}"
        dataset.InstanceNumber = number + 1
        dataset.ImagePositionPatient = [*drawn[0].ImagePositionPatient[:2], 1.25 * number]
        dataset.save_as(below / f"{number:04}.dcm")
    return choose(find_instances([below])[0], Assemble(minimum_coverage_mm=1))


def ball(slices, centre, radii):
    y, x = np.ogrid[:512, :512]
    z = (np.arange(slices) / slices - centre[0]) / radii[0]
    away = ((y - centre[1]) / radii[1]) ** 2 + ((x - centre[2]) / radii[2]) ** 2
    return np.stack([away < 1 - height**2 for height in z])


def masks(slices):
    """Right lung, left lung, lesions."""
    right = ball(slices, (0.5, 250, 150), (7 / 15, 150, 90))
    left = ball(slices, (0.5, 250, 360), (7 / 15, 150, 90))
    return right, left, ball(slices, (0.4, 300, 150), (0.2, 60, 50)) & right


@cache
def dcmqi():
    """Where dcmqi's tool is, or None."""
    beside = Path(sys.executable).with_name("itkimage2segimage")
    return (
        os.environ.get("DCMQI") or shutil.which("itkimage2segimage") or (beside.exists() and beside) or None
    )


def dcmqis(folder, series, parts):
    """A function that lets dcmqi write the three segments; reading the masks (NRRD, raw) is part of it."""
    code = {"CodeValue": "39607008", "CodingSchemeDesignator": "SCT", "CodeMeaning": "Lung"}
    category = {
        "CodeValue": "91723000",
        "CodingSchemeDesignator": "SCT",
        "CodeMeaning": "Anatomical Structure",
    }
    names = ("Right lung", "Left lung", "Lesions")
    meta = {
        "ContentCreatorName": "bench",
        "SeriesDescription": "bench",
        "SeriesNumber": "1",
        "InstanceNumber": "1",
        "segmentAttributes": [
            [
                {
                    "labelID": 1,
                    "SegmentDescription": name,
                    "SegmentAlgorithmType": "AUTOMATIC",
                    "SegmentAlgorithmName": "bench",
                    "SegmentedPropertyCategoryCodeSequence": category,
                    "SegmentedPropertyTypeCodeSequence": code,
                }
            ]
            for name in names
        ],
    }
    (folder / "meta.json").write_text(json.dumps(meta))
    files = []
    for number, part in enumerate(parts):
        image = sitk.GetImageFromArray(part.astype(np.uint8))
        image.SetSpacing(series.spacing[::-1])
        image.SetOrigin(series.instances[0].image_position_patient)
        files.append(folder / f"{number}.nrrd")
        sitk.WriteImage(image, files[-1], useCompression=False)
    command = [dcmqi(), "--inputDICOMDirectory", series.instances[0].path.parent, "--skip", "1"]
    command += ["--inputImageList", ",".join(map(str, files)), "--inputMetadata", folder / "meta.json"]
    command += ["--outputDICOM", folder / "dcmqi.dcm"]
    return lambda: subprocess.run(list(map(str, command)), check=True, capture_output=True)


def highdicoms(folder, series, parts):
    """A function that lets highdicom write the product's two objects, from what is known of the slices."""
    frame = dcmread(series.instances[0].path, stop_before_pixels=True).FrameOfReferenceUID
    right, left, lesions = (part.astype(np.uint8) for part in parts)
    names, kinds = list(seg.LUNGS), (ResultKind.LUNG_SEG, ResultKind.LESION_SEG)
    result = positive(series)
    described = [seg._segment(n, name, seg.LUNGS[name][1], result, INFO) for n, name in enumerate(names, 1)]

    def write():
        for kind, labels, segments in zip(
            kinds, (right + 2 * left, lesions), (described, described[:1]), strict=True
        ):
            slices = [source.slice_of(series, one, frame) for one in series.instances]
            for keyword in source.TYPE_2:
                setattr(slices[0], keyword, None)
            made = Segmentation(
                source_images=slices,
                pixel_array=labels,
                segmentation_type="BINARY",
                segment_descriptions=segments,
                **objects.identity(kind, result, INFO, NOW),
            )
            made.save_as(folder / "highdicom.dcm")

    return write


def timed(acts, rounds):
    """Median seconds of each, in turn; the first round is not counted."""
    taken = {name: [] for name in acts}
    for _ in range(rounds + 1):
        for name, act in acts.items():
            start = perf_counter()
            act()
            taken[name].append(perf_counter() - start)
    return {name: median(rounds[1:]) for name, rounds in taken.items()}


def of_segmentations(folder, series, parts, rounds):
    result = positive(series)
    right, left, lesions = parts

    def ours():
        seg.write_lungs(series, left, right, result, INFO, folder, now=NOW)
        seg.write_lesions(series, lesions, result, INFO, folder, now=NOW)

    acts = {"ours": ours, "highdicom": highdicoms(folder, series, parts)}
    acts["floor"] = lambda: [np.packbits(plane, bitorder="little") for part in parts for plane in part]
    if dcmqi():
        acts["dcmqi"] = dcmqis(folder, series, parts)
    taken = timed(acts, rounds)
    ours_s, frames = taken["ours"], [dcmread(folder / f"{name}.dcm").NumberOfFrames for name in OBJECTS]
    what = f"SEG, {sum(frames)} frames of {len(series.instances)} slices"
    if dcmqi():
        written = dcmread(folder / "dcmqi.dcm").NumberOfFrames
        assert written == sum(frames), f"dcmqi wrote {written} frames, the product {frames}"
        ratio = taken["dcmqi"] / ours_s
        yield Line(what, f"{ours_s:.3f} s, dcmqi {taken['dcmqi']:.3f} s", ratio, "≥ 3 × dcmqi", ratio >= 3)
    else:
        yield Line(what, "dcmqi is not installed: pip install dcmqi", goal="≥ 3 × dcmqi")
    yield Line("the same beside highdicom", f"{taken['highdicom']:.3f} s", taken["highdicom"] / ours_s)
    yield Line("the same beside packing bits alone", f"{taken['floor']:.3f} s", taken["floor"] / ours_s)


OBJECTS = ("lung_seg", "lesion_seg")


def of_the_rest(folder, series, parts, rounds):
    """As the daemon writes them: summary, thumbnail, key slices and their PNG, report."""
    right, left, lesions = parts
    found = Findings(0.97, "classifier", True, right | left, lesions)
    case = Case(
        series=series,
        volume=read(series),
        findings=found,
        severity=SEVERE,
        answer=positive(series),
        info=INFO,
        parameters={"threshold": 0.5},
        folder=folder,
        now=NOW,
        predecessor=None,
    )
    stages = []
    for _ in range(rounds + 1):
        watch = Stopwatch()
        _write(case, Results(), watch)
        stages.append(watch.seconds)
    taken = {name: median(one[name] for one in stages[1:]) for name in stages[0]}
    whole = taken["sr"] + taken["picture"] + taken["key_slices"]
    told = ", ".join(f"{name} {taken[name]:.2f}" for name in ("sr", "picture", "key_slices"))
    yield Line(
        f"report and pictures, {len(series.instances)} slices",
        f"{whole:.2f} s: {told}",
        None,
        "≤ 0.5 s",
        whole <= 0.5,
    )
    yield Line("masks as the daemon writes them by default", f"{taken['seg']:.2f} s")


def lines(quick: bool) -> list[Line]:
    slices, rounds = (60, 2) if quick else (SLICES, ROUNDS)
    with TemporaryDirectory() as name:
        folder, parts = Path(name), masks(slices)
        series = study(folder, slices)
        return [
            *of_segmentations(folder, series, parts, rounds),
            *of_the_rest(folder, series, parts, rounds),
        ]


if __name__ == "__main__":
    show(lines(quick="--quick" in sys.argv))
