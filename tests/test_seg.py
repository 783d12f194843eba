"""Segmentations: valid, on the right slices, voxel for voxel, and the same UIDs every time."""

from pathlib import Path

import numpy as np
import pytest
from highdicom.seg import Segmentation, SegmentDescription
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.dataset import Dataset

from tests.needs import DATA, needs_data, needs_dicom3tools
from tests.results import (
    INFO,
    NOW,
    SOURCES,
    blob,
    changed,
    errors,
    parted,
    positive,
    read_masks,
    small_study,
    source_series,
)
from triage.config import Assemble
from triage.dicom import objects, seg, source
from triage.dicom.header import find_instances
from triage.dicom.series import choose
from triage.domain import Mask, ResultKind, Series
from triage.errors import Retryable


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Series:
    return small_study(tmp_path_factory.mktemp("study"))


def lesions(series: Series, mask: Mask, folder: Path, **how: object) -> Dataset:
    written = seg.write_lesions(series, mask, positive(series), INFO, folder, now=NOW, **how)
    dataset = dcmread(written.path)
    assert (dataset.SOPInstanceUID, dataset.SOPClassUID) == (written.sop_instance_uid, written.sop_class_uid)
    return dataset


def read_back(dataset: Dataset, series: Series, segment: int = 1) -> Mask:
    """The mask on the grid of the series: frames are placed by what they refer to, never by their order."""
    places = {instance.sop_instance_uid: k for k, instance in enumerate(series.instances)}
    mask = np.zeros((len(places), dataset.Rows, dataset.Columns), bool)
    (shared,) = dataset.SharedFunctionalGroupsSequence
    frames = dataset.pixel_array.reshape(-1, dataset.Rows, dataset.Columns)
    for frame, group in zip(frames, dataset.PerFrameFunctionalGroupsSequence, strict=True):
        identified = "SegmentIdentificationSequence"
        (item,) = (group if identified in group else shared)[identified]
        if item.ReferencedSegmentNumber != segment:
            continue
        image = group.DerivationImageSequence[0].SourceImageSequence[0]
        k = places[image.ReferencedSOPInstanceUID]
        position = group.PlanePositionSequence[0].ImagePositionPatient
        assert np.allclose(position, series.instances[k].image_position_patient or ())
        mask[k] = frame
    orientation = shared.PlaneOrientationSequence[0]
    assert np.allclose(orientation.ImageOrientationPatient, series.orientation)
    return mask


@needs_dicom3tools
@pytest.mark.parametrize("name", SOURCES)
def test_objects_are_valid(name: str, tmp_path: Path) -> None:
    series = source_series(name, tmp_path)
    mask = blob(series)
    lesion_seg = seg.write_lesions(series, mask, positive(series), INFO, tmp_path, now=NOW)
    assert errors(lesion_seg.path) == []
    classes = parted(mask)
    lesion_seg = seg.write_lesions(series, mask, positive(series), INFO, tmp_path, now=NOW, classes=classes)
    other = np.roll(mask, 1, axis=0) & ~mask
    lung_seg = seg.write_lungs(series, mask, other, positive(series), INFO, tmp_path, now=NOW)
    assert errors(lesion_seg.path) == []
    assert errors(lung_seg.path) == []


@pytest.mark.parametrize("name", SOURCES)
def test_mask_reads_back_voxel_for_voxel(name: str, tmp_path: Path) -> None:
    series = source_series(name, tmp_path)
    mask = blob(series)
    dataset = lesions(series, mask, tmp_path)
    assert np.array_equal(read_back(dataset, series), mask)
    assert dataset.NumberOfFrames == np.count_nonzero(mask.any(axis=(1, 2)))


@pytest.mark.parametrize("orientation", [(-1, 0, 0, 0, 1, 0), (1, 0, 0, 0, -1, 0), (0, 1, 0, 1, 0, 0)])
def test_mask_follows_any_orientation(study: Series, orientation: tuple[int, ...], tmp_path: Path) -> None:
    turned = changed(study, tmp_path / "turned", ImageOrientationPatient=list(orientation))
    mask = blob(turned)
    assert turned.orientation == orientation
    assert np.array_equal(read_back(lesions(turned, mask, tmp_path), turned), mask)


