"""Folders of DICOM files → answers and written results: the daemon's way of judging, without a daemon."""

from __future__ import annotations

import csv
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from time import perf_counter

from triage import analyze, assemble, rows, unjudged
from triage.config import Config
from triage.dicom import attention, series
from triage.dicom.header import find_instances
from triage.domain import Instance, Result, ResultKind, Status
from triage.errors import Rejected, Retryable
from triage.models import Model

log = logging.getLogger(__name__)

ATTENTION = "attention"
"""Folder of a study's attention maps, where the network has any."""


@dataclass(frozen=True, slots=True)
class Found:
    """What lies at the given paths: instances by study, unreadable files, and seconds per instance."""

    studies: dict[str, list[Instance]]
    unreadable: list[tuple[Path, str]]
    seconds_per_instance: float


def find(paths: Sequence[Path]) -> Found:
    """Read every header below ``paths`` and group by study, in the order found."""
    start = perf_counter()
    instances, unreadable = find_instances(paths)
    studies: dict[str, list[Instance]] = {}
    for instance in instances:
        studies.setdefault(instance.study_instance_uid, []).append(instance)
    seconds = (perf_counter() - start) / max(len(instances), 1)
    return Found(studies, unreadable, seconds)


def predict(found: Found, output: Path, model: Model, config: Config, now: datetime) -> Iterator[Result]:
    """Judge study after study; results of each lie in ``output``/Study Instance UID."""
    for instances in found.studies.values():
        answer = _predict_one(instances, output, model, config, now)
        index = round(found.seconds_per_instance * len(instances), 3)
        total = round(index + answer.seconds.get("total", 0.0), 3)
        yield replace(answer, seconds={"index": index, **answer.seconds, "total": total})


def write_summary(answers: Sequence[Result], path: Path) -> None:
    """One line a study, the same figures as ``--json``."""
    lines = [rows.result_row(answer) for answer in answers]
    for line in lines:
        line["notes"] = "; ".join(line["notes"])
        line["seconds"] = line["seconds"].get("total")
        line["files"] = "; ".join(line["files"].values())
        for side in ("ct_severity_left", "ct_severity_right"):
            line[side] = "; ".join(f"{region} {score}" for region, score in (line[side] or {}).items())
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(lines[0]))
        writer.writeheader()
        writer.writerows({name: rows.harmless(value) for name, value in line.items()} for line in lines)


def _predict_one(
    instances: Sequence[Instance], output: Path, model: Model, config: Config, now: datetime
) -> Result:
    first = instances[0]
    failed = Result(
        study_instance_uid=first.study_instance_uid,
        patient_id=first.patient_id,
        status=Status.FAILED,
        reason="internal error; see the log",
    )
    try:
        folder = output / first.study_instance_uid
        _clear(folder)
        try:
            chosen = series.choose(instances, config.assemble)
            return analyze.judge(chosen, model, config, folder, now, also=_write_attention).answer
        except Rejected as rejection:
            answer = assemble.not_analysable(instances, str(rejection))
            if config.results.sr_not_judged:
                answer, _ = unjudged.tell(answer, instances, (), config.results, folder, now)
            return answer
    except Retryable as failure:
        return replace(failed, reason=str(failure))
    except Exception:  # one study must not cost the answers of the others
        log.exception("study %s", first.study_instance_uid)
        return failed


def _write_attention(case: analyze.Case) -> None:
    """Where the network looked, for a person: no PACS gets it."""
    attention.write(case.volume, case.findings, case.folder / ATTENTION)


def _clear(folder: Path) -> None:
    """Remove the results of an earlier run: a SEG beside a new report without lesion would mislead."""
    for name in (*(f"{kind.value}.*" for kind in ResultKind), f"{ATTENTION}/slice_*.png"):
        for path in folder.glob(name):
            path.unlink()
