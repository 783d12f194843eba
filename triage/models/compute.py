"""Where and how precisely networks run, and what their failures mean."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from triage.config import Analysis
from triage.errors import NO_MEMORY, ConfigError, DeviceLost, FreshProcess
from triage.models import engine
from triage.models.engine import Network

log = logging.getLogger(__name__)

MEMORY = ("out of memory", "can't allocate memory")
DEVICE = ("cuda", "cudnn", "cublas")
"""Parts of the messages with which torch reports memory and devices, all as RuntimeError."""

WAITING = 2
"""Batches a thread that are prepared and not yet answered: one at work, one at hand."""


@dataclass(frozen=True, slots=True)
class Compute:
    """A device, the precision of convolutions on it, how many batches a CPU works on at once, and by what."""

    device: torch.device
    dtype: torch.dtype
    threads: int
    engine: str = "torch"

    @property
    def precision(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def settings(self) -> dict[str, str]:
        """What of it changes an answer, if only in the last digits."""
        return {"precision": self.precision, "device": self.device.type, "engine": self.engine}

    def ready(self, network: nn.Module, inputs: int) -> Network:
        """A network of slices (n, inputs, h, w) → one tensor, on the device, as the engine runs it."""
        network = network.to(self.device)
        if self.device.type == "cuda":
            return engine.replayed(network)
        return engine.run_by(self.engine, network, inputs, self.dtype, self.threads)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inference in this precision. Raises FreshProcess where memory fails, DeviceLost where the GPU."""
        try:
            with torch.inference_mode(), self._rounding():
                yield
        except MemoryError as error:
            raise FreshProcess(NO_MEMORY) from error
        except RuntimeError as error:
            said = f"the network could not run: {str(error).splitlines()[0]}"
            if any(part in said.lower() for part in MEMORY):
                raise FreshProcess(said) from error
            if any(part in said.lower() for part in DEVICE):
                raise DeviceLost(said) from error
            raise

    def _rounding(self) -> torch.autocast:
        enabled = self.dtype == torch.bfloat16
        cached = self.device.type == "cpu"  # what a CUDA graph reads must not go when this ends
        return torch.autocast(self.device.type, self.dtype, enabled=enabled, cache_enabled=cached)

    def map(
        self,
        network: Callable[[Tensor], Tensor],
        batches: Iterable[Tensor],
        activation: Callable[[Tensor], Tensor] = lambda values: values,
    ) -> list[Tensor]:
        """The network's answers after ``activation``, in order.

        Raises FreshProcess for NaN, which every threshold calls negative. Few batches wait for their turn and
        only what ``activation`` keeps is kept, however long the volume is.

        On a CPU each thread takes whole batches: threads that share a layer wait for each other at its
        end, and on a busy machine that waiting took several times as long as the work.
        """

        def answer(batch: Tensor) -> Tensor:
            with self.running():
                values = network(batch)
                if not torch.isfinite(values).all():
                    raise FreshProcess("the network gave no numbers")
                return activation(values)

        if self.device.type != "cpu":
            return [answer(batch) for batch in batches]
        answers: list[Future[Tensor]] = []
        pending: set[Future[Tensor]] = set()
        with ThreadPoolExecutor(self.threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for batch in batches:
                answers.append(pool.submit(answer, batch))
                pending.add(answers[-1])
                if len(pending) >= WAITING * self.threads:
                    done, pending = wait(pending, return_when=FIRST_COMPLETED)
                    for future in done:
                        future.result()
            return [future.result() for future in answers]


def choose(analysis: Analysis) -> Compute:
    """From the settings; ``auto`` takes a GPU where there is one, bfloat16 where it is fast, and on a CPU the
    engine that a short trial finds fastest.

    Raises ConfigError for a GPU or an engine that is asked for and missing.
    """
    on_gpu = analysis.device != "cpu" and _gpu_works()
    if analysis.device == "cuda" and not on_gpu:
        raise ConfigError("analysis.device = 'cuda': no GPU can be used here; set it to auto or cpu")
    if analysis.device == "auto" and not on_gpu and torch.version.cuda is not None:
        log.warning("no GPU can be used: studies are judged on the CPU, which takes longer")
    torch.set_num_threads(1)
    dtype = _dtype(analysis, on_gpu)
    device, threads = torch.device("cuda" if on_gpu else "cpu"), analysis.threads or os.cpu_count() or 1
    return Compute(device, dtype, threads, "torch" if on_gpu else _engine(analysis, dtype, threads))


def speeds(analysis: Analysis) -> Mapping[str, float] | None:
    """Milliseconds a slice by engine, the preferred one first; None on a GPU, which torch alone uses."""
    running = choose(analysis)
    return engine.trial(running.dtype, running.threads) if running.device.type == "cpu" else None


def _dtype(analysis: Analysis, on_gpu: bool) -> torch.dtype:
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    fast = fast_bfloat16(on_gpu) and (on_gpu or analysis.engine not in engine.FLOAT32_ONLY)
    return dtypes.get(analysis.precision, torch.bfloat16 if fast else torch.float32)


def _engine(analysis: Analysis, dtype: torch.dtype, threads: int) -> str:
    if analysis.engine == "auto":
        name = engine.choose(dtype, threads)
        log.info("networks of slices are run by %s, %s", name, _said(engine.trial(dtype, threads)))
        return name
    if not engine.installed(analysis.engine):
        extra = {"openvino": "cpu", "onnxruntime": "onnx"}[analysis.engine]
        missing = f"analysis.engine = {analysis.engine!r} is not installed"
        raise ConfigError(f"{missing}: pip install '.[{extra}]', or set it to auto")
    return analysis.engine


def _gpu_works() -> bool:
    """Whether it does something for us: a GPU that fell off the bus may still be counted."""
    if not torch.cuda.is_available():
        return False
    try:
        return bool(torch.ones(1, device="cuda").sum().item() == 1)
    except (RuntimeError, AssertionError) as error:  # the second where torch was built without CUDA
        log.warning("the GPU does not work: %s", str(error).splitlines()[0])
        return False


@cache
def fast_bfloat16(on_gpu: bool) -> bool:
    """Whether the processor is made for bfloat16: elsewhere it is slower than float32."""
    if on_gpu:
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def _said(speeds: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {milliseconds:.1f} ms a slice" for name, milliseconds in speeds.items())
