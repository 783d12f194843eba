"""Starts and supervises the roles, each a process of its own; signals; recovery at boot.

    supervisor ─┬─ listener   storage SCP: spool and database
                ├─ clerk      APScheduler: assembly, delivery, housekeeping
                ├─ analyzer   the network
                ├─ web        the page
                └─ orders     HL7 from the RIS, where orders.port is set

Each role can also be started alone (systemd units, containers). A role stops when it is told to
(SIGTERM, SIGINT) or when its supervisor is gone; it finishes the unit of work it is in, or hands it back
when that takes too long. A role whose loops do not turn any more is killed and started again.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from time import monotonic

from apscheduler.executors.pool import ThreadPoolExecutor
from apscheduler.schedulers.background import BackgroundScheduler

from triage import assemble, commitment, deliver, orders, policies, priority, pull, trail, upkeep
from triage.alive import SILENT, Ear, Pulse, Silent, notify
from triage.config import AnyDestination, Config, Destination
from triage.db import Database
from triage.dicom import files
from triage.dicom.listener import Listener, index_spool
from triage.dicom.lists import Lists
from triage.dicom.storage_commitment import Reports
from triage.domain import Instance, WorklistEntry
from triage.errors import ConfigError, DeviceLost, FreshProcess, Retryable, traced
from triage.incoming import mllp
from triage.logs import about

log = logging.getLogger(__name__)

IDLE_SECONDS = 0.5
M_ARENA_MAX, ARENAS = -8, 2
"""Of mallopt(3), and how many the listener's threads share."""
SWITCH_SECONDS = 0.0005
"""A thread whose packet has come waits no longer for one that computes."""
OVERTIME_SECONDS = 25.0
"""What a role is at when it is told to stop, it hands back after this."""
STOP_SECONDS = 28.0
"""After this the supervisor kills who has not stopped."""
HEAD_START_SECONDS = 3.0
HUNG_SECONDS = 120.0
"""A role that has been ready and then silent for this long hangs."""
NOTIFY_SECONDS = 5.0
LONGEST_JOB_SECONDS = 3600.0
"""One step of the clerk's, such as fetching what is missing of a study, is done by then or never."""
RESTART_SECONDS = 5.0
STOPPING = (signal.SIGTERM, signal.SIGINT)
PROVEN_SECONDS = 60.0
"""A role that has run this long was configured well: what stops it later is not its settings."""


class Overtime(BaseException):
    """Ends what a role is at when it was told to stop OVERTIME_SECONDS ago; all of it will be done again."""


def now() -> datetime:
    """The one clock of the daemon; every step gets its time from here."""
    return datetime.now(UTC)


def open_database(config: Config) -> Database:
    database = Database(config.database.url, sync=config.storage.sync)
    database.migrate()
    return database


# --- the roles -----------------------------------------------------------------------------------


def run_listener(config: Config, stop: threading.Event, pulse: Silent = SILENT) -> None:
    """Receive until told to stop; first put on record what a killed process left unrecorded."""
    sys.setswitchinterval(SWITCH_SECONDS)
    _share_arenas()
    db = open_database(config)
    spool = config.storage.spool
    spool.mkdir(parents=True, exist_ok=True)
    for instance in index_spool(spool, db.sop_instance_uids):
        try:
            _record(db, config, instance)
        except Exception as error:  # noqa: BLE001 - one image must not keep the listener from starting
            log.error("%s in the spool cannot be put on record: %s", instance.sop_instance_uid, traced(error))
    listener = Listener(
        config.listener,
        spool,
        on_received=lambda instance: _record(db, config, instance),
        has_room=lambda: files.has_room(config.storage),
        on_conflict=db.note_conflict,
        worklist=_lists(db, config) if config.lists.serve else None,
        commitments=_reports(db, config) if commitment.wanted(config) else None,
        on_refused=lambda kind: pulse.count("refused", kind),
        on_turn=pulse.loop("accepting"),
        sync=config.storage.sync,
    )
    if not config.storage.sync:
        log.warning("%s", files.NOT_DURABLE)
    gc.collect()
    gc.freeze()  # what is there stays, and need not be looked through again and again
    try:
        listener.start()
    except OSError as error:
        where = f"listener.port = {config.listener.port}"
        raise ConfigError(f"{where}: cannot listen on {config.listener.host}: {error.strerror}") from error
    pulse.ready()
    try:
        stop.wait()
    finally:
        listener.stop()


