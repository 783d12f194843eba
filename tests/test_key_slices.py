"""The key slices: those with most lesion, turned as they are read, and what was found drawn where it is."""

from __future__ import annotations

from dataclasses import replace
from io import BytesIO
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from pydicom import dcmread

from tests import peers
from tests.boxes import Boxes
from tests.hospital import hospital
from tests.needs import needs_dicom3tools
from tests.results import INFO, NOW, SOURCES, chest, errors, positive, source_series, stored_as
from tests.test_view3d import get, judge_a_phantom
from triage.dicom import key_slices, pictures, seg
from triage.dicom.key_slices import (
    APART_MM,
    GAP,
    LEAST_SHARE,
    LEGEND_HEIGHT,
    MARGIN_MM,
    MOST,
    PANEL,
    TITLE_HEIGHT,
)
from triage.domain import DeliveryState, DetectedLesion, Findings, Instance, Mask, ResultKind, Series, Volume

RIGHT_BACK = (slice(20, 21), slice(33, 43), slice(12, 27))
"""In the patient's right lung, behind: of slice 20, ten rows of 4 mm and 15 columns of 3 mm."""
GLASS, SOLID, RED = (
    kind.colour for kind in (seg.CLASSES["ground_glass"], seg.CLASSES["consolidation"], seg.LESIONS)
)


def series_of(volume: Volume, first_number: int | None = None) -> Series:
    instances = tuple(
        Instance(
            study_instance_uid="1.2",
            series_instance_uid="1.2.3",
            sop_instance_uid=f"1.2.3.{k}",
            sop_class_uid="1.2.840.10008.5.1.4.1.1.2",
            transfer_syntax_uid="1.2.840.10008.1.2.1",
            path=Path("none"),
            digest="",
            instance_number=None if first_number is None else first_number + k,
        )
        for k in range(len(volume.array))
    )
    return Series(instances, volume.spacing, volume.orientation)


def drawn(volume: Volume, findings: Findings, first_number: int | None = None) -> NDArray[np.uint8]:
    shown = key_slices.choose(volume, findings)
    return key_slices.draw(series_of(volume, first_number), volume, findings, shown)


def told_apart(findings: Findings, volume: Volume) -> Findings:
    """The dense part of the lesions is consolidation, and each slice's lesion is detected."""
    lesion = findings.lesion_mask
    assert lesion is not None
    dense = lesion & (volume.array > -100)
    detected = []
    for k in map(int, np.flatnonzero(lesion.any(axis=(1, 2)))):
        rows, columns = np.nonzero(lesion[k])
        box = (int(rows.min()), int(columns.min()), int(rows.max()) + 1, int(columns.max()) + 1)
        detected.append(DetectedLesion(k, box, 0.8, lesion[k, box[0] : box[2], box[1] : box[3]]))
    classes = {"ground_glass": lesion & ~dense, "consolidation": dense}
    return replace(findings, detected=tuple(detected), lesion_classes=classes)


def dense_behind(volume: Volume, findings: Findings) -> Volume:
    array = volume.array.copy()
    array[20, 38:43, 12:27] = 0
    return replace(volume, array=array)


def coloured(picture: NDArray[np.uint8], colour: tuple[int, int, int]) -> Mask:
    """Where the picture, legend left out, has the colour as it is."""
    return np.abs(picture[:-LEGEND_HEIGHT].astype(int) - colour).max(axis=-1) < 40


def extent(where: Mask) -> tuple[int, int, int, int]:
    """Top, left, bottom and right in pixels below the title."""
    rows, columns = np.nonzero(where)
    return rows.min() - TITLE_HEIGHT, columns.min(), rows.max() - TITLE_HEIGHT, columns.max()


# --- which slices -----------------------------------------------------------------------------


