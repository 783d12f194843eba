"""The two ways in which work on a study can fail.

TriageError
├── ConfigError   config.yaml is wrong; the daemon does not start
├── Rejected      this study can never be judged; the text is the reason shown to the reader
└── Retryable     this attempt failed; the same step is tried again later
"""

from pathlib import Path
from traceback import extract_tb

OURS = Path(__file__).parent
NO_MEMORY = "not enough memory to judge this study"


class TriageError(Exception):
    """Anything that this product raises on purpose."""


class ConfigError(TriageError):
    """A setting is unknown, out of range or contradicts another; the text names key, value, remedy."""


class Rejected(TriageError):
    """The study can never be judged as it is; ``str(error)`` is a short reason for the reader."""


class Retryable(TriageError):
    """The attempt failed for a reason outside the study: disk, peer, memory, a killed process."""


class FreshProcess(Retryable):
    """This process may be unfit: the same is tried in a new one, and given up after a few times."""


class DeviceLost(Retryable):
    """The GPU does not answer this process any more; only a new process can use it again."""


def traced(error: BaseException) -> str:
    """Its type and where we were, for logs: the texts of libraries may quote what a peer sent."""
    frames = [frame for frame in extract_tb(error.__traceback__) if OURS in Path(frame.filename).parents]
    ours = (f"{Path(frame.filename).relative_to(OURS)}:{frame.lineno}" for frame in frames)
    return f"{type(error).__name__} at {' > '.join(ours)}"
