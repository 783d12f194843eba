"""What runs networks of slices: on a processor torch, or OpenVINO or ONNX Runtime where they are faster; on a
GPU CUDA graphs.

A network leaves torch as ONNX, in memory and in a tenth of a second, when it is loaded: no second file could
disagree with the weights that its package's card vouches for. What an engine cannot do, torch does.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from importlib.util import find_spec
from math import prod
from threading import Lock
from time import perf_counter
from types import MappingProxyType
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from triage.models.networks import LungsNet

log = logging.getLogger(__name__)

Network = Callable[[Tensor], Tensor]
"""Slices (n, c, h, w) → values (n, …)."""
Record = Callable[[Network, Tensor], Network]
"""A network and the first slices of a shape → the same network for slices of this shape only."""
Shape = tuple[int, ...]
Made = TypeVar("Made")

PIECE = 4
"""Slices that OpenVINO sees at once: what they leave between two layers stays in the processor's cache."""
SHAPES = 8
"""Sizes of slices for which a GPU's recordings are kept, and OpenVINO's plans: OpenVINO is a third faster
where it knows the size."""
RECORDED = 16
"""Slices of a recorded pass, and of every batch."""
WARMING = 2
"""Passes before a recording, in which libraries choose what cannot be chosen while it runs."""
CLEARLY = 1.2
"""Times faster than the engine named before it that another must be: the choice outlives a busy moment."""
TRIAL = (4, 1, 192, 192)
"""Slices of a trial, for each thread."""
OPSET = 17


class OpenVino:
    """A network compiled for slices of each size that comes."""

    def __init__(self, graph: bytes, dtype: torch.dtype, threads: int) -> None:
        self.model = _core().read_model(graph)
        precision = "bf16" if dtype == torch.bfloat16 else "f32"
        self.options = {
            "INFERENCE_PRECISION_HINT": precision,
            "NUM_STREAMS": threads,
            "INFERENCE_NUM_THREADS": threads,
        }
        self.compiled: OrderedDict[Shape, Any] = OrderedDict()
        self.lock = Lock()

    def __call__(self, slices: Tensor) -> Tensor:
        """From any thread; the last piece is filled up with air."""
        request = self._for((PIECE, *slices.shape[1:])).create_infer_request()
        answers = []
        for part in slices.float().contiguous().split(PIECE):
            request.infer([_filled_up(part, PIECE).numpy()], share_inputs=True)
            answers.append(torch.tensor(request.get_output_tensor(0).data[: len(part)]))
        return torch.cat(answers)

    def _for(self, shape: Shape) -> Any:
        with self.lock:
            return _kept(self.compiled, shape, lambda: self._compile(shape))

    def _compile(self, shape: Shape) -> Any:
        self.model.reshape(list(shape))
        return _core().compile_model(self.model, "CPU", self.options)


class Replayed:
    """A network whose work on slices of one size is recorded once and then replayed.

    Handing its hundreds of small tasks to a GPU one by one takes longer than the tasks. To record them takes
    ``WARMING`` + 1 passes for each size and no compiler; torch.compile takes half a minute and needs one.
    """

    def __init__(self, network: Network, record: Record) -> None:
        self.network, self.record = network, record
        self.recordings: OrderedDict[Shape, Network] = OrderedDict()

    def __call__(self, slices: Tensor) -> Tensor:
        """The last piece is filled up with air."""
        answers = []
        for part in slices.split(RECORDED):
            whole = _filled_up(part, RECORDED)
            replay = _kept(self.recordings, tuple(whole.shape), partial(self.record, self.network, whole))
            answers.append(replay(whole)[: len(part)])
        return torch.cat(answers)


def replayed(network: nn.Module) -> Network:
    """A network on a GPU, as CUDA graphs that share their memory; one by one where that fails."""
    record = partial(cuda_graph, torch.cuda.graph_pool_handle())
    return _WithTorch("a CUDA graph", Replayed(network, record), network)


def cuda_graph(pool: Any, network: Network, slices: Tensor) -> Network:
    """Records what the network does with slices of this shape, in this pool of the GPU's memory.

    Answers are copied at once, for the next graph of the pool uses the same memory.
    """
    given, aside = slices.clone(memory_format=torch.channels_last), torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(WARMING):
            network(given)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    # A recording that fails would leave its own stream behind; the outer one is set back in any case.
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, pool=pool):
        answer = network(given)

    def replay(slices: Tensor) -> Tensor:
        given.copy_(slices)
        graph.replay()
        return answer.clone()

    return replay


def _filled_up(slices: Tensor, count: int) -> Tensor:
    """So many, with air behind them."""
    return torch.cat([slices, slices.new_zeros(count - len(slices), *slices.shape[1:])])


