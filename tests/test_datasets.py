"""Every data set that training reads, as a tiny made-up copy in its documented layout, and the real ones.

NIfTI and MetaImage files are written here byte by byte: what reads them is not asked how they are written.
"""

import gzip
import itertools
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from PIL import Image

from tests.needs import DATA, needs_data
from triage.dicom import phantom
from triage.domain import Grade, Mask
from triage.errors import ConfigError
from triage.models.preprocessing import Layout, prepare
from triage.training.cases import Case, Diagnosis
from triage.training.datasets import DATASETS, cases

Array = NDArray[Any]

SHAPE = (6, 8, 10)
SPACING = (5.0, 3.0, 2.0)
CHEST: NDArray[np.int16] = (np.arange(np.prod(SHAPE)).reshape(SHAPE) * 2 - 1000).astype(np.int16)
"""Every voxel differs, so that no turn or flip goes unseen: (head, back, left), lowest slice first."""
RIGHT, LEFT = np.zeros(SHAPE, bool), np.zeros(SHAPE, bool)
RIGHT[1:4, 2:6, 1:4] = True
LEFT[2:5, 2:6, 6:9] = True
LUNG = RIGHT | LEFT
SIDES = (LEFT + 2 * RIGHT).astype(np.uint8)
LESION = np.zeros(SHAPE, bool)
LESION[2, 3:5, 2] = True
OTHER_LESION = np.roll(LESION, 1, axis=2)
GREY: NDArray[np.uint8] = (np.arange(12 * 16).reshape(12, 16)).astype(np.uint8)
SPOT = np.zeros((12, 16), bool)
SPOT[2:5, 9:15] = True

STORED = [
    (order, flips)
    for order in itertools.permutations((0, 1, 2))
    for flips in itertools.product((False, True), repeat=3)
]
"""All 48 ways in which a file may order and reverse its axes."""
TYPES = {"uint8": 2, "int16": 4, "int32": 8, "float32": 16, "float64": 64, "uint16": 512}
"""Codes of NIfTI-1 for the types of voxels."""


def nifti(
    path: Path,
    array: Array,
    order: tuple[int, ...] = (0, 1, 2),
    flips: tuple[bool, ...] = (False, False, False),
    spacing: tuple[float, float, float] = SPACING,
) -> Path:
    """Write (head, back, left) as NIfTI-1 with an sform: axes left, back, head, flipped, then reordered."""
    values = array.astype(np.uint8) if array.dtype == bool else array
    voxels = values.transpose(2, 1, 0)
    affine = np.diag([-spacing[2], -spacing[1], spacing[0], 1.0])  # RAS: right and front are positive
    for axis in np.flatnonzero(flips):
        voxels = np.flip(voxels, axis)
        affine[:3, 3] += affine[:3, axis] * (voxels.shape[axis] - 1)
        affine[:3, axis] *= -1
    voxels, affine = voxels.transpose(order), affine[:, [*order, 3]]
    header = bytearray(352)
    struct.pack_into("<i", header, 0, 348)
    struct.pack_into("<8h", header, 40, 3, *voxels.shape, 1, 1, 1, 1)
    struct.pack_into("<2h", header, 70, TYPES[str(voxels.dtype)], 8 * voxels.itemsize)
    struct.pack_into("<8f", header, 76, 1, *np.linalg.norm(affine[:3, :3], axis=0), 0, 0, 0, 0)
    struct.pack_into("<3f", header, 108, 352, 1, 0)
    struct.pack_into("<2h", header, 252, 0, 1)
    struct.pack_into("<12f", header, 280, *affine[:3].ravel())
    header[344:348] = b"n+1\0"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(bytes(header) + voxels.tobytes(order="F"), mtime=0))
    return path


def metaimage(path: Path, array: Array, *, compressed: bool = False, flipped: bool = False) -> Path:
    """Write (head, back, left) as .mhd with .raw or .zraw; ``flipped`` stores the head first."""
    values = array[::-1] if flipped else array
    raw = path.with_suffix(".zraw" if compressed else ".raw")
    data = values.tobytes()
    z, y, x = array.shape
    path.parent.mkdir(parents=True, exist_ok=True)
    raw.write_bytes(zlib.compress(data) if compressed else data)
    path.write_text(
        "ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\n"
        + (f"CompressedData = True\nCompressedDataSize = {raw.stat().st_size}\n" if compressed else "")
        + f"TransformMatrix = 1 0 0 0 1 0 0 0 {-1 if flipped else 1}\nOffset = 0 0 0\n"
        + f"ElementSpacing = {SPACING[2]} {SPACING[1]} {SPACING[0]}\nDimSize = {x} {y} {z}\n"
        + f"ElementType = {'MET_SHORT' if array.dtype == np.int16 else 'MET_UCHAR'}\n"
        + f"ElementDataFile = {raw.name}\n"
    )
    return path


def picture(path: Path, values: Array, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values.astype(np.uint8) if values.dtype == bool else values).save(path, **options)
    return path


