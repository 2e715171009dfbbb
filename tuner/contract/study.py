"""StudySpec: what to search, from where, for how long, judged how; fixed when a study is created."""

from __future__ import annotations

import itertools
from enum import StrEnum
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from tuner.contract.base import Name, Scalar
from tuner.contract.config import RunConfig
from tuner.contract.fingerprint import Fingerprint, placed
from tuner.contract.given import LONGEST_S, Given
from tuner.contract.gpu import DeviceInfo, GpuProfile
from tuner.contract.measurement import MemoryPeak
from tuner.contract.space import Dropped, SearchSpace, options_text

MEMORY_MARGIN = 0.92
"""Share of a memory limit a configuration may plan to use; the rest is for fragmentation and what probes do not see."""


PARETO_SUFFIX = "-pareto"
"""The Optuna study beside NAME that shows its configurations by several measures at once is called NAME-pareto."""


class SamplerName(StrEnum):
    """`staged` is ours; the others are Optuna's own, for comparison."""

    STAGED = "staged"
    TPE = "tpe"
    GP = "gp"
    RANDOM = "random"


class Objective(StrEnum):
    """What the winner is best at."""

    TIME = "time"
    """Total production seconds over the horizon, compile included."""
    THROUGHPUT = "throughput"
    """Samples/s, whatever the effective batch size does to the progress per sample."""
    GOODPUT = "goodput"
    """Samples/s times statistical efficiency; throughput at a fixed effective batch size."""
    MEMORY = "memory"
    """Least peak memory, without being slower than the baseline by more than `GateSpec.min_gain`."""
    ENERGY = "energy"
    """Samples per joule, from the GPU's own power reading."""


class MeasureSpec(Given):
    """How long one measurement lasts."""

    measure_s: float = Field(default=3.0, gt=0, le=LONGEST_S)
    """Longest steady-state measuring of an end-to-end probe."""
    compute_s: float = Field(default=1.0, gt=0, le=LONGEST_S)
    """The same for one compute or loader point."""
    min_steps: int = Field(default=8, ge=4, le=100_000)
    half_width: float = Field(default=0.01, gt=0)
    """Stop early once the interval is this narrow."""
    deadline_s: float = Field(default=300.0, gt=0, le=LONGEST_S)
    """Hard limit of one probe's process, by phase (see ProbeLimits)."""


class GateSpec(Given):
    """The ship gate: finalists against the baseline, interleaved, in fresh processes."""

    min_pairs: int = Field(default=6, ge=2, le=1000)
    max_pairs: int = Field(default=12, ge=2, le=1000)
    alpha: float = Field(default=0.05, gt=0, lt=1)
    """Error level, shared over the finalists and the looks at the data."""
    min_gain: float = Field(default=0.01, ge=0)
    finalists: int = Field(default=2, ge=1, le=100)
    measure_s: float = Field(default=3.0, gt=0, le=LONGEST_S)


class LrSpec(Given):
    """The lr stage: same samples, same noise, several seeds; may veto, replaces the baseline's lr only if `tune`."""

    enabled: bool = True
    tune: bool = False
    samples: int = Field(default=1024, ge=1)
    seeds: int = Field(default=2, ge=1, le=100)


class Tier(Given):
    """What a guide uses on GPUs with more than `above_gib` of memory; the first tier that fits the target holds."""

    above_gib: float = Field(ge=0)
    baseline: dict[str, Any] = Field(default_factory=dict)
    """As `StudyFile.baseline`, put over it."""
    options: dict[str, Scalar] = Field(default_factory=dict)
    """The guide's model sizes for this tier."""

    @field_validator("options")
    @classmethod
    def _preset_comes_first(cls, value: dict[str, Scalar]) -> dict[str, Scalar]:
        if "preset" in value:
            raise ValueError("the preset is chosen before the tier; name it with --preset or in options")
        return value


class Targets(Given):
    """What a guide wants to see; reported beside what was measured, never a gate."""

    gpu_utilisation_min: float | None = Field(default=None, ge=0, le=1)
    gpu_utilisation_max: float | None = Field(default=None, ge=0, le=1)
    memory_share_max: float | None = Field(default=None, ge=0, le=1)
    """Of the target GPU's memory."""
    data_wait_max: float | None = Field(default=None, ge=0, le=1)
    """Of a step's time."""
    speedup_min: float | None = Field(default=None, gt=0)
    """Gain over the baseline that the guide promises."""


class QualityConstraint(Given):
    """The condition under which a study may change the model itself (`space.options`): quality after equal samples must
    not be worse than the baseline model's by more than `tolerance`, over all seeds."""

    metric: str
    """A name from the workload's `evaluate` or `assess`."""
    higher_is_better: bool = True
    tolerance: float = Field(default=0.0, ge=0)
    """Absolute, in the metric's own unit."""
    samples: int = Field(ge=1)
    """How long each candidate is trained."""
    seeds: int = Field(default=2, ge=2, le=100)