def test_mask_follows_slices_in_reverse(study: Series, tmp_path: Path) -> None:
    mask = blob(study)
    backwards = Series(study.instances[::-1], study.spacing, study.orientation)
    assert np.array_equal(read_back(lesions(backwards, mask[::-1], tmp_path), study), mask)


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**32 - 1),
    density=st.sampled_from([0.0001, 0.01, 0.5, 1.0]),
    solid=st.sampled_from([None, 0.0, 0.3, 1.0]),
    omit=st.booleans(),
    form=st.sampled_from(list(seg.FORMS)),
)
def test_any_mask_reads_back(
    study: Series,
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    density: float,
    solid: float | None,
    omit: bool,
    form: seg.Form,
) -> None:
    """As one segment, or as those of its ground glass and its consolidation that have a voxel."""
    rng = np.random.default_rng(seed)
    mask = rng.random((24, 64, 64)) < density
    mask &= (rng.random(24) < 0.5)[:, None, None]
    mask[rng.integers(24), rng.integers(64), rng.integers(64)] = True
    parts, classes = {"Lesions": mask}, {}
    if solid is not None:
        consolidation = mask & (rng.random(mask.shape) < solid)
        classes = {"consolidation": consolidation, "ground_glass": mask & ~consolidation}
        named = {"Ground glass": classes["ground_glass"], "Consolidation": consolidation}
        parts = {label: part for label, part in named.items() if part.any()}
    folder = tmp_path_factory.getbasetemp()
    dataset = lesions(study, mask, folder, omit_empty_frames=omit, classes=classes, form=form)
    back = read_masks(dataset, study)
    assert list(back) == list(parts)
    for label, part in parts.items():
        assert np.array_equal(back[label], part)
    frames = [part.any(axis=(1, 2)).sum() if omit else 24 for part in parts.values()]
    whole = mask.any(axis=(1, 2)).sum() if omit else 24
    assert dataset.NumberOfFrames == (sum(frames) if form == "binary" else whole)
    assert dataset.file_meta.TransferSyntaxUID == seg.FORMS[form][1]


def test_bits_of_frames_of_any_size_follow_each_other() -> None:
    frames = np.random.default_rng(0).random((19, 5, 7)) < 0.5
    assert seg.packed(list(frames)) == np.packbits(frames, bitorder="little").tobytes()


@pytest.mark.parametrize("form", seg.FORMS)
@pytest.mark.parametrize("omit", [True, False])
@pytest.mark.parametrize("kinds", [1, 2])
def test_equals_what_highdicom_makes_of_all_images(
    study: Series, tmp_path: Path, form: seg.Form, omit: bool, kinds: int
) -> None:
    """Element by element, but for the one UID that it draws by chance."""
    mask = blob(study)
    parts = parted(mask) if kinds == 2 else {}
    ours = lesions(study, mask, tmp_path, classes=parts, form=form, omit_empty_frames=omit)
    labels = np.zeros(mask.shape, np.uint8)
    for number, part in enumerate(parts.values() or [mask], 1):
        labels[part] = number
    slices = [source.slice_of(study, one, ours.FrameOfReferenceUID) for one in study.instances]
    for keyword in source.TYPE_2:
        setattr(slices[0], keyword, None)
    theirs = Segmentation(
        source_images=slices,
        pixel_array=labels,
        segmentation_type=ours.SegmentationType,
        transfer_syntax_uid=ours.file_meta.TransferSyntaxUID,
        segment_descriptions=[
            SegmentDescription.from_dataset(item) for item in ours.SegmentSequence if item.SegmentNumber
        ],
        omit_empty_frames=omit,
        content_label=ours.ContentLabel,
        content_description=ours.ContentDescription,
        **objects.identity(ResultKind.LESION_SEG, positive(study), INFO, NOW),
    )
    for item in (*theirs.DimensionOrganizationSequence, *theirs.DimensionIndexSequence):
        item.DimensionOrganizationUID = ours.DimensionOrganizationSequence[0].DimensionOrganizationUID
    (tmp_path / "theirs").mkdir()
    written = objects.write(ResultKind.LESION_SEG, theirs, source.patient(study), tmp_path / "theirs", NOW)
    assert written.path.read_bytes() == (tmp_path / "lesion_seg.dcm").read_bytes()