def _kept(made: OrderedDict[Shape, Made], shape: Shape, make: Callable[[], Made]) -> Made:
    """What was made for this shape, now or before; the ``SHAPES`` used last are kept."""
    if shape not in made:
        made[shape] = make()
    made.move_to_end(shape)
    while len(made) > SHAPES:
        made.popitem(last=False)
    return made[shape]


class OnnxRuntime:
    """A network as ONNX Runtime runs it, always in float32."""

    def __init__(self, graph: bytes, _dtype: torch.dtype, _threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1  # threads take whole batches: ``Compute.map``
        options.log_severity_level = 4
        self.session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])

    def __call__(self, slices: Tensor) -> Tensor:
        (values,) = self.session.run(None, {"slices": slices.float().contiguous().numpy()})
        return torch.from_numpy(values)


ENGINES: dict[str, Callable[[bytes, torch.dtype, int], Network]] = {
    "openvino": OpenVino,
    "onnxruntime": OnnxRuntime,
}
"""Beside torch, in the order in which they are taken where none is clearly faster."""
FLOAT32_ONLY = {"onnxruntime"}


@cache
def _core() -> Any:
    import openvino

    # Its table of types is made at first use, and two threads that both make it wait for each other for ever.
    openvino.Tensor(np.zeros(1, np.float32)).element_type.to_dtype()
    return openvino.Core()


def installed(name: str) -> bool:
    """Whether this engine can be tried at all."""
    return name not in ENGINES or find_spec(name) is not None


def run_by(name: str, network: nn.Module, inputs: int, dtype: torch.dtype, threads: int) -> Network:
    """The network as this engine runs it. Where the engine fails, now or later, torch goes on alone."""
    if name not in ENGINES:
        return network
    try:
        run = ENGINES[name](exported(network, inputs), dtype, threads)
    except (ImportError, RuntimeError, ValueError, TypeError) as error:
        _go_without(name, error)
        return network
    return _WithTorch(name, run, network)


class _WithTorch:
    """An engine as long as it works."""

    def __init__(self, name: str, run: Network, network: Network) -> None:
        self.name, self.run, self.network = name, run, network

    def __call__(self, slices: Tensor) -> Tensor:
        try:
            return self.run(slices)
        except RuntimeError as error:
            if self.run is not self.network:
                _go_without(self.name, error)
            self.run = self.network
            return self.network(slices)


def _go_without(name: str, error: Exception) -> None:
    said = str(error).strip().splitlines() or [type(error).__name__]
    log.warning("%s cannot run this network, torch does: %s", name, said[0])


def exported(network: nn.Module, inputs: int) -> bytes:
    """The network as ONNX, for any number and size of slices (n, inputs, h, w)."""
    file, side = io.BytesIO(), 2 * int(getattr(network, "stride", 32))
    free = {0: "n", 2: "h", 3: "w"}
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # the exporter that needs no further package is called the old one
        export: Callable[..., object] = torch.onnx.export  # its types know of files on disk only
        export(
            network,
            (torch.zeros(2, inputs, side, side),),
            cast(Any, file),  # what it says of itself leaves files in memory out
            dynamo=False,
            input_names=["slices"],
            dynamic_axes={"slices": free},
            opset_version=OPSET,
        )
    return file.getvalue()


def choose(dtype: torch.dtype, threads: int) -> str:
    """The engine that is fastest here, of those that know this precision."""
    taken = trial(dtype, threads)
    return min(taken, key=lambda name: taken[name] * CLEARLY ** list(taken).index(name))


@cache
def trial(dtype: torch.dtype, threads: int) -> Mapping[str, float]:
    """Milliseconds a slice of a small network by each engine that is installed, the preferred one first.

    Once a process; with torch's own export and OpenVINO's compilation it takes about a second.
    """
    with torch.random.fork_rng(devices=[]):
        network = LungsNet((8, 16, 32, 64)).requires_grad_(False).eval()
    known = [name for name in ENGINES if name not in FLOAT32_ONLY or dtype == torch.float32]
    names = [name for name in (*known, "torch") if installed(name)]
    taken = {}
    for name in names:
        run = run_by(name, network, 1, dtype, threads)
        if name == "torch" or isinstance(run, _WithTorch):
            taken[name] = _milliseconds(run, dtype, threads)
    return MappingProxyType(taken)


def _milliseconds(run: Network, dtype: torch.dtype, threads: int) -> float:
    """A slice, when every thread has some; the best of three times, for other work only adds to it."""

    def once(slices: Tensor) -> None:
        with torch.inference_mode(), torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            run(slices)

    batches = [torch.linspace(0, 1, prod(TRIAL)).reshape(TRIAL) for _ in range(threads)]
    times = []
    with ThreadPoolExecutor(threads, initializer=partial(torch.set_num_threads, 1)) as pool:
        for _ in range(4):
            start = perf_counter()
            for _ in pool.map(once, batches):
                pass
            times.append(perf_counter() - start)
    return 1e3 * float(np.min(times[1:])) / (threads * TRIAL[0])
