"""The turning 3D view and the mesh: right side, right way up, nothing left out, readable by others."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import httpx
import numpy as np
import pytest
import trimesh
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from pydicom import dcmread
from pydicom.pixels import iter_pixels

from tests import peers
from tests.hospital import Hospital, hospital
from tests.needs import needs_dicom3tools, needs_orthanc
from tests.results import (
    INFO,
    NOW,
    SOURCES,
    blob,
    chest,
    errors,
    positive,
    small_study,
    source_series,
    stored_as,
)
from tests.test_orthanc import orthanc
from triage.dicom import mesh, phantom, view3d
from triage.dicom.view3d import FRAMES, SIZE
from triage.domain import DeliveryState, Findings, Instance, Mask, ResultKind, Series, Status, Volume
from triage.errors import Retryable
from triage.web.app import create_app

QUARTER = FRAMES // 4
LEFT_FRONT_LOW = (slice(12, 24), slice(17, 25), slice(60, 85))


def scaled(volume: Volume) -> Volume:
    """The chest of half the size, which is drawn sooner."""
    return replace(volume, spacing=tuple(mm / 2 for mm in volume.spacing))


def turn(lesion: tuple[slice, slice, slice] | None = LEFT_FRONT_LOW) -> NDArray[np.uint8]:
    scanned, findings = chest(lesion)
    return view3d.render(scaled(scanned), findings)


@pytest.fixture(scope="module")
def frames() -> NDArray[np.uint8]:
    return turn()


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Series:
    return small_study(tmp_path_factory.mktemp("study"))


def red(frames: NDArray[np.uint8]) -> Mask:
    pixels = frames.astype(int)
    return (pixels[..., 0] > 100) & (pixels[..., 0] > 1.5 * pixels[..., 1])


def middle(frame: NDArray[np.uint8]) -> tuple[float, float]:
    """Row and column of the red in one frame, as shares of its height and width."""
    rows, columns = np.nonzero(red(frame))
    return float(rows.mean()) / SIZE, float(columns.mean()) / SIZE


# --- the frames -------------------------------------------------------------------------------


def test_one_whole_turn_in_colour(frames: NDArray[np.uint8]) -> None:
    assert frames.shape == (36, 320, 320, 3)
    assert frames.dtype == np.uint8
    assert len({frame.tobytes() for frame in frames}) == FRAMES


def test_the_patients_left_is_on_the_right_from_the_front_and_on_the_left_from_behind(
    frames: NDArray[np.uint8],
) -> None:
    front, back = middle(frames[0]), middle(frames[FRAMES // 2])
    assert front[1] > 0.6
    assert back[1] == pytest.approx(1 - front[1], abs=0.04)
    assert back[0] == pytest.approx(front[0], abs=0.02)
    assert not red(frames[0])[:, : SIZE // 2].any()


def test_a_quarter_later_the_front_is_on_the_left(frames: NDArray[np.uint8]) -> None:
    """Seen from the patient's left; another half a turn later from the right."""
    assert middle(frames[QUARTER])[1] < 0.45
    assert middle(frames[3 * QUARTER])[1] > 0.55


def test_head_up(frames: NDArray[np.uint8]) -> None:
    assert all(middle(frame)[0] > 0.5 for frame in frames)
    high = turn((slice(38, 48), *LEFT_FRONT_LOW[1:]))
    assert all(middle(frame)[0] < 0.5 for frame in high)


def test_the_lungs_are_seen_and_seen_through(frames: NDArray[np.uint8]) -> None:
    """From the patient's right the other lung lies before the lesion, and the lesion is still red."""
    beside = frames[3 * QUARTER]
    assert red(beside).sum() > 500
    bright = beside[:300].max(axis=-1) > 40
    assert bright.mean() > 2 * red(beside)[:300].mean()


def test_solids_are_shaded(frames: NDArray[np.uint8]) -> None:
    shades = frames[0][red(frames[0])][:, 0]
    assert np.percentile(shades, 90) > 1.3 * np.percentile(shades, 10)


