"""The log of a production run: TrainEvents, metrics.csv, and the step record its result is made of."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path

from tuner.contract.config import Cadence
from tuner.contract.probe import TrainEvent
from tuner.engine.advice import Adviser
from tuner.engine.failure import Diverged
from tuner.engine.hooks import Emit, Every, Hook
from tuner.engine.memory import PeakMemory
from tuner.engine.record import StepRecord
from tuner.engine.step import TOTAL, StepResult
from tuner.engine.table import SAMPLES, Table, number
from tuner.engine.trainer import Trainer

NOT_FINITE_STEPS = 3
"""So many losses in a row that are not finite end a run."""
SMALLEST_SCALE = 2.0**-14
"""Below this fp16 loss scale every step has been skipped for long."""
DRAIN_STEPS = 50
"""On a GPU losses are read at least this often, log cadence or not."""


class Journal(Hook):
    """Reads losses and times, writes a log line at the log cadence. Raises Diverged from `after_step`."""

    def __init__(self, cadence: Cadence, adviser: Adviser, out_dir: Path, memory: PeakMemory, emit: Emit) -> None:
        self._every = Every(cadence.log_samples)
        self._adviser = adviser
        self.table = Table(out_dir / "metrics.csv", emit)
        self._memory = memory
        self._emit = emit
        self._cadence = cadence
        self._record: StepRecord | None = None
        self._began = time.monotonic()
        self._logged = 0
        self._lr = 0.0

    @property
    def record(self) -> StepRecord:
        assert self._record is not None, "the journal was not started"
        return self._record

    def on_start(self, trainer: Trainer) -> None:
        self._record = StepRecord(trainer.clock)
        self._every = Every(self._cadence.log_samples, trainer.samples)
        self.table.forget_after(trainer.samples)
        rows = self.table.rows()
        self._adviser.restore([int(row[SAMPLES]) for row in rows], [number(row.get(TOTAL)) for row in rows])

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        record = self.record
        record.add(result)
        self._lr = result.lr
        due = self._every.due(trainer.samples)
        if due or trainer.device.type == "cpu" or record.pending >= DRAIN_STEPS:
            record.drain()
            self._check(trainer)
        if due:
            self._log(trainer)

    def on_end(self, trainer: Trainer) -> None:
        self.record.drain()
        if len(self.record.step_s) > self._logged:
            self._log(trainer)

    def healthy(self) -> bool:
        """Is the last loss finite? Waits for the device."""
        self.record.drain()
        return self.record.not_finite_at_end() == 0

    def _check(self, trainer: Trainer) -> None:
        lost = self.record.not_finite_at_end()
        if lost < NOT_FINITE_STEPS:
            return
        scale = trainer.loss_scale
        if scale is None:
            raise Diverged(f"the loss was not finite in {lost} steps in a row (at {trainer.samples} samples)")
        if scale < SMALLEST_SCALE:
            raise Diverged(f"the loss was not finite in {lost} steps in a row; the fp16 loss scale fell to {scale:g}")

    def _log(self, trainer: Trainer) -> None:
        record, since = self.record, self._logged
        steps = record.step_s[since:]
        self._logged = len(record.step_s)
        seconds = sum(steps)
        if not seconds:
            return
        line = TrainEvent(
            samples=trainer.samples,
            step=trainer.steps,
            elapsed_s=time.monotonic() - self._began,
            samples_per_s=trainer.config.effective_batch_size * len(steps) / seconds,
            losses={name: _mean(values[since:]) for name, values in record.losses.items()},
            lr=self._lr,
            data_wait=min(1.0, sum(record.wait_s[since:]) / seconds),
            peak_bytes=self._memory.gate_bytes(),
        )
        self._emit(line)
        self.table.add(line.samples, _numbers(line))
        self._adviser.line(line.samples, line.losses.get(TOTAL, math.nan))


def _numbers(line: TrainEvent) -> dict[str, float]:
    """The columns of metrics.csv."""
    plain = {"step": line.step, "elapsed_s": line.elapsed_s, "samples_per_s": line.samples_per_s, "lr": line.lr}
    return {**plain, "data_wait": line.data_wait, **line.losses}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
