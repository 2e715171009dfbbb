"""What counts as a measurement: warm-up out, waits apart, raw times kept, long runs thinned without bias."""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.engine_toys import (
    CPU,
    QUICK,
    answer,
    make_request,
    read_events,
    replies,
    start_apart,
    toy_config,
)
from tests.toys import Toy
from tuner.contract.config import LoaderConfig, RunConfig
from tuner.contract.measurement import MemoryPeak, Outcome
from tuner.contract.probe import PhaseEvent, ProbeKind, ProbeLimits
from tuner.contract.statistics import throughput
from tuner.engine.hooks import Hook, Phases
from tuner.engine.live_bytes import LiveBytes
from tuner.engine.loader import Group, ResidentSource, count_weights, first_batches
from tuner.engine.memory import PeakMemory
from tuner.engine.meter import PATIENCE, REFERENCES, Meter, buffered_steps, round_steps
from tuner.engine.record import ENTRIES, StepRecord, judge_warmup, thin
from tuner.engine.reference import HostReference
from tuner.engine.step import StepResult
from tuner.engine.trainer import Trainer


class ScriptedClock:
    """Stands in for the step clock: step times as written, whatever the machine does."""

    def __init__(self, step_s: list[float]) -> None:
        self._script = list(step_s)
        self._ready: list[float] = []

    def begin(self) -> None: ...

    def rest(self) -> None: ...

    def end(self) -> None:
        self._ready.append(self._script.pop(0) if self._script else 0.010)

    def take(self, *, wait: bool) -> list[float]:
        ready, self._ready = self._ready, []
        return ready


def metered(config: RunConfig, step_s: list[float], limits: ProbeLimits = QUICK) -> tuple[Trainer, Meter]:
    trainer = Trainer(Toy(config.options), config, device=CPU)
    trainer.clock = ScriptedClock(step_s)
    meter = Meter(limits, Phases(lambda _: None), PeakMemory(CPU))
    trainer.hooks = [meter]
    trainer.run()
    return trainer, meter


def jitter(count: int, around: float = 0.010) -> list[float]:
    noise = torch.randn(count, generator=torch.Generator().manual_seed(1)).tolist()
    return [around * (1 + 0.01 * value) for value in noise]


def test_a_slow_start_is_dropped_and_the_raw_times_are_kept() -> None:
    script = [3.0, 0.5, *(0.010 * (1 + 2.0 / (1 + i)) for i in range(12)), *jitter(400)]
    trainer, meter = metered(toy_config(), script, ProbeLimits(measure_s=2.0, half_width=1e-6))
    measured = meter.measurement(trainer)
    assert measured.step_s == tuple(script[: len(measured.step_s)])
    assert measured.warmup_steps >= 4
    assert throughput(measured).value == pytest.approx(16 / 0.010, rel=0.02)


def test_it_stops_early_when_the_interval_is_narrow_and_never_before_the_least_steps() -> None:
    trainer, _ = metered(toy_config(), jitter(1000), ProbeLimits(measure_s=1e6, min_steps=12, half_width=0.02))
    assert trainer.stop_reason == "precise"
    assert 14 <= trainer.steps < 60


def test_it_stops_when_the_time_is_spent() -> None:
    noisy = [0.010 + 0.020 * value for value in torch.rand(1000, generator=torch.Generator().manual_seed(2)).tolist()]
    trainer, _ = metered(toy_config(), noisy, ProbeLimits(measure_s=0.5, half_width=1e-6))
    assert trainer.stop_reason == "measured"
    assert trainer.steps == pytest.approx(27, abs=3)


def test_very_slow_steps_end_with_at_least_two() -> None:
    trainer, _ = metered(toy_config(), [60.0] * 20, ProbeLimits(measure_s=1.0, min_steps=8))
    assert 4 <= trainer.steps <= 5


def test_one_step_from_outside_is_told_from_the_jobs_own_by_measuring_on() -> None:
    limits = ProbeLimits(measure_s=1.0, half_width=1e-6)
    trainer, meter = metered(toy_config(), [*jitter(50), 20.0, *jitter(3000)], limits)
    measured = meter.measurement(trainer)
    assert 20.0 in measured.step_s, "the raw times are kept"
    assert max(measured.steady_step_s) < 0.1
    assert sum(measured.steady_step_s) >= PATIENCE * 1.0
    assert throughput(measured).value == pytest.approx(16 / 0.010, rel=0.02)


