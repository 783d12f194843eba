"""The two ways in which work on a study can fail.

TriageError
├── ConfigError   config.yaml is wrong; the daemon does not start
├── Rejected      this study can never be judged; the text is the reason shown to the reader
└── Retryable     this attempt failed; the same step is tried again later
"""


class TriageError(Exception):
    """Anything that this product raises on purpose."""


class ConfigError(TriageError):
    """A setting is unknown, out of range or contradicts another; the text names key, value, remedy."""


class Rejected(TriageError):
    """The study can never be judged as it is; ``str(error)`` is a short reason for the reader."""


class Retryable(TriageError):
    """The attempt failed for a reason outside the study: disk, peer, memory, a killed process."""


class DeviceLost(Retryable):
    """The GPU does not answer this process any more; only a new process can use it again."""
