"""The answer as a structured report: TID 1500 Measurement Report (PS3.16), unverified.

The image library (TID 1600) names the images judged. The study-level group (TID 1501) says positive or
negative, with what certainty, how much of each lung is affected and by which network, and shows our
pictures; one for each lung scores its regions; then a group for each segment of the lesions and of the
lungs (TID 1411), if there are any, measures it. A study that was not judged has a report of its own kind:
not analysable or failed, why, and no figure. Nothing here depends on how a worklist is ordered.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Literal

from highdicom.sr import (
    AlgorithmIdentification,
    Comprehensive3DSR,
    ComprehensiveSR,
    ContainerContentItem,
    ContentSequence,
    DeviceObserverIdentifyingAttributes,
    EnhancedSR,
    FindingSite,
    ImageContentItem,
    Measurement,
    MeasurementReport,
    MeasurementsAndQualitativeEvaluations,
    ObservationContext,
    ObserverContext,
    QualitativeEvaluation,
    ReferencedSegment,
    RelationshipTypeValues,
    SourceSeriesForSegmentation,
    TextContentItem,
    TrackingIdentifier,
    VolumetricROIMeasurementsAndQualitativeEvaluations,
)
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes as standard_codes
from pydicom.sr.coding import Code

from triage import __version__
from triage.dicom import codes, objects, seg, source, stamp
from triage.dicom.header import parse, read_bytes, split
from triage.dicom.series import CT_IMAGE, MULTI_FRAME_CT
from triage.dicom.uids import derive
from triage.domain import (
    JUDGED,
    Instance,
    ModelInfo,
    Result,
    ResultKind,
    ResultObject,
    Series,
    Severity,
    Status,
    tenths_of_percent,
)

SopClass = Literal["comprehensive_3d", "comprehensive", "enhanced"]
SOP_CLASSES = {
    "comprehensive_3d": Comprehensive3DSR,
    "comprehensive": ComprehensiveSR,
    "enhanced": EnhancedSR,
}
PREDECESSOR = ("StudyInstanceUID", "SeriesInstanceUID", "SOPClassUID", "SOPInstanceUID")
CAUSE_UNKNOWN = "The network cannot tell COVID-19 from other causes of the same findings."
MUST_READ = f"{objects.DISCLAIMER}. The study must be read whatever this report says."


Group = MeasurementsAndQualitativeEvaluations | VolumetricROIMeasurementsAndQualitativeEvaluations


def write(
    series: Series,
    result: Result,
    severity: Severity,
    info: ModelInfo,
    parameters: Mapping[str, str | float],
    folder: Path,
    *,
    now: datetime,
    sop_class: SopClass = "comprehensive_3d",
    segmentations: Sequence[ResultObject] = (),
    pictures: Sequence[ResultObject] = (),
    predecessor: Path | None = None,
) -> ResultObject:
    """Write the report of a judged study.

    ``parameters`` are the settings that shaped the answer (thresholds); ``segmentations`` are the objects
    whose segments are measured, ``pictures`` those that show the finding; ``predecessor`` is the report that
    this revision replaces, the one ``result.supersedes`` names. Raises ValueError for an answer that is
    neither positive nor negative and for a wrong predecessor; Retryable when source or disk fail.
    """
    if result.status not in JUDGED:
        raise ValueError(f"a {result.status.value} study has no figures to report")
    algorithm = _algorithm(info, parameters)
    study = _study(result, _figures(result, severity), _evaluations(result, severity), algorithm)
    for picture in pictures:
        study[0].ContentSequence.append(_image(codes.ILLUSTRATION, picture))
    groups: list[Group] = [study, *_regions(result, severity, algorithm)]
    for segmentation in segmentations:
        groups += _segments(series, result, algorithm, segmentation)
    ours = [_evidence(written, result) for written in (*segmentations, *pictures)]
    return _write(
        series.instances, ours, groups, result, info, folder, now, SOP_CLASSES[sop_class], predecessor
    )


def write_unjudged(
    images: Sequence[Instance],
    result: Result,
    folder: Path,
    *,
    now: datetime,
    sop_class: SopClass = "comprehensive_3d",
    predecessor: Path | None = None,
) -> ResultObject:
    """Write that a study is not analysable, or failed, and why; ``images`` are those that were looked at.

    Raises ValueError for a study that was judged and for a wrong predecessor; Retryable when source or disk
    fail, Rejected when the first image is no longer DICOM.
    """
    if result.status in JUDGED:
        raise ValueError(f"a {result.status.value} study was judged")
    algorithm = AlgorithmIdentification(name=objects.MANUFACTURER, version=__version__)
    groups = [_study(result, (), _evaluations(result, None), algorithm)]
    return _write(images, [], groups, result, None, folder, now, SOP_CLASSES[sop_class], predecessor)


def _write(
    images: Sequence[Instance],
    ours: Sequence[Dataset],
    groups: Sequence[Group],
    result: Result,
    info: ModelInfo | None,
    folder: Path,
    now: datetime,
    sop_class: type[EnhancedSR | ComprehensiveSR | Comprehensive3DSR],
    predecessor: Path | None,
) -> ResultObject:
    """The libraries are shown one image of each series; all others are stamped after it."""
    received = source.of_instances(images)
    content = MeasurementReport(
        observation_context=_observer(info),
        procedure_reported=codes.CT_CHEST,
        imaging_measurements=groups,
    )
    encoded = []
    if judgeable := [image for image in images if image.sop_class_uid in (CT_IMAGE, *MULTI_FRAME_CT)]:
        library = _image_library(judgeable[0])
        parts = content[0].ContentSequence
        names = [item.ConceptNameCodeSequence[0].CodeValue for item in parts]
        parts.insert(names.index(codes.IMAGING_MEASUREMENTS.value), library)
        encoded.append(_repeated(library.ContentSequence[0], "ContentSequence", judgeable))
    report = sop_class(
        evidence=[*received.images, *ours],
        content=content,
        is_complete=True,
        previous_versions=_previous(result, predecessor),
        coding_schemes=[codes.private_scheme()],
        **objects.identity(ResultKind.SR, result, info, now),
    )
    (study,) = report.CurrentRequestedProcedureEvidenceSequence
    for item in study.ReferencedSeriesSequence:
        if of_it := [one for one in images if one.series_instance_uid == item.SeriesInstanceUID]:
            encoded.append(_repeated(item, "ReferencedSOPSequence", of_it))
    return objects.write(ResultKind.SR, report, received.patient, folder, now, encoded)


def _repeated(holder: Dataset, keyword: str, images: Iterable[Instance]) -> stamp.Encoded:
    """The sequence's first item for each of the images."""
    item = stamp.Stamp(holder[keyword].value[0], *stamp.REFERENCE)
    return stamp.Encoded(holder, keyword, b"".join(item(stamp.reference(image)) for image in images))


