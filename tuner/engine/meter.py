"""The meter: a hook that lets a run warm up, measures its steady state, and stops it when enough is known.

What is measured is what production will have: an unbroken stretch of steps whose seconds add up to wall time. Nothing
is done in it that gives the loader's workers free time; the host's reference work is done before it and after it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from tuner.contract.config import CompileMode, RunConfig
from tuner.contract.measurement import Measurement
from tuner.contract.probe import ProbeLimits
from tuner.contract.statistics import half_width, rate_interval, warmup_cut
from tuner.engine.failure import Diverged
from tuner.engine.hooks import Hook, Phases
from tuner.engine.lone import LEAST_STEPS, LoneStep
from tuner.engine.memory import PeakMemory
from tuner.engine.record import StepRecord
from tuner.engine.reference import HostReference
from tuner.engine.step import StepResult
from tuner.engine.telemetry import TelemetrySampler
from tuner.engine.trainer import Trainer

FIRST_STEPS = 2
"""Compilation, lazy initialisation, the optimizer's state: never steady."""
PATIENCE = 5.0
"""Slow steps may take this many times `measure_s` to reach `min_steps` and a whole round of the loader's workers; after
that two steps must do."""
REFERENCES = 4
"""The host's reference work is done so many times before the first step, and again after the last."""
PRECISE_ROUNDS = 3
"""Rounds of the loader's workers without which no interval is called narrow."""
DRAINED = 0.005
"""A stretch that took more than this share of its batches from what lay ready before it is faster than the loader."""
DRAINING = 2.0
"""Such a stretch goes on for so many times `measure_s`; then what lay ready is taken as gone, and a new one begins."""


class Meter(Hook):
    """Measures until the interval of the throughput is narrow, or the time for it is spent.

    At least two optimizer steps are always made. With loader workers a stretch begins once their buffer is used up,
    and ends with a whole round of them.
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
        self._round = 1
        self._next_judged = 0
        self._measured_s = 0.0
        self._summed = 0
        self._ready = 0
        """Batches that lay ready when the stretch began."""
        self._restarted = False
        self._lone = LoneStep(limits.measure_s, PATIENCE * limits.measure_s)

    def on_start(self, trainer: Trainer) -> None:
        self._record = StepRecord(trainer.clock)
        self._telemetry = TelemetrySampler(trainer.device)
        if self._wants_reference and trainer.device.type == "cpu":
            self._refer(trainer)
        is_narrow(
            [1.0] * max(6, self._limits.min_steps), 0, self._limits
        )  # what the first call imports is in no step then
        self._least_warmup = FIRST_STEPS + buffered_steps(trainer.config)
        self._round = round_steps(trainer.config)
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
        assert self._telemetry is not None
        self._telemetry.start()
        self._phases.enter("measure")
        self._begin(trainer, record)

    def _begin(self, trainer: Trainer, record: StepRecord) -> None:
        """The stretch begins with the next step."""
        self._least_warmup = trainer.steps
        self._summed = len(record.step_s)
        self._measured_s = 0.0
        self._next_judged = self._least_warmup + max(6, self._limits.min_steps, PRECISE_ROUNDS * (self._round - 1))
        self._ready = trainer.source.ready()

    def _measure(self, trainer: Trainer, record: StepRecord) -> None:
        steps = len(record.step_s) - self._least_warmup
        self._measured_s += sum(record.step_s[self._summed :])
        self._summed = len(record.step_s)
        spent = self._measured_s / self._lone.wanted_s
        if spent >= PATIENCE:
            self._stop(trainer, "measured", steps >= (LEAST_STEPS if self._lone.seen else 2))
        elif steps % self._round:
            return
        elif spent >= 1 and steps >= self._limits.min_steps:
            if self._restarted or not self._drains(trainer, steps):
                self._stop(trainer, "measured", True)
            elif spent >= DRAINING:
                self._restarted = True
                self._begin(trainer, record)
        elif len(record.step_s) >= self._next_judged and not self._lone.seen:
            self._next_judged = len(record.step_s) + max(4, steps // 8)
            narrow = is_narrow(record.step_s, self._least_warmup, self._limits, self._round)
            self._stop(trainer, "precise", narrow and not self._drains(trainer, steps))

    def _stop(self, trainer: Trainer, reason: str, enough: bool) -> None:
        record = self._opened()
        if not enough:
            return
        if self._lone.calls_for_more(record.step_s, self._least_warmup):
            self._begin(trainer, record)
        else:
            self._least_warmup = self._lone.begin(record.step_s, self._least_warmup)
            trainer.stop(reason)

    def _drains(self, trainer: Trainer, steps: int) -> bool:
        """Were the steps of the stretch fed from what lay ready, so that they were faster than the loader can be?

        What lies ready rises and falls by a batch of each worker. To wait until it is back where it began would end
        the stretch whenever more has been made than was counted, and make every loader look slow.
        """
        fallen = self._ready - trainer.source.ready()
        counted = DRAINED * steps * trainer.config.accumulation_steps
        return fallen > max(counted, trainer.config.loader.num_workers)

    def on_end(self, trainer: Trainer) -> None:
        """Raises Diverged when a total loss, or without a loss scaler a gradient, was not finite."""
        record = self._opened()
        record.drain()
        assert self._telemetry is not None
        self._telemetry.stop()
        if self._wants_reference and trainer.device.type == "cpu":
            trainer.close_loader()
            self._refer(trainer)
        lost = sum(record.bad_since(0))
        skips_allowed = trainer.arithmetic.scaler is not None
        if lost and (not skips_allowed or record.bad_at_end()):
            raise Diverged(f"the loss or its gradient was not finite in {lost} of {trainer.steps} steps")

    def measurement(self, trainer: Trainer) -> Measurement:
        """After the run; the phases are those entered so far."""
        record = self._opened()
        assert self._telemetry is not None
        return record.measurement(
            trainer.config.effective_batch_size,
            trainer.rank.largest(self._memory.read()),
            least_warmup=self._least_warmup,
            round_steps=self._round,
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

    def _refer(self, trainer: Trainer) -> None:
        """The leading rank measures the host while the others wait: nothing of the configuration runs."""
        trainer.rank.gather(0)
        if trainer.rank.leads:
            self._reference = self._reference or HostReference()
            self.reference_s += self._reference.measure(REFERENCES)
        trainer.rank.gather(0)

    def _opened(self) -> StepRecord:
        assert self._record is not None, "the meter was not started"
        return self._record


def is_narrow(step_s: Sequence[float], minimum: int, limits: ProbeLimits, round_steps: int = 1) -> bool:
    """Are the steps after `minimum` steady, and is the interval of their throughput as narrow as wanted?"""
    cut = warmup_cut(step_s, minimum=minimum, round_steps=round_steps)
    if cut is None or len(step_s) - cut < limits.min_steps:
        return False
    return half_width(rate_interval(step_s[cut:], 1, round_steps=round_steps)) <= limits.half_width


def buffered_steps(config: RunConfig) -> int:
    """Steps that the loader's workers can serve from what they prefetched before the steady state."""
    batches = config.loader.num_workers * config.loader.prefetch_factor
    return math.ceil(batches / config.accumulation_steps)


def round_steps(config: RunConfig) -> int:
    """Steps after which every loader worker has delivered as often as the others: batches come from them in turn."""
    workers = max(1, config.loader.num_workers)
    return workers // math.gcd(workers, config.accumulation_steps)
