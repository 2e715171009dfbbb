"""Statistics over raw step times: where warm-up ends, throughput with an interval, paired ratios, drift.

Pure functions of their arguments; every random draw has a fixed seed. It knows nothing of probes or studies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tuner.contract.measurement import Interval, Measurement

_Floats = NDArray[np.float64]
BOOTSTRAPS = 1000


def warmup_cut(step_s: Sequence[float], *, minimum: int = 1, tolerance: float = 0.01) -> int | None:
    """First step of the steady state, or None while there is none.

    The cut is the smallest c >= `minimum` for which the medians of the first and second half of
    `step_s[c:]` agree within max(`tolerance`, two standard errors of their difference); at least six
    steps must remain. Candidates grow by an eighth, so a long run stays cheap.
    """
    times = np.asarray(step_s, dtype=np.float64)
    cut = minimum
    while len(times) - cut >= 6:
        half = (len(times) - cut) // 2
        first, second = times[cut : cut + half], times[cut + half :]
        scale = float(np.median(times[cut:]))
        spread = math.hypot(_median_error(first), _median_error(second))
        if abs(float(np.median(first) - np.median(second))) <= max(tolerance * scale, 2 * spread):
            return cut
        cut += max(1, (len(times) - cut) // 8)
    return None


def _median_error(values: _Floats) -> float:
    """Standard error of a median, from the interquartile range (robust against a stray slow step)."""
    low, high = np.percentile(values, [25, 75])
    return float(1.2533 * (high - low) / 1.349 / math.sqrt(len(values)))


def throughput(measurement: Measurement, confidence: float = 0.95) -> Interval:
    """Samples per second at steady state, samples / seconds, with a moving-block bootstrap interval.

    Blocks keep the correlation of neighbouring steps (a busy neighbour slows many in a row).
    Raises ValueError when no steady step was measured.
    """
    return rate_interval(measurement.steady_step_s, measurement.samples_per_step, confidence)


def rate_interval(step_s: Sequence[float], samples_per_step: int, confidence: float = 0.95) -> Interval:
    times = np.asarray(step_s, dtype=np.float64)
    if len(times) == 0:
        raise ValueError("no steady step was measured")
    value = samples_per_step / float(times.mean())
    if len(times) < 3:
        return Interval(value=value, low=0.0, high=math.inf, confidence=confidence)
    means = _block_means(times)
    tail = (1 - confidence) / 2
    slow, fast = np.quantile(means, [1 - tail, tail])
    return Interval(
        value=value, low=samples_per_step / float(slow), high=samples_per_step / float(fast), confidence=confidence
    )


def _block_means(times: _Floats) -> _Floats:
    n = len(times)
    block = max(1, round(n ** (1 / 3)))
    rng = np.random.default_rng(0)
    starts = rng.integers(0, n - block + 1, size=(BOOTSTRAPS, math.ceil(n / block)))
    sums = np.concatenate(([0.0], np.cumsum(times)))
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


def paired_gain(candidate: Sequence[float], baseline: Sequence[float], confidence: float = 0.95) -> Interval:
    """Ratio candidate / baseline of pairs measured side by side: exp of the t-interval of the log ratios."""
    logs = np.log(np.asarray(candidate, dtype=np.float64)) - np.log(np.asarray(baseline, dtype=np.float64))
    inner = mean_interval([float(x) for x in logs], confidence)
    high = math.exp(inner.high) if math.isfinite(inner.high) else math.inf
    low = math.exp(inner.low) if math.isfinite(inner.low) else 0.0
    return Interval(value=math.exp(inner.value), low=low, high=high, confidence=confidence)


def _student(n: int, confidence: float) -> float:
    from scipy.stats import t

    return float(t.ppf(0.5 + confidence / 2, n - 1))


def drift(reference_now: Sequence[float], reference_then: Sequence[float]) -> float | None:
    """How much faster the host is now than then, by its reference work: 0.95 = 5 % slower. None = unknown."""
    if not reference_now or not reference_then:
        return None
    return float(np.mean(reference_then) / np.mean(reference_now))
