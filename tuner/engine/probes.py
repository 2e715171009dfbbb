"""The probes that run the loop: resident batches, the loader alone, lr and quality at equal samples, production."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tuner.contract.config import RunConfig
from tuner.contract.measurement import Measurement
from tuner.contract.probe import ProgressEvent
from tuner.engine import judging
from tuner.engine import soak as soaking
from tuner.engine.bench import Answer, Bench
from tuner.engine.distributed import this_rank
from tuner.engine.failure import Diverged
from tuner.engine.hooks import Heartbeat, Hook
from tuner.engine.loader import Group, ResidentSource, StreamSource, count_weights, first_batches, to_device
from tuner.engine.lone import LoneStep
from tuner.engine.memory import PeakMemory
from tuner.engine.meter import PATIENCE, PRECISE_ROUNDS, Meter, is_narrow
from tuner.engine.record import StepRecord, judge_warmup
from tuner.engine.step import TOTAL, StepResult
from tuner.engine.telemetry import TelemetrySampler
from tuner.engine.trainer import Trainer

RESIDENT_BATCHES = 8
"""At most so many different micro-batches are held for a compute point; more would cost memory production has not."""
LOADER_LEAST = 8
SHORT_SAMPLES = 1024
"""LR and QUALITY probes that do not say how long train on so many."""


def compute(bench: Bench) -> None:
    """Steps without a loader: several points, each model built, measured and torn down."""
    bench.each_point(lambda config: (_compute(bench, config), {}))


def _compute(bench: Bench, config: RunConfig) -> Measurement:
    memory = bench.peak_memory()
    workload = bench.workload(config)
    batches = first_batches(
        workload, config, min(config.accumulation_steps, RESIDENT_BATCHES), dataset=bench.dataset(config)
    )
    weights = count_weights(workload, [batches[i % len(batches)] for i in range(config.accumulation_steps)])
    moved = [to_device(batch, bench.device, channels_last=config.channels_last) for batch in batches]
    group = Group([moved[i % len(moved)] for i in range(config.accumulation_steps)], weights)
    source = ResidentSource([group])
    trainer = Trainer(workload, config, device=bench.device, source=source)
    return _metered(bench, trainer, memory)


def _metered(bench: Bench, trainer: Trainer, memory: PeakMemory, *, soak: bool = False) -> Measurement:
    """Run until the meter knows enough; with `soak`, do production's other work too before the peak is read."""
    meter = Meter(bench.request.limits, bench.phases, memory, reference=bench.request.reference)
    trainer.hooks = [meter, Heartbeat(bench.emit, 0, "measuring")]
    try:
        trainer.run(None)
        if soak and trainer.rank.leads:
            soaking.run(bench, trainer, memory)
        return meter.measurement(trainer)
    finally:
        meter.close()
        trainer.close()


def end_to_end(bench: Bench) -> None:
    """The production loop, loader and all, until its throughput is known."""
    bench.each_point(lambda config: (_end_to_end(bench, config), {}))


def _end_to_end(bench: Bench, config: RunConfig) -> Measurement:
    memory = bench.peak_memory()
    trainer = Trainer(bench.workload(config), config, device=bench.device, dataset=bench.dataset(config))
    return _metered(bench, trainer, memory, soak=bench.request.soak)


def loader(bench: Bench) -> None:
    """Batches per second with nobody to use them: an entry per micro-batch."""
    bench.each_point(lambda config: (_loader(bench, config), {}))


def _loader(bench: Bench, config: RunConfig) -> Measurement:
    memory = bench.peak_memory()
    telemetry = TelemetrySampler(bench.device)
    workload = bench.workload(config)
    source = StreamSource(workload, config, bench.device, dataset=bench.dataset(config))
    try:
        bench.phases.enter("warmup")
        step_s, dropped = _fetch(bench, config, source)
    finally:
        source.close()
    return Measurement(
        samples_per_step=config.micro_batch_size * config.world_size,
        step_s=tuple(step_s),
        warmup_steps=judge_warmup(step_s, dropped, max(1, config.loader.num_workers)),
        round_steps=max(1, config.loader.num_workers),
        memory=this_rank(config).largest(memory.read()),
        phases_s=bench.phases.seconds(),
        telemetry=telemetry.stop(),
    )


