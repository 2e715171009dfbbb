"""Verify and polish: the model's best guesses measured end to end, then the leader's neighbours."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tuner.contract.probe import ProbeKind, ProbeRequest, Stage
from tuner.contract.space import Knob
from tuner.search.forecast import MISFIT
from tuner.search.points import (
    FLAG_KNOBS,
    Point,
    as_loader,
    differences,
    flag_values,
    neighbours,
    prefetch_values,
    with_batch,
    with_flag,
    worker_values,
)
from tuner.search.situation import Situation

VERIFIED = 3
"""Configurations of the grid probed end to end because the model says so."""
LEAST_VERIFIED = 2
"""So many at least: with the baseline's they tell how far the model is off."""
POLISHED = 12
"""Probes of the polish while the model can be trusted."""
NEAR = 4
"""The same where it cannot: the nearest are still the best guess, the rest is better left to a sampler."""
WORTHWHILE = 1.01
"""Nothing is probed whose optimistic bound does not beat the incumbent by this much."""


def verify(s: Situation) -> ProbeRequest | None:
    """The best predicted configurations, not all alike; some in any case, as they teach the model's correction."""
    done = _asked(s, Stage.VERIFY)
    if len(done) >= VERIFIED:
        return None
    for point in _by_prediction(s):
        if not _too_alike(point, done):
            if len(done) >= LEAST_VERIFIED and not _promising(s, point):
                return None
            return s.end_to_end(Stage.VERIFY, point)
    return None


def _asked(s: Situation, stage: Stage) -> list[Point]:
    rows = s.history.of_kind(ProbeKind.END_TO_END)
    return [point for point, asked in rows.items() if any(row.stage is stage for row in asked)]


def _by_prediction(s: Situation) -> list[Point]:
    """Unmeasured points of the grid, best predicted first; of equals those with fewer changes to the reference."""
    ranked = []
    for point in s.forecast.grid():
        found = s.forecast.rate(point)
        if found is not None:
            worth = s.forecast.worth(point, found.value)
            ranked.append((-round(worth, 9), differences(s.forecast.reference, point), point))
    return [point for _, _, point in sorted(ranked)]


def _too_alike(point: Point, done: Iterable[Point]) -> bool:
    """One probe per computation and number of workers, two per computation: the rest differs by prefetch alone."""
    same = [other for other in done if other._replace(loader=point.loader) == point]
    return len(same) >= VERIFIED - 1 or any(other.loader.workers == point.loader.workers for other in same)


def _promising(s: Situation, point: Point) -> bool:
    return _bound(s, point) > WORTHWHILE * s.forecast.measured_worth(s.forecast.leader)


def _bound(s: Situation, point: Point) -> float:
    """Optimistic worth; of a point nothing is known of, the leader's and a bit more."""
    bound = s.forecast.optimistic(point)
    return s.forecast.unknown if bound is None else bound


def polish(s: Situation) -> ProbeRequest | None:
    """The neighbour of the leader with the best optimistic bound; then, where the model holds, any configuration.

    Where it does not, what comes after the neighbours is the fall-back's (see `fallback`).
    """
    trusted = s.forecast.misfit <= MISFIT
    if len(_asked(s, Stage.POLISH)) >= (POLISHED if trusted else NEAR):
        return None
    near = [point for point in around(s, s.forecast.leader) if _open(s, point)]
    for group in (near, list(s.forecast.grid()) if trusted else []):
        promising = [point for point in group if _promising(s, point)]
        if promising:
            best = max(promising, key=lambda point: (_bound(s, point), -differences(s.forecast.leader, point)))
            return s.end_to_end(Stage.POLISH, best)
    return None


def _open(s: Situation, point: Point) -> bool:
    return s.fits(point) and not s.history.settled(ProbeKind.END_TO_END, point)


def around(s: Situation, point: Point) -> Iterator[Point]:
    """The next batch sizes, the next worker and prefetch counts, and each flag flipped."""
    spec = s.view.spec
    for micro in neighbours(s.view.micro_values(point.samples), point.micro):
        yield with_batch(point, micro, point.samples)
    for samples in neighbours(tuple(sorted(s.view.sample_values)), point.samples):
        if samples % point.micro == 0:
            yield with_batch(point, point.micro, samples)
    for workers in neighbours(worker_values(spec), point.loader.workers):
        prefetch = point.loader.prefetch if point.loader.workers else spec.baseline.loader.prefetch_factor
        yield point._replace(loader=as_loader(workers, prefetch))
    if point.loader.workers:
        for prefetch in neighbours(prefetch_values(spec), point.loader.prefetch):
            yield point._replace(loader=as_loader(point.loader.workers, prefetch))
    for knob in FLAG_KNOBS:
        for value in flag_values(spec, knob):
            if value != getattr(point.variant, knob.value):
                yield point._replace(variant=with_flag(point.variant, knob, value))
    for mode in flag_values(spec, Knob.COMPILE):
        variant = point.variant._replace(compile=mode)
        if mode is not point.variant.compile and variant in s.view.steps.cuts:
            yield point._replace(variant=variant)
