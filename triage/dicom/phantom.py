"""Made-up chest CT studies for the demo and the tests: a drawn chest, written as valid CT Image Storage.

Nobody's anatomy: ellipses for body, lungs and heart, a spine, ribs, branching vessels and, where asked for,
ground glass and consolidation. Everything follows from the seed. The images show the way of a study through
the product; no network was made for them and nothing is promised about what one says of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels.encoders.base import get_encoder
from scipy import ndimage

from triage.dicom.uids import derive

Image = NDArray[np.floating[Any]]
Points = tuple[Image, Image, Image]
"""z, y, x of every voxel in mm: z from the lowest slice upwards, y to the back, x to the patient's left."""

NOT_SCANNED = -2000
"""Stored value outside the field of view; PixelPaddingValue says so."""
AIR, LUNG, GROUND_GLASS, FAT, CONSOLIDATION, BLOOD, MUSCLE, MARROW, CORTEX = (
    -1000, -850, -560, -100, 10, 45, 55, 180, 550,
)  # fmt: skip
"""HU of what a chest is made of."""


def _rle(values: NDArray[np.int16]) -> bytes:
    rows, columns = values.shape
    return get_encoder(uid.RLELossless).encode(
        values.tobytes(),
        encoding_plugin="pydicom",
        rows=rows,
        columns=columns,
        samples_per_pixel=1,
        photometric_interpretation="MONOCHROME2",
        bits_allocated=16,
        bits_stored=16,
        pixel_representation=1,
        number_of_frames=1,
    )


ENCODERS: dict[str, Callable[[NDArray[np.int16]], bytes]] = {
    uid.RLELossless: _rle,
    uid.JPEGLosslessSV1: lambda values: bytes(
        imagecodecs.jpeg8_encode(values.view(np.uint16), lossless=True)
    ),
    uid.JPEGLSLossless: lambda values: bytes(imagecodecs.jpegls_encode(values.view(np.uint16))),
    uid.JPEG2000Lossless: lambda values: bytes(imagecodecs.jpeg2k_encode(values, codecformat="j2k", level=0)),
}
"""The compressed transfer syntaxes a phantom can be written in; all others are written plain."""


@dataclass(frozen=True, kw_only=True)
class Phantom:
    """One made-up study; lengths in mm. Equal phantoms give equal bytes."""

    seed: int
    lesion_fraction: float = 0.0
    """Share of lung voxels that is ground glass or consolidation."""
    slices: int = 60
    rows: int = 256
    slice_spacing: float = 5.0
    slice_thickness: float = 5.0
    field_of_view: float = 360.0
    missing: tuple[int, ...] = ()
    """Slices (0 is the lowest) that are not written."""
    localizer: bool = False
    """Write a second series with one localizer."""
    transfer_syntax_uid: str = uid.ExplicitVRLittleEndian
    convolution_kernel: str = "STANDARD"
    patient_age: str = "060Y"
    patient_name: str = "PHANTOM^MADE UP"
    body_part_examined: str = "CHEST"
    study_date: str = "20200401"
    priority: str = ""
    """RequestedProcedurePriority, such as STAT."""
    study_instance_uid: str = ""
    """Derived from the seed when empty."""
    series_number: int = 2

    def uid(self, *what: object) -> str:
        """A UID that is this phantom's own: the same seed and words give the same one."""
        return derive("phantom", str(self.seed), *map(str, what))

    @property
    def study(self) -> str:
        return self.study_instance_uid or self.uid("study")

    @property
    def spacing(self) -> tuple[float, float, float]:
        pixel = self.field_of_view / self.rows
        return self.slice_spacing, pixel, pixel


def write_study(folder: Path, *, seed: int, **settings: Any) -> list[Path]:
    """Draw ``Phantom(seed=seed, **settings)`` and write it into ``folder``, one file a slice.

    Returns the files, lowest slice first, then the localizer.
    """
    phantom = Phantom(seed=seed, **settings)
    folder.mkdir(parents=True, exist_ok=True)
    array = draw(phantom)
    files = [
        _write(folder, _slice(phantom, array[k], k), phantom)
        for k in range(phantom.slices)
        if k not in phantom.missing
    ]
    if phantom.localizer:
        files.append(_write(folder, _localizer(phantom, array), phantom))
    return files


