"""config.yaml → one frozen Config. A wrong setting stops the start and says what is allowed."""

from __future__ import annotations

import os
import re
import ssl
from collections.abc import Mapping
from ipaddress import ip_address, ip_network
from pathlib import Path
from string import Formatter
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    HttpUrl,
    Tag,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from triage.errors import ConfigError

Fraction = Annotated[float, Field(ge=0, le=1)]
Seconds = Annotated[float, Field(gt=0)]
Minutes = Annotated[float, Field(gt=0, le=365 * 24 * 60)]
Port = Annotated[int, Field(ge=1, le=65535)]
AETitle = Annotated[str, Field(min_length=1, max_length=16, pattern=r"^[ -\[\]-~]*[!-\[\]-~][ -\[\]-~]*$")]

SECRETS = {
    "TRIAGE_DATABASE_URL": ("database", "url"),
    "TRIAGE_WEB_TOKEN": ("web", "token"),
}
"""Environment variables that override config.yaml: {name: (section, key)}."""
PEER_SECRET = "TRIAGE_SECRET_"  # noqa: S105 - the name of a variable
"""Followed by the name of a destination or source, in capitals and with _ for other signs: its ``secret``."""
IN_FILE = "_FILE"
"""After the name of such a variable: the file that holds the secret instead."""
PAGES = {"destinations": "Destinations", "sources": "Import and reconcile"}
"""Chapters of deploy/operating.md that list their keys."""
WITH_SECRET = ("dicomweb", "webhook", "email")
"""Kinds of these that have one; a PACS may bear the same name for DICOM, which knows no secrets."""


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach who listens there."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


class Section(BaseModel):
    """Base of every section: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class Storage(Section):
    spool: Path = Path("var/spool")
    minimum_free_gb: Annotated[float, Field(ge=0)] = 5.0
    warning_free_gb: Annotated[float, Field(ge=0)] | None = None
    """From here on down somebody is told to make room; None: twice the minimum."""
    sync: bool = True
    """Flush what is received to the disk before it is acknowledged; False only to measure."""

    @property
    def warned_gb(self) -> float:
        return 2 * self.minimum_free_gb if self.warning_free_gb is None else self.warning_free_gb

    @model_validator(mode="after")
    def _early(self) -> Self:
        if self.warned_gb < self.minimum_free_gb:
            raise ValueError("warning_free_gb must not be below minimum_free_gb: it is to warn early")
        return self


class Database(Section):
    url: str = "sqlite:///var/triage.db"

    @property
    def file(self) -> Path:
        """Where SQLite keeps it."""
        return Path(self.url.removeprefix("sqlite:///"))


class Tls(Section):
    """How to be sure of a peer, and of us: without ``ca`` the system's authorities count."""

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    @model_validator(mode="after")
    def _pair(self) -> Self:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key belong together: give both, or neither")
        return self

    def context(self) -> ssl.SSLContext:
        """TLS 1.2 or newer that checks the peer's name (BCP 195); OSError when a file cannot be used."""
        _readable(self.ca, self.certificate, self.key)
        made = ssl.create_default_context(cafile=self.ca)
        made.minimum_version = ssl.TLSVersion.TLSv1_2
        if self.certificate is not None:
            made.load_cert_chain(self.certificate, self.key)
        return made


class ServerTls(Section):
    """Who we are to those who connect; with ``ca`` they must show a certificate of one of its authorities."""

    certificate: Path
    key: Path
    ca: Path | None = None

    def context(self) -> ssl.SSLContext:
        """TLS 1.2 or newer (BCP 195); OSError when a file cannot be used."""
        _readable(self.ca, self.certificate, self.key)
        made = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=self.ca)
        made.minimum_version = ssl.TLSVersion.TLSv1_2
        made.load_cert_chain(self.certificate, self.key)
        if self.ca is not None:
            made.verify_mode = ssl.CERT_REQUIRED
        return made


