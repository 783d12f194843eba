"""The one trainer. A step depends only on (seed, step number): a resumed run is the same run."""

from __future__ import annotations

import copy
import json
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from triage.models import weights
from triage.training.data import Scan
from triage.training.tasks import Task

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """How long and how fast: Adam, learning rate warmed up, then lowered along a cosine."""

    steps: int
    learning_rate: float = 1e-3
    warm_up: int = 100
    weight_decay: float = 1e-4
    average: float = 0.995
    """Decay of the running average of the weights, which is what is validated and shipped."""
    every: int = 250
    """Steps between checkpoints."""
    seed: int = 1

    def rate(self, step: int) -> float:
        progress = min(1.0, step / self.steps)
        return (
            self.learning_rate
            * min(1.0, (step + 1) / self.warm_up)
            * (0.51 + 0.49 * math.cos(math.pi * progress))
        )


class Trainer:
    """Trains ``task.network``; ``averaged`` is the network to keep."""

    def __init__(self, task: Task, schedule: Schedule, recipe: weights.Recipe, output: Path) -> None:
        self.task, self.schedule, self.recipe, self.output = task, schedule, recipe, output
        self.step = 0
        task.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.averaged = copy.deepcopy(task.network).requires_grad_(False).eval()
        self.optimizer = torch.optim.AdamW(
            task.network.parameters(), schedule.learning_rate, weight_decay=schedule.weight_decay
        )

    @property
    def checkpoint(self) -> Path:
        return self.output / "checkpoint.pt"

    def train(self, validation: Sequence[Scan], until: int | None = None) -> float:
        """Up to step ``until``, or to the end; returns the mean of the last losses."""
        losses: list[float] = []
        started = time.monotonic()
        for _ in range(self.step, min(until or self.schedule.steps, self.schedule.steps)):
            losses.append(self._step())
            if self.step % self.schedule.every == 0 or self.step == self.schedule.steps:
                self.save()
                loss, rate = (
                    np.mean(losses[-self.schedule.every :]),
                    len(losses) / (time.monotonic() - started),
                )
                scores = {name: round(d, 3) for name, d in self.validate(validation).items()}
                logger.info("step %d, loss %.4f, %.2f steps/s, Dice %s", self.step, loss, rate, scores)
        return float(np.mean(losses[-20:])) if losses else math.nan

    def _step(self) -> float:
        torch.manual_seed(self.schedule.seed * 1_000_003 + self.step)
        rng = np.random.default_rng((self.schedule.seed, self.step))
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.rate(self.step)
        self.task.network.train()
        loss = self.task.loss(rng)
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.task.network.parameters(), 5.0)
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

    @torch.inference_mode()
    def validate(self, scans: Sequence[Scan]) -> dict[str, float]:
        """Dice of each scan at 2 mm, threshold 0.5."""
        return {s.name: dice(*self.task.logits(self.averaged, s)) for s in scans if s.has_lung}

    @property
    def weights(self) -> Path:
        return self.output / f"{self.recipe['network']}.safetensors"

    def save(self) -> None:
        """Checkpoint and weights; atomically, so that a killed run resumes from a whole file."""
        self.output.mkdir(parents=True, exist_ok=True)
        state = {
            "step": self.step,
            "network": self.task.network.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.checkpoint)
        trained = {**self.recipe, "steps": str(self.step), "schedule": json.dumps(asdict(self.schedule))}
        weights.save(self.averaged, trained, self.weights)

    def resume(self) -> None:
        state: dict[str, Any] = torch.load(self.checkpoint, weights_only=True)
        self.step = state["step"]
        self.task.network.load_state_dict(state["network"])
        self.averaged.load_state_dict(state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])


def dice(logits: Tensor, truth: Tensor) -> float:
    """Of the pixels with a logit above 0; 1 where both masks are empty."""
    answer = logits > 0
    total = int(answer.sum() + truth.sum())
    return 2 * int((answer & truth).sum()) / total if total else 1.0
