"""The tables. Times are UTC; documents are JSON; every change of shape is a migration."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    Boolean,
    Column,
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
    Index("study_by_deadline", "closed_at", "due_at", "arrived_at"),
    Index("study_by_state", "state", "last_received_at"),
    Index("study_by_patient", "patient_id"),
    Index("study_by_accession", "accession_number"),
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
    Column("superseded", Boolean, nullable=False, default=False),
    UniqueConstraint("destination", "sop_instance_uid"),
    Index("delivery_of_answer", "destination", "study_instance_uid", "revision", unique=True),
    Index("delivery_due", "state", "destination", "next_attempt_at"),
    Index("delivery_by_study", "study_instance_uid"),
    Index("delivery_by_transaction", "transaction_uid"),
    sqlite_autoincrement=True,  # who still sends a row that was deleted must not mark another one sent
)

rest = Table(
    "rest",
    metadata,
    Column("destination", String(64), primary_key=True),
    Column("until", UtcDateTime, nullable=False),
)
