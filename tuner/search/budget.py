"""Budget: what probes cost here, what is left for the search, and what is kept free for the lr stage and the gate."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from tuner.contract.config import CompileMode
from tuner.contract.probe import ProbeKind
from tuner.contract.space import Knob
from tuner.search.forecast import Forecast
from tuner.search.history import is_ok
from tuner.search.points import Point
from tuner.search.view import View

LR_SHARE = 0.2
"""Largest share of the budget that is kept free for the lr stage."""
GATE_SHARE = 0.5
"""With a budget of which the gate would take more than this share, one finalist must do."""
SOAK_COST = 2.0
"""A soak in end-to-end probes, until one was seen."""
WARM_COMPILE = 0.3
"""A compile served from the shared cache, as a share of the first."""
VERIFY_PROBES = 2
"""End-to-end probes kept possible while the model is being filled."""
COLD_COMPILE_S = {"cuda": 60.0, "cpu": 80.0}
"""What a first compile is expected to cost until one was seen; autotuning takes about three times as long."""


class Budget:
    def __init__(self, view: View, forecast: Forecast) -> None:
        self._view = view
        self._spec = view.spec
        self._forecast = forecast

    def seconds_of(self, kind: ProbeKind) -> float | None:
        """Median seconds of one eager point of this kind, where any was measured."""
        seconds = [
            row.seconds
            for point, rows in self._view.history.of_kind(kind).items()
            for row in rows
            if is_ok(row) and point.variant.compile is CompileMode.EAGER
        ]
        return float(np.median(seconds)) if seconds else None

    @cached_property
    def end_to_end_s(self) -> float:
        """One end-to-end probe of the reference."""
        rows = self._forecast.rows[self._forecast.reference]
        return float(np.mean([row.seconds for row in rows]))

    @cached_property
    def point_s(self) -> float:
        """One compute point; until one was measured, from the fixed cost and the seconds it may measure."""
        guess = min(self.end_to_end_s, self._fixed_s + 2 * self._spec.measure.compute_s)
        return self.seconds_of(ProbeKind.COMPUTE) or guess

    @cached_property
    def loader_s(self) -> float:
        return self.seconds_of(ProbeKind.LOADER) or self.point_s

    @cached_property
    def _fixed_s(self) -> float:
        return float(np.mean([row.fixed_s for row in self._forecast.rows[self._forecast.reference]]))

    def probe_s(self, point: Point) -> float:
        """One end-to-end probe of `point`."""
        if point in self._forecast.rows:
            return float(np.mean([row.seconds for row in self._forecast.rows[point]]))
        compiling = self._view.history.compile_seconds(point.variant)
        return self.end_to_end_s + WARM_COMPILE * compiling

    def gate_s(self, finalists: int) -> float:
        """The shortest gate, with the soak."""
        longer = max(0.0, self._spec.gate.measure_s - self._spec.measure.measure_s)
        own = self.end_to_end_s + longer
        other = max(own, self.probe_s(self._forecast.leader) + longer)
        return self._spec.gate.min_pairs * (own + finalists * other) + SOAK_COST * other

    @cached_property
    def finalists(self) -> int:
        """How many finalists the gate can carry: one on a small budget."""
        wanted = self._spec.gate.finalists
        cost = self._spec.gate.min_pairs * (1 + wanted) * self.end_to_end_s
        return wanted if cost <= GATE_SHARE * self._spec.budget_s else 1

    @cached_property
    def gate_reserve_s(self) -> float:
        return self.gate_s(self.finalists)

    @cached_property
    def lr_probe_s(self) -> float:
        rate = self._forecast.rates[self._forecast.leader]
        compiling = WARM_COMPILE * self._view.history.compile_seconds(self._forecast.leader.variant)
        return self._fixed_s + self._spec.lr.samples / rate + compiling

    @cached_property
    def lr_reserve_s(self) -> float:
        values = len(self._spec.space.values(Knob.LR, self._spec.baseline))
        if not self._spec.lr.enabled or values < 2:
            return 0.0
        return min(values * self._spec.lr.seeds * self.lr_probe_s, LR_SHARE * self._spec.budget_s)

    @cached_property
    def left_s(self) -> float:
        """Seconds the stages before the lr stage may still spend."""
        return self.lr_left_s - self.lr_reserve_s

    @cached_property
    def lr_left_s(self) -> float:
        """Seconds until only the gate's reserve is left."""
        return self._spec.budget_s - self._view.history.spent_s - self.gate_reserve_s

    @cached_property
    def stages_left_s(self) -> float:
        """What the model's stages may spend: some end-to-end probes must follow, or nothing was compared."""
        return self.left_s - VERIFY_PROBES * self.end_to_end_s

    @property
    def probes_left(self) -> bool:
        limit = self._spec.max_probes
        return limit is None or self._view.history.probes < limit

    def allows(self, cost_s: float) -> bool:
        return self.probes_left and cost_s <= self.left_s

    def allows_lr(self) -> bool:
        return self.probes_left and self.lr_probe_s <= self.lr_left_s

    def points_allowed(self, cost_s: float) -> int:
        """How many points of `cost_s` one more process may measure."""
        return max(0, int(self.stages_left_s // cost_s)) if self.probes_left else 0

    @property
    def least_s(self) -> float:
        """The smallest budget with which a decision is possible at all: reference, one candidate, gate."""
        return 2 * self.end_to_end_s + self.gate_s(1)

    @property
    def spent_up(self) -> bool:
        """Not even one more end-to-end probe is to be had."""
        return not self.allows(self.end_to_end_s)
