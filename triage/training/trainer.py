"""The one trainer. A step depends only on (seed, step number): a resumed run is the same run."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from triage.errors import ConfigError
from triage.models import weights
from triage.training.scans import Scan
from triage.training.tasks import Draw, Task

logger = logging.getLogger(__name__)

Progress = Callable[[int], None]
"""Told the number of the step that is done."""

FACTORS = {"plateau": 0.2, "exponential": 0.95}
"""Of the learning rate, unless the recipe says (Qiblawey et al., table 3; Gao et al., section 3.2.1)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """How long and how fast: AdamW, learning rate warmed up, then lowered as ``decay`` says.

    Without ``weight_decay`` AdamW is Adam, and without ``average`` the weights are what the last step left.
    """

    steps: Annotated[int, Field(ge=1)]
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    warm_up: Annotated[int, Field(ge=1)] = 100
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    average: Annotated[float, Field(ge=0, lt=1)] = 0.995
    """Decay of the running average of the weights, which is what is validated and kept."""
    every: Annotated[int, Field(ge=1)] = 250
    """Steps between checkpoints, each with a validation: the epoch of the papers."""
    patience: Annotated[int, Field(ge=0)] = 0
    """Validations without a better score that end training; the best weights are kept. 0: never."""
    seed: int = 1
    decay: Literal["cosine", "plateau", "exponential", "constant"] = "cosine"
    """Along a cosine to a fiftieth; by ``factor`` where validation gains nothing, or each ``every`` steps."""
    factor: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Of the learning rate, each time that it is lowered; None: that of ``FACTORS``."""
    stale: Annotated[int, Field(ge=1)] = 5
    """Validations without a better score after which a plateau lowers the learning rate."""

    def __post_init__(self) -> None:
        if self.factor is not None and self.decay not in FACTORS:
            raise ValueError(f"factor is for decay {' or '.join(FACTORS)}, not for {self.decay}")
        if self.decay == "plateau" and 0 < self.patience <= self.stale:
            raise ValueError(
                f"stale {self.stale}: patience {self.patience} ends training before the rate is lowered"
            )

    @property
    def validated(self) -> bool:
        """Whether patients who are not trained on decide how long or how fast."""
        return bool(self.patience) or self.decay == "plateau"

    def rate(self, step: int, lowered: int = 0) -> float:
        """The learning rate of a step; ``lowered``: how often a plateau was met before."""
        return self.learning_rate * min(1.0, (step + 1) / self.warm_up) * self._left(step, lowered)

    def _left(self, step: int, lowered: int) -> float:
        if self.decay == "cosine":
            return 0.51 + 0.49 * math.cos(math.pi * min(1.0, step / self.steps))
        if self.decay == "constant":
            return 1.0
        times = lowered if self.decay == "plateau" else step // self.every
        return float((self.factor or FACTORS[self.decay]) ** times)


class Trainer:
    """Trains ``task.network``; ``kept`` is the network to keep."""

    def __init__(self, task: Task, schedule: Schedule, output: Path, device: torch.device) -> None:
        self.task, self.schedule, self.output = task, schedule, output
        self.step = 0
        weights.channels_last(task.network.to(device))
        self.averaged = copy.deepcopy(task.network).requires_grad_(False).eval()
        self.optimizer = torch.optim.AdamW(
            task.network.parameters(), schedule.learning_rate, weight_decay=schedule.weight_decay
        )
        self.best: dict[str, Tensor] = {}
        self.best_score = -math.inf
        self.stale = 0
        self.lowered = 0

    @property
    def checkpoint(self) -> Path:
        return self.output / "checkpoint.pt"

    @property
    def done(self) -> bool:
        """All steps taken, or stopped early."""
        out_of_patience = bool(self.schedule.patience) and self.stale >= self.schedule.patience
        return out_of_patience or self.step >= self.schedule.steps

    @property
    def kept(self) -> nn.Module:
        """The averaged weights: the best validated ones where validation decides, else the last."""
        if self.schedule.validated and self.best:
            self.averaged.load_state_dict(self.best)
        return self.averaged

    def train(self, validation: Sequence[Scan], progress: Progress | None = None) -> float:
        """To the end, from where it stands; returns the mean of the last losses."""
        self.output.mkdir(parents=True, exist_ok=True)
        losses: list[float] = []
        with SummaryWriter(str(self.output / "log"), purge_step=self.step) as log:
            while not self.done:
                log.add_scalar("learning rate", self.rate, self.step + 1)
                losses.append(self.take_step())
                log.add_scalar("loss", losses[-1], self.step)
                if self.step % self.schedule.every == 0 or self.step == self.schedule.steps:
                    self._check(validation, float(np.mean(losses[-self.schedule.every :])), log)
                if progress:
                    progress(self.step)
        return float(np.mean(losses[-20:])) if losses else math.nan

    @property
    def rate(self) -> float:
        """The learning rate of the next step."""
        return self.schedule.rate(self.step, self.lowered)

    def take_step(self) -> float:
        """One batch; returns its loss. Raises ConfigError where training has come to grief."""
        torch.manual_seed(self.schedule.seed * 1_000_003 + self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate
        self.task.network.train()
        loss = self.task.loss(Draw(self.schedule.seed, self.step))
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        norm = nn.utils.clip_grad_norm_(self.task.network.parameters(), 5.0)
        if not norm.isfinite():
            raise ConfigError(
                f"step {self.step}: the gradient is no number; train with a lower schedule.learning_rate"
            )
        self.optimizer.step()
        self.step += 1
        self._average()
        return loss.item()

    @torch.no_grad()
    def _average(self) -> None:
        keep = min(self.schedule.average, self.step / (self.step + 10))
        new = self.task.network.state_dict()
        for name, value in self.averaged.state_dict().items():
            if value.is_floating_point():
                value.lerp_(new[name], 1 - keep)

    def _check(self, validation: Sequence[Scan], loss: float, log: SummaryWriter) -> None:
        """Validate, remember the best weights, lower the rate on a plateau, and write the checkpoint."""
        scores = self.validate(validation)
        mean = float(np.mean(list(scores.values()))) if scores else math.nan
        for name, score in scores.items():
            log.add_scalar(f"validation/{name}", score, self.step)
        logger.info("step %d, loss %.4f, validation %.3f (%d scans)", self.step, loss, mean, len(scores))
        if scores and mean > self.best_score:
            self.best_score, self.stale = mean, 0
            self.best = {name: value.clone() for name, value in self.averaged.state_dict().items()}
        elif scores:
            self.stale += 1
            if self.schedule.decay == "plateau" and self.stale % self.schedule.stale == 0:
                self.lowered += 1
        elif self.schedule.decay == "plateau":
            raise ConfigError("decay plateau: no validation case can tell how well this network does")
        self.save()

    @torch.inference_mode()
    def validate(self, scans: Sequence[Scan]) -> dict[str, float]:
        """Score of each scan that can tell."""
        scores = {s.name: self.task.score(self.averaged, s) for s in scans}
        return {name: score for name, score in scores.items() if score is not None}

    def save(self) -> None:
        """Atomically, so that a killed run resumes from a whole file."""
        state = {
            "step": self.step,
            "network": self.task.network.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "best": self.best,
            "best_score": self.best_score,
            "stale": self.stale,
            "lowered": self.lowered,
        }
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.checkpoint)

    def resume(self) -> None:
        """Go on from the checkpoint, where there is one."""
        if not self.checkpoint.exists():
            return
        device = next(self.averaged.parameters()).device
        state: dict[str, Any] = torch.load(self.checkpoint, weights_only=True, map_location=device)
        self.step, self.stale, self.best_score = state["step"], state["stale"], state["best_score"]
        self.lowered = state.get("lowered", 0)  # checkpoints from before there were plateaus lack it
        self.task.network.load_state_dict(state["network"])
        self.averaged.load_state_dict(state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.best = state["best"]
