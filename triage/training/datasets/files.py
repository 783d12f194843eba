"""What every reader needs: finding files, and saying plainly what is wrong with a folder or a file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from triage.errors import ConfigError

SHOWN = 8
"""Names of a folder that an error lists."""


def existing(folder: Path, layout: str, *patterns: str) -> list[Path]:
    """The files that match any of the patterns below ``folder``, by name, 9 before 10.

    Raises ConfigError with the layout that was expected and what is there instead.
    """
    found = sorted({path for pattern in patterns for path in folder.glob(pattern)}, key=counted)
    if not found:
        raise wrong_folder(folder, layout)
    return found


def counted(path: object) -> list[str]:
    """A key to sort by: numbers in a name, as long as they may be, in the order of counting."""
    return [part.zfill(20) if part.isdigit() else part for part in re.split(r"(\d+)", str(path))]


def wrong_folder(folder: Path, layout: str) -> ConfigError:
    return ConfigError(
        f"{folder} is not laid out as expected\n"
        f"  expected: {layout}\n"
        f"  found: {_content(folder)}\n"
        "  give the folder that holds the first of these names"
    )


def partner(path: Path, of: Path) -> Path:
    """A file that must lie beside another one. Raises ConfigError naming both."""
    if not path.exists():
        raise ConfigError(f"{path} is missing: it belongs to {of}; unpack the data set again")
    return path


def same_shape(mask: NDArray[Any], mask_path: object, image: NDArray[Any], image_path: object) -> None:
    """Raises ConfigError naming both files where a mask has not its image's shape."""
    if mask.shape != image.shape:
        sizes = [" × ".join(map(str, array.shape)) for array in (mask, image)]
        raise ConfigError(f"{mask_path} has {sizes[0]} values, its image {image_path} has {sizes[1]}")


@contextmanager
def readable(path: object, *errors: type[Exception]) -> Iterator[None]:
    """What a library raises on a damaged file becomes a ConfigError naming the file."""
    try:
        yield
    except errors as error:
        raise ConfigError(f"{path} cannot be read, unpack the data set again: {error}") from error


def _content(folder: Path) -> str:
    if not folder.exists():
        return "no such folder"
    if not folder.is_dir():
        return "a file"
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return (", ".join(names[:SHOWN]) or "an empty folder") + more
