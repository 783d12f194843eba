"""The spool is kept in order: old images go, once they are delivered and not before; strays are put aside."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import httpx
import pytest
from pydicom import dcmread

from tests import peers
from tests.hospital import Hospital, hospital
from triage import assemble, config, upkeep
from triage.config import Config
from triage.dicom import files, header, phantom, spool
from triage.dicom.spool import DELETED, QUARANTINE, RESULTS
from triage.domain import Instance, StudyState
from triage.errors import ConfigError, Retryable
from triage.web.app import create_app


def scanned(here: Hospital, folder: Path, seed: int) -> str:
    phantom.write_study(folder, seed=seed, slices=30, rows=64, slice_spacing=8)
    known = {entry.study.study_instance_uid for entry in here.db.search("")}
    peers.scan(folder, here.config)
    (uid,) = {entry.study.study_instance_uid for entry in here.db.search("")} - known
    return uid


def images(settings: Config, uid: str) -> list[Path]:
    return [path for path in (settings.storage.spool / uid).glob("*/*.dcm") if path.parent.name != RESULTS]


def get(here: Hospital, address: str) -> httpx.Response:
    async def asked() -> httpx.Response:
        app = create_app(here.db, here.config, lambda: here.now)
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://127.0.0.1:8080"
        ) as client:
            return await client.get(address)

    return asyncio.run(asked())


def test_images_go_when_they_are_old_and_delivered_and_not_before(tmp_path: Path) -> None:
    retention = {"delete_images_after_days": 30}
    port = peers.free_port()
    with hospital(tmp_path / "here", port, retention=retention) as here:
        with peers.pacs(tmp_path / "pacs", port):
            delivered = scanned(here, tmp_path / "first", 1)
            here.work()
        owed = scanned(here, tmp_path / "second", 2)
        here.work()  # the PACS is away
        waits = scanned(here, tmp_path / "third", 3)

        here.pass_time(29 * 86400)
        assert not upkeep.delete_images(here.db, here.config, here.now)
        here.pass_time(2 * 86400)
        with files.undisturbed(here.config.storage.spool):
            assert not upkeep.delete_images(here.db, here.config, here.now), "a back-up is being made"
        assert upkeep.delete_images(here.db, here.config, here.now)
        assert not upkeep.delete_images(here.db, here.config, here.now)
        assert [len(images(here.config, uid)) for uid in (delivered, owed, waits)] == [0, 30, 30]

        entry = here.entry(delivered)
        assert entry.result is not None
        assert all(path.is_file() for path in entry.result.files.values()), "answers stay"
        assert get(here, f"/studies/{delivered}/viewer.json").status_code == 404
        assert "images deleted here on 2026-04-02" in get(here, f"/studies/{delivered}").text

        here.requeue(delivered)
        here.work()
        assert here.entry(delivered).result == entry.result, "the answer stands without its images"
        peers.scan(tmp_path / "first", here.config)
        here.requeue(delivered)
        here.work()
        again = here.entry(delivered)
        assert again.study.state is StudyState.ANALYZED
        assert again.study.images_deleted_at is None
        assert get(here, f"/studies/{delivered}/viewer.json").status_code == 200
        with peers.pacs(tmp_path / "pacs", port):
            here.pass_time(86400)
            here.deliver()
        here.pass_time(28 * 86400)
        assert upkeep.delete_images(here.db, here.config, here.now), "the second one is delivered now"
        assert len(images(here.config, delivered)) == 30, "what came again stays as long again"


def test_images_that_come_after_others_were_deleted_are_judged_backed_up_and_deleted_in_their_turn(
    tmp_path: Path,
) -> None:
    with hospital(tmp_path / "here", retention={"delete_images_after_days": 30}) as here:
        uid = scanned(here, tmp_path / "first", 1)
        here.work()
        here.pass_time(31 * 86400)
        assert upkeep.delete_images(here.db, here.config, here.now)
        for path in phantom.write_study(tmp_path / "late", seed=2, slices=60, rows=64, slice_spacing=4):
            image = dcmread(path)
            image.StudyInstanceUID, image.PatientID = uid, here.entry(uid).study.patient_id
            image.save_as(path)
        here.pass_time(1)
        peers.scan(tmp_path / "late", here.config)
        here.requeue(uid)
        here.work()
        entry = here.entry(uid)
        assert entry.study.state is StudyState.ANALYZED
        assert any("images deleted here on" in remark for remark in entry.study.remarks)
        there = set(images(here.config, uid))
        assert len(there) == 60
        named = {path for path in here.db.paths() if RESULTS not in path.parts}
        assert named == there, "a back-up knows of each"
        assert get(here, f"/studies/{uid}/viewer.json").status_code == 200
        assert not upkeep.delete_images(here.db, here.config, here.now)
        here.pass_time(31 * 86400)
        assert upkeep.delete_images(here.db, here.config, here.now)
        assert not images(here.config, uid)
        assert not upkeep.delete_images(here.db, here.config, here.now)


def test_what_comes_while_images_are_deleted_is_kept_or_refused(tmp_path: Path) -> None:
    with hospital(tmp_path / "here") as here:
        uid = scanned(here, tmp_path / "first", 1)
        here.work()
        known, other = images(here.config, uid)[0], dcmread(tmp_path / "first" / "002-0001.dcm")
        other.SOPInstanceUID = "1.2.3"
        other.save_as(tmp_path / "other.dcm")
        came: list[Instance] = []

        def delete(recorded: set[Path]) -> None:
            for path in (known, tmp_path / "other.dcm"):
                syntax, body = header.split(path.read_bytes())
                parsed = spool.read(bytes(body), syntax)
                came.append(spool.file(here.config.storage.spool, bytes(body), parsed, "SCANNER").instance)
            before = peers.now() - timedelta(days=1)
            upkeep._put_aside(known.parent.parent, tmp_path / "aside", before, recorded)

        later = here.now + timedelta(days=1)
        assert here.db.mark_images_deleted(uid, here.now, later, delete)
        again, new = came
        assert images(here.config, uid) == [new.path]
        with pytest.raises(Retryable, match="send it again"):
            assemble.register(here.db, here.config, again, later)
        assemble.register(here.db, here.config, new, later)
        assert not here.db.mark_images_deleted(uid, here.now, later, delete), "it got an image since then"


def test_what_is_sent_again_before_its_images_are_deleted_stays_as_long_again(tmp_path: Path) -> None:
    with hospital(tmp_path / "here", retention={"delete_images_after_days": 30}) as here:
        uid = scanned(here, tmp_path / "first", 1)
        here.work()
        here.pass_time(31 * 86400)
        one = tmp_path / "one" / "002-0001.dcm"
        one.parent.mkdir()
        shutil.copy(tmp_path / "first" / "002-0001.dcm", one)
        peers.scan(one.parent, here.config)
        assert not upkeep.delete_images(here.db, here.config, here.now)
        assert len(images(here.config, uid)) == 30
        here.pass_time(31 * 86400)
        assert upkeep.delete_images(here.db, here.config, here.now)


def test_one_image_that_is_just_deleted_refuses_none_of_those_beside_it(tmp_path: Path) -> None:
    with hospital(tmp_path / "here") as here, ThreadPoolExecutor() as pool:
        uid = scanned(here, tmp_path / "first", 1)
        here.work()
        known = here.db.instances(uid)
        others = [replace(known[0], study_instance_uid=f"1.{n}", sop_instance_uid=f"1.{n}.1") for n in (1, 2)]
        later = here.now + timedelta(days=1)
        waiting: list[Future[None]] = []

        def come_together(recorded: set[Path]) -> None:
            """The first waits for the database, and the others for the first."""
            arrivals = here.db._arrivals
            for number, one in enumerate((others[0], known[1], others[1])):
                waiting.append(pool.submit(assemble.register, here.db, here.config, one, later))
                peers.wait_until(lambda n=number: arrivals._working and len(arrivals._waiting) == n)
            upkeep._put_aside(known[0].path.parents[1], tmp_path / "aside", later, recorded)

        assert here.db.mark_images_deleted(uid, here.now, later, come_together)
        assert [type(one.exception()) for one in waiting] == [type(None), Retryable, type(None)]
        assert [here.db.sop_instance_uids(f"1.{n}") for n in (1, 2)] == [{"1.1.1"}, {"1.2.1"}]


def test_who_is_killed_while_images_are_deleted_loses_none_that_should_stay(tmp_path: Path) -> None:
    with hospital(tmp_path / "here", retention={"delete_images_after_days": 30}) as here:
        first, second = (scanned(here, tmp_path / str(seed), seed) for seed in (1, 2))
        here.work()
        here.pass_time(31 * 86400)
        spool = here.config.storage.spool
        moved = partial(upkeep._put_aside, spool / first, spool / DELETED / first, here.now)
        moved({one.path for one in here.db.instances(first)})  # killed before that was on record
        here.requeue(first)
        marked = partial(upkeep._put_aside, spool / second, spool / DELETED / second, here.now)
        before = here.now - timedelta(days=30)
        assert here.db.mark_images_deleted(second, before, here.now, marked)  # killed before the rest
        assert not images(here.config, first) + images(here.config, second)
        assert not upkeep.delete_images(here.db, here.config, here.now)
        assert len(images(here.config, first)) == 30
        assert not images(here.config, second)
        assert not list((spool / DELETED).iterdir())


def test_a_study_whose_images_cannot_be_deleted_holds_up_no_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with hospital(tmp_path / "here", retention={"delete_images_after_days": 30}) as here:
        first, second = (scanned(here, tmp_path / str(seed), seed) for seed in (1, 2))
        here.work()
        here.pass_time(31 * 86400)
        aside = here.config.storage.spool / DELETED
        aside.mkdir()
        (aside / first).write_bytes(b"no folder")
        assert upkeep.delete_images(here.db, here.config, here.now)
        assert len(images(here.config, first)) == 30
        assert not images(here.config, second)
        assert f"images of study {first} cannot be deleted: " in caplog.text


def test_nothing_is_deleted_by_default_nor_while_it_is_on_the_list() -> None:
    assert Config().retention.delete_images_after_days is None
    with pytest.raises(ConfigError, match="leave_list_after_days"):
        config.parse({"retention": {"delete_images_after_days": 3}})


def test_strays_are_put_aside_and_what_is_whole_comes_on_record(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with hospital(tmp_path / "here", retention={"quarantine_days": 10}) as here:
        uid = scanned(here, tmp_path / "first", 1)
        here.now = peers.now()
        here.work()
        spool = here.config.storage.spool
        first, *_ = images(here.config, uid)
        series = first.parent
        (other,) = phantom.write_study(tmp_path / "other", seed=9, slices=1, rows=64)
        strays = {
            spool / "notes.txt": b"call back",
            spool / uid / "thumbs.db": b"?",
            series / "1.2.3.dcm": b"no image at all",
            series / "copy of an image": first.read_bytes(),
            series / "1.2.4.dcm": other.read_bytes(),
            spool / uid / RESULTS / "20260101T000000000000" / "sr.dcm": b"left by who was killed",
        }
        for path, data in strays.items():
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)
        (spool / "lost+found").mkdir()
        (spool / "lost+found" / "inode").write_bytes(b"")
        (spool / ".writable").write_bytes(b"")
        unknown = scanned(here, tmp_path / "second", 2)
        with here.db._write() as connection:
            connection.exec_driver_sql("DELETE FROM instance WHERE study_instance_uid = ?", (unknown,))
            connection.exec_driver_sql("DELETE FROM study WHERE study_instance_uid = ?", (unknown,))
        before = {path for path in spool.rglob("*") if path.is_file()} - set(strays)

        sweep = upkeep.Quarantine(here.db, here.config)
        now = peers.now()
        while sweep.step(now):
            pass
        assert not (spool / QUARANTINE).exists(), "whatever is young may be in the middle of something"
        later = now + timedelta(hours=2)
        with caplog.at_level(logging.INFO):
            while sweep.step(later):
                pass
        aside = spool / QUARANTINE / f"{later:%Y%m%dT%H%M%S}"
        found = {
            spool / path.relative_to(aside): path.read_bytes() for path in aside.rglob("*") if path.is_file()
        }
        assert found == strays
        assert {path for path in spool.rglob("*") if path.is_file()} - set(aside.rglob("*")) == before
        assert len(here.db.instances(unknown)) == 30
        assert "1.2.3.dcm of the spool was put into its quarantine: not a DICOM file" in caplog.text
        assert here.entry(uid).study.state is StudyState.ANALYZED

        for path in (spool, spool / uid, series):  # as if it happened days later
            os.utime(path, (0, 0))
        shutil.copy(first, series / "again")
        os.utime(series, (0, 0))
        while sweep.step(later + timedelta(days=2)):
            pass
        assert (series / "again").exists(), "folders in which nothing changed are not looked at again"
        while sweep.step(later + timedelta(days=11)):
            pass
        assert not aside.exists()