class StudyFile(Given):
    """studies/<workload>/study.yaml as written by hand. `baseline` holds only what differs from the workload's own."""

    workload: str
    options: dict[str, Scalar] = Field(default_factory=dict)
    baseline: dict[str, Any] = Field(default_factory=dict)
    space: SearchSpace = SearchSpace()
    budget_s: float = Field(default=360.0, gt=0, le=LONGEST_S)
    measure: MeasureSpec = MeasureSpec()
    gate: GateSpec = GateSpec()
    lr: LrSpec = LrSpec()
    quality: QualityConstraint | None = None
    targets: Targets = Targets()
    tiers: tuple[Tier, ...] = ()
    """From the largest memory down. A GPU below the last of them keeps the baseline as it is; a CPU takes the last."""
    presets: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Preset name -> the same keys again, replacing those above for that preset."""

    @model_validator(mode="after")
    def _no_silent_change_of_the_model(self) -> StudyFile:
        if self.space.options and self.quality is None:
            names = ", ".join(self.space.options)
            raise ValueError(
                f"space.options changes the model itself ({names}); name the condition under which that is allowed: "
                "quality: {metric: ..., tolerance: ..., samples: ...}"
            )
        return self

    @field_validator("tiers")
    @classmethod
    def _from_the_largest_down(cls, value: tuple[Tier, ...]) -> tuple[Tier, ...]:
        for upper, lower in itertools.pairwise(value):
            if lower.above_gib >= upper.above_gib:
                raise ValueError(
                    f"tiers go from the largest memory down, but above_gib {lower.above_gib:g} comes after "
                    f"{upper.above_gib:g}; the first that is below the GPU's memory holds"
                )
        return value


class StudySpec(Given):
    """Everything `next_probe` and `select` need besides the rows."""

    name: Name
    workload: str
    options: dict[str, Scalar] = Field(default_factory=dict)
    target: GpuProfile
    device: DeviceInfo
    """The machine measured on."""
    baseline: RunConfig
    space: SearchSpace
    dropped: tuple[Dropped, ...] = ()
    effective_batch: int | None = Field(default=None, ge=1)
    """The size that is kept; None = free, taken from `space.effective_batch_size`."""
    batch_coupled: bool = False
    probes_alone: bool = True
    """Parts of a training can be probed alone (loader, compute, trace, equivalence). False: end-to-end probes only, as
    in a plain Optuna study; the same points are then asked end to end, and the models learn from those."""
    memory_budget_bytes: int = Field(ge=1)
    """The gate: the smaller of the target's memory (less a margin) and what was free here."""
    memory_cap_bytes: int | None = None
    """When set, every probe runs under this hard cap (growth above the imported process on a CPU)."""
    objective: Objective = Objective.TIME
    sampler: SamplerName = SamplerName.STAGED
    budget_s: float = Field(gt=0)
    max_probes: int | None = Field(default=None, ge=1)
    """Upper bound on probes of the search, the ship gate not counted."""
    measure: MeasureSpec = MeasureSpec()
    gate: GateSpec = GateSpec()
    lr: LrSpec = LrSpec()
    quality: QualityConstraint | None = None
    targets: Targets = Targets()
    tier: str = ""
    """The guide's tier that holds for the target, in words; empty = none."""
    data: tuple[Fingerprint, ...] = ()
    """What the options name, by content and where it lies now; `options` and the rows keep their first paths."""
    data_changes: tuple[str, ...] = ()
    """In words, what of it has been changed since the first probe, and was accepted."""
    aa: bool = False
    """The baseline tuned against itself: every probe runs the baseline, so any gain found is a false one."""
    seed: int = 0

    @model_validator(mode="after")
    def _one_workload(self) -> Self:
        if self.baseline.workload != self.workload:
            raise ValueError(f"baseline.workload: {self.baseline.workload!r} is not the study's ({self.workload!r})")
        return self

    @property
    def transferred(self) -> bool:
        """True when the target is not the device measured on: speed is then a figure of this machine alone."""
        if self.target.kind != self.device.kind:
            return True
        return self.target.kind == "cuda" and self.target.capability != self.device.capability

    @property
    def transfer(self) -> Literal["measured", "unverified"]:
        return "unverified" if self.transferred else "measured"

    def in_place(self, config: RunConfig) -> RunConfig:
        """`config` with the data where they lie now."""
        return config.model_copy(update={"options": placed(config.options, self.options, self.data)})

    def label(self, config: RunConfig) -> str:
        """`RunConfig.label`, and the options that this study searches."""
        return f"{config.label} {options_text(config.options, self.space.options)}".rstrip()

    def memory_used(self, peak: MemoryPeak) -> float:
        """Share of the memory budget a peak takes; above 1.0 the configuration does not fit.

        Under a hard cap on a CPU the cap is on growth above the imported process, so that is what counts.
        """
        if self.memory_cap_bytes is not None and peak.reserved_bytes is None:
            return (peak.gate_bytes - peak.base_bytes) / (self.memory_cap_bytes * MEMORY_MARGIN)
        return peak.gate_bytes / self.memory_budget_bytes