def palette(path: Path, values: Array) -> Path:
    """A label picture whose colours have nothing to do with its numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values.astype(np.uint8), "P")
    image.putpalette([0, 0, 0, 200, 10, 10, 10, 200, 10, 10, 10, 200])
    image.save(path)
    return path


# One made-up copy of every set, in the layout that its authors publish.


def medseg9(root: Path) -> Path:
    marks = {"lung": LUNG.astype(np.uint8), "lesion": (LESION * 2).astype(np.uint8)}
    grey = np.broadcast_to(np.arange(10, dtype=np.uint8) * 25, SHAPE)
    for number, patient in ((1, "p1"), (2, "p2"), (3, "p2")):
        limits = {"hu_lo": np.float32(-1400), "hu_hi": np.float32(200)}
        path = root / f"medseg9_{number}_{patient}.npz"
        np.savez(path, gray=grey, patient=patient, allow_pickle=False, **limits, **marks)
    return root


def semiseg(root: Path) -> Path:
    for name in ("10", "2"):
        picture(root / "Imgs" / f"{name}.jpg", GREY, quality=100)
        picture(root / "GT" / f"{name}.png", SPOT * np.uint8(255))
        picture(root / "GT-multi" / f"{name}.png", SPOT * np.uint8(38))
    return root


def sarscov2(root: Path) -> Path:
    picture(root / "COVID" / "Covid (1).png", GREY)
    picture(root / "COVID" / "Covid (2).png", GREY // 2)
    picture(root / "non-COVID" / "Non-Covid (1).png", GREY // 3)
    return root


def mosmed(root: Path) -> Path:
    for number, grade in enumerate(Grade):
        nifti(root / "studies" / grade / f"study_{number:04}.nii.gz", CHEST)
    nifti(root / "masks" / "study_0001_mask.nii.gz", LESION)
    return root


def covid_benchmark(root: Path) -> Path:
    for group in ("covid", "bacterial_pneumonia", "nodules", "normal"):
        nifti(root / group / "images" / f"{group[:3]}7.nii.gz", CHEST)
    nifti(root / "covid" / "masks" / "cov7" / "rater_1.nii.gz", LESION)
    nifti(root / "covid" / "masks" / "cov7" / "rater_2.nii.gz", OTHER_LESION)
    return root


RADIOPAEDIA = "radiopaedia_10_85902_1.nii.gz"
RADIOPAEDIA_GREY = np.broadcast_to(np.arange(10, dtype=np.uint8) * 25, SHAPE)


def medseg20(root: Path) -> Path:
    """Headers of the Radiopaedia images turn them away from their masks, as in the published files."""
    cases = {"coronacases_001": CHEST, "radiopaedia_10_85902_1": RADIOPAEDIA_GREY,
             "radiopaedia_10_85902_3": RADIOPAEDIA_GREY, "radiopaedia_29_86490_1": RADIOPAEDIA_GREY,
             "radiopaedia_29_86491_1": RADIOPAEDIA_GREY}  # fmt: skip
    for name, array in cases.items():
        nifti(root / "Lung_Mask" / f"{name}.nii.gz", SIDES)
        nifti(root / "Infection_Mask" / f"{name}.nii.gz", LESION)
        path = root / "COVID-19-CT-Seg_20cases" / f"{name}.nii.gz"
        if array is CHEST:
            nifti(path, array)
        else:
            nifti(path, array[:, ::-1], flips=(False, True, False))
    return root


def medseg_nifti(root: Path) -> Path:
    for number in range(1, 10):
        nifti(root / "rp_im" / f"{number}.nii.gz", CHEST.astype(np.float32) + 0.25)
        lungs = SIDES.copy()
        lungs[0, 0, 0] = 3  # artefact
        nifti(root / "rp_lung_msk" / f"{number}.nii.gz", lungs)
        nifti(root / "rp_msk" / f"{number}.nii.gz", LESION * np.uint8(2))
    return root


STUDY = {"slices": 16, "rows": 32, "slice_spacing": 5.0}


def study_lungs(seed: int) -> Mask:
    lungs: Mask = phantom.draw(phantom.Phantom(seed=seed, **STUDY)) < -600
    return lungs


def nsclc(root: Path) -> Path:
    """Patient 2 lies turned by 180° in its files, 3 has a hole between slices, 4 no mask."""
    for number in range(1, 5):
        name = f"LUNG1-{number:03}"
        folder = root / "NSCLC-Radiomics" / name / "01-01-2014-StudyID-NA-1" / "1.000000-NA-2"
        missing = (5, 6) if number == 3 else ()
        for path in phantom.write_study(folder, seed=number, missing=missing, **STUDY):
            path.rename(path.with_suffix(".dcm"))
        if number == 2:
            turn(folder)
        if number != 4:
            mask = root / "Thoracic_Cavities" / name / f"{name}_thor_cav_primary_reviewer.nii.gz"
            nifti(mask, study_lungs(number), flips=(True, False, True), spacing=(5.0, 11.25, 11.25))
    return root


def turn(folder: Path) -> None:
    for path in folder.glob("*.dcm"):
        dataset = pydicom.dcmread(path)
        dataset.PixelData = dataset.pixel_array[::-1, ::-1].tobytes()
        dataset.ImageOrientationPatient = [-1, 0, 0, 0, -1, 0]
        x, y, z = dataset.ImagePositionPatient
        dataset.ImagePositionPatient = [-x, -y, z]
        dataset.save_as(path)


GATE = "1.3.6.1.4.1.14519.5.2.1.6279.6001.179049373636438705059720603192"


def luna16(root: Path) -> Path:
    labels = np.where(LUNG, SIDES + np.uint8(2), np.uint8(0))
    labels[0, 0, 0] = 5  # trachea
    for subset, series in ((0, "1.2.30"), (0, GATE), (1, "1.2.4")):
        metaimage(root / f"subset{subset}" / f"{series}.mhd", CHEST, flipped=series == "1.2.4")
        metaimage(root / "seg-lungs-LUNA16" / f"{series}.mhd", labels, compressed=True)
    return root


def cncb(root: Path) -> Path:
    labels = np.zeros(GREY.shape, np.uint8)
    labels[1:10, 2:8], labels[3:5, 3:5], labels[6, 6] = 1, 2, 3
    for patient, number in (("0", 115), ("0", 23), ("100", 27)):
        picture(root / "image" / patient / f"{number}.jpg", np.stack([GREY] * 3, axis=-1), quality=100)
        palette(root / "mask" / patient / f"{number}.png", labels)
    return root


COVIDX = {
    "train_COVIDx_CT-2A.txt": (
        "NCP_96_1328_0032.png 2 2 1 14 11", "NCP_96_1329_0001.png 2 2 1 14 11",
        "137covid_patient37_SR_3_IM00020.png 2 0 0 16 12", "volume-covid19-A-0003_ct-0063.png 2 0 0 16 12",
        "radiopaedia_10_85902_1-0012.png 2 0 0 16 12",
    ),
    "val_COVIDx_CT-2A.txt": ("CP_1781_3581_0001.png 1 0 0 16 12", "COVIDCTMD-P12-IM0007.png 2 0 0 16 12"),
    "test_COVIDx_CT-2A.txt": (
        "Normal_1676_50_0003.png 0 0 0 16 12", "LIDC-IDRI-0001-1.3.6.1-0012.png 0 0 0 16 12",
        "LIDC-IDRI-0104-1.3.6.1-0012.png 0 0 0 16 12", "coronacases_001-0012.png 2 0 0 16 12",
    ),
}  # fmt: skip


def covidxct(root: Path) -> Path:
    for name, lines in COVIDX.items():
        (root / name).write_text("\n".join(lines) + "\n")
        for line in lines:
            picture(root / "2A_images" / line.split()[0], GREY)
    return root


def kaggle_lungs(root: Path) -> Path:
    picture(root / "2d_images" / "ID_0000_Z_0142.tif", CHEST[2].astype(np.int32))
    picture(root / "2d_images" / "ID_0007_Z_0075.tif", (CHEST[2] + 1024).astype(np.uint16))
    for name in ("ID_0000_Z_0142", "ID_0007_Z_0075"):
        picture(root / "2d_masks" / f"{name}.tif", LUNG[2] * np.uint8(255))
    return root


MADE: dict[str, Callable[[Path], Path]] = {
    make.__name__: make
    for make in (
        medseg9, semiseg, sarscov2, mosmed, covid_benchmark, medseg20, medseg_nifti, nsclc, luna16, cncb,
        covidxct, kaggle_lungs,
    )
}  # fmt: skip


def read(kind: str, path: Path) -> list[Case]:
    return list(DATASETS[kind].read(path))


def by_name(kind: str, path: Path) -> dict[str, Case]:
    return {case.name: case for case in read(kind, path)}


def canonical(case: Case, mask: Mask | None) -> Mask:
    assert mask is not None
    turned: Mask = Layout.of(case.volume.orientation).canonical(mask)
    return turned


def test_there_is_a_made_up_copy_of_every_kind() -> None:
    assert MADE.keys() == DATASETS.keys()


class TestEveryKind:
    @pytest.mark.parametrize("kind", DATASETS)
    def test_gives_valid_cases_in_the_same_order_each_time(self, kind: str, tmp_path: Path) -> None:
        root = MADE[kind](tmp_path)
        cases, again = read(kind, root), read(kind, root)
        assert [case.name for case in cases] == [case.name for case in again]
        assert len({case.name for case in cases}) == len(cases) > 0
        for case in cases:
            array = case.volume.array
            assert (array.ndim, array.dtype) == (3, np.int16)
            assert -1400 <= array.min() < array.max()
            assert min(case.volume.spacing) > 0
            assert np.isfinite(prepare(case.volume).numpy()).all()
            for mask in (*case.lesions, *([] if case.lung is None else [case.lung])):
                assert (mask.shape, mask.dtype) == (array.shape, np.bool_)

    @pytest.mark.parametrize("kind", DATASETS)
    def test_reads_nothing_before_it_is_asked_to(self, kind: str, tmp_path: Path) -> None:
        cases = DATASETS[kind].read(MADE[kind](tmp_path))
        first = next(cases)
        for path in (path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".txt"):
            path.write_bytes(b"gone")
        assert first.volume.array.size
        with pytest.raises(ConfigError):
            list(cases)

    @pytest.mark.parametrize("kind", DATASETS)
    def test_a_folder_of_something_else_is_told_what_was_expected_and_found(
        self, kind: str, tmp_path: Path
    ) -> None:
        (tmp_path / "holiday").mkdir()
        (tmp_path / "notes.md").touch()
        with pytest.raises(ConfigError) as raised:
            read(kind, tmp_path)
        text = str(raised.value)
        assert str(tmp_path) in text
        assert DATASETS[kind].layout in text
        assert "found: holiday/, notes.md" in text

    @pytest.mark.parametrize("kind", DATASETS)
    def test_a_folder_that_is_not_there_is_named(self, kind: str, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="no such folder"):
            read(kind, tmp_path / "nowhere")

    DAMAGED = (
        ("medseg9", "medseg9_2_p2.npz"),
        ("semiseg", "Imgs/10.jpg"),
        ("semiseg", "GT/10.png"),
        ("sarscov2", "COVID/Covid (1).png"),
        ("mosmed", "studies/CT-0/study_0000.nii.gz"),
        ("mosmed", "masks/study_0001_mask.nii.gz"),
        ("covid_benchmark", "covid/masks/cov7/rater_2.nii.gz"),
        ("medseg20", "Infection_Mask/coronacases_001.nii.gz"),
        ("medseg_nifti", "rp_lung_msk/4.nii.gz"),
        ("nsclc", "Thoracic_Cavities/LUNG1-001/LUNG1-001_thor_cav_primary_reviewer.nii.gz"),
        ("luna16", "subset0/1.2.30.raw"),
        ("luna16", "seg-lungs-LUNA16/1.2.30.zraw"),
        ("cncb", "image/0/115.jpg"),
        ("cncb", "mask/0/115.png"),
        ("covidxct", "2A_images/NCP_96_1328_0032.png"),
        ("kaggle_lungs", "2d_images/ID_0000_Z_0142.tif"),
    )

    @pytest.mark.parametrize(("kind", "name"), DAMAGED, ids=str)
    def test_a_cut_file_is_named(self, kind: str, name: str, tmp_path: Path) -> None:
        path = MADE[kind](tmp_path) / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        told = path.with_suffix(".mhd") if path.suffix in (".raw", ".zraw") else path
        with pytest.raises(ConfigError) as raised:
            read(kind, tmp_path)
        assert f"{told} cannot be read" in str(raised.value)

    LOST = (
        ("semiseg", "GT/10.png"),
        ("medseg20", "Lung_Mask/coronacases_001.nii.gz"),
        ("medseg_nifti", "rp_msk/4.nii.gz"),
        ("luna16", "seg-lungs-LUNA16/1.2.4.mhd"),
        ("cncb", "mask/100/27.png"),
        ("kaggle_lungs", "2d_masks/ID_0007_Z_0075.tif"),
    )

    @pytest.mark.parametrize(("kind", "name"), LOST, ids=str)
    def test_a_missing_mask_is_named(self, kind: str, name: str, tmp_path: Path) -> None:
        path = MADE[kind](tmp_path) / name
        path.unlink()
        with pytest.raises(ConfigError) as raised:
            read(kind, tmp_path)
        assert f"{path} is missing" in str(raised.value)

    SHORTER: tuple[tuple[str, str, str], ...] = (
        ("semiseg", "GT/2.png", "Imgs/2.jpg"),
        ("cncb", "mask/0/23.png", "image/0/23.jpg"),
        ("mosmed", "masks/study_0001_mask.nii.gz", "studies/CT-1/study_0001.nii.gz"),
        ("covid_benchmark", "covid/masks/cov7/rater_2.nii.gz", "covid/images/cov7.nii.gz"),
        ("medseg20", f"Infection_Mask/{RADIOPAEDIA}", f"COVID-19-CT-Seg_20cases/{RADIOPAEDIA}"),
        ("medseg_nifti", "rp_lung_msk/5.nii.gz", "rp_im/5.nii.gz"),
        ("nsclc", "Thoracic_Cavities/LUNG1-002/LUNG1-002_thor_cav_primary_reviewer.nii.gz",
         "NSCLC-Radiomics/LUNG1-002"),
        ("luna16", "seg-lungs-LUNA16/1.2.30.mhd", "subset0/1.2.30.mhd"),
        ("kaggle_lungs", "2d_masks/ID_0000_Z_0142.tif", "2d_images/ID_0000_Z_0142.tif"),
    )  # fmt: skip

    @pytest.mark.parametrize(("kind", "mask", "image"), SHORTER, ids=str)
    def test_a_mask_of_another_shape_is_named_with_its_image(
        self, kind: str, mask: str, image: str, tmp_path: Path
    ) -> None:
        path = MADE[kind](tmp_path) / mask
        match path.suffix:
            case ".gz":
                nifti(path, LESION[:-1])
            case ".mhd":
                metaimage(path, SIDES[:-1], compressed=True)
            case _:
                picture(path, SPOT[:-1])
        with pytest.raises(ConfigError) as raised:
            read(kind, tmp_path)
        assert f"{path} has " in str(raised.value)
        assert f"its image {tmp_path / image} has " in str(raised.value)


class TestOrientation:
    @pytest.mark.parametrize(("order", "flips"), STORED)
    def test_a_nifti_gives_the_same_slices_however_its_axes_lie(
        self, order: tuple[int, ...], flips: tuple[bool, ...], tmp_path: Path
    ) -> None:
        nifti(tmp_path / "studies" / "CT-1" / "study_0255.nii.gz", CHEST, order, flips)
        nifti(tmp_path / "masks" / "study_0255_mask.nii.gz", LESION, order, flips)
        (case,) = read("mosmed", tmp_path)
        assert case.volume.spacing == pytest.approx(SPACING)
        assert np.array_equal(canonical(case, case.volume.array), CHEST)
        assert np.array_equal(canonical(case, case.lesions[0]), LESION)
        assert prepare(case.volume).shape == (6, 12, 10)

    def test_the_normal_of_the_slices_points_to_where_the_array_grows(self, tmp_path: Path) -> None:
        nifti(tmp_path / "studies" / "CT-1" / "study_0255.nii.gz", CHEST, flips=(False, False, True))
        nifti(tmp_path / "masks" / "study_0255_mask.nii.gz", LESION)
        (case,) = read("mosmed", tmp_path)
        row, column = np.reshape(case.volume.orientation, (2, 3))
        upwards = np.cross(row, column)[2] > 0
        assert np.array_equal(case.volume.array[0 if upwards else -1], CHEST[0])

    @pytest.mark.parametrize("stored", TYPES)
    def test_hu_whatever_the_type_of_the_voxels(self, stored: str, tmp_path: Path) -> None:
        chest = CHEST % 200 if stored.startswith("u") else CHEST
        nifti(tmp_path / "studies" / "CT-1" / "study_0255.nii.gz", chest.astype(stored))
        nifti(tmp_path / "masks" / "study_0255_mask.nii.gz", LESION.astype(stored))
        (case,) = read("mosmed", tmp_path)
        assert np.array_equal(case.volume.array, chest)
        assert np.array_equal(case.lesions[0], LESION)

    def test_a_plain_file_that_is_cut_is_named(self, tmp_path: Path) -> None:
        packed = nifti(tmp_path / "studies" / "CT-1" / "study_0255.nii.gz", CHEST)
        nifti(tmp_path / "masks" / "study_0255_mask.nii.gz", LESION)
        whole = gzip.decompress(packed.read_bytes())
        packed.unlink()
        path = packed.with_suffix("")
        path.write_bytes(whole)
        (case,) = read("mosmed", tmp_path)
        assert np.array_equal(case.volume.array, CHEST)
        path.write_bytes(whole[:-1])
        with pytest.raises(ConfigError, match=r"study_0255.nii cannot be read.*its end is missing"):
            read("mosmed", tmp_path)

    def test_image_and_mask_may_be_stored_differently(self, tmp_path: Path) -> None:
        nifti(tmp_path / "studies" / "CT-1" / "study_0255.nii.gz", CHEST, (1, 0, 2), (True, False, True))
        nifti(tmp_path / "masks" / "study_0255_mask.nii.gz", LESION, (2, 1, 0), (False, True, False))
        (case,) = read("mosmed", tmp_path)
        assert np.array_equal(canonical(case, case.lesions[0]), LESION)


class TestPrepared:
    def test_medseg9(self, tmp_path: Path) -> None:
        cases = read("medseg9", medseg9(tmp_path))
        assert [case.name for case in cases] == ["medseg9_1_p1", "medseg9_2_p2", "medseg9_3_p2"]
        assert [case.patient for case in cases] == ["p1", "p2", "p2"]
        case = cases[0]
        assert case.volume.array[0, 0].tolist() == pytest.approx(
            [-1400 + k * 25 / 255 * 1600 for k in range(10)], abs=1
        )
        assert np.array_equal(case.lung, LUNG)
        assert np.array_equal(case.lesions[0], LESION)
        assert (case.diagnosis, case.millimetres, case.cropped) == (Diagnosis.COVID, False, False)

    def test_an_archive_without_an_array_is_named(self, tmp_path: Path) -> None:
        np.savez(medseg9(tmp_path) / "medseg9_4_p3.npz", gray=CHEST)
        with pytest.raises(ConfigError, match=r"medseg9_4_p3.npz cannot be read.*hu_lo"):
            read("medseg9", tmp_path)

    def test_a_mask_of_another_shape_is_named(self, tmp_path: Path) -> None:
        path = medseg9(tmp_path) / "medseg9_1_p1.npz"
        with np.load(path) as data:
            arrays = {name: data[name] for name in data.files}
        np.savez(path, **{**arrays, "lesion": arrays["lesion"][1:]})
        with pytest.raises(ConfigError, match=r"medseg9_1_p1.npz: lesion has 5 × 8 × 10 values"):
            read("medseg9", tmp_path)


class TestPictures:
    def test_semiseg_is_turned_upright_and_is_as_wide_as_two_lungs(self, tmp_path: Path) -> None:
        cases = read("semiseg", semiseg(tmp_path))
        assert [case.name for case in cases] == ["semiseg_2", "semiseg_10"]
        case = cases[0]
        assert case.volume.array.shape == (1, 16, 12)
        assert np.array_equal(case.lesions[0][0], np.rot90(SPOT, -1))
        assert np.array_equal(case.lesion_classes["ground_glass"], case.lesions[0])
        assert not case.lesion_classes["consolidation"].any()
        expected = -1080 + np.rot90(GREY, -1) / 255 * 1330
        assert np.abs(case.volume.array[0] - expected).max() < 20
        assert prepare(case.volume).shape == (1, round(16 * 145 / 12), 145)
        assert (case.patient, case.lung) == (case.name, None)
        assert (case.diagnosis, case.millimetres, case.cropped) == (Diagnosis.COVID, False, True)

    @pytest.mark.parametrize("archive", [False, True], ids=["folders", "zip"])
    def test_sarscov2_from_folders_or_an_archive(self, archive: bool, tmp_path: Path) -> None:
        root = sarscov2(tmp_path / "set")
        path = zipped(root, tmp_path / "sarscov2_2d.zip") if archive else root
        cases = by_name("sarscov2", path)
        assert {name: case.diagnosis for name, case in cases.items()} == {
            "sarscov2_Covid (1)": Diagnosis.COVID,
            "sarscov2_Covid (2)": Diagnosis.COVID,
            "sarscov2_Non-Covid (1)": Diagnosis.OTHER,
        }
        case = cases["sarscov2_Covid (1)"]
        assert case.volume.array[0].tolist() == np.rint(-1400 + GREY / 255 * 1600).tolist()
        assert {case.patient for case in cases.values()} == cases.keys()
        assert (case.lung, case.lesions, case.millimetres, case.cropped) == (None, (), False, True)

    def test_the_folder_of_the_archive_will_do(self, tmp_path: Path) -> None:
        zipped(sarscov2(tmp_path / "set"), tmp_path / "data" / "sarscov2_2d.zip")
        assert len(read("sarscov2", tmp_path / "data")) == 3

    def test_an_archive_that_is_none_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "sarscov2_2d.zip").write_bytes(b"no archive")
        with pytest.raises(ConfigError, match=r"sarscov2_2d.zip cannot be read"):
            read("sarscov2", tmp_path / "sarscov2_2d.zip")

    def test_cncb_reads_numbers_not_colours(self, tmp_path: Path) -> None:
        cases = by_name("cncb", cncb(tmp_path))
        assert [case.patient for case in cases.values()] == ["cncb_0", "cncb_0", "cncb_100"]
        case = cases["cncb_0_115"]
        assert case.lung is not None
        assert (case.lung.sum(), case.lesions[0].sum()) == (54, 5)
        assert case.lung[0, 1:10, 2:8].all()
        assert case.lesions[0][0, 6, 6]
        assert np.abs(case.volume.array[0] - (-1400 + GREY / 255 * 1600)).max() < 20
        assert (case.diagnosis, case.millimetres, case.cropped) == (Diagnosis.COVID, False, False)

    def test_covidxct_knows_patients_and_diagnoses(self, tmp_path: Path) -> None:
        cases = read("covidxct", covidxct(tmp_path))
        told = {case.name.removeprefix("covidxct_"): case for case in cases}
        patients = {name: case.patient.removeprefix("covidxct_") for name, case in told.items()}
        assert patients == {
            "NCP_96_1328_0032": "NCP_96",
            "NCP_96_1329_0001": "NCP_96",
            "137covid_patient37_SR_3_IM00020": "patient37",
            "volume-covid19-A-0003_ct-0063": "volume-covid19-A-0003",
            "radiopaedia_10_85902_1-0012": "radiopaedia_10",
            "CP_1781_3581_0001": "CP_1781",
            "COVIDCTMD-P12-IM0007": "COVIDCTMD-P12",
            "Normal_1676_50_0003": "Normal_1676",
            "LIDC-IDRI-0104-1.3.6.1-0012": "LIDC-IDRI-0104",
            "coronacases_001-0012": "coronacases_001",
        }
        assert told["NCP_96_1328_0032"].diagnosis is Diagnosis.COVID
        assert told["CP_1781_3581_0001"].diagnosis is Diagnosis.OTHER
        assert told["Normal_1676_50_0003"].diagnosis is Diagnosis.HEALTHY

    def test_covidxct_cuts_to_the_box_and_keeps_the_scale(self, tmp_path: Path) -> None:
        cases = by_name("covidxct", covidxct(tmp_path))
        cut, whole = cases["covidxct_NCP_96_1328_0032"], cases["covidxct_CP_1781_3581_0001"]
        assert np.array_equal(cut.volume.array, whole.volume.array[:, 1:11, 2:14])
        assert cut.volume.spacing == whole.volume.spacing

    def test_covidxct_reads_one_split_where_its_file_is_given(self, tmp_path: Path) -> None:
        path = covidxct(tmp_path) / "val_COVIDx_CT-2A.txt"
        names = [case.name for case in read("covidxct", path)]
        assert names == ["covidxct_CP_1781_3581_0001", "covidxct_COVIDCTMD-P12-IM0007"]

    @pytest.mark.parametrize("line", ["CP_1_1_1.png", "CP_1_1_1.png 7 0 0 1 1", "CP_1_1_1.png 1 a b c d"])
    def test_a_line_that_is_no_row_is_shown(self, line: str, tmp_path: Path) -> None:
        with (covidxct(tmp_path) / "val_COVIDx_CT-2A.txt").open("a") as file:
            file.write(line)
        with pytest.raises(ConfigError, match=f"val_COVIDx_CT-2A.txt: '{line}'"):
            read("covidxct", tmp_path)

    def test_splits_without_pictures_are_told_so(self, tmp_path: Path) -> None:
        covidxct(tmp_path)
        (tmp_path / "2A_images").rename(tmp_path.parent / f"{tmp_path.name}_elsewhere")
        with pytest.raises(ConfigError, match="is not laid out as expected"):
            read("covidxct", tmp_path)


class TestSources:
    """The one way in which training and evaluation walk through what was given."""

    @staticmethod
    def given(root: Path, *kinds: str) -> dict[str, Path]:
        for kind in kinds:
            (root / kind).mkdir()
        return {kind: MADE[kind](root / kind) for kind in kinds}

    def test_every_case_comes_with_its_kind(self, tmp_path: Path) -> None:
        sources = self.given(tmp_path, "mosmed", "semiseg")
        read = [(kind, case.name) for kind, case in cases(sources)]
        assert [kind for kind, _ in read] == ["mosmed"] * 5 + ["semiseg"] * 2
        assert [name for _, name in read][-2:] == ["semiseg_2", "semiseg_10"]

    def test_only_the_wanted_kinds_are_read_in_the_order_wanted(self, tmp_path: Path) -> None:
        sources = {**self.given(tmp_path, "semiseg", "medseg9"), "mosmed": tmp_path / "nowhere"}
        read = [kind for kind, _ in cases(sources, ["medseg9", "semiseg"])]
        assert read == ["medseg9"] * 3 + ["semiseg"] * 2

    def test_only_the_wanted_patients_come(self, tmp_path: Path) -> None:
        sources = self.given(tmp_path, "medseg9", "semiseg")
        read = [case.name for _, case in cases(sources, patients={"p2", "semiseg_10"})]
        assert read == ["medseg9_2_p2", "medseg9_3_p2", "semiseg_10"]

    @pytest.mark.parametrize(
        ("kinds", "told"),
        [
            (None, "--data nosuch=…: unknown kind of data; there are medseg9, "),
            (["luna16"], "--data luna16=PATH"),
        ],
    )
    def test_a_kind_that_is_unknown_or_not_given_is_told_before_anything_is_read(
        self, tmp_path: Path, kinds: list[str] | None, told: str
    ) -> None:
        sources = {"medseg9": tmp_path / "nowhere"} | ({} if kinds else {"nosuch": tmp_path})
        with pytest.raises(ConfigError, match=told):
            cases(sources, kinds)

    @pytest.mark.parametrize("other", ["medseg9", "medseg_nifti"])
    @pytest.mark.parametrize("kinds", [None, ["medseg20"]])
    def test_who_may_be_in_two_sets_under_two_names_is_read_from_one(
        self, tmp_path: Path, other: str, kinds: list[str] | None
    ) -> None:
        """Also when only one of them is walked through: the other may be in the other part of a split."""
        sources = self.given(tmp_path, "medseg20", other)
        names = [case.name for kind, case in cases(sources, kinds) if kind == "medseg20"]
        assert names == ["coronacases_001"]
        assert len(list(cases({"medseg20": sources["medseg20"]}))) == 5

    def test_one_set_in_two_layouts_is_read_once(self, tmp_path: Path) -> None:
        sources = self.given(tmp_path, "medseg9", "medseg_nifti")
        assert {kind for kind, _ in cases(sources)} == {"medseg9"}

    def test_covidxct_is_read_without_the_patients_of_the_sets_beside_it(self, tmp_path: Path) -> None:
        sources = self.given(tmp_path, "covidxct", "cncb", "medseg20")
        patients = {case.patient.removeprefix("covidxct_") for _, case in cases(sources, ["covidxct"])}
        assert patients == {"patient37", "volume-covid19-A-0003", "COVIDCTMD-P12", "LIDC-IDRI-0104"}

    def test_sets_that_share_patients_are_kinds(self) -> None:
        assert {kind for dataset in DATASETS.values() for kind in dataset.shares} < set(DATASETS)


def zipped(root: Path, archive: Path) -> Path:
    archive.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(root.rglob("*.*")):
            file.write(path, path.relative_to(root))
    return archive


class TestCovidVolumes:
    def test_mosmed(self, tmp_path: Path) -> None:
        cases = read("mosmed", mosmed(tmp_path))
        assert [case.grade for case in cases] == list(Grade)
        assert [case.patient for case in cases] == [f"study_{number:04}" for number in range(5)]
        assert [case.diagnosis for case in cases] == [Diagnosis.HEALTHY, *[Diagnosis.COVID] * 4]
        assert [len(case.lesions) for case in cases] == [0, 1, 0, 0, 0]
        assert np.array_equal(cases[1].volume.array, CHEST)
        assert np.array_equal(cases[1].lesions[0], LESION)
        assert cases[1].lung is None
        assert cases[1].millimetres

    def test_mosmed_without_its_masks_is_not_read(self, tmp_path: Path) -> None:
        (mosmed(tmp_path) / "masks" / "study_0001_mask.nii.gz").unlink()
        with pytest.raises(ConfigError, match=r"masks/<study>_mask.nii.gz"):
            read("mosmed", tmp_path)

    def test_the_benchmark_keeps_every_rater(self, tmp_path: Path) -> None:
        cases = by_name("covid_benchmark", covid_benchmark(tmp_path))
        assert {name: case.diagnosis for name, case in cases.items()} == {
            "bacterial_pneumonia_bac7": Diagnosis.OTHER,
            "covid_cov7": Diagnosis.COVID,
            "nodules_nod7": Diagnosis.OTHER,
            "normal_nor7": Diagnosis.HEALTHY,
        }
        first, second = cases["covid_cov7"].lesions
        assert np.array_equal(first, LESION)
        assert np.array_equal(second, OTHER_LESION)
        assert cases["normal_nor7"].lesions == ()

    def test_the_benchmarks_groups_count_their_patients_anew(self, tmp_path: Path) -> None:
        for group in ("covid", "normal"):
            nifti(tmp_path / group / "images" / "001.nii.gz", CHEST)
        assert [case.patient for case in read("covid_benchmark", tmp_path)] == ["covid_001", "normal_001"]

    def test_medseg20_in_hu_or_grey_levels(self, tmp_path: Path) -> None:
        cases = by_name("medseg20", medseg20(tmp_path))
        corona, radiopaedia = cases["coronacases_001"], cases["radiopaedia_10_85902_1"]
        assert np.array_equal(corona.volume.array, CHEST)
        expected = np.rint(-1250 + RADIOPAEDIA_GREY / 255 * 1500)
        assert (
            np.abs(canonical(radiopaedia, radiopaedia.volume.array) - np.clip(expected, -1024, None)).max()
            < 1
        )
        for case in cases.values():
            assert np.array_equal(case.lung, LUNG)
            assert np.array_equal(case.lesions[0], LESION)
            assert case.diagnosis is Diagnosis.COVID
        assert (corona.millimetres, radiopaedia.millimetres) == (True, False)

    def test_medseg20_keeps_the_scans_of_one_radiopaedia_case_together(self, tmp_path: Path) -> None:
        """Also where Radiopaedia counts them as two studies."""
        patients = [case.patient for case in read("medseg20", medseg20(tmp_path))]
        assert patients == ["coronacases_001", *["radiopaedia_10"] * 2, *["radiopaedia_29"] * 2]

    def test_medseg20_voxels_keep_their_masks_whatever_the_image_header_says(self, tmp_path: Path) -> None:
        """A mark on the brightest voxels stays on them."""
        name = "radiopaedia_7_85703_0.nii.gz"
        grey = np.zeros(SHAPE, np.uint8)
        grey[LESION] = 255
        nifti(tmp_path / "Infection_Mask" / name, LESION)
        nifti(tmp_path / "Lung_Mask" / name, SIDES)
        turned = grey[::-1, ::-1]
        nifti(tmp_path / "COVID-19-CT-Seg_20cases" / name, turned, flips=(False, True, True))
        (case,) = read("medseg20", tmp_path)
        assert np.array_equal(case.volume.array == 250, case.lesions[0])
        assert np.array_equal(canonical(case, case.lesions[0]), LESION)

    def test_medseg_nifti_has_the_patients_of_medseg9(self, tmp_path: Path) -> None:
        cases = read("medseg_nifti", medseg_nifti(tmp_path))
        assert [case.name for case in cases] == [f"rp_{number}" for number in range(1, 10)]
        assert [case.patient for case in cases] == ["p1", "p2", "p2", "p3", "p4", "p5", "p5", "p6", "p7"]
        assert np.array_equal(cases[0].volume.array, CHEST)
        assert np.array_equal(cases[0].lung, LUNG)
        assert np.array_equal(cases[0].lesions[0], LESION)
        assert not cases[0].millimetres


class TestLungs:
    def test_luna16_without_trachea_and_without_the_gate(self, tmp_path: Path) -> None:
        cases = read("luna16", luna16(tmp_path))
        assert [case.name for case in cases] == ["1.2.30", "1.2.4"]
        for case in cases:
            assert np.array_equal(canonical(case, case.volume.array), CHEST)
            assert np.array_equal(canonical(case, case.lung), LUNG)
            assert case.volume.spacing == SPACING
            assert (case.patient, case.diagnosis, case.lesions) == (case.name, Diagnosis.OTHER, ())

    def test_nsclc_masks_lie_on_the_grid_of_the_files(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        cases = by_name("nsclc", nsclc(tmp_path))
        assert list(cases) == ["LUNG1-001", "LUNG1-002", "LUNG1-004"]
        assert "LUNG1-003 is left out: missing slices" in caplog.text
        for number in (1, 2):
            case = cases[f"LUNG1-{number:03}"]
            array = canonical(case, case.volume.array)
            drawn = np.clip(phantom.draw(phantom.Phantom(seed=number, **STUDY)), -1024, None)
            assert np.array_equal(array, drawn)
            assert np.array_equal(canonical(case, case.lung), study_lungs(number))
            assert case.diagnosis is Diagnosis.OTHER
        assert cases["LUNG1-002"].volume.orientation != cases["LUNG1-001"].volume.orientation
        assert cases["LUNG1-004"].lung is None

    def test_a_damaged_slice_is_named(self, tmp_path: Path) -> None:
        path = sorted((nsclc(tmp_path) / "NSCLC-Radiomics" / "LUNG1-002").rglob("*.dcm"))[3]
        path.write_bytes(b"damaged")
        with pytest.raises(ConfigError, match=f"{path} cannot be read"):
            read("nsclc", tmp_path)

    def test_kaggle_slices_in_hu_with_or_without_offset(self, tmp_path: Path) -> None:
        cases = by_name("kaggle_lungs", kaggle_lungs(tmp_path))
        assert list(cases) == ["ID_0000_Z_0142", "ID_0007_Z_0075"]
        for case in cases.values():
            assert np.array_equal(case.volume.array[0], CHEST[2])
            assert np.array_equal(case.lung, LUNG[2:3])
            assert (case.millimetres, case.diagnosis) == (False, None)
        assert [case.patient for case in cases.values()] == ["kaggle_0", "kaggle_7"]

    def test_a_kaggle_slice_without_a_number_is_named(self, tmp_path: Path) -> None:
        path = kaggle_lungs(tmp_path) / "2d_images" / "ID_0000_Z_0142.tif"
        path.rename(path.with_name("slice.tif"))
        (tmp_path / "2d_masks" / path.name).rename(tmp_path / "2d_masks" / "slice.tif")
        with pytest.raises(ConfigError, match=r"slice.tif, a name without a number"):
            read("kaggle_lungs", tmp_path)

    def test_kaggle_pictures_with_8_bits_are_refused(self, tmp_path: Path) -> None:
        picture(kaggle_lungs(tmp_path) / "2d_images" / "ID_0000_Z_0142.tif", GREY[:8, :10])
        with pytest.raises(ConfigError, match=r"ID_0000_Z_0142.tif is a picture with 8 bits"):
            read("kaggle_lungs", tmp_path)


@needs_data
class TestRealData:
    def test_medseg9(self) -> None:
        cases = read("medseg9", DATA / "train")
        assert (len(cases), len({case.patient for case in cases})) == (9, 7)
        for case in cases:
            assert case.lung is not None
            lungs, body = case.volume.array[case.lung].mean(), case.volume.array[~case.lung].mean()
            assert lungs < body
            assert 0 < case.lesions[0].sum() < case.lung.sum()

    def test_semiseg(self) -> None:
        cases = read("semiseg", DATA / "train" / "semiseg50")
        assert len({case.patient for case in cases}) == 50
        assert all(case.lesions[0].any() for case in cases)
        for case in cases:
            glass, dense = (case.lesion_classes[kind] for kind in ("ground_glass", "consolidation"))
            assert not (glass & dense).any()
            assert np.array_equal(glass | dense, case.lesions[0])
        assert (
            np.mean([np.subtract(*case.volume.array.shape[:0:-1]) for case in cases]) > 0
        )  # wider than high

    def test_sarscov2(self) -> None:
        diagnoses = [case.diagnosis for case in DATASETS["sarscov2"].read(DATA / "train")]
        assert len(diagnoses) == 2481
        assert diagnoses.count(Diagnosis.COVID) == 1252
        assert set(diagnoses) == {Diagnosis.COVID, Diagnosis.OTHER}
