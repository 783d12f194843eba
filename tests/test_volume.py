"""HU read from real and made-up slices, against independent decoders."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydicom import uid
from pydicom.encaps import encapsulate

from tests.needs import DATA, needs_data, needs_dcmtk
from triage.config import Assemble
from triage.dicom.header import find_instances, read_instance
from triage.dicom.phantom import ENCODERS, NOT_SCANNED, Phantom, draw, write_study
from triage.dicom.series import choose
from triage.dicom.volume import SIZ, read
from triage.domain import Series, Volume
from triage.errors import Rejected, Retryable

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
PLAIN = (
    uid.ImplicitVRLittleEndian,
    uid.ExplicitVRLittleEndian,
    uid.ExplicitVRBigEndian,
    uid.DeflatedExplicitVRLittleEndian,
)


def series(files: Sequence[Path]) -> Series:
    return Series(tuple(read_instance(file) for file in files), (5.0, 1.0, 1.0), AXIAL)


def hu(file: Path) -> NDArray[np.int16]:
    return read(series([file])).array[0]


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("phantom"), seed=7, slices=1, rows=64)[0]


def edited(phantom: Path, folder: Path, **changes: object) -> Path:
    dataset = pydicom.dcmread(phantom)
    for keyword, value in changes.items():
        if value is None:
            del dataset[keyword]
        else:
            setattr(dataset, keyword, value)
    path = folder / "edited.dcm"
    dataset.save_as(path, enforce_file_format=True)
    return path


# Every transfer syntax.


@pytest.mark.parametrize("transfer_syntax_uid", [*PLAIN, *ENCODERS])
def test_what_was_drawn_is_read_back_exactly(tmp_path: Path, transfer_syntax_uid: str) -> None:
    wanted = Phantom(seed=5, slices=12, rows=96, slice_spacing=25, transfer_syntax_uid=transfer_syntax_uid)
    files = write_study(
        tmp_path, seed=5, slices=12, rows=96, slice_spacing=25, transfer_syntax_uid=transfer_syntax_uid
    )
    drawn = draw(wanted)
    found = read(series(files))
    assert found.array.dtype == np.int16
    assert (drawn == NOT_SCANNED).any()
    np.testing.assert_array_equal(found.array, np.where(drawn == NOT_SCANNED, -1024, drawn))
    assert (found.spacing, found.orientation) == ((5.0, 1.0, 1.0), AXIAL)


@pytest.mark.parametrize("transfer_syntax_uid", [uid.HTJ2KLossless, uid.HTJ2KLosslessRPCL, uid.HTJ2K])
def test_high_throughput_jpeg_2000(phantom: Path, tmp_path: Path, transfer_syntax_uid: str) -> None:
    dataset = pydicom.dcmread(phantom)
    coded = imagecodecs.htj2k_encode(dataset.pixel_array, reversible=True)
    dataset.PixelData = encapsulate([bytes(coded)])
    dataset["PixelData"].is_undefined_length = True
    dataset.file_meta.TransferSyntaxUID = transfer_syntax_uid
    dataset.save_as(tmp_path / "coded.dcm", implicit_vr=False, little_endian=True)
    np.testing.assert_array_equal(hu(tmp_path / "coded.dcm"), hu(phantom))


def test_a_frame_in_several_fragments(tmp_path: Path) -> None:
    file = write_study(tmp_path, seed=5, slices=1, rows=64, transfer_syntax_uid=uid.JPEGLSLossless)[0]
    whole = hu(file)
    dataset = pydicom.dcmread(file)
    frame = next(pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=1))
    dataset.PixelData = encapsulate([frame], fragments_per_frame=3)
    dataset.save_as(file)
    np.testing.assert_array_equal(hu(file), whole)


DCMTK: dict[str, tuple[str, ...]] = {
    uid.JPEGBaseline8Bit: ("dcmdjpeg",),
    uid.JPEGExtended12Bit: ("dcmdjpeg",),
    "1.2.840.10008.1.2.4.53": ("dcmdjpeg",),
    "1.2.840.10008.1.2.4.55": ("dcmdjpeg",),
    uid.JPEGLosslessSV1: ("dcmdjpeg",),
    uid.JPEGLSLossless: ("dcmdjpls",),
    uid.JPEGLSNearLossless: ("dcmdjpls",),
    uid.RLELossless: ("dcmdrle",),
    uid.ExplicitVRBigEndian: ("dcmconv", "+te"),
    uid.DeflatedExplicitVRLittleEndian: ("dcmconv", "+te"),
    uid.ImplicitVRLittleEndian: ("dcmconv", "+te"),
    uid.ExplicitVRLittleEndian: ("dcmconv", "+te"),
}
LOSSY = {uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit, "1.2.840.10008.1.2.4.53", "1.2.840.10008.1.2.4.55"}


def reference(file: Path, folder: Path) -> NDArray[np.float64]:
    """HU by dcmtk's decoder and the textbook formula, before clipping; NaN where padded."""
    transfer_syntax_uid = pydicom.dcmread(file, stop_before_pixels=True).file_meta.TransferSyntaxUID
    plain = folder / "plain.dcm"
    subprocess.run([*DCMTK[transfer_syntax_uid], str(file), str(plain)], check=True, capture_output=True)
    dataset = pydicom.dcmread(plain)
    values = dataset.pixel_array.astype(float)
    padding = dataset.get("PixelPaddingValue")
    scaled: NDArray[np.float64] = values * dataset.RescaleSlope + dataset.RescaleIntercept
    if padding is not None:
        signed = padding - 65536 if dataset.PixelRepresentation and padding > 32767 else padding
        scaled[values == signed] = np.nan
    return scaled


