"""The objective: total seconds of the production run, and after how many samples the tuning has paid for itself."""

from __future__ import annotations

import math

from tuner.contract.study import StudySpec

_DUTIES = (
    ("evaluate", "evaluate_samples"),
    ("sample", "sample_samples"),
    ("checkpoint", "checkpoint_samples"),
)
"""Phase of a soak -> the cadence at which production repeats it."""


def production_seconds(
    spec: StudySpec, samples_per_s: float, compile_s: float = 0.0, phases_s: dict[str, float] | None = None
) -> float:
    """Seconds from start to horizon: compile + samples / throughput + evaluation, sampling and checkpoints.

    `phases_s`: seconds of one evaluation, sampling and checkpoint write, from a soak; what is missing counts as 0.
    """
    horizon = spec.baseline.horizon_samples
    duties = 0.0
    for phase, cadence in _DUTIES:
        every = getattr(spec.baseline.cadence, cadence)
        if every and phases_s:
            duties += phases_s.get(phase, 0.0) * (horizon // every)
    return compile_s + horizon / samples_per_s + duties


def break_even_samples(
    tuning_s: float, baseline_rate: float, rate: float, extra_compile_s: float, horizon_samples: int
) -> int | None:
    """After this many samples the time saved has paid for `tuning_s` and the longer compile.

    None when nothing is saved per sample. More than `horizon_samples` means: not within this run.
    """
    saved_per_sample = 1 / baseline_rate - 1 / rate
    if saved_per_sample <= 0:
        return None
    samples = math.ceil(max(0.0, tuning_s + extra_compile_s) / saved_per_sample)
    return samples if samples <= 1000 * horizon_samples else None
