"""Seconds that each network takes for one study, from HU to masks, all on the same series, in turn.

    python -m tests.bench.networks [NETWORK or FOLDER …]

Without names, those that ship. A slice's seconds are the study's over the slices that show lung.
"""

import sys
from statistics import median
from time import perf_counter

from safetensors import safe_open

from tests.needs import DATA
from triage import models
from triage.config import Analysis, Assemble
from triage.dicom.header import find_instances
from triage.dicom.series import choose
from triage.dicom.volume import read
from triage.models import packages

ROUNDS = 5
SERIES = "covid_ricord_1012"


def weights(name):
    """Millions in all files of a package."""
    count = 0
    for path in packages.read(packages.find(name)).files.values():
        with safe_open(path, "np") as file:
            count += sum(file.get_tensor(key).size for key in file.keys())  # noqa: SIM118 - no mapping
    return count / 1e6


def seconds(model, volume):
    start = perf_counter()
    found = model.predict(volume)
    return perf_counter() - start, int(found.lung_mask.any(axis=(1, 2)).sum())


def main(names):
    instances, _ = find_instances([DATA / "dicom" / SERIES])
    volume = read(choose(instances, Assemble()))
    loaded = {name: models.load(Analysis(model=name)) for name in names}
    taken = {name: [] for name in names}
    for _ in range(ROUNDS):
        for name, model in loaded.items():
            taken[name].append(seconds(model, volume))
    print(f"{len(volume.array)} slices; medians of {ROUNDS} rounds, all networks in turn")
    print(f"{'network':12} {'million weights':>15} {'s a study':>10} {'s a slice with lung':>20}")
    for name, rounds in taken.items():
        study, slices = median(s for s, _ in rounds), rounds[0][1]
        shown = loaded[name].info.name
        print(f"{shown:12} {weights(name):15.1f} {study:10.2f} {study / slices:20.3f}")


if __name__ == "__main__":
    main(sys.argv[1:] or [*models.MODELS])
