"""One line for each thing that happened, as text or as JSON; of a study, its UID goes with every line.

No line at INFO or above names a patient: UIDs only.
"""

from __future__ import annotations

import json
import logging
import sys
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Literal

TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_study: ContextVar[str] = ContextVar("study", default="")


def about(study_instance_uid: str) -> None:
    """What this thread is at from now on; "" for no study."""
    _study.set(study_instance_uid)


class Json(logging.Formatter):
    """``time``, ``level``, ``role``, ``logger``, ``study`` where there is one, ``message``, ``traceback``."""

    def __init__(self, role: str) -> None:
        super().__init__()
        self._role = role

    def format(self, record: logging.LogRecord) -> str:
        """One JSON object on one line."""
        said = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "role": self._role,
            "logger": record.name,
            "study": _study.get(),
            "message": record.getMessage(),
            "traceback": self.formatException(record.exc_info) if record.exc_info else "",
        }
        return json.dumps({name: value for name, value in said.items() if value}, ensure_ascii=False)


def use(form: Literal["text", "json"], role: str) -> None:
    """Write lines of this form to standard error from now on; all but ours from WARNING on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Json(role) if form == "json" else logging.Formatter(TEXT))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("triage").setLevel(logging.INFO)