def _image_library(image: Instance) -> ContainerContentItem:
    """TID 1600, without what the images say of themselves: the report would be fifteen times larger."""
    library = ContainerContentItem(codes.IMAGE_LIBRARY, relationship_type=RelationshipTypeValues.CONTAINS)
    group = ContainerContentItem(codes.IMAGE_LIBRARY_GROUP, relationship_type=RelationshipTypeValues.CONTAINS)
    group.ContentSequence = ContentSequence([_image(codes.SOURCE, image)])
    library.ContentSequence = ContentSequence([group])
    return library


def _image(name: Code, image: Instance | ResultObject) -> ImageContentItem:
    return ImageContentItem(
        name, image.sop_class_uid, image.sop_instance_uid, relationship_type=RelationshipTypeValues.CONTAINS
    )


def _study(
    result: Result,
    figures: Iterable[Measurement],
    evaluations: Iterable[QualitativeEvaluation],
    algorithm: AlgorithmIdentification,
) -> MeasurementsAndQualitativeEvaluations:
    """TID 1501: the answer for the whole study. Only a positive answer names a finding.

    It is pneumonia, not COVID-19: the research weights have never seen another cause to tell it from.
    """
    group = MeasurementsAndQualitativeEvaluations(
        tracking_identifier=TrackingIdentifier(seg.tracking_uid("Study", result), "Study"),
        finding_type=codes.PNEUMONIA if result.status is Status.POSITIVE else None,
        finding_sites=[FindingSite(codes.LUNG)],
        algorithm_id=algorithm,
        measurements=list(figures) or None,
        qualitative_evaluations=list(evaluations),
    )
    for text in _comments(result):
        group[0].ContentSequence.append(
            TextContentItem(codes.COMMENT, objects.plain(text), RelationshipTypeValues.CONTAINS)
        )
    return group