def _fetch(bench: Bench, config: RunConfig, source: StreamSource) -> tuple[list[float], int]:
    """Seconds of each batch, and how many of them came from the buffer the workers had filled. The last batch ends a
    whole round of the workers, unless that would take too long."""
    limits, every = bench.request.limits, max(1, config.loader.num_workers)
    most = bench.request.samples or 1_000_000
    dropped = 1 + config.loader.num_workers * config.loader.prefetch_factor
    dropped = min(dropped, max(1, most - LOADER_LEAST))
    step_s: list[float] = []
    lone = LoneStep(limits.measure_s, PATIENCE * limits.measure_s)
    measured_s, told, judged_at = 0.0, time.monotonic(), dropped + LOADER_LEAST
    while len(step_s) < most:
        began = time.perf_counter()
        source.next_batch()
        step_s.append(time.perf_counter() - began)
        if len(step_s) == dropped:
            bench.phases.enter("measure")
        if len(step_s) > dropped:
            measured_s += step_s[-1]
        whole = (len(step_s) - dropped) % every == 0 or measured_s >= PATIENCE * limits.measure_s
        if whole and measured_s >= lone.wanted_s and len(step_s) - dropped >= min(LOADER_LEAST, limits.min_steps):
            if not lone.calls_for_more(step_s, dropped):
                break
            dropped, measured_s = len(step_s), 0.0
        if whole and len(step_s) >= judged_at and not lone.seen:
            judged_at += max(4, len(step_s) // 8)
            if len(step_s) - dropped >= PRECISE_ROUNDS * every and is_narrow(step_s, dropped, limits, every):
                break
        if time.monotonic() - told > 2.0:
            told = time.monotonic()
            bench.emit(ProgressEvent(done=len(step_s), total=0, text="fetching"))
    return step_s, lone.begin(step_s, dropped)


class LossKeeper(Hook):
    """Keeps every loss and stops a run that has lost its mind."""

    def __init__(self) -> None:
        self.record: StepRecord | None = None

    def on_start(self, trainer: Trainer) -> None:
        self.record = StepRecord(trainer.clock)

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        assert self.record is not None
        self.record.add(result)
        if trainer.device.type == "cpu" or self.record.pending >= 50:
            self._judge(trainer)

    def on_end(self, trainer: Trainer) -> None:
        self._judge(trainer)

    def _judge(self, trainer: Trainer) -> None:
        assert self.record is not None
        self.record.drain()
        lost = self.record.bad_at_end()
        if lost and (trainer.arithmetic.scaler is None or lost > 20):
            at = f"after {trainer.samples} samples at lr {trainer.config.optimizer.lr:g}"
            raise Diverged(f"the loss or its gradient was not finite {at}")


def lr(bench: Bench) -> None:
    """Loss at equal samples: the same stream and the same noise for every rate of one seed. What rose too far is judged
    by the search, from all losses."""
    bench.each_point(lambda config: _lr(bench, config))


def _lr(bench: Bench, config: RunConfig) -> Answer:
    with short_training(bench, config) as run:
        first, final = first_and_final(run.record.losses[TOTAL].tolist())
        return run.measurement(bench), {"first_loss": first, "final_loss": final}


def quality(bench: Bench) -> None:
    """The validation figures after training on equal samples: what a change of the model itself costs or brings."""
    bench.each_point(lambda config: _quality(bench, config))


def _quality(bench: Bench, config: RunConfig) -> Answer:
    samples = bench.request.samples or SHORT_SAMPLES
    with short_training(bench, without_slow_average(config, samples)) as run:
        if not run.trainer.rank.leads:
            return run.measurement(bench), {}
        with bench.phases.during("evaluate"):
            values = judging.evaluate(run.trainer)
        if config.quality is not None and config.quality.metric not in values:
            with bench.phases.during("assess"), tempfile.TemporaryDirectory(prefix="tuner-quality-") as folder:
                values |= judging.assess(run.trainer, Path(folder))
        return run.measurement(bench), values


def without_slow_average(config: RunConfig, samples: int) -> RunConfig:
    """`config` for a run of so many samples: no averaged weights where they would be mostly the initial ones still."""
    if config.ema is None:
        return config
    half_life = float(config.ema.half_life_samples)
    if config.ema.warmup_ratio > 0:
        half_life = min(half_life, config.ema.warmup_ratio * samples)
    return config.model_copy(update={"ema": None}) if half_life > samples / 2 else config


@dataclass(frozen=True)
class ShortTraining:
    """A trainer that has seen the request's samples, and the record of its steps."""

    trainer: Trainer
    samples: int
    """As asked for; the last step may have brought some more."""
    record: StepRecord
    memory: PeakMemory

    def measurement(self, bench: Bench) -> Measurement:
        return self.record.measurement(
            self.trainer.config.effective_batch_size,
            self.trainer.rank.largest(self.memory.read()),
            phases_s=bench.phases.seconds(),
            parameters=self.trainer.parameter_count,
            flops_per_sample=self.trainer.flops_per_sample,
        )


@contextmanager
def short_training(bench: Bench, config: RunConfig) -> Iterator[ShortTraining]:
    """Train from the start on the request's samples; the trainer is closed afterwards. Raises Diverged."""
    memory = bench.peak_memory()
    samples = bench.request.samples or SHORT_SAMPLES
    losses = LossKeeper()
    trainer = Trainer(bench.workload(config), config, device=bench.device, dataset=bench.dataset(config))
    trainer.hooks = [losses, Heartbeat(bench.emit, samples, bench.request.kind.value)]
    try:
        bench.phases.enter("measure")
        trainer.run(samples)
        assert losses.record is not None
        yield ShortTraining(trainer, samples, losses.record, memory)
    finally:
        trainer.close()


def first_and_final(total: list[float]) -> tuple[float, float]:
    """Total loss of the first step, before anything was learned, and the mean of the last quarter of the steps.

    Losses that are not finite (skipped fp16 steps) are left out. Raises Diverged when no other is there.
    """
    finite = [value for value in total if math.isfinite(value)]
    if not finite:
        raise Diverged("no step had a finite loss")
    tail = max(1, len(finite) // 4)
    return finite[0], sum(finite[-tail:]) / tail