def _readable(*paths: Path | None) -> None:
    for path in paths:
        if path is not None:
            path.open("rb").close()  # its error names the file, ssl's does not


class Listener(Section):
    ae_title: AETitle = "TRIAGE"
    host: str = "0.0.0.0"  # noqa: S104 - scanners and the PACS are other machines
    port: Port = 11112
    calling_ae_titles: tuple[AETitle, ...] = ()
    peers: tuple[str, ...] = ()
    maximum_associations: Annotated[int, Field(ge=1, le=1000)] = 25
    timeout_seconds: Seconds = 30.0
    maximum_pdu_bytes: Annotated[int, Field(ge=4096, le=4 * 1024 * 1024)] = 131072
    fast: bool = True
    """Store objects without pynetdicom's queues and polling; False: its own way, for everything."""
    tls: ServerTls | None = None

    @field_validator("peers")
    @classmethod
    def _networks(cls, peers: tuple[str, ...]) -> tuple[str, ...]:
        for peer in peers:
            ip_network(peer)
        return peers


class Assemble(Section):
    quiet_seconds: Seconds = 60.0
    minimum_age_years: Annotated[float, Field(ge=0, le=120)] = 18.0
    minimum_slices: Annotated[int, Field(ge=2)] = 20
    minimum_coverage_mm: Annotated[float, Field(gt=0)] = 150.0
    maximum_spacing_mm: Annotated[float, Field(gt=0)] = 10.0
    maximum_tilt_degrees: Annotated[float, Field(ge=0, le=45)] = 10.0


class Analysis(Section):
    model: str = "multitask"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    engine: Literal["auto", "torch", "openvino", "onnxruntime"] = "auto"
    threads: Annotated[int, Field(ge=0, le=256)] = 0
    lesion_threshold: Annotated[float, Field(gt=0, lt=1)] | None = None
    positive_probability: Fraction = 0.5
    positive_fraction: Fraction = 0.05
    ct0_tolerance: Annotated[float, Field(ge=0, lt=0.25)] = 0.005
    minimum_lung_ml: Annotated[float, Field(ge=0)] = 500.0
    lease_seconds: Seconds = 900.0
    maximum_attempts: Annotated[int, Field(ge=1, le=100)] = 5
    retry_seconds: Seconds = 30.0

    @model_validator(mode="after")
    def _precision_of_the_engine(self) -> Self:
        if self.engine == "onnxruntime" and self.precision == "bfloat16":
            raise ValueError("engine onnxruntime computes in float32 only; set precision to auto")
        return self


class Results(Section):
    sr: Literal["comprehensive_3d", "comprehensive", "enhanced"] = "comprehensive_3d"
    sr_not_judged: bool = False
    lesion_seg: bool = True
    lung_seg: bool = False
    seg: Literal["binary", "labelmap_rle", "labelmap_jpeg_ls"] = "binary"
    omit_empty_frames: bool = True
    picture: bool = True
    key_slices: bool = True
    view_3d: bool = False


DicomResult = Literal["lesion_seg", "lung_seg", "sr", "picture", "key_slices", "view_3d"]
Only = Literal["all", "positive", "severe", "critical"]
NotJudged = Literal["not_analysable", "failed"]
Mode = Literal["live", "shadow", "both"]


def _web_address(value: str) -> str:
    try:
        url = TypeAdapter(HttpUrl).validate_python(value)
    except ValidationError as error:
        raise ValueError("no web address; write https://host/path or https://host:port/path") from error
    if url.username or url.password:
        raise ValueError("has a user or password in it, which would be shown; set user and secret")
    if _is_link_local((url.host or "").strip("[]")):
        raise ValueError("is a link-local address: clouds tell secrets of the machine there, no peer has one")
    return value


def _is_link_local(host: str) -> bool:
    try:
        return ip_address(host).is_link_local
    except ValueError:
        return False


