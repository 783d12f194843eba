"""The made-up study: a valid, deterministic chest CT that says it is made up."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom import uid
from scipy import ndimage

from tests.needs import needs_dicom3tools
from triage.dicom.header import find_instances
from triage.dicom.phantom import ENCODERS, NOT_SCANNED, Phantom, draw, write_study


def aerated_ml(array: np.ndarray, phantom: Phantom) -> float:
    z, y, x = phantom.spacing
    return float(((array > -950) & (array < -720)).sum() * z * y * x / 1000)


def test_equal_phantoms_are_equal_bytes(tmp_path: Path) -> None:
    settings = {"slices": 4, "rows": 64, "lesion_fraction": 0.2, "localizer": True}
    first = write_study(tmp_path / "a", seed=4, **settings)
    second = write_study(tmp_path / "b", seed=4, **settings)
    other = write_study(tmp_path / "c", seed=5, **settings)
    assert [f.read_bytes() for f in first] == [f.read_bytes() for f in second]
    assert all(a.read_bytes() != b.read_bytes() for a, b in zip(first, other, strict=True))


def test_it_says_that_it_is_made_up(tmp_path: Path) -> None:
    for file in write_study(tmp_path, seed=4, slices=2, rows=64, localizer=True):
        dataset = pydicom.dcmread(file)
        assert str(dataset.PatientName).startswith("PHANTOM^")
        assert dataset.PatientID == "PHANTOM-4"
        assert "MADE-UP" in dataset.StudyDescription
        assert "MADE-UP" in dataset.SeriesDescription


@needs_dicom3tools
@pytest.mark.parametrize(
    "transfer_syntax_uid", [uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian, *ENCODERS]
)
def test_dciodvfy_accepts_every_file(tmp_path: Path, transfer_syntax_uid: str) -> None:
    files = write_study(
        tmp_path,
        seed=4,
        slices=2,
        rows=64,
        localizer=True,
        priority="STAT",
        transfer_syntax_uid=transfer_syntax_uid,
    )
    for file in files:
        done = subprocess.run(["dciodvfy", str(file)], capture_output=True, text=True, check=False)
        assert "CTImage" in done.stderr
        assert "Error" not in done.stderr, done.stderr


def test_two_lungs_of_an_adult() -> None:
    phantom = Phantom(seed=4)
    array = draw(phantom)
    assert 3000 < aerated_ml(array, phantom) < 6500
    labels, _count = ndimage.label((array > -950) & (array < -720))
    sizes = np.bincount(labels.ravel())[1:]
    small, large = np.argsort(sizes)[-2:]
    assert sizes[small] > 0.5 * sizes[large]
    centres = ndimage.center_of_mass(labels > 0, labels, [small + 1, large + 1])
    assert abs(centres[0][2] - centres[1][2]) > 70 / phantom.spacing[2]


@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.6])
def test_lesions_take_about_the_share_of_the_lungs_that_was_asked_for(fraction: float) -> None:
    healthy, ill = Phantom(seed=4, rows=128), Phantom(seed=4, rows=128, lesion_fraction=fraction)
    before, after = draw(healthy), draw(ill)
    lungs = ndimage.binary_opening((before > -950) & (before < -720), np.ones((1, 5, 5)))
    assert (after[lungs] > -720).mean() == pytest.approx(fraction, abs=0.06)


def test_hu_are_those_of_a_chest() -> None:
    array = draw(Phantom(seed=4, rows=128))
    scanned = array[array != NOT_SCANNED]
    assert scanned.min() >= -1024
    assert (scanned > 300).mean() > 0.005
    assert array[0, 0, 0] == NOT_SCANNED
    assert array[30, 2, 64] < -950


def test_settings_reach_the_files(tmp_path: Path) -> None:
    write_study(
        tmp_path,
        seed=4,
        slices=6,
        rows=64,
        missing=(0, 3),
        study_instance_uid="1.2.3",
        convolution_kernel="LUNG",
        patient_age="012Y",
        body_part_examined="HEAD",
        slice_spacing=2.5,
        priority="STAT",
    )
    found, refused = find_instances([tmp_path])
    assert not refused
    assert len(found) == 4
    assert {i.study_instance_uid for i in found} == {"1.2.3"}
    assert {i.convolution_kernel for i in found} == {"LUNG"}
    assert {i.patient_age_years for i in found} == {12}
    assert {i.body_part_examined for i in found} == {"HEAD"}
    assert {i.requested_procedure_priority for i in found} == {"STAT"}
    heights = sorted(i.image_position_patient[2] for i in found if i.image_position_patient)
    assert heights == [-297.5, -295.0, -290.0, -287.5]


def test_an_unknown_setting_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="lesions"):
        write_study(tmp_path, seed=4, lesions=3)
