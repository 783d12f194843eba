"""The glance picture: right side, right way up, true proportions, green to red, and nobody's name."""

from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from pydicom import dcmread

from tests.needs import needs_dicom3tools
from tests.results import (
    CLEAR,
    INFO,
    NOW,
    SEVERE,
    SOURCES,
    chest,
    errors,
    negative,
    positive,
    small_study,
    source_series,
    stored_as,
)
from triage.dicom import pictures, volume
from triage.domain import Findings, Mask, Series, Severity
from triage.errors import Retryable


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Series:
    return small_study(tmp_path_factory.mktemp("study"))


RIGHT_LOWER = (slice(10, 22), slice(15, 45), slice(10, 45))


@pytest.fixture(scope="module")
def picture(study: Series) -> NDArray[np.uint8]:
    return pictures.summary(*chest(RIGHT_LOWER), SEVERE, positive(study))


def view(picture: NDArray[np.uint8]) -> NDArray[np.int_]:
    return picture[: pictures.VIEW_HEIGHT].astype(int)


def red(picture: NDArray[np.uint8]) -> Mask:
    pixels = view(picture)
    return (pixels[..., 0] > 130) & (pixels[..., 0] > 1.8 * pixels[..., 1])


def green(picture: NDArray[np.uint8]) -> Mask:
    pixels = view(picture)
    return (pixels[..., 1] > 80) & (pixels[..., 1] > 1.5 * pixels[..., 0])


def middle(mask: Mask) -> tuple[float, float]:
    rows, columns = np.nonzero(mask)
    return float(rows.mean()) / mask.shape[0], float(columns.mean()) / mask.shape[1]


