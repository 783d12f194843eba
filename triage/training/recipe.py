"""Recipes: small YAML files that say what a network is, what it learns from, and for how long."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from triage.errors import ConfigError
from triage.training.trainer import Schedule

RECIPES = Path(__file__).parent / "recipes"

VariantName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
Overrides = Mapping[Literal["network", "options", "schedule"], Mapping[str, Any]]
VariantOverrides = Mapping[
    Literal["network", "options", "schedule", "parts", "start"], Mapping[str, Any] | str | None
]


class Recipe(BaseModel):
    """One network. ``network`` and ``options`` are what its task is made with (see ``TASKS``)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    summary: str
    task: str
    network: Mapping[str, Any] = {}
    options: Mapping[str, Any] = {}
    data: tuple[str, ...]
    """Kinds of data sets it learns from (see ``DATASETS``)."""
    also: tuple[str, ...] = ()
    """Kinds it learns from too where they are given: what the authors had and few others have."""
    hold_out: Mapping[str, Annotated[int, Field(ge=1)]] = {}
    """Of a kind without patients: how many of its last cases are for validation, never trained on.

    Nobody knows whether patients of theirs are among those trained on.
    """
    lungs: str | None = None
    """The recipe of the network that finds the lungs for this one."""
    after: str | None = None
    """The recipe of the network whose answers this one learns from."""
    start: str | None = None
    """The recipe of the network whose weights this one's begin with; no part of the model."""
    spare_lungs: str | None = None
    """The shipped package whose network finds the lungs where the data of ``lungs`` is not given."""
    system: str | None = None
    """What the finished networks make together, when they are a model of their own (see ``SYSTEMS``)."""
    lesion_threshold: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Of the model as long as no validation patients choose another."""
    card: Mapping[str, Any] = {}
    """What the model's card says beyond what training knows: licence, claims, limits."""
    text: Annotated[str, Field(exclude=True)] = ""
    """For ``card.md``: the file of the same name with the ending .md, where there is one."""
    schedule: Schedule = Schedule(steps=1)
    """Of a network; what is only searched for has none."""
    validation_share: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Of a cross-validation's patients who are not tested: how many validate, where a schedule needs them."""
    parts: Mapping[str, Overrides] = {}
    """Name of a recipe that this one builds on → what it changes there."""
    variants: Mapping[VariantName, VariantOverrides] = {}
    """Name → what it changes: trained alike and compared, as in a paper's table. ``{}``: as the recipe is.

    ``start: null`` is without one.
    """

    def variant(self, name: str) -> Recipe:
        """The recipe that one of ``variants`` is; its model is called after both."""
        card = {**self.card, "name": f"{self.card.get('name', self.name)}-{name}"}
        return self._changed(self.variants[name], card=card, variants={})

    def without_lungs(self) -> Recipe:
        """The same with the lungs' network of a shipped package, as ``spare_lungs`` says."""
        return self._changed({}, lungs=None, spare_lungs=None, card={**self.card, "lungs": self.spare_lungs})

    def part(self, name: str) -> Recipe:
        """A recipe that this one builds on, as it changes it. Raises ConfigError."""
        recipe = load(name)
        if recipe.name not in self.parts:
            return recipe
        try:
            return recipe._changed(self.parts[recipe.name])
        except ValidationError as error:
            raise ConfigError(f"recipe {self.name}, parts.{recipe.name}: {_explain(error)}") from error

    def _changed(self, overrides: Mapping[Any, Any], **keys: Any) -> Recipe:
        mine = {**self.model_dump(), "text": self.text, **keys}
        merged = {key: _merged(mine[key], values) for key, values in overrides.items()}
        return Recipe.model_validate({**mine, **merged})

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        unused = set(self.hold_out) - {*self.data, *self.also}
        if unused:
            raise ValueError(
                f"hold_out names {', '.join(sorted(unused))}, which the recipe does not learn from"
            )
        if not self.options.get("batch", 1) >= 1:
            raise ValueError(f"options.batch = {self.options['batch']}: at least 1")
        for name in self.variants:
            try:
                self.variant(name)
            except ValidationError as error:
                raise ValueError(f"variants.{name}: {_explain(error)}") from error
        return self


def _merged(mine: Any, theirs: Any) -> Any:
    """Keys of both, theirs first; what has no keys takes the other's place."""
    return {**mine, **theirs} if isinstance(mine, Mapping) and isinstance(theirs, Mapping) else theirs


def names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load(name: str) -> Recipe:
    """A recipe by its name, or by the path of a YAML file.

    Raises ConfigError for an unknown name, or naming the key that is wrong.
    """
    path = RECIPES / f"{name}.yaml" if name in names() else Path(name)
    if path.suffix != ".yaml" or not path.is_file():
        raise ConfigError(f"no recipe {name!r}: there are {', '.join(names())}, or give a .yaml file")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        beside = path.with_suffix(".md")
        text = beside.read_text(encoding="utf-8") if beside.is_file() else ""
        return Recipe.model_validate({"name": path.stem, "text": text, **(data or {})})
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    except ValidationError as error:
        raise ConfigError(f"{path}: {_explain(error)}") from error


def _explain(error: ValidationError) -> str:
    return "; ".join(f"{'.'.join(map(str, e['loc'])) or 'recipe'}: {e['msg']}" for e in error.errors())
