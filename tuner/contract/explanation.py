"""Explanation: why a study chose its configuration, as data: limits, fits, memory, what would be faster, candidates."""

from __future__ import annotations

from typing import Literal

from tuner.contract.base import Frozen
from tuner.contract.config import RunConfig
from tuner.contract.measurement import Interval, Outcome
from tuner.contract.space import Dropped
from tuner.contract.tuned import Origin

LimitName = Literal["loader", "launch overhead", "computation", "update", "memory", "duties", "compile"]


class Limit(Frozen):
    """One thing that may limit the configuration, with its figure."""

    name: LimitName
    share: Interval | None
    """null = unknown; `text` says why."""
    of: str
    """What it is a share of: a step, the run, the memory budget."""
    limits: bool
    """True where it is large enough to be called a limit."""
    text: str


class StepFitResult(Frozen):
    """Step time = accumulation * alpha + samples * beta + omega, fitted to one variant."""

    variant: str
    alpha_s: Interval
    beta_s: Interval
    omega_s: Interval
    residual: float
    """Largest relative misfit over the cuts fitted."""
    cuts: int
    """Different cuts behind the fit."""
    exact: bool
    """As many unknowns as cuts: the line meets every point, and the residual proves nothing."""


class StepPoint(Frozen):
    """One measured step time; `cut` 16x1 = micro-batch x accumulation."""

    variant: str
    micro_batch_size: int
    accumulation_steps: int
    step_s: Interval
    """Compute probes: without a loader. End to end: with it, waits included."""
    end_to_end: bool
    chosen: bool
    """Of the configuration explained."""


class LoaderPoint(Frozen):
    """The loader alone, without a model."""

    num_workers: int
    prefetch_factor: int
    sample_s: Interval
    """Seconds per sample."""


class LoaderResult(Frozen):
    points: tuple[LoaderPoint, ...]
    compute_sample_s: float | None
    """Seconds per sample of the computation alone; null = not measured."""
    enough_workers: int | None
    """Fewest workers with which the loader keeps up; null = none measured does, or nothing to compare with. 0 workers
    load before the computation and not beside it, so they keep up only within 1 % of it."""


class MemoryCell(Frozen):
    """Peak memory of one variant and micro-batch size, measured, and predicted from all other rows."""

    variant: str
    micro_batch_size: int
    outcome: Outcome
    measured_share: float | None
    """Of the memory budget, the largest seen; null = it did not run."""
    measured_bytes: float | None
    predicted_share: Interval | None
    """`high` is the error bar the memory gate uses; null = no other row tells."""
    below_bar: bool | None
    """Reality stayed below the error bar; null = not to be said."""


class Change(Frozen):
    """What would have to change to go faster, and what it could bring by the fitted model."""

    what: str
    gain: Interval | None
    """Ratio; `high` is the bound ("at most"). null = unknown."""
    of: Literal["throughput", "run time"]
    basis: str
    """What the bound rests on."""
    hindrance: str
    """Why it is not so now: memory, the target's limits; empty = nothing known stands against it."""


class Candidate(Frozen):
    """One configuration that was measured end to end, or nearly was."""

    label: str
    predicted: Interval | None
    """Samples/s as the model saw it before it was measured; null = it could not tell."""
    measured: Interval | None
    """Samples/s in the search as its probes measured it, with the spread of single processes; null = not measured, or
    it failed."""
    at_usual_speed: Interval | None = None
    """The same as the search compares it: as at the host's usual speed; null where nothing was taken out."""
    gate: Interval | None
    """Ratio to the reference in the ship gate."""
    pairs: int = 0
    verdict: str


class Effect(Frozen):
    """One setting changed alone."""

    setting: str
    """`fused optimizer off -> on`."""
    at: str
    """The configuration or cut it was compared at."""
    ratio: Interval
    """Throughput with over without."""
    basis: Literal["compute", "end to end"]


class ModelUse(Frozen):
    """FLOPs of the model against the device's peak."""

    flops_per_sample: float | None
    flops_per_s: float | None
    """Reached: FLOPs per sample x throughput."""
    peak_flops_per_s: float | None
    """Of the device measured on, for the precision used; null = no table has it."""
    mfu: Interval | None
    """Share of the peak."""
    text: str


class ExplainResult(Origin):
    """`tuner explain --json`."""

    decision: Literal["winner", "no_gain", "failed", "open"]
    config: RunConfig
    label: str
    headline: str
    samples_per_s: Interval | None
    memory_budget_bytes: float
    """What the shares of memory are shares of."""
    limits: tuple[Limit, ...]
    model_use: ModelUse
    changes: tuple[Change, ...]
    fits: tuple[StepFitResult, ...]
    steps: tuple[StepPoint, ...]
    loader: LoaderResult
    memory: tuple[MemoryCell, ...]
    candidates: tuple[Candidate, ...]
    effects: tuple[Effect, ...]
    dropped: tuple[Dropped, ...]
    ruled_out: tuple[str, ...]
    """What else was not tried, and why: compile modes, sizes that did not fit."""
    seconds: dict[str, float]
    """Probing seconds by stage."""