@pytest.mark.parametrize("every", [70, 250])
def test_rare_slow_steps_that_are_the_jobs_own_count(every: int) -> None:
    script = [*jitter(50), *([4.0, *jitter(every - 1)] * 30)]
    trainer, meter = metered(toy_config(), script, ProbeLimits(measure_s=1.0, half_width=1e-6))
    steady = meter.measurement(trainer).steady_step_s
    assert steady.count(4.0) >= 2
    assert throughput(meter.measurement(trainer)).value < 16 / 0.015


@pytest.mark.parametrize("slow", [0.05, 0.09])
def test_a_step_that_is_only_slow_is_no_stranger(slow: float) -> None:
    trainer, _ = metered(toy_config(), [*jitter(50), slow, *jitter(3000)], ProbeLimits(measure_s=1.0, half_width=1e-6))
    assert trainer.steps < 150


def test_what_the_loader_had_ready_is_dropped() -> None:
    loader = LoaderConfig(num_workers=2, prefetch_factor=4)
    config = toy_config(loader=loader)
    assert buffered_steps(config) == 4
    script = [0.001] * 6 + jitter(400)
    trainer, meter = metered(config, script, ProbeLimits(measure_s=1.0, half_width=1e-6))
    trainer.close()
    assert meter.measurement(trainer).warmup_steps >= 6


class Busy(Hook):
    """Takes `seconds` after every step: as itself, or in a break."""

    def __init__(self, phases: Phases, seconds: float, *, breaks: bool) -> None:
        self.phases = phases
        self.seconds = seconds
        self.breaks = breaks
        self.steps: list[StepResult] = []

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        self.steps.append(result)
        with self.phases.during("evaluate") if self.breaks else nullcontext():
            time.sleep(self.seconds)


def run_beside(busy: Busy, config: RunConfig, steps: int) -> list[float]:
    """Seconds of each step of a run with `busy` among its hooks."""
    trainer = Trainer(Toy(config.options), config, device=CPU, hooks=[busy])
    busy.phases.on_break = trainer.rest
    trainer.run(steps * config.effective_batch_size)
    trainer.close()
    return trainer.clock.take(wait=True)


def test_what_a_hook_does_beside_the_steps_counts_as_it_does_for_the_user() -> None:
    times = run_beside(Busy(Phases(lambda _: None), 0.05, breaks=False), toy_config(), 6)
    assert len(times) == 6
    assert min(times[1:]) >= 0.05


def test_a_break_is_in_no_step() -> None:
    slept = run_beside(Busy(Phases(lambda _: None), 0.3, breaks=True), toy_config(), 6)
    assert len(slept) == 6
    assert sorted(slept)[3] < 0.3


def test_steps_fed_from_what_workers_made_during_a_break_are_told_and_not_counted() -> None:
    """8 items of 5 ms make a micro-batch: the loader binds, so nothing lies ready before the break."""
    busy = Busy(Phases(lambda _: None), 0.5, breaks=True)
    config = toy_config({"load_s": 0.005}, loader=LoaderConfig(num_workers=2, prefetch_factor=2), accumulation_steps=1)
    run_beside(busy, config, 4)
    assert not busy.steps[0].ahead
    assert all(step.ahead for step in busy.steps[1:])
    record = StepRecord(ScriptedClock([]))
    for step in range(40):
        record.step_s.append(0.001 if 20 <= step < 24 else 0.010)
        record.add(StepResult(8, {"total": torch.tensor(1.0)}, ahead=20 <= step < 24))
    measured = record.measurement(8, MemoryPeak(process_bytes=1))
    assert set(measured.steady_step_s) == {0.010}
    assert record.stretch(18, 26) == pytest.approx((4, 0.040, 0.0))


@pytest.mark.parametrize("reference", [False, True])
def test_no_probe_is_faster_than_the_loader_can_be(reference: bool) -> None:
    """Two workers that sleep 4 ms an item bring at most 500 samples a second, whatever else is done meanwhile."""
    config = toy_config({"load_s": 0.004}, loader=LoaderConfig(num_workers=2, prefetch_factor=4), accumulation_steps=1)
    limits = ProbeLimits(measure_s=1.0, min_steps=8, half_width=1e-6)
    (reply,) = replies(answer(ProbeKind.END_TO_END, config, limits=limits, reference=reference))
    assert reply.measurement is not None
    assert throughput(reply.measurement).value <= 1.02 * 500
    assert len(reply.measurement.reference_s) == (2 * REFERENCES if reference else 0)


