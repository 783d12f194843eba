"""Figures in words: the same on the terminal, in the report and beside a paper's."""

from __future__ import annotations

from triage.training.metrics import Figure

NOT_MEASURABLE = "not measurable here"


def value(figure: Figure, digits: int | None = None, scale: float = 1) -> str:
    """ "0.718 (0.597 to 0.828)"; the value alone where it has no interval."""
    if figure.value is None:
        return NOT_MEASURABLE
    digits = (1 if figure.unit else 3) if digits is None else digits
    text = f"{scale * figure.value:.{digits}f}"
    if figure.low is not None and figure.high is not None:
        text += f" ({scale * figure.low:.{digits}f} to {scale * figure.high:.{digits}f})"
    return f"{text} {figure.unit}".rstrip().replace("-", "−")


def measured_on(figure: Figure, noun: str = "case") -> str:
    """ "9 cases, 7 patients, medseg9", or why there is no value."""
    if figure.value is None:
        return figure.reason
    patients = "" if figure.patients == figure.n else f" of {counted(figure.patients, 'patient')}"
    note = f"; {figure.reason}" if figure.reason else ""
    return f"{counted(figure.n, noun)}{patients}, {figure.where}{note}"


def counted(n: int, noun: str) -> str:
    """ "1 case", "2 cases"."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