Url = Annotated[str, AfterValidator(_web_address)]
Host = Annotated[str, Field(min_length=1)]


class _AtUrl(Section):
    """A peer at a web address."""

    url: Url
    tls: Tls | None = None

    @model_validator(mode="after")
    def _over_tls(self) -> Self:
        if self.tls is not None and not self.url.lower().startswith("https:"):
            raise ValueError("tls is set, but the url is not https: all would be sent readable")
        return self


class _Owed(Section):
    """What every kind of destination has: a name, what it gets, and how to be sure of it."""

    name: Annotated[str, Field(min_length=1, max_length=64)]
    only: Only = "all"
    mode: Mode = "live"
    tls: Tls | None = None


class _Told(_Owed):
    """What gets answers instead of DICOM objects: also that there is none, where it asks for that."""

    also: tuple[NotJudged, ...] = ()


class Destination(_Owed):
    """A PACS that gets DICOM objects by C-STORE."""

    kind: Literal["dicom"] = "dicom"
    ae_title: AETitle
    host: Host
    port: Port
    objects: tuple[DicomResult, ...] = get_args(DicomResult)
    commitment: bool = False


class DicomWeb(_AtUrl, _Owed):
    """An archive that gets DICOM objects by STOW-RS: with ``user`` basic, with ``secret`` alone bearer."""

    kind: Literal["dicomweb"]
    user: str = ""
    secret: str = Field("", repr=False)
    objects: tuple[DicomResult, ...] = get_args(DicomResult)


class Hl7(_Told):
    """A RIS that gets the answer as ORU^R01 over MLLP."""

    kind: Literal["hl7"]
    host: Host
    port: Port
    application: str = ""
    facility: str = ""


class Webhook(_AtUrl, _Told):
    """A program that gets the answer as JSON, signed with ``secret``."""

    kind: Literal["webhook"]
    secret: str = Field(min_length=16, repr=False)


def _one_address(value: Any) -> Any:
    if isinstance(value, list | tuple):
        raise ValueError("is one address, so that each gets the letter: make a destination of each")
    return value


class Email(_Told):
    """Who gets the answer as a letter: never the patient's name or number."""

    kind: Literal["email"]
    host: Host
    port: Port = 25
    user: str = ""
    secret: str = Field("", repr=False)
    sender: Annotated[str, Field(pattern=r"^[^@\s]+@[^@\s]+$")]
    to: Annotated[str, BeforeValidator(_one_address), Field(pattern=r"^[^@\s]+@[^@\s]+$")]

    @model_validator(mode="after")
    def _hidden(self) -> Self:
        if self.user and self.tls is None:
            raise ValueError("user and secret would be sent readable: set tls, `tls: {}` is enough")
        return self


def _kind(destination: Any) -> Any:
    return destination.get("kind", "dicom") if isinstance(destination, dict) else destination.kind


AnyDestination = Annotated[
    Annotated[Destination, Tag("dicom")]
    | Annotated[DicomWeb, Tag("dicomweb")]
    | Annotated[Hl7, Tag("hl7")]
    | Annotated[Webhook, Tag("webhook")]
    | Annotated[Email, Tag("email")],
    Discriminator(
        _kind,
        custom_error_type="destination_kind",
        custom_error_message="kind must be dicom, dicomweb, hl7, webhook or email",
    ),
]


class Delivery(Section):
    destinations: tuple[AnyDestination, ...] = ()
    timeout_seconds: Seconds = 30.0
    first_retry_seconds: Seconds = 10.0
    longest_retry_seconds: Annotated[float, Field(gt=0, le=86400)] = 86400.0
    give_up_hours: Annotated[float, Field(gt=0)] = 72.0
    commitment_seconds: Seconds = 600.0

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [d.name for d in self.destinations]
        if len(set(names)) != len(names):
            raise ValueError("every destination needs a name of its own")
        if self.longest_retry_seconds < self.first_retry_seconds:
            raise ValueError("longest_retry_seconds must not be below first_retry_seconds")
        return self