def assert_like(found: NDArray[np.int16], expected: NDArray[np.float64], tolerance: float) -> None:
    clipped = np.clip(np.nan_to_num(expected, nan=-1024), -1024, 32767)
    np.testing.assert_allclose(found, clipped, atol=tolerance + 0.5)


CODECS = sorted((DATA / "dicom" / "odd" / "codecs_chest_ge").glob("CTImage*"))
JPEG_2000 = [file for file in CODECS if "JPEG2000" in file.name]
OTHERS = [file for file in CODECS if file not in JPEG_2000]


@needs_data
@needs_dcmtk
@pytest.mark.parametrize(
    "file", [pytest.param(f, id=f.stem[12:]) for f in CODECS if "JPEG2000" not in f.name]
)
def test_real_slices_decode_as_dcmtk_decodes_them(file: Path, tmp_path: Path) -> None:
    instance = read_instance(file)
    lossy = instance.transfer_syntax_uid in LOSSY
    tolerance = 2 * (instance.rescale_slope or 1) if lossy else 0
    assert_like(hu(file), reference(file, tmp_path), tolerance)


@needs_data
@pytest.mark.parametrize("file", JPEG_2000, ids=lambda file: file.name[12:])
def test_real_jpeg_2000_slices_equal_their_plain_original(file: Path) -> None:
    (plain,) = [f for f in CODECS if "LittleEndianExplicit" in f.name and "Deflated" not in f.name]
    lossless = "LosslessOnly" in file.name
    np.testing.assert_allclose(hu(file), hu(plain), atol=0 if lossless else 25)


@needs_data
@needs_dcmtk
@pytest.mark.parametrize(
    "file",
    [
        "covid_ricord_1012/0000.dcm",
        "covid_ricord_1012/0123.dcm",
        "lidc_0001/0002.dcm",
        "lungdx_a0001_two_kernels/0070.dcm",
        "acrin_013_gap/0030.dcm",
        "odd/head_tilt_ge/0007.dcm",
    ],
)
def test_slices_of_real_series_decode_as_dcmtk_decodes_them(file: str, tmp_path: Path) -> None:
    path = DATA / "dicom" / file
    assert_like(hu(path), reference(path, tmp_path), 0)


