"""Statistics over raw step times: where warm-up ends, throughput with an interval, paired ratios, drift.

Pure functions of their arguments; every random draw has a fixed seed. It knows nothing of probes or studies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from tuner.contract.measurement import Interval, Measurement

_Floats = NDArray[np.float64]
BOOTSTRAPS = 1000


def warmup_cut(
    step_s: Sequence[float], *, minimum: int = 1, tolerance: float = 0.01, round_steps: int = 1
) -> int | None:
    """First step of the steady state, or None while there is none.

    The cut is the smallest c >= `minimum` for which the medians of the first and second half of
    `step_s[c:]` agree within max(`tolerance`, two standard errors of their difference), and likewise those of
    the first eighth and the rest: medians of halves do not see a short slow start, but the mean does.
    At least six steps must remain. Candidates grow by an eighth, so a long run stays cheap. Where loader workers
    deliver in rounds, the steps of a round are judged by their mean.
    """
    times = np.asarray(step_s, dtype=np.float64)
    if round_steps > 1:
        return _cut_of_rounds(times, minimum, tolerance, round_steps)
    cut = minimum
    while len(times) - cut >= 6:
        left = times[cut:]
        half, head = len(left) // 2, max(3, len(left) // 8)
        if _agree(left[:half], left[half:], tolerance) and _agree(left[:head], left[head:], tolerance):
            return cut
        cut += max(1, len(left) // 8)
    return None


def _cut_of_rounds(times: _Floats, minimum: int, tolerance: float, round_steps: int) -> int | None:
    """As `warmup_cut`, over the whole rounds that end with the last step and begin at `minimum` or later."""
    rounds = max(0, len(times) - minimum) // round_steps
    first = len(times) - rounds * round_steps
    means = times[first:].reshape(rounds, round_steps).mean(axis=1)
    cut = warmup_cut([float(mean) for mean in means], minimum=0, tolerance=tolerance)
    return None if cut is None else first + cut * round_steps


def _agree(first: _Floats, second: _Floats, tolerance: float) -> bool:
    """Do the medians agree, as far as the noise lets one tell? The later part, being steadier, tells the noise."""
    low, high = np.percentile(second, [25, 75])
    error = float(1.2533 * (high - low) / 1.349) * math.sqrt(1 / len(first) + 1 / len(second))
    apart = abs(float(np.median(first) - np.median(second)))
    return apart <= max(tolerance * float(np.median(second)), 2 * error)


def throughput(measurement: Measurement, confidence: float = 0.95) -> Interval:
    """Samples per second at steady state, samples / seconds, with a circular block bootstrap interval
    (Politis and Romano, 1992).

    Blocks keep the correlation of neighbouring steps (a busy neighbour slows many in a row); the circle gives the
    first and last steps their full weight. The value always lies within its interval.
    Raises ValueError when no steady step was measured.
    """
    return rate_interval(
        measurement.steady_step_s, measurement.samples_per_step, confidence, round_steps=measurement.round_steps
    )


def rate_interval(
    step_s: Sequence[float], samples_per_step: int, confidence: float = 0.95, *, round_steps: int = 1
) -> Interval:
    """As `throughput`, of bare step times; blocks are whole rounds of `round_steps`."""
    times = np.asarray(step_s, dtype=np.float64)
    if len(times) == 0:
        raise ValueError("no steady step was measured")
    value = samples_per_step / float(times.mean())
    if len(times) < 3:
        return Interval(value=value, low=0.0, high=math.inf, confidence=confidence)
    means = _block_means(times, round_steps)
    tail = (1 - confidence) / 2
    slow, fast = np.quantile(means, [1 - tail, tail])
    low, high = samples_per_step / float(slow), samples_per_step / float(fast)
    return Interval(value=value, low=min(low, value), high=max(high, value), confidence=confidence)


def _block_means(times: _Floats, round_steps: int) -> _Floats:
    n = len(times)
    block = min(n, math.ceil(max(1, round(n ** (1 / 3))) / round_steps) * round_steps)
    rng = np.random.default_rng(0)
    starts = rng.integers(0, n, size=(BOOTSTRAPS, math.ceil(n / block)))
    sums = np.concatenate(([0.0], np.cumsum(np.concatenate((times, times[:block])))))
    blocks: _Floats = (sums[starts + block] - sums[starts]) / block
    means: _Floats = blocks.mean(axis=1)
    return means


def half_width(interval: Interval) -> float:
    """Relative half-width: 0.01 = +-1 %."""
    if not math.isfinite(interval.high) or interval.value <= 0:
        return math.inf
    return (interval.high - interval.low) / 2 / interval.value


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Student-t interval of the mean; infinite with fewer than two values."""
    n = len(values)
    mean = float(np.mean(values))
    if n < 2:
        return Interval(value=mean, low=-math.inf, high=math.inf, confidence=confidence)
    reach = _student(n, confidence) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return Interval(value=mean, low=mean - reach, high=mean + reach, confidence=confidence)


