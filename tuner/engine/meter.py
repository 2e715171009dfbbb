"""The meter: a hook that lets a run warm up, measures its steady state, and stops it when enough is known."""

from __future__ import annotations

import math

from tuner.contract.config import CompileMode, RunConfig
from tuner.contract.measurement import Measurement
from tuner.contract.probe import ProbeLimits
from tuner.contract.statistics import half_width, rate_interval, warmup_cut
from tuner.engine.failure import Diverged
from tuner.engine.hooks import Hook, Phases
from tuner.engine.memory import PeakMemory
from tuner.engine.record import StepRecord
from tuner.engine.reference import HostReference
from tuner.engine.step import StepResult
from tuner.engine.telemetry import TelemetrySampler
from tuner.engine.trainer import Trainer

FIRST_STEPS = 2
"""Compilation, lazy initialisation, the optimizer's state: never steady."""
PATIENCE = 5.0
"""Slow steps may take this many times `measure_s` to reach `min_steps`; after that two steps must do."""
REFERENCES = 8
"""The host's reference work is done about this many times in one measurement."""


class Meter(Hook):
    """Measures until the interval of the throughput is narrow, or the time for it is spent.

    Seconds of other hooks and of the reference work are in no step. At least two optimizer steps are always made.
    """

    def __init__(self, limits: ProbeLimits, phases: Phases, memory: PeakMemory, *, reference: bool = False) -> None:
        self._limits = limits
        self._phases = phases
        self._memory = memory
        self._wants_reference = reference
        self._reference: HostReference | None = None
        self.reference_s: list[float] = []
        self._record: StepRecord | None = None
        self._telemetry: TelemetrySampler | None = None
        self._least_warmup = FIRST_STEPS
        self._next_judged = 0
        self._measured_s = 0.0
        self._summed = 0

    def on_start(self, trainer: Trainer) -> None:
        self._record = StepRecord(trainer.clock)
        self._telemetry = TelemetrySampler(trainer.device)
        if self._wants_reference and trainer.device.type == "cpu" and trainer.rank.leads:
            self._reference = HostReference()
        self._least_warmup = FIRST_STEPS + buffered_steps(trainer.config)
        compiles = trainer.config.compile is not CompileMode.EAGER
        self._phases.enter("compile" if compiles else "warmup")

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        record = self._opened()
        record.add(result)
        if trainer.steps == 1:
            record.drain()
            self._phases.enter("warmup")
        if self._phases.current == "warmup":
            self._leave_warmup(trainer, record)
        elif self._phases.current == "measure":
            self._measure(trainer, record)

    def _leave_warmup(self, trainer: Trainer, record: StepRecord) -> None:
        """The prefetch buffer is dropped, unless that would take longer than measuring."""
        spent = sum(record.step_s[FIRST_STEPS:])
        if trainer.steps < FIRST_STEPS or (trainer.steps < self._least_warmup and spent < self._limits.measure_s):
            return
        self._least_warmup = self._summed = trainer.steps
        self._next_judged = self._least_warmup + max(6, self._limits.min_steps)
        self._phases.enter("measure")
        assert self._telemetry is not None
        self._telemetry.start()
        if self._reference is not None:
            self._reference.measure()  # the loader still fills its buffer: slower than all that follow, so not kept

    def _measure(self, trainer: Trainer, record: StepRecord) -> None:
        steps = len(record.step_s) - self._least_warmup
        self._measured_s += sum(record.step_s[self._summed :])
        self._summed = len(record.step_s)
        measured_s = self._measured_s
        if len(self.reference_s) <= REFERENCES * measured_s / self._limits.measure_s:
            self._refer()
        if measured_s >= self._limits.measure_s:
            patient = measured_s < PATIENCE * self._limits.measure_s
            if steps >= (self._limits.min_steps if patient else 2):
                trainer.stop("measured")
        elif len(record.step_s) >= self._next_judged:
            self._next_judged = len(record.step_s) + max(4, steps // 8)
            if self._is_precise(record):
                trainer.stop("precise")

    def _is_precise(self, record: StepRecord) -> bool:
        cut = warmup_cut(record.step_s, minimum=self._least_warmup)
        if cut is None or len(record.step_s) - cut < self._limits.min_steps:
            return False
        return half_width(rate_interval(record.step_s[cut:], 1)) <= self._limits.half_width

    def on_end(self, trainer: Trainer) -> None:
        """Raises Diverged when a total loss was not finite."""
        record = self._opened()
        record.drain()
        self._refer()
        lost = sum(not math.isfinite(value) for value in record.losses.get("total", ()))
        skips_allowed = trainer.arithmetic.scaler is not None
        if lost and (not skips_allowed or record.not_finite_at_end()):
            raise Diverged(f"the loss was not finite in {lost} of {trainer.steps} steps")

    def measurement(self, trainer: Trainer) -> Measurement:
        """After the run; the phases are those entered so far."""
        record = self._opened()
        assert self._telemetry is not None
        return record.measurement(
            trainer.config.effective_batch_size,
            trainer.rank.largest(self._memory.read()),
            least_warmup=self._least_warmup,
            telemetry=self._telemetry.stop(),
            reference_s=self.reference_s,
            phases_s=self._phases.seconds(),
            parameters=trainer.parameter_count,
            flops_per_sample=trainer.flops_per_sample,
        )

    def close(self) -> None:
        """End the sampling thread of a run that failed."""
        if self._telemetry is not None:
            self._telemetry.stop()

    def _refer(self) -> None:
        if self._reference is not None:
            self.reference_s.append(self._reference.measure())

    def _opened(self) -> StepRecord:
        assert self._record is not None, "the meter was not started"
        return self._record


def buffered_steps(config: RunConfig) -> int:
    """Steps that the loader's workers can serve from what they prefetched before the steady state."""
    batches = config.loader.num_workers * config.loader.prefetch_factor
    return math.ceil(batches / config.accumulation_steps)
