"""What an Optuna sampler searches, and what it is told of the configurations measured. And the fall-back: where the
factored model misfits, a sampler has the rest of the budget; when that is, and when it ends. It knows nothing of
Optuna: `sampler.propose` does."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tuner.contract.measurement import Outcome
from tuner.contract.probe import ProbeKind, Stage
from tuner.contract.space import Knob
from tuner.contract.study import SamplerName
from tuner.search.forecast import MISFIT
from tuner.search.points import (
    Point,
    Variant,
    as_loader,
    flag_values,
    prefetch_values,
    worker_values,
)
from tuner.search.score import overruns
from tuner.search.situation import Situation

FRUITLESS = 12
"""Proposals in a row without a gain beyond the noise after which the fall-back ends."""
ORDERED = (Knob.EFFECTIVE_BATCH_SIZE, Knob.MICRO_BATCH_SIZE, Knob.NUM_WORKERS, Knob.PREFETCH_FACTOR)


def handed_over(s: Situation) -> str:
    """Why a sampler proposes the next end-to-end probe; empty = it does not."""
    if s.forecast.misfit <= MISFIT or s.budget.spent_up or _fruitless(s) >= FRUITLESS:
        return ""
    if next(open_points(s), None) is None:
        return ""
    return f"the model is off by {100 * s.forecast.misfit:.0f} % end to end: Optuna's TPE proposes"


def proposals(s: Situation) -> list[Point]:
    """Configurations the fall-back has asked for, in order."""
    rows = s.history.of_kind(ProbeKind.END_TO_END)
    return [point for point, asked in rows.items() if asked[0].stage is Stage.SAMPLER]


def _fruitless(s: Situation) -> int:
    """Proposals since the first configuration that the best one does not beat beyond the noise of both."""
    f, asked = s.forecast, list(s.history.of_kind(ProbeKind.END_TO_END))
    best = f.measured_worth(f.leader)
    as_good = (
        place
        for place, point in enumerate(asked)
        if point in f.rates and f.measured_worth(point) * (1 + math.hypot(f.noise(point), f.noise(f.leader))) >= best
    )
    later = set(asked[next(as_good) + 1 :])
    return sum(point in later for point in proposals(s))


@dataclass(frozen=True)
class Axis:
    """One dimension a sampler searches."""

    knob: Knob
    values: tuple[Any, ...]

    @property
    def ordered(self) -> bool:
        """Neighbouring values are alike: a sampler may reason about their order."""
        return self.knob in ORDERED


def axes(s: Situation) -> tuple[Axis, ...]:
    """Every knob of the system with more than one value, those of the measured points among them."""
    found = {knob: set(values) for knob, values in _listed(s).items()}
    for point in s.history.of_kind(ProbeKind.END_TO_END):
        for knob, value in values_of(s, point).items():
            found[knob].add(value)
    return tuple(Axis(knob, tuple(sorted(values))) for knob, values in found.items() if len(values) > 1)


def _listed(s: Situation) -> dict[Knob, tuple[Any, ...]]:
    spec, world = s.view.spec, s.view.spec.baseline.world_size
    samples = s.view.sample_values
    values: dict[Knob, tuple[Any, ...]] = {
        Knob.EFFECTIVE_BATCH_SIZE: tuple(size * world for size in samples),
        Knob.MICRO_BATCH_SIZE: tuple({micro for size in samples for micro in s.view.micro_values(size)}),
        Knob.NUM_WORKERS: worker_values(spec),
        Knob.PREFETCH_FACTOR: prefetch_values(spec),
    }
    for knob in (Knob(name) for name in Variant._fields):
        values[knob] = flag_values(spec, knob)
    if spec.sampler is SamplerName.STAGED:
        seen = {variant.compile for variant in (s.view.base, *s.forecast.variants())}
        values[Knob.COMPILE] = tuple(mode for mode in values[Knob.COMPILE] if mode in seen)
    return values


def values_of(s: Situation, point: Point) -> dict[Knob, Any]:
    """Every knob of the system at `point`."""
    return {
        Knob.EFFECTIVE_BATCH_SIZE: point.samples * s.view.spec.baseline.world_size,
        Knob.MICRO_BATCH_SIZE: point.micro,
        Knob.NUM_WORKERS: point.loader.workers,
        Knob.PREFETCH_FACTOR: point.loader.prefetch,
        **{Knob(name): value for name, value in point.variant._asdict().items()},
    }


def point_at(s: Situation, values: Mapping[Knob, Any]) -> Point | None:
    """The point of the knob values, what is missing as in the reference; None where the batch cannot be cut so."""
    known = {**values_of(s, s.forecast.reference), **values}
    micro, samples = known[Knob.MICRO_BATCH_SIZE], known[Knob.EFFECTIVE_BATCH_SIZE] // s.view.spec.baseline.world_size
    if samples % micro:
        return None
    loader = as_loader(known[Knob.NUM_WORKERS], known[Knob.PREFETCH_FACTOR])
    return Point(Variant(*(known[Knob(name)] for name in Variant._fields)), micro, samples // micro, loader)


def may_propose(s: Situation, point: Point) -> bool:
    """Open end to end, legal, within memory, and affordable. Of the fall-back the model foretells memory; Optuna's own
    samplers, which stand for comparison, are kept from what was seen not to fit alone."""
    if s.history.settled(ProbeKind.END_TO_END, point) or point.micro not in s.view.micro_values(point.samples):
        return False
    if point.loader.workers and point.loader.prefetch not in prefetch_values(s.view.spec):
        return False
    ours = s.view.spec.sampler is SamplerName.STAGED
    fits = s.fits(point) if ours else point.micro < s.history.limit(point)
    return fits and s.budget.allows(s.budget.probe_s(point))


def open_points(s: Situation) -> Iterator[Point]:
    """Every configuration that may be proposed; the same one may come twice."""
    dimensions = axes(s)
    for choice in itertools.product(*(axis.values for axis in dimensions)):
        point = point_at(s, dict(zip((axis.knob for axis in dimensions), choice, strict=True)))
        if point is not None and may_propose(s, point):
            yield point


@dataclass(frozen=True)
class Lesson:
    """What one measured configuration teaches a sampler."""

    values: dict[Knob, Any]
    worth: float
    overruns: dict[str, float]
    """By constraint; above zero = infeasible."""


def lessons(s: Situation) -> Iterator[Lesson]:
    """Every configuration settled end to end: its worth, and how far it is from the memory budget (continuous)."""
    for point, rows in s.history.of_kind(ProbeKind.END_TO_END).items():
        if point in s.forecast.rates:
            share = s.history.shares[s.history.needed(point)]
            within = {"memory": min(0.0, share - 1), "failed": -1.0}
            yield Lesson(values_of(s, point), s.forecast.measured_worth(point), within)
        elif s.history.settled(ProbeKind.END_TO_END, point):
            found = [overruns(s.view.spec, row) for row in rows if row.outcome is not Outcome.CONTENDED]
            worst = {name: max(own[name] for own in found) for name in found[0]} if found else {"failed": 1.0}
            yield Lesson(values_of(s, point), 0.0, worst)
