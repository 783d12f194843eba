"""Networks in safetensors files: weights as fp16, the recipe they were built from as metadata."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from triage.errors import ConfigError
from triage.models.networks import LungsNet, MultitaskNet

N = TypeVar("N", bound=nn.Module)

Recipe = Mapping[str, str]
"""``network`` (a key of NETWORKS), what builds it, such as ``widths``, and how it was trained."""


def _widths(recipe: Recipe) -> list[int]:
    return [int(width) for width in recipe["widths"].split(",")]


NETWORKS: dict[str, Callable[[Recipe], nn.Module]] = {
    "lungs": lambda recipe: LungsNet(_widths(recipe)),
    "multitask": lambda recipe: MultitaskNet(_widths(recipe), int(recipe["hidden"])),
}
"""Every network that a file can hold."""


def build(recipe: Recipe) -> nn.Module:
    """The untrained network of a recipe. Raises KeyError or ValueError for an incomplete one."""
    kind = recipe["network"]
    if kind not in NETWORKS:
        raise ValueError(f"unknown network {kind!r}; there are {', '.join(NETWORKS)}")
    return NETWORKS[kind](recipe)


def save(network: nn.Module, recipe: Recipe, path: Path) -> None:
    """Write a network that ``read`` rebuilds."""
    half = {
        name: (value.half() if value.is_floating_point() else value).contiguous()
        for name, value in network.state_dict().items()
    }
    save_file(half, path, metadata=dict(recipe))


def read(path: Path, kind: type[N]) -> tuple[N, Recipe]:
    """Rebuild a network of this kind, float32, ready to judge. Raises ConfigError naming the file."""
    try:
        with safe_open(path, framework="pt") as file:
            recipe = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        network = build(recipe)
        network.load_state_dict(state)
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise ConfigError(f"weights {path} cannot be used: {error}") from error
    if not isinstance(network, kind):
        raise ConfigError(f"weights {path} hold {recipe['network']!r}, not {kind.__name__}")
    network.requires_grad_(False).eval()
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network, recipe
