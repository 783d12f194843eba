"""The default network on whole series from real scanners: a smoke test of order and stability, not evidence.

None of these series was trained on, and no threshold was chosen with them.
"""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from scipy import ndimage

from tests.needs import DATA, needs_data
from triage import models
from triage.config import Analysis, Assemble
from triage.dicom.header import find_instances
from triage.dicom.series import choose
from triage.dicom.volume import read
from triage.domain import Volume
from triage.severity import measure
from triage.training.datasets import DATASETS
from triage.training.metrics import dice

pytestmark = needs_data

ANALYSIS = Analysis()
COVID = "covid_ricord_1012"
SERIES = {
    COVID: (COVID, None),
    "nodules": ("lidc_0001", None),
    "tumour, kernel L": ("lungdx_a0001_two_kernels", "L"),
    "tumour, kernel B": ("lungdx_a0001_two_kernels", "B"),
}
OTHERS = [name for name in SERIES if name != COVID]
POINT = 0.01


@cache
def network():
    return models.load(ANALYSIS)


@cache
def volume(name):
    folder, kernel = SERIES[name]
    instances, _ = find_instances([DATA / "dicom" / folder])
    return read(choose([i for i in instances if kernel in (None, i.convolution_kernel)], Assemble()))


def judge(ct):
    findings = network().predict(ct)
    return findings, measure(ct, findings, ANALYSIS.ct0_tolerance)


@cache
def judged(name):
    return judge(volume(name))


def thick(ct):
    """Slices averaged to about 5 mm."""
    n = round(5 / ct.spacing[0])
    whole = ct.array[: len(ct.array) // n * n]
    array = whole.reshape(-1, n, *whole.shape[1:]).mean(axis=1)
    return replace(ct, array=np.rint(array).astype(np.int16), spacing=(n * ct.spacing[0], *ct.spacing[1:]))


def shifted(ct):
    """By a fraction of the networks' pixels, in plane."""
    array = ndimage.shift(ct.array, (0, 7.4, -5.3), order=1, mode="nearest")
    return replace(ct, array=array)


def turned(ct):
    """Last slice first; seen from the other side, rows run the other way to stay the same patient."""
    row, column = ct.orientation[:3], ct.orientation[3:]
    return Volume(np.ascontiguousarray(ct.array[::-1, :, ::-1]), ct.spacing, (*(-x for x in row), *column))


def noisy(ct):
    noise = np.random.default_rng(1).normal(0, 20, ct.array.shape)
    return replace(ct, array=np.rint(ct.array + noise).astype(np.int16))


def test_covid_is_positive_and_the_others_are_not():
    findings, extent = judged(COVID)
    assert findings.probability >= ANALYSIS.positive_probability
    assert extent.affected_fraction >= ANALYSIS.positive_fraction
    for name in OTHERS:
        other, little = judged(name)
        assert other.probability < ANALYSIS.positive_probability, name
        assert little.affected_fraction < ANALYSIS.positive_fraction, name
        assert findings.probability - other.probability >= 0.3, name


@pytest.mark.parametrize("name", SERIES)
def test_lungs_have_the_size_of_lungs(name):
    _, extent = judged(name)
    assert 2000 < extent.lung_volume_ml < 7500
    assert not extent.doubts


@pytest.mark.parametrize("change", [thick, shifted, turned, noisy])
@pytest.mark.parametrize("name", SERIES)
def test_the_affected_fraction_is_stable(name, change):
    if change is thick and volume(name).spacing[0] > 2.5:
        change = lambda ct: replace(ct, array=ct.array[::2], spacing=(2 * ct.spacing[0], *ct.spacing[1:]))  # noqa: E731
    _, extent = judged(name)
    _, changed = judge(change(volume(name)))
    assert changed.affected_fraction == pytest.approx(extent.affected_fraction, abs=POINT)


@cache
def in_precision(precision):
    """In float32 by torch, otherwise by what is fastest here, such as OpenVINO."""
    engine = "torch" if precision == "float32" else "auto"
    return models.load(ANALYSIS.model_copy(update={"precision": precision, "engine": engine}))


@pytest.mark.parametrize("name", SERIES)
def test_the_faster_precision_and_engine_give_the_same_masks(name):
    exact, fast = (in_precision(p).predict(volume(name)) for p in ("float32", "bfloat16"))
    assert dice(exact.lung_mask, fast.lung_mask) >= 0.998
    assert dice(exact.lesion_mask, fast.lesion_mask) >= 0.99
    assert abs(exact.probability - fast.probability) < 0.01


def test_the_faster_precision_and_engine_agree_as_well_with_what_was_drawn():
    """Dice with the drawn masks differs by at most 0.002."""
    for case in DATASETS["medseg9"].read(DATA / "train"):
        if case.patient in ("p3", "p4"):
            exact, fast = (in_precision(p).predict(case.volume) for p in ("float32", "bfloat16"))
            assert dice(exact.lung_mask, case.lung) == pytest.approx(
                dice(fast.lung_mask, case.lung), abs=0.002
            )
            (drawn,) = case.lesions
            assert dice(exact.lesion_mask, drawn) == pytest.approx(dice(fast.lesion_mask, drawn), abs=0.002)
