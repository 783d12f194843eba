"""The commands a person types. No logic here: each calls one door and prints what it gave."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from getpass import getuser
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from triage import __version__, logs, passwords
from triage import config as configuration
from triage.audit import Actor, Event, messages
from triage.config import Analysis, Config
from triage.db import Database
from triage.domain import DeliveryState, Role, WorklistEntry, percent
from triage.errors import ConfigError, TriageError
from triage.rows import delivery_row, entry_row, result_row

if TYPE_CHECKING:
    from triage.dicom.query import Query
    from triage.dicom.receiving import Receiver
    from triage.models.packages import Metric, Package
    from triage.pull import Archive, Coming, File
    from triage.training.evaluation import Evaluation

app = typer.Typer(
    help="Receives chest CTs, judges them, writes results back to the PACS and orders the worklist. "
    "Research use, not a medical device.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
out = Console()
err = Console(stderr=True)

TRAINING = ("matplotlib", "SimpleITK", "sklearn", "tensorboard")
"""Modules of the extra that training and evaluation need."""
DEFAULT_CONFIG = Path("config.yaml")
DELIVERIES = {
    DeliveryState.PENDING: "pending",
    DeliveryState.GIVEN_UP: "given up",
    DeliveryState.COMMITTING: "delivered, commitment awaited",
    DeliveryState.NOT_COMMITTED: "delivered, not committed",
}
"""What `triage deliveries` calls what is not finished."""
SHADOW = "shadow mode: in order of arrival; results go to destinations with mode shadow or both only"
STOPPED = 128 + signal.SIGINT
"""Exit status after Ctrl-C, as shells have it."""
SHOWN = 10
"""Files named with the same reason; of more, the number is enough."""

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of a table.")]
StudyUid = Annotated[str, typer.Argument(help="Study Instance UID, as the worklist shows it.")]


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    config: Annotated[
        Path, typer.Option("--config", "-c", envvar="TRIAGE_CONFIG", help="The settings file.")
    ] = DEFAULT_CONFIG,
    version: Annotated[bool, typer.Option("--version", help="Print the version and end.")] = False,
) -> None:
    """Set up what every command shares."""
    if version:
        typer.echo(f"triage {__version__}")
        raise typer.Exit
    logs.use("text", "cli")
    context.obj = config


@app.command()
def serve(
    context: typer.Context,
    role: Annotated[
        list[str] | None,
        typer.Option(help="Run only this role: listener, clerk, analyzer, web or orders. Without it: all."),
    ] = None,
    supervised: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Run the daemon: receive, judge, deliver, show the worklist. Ends on Ctrl-C or SIGTERM."""
    from triage import daemon

    os.umask(0o077)  # images and names are for this user alone
    with _plain_errors():
        settings = configuration.load(context.obj)
        roles = role or settings.roles
        for name in roles:
            if name not in daemon.ROLES:
                raise ConfigError(f"--role {name}: unknown; there are {', '.join(daemon.ROLES)}")
        if "web" in roles and not supervised:
            _offer_first_link(settings)
        logs.use(settings.log.format, roles[0] if len(roles) == 1 else "supervisor")
        if supervised:
            daemon.run_role(roles[0], settings, supervised=True)
        elif len(roles) == 1:
            daemon.run_role(roles[0], settings, supervised=False)
        else:
            raise typer.Exit(daemon.supervise(context.obj, roles, daemon.stopped_by_signals()))


