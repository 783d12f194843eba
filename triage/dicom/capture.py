"""Reading our own summary picture back, for those who have no DICOM viewer at hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.errors import InvalidDicomError

from triage.dicom.header import BROKEN
from triage.errors import Retryable


def read_capture(path: Path) -> NDArray[np.uint8]:
    """Pixels of a colour Secondary Capture, uint8 (rows, columns, 3), RGB. Raises Retryable."""
    try:
        pixels: NDArray[np.uint8] = pydicom.dcmread(path).pixel_array
    except OSError as error:
        raise Retryable(f"cannot read {path.name}: {error.strerror}") from error
    except (InvalidDicomError, *BROKEN) as error:
        raise Retryable(f"{path.name} holds no picture") from error
    return pixels
