"""How a broken image is read, and what may come of it; imports no more than reading needs."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from triage import config
from triage.dicom import header, series, spool, volume
from triage.domain import Instance
from triage.errors import Rejected, Retryable, traced

LONGEST = 10
"""Seconds of a processor that one input may take: neighbours on a busy machine do not count."""
STUCK = 60
"""Seconds after which it hangs, whether it works or waits."""
MOST_ADDRESSED = 4 << 30
RULES = config.Assemble(minimum_slices=2, minimum_coverage_mm=1)
NOBODY = "DOE^FUZZED"

Read = Callable[[bytes, Path], None]


def read_image(raw: bytes, path: Path) -> None:
    """The way of a received image up to the network: header, choice, pixels."""
    syntax, body = header.split(raw)
    instance = replace(spool.read(bytes(body), syntax), path=path)
    header.read_instance(path)
    with suppress(Rejected):
        series.choose([instance, _neighbour(instance)], RULES)
    volume.read_image(instance)


def _neighbour(instance: Instance) -> Instance:
    """The same slice, 2 mm further up."""
    x, y, z = instance.image_position_patient or (0.0, 0.0, 0.0)
    return replace(instance, sop_instance_uid="1.9", image_position_patient=(x, y, z + 2))


def attempted(read: Read, raw: bytes, path: Path) -> tuple[str, str]:
    """Whether an input is taken, refused or wrong; and what is wrong with how it was answered."""
    path.write_bytes(raw)
    began = time.process_time()
    try:
        read(raw, path)
        answer, complaint = "taken", ""
    except (Rejected, Retryable) as refusal:
        answer, complaint = "refused", "says a patient's name" if NOBODY in str(refusal) else ""
    except Exception as error:  # noqa: BLE001 - this is what is looked for
        return "wrong", f"{traced(error)}: {str(error)[:80]}"
    seconds = time.process_time() - began
    return answer, complaint or (f"took {seconds:.0f} s" if seconds > LONGEST else "")


def limit_memory() -> None:
    """What asks for all memory gets none."""
    limit = kilobytes("VmSize") * 1024 + MOST_ADDRESSED
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def kilobytes(name: str) -> int:
    """Of this process."""
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0])
