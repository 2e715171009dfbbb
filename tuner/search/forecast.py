"""Forecast: end-to-end speed of any configuration, measured or predicted, and how far the prediction may be off."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np

from tuner.contract.probe import ProbeKind, ProbeRow, Stage
from tuner.contract.study import Objective
from tuner.search import goodput
from tuner.search.belief import Belief, believe, process_noise
from tuner.search.history import is_ok, power_of
from tuner.search.model import Estimate, overlap
from tuner.search.objective import Figures, worth
from tuner.search.points import Loader, Point, Variant, differences, with_batch
from tuner.search.view import View

PEAK_SPREAD = {"cpu": 0.01, "cuda": 0.005}
"""Standard deviation of peaks between processes of one configuration, until repeats were seen; an allocator on a GPU
repeats itself."""
PEAK_WEIGHT = 4.0
"""How many repeats that guess is worth."""
PEAK_ROOM = 1.0
"""So many of them below the memory budget candidates end: the ship gate would throw out what is closer."""
LEAST_NOISE = 0.01
"""Gains below this are never told from noise by single probes."""
UNKNOWN_ERROR = 0.10
"""Error of the guess that a neighbour nothing is known of runs like the leader, and of guessed memory and power."""
UNTRIED_WORKERS = 0.10
"""Error of a prediction with a number of workers that was never measured beside the computation: what they take from it
is not known."""
MISFIT = 0.10
"""Typical end-to-end misfit above which the model is not trusted beyond neighbours."""
CONFIRMING = frozenset({Stage.VERIFY, Stage.POLISH, Stage.SAMPLER})
"""Stages whose end-to-end rows show how far the model is off where it learns from such rows."""
LATEST = 6
"""So many of them, the latest, count: what misled the model before it has learnt from since."""
FEW = 3
"""End-to-end rows from which the corrections' spread is read."""


def noise_of(row: ProbeRow) -> float:
    """Relative half-width of a probe's mean step time, two standard errors, never below `LEAST_NOISE`."""
    assert row.measurement is not None
    steady = np.asarray(row.measurement.steady_step_s)
    if len(steady) < 2:
        return UNKNOWN_ERROR
    return max(LEAST_NOISE, 2 * float(steady.std(ddof=1) / steady.mean()) / math.sqrt(len(steady)))


