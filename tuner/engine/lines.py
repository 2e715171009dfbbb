"""metrics.jsonl of a production run: everything measured, an object a line, for scripts that follow a growing file.

    {"kind": "log", "samples": 1600, "step": 100, "total": 0.31, ...}        the columns of metrics.csv
    {"kind": "evaluate", "samples": 16000, "valid_loss": 0.29, ...}          and those of the other tables

What is not a finite number is null. A resumed run drops the lines it will write again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tuner.contract.own_files import replace_text

FILE = "metrics.jsonl"
LOG = "log"


class Lines:
    """One file. Raises OSError when it cannot be written."""

    def __init__(self, out: Path) -> None:
        self.path = out / FILE

    def rows(self) -> list[dict[str, Any]]:
        """Every whole line; what a killed writer left of its last one is passed over."""
        try:
            text = self.path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return []
        return list(_objects(text[: text.rfind("\n") + 1].splitlines()))

    def forget_after(self, samples: int, kind: str | None = None) -> None:
        """Take back the lines after `samples`, of one kind or of all."""
        if not self.path.exists():
            return
        kept = [row for row in self.rows() if row["samples"] <= samples or kind not in (None, row.get("kind"))]
        replace_text(self.path, "".join(f"{json.dumps(row)}\n" for row in kept))

    def add(self, kind: str, samples: int, numbers: Mapping[str, float]) -> None:
        row = {"kind": kind, "samples": samples} | {name: _rounded(value) for name, value in numbers.items()}
        with self.path.open("a", encoding="utf-8") as target:
            target.write(json.dumps(row) + "\n")


def _objects(lines: Iterable[str]) -> Iterable[dict[str, Any]]:
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("samples"), int):
            yield row


def _rounded(value: float) -> float | int | None:
    """Nine digits, as in the tables."""
    if isinstance(value, int):
        return value
    return float(f"{value:.9g}") if math.isfinite(value) else None
