"""Our tables. Every name begins with `tuner_`, so that Optuna's tables live beside them in one database.

Documents are kept as text, not in the database's JSON type: measurements may hold NaN and infinity, which that refuses.
"""

from __future__ import annotations

from sqlalchemy import Boolean, Column, Float, ForeignKey, Integer, MetaData, String, Table, Text, UniqueConstraint
from sqlalchemy.dialects.mysql import LONGTEXT

PREFIX = "tuner_"
VERSION_TABLE = "tuner_alembic_version"
SCHEMA_REVISION = "0001"
"""The newest migration: a store that says so needs no migrating, and opens without Alembic."""

LongText = Text().with_variant(LONGTEXT(), "mysql", "mariadb")
metadata = MetaData()

study = Table(
    "tuner_study",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", String(128), nullable=False, unique=True),
    Column("spec", LongText, nullable=False),
    Column("created_at", String(40), nullable=False),
    Column("decision", LongText),
    Column("summary", LongText),
)

probe = Table(
    "tuner_probe",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("study_id", Integer, ForeignKey("tuner_study.id"), nullable=False),
    Column("number", Integer, nullable=False),
    Column("request_id", String(255), nullable=False),
    Column("point_index", Integer, nullable=False),
    Column("kind", String(32), nullable=False),
    Column("stage", String(32), nullable=False),
    Column("pair", Integer),
    Column("soak", Boolean, nullable=False),
    Column("outcome", String(32), nullable=False),
    Column("message", LongText, nullable=False),
    Column("detail", LongText, nullable=False),
    Column("config", LongText, nullable=False),
    Column("measurement", LongText),
    Column("values", LongText, nullable=False),
    Column("environment", LongText),
    Column("seconds", Float(53), nullable=False),
    Column("fixed_s", Float(53), nullable=False),
    Column("finished_at", String(40), nullable=False),
    Column("trial", Integer),
    UniqueConstraint("study_id", "request_id", "point_index", name="uq_tuner_probe_request"),
    UniqueConstraint("study_id", "number", name="uq_tuner_probe_number"),
)

run = Table(
    "tuner_run",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("study", String(128), index=True),
    Column("config", LongText, nullable=False),
    Column("promise", LongText),
    Column("result", LongText),
    Column("out_dir", LongText, nullable=False),
    Column("started_at", String(40), nullable=False),
    Column("finished_at", String(40), nullable=False),
    Column("status", String(32), nullable=False),
)
