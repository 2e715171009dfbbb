"""Forecast: end-to-end speed of any configuration, measured or predicted, and how far the prediction may be off."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property

import numpy as np

from tuner.contract.probe import ProbeKind, ProbeRow
from tuner.contract.study import Objective
from tuner.search.history import is_ok, rate_of
from tuner.search.model import Estimate, overlap
from tuner.search.objective import production_seconds
from tuner.search.points import Loader, Point, Variant, sample_values, with_batch
from tuner.search.view import View

LEAST_NOISE = 0.01
"""Gains below this are never told from noise by single probes."""
MOST_NOISE = 0.03
"""Misfit above this is the model's and not the processes'."""
UNKNOWN_ERROR = 0.10
"""Error of the guess that a neighbour nothing is known of runs like the leader."""
MISFIT = 0.10
"""Typical end-to-end misfit above which the model is not trusted beyond neighbours."""
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
            if good and all(self._view.history.fits(row) for row in good):
                found[point] = good
        return found

    @cached_property
    def rates(self) -> dict[Point, float]:
        """Measured samples/s."""
        return {point: float(np.mean([rate_of(row) for row in rows])) for point, rows in self.rows.items()}

    def noise(self, point: Point) -> float:
        """Relative error of a measured rate: within the process, and between processes as far as the misfit tells."""
        between = min(self.residual, MOST_NOISE)
        return max(LEAST_NOISE, between, self._within[point]) / math.sqrt(len(self.rows[point]))

    @cached_property
    def _within(self) -> dict[Point, float]:
        return {point: max(noise_of(row) for row in rows) for point, rows in self.rows.items()}

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
            raw = self.raw_step(point)
            if raw is not None and raw.value > 0:
                found[point] = math.log(point.samples * world / rate / raw.value)
        return found

    def correction(self, point: Point) -> tuple[float, float]:
        """Factor on the predicted step time learnt from end-to-end rows, and the spread around it.

        Rows with the same number of workers count first (workers and compute share a CPU), then any row.
        """
        return math.exp(self._shift(point.loader.workers)), self.residual

    def _shift(self, workers: int) -> float:
        """Typical log misfit with so many workers; of all rows where one alone would be no more than its own noise."""
        logs = [log for other, log in self._misfits.items() if other.loader.workers == workers]
        logs = logs if len(logs) > 1 else list(self._misfits.values())
        return float(np.median(logs)) if logs else 0.0

    @cached_property
    def residual(self) -> float:
        """Typical end-to-end misfit left after the correction; 0 while too few rows tell."""
        left = [log - self._shift(point.loader.workers) for point, log in self._misfits.items()]
        if len(left) < FEW:
            return 0.0
        return float(np.sqrt(np.mean(np.square(left))))

    def rate(self, point: Point) -> Estimate | None:
        """Samples/s: measured where it was, else predicted."""
        if point in self.rates:
            return Estimate(self.rates[point], self.noise(point))
        raw = self.raw_step(point)
        if raw is None or raw.value <= 0:
            return None
        factor, spread = self.correction(point)
        world = self._spec.baseline.world_size
        return Estimate(point.samples * world / (raw.value * factor), math.hypot(raw.error, 2 * spread))

    def worth(self, point: Point, rate: float) -> float:
        """What the objective maximises: samples/s, or the horizon over the total production time."""
        if self._spec.objective is Objective.THROUGHPUT:
            return rate
        compiling = self._view.history.compile_seconds(point.variant)
        return self._spec.baseline.horizon_samples / production_seconds(self._spec, rate, compiling)

    def measured_worth(self, point: Point) -> float:
        return self.worth(point, self.rates[point])

    def optimistic(self, point: Point) -> float | None:
        """Upper bound of the worth; None where nothing is known."""
        found = self.rate(point)
        return None if found is None else self.worth(point, found.value * (1 + found.error))

    @cached_property
    def leader(self) -> Point:
        """The best measured end to end; a later one replaces an earlier only beyond the noise of both."""
        best = self.reference
        for point in self.rates:
            noise = math.hypot(self.noise(point), self.noise(best))
            if self.measured_worth(point) > self.measured_worth(best) * (1 + noise):
                best = point
        return best

    def variants(self) -> tuple[Variant, ...]:
        """Variants with compute rows, in the order measured."""
        return tuple(self._view.steps.cuts)

    def grid(self) -> Iterator[Point]:
        """Every configuration the model knows something of and memory allows, not yet settled end to end."""
        for variant in self.variants():
            for samples in sample_values(self._spec):
                for micro in self._view.micro_values(samples):
                    if self._view.memory.fits(variant, micro):
                        yield from self._unsettled(variant, micro, samples)

    def _unsettled(self, variant: Variant, micro: int, samples: int) -> Iterator[Point]:
        for loader in self._view.loaders:
            point = Point(variant, micro, samples // micro, Loader(*loader))
            if not self._view.history.settled(ProbeKind.END_TO_END, point):
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
