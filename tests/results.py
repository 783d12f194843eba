"""What the tests of our own objects share: series, answers, masks, and what the checkers say."""

import subprocess
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset

from tests.needs import DATA, needs_data
from triage.config import Assemble
from triage.dicom.header import find_instances
from triage.dicom.phantom import write_study
from triage.dicom.series import choose
from triage.domain import (
    CtSeverityScore,
    Findings,
    Grade,
    LesionClass,
    Mask,
    ModelInfo,
    Result,
    Series,
    Severity,
    Status,
    Volume,
)

NOW = datetime(2021, 3, 4, 5, 6, 7, tzinfo=UTC)
INFO = ModelInfo(name="multitask", version="3f2a9c01", summary="", calibrated=False, card="")
SEVERE = Severity(
    *(0.62, 0.41, 0.62, Grade.CT3, 4100.2, 2200.4),
    percent_infection=0.473,
    ct_severity_score=CtSeverityScore((1,) * 10, (2, 2, 2, 2, 2, 2, 1, 1, 1, 0)),
)
CLEAR = Severity(
    *(0.0, 0.0, 0.0, Grade.CT0, 5200.0, 0.0),
    percent_infection=0.0,
    ct_severity_score=CtSeverityScore((0,) * 10, (0,) * 10),
)
SOURCES = [
    "phantom",
    *(
        pytest.param(name, marks=needs_data)
        for name in ("covid_ricord_1012", "lidc_0001", "lungdx_a0001_two_kernels")
    ),
]


@cache
def real_series(name: str) -> Series:
    found, _ = find_instances([DATA / "dicom" / name])
    return choose(found, Assemble())


def small_study(folder: Path, **settings: object) -> Series:
    """24 slices of 64 × 64, 8 mm apart."""
    files = write_study(folder, seed=7, slices=24, rows=64, slice_spacing=8.0, **settings)
    return choose(find_instances(files)[0], Assemble())


def source_series(name: str, folder: Path) -> Series:
    return small_study(folder / "source") if name == "phantom" else real_series(name)


def blob(series: Series) -> Mask:
    """Lesion-like and lopsided in every axis, with empty slices before, between and behind."""
    first = series.instances[0]
    mask = np.zeros((len(series.instances), first.rows, first.columns), bool)
    mask[3:7, 10:20, 30:45] = True
    mask[9, 11, 3] = True
    mask[12:14, 40:43, 5:60:2] = True
    return mask


def parted(mask: Mask) -> dict[LesionClass, Mask]:
    """The mask as ground glass with consolidation in it, in the same slices."""
    consolidation = mask.copy()
    consolidation[..., :38] = False
    return {"ground_glass": mask & ~consolidation, "consolidation": consolidation}


def positive(series: Series, **changes: object) -> Result:
    figures = {
        "patient_id": "p",
        "status": Status.POSITIVE,
        "reason": "right lung 62 % affected, P 0.97",
        "probability": 0.97,
        "probability_kind": "classifier",
        "content_key": "key",
    }
    return Result(study_instance_uid=series.study_instance_uid, **{**figures, **changes})


def negative(series: Series, **changes: object) -> Result:
    return positive(
        series,
        **{"status": Status.NEGATIVE, "reason": "no lung affected, P 0.03", "probability": 0.03, **changes},
    )


def errors(path: Path) -> list[str]:
    """The errors that dciodvfy finds in the object; its warnings are none."""
    told = subprocess.run(["dciodvfy", path], capture_output=True, text=True, errors="replace", check=False)
    lines = (told.stdout + told.stderr).splitlines()
    assert lines, "dciodvfy said nothing"
    return [line for line in lines if line.startswith("Error")]


def read_masks(dataset: Dataset, series: Series) -> dict[str, Mask]:
    """Every segment's mask by its label, on the series' grid: frames are placed by what they refer to."""
    places = {instance.sop_instance_uid: k for k, instance in enumerate(series.instances)}
    labels = {int(s.SegmentNumber): s.SegmentLabel for s in dataset.SegmentSequence if s.SegmentNumber}
    shape = (len(places), dataset.Rows, dataset.Columns)
    masks = {label: np.zeros(shape, bool) for label in labels.values()}
    (shared,) = dataset.SharedFunctionalGroupsSequence
    frames = dataset.pixel_array.reshape(-1, *shape[1:])
    for frame, group in zip(frames, dataset.PerFrameFunctionalGroupsSequence, strict=True):
        k = places[group.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID]
        if dataset.SegmentationType == "LABELMAP":
            for number, label in labels.items():
                masks[label][k] = frame == number
        else:
            (item,) = group.get("SegmentIdentificationSequence") or shared.SegmentIdentificationSequence
            masks[labels[item.ReferencedSegmentNumber]][k] = frame
    return masks


def changed(series: Series, folder: Path, **attributes: object) -> Series:
    """The series with other attributes in its files; None takes one away."""
    folder.mkdir()
    files = []
    for instance in series.instances:
        dataset = dcmread(instance.path)
        for keyword, value in attributes.items():
            change(dataset, keyword, value)
        dataset.save_as(folder / instance.path.name)
        files.append(folder / instance.path.name)
    return choose(find_instances(files)[0], Assemble())


def change(dataset: Dataset, keyword: str, value: object) -> None:
    if value is not None:
        setattr(dataset, keyword, value)
    elif keyword in dataset:
        delattr(dataset, keyword)


SPACING = (5.0, 4.0, 3.0)
AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
"""Seen from the feet: columns run to the patient's left, rows to the back, slices to the head."""


def chest(lesion: tuple[slice, slice, slice] | None) -> tuple[Volume, Findings]:
    """Two boxes of lung, 200 mm high, in 60 slices of 60 × 100; the right one is in the low columns."""
    array = np.full((60, 60, 100), 40, np.int16)
    lung = np.zeros(array.shape, bool)
    lung[10:50, 15:45, 10:45] = True
    lung[10:50, 15:45, 55:90] = True
    array[lung] = -850
    mask = np.zeros_like(lung)
    if lesion is not None:
        mask[lesion] = True
        mask &= lung
        array[mask] = -300
    return Volume(array, SPACING, AXIAL), Findings(0.9, "classifier", False, lung, mask)


def stored_as(
    scanned: Volume, findings: Findings, flip_rows: bool, flip_columns: bool, turned: bool, tilted: bool
) -> tuple[Volume, Findings]:
    """The same axial scan, stored with rows and columns turned about; slices follow their normal."""
    row, column = np.array(AXIAL[:3]), np.array(AXIAL[3:])
    arrays = [scanned.array, findings.lung_mask, findings.lesion_mask]
    spacing = scanned.spacing
    if turned:
        row, column, spacing = column, row, (spacing[0], spacing[2], spacing[1])
        arrays = [array.swapaxes(1, 2) for array in arrays]
    if flip_columns:
        row, arrays = -row, [array[:, :, ::-1] for array in arrays]
    if flip_rows:
        column, arrays = -column, [array[:, ::-1] for array in arrays]
    if np.cross(row, column)[2] < 0:
        arrays = [array[::-1] for array in arrays]
    lean = np.array([0.0, 0.0, 0.1 if tilted else 0.0])
    stored = Volume(arrays[0], spacing, (*(row + lean), *(column + lean)))
    return stored, replace(findings, lung_mask=arrays[1], lesion_mask=arrays[2])
