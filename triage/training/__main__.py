"""Train, choose the threshold, evaluate.

python -m triage.training lungs --data DIR --output DIR
python -m triage.training multitask --data DIR --output DIR
python -m triage.training threshold --data DIR --weights DIR --patients p6
python -m triage.training evaluate --data DIR --weights DIR --patients p3,p4
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from triage.errors import ConfigError
from triage.training import evaluation
from triage.training.data import Scan, read, split
from triage.training.tasks import LungsTask, MultitaskTask, Task
from triage.training.trainer import Schedule, Trainer

TASKS: dict[str, Callable[[Sequence[Scan], Sequence[int], int], Task]] = {
    "lungs": lambda scans, widths, _: LungsTask(scans, widths),
    "multitask": MultitaskTask,
}
WIDTHS = {"lungs": "8,16,32,64,128,256", "multitask": "16,32,64,128,256"}
"""Of the networks that ship; the paper's are 8,16,32,64,128,256,512 with 1024 hidden."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m triage.training", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in TASKS:
        train = commands.add_parser(name, help=f"train the {name} network")
        train.add_argument("--output", type=Path, required=True, help="for checkpoints and weights")
        train.add_argument("--validation", type=_names, default=("p6",), help="patients, comma separated")
        train.add_argument("--test", type=_names, default=("p3", "p4"), help="patients never trained on")
        train.add_argument("--widths", default=WIDTHS[name])
        train.add_argument("--hidden", type=int, default=128)
        train.add_argument("--steps", type=int, default=5000)
        train.add_argument("--learning-rate", type=float, default=1e-3)
        train.add_argument("--seed", type=int, default=1)
        train.add_argument("--resume", action="store_true")
    for name in ("threshold", "evaluate"):
        judge = commands.add_parser(name)
        judge.add_argument("--weights", type=Path, required=True, help="folder of the trained networks")
        judge.add_argument("--patients", type=_names, required=True, help="comma separated")
    for command in commands.choices.values():
        command.add_argument("--data", type=Path, required=True)
        command.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


def _names(text: str) -> tuple[str, ...]:
    return tuple(filter(None, text.split(",")))


def train(args: argparse.Namespace) -> None:
    parts = split(read(args.data), args.validation, args.test)
    torch.manual_seed(args.seed)
    task = TASKS[args.command](parts.train, [int(width) for width in args.widths.split(",")], args.hidden)
    schedule = Schedule(steps=args.steps, learning_rate=args.learning_rate, seed=args.seed)
    recipe = {
        "network": args.command,
        "widths": args.widths,
        "hidden": str(args.hidden),
        "lesion_threshold": "0.5",
        "validation": ",".join(args.validation),
        "test": ",".join(args.test),
    }
    trainer = Trainer(task, schedule, recipe, args.output)
    if args.resume:
        trainer.resume()
    trainer.train(parts.validation)


def main() -> None:
    args = arguments()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    if args.command in TASKS:
        train(args)
    elif args.command == "threshold":
        print(f"lesion threshold {evaluation.choose_threshold(args.data, args.weights, args.patients)}")
    else:
        print(evaluation.table(evaluation.evaluate(args.data, args.weights, args.patients)))


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        raise SystemExit(str(error)) from error