class DicomSource(Section):
    """An archive that is asked by C-FIND and sends by C-GET or C-MOVE."""

    kind: Literal["dicom"] = "dicom"
    name: Annotated[str, Field(min_length=1, max_length=64)]
    ae_title: AETitle
    host: Host
    port: Port
    retrieve: Literal["auto", "get", "move"] = "auto"
    tls: Tls | None = None


class WebSource(_AtUrl):
    """An archive that is asked by QIDO-RS and read by WADO-RS; ``user``: basic, ``secret`` alone: bearer."""

    kind: Literal["dicomweb"]
    name: Annotated[str, Field(min_length=1, max_length=64)]
    user: str = ""
    secret: str = Field("", repr=False)


AnySource = Annotated[
    Annotated[DicomSource, Tag("dicom")] | Annotated[WebSource, Tag("dicomweb")],
    Discriminator(
        _kind,
        custom_error_type="source_kind",
        custom_error_message="kind must be dicom or dicomweb",
    ),
]


class Pull(Section):
    """Archives to ask and to fetch from.

    Not the destinations: who takes results need not answer queries, and often another machine does.
    """

    sources: tuple[AnySource, ...] = ()
    timeout_seconds: Seconds = 30.0
    reconcile: str | None = None
    """The source that each study is compared with before it is judged."""
    reconcile_seconds: Seconds = 300.0
    retry_seconds: Seconds = 30.0

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [source.name for source in self.sources]
        if len(set(names)) != len(names):
            raise ValueError("every source needs a name of its own")
        if self.reconcile is not None and self.reconcile not in names:
            known = ", ".join(names) or "none"
            raise ValueError(f"reconcile: no source {self.reconcile}; sources names {known}")
        return self


class TargetWaits(Section):
    """Minutes from arrival until a study of this band should be read."""

    critical: Minutes = 15.0
    severe: Minutes = 30.0
    positive: Minutes = 60.0
    indeterminate: Minutes = 120.0
    not_judged: Minutes = 120.0
    routine: Minutes = 480.0

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        waits = [self.critical, self.severe, self.positive, self.indeterminate, self.routine]
        if waits != sorted(waits):
            raise ValueError("waits must grow: critical ≤ severe ≤ positive ≤ indeterminate ≤ routine")
        if self.not_judged > self.routine:
            raise ValueError("not_judged must not wait longer than routine")
        return self


class PriorityPolicy(Section):
    ordering: Literal["deadline", "strict"] = "deadline"
    policy: Literal["identification", "severity", "combined"] = "combined"
    positive_probability: Fraction | None = None
    """From here on a study is flagged; None: from where the analysis calls it positive."""
    positive_fraction: Fraction | None = None
    indeterminate_probability: Fraction = 0.2
    indeterminate_fraction: Fraction = 0.01
    severe_fraction: Fraction = 0.25
    critical_fraction: Fraction = 0.5
    target_wait_minutes: TargetWaits = TargetWaits()

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        if not self.indeterminate_fraction <= self.severe_fraction <= self.critical_fraction:
            raise ValueError("fractions must grow: indeterminate ≤ severe ≤ critical")
        if (
            self.positive_probability is not None
            and self.indeterminate_probability > self.positive_probability
        ):
            raise ValueError("indeterminate_probability must not exceed positive_probability")
        if self.positive_fraction is not None and self.indeterminate_fraction > self.positive_fraction:
            raise ValueError("indeterminate_fraction must not exceed positive_fraction")
        return self


class Session(Section):
    """How long somebody stays logged in: without a touch of the page, and at most."""

    idle_minutes: Annotated[float, Field(gt=0)] = 60.0
    hours: Annotated[float, Field(gt=0, le=168)] = 12.0