@needs_data
@pytest.mark.parametrize(("folder", "slices"), [("covid_ricord_1012", 248), ("lidc_0001", 67)])
def test_a_real_series_becomes_one_grid_of_plausible_hu(folder: str, slices: int) -> None:
    found = read(choose(find_instances([DATA / "dicom" / folder])[0], Assemble()))
    assert found.array.shape == (slices, 512, 512)
    assert found.array.min() == -1024
    lung_like = ((found.array > -950) & (found.array < -700)).sum() * found.voxel_ml
    assert 1500 < lung_like < 9000


def test_the_number_of_threads_changes_nothing(tmp_path: Path) -> None:
    files = write_study(tmp_path, seed=5, slices=20, rows=64)
    np.testing.assert_array_equal(read(series(files), 1).array, read(series(files), 8).array)


@pytest.mark.parametrize("form", ["j2k", "jp2"])
def test_a_code_stream_may_say_anything_in_its_data(phantom: Path, tmp_path: Path, form: str) -> None:
    """The bytes with which one begins occur within some of any long ones; and some writers leave a file's
    boxes around it.
    """
    pixels = pydicom.dcmread(phantom).pixel_array
    stream = imagecodecs.jpeg2k_encode(pixels, level=0, codecformat=form)
    comment = b"\xff\x64\x00\x08\x00\x00" + SIZ  # behind the SIZ marker's segment
    behind = stream.index(SIZ) + 4 + int.from_bytes(stream[stream.index(SIZ) + 4 :][:2], "big")
    stream = stream[:behind] + comment + stream[behind:]
    if form == "jp2":
        at = stream.index(b"jp2c") - 4
        length = int.from_bytes(stream[at : at + 4], "big")
        stream = stream[:at] + (length and length + len(comment)).to_bytes(4, "big") + stream[at + 4 :]
    dataset = pydicom.dcmread(phantom)
    dataset.PixelData = encapsulate([stream])
    dataset["PixelData"].VR = "OB"
    dataset["PixelData"].is_undefined_length = True
    dataset.file_meta.TransferSyntaxUID = uid.JPEG2000Lossless
    dataset.save_as(tmp_path / "coded.dcm")
    np.testing.assert_array_equal(hu(tmp_path / "coded.dcm"), hu(phantom))


