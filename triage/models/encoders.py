"""The encoders of Qiblawey et al. (section 2.3): six published classifiers and the plain U-Net's way down.

The classifiers are MONAI's, in their published form, which a file of published weights can fill; their heads
are left out. The plain U-Net has five levels of its own (Ronneberger et al. 2015).
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from monai.networks.nets import DenseNet, ResNet
from monai.networks.nets.basic_unet import TwoConv
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from triage.errors import ConfigError

Classifier = ResNet | DenseNet

CLASSES = 1000
RESNET_WIDTHS = (64, 128, 256, 512)
PLAIN_WIDTHS = (64, 128, 256, 512, 1024)
HEADS = ("fc.", "classifier.", "class_layers.")
"""What a classifier's weights end with, under the names that libraries give it."""


def scaled(channels: int, width: float) -> int:
    """So many channels at this width; never none."""
    return max(1, round(channels * width))


def _resnet(block: str, layers: Sequence[int], width: float, inputs: int) -> ResNet:
    widths = [scaled(channels, width) for channels in RESNET_WIDTHS]
    return resnet(block, layers, widths, inputs, num_classes=CLASSES)


def resnet(block: str, layers: Sequence[int], widths: Sequence[int], inputs: int, **head: Any) -> ResNet:
    """MONAI's ResNet in its published form for slices (N, inputs, H, W); ``head`` is what it ends with."""
    return ResNet(
        block=block,
        layers=list(layers),
        block_inplanes=list(widths),
        spatial_dims=2,
        n_input_channels=inputs,
        conv1_t_stride=2,
        bias_downsample=False,
        **head,
    )


def _densenet(first: int, growth: int, blocks: Sequence[int], width: float, inputs: int) -> DenseNet:
    return DenseNet(
        spatial_dims=2,
        in_channels=inputs,
        out_channels=CLASSES,
        init_features=scaled(first, width),
        growth_rate=scaled(growth, width),
        block_config=blocks,
    )


CLASSIFIERS: dict[str, Callable[[float, int], Classifier]] = {
    "resnet18": partial(_resnet, "basic", (2, 2, 2, 2)),
    "resnet50": partial(_resnet, "bottleneck", (3, 4, 6, 3)),
    "resnet152": partial(_resnet, "bottleneck", (3, 8, 36, 3)),
    "densenet121": partial(_densenet, 64, 32, (6, 12, 24, 16)),
    "densenet161": partial(_densenet, 96, 48, (6, 12, 36, 24)),
    "densenet201": partial(_densenet, 64, 32, (6, 12, 48, 32)),
}
"""Made of a width (1: the published one) and a number of input channels (He et al. 2016a, table 1; Huang et
al. 2017, table 1 and section 4.1)."""
PLAIN = "unet"
ENCODERS = (*CLASSIFIERS, PLAIN)


def stages(encoder: str, width: float, inputs: int, weights: str | Path | None = None) -> list[nn.Sequential]:
    """The encoder in five parts; each ends with the normalised, activated map that the decoder sees.

    Raises ConfigError for weights that are not the encoder's.
    """
    if encoder == PLAIN:
        if weights is not None:
            raise ConfigError("encoder_weights: the plain U-Net has no published ones; take another encoder")
        return _plain(width, inputs)
    network = CLASSIFIERS[encoder](width, inputs)
    if weights is not None:
        load_classifier(network, Path(weights))
    return of_resnet(network) if isinstance(network, ResNet) else _of_densenet(network)


def check_known(what: str, value: str | int, known: Iterable[str | int]) -> None:
    """Raises ConfigError for a name or number that is not among those known."""
    if value not in known:
        raise ConfigError(f"{what} {value!r}: there are {', '.join(map(str, known))}")


def channels(stage: nn.Module) -> int:
    """Of the map that a stage ends with: its last normalisation's."""
    return [part.num_features for part in stage.modules() if isinstance(part, nn.BatchNorm2d)][-1]


def of_resnet(network: ResNet) -> list[nn.Sequential]:
    """Its five parts, as ``stages`` gives them."""
    return [
        nn.Sequential(network.conv1, network.bn1, network.act),
        nn.Sequential(network.maxpool, *network.layer1),
        network.layer2,
        network.layer3,
        network.layer4,
    ]


def _of_densenet(network: DenseNet) -> list[nn.Sequential]:
    """A map is taken where the next transition has normalised it, before that makes it coarser."""
    parts = dict(network.features.named_children())
    found = [nn.Sequential(parts["conv0"], parts["norm0"], parts["relu0"])]
    coarser = [parts["pool0"]]
    for number in (1, 2, 3):
        norm, relu, *after = parts[f"transition{number}"].children()
        found.append(nn.Sequential(*coarser, parts[f"denseblock{number}"], norm, relu))
        coarser = after
    found.append(nn.Sequential(*coarser, parts["denseblock4"], parts["norm5"], nn.ReLU()))
    return found


def _plain(width: float, inputs: int) -> list[nn.Sequential]:
    widths = [scaled(channels, width) for channels in PLAIN_WIDTHS]
    first = nn.Sequential(_two_convolutions(inputs, widths[0]))
    return [first] + [nn.Sequential(nn.MaxPool2d(2), _two_convolutions(a, b)) for a, b in pairwise(widths)]


def _two_convolutions(inputs: int, outputs: int) -> nn.Module:
    return TwoConv(2, inputs, outputs, act="RELU", norm="BATCH", bias=False)


def load_classifier(network: nn.Module, path: Path) -> None:
    """Fill a classifier, but for its head, from a state dict as torchvision names it, or MONAI.

    Weights for three colours are summed for a network of one channel: grey is the same in all of them. The
    file is safetensors, or torch's with tensors only: nothing in it is executed. Raises ConfigError.
    """
    own = {name: value for name, value in network.state_dict().items() if not name.startswith(HEADS)}
    state = {_monai_name(n): v for n, v in _tensors(path).items() if not n.startswith(HEADS)}
    first = next(iter(own))
    if first in state and state[first].dim() == 4 and own[first].shape[1] == 1:
        state[first] = state[first].sum(dim=1, keepdim=True)
    wanted = {name for name in own if not name.endswith("num_batches_tracked")}
    unlike = sorted(wanted - state.keys()) + sorted(state.keys() - own.keys())
    unlike += [name for name in sorted(wanted & state.keys()) if own[name].shape != state[name].shape]
    if unlike:
        raise ConfigError(
            f"encoder_weights {path}: not those of this encoder at this width: {len(unlike)} tensors are "
            f"missing, unknown or of another size, the first is {unlike[0]}"
        )
    network.load_state_dict(state, strict=False)


def _monai_name(name: str) -> str:
    """``denselayer1.norm1`` and, in old files, ``denselayer1.norm.1`` → ``denselayer1.layers.norm1``."""
    return re.sub(r"(denselayer\d+)\.(norm|conv)\.?([12])\.", r"\1.layers.\2\3.", name)


def _tensors(path: Path) -> Mapping[str, Tensor]:
    safe = path.suffix == ".safetensors"
    try:
        state = load_file(path) if safe else torch.load(path, "cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        raise ConfigError(f"encoder_weights {path} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ConfigError(f"encoder_weights {path}: holds something else than named tensors")
    return state
