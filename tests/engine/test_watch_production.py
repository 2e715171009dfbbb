"""What a production run says while it goes on: steps that are not finite, a loader that stands still or is slow,
throughput and memory off the promise; each once, with the likely cause, and when it is over."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from tests.engine.engine_toys import answer, make_request, replies, toy_config
from tests.toys import Rows, Toy
from tuner.contract.config import Cadence, LoaderConfig, RunConfig
from tuner.contract.measurement import Interval, Outcome
from tuner.contract.probe import Event, Expected, NoticeEvent, ProbeKind, TrainPlan, TrainResult
from tuner.contract.workload import Batch, Split, Term
from tuner.engine import tasks
from tuner.engine.checkpoint import Checkpointer
from tuner.engine.precision import Arithmetic
from tuner.engine.watch import Alarm, Window, is_slow, memory_cause, slow_cause

CADENCE = Cadence(log_samples=160, checkpoint_samples=160)


def config(**changes: object) -> RunConfig:
    return toy_config({"samples": 256}).model_copy(update={"horizon_samples": 640, "cadence": CADENCE, **changes})


def trained(asked: RunConfig, out: Path, workload: type[Toy], **plan: Any) -> list[Event]:
    return answer(ProbeKind.TRAIN, asked, workload=workload, train=TrainPlan(out_dir=str(out), **plan))


def told(events: list[Event], level: str = "warning") -> list[str]:
    return [event.text for event in events if isinstance(event, NoticeEvent) and event.level == level]


def result_of(events: list[Event]) -> TrainResult:
    (result,) = [event for event in events if isinstance(event, TrainResult)]
    return result


def all_finite(out: Path) -> bool:
    state = Checkpointer(out / "checkpoints").latest()
    assert state is not None
    return all(bool(torch.isfinite(value).all()) for value in state["model"].values())


class Disturbed(Toy):
    """Its loss is not what it should be in the calls named; two calls make a step."""

    first, last = 0, 0

    def loss(self, model: nn.Module, batch: Batch) -> Mapping[str, Term]:
        terms = dict(super().loss(model, batch))
        if self.first <= self.calls <= self.last:
            terms["fit"] = self.disturbed(terms["fit"])
        return terms

    def disturbed(self, term: Term) -> Term:
        raise NotImplementedError


class Blinks(Disturbed):
    """An infinite loss whose gradient is sound: the training survives it."""

    first, last = 21, 22

    def disturbed(self, term: Term) -> Term:
        return Term(sum=term.sum + float("inf"), weight=term.weight)


class BadGradient(Disturbed):
    """The loss looks well, its gradient is not a number."""

    first, last = 21, 1 << 30

    def disturbed(self, term: Term) -> Term:
        return Term(sum=term.sum + (0.0 * term.sum).sqrt(), weight=term.weight)


class BadGradientAWhile(BadGradient):
    last = 32


def test_a_loss_that_comes_back_is_told_and_counted(tmp_path: Path) -> None:
    events = trained(config(), tmp_path, Blinks)
    assert result_of(events).not_finite_steps == 1
    (text,) = [text for text in told(events) if "not finite" in text]
    assert "in 1 step before 192 samples" in text


class WithScaler(Arithmetic):
    """fp16's loss scaler on a CPU: the policy is the same on every device."""

    def __init__(self, *words: Any) -> None:
        super().__init__(*words)
        self.scaler = torch.amp.GradScaler("cpu")


def test_a_loss_scaler_skips_and_the_steps_skipped_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tuner.engine.trainer.Arithmetic", WithScaler)
    result = result_of(trained(config(), tmp_path, BadGradientAWhile))
    assert (result.finished, result.skipped_steps, result.not_finite_steps) == (True, 6, 0)
    assert all_finite(tmp_path)


