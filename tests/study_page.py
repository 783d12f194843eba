"""Studies of phantoms as the daemon leaves them: images in the spool, masks written, the answer on record."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tests.web_studies import Ward
from triage import priority
from triage.config import Assemble
from triage.dicom import seg, volume
from triage.dicom.header import read_instance
from triage.dicom.phantom import write_study
from triage.dicom.series import choose
from triage.domain import (
    LesionBox,
    LesionClass,
    Mask,
    ModelInfo,
    Owed,
    Result,
    ResultObject,
    Series,
    Status,
    Volume,
)

INFO = ModelInfo(name="multitask", version="a1b2c3d4", summary="", calibrated=False, card="")


@dataclass(frozen=True)
class Judged:
    """One study, and what its page must show of it: masks lie on the series' grid."""

    uid: str
    series: Series
    volume: Volume
    lesions: Mask
    lungs: Mask
    answer: Result

    @property
    def in_viewer_order(self) -> list[int]:
        """Place in the series of each image as viewers sort them: by InstanceNumber."""
        order = range(len(self.series.instances))
        return sorted(order, key=lambda k: self.series.instances[k].instance_number or 0)


def judged_phantom(
    ward: Ward,
    *,
    seed: int,
    classes: bool = False,
    boxes: bool = False,
    to: tuple[str, ...] = (),
    **phantom: Any,
) -> Judged:
    """A phantom arrives and is judged: the dark of its chest is lung, the grey in it lesion."""
    spool = ward.config.storage.spool
    files = write_study(spool / f"phantom-{seed}", seed=seed, **{"lesion_fraction": 0.2, **phantom})
    for path in files:
        received = replace(read_instance(path), patient_id="P-PHANTOM")
        ward.database.register(received, ward.now, judgeable=True, stat=False, pending=ward.waiting)
    uid = received.study_instance_uid
    chosen = choose(ward.database.instances(uid), Assemble())
    ct = volume.read(chosen, 1)
    lungs, lesions = drawn(ct)
    answer = replace(
        ward.answer(uid, Status.POSITIVE),
        series_instance_uid=chosen.series_instance_uid,
        content_key=f"key-{seed}",
        affected_fraction=float(lesions.sum() / lungs.sum()),
        boxes=(box(chosen, lesions),) if boxes else (),
    )
    written = written_masks(chosen, lungs, lesions, answer, spool / uid / "results", ward, classes)
    answer = replace(answer, files={one.kind: one.path for one in written})
    claimed = ward.claim(uid)
    place = priority.prioritise(answer, claimed.arrived_at, False, ward.config.priority, ward.config.analysis)
    assert ward.database.finish(claimed, answer, [Owed(name, written) for name in to], place, ward.now)
    return Judged(uid, chosen, ct, lesions, lungs, answer)


def drawn(ct: Volume) -> tuple[Mask, Mask]:
    """Lungs in the middle of the image, and in them what is denser than air-filled lung and no vessel."""
    inside = np.zeros(ct.array.shape, bool)
    _, rows, columns = ct.array.shape
    inside[:, rows // 5 : -rows // 5, columns // 8 : -columns // 8] = True
    lungs = inside & (ct.array > -1000) & (ct.array < -300)
    return lungs, lungs & (ct.array > -700)


def box(chosen: Series, lesions: Mask) -> LesionBox:
    """Of all that is lesion in the image with most of it."""
    k = int(lesions.sum(axis=(1, 2)).argmax())
    rows, columns = (np.flatnonzero(lesions[k].any(axis=axis)) for axis in (1, 0))
    sides = (int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1)
    return LesionBox(chosen.instances[k].sop_instance_uid, sides, 0.87)


def written_masks(
    chosen: Series, lungs: Mask, lesions: Mask, answer: Result, folder: Path, ward: Ward, classes: bool
) -> tuple[ResultObject, ...]:
    folder.mkdir(parents=True)
    half = np.zeros_like(lesions)
    half[..., : lesions.shape[2] // 2] = True
    parts: dict[LesionClass, Mask] = (
        {"ground_glass": lesions & half, "consolidation": lesions & ~half} if classes else {}
    )
    left = lungs & ~half
    about: dict[str, Any] = {"now": ward.now}
    return (
        seg.write_lesions(chosen, lesions, answer, INFO, folder, classes=parts, **about),
        seg.write_lungs(chosen, left, lungs & half, answer, INFO, folder, **about),
    )