class Proxy(Section):
    """A reverse proxy before the page: who it is, and the header in which it names whom it has let in."""

    networks: tuple[str, ...] = ("127.0.0.1", "::1")
    user_header: Annotated[str, Field(pattern=r"^[A-Za-z0-9-]*$")] = ""

    @field_validator("networks")
    @classmethod
    def _networks(cls, networks: tuple[str, ...]) -> tuple[str, ...]:
        for network in networks:
            ip_network(network)
        return networks


VIEWER_NAMES = ("study_instance_uid", "accession_number", "patient_id")
"""What ``web.viewer_url`` may name of a study."""
NO_VIEWERS = ("javascript", "data", "vbscript", "file", "blob", "about")


def _check_template(template: str, app_scheme: str | None) -> None:
    """Raises ValueError where a template names what is not known, or could lead anywhere but to a viewer."""
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"viewer_url: {error}") from error
    names = [name for _, name, form, conversion in parts if name is not None and not (form or conversion)]
    if sum(part[1] is not None for part in parts) != len(names) or not {*names} <= {*VIEWER_NAMES}:
        known = ", ".join(f"{{{name}}}" for name in VIEWER_NAMES)
        raise ValueError(f"viewer_url may name {known} and no other")
    if not names:
        raise ValueError("viewer_url names no study: write {study_instance_uid} where the viewer expects it")
    fixed = parts[0][0]
    if app_scheme and fixed.startswith(f"{app_scheme}:"):
        return
    if not re.match(r"https?://[^/?#\s{}]+[/?#]", fixed):
        raise ValueError(
            "viewer_url must begin with http:// or https:// and a host, before any name in braces; "
            "the scheme of a program is named in viewer_scheme"
        )


class Web(Section):
    host: str = "127.0.0.1"
    port: Port = 8080
    token: str = Field(default="", repr=False)
    """Of programs that may read; more of them, with other scopes, are made on the page."""
    refresh_seconds: Annotated[int, Field(ge=1, le=3600)] = 5
    claim_minutes: Annotated[float, Field(gt=0, le=1440)] = 60.0
    upload_gb: Annotated[float, Field(gt=0, le=1000)] = 4.0
    """The largest file that is taken by an upload, and the most that a zip file may unpack to."""
    session: Session = Session()
    proxy: Proxy = Proxy()
    notice: Annotated[str, Field(min_length=1, max_length=300)] | None = None
    """The site's own words in place of the banner that says research use."""
    viewer_url: str = ""
    """Of one study in the site's own viewer, with names of VIEWER_NAMES in braces; empty: no link."""
    viewer_scheme: Annotated[str, Field(pattern=r"^[a-z][a-z0-9+.-]*$")] | None = None
    """Of a viewer that is a program on the reader's machine, as weasis."""

    @model_validator(mode="after")
    def _opens(self) -> Self:
        if self.viewer_scheme in NO_VIEWERS:
            raise ValueError(f"viewer_scheme: {self.viewer_scheme} opens no viewer")
        if self.viewer_url:
            _check_template(self.viewer_url, self.viewer_scheme)
        return self

    @model_validator(mode="after")
    def _guarded(self) -> Self:
        if self.token and len(self.token) < 16:
            raise ValueError("token: a token has at least 16 characters (TRIAGE_WEB_TOKEN)")
        return self


class Syslog(Section):
    """A collector of audit messages (PS3.15 A.6, A.7): RFC 5424 over TLS, TCP or UDP."""

    host: Host
    port: Port
    protocol: Literal["tls", "tcp", "udp"] = "tls"
    tls: Tls = Tls()


class Audit(Section):
    """Where the audit trail is handed on to, and after how long the same sight is recorded again."""

    file: Path | None = Path("audit.log")
    syslog: Syslog | None = None
    repeat_minutes: Annotated[float, Field(gt=0)] = 60.0