def test_right_lower_lobe_is_red_below_on_the_left_of_the_picture(picture: NDArray[np.uint8]) -> None:
    row, column = middle(red(picture))
    assert row > 0.6
    assert column < 0.4
    assert red(picture)[:, pictures.WIDTH // 2 :].sum() == 0
    assert green(picture)[:, pictures.WIDTH // 2 :].sum() > 10_000


@pytest.mark.parametrize(
    ("lesion", "low", "left"),
    [
        ((slice(38, 50), slice(15, 45), slice(10, 45)), False, True),
        ((slice(10, 22), slice(15, 45), slice(55, 90)), True, False),
        ((slice(38, 50), slice(15, 45), slice(55, 90)), False, False),
    ],
)
def test_other_quarters(study: Series, lesion: tuple[slice, slice, slice], low: bool, left: bool) -> None:
    row, column = middle(red(pictures.summary(*chest(lesion), SEVERE, positive(study))))
    assert (row > 0.5, column < 0.5) == (low, left)


@given(flip_rows=st.booleans(), flip_columns=st.booleans(), turned=st.booleans(), tilted=st.booleans())
def test_any_orientation_gives_the_same_rays(
    flip_rows: bool, flip_columns: bool, turned: bool, tilted: bool
) -> None:
    scanned, findings = chest(RIGHT_LOWER)
    rays = pictures.project(*stored_as(scanned, findings, flip_rows, flip_columns, turned, tilted))
    expected = pictures.project(scanned, findings)
    assert rays.spacing == expected.spacing
    for ours, theirs in (
        (rays.attenuation, expected.attenuation),
        (rays.lung, expected.lung),
        (rays.affected, expected.affected),
    ):
        assert np.allclose(ours, theirs)


def test_rays_measure_depth_and_share() -> None:
    """A ray through 120 mm of lung, half of it affected, and nothing before or behind the lungs."""
    half = (slice(20, 40), slice(15, 30), slice(10, 45))
    rays = pictures.project(*chest(half))
    lung = rays.lung > 0
    assert rays.lung.max() == 120
    assert rays.affected is not None
    assert rays.affected.max() == pytest.approx(0.5, abs=0.01)
    assert rays.affected[lung].min() == 0
    assert rays.attenuation[~lung].max() == pytest.approx(120 * 1.04)
    assert rays.attenuation[lung].min() == pytest.approx(120 * 0.15, rel=1e-4)


def test_colour_goes_from_green_over_yellow_to_red(study: Series) -> None:
    def colour(depth: int) -> tuple[int, ...]:
        lesion = (slice(10, 50), slice(15, 15 + depth), slice(10, 90))
        drawn = pictures.summary(*chest(lesion), SEVERE, positive(study))
        return tuple(view(drawn)[pictures.VIEW_HEIGHT // 2, pictures.WIDTH // 4])

    healthy, some, half, all_of_it = colour(0), colour(7), colour(15), colour(30)
    assert healthy[1] > 2 * healthy[0]
    assert some[0] > 0.9 * some[1] > 2 * some[2]
    assert half[0] > 2 * half[1]
    assert np.abs(np.subtract(half, all_of_it)).max() < 40


def test_proportions_are_true(picture: NDArray[np.uint8]) -> None:
    """Lungs 200 mm high and 240 mm wide from edge to edge."""
    rows, columns = np.nonzero(red(picture) | green(picture))
    ratio = (rows.max() - rows.min()) / (columns.max() - columns.min())
    assert ratio == pytest.approx(200 / 240, rel=0.03)


def test_without_a_lesion_mask_nothing_is_green_or_red(study: Series) -> None:
    """Unknown must not look healthy."""
    scanned, findings = chest(None)
    unknown = Severity(None, None, None, None, 4000.0, None)
    drawn = pictures.summary(scanned, replace(findings, lesion_mask=None), unknown, positive(study))
    assert not red(drawn).any()
    assert not green(drawn).any()


def test_caption_tells_answers_apart(study: Series) -> None:
    scanned, findings = chest(None)
    captions = {
        pictures.summary(scanned, findings, severity, result)[pictures.VIEW_HEIGHT :].tobytes()
        for severity, result in (
            (SEVERE, positive(study)),
            (SEVERE, positive(study, calibrated=True)),
            (SEVERE, positive(study, probability_kind="score")),
            (SEVERE, negative(study, probability=0.97)),
            (CLEAR, positive(study)),
            (replace(SEVERE, affected_left=0.42), positive(study)),
            (replace(SEVERE, affected_right=0.61), positive(study)),
            (replace(SEVERE, affected_left=None, affected_right=None), positive(study)),
        )
    }
    assert len(captions) == 8


def test_no_lungs_no_picture(study: Series) -> None:
    scanned, findings = chest(None)
    nothing = np.zeros_like(findings.lung_mask)
    with pytest.raises(ValueError, match="no lungs"):
        pictures.summary(scanned, replace(findings, lung_mask=nothing), CLEAR, negative(study))


@pytest.mark.parametrize("name", SOURCES)
def test_a_real_chest_is_drawn_head_up(name: str, tmp_path: Path) -> None:
    """Below the lungs lies the liver, which dims the rays more than the lungs do."""
    series = source_series(name, tmp_path)
    scanned = volume.read(series)
    dark = (scanned.array < -600) & (scanned.array > -990)
    dark[:, : dark.shape[1] // 5] = dark[:, -dark.shape[1] // 4 :] = False
    rays = pictures.project(scanned, Findings(0.5, "score", False, dark, np.zeros_like(dark)))
    top, bottom = series.instances[-1], series.instances[0]
    assert top.image_position_patient is not None
    assert bottom.image_position_patient is not None
    assert top.image_position_patient[2] > bottom.image_position_patient[2]
    height = len(rays.lung) // 5
    assert rays.attenuation[-height:].mean() > rays.attenuation[height:-height].mean()


@needs_dicom3tools
@pytest.mark.parametrize("name", SOURCES)
def test_secondary_capture_is_valid(name: str, picture: NDArray[np.uint8], tmp_path: Path) -> None:
    series = source_series(name, tmp_path)
    written = pictures.write_secondary_capture(picture, series, positive(series), INFO, tmp_path, now=NOW)
    source, dataset = dcmread(series.instances[0].path), dcmread(written.path)
    assert errors(written.path) == []
    assert np.array_equal(dataset.pixel_array, picture)
    assert (dataset.SOPClassUID, dataset.SOPInstanceUID) == (written.sop_class_uid, written.sop_instance_uid)
    assert (dataset.BodyPartExamined, dataset.BurnedInAnnotation) == ("CHEST", "NO")
    for keyword in ("PatientName", "PatientID", "StudyInstanceUID", "StudyDate", "AccessionNumber"):
        assert dataset[keyword].value == source[keyword].value


def test_picture_of_one_content_has_one_uid(
    study: Series, picture: NDArray[np.uint8], tmp_path: Path
) -> None:
    first, again, other = (
        pictures.write_secondary_capture(
            picture, study, positive(study, content_key=key), INFO, tmp_path, now=NOW
        ).sop_instance_uid
        for key in ("key", "key", "other")
    )
    assert first == again != other


def test_thumbnail_is_a_small_png(picture: NDArray[np.uint8], tmp_path: Path) -> None:
    pictures.write_thumbnail(picture, tmp_path / "thumbnail.png")
    data = (tmp_path / "thumbnail.png").read_bytes()
    thumbnail = Image.open(BytesIO(data))
    assert (thumbnail.format, thumbnail.size) == ("PNG", (256, 256))
    assert len(data) < 100_000
    small = np.asarray(thumbnail.convert("RGB")).astype(int)
    half = small[100:190, :128]
    assert ((half[..., 0] > 130) & (half[..., 0] > 1.8 * half[..., 1])).any()


def test_a_full_disk_can_be_tried_again(picture: NDArray[np.uint8], tmp_path: Path) -> None:
    with pytest.raises(Retryable, match="cannot write"):
        pictures.write_thumbnail(picture, tmp_path / "no such folder" / "thumbnail.png")
