"""The import rule: which room may use which, and which library stays at which edge."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "triage"

BASE = {"domain", "errors", "config", "together", "logs"}
TOP = {"cli", "__main__", "daemon", "check", "predict"}
ROOMS: dict[str, set[str]] = {
    "domain": set(),
    "errors": set(),
    "logs": set(),
    "config": {"errors"},
    "together": {"errors"},
    "severity": {"domain", "config"},
    "priority": {"domain", "config"},
    "whatif": {"domain", "config", "priority"},
    "drift": set(),
    "policies": {*BASE, "audit", "db", "priority", "whatif"},
    "rows": {"domain"},
    "outbox": {"domain", "config"},
    "passwords": set(),
    "audit": {"domain"},
    "first": {"config", "db", "passwords"},
    "trail": {*BASE, "audit", "db", "outgoing"},
    "db": BASE,
    "alive": {*BASE, "db"},
    "backup": {*BASE, "db", "dicom"},
    "dicom": BASE,
    # The transports that carry an answer instead of a DICOM object; like every room, they meet no other.
    "outgoing": {*BASE, "rows"},
    "models": BASE,
    "training": {*BASE, "models", "severity", "dicom"},
    "web": {
        *BASE,
        "db",
        "audit",
        "passwords",
        "priority",
        "rows",
        "dicom",
        "policies",
        "whatif",
        "drift",
        "upload",
    },
    "unjudged": {*BASE, "dicom"},
    "assemble": {*BASE, "db", "policies", "dicom", "priority", "outbox", "unjudged"},
    "analyze": {
        *BASE,
        "db",
        "policies",
        "dicom",
        "models",
        "priority",
        "severity",
        "assemble",
        "outbox",
        "unjudged",
    },
    "deliver": {*BASE, "db", "dicom", "outgoing"},
    "commitment": {*BASE, "db", "dicom", "deliver"},
    "upkeep": {*BASE, "assemble", "db", "dicom"},
    "incoming": BASE,
    "orders": {*BASE, "db", "policies", "dicom", "incoming", "priority"},
    "pull": {*BASE, "audit", "db", "dicom", "assemble"},
    "upload": {*BASE, "db", "dicom", "pull"},
}
READING = {"capture", "header", "series", "volume", "phantom", "masks", "mesh"}
"""The modules of ``dicom`` that only read; ``training`` and ``web`` may use these."""
EDGES = {
    "pydicom": {"dicom"},
    "pynetdicom": {"dicom"},
    "highdicom": {"dicom"},
    "imagecodecs": {"dicom"},
    "skimage": {"dicom"},
    "trimesh": {"dicom"},
    "dicomweb_client": {"dicom"},
    "requests": {"dicom"},
    "httpx": {"outgoing"},
    "hl7": {"incoming", "outgoing"},
    "smtplib": {"outgoing"},
    "torch": {"models", "training"},
    "monai": {"models", "training"},
    "safetensors": {"models", "training"},
    "sqlalchemy": {"db"},
    "alembic": {"db"},
    "apscheduler": {"daemon"},
    "starlette": {"web"},
    "uvicorn": {"web"},
    "prometheus_client": {"web"},
    "python_multipart": {"web"},
    "jinja2": {"web", "training"},
    "typer": {"cli"},
    "argon2": {"passwords"},
    "rich": {"cli", "training"},
    "pydantic": {"config", "models", "training", "web", "whatif"},  # what-if's answer is the API's as it is
    "fastapi": {"web"},
    "yaml": {"config", "models", "training"},
    "sklearn": {"training"},
    "matplotlib": {"training"},
    "SimpleITK": {"training"},
    "onnxruntime": {"models"},
    "openvino": {"models"},
    "torchvision": set(),
}


def modules() -> list[tuple[str, Path]]:
    return [(p.relative_to(ROOT).parts[0].removesuffix(".py"), p) for p in sorted(ROOT.rglob("*.py"))]


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def ours(path: Path) -> Iterator[list[str]]:
    """Imported modules of ours, as path parts below ``triage``."""
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "triage" and len(parts) > 1 and re.fullmatch(r"[a-z_]+", parts[1]):
            yield parts[1:]


@pytest.mark.parametrize(("room", "path"), modules(), ids=lambda value: str(value).rpartition("triage/")[2])
def test_a_room_uses_only_the_rooms_it_may(room: str, path: Path) -> None:
    allowed = None if room in TOP or room == "__init__" else ROOMS[room] | {room}
    for target in ours(path):
        if target[0] in ("__version__", room):
            continue
        if allowed is not None:
            assert target[0] in allowed, f"{path} imports triage.{'.'.join(target)}"
        if target[0] == "dicom" and room in ("training", "web"):
            assert target[1] in READING, f"{path} imports triage.{'.'.join(target)}"


@pytest.mark.parametrize(("room", "path"), modules(), ids=lambda value: str(value).rpartition("triage/")[2])
def test_a_library_stays_at_its_edge(room: str, path: Path) -> None:
    for name in imported(path):
        library = name.split(".")[0]
        if library in EDGES:
            assert room in EDGES[library], f"{path} imports {name}"


def test_service_providers_never_see_the_database() -> None:
    for path in (ROOT / "dicom").rglob("*.py"):
        assert all(target[0] != "db" for target in ours(path))


def test_the_rules_name_every_module() -> None:
    assert {room for room, _ in modules()} == {*ROOMS, *TOP, "__init__"}