@app.command()
def predict(
    context: typer.Context,
    paths: Annotated[list[Path], typer.Argument(help="Folders or files with DICOM images.", exists=True)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results of each study.")],
    model: Annotated[str | None, typer.Option(help="Network to use instead: a name or a folder.")] = None,
    as_json: AsJson = False,
) -> None:
    """Judge studies from files: writes SEG, SR and picture of each, and prints the answers."""
    from triage import models
    from triage import predict as prediction

    with _plain_errors():
        settings = _load_or_defaults(context.obj)
        if model is not None:
            analysis = settings.analysis.model_copy(update={"model": model})
            settings = settings.model_copy(update={"analysis": analysis})
        network = models.load(settings.analysis)
        found = prediction.find(paths)
        for path, reason in found.unreadable:
            err.print(
                f"passed over {path}: {reason}", style="yellow", highlight=False, markup=False, soft_wrap=True
            )
        if not found.studies:
            raise ConfigError(f"no DICOM instance found in {', '.join(map(str, paths))}")
        output.mkdir(parents=True, exist_ok=True)
        with Progress(console=err, transient=True) as progress:
            studies = prediction.predict(found, output, network, settings, datetime.now(UTC))
            answers = list(progress.track(studies, len(found.studies), description="judging"))
        if len(answers) > 1:
            prediction.write_summary(answers, output / "summary.csv")
    lines = [result_row(answer) for answer in answers]
    if as_json:
        typer.echo(json.dumps(lines, indent=2, ensure_ascii=False))
    else:
        out.print(_predictions(lines))
        out.print(
            f"results of each study: {output}/<Study Instance UID>/; stages and figures: --json",
            soft_wrap=True,
        )
    if any(line["status"] == "failed" for line in lines):
        raise typer.Exit(1)


@app.command(name="import")
def import_(
    context: typer.Context,
    paths: Annotated[
        list[Path] | None, typer.Argument(help="Folders, zip files or files.", exists=True)
    ] = None,
    source: Annotated[str, typer.Option("--from", help="Instead: an archive, a name of pull.sources.")] = "",
    date: Annotated[str, typer.Option(help="Study date or range: 20260301, 20260301-20260331.")] = "",
    description: Annotated[
        str, typer.Option(help="Part of the study description, or all of it with * and ?.")
    ] = "",
    patient: Annotated[str, typer.Option(help="Patient ID.")] = "",
    accession: Annotated[str, typer.Option(help="Accession number.")] = "",
    study: Annotated[str, typer.Option(help="Study Instance UID.")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would come.")] = False,
) -> None:
    """Bring studies in as if they had been sent: they are judged, ordered and delivered like all others.

    Run it as the daemon's user: root beside a daemon that is not root is refused.
    """
    from triage import pull
    from triage.dicom.query import Query

    os.umask(0o077)  # images and names are for the daemon's user alone
    with _plain_errors(), Progress(console=err, transient=True) as progress:
        asked = {
            "--date": date,
            "--description": description,
            "--patient": patient,
            "--accession": accession,
            "--study": study,
        }
        filters = " ".join(f"{option} {value}" for option, value in asked.items() if value)
        query = Query(*asked.values())
        if paths and source:
            raise ConfigError("give folders or files, or --from SOURCE and what to look for; not both")
        if filters and not source:
            raise ConfigError(f"{filters.split()[0]} goes with --from SOURCE")
        if not (paths or source):
            raise ConfigError("give folders or files; or --from SOURCE and what to look for")
        settings = configuration.load(context.obj)
        pull.check_user(settings.storage.spool)
        database = _database(settings)
        take = None if dry_run else pull.receiver(database, settings, lambda: datetime.now(UTC), _typist())
        if paths:
            found = progress.track(pull.find(paths), description="reading")
            read = pull.read_files(found, database, take)
            studies, passed_over = list(read.studies.values()), read.passed_over
        else:
            studies, passed_over = (
                _fetched(database, pull.archive(settings, source), query, take, progress),
                [],
            )
            if study and not studies:
                raise TriageError(f"{source} has no such study: {filters}")
    for line in _passed_over(passed_over):
        err.print(line, style="yellow", highlight=False, markup=False, soft_wrap=True)
    if source and not studies:
        out.print(f"{source} has no such study: {filters}", markup=False, highlight=False, soft_wrap=True)
    out.print(_came(studies, dry_run), soft_wrap=True)
    if any(one.error for one in studies) or (paths and not studies):
        raise typer.Exit(1)


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe, or path of a YAML file.")],
    data: Annotated[list[str], typer.Option(help="KIND=PATH of a data set; may be given again.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder; a run that stopped goes on there.")],
    validation: Annotated[
        str, typer.Option(help="Patients who choose the lesion threshold, never trained on.")
    ] = "",
    test: Annotated[str, typer.Option(help="Patients who are left out altogether.")] = "",
    leave_one_out: Annotated[
        bool, typer.Option("--leave-one-out", help="Also train once without each patient, for the card.")
    ] = False,
    folds: Annotated[
        str,
        typer.Option(help="Also train so many times, each patient left out of one; or a file of folds."),
    ] = "",
    variants: Annotated[
        str, typer.Option(help="Variants of the recipe to train and compare: all, or names, comma separated.")
    ] = "",
    jobs: Annotated[int, typer.Option(min=1, help="Trainings side by side with --folds.")] = 1,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where to train.")] = "auto",
    threads: Annotated[int, typer.Option(min=0, help="Processor cores; 0: all.")] = 0,
) -> None:
    """Train a network; the finished model is a folder that analysis.model can name."""
    with _plain_errors(), Progress(console=err) as progress:
        from triage.training import making
        from triage.training import recipe as recipes
        from triage.training import variants as comparing
        from triage.training.run import Run

        run = Run(
            recipe=recipes.load(recipe),
            sources=_sources(data),
            output=output,
            validation=_names(validation),
            test=_names(test),
            device=device,
            threads=threads,
        )
        asked, watch = _folds(folds, leave_one_out), making.Watch(progress)
        if variants:
            names = comparing.chosen(run.recipe, variants)
            compared = comparing.compare(run, names, watch, asked, jobs)
        else:
            folder = making.make(run, watch, asked, jobs)
    if variants:
        out.print(f"{recipe}, measured on {compared.measured_on}:", soft_wrap=True)
        out.print(comparing.table(compared))
        out.print(f"every figure: {output / comparing.FILE}", soft_wrap=True)
        return
    out.print(f"{recipe} is in {folder}", soft_wrap=True)
    if asked:
        out.print(f"those left out: triage evaluate --left-out {output}", soft_wrap=True)
    if run.recipe.system:
        out.print(f"measure it: triage evaluate --model {folder} --data KIND=PATH", soft_wrap=True)


@app.command()
def evaluate(
    context: typer.Context,
    data: Annotated[
        list[str] | None, typer.Option(help="KIND=PATH of a data set; may be given again.")
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="Network, a name or a folder; given again, compared with.")
    ] = None,
    patients: Annotated[str, typer.Option(help="Only these patients, comma separated.")] = "",
    left_out: Annotated[
        list[Path] | None,
        typer.Option(help="Instead: output of triage train with folds, for those it left out; again, too."),
    ] = None,
    as_json: AsJson = False,
    report: Annotated[Path | None, typer.Option(help="Folder for a readable report with plots.")] = None,
) -> None:
    """Measure networks on cases whose answers are known: figures with intervals, and the paper's beside."""
    with _plain_errors():
        from triage.training import making, tables

        if report:  # what it needs is missed before the work, not after
            from triage.training import report as _  # noqa: F401

        if bool(data) == bool(left_out) or (left_out and (model or patients)):
            raise ConfigError("give --data KIND=PATH, or --left-out FOLDER without --model and --patients")
        if left_out:
            evaluations = [making.evidence(folder) for folder in left_out]
        else:
            analysis = _load_or_defaults(context.obj).analysis
            evaluations = _judged(analysis, model or [analysis.model], _sources(data or []), _names(patients))
        pages = _reports(evaluations, report) if report else []
    if as_json:
        answers = [tables.as_json(one) for one in evaluations]
        answer = answers[0] if len(answers) == 1 else answers
        typer.echo(json.dumps(answer, indent=2, ensure_ascii=False, allow_nan=False))
        return
    out.print(tables.for_people(evaluations))
    for page in pages:
        out.print(f"report: {page}", soft_wrap=True)


