"""Chosen series → findings, severity, answer, written results. The page to read first.

``judge`` is the whole way of one series and is used alike by the daemon's ``step`` and by
``triage predict``. Nothing here knows the order of the worklist but ``step``, which asks for it last.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path
from time import perf_counter

from triage import outbox, policies, priority, severity
from triage.assemble import fail, give_up, reject, results_folder, try_later
from triage.config import Config, Results
from triage.db import Database
from triage.dicom import files, key_slices, mesh, pictures, seg, series, sr, view3d, volume
from triage.domain import (
    Findings,
    Instance,
    LesionBox,
    ModelInfo,
    Result,
    ResultKind,
    ResultObject,
    Series,
    Severity,
    Status,
    Study,
    Volume,
)
from triage.errors import NO_MEMORY, DeviceLost, FreshProcess, Rejected, Retryable
from triage.logs import about
from triage.models import Model
from triage.unjudged import report_at_hand

log = logging.getLogger(__name__)

ANSWER_VERSION = 10
"""Raised whenever the same images, weights and settings give another answer or other objects than before."""
UNDRAWABLE = (ValueError, RuntimeError, MemoryError)
"""What drawing may raise: an answer never waits for what only its page or a picture shows."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """The answer for one study and the DICOM objects written for it."""

    answer: Result
    objects: tuple[ResultObject, ...] = ()


@dataclass(frozen=True, slots=True)
class Case:
    """A judged series: everything its result objects are made from."""

    series: Series
    volume: Volume
    findings: Findings
    severity: Severity
    answer: Result
    info: ModelInfo
    parameters: Mapping[str, str | float]
    folder: Path
    now: datetime
    predecessor: Path | None


@dataclass
class Stopwatch:
    """Seconds by stage, in the order of the stages."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = perf_counter()
        yield
        self.seconds[stage] = round(perf_counter() - start, 3)


def judge(
    chosen: Series,
    model: Model,
    config: Config,
    folder: Path,
    now: datetime,
    previous: Result | None = None,
    also: Callable[[Case], None] | None = None,
) -> Judgement:
    """Judge one series and write its objects into ``folder``: SEG, SR, pictures and 3D view.

    ``previous`` is the answer that this one supersedes; ``also`` is given the judged series at the end, and
    its time is not counted. Raises Rejected when the series cannot be judged, Retryable when disk, memory or
    device fail.
    """
    watch = Stopwatch()
    with watch("read"):
        ct = volume.read(chosen, config.analysis.threads)
    with watch("predict"):
        findings = model.predict(ct)
    with watch("measure"):
        extent = severity.measure(ct, findings, config.analysis.ct0_tolerance)
    supersedes = previous.sr_sop_instance_uid if previous else None
    answer = _conclude(chosen, findings, extent, model, config, supersedes)
    case = Case(
        series=chosen,
        volume=ct,
        findings=findings,
        severity=extent,
        answer=answer,
        info=model.info,
        parameters=_parameters(model, config),
        folder=folder,
        now=now,
        predecessor=report_at_hand(previous),
    )
    objects, beside = _write(case, config.results, watch)
    if also is not None:
        also(case)
    return Judgement(_filed(answer, objects, beside, watch), objects)


def step(db: Database, config: Config, model: Model, owner: str, now: datetime) -> bool:
    """Judge the most urgent waiting study; False when none waits."""
    study = db.claim(owner, now, config.analysis.lease_seconds)
    if study is None:
        return False
    about(study.study_instance_uid)
    instances = db.instances(study.study_instance_uid)
    if study.attempts > config.analysis.maximum_attempts:
        give_up(db, config, study, "the analysis ended without a word each time it was tried", now)
        return True
    try:
        judgement = _judgement_of(db, config, model, study, instances, now)
    except Rejected as rejection:
        reject(db, config, study, instances, str(rejection), now)
    except FreshProcess as failure:
        _count_failure(db, config, study, str(failure), now)
        raise
    except MemoryError as error:
        _count_failure(db, config, study, NO_MEMORY, now)
        raise FreshProcess(NO_MEMORY) from error
    except Retryable as failure:
        try_later(db, config, study, str(failure), now)
        if isinstance(failure, DeviceLost):
            raise
    except Exception as error:
        _count_failure(db, config, study, f"internal error: {type(error).__name__}", now)
        raise
    else:
        _finish(db, config, study, judgement, now)
    return True


