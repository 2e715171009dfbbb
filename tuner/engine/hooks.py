"""What may look on while a trainer runs: the one difference between a probe and production."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tuner.contract.probe import Event, PhaseEvent, ProgressEvent

if TYPE_CHECKING:
    from tuner.engine.step import StepResult
    from tuner.engine.trainer import Trainer

Emit = Callable[[Event], None]


class Hook:
    """Does nothing. Seconds spent in `after_step` belong to the next step, as they do for the user; what is to be in no
    step is done within `Phases.during`."""

    def on_start(self, trainer: Trainer) -> None:
        """Before the first step of this run."""

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """After every step; `trainer.stop(reason)` ends the run at this border."""

    def on_end(self, trainer: Trainer) -> None:
        """After the last step of a run that was not ended by an exception."""


class Phases:
    """Tells which phase begins, and adds up the seconds of each."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self._name = ""
        self._since = time.monotonic()
        self._seconds: dict[str, float] = {}
        self.on_break: Callable[[], None] = lambda: None
        """Told when a phase within another begins: what is done in it is no part of a step."""

    @property
    def current(self) -> str:
        return self._name

    def enter(self, name: str) -> None:
        if name != self._name:
            self._close()
            self._name = name
            self._emit(PhaseEvent(phase=name))

    @contextmanager
    def during(self, name: str) -> Iterator[None]:
        """A phase within another, which goes on afterwards."""
        self.on_break()
        before = self._name
        self.enter(name)
        try:
            yield
        finally:
            if before:
                self.enter(before)

    def seconds(self) -> dict[str, float]:
        self._close()
        return dict(self._seconds)

    def _close(self) -> None:
        now = time.monotonic()
        if self._name:
            self._seconds[self._name] = self._seconds.get(self._name, 0.0) + now - self._since
        self._since = now


class Heartbeat(Hook):
    """A sign of life every few seconds, so that slow steps are not taken for a hang."""

    def __init__(self, emit: Emit, total: int, text: str = "", every_s: float = 2.0) -> None:
        self._emit = emit
        self._total = total
        self._text = text
        self._every_s = every_s
        self._last = time.monotonic()

    def after_step(self, trainer: Trainer, result: StepResult) -> None:  # noqa: ARG002
        now = time.monotonic()
        if now - self._last >= self._every_s:
            self._last = now
            self._emit(ProgressEvent(done=trainer.samples, total=self._total, text=self._text))


class Every:
    """True each time another `samples` have gone by; never for 0."""

    def __init__(self, samples: int, start: int = 0) -> None:
        self._every = samples
        self._last = start

    def due(self, samples: int) -> bool:
        if not self._every or samples // self._every <= self._last // self._every:
            return False
        self._last = samples
        return True
