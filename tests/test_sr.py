"""The report: valid, readable by three independent readers, and never saying more than was found."""

import re
import subprocess
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from highdicom.sr import (
    ImageContentItem,
    Measurement,
    MeasurementReport,
    MeasurementsAndQualitativeEvaluations,
    RelationshipTypeValues,
    VolumetricROIMeasurementsAndQualitativeEvaluations,
    srread,
)
from highdicom.sr.utils import collect_evidence
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.sr.coding import Code

from tests.needs import needs_dcmtk, needs_dicom3tools
from tests.results import (
    CLEAR,
    INFO,
    NOW,
    SEVERE,
    SOURCES,
    blob,
    errors,
    negative,
    parted,
    positive,
    small_study,
    source_series,
)
from triage.dicom import codes, pictures, seg, source, sr
from triage.domain import LUNG_REGIONS, Grade, Result, ResultObject, Series, Severity, Status

PARAMETERS = {"lesion threshold": 0.5, "positive probability": 0.5}
DISEASES = {"840539006", "233604007", "840544004", "882784691000119100"}
"""COVID-19, pneumonia, suspected COVID-19, pneumonia caused by SARS-CoV-2."""


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Series:
    return small_study(tmp_path_factory.mktemp("study"))


@pytest.fixture
def lesion_seg(study: Series, tmp_path: Path) -> ResultObject:
    return seg.write_lesions(study, blob(study), positive(study), INFO, tmp_path, now=NOW)


def report(
    study: Series, result: Result, severity: Severity, folder: Path, **how: object
) -> MeasurementReport:
    written = sr.write(study, result, severity, INFO, PARAMETERS, folder, now=NOW, **how)
    return srread(written.path).content


def study_group(content: MeasurementReport) -> MeasurementsAndQualitativeEvaluations:
    group, *_ = content.get_image_measurement_groups()
    return group


def items(dataset: Dataset) -> list[Dataset]:
    """All content items below one, depth first."""
    return [each for item in dataset.get("ContentSequence", []) for each in (item, *items(item))]


def images(folder: Path, name: str) -> list[Dataset]:
    """The images of this name that the report in the folder refers to."""
    found = [item for item in items(dcmread(folder / "sr.dcm")) if item.ValueType == "IMAGE"]
    return [image for image in found if image.ConceptNameCodeSequence[0].CodeMeaning == name]


def referenced(found: list[Dataset]) -> list[str]:
    return [image.ReferencedSOPSequence[0].ReferencedSOPInstanceUID for image in found]


def answers(group: MeasurementsAndQualitativeEvaluations) -> dict[str, str]:
    told = {e.name.meaning: e.value.meaning for e in group.get_qualitative_evaluations()}
    assert told.pop("Algorithm Family") == "Artificial Intelligence"
    return told


def affected(group: MeasurementsAndQualitativeEvaluations) -> dict[str, float]:
    """Percentages by side; "worse" is the larger of both, "whole" that of lungs that were not told apart."""

    def side(measurement: Measurement) -> str:
        laterality = measurement.finding_sites[0].laterality
        return laterality.meaning if laterality else "worse" if measurement.derivation else "whole"

    return {side(m): m.value for m in group.get_measurements(codes.AFFECTED)}


@needs_dicom3tools
@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("sop_class", sorted(sr.SOP_CLASSES))
def test_reports_are_valid(name: str, sop_class: sr.SopClass, tmp_path: Path) -> None:
    series = source_series(name, tmp_path)
    result = positive(series)
    lesions = seg.write_lesions(series, blob(series), result, INFO, tmp_path, now=NOW)
    for answer, severity, segment in ((result, SEVERE, [lesions]), (negative(series), CLEAR, [])):
        written = sr.write(
            series,
            answer,
            severity,
            INFO,
            PARAMETERS,
            tmp_path,
            now=NOW,
            sop_class=sop_class,
            segmentations=segment,
        )
        assert errors(written.path) == []
        assert dcmread(written.path).SOPClassUID == written.sop_class_uid


