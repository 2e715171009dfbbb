"""Alembic's entry: runs the migrations on the connection it is handed (`tuner.store.schema`), on our tables alone."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from alembic import context

from tuner.store.tables import PREFIX, VERSION_TABLE, metadata


def ours(name: str | None, kind: str, _parents: MutableMapping[Any, Any]) -> bool:
    """Comparisons look at tables of ours only; Optuna's are none of our business."""
    return kind != "table" or (name or "").startswith(PREFIX)


context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    version_table=VERSION_TABLE,
    include_name=ours,
)
with context.begin_transaction():
    context.run_migrations()
