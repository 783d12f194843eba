"""What must never be: code from a file, a secret that is shown, a name that leaves its place."""

from __future__ import annotations

import ast
import csv
import http.server
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tests.peers import HOST, free_port, write_config
from tests.test_outgoing import letter
from tests.test_web import browse
from tests.web_studies import Ward
from triage import check, config, deliver, models, policies
from triage.config import Config, DicomWeb, Webhook
from triage.dicom import phantom, spool, stow
from triage.errors import ConfigError, Rejected
from triage.outgoing import webhook
from triage.rows import FORMULA, harmless
from triage.web.export import _line

ROOT = Path(__file__).parents[1] / "triage"
MODULES = sorted(ROOT.rglob("*.py"))
FORBIDDEN_MODULES = {"cloudpickle", "dill", "joblib", "marshal", "shelve", "telnetlib", "ftplib"}
FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "os.system", "os.popen", "pickle.load", "pickle.loads", "pickle.Unpickler",
    "yaml.load", "yaml.unsafe_load", "yaml.full_load", "torch.hub.load", "tempfile.mktemp",
}  # fmt: skip
SECRET = "hush-this-is-nobody-elses"


def calls(path: Path) -> Iterator[tuple[str, dict[str, object]]]:
    """Every call in a module: what is called, and its keyword arguments that are constants."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            constants = {
                k.arg: k.value.value for k in node.keywords if k.arg and isinstance(k.value, ast.Constant)
            }
            yield ast.unparse(node.func), constants


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_ever_code(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    imported |= {(n.module or "").split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert not imported & FORBIDDEN_MODULES
    for name, constants in calls(path):
        assert name not in FORBIDDEN_CALLS, name
        assert not constants.get("shell")
        assert not constants.get("allow_pickle")
        assert constants.get("verify") is not False, "TLS checks who answers"
        if name == "torch.load":
            assert constants.get("weights_only") is True


# --- secrets ----------------------------------------------------------------------------------------


def every_secret(folder: Path) -> Config:
    """Settings with a secret wherever there can be one, from files, and peers that are not there."""
    port = free_port()
    url = f"http://{HOST}:{port}/x"
    destinations = [
        {"name": "board", "kind": "webhook", "url": url},
        {"name": "archive", "kind": "dicomweb", "url": url, "user": "u"},
        {"name": "mail", "kind": "email", "host": HOST, "port": port, "sender": "a@b", "to": "c@d", "tls": {}}
        | {"user": "u"},
    ]
    sources = [{"name": "vna", "kind": "dicomweb", "url": url}]
    path = write_config(
        folder,
        delivery={"destinations": destinations, "timeout_seconds": 1},
        pull={"sources": sources, "timeout_seconds": 1},
    )
    (folder / "secret").write_text(SECRET + "\n")
    names = ("WEB_TOKEN", "SECRET_BOARD", "SECRET_ARCHIVE", "SECRET_MAIL", "SECRET_VNA")
    return config.load(path, {f"TRIAGE_{name}_FILE": str(folder / "secret") for name in names})


def test_secrets_come_from_files_and_are_shown_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings = every_secret(tmp_path / "here")
    secrets = [one.secret for one in settings.delivery.destinations]  # type: ignore[union-attr]
    assert {SECRET, settings.web.token, *secrets} == {SECRET}
    monkeypatch.setattr(models, "load", lambda _analysis: (_ for _ in ()).throw(ConfigError("no network")))
    ward = Ward(settings)
    ward.arrive("1.1")
    ward.judge("1.1", to=("archive",))
    policies.settle(ward.database, settings, ward.now, always=True)
    for destination in settings.destinations:
        deliver.step(ward.database, settings, destination, ward.now)
    reader = browse(ward)
    pages = [
        reader.get(a, headers={"authorization": f"Bearer {SECRET}"}).text for a in ("/metrics", "/monitoring")
    ]
    shown = [*pages, repr(settings), str(settings), *map(str, check.run(settings)), caplog.text]
    shown += [str(one) for one in ward.database.undelivered()]
    assert "board" in str(shown)
    assert SECRET not in str(shown)
    ward.database.close()
    with pytest.raises(ConfigError, match="TRIAGE_WEB_TOKEN_FILE: cannot read"):
        config.load(tmp_path / "here" / "config.yaml", {"TRIAGE_WEB_TOKEN_FILE": str(tmp_path / "none")})


# --- names ------------------------------------------------------------------------------------------


def element(tag: int, vr: bytes, value: bytes) -> bytes:
    value += b"\0" * (len(value) % 2)
    return struct.pack("<HH2sH", tag >> 16, tag & 0xFFFF, vr, len(value)) + value


NAMES = st.one_of(
    st.from_regex(r"[0-9][0-9.]{0,70}", fullmatch=True),
    st.sampled_from(["..", "../../etc/passwd", "/etc/passwd", "1/../../2", "quarantine", "incoming", "1\n2"]),
    st.text("0123456789./\\ab\0 \n", max_size=70),
)


@given(NAMES, NAMES, NAMES)
def test_no_uid_leads_out_of_its_folder(study: str, series: str, sop: str) -> None:
    """Whatever bytes a sender names its objects with: they are refused, or stay where they belong."""
    uids = {0x00080016: "1.2.840.10008.5.1.4.1.1.2", 0x00080018: sop, 0x0020000D: study, 0x0020000E: series}
    raw = b"".join(element(tag, b"UI", uid.encode()) for tag, uid in uids.items())
    try:
        found = spool.read(raw, "1.2.840.10008.1.2.1")
    except Rejected:
        return
    home = Path("/spool")
    path = home / found.study_instance_uid / found.series_instance_uid / f"{found.sop_instance_uid}.dcm"
    assert path.resolve().relative_to(home).parts == path.relative_to(home).parts
    assert len(path.relative_to(home).parts) == 3
    assert not {*path.relative_to(home).parts} & {spool.INCOMING, spool.QUARANTINE, spool.RESULTS}


@given(st.text() | st.sampled_from(FORMULA).flatmap(lambda sign: st.text().map(lambda rest: sign + rest)))
def test_no_name_is_a_formula_or_another_cell(name: str) -> None:
    kept = name.replace("\r", " ").replace("\0", "")
    (row,) = csv.reader(StringIO(_line([kept, 1, None]), newline=""))
    assert len(row) == 3
    assert not row[0].startswith(FORMULA)
    assert harmless(3.5) == 3.5


# --- where data go ----------------------------------------------------------------------------------


@contextmanager
def redirecting(code: int) -> Iterator[tuple[int, list[str]]]:
    """A server that sends everybody on; what it was asked for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(f"{self.command} {self.path}")
            self.rfile.read(int(self.headers.get("content-length") or 0))
            self.send_response(code)
            self.send_header("location", "/elsewhere")
            self.send_header("content-length", "0")
            self.end_headers()

        do_GET = do_POST

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer((HOST, 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.05])
        thread.start()
        try:
            yield server.server_address[1], asked
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("code", [302, 307])
def test_nobody_but_the_settings_says_where_data_go(tmp_path: Path, code: int) -> None:
    (image,) = phantom.write_study(tmp_path, seed=1, slices=1, rows=64)
    with redirecting(code) as (port, asked):
        url = f"http://{HOST}:{port}/here"
        hook = Webhook(name="h", kind="webhook", url=url, secret="x" * 16)
        assert not webhook.send(letter(), hook, 5).sent
        archive = DicomWeb(name="a", kind="dicomweb", url=url)
        assert not any(outcome.sent for outcome in stow.send([image], archive, timeout_seconds=5))
        stow.reach(archive, 5)
    assert asked
    assert not [one for one in asked if "elsewhere" in one]


@pytest.mark.parametrize("host", ["169.254.169.254", "[fe80::1]"])
def test_where_clouds_tell_secrets_nothing_is_sent(host: str) -> None:
    told = yaml.safe_load(f"{{name: a, kind: webhook, url: 'http://{host}/x', secret: {'x' * 16}}}")
    with pytest.raises(ConfigError, match="link-local"):
        config.parse({"delivery": {"destinations": [told]}})