@needs_dcmtk
@needs_dicom3tools
def test_other_readers_show_the_figures(study: Series, lesion_seg: ResultObject, tmp_path: Path) -> None:
    written = sr.write(
        study, positive(study), SEVERE, INFO, PARAMETERS, tmp_path, now=NOW, segmentations=[lesion_seg]
    )
    figures = (
        "0.97", "not calibrated", "62.0", "41.0", "4100.2", "2200.4", "CT-3", "Severe", "Positive",
        "Pneumonia", "cannot tell COVID-19", "ACR Category 1", "with findings", "multitask", "3f2a9c01",
        "lesion threshold = 0.5", "CT severity score, left lung", "Lower posterior lateral",
        "Positive: right lung 62 % affected, P 0.97", "not a medical device",
    )  # fmt: skip
    for command in (["dsrdump", "+Pl", written.path], ["dcsrdump", written.path]):
        told = subprocess.run(command, capture_output=True, text=True, check=True)
        text = told.stdout + told.stderr
        assert [figure for figure in figures if figure not in text] == [], command
    header = subprocess.run(["dsrdump", written.path], capture_output=True, text=True, check=True).stdout
    assert "UNVERIFIED" in header
    assert "COMPLETE" in header


def test_positive_reads_back(study: Series, lesion_seg: ResultObject, tmp_path: Path) -> None:
    content = report(study, positive(study), SEVERE, tmp_path, segmentations=[lesion_seg])
    group = study_group(content)
    (probability,) = group.get_measurements(codes.PROBABILITY)
    (volume,) = group.get_measurements(codes.VOLUME)
    assert (probability.value, probability.unit) == (0.97, codes.NO_UNITS)
    assert probability.method.meaning == "Network output, not calibrated"
    assert affected(group) == {"worse": 62.0, "Left": 41.0, "Right": 62.0}
    (slice_mean,) = group.get_measurements(codes.SLICE_MEAN)
    assert (slice_mean.value, slice_mean.unit) == (47.3, codes.PERCENT)
    (score,) = group.get_measurements(codes.CT_SEVERITY_SCORE)
    assert (score.value, score.unit) == (25, codes.NO_UNITS)
    assert (volume.value, volume.unit) == (4100.2, codes.MILLILITRE)
    assert group.finding_type == codes.PNEUMONIA
    assert answers(group) == {
        "Triage result": "Positive",
        "CAD Processing and Findings Summary": "All algorithms succeeded; with findings",
        "CT grade by affected lung fraction": "CT-3: 50 to 75 % affected",
        "Severity": "Severe",
        "Actionable finding classification": "ACR Category 1 Actionable Finding",
    }


def test_lesion_segment_is_measured(study: Series, lesion_seg: ResultObject, tmp_path: Path) -> None:
    content = report(study, positive(study), SEVERE, tmp_path, segmentations=[lesion_seg])
    (group,) = content.get_volumetric_roi_measurement_groups()
    assert isinstance(group, VolumetricROIMeasurementsAndQualitativeEvaluations)
    (volume,) = group.get_measurements(codes.VOLUME)
    voxels = np.count_nonzero(blob(study))
    assert volume.value == pytest.approx(voxels * np.prod(study.spacing) / 1000, abs=0.05)
    assert volume.method == codes.BY_VOXELS
    segment = dcmread(lesion_seg.path).SegmentSequence[0]
    assert group.tracking_uid == segment.TrackingUID
    (image,) = images(tmp_path, "Referenced Segment")
    assert image.ReferencedSOPSequence[0].ReferencedSOPInstanceUID == lesion_seg.sop_instance_uid
    assert image.ReferencedSOPSequence[0].ReferencedSegmentNumber == 1
    assert "ReferencedFrameNumber" not in image.ReferencedSOPSequence[0]


