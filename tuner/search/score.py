"""What one end-to-end row says to a sampler: the objective's value, and how far it is from what is allowed. The one
rule for Optuna's trials, for its samplers, and for our fall-back."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tuner.contract.measurement import Outcome
from tuner.contract.probe import PREDICTED_USED, ProbeRow, Score
from tuner.contract.study import StudySpec
from tuner.search.forecast import Forecast
from tuner.search.history import is_ok, rate_of
from tuner.search.objective import Figures, merit
from tuner.search.points import point_of
from tuner.search.view import View

SURELY_OVER = 0.01
"""Least overrun of what did run out of memory, whatever was foretold."""
PER_SIZE = 0.1
"""Overrun of what ran out of memory unforetold, for each time that it is as large as the baseline's micro-batch."""


def score(spec: StudySpec, rows: Sequence[ProbeRow], row: ProbeRow) -> Score:
    """Value and overruns of `row`, one of the study's `rows`. Only what was stored up to it counts, so that it means
    the same whenever it is asked.

    A contended probe says nothing of its configuration: no value. What failed is worth 0, below all that ran.
    """
    if row.outcome is Outcome.CONTENDED:
        return Score(value=None)
    if not is_ok(row):
        return Score(value=0.0, overruns=overruns(spec, row))
    known = [other for other in rows if other.number <= row.number]
    return Score(value=_worth(View(spec, known), row), overruns=overruns(spec, row))


def _worth(view: View, row: ProbeRow) -> float:
    """As measured. Before there is a reference nothing is known but its speed and its memory."""
    if view.reference is not None:
        return Forecast(view).worth(point_of(row.config), rate_of(row), [row])
    assert row.measurement is not None
    return merit(view.spec, Figures(rate_of(row), memory_used=view.spec.memory_used(row.measurement.memory)))


def overruns(spec: StudySpec, row: ProbeRow) -> dict[str, float]:
    """`memory`, continuous around the budget, and `failed`, -1 or 1."""
    ran = is_ok(row) or row.outcome.is_oom
    return {"memory": _memory_overrun(spec, row), "failed": -1.0 if ran else 1.0}


def _memory_overrun(spec: StudySpec, row: ProbeRow) -> float:
    """Share of the budget above (below: negative) the whole of it.

    A probe that ran out of memory never saw its real peak: there the one foretold from traces counts. Without one it
    grows with the size and so points the sampler downwards.
    """
    overrun = spec.memory_used(row.measurement.memory) - 1 if row.measurement else 0.0
    if row.outcome.is_oom:
        by_size = PER_SIZE * row.config.micro_batch_size / spec.baseline.micro_batch_size
        foretold = row.values.get(PREDICTED_USED, math.nan)
        overrun = max(overrun, foretold - 1, SURELY_OVER) if math.isfinite(foretold) else max(overrun, by_size)
    return overrun
