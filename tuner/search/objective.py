"""The objective: what one configuration is worth, how two are compared, and when the tuning has paid for itself.

The single place that knows what each `--objective` means; leader, finalists and ship gate all ask here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tuner.contract.study import Objective, StudySpec

_DUTIES = (
    ("evaluate", "evaluate_samples"),
    ("sample", "sample_samples"),
    ("checkpoint", "checkpoint_samples"),
)
"""Phase of a soak -> the cadence at which production repeats it."""
TOO_SLOW = 0.5
"""Worth, under `memory`, of a configuration as fast as the reference that is not allowed: one that fits the budget is
worth 1 or more, so nothing too slow comes before anything that is not."""
PROVABLE = 0.5
"""Share of the slowness allowed that the search goes to: the rest is needed to prove it in the ship gate."""
LEAST_SHARE = 1e-6


@dataclass(frozen=True)
class Figures:
    """What the objectives are made of, of one configuration, measured or predicted."""

    samples_per_s: float
    compile_s: float = 0.0
    """Seconds of the first compile."""
    efficiency: float = 1.0
    """Progress per sample over that at the baseline's effective batch size."""
    memory_used: float = 1.0
    """Peak as a share of the memory budget (`StudySpec.memory_used`)."""
    power_w: float = 1.0
    """Mean power of the device while the steps were measured."""


def merit(spec: StudySpec, own: Figures) -> float:
    """The objective's own quantity, more is better; two configurations are compared by its ratio.

    TIME: horizon / (compile + horizon / goodput), in samples/s. Evaluation, sampling and checkpoints are left out:
    they are taken as equal for all configurations of one model, and change no order. THROUGHPUT: samples/s.
    GOODPUT: samples/s times statistical efficiency (Pollux, OSDI'21). MEMORY: memory budget over peak.
    ENERGY: samples per joule, each counted by its statistical efficiency.
    """
    goodput = own.samples_per_s * own.efficiency
    if spec.objective is Objective.TIME:
        return goodput / (1 + goodput * own.compile_s / spec.baseline.horizon_samples)
    if spec.objective is Objective.MEMORY:
        return 1 / max(own.memory_used, LEAST_SHARE)
    if spec.objective is Objective.ENERGY:
        return goodput / own.power_w
    return own.samples_per_s if spec.objective is Objective.THROUGHPUT else goodput


def fast_enough(spec: StudySpec, speed: float, *, share: float = 1.0) -> bool:
    """May a configuration with `speed` times the reference's goodput be shipped? Asked under `memory` alone, where
    it must not be slower by more than `share` of the least gain that counts."""
    return spec.objective is not Objective.MEMORY or speed >= 1 - share * spec.gate.min_gain


def worth(spec: StudySpec, own: Figures, reference: Figures) -> float:
    """What the search maximises: `merit`; of what is too slow only how fast it is, below all that is allowed."""
    speed = own.samples_per_s * own.efficiency / (reference.samples_per_s * reference.efficiency)
    return merit(spec, own) if fast_enough(spec, speed, share=PROVABLE) else TOO_SLOW * speed


VALUE_OF = {
    Objective.TIME: "samples/s",
    Objective.THROUGHPUT: "samples/s",
    Objective.GOODPUT: "goodput, samples/s",
    Objective.MEMORY: "memory budget / peak",
    Objective.ENERGY: "samples/J",
}
"""What a trial's value is called. Under `time` the first compile is counted in, over the whole run."""
GAIN_IN = {
    Objective.GOODPUT: "goodput (samples/s times statistical efficiency)",
    Objective.MEMORY: "peak memory",
    Objective.ENERGY: "samples per joule",
}
"""What a gain is a gain in, where it is not time or samples/s."""


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