@needs_dicom3tools
@pytest.mark.parametrize("sop_class", sorted(sr.SOP_CLASSES))
def test_each_kind_of_lesion_is_measured(study: Series, tmp_path: Path, sop_class: sr.SopClass) -> None:
    mask, result = blob(study), positive(study)
    lesions = seg.write_lesions(study, mask, result, INFO, tmp_path, now=NOW, classes=parted(mask))
    parts = replace(SEVERE, ground_glass_ml=1700.2, consolidation_ml=500.2)
    content = report(study, result, parts, tmp_path, segmentations=[lesions], sop_class=sop_class)
    groups = content.get_volumetric_roi_measurement_groups()
    told = {g.finding_type: g.get_measurements(codes.VOLUME)[0].value for g in groups}
    glass, solid = (np.count_nonzero(part) * np.prod(study.spacing) / 1000 for part in parted(mask).values())
    assert told == {
        codes.GROUND_GLASS: pytest.approx(glass, abs=0.05),
        codes.CONSOLIDATION: pytest.approx(solid, abs=0.05),
    }
    segments = dcmread(lesions.path).SegmentSequence
    assert [g.tracking_uid for g in groups] == [segment.TrackingUID for segment in segments]
    numbers = [
        image.ReferencedSOPSequence[0].ReferencedSegmentNumber
        for image in images(tmp_path, "Referenced Segment")
    ]
    assert numbers == [segment.SegmentNumber for segment in segments]
    (whole,) = study_group(content).get_measurements(codes.LESION_VOLUME)
    assert whole.value == 2200.4
    assert errors(tmp_path / "sr.dcm") == []


def test_what_a_network_did_not_find_of_both_kinds_is_no_group(study: Series, tmp_path: Path) -> None:
    mask, result = blob(study), positive(study)
    classes = {"ground_glass": np.zeros_like(mask), "consolidation": mask}
    lesions = seg.write_lesions(study, mask, result, INFO, tmp_path, now=NOW, classes=classes)
    parts = replace(SEVERE, ground_glass_ml=0.0, consolidation_ml=2200.4)
    content = report(study, result, parts, tmp_path, segmentations=[lesions])
    (group,) = content.get_volumetric_roi_measurement_groups()
    assert group.finding_type == codes.CONSOLIDATION
    (image,) = images(tmp_path, "Referenced Segment")
    assert image.ReferencedSOPSequence[0].ReferencedSegmentNumber == 1


def test_regions_of_either_lung_are_scored(study: Series, tmp_path: Path) -> None:
    content = report(study, positive(study), SEVERE, tmp_path)
    (total,) = study_group(content).get_measurements(codes.CT_SEVERITY_SCORE)
    _, *lungs = content.get_image_measurement_groups()
    told = {group.tracking_identifier: group.get_measurements(codes.REGION_SCORE) for group in lungs}
    assert list(told) == ["CT severity score, right lung", "CT severity score, left lung"]
    score = SEVERE.ct_severity_score
    assert score is not None
    for name, values in (("Right", score.right), ("Left", score.left)):
        scored = told[f"CT severity score, {name.lower()} lung"]
        sites = [measurement.finding_sites[0] for measurement in scored]
        assert {site.laterality.meaning for site in sites} == {name}
        assert [site.topographical_modifier.meaning.lower() for site in sites] == list(LUNG_REGIONS)
        assert [measurement.value for measurement in scored] == list(values)
        assert {measurement.method for measurement in scored} == {codes.BY_SHAPE}
    assert sum(m.value for scored in told.values() for m in scored) == total.value == 25


def test_evidence_names_every_slice_and_the_segmentation(
    study: Series, lesion_seg: ResultObject, tmp_path: Path
) -> None:
    written = sr.write(
        study, positive(study), SEVERE, INFO, {}, tmp_path, now=NOW, segmentations=[lesion_seg]
    )
    evidence = {(series, instance) for _, series, instance, _ in srread(written.path).get_evidence()}
    slices = {(i.series_instance_uid, i.sop_instance_uid) for i in study.instances}
    segmentation = dcmread(lesion_seg.path)
    assert evidence == {*slices, (segmentation.SeriesInstanceUID, segmentation.SOPInstanceUID)}


