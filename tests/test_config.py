"""Configuration is right or the daemon does not start."""

from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from triage import config
from triage.config import Config
from triage.errors import ConfigError

SHIPPED = Path(__file__).parents[1] / "config.yaml"


def keys(model: BaseModel, prefix: str = "") -> set[str]:
    found: set[str] = set()
    for name in type(model).model_fields:
        value = getattr(model, name)
        found |= keys(value, f"{prefix}{name}.") if isinstance(value, BaseModel) else {prefix + name}
    return found


def flat(data: dict, prefix: str = "") -> set[str]:
    found: set[str] = set()
    for name, value in data.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name}
    return found


def test_the_shipped_file_names_every_setting_with_its_default() -> None:
    data = yaml.safe_load(SHIPPED.read_text())
    assert flat(data) == keys(Config())
    assert config.parse(data) == Config()


def test_every_setting_has_a_line_that_says_what_it_does() -> None:
    for line in SHIPPED.read_text().splitlines():
        if line.startswith("  ") and not line.rstrip().endswith(":"):
            assert "  # " in line, line


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"listner": {}}, ["listner", "unknown key"]),
        ({"listener": {"prt": 1}}, ["listener.prt", "unknown key"]),
        ({"listener": {"port": 99999}}, ["listener.port", "99999", "65535"]),
        ({"listener": {"ae_title": "SEVENTEEN_LETTERS"}}, ["listener.ae_title", "16"]),
        ({"listener": {"peers": ["10.0.0.0/99"]}}, ["listener.peers", "10.0.0.0/99"]),
        ({"listener": {"port": 8080}}, ["listener.port", "web.port", "8080"]),
        ({"web": {"token": "short"}}, ["web", "token", "16"]),
        ({"web": {"proxy": {"networks": ["10.0.0.0/99"]}}}, ["web.proxy.networks", "10.0.0.0/99"]),
        ({"web": {"session": {"hours": 1000}}}, ["web.session.hours", "1000", "168"]),
        ({"audit": {"syslog": {"host": "h", "port": 514, "protocol": "smoke"}}}, ["audit.syslog", "udp"]),
        ({"lists": {"serve": True}}, ["lists.serve", "listener.peers"]),
        ({"orders": {"port": 2575}}, ["orders", "orders.peers"]),
        ({"orders": {"port": 8080, "host": "127.0.0.1"}}, ["orders.port", "8080", "differ"]),
        ({"orders": {"accession_number": ["OBR18"]}}, ["orders.accession_number", "OBR18"]),
        ({"priority": {"ordering": "newest"}}, ["priority.ordering", "newest", "deadline"]),
        ({"priority": {"severe_fraction": 0.9}}, ["priority", "fractions must grow"]),
        ({"priority": {"target_wait_minutes": {"critical": 90}}}, ["target_wait_minutes", "must grow"]),
        ({"analysis": {"positive_probability": 1.5}}, ["analysis.positive_probability", "1.5"]),
        ({"analysis": {"positive_probability": 0.1}}, ["priority.indeterminate_probability"]),
        (
            {"analysis": {"engine": "onnxruntime", "precision": "bfloat16"}},
            ["analysis: ", "float32 only; set precision to auto"],
        ),
        ({"results": {"sr": "pdf"}}, ["results.sr", "pdf", "comprehensive"]),
        (
            {"delivery": {"destinations": [{"name": "A", "ae_title": "X", "host": "h", "port": 1}] * 2}},
            ["delivery", "name of its own"],
        ),
    ],
)
def test_a_wrong_setting_is_named_with_its_value_and_the_remedy(data: dict, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        config.parse(data)
    for word in words:
        assert word in str(error.value)


BOARD = {"name": "on call", "kind": "webhook", "url": "https://h/x"}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {},
            "delivery.destinations.on call.secret: Field required; set TRIAGE_SECRET_ON_CALL or TRIAGE_S",
        ),
        (
            {"secret": "x" * 16, "sevret": 1},
            'destinations.on call.sevret: unknown key; see deploy/operating.md, "Destinations", for the keys',
        ),
        ({"kind": "fax"}, "delivery.destinations.on call: kind must be dicom, "),
        ({"secret": "hunter2"}, "delivery.destinations.on call.secret = ***: "),
    ],
)
def test_a_mistake_in_a_destination_names_it(changes: dict, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        config.parse({"delivery": {"destinations": [BOARD | changes]}})
    assert says in str(error.value)


def test_a_mistake_in_a_source_names_it() -> None:
    source = {"name": "VNA", "ae_title": "VNA", "host": "h", "port": 104, "retreive": "get"}
    with pytest.raises(ConfigError, match=r'pull.sources.VNA.retreive: .* "Import and reconcile"'):
        config.parse({"pull": {"sources": [source]}})


def test_secrets_come_from_the_environment_and_are_never_printed(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("web:\n  host: 0.0.0.0\n")
    loaded = config.load(path, {"TRIAGE_WEB_TOKEN": "a-token-of-some-length"})
    assert loaded.web.token == "a-token-of-some-length"
    with pytest.raises(ConfigError) as error:
        config.load(path, {"TRIAGE_WEB_TOKEN": "hunter2"})
    assert "hunter2" not in str(error.value)


def test_relative_paths_belong_to_the_folder_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("storage:\n  spool: images\naudit:\n  syslog: {host: h, port: 6514, tls: {ca: ca.pem}}\n")
    loaded = config.load(path, {})
    assert loaded.audit.file == tmp_path / "var" / "audit.log"
    assert loaded.audit.syslog is not None
    assert loaded.audit.syslog.tls.ca == tmp_path / "ca.pem"
    assert loaded.storage.spool == tmp_path / "images"
    assert loaded.database.url == f"sqlite:///{tmp_path}/var/triage.db"


def test_an_archive_of_either_kind_has_its_files_beside_the_settings_and_only_the_web_has_a_secret(
    tmp_path: Path,
) -> None:
    pacs = {"name": "VNA", "ae_title": "VNA", "host": "h", "port": 104}
    web = {"name": "VNA", "kind": "dicomweb", "url": "https://h/x", "user": "u", "tls": {"ca": "ca.pem"}}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"delivery": {"destinations": [pacs]}, "pull": {"sources": [web]}}))
    loaded = config.load(path, {"TRIAGE_SECRET_VNA": "not for the PACS"})
    (source,) = loaded.pull.sources
    assert isinstance(source, config.WebSource)
    assert (source.secret, source.tls) == ("not for the PACS", config.Tls(ca=tmp_path / "ca.pem"))


@pytest.mark.parametrize("text", ["- a\n- b\n", "listener: [1, 2", "listener: 7\n"])
def test_a_file_that_is_not_sections_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="config"):
        config.load(path, {})


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        config.load(tmp_path / "nowhere.yaml", {})