def draw(phantom: Phantom) -> NDArray[np.int16]:
    """HU of the whole chest, (slices, rows, rows), lowest slice first; NOT_SCANNED outside the circle."""
    rng = np.random.default_rng(phantom.seed)
    where = _points(phantom)
    lungs = _lungs(where)
    image = np.where(lungs, _parenchyma(phantom, where, lungs, rng), _trunk(where))
    vessels = _vessels(phantom, where, lungs, rng)
    np.copyto(image, image + vessels * (BLOOD - image), where=lungs)
    _airways(image, where)
    image = ndimage.gaussian_filter(image, (0.0, 0.6, 0.6))
    grain = rng.standard_normal(image.shape, np.float32)
    image += 45.0 * ndimage.gaussian_filter(grain, (0.0, 0.7, 0.7), truncate=3.0)
    _z, y, x = where
    image = np.clip(image, -1024, 3071)
    return np.where(x**2 + y**2 < (phantom.field_of_view / 2) ** 2, image, NOT_SCANNED).astype(np.int16)


def _points(phantom: Phantom) -> Points:
    """A chest 300 mm long, stretched so that it always fills the scan."""
    z = (np.arange(phantom.slices, dtype=np.float32) + 0.5) * 300 / phantom.slices
    half = phantom.field_of_view / 2
    pixel = phantom.field_of_view / phantom.rows
    line = np.arange(phantom.rows, dtype=np.float32) * pixel - half + pixel / 2
    return z[:, None, None], line[None, :, None], line[None, None, :]


def _oval(x: Image, y: Image, power: float = 2.0) -> Image:
    """Distance from the centre of an ellipse, 1 on its edge; a higher power makes it boxier."""
    return (np.abs(x) ** power + np.abs(y) ** power) ** np.float32(1 / power)


def _cage(where: Points) -> Image:
    """1 on the inner side of the ribs, less within."""
    z, y, x = where
    width = np.sqrt(np.clip(1 - ((z - 105) / 200) ** 2, 0.02, 1))
    return _oval(x / (142 * width), (y - 5) / (102 * width), 2.3)


def _lungs(where: Points) -> NDArray[np.bool_]:
    """Inside the cage, beside the mediastinum and the heart, above the domes of the diaphragm."""
    z, y, x = where
    right = 30 + 65 * np.exp(-(((x + 70) / 60) ** 2) - ((y + 15) / 75) ** 2)
    left = 20 + 60 * np.exp(-(((x - 70) / 60) ** 2) - ((y + 15) / 75) ** 2)
    mediastinum = (_oval(x / 30, (y - 15) / 95) < 1) | (np.abs(x) < 3)
    return (_cage(where) < 0.95) & (z > right) & (z > left) & ~mediastinum & (_heart(where) > 1)


def _heart(where: Points) -> Image:
    z, y, x = where
    return np.sqrt(((x - 25) / 62) ** 2 + ((y + 25) / 52) ** 2 + ((z - 95) / 65) ** 2)


def _trunk(where: Points) -> Image:
    """Everything but the lungs: later lines lie over earlier ones."""
    z, y, x = where
    body = _oval(x / 168, (y - 8) / 120, 2.3)
    cage = _cage(where)
    image = np.full(np.broadcast_shapes(z.shape, y.shape, x.shape), AIR, np.float32)
    _paint(image, np.abs(y - 131 + (x / 60) ** 2) < 2, -250)  # table
    _paint(image, body < 1, FAT)
    _paint(image, (body < 0.9) & (cage < 1.2), MUSCLE)
    _paint(image, (body < 0.86) & (cage > 1.12) & (z > 190) & (np.mod(_oval(x, y) + z / 4, 26) < 20), MUSCLE)
    _paint(image, (cage < 0.95) & (np.abs(x) < 40) & (_heart(where) > 1.02), -20)  # mediastinal fat
    _paint(image, _heart(where) < 1, BLOOD)
    _paint(image, (_oval((x - 14) / 13, (y - 52) / 13) < 1) & (z < 215), BLOOD)  # descending aorta
    _paint(image, (_oval((x + 12) / 15, (y + 22) / 15) < 1) & (z > 130) & (z < 230), BLOOD)  # ascending aorta
    ribs = (np.abs(cage - 1.0) < 0.045) & (np.mod(z - 0.35 * y, 27) < 11) & (y > -75)
    _paint(image, ribs, CORTEX)
    _paint(image, (np.abs(cage - 1.0) < 0.05) & (np.abs(x) < 20) & (y < -60) & (z > 70), 250)  # sternum
    _spine(image, where)
    return image


def _spine(image: Image, where: Points) -> None:
    z, y, x = where
    disc = np.mod(z, 25) < 4
    vertebra = _oval(x / 18, (y - 80) / 16)
    _paint(image, (vertebra < 1) & ~disc, CORTEX)
    _paint(image, (vertebra < 0.85) & ~disc, MARROW)
    _paint(image, (vertebra < 1) & disc, 80)
    _paint(image, (_oval(x / 14, (y - 102) / 11) < 1) & ~disc, CORTEX)
    _paint(image, _oval(x / 9, (y - 102) / 7) < 1, 30)
    _paint(image, (np.abs(x) < 4) & (y > 112) & (y < 122) & ~disc, 350)


