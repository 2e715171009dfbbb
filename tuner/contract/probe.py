"""ProbeRequest in, a stream of events out: the words between the tuner and its worker processes.

One JSON object a line on a pipe of its own (never stdout). The last line of a good worker is `Finished`.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal, Protocol

from pydantic import Field, TypeAdapter

from tuner.contract.base import Frozen, Scalar, Words
from tuner.contract.config import RunConfig
from tuner.contract.fingerprint import Fingerprint
from tuner.contract.gpu import DeviceInfo
from tuner.contract.measurement import Environment, Interval, Measurement, Outcome
from tuner.contract.tuned import Promise
from tuner.contract.workload import Trivial, WorkloadInfo


class ProbeKind(StrEnum):
    DESCRIBE = "describe"
    """What is this machine, what is this workload. No points."""
    PREPARE = "prepare"
    """Data made ready and cached, once. No points."""
    LOADER = "loader"
    """Batches per second without a model."""
    COMPUTE = "compute"
    """Steps on resident batches, no loader; several points of one compile mode in one process."""
    TRACE = "trace"
    """Peak memory predicted without running (fake tensors)."""
    EQUIVALENCE = "equivalence"
    """Gradient of the first point against the second at the same samples: `relative_l2`, and why (`equivalence`)."""
    LR = "lr"
    """Loss at equal samples; one process per value and seed."""
    NOISE = "noise"
    """Gradient noise scale after `samples` samples of training: `noise_scale`, `gradient_sq`, `trace`."""
    QUALITY = "quality"
    """The validation metrics after training on equal samples; one process per point and seed."""
    PROFILE = "profile"
    """A few steps under torch.profiler: where the step's time goes; the trace is written to `out_dir`."""
    INFERENCE = "inference"
    """Latency and throughput of prediction, no gradients."""
    END_TO_END = "end_to_end"
    """The production loop for a few seconds, in a process of its own. An Optuna trial."""
    TRAIN = "train"
    """The production run itself."""


class Stage(StrEnum):
    """Where in the search a probe belongs."""

    SETUP = "setup"
    BASELINE = "baseline"
    EQUIVALENCE = "equivalence"
    NOISE = "noise"
    TRACE = "trace"
    LOADER = "loader"
    FLAGS = "flags"
    BATCH = "batch"
    VERIFY = "verify"
    POLISH = "polish"
    CONFIRM = "confirm"
    LR = "lr"
    QUALITY = "quality"
    SAMPLER = "sampler"
    GATE = "gate"
    SOAK = "soak"
    HAND = "hand"
    PRODUCTION = "production"


STOPPED_EARLY = "stopped on request before it had a result"
"""The message of a point whose process was told to end before it could save anything: the same command begins again."""
PREDICTED_USED = "predicted_memory_used"
"""Among the values of a point that ran out of memory: the share of the memory budget foretold for it."""
SAMPLES_REACHED = "samples"
"""Among the values of a production run that failed: where it had come to."""


class ProbeLimits(Frozen):
    measure_s: float = Field(default=3.0, gt=0)
    """Steady-state seconds per point at most."""
    min_steps: int = Field(default=8, ge=1)
    half_width: float = Field(default=0.01, gt=0)
    deadline_s: float = Field(default=300.0, gt=0)
    """Longest silence within one phase after which the process group is ended (a compile phase gets ten times it)."""
    peer_s: float = Field(default=30.0, gt=0)
    """With several ranks: one that is stopped (SIGSTOP) for so long is given up, and the others with it."""
    evaluate_s: float = Field(default=60.0, gt=0)
    """Seconds for a soak's evaluation; where the whole split would take longer, a part of it is evaluated and the peak
    is extrapolated."""
    memory_bytes: int | None = Field(default=None, ge=1)
    """Hard cap. CUDA: allocator limit. CPU: growth of the data segment above the imported process."""