def test_kinds_of_lesion_are_segments_with_codes_and_colours_of_their_own(
    study: Series, tmp_path: Path
) -> None:
    mask = blob(study)
    dataset = lesions(study, mask, tmp_path, classes=parted(mask))
    glass, solid = dataset.SegmentSequence
    kinds = [segment.SegmentedPropertyTypeCodeSequence[0] for segment in (glass, solid)]
    assert [(kind.CodeValue, kind.CodingSchemeDesignator, kind.CodeMeaning) for kind in kinds] == [
        ("112120", "DCM", "Ground glass opacity"),
        ("95436008", "SCT", "Lung consolidation"),
    ]
    for segment in (glass, solid):
        assert segment.SegmentedPropertyCategoryCodeSequence[0].CodeValue == "49755003"
        assert segment.AnatomicRegionSequence[0].CodeMeaning == "Lung"
    assert glass.TrackingUID != solid.TrackingUID
    assert glass.RecommendedDisplayCIELabValue != solid.RecommendedDisplayCIELabValue


@pytest.mark.parametrize("change", ["overlap", "missing", "beyond"])
def test_classes_that_are_not_the_lesions_in_parts_are_refused(
    study: Series, tmp_path: Path, change: str
) -> None:
    mask = blob(study)
    classes = parted(mask)
    if change == "overlap":
        classes["ground_glass"] |= mask
    elif change == "missing":
        classes["ground_glass"][3] = False
    else:
        classes["ground_glass"][20, 0, 0] = True
    with pytest.raises(ValueError, match="disjoint parts"):
        lesions(study, mask, tmp_path, classes=classes)


def halves(study: Series) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    left, right = np.zeros((2, 24, 64, 64), bool)
    left[2:20, 20:40, 36:60] = True
    right[4:22, 22:44, 5:30] = True
    return left, right


def test_lungs_are_two_segments_with_their_side(study: Series, tmp_path: Path) -> None:
    left, right = halves(study)
    dataset = dcmread(seg.write_lungs(study, left, right, positive(study), INFO, tmp_path, now=NOW).path)
    sides = {
        item.SegmentedPropertyTypeCodeSequence[0]
        .SegmentedPropertyTypeModifierCodeSequence[0]
        .CodeMeaning: item.SegmentNumber
        for item in dataset.SegmentSequence
    }
    assert set(sides) == {"Left", "Right"}
    assert np.array_equal(read_back(dataset, study, sides["Left"]), left)
    assert np.array_equal(read_back(dataset, study, sides["Right"]), right)


def test_a_missing_lung_has_no_segment(study: Series, tmp_path: Path) -> None:
    left, right = halves(study)
    nothing = np.zeros_like(right)
    dataset = dcmread(seg.write_lungs(study, left, nothing, positive(study), INFO, tmp_path, now=NOW).path)
    assert [item.SegmentLabel for item in dataset.SegmentSequence] == ["Left lung"]
    assert np.array_equal(read_back(dataset, study), left)


def test_nothing_to_segment_is_refused(study: Series, tmp_path: Path) -> None:
    nothing = np.zeros((24, 64, 64), bool)
    with pytest.raises(ValueError, match="empty"):
        lesions(study, nothing, tmp_path)
    with pytest.raises(ValueError, match="empty"):
        seg.write_lungs(study, nothing, nothing, positive(study), INFO, tmp_path, now=NOW)
    with pytest.raises(ValueError, match="23 mask slices for 24 images"):
        lesions(study, ~nothing[1:], tmp_path)
    with pytest.raises(ValueError, match="overlap"):
        seg.write_lungs(study, ~nothing, ~nothing, positive(study), INFO, tmp_path, now=NOW)
    assert list(tmp_path.iterdir()) == []


def test_says_what_made_it(study: Series, tmp_path: Path) -> None:
    dataset = lesions(study, blob(study), tmp_path)
    source = dcmread(study.instances[0].path)
    (segment,) = dataset.SegmentSequence
    algorithm = segment.SegmentationAlgorithmIdentificationSequence[0]
    assert segment.SegmentAlgorithmType == "AUTOMATIC"
    assert (algorithm.AlgorithmName, algorithm.AlgorithmVersion) == ("multitask", "3f2a9c01")
    assert algorithm.AlgorithmFamilyCodeSequence[0].CodeValue == "123110"
    assert segment.SegmentedPropertyTypeCodeSequence[0].CodeMeaning == "Lesion"
    assert (dataset.Manufacturer, dataset.ManufacturerModelName) == ("triage", "triage multitask")
    assert "InstitutionName" not in dataset
    assert "not a medical device" in dataset.ContentDescription
    assert dataset.PatientName == source.PatientName
    assert dataset.FrameOfReferenceUID == source.FrameOfReferenceUID
    assert dataset.StudyInstanceUID == source.StudyInstanceUID
    assert dataset.SeriesInstanceUID != source.SeriesInstanceUID
    local = NOW.astimezone()
    assert (dataset.ContentDate, dataset.ContentTime[:6]) == (f"{local:%Y%m%d}", f"{local:%H%M%S}")
    assert dataset.InstanceCreationDate == dataset.ContentDate


