"""The gates: each object that a network leaves of real series is valid, readable, and comes back unchanged.

Without ``--every-series`` the default network judges all series, and each other network one of them.
"""

import json
import subprocess
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread

from tests import peers
from tests.needs import DATA, needs_data, needs_dcmtk, needs_dicom3tools, needs_orthanc
from tests.results import NOW, errors, read_masks
from tests.test_orthanc import Orthanc, orthanc
from triage import analyze, assemble, models, severity, unjudged
from triage.config import Analysis, Config, Destination, DicomWeb, Results
from triage.dicom import seg, sender, stow
from triage.dicom.header import digest_of, find_instances, split
from triage.dicom.series import choose
from triage.domain import Instance, Mask, ResultKind, ResultObject
from triage.errors import Rejected
from triage.models import MODELS

pytestmark = [needs_data, needs_orthanc, needs_dcmtk, needs_dicom3tools, pytest.mark.timeout(600)]

SERIES = {
    "covid": ("covid_ricord_1012", None),
    "nodules": ("lidc_0001", None),
    "tumour, kernel L": ("lungdx_a0001_two_kernels", "L"),
    "tumour, kernel B": ("lungdx_a0001_two_kernels", "B"),
    "slices missing": ("acrin_013_gap", None),
}
LABEL_MAP = "1.2.840.10008.5.1.4.1.1.66.7"
FEW = ("nodules",)
CONFIG = Config(results=Results(sr_not_judged=True, lung_seg=True, view_3d=True))
NOT_JUDGED = {ResultKind.SR}
ALWAYS = NOT_JUDGED | {ResultKind.LUNG_SEG, ResultKind.PICTURE, ResultKind.VIEW_3D}
OF_LESIONS = {ResultKind.LESION_SEG, ResultKind.KEY_SLICES}


@dataclass(frozen=True)
class Written:
    """What was written of one series; without a case it was not judged."""

    objects: tuple[ResultObject, ...]
    case: analyze.Case | None

    def path(self, kind: ResultKind) -> Path:
        return next(item.path for item in self.objects if item.kind is kind)

    def masks(self) -> dict[ResultKind, dict[str, Mask]]:
        """What the network gave, by object and segment."""
        if self.case is None:
            return {}
        found = self.case.findings
        assert found.lesion_mask is not None
        sides = severity.side_masks(found.lung_mask, self.case.volume)
        assert sides is not None
        lesions = {k.label: part for k, part in seg.lesion_parts(found.lesion_mask, found.lesion_classes)}
        lungs = dict(zip(("Left lung", "Right lung"), sides, strict=True))
        return {ResultKind.LUNG_SEG: lungs, **({ResultKind.LESION_SEG: lesions} if lesions else {})}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "written" in metafunc.fixturenames:
        every = metafunc.config.getoption("--every-series")
        ways = [(m, s) for m in MODELS for s in SERIES if every or m == Analysis().model or s in FEW]
        if "form" in metafunc.fixturenames:  # of the other networks' masks it says nothing new
            ways = [(m, s) for m, s in ways if m == Analysis().model and s in FEW]
        metafunc.parametrize("written", ways, indirect=True, scope="module", ids=": ".join)


@lru_cache(maxsize=1)
def network(name: str) -> models.Model:
    return models.load(Analysis(model=name))


def images(name: str) -> list[Instance]:
    folder, kernel = SERIES[name]
    found, _ = find_instances([DATA / "dicom" / folder])
    return [i for i in found if kernel in (None, i.convolution_kernel)]


@pytest.fixture(scope="module")
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
    model, name = request.param
    instances, folder = images(name), tmp_path_factory.mktemp("written")
    cases: list[analyze.Case] = []
    try:
        chosen = choose(instances, CONFIG.assemble)
        judged = analyze.judge(chosen, network(model), CONFIG, folder, NOW, also=cases.append)
        return Written(judged.objects, cases[0])
    except Rejected as rejection:
        answer = assemble.not_analysable(instances, str(rejection))
        _, objects = unjudged.tell(answer, instances, (), CONFIG.results, folder, NOW)
        return Written(objects, None)


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Orthanc]]:
    """Two, so that what came one way is not there before it comes the other."""
    folder = tmp_path_factory.mktemp("archives")
    with (
        orthanc(folder / "a", peers.free_port(), peers.free_port(), web=True) as first,
        orthanc(folder / "b", peers.free_port(), peers.free_port(), web=True) as second,
    ):
        yield {"C-STORE": first, "STOW-RS": second}


