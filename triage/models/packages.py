"""Model packages: a folder with ``model.yaml``, its card, and the files that the card names.

The card says what the files are, what is known of the network, and the SHA-256 of each file: what is
loaded is what was measured. ``deploy/models.md`` tells how to write one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from triage.config import Analysis, Section
from triage.domain import ModelInfo
from triage.errors import ConfigError

PACKAGES = Path(__file__).parent / "packages"
MODELS: dict[str, Path] = {
    "multitask": PACKAGES / "multitask",
    "cascade": PACKAGES / "cascade",
    "dcn": PACKAGES / "dcn",
    "ssm": PACKAGES / "ssm",
    "infnet": PACKAGES / "infnet",
}
"""The packages that ship, by the name that ``analysis.model`` gives them."""

CARD, TEXT = "model.yaml", "card.md"
HELP = "see deploy/models.md"

Role = Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]
Value = bool | int | float | str


class File(Section):
    """One file of the package; ``path`` is relative to the folder and stays inside it."""

    path: str
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

    @field_validator("path")
    @classmethod
    def _inside(cls, path: str) -> str:
        if not path or PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
            raise ValueError("must be a path inside of the package's folder")
        return path


class Input(Section):
    """What an exported network takes: axial slices (N, 1, H, W), float32 in [0, 1]."""

    spacing_mm: Annotated[float, Field(ge=0.5, le=4)]
    """Of a pixel, in plane; slices are untouched along z."""
    window_hu: tuple[Annotated[int, Field(ge=-4000)], Annotated[int, Field(le=4000)]]
    """HU that become 0 and 1."""
    multiple_of: Annotated[int, Field(ge=1, le=512)] = 1
    """H and W are padded with air to a multiple of this."""

    @field_validator("window_hu")
    @classmethod
    def _ascending(cls, window: tuple[int, int]) -> tuple[int, int]:
        if window[0] >= window[1]:
            raise ValueError("the first must be below the second")
        return window


class Output(Section):
    """What an exported network gives: (N, channels, H, W), one of them the lesions."""

    channels: Annotated[int, Field(ge=1)] = 1
    lesion_channel: Annotated[int, Field(ge=0)] = 0
    activation: Literal["none", "sigmoid", "softmax"]
    """What turns the output into probabilities; none where it gives them itself."""

    @model_validator(mode="after")
    def _exists(self) -> Self:
        if self.lesion_channel >= self.channels:
            raise ValueError(f"lesion_channel {self.lesion_channel}: there are {self.channels}, from 0")
        return self


class Metric(Section):
    """One measured figure; ``value`` is None where the data cannot support it."""

    name: str
    value: float | None
    low: float | None = None
    high: float | None = None
    """Limits of the 95 % interval."""
    unit: str = ""
    """Of value and limits, such as ml; empty for a share, a Dice or another plain number."""
    reason: str = ""
    """Why there is no value."""
    patients: Annotated[int, Field(ge=0)] | None = None
    measured_on: str


class Card(Section):
    """``model.yaml``."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,31}$")]
    system: str
    """What the files are for: a key of ``triage.models.SYSTEMS``."""
    summary: Annotated[str, Field(min_length=1, max_length=200)]
    files: Mapping[Role, File] = {}
    lungs: str | None = None
    """The shipped package whose lungs network is used, for a package without one."""
    lesion_threshold: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Lesion probability above which a voxel is lesion; ``analysis.lesion_threshold`` goes before it."""
    parameters: Mapping[str, Value] = {}
    """Further numbers of the system that change its answer."""
    input: Input | None = None
    output: Output | None = None
    calibrated: bool = False
    training_data: tuple[str, ...]
    splits: Mapping[str, str] = {}
    trained_on: Mapping[str, tuple[str, ...]] = {}
    """Kind of data → fingerprints of the cases it learned from; evaluation tells where it meets them."""
    metrics: tuple[Metric, ...] = ()
    licence: Annotated[str, Field(min_length=1)]
    claims: tuple[str, ...] = ()
    limits: tuple[str, ...]
    recipe: Mapping[str, Value] = {}
    """How it was trained, for the reader; nothing is computed from it."""


@dataclass(frozen=True, slots=True)
class Package:
    """A card whose files were found to be the ones that it names."""

    folder: Path
    card: Card
    text: str
    """``card.md``, the long card; may be empty."""
    version: str
    """12 hex digits over every file and every fact of the card that changes the answer."""
    files: Mapping[str, Path]
    """By role; ``lungs`` may lie in another package."""

    @property
    def info(self) -> ModelInfo:
        card = self.card
        return ModelInfo(
            name=card.name,
            version=self.version,
            summary=card.summary,
            calibrated=card.calibrated,
            card=self.text,
            system=card.system,
        )

    def file(self, role: str) -> Path:
        """Raises ConfigError where the card names none."""
        if role not in self.files:
            raise self.wrong(f"files.{role}: missing; system {self.card.system!r} needs it")
        return self.files[role]

    def lesion_threshold(self, analysis: Analysis) -> float:
        """The settings' own, else the card's. Raises ConfigError where neither has one."""
        threshold = analysis.lesion_threshold or self.card.lesion_threshold
        if threshold is None:
            raise self.wrong("lesion_threshold: missing; give one here or set analysis.lesion_threshold")
        return threshold

    def wrong(self, what: str) -> ConfigError:
        """An error that names this card."""
        return ConfigError(f"{self.folder / CARD}: {what}; {HELP}")


def find(model: str) -> Path:
    """The folder of a shipped name or of a path. Raises ConfigError listing the names."""
    if model in MODELS:
        return MODELS[model]
    if os.sep not in model:
        names = ", ".join(sorted(MODELS))
        raise ConfigError(
            f"analysis.model = {model!r}: unknown network; there are {names}; "
            f"a folder of your own is written with a slash, as ./{model}"
        )
    if Path(model).is_file():
        raise ConfigError(f"analysis.model = {model!r}: put this file into a folder with a {CARD}; {HELP}")
    return Path(model)


def read(folder: Path) -> Package:
    """Read the card and compare every file with it; loads no network.

    Raises ConfigError naming the file, the key and the remedy.
    """
    card = _card(folder / CARD)
    files = {role: folder / file.path for role, file in card.files.items()}
    digests = {role: file.sha256 for role, file in card.files.items()}
    for role, path in files.items():
        _verify(path, role, digests[role])
    if card.lungs is not None:
        files["lungs"], digests["lungs"] = _borrowed(card.lungs, folder / CARD)
    text = folder / TEXT
    return Package(
        folder=folder,
        card=card,
        text=text.read_text(encoding="utf-8") if text.is_file() else "",
        version=_version(card, digests),
        files=files,
    )


def write(folder: Path, card: Mapping[str, Any], files: Mapping[str, Path], text: str = "") -> Package:
    """Make a package: copies the files by role into the folder, adds their hashes, and reads it back.

    ``card`` is ``model.yaml`` without ``files``. A file that lies in the folder already stays where it is.
    Raises ConfigError for a card that is not complete.
    """
    folder.mkdir(parents=True, exist_ok=True)
    named = {}
    for role, path in files.items():
        inside = path if path.is_relative_to(folder) else folder / path.name
        if inside != path:
            shutil.copyfile(path, inside)
        named[role] = {"path": inside.relative_to(folder).as_posix(), "sha256": _sha256(inside)}
    check({**card, "files": named}, folder / CARD)
    (folder / CARD).write_text(
        yaml.safe_dump({**card, "files": named}, sort_keys=False, allow_unicode=True, width=110),
        encoding="utf-8",
    )
    if text:
        (folder / TEXT).write_text(text, encoding="utf-8")
    return read(folder)


def _card(path: Path) -> Card:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error.strerror}; a model is a folder with a {CARD}: {HELP}"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    return check(data, path)


def check(data: Any, source: Path | str) -> Card:
    """The card that plain data makes. Raises ConfigError with every wrong key, naming the source."""
    try:
        return Card.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{source}: {explain(error)}; {HELP}") from error


def explain(error: ValidationError) -> str:
    """Every wrong key, on one line."""
    return "; ".join(_explain(dict(one)) for one in error.errors())


def _explain(error: Mapping[str, Any]) -> str:
    key = ".".join(map(str, error["loc"])) or "the card"
    if error["type"] == "extra_forbidden":
        return f"{key}: unknown key"
    if error["type"] == "missing":
        return f"{key}: missing"
    return f"{key} = {error['input']!r}: {str(error['msg']).removeprefix('Value error, ')}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _verify(path: Path, role: str, expected: str) -> None:
    try:
        found = _sha256(path)
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error.strerror}; {CARD} names it as files.{role}: reinstall the package"
        ) from error
    if found != expected:
        raise ConfigError(
            f"{path} is not the file that {CARD} names: its sha256 is {found}, not {expected}; it is damaged "
            f"or was exchanged: reinstall it, or correct files.{role}.sha256 if the change is your own"
        )


def _borrowed(name: str, card: Path) -> tuple[Path, str]:
    """File and SHA-256 of a shipped lungs network."""
    if name not in MODELS:
        raise ConfigError(f"{card}: lungs = {name!r}: there are {', '.join(sorted(MODELS))}; {HELP}")
    package = read(MODELS[name])
    return package.file("lungs"), package.card.files["lungs"].sha256


def _version(card: Card, digests: Mapping[str, str]) -> str:
    answers = {"system", "lesion_threshold", "parameters", "input", "output", "calibrated"}
    facts = card.model_dump(include=answers)
    data = json.dumps({**facts, "files": digests}, sort_keys=True)
    return hashlib.sha256(data.encode()).hexdigest()[:12]