def _lists(db: Database, config: Config) -> Lists:
    """The open studies for other machines' queries, as the page shows them; in shadow mode nothing is told
    of what was found.
    """

    def open_studies(limit: int) -> list[WorklistEntry]:
        settings = policies.in_force(db, config)
        entries = db.worklist(now(), settings.ordering, settings.retention.leave_list_after_days, limit)
        return [_as_arrived(entry, settings) for entry in entries] if config.shadow else entries

    return Lists(open_studies, config.listener.ae_title, config.lists.maximum_answers)


def _as_arrived(entry: WorklistEntry, config: Config) -> WorklistEntry:
    """The place of a study as if nobody had judged it."""
    place = priority.pending(entry.study.arrived_at, entry.study.stat, config.priority)
    return replace(entry, priority=replace(place, reason=""))


def _reports(db: Database, config: Config) -> Reports:
    """What archives say of their commitment, put on record."""
    return Reports(lambda report: commitment.take(db, config, report, now()))


def _share_arenas() -> None:
    """glibc has memory for each thread apart, and keeps it: a thread for each association would fill it for
    days. Other C libraries do not.
    """
    with suppress(AttributeError):
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, ARENAS)


def run_analyzer(config: Config, stop: threading.Event, pulse: Silent = SILENT) -> None:
    """Judge one study after the other."""
    from triage import analyze, models  # torch is loaded by this process only

    db = open_database(config)
    owner = f"{socket.gethostname()}/analyzer"
    released = db.release_leases(now(), owner)
    log.info("analyzer ready; %d interrupted studies will be judged again", released)
    model = models.load(config.analysis)
    device = str(model.settings.get("device", "cpu"))
    db.roles.computes_on("analyzer", device, chosen=config.analysis.device == "cpu")
    turn = pulse.loop("judging", config.analysis.lease_seconds + 60)

    def step() -> bool:
        turn()
        # A hung network or GPU ends the process when its lease runs out; the supervisor starts another.
        faulthandler.dump_traceback_later(config.analysis.lease_seconds, exit=True)
        try:
            return analyze.step(db, config, model, owner, now())
        finally:
            faulthandler.cancel_dump_traceback_later()

    pulse.ready()
    try:
        repeat(step, stop, pulse)
    except Overtime:
        db.release_leases(now(), owner)
        raise


