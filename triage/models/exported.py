"""A lesion network of someone else's, as an ONNX or TorchScript file or a MONAI bundle.

It sees slices within the lungs that a network of ours finds; ``deploy/models.md`` has the contract.
Nothing is unpickled and no code of a package is imported: hence no ``torch.load``, no ``torch.export``
(its files are pickles inside), and of a bundle only ``metadata.json`` is read, never the configs that
MONAI's ConfigParser would instantiate, which can name any Python function.
"""

from __future__ import annotations

import io
import json
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor

from triage.config import Analysis
from triage.errors import ConfigError
from triage.models import compute
from triage.models.compute import Compute
from triage.models.packages import HELP, Input, Output, Package, explain
from triage.models.pipeline import Pipeline, assemble, in_each_slice, slice_by_slice
from triage.models.preprocessing import Grid

Network = Callable[[Tensor], Tensor]
"""Slices (n, 1, h, w) → values (n, channels, h, w)."""
SHORTEST_SIDE = 64
"""Pixels of the slices on which a network is tried at start."""


def load(package: Package, analysis: Analysis) -> Pipeline:
    """From the file ``network`` of a package, its card's ``input`` and ``output``, and a lungs network.

    It runs in float32, the precision it was exported in. Raises ConfigError where it breaks the contract.
    """
    takes, gives = package.card.input, package.card.output
    if takes is None or gives is None:
        raise package.wrong(f"{'input' if takes is None else 'output'}: missing; system 'exported' needs it")
    running = replace(compute.choose(analysis), dtype=torch.float32)
    if "metadata" in package.files:
        _agree(package, takes, gives)
    path = package.file("network")
    network = _read(path, running)
    _try(network, takes, gives, running, path)
    lesions = slice_by_slice(network, takes.multiple_of, running, _activation(gives))
    grid = Grid(takes.spacing_mm, takes.window_hu, thickness_mm=0)
    return assemble(package, analysis, running, in_each_slice(lesions), grid)


ACTIVATIONS: dict[str, Network] = {
    "none": lambda values: values,
    "sigmoid": torch.sigmoid,
    "softmax": lambda values: values.softmax(1),
}


def _activation(gives: Output) -> Network:
    """Values (n, channels, h, w) → probability of lesion (n, 1, h, w)."""
    probability = ACTIVATIONS[gives.activation]
    channel = slice(gives.lesion_channel, gives.lesion_channel + 1)
    return lambda values: probability(values)[:, channel]


def _read(path: Path, running: Compute) -> Network:
    if path.suffix not in READERS:
        raise ConfigError(
            f"{path}: a network is one of {', '.join(READERS)}; pickles and torch.export's .pt2, which holds "
            f"pickles, are not taken: export to ONNX; {HELP}"
        )
    try:
        return READERS[path.suffix](path, running)
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"{path} cannot be used: {_first_line(error)}; {HELP}") from error


def _torchscript(path: Path, running: Compute) -> Network:
    with warnings.catch_warnings():
        # Deprecated for writing anew; what MONAI bundles hold, and read without Python's unpickler.
        warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
        read: Callable[..., torch.nn.Module] = torch.jit.load
        return read(io.BytesIO(path.read_bytes()), running.device).eval()


def _onnx(path: Path, running: Compute) -> Network:
    try:
        import onnxruntime
        from onnxruntime.capi import onnxruntime_pybind11_state as failures
    except ImportError as error:
        raise ConfigError(f"{path}: ONNX networks need one more package: pip install triage[onnx]") from error
    on_cpu = running.device.type == "cpu"
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1 if on_cpu else running.threads
    options.log_severity_level = 4
    wanted = ["CPUExecutionProvider"] if on_cpu else ["CUDAExecutionProvider", "CPUExecutionProvider"]
    providers = [name for name in wanted if name in onnxruntime.get_available_providers()]
    failed = tuple(getattr(failures, name) for name in ONNX_FAILURES)
    try:
        # From bytes: weights in a second file, which no hash would cover, are then not found.
        session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=providers)
    except failed as error:
        raise RuntimeError(_first_line(error)) from error
    inputs, outputs = session.get_inputs(), session.get_outputs()
    if len(inputs) != 1 or len(outputs) != 1:
        raise RuntimeError(f"it has {len(inputs)} inputs and {len(outputs)} outputs, not one each")

    def network(slices: Tensor) -> Tensor:
        try:
            values = session.run(None, {inputs[0].name: np.ascontiguousarray(slices.cpu().numpy())})[0]
        except failed as error:
            kind = MemoryError if "allocate memory" in str(error) else RuntimeError
            raise kind(_first_line(error)) from error
        return torch.from_numpy(values).to(running.device)

    return network