def content_key(chosen: Series, model: Model, config: Config, supersedes: str | None) -> str:
    """Same slices, weights and settings after the same report: the same key, hence the same object UIDs."""
    facts = {
        "version": ANSWER_VERSION,
        "content": chosen.content_digest,
        "notes": chosen.notes,
        "supersedes": supersedes,
        "model": [model.info.name, model.info.version],
        "parameters": dict(_parameters(model, config)),
        "minimum_lung_ml": config.analysis.minimum_lung_ml,
        "results": config.results.model_dump(exclude={"sr_not_judged"}),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _judgement_of(
    db: Database, config: Config, model: Model, study: Study, instances: Sequence[Instance], now: datetime
) -> Judgement:
    """The newest report's answer is given again to the same content; its objects are never rebuilt."""
    chosen = series.choose(instances, config.assemble)
    previous = next((r for r in db.results(study.study_instance_uid) if r.sr_sop_instance_uid), None)
    if previous and previous.content_key == content_key(chosen, model, config, previous.supersedes):
        return Judgement(previous)
    folder = results_folder(config, study.study_instance_uid, now)
    try:
        return judge(chosen, model, config, folder, now, previous)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _finish(db: Database, config: Config, study: Study, judgement: Judgement, now: datetime) -> None:
    answer, config = judgement.answer, policies.in_force(db, config)
    place = priority.prioritise(answer, study.arrived_at, study.stat, config.priority, config.analysis)
    owed = outbox.owed(config.destinations, answer, place, judgement.objects)
    if db.finish(study, answer, owed, place, now):
        log.info("study %s is %s", study.study_instance_uid, answer.status.value)
    else:
        log.info("study %s received more images while it was judged; again", study.study_instance_uid)


def _count_failure(db: Database, config: Config, study: Study, reason: str, now: datetime) -> None:
    """A fault of ours: tried again a few times, each after twice the wait, then given up."""
    settings = config.analysis
    if study.attempts >= settings.maximum_attempts:
        give_up(db, config, study, reason, now)
        return
    wait = timedelta(seconds=settings.retry_seconds * 2.0 ** (study.attempts - 1))
    fail(db, config, study, reason, now + wait, attempts=study.attempts)


def _conclude(
    chosen: Series,
    findings: Findings,
    extent: Severity,
    model: Model,
    config: Config,
    supersedes: str | None,
) -> Result:
    """Positive or negative, in plain figures. Raises Rejected where ``severity.answer`` is neither."""
    status, reason = severity.answer(findings.probability, extent, config.analysis)
    if status is Status.NOT_ANALYSABLE:
        raise Rejected(reason)
    answer = Result(
        study_instance_uid=chosen.study_instance_uid,
        series_instance_uid=chosen.series_instance_uid,
        patient_id=chosen.instances[0].patient_id,
        status=status,
        reason="",
        probability=findings.probability,
        probability_kind=findings.probability_kind,
        calibrated=findings.calibrated,
        affected_fraction=extent.affected_fraction,
        affected_left=extent.affected_left,
        affected_right=extent.affected_right,
        grade=extent.grade,
        lung_volume_ml=extent.lung_volume_ml,
        lesion_volume_ml=extent.lesion_volume_ml,
        ground_glass_ml=extent.ground_glass_ml,
        consolidation_ml=extent.consolidation_ml,
        percent_infection=extent.percent_infection,
        ct_severity_score=extent.ct_severity_score,
        positive_slices=findings.positive_slices,
        grade_from=extent.grade_from,
        model=model.info.name,
        model_version=model.info.version,
        content_key=content_key(chosen, model, config, supersedes),
        supersedes=supersedes,
        notes=(*chosen.notes, *extent.doubts),
        boxes=tuple(
            LesionBox(chosen.instances[one.slice_index].sop_instance_uid, one.box, one.score)
            for one in findings.detected or ()
        ),
    )
    return replace(answer, reason=priority.sentence(answer))


def _filed(
    answer: Result, objects: Sequence[ResultObject], beside: Mapping[ResultKind, Path], watch: Stopwatch
) -> Result:
    """The answer, knowing its files and how long it took."""
    return replace(
        answer,
        sr_sop_instance_uid=next(o.sop_instance_uid for o in objects if o.kind is ResultKind.SR),
        seconds={**watch.seconds, "total": round(sum(watch.seconds.values()), 3)},
        files={**{o.kind: o.path for o in objects}, **beside},
    )


def _parameters(model: Model, config: Config) -> Mapping[str, str | float]:
    """What shaped the answer; written into the report."""
    settings = config.analysis
    return {
        **model.settings,
        "positive_probability": settings.positive_probability,
        "positive_fraction": settings.positive_fraction,
        "ct0_tolerance": settings.ct0_tolerance,
    }


def _write(
    case: Case, settings: Results, watch: Stopwatch
) -> tuple[tuple[ResultObject, ...], dict[ResultKind, Path]]:
    """SEG of lesions and of lungs, pictures, 3D view, SR; and beside them the page's files."""
    files.make_folder(case.folder)
    with watch("seg"):
        lesions, lungs = _lesion_seg(case, settings), _lung_seg(case, settings)
        masks = [o for o in (lesions, lungs if settings.lung_seg else None) if o is not None]
    with watch("picture"):
        capture, beside = _summary_picture(case, settings)
    if lungs is not None:
        beside[lungs.kind] = lungs.path
    slices, turning = None, None
    if settings.key_slices:
        with watch("key_slices"):
            slices, pngs = _key_slices(case)
        beside |= pngs
    if settings.view_3d:
        with watch("view_3d"):
            turning, surfaces = _view_3d(case)
        beside |= surfaces
    drawn = [o for o in (capture, slices, turning) if o is not None]
    with watch("sr"):  # last: it refers to all others
        report = _report(case, settings, masks, drawn)
    return (*masks, *drawn, report), beside


def _report(
    case: Case, settings: Results, masks: Sequence[ResultObject], drawn: Sequence[ResultObject]
) -> ResultObject:
    return sr.write(
        case.series,
        case.answer,
        case.severity,
        case.info,
        case.parameters,
        case.folder,
        now=case.now,
        sop_class=settings.sr,
        segmentations=masks,
        pictures=drawn,
        predecessor=case.predecessor,
    )


def _summary_picture(case: Case, settings: Results) -> tuple[ResultObject | None, dict[ResultKind, Path]]:
    """For the PACS, where it is wanted, and small for the page."""
    drawn = pictures.summary(case.volume, case.findings, case.severity, case.answer)
    thumbnail = case.folder / f"{ResultKind.THUMBNAIL.value}.png"
    pictures.write_thumbnail(drawn, thumbnail)
    capture = None
    if settings.picture:
        capture = pictures.write_secondary_capture(
            drawn, case.series, case.answer, case.info, case.folder, now=case.now
        )
    return capture, {ResultKind.THUMBNAIL: thumbnail}


def _lesion_seg(case: Case, settings: Results) -> ResultObject | None:
    mask = case.findings.lesion_mask if settings.lesion_seg else None
    if mask is None or not mask.any():
        return None  # an empty segment hangs viewers; the report says that there is none
    return seg.write_lesions(
        case.series,
        mask,
        case.answer,
        case.info,
        case.folder,
        now=case.now,
        classes=case.findings.lesion_classes,
        omit_empty_frames=settings.omit_empty_frames,
        form=settings.seg,
    )


def _lung_seg(case: Case, settings: Results) -> ResultObject | None:
    """For the page always, in the smallest form; for the PACS, where it is wanted, in that of the setting."""
    sides = severity.side_masks(case.findings.lung_mask, case.volume)
    if sides is None:
        return None
    try:
        return seg.write_lungs(
            case.series,
            *sides,
            case.answer,
            case.info,
            case.folder,
            now=case.now,
            omit_empty_frames=settings.omit_empty_frames,
            form=settings.seg if settings.lung_seg else "labelmap_jpeg_ls",
        )
    except UNDRAWABLE as error:
        if settings.lung_seg:
            raise
        _go_without("lungs on its page", case, error)
        return None


def _key_slices(case: Case) -> tuple[ResultObject | None, dict[ResultKind, Path]]:
    """The slices with most lesion as one picture, and the same as PNG; neither where there is no lesion."""
    shown = key_slices.choose(case.volume, case.findings)
    if not shown:
        return None, {}
    try:
        drawn = key_slices.draw(case.series, case.volume, case.findings, shown)
    except UNDRAWABLE as error:
        _go_without("key slices", case, error)
        return None, {}
    path = case.folder / f"{ResultKind.KEY_SLICES.value}.png"
    pictures.write_png(drawn, path)
    written = key_slices.write(drawn, case.series, shown, case.answer, case.info, case.folder, now=case.now)
    return written, {ResultKind.KEY_SLICES_PNG: path}


def _view_3d(case: Case) -> tuple[ResultObject | None, dict[ResultKind, Path]]:
    """The view and its mesh, or neither."""
    try:
        frames = view3d.render(case.volume, case.findings)
        surfaces = {ResultKind.MESH: mesh.write(case.series, case.findings, case.folder)}
    except UNDRAWABLE as error:
        _go_without("a 3D view", case, error)
        return None, {}
    return view3d.write(frames, case.series, case.answer, case.info, case.folder, now=case.now), surfaces


def _go_without(what: str, case: Case, error: Exception) -> None:
    uid, kind = case.answer.study_instance_uid, type(error).__name__
    log.warning("study %s goes without %s, which could not be drawn: %s", uid, what, kind)
