"""The factored model: step time from compute rows, data time from loader rows (memory: see `memory`).

It predicts and says how far it may be off; it chooses nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from tuner.contract.probe import ProbeKind
from tuner.contract.space import Knob
from tuner.search.history import History, is_ok, mean_step_s
from tuner.search.points import IDLE_PREFETCH, Loader, Point, Variant, as_loader, with_flag
from tuner.search.whole import take_apart

MEASURED_ERROR = 0.02
FITTED_ERROR = 0.04
SCALED_ERROR = 0.07
COMPOSED_ERROR = 0.10
"""Relative error to expect of a step time: measured, fitted over sizes, scaled from one size, composed of flags."""


class Cut(NamedTuple):
    """One measured cut of an optimizer step: samples = micro * accumulation."""

    micro: int
    accumulation: int
    step_s: float


@dataclass(frozen=True)
class StepFit:
    """Step time = accumulation * alpha + samples * beta + omega, all in seconds and never negative."""

    alpha: float
    """Cost of one micro-batch whatever its size: launches, Python, synchronisation."""
    beta: float
    """Cost of one sample."""
    omega: float
    """Cost of one optimizer update; contained in beta where only one batch size was measured."""
    residual: float
    """Largest relative misfit over the rows fitted."""

    def step_s(self, micro: int, accumulation: int) -> float:
        return accumulation * self.alpha + micro * accumulation * self.beta + self.omega

    def launch_share(self, micro: int, accumulation: int) -> float:
        """Part of a step that a larger micro-batch could save."""
        step = self.step_s(micro, accumulation)
        return accumulation * self.alpha / step if step > 0 else 0.0


def fit_step(cuts: Sequence[Cut]) -> StepFit | None:
    """Non-negative least squares of relative errors; None with fewer than two different cuts."""
    if len({(cut.micro, cut.accumulation) for cut in cuts}) < 2:
        return None
    from scipy.optimize import nnls

    y = np.array([cut.step_s for cut in cuts])
    columns = [[cut.accumulation for cut in cuts], [cut.micro * cut.accumulation for cut in cuts]]
    if len(set(columns[1])) > 1 and len(cuts) >= 3:
        columns.append([1] * len(cuts))
    matrix = np.array(columns, dtype=np.float64).T / y[:, None]
    solution, _ = nnls(matrix, np.ones(len(cuts)))
    alpha, beta, *rest = (float(value) for value in solution)
    misfit = float(np.max(np.abs(matrix @ solution - 1.0)))
    return StepFit(alpha, beta, rest[0] if rest else 0.0, misfit)


class Estimate(NamedTuple):
    """A predicted value and its relative error."""

    value: float
    error: float


def _compute_seconds(history: History) -> Iterator[tuple[Point, float]]:
    """Of one step: from compute rows, or from whole steps where computing cannot be probed alone."""
    if not history.spec.probes_alone:
        yield from take_apart(history).compute_s.items()
        return
    for point, rows in history.of_kind(ProbeKind.COMPUTE).items():
        for row in rows:
            if is_ok(row):
                yield point, history.step_s(row)


class StepModel:
    """Compute seconds of one optimizer step, for any variant that was measured or can be composed of such."""

    def __init__(self, history: History, base: Variant) -> None:
        self._base = base
        self.cuts: dict[Variant, list[Cut]] = {}
        for point, seconds in _compute_seconds(history):
            self.cuts.setdefault(point.variant, []).append(Cut(point.micro, point.accumulation, seconds))

    @cached_property
    def fits(self) -> dict[Variant, StepFit]:
        found = {variant: fit_step(cuts) for variant, cuts in self.cuts.items()}
        return {variant: fit for variant, fit in found.items() if fit is not None}

    def measured(self, variant: Variant, micro: int, accumulation: int) -> float | None:
        times = [c.step_s for c in self.cuts.get(variant, ()) if (c.micro, c.accumulation) == (micro, accumulation)]
        return float(np.mean(times)) if times else None

    def estimate(self, variant: Variant, micro: int, accumulation: int) -> Estimate | None:
        """Seconds of one step; None where nothing measured says anything about the variant."""
        if (own := self.measured(variant, micro, accumulation)) is not None:
            return Estimate(own, MEASURED_ERROR)
        if (fit := self.fits.get(variant)) is not None:
            return Estimate(fit.step_s(micro, accumulation), max(FITTED_ERROR, fit.residual))
        return self._scaled(variant, micro, accumulation) or self._composed(variant, micro, accumulation)

    def _scaled(self, variant: Variant, micro: int, accumulation: int) -> Estimate | None:
        """From another variant's fit, by the ratio of the two where both are known."""
        for cut in self.cuts.get(variant, ()):
            for fit in self._donors(variant):
                ratio = cut.step_s / fit.step_s(cut.micro, cut.accumulation)
                return Estimate(ratio * fit.step_s(micro, accumulation), SCALED_ERROR)
        return None

    def _donors(self, variant: Variant) -> list[StepFit]:
        """Fits to scale from, the most similar variant first."""
        ranked = sorted(self.fits, key=lambda other: (_distance(other, variant), other != self._base))
        return [self.fits[other] for other in ranked]

    def _composed(self, variant: Variant, micro: int, accumulation: int) -> Estimate | None:
        """The base's time times the ratio of every flag that differs, each measured alone."""
        base = self.fits.get(self._base)
        if base is None:
            return None
        step = base.step_s(micro, accumulation)
        for knob in Variant._fields:
            if getattr(variant, knob) == getattr(self._base, knob):
                continue
            ratio = self.flag_ratio(Knob(knob), getattr(variant, knob))
            if ratio is None:
                return None
            step *= ratio
        return Estimate(step, COMPOSED_ERROR)

    def nearest_fit(self, variant: Variant) -> StepFit | None:
        """The variant's own fit, or the most similar one's."""
        return self.fits.get(variant) or next(iter(self._donors(variant)), None)

    def flag_ratio(self, knob: Knob, value: object) -> float | None:
        """Step time with the base's one flag changed over the base's, at a cut where both were measured."""
        flipped = with_flag(self._base, knob, value)
        for cut in self.cuts.get(flipped, ()):
            base = self.measured(self._base, cut.micro, cut.accumulation)
            if base is not None:
                return cut.step_s / base
        return None


