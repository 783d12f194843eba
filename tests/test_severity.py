"""Severity: worked examples, and rules that hold for any masks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from triage.domain import Findings, Grade, Volume
from triage.severity import ONE_LUNG, grade, measure, side_masks

SHAPE = (12, 60, 100)
STANDARD = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


def ellipse(centre_y: int, centre_x: int, radius_y: int, radius_x: int) -> np.ndarray:
    y, x = np.mgrid[: SHAPE[1], : SHAPE[2]]
    plane = ((y - centre_y) / radius_y) ** 2 + ((x - centre_x) / radius_x) ** 2 <= 1
    return np.broadcast_to(plane, SHAPE).copy()


ON_THE_PICTURES_LEFT = ellipse(30, 25, 25, 15)
ON_THE_PICTURES_RIGHT = ellipse(30, 75, 22, 13)
LUNGS = ON_THE_PICTURES_LEFT | ON_THE_PICTURES_RIGHT


def volume(orientation: tuple[float, ...] = STANDARD) -> Volume:
    return Volume(np.zeros(SHAPE, np.int16), (5.0, 3.0, 3.0), orientation)


def findings(lesion: np.ndarray | None, lung: np.ndarray = LUNGS) -> Findings:
    return Findings(0.5, "score", False, lung, lesion)


@pytest.mark.parametrize(
    ("fraction", "expected"),
    [
        (0.0, Grade.CT0),
        (0.001, Grade.CT0),
        (0.002, Grade.CT1),
        (0.25, Grade.CT1),
        (0.2501, Grade.CT2),
        (0.5, Grade.CT2),
        (0.5001, Grade.CT3),
        (0.7499, Grade.CT3),
        (0.75, Grade.CT4),
        (1.0, Grade.CT4),
    ],
)
def test_grades_have_the_papers_limits(fraction: float, expected: Grade) -> None:
    assert grade(fraction, 0.001) is expected


def test_the_larger_lung_fraction_counts_and_sides_are_the_patients() -> None:
    lesion = ON_THE_PICTURES_LEFT.copy()
    lesion[6:] = False  # half of the lung on the picture's left: the patient's right
    severity = measure(volume(), findings(lesion), 0.001)
    assert severity.affected_right == pytest.approx(0.5)
    assert severity.affected_left == 0
    assert severity.affected_fraction == severity.affected_right
    assert severity.lung_volume_ml == pytest.approx(LUNGS.sum() * 0.045)
    assert severity.lesion_volume_ml == pytest.approx(lesion.sum() * 0.045)
    assert severity.grade is Grade.CT2


def test_a_prone_or_mirrored_image_still_names_the_patients_sides() -> None:
    mirrored = (-1.0, 0.0, 0.0, 0.0, -1.0, 0.0)
    severity = measure(volume(mirrored), findings(ON_THE_PICTURES_LEFT), 0.001)
    assert severity.affected_left == 1
    assert severity.affected_right == 0


def test_tall_lungs_are_not_split_into_top_and_bottom() -> None:
    tall = Volume(np.zeros(SHAPE, np.int16), (60.0, 3.0, 3.0), STANDARD)
    left, right = side_masks(LUNGS, tall) or (None, None)
    assert left is not None
    assert right is not None
    np.testing.assert_array_equal(right, ON_THE_PICTURES_LEFT)
    np.testing.assert_array_equal(left, ON_THE_PICTURES_RIGHT)


@pytest.mark.parametrize("lung", [ON_THE_PICTURES_LEFT, ellipse(30, 50, 10, 40)])
def test_one_lung_is_a_named_case(lung: np.ndarray) -> None:
    severity = measure(volume(), findings(lung, lung), 0.001)
    assert ONE_LUNG in severity.doubts
    assert severity.affected_left is None
    assert severity.affected_fraction == 1


def test_without_a_lesion_mask_the_fraction_is_unknown_never_zero() -> None:
    severity = measure(volume(), findings(None), 0.001)
    assert severity.affected_fraction is None
    assert severity.grade is None
    assert severity.lesion_volume_ml is None
    assert severity.lung_volume_ml > 0


@given(st.integers(0, 2**32 - 1))
def test_lesions_outside_the_lungs_never_count_and_fractions_stay_fractions(seed: int) -> None:
    lesion = np.random.default_rng(seed).random(SHAPE) < 0.3
    severity = measure(volume(), findings(lesion), 0.001)
    inside = measure(volume(), findings(lesion & LUNGS), 0.001)
    assert severity == inside
    assert severity.affected_fraction is not None
    assert 0 <= severity.affected_fraction <= 1


@given(st.integers(0, 2**32 - 1))
def test_more_lesion_never_lowers_the_fraction(seed: int) -> None:
    random = np.random.default_rng(seed)
    less = random.random(SHAPE) < 0.2
    more = less | (random.random(SHAPE) < 0.2)
    low = measure(volume(), findings(less), 0.001).affected_fraction
    high = measure(volume(), findings(more), 0.001).affected_fraction
    assert low is not None
    assert high is not None
    assert low <= high