def test_a_loss_scale_that_falls_and_falls_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sound loss does not hide it."""
    monkeypatch.setattr("tuner.engine.trainer.Arithmetic", WithScaler)
    events = trained(config(horizon_samples=4096), tmp_path, BadGradient)
    (reply,) = replies(events)
    assert reply.outcome is Outcome.DIVERGED
    assert "loss scale fell to" in reply.message
    assert "is kept" in reply.message
    assert all_finite(tmp_path)
    assert len([text for text in told(events) if "left out of late" in text]) == 1


def expected(rate: float, peak: int = 1 << 50) -> Expected:
    return Expected(
        samples_per_s=Interval(value=rate, low=0.98 * rate, high=1.02 * rate), peak_bytes=peak, peak_high_bytes=peak
    )


class SlowRows(Rows):
    """Four milliseconds an item, until so many have been fetched."""

    fetched, slow = 0, 400

    def __getitem__(self, index: int) -> Mapping[str, torch.Tensor]:
        type(self).fetched += 1
        if self.fetched < self.slow:
            time.sleep(0.004)
        return super().__getitem__(index)


class SlowLoader(Toy):
    def dataset(self, split: Split) -> Dataset[Mapping[str, torch.Tensor]]:
        SlowRows.fetched = 0
        return SlowRows(self.options["samples"], 0, self.options)


def test_throughput_below_the_promise_is_told_once_with_its_cause_and_when_it_is_over(tmp_path: Path) -> None:
    asked = config(horizon_samples=2400)
    events = trained(asked, tmp_path, SlowLoader, expected=expected(500), watch_every_s=0.01)
    (warning,) = [text for text in told(events) if "promised" in text]
    assert "below the promised 500" in warning
    assert "waiting for batches" in warning
    assert "num_workers 0" in warning
    assert [text for text in told(events, "info") if "about the promised 500 again" in text]


def test_without_a_promise_a_loader_that_takes_most_of_the_time_is_told(tmp_path: Path) -> None:
    events = trained(config(), tmp_path, SlowLoader, watch_every_s=0.01)
    (warning,) = told(events)
    assert "% of the time went into waiting for batches" in warning


def test_memory_above_the_promise_is_told_once(tmp_path: Path) -> None:
    events = trained(config(), tmp_path, Toy, expected=expected(1e-3, peak=1 << 20), watch_every_s=1e-6)
    (warning,) = told(events)
    assert "above the promised 1 MiB" in warning
    assert "still free" in warning


class OneLongItem(Rows):
    def __getitem__(self, index: int) -> Mapping[str, torch.Tensor]:
        if index == 0:
            time.sleep(0.8)
        return super().__getitem__(index)


class Dawdles(Toy):
    def dataset(self, split: Split) -> Dataset[Mapping[str, torch.Tensor]]:
        return OneLongItem(self.options["samples"], 0, self.options)


def test_a_loader_that_stands_still_is_told_with_the_place(tmp_path: Path) -> None:
    events = trained(config(horizon_samples=256), tmp_path, Dawdles, stall_s=0.2)
    (warning,) = told(events)
    assert warning.startswith("no batch for")
    assert "__getitem__ (test_watch_production.py:" in warning
    assert [text for text in told(events, "info") if "batches come again" in text]


class StoppingRows(Rows):
    """The worker stops itself at one item, as a debugger or a full machine would."""

    def __getitem__(self, index: int) -> Mapping[str, torch.Tensor]:
        if index == 0 and os.getpid() != StoppedWorker.pid:
            StoppedWorker.note.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGSTOP)
        return super().__getitem__(index)


class StoppedWorker(Toy):
    note = Path()
    pid = os.getpid()

    def dataset(self, split: Split) -> Dataset[Mapping[str, torch.Tensor]]:
        return StoppingRows(self.options["samples"], 0, self.options)


def test_a_stopped_worker_is_named(tmp_path: Path) -> None:
    StoppedWorker.note, StoppedWorker.pid = tmp_path / "pid", os.getpid()
    events: list[Event] = []

    def wake(event: Event) -> None:
        events.append(event)
        if isinstance(event, NoticeEvent) and "no batch" in event.text:
            os.kill(int(StoppedWorker.note.read_text()), signal.SIGCONT)

    asked = config(horizon_samples=256, loader=LoaderConfig(num_workers=1))
    plan = TrainPlan(out_dir=str(tmp_path / "run"), stall_s=0.2)
    tasks.run(make_request(ProbeKind.TRAIN, asked, train=plan), StoppedWorker, wake)
    assert result_of(events).finished
    (warning,) = [text for text in told(events) if "no batch" in text]
    assert "of the loader worker one is stopped" in warning


STEADY = Window(samples=1000, seconds=10.0, wait_s=0.1, step_elements=100)
PROMISED = expected(100).model_copy(update={"reference_s": (0.1, 0.1)})


def test_an_alarm_needs_three_windows_in_a_row_to_go_on_and_out() -> None:
    alarm = Alarm()
    seen = [alarm.changed(bool(off)) for off in (1, 1, 0, 1, 1, 1, 1, 0, 0, 1, 0, 0, 0, 0)]
    assert [place for place, changed in enumerate(seen) if changed] == [5, 12]


@pytest.mark.parametrize(
    ("window", "host", "slow", "cause"),
    [
        (STEADY, 1.0, False, None),
        (replace(STEADY, samples=850), 1.0, True, ""),
        (replace(STEADY, samples=850), 0.86, False, None),
        (replace(STEADY, samples=600), 0.62, True, "the host itself runs at 62 %"),
        (replace(STEADY, samples=600, wait_s=4.0), 1.0, True, "loader"),
        (replace(STEADY, samples=600, step_elements=150), None, True, "shapes changed"),
    ],
)
def test_what_is_slow_and_why(window: Window, host: float | None, slow: bool, cause: str | None) -> None:
    assert is_slow(window, PROMISED, host) is slow
    if cause is not None:
        found = slow_cause([window] * 3, PROMISED, host, 100)
        assert cause in found
        assert bool(cause) is bool(found)


def test_why_memory_is_above_the_promise() -> None:
    rising = [replace(STEADY, peak_bytes=1000 + 10 * number) for number in range(5)]
    assert "kept from step to step" in memory_cause(rising, 100)
    level = [replace(STEADY, peak_bytes=1000)] * 4
    assert "shapes changed" in memory_cause([*level, replace(STEADY, peak_bytes=2000, step_elements=200)], 100)
    evaluated = replace(STEADY, peak_bytes=2000, maintenance=("evaluate",))
    assert "rose with evaluate" in memory_cause([*level, evaluated], 100)