class Peer(Section):
    """A DICOM service that we ask."""

    name: str = "RIS"
    ae_title: AETitle
    host: Host
    port: Port
    tls: Tls | None = None


class Orders(Section):
    """What the RIS tells us: HL7 v2 over MLLP, and its Modality Worklist."""

    host: str = "0.0.0.0"  # noqa: S104 - the RIS is another machine
    port: Port | None = None
    peers: tuple[str, ...] = ()
    accession_number: Annotated[
        tuple[Annotated[str, Field(pattern=r"^[A-Z][A-Z0-9]{2}-[1-9][0-9]?$")], ...], Field(min_length=1)
    ] = ("OBR-18", "OBR-3")
    stat: tuple[str, ...] = ("S", "STAT")
    closing_statuses: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    worklist: Peer | None = None

    @field_validator("peers")
    @classmethod
    def _networks(cls, peers: tuple[str, ...]) -> tuple[str, ...]:
        for peer in peers:
            ip_network(peer)
        return peers

    @model_validator(mode="after")
    def _guarded(self) -> Self:
        if self.port is not None and not (self.peers or is_loopback(self.host)):
            raise ValueError("a message can close a study: name the networks that may send in orders.peers")
        return self


class Lists(Section):
    """The worklist for machines."""

    serve: bool = False
    maximum_answers: Annotated[int, Field(ge=1)] = 500


class Log(Section):
    format: Literal["text", "json"] = "text"


class Retention(Section):
    leave_list_after_days: Annotated[float, Field(gt=0)] = 7.0
    delete_images_after_days: Annotated[float, Field(gt=0)] | None = None
    """Of studies that have left the list, and whose results are delivered; None: never."""
    quarantine_days: Annotated[float, Field(gt=0)] = 30.0

    @model_validator(mode="after")
    def _after_the_list(self) -> Self:
        days = self.delete_images_after_days
        if days is not None and days < self.leave_list_after_days:
            raise ValueError("delete_images_after_days must not be below leave_list_after_days")
        return self


class Config(Section):
    """Every setting of the daemon. Relative paths are relative to the folder of config.yaml."""

    shadow: bool = False
    """Judge and record, but let nobody see it: order by arrival, send nothing but to who wants it so."""
    storage: Storage = Storage()
    database: Database = Database()
    listener: Listener = Listener()
    assemble: Assemble = Assemble()
    analysis: Analysis = Analysis()
    results: Results = Results()
    delivery: Delivery = Delivery()
    pull: Pull = Pull()
    priority: PriorityPolicy = PriorityPolicy()
    web: Web = Web()
    audit: Audit = Audit()
    lists: Lists = Lists()
    orders: Orders = Orders()
    log: Log = Log()
    retention: Retention = Retention()

    @property
    def policy(self) -> PriorityPolicy:
        """What orders, complete: where the analysis calls a study positive is written out."""
        given, analysis = self.priority, self.analysis
        probability, fraction = given.positive_probability, given.positive_fraction
        return given.model_copy(
            update={
                "positive_probability": analysis.positive_probability if probability is None else probability,
                "positive_fraction": analysis.positive_fraction if fraction is None else fraction,
            }
        )

    def under(self, policy: PriorityPolicy) -> Config:
        """The same settings with another policy; what is judged, and how, stays as it is."""
        return self.model_copy(update={"priority": policy})

    @property
    def roles(self) -> list[str]:
        """The roles that these settings need; ``daemon.ROLES`` has their work."""
        return ["listener", "clerk", "analyzer", "web", *(["orders"] if self.orders.port is not None else [])]

    @property
    def ordering(self) -> Literal["deadline", "strict", "arrival"]:
        """The order of every list."""
        return "arrival" if self.shadow else self.priority.ordering

    @property
    def destinations(self) -> tuple[AnyDestination, ...]:
        """Those that get anything in this mode."""
        modes = ("shadow" if self.shadow else "live", "both")
        return tuple(one for one in self.delivery.destinations if one.mode in modes)

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.listener.port == self.web.port:
            raise ValueError(f"listener.port and web.port are both {self.web.port}: they must differ")
        if self.orders.port in (self.listener.port, self.web.port):
            raise ValueError(f"orders.port is {self.orders.port}, as another port here: they must differ")
        answering = {
            one.ae_title
            for one in self.delivery.destinations
            if isinstance(one, Destination) and one.commitment
        }
        if self.listener.calling_ae_titles and (unknown := answering - {*self.listener.calling_ae_titles}):
            raise ValueError(
                f"who is asked for its commitment answers to our listener: add {', '.join(sorted(unknown))} "
                "to listener.calling_ae_titles"
            )
        if self.lists.serve and not (self.listener.peers or is_loopback(self.listener.host)):
            raise ValueError(
                "lists.serve shows patients' names to whoever may connect: "
                "name the networks that may in listener.peers"
            )
        probability, fraction = self.priority.positive_probability, self.priority.positive_fraction
        if (
            probability is None
            and self.priority.indeterminate_probability > self.analysis.positive_probability
        ):
            raise ValueError(
                "priority.indeterminate_probability must not exceed analysis.positive_probability"
            )
        if fraction is None and self.priority.indeterminate_fraction > self.analysis.positive_fraction:
            raise ValueError("priority.indeterminate_fraction must not exceed analysis.positive_fraction")
        return self