@given(
    areas=st.lists(st.sampled_from([0, 0, 0, 1, 2, 5, 30, 31, 60]), min_size=1, max_size=60),
    spacing=st.sampled_from([0.6, 1.25, 5.0, 10.0, 30.0]),
    from_feet=st.booleans(),
)
def test_they_are_those_with_most_lesion_apart_from_each_other(
    areas: list[int], spacing: float, from_feet: bool
) -> None:
    lesion = (np.arange(64) < np.array(areas)[:, None]).reshape(-1, 8, 8)
    orientation = (1.0, 0.0, 0.0, 0.0, 1.0 if from_feet else -1.0, 0.0)
    volume = Volume(np.zeros(lesion.shape, np.int16), (spacing, 1.0, 1.0), orientation)
    chosen = key_slices.choose(volume, Findings(0.5, "score", False, np.ones_like(lesion), lesion))
    assert chosen == sorted(chosen, reverse=from_feet)  # from head to feet
    assert len(chosen) <= MOST
    assert all(abs(a - b) * spacing >= APART_MM for a, b in combinations(chosen, 2))
    least = max(1, LEAST_SHARE * max(areas))
    assert all(areas[k] >= least for k in chosen)
    for k in {k for k, area in enumerate(areas) if area >= least} - set(chosen):
        before = [other for other in chosen if areas[other] >= areas[k]]
        assert len(before) == MOST or any(abs(k - other) * spacing < APART_MM for other in before)


def test_without_lesion_or_without_a_mask_there_are_none() -> None:
    volume, findings = chest(None)
    assert key_slices.choose(volume, findings) == []
    assert key_slices.choose(volume, replace(findings, lesion_mask=None)) == []


# --- what is drawn ----------------------------------------------------------------------------


def test_a_lesion_is_outlined_where_it_is() -> None:
    """Right side on the left of the picture, back below, true proportions."""
    picture = drawn(*chest(RIGHT_BACK))
    mm = PANEL[0] / (80 * 3.0 + 2 * MARGIN_MM)  # the lungs are 80 columns wide, and rows are 4 mm
    expected = [
        (MARGIN_MM + 18 * 4) * mm,
        (MARGIN_MM + 2 * 3) * mm,
        (MARGIN_MM + 28 * 4) * mm,
        (MARGIN_MM + 17 * 3) * mm,
    ]
    outline = coloured(picture, RED)
    assert extent(outline) == pytest.approx(expected, abs=2)
    inner = picture[TITLE_HEIGHT + 190 : TITLE_HEIGHT + 265, 45:130].astype(int)
    assert np.ptp(inner, axis=-1).max() == 0  # the lesion itself stays as the scanner saw it
    assert outline.mean() < 0.02


@given(flip_rows=st.booleans(), flip_columns=st.booleans(), turned=st.booleans(), tilted=st.booleans())
@settings(max_examples=8)
def test_any_orientation_gives_the_same_picture(
    flip_rows: bool, flip_columns: bool, turned: bool, tilted: bool
) -> None:
    scanned, findings = chest(RIGHT_BACK)
    scanned = dense_behind(scanned, findings)
    stored, found = stored_as(scanned, findings, flip_rows, flip_columns, turned, tilted)
    picture = drawn(stored, told_apart(found, stored))
    expected = drawn(scanned, told_apart(findings, scanned))
    assert np.array_equal(picture[TITLE_HEIGHT:], expected[TITLE_HEIGHT:])


def test_kinds_of_lesion_have_colours_of_their_own() -> None:
    scanned, findings = chest(RIGHT_BACK)
    scanned = dense_behind(scanned, findings)
    told = replace(told_apart(findings, scanned), detected=())
    picture = drawn(scanned, told)
    glass, solid = extent(coloured(picture, GLASS)), extent(coloured(picture, SOLID))
    assert glass[2] == pytest.approx(solid[0], abs=4)  # consolidation lies behind the ground glass
    assert glass[1] == pytest.approx(solid[1], abs=2)
    assert not coloured(picture, RED).any()
    only = {**told.lesion_classes, "consolidation": np.zeros_like(findings.lung_mask)}
    assert not coloured(drawn(scanned, replace(told, lesion_classes=only)), SOLID).any()


def test_the_legend_names_what_is_drawn() -> None:
    scanned, findings = chest(RIGHT_BACK)
    scanned = dense_behind(scanned, findings)
    told = told_apart(findings, scanned)
    legends = {
        drawn(scanned, shown)[-LEGEND_HEIGHT:].tobytes()
        for shown in (findings, told, replace(told, detected=()), replace(told, lesion_classes={}))
    }
    assert len(legends) == 4


