"""Who looks on at a production run from outside: its folder's documents, status.json, metrics.jsonl, TensorBoard.

They live on the events that go to the parent anyway. What cannot be written is told once and never ends the run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tuner.contract.config import RunConfig
from tuner.contract.probe import Event, NoticeEvent, TrainEvent, TrainPlan
from tuner.engine.board import Board
from tuner.engine.failure import one_line
from tuner.engine.folder import write_documents
from tuner.engine.hooks import Emit
from tuner.engine.journal import numbers_of
from tuner.engine.lines import LOG, Lines
from tuner.engine.scores import Origin
from tuner.engine.status import StatusFile

if TYPE_CHECKING:
    from tuner.engine.trainer import Trainer


class Onlookers:
    """Passes every event on. Nothing is written before `begin`: until then the folder may be another run's."""

    def __init__(self, config: RunConfig, plan: TrainPlan, device: torch.device, emit: Emit) -> None:
        self._config = config
        self._plan = plan
        self._device = device
        self._emit = emit
        self._status: StatusFile | None = None
        self._lines: Lines | None = None
        self._board: Board | None = None
        self._broken: set[str] = set()

    def __call__(self, event: Event) -> None:
        if self._lines is not None and isinstance(event, TrainEvent):
            with self._tolerated("metrics.jsonl"):
                self._lines.add(LOG, event.samples, numbers_of(event))
        if self._board is not None:
            with self._tolerated("tensorboard"):
                self._board.listen(event)
        if self._status is not None:
            with self._tolerated("status.json"):
                self._status.listen(event)
        self._emit(event)

    def begin(self, goal: int, resumed_from: int, reference: Callable[[], Sequence[float]]) -> None:
        """The folder is ours. `reference`: the host's reference work so far. Raises ConfigError without tensorboard."""
        out = Path(self._plan.out_dir)
        with self._tolerated("the folder's documents"):
            write_documents(self._config, self._plan, self._device, resumed_from)
        with self._tolerated("metrics.jsonl"):
            self._lines = Lines(out)
            self._lines.forget_after(resumed_from)
        with self._tolerated("status.json"):
            self._status = StatusFile(self._config, self._plan, goal, resumed_from)
            self._status.reference = reference
        if self._plan.tensorboard:
            self._board = Board(out, resumed_from)

    def forget_lines(self, samples: int) -> None:
        """A line that a stop wrote between two of the cadence is taken back."""
        if self._lines is not None:
            with self._tolerated("metrics.jsonl"):
                self._lines.forget_after(samples, LOG)

    def see(self, trainer: Trainer, origin: Origin, found: Mapping[str, float]) -> None:
        """New validation figures."""
        if self._lines is not None:
            with self._tolerated("metrics.jsonl"):
                self._lines.add(origin.value, trainer.samples, found)
        if self._board is not None:
            with self._tolerated("tensorboard"):
                self._board.figures(trainer.samples, found)
        if self._status is not None:
            self._status.figures(found)

    def show(self, samples: int, files: Sequence[Path]) -> None:
        """New sample files."""
        if self._board is not None:
            with self._tolerated("tensorboard"):
                self._board.show(samples, files)

    def close(self) -> None:
        if self._board is not None:
            with self._tolerated("tensorboard"):
                self._board.close()

    @contextlib.contextmanager
    def _tolerated(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if what not in self._broken:
                self._broken.add(what)
                text = f"{what} in {self._plan.out_dir} cannot be written: {one_line(error)}; the run goes on"
                self._emit(NoticeEvent(level="warning", text=text))