def load(path: Path, environ: Mapping[str, str] = os.environ) -> Config:
    """Read config.yaml and the secrets of the environment.

    Raises ConfigError naming the file, the key, the value and what is allowed.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected sections such as 'listener:', got {type(data).__name__}")
    sections = {name: {} if section is None else section for name, section in data.items()}
    config = parse(_with_secrets(sections, environ), str(path))
    return _anchored(config, path.resolve().parent)


def parse(data: Mapping[str, Any], source: str = "config") -> Config:
    """Validate plain data; raises ConfigError with one line a mistake."""
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        lines = [_explain(dict(e), data) for e in error.errors()]
        raise ConfigError(f"{source}: " + "; ".join(lines)) from error


def read_policy(path: Path, config: Config) -> PriorityPolicy:
    """A policy from a YAML file of its own, complete; raises ConfigError as ``load`` does."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    try:
        return config.under(PriorityPolicy.model_validate(data)).policy
    except ValidationError as error:
        lines = [_explain(dict(e), data) for e in error.errors()]
        raise ConfigError(f"{path}: " + "; ".join(lines)) from error


def written(policy: PriorityPolicy) -> str:
    """The YAML that ``read_policy`` takes."""
    return yaml.safe_dump(policy.model_dump(mode="json"), sort_keys=False)


def _explain(error: dict[str, Any], data: Mapping[str, Any]) -> str:
    key, page = ".".join(str(part) for part in error["loc"]) or "settings", "config.yaml"
    message = str(error["msg"]).removeprefix("Value error, ")
    match error["loc"]:
        case (section, ("destinations" | "sources") as peers, int(at), *rest):  # by name, without its kind
            peer = data[section][peers][at]
            name = str(peer.get("name", at)) if isinstance(peer, dict) else str(at)
            key = ".".join([section, peers, name, *map(str, rest[1:])])
            page = f'deploy/operating.md, "{PAGES[peers]}",'
            if rest[1:] == ["secret"] and error["type"] == "missing":
                return f"{key}: {message}; set {_variable(name)} or {_variable(name)}_FILE in the environment"
    if error["type"] == "extra_forbidden":
        return f"{key}: unknown key; see {page} for the keys that exist"
    if isinstance(error["input"], BaseModel | dict):
        return f"{key}: {message}"
    secret = key.endswith(("token", "secret")) or (key.endswith("url") and "@" in str(error["input"]))
    shown = "***" if secret else repr(error["input"])
    return f"{key} = {shown}: {message}"