def test_detected_lesions_are_boxed_in_their_own_slice_with_their_score() -> None:
    scanned, findings = chest(RIGHT_BACK)
    box = DetectedLesion(20, (20, 60, 30, 80), 0.91, np.ones((10, 20), bool))
    plain = drawn(scanned, findings)[:-LEGEND_HEIGHT].astype(int)
    boxed = drawn(scanned, replace(findings, detected=(box,)))[:-LEGEND_HEIGHT].astype(int)
    other = drawn(scanned, replace(findings, detected=(replace(box, score=0.52),)))[:-LEGEND_HEIGHT]
    elsewhere = drawn(scanned, replace(findings, detected=(replace(box, slice_index=21),)))
    top, left, bottom, right = extent((boxed != plain).any(axis=-1))
    mm = PANEL[0] / (80 * 3.0 + 2 * MARGIN_MM)
    assert left == pytest.approx((MARGIN_MM + 50 * 3) * mm, abs=4)
    assert right == pytest.approx((MARGIN_MM + 70 * 3) * mm, abs=2)
    assert bottom == pytest.approx((MARGIN_MM + 15 * 4) * mm, abs=2)
    assert top < (MARGIN_MM + 5 * 4) * mm - 8  # the score stands above
    assert extent((boxed != other).any(axis=-1))[2] < (MARGIN_MM + 5 * 4) * mm
    assert np.array_equal(elsewhere[:-LEGEND_HEIGHT], plain)