def test_every_object_is_written(written: Written) -> None:
    kinds = {item.kind for item in written.objects}
    lesions = ResultKind.LESION_SEG in written.masks()
    assert kinds == (NOT_JUDGED if written.case is None else ALWAYS | (OF_LESIONS if lesions else set()))


def test_dciodvfy_finds_no_error(written: Written) -> None:
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(errors, [item.path for item in written.objects])
        assert dict(zip((item.kind for item in written.objects), found, strict=True)) == {
            item.kind: [] for item in written.objects
        }


def test_other_readers_name_the_template(written: Written) -> None:
    report = written.path(ResultKind.SR)
    dumped = subprocess.run(["dsrdump", "+Pt", "+Pl", report], capture_output=True, text=True, check=True)
    assert dumped.stderr == ""
    assert "# TID 1500 (DCMR)" in dumped.stdout
    other = subprocess.run(["dcsrdump", report], capture_output=True, text=True, check=True)
    told = other.stdout + other.stderr
    assert "(DCMR,1500)" in told
    assert "Error" not in told
    answer = "Not analysable" if written.case is None else written.case.answer.status.value.capitalize()
    assert f'"{answer}"' in dumped.stdout
    assert f'"{answer}"' in told


@pytest.mark.parametrize("way", ["C-STORE", "STOW-RS"])
def test_it_comes_back_unchanged(written: Written, archives: dict[str, Orthanc], way: str) -> None:
    archive = archives[way]
    paths = [item.path for item in written.objects]
    if way == "C-STORE":
        pacs = Destination(name="PACS", ae_title="PACS", host=peers.HOST, port=archive.dicom_port)
        sent = sender.send(paths, pacs, calling_ae_title="TRIAGE", timeout_seconds=60)
    else:
        url = f"http://{peers.HOST}:{archive.http_port}/dicom-web"
        sent = stow.send(paths, DicomWeb(name="PACS", kind="dicomweb", url=url), timeout_seconds=60)
    assert [outcome.error for outcome in sent if not outcome.sent] == []
    masks = written.masks()
    for item in written.objects:
        path = fetched(archive, item, item.path.with_suffix(f".{way}"))
        assert body(path) == body(item.path), item.kind
        if item.kind in masks:
            assert written.case is not None
            back = read_masks(dcmread(path), written.case.series)
            assert back.keys() == masks[item.kind].keys()
            for label, mask in masks[item.kind].items():
                np.testing.assert_array_equal(back[label], mask)


def fetched(archive: Orthanc, item: ResultObject, path: Path) -> Path:
    """The object as it lies in the archive."""
    url = f"http://{peers.HOST}:{archive.http_port}/tools/lookup"
    with urllib.request.urlopen(url, item.sop_instance_uid.encode(), timeout=30) as answer:
        (found,) = json.load(answer)
    path.write_bytes(archive.read(f"{found['Path']}/file"))
    return path


def body(path: Path) -> str:
    """Of the data set; the file meta information is the archive's own."""
    return digest_of(split(path.read_bytes())[1])


@pytest.mark.parametrize("form", ["labelmap_rle", "labelmap_jpeg_ls"])
def test_label_maps_hold_the_same_masks(
    written: Written, archives: dict[str, Orthanc], form: seg.Form, tmp_path: Path
) -> None:
    """Only by STOW-RS: the archive at hand is older than their SOP class, and so is dciodvfy."""
    assert written.case is not None
    case, masks = written.case, written.masks()[ResultKind.LESION_SEG]
    assert case.findings.lesion_mask is not None
    answer = replace(case.answer, content_key=form)
    label_map = seg.write_lesions(
        case.series, case.findings.lesion_mask, answer, case.info, tmp_path, now=NOW, form=form
    )
    assert label_map.path.stat().st_size < written.path(ResultKind.LESION_SEG).stat().st_size / 3
    archive = archives["STOW-RS"]
    url = f"http://{peers.HOST}:{archive.http_port}/dicom-web"
    (sent,) = stow.send([label_map.path], DicomWeb(name="PACS", kind="dicomweb", url=url), timeout_seconds=60)
    assert sent.sent, sent.error
    back = dcmread(fetched(archive, label_map, tmp_path / "back"))
    assert back.SOPClassUID == LABEL_MAP
    np.testing.assert_array_equal(read_masks(back, case.series)["Lesions"], masks["Lesions"])
