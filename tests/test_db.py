"""The database keeps what it promised: states, revisions, deliveries, and order."""

import dataclasses
import json
import multiprocessing
import sqlite3
import stat
from collections.abc import Callable, Sequence
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import alembic.command
import alembic.config
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, select

from triage.config import PriorityPolicy
from triage.db import Database, intake
from triage.db.engine import MIGRATIONS, connect
from triage.db.records import result_document, result_of
from triage.db.tables import instance as instance_table
from triage.db.tables import metadata, stat_order
from triage.db.tables import study as study_table
from triage.domain import (
    Band,
    CtSeverityScore,
    DeliveryState,
    Grade,
    Instance,
    Owed,
    Priority,
    Result,
    ResultKind,
    ResultObject,
    Status,
    StudyState,
)
from triage.errors import ConfigError, Retryable
from triage.priority import pending

NOW = datetime(2026, 3, 1, 8, 0, tzinfo=UTC)
POLICY = PriorityPolicy()
Way = Callable[[Connection, intake.Arrival], None]


def an_instance(study: str = "1.2", sop: str = "1.2.3.1", digest: str = "d1") -> Instance:
    return Instance(
        study_instance_uid=study,
        series_instance_uid=study + ".3",
        sop_instance_uid=sop,
        sop_class_uid="1.2.840.10008.5.1.4.1.1.2",
        transfer_syntax_uid="1.2.840.10008.1.2.1",
        path=Path("/spool") / study / sop,
        digest=digest,
        patient_id="P1",
        patient_name="Doe^Jane",
        accession_number="A1",
        image_position_patient=(0.0, 0.0, 1.5),
        image_type=("ORIGINAL", "PRIMARY", "AXIAL"),
    )


def an_answer(study: str = "1.2", key: str = "k1", status: Status = Status.POSITIVE) -> Result:
    return Result(
        study_instance_uid=study,
        patient_id="P1",
        status=status,
        reason="because",
        probability=0.9,
        affected_fraction=0.3,
        grade=Grade.CT2,
        ground_glass_ml=812.5,
        consolidation_ml=0.0,
        percent_infection=0.25,
        ct_severity_score=CtSeverityScore((1,) * 10, (0, 0, 0, 0, 0, 0, 0, 0, 2, 2)),
        content_key=key,
        seconds={"read": 1.0},
        files={ResultKind.SR: Path("/spool/sr.dcm")},
    )


def objects(key: str = "k1") -> tuple[ResultObject, ...]:
    uid = f"2.25.1{len(key)}"
    return (ResultObject(ResultKind.SR, Path("/spool/sr.dcm"), uid, "1.2.840.10008.5.1.4.1.1.88.34"),)


def place(band: Band = Band.SEVERE, minutes: float = 30) -> Priority:
    return Priority(band, 0.5, NOW + timedelta(minutes=minutes), "right lung 30 % affected")


@pytest.fixture
def db(tmp_path: Path) -> Database:
    database = Database(f"sqlite:///{tmp_path}/triage.db")
    database.migrate()
    return database


def waiting(arrived_at: datetime, stat: bool) -> Priority:
    return pending(arrived_at, stat, POLICY)


def register(
    db: Database, received: Instance, now: datetime = NOW, judgeable: bool = True, stat: bool = False
) -> None:
    db.register(received, now, judgeable=judgeable, stat=stat, pending=waiting)


def judged(db: Database, key: str = "k1", band: Band = Band.SEVERE, minutes: float = 30) -> None:
    seen = db.quiet_study(NOW + timedelta(days=1))
    assert seen is not None
    assert db.mark_ready(seen)
    claimed = db.claim("me", NOW, 60)
    assert claimed is not None
    assert db.finish(claimed, an_answer(key=key), [Owed("PACS", objects(key))], place(band, minutes), NOW)


def test_nobody_else_reads_names(tmp_path: Path) -> None:
    db = Database(f"sqlite:///{tmp_path}/var/triage.db")
    db.migrate()
    register(db, an_instance())
    files = list((tmp_path / "var").iterdir())
    assert len(files) > 1, "the write-ahead log too"
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}