def prediction_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Where the next value will lie, in log space (values must be positive): wider than the interval of the mean."""
    logs = np.log(np.asarray(values, dtype=np.float64))
    n = len(logs)
    centre = float(logs.mean())
    if n < 2:
        return Interval(value=math.exp(centre), low=0.0, high=math.inf, confidence=confidence)
    reach = _student(n, confidence) * float(logs.std(ddof=1)) * math.sqrt(1 + 1 / n)
    return Interval(
        value=math.exp(centre), low=math.exp(centre - reach), high=math.exp(centre + reach), confidence=confidence
    )


def pooled_prediction(values: Sequence[float], groups: Sequence[Sequence[float]], confidence: float = 0.95) -> Interval:
    """Where the next of `values` will lie, as `prediction_interval`, with a relative spread that all `groups` share
    (`values` among them): two values of one alone would say hardly anything. Values must be positive."""
    logs = [np.log(np.asarray(group, dtype=np.float64)) for group in groups if len(group) > 1]
    free = sum(len(group) - 1 for group in logs)
    centre = float(np.log(np.asarray(values, dtype=np.float64)).mean())
    if not free:
        return Interval(value=math.exp(centre), low=0.0, high=math.inf, confidence=confidence)
    spread = math.sqrt(sum(float(((group - group.mean()) ** 2).sum()) for group in logs) / free)
    reach = _student(free + 1, confidence) * spread * math.sqrt(1 + 1 / len(values))
    return Interval(
        value=math.exp(centre), low=math.exp(centre - reach), high=math.exp(centre + reach), confidence=confidence
    )


def paired_gain(candidate: Sequence[float], baseline: Sequence[float], confidence: float = 0.95) -> Interval:
    """Ratio candidate / baseline of pairs measured side by side: exp of the t-interval of the log ratios."""
    logs = np.log(np.asarray(candidate, dtype=np.float64)) - np.log(np.asarray(baseline, dtype=np.float64))
    inner = mean_interval([float(x) for x in logs], confidence)
    high = math.exp(inner.high) if math.isfinite(inner.high) else math.inf
    low = math.exp(inner.low) if math.isfinite(inner.low) else 0.0
    return Interval(value=math.exp(inner.value), low=low, high=high, confidence=confidence)


@cache
def _student(n: int, confidence: float) -> float:
    from scipy.stats import t

    return float(t.ppf(0.5 + confidence / 2, n - 1))


def drift(reference_now: Sequence[float], reference_then: Sequence[float]) -> float | None:
    """How much faster the host is now than then, by its reference work: 0.95 = 5 % slower. None = unknown.

    Medians, as a single piece of reference work that a neighbour interrupted may take many times as long.
    """
    if not reference_now or not reference_then:
        return None
    return float(np.median(reference_then) / np.median(reference_now))
