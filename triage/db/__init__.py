"""Everything the daemon must not forget: studies, instances, results, deliveries. Nobody else writes SQL."""

from triage.db.database import Database

__all__ = ["Database"]