def test_names_what_was_judged_and_shows_what_was_drawn(study: Series, tmp_path: Path) -> None:
    result = positive(study)
    picture = pictures.write_secondary_capture(
        np.zeros((8, 8, 3), np.uint8), study, result, INFO, tmp_path, now=NOW
    )
    report(study, result, SEVERE, tmp_path, pictures=[picture])
    assert referenced(images(tmp_path, "Source")) == [i.sop_instance_uid for i in study.instances]
    assert referenced(images(tmp_path, "Best illustration of finding")) == [picture.sop_instance_uid]
    told = {(uid, class_uid) for _, _, uid, class_uid in srread(tmp_path / "sr.dcm").get_evidence()}
    assert (picture.sop_instance_uid, picture.sop_class_uid) in told
    current = dcmread(tmp_path / "sr.dcm").CurrentRequestedProcedureEvidenceSequence
    assert sum(len(s.ReferencedSOPSequence) for s in current[0].ReferencedSeriesSequence) == 25


def test_repeats_what_highdicom_makes_of_each_image(study: Series, tmp_path: Path) -> None:
    """Image library and evidence, element by element."""
    report(study, positive(study), SEVERE, tmp_path)
    ours = dcmread(tmp_path / "sr.dcm")
    slices = [source.slice_of(study, one, "1.2") for one in study.instances]
    (library,) = [
        item for item in ours.ContentSequence if item.ConceptNameCodeSequence[0].CodeValue == "111028"
    ]
    contains = RelationshipTypeValues.CONTAINS
    assert list(library.ContentSequence[0].ContentSequence) == [
        ImageContentItem(codes.SOURCE, one.SOPClassUID, one.SOPInstanceUID, relationship_type=contains)
        for one in slices
    ]
    same, other = collect_evidence(slices, ours, study.study_instance_uid)
    assert (list(ours.CurrentRequestedProcedureEvidenceSequence), []) == (same, other)


def test_either_lung_is_measured_where_it_is_segmented(study: Series, tmp_path: Path) -> None:
    left, right = np.zeros((2, 24, 64, 64), bool)
    left[2:20, 20:40, 36:60] = True
    right[4:22, 22:44, 5:30] = True
    lungs = seg.write_lungs(study, left, right, positive(study), INFO, tmp_path, now=NOW)
    content = report(study, positive(study), SEVERE, tmp_path, segmentations=[lungs])
    groups = content.get_volumetric_roi_measurement_groups()
    told = {g.finding_sites[0].laterality.meaning: g.get_measurements(codes.VOLUME)[0].value for g in groups}
    ml = np.prod(study.spacing) / 1000
    assert told == {
        "Right": pytest.approx(np.count_nonzero(right) * ml, abs=0.05),
        "Left": pytest.approx(np.count_nonzero(left) * ml, abs=0.05),
    }
    assert {group.finding_type for group in groups} == {codes.LUNG}


def test_every_figure_says_how_it_was_made(study: Series, lesion_seg: ResultObject, tmp_path: Path) -> None:
    report(study, positive(study), SEVERE, tmp_path, segmentations=[lesion_seg])
    figures = [item for item in items(dcmread(tmp_path / "sr.dcm")) if item.ValueType == "NUM"]
    assert len(figures) == 9 + 20
    for figure in figures:
        assert (
            figure.MeasuredValueSequence[0].MeasurementUnitsCodeSequence[0].CodingSchemeDesignator == "UCUM"
        )
        how = {item.ConceptNameCodeSequence[0].CodeMeaning for item in figure.ContentSequence}
        assert "Measurement Method" in how, figure.ConceptNameCodeSequence[0].CodeMeaning


UNJUDGED = {
    Status.NOT_ANALYSABLE: "Not analysable: missing slices: 35 mm hole between slices 20 and 27",
    Status.FAILED: "Failed: missing slices: 35 mm hole between slices 20 and 27",
}


