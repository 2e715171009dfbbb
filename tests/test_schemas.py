"""The published JSON Schemas are the current types."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tuner.export.schemas import SCHEMAS, schema_text

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "schema"


@pytest.mark.parametrize("name", SCHEMAS)
def test_published_schema_is_current(name: str) -> None:
    published = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    assert published == json.loads(schema_text(name)), "run: python -m tuner.export.schemas docs/schema"
