"""The way of a study, step by step: what each step leaves behind, also when things go wrong."""

from __future__ import annotations

import shutil
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from pydicom import dcmread

from tests import peers
from tests.boxes import Boxes
from tests.hospital import Hospital, hospital
from triage import analyze, assemble, daemon, deliver
from triage.config import Assemble
from triage.dicom import phantom
from triage.domain import Band, DeliveryState, Findings, Instance, ResultKind, Series, StudyState, Volume
from triage.errors import DeviceLost, Rejected, Retryable
from triage.rows import entry_row

PHANTOM = {"slices": 30, "rows": 64, "slice_spacing": 8.0}


@pytest.fixture
def study(tmp_path: Path) -> Path:
    phantom.write_study(tmp_path / "study", seed=3, **PHANTOM)  # type: ignore[arg-type]
    return tmp_path / "study"


@pytest.fixture
def ward(tmp_path: Path) -> Iterator[tuple[Hospital, list[Instance]]]:
    with peers.pacs(tmp_path / "pacs") as (port, received), hospital(tmp_path / "daemon", port) as built:
        yield built, received


def uid_of(study: Path) -> str:
    return str(dcmread(next(study.iterdir())).StudyInstanceUID)


def test_received_judged_and_delivered(ward: tuple[Hospital, list[Instance]], study: Path) -> None:
    here, pacs = ward
    peers.scan(study, here.config)
    entry = here.entry(uid_of(study))
    assert (entry.study.state, entry.priority.band, entry.images) == (
        StudyState.RECEIVING,
        Band.NOT_JUDGED,
        30,
    )
    here.work()
    entry = here.entry(uid_of(study))
    assert entry.study.state is StudyState.ANALYZED
    assert entry.priority.band is Band.SEVERE
    assert entry.deliveries == {DeliveryState.SENT: 4}
    assert entry.result is not None
    assert set(entry.result.files) == {
        ResultKind.LESION_SEG,
        ResultKind.LUNG_SEG,
        ResultKind.SR,
        ResultKind.PICTURE,
        ResultKind.THUMBNAIL,
        ResultKind.KEY_SLICES,
        ResultKind.KEY_SLICES_PNG,
    }
    stages = ("read", "predict", "measure", "seg", "picture", "key_slices", "sr", "total")
    assert tuple(entry.result.seconds) == stages
    assert {i.study_instance_uid for i in pacs} == {uid_of(study)}