# Stored values → HU.


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    bits=st.integers(8, 16),
    shift=st.integers(0, 4),
    signed=st.booleans(),
    slope=st.sampled_from([1.0, 2.0002442, 0.5, -1.0]),
    intercept=st.sampled_from([-1024.0, 0.0, -1000.5, -8192.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_bit_depth_sign_and_rescale(
    phantom: Path,
    tmp_path: Path,
    bits: int,
    shift: int,
    signed: bool,
    slope: float,
    intercept: float,
    seed: int,
) -> None:
    """Bits above and below the stored ones are filled with noise, as overlays and careless writers do."""
    rng = np.random.default_rng(seed)
    high_bit = min(bits - 1 + shift, 15)
    lowest = high_bit + 1 - bits
    limits = (-(1 << (bits - 1)), 1 << (bits - 1)) if signed else (0, 1 << bits)
    values = rng.integers(*limits, size=(64, 64))
    mask = ((1 << bits) - 1) << lowest
    noise = rng.integers(0, 1 << 16, size=values.shape) & ~mask
    words = ((values << lowest) & mask | noise).astype(np.uint16)
    file = edited(
        phantom,
        tmp_path,
        PixelPaddingValue=None,
        BitsStored=bits,
        HighBit=high_bit,
        PixelRepresentation=int(signed),
        RescaleSlope=slope,
        RescaleIntercept=intercept,
        PixelData=words.astype("<u2").tobytes(),
    )
    assert_like(hu(file), values * slope + intercept, 0)


@pytest.mark.parametrize("slope", [1.0, 0.5])
def test_values_beyond_the_scale_are_clipped(phantom: Path, tmp_path: Path, slope: float) -> None:
    values = np.full((64, 64), 32767, "<i2")
    values[0] = -32768
    file = edited(
        phantom,
        tmp_path,
        PixelData=values.tobytes(),
        RescaleIntercept=32767,
        RescaleSlope=slope,
        PixelPaddingValue=None,
    )
    assert hu(file)[1:].min() == 32767
    low = edited(
        phantom, tmp_path, PixelData=values.tobytes(), RescaleIntercept=-3000, PixelPaddingValue=None
    )
    assert hu(low)[0].max() == -1024


@pytest.mark.parametrize(
    ("value", "limit", "vr", "air"),
    [
        (-2000, None, "SS", [-2000]),
        (63536, None, "US", [-2000]),  # LIDC: unsigned, though the pixels are signed
        (-2000, -1990, "SS", [-2000, -1995, -1990]),
        (-1990, -2000, "SS", [-2000, -1995, -1990]),
        (40, None, "SS", [40]),
        ([1, 2, 3], None, "SS", []),
        (None, None, "SS", []),
    ],
)
def test_padding_is_air(
    phantom: Path, tmp_path: Path, value: Any, limit: Any, vr: str, air: list[int]
) -> None:
    dataset = pydicom.dcmread(phantom)
    del dataset.PixelPaddingValue
    if value is not None:
        dataset.add_new("PixelPaddingValue", vr, value)
    if limit is not None:
        dataset.add_new("PixelPaddingRangeLimit", vr, limit)
    stored = np.zeros((64, 64), "<i2")
    stored[0, :5] = [-2000, -1995, -1990, 40, 41]
    dataset.PixelData, dataset.RescaleIntercept = stored.tobytes(), 1000
    dataset.save_as(tmp_path / "padded.dcm")
    expected = [-1024 if x in air else max(x + 1000, -1024) for x in stored[0, :5].tolist()]
    assert hu(tmp_path / "padded.dcm")[0, :5].tolist() == expected


def test_each_slice_has_its_own_rescale(tmp_path: Path) -> None:
    first, second = write_study(tmp_path, seed=5, slices=2, rows=64)
    before = read(series([first, second])).array
    edited_second = edited(second, tmp_path, RescaleIntercept=100)
    after = read(series([first, edited_second])).array
    np.testing.assert_array_equal(after[0], before[0])
    inside = before[1] > -1000
    np.testing.assert_array_equal(after[1][inside], before[1][inside] + 100)


@pytest.mark.parametrize("transfer_syntax_uid", PLAIN[:2])
def test_the_short_walk_reads_what_pydicom_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, transfer_syntax_uid: str
) -> None:
    files = write_study(tmp_path, seed=5, slices=3, rows=64, transfer_syntax_uid=transfer_syntax_uid)
    with monkeypatch.context() as without:
        without.setattr("triage.dicom.volume.parse", None)
        walked = read(series(files)).array
    monkeypatch.setattr("triage.dicom.elements.find", lambda *_, **__: None)
    np.testing.assert_array_equal(walked, read(series(files)).array)


# What cannot be read.


def refused(files: Sequence[Path]) -> str:
    with pytest.raises(Rejected) as refusal:
        read(series(files))
    return str(refusal.value)


@pytest.mark.parametrize("transfer_syntax_uid", [*PLAIN, *ENCODERS])
@pytest.mark.parametrize("part", [0.5, 0.9, 0.99])
def test_a_truncated_slice_is_named(tmp_path: Path, transfer_syntax_uid: str, part: float) -> None:
    files = write_study(tmp_path, seed=5, slices=5, rows=64, transfer_syntax_uid=transfer_syntax_uid)
    found = series(files)
    raw = files[2].read_bytes()
    files[2].write_bytes(raw[: int(len(raw) * part)])
    with pytest.raises(Rejected, match=r"^pixel data of slice 3 cannot be decoded$"):
        read(found)


@pytest.mark.parametrize("transfer_syntax_uid", list(ENCODERS))
def test_a_code_stream_cut_within_a_whole_file_is_named(tmp_path: Path, transfer_syntax_uid: str) -> None:
    (file,) = write_study(tmp_path, seed=5, slices=1, rows=64, transfer_syntax_uid=transfer_syntax_uid)
    dataset = pydicom.dcmread(file)
    frame = next(pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=1))
    dataset.PixelData = encapsulate([frame[: len(frame) // 2]])
    dataset.save_as(file)
    assert refused([file]) == "pixel data of slice 1 cannot be decoded"


CHANGES: dict[str, tuple[dict[str, object], str]] = {
    "no pixel data": ({"PixelData": None}, "pixel data of slice 1 cannot be decoded"),
    "no bits allocated": ({"BitsAllocated": None}, "pixel data of slice 1 cannot be decoded"),
    "no sign": ({"PixelRepresentation": None}, "pixel data of slice 1 cannot be decoded"),
    "more bits than allocated": ({"BitsStored": 17}, "pixel data of slice 1 cannot be decoded"),
    "colour": ({"SamplesPerPixel": 3}, "pixel data of slice 1 cannot be decoded"),
    "too many rows": ({"Rows": 128}, "pixel data of slice 1 cannot be decoded"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_contradictory_attributes_are_named(phantom: Path, tmp_path: Path, name: str) -> None:
    changes, expected = CHANGES[name]
    assert refused([edited(phantom, tmp_path, **changes)]) == expected


def test_a_slice_of_another_size_is_named(tmp_path: Path) -> None:
    large = write_study(tmp_path / "large", seed=5, slices=1, rows=64)
    small = write_study(tmp_path / "small", seed=5, slices=2, rows=32)
    assert refused([large[0], small[0]]) == "slice 2 has the wrong size: 32 × 32, not 64 × 64"


def test_an_unsupported_transfer_syntax_is_named(phantom: Path, tmp_path: Path) -> None:
    file = tmp_path / "movie.dcm"
    dataset = pydicom.dcmread(phantom)
    dataset.PixelData = encapsulate([b"movie"])
    dataset["PixelData"].is_undefined_length = True
    dataset.file_meta.TransferSyntaxUID = uid.MPEG2MPML
    dataset.save_as(file, implicit_vr=False, little_endian=True)
    assert refused([file]) == "transfer syntax of slice 1 is not supported: MPEG2 Main Profile / Main Level"


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    files = write_study(tmp_path, seed=5, slices=3, rows=64)
    found = series(files)
    number = found.instances[1].instance_number
    files[1].unlink()
    expected = f"^image file of slice {number} is gone from the spool; send the study again$"
    with pytest.raises(Rejected, match=expected):
        read(found)


def test_a_disk_that_cannot_be_read_may_come_back(tmp_path: Path) -> None:
    files = write_study(tmp_path, seed=5, slices=3, rows=64)
    found = series(files)
    aside = shutil.move(files[1], tmp_path / "aside")
    files[1].mkdir()
    with pytest.raises(Retryable, match="Is a directory"):
        read(found)
    files[1].rmdir()
    shutil.move(aside, files[1])
    assert isinstance(read(found), Volume)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    transfer_syntax_uid=st.sampled_from(list(ENCODERS)),
    noise=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=6),
)
def test_wrong_bytes_in_a_code_stream_never_crash(
    coded: Callable[[str], Path], tmp_path: Path, transfer_syntax_uid: str, noise: list[tuple[float, int]]
) -> None:
    source = coded(transfer_syntax_uid)
    raw = bytearray(source.read_bytes())
    start = raw.index(b"\xe0\x7f\x10\x00")
    for where, byte in noise:
        raw[start + int(where * (len(raw) - start - 1))] = byte
    file = tmp_path / "noisy.dcm"
    file.write_bytes(raw)
    known = replace(read_instance(source), path=file)
    try:
        found = read(Series((known,), (5.0, 1.0, 1.0), AXIAL)).array
    except Rejected as refusal:
        found = None
        reason = str(refusal)
    assert reason if found is None else found.shape == (1, 64, 64)


@pytest.fixture(scope="module")
def coded(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """One small slice in each compressed transfer syntax."""
    files = {
        x: write_study(tmp_path_factory.mktemp("coded"), seed=7, slices=1, rows=64, transfer_syntax_uid=x)[0]
        for x in ENCODERS
    }
    return files.__getitem__