def test_workers_that_deliver_in_bursts_are_measured_in_whole_rounds() -> None:
    """Eight workers in step with each other: seven batches at once, then a wait. Every round takes 80 ms."""
    burst = [*[0.001] * 7, 0.073]
    config = toy_config(loader=LoaderConfig(num_workers=8, prefetch_factor=2), accumulation_steps=1)
    assert round_steps(config) == 8
    assert round_steps(config.model_copy(update={"accumulation_steps": 2})) == 4
    trainer, meter = metered(config, [0.001] * 3 + burst * 100, ProbeLimits(measure_s=0.5, half_width=1e-6))
    trainer.close()
    measured = meter.measurement(trainer)
    found = throughput(measured)
    assert len(measured.steady_step_s) % 8 == 0
    assert found.value == pytest.approx(8 * 8 / 0.080)
    assert found.high / found.low < 1.02


def test_a_stretch_fed_from_a_full_queue_is_not_taken_for_the_loaders_speed() -> None:
    """What lay ready runs out: the first steps take 10 ms, once the queue is empty 20 ms."""

    class Draining(ResidentSource):
        def __init__(self, groups: list[Group], lying: int) -> None:
            super().__init__(groups)
            self.lying = lying

        def next_group(self) -> Group:
            self.lying = max(0, self.lying - 1)
            return super().next_group()

        def ready(self) -> int:
            return self.lying

    config = toy_config(accumulation_steps=1)
    workload = Toy(config.options)
    batches = first_batches(workload, config, 1)
    source = Draining([Group(batches, count_weights(workload, batches))], lying=60)
    trainer = Trainer(workload, config, device=CPU, source=source)
    trainer.clock = ScriptedClock([0.010] * 60 + [0.020] * 1000)
    meter = Meter(ProbeLimits(measure_s=0.3, half_width=1e-6), Phases(lambda _: None), PeakMemory(CPU))
    trainer.hooks = [meter]
    trainer.run()
    assert throughput(meter.measurement(trainer)).value == pytest.approx(8 / 0.020)