def _figures(result: Result, severity: Severity) -> Iterator[Measurement]:
    if result.probability is not None and result.probability_kind is not None:
        yield Measurement(
            name=codes.SCORE if result.probability_kind == "score" else codes.PROBABILITY,
            value=round(result.probability, 4),
            unit=codes.NO_UNITS,
            method=codes.PROBABILITY_KINDS[result.probability_kind, result.calibrated],
        )
    both, left, right = (
        FindingSite(codes.LUNG),
        FindingSite(codes.LUNG, codes.LEFT),
        FindingSite(codes.LUNG, codes.RIGHT),
    )
    sides_known = severity.affected_left is not None and severity.affected_right is not None
    if severity.affected_fraction is not None:
        yield Measurement(
            name=codes.AFFECTED,
            value=tenths_of_percent(severity.affected_fraction),
            unit=codes.PERCENT,
            method=codes.BY_VOLUME,
            derivation=codes.MAXIMUM if sides_known else None,
            finding_sites=[both],
        )
    for site, fraction in ((left, severity.affected_left), (right, severity.affected_right)):
        if fraction is not None:
            yield Measurement(
                name=codes.AFFECTED,
                value=tenths_of_percent(fraction),
                unit=codes.PERCENT,
                method=codes.BY_VOLUME,
                finding_sites=[site],
            )
    if severity.percent_infection is not None:
        yield Measurement(
            name=codes.SLICE_MEAN,
            value=tenths_of_percent(severity.percent_infection),
            unit=codes.PERCENT,
            method=codes.BY_AREA,
            derivation=codes.MEAN,
            finding_sites=[both],
        )
    if severity.ct_severity_score is not None:
        yield Measurement(
            name=codes.CT_SEVERITY_SCORE,
            value=severity.ct_severity_score.total,
            unit=codes.NO_UNITS,
            method=codes.BY_SHAPE,
            derivation=codes.TOTAL,
            finding_sites=[both],
        )
    yield _volume(codes.VOLUME, severity.lung_volume_ml, both)
    if severity.lesion_volume_ml is not None:
        yield _volume(codes.LESION_VOLUME, severity.lesion_volume_ml, both)


def _volume(name: Code, volume_ml: float, site: FindingSite | None = None) -> Measurement:
    return Measurement(
        name=name,
        value=round(volume_ml, 1),
        unit=codes.MILLILITRE,
        method=codes.BY_VOXELS,
        finding_sites=[site] if site else None,
    )


def _evaluations(result: Result, severity: Severity | None) -> Iterator[QualitativeEvaluation]:
    yield QualitativeEvaluation(codes.ANSWER, codes.ANSWERS[result.status])
    yield QualitativeEvaluation(codes.CAD_SUMMARY, codes.CAD_SUMMARIES[result.status])
    if severity is None:
        return
    if severity.grade is not None:
        yield QualitativeEvaluation(codes.CT_GRADE[severity.grade_from], codes.CT_GRADES[severity.grade])
    if result.status is not Status.POSITIVE:
        return
    if severity.grade in codes.SEVERITIES:
        yield QualitativeEvaluation(codes.SEVERITY, codes.SEVERITIES[severity.grade])
    yield QualitativeEvaluation(codes.ACTIONABILITY, codes.ACTIONABILITIES[severity.grade])


def _comments(result: Result) -> Iterator[str]:
    yield f"{result.status.value.capitalize().replace('_', ' ')}: {result.reason}"
    yield from result.notes
    if result.status in JUDGED:
        yield CAUSE_UNKNOWN
    yield MUST_READ


