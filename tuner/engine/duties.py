"""What production does between steps: checkpoints, the host's reference, and stopping in time.

None of it touches the training's random state, and none of its time is in a step.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from tuner.contract.config import Cadence
from tuner.contract.probe import NoticeEvent
from tuner.engine.background import BackgroundWriter
from tuner.engine.checkpoint import Checkpointer, CheckpointError
from tuner.engine.hooks import Emit, Every, Hook, Phases
from tuner.engine.journal import Journal
from tuner.engine.reference import HostReference
from tuner.engine.step import StepResult
from tuner.engine.trainer import Trainer

RAREST = 5.0
"""How many times rarer than at first the host's reference is taken in a long run."""
WORKERS_REST_S = 0.5
"""Longest wait for the loader's workers to come to rest; what they make meanwhile is used afterwards."""


class Keeper(Hook):
    """Checkpoints at their cadence and at the end; never one whose loss or parameters are not finite.

    In the `background` the loop waits for a copy alone; the last one, and the best one, are always waited for.
    """

    def __init__(
        self,
        checkpointer: Checkpointer,
        cadence: Cadence,
        journal: Journal,
        phases: Phases,
        emit: Emit,
        extra: Mapping[str, Any],
        *,
        background: bool = False,
    ) -> None:
        self._checkpointer = checkpointer
        self._cadence = cadence
        self._journal = journal
        self._phases = phases
        self._emit = emit
        self._extra = extra
        self._every = Every(0)
        self._saved_at = -1
        self._writer = BackgroundWriter(checkpointer.save) if background else None
        self._writing = -1
        """Samples of the checkpoint that is being written beside the training."""

    def on_start(self, trainer: Trainer) -> None:
        self._every = Every(self._cadence.checkpoint_samples, trainer.samples)
        self._saved_at = trainer.samples

    def after_step(self, trainer: Trainer, result: StepResult) -> None:  # noqa: ARG002
        if self._writer is not None and self._writer.done:
            self.settle()
        if self._every.due(trainer.samples):
            try:
                self._save_beside(trainer) if self._writer is not None else self.save(trainer)
            except CheckpointError as error:
                self._go_on_without(error)

    def on_end(self, trainer: Trainer) -> None:
        self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Raises CheckpointError."""
        self.settle()
        if trainer.samples == self._saved_at or not self._sound(trainer):
            return
        with self._phases.during("checkpoint"), self._telling():
            self._checkpointer.save(self._state(trainer))
        self._saved_at = trainer.samples

    def save_best(self, trainer: Trainer, about: Mapping[str, Any]) -> bool:
        """Keep this moment as the best one; False when its state is not sound. Raises CheckpointError."""
        self.settle()
        if not self._sound(trainer):
            return False
        with self._phases.during("checkpoint"), self._telling():
            self._checkpointer.save_best(self._state(trainer), about)
        return True

    def settle(self) -> None:
        """Wait for the checkpoint that is being written beside the training, and tell when it could not be."""
        if self._writer is None or not self._writer.in_flight:
            return
        try:
            with self._phases.during("checkpoint"), self._telling():
                self._writer.wait()
            self._saved_at = self._writing
        except CheckpointError as error:
            self._go_on_without(error)

    def _save_beside(self, trainer: Trainer) -> None:
        """As `save`, but only the copy of the state is made here."""
        assert self._writer is not None
        self.settle()
        if trainer.samples == self._saved_at or not self._sound(trainer):
            return
        with self._phases.during("checkpoint"):
            self._writer.start(self._state(trainer))
        self._writing = trainer.samples

    def _state(self, trainer: Trainer) -> dict[str, Any]:
        return {**trainer.state_dict(), **self._extra, "log": self._journal.state_dict()}

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        """Afterwards it is told which checkpoints were given up for one that needed their space."""
        try:
            yield
        finally:
            names, self._checkpointer.given_up = self._checkpointer.given_up, []
            if names:
                place = f"the disk under {self._checkpointer.directory} is full"
                text = f"{place}: {', '.join(names)} given up for a newer checkpoint; free some space"
                self._emit(NoticeEvent(level="warning", text=text))

    def _go_on_without(self, error: CheckpointError) -> None:
        self._emit(NoticeEvent(level="warning", text=f"{error}; the run goes on without it"))

    def _sound(self, trainer: Trainer) -> bool:
        if self._journal.healthy() and _all_finite(trainer):
            return True
        text = f"no checkpoint at {trainer.samples} samples: the loss or the weights are not finite"
        self._emit(NoticeEvent(level="warning", text=text))
        return False


def _all_finite(trainer: Trainer) -> bool:
    with torch.no_grad():
        return all(bool(torch.isfinite(parameter).all()) for parameter in trainer.parameters)


class ReferenceWork(Hook):
    """The host's own speed (CPU only): often in a short run, more and more rarely, down to a fifth, in a long one.

    Taken in a break of its own, once the loader's workers have nothing to do: a worker at work would slow it, and be
    read as a slow host. Where they do not come to rest soon it is left out, and tried again later.
    """

    def __init__(self, every_s: float, phases: Phases) -> None:
        self._every_s = every_s
        self._phases = phases
        self._work: HostReference | None = None
        self._began = self._last = time.monotonic()
        self.seconds: list[float] = []

    def on_start(self, trainer: Trainer) -> None:
        if trainer.device.type == "cpu":
            self._work = HostReference()
            self._began = time.monotonic()
            self._measure(trainer)

    def after_step(self, trainer: Trainer, result: StepResult) -> None:  # noqa: ARG002
        now = time.monotonic()
        if self._work is not None and now - self._last >= self._interval_s(now - self._began):
            self._measure(trainer)

    def on_end(self, trainer: Trainer) -> None:
        trainer.close_loader()
        if self._work is not None:
            self._measure(trainer)

    def _interval_s(self, elapsed_s: float) -> float:
        return min(RAREST * self._every_s, max(self._every_s, elapsed_s / 60))

    def _measure(self, trainer: Trainer) -> None:
        assert self._work is not None
        with self._phases.during("reference"):
            if trainer.loader_rests(WORKERS_REST_S):
                self.seconds += self._work.measure()
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
    """A signal is only noted; the run ends at the next step border, with a checkpoint."""

    def on_start(self, trainer: Trainer) -> None:
        trainer.heed()

    def after_step(self, trainer: Trainer, result: StepResult) -> None:  # noqa: ARG002
        trainer.heed()