def test_instances_come_back_as_they_were_registered(db: Database) -> None:
    register(db, an_instance())
    assert db.instances("1.2") == [an_instance()]


def test_the_same_instance_again_changes_nothing(db: Database) -> None:
    register(db, an_instance())
    judged(db)
    register(db, an_instance(), NOW + timedelta(minutes=59))
    assert len(db.instances("1.2")) == 1
    entry = db.entry("1.2")
    assert entry is not None
    assert entry.study.state is StudyState.ANALYZED


def test_other_bytes_under_a_known_uid_are_noted_and_never_replace(db: Database) -> None:
    register(db, an_instance())
    register(db, an_instance(digest="other"))
    entry = db.entry("1.2")
    assert entry is not None
    assert "different content" in entry.study.notes[0]
    assert db.instances("1.2")[0].digest == "d1"


def said(**choices: list[object]) -> st.SearchStrategy[dict[str, object]]:
    return st.fixed_dictionaries({name: st.sampled_from(values) for name, values in choices.items()})


ONE = said(
    sop=["1", "2", "3", "4", "5", "6"],
    digest=["d1", "d1", "d2"],
    patient_id=["P1", "P1", "", "P2"],
    patient_name=["Doe^Jane", ""],
    accession_number=["A1", "A1", "", "STAT"],
    scanner=["Acme", "Acme", ""],
    judgeable=[True, True, True, False],
    stat=[False, False, True],
)
MOVED = said(state=[StudyState.READY, StudyState.ANALYZED, StudyState.FAILED])
EVENTS = st.tuples(*[ONE] * 4, MOVED | ONE, *[ONE] * 3)


def test_the_short_way_of_an_image_comes_to_the_same(tmp_path: Path) -> None:
    """Of two databases one goes the long way with every image."""
    ways = [Database(f"sqlite:///{tmp_path}/{name}.db", sync=False) for name in ("short", "long")]
    for db in ways:
        metadata.create_all(db._engine)

    @settings(max_examples=80)
    @given(EVENTS)
    def compare(events: Sequence[dict[str, object]]) -> None:
        for db, way in zip(ways, (intake.register, intake.weigh), strict=True):
            with db._write() as connection:
                for table in (instance_table, study_table, stat_order):
                    connection.execute(table.delete())
                connection.execute(stat_order.insert().values(accession_number="STAT", ordered_at=NOW))
                for number, event in enumerate(events):
                    happen(connection, way, event, NOW + timedelta(seconds=number))
        assert rows(ways[0]) == rows(ways[1])

    compare()


def happen(connection: Connection, way: Way, event: dict[str, object], now: datetime) -> None:
    if "state" in event:
        connection.execute(study_table.update().values(state=event["state"], reason="", attempts=1))
        return
    facts = dict(event)
    judgeable, stat = bool(facts.pop("judgeable")), bool(facts.pop("stat"))
    one = an_instance(sop=str(facts.pop("sop")), digest=str(facts.pop("digest")))
    way(connection, intake.Arrival(dataclasses.replace(one, **facts), now, judgeable, stat, waiting))


def rows(db: Database) -> list[object]:
    with db._read() as connection:
        studies = [{**row, "changed": 0} for row in connection.execute(select(study_table)).mappings()]
        return [studies, sorted(map(tuple, connection.execute(select(instance_table))), key=str)]


def test_objects_that_are_not_ct_images_never_reopen_a_study(db: Database) -> None:
    register(db, an_instance())
    judged(db)
    register(db, an_instance(sop="2.25.12"), judgeable=False)
    assert len(db.instances("1.2")) == 2
    entry = db.entry("1.2")
    assert entry is not None
    assert entry.study.state is StudyState.ANALYZED


