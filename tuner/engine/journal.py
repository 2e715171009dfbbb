"""The log of a production run: TrainEvents, warnings about the loss, and the step record its result is made of."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path

from tuner.contract.config import Cadence, LossBands
from tuner.contract.probe import NoticeEvent, TrainEvent
from tuner.engine.failure import Diverged
from tuner.engine.hooks import Emit, Every, Hook
from tuner.engine.memory import PeakMemory
from tuner.engine.record import StepRecord
from tuner.engine.step import TOTAL, StepResult
from tuner.engine.table import Table
from tuner.engine.trainer import Trainer

NOT_FINITE_STEPS = 3
"""So many losses in a row that are not finite end a run."""
SMALLEST_SCALE = 2.0**-14
"""Below this fp16 loss scale every step has been skipped for long."""
DRAIN_STEPS = 50
"""On a GPU losses are read at least this often, log cadence or not."""
BAND_PATIENCE = 5
"""A loss outside its band is told again only after it was back, or after this many further log lines."""


class Journal(Hook):
    """Reads losses and times, writes a log line at the log cadence. Raises Diverged from `after_step`."""

    def __init__(
        self, cadence: Cadence, bands: LossBands | None, out_dir: Path, memory: PeakMemory, emit: Emit
    ) -> None:
        self._every = Every(cadence.log_samples)
        self._bands = Bands(bands, emit) if bands is not None else None
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
        self.table.add(line)
        if self._bands is not None:
            self._bands.judge(line.samples, line.losses.get(TOTAL, math.nan))


class Bands:
    """Holds the total loss against the guide's bands, and says what the guide advises, without repeating itself."""

    def __init__(self, bands: LossBands, emit: Emit) -> None:
        self._bands = bands
        self._emit = emit
        self._quiet = 0

    def judge(self, samples: int, loss: float) -> None:
        advice = self._advice(loss)
        if not advice:
            self._quiet = 0
        elif self._quiet == 0:
            self._quiet = BAND_PATIENCE
            self._emit(NoticeEvent(level="warning", text=f"at {samples:,} samples {advice}"))
        else:
            self._quiet -= 1

    def _advice(self, loss: float) -> str:
        bands = self._bands
        normal = f"normal is {bands.normal_low:g} to {bands.normal_high:g}"
        if loss < bands.warn_low:
            return (
                f"the loss is {loss:.3g}, below {bands.warn_low:g} ({normal}): the model probably memorises the data; "
                "take an earlier checkpoint, or a smaller model"
            )
        if loss > bands.warn_high:
            return (
                f"the loss is {loss:.3g}, above {bands.warn_high:g} ({normal}): training is in trouble; "
                "lower the learning rate, or look at the data"
            )
        return ""


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