def unjudged(study: Series, status: Status, **changes: object) -> Result:
    return Result(
        **{
            "study_instance_uid": study.study_instance_uid,
            "patient_id": "p",
            "status": status,
            "reason": "missing slices: 35 mm hole between slices 20 and 27",
            "content_key": "key",
            **changes,
        }
    )


@needs_dicom3tools
@needs_dcmtk
@pytest.mark.parametrize("status", list(UNJUDGED))
@pytest.mark.parametrize("sop_class", sorted(sr.SOP_CLASSES))
def test_a_study_that_was_not_judged_has_a_report_without_figures(
    study: Series, status: Status, sop_class: sr.SopClass, tmp_path: Path
) -> None:
    result = unjudged(study, status)
    written = sr.write_unjudged(study.instances, result, tmp_path, now=NOW, sop_class=sop_class)
    assert errors(written.path) == []
    dataset = dcmread(written.path)
    assert [item for item in items(dataset) if item.ValueType == "NUM"] == []
    group = study_group(srread(written.path).content)
    told = {e.name.meaning: e.value.meaning for e in group.get_qualitative_evaluations()}
    answer = {Status.NOT_ANALYSABLE: "Not analysable", Status.FAILED: "Failed, given up"}[status]
    assert told["Triage result"] == answer
    assert told["CAD Processing and Findings Summary"] == "No algorithms succeeded; without findings"
    assert group.finding_type is None
    assert dataset.ManufacturerModelName == "triage"
    assert dataset.PatientName == dcmread(study.instances[0].path).PatientName
    assert referenced(images(tmp_path, "Source")) == [i.sop_instance_uid for i in study.instances]
    dumped = subprocess.run(
        ["dsrdump", "+Pl", written.path], capture_output=True, text=True, check=True
    ).stdout
    assert UNJUDGED[status] in dumped
    assert sr.CAUSE_UNKNOWN not in dumped


@needs_dicom3tools
def test_a_study_without_ct_images_is_reported_without_a_library(study: Series, tmp_path: Path) -> None:
    other = replace(study.instances[0], sop_class_uid="1.2.840.10008.5.1.4.1.1.88.67", modality="SR")
    written = sr.write_unjudged([other], unjudged(study, Status.NOT_ANALYSABLE), tmp_path, now=NOW)
    assert errors(written.path) == []
    assert images(tmp_path, "Source") == []
    assert [uid for _, _, uid, _ in srread(written.path).get_evidence()] == [other.sop_instance_uid]


def test_a_judged_study_is_never_reported_as_not_judged(study: Series, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="was judged"):
        sr.write_unjudged(study.instances, positive(study), tmp_path, now=NOW)


def test_negative_names_no_disease(study: Series, tmp_path: Path) -> None:
    content = report(study, negative(study), CLEAR, tmp_path)
    dataset = dcmread(tmp_path / "sr.dcm")
    named = {
        code.get("CodeValue") or code.get("LongCodeValue")
        for item in items(dataset)
        for code in (*item.get("ConceptCodeSequence", []), *item.get("ConceptNameCodeSequence", []))
    }
    assert not named & DISEASES
    assert study_group(content).finding_type is None
    assert answers(study_group(content)) == {
        "Triage result": "Negative",
        "CAD Processing and Findings Summary": "All algorithms succeeded; without findings",
        "CT grade by affected lung fraction": "CT-0: none or hardly any affected",
    }
    assert affected(study_group(content)) == {"worse": 0, "Left": 0, "Right": 0}
    assert content.get_volumetric_roi_measurement_groups() == []


def test_a_score_is_never_called_a_probability(study: Series, tmp_path: Path) -> None:
    group = study_group(report(study, positive(study, probability_kind="score"), SEVERE, tmp_path))
    (score,) = group.get_measurements(codes.SCORE)
    assert (score.value, score.method.meaning) == (0.97, "Documented monotone rule, not calibrated")
    assert group.get_measurements(codes.PROBABILITY) == []