def test_a_late_slice_reopens_and_brings_a_closed_study_back(db: Database) -> None:
    register(db, an_instance())
    judged(db)
    assert db.close_study("1.2", "read", NOW)
    assert db.worklist(NOW, "deadline", 7) == []
    register(db, an_instance(sop="1.2.3.2"), NOW + timedelta(minutes=5))
    (entry,) = db.worklist(NOW, "deadline", 7)
    assert entry.study.state is StudyState.RECEIVING
    assert entry.priority == dataclasses.replace(place(), reason="new images came, not judged yet")


def test_a_reopened_negative_study_moves_up_to_those_nobody_has_judged(db: Database) -> None:
    register(db, an_instance())
    judged(db, band=Band.ROUTINE, minutes=480)
    register(db, an_instance(sop="1.2.3.2"), NOW + timedelta(minutes=5))
    (entry,) = db.worklist(NOW, "deadline", 7)
    assert entry.priority == dataclasses.replace(
        waiting(NOW, False), reason="new images came, not judged yet"
    )


def test_new_images_bring_an_old_study_back(db: Database) -> None:
    register(db, an_instance())
    later = NOW + timedelta(days=8)
    assert db.worklist(later, "deadline", 7) == []
    register(db, an_instance(sop="1.2.3.2"), later)
    assert len(db.worklist(later, "deadline", 7)) == 1
    assert sum(db.counts(later, 7).values()) == 1


def test_what_the_first_object_did_not_know_comes_with_the_next(db: Database) -> None:
    """A dose report without accession number first; then CT images of a STAT order."""
    first = dataclasses.replace(an_instance(sop="1.2.3.9"), accession_number="", patient_name="")
    register(db, first, judgeable=False)
    register(db, an_instance(), NOW + timedelta(seconds=9), stat=True)
    (entry,) = db.worklist(NOW, "deadline", 7)
    assert (entry.study.accession_number, entry.study.patient_name) == ("A1", "Doe^Jane")
    assert entry.study.stat
    assert entry.priority == waiting(NOW, True)


def test_the_list_has_no_end(db: Database) -> None:
    for n in range(230):
        register(db, an_instance(f"1.{n + 1}"))
    assert len(db.worklist(NOW, "deadline", 7)) == 230


def test_slices_that_come_during_the_analysis_discard_it(db: Database) -> None:
    register(db, an_instance())
    seen = db.quiet_study(NOW)
    assert seen is not None
    db.mark_ready(seen)
    claimed = db.claim("me", NOW, 60)
    assert claimed is not None
    register(db, an_instance(sop="1.2.3.2"), NOW + timedelta(seconds=1))
    assert not db.finish(claimed, an_answer(), [Owed("PACS", objects())], place(), NOW)
    assert db.results("1.2") == []
    assert db.deliveries("1.2") == []


def test_a_revision_is_written_and_sent_only_for_a_new_answer(db: Database) -> None:
    register(db, an_instance())
    judged(db, "k1")
    db.requeue("1.2", NOW, waiting)
    judged(db, "k1")
    assert [r.revision for r in db.results("1.2")] == [1]
    db.requeue("1.2", NOW, waiting)
    judged(db, "key2")
    assert [r.revision for r in db.results("1.2")] == [2, 1]
    (owed,) = db.deliveries("1.2")  # the first was never sent: it is out of date
    assert owed.sop_instance_uid == objects("key2")[0].sop_instance_uid


def test_an_answer_comes_back_whole_and_one_from_before_a_figure_existed_without_it(db: Database) -> None:
    register(db, an_instance())
    judged(db, "k1")
    (kept,) = db.results("1.2")
    assert kept == dataclasses.replace(an_answer(), revision=kept.revision)
    document = result_document(an_answer())
    del document["percent_infection"], document["ct_severity_score"]
    assert result_of(document) == dataclasses.replace(
        an_answer(), percent_infection=None, ct_severity_score=None
    )


