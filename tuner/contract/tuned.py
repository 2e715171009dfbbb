"""best.<gpu>.yaml as a type: the configuration, its promise, where it comes from; and the decision behind it."""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from tuner.contract.base import Frozen
from tuner.contract.config import RunConfig
from tuner.contract.fingerprint import Fingerprint
from tuner.contract.given import Given
from tuner.contract.measurement import Environment, Interval, MemoryPeak, Outcome

LEAST_RATE, MOST_RATE = 1e-9, 1e15


class Confirmed(Frozen):
    """One configuration measured again on the machine that is to run it, just before the run."""

    origin: Literal["winner", "runner-up", "baseline"]
    config: RunConfig
    outcome: Outcome
    message: str = ""
    samples_per_s: tuple[float, ...] = ()
    """One figure per round, each from a fresh process."""
    peak_bytes: int | None = None
    peaks: tuple[MemoryPeak, ...] = ()
    """One per round; the last one has an evaluation in it."""
    reference_s: tuple[float, ...] = ()
    """The host's reference work meanwhile."""


class Promise(Given):
    """What production will do with this configuration on the machine it was measured on."""

    samples_per_s: Interval
    """Prediction interval for one further process, from the fresh measurements of the ship gate."""
    peak_bytes: int = Field(ge=0)
    peak_low_bytes: int = Field(ge=0)
    peak_high_bytes: int = Field(ge=0)
    peak_from: str = ""
    """What the peak stands on: the whole evaluation, or so many of its batches; empty = not known."""
    hours: float = Field(gt=0, le=MOST_RATE)
    """Steady-state hours to the horizon, compile time included."""
    gain: Interval
    """Throughput over the baseline's, paired and interleaved; 1.0 = equal."""
    break_even_samples: int | None = Field(default=None, ge=0)
    """After this many samples the time saved has paid for the tuning; None = never within any horizon."""
    reference_s: tuple[float, ...] = ()
    """The host's reference work while this was measured, to tell the host's drift from a broken promise."""
    confirmed_on: str | None = None
    """Where it was measured anew just before the run; None = it is the search's own promise."""
    confirmed: tuple[Confirmed, ...] | None = None
    """What was measured then."""

    @field_validator("samples_per_s", "gain")
    @classmethod
    def _can_be_divided_by(cls, value: Interval) -> Interval:
        """Runs are held against it. The ends of an interval may be unknown: 0 and infinity."""
        if not (LEAST_RATE <= value.value <= MOST_RATE and 0 <= value.low <= value.high):
            raise ValueError(f"a value from {LEAST_RATE:g} to {MOST_RATE:g} with 0 <= low <= high is expected")
        return value

    @field_validator("reference_s")
    @classmethod
    def _durations(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not all(0 < seconds < math.inf for seconds in value):
            raise ValueError("finite seconds above 0 are expected")
        return value


class Origin(Frozen):
    """Which study says so, for which GPU, and where it was measured."""

    study: str
    target: str
    tier: str = ""
    """The guide's tier the baseline was taken from; empty = the study has none for this target."""
    measured_on: str
    transfer: Literal["measured", "unverified"]
    """`unverified`: the target is not the device measured on, so speed there is not known."""
    reason: str


class Provenance(Origin):
    decision: Literal["winner", "no_gain"]
    probes: int
    baseline_digest: str
    lr_note: str = ""
    data: tuple[Fingerprint, ...] = ()
    """What it was tuned on, by content."""
    data_changes: tuple[str, ...] = ()
    """What of it was changed while it was tuned, and accepted."""
    environment: Environment
    tuner: str
    created: str


class TunedConfig(Given):
    """The document `tuner optimize` writes and `tuner train --config` reads."""

    config: RunConfig
    promise: Promise | None = None
    provenance: Provenance | None = None
    runner_ups: tuple[RunConfig, ...] = ()
    runner_up_peaks: tuple[int | None, ...] = ()
    """Peak memory in bytes of each of them, as measured; None = not known."""
    baseline: RunConfig | None = None
    """What the winner was compared with; measured beside it when the choice is confirmed on another machine."""

    @model_validator(mode="after")
    def _one_workload(self) -> Self:
        others = [(f"runner_ups.{place}", config) for place, config in enumerate(self.runner_ups)]
        for place, config in [*others, *([("baseline", self.baseline)] if self.baseline else [])]:
            if config.workload != self.config.workload:
                raise ValueError(
                    f"{place}.workload: {config.workload!r} is not the workload of `config` ({self.config.workload!r})"
                )
        return self


class Side(Frozen):
    """One side of the comparison, measured in the ship gate."""

    config: RunConfig
    samples_per_s: Interval | None = None
    peak_bytes: int | None = None
    peak_from: str = ""
    """As `Promise.peak_from`."""
    processes: int = 0
    """Fresh processes behind the figure."""


class Decision(Frozen):
    """What the rows prove. `failed`: not even the baseline could be measured."""

    kind: Literal["winner", "no_gain", "failed"]
    reason: str
    """Two or three sentences for people."""
    baseline: Side | None = None
    winner: Side | None = None
    """The configuration to ship: the baseline itself when there is no gain."""
    gain: Interval | None = None
    """In what the study's objective asks for: whole time, samples/s, goodput, memory or energy."""
    speedup: Interval | None = None
    """Samples/s over the baseline's, from the same pairs; None where no gain is given."""
    search_maximum: float | None = None
    """The best figure of the search over the baseline's own there: what picking the maximum would have claimed."""
    runner_ups: tuple[RunConfig, ...] = Field(default=())
    notes: tuple[str, ...] = ()
    """What a reader should also know: lr vetoed, budget spent before the gate, transfer unverified."""
