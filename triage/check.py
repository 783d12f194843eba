"""Go or no-go: everything the daemon needs, tried once before a study depends on it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

from triage import daemon, deliver, models, policies, pull
from triage.config import AnyDestination, Config, Destination, DicomWeb, ServerTls, Webhook
from triage.dicom import files, sender
from triage.errors import TriageError


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the table."""

    what: str
    go: bool
    detail: str


def run(config: Config) -> Iterator[Check]:
    """Try spool, disk, database, weights, device, every destination and every source."""
    yield _spool(config)
    if config.listener.tls is not None:
        yield _listener_tls(config.listener.tls)
    yield _database(config)
    yield _policy(config)
    yield from _model(config)
    if not config.delivery.destinations:
        yield Check("destinations", True, "none configured: results stay in the spool and on the page")
    for destination in config.delivery.destinations:
        error = deliver.reach(destination, config)
        yield Check(f"destination {destination.name}", error is None, error or _answers(destination))
    for source in config.pull.sources:
        try:
            yield Check(f"source {source.name}", True, pull.archive(config, source.name).reach())
        except TriageError as fault:
            yield Check(f"source {source.name}", False, str(fault))
    if (ris := config.orders.worklist) is not None:
        error = sender.echo(ris, config.listener.ae_title, config.delivery.timeout_seconds)
        where = f"{ris.ae_title} at {ris.host}:{ris.port} answers C-ECHO"
        yield Check(f"worklist of {ris.name}", error is None, error or where)


def _answers(destination: AnyDestination) -> str:
    match destination:
        case Destination():
            also = ", offers storage commitment" if destination.commitment else ""
            return f"{destination.ae_title} at {destination.host}:{destination.port} answers C-ECHO{also}"
        case DicomWeb():
            return f"{destination.kind} at {destination.url} answers"
        case Webhook():  # the path of such an address often is a secret
            return f"{destination.kind} at {urlsplit(destination.url).hostname} answers"
    return f"{destination.kind} at {destination.host}:{destination.port} answers"


def _spool(config: Config) -> Check:
    spool, needed = config.storage.spool, config.storage.minimum_free_gb
    try:
        files.make_folder(spool)
        probe = spool / ".writable"
        files.write_durably(probe, b"")
        probe.unlink()
    except (TriageError, OSError) as error:
        return Check("spool", False, f"{spool}: {error}; the daemon's user must be able to write there")
    if not config.storage.sync:
        return Check("spool", False, files.NOT_DURABLE)
    free = files.free_gigabytes(spool)
    detail = f"{spool}: {free:.0f} GB free, storage.minimum_free_gb is {needed:g}"
    return Check("spool", files.has_room(config.storage), detail)


def _listener_tls(tls: ServerTls) -> Check:
    try:
        tls.context()
    except OSError as error:
        return Check(
            "listener.tls", False, f"{error}: certificate, key and ca are PEM files that belong together"
        )
    who = "whoever connects" if tls.ca is None else f"who shows a certificate of {tls.ca}"
    return Check("listener.tls", True, f"TLS 1.2 or newer, for {who}")


def _database(config: Config) -> Check:
    known = config.database.file.exists()
    try:
        database = daemon.open_database(config)
        open_studies = sum(database.counts(daemon.now(), config.retention.leave_list_after_days).values())
        waiting = database.destinations_owed()
        database.close()
    except TriageError as error:
        return Check("database", False, str(error))
    unknown = waiting - {destination.name for destination in config.delivery.destinations}
    if unknown:
        names = ", ".join(sorted(unknown))
        return Check(
            "database", False, f"results wait for {names}, which delivery.destinations does not name"
        )
    new = "" if known else "new and empty; is the path right? "
    return Check("database", True, f"{config.database.url}: {new}{open_studies} open studies")


def _policy(config: Config) -> Check:
    """Which version counts, and whether config.yaml does, or will."""
    try:
        database = daemon.open_database(config)
        newest = database.policy()
        database.close()
    except TriageError as error:
        return Check("policy", False, str(error))
    counts = f"version {newest.version} by {newest.author} counts: {newest.reason}" if newest else ""
    return Check("policy", True, "; ".join(filter(None, [counts, policies.of_the_file(newest, config)])))


def _model(config: Config) -> Iterator[Check]:
    try:
        model = models.load(config.analysis)
    except TriageError as error:
        yield Check("weights", False, str(error))
        return
    calibrated = "calibrated" if model.info.calibrated else "not calibrated"
    detail = f"{model.info.name} {model.info.version}, hashes as its card says, {calibrated}, research use"
    yield Check("weights", True, detail)
    settings = ", ".join(f"{name} {value}" for name, value in model.settings.items())
    yield Check("device", True, settings)
    if (speeds := models.speeds(config.analysis)) is not None:
        taken = ", ".join(f"{name} {milliseconds:.1f}" for name, milliseconds in speeds.items())
        yield Check("engine", True, f"milliseconds a slice in a trial: {taken}")
