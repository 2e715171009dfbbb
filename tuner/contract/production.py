"""A production run as the store keeps it (what was promised, and what came of it), and as it shows itself while it
goes on."""

from __future__ import annotations

from enum import StrEnum

from pydantic import Field

from tuner.contract.base import Frozen
from tuner.contract.config import RunConfig
from tuner.contract.liveness import Writer
from tuner.contract.probe import TrainResult
from tuner.contract.promise_check import PeakVerdict, Verdict
from tuner.contract.tuned import Promise


class RunStatus(StrEnum):
    """`running` is also what a run is left at whose machine died; who looks for its process sees `died`."""

    RUNNING = "running"
    FINISHED = "finished"
    STOPPED = "stopped"
    FAILED = "failed"
    DIED = "died"
    """Seen, never stored: it says `running`, but its process is gone."""


class ProductionRun(Frozen):
    """One invocation of `tuner train`; a resumed job has one of these per invocation."""

    id: str
    study: str | None = None
    """The study its configuration came from."""
    config: RunConfig
    promise: Promise | None = None
    out_dir: str = ""
    started_at: str = ""
    """UTC, ISO 8601; for people, never for arithmetic."""
    finished_at: str = ""
    status: RunStatus = RunStatus.RUNNING
    result: TrainResult | None = None


STATUS_FILE, CONFIG_FILE = "status.json", "config.yaml"


class LiveStatus(Frozen):
    """status.json in a run's folder, for whoever watches from outside. It is replaced whole at every log line, at
    the beginning of every phase, every few seconds while steps go on, and at the end."""

    run: str = ""
    """The store's name for this invocation."""
    workload: str
    label: str
    """The configuration in one line."""
    status: RunStatus
    """As its writer knows it: whether the writer is still there, `writer` and `updated_at` tell."""
    reason: str = ""
    """Why it ended."""
    phase: str = ""
    """build, measure (= training), evaluate, sample, assess, checkpoint, teardown."""
    writer: Writer
    started_at: str
    """UTC, ISO 8601."""
    updated_at: str
    """UTC, ISO 8601. Without a sign of life for `silent_s` the run is no more."""
    silent_s: float = 1800.0
    """A worker that is silent for longer is ended by the command that started it."""
    samples: int = 0
    goal_samples: int
    step: int = 0
    resumed_from: int = 0
    elapsed_s: float = 0.0
    """Wall seconds of this invocation's training so far."""
    eta_s: float | None = None
    samples_per_s: float | None = None
    """Since the last log line."""
    mean_samples_per_s: float | None = None
    """Of this invocation, without its first log line (warm-up)."""
    losses: dict[str, float | None] = Field(default_factory=dict)
    """Means since the last log line; null = not a finite number."""
    lr: float = 0.0
    data_wait: float = 0.0
    metrics: dict[str, float | None] = Field(default_factory=dict)
    """The last validation figures."""
    peak_bytes: int = 0
    checkpoint: str = ""
    """The newest one, relative to the folder."""
    promised_samples_per_s: float | None = None
    promised_low: float | None = None
    """Samples per second: the lower end of the promised interval; null = it has none."""
    promised_high: float | None = None
    promised_peak_bytes: int | None = None
    host_drift: float | None = None
    """How much faster the host is than when the promise was made; null = unknown."""
    deviation: float | None = None
    """mean_samples_per_s / promised - 1."""
    deviation_beyond_drift: float | None = None
    """The same without what the host itself has become slower or faster by."""
    verdict: Verdict | None = None
    """The promise so far: inside its interval, above or below it, by what is known beyond the drift."""
    peak_deviation: float | None = None
    peak_verdict: PeakVerdict | None = None
    warning: str = ""
    """The last warning of this invocation."""
    command: str = ""
    """What a person types to go on with this run."""