def _regions(
    result: Result, severity: Severity, algorithm: AlgorithmIdentification
) -> Iterator[MeasurementsAndQualitativeEvaluations]:
    """TID 1501 for either lung: the CT severity score of each of its regions."""
    score = severity.ct_severity_score
    if score is None:
        return
    for side, name, values in ((codes.RIGHT, "right", score.right), (codes.LEFT, "left", score.left)):
        label = f"CT severity score, {name} lung"
        yield MeasurementsAndQualitativeEvaluations(
            tracking_identifier=TrackingIdentifier(seg.tracking_uid(label, result), label),
            finding_sites=[FindingSite(codes.LUNG, side)],
            algorithm_id=algorithm,
            measurements=[
                Measurement(
                    codes.REGION_SCORE,
                    value,
                    codes.NO_UNITS,
                    method=codes.BY_SHAPE,
                    finding_sites=[FindingSite(codes.LUNG, side, topographical_modifier=region)],
                )
                for region, value in zip(codes.REGIONS, values, strict=True)
            ],
        )


def _segments(
    series: Series, result: Result, algorithm: AlgorithmIdentification, segmentation: ResultObject
) -> Iterator[VolumetricROIMeasurementsAndQualitativeEvaluations]:
    """TID 1411 for each segment of an object, without frame numbers (both together are invalid)."""
    segments = zip(segmentation.segments, segmentation.volumes_ml, strict=True)
    for number, (label, volume_ml) in enumerate(segments, 1):
        kind, category, side = seg.MEANINGS[label]
        yield VolumetricROIMeasurementsAndQualitativeEvaluations(
            tracking_identifier=TrackingIdentifier(seg.tracking_uid(label, result), label),
            referenced_segment=ReferencedSegment(
                sop_class_uid=segmentation.sop_class_uid,
                sop_instance_uid=segmentation.sop_instance_uid,
                segment_number=number,
                source_series=SourceSeriesForSegmentation(series.series_instance_uid),
            ),
            finding_type=kind,
            finding_category=category,
            finding_sites=[FindingSite(codes.LUNG, side)],
            algorithm_id=algorithm,
            measurements=[_volume(codes.VOLUME, volume_ml)],
        )


def _algorithm(info: ModelInfo, parameters: Mapping[str, str | float]) -> AlgorithmIdentification:
    """TID 4019: name, version (hash of the weights) and every setting that shaped the answer."""
    return AlgorithmIdentification(
        name=objects.plain(info.name),
        version=objects.plain(info.version),
        parameters=[objects.plain(f"{name} = {value}") for name, value in parameters.items()],
        family=codes.ARTIFICIAL_INTELLIGENCE,
        manufacturer=objects.MANUFACTURER,
    )


def _observer(info: ModelInfo | None) -> ObservationContext:
    name, version = (info.name, info.version) if info else (objects.MANUFACTURER, __version__)
    model = f"{objects.MANUFACTURER} {__version__}" + (f", {name}" if info else "")
    device = DeviceObserverIdentifyingAttributes(
        uid=derive("device", name, version),
        name=objects.MANUFACTURER,
        manufacturer_name=objects.MANUFACTURER,
        model_name=objects.plain(model),
        serial_number=objects.plain(version),
    )
    return ObservationContext(
        observer_device_context=ObserverContext(
            observer_type=standard_codes.DCM.Device, observer_identifying_attributes=device
        )
    )


def _evidence(written: ResultObject, result: Result) -> Dataset:
    evidence = Dataset()
    evidence.StudyInstanceUID = result.study_instance_uid
    evidence.SeriesInstanceUID = objects.series_instance_uid(written.kind, result)
    evidence.SOPClassUID = written.sop_class_uid
    evidence.SOPInstanceUID = written.sop_instance_uid
    return evidence


def _previous(result: Result, predecessor: Path | None) -> list[Dataset] | None:
    if predecessor is None:
        return None
    transfer_syntax_uid, body = split(read_bytes(predecessor))
    previous = parse(body, transfer_syntax_uid, PREDECESSOR)
    if previous.SOPInstanceUID != result.supersedes:
        raise ValueError(f"{predecessor} is not the superseded report {result.supersedes}")
    return [previous]