def test_calibration_is_told(study: Series, tmp_path: Path) -> None:
    group = study_group(report(study, positive(study, calibrated=True), SEVERE, tmp_path))
    (probability,) = group.get_measurements(codes.PROBABILITY)
    assert probability.method.meaning == "Network output, calibrated"


def test_unknown_is_not_zero(study: Series, tmp_path: Path) -> None:
    """A network that only classifies: no percentage, no grade, no severity, no lesion volume."""
    unknown = Severity(None, None, None, None, 4100.2, None)
    group = study_group(report(study, positive(study), unknown, tmp_path))
    assert affected(group) == {}
    assert group.get_measurements(codes.SLICE_MEAN) == group.get_measurements(codes.CT_SEVERITY_SCORE) == []
    assert group.get_measurements(codes.LESION_VOLUME) == []
    assert set(answers(group)) == {
        "Triage result",
        "CAD Processing and Findings Summary",
        "Actionable finding classification",
    }


def test_one_lung_has_no_side_and_no_maximum(study: Series, tmp_path: Path) -> None:
    one = replace(SEVERE, affected_left=None, affected_right=None)
    result = positive(study, notes=("one lung only",))
    assert affected(study_group(report(study, result, one, tmp_path))) == {"whole": 62.0}
    texts = [item.TextValue for item in items(dcmread(tmp_path / "sr.dcm")) if "TextValue" in item]
    assert "one lung only" in texts


def test_notes_and_sentence_are_told_in_ascii(study: Series, tmp_path: Path) -> None:
    result = positive(study, reason="left 3 – 4 % affected …", notes=("spacing ≤ 5 mm", "naïve"))
    report(study, result, replace(SEVERE, ct_severity_score=None), tmp_path)
    texts = [item.TextValue for item in items(dcmread(tmp_path / "sr.dcm")) if "TextValue" in item]
    assert texts[-5:] == [
        "Positive: left 3 - 4 % affected ...",
        "spacing <= 5 mm",
        "na?ve",
        sr.CAUSE_UNKNOWN,
        "Research use, not a medical device. The study must be read whatever this report says.",
    ]


@settings(max_examples=25)
@given(
    st.sampled_from(
        list(product((Status.POSITIVE, Status.NEGATIVE), ("classifier", "score"), (True, False)))
    ),
    st.floats(0, 1),
    st.floats(0, 1),
    st.floats(0, 1),
    st.sampled_from(Grade),
)
def test_every_figure_reads_back(
    study: Series,
    tmp_path_factory: pytest.TempPathFactory,
    kind: tuple[Status, str, bool],
    probability: float,
    left: float,
    right: float,
    grade: Grade,
) -> None:
    status, probability_kind, calibrated = kind
    result = positive(
        study,
        status=status,
        probability=probability,
        probability_kind=probability_kind,
        calibrated=calibrated,
    )
    severity = Severity(max(left, right), left, right, grade, 5000.0, 0.0)
    group = study_group(report(study, result, severity, tmp_path_factory.getbasetemp()))
    (certainty,) = group.get_measurements(codes.SCORE if probability_kind == "score" else codes.PROBABILITY)
    assert certainty.value == pytest.approx(probability, abs=5e-5)
    assert certainty.method.meaning.endswith(", calibrated") is calibrated
    told_percent = affected(group)
    for name, fraction in {"worse": max(left, right), "Left": left, "Right": right}.items():
        assert 0 <= 100 * fraction - told_percent[name] + 1e-4 < 0.1 + 2e-4  # rounded down, never up
    told = answers(group)
    assert told["Triage result"].upper() == status.name
    assert told["CT grade by affected lung fraction"].startswith(grade.value)
    assert ("Severity" in told) is (status is Status.POSITIVE and grade is not Grade.CT0)