class Expected(Frozen):
    """What a run may expect of itself on this very machine: the live watch warns when it is not so."""

    samples_per_s: Interval
    peak_bytes: int
    peak_high_bytes: int
    reference_s: tuple[float, ...] = ()
    """The host's reference work when the promise was made: tells a slower host from a slower run."""


class TrainPlan(Frozen):
    """What production needs besides the configuration."""

    out_dir: str
    max_samples: int | None = Field(default=None, ge=1)
    """Stop with a checkpoint after this many samples in total; None = the horizon."""
    max_seconds: float | None = Field(default=None, gt=0)
    keep: int = Field(default=2, ge=1)
    """Checkpoints kept."""
    background_checkpoints: bool = False
    """Write them beside the training: the loop waits for a copy of the state alone (as much memory again)."""
    reference_every_s: float = Field(default=2.0, gt=0)
    """Seconds between two measurements of the host's own drift (CPU only); up to five times as long in a long run."""
    expected: Expected | None = None
    """None = nothing is known about this machine."""
    watch_every_s: float = Field(default=10.0, gt=0)
    """Length of one window of the live watch."""
    stall_s: float = Field(default=30.0, gt=0)
    """So long without a batch is a stalled loader, and is said."""
    promise: Promise | None = None
    """What the configuration promises: written into the folder, and held against reality while the run goes on."""
    run_id: str = ""
    """The store's name for this invocation."""
    command: str = ""
    """What a person types to go on with this run."""
    tensorboard: bool = False
    """Write TensorBoard event files too."""
    data: tuple[Fingerprint, ...] = ()
    """What it learns from, by content. Where that is not what the folder's run has learned from, it is so knowingly."""


class ProbeRequest(Frozen):
    id: str
    """Unique in its study, and a pure function of what is asked: a rerun after a crash has the same id."""
    kind: ProbeKind
    stage: Stage = Stage.HAND
    workload: str
    options: dict[str, Scalar] = Field(default_factory=dict)
    points: tuple[RunConfig, ...] = ()
    limits: ProbeLimits = ProbeLimits()
    cache_dir: str = ""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    pair: int | None = None
    """Which interleaved round of the ship gate this belongs to."""
    soak: bool = False
    """Also evaluate, sample and write a checkpoint, so that the peak is production's."""
    samples: int | None = Field(default=None, ge=1)
    """LR and NOISE probes: how many samples to train on. LOADER: batches to fetch at most."""
    reference: bool = False
    """Interleave the host's reference work with the steps."""
    out_dir: str = ""
    """PROFILE: where the trace and the table go."""
    train: TrainPlan | None = None


class PointReply(Frozen):
    """The answer to one point of a request."""

    event: Literal["point"] = "point"
    index: int = 0
    outcome: Outcome
    message: Words = ""
    """One line: what happened. Empty when ok."""
    detail: Words = ""
    """Traceback or last log lines, for people who look closer."""
    measurement: Measurement | None = None
    values: dict[str, float] = Field(default_factory=dict)
    """Named scalars of special probes: relative_l2, predicted_peak_bytes, predicted_memory_used, final_loss."""
    environment: Environment | None = None
    seconds: float = 0.0
    """Wall seconds this point cost, its share of the process's fixed cost included (set by the runner)."""


class PhaseEvent(Frozen):
    """Begun: start, import, build, compile, warmup, measure, evaluate, sample, assess, checkpoint, or teardown."""

    event: Literal["phase"] = "phase"
    phase: str


class ProgressEvent(Frozen):
    event: Literal["progress"] = "progress"
    done: int
    total: int
    text: Words = ""

    @property
    def is_remark(self) -> bool:
        """Nothing is counted: something that a person should read once."""
        return bool(self.text) and self.done == self.total == 0


class DescribeEvent(Frozen):
    event: Literal["describe"] = "describe"
    device: DeviceInfo
    info: WorkloadInfo | None = None
    environment: Environment


