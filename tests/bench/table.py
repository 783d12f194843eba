"""What a benchmark found, one line a goal, as every benchmark prints it."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Line:
    """One comparison: ``ratio`` is the peer's time over ours, or what the goal counts in; None: no peer."""

    what: str
    measured: str
    ratio: float | None = None
    goal: str = ""
    met: bool | None = None


def show(lines: Iterable[Line]) -> None:
    """Print a Markdown table."""
    answers = {True: "yes", False: "NO", None: ""}
    rows = [("what", "measured", "ratio", "goal", "met")]
    rows += [
        (one.what, one.measured, "" if one.ratio is None else f"{one.ratio:.2f}", one.goal, answers[one.met])
        for one in lines
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    for number, row in enumerate(rows):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")
        if number == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")
