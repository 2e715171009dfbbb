"""Promise against reality: the one rule by which a production run is judged, while it goes on and at its end.

It knows nothing of runs, files or words around it: a promise, what was measured, and the host's reference work.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

from tuner.contract.base import Frozen
from tuner.contract.statistics import drift
from tuner.contract.tuned import Promise


class Verdict(StrEnum):
    """Of the throughput, the host's own drift taken out where it is known: against the promised interval, which says
    where one further process will lie. How far from its middle is a figure (`deviation`), not a verdict."""

    KEPT = "kept"
    """Inside the interval."""
    ABOVE = "above"
    """Faster than the interval: kept, and exceeded."""
    BELOW = "below"
    """Slower than the interval's lower end: not kept."""


class PeakVerdict(StrEnum):
    """Of the peak memory. Less than was promised is kept, however much less."""

    WITHIN = "within"
    """Up to the upper end of the promised peak's error bar."""
    ABOVE = "above"


class PromiseCheck(Frozen):
    """What came of a promise; null = nothing was promised, or too little was measured to say."""

    host_drift: float | None = None
    """How much faster the host was than when the promise was made; 0.95 = 5 % slower; null = unknown."""
    deviation: float | None = None
    """reached / promised - 1."""
    deviation_beyond_drift: float | None = None
    """reached / promised / host_drift - 1."""
    verdict: Verdict | None = None
    peak_deviation: float | None = None
    """peak / promised peak - 1."""
    peak_verdict: PeakVerdict | None = None


def check_promise(
    promise: Promise | None, samples_per_s: float | None, reference_s: Sequence[float], peak_bytes: int | None
) -> PromiseCheck:
    """Hold throughput (steady state) and peak memory against `promise`; `reference_s` is the host's reference work
    meanwhile."""
    if promise is None:
        return PromiseCheck()
    peak_deviation = peak_verdict = None
    if peak_bytes and promise.peak_bytes:
        peak_deviation = peak_bytes / promise.peak_bytes - 1
        peak_verdict = PeakVerdict.WITHIN if peak_bytes <= promise.peak_high_bytes else PeakVerdict.ABOVE
    peak = PromiseCheck(peak_deviation=peak_deviation, peak_verdict=peak_verdict)
    if samples_per_s is None:
        return peak
    moved = drift(reference_s, promise.reference_s)
    promised = promise.samples_per_s
    judged = samples_per_s if moved is None else samples_per_s / moved
    return peak.model_copy(
        update={
            "host_drift": moved,
            "deviation": samples_per_s / promised.value - 1,
            "deviation_beyond_drift": None if moved is None else judged / promised.value - 1,
            "verdict": _verdict(judged, promised.low, promised.high),
        }
    )


def _verdict(samples_per_s: float, low: float, high: float) -> Verdict:
    if samples_per_s < low:
        return Verdict.BELOW
    return Verdict.ABOVE if samples_per_s > high else Verdict.KEPT
