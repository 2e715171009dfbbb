"""Means of the losses since the last log line, in a form that a checkpoint can hold: sum and count of each term.

Sums are formed from left to right, so a line that a resumed run completes is bit for bit the uninterrupted run's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class LineMeans:
    """Fed from the growing lists of all losses of this process."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._taken: dict[str, int] = {}
        """Term -> how many entries of its list have been added."""

    def take(self, losses: Mapping[str, Sequence[float]]) -> None:
        """Add what is new in `losses` (term -> one value a step, all of this process)."""
        for name, values in losses.items():
            new = values[self._taken.get(name, 0) :]
            total = self._sums.get(name, 0.0)
            for value in new:
                total += value
            if new:
                self._sums[name] = total
                self._counts[name] = self._counts.get(name, 0) + len(new)
                self._taken[name] = len(values)

    def means(self) -> dict[str, float]:
        return {name: total / self._counts[name] for name, total in self._sums.items()}

    def begin(self) -> None:
        """A line was written; the next one begins."""
        self._sums.clear()
        self._counts.clear()

    def state_dict(self) -> dict[str, Any]:
        return {"sums": dict(self._sums), "counts": dict(self._counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._sums, self._counts = dict(state["sums"]), dict(state["counts"])