def test_detected_lesions_that_touch_are_parted() -> None:
    scanned, findings = chest(RIGHT_BACK)
    box = (33, 12, 43, 27)
    whole = DetectedLesion(20, box, 0.9, np.ones((10, 15), bool))
    upper, lower = (replace(whole, mask=np.arange(10)[:, None] // 5 == np.full(15, half)) for half in (0, 1))
    one = drawn(scanned, replace(findings, detected=(whole, whole)))[:-LEGEND_HEIGHT].astype(int)
    two = drawn(scanned, replace(findings, detected=(upper, lower)))[:-LEGEND_HEIGHT].astype(int)
    mm = PANEL[0] / (80 * 3.0 + 2 * MARGIN_MM)
    border, left, right = ((MARGIN_MM + at) * mm for at in (23 * 4, 2 * 3, 17 * 3))
    top, first, bottom, last = extent((one != two).any(axis=-1))
    assert (top, bottom) == pytest.approx((border, border), abs=6)
    assert (first, last) == pytest.approx((left, right), abs=4)


@given(st.integers(15, 44), st.integers(10, 44))
@settings(max_examples=10)
def test_a_single_voxel_is_outlined(row: int, column: int) -> None:
    picture = drawn(*chest((slice(30, 31), slice(row, row + 1), slice(column, column + 1))))
    assert coloured(picture, RED).sum() > 10


@pytest.mark.parametrize(("slices", "columns", "rows"), [(1, 1, 1), (2, 2, 1), (3, 2, 2), (4, 2, 2)])
def test_panels_stand_two_in_a_row_from_head_to_feet(slices: int, columns: int, rows: int) -> None:
    """Every second slice with a lesion, from the head, has it in the left lung instead of the right."""
    volume, findings = chest(None)
    lesion = np.zeros_like(findings.lung_mask)
    for number in range(slices):
        lesion[45 - 6 * number, 20:40, (60 if number % 2 else 15) :][:, :20] = True
    picture = drawn(volume, replace(findings, lesion_mask=lesion))
    height, width = picture.shape[0] - LEGEND_HEIGHT, picture.shape[1]
    assert width == columns * (PANEL[0] + GAP) - GAP
    assert height % rows == 0
    for number in range(slices):
        y, x = number // columns * height // rows, number % columns * (PANEL[0] + GAP)
        panel = coloured(picture, RED)[y : y + height // rows, x : x + PANEL[0]]
        halves = [half.any() for half in np.array_split(panel, 2, axis=1)]
        assert halves == [number % 2 == 0, number % 2 == 1]


def test_titles_tell_slices_and_their_own_numbers_apart() -> None:
    titles = {
        drawn(*chest(lesion), first_number)[:TITLE_HEIGHT].tobytes()
        for lesion in (RIGHT_BACK, (slice(30, 31), *RIGHT_BACK[1:]), (*RIGHT_BACK[:2], slice(12, 40)))
        for first_number in (None, 1, 100)
    }
    assert len(titles) == 9


def test_without_numbers_of_their_own_slices_are_counted_from_the_head() -> None:
    """As viewers order them, whichever way the series is stored."""
    scanned, findings = chest(RIGHT_BACK)
    stored = stored_as(scanned, findings, True, False, False, False)
    numbered = drawn(scanned, findings, first_number=1)[:TITLE_HEIGHT]
    counted = drawn(scanned, findings)[:TITLE_HEIGHT]
    assert np.array_equal(counted, drawn(*stored)[:TITLE_HEIGHT])
    assert not np.array_equal(counted, numbered)
    series = series_of(scanned)
    alike = replace(series, instances=tuple(replace(i, instance_number=1) for i in series.instances))
    assert np.array_equal(key_slices.draw(alike, scanned, findings, [20])[:TITLE_HEIGHT], counted)


def test_a_title_tells_what_share_of_the_lung_is_lesion() -> None:
    scanned, findings = chest(RIGHT_BACK)
    assert findings.lesion_mask is not None
    beyond = findings.lesion_mask.copy()
    beyond[20, :10] = True  # in front of the lungs
    other = drawn(scanned, replace(findings, lesion_mask=beyond))
    assert np.array_equal(other[:TITLE_HEIGHT], drawn(scanned, findings)[:TITLE_HEIGHT])
    assert not np.array_equal(other, drawn(scanned, findings))


# --- its way ----------------------------------------------------------------------------------


@needs_dicom3tools
@pytest.mark.parametrize("name", SOURCES)
def test_the_object_is_valid_and_names_its_slices(name: str, tmp_path: Path) -> None:
    series, picture = source_series(name, tmp_path), drawn(*chest(RIGHT_BACK))
    result = positive(series)
    written = key_slices.write(picture, series, [5, 3], result, INFO, tmp_path, now=NOW)
    dataset = dcmread(written.path)
    assert errors(written.path) == []
    assert np.array_equal(dataset.pixel_array, picture)
    assert (dataset.PatientOrientation, dataset.BurnedInAnnotation) == (["L", "P"], "NO")
    assert [item.ReferencedSOPInstanceUID for item in dataset.SourceImageSequence] == [
        series.instances[k].sop_instance_uid for k in (5, 3)
    ]
    summary = pictures.write_secondary_capture(picture, series, result, INFO, tmp_path, now=NOW)
    assert dcmread(summary.path).SeriesInstanceUID != dataset.SeriesInstanceUID
    assert summary.sop_instance_uid != written.sop_instance_uid


def test_it_is_delivered_and_the_page_shows_the_same(tmp_path: Path) -> None:
    with (
        peers.pacs(tmp_path / "pacs") as (port, received),
        hospital(tmp_path / "daemon", port, results={"picture": False}) as here,
    ):
        here.model = Boxes(tells_apart=True)
        uid = judge_a_phantom(here, tmp_path / "study")
        entry = here.entry(uid)
        assert entry.result is not None
        assert entry.deliveries == {DeliveryState.SENT: 3}
        (capture,) = (i for i in received if i.sop_class_uid == "1.2.840.10008.5.1.4.1.1.7")
        pixels = dcmread(capture.path).pixel_array
        for kind, colour in (("ground_glass", GLASS), ("consolidation", SOLID)):
            assert coloured(pixels, colour).any(), kind
        served = get(here, f"/pictures/{uid}/key_slices.png")
        assert np.array_equal(np.asarray(Image.open(BytesIO(served.content))), pixels)
        assert f'src="/pictures/{uid}/key_slices.png?revision=1"' in get(here, f"/studies/{uid}").text
        assert "Key slices" in get(here, f"/studies/{uid}").text


def test_an_answer_goes_without_key_slices_that_cannot_be_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise ValueError

    monkeypatch.setattr("triage.dicom.key_slices.draw", fail)
    with hospital(tmp_path / "daemon") as here:
        uid = judge_a_phantom(here, tmp_path / "study")
        result = here.entry(uid).result
        assert result is not None
        assert {ResultKind.LESION_SEG, ResultKind.SR, ResultKind.PICTURE} <= result.files.keys()
        assert not result.files.keys() & {ResultKind.KEY_SLICES, ResultKind.KEY_SLICES_PNG}
        assert f"study {uid} goes without key slices" in caplog.text


def test_switched_off_there_is_none(tmp_path: Path) -> None:
    with hospital(tmp_path / "daemon", results={"key_slices": False}) as here:
        uid = judge_a_phantom(here, tmp_path / "study")
        result = here.entry(uid).result
        assert result is not None
        assert not result.files.keys() & {ResultKind.KEY_SLICES, ResultKind.KEY_SLICES_PNG}
        assert "key_slices" not in result.seconds
        assert get(here, f"/pictures/{uid}/key_slices.png").status_code == 404
