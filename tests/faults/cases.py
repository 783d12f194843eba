"""The cases by name. Those in which something arrives are tried on each way of receiving."""

from __future__ import annotations

import traceback
from dataclasses import replace
from typing import Any

from tests.faults import disk, drawn, fuzz, guided, judging, kills, receiving, soak
from tests.faults.table import Case, Context, Row, ways_of_receiving

RECEIVING: dict[str, Case] = {
    "disk full": disk.full_at_each_write,
    "killed while slices come": kills.while_receiving,
    "receiving": receiving.all_faults,
}
CASES: dict[str, tuple[Case, dict[str, Any]]] = {
    **{
        f"{name}{way}": (case, settings)
        for way, settings in ways_of_receiving().items()
        for name, case in RECEIVING.items()
    },
    "killed at each step": (kills.at_each_step, {}),
    "judging": (judging.every_failure, {}),
    "broken images": (fuzz.images, {}),
    "drawn data sets": (drawn.images, {}),
    "images guided by coverage": (guided.images, {}),
    "broken archives": (fuzz.zips, {}),
}
"""{name: (case, settings of the listener)}"""
SOAK = "a department's traffic"
"""Takes as long as one lets it: on demand only."""


def attempt(name: str, context: Context) -> dict[str, Row]:
    """The rows of one case; what breaks the case itself is wrong as well."""
    case, listener = {**CASES, SOAK: (soak.soak, {})}[name]
    try:
        found = case(replace(context, listener=listener))
    except Exception as error:  # noqa: BLE001 - one case must not hide the others
        found = Row(tries=1, wrong=[f"{type(error).__name__}: {error}\n{traceback.format_exc()}"])
    if isinstance(found, Row):
        return {name: found}
    return {f"{name}: {part}": row for part, row in found.items()}
