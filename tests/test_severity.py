"""Severity: worked examples, and rules that hold for any masks."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from triage.config import Analysis
from triage.domain import LUNG_REGIONS, CtSeverityScore, Findings, Grade, Status, Volume
from triage.severity import ONE_LUNG, answer, grade, measure, percent_infection, side_masks

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


def test_kinds_of_lesion_are_measured_inside_the_lungs_where_they_are_told_apart() -> None:
    lesion = ON_THE_PICTURES_LEFT.copy()
    consolidation = lesion.copy()
    consolidation[6:] = False
    plain = findings(lesion)
    assert measure(volume(), plain, 0.001).consolidation_ml is None
    parts = {"ground_glass": lesion & ~consolidation, "consolidation": consolidation | ~LUNGS}
    severity = measure(volume(), replace(plain, lesion_classes=parts), 0.001)
    assert severity.consolidation_ml == pytest.approx(consolidation.sum() * 0.045)
    assert severity.ground_glass_ml == pytest.approx((lesion & ~consolidation).sum() * 0.045)
    assert severity.ground_glass_ml + severity.consolidation_ml == pytest.approx(severity.lesion_volume_ml)


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


class TestAnswer:
    nothing = np.zeros(SHAPE, dtype=bool)
    inner = nothing.copy()
    inner[1:-1] = True
    whole = measure(volume(), findings(nothing, LUNGS & inner), 0.001)
    one_lung = measure(volume(), findings(nothing, ON_THE_PICTURES_LEFT & inner), 0.001)
    sick_lung = measure(volume(), findings(ON_THE_PICTURES_LEFT, ON_THE_PICTURES_LEFT & inner), 0.001)
    analysis = Analysis(minimum_lung_ml=100, positive_probability=0.5, positive_fraction=0.05)

    def test_is_by_probability_or_by_fraction(self) -> None:
        assert answer(0.49, self.whole, self.analysis) == (Status.NEGATIVE, "")
        assert answer(0.5, self.whole, self.analysis) == (Status.POSITIVE, "")
        assert answer(0.0, self.sick_lung, self.analysis) == (Status.POSITIVE, "")

    def test_nobody_is_negative_in_doubt(self) -> None:
        assert answer(0.5, self.one_lung, self.analysis) == (Status.POSITIVE, "")
        status, reason = answer(0.49, self.one_lung, self.analysis)
        assert status is Status.NOT_ANALYSABLE
        assert reason == "one lung only: no lesion in what is seen, which is not the whole"

    def test_too_little_lung_has_none_where_ml_are_known(self) -> None:
        strict = Analysis(minimum_lung_ml=3000)
        status, reason = answer(0.9, self.whole, strict)
        assert status is Status.NOT_ANALYSABLE
        assert reason.endswith("ml of lung found, below 3000 ml")
        assert answer(0.9, self.whole, strict, millimetres=False) == (Status.POSITIVE, "")


def test_without_a_lesion_mask_the_fraction_is_unknown_never_zero() -> None:
    severity = measure(volume(), findings(None), 0.001)
    assert severity.affected_fraction is None
    assert severity.grade is None
    assert severity.lesion_volume_ml is None
    assert severity.lung_volume_ml > 0


def test_percent_infection_is_the_mean_of_the_slices_not_of_the_pixels() -> None:
    """10 of 100 pixels, 100 of 200, and a slice without lung: (10 % + 50 %) / 2; pooled it would be 37 %."""
    lung, lesion = np.zeros((2, 3, 20, 20), dtype=bool)
    lung[0, :10, :10] = lung[1, :, :10] = True
    lesion[0, 0, :10] = lesion[1, :10, :10] = True
    lesion[2] = lesion[0, 15:] = True  # outside the lungs
    assert percent_infection(lung, lesion) == pytest.approx(0.3)
    assert percent_infection(lung, np.zeros_like(lung)) == 0
    assert percent_infection(lung, lung) == 1
    assert percent_infection(np.zeros_like(lung), lung) is None


BLOCK = (20, 24, 60)
"""Two lungs as blocks of 20 slices, 24 rows and 24 columns, 36 mm apart: bands of 2, 4, 6 and 8 slices."""
ON_THE_LEFT, ON_THE_RIGHT = slice(0, 24), slice(36, 60)
"""Columns of the lung on the picture's left, the patient's right, and of the other."""


def score(painted: np.ndarray, tolerance: float = 0.005) -> CtSeverityScore:
    """Slices run to the head, rows to the back, columns to the patient's left."""
    lung = np.zeros(BLOCK, dtype=bool)
    lung[:, :, ON_THE_LEFT] = lung[:, :, ON_THE_RIGHT] = True
    volume = Volume(np.zeros(BLOCK, np.int16), (5.0, 3.0, 3.0), STANDARD)
    answer = measure(volume, findings(painted, lung), tolerance).ct_severity_score
    assert answer is not None
    return answer