@app.command()
def worklist(
    context: typer.Context,
    as_json: AsJson = False,
    watch: Annotated[bool, typer.Option("--watch", help="Stay and update until Ctrl-C.")] = False,
) -> None:
    """Print the open studies in reading order."""
    with _plain_errors():
        settings = configuration.load(context.obj)
        database = _database(settings)
        look = partial(_open_studies, database, settings, set())
        if as_json:
            entries, now = look()
            typer.echo(json.dumps([entry_row(e, now) for e in entries], indent=2, ensure_ascii=False))
        elif watch:
            with Live(console=out, screen=True, auto_refresh=False) as live, _until_interrupted():
                while True:
                    live.update(_list(*look(), settings.shadow), refresh=True)
                    time.sleep(settings.web.refresh_seconds)
        else:
            out.print(_list(*look(), settings.shadow))


@app.command()
def check(context: typer.Context, as_json: AsJson = False) -> None:
    """Go or no-go: try settings, disk, database, weights, device, every destination and every source."""
    from triage import check as checking

    with _plain_errors():
        settings = configuration.load(context.obj)
        detail = f"{context.obj}; {SHADOW}" if settings.shadow else str(context.obj)
        checks = [checking.Check("settings", True, detail), *checking.run(settings)]
    if as_json:
        typer.echo(json.dumps([{"what": c.what, "go": c.go, "detail": c.detail} for c in checks], indent=2))
    else:
        table = Table("", "what", "detail", box=None)
        for c in checks:
            table.add_row("[green]go[/]" if c.go else "[bold red]NO-GO[/]", c.what, c.detail)
        out.print(table)
        _offer_first_link(settings)
    if not all(c.go for c in checks):
        raise typer.Exit(1)