def test_a_lease_is_given_back_at_boot_or_when_it_runs_out(db: Database) -> None:
    register(db, an_instance())
    seen = db.quiet_study(NOW)
    assert seen is not None
    db.mark_ready(seen)
    assert db.claim("me", NOW, 60) is not None
    assert db.claim("me", NOW, 60) is None
    assert db.release_leases(NOW, owner="another") == 0
    assert db.release_leases(NOW, owner="me") == 1
    assert db.claim("me", NOW, 60) is not None
    assert db.release_leases(NOW + timedelta(seconds=61)) == 1


def test_a_failed_study_is_claimed_again_only_when_its_time_has_come(db: Database) -> None:
    register(db, an_instance())
    seen = db.quiet_study(NOW)
    assert seen is not None
    db.mark_ready(seen)
    claimed = db.claim("me", NOW, 60)
    assert claimed is not None
    assert db.mark_failed(claimed, "disk full", place(), NOW + timedelta(minutes=1), attempts=1)
    assert db.claim("me", NOW, 60) is None
    again = db.claim("me", NOW + timedelta(minutes=1), 60)
    assert again is not None
    assert again.attempts == 2
    assert db.mark_given_up(again, an_answer(status=Status.FAILED), place(), NOW)
    assert db.claim("me", NOW + timedelta(days=1), 60) is None
    assert db.requeue("1.2", NOW, waiting)
    assert db.quiet_study(NOW) is not None


def test_deliveries_wait_are_sent_or_given_up(db: Database) -> None:
    register(db, an_instance())
    judged(db)
    (owed,) = db.due_deliveries("PACS", NOW)
    db.postpone(owed.delivery_id, "refused", NOW + timedelta(minutes=1))
    assert db.due_deliveries("PACS", NOW) == []
    (owed,) = db.due_deliveries("PACS", NOW + timedelta(minutes=1))
    assert (owed.attempts, owed.last_error) == (1, "refused")
    db.give_up(owed.delivery_id, "refused for days")
    assert db.due_deliveries("PACS", NOW + timedelta(days=9)) == []
    db.requeue("1.2", NOW, waiting)
    (owed,) = db.due_deliveries("PACS", NOW)
    db.mark_sent(owed.delivery_id, NOW)
    (done,) = db.deliveries("1.2")
    assert done.state is DeliveryState.SENT


def test_closed_and_old_studies_leave_the_list_and_stay_searchable(db: Database) -> None:
    register(db, an_instance("1.2"))
    register(db, an_instance("1.9"), NOW + timedelta(days=6))
    later = NOW + timedelta(days=8)
    assert [e.study.study_instance_uid for e in db.worklist(later, "deadline", 7)] == ["1.9"]
    assert {e.study.study_instance_uid for e in db.search("doe")} == {"1.2", "1.9"}
    assert db.search("%") == []


def test_what_is_too_old_is_marked_and_comes_back(db: Database) -> None:
    def marked() -> list[str]:
        with db._read() as connection:
            query = "SELECT study_instance_uid FROM study WHERE forgotten ORDER BY 1"
            return list(connection.exec_driver_sql(query).scalars())

    def settle(now: datetime, days: float) -> list[str]:
        while db.forget(now, days):
            pass
        listed = {entry.study.study_instance_uid for entry in db.worklist(now, "deadline", days)}
        assert listed == {"1.2", "1.7", "1.8", "1.9"} - set(marked())
        return marked()

    for number in (2, 7, 8, 9):
        register(db, an_instance(f"1.{number}", f"1.{number}.1"), NOW + timedelta(days=number))
    now = NOW + timedelta(days=10)
    assert settle(now, 7) == ["1.2"]
    assert settle(now, 1.5) == ["1.2", "1.7", "1.8"]
    assert settle(now, 3.5) == ["1.2"]  # they stay longer than before
    register(db, an_instance("1.2", "1.2.2"), now)
    assert marked() == []
    assert settle(now, 2.5) == ["1.7"]
    assert db.requeue("1.7", now, waiting)
    assert marked() == []


