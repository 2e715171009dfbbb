"""status.json of a production run, written from its events: what somebody who watches from outside needs to know.

It is replaced whole (written aside and moved), so a reader never sees half of it. It does not know the trainer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tuner.contract.config import RunConfig
from tuner.contract.liveness import Writer
from tuner.contract.measurement import Outcome
from tuner.contract.own_files import newest_checkpoint, replace_text
from tuner.contract.probe import (
    Event,
    NoticeEvent,
    PhaseEvent,
    PointReply,
    ProgressEvent,
    TrainEvent,
    TrainPlan,
    TrainResult,
)
from tuner.contract.production import STATUS_FILE, LiveStatus, RunStatus
from tuner.contract.promise_check import check_promise
from tuner.contract.result import plain_json
from tuner.contract.tuned import Promise

LEAST_S = 0.2
"""Log lines closer together than this share one writing."""


class StatusFile:
    """Told of every event of a run; raises OSError when the file cannot be written."""

    def __init__(self, config: RunConfig, plan: TrainPlan, goal: int, resumed_from: int) -> None:
        self._out = Path(plan.out_dir)
        self._promise = plan.promise
        self._pace = Pace()
        self._written = -math.inf
        self.reference: Callable[[], Sequence[float]] = tuple
        """The host's reference work so far, in seconds."""
        now = _now()
        self._status = LiveStatus(
            run=plan.run_id,
            workload=config.workload,
            label=config.label,
            status=RunStatus.RUNNING,
            writer=Writer.here(),
            started_at=now,
            updated_at=now,
            samples=resumed_from,
            resumed_from=resumed_from,
            goal_samples=goal,
            command=plan.command,
            **_promised(plan.promise),
        )
        self.write()

    def listen(self, event: Event) -> None:
        if isinstance(event, TrainEvent):
            self._change(self._line(event))
            if time.monotonic() - self._written >= LEAST_S:
                self.write()
        elif isinstance(event, ProgressEvent):
            self._change({"samples": max(event.done, self._status.samples)})
            self.write()
        elif isinstance(event, TrainResult):
            self._change(self._result(event))
            self.write()
        elif found := _news(event):
            self._change(found)
            self.write()

    def figures(self, found: Mapping[str, float]) -> None:
        """New validation figures; the next writing has them."""
        self._change({"metrics": {**self._status.metrics, **_finite(found)}})

    def write(self) -> None:
        self._change({"updated_at": _now(), "checkpoint": newest_checkpoint(self._out)})
        replace_text(self._out / STATUS_FILE, plain_json(self._status) + "\n")
        self._written = time.monotonic()

    def _change(self, update: Mapping[str, Any]) -> None:
        self._status = self._status.model_copy(update=dict(update))

    def _line(self, line: TrainEvent) -> dict[str, Any]:
        self._pace.take(line)
        left = max(0, self._status.goal_samples - line.samples)
        return {
            **_plain(line),
            "eta_s": left / self._pace.mean if self._pace.mean else None,
            "mean_samples_per_s": self._pace.mean,
            **self._held(self._pace.steady, self.reference(), line.peak_bytes),
        }

    def _result(self, result: TrainResult) -> dict[str, Any]:
        """The end, with the figures that the result is judged by."""
        measured = result.measurement
        mean = None
        if steps := measured.steady_step_s:
            mean = measured.samples_per_step * len(steps) / sum(steps)
        return {
            "status": RunStatus.FINISHED if result.finished else RunStatus.STOPPED,
            "reason": result.reason,
            "samples": result.samples,
            "step": result.step,
            "eta_s": 0.0 if result.finished else None,
            "metrics": _finite(result.metrics),
            "mean_samples_per_s": mean,
            "peak_bytes": measured.memory.gate_bytes,
            **self._held(mean, measured.reference_s, measured.memory.gate_bytes),
        }

    def _held(self, mean: float | None, reference_s: Sequence[float], peak_bytes: int) -> dict[str, Any]:
        """The promise against what was reached so far."""
        return dict(check_promise(self._promise, mean, reference_s, peak_bytes))


class Pace:
    """Mean throughput over log lines. The first line holds the warm-up, so it counts only while it is alone."""

    def __init__(self) -> None:
        self._first: TrainEvent | None = None
        self._samples = 0
        self._seconds = 0.0
        self._last = 0

    def take(self, line: TrainEvent) -> None:
        if self._first is None:
            self._first = line
        elif line.samples_per_s > 0:
            self._samples += line.samples - self._last
            self._seconds += (line.samples - self._last) / line.samples_per_s
        self._last = line.samples

    @property
    def steady(self) -> float | None:
        """Samples per second without the first line; None before the second."""
        return self._samples / self._seconds if self._seconds > 0 else None

    @property
    def mean(self) -> float | None:
        """The best that is known so far; None before the first line."""
        return self.steady or (self._first.samples_per_s if self._first is not None else None)


def _promised(promise: Promise | None) -> dict[str, Any]:
    if promise is None:
        return {}
    rate = promise.samples_per_s
    ends = _finite({"promised_low": rate.low, "promised_high": rate.high})
    return {"promised_samples_per_s": rate.value, "promised_peak_bytes": promise.peak_bytes, **ends}


def _news(event: Event) -> dict[str, Any]:
    """What an event changes that is no log line, no sign of life and no result; empty = nothing."""
    if isinstance(event, PhaseEvent):
        return {"phase": event.phase}
    if isinstance(event, NoticeEvent) and event.level == "warning":
        return {"warning": event.text}
    if isinstance(event, PointReply) and event.outcome is not Outcome.OK:
        return {"status": RunStatus.FAILED, "reason": f"{event.outcome.value}: {event.message}", "eta_s": None}
    return {}


def _plain(line: TrainEvent) -> dict[str, Any]:
    same = {"samples", "step", "elapsed_s", "samples_per_s", "lr", "data_wait", "peak_bytes"}
    return {**line.model_dump(include=same), "losses": _finite(line.losses)}


def _finite(found: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in found.items()}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