class TrainEvent(Frozen):
    """One line of a production run's log."""

    event: Literal["train"] = "train"
    samples: int
    step: int
    elapsed_s: float
    """Wall seconds of this process's run so far."""
    samples_per_s: float
    """Steady-state throughput since the last line."""
    losses: dict[str, float] = Field(default_factory=dict)
    lr: float = 0.0
    data_wait: float = 0.0
    """Share of the time spent waiting for the loader."""
    peak_bytes: int = 0


class NoticeEvent(Frozen):
    """Something a person should read: a loss outside its band, a checkpoint that was damaged, samples written."""

    event: Literal["notice"] = "notice"
    level: Literal["info", "warning"] = "info"
    text: Words


class TrainResult(Frozen):
    """How a production run ended; steady-state figures over this process's part of it."""

    event: Literal["train_result"] = "train_result"
    samples: int
    step: int
    finished: bool
    """True at the horizon (or --max-samples); False when stopped before, resumable."""
    reason: str
    resumed_from: int = 0
    elapsed_s: float
    epoch_samples: int = 0
    """Samples of the training split; 0 = not told."""
    measurement: Measurement
    metrics: dict[str, float] = Field(default_factory=dict)
    """The last evaluation's figures, and the last assessment's."""
    trivial: dict[str, Trivial] = Field(default_factory=dict)
    """Metric -> what it would be without learning."""
    best: dict[str, float] = Field(default_factory=dict)
    """Where the configuration names a quality metric: its best `value`, and the `samples` it was reached at."""
    skipped_steps: int = 0
    """Updates left out, as their loss or gradient was not finite."""
    not_finite_steps: int = 0
    """Steps whose loss was not finite."""


class Finished(Frozen):
    """The worker has said all it had to say."""

    event: Literal["finished"] = "finished"
    phases_s: dict[str, float] = Field(default_factory=dict)


Event = Annotated[
    PointReply | PhaseEvent | ProgressEvent | DescribeEvent | TrainEvent | NoticeEvent | TrainResult | Finished,
    Field(discriminator="event"),
]
EVENT: TypeAdapter[Event] = TypeAdapter(Event)


class ProbeReply(Frozen):
    """What became of one request: one reply per point, always, whatever the process did."""

    request_id: str
    points: tuple[PointReply, ...]
    seconds: float
    """Wall seconds of the whole probe as the tuner saw it."""
    fixed_s: float = 0.0
    """Part of it outside building, compiling, warming up and measuring: spawn, import, teardown."""
    description: DescribeEvent | None = None
    train_result: TrainResult | None = None


class ProbeRow(Frozen):
    """One stored point: what the search sees of the past. Finished rows never change."""

    number: int
    """Gap-free within the study, from 0, in order of completion."""
    request_id: str
    index: int = 0
    """Which point of the request."""
    kind: ProbeKind
    stage: Stage
    config: RunConfig
    pair: int | None = None
    soak: bool = False
    outcome: Outcome
    message: str = ""
    detail: str = ""
    measurement: Measurement | None = None
    values: dict[str, float] = Field(default_factory=dict)
    environment: Environment | None = None
    seconds: float
    fixed_s: float = 0.0
    finished_at: str = ""
    """UTC, ISO 8601; for people, never for arithmetic."""
    trial: int | None = None
    """Number of the Optuna trial beside it."""


class Score(Frozen):
    """What a row means to a sampler: more is better, and overruns above zero are infeasible."""

    value: float | None
    """None = nothing was learned of the configuration."""
    overruns: dict[str, float] = Field(default_factory=dict)


class Listener(Protocol):
    """Told of every event of a running probe, as it arrives."""

    def __call__(self, event: Event) -> None: ...


class ProbeRunner(Protocol):
    """Runs requests. Never raises for what the probe did: outcomes are data."""

    def run(self, request: ProbeRequest, listener: Listener | None = None) -> ProbeReply: ...

    def close(self) -> None: ...