def _paint(image: Image, region: NDArray[np.bool_], hu: float) -> None:
    np.copyto(image, np.float32(hu), where=region)


def _parenchyma(phantom: Phantom, where: Points, lungs: NDArray[np.bool_], rng: np.random.Generator) -> Image:
    """Aerated lung, denser towards the back, and the lesions: patches that favour pleura, back and base."""
    z, y, _x = where
    cloud = _cloud(phantom, rng)
    hu: Image = LUNG + 0.35 * y + 25 * cloud
    if phantom.lesion_fraction > 0:
        likely = cloud + 1.5 * _cage(where) + 0.006 * y - 0.003 * z
        inside = likely[lungs]
        glass, solid = np.quantile(inside, [1 - phantom.lesion_fraction, 1 - 0.25 * phantom.lesion_fraction])
        hu += np.clip((likely - glass) / 0.15 + 0.5, 0, 1) * (GROUND_GLASS - hu)
        hu += np.clip((likely - solid) / 0.15 + 0.5, 0, 1) * (CONSOLIDATION - hu)
    return hu


def _cloud(phantom: Phantom, rng: np.random.Generator) -> Image:
    """Smooth random field of unit variance: features of about 30 mm, and finer ones half as strong."""
    cloud: Image = np.zeros((phantom.slices, phantom.rows, phantom.rows), np.float32)
    for cells, height in ((12, 1.0), (30, 0.5)):
        coarse = height * rng.standard_normal((cells, cells, cells), np.float32)
        cloud += ndimage.zoom(coarse, [size / cells for size in cloud.shape], order=1)
    cloud /= cloud.std()
    return cloud


def _vessels(phantom: Phantom, where: Points, lungs: NDArray[np.bool_], rng: np.random.Generator) -> Image:
    """Share of blood in each voxel: branches from each hilum to random places, thinner on the way."""
    z, y, x = where
    places = np.argwhere(lungs)
    ends = places[rng.integers(len(places), size=260)]
    share = np.zeros(lungs.shape, np.float32)
    scale = np.array([300 / phantom.slices, *phantom.spacing[1:]], np.float32)
    corner = np.array([axis.flat[0] for axis in (z, y, x)], np.float32)
    tips = ends * scale + corner
    hila = np.stack([np.full(len(tips), 150), np.full(len(tips), 12), 38 * np.sign(tips[:, 2])], axis=1)
    bends = (tips + hila) / 2 + rng.normal(0, 12, tips.shape)
    way = np.linspace(0, 1, 160)[:, None, None]
    path = (1 - way) ** 2 * hila + 2 * way * (1 - way) * bends + way**2 * tips
    for radius, part in ((3.2, path[:48]), (1.8, path[48:100]), (1.0, path[100:])):
        share += _tubes(part.reshape(-1, 3), radius, (corner, scale), share.shape, phantom.spacing[1])
    return np.clip(share, 0, 1)


def _tubes(
    points: NDArray[np.float64],
    radius: float,
    grid: tuple[Image, Image],
    shape: tuple[int, ...],
    pixel: float,
) -> Image:
    """1 along the points, falling off softly with ``radius`` mm in the plane of the slice."""
    corner, scale = grid
    z, y, x = np.rint((points - corner) / scale).astype(int).T
    canvas = np.zeros(shape, np.float32)
    seen = (z >= 0) & (z < shape[0]) & (y >= 0) & (y < shape[1]) & (x >= 0) & (x < shape[2])
    canvas[z[seen], y[seen], x[seen]] = 1
    sigma = radius / pixel / 1.5
    soft: Image = ndimage.gaussian_filter(canvas, (0.0, sigma, sigma), truncate=2.5)
    solid: Image = np.clip(soft * max(2 * np.pi * sigma**2, 1.0), 0, 1)
    return solid


def _airways(image: Image, where: Points) -> None:
    """Trachea down to the carina at z = 175 mm, and the two main bronchi beside it."""
    z, y, x = where
    below = np.clip(175 - z, 0, 35)
    tubes = [(np.abs(_oval(x / 10, (y - 12) / 9)), z >= 175)]
    for side in (-1, 1):
        tubes.append((_oval((x - side * 1.3 * below) / 8, (y - 14) / 7), (z < 175) & (z > 140)))
    for tube, here in tubes:
        _paint(image, (tube < 1.25) & here, MUSCLE)
        _paint(image, (tube < 1) & here, AIR)


