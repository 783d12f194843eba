"""Volumes of COVID-19 patients, and of those they are compared with, as NIfTI."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from triage.domain import Grade
from triage.training.cases import Case, Diagnosis
from triage.training.datasets.files import existing, partner
from triage.training.datasets.grids import mask, stem, volume

MOSMED = "studies/CT-0…CT-4/<study>.nii.gz and masks/<study>_mask.nii.gz"
BENCHMARK = (
    "covid/, bacterial_pneumonia/, nodules/, normal/ with images/<id>.nii.gz; covid/masks/<id>/<rater>.nii.gz"
)
MEDSEG20 = "COVID-19-CT-Seg_20cases/, Lung_Mask/ and Infection_Mask/, each with <case>.nii.gz"
MEDSEG_NIFTI = "rp_im/, rp_lung_msk/ and rp_msk/, each with 1.nii.gz … 9.nii.gz"

RADIOPAEDIA_WINDOW = (-1250.0, 250.0)
"""HU of 0 and 255 in MedSeg-20's volumes from Radiopaedia, as its authors say."""
RP_PATIENTS = dict(zip("123456789", ("p1", "p2", "p2", "p3", "p4", "p5", "p5", "p6", "p7"), strict=True))
"""MedSeg-9: volumes 2 and 3 are one scan, 6 and 7 probably one patient."""
RP_LUNGS = (1, 2)
"""Right and left lung; single voxels of 3 at the border are artefacts."""
GROUPS = {
    "covid": Diagnosis.COVID,
    "bacterial_pneumonia": Diagnosis.OTHER,
    "nodules": Diagnosis.OTHER,
    "normal": Diagnosis.HEALTHY,
}
"""The folders of the multitask paper's test set."""


def mosmed(folder: Path) -> Iterator[Case]:
    """MosMedData-1110 (Morozov et al., arXiv:2005.06465): grades of 1,110 patients, lesions of 50.

    CT-0 are the 254 patients without signs of viral pneumonia, the paper's negatives (Goncharov et al.,
    section 3.1). Every tenth slice was published. Raises ConfigError.
    """
    existing(folder, MOSMED, "masks/*_mask.nii*")
    for path in existing(folder, MOSMED, "studies/CT-[0-4]/*.nii*"):
        grade, scan = Grade(path.parent.name), volume(path)
        masks = sorted((folder / "masks").glob(f"{stem(path)}_mask.nii*"))
        yield Case(
            name=stem(path),
            patient=stem(path),
            volume=scan,
            lesions=tuple(mask(lesions, scan, path) for lesions in masks),
            diagnosis=Diagnosis.HEALTHY if grade is Grade.CT0 else Diagnosis.COVID,
            grade=grade,
        )


def covid_benchmark(folder: Path) -> Iterator[Case]:
    """The multitask paper's test set (Goncharov et al., section 3.5; github.com/neuro-ml/COVID-19-Triage).

    ``covid`` is from Mosmed-20, marked by two raters; the others are from Mosmed-Lung-Cancer-500. Raises
    ConfigError.
    """
    for path in existing(folder, BENCHMARK, *(f"{group}/images/*.nii*" for group in GROUPS)):
        scan, group = volume(path), path.parent.parent
        raters = sorted((group / "masks" / stem(path)).glob("*.nii*"))
        yield Case(
            name=f"{group.name}_{stem(path)}",
            patient=f"{group.name}_{stem(path)}",
            volume=scan,
            lesions=tuple(mask(rater, scan, path) for rater in raters),
            diagnosis=GROUPS[group.name],
        )


def medseg20(folder: Path) -> Iterator[Case]:
    """COVID-19-CT-Seg (Ma et al., doi:10.5281/zenodo.3757476): lungs (left 1, right 2) and lesions.

    Two traps of the ten cases from Radiopaedia: grey levels in place of HU, and image headers that turn the
    image away from its masks. Voxels correspond one to one, so the lesions' header is believed for all. Their
    spacing is not from a scanner. Scans of one Radiopaedia case count as one patient. Raises ConfigError.
    """
    for path in existing(folder, MEDSEG20, "COVID-19-CT-Seg_20cases/*.nii*"):
        lungs, lesions = (
            partner(folder / kind / path.name, path) for kind in ("Lung_Mask", "Infection_Mask")
        )
        scan = volume(path, lesions, RADIOPAEDIA_WINDOW)
        yield Case(
            name=stem(path),
            patient=re.sub(r"^(radiopaedia_\d+)_.*$", r"\1", stem(path)),
            volume=scan,
            lung=mask(lungs, scan, path, geometry=lesions),
            lesions=(mask(lesions, scan, path),),
            diagnosis=Diagnosis.COVID,
            millimetres=not path.name.startswith("radiopaedia"),
        )


def medseg_nifti(folder: Path) -> Iterator[Case]:
    """MedSeg-9 (medicalsegmentation.com/covid19) as published; ``medseg9`` is the same, prepared.

    The authors estimated HU from JPEG pictures; the spacing is not from a scanner. Raises ConfigError.
    """
    for path in existing(folder, MEDSEG_NIFTI, "rp_im/[1-9].nii*"):
        lungs, lesions = (partner(folder / kind / path.name, path) for kind in ("rp_lung_msk", "rp_msk"))
        scan = volume(path)
        yield Case(
            name=f"rp_{stem(path)}",
            patient=RP_PATIENTS[stem(path)],
            volume=scan,
            lung=mask(lungs, scan, path, RP_LUNGS),
            lesions=(mask(lesions, scan, path),),
            diagnosis=Diagnosis.COVID,
            millimetres=False,
        )