def _with_secrets(data: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, Any]:
    merged = dict(data)
    for variable, (section, key) in SECRETS.items():
        if (secret := _secret(variable, environ)) is not None:
            merged[section] = {**(merged.get(section) or {}), key: secret}
    delivery = merged.get("delivery")
    if isinstance(delivery, dict) and isinstance(delivery.get("destinations"), list):
        destinations = [_with_secret(destination, environ) for destination in delivery["destinations"]]
        merged["delivery"] = {**delivery, "destinations": destinations}
    pull = merged.get("pull")
    if isinstance(pull, dict) and isinstance(pull.get("sources"), list):
        merged["pull"] = {**pull, "sources": [_with_secret(source, environ) for source in pull["sources"]]}
    return merged


def _with_secret(peer: Any, environ: Mapping[str, str]) -> Any:
    if not isinstance(peer, dict) or peer.get("kind") not in WITH_SECRET:
        return peer
    secret = _secret(_variable(str(peer.get("name"))), environ)
    return peer if secret is None else {**peer, "secret": secret}


def _secret(variable: str, environ: Mapping[str, str]) -> str | None:
    """The variable, or what the file holds that its companion names, but for a line's end."""
    if variable in environ:
        return environ[variable]
    path = environ.get(variable + IN_FILE)
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8").rstrip("\r\n")
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "is no text in UTF-8"
        raise ConfigError(f"{variable}{IN_FILE}: cannot read {path}: {why}") from error


def _variable(name: str) -> str:
    return PEER_SECRET + re.sub(r"[^A-Z0-9]", "_", name.upper())


def _anchored(config: Config, folder: Path) -> Config:
    storage = config.storage.model_copy(update={"spool": folder / config.storage.spool})
    url = config.database.url
    prefix = "sqlite:///"
    if url.startswith(prefix):
        url = prefix + str(folder / url.removeprefix(prefix))
    database = config.database.model_copy(update={"url": url})
    analysis = config.analysis
    if os.sep in analysis.model:  # a folder; without a stroke it is the name of a network that ships
        analysis = analysis.model_copy(update={"model": str(folder / analysis.model)})
    destinations = tuple(
        destination.model_copy(update={"tls": _anchored_tls(destination.tls, folder)})
        for destination in config.delivery.destinations
    )
    delivery = config.delivery.model_copy(update={"destinations": destinations})
    sources = tuple(
        source.model_copy(update={"tls": _anchored_tls(source.tls, folder)}) for source in config.pull.sources
    )
    sections: dict[str, Section] = {
        "storage": storage,
        "listener": config.listener.model_copy(update={"tls": _anchored_tls(config.listener.tls, folder)}),
        "database": database,
        "analysis": analysis,
        "delivery": delivery,
        "audit": _anchored_audit(config.audit, database, folder),
        "pull": config.pull.model_copy(update={"sources": sources}),
    }
    if (ris := config.orders.worklist) is not None:
        ris = ris.model_copy(update={"tls": _anchored_tls(ris.tls, folder)})
        sections["orders"] = config.orders.model_copy(update={"worklist": ris})
    return config.model_copy(update=sections)


def _anchored_audit(audit: Audit, database: Database, folder: Path) -> Audit:
    """The file lies beside the database, where the daemon can surely write."""
    syslog = audit.syslog
    if syslog is not None:
        syslog = syslog.model_copy(update={"tls": _anchored_tls(syslog.tls, folder)})
    file = None if audit.file is None else database.file.parent / audit.file
    return audit.model_copy(update={"file": file, "syslog": syslog})


AnyTls = TypeVar("AnyTls", Tls, ServerTls)


def _anchored_tls(tls: AnyTls | None, folder: Path) -> AnyTls | None:
    if tls is None:
        return None
    return tls.model_copy(update={name: folder / path for name, path in tls if path is not None})
