"""What production does between steps: checkpoints, evaluation, samples, the host's reference, and stopping in time.

None of it touches the training's random state, and none of its time is in a step.
"""

from __future__ import annotations

import contextlib
import csv
import math
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from tuner.contract.config import Cadence
from tuner.contract.errors import TunerError
from tuner.contract.probe import NoticeEvent
from tuner.engine.checkpoint import Checkpointer, CheckpointError
from tuner.engine.hooks import Emit, Every, Hook, Phases
from tuner.engine.journal import Journal
from tuner.engine.loader import to_device, valid_batches
from tuner.engine.reference import HostReference
from tuner.engine.step import StepResult
from tuner.engine.table import draw_curves
from tuner.engine.trainer import Trainer

SIGNALS = ("SIGTERM", "SIGUSR1", "SIGINT")
RAREST = 5.0
"""How many times rarer than at first the host's reference is taken in a long run."""


@contextlib.contextmanager
def aside(trainer: Trainer) -> Iterator[None]:
    """Maintenance: no gradients, and the random state as it was afterwards."""
    devices = [trainer.device] if trainer.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        yield


def evaluate(trainer: Trainer, limit: int | None = None) -> dict[str, float]:
    """The workload's own figures of the (averaged) model on the validation split."""
    model, was_training = trainer.effective_model, trainer.effective_model.training
    model.eval()
    try:
        with aside(trainer), trainer.arithmetic.autocast():
            found: Mapping[str, float] = trainer.workload.evaluate(model, _batches(trainer, limit))
            return {name: float(value) for name, value in found.items()}
    finally:
        model.train(was_training)


def _batches(trainer: Trainer, limit: int | None) -> Iterator[dict[str, torch.Tensor]]:
    for batch in valid_batches(trainer.workload, trainer.config, limit):
        yield to_device(batch, trainer.device, channels_last=trainer.config.channels_last)


def write_samples(trainer: Trainer, folder: Path) -> list[Path]:
    """Sample files of the (averaged) model; empty when the workload makes none."""
    if not hasattr(trainer.workload, "sample"):
        return []
    model, was_training = trainer.effective_model, trainer.effective_model.training
    model.eval()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with aside(trainer):
            return [Path(path) for path in trainer.workload.sample(model, folder, trainer.config.seed)]
    finally:
        model.train(was_training)