def painted(*boxes: tuple[slice, slice, slice]) -> np.ndarray:
    lesion = np.zeros(BLOCK, dtype=bool)
    for box in boxes:
        lesion[box] = True
    return lesion


@pytest.mark.parametrize(
    ("slices", "rows", "lateral_columns", "region"),
    [
        ((18, 20), (0, 24), (0, 24), "apical"),
        ((14, 18), (0, 12), (0, 24), "upper anterior"),
        ((14, 18), (12, 24), (0, 24), "upper posterior"),
        ((8, 14), (0, 16), (12, 24), "middle anterior medial"),
        ((8, 14), (0, 16), (0, 12), "middle anterior lateral"),
        ((8, 14), (16, 24), (0, 24), "middle posterior"),
        ((0, 8), (0, 12), (12, 24), "lower anterior medial"),
        ((0, 8), (0, 12), (0, 12), "lower anterior lateral"),
        ((0, 8), (12, 24), (12, 24), "lower posterior medial"),
        ((0, 8), (12, 24), (0, 12), "lower posterior lateral"),
    ],
)
def test_each_region_of_each_lung_scores_by_itself(slices, rows, lateral_columns, region) -> None:
    """Ten parts of 20 · 24 · 24 / 10 voxels; the outer columns of the picture are the lateral ones."""
    z, y = slice(*slices), slice(*rows)
    right = slice(*lateral_columns)
    left = slice(BLOCK[2] - lateral_columns[1], BLOCK[2] - lateral_columns[0])
    number = LUNG_REGIONS.index(region)
    only = tuple(2 if n == number else 0 for n in range(10))
    assert (z.stop - z.start) * (y.stop - y.start) * (right.stop - right.start) == 20 * 24 * 24 / 10
    assert score(painted((z, y, right))) == CtSeverityScore((0,) * 10, only)
    assert score(painted((z, y, left))) == CtSeverityScore(only, (0,) * 10)


def test_a_region_scores_one_below_half_and_two_from_half() -> None:
    upper, front = slice(14, 18), slice(0, 12)
    half, less = slice(0, 12), slice(0, 11)
    assert score(painted((upper, front, half))).right[1] == 2
    assert score(painted((upper, front, less))).right[1] == 1
    speck = painted((slice(14, 15), slice(0, 1), slice(0, 1)))
    assert score(speck, tolerance=0).total == 1
    assert score(speck, tolerance=0.005).total == 0


def test_the_scale_runs_from_none_to_forty() -> None:
    everything = slice(None)
    assert score(painted()).total == 0
    assert score(painted((everything, everything, everything))).total == 40
    stripes = np.zeros(BLOCK, dtype=bool)
    stripes[:, :, ::4] = True
    assert score(stripes) == CtSeverityScore((1,) * 10, (1,) * 10)
    assert score(painted((everything, everything, ON_THE_RIGHT))).left == (2,) * 10


def test_scores_that_cannot_be_told_are_unknown() -> None:
    unknown = measure(volume(), findings(None), 0.001)
    assert unknown.percent_infection is None
    assert unknown.ct_severity_score is None
    one = measure(volume(), findings(ON_THE_PICTURES_LEFT, ON_THE_PICTURES_LEFT), 0.001)
    assert one.percent_infection == 1
    assert one.ct_severity_score is None
    few = Volume(np.zeros((3, *SHAPE[1:]), np.int16), (5.0, 3.0, 3.0), STANDARD)
    assert measure(few, findings(LUNGS[:3], LUNGS[:3]), 0.001).ct_severity_score is None


