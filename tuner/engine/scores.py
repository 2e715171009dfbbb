"""All validation figures of a run: rounded as written, kept as CSV, remembered over a resume, handed to who judges."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from tuner.contract.config import Cadence
from tuner.contract.own_files import replacing
from tuner.contract.workload import Trivial
from tuner.engine.hooks import Emit, Every
from tuner.engine.table import SAMPLES, Table, number

if TYPE_CHECKING:
    from tuner.engine.trainer import Trainer

RAW = "raw_"
"""Before the name of a figure of the weights as trained, where the averaged ones are evaluated too."""


class Origin(StrEnum):
    """Which of the workload's two judgements a figure comes from."""

    EVALUATE = "evaluate"
    ASSESS = "assess"


class Judge(Protocol):
    def see(self, trainer: Trainer, origin: Origin, found: Mapping[str, float]) -> None:
        """New figures; may end the run."""
        ...


class Scores:
    """evaluations.csv and assessments.csv, and the last figure of each name."""

    def __init__(self, out_dir: Path, emit: Emit) -> None:
        self.tables = {
            Origin.EVALUATE: Table(out_dir / "evaluations.csv", emit),
            Origin.ASSESS: Table(out_dir / "assessments.csv", emit),
        }
        self.judges: list[Judge] = []
        self.metrics: dict[str, float] = {}
        self.history: dict[str, list[tuple[int, float]]] = {}
        """Figure -> (samples, value), in time."""
        self.last_at: dict[Origin, int] = {}
        self._origin: dict[str, Origin] = {}

    def restore(self, samples: int) -> None:
        """Read what the run's earlier part found up to `samples`; what comes after is forgotten."""
        for origin, table in self.tables.items():
            table.forget_after(samples)
            for row in table.rows():
                names = [name for name in row if name != SAMPLES and row[name]]
                self._remember(origin, int(row[SAMPLES]), {name: number(row[name]) for name in names})

    def add(self, trainer: Trainer, origin: Origin, found: Mapping[str, float]) -> dict[str, float]:
        """Keep new figures and let everyone judge them; returns them as kept (nine digits, as in the file)."""
        kept = {name: float(f"{float(value):.9g}") for name, value in found.items()}
        self._remember(origin, trainer.samples, kept)
        self.tables[origin].add(trainer.samples, kept)
        for judge in self.judges:
            judge.see(trainer, origin, kept)
        return kept

    def _remember(self, origin: Origin, samples: int, found: Mapping[str, float]) -> None:
        self.last_at[origin] = samples
        self.metrics |= found
        for name, value in found.items():
            self.history.setdefault(name, []).append((samples, value))
            self._origin[name] = origin

    def of_the_cadence(self, name: str, cadence: Cadence) -> list[tuple[int, float]]:
        """The history of a figure without those of a run's stop between two evaluations: a run that was never stopped
        has no such figures, and its patience must not end earlier for being interrupted."""
        assess = self._origin.get(name) is Origin.ASSESS
        due = Every(cadence.sample_samples if assess else cadence.evaluate_samples)
        return [(samples, value) for samples, value in self.history.get(name, ()) if due.due(samples)]


def is_better(value: float, than: float, *, higher: bool, by: float = 0.0) -> bool:
    """Is `value` better than `than` by more than `by`? What is not finite is never better."""
    if not math.isfinite(value):
        return False
    if not math.isfinite(than):
        return True
    return value - than > by if higher else than - value > by


def write_quality(metrics: Mapping[str, float], trivial: Mapping[str, Trivial], path: Path) -> None:
    """quality.csv: every figure, what it would be without learning, how that comes about, and whether it is better."""
    rows: list[Sequence[object]] = []
    for name, value in metrics.items():
        known = trivial.get(name)
        if known is None:
            rows.append((name, f"{value:.9g}", "", "", "", ""))
        else:
            better = known.beaten_by(name, metrics)
            direction = "yes" if known.higher_is_better else "no"
            verdict = "yes" if better else "no"
            rows.append((name, f"{value:.9g}", f"{known.value:.9g}", known.text, direction, verdict))
    with replacing(path) as aside, aside.open("w", newline="", encoding="utf-8") as target:
        writer = csv.writer(target, lineterminator="\n")
        writer.writerow(("metric", "value", "trivial", "how", "higher_is_better", "better"))
        writer.writerows(rows)


def with_raw(trivial: Mapping[str, Trivial]) -> dict[str, Trivial]:
    """The same trivial values for the figures of the raw weights."""
    return {**trivial, **{RAW + name: known for name, known in trivial.items()}}