class Keeper(Hook):
    """Checkpoints at their cadence and at the end; never one whose loss or parameters are not finite."""

    def __init__(
        self, checkpointer: Checkpointer, cadence: Cadence, journal: Journal, phases: Phases, emit: Emit, extra: Any
    ) -> None:
        self._checkpointer = checkpointer
        self._cadence = cadence
        self._journal = journal
        self._phases = phases
        self._emit = emit
        self._extra = extra
        self._every = Every(0)
        self._saved_at = -1

    def on_start(self, trainer: Trainer) -> None:
        self._every = Every(self._cadence.checkpoint_samples, trainer.samples)
        self._saved_at = trainer.samples

    def after_step(self, trainer: Trainer, result: StepResult) -> None:  # noqa: ARG002
        if self._every.due(trainer.samples):
            try:
                self.save(trainer)
            except CheckpointError as error:
                self._emit(NoticeEvent(level="warning", text=f"{error}; the run goes on without it"))

    def on_end(self, trainer: Trainer) -> None:
        self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Raises CheckpointError."""
        if trainer.samples == self._saved_at:
            return
        if not (self._journal.healthy() and _all_finite(trainer)):
            text = f"no checkpoint at {trainer.samples} samples: the loss or the weights are not finite"
            self._emit(NoticeEvent(level="warning", text=text))
            return
        with self._phases.during("checkpoint"):
            self._checkpointer.save({**trainer.state_dict(), **self._extra})
        self._saved_at = trainer.samples


def _all_finite(trainer: Trainer) -> bool:
    with torch.no_grad():
        return all(bool(torch.isfinite(parameter).all()) for parameter in trainer.parameters)


class Evaluator(Hook):
    """Evaluates at its cadence and at the end; `metrics` are the last figures, evaluations.csv has all."""

    def __init__(self, cadence: Cadence, out_dir: Path, phases: Phases, emit: Emit) -> None:
        self._cadence = cadence
        self._path = out_dir / "evaluations.csv"
        self._phases = phases
        self._emit = emit
        self._every = Every(0)
        self._at = -1
        self.metrics: dict[str, float] = {}

    def on_start(self, trainer: Trainer) -> None:
        self._every = Every(self._cadence.evaluate_samples, trainer.samples)
        self._at = trainer.samples

    def after_step(self, trainer: Trainer, result: StepResult) -> None:  # noqa: ARG002
        if self._every.due(trainer.samples):
            self._evaluate(trainer)

    def on_end(self, trainer: Trainer) -> None:
        if self._cadence.evaluate_samples and trainer.samples != self._at:
            self._evaluate(trainer)

    def _evaluate(self, trainer: Trainer) -> None:
        self._at = trainer.samples
        with self._phases.during("evaluate"):
            self.metrics = evaluate(trainer)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in self.metrics.items())
        self._emit(NoticeEvent(text=f"evaluated at {trainer.samples:,} samples: {shown}"))
        with contextlib.suppress(OSError):
            fresh = not self._path.exists()
            with self._path.open("a", newline="", encoding="utf-8") as target:
                writer = csv.writer(target, lineterminator="\n")
                if fresh:
                    writer.writerow(["samples", *self.metrics])
                writer.writerow([trainer.samples, *(f"{value:.9g}" for value in self.metrics.values())])


class Pictures(Hook):
    """Samples and curves at the sample cadence, and at the end."""

    def __init__(self, cadence: Cadence, out_dir: Path, journal: Journal, phases: Phases, emit: Emit) -> None:
        self._cadence = cadence
        self._out_dir = out_dir
        self._journal = journal
        self._phases = phases
        self._emit = emit
        self._every = Every(0)
        self._at = -1

    def on_start(self, trainer: Trainer) -> None:
        self._every = Every(self._cadence.sample_samples, trainer.samples)
        self._at = trainer.samples

    def after_step(self, trainer: Trainer, result: StepResult) -> None:  # noqa: ARG002
        if self._every.due(trainer.samples):
            self._draw(trainer)

    def on_end(self, trainer: Trainer) -> None:
        if trainer.samples != self._at:
            self._draw(trainer, samples=self._cadence.sample_samples > 0)

    def _draw(self, trainer: Trainer, *, samples: bool = True) -> None:
        """A picture that cannot be written is told, and never ends the run."""
        self._at = trainer.samples
        try:
            if samples:
                with self._phases.during("sample"):
                    self._tell(write_samples(trainer, self._out_dir / "samples" / f"{trainer.samples:012d}"))
            draw_curves(self._journal.table.rows(), self._out_dir / "curves.png")
        except (OSError, TunerError) as error:
            self._emit(NoticeEvent(level="warning", text=f"pictures at {trainer.samples:,} samples failed: {error}"))

    def _tell(self, files: list[Path]) -> None:
        if files:
            self._emit(NoticeEvent(text=f"{len(files)} sample file(s) in {files[0].parent}"))


class ReferenceWork(Hook):
    """The host's own speed (CPU only): often in a short run, more and more rarely, down to a fifth, in a long one."""

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._work: HostReference | None = None
        self._began = self._last = time.monotonic()
        self.seconds: list[float] = []

    def on_start(self, trainer: Trainer) -> None:
        if trainer.device.type == "cpu":
            self._work = HostReference()
            self._began = self._last = time.monotonic()

    def after_step(self, trainer: Trainer, result: StepResult) -> None:  # noqa: ARG002
        now = time.monotonic()
        if self._work is not None and now - self._last >= self._interval_s(now - self._began):
            self._measure()

    def on_end(self, trainer: Trainer) -> None:  # noqa: ARG002
        if self._work is not None:
            self._measure()

    def _interval_s(self, elapsed_s: float) -> float:
        return min(RAREST * self._every_s, max(self._every_s, elapsed_s / 60))

    def _measure(self) -> None:
        assert self._work is not None
        self.seconds.append(self._work.measure())
        self._last = time.monotonic()


class Deadline(Hook):
    """Ends the run after `max_seconds` of this process's training."""

    def __init__(self, max_seconds: float | None) -> None:
        self._max_s = max_seconds if max_seconds is not None else math.inf
        self._began = time.monotonic()

    def on_start(self, trainer: Trainer) -> None:  # noqa: ARG002
        self._began = time.monotonic()

    def after_step(self, trainer: Trainer, result: StepResult) -> None:  # noqa: ARG002
        if time.monotonic() - self._began >= self._max_s:
            trainer.stop(f"stopped after {self._max_s:g} s as asked")


class StopFlag(Hook):
    """A signal only sets a flag; the run ends at the next step border, with a checkpoint."""

    def __init__(self) -> None:
        self.name = ""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopFlag:
        for name in SIGNALS:
            number = getattr(signal, name, None)
            if number is not None:
                with contextlib.suppress(ValueError):  # not the main thread: then nobody can stop us by signal
                    self._before[number] = signal.signal(number, self._raise)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def after_step(self, trainer: Trainer, result: StepResult) -> None:  # noqa: ARG002
        if self.name:
            trainer.stop(f"stopped by {self.name}")

    def _raise(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self.name = signal.Signals(number).name