def test_a_speck_is_not_lost() -> None:
    """Four voxels, 60 mm³: seen wherever no border of a lung lies edge-on before them."""
    drawn = turn((slice(20, 22), slice(20, 22), slice(60, 61)))
    assert sum(red(frame).any() for frame in drawn) >= 0.7 * FRAMES


def test_no_lesion_no_red() -> None:
    scanned, findings = chest(None)
    clear = view3d.render(scaled(scanned), findings)
    assert not (clear[..., 0] > 1.2 * clear[..., 1].astype(int) + 10).any()
    assert np.array_equal(clear, view3d.render(scaled(scanned), replace(findings, lesion_mask=None)))


def test_no_lungs_no_view() -> None:
    scanned, findings = chest(None)
    with pytest.raises(ValueError, match="no lungs"):
        view3d.render(scanned, replace(findings, lung_mask=np.zeros_like(findings.lung_mask)))


def test_proportions_are_true(frames: NDArray[np.uint8]) -> None:
    """Lungs 100 mm high and 120 mm wide: the letters lie above them, the disclaimer below."""
    lungs = frames[0].max(axis=-1) > 40
    lungs[:, : SIZE // 8] &= np.arange(SIZE)[:, None] > 40
    lungs[:, -SIZE // 8 :] &= np.arange(SIZE)[:, None] > 40
    rows, columns = np.nonzero(lungs[:300])
    ratio = (rows.max() - rows.min()) / (columns.max() - columns.min())
    assert ratio == pytest.approx(100 / 120, rel=0.06)


@given(flip_rows=st.booleans(), flip_columns=st.booleans(), turned=st.booleans(), tilted=st.booleans())
@settings(max_examples=8)
def test_any_orientation_gives_the_same_frames(
    frames: NDArray[np.uint8], flip_rows: bool, flip_columns: bool, turned: bool, tilted: bool
) -> None:
    scanned, findings = chest(LEFT_FRONT_LOW)
    drawn = view3d.render(*stored_as(scaled(scanned), findings, flip_rows, flip_columns, turned, tilted))
    assert np.abs(drawn.astype(int) - frames).max() <= 2


@pytest.mark.parametrize(
    ("angle", "letters"),
    [
        (0, ("R", "L")),
        (10, ("R", "L")),
        (30, ("RA", "LP")),
        (60, ("AR", "PL")),
        (90, ("A", "P")),
        (180, ("L", "R")),
        (270, ("P", "A")),
        (330, ("RP", "LA")),
    ],
)
def test_letters_tell_the_sides(angle: float, letters: tuple[str, str]) -> None:
    assert view3d.sides(angle) == letters


# --- the object -------------------------------------------------------------------------------


@needs_dicom3tools
@pytest.mark.parametrize("name", SOURCES)
def test_the_object_is_valid_and_holds_every_frame(
    name: str, frames: NDArray[np.uint8], tmp_path: Path
) -> None:
    series = source_series(name, tmp_path)
    written = view3d.write(frames, series, positive(series), INFO, tmp_path, now=NOW)
    source, dataset = dcmread(series.instances[0].path), dcmread(written.path)
    assert errors(written.path) == []
    for read, drawn in zip(iter_pixels(written.path), frames, strict=True):
        assert np.array_equal(read, drawn)
    assert dataset.SOPClassUID == written.sop_class_uid == "1.2.840.10008.5.1.4.1.1.7.4"
    assert dataset.SOPInstanceUID == written.sop_instance_uid
    assert dataset.FrameIncrementPointer == 0x00181063
    assert dataset.FrameTime * FRAMES == 4500
    assert dataset.BurnedInAnnotation == "NO"
    for keyword in ("PatientName", "PatientID", "StudyInstanceUID", "StudyDate", "AccessionNumber"):
        assert dataset[keyword].value == source[keyword].value


def test_one_content_has_one_uid(study: Series, frames: NDArray[np.uint8], tmp_path: Path) -> None:
    first, again, other = (
        view3d.write(
            frames, study, positive(study, content_key=key), INFO, tmp_path, now=NOW
        ).sop_instance_uid
        for key in ("key", "key", "other")
    )
    assert first == again != other


# --- the mesh ---------------------------------------------------------------------------------


def body(surface: mesh.Surface) -> trimesh.Trimesh:
    return trimesh.Trimesh(surface.points, surface.triangles, process=False)


def millilitres(mask: Mask, series: Series) -> float:
    return float(mask.sum() * np.prod(series.spacing) / 1000)


def corners(mask: Mask, series: Series) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Least and greatest patient coordinates of the mask's voxels, from the headers of their slices."""
    row, column = np.array(series.orientation[:3]), np.array(series.orientation[3:])
    places = []
    for k, i, j in np.argwhere(mask):
        first = np.array(series.instances[k].image_position_patient)
        places.append(first + i * series.spacing[1] * column + j * series.spacing[2] * row)
    return np.min(places, axis=0), np.max(places, axis=0)


def judged(series: Series) -> Findings:
    """A box of lung, a part of it diseased."""
    lung = np.zeros_like(blob(series))
    lung[2:20, 12:50, 8:30] = True
    lesion = np.zeros_like(lung)
    lesion[4:9, 30:45, 10:24] = True
    return Findings(0.9, "classifier", False, lung, lesion)


@pytest.fixture(scope="module")
def lungs(study: Series) -> Findings:
    return judged(study)


def test_surfaces_hold_what_the_masks_hold(study: Series, lungs: Findings) -> None:
    found = mesh.surfaces(study, lungs)
    assert list(found) == ["infection", "lungs"]
    for name, mask in (("infection", lungs.lesion_mask), ("lungs", lungs.lung_mask)):
        solid = body(found[name])
        assert solid.is_watertight
        assert solid.volume / 1000 == pytest.approx(millilitres(mask, study), rel=0.05)


def test_surfaces_lie_where_the_slices_say(study: Series, lungs: Findings) -> None:
    """In LPS mm: half a voxel around the voxels' middles, less what smoothing rounds off."""
    half = np.array(study.spacing)[[2, 1, 0]] / 2
    for name, mask in (("infection", lungs.lesion_mask), ("lungs", lungs.lung_mask)):
        least, greatest = corners(mask, study)
        bounds = body(mesh.surfaces(study, lungs)[name]).bounds
        np.testing.assert_allclose(bounds, [least - half, greatest + half], atol=1.5)


def test_a_scan_stored_turned_about_gives_the_same_surfaces(study: Series, lungs: Findings) -> None:
    """Rows and columns exchanged: the normal points to the feet, so the slices come in that order."""
    stored = replace(
        study,
        instances=study.instances[::-1],
        orientation=(*study.orientation[3:], *study.orientation[:3]),
        spacing=(study.spacing[0], study.spacing[2], study.spacing[1]),
    )
    turned = replace(
        lungs,
        lung_mask=lungs.lung_mask[::-1].swapaxes(1, 2),
        lesion_mask=lungs.lesion_mask[::-1].swapaxes(1, 2),
    )
    for name, surface in mesh.surfaces(stored, turned).items():
        here, there = body(surface), body(mesh.surfaces(study, lungs)[name])
        np.testing.assert_allclose(here.bounds, there.bounds, atol=0.01)
        np.testing.assert_allclose(here.center_mass, there.center_mass, atol=0.1)
        assert here.volume == pytest.approx(there.volume, rel=0.01)


def test_slices_of_a_tilted_gantry_lie_askew(study: Series, lungs: Findings) -> None:
    """Each slice 1 mm further back than the one below it."""
    leaning = tuple(
        replace(instance, image_position_patient=(x, y + k, z))
        for k, instance in enumerate(study.instances)
        for x, y, z in [instance.image_position_patient]
    )
    straight, askew = (
        body(mesh.surfaces(series, lungs)["lungs"]) for series in (study, replace(study, instances=leaning))
    )
    assert askew.volume == pytest.approx(straight.volume, rel=0.01)
    assert askew.center_mass - straight.center_mass == pytest.approx([0, 10.5, 0], abs=0.2)


@pytest.mark.parametrize("lesion", ["none", "unknown"])
def test_without_lesion_there_are_only_lungs(study: Series, lungs: Findings, lesion: str) -> None:
    mask = np.zeros_like(lungs.lung_mask) if lesion == "none" else None
    assert list(mesh.surfaces(study, replace(lungs, lesion_mask=mask))) == ["lungs"]


@given(st.tuples(st.integers(0, 23), st.integers(0, 63), st.integers(0, 63)), st.integers(1, 3))
@settings(max_examples=20)
def test_a_speck_has_a_surface(
    study: Series, lungs: Findings, place: tuple[int, int, int], size: int
) -> None:
    mask = np.zeros_like(lungs.lung_mask)
    mask[tuple(slice(at, at + size) for at in place)] = True
    solid = body(mesh.surfaces(study, replace(lungs, lesion_mask=mask))["infection"])
    least, greatest = corners(mask, study)
    assert solid.is_watertight
    assert solid.volume > 0
    assert np.all(solid.center_mass > least - 6)
    assert np.all(solid.center_mass < greatest + 6)


def test_the_file_names_and_colours_both(study: Series, lungs: Findings, tmp_path: Path) -> None:
    scene = trimesh.load_scene(mesh.write(study, lungs, tmp_path))
    assert set(scene.geometry) == {"lungs", "infection"}
    colours = {name: tuple(g.visual.material.baseColorFactor) for name, g in scene.geometry.items()}
    assert colours == {"infection": (226, 44, 44, 255), "lungs": (168, 206, 236, 64)}
    for name, surface in mesh.surfaces(study, lungs).items():
        np.testing.assert_allclose(scene.geometry[name].vertices, surface.points, atol=1e-3)
    x, y, z = np.mean(scene.bounds, axis=0)
    left, back, head = np.mean(corners(lungs.lung_mask, study), axis=0) / 1000
    assert (x, y, z) == pytest.approx((left, head, -back), abs=0.002)


def test_the_file_of_ragged_masks_stays_below_two_megabytes(study: Series, tmp_path: Path) -> None:
    ragged = np.random.default_rng(1).random(blob(study).shape) < 0.5
    path = mesh.write(study, Findings(0.9, "score", False, ragged, ragged), tmp_path)
    assert path.stat().st_size < 2_000_000


def test_a_full_disk_can_be_tried_again(study: Series, lungs: Findings, tmp_path: Path) -> None:
    with pytest.raises(Retryable, match="cannot write"):
        mesh.write(study, lungs, tmp_path / "no such folder")


# --- its way ----------------------------------------------------------------------------------


def judge_a_phantom(here: Hospital, folder: Path) -> str:
    phantom.write_study(folder, seed=3, slices=30, rows=64, slice_spacing=8.0)
    peers.scan(folder, here.config)
    here.work()
    return str(dcmread(next(folder.iterdir())).StudyInstanceUID)


def get(here: Hospital, address: str, **web: object) -> httpx.Response:
    changed = here.config.web.model_copy(update=web)
    app = create_app(here.db, here.config.model_copy(update={"web": changed}), lambda: here.now)
    client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1:8080")
    return asyncio.run(client.get(address))


def test_switched_on_it_is_delivered_and_the_page_has_the_mesh(tmp_path: Path) -> None:
    received: list[Instance]
    with (
        peers.pacs(tmp_path / "pacs") as (port, received),
        hospital(tmp_path / "daemon", port, results={"view_3d": True}) as here,
    ):
        uid = judge_a_phantom(here, tmp_path / "study")
        entry = here.entry(uid)
        assert entry.result is not None
        files = entry.result.files
        assert entry.deliveries == {DeliveryState.SENT: 5}
        assert entry.result.seconds["view_3d"] > 0
        (view,) = (i for i in received if i.sop_class_uid == "1.2.840.10008.5.1.4.1.1.7.4")
        assert view.number_of_frames == FRAMES
        assert dcmread(view.path).PixelData == dcmread(files[ResultKind.VIEW_3D]).PixelData
        served = get(here, f"/meshes/{uid}.glb")
        assert served.headers["content-type"] == "model/gltf-binary"
        assert served.content == files[ResultKind.MESH].read_bytes()
        assert set(trimesh.load_scene(BytesIO(served.content), "glb").geometry) == {"lungs", "infection"}
        assert get(here, f"/meshes/{uid}.glb", token="a-token-of-the-room").status_code == 401
        files[ResultKind.MESH].unlink()
        assert get(here, f"/meshes/{uid}.glb").status_code == 404
        assert get(here, "/meshes/1.2.3.glb").status_code == 404


@pytest.mark.parametrize("part", ["view3d.render", "mesh.surfaces"])
def test_an_answer_goes_without_what_cannot_be_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, part: str
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(f"triage.dicom.{part}", fail)
    with hospital(tmp_path / "daemon", results={"view_3d": True}) as here:
        uid = judge_a_phantom(here, tmp_path / "study")
        result = here.entry(uid).result
        assert result is not None
        assert result.status is Status.POSITIVE
        assert not result.files.keys() & {ResultKind.VIEW_3D, ResultKind.MESH}
        (folder,) = {path.parent for path in result.files.values()}
        assert not [*folder.glob("view_3d*"), *folder.glob("mesh*")]
        assert f"study {uid} goes without a 3D view" in caplog.text


def test_a_full_disk_is_tried_again_with_its_3d_view(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise Retryable("cannot write mesh.glb: No space left on device")

    with hospital(tmp_path / "daemon", results={"view_3d": True}) as here:
        with monkeypatch.context() as full:
            full.setattr("triage.dicom.mesh.write_durably", fail)
            uid = judge_a_phantom(here, tmp_path / "study")
        assert here.entry(uid).result is None
        assert not [*(here.config.storage.spool / uid).glob("results/*")]
        here.pass_time(3600)
        here.work()
        result = here.entry(uid).result
        assert result is not None
        assert {ResultKind.VIEW_3D, ResultKind.MESH} <= result.files.keys()


def test_switched_off_there_is_none(tmp_path: Path) -> None:
    with hospital(tmp_path / "daemon") as here:
        uid = judge_a_phantom(here, tmp_path / "study")
        result = here.entry(uid).result
        assert result is not None
        assert not result.files.keys() & {ResultKind.VIEW_3D, ResultKind.MESH}
        assert "view_3d" not in result.seconds
        (folder,) = {path.parent for path in result.files.values()}
        assert not [*folder.glob("view_3d*"), *folder.glob("mesh*")]
        assert get(here, f"/meshes/{uid}.glb").status_code == 404


@needs_orthanc
def test_orthanc_keeps_it_and_shows_each_frame(tmp_path: Path) -> None:
    port = peers.free_port()
    with (
        orthanc(tmp_path / "orthanc", peers.free_port(), port) as pacs,
        hospital(tmp_path / "daemon", port, results={"view_3d": True}) as here,
    ):
        uid = judge_a_phantom(here, tmp_path / "study")
        entry = here.entry(uid)
        assert entry.deliveries == {DeliveryState.SENT: 5}
        assert entry.result is not None
        drawn = dcmread(entry.result.files[ResultKind.VIEW_3D]).pixel_array
        (kept,) = (i for i in pacs.get("/instances") if shows_frames(pacs, i))
        for n in (0, 17, FRAMES - 1):
            shown = Image.open(BytesIO(pacs.read(f"/instances/{kept}/frames/{n}/preview")))
            assert np.array_equal(np.asarray(shown), drawn[n])


def shows_frames(pacs: object, instance: str) -> bool:
    return len(pacs.get(f"/instances/{instance}/frames")) == FRAMES