def test_says_by_what_it_grades(study: Series, tmp_path: Path) -> None:
    by_slices = replace(SEVERE, grade=Grade.CT2, grade_from="percent_infection")
    told = answers(study_group(report(study, positive(study), by_slices, tmp_path)))
    assert told["CT grade by percentage of infection"] == "CT-2: 25 to 50 % affected"
    assert "CT grade by affected lung fraction" not in told


def test_names_the_report_it_replaces(study: Series, tmp_path: Path) -> None:
    first = sr.write(study, positive(study), SEVERE, INFO, {}, tmp_path, now=NOW)
    (tmp_path / "second").mkdir()
    second = sr.write(
        study,
        positive(study, content_key="more slices", revision=2, supersedes=first.sop_instance_uid),
        SEVERE,
        INFO,
        {},
        tmp_path / "second",
        now=NOW,
        predecessor=first.path,
    )
    earlier, later = dcmread(first.path), dcmread(second.path)
    (predecessor,) = later.PredecessorDocumentsSequence
    (in_series,) = predecessor.ReferencedSeriesSequence
    assert predecessor.StudyInstanceUID == earlier.StudyInstanceUID
    assert in_series.SeriesInstanceUID == earlier.SeriesInstanceUID
    assert in_series.ReferencedSOPSequence[0].ReferencedSOPInstanceUID == earlier.SOPInstanceUID
    assert later.SOPInstanceUID != earlier.SOPInstanceUID
    assert "PredecessorDocumentsSequence" not in earlier


def test_a_report_replaces_only_the_one_it_names(study: Series, tmp_path: Path) -> None:
    first = sr.write(study, positive(study), SEVERE, INFO, {}, tmp_path, now=NOW)
    other = positive(study, content_key="more slices", supersedes="2.25.1")
    with pytest.raises(ValueError, match=r"not the superseded report 2\.25\.1"):
        sr.write(study, other, SEVERE, INFO, {}, tmp_path, now=NOW, predecessor=first.path)


@pytest.mark.parametrize("status", [Status.NOT_ANALYSABLE, Status.FAILED])
def test_no_figures_without_an_answer(study: Series, status: Status, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no figures"):
        sr.write(study, positive(study, status=status), SEVERE, INFO, {}, tmp_path, now=NOW)
    assert list(tmp_path.iterdir()) == []


def test_same_content_same_uids(study: Series, tmp_path: Path) -> None:
    def uids(key: str) -> tuple[str, str]:
        dataset = dcmread(
            sr.write(study, positive(study, content_key=key), SEVERE, INFO, {}, tmp_path, now=NOW).path
        )
        return dataset.SOPInstanceUID, dataset.SeriesInstanceUID

    assert uids("key") == uids("key")
    assert len({*uids("key"), *uids("another")}) == 4


def test_no_code_of_ours_is_too_long_for_old_readers() -> None:
    ours = [code for code in private_codes() if len(code.value) > 16 or len(code.meaning) > 64]
    assert ours == []


def test_every_private_code_is_documented() -> None:
    page = Path(__file__).parents[1] / "deploy" / "objects.md"
    table = page.read_text(encoding="utf-8").partition("## Private codes")[2]
    rows = re.findall(r"^\| `(.+?)` \| .+ \| .+ \|$", table, re.M)
    assert sorted(rows) == sorted(code.value for code in private_codes())


def private_codes() -> set[Code]:
    """Every code of the private scheme that ``codes`` names, however deep."""

    def within(value: object) -> list[Code]:
        if isinstance(value, Code):
            return [value] if value.scheme_designator == codes.PRIVATE else []
        inside = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else ()
        return [code for each in inside for code in within(each)]

    return {code for value in vars(codes).values() for code in within(value)}


def test_private_codes_say_whose_they_are(study: Series, tmp_path: Path) -> None:
    report(study, positive(study), SEVERE, tmp_path)
    schemes = dcmread(tmp_path / "sr.dcm").CodingSchemeIdentificationSequence
    assert "99TRIAGE" in {scheme.CodingSchemeDesignator for scheme in schemes}