def _slice(phantom: Phantom, stored: NDArray[np.int16], k: int) -> Dataset:
    dataset = _image(phantom, stored, "axial", phantom.series_number, phantom.slices - k)
    half = (phantom.field_of_view - phantom.spacing[1]) / 2
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.SeriesDescription = "MADE-UP CHEST"
    dataset.ImagePositionPatient = [_ds(-half), _ds(-half), _ds(k * phantom.slice_spacing - 300)]
    dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    dataset.PixelSpacing = [_ds(phantom.spacing[1]), _ds(phantom.spacing[2])]
    dataset.SliceThickness = _ds(phantom.slice_thickness)
    dataset.ConvolutionKernel = phantom.convolution_kernel
    dataset.RescaleType = "HU"
    dataset.PixelPaddingValue = NOT_SCANNED
    return dataset


def _localizer(phantom: Phantom, array: NDArray[np.int16]) -> Dataset:
    """The view from the front: the mean along y, head at the top."""
    view = np.clip(array, -1024, None).mean(axis=1).astype(np.int16)[::-1]
    dataset = _image(phantom, np.ascontiguousarray(view), "localizer", 1, 1)
    half = (phantom.field_of_view - phantom.spacing[1]) / 2
    top = (phantom.slices - 1) * phantom.slice_spacing - 300
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    dataset.SeriesDescription = "MADE-UP SCOUT"
    dataset.ImagePositionPatient = [_ds(-half), 0, _ds(top)]
    dataset.ImageOrientationPatient = [1, 0, 0, 0, 0, -1]
    dataset.PixelSpacing = [_ds(phantom.slice_spacing), _ds(phantom.spacing[2])]
    dataset.SliceThickness = _ds(phantom.field_of_view)
    return dataset


def _image(
    phantom: Phantom, stored: NDArray[np.int16], series: str, series_number: int, number: int
) -> Dataset:
    """What every object of the study says (CT Image IOD, PS3.3 A.3); HU are stored as they are."""
    dataset = Dataset()
    dataset.SpecificCharacterSet = "ISO_IR 192"
    dataset.SOPClassUID = uid.CTImageStorage
    dataset.SOPInstanceUID = phantom.uid(phantom.study, series, series_number, number)
    dataset.StudyInstanceUID = phantom.study
    dataset.SeriesInstanceUID = phantom.uid(phantom.study, series, series_number)
    dataset.FrameOfReferenceUID = phantom.uid(phantom.study, "frame of reference")
    dataset.PositionReferenceIndicator = ""
    dataset.Modality = "CT"
    dataset.Manufacturer = "triage phantom"
    dataset.ManufacturerModelName = "made up, no patient"
    dataset.StudyDescription = "MADE-UP CHEST CT, NO PATIENT"
    for moment in ("Study", "Series", "Acquisition", "Content"):
        setattr(dataset, f"{moment}Date", phantom.study_date)
        setattr(dataset, f"{moment}Time", "120000")
    dataset.StudyID = str(phantom.seed)
    dataset.AccessionNumber = f"PHANTOM{phantom.seed}"
    dataset.ReferringPhysicianName = ""
    dataset.PatientName = phantom.patient_name
    dataset.PatientID = f"PHANTOM-{phantom.seed}"
    dataset.PatientBirthDate = ""
    dataset.PatientSex = "O"
    dataset.PatientAge = phantom.patient_age
    dataset.PatientPosition = "HFS"
    dataset.BodyPartExamined = phantom.body_part_examined
    if phantom.priority:
        dataset.RequestedProcedurePriority = phantom.priority
    dataset.SeriesNumber = series_number
    dataset.AcquisitionNumber = 1
    dataset.InstanceNumber = number
    dataset.KVP = 120
    dataset.RescaleIntercept, dataset.RescaleSlope = 0, 1
    _set_pixels(dataset, stored, phantom.transfer_syntax_uid)
    return dataset


def _set_pixels(dataset: Dataset, stored: NDArray[np.int16], transfer_syntax_uid: str) -> None:
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.Rows, dataset.Columns = stored.shape
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 16, 15, 1
    encode = ENCODERS.get(transfer_syntax_uid)
    if encode:
        dataset.PixelData = encapsulate([encode(stored)])
        dataset["PixelData"].is_undefined_length = True
    else:
        order = ">" if transfer_syntax_uid == uid.ExplicitVRBigEndian else "<"
        dataset.PixelData = stored.astype(f"{order}i2").tobytes()
    dataset["PixelData"].VR = "OB" if encode else "OW"


def _write(folder: Path, dataset: Dataset, phantom: Phantom) -> Path:
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = uid.UID(phantom.transfer_syntax_uid)
    path = folder / f"{dataset.SeriesNumber:03d}-{dataset.InstanceNumber:04d}.dcm"
    dataset.save_as(path, enforce_file_format=True)
    return path


def _ds(number: float) -> str:
    """A Decimal String of at most 16 characters."""
    return f"{number:.6f}"