def test_the_reference_work_is_done_on_one_thread_and_gives_the_others_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert len(HostReference().measure(3)) == 3
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 30_000), st.integers(0, 50))
def test_a_thinned_run_keeps_its_mean_and_its_size(count: int, cut: int) -> None:
    values = [float(i % 7) for i in range(count)]
    cut = min(cut, count - 1)
    every = max(1, -(-count // ENTRIES))
    thinned = thin(values, cut, every)
    assert len(thinned) <= ENTRIES + 1
    warm = -(-cut // every)
    whole = len(thinned[warm:]) * every
    if whole:
        expected = sum(values[cut : cut + whole]) / whole
        assert sum(thinned[warm:]) / len(thinned[warm:]) == pytest.approx(expected)


def test_a_long_record_is_reported_with_few_entries() -> None:
    clock = ScriptedClock([5.0, *jitter(12_000)])
    record = StepRecord(clock)
    for step in range(12_001):
        clock.end()
        record.add(StepResult(16, {"total": torch.tensor(float(step))}, wait_s=0.001))
    record.drain()
    measured = record.measurement(16, MemoryPeak(process_bytes=1))
    assert len(measured.step_s) == len(measured.data_wait_s) == len(measured.losses["total"]) <= ENTRIES + 1
    assert throughput(measured).value == pytest.approx(1600, rel=0.01)


def test_a_host_that_drifts_is_not_taken_for_a_warm_up() -> None:
    drifting = [0.010 * (1 + i / 200) for i in range(400)]
    assert judge_warmup(drifting, 2) <= 200


@pytest.mark.parametrize("count", range(8))
def test_some_step_is_always_left(count: int) -> None:
    assert 0 <= judge_warmup([0.01] * count, 20) <= max(0, count - 1)


def test_probe_measures_memory_waits_losses_and_the_host(tmp_path: Path) -> None:
    """In a process of its own: one that ran other tests has memory left that a probe need not grow for."""
    asked = make_request(ProbeKind.END_TO_END, toy_config({"load_s": 0.001}), reference=True, soak=True)
    (reply,) = replies(read_events(start_apart(asked, tmp_path)))
    assert reply.outcome is Outcome.OK
    found = reply.measurement
    assert found is not None
    assert len(found.step_s) == len(found.data_wait_s) == len(found.losses["total"])
    assert set(found.losses) == {"fit", "size", "total"}
    assert all(wait >= 0.016 for wait in found.data_wait_s)
    assert all(step > wait for step, wait in zip(found.step_s, found.data_wait_s, strict=True))
    assert found.memory.process_bytes > found.memory.base_bytes > 50 << 20
    assert len(found.reference_s) >= 2
    assert found.parameters == 2689
    assert found.flops_per_sample == pytest.approx(4 * 2 * (16 * 32 * 2 + 32 * 32 * 2 * 3 + 32 * 3), rel=0.1)
    assert {"build", "warmup", "measure", "evaluate", "sample", "checkpoint"} <= set(found.phases_s)
    assert reply.environment is not None
    assert reply.environment.threads == 1


def test_points_are_answered_one_by_one_in_their_own_phases() -> None:
    events = answer(ProbeKind.COMPUTE, toy_config(), toy_config(micro_batch_size=4))
    words = [event.phase if isinstance(event, PhaseEvent) else event.event for event in events]
    words = [word for word in words if word != "progress"]
    assert words == ["build", "warmup", "measure", "point", "teardown"] * 2
    assert all(reply.measurement and not any(reply.measurement.data_wait_s) for reply in replies(events))


@pytest.mark.parametrize("workers", [0, 1])
def test_loader_probe_counts_batches(workers: int) -> None:
    point = toy_config(loader=LoaderConfig(num_workers=workers))
    (reply,) = replies(answer(ProbeKind.LOADER, point, samples=40))
    assert reply.measurement is not None
    assert reply.measurement.samples_per_step == 8
    assert 9 <= len(reply.measurement.step_s) <= 40
    assert reply.measurement.warmup_steps >= 1 + 2 * workers


def test_lr_probe_uses_the_same_samples_and_noise_for_every_rate() -> None:
    base = toy_config()
    found = []
    for lr in (1e-3, 1e-3, 1e-4):
        point = base.model_copy(update={"optimizer": base.optimizer.model_copy(update={"lr": lr})})
        (reply,) = replies(answer(ProbeKind.LR, point, samples=256))
        found.append(reply.values)
    assert found[0] == found[1]
    assert found[0]["first_loss"] == found[2]["first_loss"]
    assert found[0]["final_loss"] < found[2]["final_loss"] < found[2]["first_loss"]


def test_trace_predicts_more_memory_for_a_larger_batch_and_less_with_checkpointing() -> None:
    small = toy_config({"width": 128, "depth": 4}, micro_batch_size=8)
    large = small.model_copy(update={"micro_batch_size": 512, "accumulation_steps": 1})
    lean = large.model_copy(update={"gradient_checkpointing": True})
    found = replies(answer(ProbeKind.TRACE, small, large, lean))
    assert [reply.outcome for reply in found] == [Outcome.OK] * 3
    peaks = [reply.values["predicted_peak_bytes"] for reply in found]
    assert peaks[0] < peaks[2] < peaks[1]


@pytest.mark.parametrize("micro", [8, 256])
def test_trace_counts_what_a_real_run_holds(micro: int) -> None:
    config = toy_config({"width": 128}, micro_batch_size=micro, ema=None, max_grad_norm=None)
    (reply,) = replies(answer(ProbeKind.TRACE, config))
    workload, count = Toy(config.options), LiveBytes()
    batches = first_batches(workload, config, 2)
    source = ResidentSource([Group(batches, count_weights(workload, batches))])
    trainer = Trainer(workload, config, device=CPU, source=source)
    count.hold([*trainer.model.parameters(), *trainer.model.buffers(), *batches[0].values()])
    with count:
        trainer.step()
        trainer.step()
    assert reply.values["predicted_peak_bytes"] == pytest.approx(count.peak, rel=0.02)


def test_trace_of_a_loss_that_looks_at_values_is_unsupported() -> None:
    class Looks(Toy):
        def loss(self, model, batch):  # type: ignore[no-untyped-def]
            if batch["x"].sum() > 1e9:
                raise AssertionError
            return super().loss(model, batch)

    (reply,) = replies(answer(ProbeKind.TRACE, toy_config(), workload=Looks))
    assert reply.outcome is Outcome.UNSUPPORTED
    assert "traced" in reply.message


def test_a_slow_stretch_of_production_is_not_called_warm_up() -> None:
    record = StepRecord(ScriptedClock([]))
    for step in range(200):
        record.step_s.append(0.4 if step < 90 else 0.1)
        record.add(StepResult(16, {"total": torch.tensor(1.0)}))
    peak = MemoryPeak(process_bytes=1)
    judged = record.measurement(16, peak).warmup_steps
    capped = record.measurement(16, peak, most_warmup=2).warmup_steps
    assert (judged > 2, capped) == (True, 2)
