"""Case: one configuration of a study, its fresh measurements and the fit behind it, as every part of an explanation
needs them. It measures nothing and judges nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tuner.contract.config import RunConfig
from tuner.contract.measurement import Interval, Measurement
from tuner.contract.probe import ProbeKind, ProbeRow
from tuner.contract.statistics import mean_interval, paired_gain, throughput
from tuner.contract.study import MEMORY_MARGIN, StudySpec
from tuner.contract.tuned import Decision
from tuner.search.forecast import noise_of
from tuner.search.gate import soak_rows
from tuner.search.history import is_ok, rate_of
from tuner.search.memory import Size
from tuner.search.model import MEASURED_ERROR, Cut, StepFit, fit_step
from tuner.search.points import Point, Variant, point_of
from tuner.search.selection import fresh_rows
from tuner.search.situation import Situation
from tuner.search.view import View

DRAWS = 200
"""Fits over redrawn step times from which the interval of a fitted figure is read."""


@dataclass(frozen=True)
class Case:
    s: Situation
    config: RunConfig
    decision: Decision | None

    @property
    def view(self) -> View:
        return self.s.view

    @property
    def spec(self) -> StudySpec:
        return self.s.view.spec

    @cached_property
    def point(self) -> Point:
        return point_of(self.config)

    @property
    def same_model(self) -> bool:
        """Fits and loader figures are of the unchanged model; another one's step is not taken apart."""
        return self.config.options == self.spec.baseline.options

    @cached_property
    def rows(self) -> list[ProbeRow]:
        """Gate and soak, or else the search's end-to-end rows."""
        return fresh_rows(self.s, self.config)

    @cached_property
    def measurements(self) -> list[Measurement]:
        return [row.measurement for row in self.rows if row.measurement is not None]

    @cached_property
    def rate(self) -> Interval:
        """Samples/s over all devices: the mean over processes with its interval, or the one process's own."""
        if len(self.rows) == 1:
            return throughput(self.measurements[0])
        rates = [rate_of(row) for row in self.rows]
        return _scaled(paired_gain(rates, [1.0] * len(rates)), 1.0)

    @property
    def sample_s(self) -> float:
        """Seconds per sample of one device's step, waits included."""
        return self.config.world_size / self.rate.value

    @cached_property
    def wait(self) -> Interval | None:
        """Share of a step spent waiting for the loader; None = not recorded."""
        shares = [found for m in self.measurements if (found := _wait_share(m)) is not None]
        if not shares:
            return None
        if len(shares) == 1:
            return shares[0]
        found = mean_interval([share.value for share in shares])
        return Interval(value=found.value, low=max(0.0, found.low), high=min(1.0, found.high))

    @cached_property
    def soak_phases(self) -> dict[str, float]:
        """Seconds of one evaluation, sampling and checkpoint; empty = no soak measured them."""
        rows = [row for row in good_rows(soak_rows(self.s, self.config)) if row.measurement is not None]
        return dict(rows[-1].measurement.duties_s) if rows and rows[-1].measurement is not None else {}

    @cached_property
    def fitted(self) -> tuple[Variant, StepFit] | None:
        """The fit that says most about this configuration: its own variant's, or the most similar one's."""
        if not self.same_model:
            return None
        found = self.view.steps.nearest_fit(self.point.variant)
        owner = next((variant for variant, fit in self.view.steps.fits.items() if fit == found), None)
        return (owner, found) if owner is not None and found is not None else None

    @cached_property
    def draws(self) -> tuple[StepFit, ...]:
        return redrawn(self.view, self.fitted[0]) if self.fitted else ()

    def of_fit(self, figure: Callable[[StepFit], float]) -> Interval | None:
        """A figure of the fit with the range that the noise of the step times leaves it."""
        return spread(figure, self.fitted[1], self.draws) if self.fitted else None


def _wait_share(measurement: Measurement) -> Interval | None:
    """Waits over step times of one process, with two standard errors of the ratio (Cochran, Sampling Techniques, 1977,
    chapter 6)."""
    steps = np.asarray(measurement.steady_step_s)
    waits = np.asarray(measurement.data_wait_s[measurement.warmup_steps :])
    if len(waits) < 2 or len(waits) != len(steps):
        return None
    value = float(waits.sum() / steps.sum())
    reach = 2 * math.sqrt(len(steps)) * float(np.std(waits - value * steps, ddof=1)) / float(steps.sum())
    return Interval(value=value, low=max(0.0, value - reach), high=min(1.0, value + reach))