@settings(max_examples=25)
@given(st.lists(st.tuples(st.sampled_from(list(Band)), st.floats(0, 1), st.integers(1, 500)), max_size=12))
def test_both_orderings(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[Band, float, int]]
) -> None:
    db = Database(f"sqlite:///{tmp_path_factory.mktemp('db')}/triage.db")
    db.migrate()
    for n, (band, score, minutes) in enumerate(rows):
        priority = Priority(band, score, NOW + timedelta(minutes=minutes), "")
        arrived = NOW + timedelta(seconds=n)
        db.register(
            an_instance(f"1.{n + 1}"),
            arrived,
            judgeable=True,
            stat=False,
            pending=lambda *_, place=priority: place,
        )
    by_deadline = [e.priority.due_at for e in db.worklist(NOW, "deadline", 7)]
    assert by_deadline == sorted(by_deadline)
    strict = [
        (Band.INDETERMINATE if e.priority.band is Band.NOT_JUDGED else e.priority.band, -e.priority.score)
        for e in db.worklist(NOW, "strict", 7)
    ]
    assert strict == sorted(strict)
    db.close()


def _register_many(url: str, first: int) -> None:
    db = Database(url)
    for n in range(first, first + 25):
        register(db, an_instance(sop=f"1.2.3.{n}"))


def test_two_processes_write_at_once(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/triage.db"
    db = Database(url)
    db.migrate()
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_register_many, args=(url, first)) for first in (100, 200)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert len(db.instances("1.2")) == 50


def test_a_lost_database_is_retryable_and_a_wrong_url_is_named(tmp_path: Path) -> None:
    db = Database(f"sqlite:///{tmp_path}/triage.db")  # never migrated: no tables
    with pytest.raises(Retryable, match="database"):
        db.quiet_study(NOW)
    for url in ("nonsense://x", "postgresql://host/triage", "sqlite://"):
        with pytest.raises(ConfigError, match="sqlite:///path"):
            Database(url)


def test_studies_from_before_have_what_lists_ask_for(tmp_path: Path) -> None:
    file = tmp_path / "triage.db"
    upgraded(file, "0012")
    with closing(sqlite3.connect(file)) as old, old:
        old.execute(
            "INSERT INTO study (study_instance_uid, state, reason, arrived_at, last_received_at, patient_id,"
            " patient_name, accession_number, study_date, study_description, stat, notes, attempts, band,"
            " score, due_at, priority_reason, closed_reason) VALUES ('1.2', 'analyzed', '', '2026-03-01',"
            " '2026-03-01', 'P', 'N', 'A', '', '', 0, '[]', 0, 4, 0.5, '2026-03-01', '', '')"
        )
        for number, judgeable in enumerate((0, 1)):
            old.execute(
                "INSERT INTO instance VALUES ('1.2', ?, '1', '1', '1', 'x', 'x', '2026-03-01', ?, ?)",
                (str(number), judgeable, json.dumps({"scanner": ("PRINTER", "FORCE")[number]})),
            )
        said = [("positive", 0.9, None), ("negative", 0.1, 0.0), ("failed", None, None)]
        for revision, (status, probability, fraction) in enumerate(said, 1):
            document = {"probability": probability, "affected_fraction": fraction}
            old.execute(
                "INSERT INTO result VALUES ('1.2', ?, 'k', ?, ?, ?)",
                (revision, status, f"2026-03-0{revision} 00:00:00.000000", json.dumps(document)),
            )
    upgraded(file, "head")
    with closing(sqlite3.connect(file)) as new:
        query = "SELECT scanner, status, probability, affected_fraction, judged_at, searched FROM study"
        known = ("FORCE", "negative", 0.1, 0.0, "2026-03-02 00:00:00.000000", "p\nn\na\n1.2")
        assert new.execute(query).fetchall() == [known]


def upgraded(file: Path, revision: str) -> None:
    config = alembic.config.Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    engine = connect(f"sqlite:///{file}")
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        alembic.command.upgrade(config, revision)
    engine.dispose()


REVISIONS = sorted(path.name[:4] for path in MIGRATIONS.glob("versions/0*.py"))