@app.command(name="models")
def list_models(as_json: AsJson = False) -> None:
    """List the networks that analysis.model can name: their hashes, data, figures, licence and limits."""
    from triage import models

    with _plain_errors():
        packages = models.describe()
    if as_json:
        rows = [{"version": p.version, **p.card.model_dump(mode="json"), "card": p.text} for p in packages]
        typer.echo(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    for package in packages:
        out.print(_card(package))


@app.command()
def requeue(context: typer.Context, study_uid: StudyUid) -> None:
    """Assemble and judge a study again, and try its undelivered results anew."""
    from triage import policies

    with _plain_errors():
        settings = configuration.load(context.obj)
        database = _database(settings)
        pending = policies.pending(database, settings)
        _known(database.requeue(study_uid, datetime.now(UTC), pending), study_uid)
        _record(database, Event.REQUEUED, study_uid)
    out.print(
        f"{study_uid} will be looked at again; the same images, weights and settings keep their answer",
        soft_wrap=True,
    )


@app.command()
def deliveries(context: typer.Context, as_json: AsJson = False) -> None:
    """Show what waits to be sent to its destination, or to be committed by it, or was given up, and why."""
    with _plain_errors():
        database = _database(configuration.load(context.obj))
        unfinished = database.undelivered() + database.uncommitted()
    if as_json:
        typer.echo(json.dumps([delivery_row(one) for one in unfinished], indent=2, ensure_ascii=False))
        return
    if not unfinished:
        out.print("everything has been sent")
    for one in unfinished:
        state = f"{DELIVERIES[one.state]}, tried {_count(one.attempts, 'time')}"
        what = f"{one.path.name} {one.name} of {one.study_instance_uid}" if one.path else one.name
        out.print(Text.assemble((f"{one.destination}: {state}\n", "bold"), f"  {what}"), soft_wrap=True)
        if one.last_error:
            out.print(f"  {one.last_error}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def resend(
    context: typer.Context,
    destination: Annotated[str, typer.Argument(help="Its name in delivery.destinations.")],
    study: Annotated[str | None, typer.Option(help="Only of this study: its Study Instance UID.")] = None,
) -> None:
    """Send a destination now what waits for its next try or was given up; never what it has taken.

    Where it has not committed itself to what it took, it is asked again.
    """
    with _plain_errors():
        settings = configuration.load(context.obj)
        names = [one.name for one in settings.delivery.destinations]
        if destination not in names:
            known = ", ".join(names) or "none"
            raise ConfigError(f"{destination}: no such destination; delivery.destinations has {known}")
        database, now = _database(settings), datetime.now(UTC)
        if study is not None:
            _known(database.entry(study) is not None, study)
        waiting = (
            one
            for one in [*database.undelivered(), *database.uncommitted()]
            if one.destination == destination
        )
        uids = [study] if study is not None else sorted({one.study_instance_uid for one in waiting})
        told = _told(database, Event.RESENT, uids, destination) if uids else []
        count = database.resend(destination, study, now, told)
        asked = database.ask_anew(destination, study, now)
    results = _count(count, "result")
    if destination not in [one.name for one in settings.destinations]:
        why = "shadow mode" if settings.shadow else "it gets results in shadow mode only"
        out.print(f"{results} for {destination} held: {why}", markup=False, soft_wrap=True)
        return
    out.print(f"{results} will be sent to {destination} again", markup=False, soft_wrap=True)
    if asked:
        out.print(f"it will be asked again to commit itself to {asked} that it has", soft_wrap=True)


@app.command()
def close(
    context: typer.Context,
    study_uid: StudyUid,
    reason: Annotated[str, typer.Option(help="Kept with the study.")] = "read",
) -> None:
    """Take a study off the list; it stays searchable and comes back when new images arrive."""
    with _plain_errors():
        database = _database(configuration.load(context.obj))
        _known(database.close_study(study_uid, reason, datetime.now(UTC)), study_uid)
        _record(database, Event.MARKED_READ, study_uid, reason)
    out.print(f"{study_uid} is closed: {reason}", markup=False, soft_wrap=True)


@app.command()
def backup(
    context: typer.Context,
    target: Annotated[Path, typer.Argument(help="A folder, or a file whose name ends with .tar.")],
) -> None:
    """Put database and spool away, also while the daemon runs; an earlier back-up there is renewed."""
    from triage import backup as keeping
    from triage import pull

    os.umask(0o077)
    with _plain_errors():
        settings = configuration.load(context.obj)
        pull.check_user(settings.storage.spool)
        saved = keeping.save(_database(settings), settings, target, datetime.now(UTC))
    held = f"{_count(saved.files, 'file')} of the spool, {saved.bytes / 1024**3:.1f} GB, and the database"
    out.print(f"{target}: {held}", soft_wrap=True)
    if saved.linked:
        linked = _count(saved.linked, "file")
        out.print(f"{linked} linked, not copied: they lie on the same disk as the spool", soft_wrap=True)
    if saved.missing:
        said = f"{_count(saved.missing, 'file')} that the database names lay in the spool no more"
        err.print(said, style="yellow", soft_wrap=True)


@app.command()
def restore(
    context: typer.Context,
    source: Annotated[Path, typer.Argument(help="What `triage backup` made.", exists=True)],
) -> None:
    """Bring a back-up to where the settings say; the daemon must not run, and there must be no database."""
    from triage import backup as keeping
    from triage import pull

    os.umask(0o077)
    with _plain_errors():
        settings = configuration.load(context.obj)
        pull.check_user(settings.storage.spool)
        saved = keeping.restore(settings, source)
    out.print(f"restored as of {saved.made_at}, by triage {saved.version}", soft_wrap=True)


user_app = typer.Typer(help="Users of the page, for a site that is locked out.", no_args_is_help=True)
app.add_typer(user_app, name="user")
audit_app = typer.Typer(help="The audit trail.", no_args_is_help=True)
app.add_typer(audit_app, name="audit")
UserName = Annotated[str, typer.Argument(help="The user's name.")]


@user_app.command(name="list")
def list_users(context: typer.Context) -> None:
    """Print who can log in."""
    with _plain_errors():
        users = _database(configuration.load(context.obj)).people.users()
    table = Table("name", "role", "last log-in", "", box=None)
    for user in users:
        last = user.last_login_at.astimezone().strftime("%Y-%m-%d %H:%M") if user.last_login_at else "never"
        table.add_row(user.name, user.role, last, "closed" if user.disabled else "")
    out.print(table if users else "no user yet; `triage check` prints a link that makes the first one")


@user_app.command(name="add")
def add_user(
    context: typer.Context,
    name: UserName,
    role: Annotated[Role, typer.Option(help="What they are.")] = Role.ADMIN,
) -> None:
    """Make a user; asks for the password."""
    with _plain_errors():
        database = _database(configuration.load(context.obj))
        if wrong := passwords.objection_to_name(name):
            raise ConfigError(wrong)
        kept, now = _asked_password(name), datetime.now(UTC)
        told = messages(Event.USER_CHANGED, _typist(), now, detail=f"new user {name}: {role}")
        if not database.people.add_user(name, role, kept, now, told):
            raise ConfigError(f"there is a user {name} already; `triage user password {name}` lets them in")
    out.print(f"{name} can log in as {role}", markup=False)


@user_app.command(name="password")
def set_password(context: typer.Context, name: UserName) -> None:
    """Set a new password, asked for; opens a closed account and forgets wrong passwords."""
    with _plain_errors():
        database = _database(configuration.load(context.obj))
        if database.people.user(name) is None:
            raise ConfigError(f"there is no user {name}; `triage user list` names them")
        kept = _asked_password(name)
        told = messages(Event.USER_CHANGED, _typist(), datetime.now(UTC), detail=f"user {name}: new password")
        database.people.change_user(name, told, password=kept, disabled=False)
    out.print(f"{name} can log in with the new password", markup=False)


@audit_app.command()
def verify(context: typer.Context) -> None:
    """Find every row of the audit trail that was changed, removed or inserted."""
    from triage import trail

    with _plain_errors():
        settings = configuration.load(context.obj)
        database = _database(settings)
        faults = list(trail.faults(database, settings.audit))
        found = f"verified: {len(faults)} faults"
        database.trail.append(messages(Event.AUDIT_USED, _typist(), datetime.now(UTC), detail=found))
    for fault in faults:
        err.print(fault, style="bold red", highlight=False, markup=False, soft_wrap=True)
    if faults:
        raise typer.Exit(1)
    out.print("the audit trail is whole")


def _typist() -> Actor:
    return Actor(getuser(), process="triage/cli")


def _record(database: Database, event: Event, study_uid: str, detail: str = "") -> None:
    database.trail.append(_told(database, event, [study_uid], detail))


def _told(database: Database, event: Event, uids: Sequence[str], detail: str) -> list[str]:
    """Audit messages, to be written in the transaction of what they tell of."""
    studies = [entry.study for uid in uids if (entry := database.entry(uid))]
    return messages(event, _typist(), datetime.now(UTC), studies, detail)


def _asked_password(name: str) -> str:
    """The hash of a password that is typed twice, or comes from a pipe."""
    if sys.stdin.isatty():
        password: str = typer.prompt("Password", hide_input=True, confirmation_prompt=True, err=True)
    else:
        password = sys.stdin.readline().rstrip("\n")
    if wrong := passwords.objection(password, name):
        raise ConfigError(wrong)
    return passwords.hashed(password)


def _offer_first_link(settings: Config) -> None:
    from triage import first

    link = first.link(_database(settings), settings, datetime.now(UTC))
    if link is not None:
        said = "No user yet. Whoever opens this link first, within a day, becomes the admin:"
        err.print(f"{said}\n{link}", highlight=False, markup=False, soft_wrap=True)


policy = typer.Typer(
    help="Show what orders the list, set it, or go back; the page does the same.", no_args_is_help=True
)
app.add_typer(policy, name="policy")
Why = Annotated[str, typer.Option(help="Kept with the version, beside your name.")]
CHANGED = "version {} counts from now on: open studies have their new places, nothing is judged again"


@policy.command(name="show")
def show_policy(
    context: typer.Context,
    history: Annotated[bool, typer.Option("--history", help="Who set which version, when and why.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print the policy that counts, as YAML that `triage policy set` takes."""
    from triage import policies

    with _plain_errors():
        settings = configuration.load(context.obj)
        versions = _database(settings).policies(1000 if history else 1)
    newest = versions[0] if versions else None
    if as_json:
        typer.echo(json.dumps([policies.row(one) for one in versions], indent=2, ensure_ascii=False))
        return
    said = [
        f"version {one.version} by {one.author}, {one.created_at:%Y-%m-%d %H:%M} UTC: {one.reason}"
        for one in versions
    ]
    for line in filter(None, [*said, policies.of_the_file(newest, settings)]):
        out.print(f"# {line}", markup=False, highlight=False, soft_wrap=True)
    if not history:
        typer.echo(configuration.written(newest.policy if newest else settings.policy), nl=False)


@policy.command(name="set")
def set_policy(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="YAML, as `triage policy show` prints it.", exists=True)],
    reason: Why,
) -> None:
    """Set a new policy; what the file leaves out has its default."""
    from triage import policies

    with _plain_errors():
        settings = configuration.load(context.obj)
        wanted = configuration.read_policy(file, settings)
        database = _database(settings)
        new = policies.save(database, settings, wanted, _who(), reason, datetime.now(UTC), _newest(database))
    out.print(CHANGED.format(new.version), soft_wrap=True)


@policy.command(name="rollback")
def roll_back_policy(
    context: typer.Context,
    version: Annotated[int, typer.Argument(help="A version that `triage policy show --history` shows.")],
    reason: Why = "",
) -> None:
    """Set a new version that is equal to an old one."""
    from triage import policies

    with _plain_errors():
        settings = configuration.load(context.obj)
        database, now = _database(settings), datetime.now(UTC)
        new = policies.roll_back(database, settings, version, _who(), reason, now, _newest(database))
    out.print(CHANGED.format(new.version), soft_wrap=True)


def _who() -> Actor:
    """Whose account this is: the author of what is set from the terminal."""
    return Actor(f"{getuser()} (terminal)", process="triage/cli")


def _newest(database: Database) -> int:
    newest = database.policy()
    return newest.version if newest else 0


@contextmanager
def _plain_errors() -> Iterator[None]:
    """What this product raises on purpose, or a missing extra, is a sentence for the person, no traceback."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in TRAINING:
            raise
        how = "run deploy/install training, or pip install 'triage[training]'"
        err.print(f"this needs {error.name}: {how}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(os.EX_CONFIG) from error
    except KeyboardInterrupt as stopped:
        if stopped.args:  # what has come of an import
            err.print(str(stopped), highlight=False, soft_wrap=True)
        raise typer.Exit(STOPPED) from stopped
    except TriageError as error:
        err.print(str(error), style="bold red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(os.EX_CONFIG if isinstance(error, ConfigError) else 1) from error


@contextmanager
def _until_interrupted() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        return


def _load_or_defaults(path: Path) -> Config:
    """Judging files needs no settings file unless one is named."""
    return Config() if path == DEFAULT_CONFIG and not path.exists() else configuration.load(path)


def _judged(
    analysis: Analysis, models: Sequence[str], sources: Mapping[str, Path], patients: Sequence[str]
) -> list[Evaluation]:
    """Each network on the cases, one after the other."""
    from triage.training import evaluation

    with Progress(console=err, transient=True) as progress:
        track = partial(progress.track, description="judging")
        settings = [analysis.model_copy(update={"model": name}) for name in models]
        return [evaluation.run(one, sources, patients, track) for one in settings]


def _names(text: str) -> tuple[str, ...]:
    return tuple(filter(None, text.split(",")))


def _folds(text: str, leave_one_out: bool) -> int | Path | None:
    """How many folds, or a file of them; None for none."""
    from triage.training.folds import ONE_EACH

    if text and leave_one_out:
        raise ConfigError("--leave-one-out is --folds of one patient each: give one of the two")
    if leave_one_out:
        return ONE_EACH
    return (int(text) if text.isdecimal() else Path(text)) if text else None


def _sources(texts: Sequence[str]) -> dict[str, Path]:
    """KIND=PATH… → {kind: path}."""
    sources = {}
    for text in texts:
        kind, equals, path = text.partition("=")
        if not (kind and equals and path):
            raise ConfigError(f"--data {text}: write KIND=PATH, such as semiseg=folder/semiseg50")
        if kind in sources:
            raise ConfigError(f"--data {kind}=… is given twice")
        sources[kind] = Path(path)
    return sources


def _reports(evaluations: Sequence[Evaluation], folder: Path) -> list[Path]:
    """One network's report in the folder itself, several networks' in a folder each.

    Versions of one network differ in their hash.
    """
    from triage.training import report

    now = datetime.now(UTC)
    if len(evaluations) == 1:
        return [report.write(evaluations[0], folder, now)]
    return [
        report.write(
            one, folder / f"{one.info.name}_{one.info.version}", now, [e for e in evaluations if e is not one]
        )
        for one in evaluations
    ]


def _database(settings: Config) -> Database:
    from triage.daemon import open_database

    return open_database(settings)


def _count(number: int, one: str, more: str = "") -> str:
    return f"{number} {one if number == 1 else more or f'{one}s'}"


def _known(found: bool, study_uid: str) -> None:
    if not found:
        raise TriageError(f"no study {study_uid} here; `triage worklist` shows the open ones")


def _open_studies(
    database: Database, settings: Config, recorded: set[str]
) -> tuple[list[WorklistEntry], datetime]:
    """The list, and when; that it was seen is recorded of each study once, those ``recorded`` already are."""
    from triage import policies

    now = datetime.now(UTC)
    days = settings.retention.leave_list_after_days
    entries = database.worklist(now, policies.in_force(database, settings).ordering, days)
    fresh = [entry.study for entry in entries if entry.study.study_instance_uid not in recorded]
    if fresh:
        database.trail.append(messages(Event.LISTED, _typist(), now, fresh))
        recorded.update(study.study_instance_uid for study in fresh)
    return entries, now


def _list(entries: Sequence[WorklistEntry], now: datetime, shadow: bool) -> Group:
    """Some lines a study: a UID on a line of its own can be copied in any terminal."""
    heading = [Text(SHADOW, "bold")] if shadow else []
    if not entries:
        return Group(*heading, Text("no open study"))
    return Group(*heading, *(_lines(place, entry_row(entry, now)) for place, entry in enumerate(entries, 1)))


def _lines(place: int, row: dict[str, Any]) -> Text:
    due = datetime.fromisoformat(row["due_at"]).astimezone().strftime("%H:%M")
    answer = (row["status"] or row["state"]).replace("_", " ")
    counts = {DeliveryState(state): count for state, count in row["deliveries"].items()}
    sent, owed = sum(n for state, n in counts.items() if state.is_delivered), sum(counts.values())
    committed = counts[DeliveryState.COMMITTED]
    grade = f", {row['grade']}" if row["grade"] else ""
    return Text.assemble(
        (f"{place:>3}  {row['band']}, due {due}: {answer}{grade}\n", "bold"),
        f"     {row['reason']}\n",
        f"     {row['patient_id']}, {row['images']} images, {sent} of {owed} delivered"
        f"{f', {committed} committed' if committed else ''}\n",
        (f"     {row['study_instance_uid']}\n", "dim"),
    )


def _fetched(
    database: Database, archive: Archive, query: Query, take: Receiver | None, progress: Progress
) -> list[Coming]:
    from triage import pull

    studies = list(progress.track(pull.look(database, archive, query), total=None, description="asking"))
    if take is not None:
        bar, came = progress.add_task("fetching", total=sum(study.new for study in studies)), 0
        try:
            for study in studies:
                for more in pull.fetch(database, archive, study, take):
                    progress.advance(bar, more)
                    came += more
        except KeyboardInterrupt as stopped:
            raise KeyboardInterrupt(f"stopped; {pull.so_far(came)}") from stopped
    return studies


def _passed_over(files: Sequence[tuple[File, str]]) -> Iterator[str]:
    """A line a file; where many are no DICOM, as on a CD with a viewer, only the first and their number."""
    for reason in dict.fromkeys(reason for _, reason in files):
        same = [file for file, why in files if why == reason]
        yield from (f"passed over {file}: {reason}" for file in same[:SHOWN])
        if len(same) > SHOWN:
            yield f"passed over {len(same) - SHOWN} more: {reason}"


def _came(studies: Sequence[Coming], dry_run: bool) -> Group:
    """Some lines a study: a UID on a line of its own can be copied in any terminal."""
    came = "to come" if dry_run else "came"
    lines = []
    for study in studies:
        lines.append(Text(f"{study.patient_id}, {study.study_date}, {study.study_description}", "bold"))
        here = len(study.objects & study.here_before)
        lines.append(Text(f"     {study.new} {came}, {here} here before"))
        if study.error:
            missing = f"{study.missing} missing: " if study.missing else ""
            lines.append(Text(f"     {missing}{study.error}", "red"))
        lines.append(Text(f"     {study.study_instance_uid}", "dim"))
    total = sum(study.new for study in studies)
    return Group(
        *lines, Text(f"{_count(total, 'object')} of {_count(len(studies), 'study', 'studies')} {came}")
    )


def _card(package: Package) -> Table:
    card = package.card
    table = Table(card.name, f"version {package.version}", box=None)
    table.add_row("what it is", card.summary)
    table.add_row("calibrated", "yes" if card.calibrated else "no")
    table.add_row("trained on", "\n".join(card.training_data))
    for metric in card.metrics:
        table.add_row(metric.name, _figure(metric))
    table.add_row("licence", card.licence)
    table.add_row("claims", "\n".join(card.claims))
    table.add_row("limits", "\n".join(card.limits))
    if card.lungs is not None:
        table.add_row("lungs", f"those of {card.lungs}")
    for role, file in card.files.items():
        table.add_row(role, f"sha256 {file.sha256}")
    return table


def _figure(metric: Metric) -> str:
    if metric.value is None:
        return f"not measurable here{f': {metric.reason}' if metric.reason else ''}"
    interval = f" ({metric.low:g} to {metric.high:g})" if None not in (metric.low, metric.high) else ""
    unit = f" {metric.unit}" if metric.unit else ""
    patients = f", {metric.patients} patients" if metric.patients is not None else ""
    return f"{metric.value:g}{interval}{unit}{patients}, {metric.measured_on}"


def _predictions(lines: Sequence[dict[str, Any]]) -> Table:
    table = Table("patient", "answer", "why", "grade", "affected", "seconds", box=None)
    for line in lines:
        fraction = line["affected_fraction"]
        table.add_row(
            line["patient_id"],
            line["status"].replace("_", " "),
            line["reason"],
            line["grade"] or "",
            "" if fraction is None else percent(fraction),
            f"{line['seconds'].get('total', 0):.1f}",
        )
    return table
