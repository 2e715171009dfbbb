"""Loss of each candidate at equal samples: what a faster configuration must not pay with. It decides nothing.

End-to-end probes start from the same weights and see the same stream of samples, so at one effective batch size their
losses agree but for rounding, and further apart only where arithmetic differs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tuner.contract.config import RunConfig
from tuner.contract.measurement import Outcome
from tuner.contract.probe import ProbeKind, ProbeRow
from tuner.contract.statistics import mean_interval

TAIL = 0.25
"""Share of the common samples, the last ones, over which a loss is averaged: one step's is noise."""
APART = 0.02
"""Relative difference below which two losses count as equal whatever their spread: rounding alone can make as much."""
MOST_ENTRIES = 2000
"""Longer records may have been thinned, so that an entry is no longer one step."""
LEAST_STEPS = 4

_Floats = NDArray[np.float64]


@dataclass(frozen=True)
class LossAt:
    """Mean total loss of each configuration over the last quarter of the first `samples` samples."""

    samples: int
    """The largest number every configuration has seen."""
    losses: tuple[float, ...]
    """One per configuration, in the order asked."""
    differs: tuple[bool, ...]
    """Further from the first than its noise, at the same effective batch size."""


def losses_at_equal_samples(rows: Sequence[ProbeRow], configs: Sequence[RunConfig]) -> LossAt | None:
    """The loss of each of `configs` at the largest common number of samples; None where one has no record of it.

    Of several probes of a configuration the longest speaks. Configurations must share seed and model.
    """
    curves = [_curve(rows, config) for config in configs]
    if not curves or any(curve is None for curve in curves):
        return None
    steps = [config.effective_batch_size for config in configs]
    known = [curve for curve in curves if curve is not None]
    samples = min(len(curve) * step for curve, step in zip(known, steps, strict=True))
    if any(samples // step < LEAST_STEPS for step in steps):
        return None
    tails = [_tail(curve, samples // step) for curve, step in zip(known, steps, strict=True)]
    means = tuple(float(tail.mean()) for tail in tails)
    differs = tuple(step == steps[0] and _differs(tail, tails[0]) for tail, step in zip(tails, steps, strict=True))
    return LossAt(samples, means, differs)


def _curve(rows: Sequence[ProbeRow], config: RunConfig) -> _Floats | None:
    """Total loss by step, from the first step on."""
    found = [
        row.measurement.losses.get("total", ())
        for row in rows
        if row.kind is ProbeKind.END_TO_END and row.config == config and row.outcome is Outcome.OK and row.measurement
    ]
    usable = [losses for losses in found if len(losses) <= MOST_ENTRIES]
    longest = max(usable, key=len, default=())
    return np.asarray(longest, dtype=np.float64) if longest else None


def _tail(curve: _Floats, steps: int) -> _Floats:
    return curve[steps - max(1, round(TAIL * steps)) : steps]


def _differs(own: _Floats, other: _Floats) -> bool:
    """Paired step by step, as both saw the same samples."""
    apart = own - other
    if not np.isfinite(apart).all():
        return True
    inner = mean_interval([float(value) for value in apart])
    beyond = abs(inner.value) > APART * abs(float(other.mean()))
    return beyond and (not math.isfinite(inner.low) or inner.low > 0 or inner.high < 0)


def loss_notes(rows: Sequence[ProbeRow], reference: RunConfig, named: Sequence[tuple[str, RunConfig]]) -> Iterator[str]:
    """`loss at 480 samples: 16x1 fp32 eager w0 0.4512, baseline 0.4513`, and a warning where they differ.

    `named`: what the notes call each finalist, and its configuration; of another model's nothing is said.
    """
    for name, config in named:
        alike = config.options == reference.options and config.seed == reference.seed
        found = losses_at_equal_samples(rows, [reference, config]) if alike else None
        if found is None:
            continue
        (base, own), remark = found.losses, _remark(found, reference, config)
        yield f"loss at {found.samples} samples: {name} {own:.4g}, baseline {base:.4g}{remark}"


def _remark(found: LossAt, reference: RunConfig, config: RunConfig) -> str:
    if config.effective_batch_size != reference.effective_batch_size:
        return f" (effective batch {config.effective_batch_size}: fewer or more updates, so they need not agree)"
    if config.optimizer.lr != reference.optimizer.lr:
        return f" (at lr {config.optimizer.lr:g}, so they need not agree)"
    if found.differs[1]:
        return "; warning: further apart than noise at the same samples: check precision and compile before a long run"
    return ""