def run_clerk(config: Config, stop: threading.Event, pulse: Silent = SILENT) -> None:
    """Assemble, deliver and tidy up on schedule."""
    db = open_database(config)
    files.make_folder(config.storage.spool)
    db.restart_quiet_periods(now())
    db.restart_waits(now())
    db.waive_commitments([one.name for one in commitment.wanted(config)])
    policies.settle(db, config, now(), always=True)
    strays = upkeep.Quarantine(db, config)
    jobs: dict[str, tuple[Callable[[], bool], float]] = {
        **{
            f"audit trail to its {name}": (partial(trail.step, db, name, sink), 10)
            for name, sink in trail.sinks(config.audit).items()
        },
        "sessions": (lambda: db.people.end_old_sessions(now(), config.web.session), 3600),
        "studies out of date": (lambda: db.forget(now(), config.retention.leave_list_after_days), 3600),
        "images out of date": (lambda: upkeep.delete_images(db, config, now()), 3600),
        "quarantine": (lambda: strays.step(now()), 86400),
        "policy": (lambda: policies.settle(db, config, now()), 20),
        "assemble": (lambda: assemble.step(db, config, now()), 1),
        "clock": (lambda: db.heed_clock(now(), config.analysis.lease_seconds), 60),
        "leases": (lambda: db.release_leases(now()) > 0, 60),
    }
    for destination in config.destinations:
        jobs[f"deliver to {destination.name}"] = (_delivery(db, config, destination), 1)
    for destination in commitment.asked(config):
        jobs[f"ask {destination.name} for its commitment"] = (_commitment(db, config, destination), 1)
    if (source := config.pull.reconcile) is not None:
        archive, take = pull.archive(config, source), pull.receiver(db, config, now)
        jobs[f"compare with {source}"] = (lambda: pull.step(db, config, archive, take, now()), 1)
    if (ris := config.orders.worklist) is not None:
        jobs["ask for priorities"] = (lambda: orders.step(db, config, ris, now()), 10)
    logging.getLogger("apscheduler").setLevel(logging.ERROR)  # that a step still runs is no news
    scheduler = BackgroundScheduler(
        timezone="UTC",
        executors={"default": ThreadPoolExecutor(len(jobs))},  # one that hangs holds up no other
        job_defaults={"coalesce": True, "max_instances": 1},
    )
    for name, (step, seconds) in jobs.items():
        turning = _turning(step, pulse.loop(name, seconds + LONGEST_JOB_SECONDS))
        arguments = [turning, stop, pulse]
        scheduler.add_job(drain, "interval", args=arguments, seconds=seconds, id=name, next_run_time=now())
    scheduler.start()
    pulse.ready()
    stop.wait()
    scheduler.shutdown(wait=True)


def _turning(step: Callable[[], bool], turn: Callable[[], None]) -> Callable[[], bool]:
    def turning() -> bool:
        turn()
        return step()

    return turning


def _delivery(db: Database, config: Config, destination: AnyDestination) -> Callable[[], bool]:
    return lambda: deliver.step(db, config, destination, now())


def _commitment(db: Database, config: Config, destination: Destination) -> Callable[[], bool]:
    return lambda: commitment.step(db, config, destination, now())


def run_orders(config: Config, stop: threading.Event, pulse: Silent = SILENT) -> None:
    """Take orders and final reports from the RIS until told to stop."""
    settings = config.orders
    if settings.port is None:
        raise ConfigError("orders.port is not set: there is nothing to listen on")
    db = open_database(config)
    turn = pulse.loop("accepting")
    try:
        mllp.serve(
            settings,
            settings.port,
            lambda raw: orders.receive(db, config, raw, now()),
            stop,
            on_ready=pulse.ready,
            on_turn=turn,
        )
    except OSError as error:
        where = f"orders.port = {settings.port}"
        raise ConfigError(f"{where}: cannot listen on {settings.host}: {error.strerror}") from error


def run_web(config: Config, stop: threading.Event, pulse: Silent = SILENT) -> None:
    """Serve the page."""
    from triage.web import app as web  # what the page needs does not hold up the listener's start

    web.serve(open_database(config), config, now, stop, on_ready=pulse.ready, on_turn=pulse.loop("answering"))


ROLES: Mapping[str, Callable[[Config, threading.Event, Silent], None]] = {
    "listener": run_listener,
    "clerk": run_clerk,
    "analyzer": run_analyzer,
    "web": run_web,
    "orders": run_orders,
}


def _record(db: Database, config: Config, instance: Instance) -> None:
    assemble.register(db, config, instance, now())


# --- loops: the only places where anything is caught ------------------------------------------------