def leaning_lungs() -> np.ndarray:
    """Lungs without any symmetry: every axis and both sides differ."""
    z, y, x = np.indices(SHAPE)
    right = ((x - 25) / 15) ** 2 + ((y - 28) / (14 + z)) ** 2 < 1
    left = ((x - 76 + z / 3) / 13) ** 2 + ((y - 33) / (22 - z / 2)) ** 2 < 1
    return (right & (z < 11)) | (left & (z > 0))


@given(st.integers(0, 2**32 - 1), *(st.booleans() for _ in range(3)))
def test_how_the_images_are_stored_changes_no_score(
    seed: int, across: bool, back: bool, swapped: bool
) -> None:
    """The same patient, slices stored with other axes: fractions, slice mean and regions stay."""
    random = np.random.default_rng(seed)
    lung, lesion = leaning_lungs(), ndimage.gaussian_filter(random.random(SHAPE), 3) > 0.5
    row, column = np.array([1.0, 0, 0]), np.array([0, 1.0, 0])
    expected = measure(volume(), findings(lesion, lung), 0.005)
    if back:
        lung, lesion, column = lung[:, ::-1], lesion[:, ::-1], -column
    if across:
        lung, lesion, row = lung[:, :, ::-1], lesion[:, :, ::-1], -row
    if swapped:
        lung, lesion, row, column = lung.swapaxes(1, 2), lesion.swapaxes(1, 2), column, row
    if np.cross(row, column)[2] < 0:  # slices are ordered along the normal of their plane
        lung, lesion = lung[::-1], lesion[::-1]
    stored = Volume(np.zeros(lung.shape, np.int16), (5.0, 3.0, 3.0), (*row, *column))
    answer = measure(stored, findings(lesion, lung), 0.005)
    assert expected.ct_severity_score is not None
    assert answer.ct_severity_score == expected.ct_severity_score
    assert answer.percent_infection == pytest.approx(expected.percent_infection)
    assert (answer.affected_left, answer.affected_right) == (expected.affected_left, expected.affected_right)


@given(st.integers(0, 2**32 - 1))
def test_a_mirrored_patient_has_the_mirrored_score(seed: int) -> None:
    lung = leaning_lungs()
    lesion = ndimage.gaussian_filter(np.random.default_rng(seed).random(SHAPE), 3) > 0.5
    seen = measure(volume(), findings(lesion, lung), 0.005).ct_severity_score
    mirrored = measure(volume(), findings(lesion[:, :, ::-1], lung[:, :, ::-1]), 0.005).ct_severity_score
    assert seen is not None
    assert mirrored == CtSeverityScore(seen.right, seen.left)


@given(st.integers(0, 2**32 - 1))
def test_lesions_outside_the_lungs_never_count_and_fractions_stay_fractions(seed: int) -> None:
    lesion = np.random.default_rng(seed).random(SHAPE) < 0.3
    severity = measure(volume(), findings(lesion), 0.001)
    inside = measure(volume(), findings(lesion & LUNGS), 0.001)
    assert severity == inside
    assert severity.affected_fraction is not None
    assert severity.percent_infection is not None
    assert severity.ct_severity_score is not None
    assert 0 <= severity.affected_fraction <= 1
    assert 0 <= severity.percent_infection <= 1
    assert 0 <= severity.ct_severity_score.total <= 40


@given(st.integers(0, 2**32 - 1))
def test_more_lesion_never_lowers_any_score(seed: int) -> None:
    random = np.random.default_rng(seed)
    density = random.random()
    less = random.random(SHAPE) < density
    more = less | (random.random(SHAPE) < 0.2)
    low, high = (measure(volume(), findings(lesion), 0.001) for lesion in (less, more))
    assert low.affected_fraction <= high.affected_fraction
    assert low.percent_infection <= high.percent_infection
    before, after = low.ct_severity_score, high.ct_severity_score
    assert all(a <= b for a, b in zip(before.left + before.right, after.left + after.right, strict=True))
