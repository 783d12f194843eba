"""The data sets that training and evaluation can read, by kind: nothing is downloaded, nothing is changed.

``--data KIND=PATH`` names one; ``PATH`` is laid out as the set's own authors publish it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from triage.errors import ConfigError
from triage.training.cases import Case
from triage.training.datasets import covid, lungs, pictures, prepared


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """One kind of data set: how it lies on the disk, and how it becomes cases."""

    summary: str
    layout: str
    """What ``read`` expects below the given path."""
    read: Callable[[Path], Iterator[Case]]
    """Cases one at a time, always in the same order. Raises ConfigError where path or file is not right."""
    source: str
    licence: str
    notes: str = ""
    """What must be known before anything is claimed with it."""
    patients_known: bool = True
    """Else each picture counts as a patient: what else can it count as?"""
    shares: Mapping[str, str] = field(default_factory=dict)
    """Another kind → pattern of the patients here who may be in it too, under another name."""

    def doubles(self, case: Case, kinds: Collection[str]) -> bool:
        """Whether the case's patient may be in one of these kinds too."""
        return any(kind in kinds and re.match(like, case.patient) for kind, like in self.shares.items())


DATASETS: dict[str, Dataset] = {
    "medseg9": Dataset(
        summary="9 COVID-19 volumes of 7 patients with lungs and lesions, as NumPy archives",
        layout=prepared.MEDSEG9,
        read=prepared.medseg9,
        source="MedSeg, COVID-19 CT segmentation dataset, medicalsegmentation.com/covid19",
        licence="CC0; the scans are from Radiopaedia, non-commercial",
        notes="HU estimated from grey values (±50), true spacing unknown: no ml, no mm",
    ),
    "semiseg": Dataset(
        summary="COVID-19 slices with lesions, pictures cropped to the lungs",
        layout=pictures.SEMISEG,
        read=pictures.semiseg,
        source="Fan et al., Inf-Net, doi:10.1109/TMI.2020.2996645 (COVID-SemiSeg)",
        licence="research use",
        notes="window, spacing and patients unknown; the 48 test slices are for testing only",
        patients_known=False,
    ),
    "sarscov2": Dataset(
        summary="2,481 single slices, COVID-19 or other findings, without masks",
        layout=pictures.SARSCOV2,
        read=pictures.sarscov2,
        source="Soares et al., doi:10.1101/2020.04.24.20078584 (SARS-CoV-2 CT-scan)",
        licence="CC BY-NC-SA 4.0",
        notes="patients unknown: never evidence of accuracy by patient",
        patients_known=False,
    ),
    "mosmed": Dataset(
        summary="1,110 volumes graded CT-0…CT-4, 50 of them with lesions",
        layout=covid.MOSMED,
        read=covid.mosmed,
        source="Morozov et al., MosMedData-1110, arXiv:2005.06465",
        licence="CC BY-NC-ND 3.0",
        notes="every tenth slice; grades were estimated by eye",
    ),
    "covid_benchmark": Dataset(
        summary="the multitask paper's test set: COVID-19 with lesions by two raters, others without",
        layout=covid.BENCHMARK,
        read=covid.covid_benchmark,
        source="Goncharov et al., section 3.5, github.com/neuro-ml/COVID-19-Triage",
        licence="CC BY-NC-ND 3.0 (Mosmed-20, Mosmed-Lung-Cancer-500)",
        notes="for testing only; orientation as the headers say, which the authors' own code ignores",
    ),
    "medseg20": Dataset(
        summary="20 COVID-19 volumes of 18 patients with lungs and lesions",
        layout=covid.MEDSEG20,
        read=covid.medseg20,
        source="Ma et al., doi:10.5281/zenodo.3757476",
        licence="masks CC BY 4.0; scans of Coronacases CC BY-NC 3.0, of Radiopaedia CC BY-NC-SA 3.0",
        notes="ten are grey levels of an assumed window; those from Radiopaedia are not read beside "
        "medseg9 or medseg_nifti, which may have the same patients",
        shares=dict.fromkeys(("medseg9", "medseg_nifti"), "radiopaedia_"),
    ),
    "medseg_nifti": Dataset(
        summary="the 9 volumes of medseg9 as published",
        layout=covid.MEDSEG_NIFTI,
        read=covid.medseg_nifti,
        source="MedSeg, COVID-19 CT segmentation dataset, medicalsegmentation.com/covid19",
        licence="CC0; the scans are from Radiopaedia, non-commercial",
        notes="the same patients as medseg9, and not read beside it",
        shares={"medseg9": ""},
    ),
    "nsclc": Dataset(
        summary="lung cancer patients, 402 with lungs",
        layout=lungs.NSCLC,
        read=lungs.nsclc,
        source="Aerts et al., doi:10.7937/K9/TCIA.2015.PF0M9REI; Kiser et al., doi:10.1002/mp.14424",
        licence="CC BY-NC 3.0",
        notes="tumours and effusion belong to the lungs",
    ),
    "luna16": Dataset(
        summary="888 volumes with lungs by an algorithm, patients with nodules",
        layout=lungs.LUNA16,
        read=lungs.luna16,
        source="Jacobs et al., luna16.grand-challenge.org, from LIDC-IDRI",
        licence="CC BY 3.0",
        notes="patients unknown, each series counts as one; the series of an ordering gate is left out",
    ),
    "cncb": Dataset(
        summary="750 slices of 150 COVID-19 patients with lungs and lesions",
        layout=pictures.CNCB,
        read=pictures.cncb,
        source="Zhang et al., CC-CCII, doi:10.1016/j.cell.2020.04.045",
        licence="research use",
        notes="window and spacing unknown",
    ),
    "covidxct": Dataset(
        summary="slices of COVID-19, other pneumonia and normal lungs, without masks, in published splits",
        layout=pictures.COVIDXCT,
        read=pictures.covidxct,
        source="Gunraj et al., COVIDx CT, doi:10.3389/fmed.2020.608525",
        licence="that of each source; non-commercial",
        notes="windows unknown and not one; the patients of cncb, luna16, mosmed and the medseg sets are not "
        "read beside these",
        shares={
            "cncb": "covidxct_(N?CP|Normal)_",
            "luna16": "covidxct_LIDC-IDRI-",
            "mosmed": "covidxct_study_",
            "medseg20": "covidxct_(radiopaedia|coronacases)_",
            "medseg9": "covidxct_radiopaedia_",
            "medseg_nifti": "covidxct_radiopaedia_",
        },
    ),
    "kaggle_lungs": Dataset(
        summary="267 slices with lungs",
        layout=lungs.KAGGLE,
        read=lungs.kaggle_lungs,
        source="Mader, Finding and Measuring Lungs in CT Data, kaggle.com/kmader/finding-lungs-in-ct-data",
        licence="that of the Kaggle page",
        notes="no diagnosis; patients by the number in the file name, unconfirmed",
    ),
}
"""The kinds a recipe or ``--data`` may name."""


def cases(
    sources: Mapping[str, Path], kinds: Collection[str] | None = None, patients: Collection[str] = ()
) -> Iterator[tuple[str, Case]]:
    """Kind and case, one at a time, of every source or of some ``kinds`` of them, in their order.

    With ``patients``, only theirs. A case whose patient may be in another source too, under another name
    (``Dataset.shares``), is left out: no split could keep such a patient in one part. Raises ConfigError, for
    a kind that is unknown or not given before anything is read.
    """
    for kind in sources:
        if kind not in DATASETS:
            raise ConfigError(f"--data {kind}=…: unknown kind of data; there are {', '.join(DATASETS)}")
    wanted = sources if kinds is None else kinds
    missing = [kind for kind in wanted if kind not in sources]
    if missing:
        raise ConfigError("give " + ", ".join(f"--data {kind}=PATH" for kind in missing))
    return _cases(sources, wanted, patients)


def _cases(
    sources: Mapping[str, Path], kinds: Collection[str], patients: Collection[str]
) -> Iterator[tuple[str, Case]]:
    for kind in kinds:
        for case in DATASETS[kind].read(sources[kind]):
            chosen = not patients or case.patient in patients
            if chosen and not DATASETS[kind].doubles(case, sources):
                yield kind, case