def test_lungs_that_cannot_be_written_are_missed_only_where_they_are_sent(
    tmp_path: Path, study: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError

    monkeypatch.setattr("triage.dicom.seg.write_lungs", fail)
    uid = uid_of(study)
    with hospital(tmp_path / "page") as here:
        peers.scan(study, here.config)
        here.work()
        answer = here.entry(uid).result
        assert answer is not None
        assert ResultKind.LUNG_SEG not in answer.files
        assert f"study {uid} goes without lungs on its page" in caplog.text
    with hospital(tmp_path / "sent", results={"lung_seg": True}) as here:
        peers.scan(study, here.config)
        with pytest.raises(ValueError):  # noqa: PT011 - a fault of ours, which is tried again
            here.work()
        assert here.entry(uid).study.state is StudyState.FAILED


def test_lungs_are_sent_where_that_is_set(tmp_path: Path, study: Path) -> None:
    with (
        peers.pacs(tmp_path / "pacs") as (port, _),
        hospital(tmp_path / "daemon", port, results={"lung_seg": True}) as here,
    ):
        peers.scan(study, here.config)
        here.work()
        assert here.entry(uid_of(study)).deliveries == {DeliveryState.SENT: 5}


def test_a_study_still_arriving_is_not_judged(ward: tuple[Hospital, list[Instance]], study: Path) -> None:
    here, _ = ward
    peers.scan(study, here.config)
    here.pass_time(here.config.assemble.quiet_seconds - 0.1)
    assert not assemble.step(here.db, here.config, here.now)


def test_our_own_results_coming_back_change_nothing(
    ward: tuple[Hospital, list[Instance]], study: Path, tmp_path: Path
) -> None:
    here, pacs = ward
    peers.scan(study, here.config)
    here.work()
    before = here.entry(uid_of(study))
    peers.scan(study, here.config)  # Orthanc sends the whole study again, with what we put there
    peers.scan(tmp_path / "pacs", here.config)
    here.work()
    after = here.entry(uid_of(study))
    assert after == before
    assert len(here.db.instances(uid_of(study))) == before.images + 4
    assert len(pacs) == 4


def test_late_slices_supersede_the_earlier_result(
    ward: tuple[Hospital, list[Instance]], study: Path, tmp_path: Path
) -> None:
    here, pacs = ward
    late = tmp_path / "late"
    late.mkdir()
    for path in sorted(study.iterdir())[-5:]:
        shutil.move(path, late / path.name)
    peers.scan(study, here.config)
    here.work()
    first = here.entry(uid_of(study))
    here.pass_time(600)
    peers.scan(late, here.config)
    reopened = here.entry(uid_of(study))
    assert reopened.study.state is StudyState.RECEIVING
    assert reopened.priority.due_at == first.priority.due_at
    assert reopened.priority.reason == "new images came, not judged yet"
    here.work()
    second = here.entry(uid_of(study))
    assert first.result is not None
    assert second.result is not None
    assert second.result.revision == 2
    assert second.result.supersedes == first.result.sr_sop_instance_uid
    assert second.priority.due_at == first.priority.due_at  # the wait counts from the first arrival
    report = dcmread(second.result.files[ResultKind.SR])
    previous = report.PredecessorDocumentsSequence[0].ReferencedSeriesSequence[0].ReferencedSOPSequence[0]
    assert previous.ReferencedSOPInstanceUID == first.result.sr_sop_instance_uid
    assert Counter(i.sop_class_uid for i in pacs)["1.2.840.10008.5.1.4.1.1.88.34"] == 2


def test_a_study_without_lesion_sends_neither_seg_nor_key_slices(
    ward: tuple[Hospital, list[Instance]], study: Path
) -> None:
    here, pacs = ward
    here.model.affected = 0.0  # type: ignore[attr-defined]
    peers.scan(study, here.config)
    here.work()
    entry = here.entry(uid_of(study))
    assert entry.result is not None
    assert entry.result.status == "negative"
    assert entry.priority.band is Band.ROUTINE
    assert len(pacs) == 2
    assert not {ResultKind.LESION_SEG, ResultKind.KEY_SLICES, ResultKind.KEY_SLICES_PNG} & set(
        entry.result.files
    )


def test_what_a_network_tells_apart_reaches_pacs_and_list(
    ward: tuple[Hospital, list[Instance]], study: Path
) -> None:
    here, pacs = ward
    here.model = Boxes(tells_apart=True)
    peers.scan(study, here.config)
    here.work()
    entry = here.entry(uid_of(study))
    result = entry.result
    assert result is not None
    assert result.ground_glass_ml == pytest.approx(6 * result.lesion_volume_ml / 10)
    assert result.consolidation_ml == pytest.approx(4 * result.lesion_volume_ml / 10)
    row = entry_row(entry, here.now)
    assert (row["ground_glass_ml"], row["consolidation_ml"]) == (
        result.ground_glass_ml,
        result.consolidation_ml,
    )
    by_class = {instance.sop_class_uid: dcmread(instance.path) for instance in pacs}
    seg = by_class["1.2.840.10008.5.1.4.1.1.66.4"]
    assert [segment.SegmentLabel for segment in seg.SegmentSequence] == ["Ground glass", "Consolidation"]
    report = str(by_class["1.2.840.10008.5.1.4.1.1.88.34"])
    for told in ("Ground glass opacity", "Lung consolidation", f"{result.consolidation_ml:.1f}"):
        assert told in report


class _Broken:
    """A network that fails as told, then works."""

    def __init__(self, here: Hospital, *failures: Exception) -> None:
        self._works = here.model
        self._failures = list(failures)
        self.info, self.settings = here.model.info, here.model.settings

    def predict(self, volume: Volume) -> Findings:
        if self._failures:
            raise self._failures.pop(0)
        return self._works.predict(volume)


def test_a_failure_is_shown_and_tried_again(ward: tuple[Hospital, list[Instance]], study: Path) -> None:
    here, _ = ward
    here.model = _Broken(here, Retryable("not enough memory"))
    peers.scan(study, here.config)
    here.work()
    entry = here.entry(uid_of(study))
    assert entry.study.state is StudyState.FAILED
    assert entry.priority.reason == "failed, will be retried: not enough memory"
    here.pass_time(here.config.analysis.retry_seconds)
    here.work()
    assert here.entry(uid_of(study)).study.state is StudyState.ANALYZED


def test_a_full_disk_or_a_busy_gpu_never_gives_a_study_up(
    ward: tuple[Hospital, list[Instance]], study: Path
) -> None:
    here, _ = ward
    here.model = _Broken(here, *[Retryable("not enough memory")] * 30)
    peers.scan(study, here.config)
    for _ in range(30):
        here.work()
        assert "will be retried" in here.entry(uid_of(study)).priority.reason
        here.pass_time(assemble.LONGEST_RETRY.total_seconds())
    here.work()
    assert here.entry(uid_of(study)).study.state is StudyState.ANALYZED


def test_a_spool_that_is_not_mounted_is_waited_for(
    ward: tuple[Hospital, list[Instance]], study: Path, tmp_path: Path
) -> None:
    here, _ = ward
    peers.scan(study, here.config)
    spool = here.config.storage.spool
    spool.rename(tmp_path / "unmounted")
    here.work()
    assert "is the disk mounted?" in here.entry(uid_of(study)).priority.reason
    (tmp_path / "unmounted").rename(spool)
    here.pass_time(10_000)
    here.work()
    assert here.entry(uid_of(study)).study.state is StudyState.ANALYZED


def test_a_lost_gpu_is_shown_and_ends_the_process(ward: tuple[Hospital, list[Instance]], study: Path) -> None:
    here, _ = ward
    here.model = _Broken(here, DeviceLost("the GPU is gone"))
    peers.scan(study, here.config)
    with pytest.raises(DeviceLost):
        here.work()
    assert "will be retried: the GPU is gone" in here.entry(uid_of(study)).priority.reason
    stop = threading.Event()
    here.pass_time(10_000)
    here.model = _Broken(here, DeviceLost("the GPU is gone"))
    daemon.repeat(lambda: analyze.step(here.db, here.config, here.model, "test", here.now), stop)
    assert stop.is_set()


def test_a_study_that_trips_us_is_given_up_and_says_so(
    ward: tuple[Hospital, list[Instance]], study: Path
) -> None:
    here, _ = ward
    attempts = here.config.analysis.maximum_attempts
    here.model = _Broken(here, *[ZeroDivisionError()] * attempts)
    peers.scan(study, here.config)
    for _ in range(attempts):
        with pytest.raises(ZeroDivisionError):
            here.work()
        here.pass_time(10_000)
    entry = here.entry(uid_of(study))
    assert entry.priority.reason == "failed, given up: internal error: ZeroDivisionError"
    assert entry.priority.band is Band.NOT_JUDGED
    here.work()
    assert here.entry(uid_of(study)).study.state is StudyState.FAILED
    here.requeue(uid_of(study))
    here.work()
    assert here.entry(uid_of(study)).study.state is StudyState.ANALYZED


def test_a_study_that_cannot_be_assembled_holds_up_nobody(
    ward: tuple[Hospital, list[Instance]], study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, _ = ward
    phantom.write_study(tmp_path / "next", seed=4, **PHANTOM)  # type: ignore[arg-type]
    peers.scan(study, here.config)
    here.pass_time(1)
    peers.scan(tmp_path / "next", here.config)
    choose = assemble.series.choose

    def tripping(instances: Sequence[Instance], rules: Assemble) -> Series:
        if instances[0].study_instance_uid == uid_of(study):
            raise ZeroDivisionError
        return choose(instances, rules)

    monkeypatch.setattr(assemble.series, "choose", tripping)
    with pytest.raises(ZeroDivisionError):
        here.work()
    here.work()
    assert "given up" in here.entry(uid_of(study)).priority.reason
    assert here.entry(uid_of(tmp_path / "next")).study.state is StudyState.ANALYZED


@pytest.mark.parametrize(
    ("change", "doubt"), [({"lungs": 1}, "one lung only"), ({"margin": 0}, "the images end inside the lungs")]
)
def test_nobody_is_called_negative_when_the_lungs_were_not_seen_whole(
    ward: tuple[Hospital, list[Instance]], study: Path, change: dict[str, int], doubt: str
) -> None:
    here, pacs = ward
    here.model = Boxes(affected=0, **change)
    peers.scan(study, here.config)
    here.work()
    entry = here.entry(uid_of(study))
    assert entry.study.state is StudyState.REJECTED
    assert doubt in entry.priority.reason
    assert entry.priority.band is Band.NOT_JUDGED
    assert pacs == []


def test_a_positive_answer_stands_in_doubt_and_says_so(
    ward: tuple[Hospital, list[Instance]], study: Path
) -> None:
    here, _ = ward
    here.model = Boxes(lungs=1)
    peers.scan(study, here.config)
    here.work()
    result = here.entry(uid_of(study)).result
    assert result is not None
    assert result.status == "positive"
    assert result.notes == ("one lung only",)


def test_settings_changed_and_changed_back_supersede_each_time(
    ward: tuple[Hospital, list[Instance]], study: Path
) -> None:
    """The PACS's newest report and the page say the same, and no UID is used twice."""
    here, pacs = ward
    peers.scan(study, here.config)
    here.work()
    before = here.config
    stricter = before.analysis.model_copy(update={"positive_probability": 0.99, "positive_fraction": 0.99})
    for settings in (before.model_copy(update={"analysis": stricter}), before, before):
        here.config = settings
        here.requeue(uid_of(study))
        here.work()
    results = here.db.results(uid_of(study))
    assert [(r.revision, r.status.value) for r in results] == [
        (3, "positive"),
        (2, "negative"),
        (1, "positive"),
    ]
    assert [r.supersedes for r in results[:2]] == [r.sr_sop_instance_uid for r in results[1:]]
    assert pacs[-1].study_instance_uid == uid_of(study)
    assert len({i.sop_instance_uid for i in pacs}) == len(pacs) == 12


def test_a_tidied_spool_does_not_stop_a_judgement(ward: tuple[Hospital, list[Instance]], study: Path) -> None:
    here, _ = ward
    peers.scan(study, here.config)
    here.work()
    shutil.rmtree(here.config.storage.spool / uid_of(study) / "results")
    stricter = here.config.analysis.model_copy(update={"lesion_threshold": 0.4, "ct0_tolerance": 0.01})
    here.config = here.config.model_copy(update={"analysis": stricter})
    here.requeue(uid_of(study))
    here.work()
    result = here.entry(uid_of(study)).result
    assert result is not None
    assert result.revision == 2


def test_a_fault_of_ours_is_shown_and_does_not_stop_the_next_study(
    ward: tuple[Hospital, list[Instance]], study: Path, tmp_path: Path
) -> None:
    here, _ = ward
    here.model = _Broken(here, ZeroDivisionError())
    phantom.write_study(tmp_path / "next", seed=4, **PHANTOM)  # type: ignore[arg-type]
    peers.scan(study, here.config)
    here.pass_time(1)
    peers.scan(tmp_path / "next", here.config)
    with pytest.raises(ZeroDivisionError):
        here.work()
    here.work()
    states = {here.entry(uid_of(folder)).study.state for folder in (study, tmp_path / "next")}
    assert states == {StudyState.FAILED, StudyState.ANALYZED}


def test_an_analyzer_that_dies_each_time_is_given_up(
    ward: tuple[Hospital, list[Instance]], study: Path
) -> None:
    here, _ = ward
    peers.scan(study, here.config)
    here.pass_time(here.config.assemble.quiet_seconds)
    assemble.step(here.db, here.config, here.now)
    for _ in range(here.config.analysis.maximum_attempts):
        assert here.db.claim("test", here.now, 60) is not None
        here.db.release_leases(here.now, owner="test")
    assert analyze.step(here.db, here.config, here.model, "test", here.now)
    entry = here.entry(uid_of(study))
    assert entry.study.state is StudyState.FAILED
    assert "given up" in entry.priority.reason


def test_no_lungs_is_not_analysable(ward: tuple[Hospital, list[Instance]], study: Path) -> None:
    here, pacs = ward
    here.model = _Broken(here, Rejected("no lungs found"))
    peers.scan(study, here.config)
    here.work()
    entry = here.entry(uid_of(study))
    assert entry.study.state is StudyState.REJECTED
    assert entry.priority.reason == "no lungs found"
    assert pacs == []


def test_too_little_lung_is_not_analysable(tmp_path: Path, study: Path) -> None:
    with hospital(tmp_path / "daemon", analysis={"minimum_lung_ml": 90_000}) as here:
        peers.scan(study, here.config)
        here.work()
        assert "ml of lung found" in here.entry(uid_of(study)).priority.reason


def test_a_destination_that_is_away_holds_up_nobody_and_gets_everything_later(
    tmp_path: Path, study: Path
) -> None:
    away = peers.free_port()
    with peers.pacs(tmp_path / "pacs") as (port, received):
        destinations = [
            {"name": "AWAY", "ae_title": "PACS", "host": "127.0.0.1", "port": away},
            {"name": "PACS", "ae_title": "PACS", "host": "127.0.0.1", "port": port},
        ]
        with hospital(tmp_path / "daemon", delivery={"destinations": destinations}) as here:
            peers.scan(study, here.config)
            here.work()
            assert len(received) == 4
            owed = [d for d in here.db.deliveries(uid_of(study)) if d.state is DeliveryState.PENDING]
            assert {d.destination for d in owed} == {"AWAY"}
            assert all("127.0.0.1" in d.last_error for d in owed)
            with peers.pacs(tmp_path / "back", away) as (_, late):
                here.deliver()
                assert late == []  # not before its time
                here.pass_time(here.config.delivery.first_retry_seconds)
                here.deliver()
                assert len(late) == 4


def test_an_undeliverable_result_is_given_up_after_days_and_says_so(tmp_path: Path, study: Path) -> None:
    with hospital(tmp_path / "daemon", peers.free_port()) as here:
        peers.scan(study, here.config)
        here.work()
        here.pass_time(here.config.delivery.give_up_hours * 3600)
        here.deliver()
        assert here.entry(uid_of(study)).deliveries == {DeliveryState.GIVEN_UP: 4}


def test_what_would_be_refused_again_is_tried_rarely_and_holds_up_nothing(
    ward: tuple[Hospital, list[Instance]], study: Path
) -> None:
    here, pacs = ward
    peers.scan(study, here.config)
    here.pass_time(here.config.assemble.quiet_seconds)
    assemble.step(here.db, here.config, here.now)
    analyze.step(here.db, here.config, here.model, "test", here.now)
    seg = next(d for d in here.db.deliveries(uid_of(study)) if d.path.name == "lesion_seg.dcm")
    seg.path.write_bytes(b"damaged")
    here.deliver()
    assert len(pacs) == 3
    settings = here.config.delivery
    here.pass_time(settings.longest_retry_seconds * (1 - deliver.JITTER) - 1)
    assert here.db.due_deliveries("PACS", here.now) == []
    here.pass_time(settings.longest_retry_seconds * deliver.JITTER + 1)
    (owed,) = here.db.due_deliveries("PACS", here.now)
    assert owed.sop_instance_uid == seg.sop_instance_uid
    assert owed.last_error


def test_a_stat_order_goes_first(ward: tuple[Hospital, list[Instance]], study: Path, tmp_path: Path) -> None:
    here, _ = ward
    phantom.write_study(tmp_path / "stat", seed=5, priority="STAT", **PHANTOM)  # type: ignore[arg-type]
    peers.scan(study, here.config)
    here.pass_time(120)
    peers.scan(tmp_path / "stat", here.config)
    order = [e.study.study_instance_uid for e in here.db.worklist(here.now, "deadline", 7)]
    assert order == [uid_of(tmp_path / "stat"), uid_of(study)]
