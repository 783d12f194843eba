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

SUFFIX = ".safetensors"
Recipe = Mapping[str, str]
"""``network`` (a key of NETWORKS), what builds it, such as ``widths`` and ``inputs`` (1 unless said), and how
it was trained."""


def _widths(recipe: Recipe) -> list[int]:
    return [int(width) for width in recipe["widths"].split(",")]


def _inputs(recipe: Recipe) -> int:
    return int(recipe.get("inputs", "1"))


def _unet2d(recipe: Recipe) -> nn.Module:
    from triage.models.unet2d import LesionsNet

    return LesionsNet(_widths(recipe))


def _unet3d(recipe: Recipe) -> nn.Module:
    from triage.models.unet3d import VolumeNet

    return VolumeNet(_widths(recipe))


def _resnet50(recipe: Recipe) -> nn.Module:
    from triage.models.resnet50 import SliceClassifier

    return SliceClassifier(_widths(recipe), int(recipe["hidden"]))


def _encoder_decoder(recipe: Recipe) -> nn.Module:
    from triage.models.cascade import EncoderDecoder

    return EncoderDecoder(
        recipe["encoder"], recipe["decoder"], float(recipe.get("width", "1")), _inputs(recipe)
    )


def _switch(recipe: Recipe, key: str) -> bool:
    """What is on unless the recipe says otherwise."""
    return recipe.get(key, "True") == "True"


def _dcn_slices(recipe: Recipe) -> nn.Module:
    from triage.models.dcn_networks import DualBranchNet

    return DualBranchNet(float(recipe["width"]), _switch(recipe, "attention"))


def _dcn_study(recipe: Recipe) -> nn.Module:
    from triage.models.dcn_networks import StudyNet

    return StudyNet(float(recipe["width"]), _switch(recipe, "mapping"))


def _ssm(recipe: Recipe) -> nn.Module:
    from triage.models.ssm_networks import SsmNet

    numbers = {key: int(recipe[key]) for key in ("blocks", "branches", "classes", "zoom")}
    return SsmNet(recipe["encoder"], width=float(recipe["width"]), **numbers)


def _infnet(recipe: Recipe) -> nn.Module:
    from triage.models.infnet_networks import InfNet

    return InfNet(*_infnet_shape(recipe))


def _infnet_inpainting(recipe: Recipe) -> nn.Module:
    from triage.models.infnet_networks import Inpainting

    return Inpainting(*_infnet_shape(recipe), float(recipe["coach_width"]))


def _infnet_shape(recipe: Recipe) -> tuple[str, float, float, int]:
    return recipe["encoder"], float(recipe["width"]), float(recipe["multi_width"]), int(recipe["size"])


NETWORKS: dict[str, Callable[[Recipe], nn.Module]] = {
    "lungs": lambda recipe: LungsNet(_widths(recipe), _inputs(recipe)),
    "multitask": lambda recipe: MultitaskNet(_widths(recipe), int(recipe["hidden"]), _inputs(recipe)),
    "unet2d": _unet2d,
    "unet2d_plus": _unet2d,
    "unet3d": _unet3d,
    "resnet50": _resnet50,
    "cascade_lungs": _encoder_decoder,
    "cascade": _encoder_decoder,
    "dcn_slices": _dcn_slices,
    "dcn_study": _dcn_study,
    "infnet": _infnet,
    "infnet_inpainting": _infnet_inpainting,
    "ssm": _ssm,
}
"""Every network that a file can hold."""


def build(recipe: Recipe) -> nn.Module:
    """The untrained network of a recipe. Raises KeyError or ValueError for an incomplete one."""
    kind = recipe["network"]
    if kind not in NETWORKS:
        raise ValueError(f"unknown network {kind!r}; there are {', '.join(NETWORKS)}")
    return NETWORKS[kind](recipe)


def save(network: nn.Module, recipe: Recipe, path: Path) -> None:
    """Write a network that ``read`` rebuilds. Raises ConfigError where training left what is no number.

    What batch normalisation has measured stays float32: variances may be more than fp16 can hold.
    """
    state = network.state_dict()
    spoilt = [name for name, value in state.items() if not value.isfinite().all()]
    if spoilt:
        raise ConfigError(f"{path.name}: {spoilt[0]} is no number: train with a lower schedule.learning_rate")
    learned = {name for name, _ in network.named_parameters()}
    small = {name: (value.half() if name in learned else value).contiguous() for name, value in state.items()}
    save_file(small, path, metadata=dict(recipe))


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
    return channels_last(network), recipe


def facts(path: Path) -> Recipe:
    """What a file's network was built from, without building it. Raises ConfigError naming the file."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"weights {path} cannot be used: {error}") from error


def channels_last(network: N) -> N:
    """The same network with its convolutions' weights laid out as processors read them fastest."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for weight in network.parameters():
        if weight.dim() in formats:
            weight.data = weight.data.contiguous(memory_format=formats[weight.dim()])
    return network
