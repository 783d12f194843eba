"""Cross-validation by patient: who is judged by which networks, kept as a file beside what was trained.

Each patient is tested in one fold, by networks that learned from the others. Where a schedule needs
patients for validation, some of those who learn are taken for that, as in the papers (Qiblawey et al.,
section 3.1: 20 % of the training data).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from triage.errors import ConfigError

FILE = "folds.json"
ONE_EACH = 2**31
"""As many folds as there are patients: each is left out alone."""
FEWEST_PATIENTS = 3
"""One to be judged, one to learn from, and one more to choose the threshold on."""


class Fold(BaseModel):
    """One training: who is tested, and who of the others only validates."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    test: tuple[str, ...] = Field(min_length=1)
    validation: tuple[str, ...] = ()


class Folds(BaseModel):
    """All trainings of a cross-validation, and who validates the one that leaves nobody out."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    folds: tuple[Fold, ...] = Field(min_length=2)
    validation: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """Of the folders that the folds are trained in."""
        if self.one_each:
            return [f"without_{fold.test[0]}" for fold in self.folds]
        return [f"fold_{number}" for number in range(1, len(self.folds) + 1)]

    @property
    def one_each(self) -> bool:
        return all(len(fold.test) == 1 for fold in self.folds)

    @property
    def tested(self) -> list[tuple[str, ...]]:
        """Who is tested in each fold."""
        return [fold.test for fold in self.folds]


def plan(
    asked: int | Path, patients: Sequence[str], output: Path, seed: int, validation_share: float | None
) -> Folds:
    """The folds of a run: those in its folder, else a file's, else patients dealt by the seed; kept there.

    ``asked``: how many, at most one for each patient, or a file of one's own. ``validation_share``: of those
    who are not tested, how many validate; None where nobody needs to. Raises ConfigError for too few
    patients, and for a file in which one is missing or tested twice.
    """
    if len(patients) < FEWEST_PATIENTS:
        raise ConfigError(
            f"{len(patients)} patients have volumes with lesions drawn: at least {FEWEST_PATIENTS} are needed"
        )
    kept = output / FILE
    earlier = read(kept, patients) if kept.exists() else None
    if isinstance(asked, Path):
        folds = read(asked, patients)
        other = earlier is not None and earlier.tested != folds.tested
    else:
        folds = earlier or deal(patients, asked, seed)
        other = len(folds.folds) != min(asked, len(patients))
    if other:
        raise ConfigError(
            f"{kept} has other folds than are asked for: choose another --output, or give --folds {kept}"
        )
    if validation_share is not None:
        folds = with_validation(folds, patients, validation_share, seed)
    output.mkdir(parents=True, exist_ok=True)
    kept.write_text(folds.model_dump_json(indent=1), encoding="utf-8")
    return folds


def deal(patients: Sequence[str], count: int, seed: int) -> Folds:
    """Each patient into one of so many folds, at most as many as patients; sizes differ by one at most.

    One each, they keep their order. Raises ConfigError for fewer than two.
    """
    if count < 2:
        raise ConfigError(f"--folds {count}: at least 2 are needed")
    if count >= len(patients):
        return Folds(folds=tuple(Fold(test=(patient,)) for patient in patients))
    shuffled = np.random.default_rng(seed).permutation(patients).tolist()
    return Folds(folds=tuple(Fold(test=tuple(sorted(shuffled[k::count]))) for k in range(count)))


def with_validation(folds: Folds, patients: Sequence[str], share: float, seed: int) -> Folds:
    """Where a training has nobody to validate it, this share of its patients, at least one."""

    def some(tested: Collection[str], number: int) -> tuple[str, ...]:
        others = [patient for patient in patients if patient not in tested]
        wanted = min(max(1, round(share * len(others))), len(others) - 1)
        return tuple(sorted(np.random.default_rng((seed, number)).permutation(others)[:wanted].tolist()))

    each = tuple(
        fold if fold.validation else Fold(test=fold.test, validation=some(fold.test, number))
        for number, fold in enumerate(folds.folds, 1)
    )
    return Folds(folds=each, validation=folds.validation or some((), 0))


def read(path: Path, patients: Sequence[str]) -> Folds:
    """A file of folds for just these patients. Raises ConfigError that says what is wrong with it."""
    try:
        folds = Folds.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--folds {path}: cannot be read; give a number, or a file as {FILE}") from error
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors())
        raise ConfigError(f"{path}: {wrong}") from error
    _check(folds, patients, path)
    return folds


def _check(folds: Folds, patients: Sequence[str], path: Path) -> None:
    tested = [patient for test in folds.tested for patient in test]
    named = {*tested, *folds.validation, *(p for fold in folds.folds for p in fold.validation)}
    wrong = {
        "unknown": named - {*patients},
        "in no fold's test": {*patients} - {*tested},
        "tested twice": {patient for patient in tested if tested.count(patient) > 1},
        "tested and validating in one fold": {
            patient for fold in folds.folds for patient in fold.test if patient in fold.validation
        },
    }
    if any(wrong.values()):
        faults = "; ".join(f"{what}: {', '.join(sorted(who))}" for what, who in wrong.items() if who)
        raise ConfigError(f"{path}: {faults}; there are {', '.join(patients)}")
    for held_back in (folds.validation, *((*fold.test, *fold.validation) for fold in folds.folds)):
        if {*held_back} >= {*patients}:
            raise ConfigError(f"{path}: nobody is left to learn from beside {', '.join(held_back)}")