def test_same_content_same_uids(study: Series, tmp_path: Path) -> None:
    def uids(key: str) -> tuple[str, str, str]:
        result = positive(study, content_key=key)
        path = seg.write_lesions(study, blob(study), result, INFO, tmp_path, now=NOW).path
        dataset = dcmread(path)
        return dataset.SOPInstanceUID, dataset.SeriesInstanceUID, dataset.SegmentSequence[0].TrackingUID

    assert uids("key") == uids("key")
    assert len({*uids("key"), *uids("another key")}) == 6


def test_a_full_disk_can_be_tried_again(study: Series, tmp_path: Path) -> None:
    with pytest.raises(Retryable, match=r"cannot write lesion_seg\.dcm"):
        lesions(study, blob(study), tmp_path / "no such folder")


def test_a_lost_source_can_be_tried_again(tmp_path: Path) -> None:
    series = small_study(tmp_path / "source")
    series.instances[0].path.unlink()
    with pytest.raises(Retryable, match="cannot read"):
        lesions(series, blob(series), tmp_path)


BROKEN = {
    "PatientSex": "Y",
    "PatientBirthDate": "19509999",
    "PatientAge": "60",
    "PatientWeight": "0",
    "StudyTime": "9999",
    "ClinicalTrialSponsorName": "sponsor",
    "ClinicalTrialProtocolID": "protocol",
    "ClinicalTrialSubjectID": "",
}


@needs_dicom3tools
@pytest.mark.filterwarnings("ignore:Invalid value for VR")
def test_broken_attributes_are_not_handed_on(study: Series, tmp_path: Path) -> None:
    broken = changed(study, tmp_path / "broken", **BROKEN)
    dataset = lesions(broken, blob(broken), tmp_path)
    assert errors(tmp_path / "lesion_seg.dcm") == []
    assert not any(dataset.get(keyword) for keyword in BROKEN)
    assert dataset.PatientID == study.instances[0].patient_id


@pytest.mark.parametrize("name", ["Bono", "M\xfcller^J\xfcrgen", ""])
@pytest.mark.parametrize("character_set", ["ISO_IR 100", "ISO_IR 192"])
def test_names_are_never_altered(study: Series, name: str, character_set: str, tmp_path: Path) -> None:
    """One component or an empty name, and the bytes in the source's own character set."""
    named = changed(study, tmp_path / "named", SpecificCharacterSet=character_set, PatientName=name)
    written = lesions(named, blob(named), tmp_path)
    source = dcmread(named.instances[0].path)
    assert written.PatientName == source.PatientName == name
    assert written.SpecificCharacterSet == character_set


@needs_dicom3tools
def test_a_source_without_frame_of_reference(study: Series, tmp_path: Path) -> None:
    lost = changed(study, tmp_path / "lost", FrameOfReferenceUID=None)
    assert lesions(lost, blob(lost), tmp_path).FrameOfReferenceUID.startswith("2.25.")
    assert errors(tmp_path / "lesion_seg.dcm") == []


@needs_data
@needs_dicom3tools
def test_real_broken_attributes_are_not_handed_on(tmp_path: Path) -> None:
    """ACRIN: an empty ClinicalTrialSubjectID; its series has a hole, so a part of it is taken here."""
    found, _ = find_instances([DATA / "dicom" / "acrin_013_gap"])
    below = sorted(found, key=lambda i: i.image_position_patient or ())[:25]
    series = choose(below, Assemble(minimum_coverage_mm=50))
    dataset = lesions(series, blob(series), tmp_path)
    assert errors(tmp_path / "lesion_seg.dcm") == []
    assert not [
        e.keyword for e in dataset if e.keyword.startswith("ClinicalTrial") and "Time" not in e.keyword
    ]
