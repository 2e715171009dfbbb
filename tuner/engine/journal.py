"""The log of a production run: TrainEvents, metrics.csv, and the step record its result is made of."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tuner.contract.config import Cadence
from tuner.contract.probe import NoticeEvent, TrainEvent
from tuner.engine.advice import Adviser
from tuner.engine.finite import FiniteWatch
from tuner.engine.hooks import Emit, Every, Hook
from tuner.engine.line_means import LineMeans
from tuner.engine.memory import PeakMemory
from tuner.engine.pulse import HOW_IT_SLEPT, Pulse
from tuner.engine.record import StepRecord
from tuner.engine.step import TOTAL, StepResult
from tuner.engine.table import SAMPLES, Table, number
from tuner.engine.trainer import Trainer

DRAIN_STEPS = 50
"""Losses are read at least this often, log cadence or not."""


class Journal(Hook):
    """Reads losses and times, writes a log line at the log cadence. Raises Diverged from `after_step`."""

    def __init__(self, cadence: Cadence, adviser: Adviser, out_dir: Path, memory: PeakMemory, emit: Emit) -> None:
        self._every = Every(cadence.log_samples)
        self._adviser = adviser
        self.finite = FiniteWatch(emit)
        self.table = Table(out_dir / "metrics.csv", emit)
        self._memory = memory
        self._emit = emit
        self._cadence = cadence
        self._record: StepRecord | None = None
        self._began = time.monotonic()
        self._logged = 0
        self._means = LineMeans()
        self._line_at = -1
        """Samples of the last line of the cadence."""
        self._provisional = False
        """Does the file end with the line of a run that was stopped between two lines?"""
        self.forget_lines: Callable[[int], None] = lambda _samples: None
        """Told of the samples after which log lines are taken back."""
        self._lr = 0.0
        self._reads_total = self._was_bad = False
        self._pulse: Pulse | None = None
        self._slept_s = self._told_s = 0.0

    @property
    def record(self) -> StepRecord:
        assert self._record is not None, "the journal was not started"
        return self._record

    def on_start(self, trainer: Trainer) -> None:
        self._record = StepRecord(trainer.clock)
        self._pulse = Pulse()
        self._reads_total = trainer.device.type == "cpu"
        self.finite.start(trainer)
        self._every = Every(self._cadence.log_samples, trainer.samples)
        self._line_at = self._line_at if self._line_at >= 0 else trainer.samples
        self.table.forget_after(trainer.samples)
        rows = [row for row in self.table.rows() if int(row[SAMPLES]) <= self._line_at]
        self._provisional = len(rows) < len(self.table.rows())
        self._adviser.restore([int(row[SAMPLES]) for row in rows], [number(row.get(TOTAL)) for row in rows])

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        record = self.record
        record.add(result, slept=self._has_slept(trainer))
        self._lr = result.lr
        due = self._every.due(trainer.samples)
        if due or record.pending >= DRAIN_STEPS or self._looks_bad(result):
            record.drain()
            self.finite.check(trainer, record)
        if due:
            self._log(trainer)
            self._means.begin()
            self._line_at, self._logged = trainer.samples, len(record.step_s)

    def _has_slept(self, trainer: Trainer) -> bool:
        """Did this process not run for a while since the step before? Told once, and whenever the sum has doubled."""
        slept_s = self._pulse.take() if self._pulse is not None else 0.0
        self._slept_s += slept_s
        if slept_s and self._slept_s >= 2 * self._told_s:
            self._told_s = self._slept_s
            where = f"at {trainer.samples:,} samples the run had not run for {slept_s:.0f} s ({HOW_IT_SLEPT})"
            self._emit(NoticeEvent(text=f"{where}: that step is in no throughput"))
        return slept_s > 0

    def close(self) -> None:
        """Ends the watching thread."""
        if self._pulse is not None:
            self._pulse.close()

    def _looks_bad(self, result: StepResult) -> bool:
        """On a CPU: is this step not finite, or was the one before? Such steps are judged at once."""
        if not self._reads_total:
            return False
        before, self._was_bad = self._was_bad, result.left_out is True or not math.isfinite(result.losses[TOTAL])
        return before or self._was_bad

    def on_end(self, trainer: Trainer) -> None:
        self.record.drain()
        self.finite.check(trainer, self.record, last=True)
        if len(self.record.step_s) > self._logged:
            self._log(trainer)

    def healthy(self) -> bool:
        """Is the last loss finite, or was nothing updated by it? Waits for the device."""
        self.record.drain()
        return self.record.ends_sound

    def state_dict(self) -> dict[str, Any]:
        """Where the last line was and what has come since, so that a resumed run writes the lines it would have."""
        self.record.drain()
        self._means.take(self.record.losses)
        bad = self.finite.in_a_row_after(self.record)
        return {"line_at": self._line_at, "means": self._means.state_dict(), "bad_in_a_row": bad}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Before the run starts."""
        self._line_at = int(state["line_at"])
        self._means.load_state_dict(state["means"])
        self.finite.in_a_row = int(state.get("bad_in_a_row", 0))

    def _log(self, trainer: Trainer) -> None:
        record, since = self.record, self._logged
        if since == len(record.step_s):
            return
        found = record.stretch(since)  # of no steps, where all were slept through
        seconds = found.seconds or math.inf
        self._means.take(record.losses)
        line = TrainEvent(
            samples=trainer.samples,
            step=trainer.steps,
            elapsed_s=time.monotonic() - self._began,
            samples_per_s=trainer.config.effective_batch_size * found.steps / seconds,
            losses=self._means.means(),
            lr=self._lr,
            data_wait=min(1.0, found.wait_s / seconds),
            peak_bytes=self._memory.gate_bytes(),
        )
        if self._provisional:
            self.table.forget_after(self._line_at)
            self.forget_lines(self._line_at)
            self._provisional = False
        self._emit(line)
        self.table.add(line.samples, numbers_of(line))
        self._adviser.line(line.samples, line.losses.get(TOTAL, math.nan))


def numbers_of(line: TrainEvent) -> dict[str, float]:
    """The columns of metrics.csv."""
    plain = {"step": line.step, "elapsed_s": line.elapsed_s, "samples_per_s": line.samples_per_s, "lr": line.lr}
    return {**plain, "data_wait": line.data_wait, **line.losses}
