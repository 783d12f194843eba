"""The answer as a structured report: TID 1500 Measurement Report (PS3.16), unverified.

The study-level group (TID 1501) says positive or negative, with what certainty, how much of each lung
is affected and by which network; one for each lung scores its regions; then a group for each segment of
the lesions (TID 1411), if there are any, measures it. Nothing here depends on how a worklist is ordered.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Literal

from highdicom.sr import (
    AlgorithmIdentification,
    Comprehensive3DSR,
    ComprehensiveSR,
    DeviceObserverIdentifyingAttributes,
    EnhancedSR,
    FindingSite,
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

from triage import __version__
from triage.dicom import codes, objects, seg, source
from triage.dicom.header import parse, read_bytes, split
from triage.dicom.uids import derive
from triage.domain import (
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
    lesion_seg: ResultObject | None = None,
    predecessor: Path | None = None,
) -> ResultObject:
    """Write the report of a judged study.

    ``parameters`` are the settings that shaped the answer (thresholds); ``lesion_seg`` is the object
    whose segments are measured; ``predecessor`` is the report that this revision replaces, the one
    ``result.supersedes`` names. Raises ValueError for an answer that is neither positive nor negative
    and for a wrong predecessor; Retryable when source or disk fail.
    """
    if result.status not in codes.ANSWERS:
        raise ValueError(f"a {result.status.value} study has no report")
    received = source.read(series)
    algorithm = _algorithm(info, parameters)
    groups: list[MeasurementsAndQualitativeEvaluations | VolumetricROIMeasurementsAndQualitativeEvaluations]
    groups = [_study(result, severity, algorithm), *_regions(result, severity, algorithm)]
    evidence = received.slices
    if lesion_seg is not None:
        groups += _lesions(series, result, severity, algorithm, lesion_seg)
        evidence = [*evidence, _evidence(lesion_seg, result)]
    report = SOP_CLASSES[sop_class](
        evidence=evidence,
        content=MeasurementReport(
            observation_context=_observer(info),
            procedure_reported=codes.CT_CHEST,
            imaging_measurements=groups,
        ),
        is_complete=True,
        previous_versions=_previous(result, predecessor),
        coding_schemes=[codes.private_scheme()],
        **objects.identity(ResultKind.SR, result, info, now),
    )
    return objects.write(ResultKind.SR, report, received.patient, folder, now)


def _study(
    result: Result, severity: Severity, algorithm: AlgorithmIdentification
) -> MeasurementsAndQualitativeEvaluations:
    """TID 1501: the answer for the whole study. Only a positive answer names a finding.

    It is pneumonia, not COVID-19: the research weights have never seen another cause to tell it from.
    """
    group = MeasurementsAndQualitativeEvaluations(
        tracking_identifier=TrackingIdentifier(seg.tracking_uid("Study", result), "Study"),
        finding_type=codes.PNEUMONIA if result.status is Status.POSITIVE else None,
        finding_sites=[FindingSite(codes.LUNG)],
        algorithm_id=algorithm,
        measurements=list(_figures(result, severity)),
        qualitative_evaluations=list(_evaluations(result, severity)),
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
            derivation=codes.MAXIMUM if sides_known else None,
            finding_sites=[both],
        )
    for site, fraction in ((left, severity.affected_left), (right, severity.affected_right)):
        if fraction is not None:
            yield Measurement(
                codes.AFFECTED, tenths_of_percent(fraction), codes.PERCENT, finding_sites=[site]
            )
    if severity.percent_infection is not None:
        value = tenths_of_percent(severity.percent_infection)
        yield Measurement(codes.SLICE_MEAN, value, codes.PERCENT, finding_sites=[both])
    if severity.ct_severity_score is not None:
        value = severity.ct_severity_score.total
        yield Measurement(
            codes.CT_SEVERITY_SCORE, value, codes.NO_UNITS, method=codes.BY_SHAPE, finding_sites=[both]
        )
    yield Measurement(codes.VOLUME, round(severity.lung_volume_ml, 1), codes.MILLILITRE, finding_sites=[both])
    if severity.lesion_volume_ml is not None:
        value = round(severity.lesion_volume_ml, 1)
        yield Measurement(codes.LESION_VOLUME, value, codes.MILLILITRE, finding_sites=[both])


def _evaluations(result: Result, severity: Severity) -> Iterator[QualitativeEvaluation]:
    yield QualitativeEvaluation(codes.ANSWER, codes.ANSWERS[result.status])
    yield QualitativeEvaluation(codes.CAD_SUMMARY, codes.CAD_SUMMARIES[result.status])
    if severity.grade is not None:
        yield QualitativeEvaluation(codes.CT_GRADE[severity.grade_from], codes.CT_GRADES[severity.grade])
    if result.status is not Status.POSITIVE:
        return
    if severity.grade in codes.SEVERITIES:
        yield QualitativeEvaluation(codes.SEVERITY, codes.SEVERITIES[severity.grade])
    yield QualitativeEvaluation(codes.ACTIONABILITY, codes.ACTIONABILITIES[severity.grade])


def _comments(result: Result) -> Iterator[str]:
    yield f"{result.status.value.capitalize()}: {result.reason}"
    yield from result.notes
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


def _lesions(
    series: Series,
    result: Result,
    severity: Severity,
    algorithm: AlgorithmIdentification,
    lesion_seg: ResultObject,
) -> Iterator[VolumetricROIMeasurementsAndQualitativeEvaluations]:
    """TID 1411 for each segment of the lesion object, without frame numbers (both together are invalid)."""
    volumes = {
        seg.LESIONS: severity.lesion_volume_ml,
        seg.CLASSES["ground_glass"]: severity.ground_glass_ml,
        seg.CLASSES["consolidation"]: severity.consolidation_ml,
    }
    kinds = {kind.label: (kind, volume) for kind, volume in volumes.items()}
    for number, label in enumerate(lesion_seg.segments, 1):
        kind, volume = kinds[label]
        yield VolumetricROIMeasurementsAndQualitativeEvaluations(
            tracking_identifier=TrackingIdentifier(seg.tracking_uid(label, result), label),
            referenced_segment=ReferencedSegment(
                sop_class_uid=lesion_seg.sop_class_uid,
                sop_instance_uid=lesion_seg.sop_instance_uid,
                segment_number=number,
                source_series=SourceSeriesForSegmentation(series.series_instance_uid),
            ),
            finding_type=kind.code,
            finding_category=codes.ABNORMAL_STRUCTURE,
            finding_sites=[FindingSite(codes.LUNG)],
            algorithm_id=algorithm,
            measurements=None
            if volume is None
            else [Measurement(codes.VOLUME, round(volume, 1), codes.MILLILITRE)],
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


def _observer(info: ModelInfo) -> ObservationContext:
    device = DeviceObserverIdentifyingAttributes(
        uid=derive("device", info.name, info.version),
        name=objects.MANUFACTURER,
        manufacturer_name=objects.MANUFACTURER,
        model_name=objects.plain(f"triage {__version__}, {info.name}"),
        serial_number=objects.plain(info.version),
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