class Forecast:
    def __init__(self, view: View) -> None:
        assert view.reference is not None
        self._view = view
        self._spec = view.spec
        self.reference: Point = view.reference

    @cached_property
    def rows(self) -> dict[Point, list[ProbeRow]]:
        """End-to-end rows of the search that ran and fit, by configuration, in the order first asked."""
        found = {}
        for point, rows in self._view.history.of_kind(ProbeKind.END_TO_END).items():
            good = [row for row in rows if is_ok(row)]
            if good and self._view.history.typical_share(good) <= 1.0:
                found[point] = good
        return found

    @cached_property
    def rates(self) -> dict[Point, float]:
        """Measured samples/s, as at the host's usual speed."""
        return {
            point: float(np.mean([self._view.history.rate(row) for row in rows])) for point, rows in self.rows.items()
        }

    def noise(self, point: Point) -> float:
        """Relative error of what is believed of a measured rate, never below `LEAST_NOISE`."""
        return max(LEAST_NOISE, self.beliefs[point].sd)

    @cached_property
    def beliefs(self) -> dict[Point, Belief]:
        """By measured configuration. What the model learnt from these rows themselves is no second opinion."""
        noise = self.process_noise
        found = {}
        for point, rows in self.rows.items():
            prior = self._prior(point) if self._spec.probes_alone and len(self._misfits) >= FEW else None
            found[point] = believe([self._view.history.rate(row) for row in rows], noise, prior)
        return found

    @cached_property
    def process_noise(self) -> float:
        """Standard deviation between processes of one configuration, from those measured more than once."""
        return process_noise([self._view.history.rate(row) for row in rows] for rows in self.rows.values())

    def _prior(self, point: Point) -> Belief | None:
        """The model's word."""
        raw = self.raw_step(point)
        if raw is None or raw.value <= 0:
            return None
        factor, spread = self.correction(point)
        rate = point.samples * self._spec.baseline.world_size / (raw.value * factor)
        return Belief(math.log(rate), math.hypot(raw.error, spread))

    def raw_step(self, point: Point) -> Estimate | None:
        """Seconds of one step by the factored model alone."""
        compute = self._view.steps.estimate(point.variant, point.micro, point.accumulation)
        if compute is None:
            return None
        data = self.data_seconds(point)
        return Estimate(overlap(compute.value, data, point.loader), compute.error)

    def data_seconds(self, point: Point) -> float:
        """Loader seconds of one step; what the reference waited for data where the loader was not measured."""
        known = self._view.loading.seconds(point.loader, point.samples)
        return known if known is not None else self._reference_wait * point.samples

    @cached_property
    def _reference_wait(self) -> float:
        """Seconds per sample the reference waited for data."""
        waits = [
            math.fsum(m.data_wait_s[m.warmup_steps :]) / (len(m.steady_step_s) * m.samples_per_step)
            for row in self.rows.get(self.reference, ())
            if (m := row.measurement) is not None and m.data_wait_s
        ]
        return float(np.mean(waits)) if waits else 0.0

    @cached_property
    def _misfits(self) -> dict[Point, float]:
        """Measured over predicted step time (log), where both are known."""
        world = self._spec.baseline.world_size
        found = {}
        for point, rate in self.rates.items():
            raw = self._foretold(point)
            if raw is not None and raw.value > 0:
                found[point] = math.log(point.samples * world / rate / raw.value)
        return found

    def _foretold(self, point: Point) -> Estimate | None:
        """What the model says of a measured point. Where the model itself learnt from end-to-end rows, that is what it
        said before this one was measured, and only of points that were to confirm it."""
        if self._spec.probes_alone:
            return self.raw_step(point)
        first = self.rows[point][0]
        if first.stage not in CONFIRMING:
            return None
        rows = [row for row in self._view.history.rows if row.number < first.number]
        return Forecast(View(self._spec, rows)).raw_step(point)

    def correction(self, point: Point) -> tuple[float, float]:
        """Factor on the predicted step time learnt from end-to-end rows, and the spread around it.

        Rows with the same number of workers count first (workers and compute share a CPU), then any row.
        """
        return math.exp(self._shift(point.loader.workers)), self.misfit

    def _shift(self, workers: int) -> float:
        """Typical log misfit with so many workers: they share the CPU with the computation. Few rows count less
        than all rows together, as one alone would be little more than its own noise."""
        if not self._spec.probes_alone or not self._misfits:
            return 0.0  # without probes of its parts the model has learnt from these rows already
        general = float(np.median(list(self._misfits.values())))
        logs = [log for other, log in self._misfits.items() if other.loader.workers == workers]
        if not logs:
            return general
        return (len(logs) * float(np.median(logs)) + general) / (len(logs) + 1)

    @property
    def misfit(self) -> float:
        """What of the residual is the model's, once the noise between processes is taken out."""
        return math.sqrt(max(0.0, self.residual**2 - self.process_noise**2))

    @cached_property
    def residual(self) -> float:
        """Typical end-to-end difference left after the correction; 0 while too few rows tell."""
        left = [log - self._shift(point.loader.workers) for point, log in self._misfits.items()]
        left = left if self._spec.probes_alone else left[-LATEST:]
        if len(left) < FEW:
            return 0.0
        return float(np.sqrt(np.mean(np.square(left))))

    def rate(self, point: Point) -> Estimate | None:
        """Samples/s: measured where it was, else predicted."""
        if point in self.rates:
            return Estimate(self.beliefs[point].rate, self.noise(point))
        raw = self.raw_step(point)
        if raw is None or raw.value <= 0:
            return None
        factor, spread = self.correction(point)
        world = self._spec.baseline.world_size
        error = math.hypot(raw.error, 2 * spread, 0.0 if self._tried(point) else UNTRIED_WORKERS)
        return Estimate(point.samples * world / (raw.value * factor), error)

    def _tried(self, point: Point) -> bool:
        """So many workers were measured beside the computation."""
        return any(other.loader.workers == point.loader.workers for other in self.rates)

    def worth(self, point: Point, rate: float, rows: Sequence[ProbeRow] = ()) -> float:
        """What the objective maximises (see `objective.worth`). `rows`: measurements of `point` with another model."""
        return worth(self._spec, self.figures(point, rate, rows), self._bar)

    def measured_worth(self, point: Point) -> float:
        """Of a measured configuration, as far as its figures are believed (see `belief`)."""
        return self.worth(point, self.beliefs[point].rate)

    def figures(self, point: Point, rate: float, rows: Sequence[ProbeRow] = ()) -> Figures:
        """Everything the objectives ask of `point` at `rate` samples/s; memory and power only where asked for."""
        rows, objective = rows or self.rows.get(point, ()), self._spec.objective
        return Figures(
            samples_per_s=rate,
            compile_s=self._view.history.compile_seconds(point.variant),
            efficiency=self.efficiency(point),
            memory_used=self._memory_used(point, rows) if objective is Objective.MEMORY else 1.0,
            power_w=(power_of(rows) or self._power_w) if objective is Objective.ENERGY else 1.0,
        )

    @cached_property
    def _bar(self) -> Figures:
        return self.figures(self.reference, self.rates[self.reference])

    def efficiency(self, point: Point) -> float:
        """Progress per sample over that at the baseline's effective batch size; the least it can be while the
        gradient noise scale is unknown."""
        world, before = self._spec.baseline.world_size, self._spec.baseline.effective_batch_size
        batch = point.samples * world
        if batch == before:
            return 1.0
        if self._view.noise_scale is None:
            return min(1.0, before / batch)
        return goodput.efficiency(self._view.noise_scale.value, batch, before)

    def _memory_used(self, point: Point, rows: Sequence[ProbeRow]) -> float:
        """Largest share of the memory budget seen; the upper error bar of the model where nothing was."""
        seen = [self._spec.memory_used(row.measurement.memory) for row in rows if row.measurement is not None]
        return max(seen) if seen else self._view.memory.upper(*self._view.history.needed(point))

    @cached_property
    def _power_w(self) -> float:
        """What the reference draws: the guess for a configuration that was not measured end to end."""
        return power_of(self.rows[self.reference]) or 1.0

    def optimistic(self, point: Point) -> float | None:
        """Upper bound of the worth; None where nothing is known."""
        found = self.rate(point)
        if found is None:
            return None
        return self._hoped(point, found.value * (1 + found.error), measured=point in self.rates)

    @property
    def unknown(self) -> float:
        """Optimistic worth of a configuration near the leader that nothing is known of."""
        return self._hoped(self.leader, self.rates[self.leader] * (1 + UNKNOWN_ERROR), measured=False)

    def _hoped(self, point: Point, rate: float, *, measured: bool) -> float:
        """With less memory and less power than assumed, where that was not measured end to end."""
        own, less = self.figures(point, rate), 1.0 if measured else 1 - UNKNOWN_ERROR
        own = replace(own, memory_used=own.memory_used * less, power_w=own.power_w * less)
        return worth(self._spec, own, self._bar)

    @cached_property
    def leader(self) -> Point:
        """The best believed of those measured end to end, of equals the one that changes least; the reference stays
        unless beaten beyond the noise of both."""
        bar = max(self.measured_worth(point) for point in self.roomy) / (1 + LEAST_NOISE)
        equals = [point for point in self.roomy if self.measured_worth(point) >= bar]
        best = min(equals, key=lambda p: (differences(self.reference, p), -self.measured_worth(p)))
        noise = math.hypot(self.noise(best), self.noise(self.reference))
        beaten = self.measured_worth(best) > self.measured_worth(self.reference) * (1 + noise)
        return best if beaten else self.reference

    @cached_property
    def roomy(self) -> tuple[Point, ...]:
        """The reference, and what was measured whose peak leaves room for what those of fresh processes differ by."""
        used = {point: self._view.history.typical_share(rows) for point, rows in self.rows.items()}
        most = math.exp(-PEAK_ROOM * self.peak_spread)
        return tuple(point for point in self.rows if point == self.reference or used[point] <= most)

    @property
    def peak_spread(self) -> float:
        """Standard deviation of log peaks between processes of one configuration, pooled over those seen to repeat."""
        squares, freedom = PEAK_WEIGHT * PEAK_SPREAD[self._spec.device.kind] ** 2, PEAK_WEIGHT
        for growths in self._view.history.growths.values():
            if len(growths) > 1 and min(growths) > 0:  # 0 = not told
                squares += float(np.var(np.log(growths))) * len(growths)
                freedom += len(growths) - 1
        return math.sqrt(squares / freedom)

    def variants(self) -> tuple[Variant, ...]:
        """Variants with compute rows, in the order measured."""
        return tuple(self._view.steps.cuts)

    def grid(self) -> Iterator[Point]:
        """Every configuration the model knows something of and memory allows, not yet settled end to end."""
        for variant in self.variants():
            for samples in self._view.sample_values:
                for micro in self._view.micro_values(samples):
                    yield from self._unsettled(variant, micro, samples)

    def _unsettled(self, variant: Variant, micro: int, samples: int) -> Iterator[Point]:
        for loader in self._view.loaders:
            point = Point(variant, micro, samples // micro, Loader(*loader))
            fits = self._view.memory.fits(*self._view.history.needed(point))
            if fits and not self._view.history.settled(ProbeKind.END_TO_END, point):
                yield point

    def best_cut(self, variant: Variant, *, ignore_memory: bool = False) -> Point | None:
        """The cut of the working batch at which `variant` computes fastest (loader as in the reference)."""
        found: list[tuple[float, int]] = []
        for micro in self._view.micro_values(self._view.samples):
            if ignore_memory or self._view.memory.fits(variant, micro):
                step = self._view.steps.estimate(variant, micro, self._view.samples // micro)
                if step is not None:
                    found.append((step.value, micro))
        if not found:
            return None
        return with_batch(self.reference._replace(variant=variant), min(found)[1], self._view.samples)
