"""How well a network judges cases it has not seen: the whole pipeline, case by case, and the summary.

``evaluate`` gives one Score a case, plain data that can be stored; ``summarise`` makes the figures, each
with its interval, what it was counted on, and "not measurable here" where the cases cannot tell.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from triage import models
from triage.config import Analysis
from triage.domain import ModelInfo
from triage.errors import ConfigError
from triage.models import packages, weights
from triage.models.packages import Package
from triage.training.cases import Case
from triage.training.datasets import DATASETS, cases
from triage.training.gallery import Gallery, Sketch
from triage.training.scores import Extent, Overlap, Score, from_json, to_json
from triage.training.scoring import evaluate
from triage.training.summary import FIGURES, Summary, summarise, threshold_curve

__all__ = [
    "FIGURES",
    "Evaluation",
    "Extent",
    "Gallery",
    "Overlap",
    "Score",
    "Sketch",
    "Summary",
    "evaluate",
    "from_json",
    "networks_of",
    "run",
    "summarise",
    "threshold_curve",
    "to_json",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One network on some data sets: what the tables, the JSON and the report are made of."""

    info: ModelInfo
    settings: Mapping[str, str | float]
    sources: Mapping[str, Path]
    trained_on: tuple[str, ...]
    """Cases that the network learned from, or may have: their figures show its fit, not its quality."""
    patients_chosen: tuple[str, ...]
    """Only these patients were asked for; empty for all."""
    scores: tuple[Score, ...]
    summary: Summary
    worst: tuple[Sketch, ...]
    networks: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """File of the package → what its network was built from."""
    left_out: bool = False
    """Each patient was judged by networks that never saw the patient, and not by the finished model."""

    @property
    def described_data(self) -> str:
        """ "medseg9 (9 cases), semiseg (50 cases)"."""
        counts = Counter(s.data for s in self.scores)
        chosen = f", patients {', '.join(self.patients_chosen)}" if self.patients_chosen else ""
        judged = ", each patient judged by networks that never saw the patient" if self.left_out else ""
        return ", ".join(f"{data} ({n} cases)" for data, n in counts.items()) + chosen + judged


def run(
    analysis: Analysis,
    sources: Mapping[str, Path],
    patients: Sequence[str] = (),
    track: Callable[[Iterable[Case]], Iterable[Case]] = iter,
) -> Evaluation:
    """Evaluate the network that ``analysis`` names on data sets, of all patients or of some.

    ``sources``: kind of data (``datasets.DATASETS``) → folder. ``track`` watches the cases go by. Raises
    ConfigError for an unknown kind, a folder that is not laid out so, or a patient who is not there.
    """
    each = {kind: cases(sources, [kind], patients) for kind in sources}
    model = models.load(analysis)
    package = packages.read(packages.find(analysis.model))
    learned = package.card.trained_on
    prints = frozenset(one for some in learned.values() for one in some)
    trained_on: list[str] = []

    def noted(found: Iterable[Case], kind: str) -> Iterator[Case]:
        for case in found:
            seen = case.fingerprint in prints or DATASETS[kind].doubles(case, learned)
            trained_on.extend([case.name] if seen else [])
            yield case

    scores: list[Score] = []
    worst: list[Sketch] = []
    for kind, found in each.items():
        gallery = Gallery()
        scores += evaluate(model, noted(track(case for _, case in found), kind), kind, analysis, gallery)
        worst += gallery.worst()
    missing = set(patients) - {s.patient for s in scores}
    if missing or not scores:
        raise ConfigError(
            f"no case of patient {', '.join(sorted(missing))}" if missing else "no case to judge"
        )
    return Evaluation(
        info=model.info,
        settings=model.settings,
        sources=sources,
        trained_on=tuple(trained_on),
        patients_chosen=tuple(patients),
        scores=tuple(scores),
        summary=summarise(scores),
        worst=tuple(worst),
        networks=networks_of(package),
    )


def networks_of(package: Package) -> dict[str, Mapping[str, str]]:
    """File of the package → what its network was built from."""
    return {
        role: weights.facts(path) for role, path in package.files.items() if path.suffix == weights.SUFFIX
    }