def shape(file: Path) -> dict[str, object]:
    """Every column, index and trigger, whatever order they were made in."""
    with closing(sqlite3.connect(file)) as connection:
        tables = [
            name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        ]
        found: dict[str, object] = {}
        for table in sorted(set(tables) - {"alembic_version", "sqlite_sequence"}):
            columns = connection.execute(f"PRAGMA table_xinfo('{table}')").fetchall()
            found[table] = {(row[1], row[2], row[3], row[5], row[6]) for row in columns}
            for _, name, unique, _, partial in connection.execute(f"PRAGMA index_list('{table}')").fetchall():
                keys = [row[2] for row in connection.execute(f"PRAGMA index_info('{name}')")]
                known = name if not name.startswith("sqlite_autoindex") else ",".join(keys)
                found[f"{table}.{known}"] = (keys, unique, partial)
        triggers = connection.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall()
        found["triggers"] = sorted(triggers)
        return found


def some_rows(file: Path) -> dict[str, int]:
    """One row in every table that there is; how many there are then."""
    values = {
        "INTEGER": 1,
        "BOOLEAN": 0,
        "FLOAT": 0.5,
        "DATETIME": "2026-03-01 00:00:00.000000",
        "JSON": "[]",
    }
    counts = {}
    with closing(sqlite3.connect(file)) as old, old:
        tables = [name for (name,) in old.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        for table in set(tables) - {"alembic_version", "sqlite_sequence"}:
            columns = [row for row in old.execute(f"PRAGMA table_xinfo('{table}')") if row[6] == 0]
            given = [values.get(row[2].partition("(")[0], "1.2") for row in columns]
            given = [
                '{"probability": 0.5}' if row[1] in ("document", "facts") else value
                for row, value in zip(columns, given, strict=True)
            ]
            names = ", ".join(f'"{row[1]}"' for row in columns)
            places = ", ".join("?" * len(columns))
            old.execute(f'INSERT INTO "{table}" ({names}) VALUES ({places})', given)
            counts[table] = 1
    return counts


@pytest.fixture(scope="module")
def newest(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """The shape of a database that never was another."""
    file = tmp_path_factory.mktemp("new") / "triage.db"
    upgraded(file, "head")
    return shape(file)


@pytest.mark.parametrize("revision", REVISIONS)
def test_every_release_is_brought_to_the_newest_shape(
    revision: str, tmp_path: Path, newest: dict[str, object]
) -> None:
    """With rows in it, and without losing one but wrong passwords, which are forgotten after a day anyway."""
    file = tmp_path / "triage.db"
    upgraded(file, revision)
    counts = some_rows(file)
    upgraded(file, "head")
    assert shape(file) == newest
    with closing(sqlite3.connect(file)) as new:
        assert new.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert new.execute("PRAGMA foreign_key_check").fetchall() == []
        for table in set(counts) - {"login_failure"}:
            assert new.execute(f'SELECT count(*) FROM "{table}"').fetchone() >= (counts[table],), table
    database = Database(f"sqlite:///{file}")
    with database._read() as connection:
        assert connection.exec_driver_sql("SELECT study_instance_uid FROM study").scalars().all() == ["1.2"]
    database.close()


def test_the_newest_shape_is_that_of_the_tables(tmp_path: Path, newest: dict[str, object]) -> None:
    """What the queries are written for is what the migrations make, down to the last index."""
    engine = connect(f"sqlite:///{tmp_path}/made.db")
    metadata.create_all(engine)
    engine.dispose()
    made = shape(tmp_path / "made.db")
    assert made.keys() - {"triggers"} == newest.keys() - {"triggers"}
    for name in made.keys() - {"triggers"}:
        if "." in name:
            assert made[name] == newest[name], name
        else:
            assert {row[0] for row in made[name]} == {row[0] for row in newest[name]}, name


def test_no_migration_promises_a_way_back() -> None:
    """Only the back-up is one: a table that others refer to cannot be made anew while it has rows."""
    assert [
        path.name for path in MIGRATIONS.glob("versions/*.py") if "def downgrade" in path.read_text()
    ] == []
