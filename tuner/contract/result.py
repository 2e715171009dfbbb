"""What `--json` prints: one object on stdout. Published as JSON Schema in docs/schema/."""

from __future__ import annotations

import json
import math
from typing import Any, Literal

from pydantic import Field

from tuner.contract.base import Frozen
from tuner.contract.choice import Confirmation, FellBack
from tuner.contract.config import RunConfig
from tuner.contract.measurement import Interval, Outcome
from tuner.contract.promise_check import PeakVerdict, Verdict
from tuner.contract.space import Dropped
from tuner.contract.study import Objective
from tuner.contract.tuned import Origin
from tuner.contract.workload import Trivial


class SideResult(Frozen):
    config: RunConfig
    samples_per_s: Interval | None
    peak_bytes: int | None


class TargetResult(Frozen):
    """One of the guide's targets beside what the configuration to ship reached."""

    name: str
    wanted: str
    """`< 80 %`, `> 2x`."""
    value: float | None
    """In the unit of the limit (a share, or a ratio); null = unknown."""
    verdict: Literal["ok", "missed", "unknown"]
    note: str = ""
    """Why it is unknown, or what stands in for it."""


class AaResult(Frozen):
    """`tuner optimize --aa`: what tuning the baseline against itself came to."""

    false_gain: bool
    search_maximum: float | None
    """The best figure of the search over the baseline's own: the gain that picking the maximum would have claimed."""


class OptimizeResult(Origin):
    """`tuner optimize --json`."""

    decision: Literal["winner", "no_gain", "failed"]
    notes: tuple[str, ...]
    probes: dict[str, int]
    """How many probes ended with which outcome."""
    dropped: tuple[Dropped, ...]
    baseline: SideResult | None
    winner: SideResult | None
    gain: Interval | None
    speedup: Interval | None = None
    """Samples/s over the baseline's, from the same pairs, whatever the objective."""
    objective: Objective = Objective.TIME
    break_even_samples: int | None = None
    """After this many samples the time saved has paid for the tuning; null = never, or nothing was gained."""
    aa: AaResult | None = None
    """Only of an A/A run."""
    targets: tuple[TargetResult, ...] = ()
    """What the guide wants to see; empty = the study names no targets."""
    config_path: str | None
    storage: str
    """The store's URL, its password hidden."""
    seconds: dict[str, float]
    """Wall seconds by phase: setup, prepare, each stage of the search, gate, total."""


class TrainResultJson(Frozen):
    """`tuner train --json`."""

    run: str
    out_dir: str
    samples: int
    finished: bool
    reason: str
    resumed_from: int
    elapsed_s: float
    step_s: float | None = None
    """Of one optimizer step at steady state; null = too short to say."""
    steps_per_epoch: float | None = None
    epochs_per_min: float | None = None
    samples_per_s: Interval | None
    promised_samples_per_s: Interval | None
    host_drift: float | None
    """How much faster the host was than when the promise was made; 0.95 = 5 % slower; null = unknown."""
    deviation: float | None
    """reached / promised - 1."""
    deviation_beyond_drift: float | None
    """reached / promised / host_drift - 1: what the promise is judged by on a machine without a GPU."""
    verdict: Verdict | None
    """Of the throughput, beyond the drift where that is known: `kept` = inside the promised interval, `above` = faster
    (kept and exceeded), `below` = slower than its lower end: not kept; null = nothing was promised, or measured."""
    peak_bytes: int
    promised_peak_bytes: int | None
    peak_deviation: float | None
    peak_verdict: PeakVerdict | None
    """`within` the promised peak's error bar (or below it), or `above` it."""
    losses: dict[str, float]
    metrics: dict[str, float]
    """The last evaluation's figures, and the last assessment's."""
    trivial: dict[str, Trivial] = Field(default_factory=dict)
    """Metric -> what it would be without learning anything, and how that comes about."""
    best: dict[str, float] = Field(default_factory=dict)
    """Of the metric the configuration judges by: its best `value`, and the `samples` it was reached at."""
    skipped_steps: int = 0
    """Updates left out, as their loss or gradient was not finite."""
    not_finite_steps: int = 0
    """Steps whose loss was not finite."""
    confirmed: Confirmation | None = None
    """The configurations measured on this machine before the run, and the choice; null = none were."""
    fallbacks: tuple[FellBack, ...] = ()
    """Changes of configuration in the middle of the run, as memory ran out."""


class RunLine(Frozen):
    """One production run in `tuner runs --json`: promise and reality."""

    run: str
    workload: str
    label: str
    """Its configuration in one line."""
    study: str | None
    status: Literal["running", "finished", "stopped", "failed", "died"]
    """`died`: it says `running`, but its process is gone."""
    resumable: bool
    """Would the same command go on from a checkpoint?"""
    reason: str
    """Why it ended; empty while it runs, or when nobody was left to say."""
    out_dir: str
    started_at: str
    finished_at: str
    samples: int | None
    """null = its folder was gone on with, or is not here."""
    goal_samples: int
    samples_per_s: float | None
    """Reached, at steady state."""
    samples_per_s_interval: Interval | None
    """Only of a run that has told its result."""
    promised_samples_per_s: Interval | None
    host_drift: float | None
    deviation: float | None
    deviation_beyond_drift: float | None
    verdict: Verdict | None
    peak_bytes: int | None
    promised_peak_bytes: int | None
    peak_deviation: float | None
    peak_verdict: PeakVerdict | None
    loss: float | None
    metrics: dict[str, float | None]
    command: str
    """What goes on with it; empty where its folder does not tell."""


class RunsResult(Frozen):
    """`tuner runs --json`: newest first."""

    runs: tuple[RunLine, ...]
    more: int
    """How many older ones were left out by --limit."""


class CurvePoint(Frozen):
    samples: int
    loss: float | None
    """null = not a finite number."""


class RunResult(RunLine):
    """`tuner runs ID --json`."""

    config: RunConfig
    curve: tuple[CurvePoint, ...]
    """The total loss at every log line of the run's whole course."""


class InferenceSpeed(Frozen):
    """One batch size of inference."""

    batch_size: int
    samples_per_s: float


class InferenceResult(Frozen):
    """Prediction without gradients, the batch's way to the device included. No figures unless the outcome is ok."""

    outcome: Outcome
    message: str = ""
    latency_p50_s: float | None = None
    """Of a single sample."""
    latency_p95_s: float | None = None
    speeds: tuple[InferenceSpeed, ...] = ()
    """Up to the largest batch that fits."""
    peak_bytes: int | None = None
    """At the largest batch."""


class TrainingSpeed(Frozen):
    """One micro-batch size of training, without accumulation and without a loader."""

    micro_batch_size: int
    outcome: Outcome
    message: str = ""
    samples_per_s: Interval | None = None
    median_step_s: float | None = None
    peak_bytes: int | None = None


class BenchResult(Frozen):
    """`tuner bench --json`."""

    workload: str
    preset: str
    unit: str
    measured_on: str
    config: RunConfig
    """The baseline; for training only its micro-batch size is changed."""
    parameters: int | None
    prepare_cold_s: float
    """From an empty cache."""
    prepare_cached_s: float
    prepared_bytes: int
    """What it left in the cache."""
    inference: InferenceResult
    training: tuple[TrainingSpeed, ...]
    picture: str
    seconds: float


def plain_json(value: Frozen) -> str:
    """Valid JSON text (RFC 8259): what is not finite becomes null."""
    return json.dumps(_finite(json.loads(value.model_dump_json())), indent=2)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value
