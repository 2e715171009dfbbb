"""What a probe measured, raw. Statistics are computed when read (`tuner.contract.statistics`)."""

from __future__ import annotations

from enum import StrEnum

from pydantic import Field

from tuner.contract.base import Frozen


class Outcome(StrEnum):
    """How a probe ended. Every exit of a child process maps to exactly one of these."""

    OK = "ok"
    OOM_DEVICE = "oom_device"
    OOM_HOST = "oom_host"
    DIVERGED = "diverged"
    TIMEOUT = "timeout"
    UNSUPPORTED = "unsupported"
    COMPILE_ERROR = "compile_error"
    LOADER_ERROR = "loader_error"
    BAD_INPUT = "bad_input"
    CRASHED = "crashed"
    NO_RESULT = "no_result"
    CONTENDED = "contended"

    @property
    def is_oom(self) -> bool:
        return self in (Outcome.OOM_DEVICE, Outcome.OOM_HOST)


class Interval(Frozen):
    """A value and the range it lies in with the given confidence."""

    value: float
    low: float
    high: float
    confidence: float = 0.95


class ByteRange(Frozen):
    """Bytes, and the range they lie in."""

    value: int = Field(ge=0)
    low: int = Field(ge=0)
    high: int = Field(ge=0)


class EvaluationPart(Frozen):
    """How much of the validation split a soak evaluated, and what all of it takes."""

    batches: int = Field(ge=0)
    """Micro-batches of the whole evaluation."""
    seen: int = Field(ge=0)
    """Those that were evaluated."""
    seconds: float = Field(ge=0)
    """Of one whole evaluation; in proportion where a part was evaluated."""
    held: ByteRange | None = None
    """Where a part was evaluated: bytes held at the peak with all of it, extrapolated (host memory, or reserved on a
    GPU). None = the peak was measured."""

    @property
    def words(self) -> str:
        """What a peak with this evaluation stands on."""
        if self.held is None:
            return "peak of the whole evaluation"
        return f"extrapolated from {self.seen:,} of {self.batches:,} evaluation batches"


class MemoryPeak(Frozen):
    """Bytes at the peak. The gate is on `gate_bytes`."""

    process_bytes: int = Field(ge=0)
    """Resident host memory of the probe's process at its peak (VmHWM)."""
    base_bytes: int = Field(default=0, ge=0)
    """Resident host memory before the model was built: what the imports cost."""
    allocated_bytes: int | None = None
    """CUDA allocator: live tensors at the peak."""
    reserved_bytes: int | None = None
    """CUDA allocator: memory held from the device at the peak."""
    context_bytes: int | None = None
    """Device memory used outside the allocator (CUDA context, libraries), where NVML or mem_get_info tells."""

    evaluation: EvaluationPart | None = None
    """The evaluation among what was done, in a soak; None = there was none."""

    @property
    def gate_bytes(self) -> int:
        """Reserved + context on a GPU; resident host memory without one; extrapolated where that is larger."""
        return self.gate_range.value

    @property
    def gate_range(self) -> ByteRange:
        """`gate_bytes`, and how far it is known; a peak that was measured is known exactly."""
        outside = (self.context_bytes or 0) if self.reserved_bytes is not None else 0
        seen = (self.reserved_bytes if self.reserved_bytes is not None else self.process_bytes) + outside
        held = self.evaluation.held if self.evaluation is not None else None
        if held is None:
            return ByteRange(value=seen, low=seen, high=seen)
        value, low, high = (max(seen, item + outside) for item in (held.value, held.low, held.high))
        return ByteRange(value=value, low=low, high=high)


class Telemetry(Frozen):
    """Means over the measured steps; None = unknown, never 0."""

    gpu_utilization: float | None = None
    """Share of time, 0..1, in which a kernel ran."""
    power_w: float | None = None
    """From the GPU's energy counter where it has one, otherwise the mean of its power readings."""
    sm_clock_mhz: float | None = None
    temperature_c: float | None = None
    throttled: bool | None = None
    other_processes: int | None = None
    """Other processes on the GPU."""
    host_load: float | None = None
    """1-minute load average per core when the probe began."""
    swap_used_bytes: int | None = None
    cpu_throttled: float | None = None
    """Share, 0..1, of the periods of a container's CPU quota in which it held the container back; None = no quota."""


class Environment(Frozen):
    """Where a measurement was taken. Two measurements compare only where these agree."""

    tuner: str
    python: str
    torch: str
    cuda: str | None = None
    driver: str | None = None
    device: str
    """`cpu` or the GPU's name."""
    capability: tuple[int, int] | None = None
    cpu: str
    cpu_count: int
    threads: int
    host: str = ""
    platform: str = ""


class Measurement(Frozen):
    """Raw figures of one measured configuration; one entry per optimizer step, warm-up included."""

    samples_per_step: int = Field(ge=1)
    step_s: tuple[float, ...]
    """Wall seconds of each step, from the end of the step before (data wait and whatever else came between included,
    but no break). For loader probes: per batch."""
    data_wait_s: tuple[float, ...] = ()
    """Part of each step spent waiting for the loader."""
    losses: dict[str, tuple[float, ...]] = Field(default_factory=dict)
    """Weighted mean of each loss term per step; `total` is what was differentiated."""
    warmup_steps: int = Field(default=0, ge=0)
    """Leading entries of `step_s` that are not steady state, judged and not assumed."""
    round_steps: int = Field(default=1, ge=1)
    """Entries after which every loader worker has delivered as often as the others. Workers in step with each other
    deliver in bursts, so only whole rounds have a throughput."""
    memory: MemoryPeak
    phases_s: dict[str, float] = Field(default_factory=dict)
    """Seconds by phase: start, import, build, compile, warmup, measure, teardown (those that occurred)."""
    reference_s: tuple[float, ...] = ()
    """Seconds of a fixed piece of work, done where the configuration did not run (before the first step and after the
    last, on one thread, no loader worker at work): the host's own speed."""
    telemetry: Telemetry | None = None
    parameters: int | None = None
    flops_per_sample: float | None = None
    """Forward + backward, counted on the model."""

    @property
    def steady_step_s(self) -> tuple[float, ...]:
        return self.step_s[self.warmup_steps :]

    @property
    def duties_s(self) -> dict[str, float]:
        """`phases_s` of a soak as production will have them: the evaluation is that of the whole split."""
        evaluation = self.memory.evaluation
        return self.phases_s if evaluation is None else {**self.phases_s, "evaluate": evaluation.seconds}