def _scaled(interval: Interval, factor: float) -> Interval:
    return interval.model_copy(
        update={"value": interval.value * factor, "low": interval.low * factor, "high": interval.high * factor}
    )


def cut_noise(view: View, variant: Variant, cut: Cut) -> float:
    """Relative standard error of a measured step time: within its process, never below what processes differ by."""
    point = next(
        (p for p in view.history.of_kind(ProbeKind.COMPUTE) if (p.variant, *p[1:3]) == (variant, *cut[:2])), None
    )
    rows = view.history.ok(ProbeKind.COMPUTE, point) if point is not None else ()
    return max([MEASURED_ERROR, *(noise_of(row) / 2 for row in rows)])


def redrawn(view: View, variant: Variant) -> tuple[StepFit, ...]:
    """The fit of a variant over step times redrawn within their noise (parametric bootstrap, fixed seed)."""
    cuts = view.steps.cuts[variant]
    noise = np.array([cut_noise(view, variant, cut) for cut in cuts])
    factors = np.exp(noise * np.random.default_rng(0).standard_normal((DRAWS, len(cuts))))
    drawn = (fit_step([c._replace(step_s=c.step_s * f) for c, f in zip(cuts, row, strict=True)]) for row in factors)
    return tuple(fit for fit in drawn if fit is not None)


def spread(figure: Callable[[StepFit], float], fit: StepFit, draws: Sequence[StepFit]) -> Interval:
    """95 % of the redrawn figures, the fitted value always among them."""
    value = figure(fit)
    low, high = np.quantile([figure(draw) for draw in draws] or [value], [0.025, 0.975])
    return Interval(value=value, low=min(value, float(low)), high=max(value, float(high)))


def ratio_of_rows(one: Sequence[ProbeRow], other: Sequence[ProbeRow]) -> Interval:
    """Throughput of `one` over `other`, not measured side by side: relative errors of both added in squares."""
    rates = [float(np.mean([rate_of(row) for row in rows])) for rows in (one, other)]
    errors = [max(MEASURED_ERROR, *(noise_of(row) for row in rows)) / math.sqrt(len(rows)) for rows in (one, other)]
    value, reach = rates[0] / rates[1], math.hypot(*errors)
    return Interval(value=value, low=value * math.exp(-reach), high=value * math.exp(reach))


def around(value: float, error: float) -> Interval:
    """`value` with its relative error on both sides."""
    return Interval(value=value, low=value * max(0.0, 1 - error), high=value * (1 + error))


def good_rows(rows: Sequence[ProbeRow]) -> list[ProbeRow]:
    return [row for row in rows if is_ok(row)]


def rows_of_size(view: View, size: Size) -> list[ProbeRow]:
    """Rows that show what the size needs, or that it does not fit."""
    kinds = (ProbeKind.COMPUTE, ProbeKind.END_TO_END)
    return [
        row
        for row in view.history.rows
        if row.kind in kinds and view.history.size_of(row.kind, point_of(row.config)) == size
    ]


def overrun_row(view: View, size: Size) -> ProbeRow | None:
    """The first row that shows that a size does not fit."""
    over = (r for r in rows_of_size(view, size) if r.outcome.is_oom or (is_ok(r) and not view.history.fits(r)))
    return next(over, None)


def probe_words(row: ProbeRow | None) -> str:
    """Where `tuner show STUDY --probes` has it."""
    return f"probe {row.number}" if row is not None else "no probe"


def counted_budget(spec: StudySpec) -> float:
    """Bytes that a share of 1.0 stands for (see `StudySpec.memory_used`)."""
    if spec.memory_cap_bytes is not None and spec.device.kind == "cpu":
        return spec.memory_cap_bytes * MEMORY_MARGIN
    return float(spec.memory_budget_bytes)


def variant_name(variant: Variant) -> str:
    """`fp32 eager fused`."""
    flags = {
        "fused": variant.fused,
        "channels_last": variant.channels_last,
        "checkpointing": variant.gradient_checkpointing,
    }
    return " ".join([variant.precision.value, variant.compile.value, *(name for name, on in flags.items() if on)])