def drain(step: Callable[[], bool], stop: threading.Event, pulse: Silent = SILENT) -> bool:
    """Repeat a step while it finds work. False when it failed: the caller waits before the next try."""
    about("")
    try:
        while not stop.is_set() and step():
            about("")
    except (DeviceLost, FreshProcess) as failure:
        pulse.count("step", "device lost" if isinstance(failure, DeviceLost) else "fresh process")
        log.error("%s; this process ends for a new one", failure)
        stop.set()
        return False
    except Retryable as failure:
        pulse.count("step", "retried")
        log.warning("%s; trying again", failure)
        return False
    except Exception as error:  # noqa: BLE001 - one failure must not end the loop
        pulse.count("step", "unexpected")
        log.error("unexpected error: %s; trying again", traced(error))
        return False
    return True


def repeat(step: Callable[[], bool], stop: threading.Event, pulse: Silent = SILENT) -> None:
    """Drain a step again and again until told to stop."""
    while not stop.is_set():
        stop.wait(IDLE_SECONDS if drain(step, stop, pulse) else RESTART_SECONDS)


# --- processes -----------------------------------------------------------------------------------


def run_role(name: str, config: Config, *, supervised: bool) -> None:
    """Run one role in this process until a signal, or until the supervisor's end of stdin closes."""
    stop = stopped_by_signals()
    if supervised:
        threading.Thread(target=_stop_at_end_of, args=(sys.stdin.buffer.fileno(), stop), daemon=True).start()
    _end_overtime(stop)
    log.info("%s starts", name)
    database = open_database(config)
    pulse = Pulse(name, database, now)
    try:
        with trail.lifetime(database, name, now), pulse.beating():
            policies.adopt(database, config, now())
            ROLES[name](config, stop, pulse)
            signal.setitimer(signal.ITIMER_REAL, 0)
    except Overtime:
        log.warning("%s stops in the middle of its work, which will be done again", name)
        logging.shutdown()
        os._exit(os.EX_OK)  # threads that still are at it would be waited for
    log.info("%s stops", name)


def _end_overtime(stop: threading.Event) -> None:
    """Raise Overtime in this, the main thread, OVERTIME_SECONDS after ``stop`` was set."""

    def end(*_: object) -> None:
        raise Overtime

    def wind_up() -> None:
        stop.wait()
        signal.setitimer(signal.ITIMER_REAL, OVERTIME_SECONDS)

    signal.signal(signal.SIGALRM, end)
    threading.Thread(target=wind_up, name="overtime", daemon=True).start()


def stopped_by_signals() -> threading.Event:
    """An event that SIGTERM and SIGINT set.

    A thread of its own hears of them. A handler runs within whatever the main thread is at: it may hold the
    event's lock, or be just about to wait for it, and the signal would be missed.
    """
    stop = threading.Event()
    heard, told = os.pipe()
    os.set_blocking(told, False)
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    for number in STOPPING:
        signal.signal(number, lambda *_: None)

    def wait_for_one() -> None:
        while os.read(heard, 1)[0] not in STOPPING:
            pass
        stop.set()

    threading.Thread(target=wait_for_one, name="signals", daemon=True).start()
    return stop


def supervise(config_path: Path, roles: Sequence[str], stop: threading.Event) -> int:
    """Keep one process a role alive until ``stop`` is set. Returns the exit status of the daemon.

    A role that cannot start as configured ends the daemon: wrong at start or never. A role that has
    worked before is started again and again instead, so that the others go on receiving. systemd is told
    that we are ready as soon as all roles are, or at the latest after PROVEN_SECONDS.
    """
    ear, status = Ear(), 0
    children: dict[str, _Child] = {}
    for role in roles:
        children[role] = _Child(role, config_path, ear.address)
        if role == "listener":
            _let_begin(children[role], ear, stop)
    told = _Told(children.values())
    while not stop.wait(IDLE_SECONDS):
        _hear(ear, children.values())
        for child in children.values():
            if child.ended() == os.EX_CONFIG and not child.has_worked:
                status = os.EX_CONFIG
                stop.set()
            elif child.ended() is not None and child.may_restart():
                child.start_again()
            elif child.is_hung():
                child.kill("does not answer any more")
        told.tell()
    notify("STOPPING=1")
    for child in children.values():
        child.ask_to_stop()
    deadline = monotonic() + STOP_SECONDS
    for child in children.values():
        child.wait_or_kill(deadline - monotonic())
    ear.close()
    return status


