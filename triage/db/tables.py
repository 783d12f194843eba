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
ASKED_OF_EVERY_ROW = (
    "last_received_at",
    "band",
    "state",
    "status",
    "scanner",
    "study_description",
    "searched",
)
"""What filters and counts look at: they read the index of an order alone, from end to end at worst."""
OPEN = text("closed_at IS NULL AND forgotten IS 0")
"""The indices of the orders hold the studies of the list, not those of all years."""
STATUS = (
    "CASE state WHEN 'analyzed' THEN answer WHEN 'rejected' THEN 'not_analysable'"
    " WHEN 'failed' THEN 'failed' END"
)
"""``rows.status``: the answer that stands now; NULL while it is pending."""
SEARCHED = (
    "lower(patient_id || char(10) || patient_name || char(10) ||"
    " accession_number || char(10) || study_instance_uid)"
)

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
    Column("scanner", Text, nullable=False, default=""),
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
    # Of the newest answer that is positive or negative: what places, filters and rehearsals ask for.
    Column("answer", String(16)),
    Column("probability", Float),
    Column("affected_fraction", Float),
    Column("judged_at", UtcDateTime),
    Column("closed_at", UtcDateTime),
    Column("closed_reason", Text, nullable=False, default=""),
    Column("forgotten", Boolean, nullable=False, default=False),
    Column("images_deleted_at", UtcDateTime),
    Column("images_back", Boolean, nullable=False, default=False),  # some, since then
    Column("changed", Integer, nullable=False, default=NEXT_CHANGE, onupdate=NEXT_CHANGE),
    Column("strict_rank", Integer, Computed("CASE WHEN band = 5 THEN 4 ELSE band END", persisted=False)),
    Column("strict_score", Float, Computed("-score", persisted=False)),
    Column("status", String(16), Computed(STATUS, persisted=False)),
    Column("searched", Text, Computed(SEARCHED, persisted=False)),
    Index("study_by_deadline", "due_at", *LAST_OF_KEY, *ASKED_OF_EVERY_ROW, sqlite_where=OPEN),
    Index(
        "study_by_strict",
        "strict_rank",
        "strict_score",
        *LAST_OF_KEY,
        "due_at",
        *ASKED_OF_EVERY_ROW,
        sqlite_where=OPEN,
    ),
    Index("study_by_arrival", *LAST_OF_KEY, "due_at", *ASKED_OF_EVERY_ROW, sqlite_where=OPEN),
    Index("study_by_change", "changed"),
    Index("study_by_state", "state", "last_received_at"),
    Index("study_by_day", "arrived_at", "state", "searched"),
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
    Index("delivery_by_sending", "sent_at"),
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

upload = Table(
    "upload",
    metadata,
    Column("upload_id", Integer, primary_key=True),
    Column("person", Text, nullable=False),
    Column("started_at", UtcDateTime, nullable=False),
    Column("completed_at", UtcDateTime),
    Column("passed_over", Integer, nullable=False, default=0),
    Column("examples", JSON, nullable=False, default=list),
    Index("upload_by_person", "person"),
    sqlite_autoincrement=True,
)

upload_study = Table(
    "upload_study",
    metadata,
    Column("upload_id", ForeignKey("upload.upload_id"), primary_key=True),
    Column("study_instance_uid", ForeignKey("study.study_instance_uid"), primary_key=True),
    Index("upload_of_study", "study_instance_uid"),
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
    Column("address", String(64), primary_key=True),
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

role = Table(
    "role",
    metadata,
    Column("name", String(16), primary_key=True),
    Column("started_at", UtcDateTime, nullable=False),
    Column("beat_at", UtcDateTime),
    Column("starts", Integer, nullable=False),
    Column("device", String(8)),
)

tally = Table(
    "tally",
    metadata,
    Column("what", String(32), primary_key=True),
    Column("kind", String(64), primary_key=True),
    Column("count", Integer, nullable=False),
)
