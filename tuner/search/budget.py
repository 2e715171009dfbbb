"""Budget: what probes cost here, what is left for the search, and what is kept free for the lr stage and the gate."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from tuner.contract.config import CompileMode
from tuner.contract.probe import ProbeKind
from tuner.contract.space import Knob
from tuner.search.forecast import Forecast
from tuner.search.history import TRACED, is_ok
from tuner.search.points import Point, other_models
from tuner.search.view import View

LR_SHARE = 0.2
"""Largest share of the budget that is kept free for the lr stage."""
QUALITY_SHARE = 0.4
"""Largest share of the budget that is kept free for the quality of other models."""
GATE_SHARE = 0.5
"""With a budget of which the gate would take more than this share, one finalist must do."""
SOAK_COST = 2.0
"""A soak in end-to-end probes, until one was seen."""
WARM_COMPILE = 0.3
"""A compile served from the shared cache, as a share of the first."""
VERIFY_PROBES = 2
"""End-to-end probes kept possible while the model is being filled."""
COLD_COMPILE_S = {"cuda": 60.0, "cpu": 140.0}
"""What a first compile may cost until this study has seen one: the upper end of what was measured for tiny models on
two CPU cores (a perceptron 17 s, a U-Net 139 s), and a guess for a GPU's host. Autotuning takes about three times as
long."""
NOISE_GRADIENTS = 64
"""Micro-gradients a noise probe is expected to pool."""
TRACE_S = 3.0
"""Seconds of one trace on fake tensors, until one was seen: two steps of Python for every operator."""
PATIENCE = 5.0
"""A measurement that waits for its least number of steps is given up after so many times its seconds."""


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
            if (is_ok(row) or TRACED in row.values) and point.variant.compile is CompileMode.EAGER
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
        compute_s = self._spec.measure.compute_s
        guess = min(
            self.end_to_end_s, self._fixed_s + compute_s + self.measuring_s(compute_s, self._forecast.reference)
        )
        return self.seconds_of(ProbeKind.COMPUTE) or guess

    def measuring_s(self, seconds: float, point: Point) -> float:
        """Steady-state seconds of a probe of `point` that is given `seconds`: slow steps take longer, as the least
        number of them is waited for, within reason."""
        rate = self._forecast.rate(point)
        if rate is None:
            return seconds
        step_s = point.samples * self._spec.baseline.world_size / rate.value
        return max(seconds, min(self._spec.measure.min_steps * step_s, PATIENCE * seconds + step_s))

    def _longer_s(self, seconds: float, point: Point) -> float:
        """How much longer than the reference's end-to-end probe one of `point` measures when given `seconds`."""
        known = self.measuring_s(self._spec.measure.measure_s, self._forecast.reference)
        return max(0.0, self.measuring_s(seconds, point) - known)

    @cached_property
    def loader_s(self) -> float:
        return self.seconds_of(ProbeKind.LOADER) or self.point_s

    @cached_property
    def trace_s(self) -> float:
        """One traced point."""
        return self.seconds_of(ProbeKind.TRACE) or self._fixed_s + TRACE_S

    @cached_property
    def _fixed_s(self) -> float:
        return float(np.mean([row.fixed_s for row in self._forecast.rows[self._forecast.reference]]))

    def probe_s(self, point: Point) -> float:
        """One end-to-end probe of `point`; of one never measured what is usual, as the reference's may have been steady
        and ended early."""
        if point in self._forecast.rows:
            return float(np.mean([row.seconds for row in self._forecast.rows[point]]))
        compiling = self._view.history.compile_seconds(point.variant)
        longer = self._longer_s(self._spec.measure.measure_s, point)
        usual = max(self.end_to_end_s, self.seconds_of(ProbeKind.END_TO_END) or 0.0)
        return usual + longer + WARM_COMPILE * compiling

    def gate_s(self, finalists: int) -> float:
        """The shortest gate, with the soak."""
        leader, seconds = self._forecast.leader, self._spec.gate.measure_s
        own = self.end_to_end_s + self._longer_s(seconds, self._forecast.reference)
        other = max(own, self.probe_s(leader) + self._longer_s(seconds, leader))
        return self._spec.gate.min_pairs * (own + finalists * other) + SOAK_COST * other

    @cached_property
    def finalists(self) -> int:
        """How many finalists the gate can carry: one on a small budget."""
        wanted = self._spec.gate.finalists
        own = self.end_to_end_s + self._longer_s(self._spec.gate.measure_s, self._forecast.reference)
        cost = self._spec.gate.min_pairs * (1 + wanted) * own
        return wanted if cost <= GATE_SHARE * self._spec.budget_s else 1

    @cached_property
    def gate_reserve_s(self) -> float:
        another_model = bool(self.quality_reserve_s or self._view.history.quality)
        return self.gate_s(self.finalists + another_model)

    @cached_property
    def lr_probe_s(self) -> float:
        rate = self._forecast.rates[self._forecast.leader]
        compiling = WARM_COMPILE * self._view.history.compile_seconds(self._forecast.leader.variant)
        return self._fixed_s + self._spec.lr.samples / rate + compiling

    @cached_property
    def noise_s(self) -> float:
        """The noise probe: as long a training as an lr probe's, then two passes over its micro-gradients."""
        reference = self._forecast.reference
        samples = self._spec.lr.samples + 2 * NOISE_GRADIENTS * reference.micro
        return self._fixed_s + samples / self._forecast.rates[reference]

    @cached_property
    def lr_reserve_s(self) -> float:
        values = len(self._spec.space.values(Knob.LR, self._spec.baseline))
        if not self._spec.lr.enabled or values < 2:
            return 0.0
        return min(values * self._spec.lr.seeds * self.lr_probe_s, LR_SHARE * self._spec.budget_s)

    @cached_property
    def quality_probe_s(self) -> float:
        """One training for quality: the dearest seen, or what so many samples take at the leader's speed."""
        quality = self._spec.quality
        assert quality is not None
        seen = [row.seconds for row in self._view.history.quality if row.kind is ProbeKind.QUALITY and row.values]
        leader = self._forecast.leader
        compiling = WARM_COMPILE * self._view.history.compile_seconds(leader.variant)
        return max(seen, default=self._fixed_s + quality.samples / self._forecast.rates[leader] + compiling)

    @cached_property
    def quality_reserve_s(self) -> float:
        """What is kept free for other models until their stage begins; 0 where not even one could be judged."""
        quality, models = self._spec.quality, len(other_models(self._spec))
        if quality is None or not models or self._view.history.quality:
            return 0.0
        least, whole = (
            (1 + count) * quality.seeds * self.quality_probe_s + count * self.end_to_end_s for count in (1, models)
        )
        most = QUALITY_SHARE * self._spec.budget_s
        return min(whole, most) if least <= most else 0.0

    @cached_property
    def left_s(self) -> float:
        """Seconds the stages before the quality stage may still spend."""
        return self.quality_left_s - self.quality_reserve_s

    @cached_property
    def quality_left_s(self) -> float:
        """Seconds the quality stage may still spend."""
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

    def allows_quality(self, cost_s: float) -> bool:
        return self.probes_left and cost_s <= self.quality_left_s

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
