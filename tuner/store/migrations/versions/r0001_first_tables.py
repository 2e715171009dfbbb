"""First tables: studies, probes, production runs.

Written out rather than taken from `tables.py`: a migration stays what it was when the tables move on.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.mysql import LONGTEXT

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def _long() -> sa.types.TypeEngine[str]:
    return sa.Text().with_variant(LONGTEXT(), "mysql", "mariadb")


def upgrade() -> None:
    _studies()
    _probes()
    _runs()


def downgrade() -> None:
    for name in ("tuner_run", "tuner_probe", "tuner_study"):
        op.drop_table(name)


def _studies() -> None:
    op.create_table(
        "tuner_study",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("name", sa.String(128), nullable=False, unique=True),
        sa.Column("spec", _long(), nullable=False),
        sa.Column("created_at", sa.String(40), nullable=False),
        sa.Column("decision", _long()),
        sa.Column("summary", _long()),
    )


def _probes() -> None:
    op.create_table(
        "tuner_probe",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("study_id", sa.Integer, sa.ForeignKey("tuner_study.id"), nullable=False),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("request_id", sa.String(255), nullable=False),
        sa.Column("point_index", sa.Integer, nullable=False),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("stage", sa.String(32), nullable=False),
        sa.Column("pair", sa.Integer),
        sa.Column("soak", sa.Boolean, nullable=False),
        sa.Column("outcome", sa.String(32), nullable=False),
        sa.Column("message", _long(), nullable=False),
        sa.Column("detail", _long(), nullable=False),
        sa.Column("config", _long(), nullable=False),
        sa.Column("measurement", _long()),
        sa.Column("values", _long(), nullable=False),
        sa.Column("environment", _long()),
        sa.Column("seconds", sa.Float(53), nullable=False),
        sa.Column("fixed_s", sa.Float(53), nullable=False),
        sa.Column("finished_at", sa.String(40), nullable=False),
        sa.Column("trial", sa.Integer),
        sa.UniqueConstraint("study_id", "request_id", "point_index", name="uq_tuner_probe_request"),
        sa.UniqueConstraint("study_id", "number", name="uq_tuner_probe_number"),
    )


def _runs() -> None:
    op.create_table(
        "tuner_run",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("study", sa.String(128), index=True),
        sa.Column("config", _long(), nullable=False),
        sa.Column("promise", _long()),
        sa.Column("result", _long()),
        sa.Column("out_dir", _long(), nullable=False),
        sa.Column("started_at", sa.String(40), nullable=False),
        sa.Column("finished_at", sa.String(40), nullable=False),
        sa.Column("status", sa.String(32), nullable=False),
    )