ONNX_FAILURES = (
    *("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf"),
    *("NoModel", "NotImplemented", "RuntimeException", "EPFail"),
)
READERS: dict[str, Callable[[Path, Compute], Network]] = {
    ".onnx": _onnx,
    ".ts": _torchscript,
    ".pt": _torchscript,
}
"""By the file's suffix. Raise RuntimeError or OSError for a file that cannot be read."""


def _try(network: Network, takes: Input, gives: Output, running: Compute, path: Path) -> None:
    """Slices of two shapes, together and alone: one size only, or training mode, comes to light here."""

    def answer(slices: Tensor) -> Tensor:
        try:
            with running.running():
                values = network(slices)
        except RuntimeError as error:
            raise ConfigError(
                f"{path} cannot take slices {tuple(slices.shape)}: {_first_line(error)}; export it with free "
                f"number, height and width, and give the right input.multiple_of; {HELP}"
            ) from error
        _check_values(values, (len(slices), gives.channels, *slices.shape[2:]), gives, path)
        return values

    side = takes.multiple_of * -(-SHORTEST_SIDE // takes.multiple_of)
    answer(torch.zeros(1, 1, side, side, device=running.device))
    slices = torch.linspace(0, 1, 6 * side * side, device=running.device).reshape(3, 1, side, 2 * side)
    if not torch.allclose(answer(slices)[:1], answer(slices[:1]), rtol=0.01, atol=0.01):
        raise ConfigError(
            f"{path} answers otherwise for a slice alone than beside others: export it after eval(); {HELP}"
        )


def _check_values(values: Any, shape: tuple[int, ...], gives: Output, path: Path) -> None:
    if not isinstance(values, Tensor) or tuple(values.shape) != shape:
        found = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ConfigError(f"{path} gives {found}, not one tensor {shape} as output.channels says; {HELP}")
    if not torch.isfinite(values).all():
        raise ConfigError(f"{path} gives values that are no numbers; {HELP}")
    if gives.activation == "none" and (values.min() < 0 or values.max() > 1):
        raise ConfigError(
            f"{path} gives values from {values.min():.3g} to {values.max():.3g}, no probabilities: "
            f"set output.activation to sigmoid or softmax; {HELP}"
        )


class _Array(BaseModel):
    """An entry of ``network_data_format`` of a MONAI bundle; what is not asked is passed over."""

    num_channels: int
    spatial_shape: tuple[int | str, ...]
    dtype: str = "float32"
    value_range: tuple[float, ...] = ()


class _Format(BaseModel):
    inputs: Mapping[str, _Array]
    outputs: Mapping[str, _Array]


class _Metadata(BaseModel):
    """``configs/metadata.json``."""

    network_data_format: _Format


def _agree(package: Package, takes: Input, gives: Output) -> None:
    """A bundle's own description must not contradict the card. Raises ConfigError naming the key."""
    path = package.file("metadata")
    try:
        described = _Metadata.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        raise ConfigError(f"{path}: {explain(error)}; {HELP}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error
    inputs, outputs = described.network_data_format.inputs, described.network_data_format.outputs
    if len(inputs) != 1 or len(outputs) != 1:
        raise ConfigError(f"{path}: {len(inputs)} inputs and {len(outputs)} outputs, not one each; {HELP}")
    (image,), (answer,) = inputs.values(), outputs.values()
    probability = gives.activation == "none"
    contract = {
        "input num_channels": (image.num_channels, image.num_channels == 1),
        "input dtype": (image.dtype, image.dtype == "float32"),
        "input value_range": (image.value_range, image.value_range in ((), (0, 1))),
        "input spatial_shape": (image.spatial_shape, _takes(image.spatial_shape, takes.multiple_of)),
        "output num_channels": (answer.num_channels, answer.num_channels == gives.channels),
        "output value_range": (
            answer.value_range,
            not probability or answer.value_range in ((), (0, 1)),
        ),
    }
    for key, (value, agrees) in contract.items():
        if not agrees:
            raise ConfigError(f"{path}: {key} = {value!r} contradicts the contract or the card; {HELP}")


def _takes(shape: tuple[int | str, ...], multiple: int) -> bool:
    """Two sizes, each free ("*") or any multiple ("16*n") of a number that divides ours."""
    sizes = [re.fullmatch(r"\*|(?:(\d+)\s*\*\s*)?n", str(size)) for size in shape]
    return len(sizes) == 2 and all(size and multiple % int(size[1] or 1) == 0 for size in sizes)


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
