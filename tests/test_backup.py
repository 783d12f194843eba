"""A back-up made while images come is whole; restored at another place it goes on as if nothing was."""

from __future__ import annotations

import shutil
import tarfile
import threading
from pathlib import Path

import pytest

from tests import forked, peers
from tests.hospital import Hospital, hospital
from triage import backup, config, daemon, trail
from triage.db import Database
from triage.dicom import files, phantom
from triage.dicom.listener import Listener, index_spool
from triage.domain import DeliveryState, StudyState
from triage.errors import ConfigError

SLICES = 30


def restored(folder: Path, source: Path, pacs_port: int) -> Hospital:
    settings = config.load(peers.write_config(folder, pacs_port), {})
    backup.restore(settings, source)
    database = Database(settings.database.url)
    return Hospital(settings, database)


def scanned(here: Hospital, folder: Path, seed: int) -> str:
    phantom.write_study(folder, seed=seed, slices=SLICES, rows=64, slice_spacing=8)
    peers.scan(folder, here.config)
    return next(iter(index_spool(here.config.storage.spool))).study_instance_uid


@pytest.mark.parametrize("name", ["kept", "kept.tar"])
def test_a_back_up_made_while_images_come_goes_on_elsewhere(tmp_path: Path, name: str) -> None:
    target = tmp_path / name
    with peers.pacs(tmp_path / "pacs") as (port, received), hospital(tmp_path / "here", port) as here:
        judged = scanned(here, tmp_path / "first", 1)
        here.work()
        answer = here.entry(judged).result
        sent = len(received)
        phantom.write_study(tmp_path / "second", seed=2, slices=SLICES, rows=64, slice_spacing=8)
        scanner = threading.Thread(target=peers.scan, args=(tmp_path / "second", here.config))
        scanner.start()
        peers.wait_until(lambda: len(here.db.search("")) == 2)
        saved = backup.save(here.db, here.config, target, here.now)
        scanner.join()
        assert saved.missing == 0
        assert saved.files > SLICES
        assert (saved.linked > 0) is (target.is_dir())
        shutil.rmtree(here.config.storage.spool)  # the disk is gone

        there = restored(tmp_path / "there", target, port)
        for instance in index_spool(there.config.storage.spool, there.db.sop_instance_uids):
            there.receive(instance)  # what came after the database was copied and before its file was
        for entry in there.db.search(""):
            images = there.db.instances(entry.study.study_instance_uid)
            assert all(one.path.is_relative_to(tmp_path / "there") and one.path.is_file() for one in images)
        kept = there.entry(judged).result
        assert answer is not None
        assert kept is not None
        assert kept.content_key == answer.content_key
        assert all(path.is_file() for path in kept.files.values())
        settled = daemon.open_database(there.config)
        while trail.step(settled, trail.FILE, trail.sinks(there.config.audit)[trail.FILE]):
            pass
        assert list(trail.faults(settled, there.config.audit)) == []
        settled.close()
        with hospital_at(there):
            peers.scan(tmp_path / "second", there.config)  # as the PACS sends what it holds to be missing
            there.work()
        states = {entry.study.state for entry in there.db.search("")}
        assert states == {StudyState.ANALYZED}
        assert len(received) == 2 * sent, "the second study's results went out, the first one's not again"
        for entry in there.db.search(""):
            assert set(entry.deliveries) == {DeliveryState.SENT}
        there.db.close()


def hospital_at(there: Hospital) -> Listener:
    return Listener(
        there.config.listener,
        there.config.storage.spool,
        on_received=there.receive,
        has_room=lambda: True,
        on_conflict=there.db.note_conflict,
    )


def test_a_folder_is_renewed_and_nothing_is_deleted_meanwhile(tmp_path: Path) -> None:
    with hospital(tmp_path / "here") as here:
        scanned(here, tmp_path / "first", 1)
        spool = here.config.storage.spool
        first = backup.save(here.db, here.config, tmp_path / "kept", here.now)
        scanned(here, tmp_path / "second", 2)
        again = backup.save(here.db, here.config, tmp_path / "kept", here.now)
        assert (first.files, again.files) == (SLICES, 2 * SLICES)
        with files.undisturbed(spool), files.undisturbed(spool), files.may_delete(spool) as may:
            assert not may
        with files.may_delete(spool) as may:
            assert may
        next(spool.glob("*/*/*.dcm")).unlink()
        assert backup.save(here.db, here.config, tmp_path / "new", here.now).missing == 1
        with pytest.raises(ConfigError, match="lies in the spool"):
            backup.save(here.db, here.config, spool / "kept", here.now)
        with pytest.raises(ConfigError, match="move it away"):
            backup.restore(here.config, tmp_path / "kept")


def test_the_commands(tmp_path: Path) -> None:
    with hospital(tmp_path / "here") as here:
        here.now = peers.now()
        uid = scanned(here, tmp_path / "first", 1)
    old, new = tmp_path / "here" / "config.yaml", peers.write_config(tmp_path / "there")
    made = forked.command("--config", str(old), "backup", str(tmp_path / "kept"))
    assert made.returncode == 0, made.stderr
    assert f"{SLICES} files of the spool" in made.stdout
    assert "linked, not copied" in made.stdout
    assert {path.stat().st_mode & 0o077 for path in (tmp_path / "kept").iterdir()} == {0}
    assert "restored as of" in forked.command("--config", str(new), "restore", str(tmp_path / "kept")).stdout
    assert uid in forked.command("--config", str(new), "worklist").stdout
    twice = forked.command("--config", str(new), "restore", str(tmp_path / "kept"))
    assert (twice.returncode, "there is a database" in twice.stderr) == (78, True)


@pytest.mark.parametrize("name", ["../outside", "/tmp/outside"])
def test_an_archive_from_elsewhere_writes_nothing_outside(tmp_path: Path, name: str) -> None:
    bad = tmp_path / "bad.tar"
    with tarfile.open(bad, "w") as tar:
        tar.addfile(tarfile.TarInfo(name))
    settings = config.load(peers.write_config(tmp_path / "there"), {})
    with pytest.raises(ConfigError, match="cannot be restored"):
        backup.restore(settings, bad)
    assert not (tmp_path / "outside").exists()
