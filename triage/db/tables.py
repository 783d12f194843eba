"""The tables. Times are UTC; documents are JSON; every change of shape is a migration."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    Boolean,
    Column,
    Computed,
    DateTime,
    Dialect,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
    text,
)


class UtcDateTime(TypeDecorator[datetime]):
    """An aware datetime, kept in UTC by databases that know no time zones."""

    impl = DateTime
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        return None if value is None else value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: Any | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        return None if value is None else value.replace(tzinfo=UTC)


metadata = MetaData()

NEXT_CHANGE = text(
    "(SELECT max(coalesce((SELECT max(changed) FROM study), 0),"
    " coalesce((SELECT max(changed) FROM delivery), 0)) + 1)"
)
"""The number of the next change: every statement on a study or delivery gives its rows a new one, so that
who keeps a list open sees at once whether anything has changed."""

LAST_OF_KEY = ("arrived_at", "study_instance_uid")
"""No two studies have the same place."""

study = Table(
    "study",
    metadata,
    Column("study_instance_uid", String(64), primary_key=True),
    Column("state", String(16), nullable=False),
    Column("reason", Text, nullable=False, default=""),
    Column("arrived_at", UtcDateTime, nullable=False),
    Column("last_received_at", UtcDateTime, nullable=False),
    Column("patient_id", Text, nullable=False),
    Column("patient_name", Text, nullable=False),
    Column("accession_number", Text, nullable=False),
    Column("study_date", String(8), nullable=False),
    Column("study_description", Text, nullable=False),
    Column("stat", Boolean, nullable=False, default=False),
    Column("priority_asked_at", UtcDateTime),
    Column("priority_tried_at", UtcDateTime),
    Column("notes", JSON, nullable=False, default=list),
    Column("completeness", Text),
    Column("attempts", Integer, nullable=False, default=0),
    Column("not_before", UtcDateTime),
    Column("lease_owner", String(128)),
    Column("lease_until", UtcDateTime),
    Column("band", Integer, nullable=False),
    Column("score", Float, nullable=False),
    Column("due_at", UtcDateTime, nullable=False),
    Column("priority_reason", Text, nullable=False),
    Column("closed_at", UtcDateTime),
    Column("closed_reason", Text, nullable=False, default=""),
    Column("changed", Integer, nullable=False, default=NEXT_CHANGE, onupdate=NEXT_CHANGE),
    Column("strict_rank", Integer, Computed("CASE WHEN band = 5 THEN 4 ELSE band END", persisted=False)),
    Column("strict_score", Float, Computed("-score", persisted=False)),
    # The lists are read from these alone, whose last columns are asked of every row.
    Index("study_by_deadline", "closed_at", "due_at", *LAST_OF_KEY, "last_received_at", "band", "state"),
    Index("study_by_strict", "closed_at", "strict_rank", "strict_score", *LAST_OF_KEY, "last_received_at"),
    Index("study_by_arrival", "closed_at", *LAST_OF_KEY, "last_received_at"),
    Index("study_by_change", "changed"),
    Index("study_by_state", "state", "last_received_at"),
    Index("study_by_day", "arrived_at"),
    Index("study_by_patient", "patient_id"),
    Index("study_by_accession", "accession_number"),
)

policy = Table(
    "policy",
    metadata,
    Column("version", Integer, primary_key=True),
    Column("author", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("document", JSON, nullable=False),
    sqlite_autoincrement=True,
)

stat_order = Table(
    "stat_order",
    metadata,
    Column("accession_number", Text, primary_key=True),
    Column("ordered_at", UtcDateTime, nullable=False),
)

instance = Table(
    "instance",
    metadata,
    Column("study_instance_uid", ForeignKey("study.study_instance_uid"), primary_key=True),
    Column("sop_instance_uid", String(64), primary_key=True),
    Column("series_instance_uid", String(64), nullable=False),
    Column("sop_class_uid", String(64), nullable=False),
    Column("transfer_syntax_uid", String(64), nullable=False),
    Column("path", Text, nullable=False),
    Column("digest", String(64), nullable=False),
    Column("received_at", UtcDateTime, nullable=False),
    Column("judgeable", Boolean, nullable=False),
    Column("facts", JSON, nullable=False),
)

result = Table(
    "result",
    metadata,
    Column("study_instance_uid", ForeignKey("study.study_instance_uid"), primary_key=True),
    Column("revision", Integer, primary_key=True),
    Column("content_key", String(64), nullable=False),
    Column("status", String(16), nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("document", JSON, nullable=False),
    Index("result_by_creation", "created_at"),
)

delivery = Table(
    "delivery",
    metadata,
    Column("delivery_id", Integer, primary_key=True),
    Column("study_instance_uid", ForeignKey("study.study_instance_uid"), nullable=False),
    Column("destination", String(64), nullable=False),
    Column("revision", Integer),
    Column("sop_instance_uid", String(64)),
    Column("sop_class_uid", String(64)),
    Column("path", Text),
    Column("state", String(16), nullable=False),
    Column("attempts", Integer, nullable=False, default=0),
    Column("created_at", UtcDateTime, nullable=False),
    Column("next_attempt_at", UtcDateTime, nullable=False),
    Column("sent_at", UtcDateTime),
    Column("transaction_uid", String(64)),
    Column("last_error", Text, nullable=False, default=""),
    Column("away", Boolean, nullable=False, default=False),
    Column("changed", Integer, nullable=False, default=NEXT_CHANGE, onupdate=NEXT_CHANGE),
    Column("superseded", Boolean, nullable=False, default=False),
    UniqueConstraint("destination", "sop_instance_uid"),
    Index("delivery_of_answer", "destination", "study_instance_uid", "revision", unique=True),
    Index("delivery_due", "state", "destination", "next_attempt_at"),
    Index("delivery_by_study", "study_instance_uid"),
    Index("delivery_by_creation", "created_at"),
    Index("delivery_by_transaction", "transaction_uid"),
    Index("delivery_by_change", "changed"),
    sqlite_autoincrement=True,  # who still sends a row that was deleted must not mark another one sent
)

claim = Table(
    "claim",
    metadata,
    Column("study_instance_uid", ForeignKey("study.study_instance_uid"), primary_key=True),
    Column("person", Text, nullable=False),
    Column("claimed_at", UtcDateTime, nullable=False),
    Column("until", UtcDateTime, nullable=False),
)

verdict = Table(
    "verdict",
    metadata,
    Column("verdict_id", Integer, primary_key=True),
    Column("study_instance_uid", ForeignKey("study.study_instance_uid"), nullable=False),
    Column("revision", Integer),
    Column("person", Text, nullable=False),
    Column("given_at", UtcDateTime, nullable=False),
    Column("opinion", String(16), nullable=False),
    Column("comment", Text, nullable=False, default=""),
    Column("true_grade", String(8)),
    Column("status", String(16)),
    Column("probability", Float),
    Column("band", Integer, nullable=False),
    Column("score", Float, nullable=False),
    Column("model", Text),
    Column("model_version", Text),
    Column("policy_version", Integer),
    Index("verdict_by_study", "study_instance_uid"),
)

saved_view = Table(
    "saved_view",
    metadata,
    Column("person", Text, primary_key=True),
    Column("name", String(64), primary_key=True),
    Column("query", Text, nullable=False),
)

user = Table(
    "user",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("role", String(16), nullable=False),
    Column("password", Text, nullable=False),
    Column("disabled", Boolean, nullable=False, default=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("last_login_at", UtcDateTime),
)

login_failure = Table(
    "login_failure",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("failures", Integer, nullable=False),
    Column("last_at", UtcDateTime, nullable=False),
    Column("locked_until", UtcDateTime),
)

session = Table(
    "session",
    metadata,
    Column("token_hash", String(64), primary_key=True),
    Column("name", ForeignKey("user.name", ondelete="CASCADE"), nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("last_seen_at", UtcDateTime, nullable=False),
    Index("session_by_user", "name"),
)

first_link = Table(
    "first_link",
    metadata,
    Column("token_hash", String(64), primary_key=True),
    Column("expires_at", UtcDateTime, nullable=False),
)

api_token = Table(
    "api_token",
    metadata,
    Column("token_id", Integer, primary_key=True),
    Column("name", String(64), nullable=False, unique=True),
    Column("token_hash", String(64), nullable=False, unique=True),
    Column("scopes", JSON, nullable=False),
    Column("created_by", String(64), nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("expires_at", UtcDateTime),
    Column("last_used_at", UtcDateTime),
    sqlite_autoincrement=True,
)

audit = Table(
    "audit",
    metadata,
    Column("number", Integer, primary_key=True),
    Column("message", Text, nullable=False),
    Column("hash", String(64), nullable=False),
    sqlite_autoincrement=True,  # the last number given stays known when the last row is removed
)

audit_sent = Table(
    "audit_sent",
    metadata,
    Column("sink", String(16), primary_key=True),
    Column("number", Integer, nullable=False),
)

rest = Table(
    "rest",
    metadata,
    Column("destination", String(64), primary_key=True),
    Column("until", UtcDateTime, nullable=False),
)