def _distance(one: Variant, other: Variant) -> int:
    return sum(a != b for a, b in zip(one, other, strict=True))


class LoaderModel:
    """Seconds the loader needs per sample, by workers and prefetch."""

    def __init__(self, history: History) -> None:
        self.per_sample: dict[Loader, float] = {}
        self._single: float | None = None
        if not history.spec.probes_alone:
            self.per_sample = take_apart(history).per_sample_s
            self._single = self.per_sample.get(as_loader(0, IDLE_PREFETCH))
        for point, rows in history.of_kind(ProbeKind.LOADER).items():
            times = [
                mean_step_s(row.measurement) / row.measurement.samples_per_step
                for row in rows
                if is_ok(row) and row.measurement is not None
            ]
            if times:
                self.per_sample[point.loader] = float(np.mean(times))

    def seconds(self, loader: Loader, samples: int) -> float | None:
        """Loader seconds of one step of `samples`; another prefetch of the same workers stands in where needed."""
        for known in (loader, *(other for other in self.per_sample if other.workers == loader.workers)):
            if known in self.per_sample:
                return self.per_sample[known] * samples
        return None if self._single is None else self._single / max(1, loader.workers) * samples

    def best(self) -> Loader | None:
        """The fastest; of those within 3 % of it, the one with fewest workers."""
        if not self.per_sample:
            return None
        fastest = min(self.per_sample.values())
        return min(loader for loader, seconds in self.per_sample.items() if seconds <= 1.03 * fastest)


def overlap(compute_s: float, data_s: float, loader: Loader) -> float:
    """Step seconds with the loader running: beside the compute with workers, before it without."""
    return max(compute_s, data_s) if loader.workers else compute_s + data_s