def _let_begin(child: _Child, ear: Ear, stop: threading.Event) -> None:
    """The others would take the processor from it for seconds, in which nobody could send."""
    deadline = monotonic() + HEAD_START_SECONDS
    while not (child.is_ready or child.ended() is not None or monotonic() > deadline or stop.wait(0.02)):
        _hear(ear, [child])


def _hear(ear: Ear, children: Collection[_Child]) -> None:
    for process, states in ear.heard():
        for child in children:
            child.hear(process, states)


class _Child:
    """One role's process. Its stdin is a pipe from us: when we die, however we die, it sees the end."""

    def __init__(self, role: str, config_path: Path, tell: str) -> None:
        self.role = role
        self.has_worked = False
        self._heard: float | None = None
        """When it last gave a sign of life; None until it is ready."""
        self._environment = {**os.environ, "NOTIFY_SOCKET": tell}
        # -P: a folder called triage where we were started, such as a clone, is not our package.
        self._command = [sys.executable, "-P", "-m", "triage", "--config", str(config_path)]
        self._command += ["serve", "--role", role, "--supervised"]
        self._process, self._started = self._launch()

    def start_again(self) -> None:
        self.ask_to_stop()  # it is dead; this closes our end of its pipe
        self._process, self._started = self._launch()

    def _launch(self) -> tuple[subprocess.Popen[bytes], float]:
        process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, start_new_session=True, env=self._environment
        )
        self._heard = None
        return process, monotonic()

    def hear(self, process: int, states: Sequence[str]) -> None:
        """What a process has said; of others it is nothing to us."""
        if process == self._process.pid and ("READY=1" in states or self.is_ready):
            self._heard = monotonic()

    @property
    def is_ready(self) -> bool:
        return self._heard is not None

    def is_hung(self) -> bool:
        """True when it was ready and has been silent since, for long."""
        return self._heard is not None and monotonic() - self._heard > HUNG_SECONDS

    def ended(self) -> int | None:
        """Exit status, or None while it runs."""
        status = self._process.poll()
        if status is None and monotonic() - self._started > PROVEN_SECONDS:
            self.has_worked = True
        return status

    def may_restart(self) -> bool:
        """True RESTART_SECONDS after the last start at the earliest."""
        if monotonic() - self._started < RESTART_SECONDS:
            return False
        log.error("%s ended with status %s; starting it again", self.role, self._process.returncode)
        return True

    def ask_to_stop(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()

    def kill(self, why: str) -> None:
        log.error("%s %s; killed. What it was doing will be done again", self.role, why)
        self.has_worked, self._heard = True, None
        self._process.kill()

    def wait_or_kill(self, seconds: float) -> None:
        try:
            self._process.wait(max(seconds, 0.1))
        except subprocess.TimeoutExpired:
            self.kill("did not stop in time")
            self._process.wait()


class _Told:
    """What systemd has been told of us: once that we are ready, and again and again that we live."""

    def __init__(self, children: Collection[_Child]) -> None:
        self._children, self._started = children, monotonic()
        self._is_ready, self._last = False, 0.0

    def tell(self) -> None:
        if monotonic() - self._last < NOTIFY_SECONDS and self._is_ready:
            return
        waited_for = [child.role for child in self._children if not child.is_ready]
        if not waited_for or monotonic() - self._started > PROVEN_SECONDS:
            self._is_ready = True
        status = f"waiting for {', '.join(waited_for)}" if waited_for else "all roles are ready"
        notify(*(["READY=1"] if self._is_ready else []), f"STATUS={status}", "WATCHDOG=1")
        self._last = monotonic()


def _stop_at_end_of(stdin: int, stop: threading.Event) -> None:
    while os.read(stdin, 1024):
        pass
    stop.set()
