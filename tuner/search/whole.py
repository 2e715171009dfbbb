"""Whole steps taken apart: compute and loader seconds from end-to-end rows alone, where parts cannot be probed.

A recorded wait for data is subtracted; without one, loaders are compared at equal cuts of the batch.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from typing import NamedTuple

from tuner.contract.probe import ProbeKind, ProbeRow
from tuner.search.history import History, is_ok
from tuner.search.points import IDLE_PREFETCH, Loader, Point, Variant

BOUND = 1.05
"""Ratio to the fastest loader at the same cut from which a step counts as limited by its loader."""
WAITING = 0.05
"""Share of a step spent waiting for data from which workers count as too slow."""
LEAST_COMPUTE = 0.05
"""Share of a step that computing takes at least."""


class Step(NamedTuple):
    """Seconds of one measured optimizer step."""

    whole_s: float
    waited_s: float | None
    """Part of it waiting for data; None = not recorded."""


class Parts(NamedTuple):
    compute_s: dict[Point, float]
    """Compute seconds of one step, where the loader did not hide them."""
    per_sample_s: dict[Loader, float]
    """Loader seconds per sample; of one that hides behind the compute wherever it was seen, a fair share of the work
    that one process takes alone."""


def take_apart(history: History) -> Parts:
    """Loaders first, by what they cost at equal cuts; then the compute of every point they do not limit."""
    steps = _steps(history)
    loading = _loading(steps)
    compute = {}
    for point, step in steps.items():
        seconds = _compute(point, step, loading.get(point.loader, 0.0) * point.samples)
        if seconds is not None:
            compute[point] = seconds
    return Parts(compute, loading)


def _steps(history: History) -> dict[Point, Step]:
    found = {}
    for point, rows in history.of_kind(ProbeKind.END_TO_END).items():
        good = [row for row in rows if is_ok(row)]
        if good:
            waits = [wait * history.host_factor(row) for row in good if (wait := _waited(row)) is not None]
            wholes = [history.step_s(row) for row in good]
            found[point] = Step(statistics.fmean(wholes), statistics.fmean(waits) if waits else None)
    return found


def _waited(row: ProbeRow) -> float | None:
    """Seconds of a steady step spent waiting for data."""
    measured = row.measurement
    if measured is None or not measured.data_wait_s:
        return None
    return math.fsum(measured.data_wait_s[measured.warmup_steps :]) / len(measured.steady_step_s)


def _loading(steps: dict[Point, Step]) -> dict[Loader, float]:
    """Seconds per sample by loader; the dearest figure counts, as a slow computation hides a slow loader."""
    alike: defaultdict[tuple[Variant, int, int], dict[Loader, Step]] = defaultdict(dict)
    for point, step in steps.items():
        alike[point.variant, point.micro, point.accumulation][point.loader] = step
    found: dict[Loader, float] = {}
    for (_, micro, accumulation), by_loader in alike.items():
        best = min(step.whole_s for step in by_loader.values())
        for loader, step in by_loader.items():
            if step.waited_s is None and len(by_loader) == 1:
                continue
            seconds = _data(loader, step, best) / (micro * accumulation)
            found[loader] = max(seconds, found.get(loader, 0.0))
    return {loader: seconds or _hidden(loader, steps, found) for loader, seconds in found.items()}


def _hidden(loader: Loader, steps: dict[Point, Step], known: dict[Loader, float]) -> float:
    """Seconds per sample of workers that were never waited for: what one process takes, shared among them; less than
    any step they hid behind."""
    fair = known.get(Loader(0, IDLE_PREFETCH), 0.0) / max(1, loader.workers)
    seen = [step.whole_s / point.samples for point, step in steps.items() if point.loader == loader]
    return min(fair, min(seen) / BOUND**2)


def _data(loader: Loader, step: Step, best_s: float) -> float:
    """Loader seconds of one step: without workers they add to it; with workers they are all of it or hidden."""
    if step.waited_s is not None:
        bound = step.waited_s > WAITING * step.whole_s
        own = step.whole_s if bound else 0.0
        return own if loader.workers else step.waited_s
    if not loader.workers:
        return step.whole_s - best_s
    return step.whole_s if step.whole_s > BOUND * best_s else 0.0


def _compute(point: Point, step: Step, data_s: float) -> float | None:
    """None where the loader, and not the computation, decided how long the step took."""
    least = LEAST_COMPUTE * step.whole_s
    if step.waited_s is not None:
        return max(least, step.whole_s - step.waited_s)
    if not point.loader.workers:
        return max(least, step.whole_s - data_s)
    return step.whole_s if data_s * BOUND < step.whole_s else None
