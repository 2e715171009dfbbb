"""The production run as a user meets it: files, log, resume after kill -9, signals, warnings, bad ends."""

from __future__ import annotations

import csv
import os
import random
import signal
from pathlib import Path

import pytest
import torch

from tests.engine.engine_toys import answer, make_request, read_events, replies, start_apart, toy_config
from tests.toys import Toy
from tuner.contract.config import Cadence, EmaConfig, LossBands, RunConfig
from tuner.contract.measurement import Outcome
from tuner.contract.probe import EVENT, Event, NoticeEvent, ProbeKind, ProbeRequest, TrainEvent, TrainPlan, TrainResult
from tuner.engine import tasks
from tuner.engine.checkpoint import Checkpointer

CADENCE = Cadence(log_samples=96, evaluate_samples=512, sample_samples=512, checkpoint_samples=160)


def production(**changes: object) -> RunConfig:
    settings = {"horizon_samples": 1024, "cadence": CADENCE, "ema": EmaConfig(half_life_samples=300), **changes}
    return toy_config({"dropout": 0.2, "samples": 200}).model_copy(update=settings)


def trained(config: RunConfig, out: Path, workload: type[Toy] = Toy, **plan: object) -> list[Event]:
    return answer(ProbeKind.TRAIN, config, workload=workload, train=TrainPlan(out_dir=str(out), **plan))  # type: ignore[arg-type]


def result_of(events: list[Event]) -> TrainResult:
    (result,) = [event for event in events if isinstance(event, TrainResult)]
    return result


def notices(events: list[Event]) -> list[str]:
    return [event.text for event in events if isinstance(event, NoticeEvent) and event.level == "warning"]


def state_of(out: Path) -> dict[str, torch.Tensor]:
    state = Checkpointer(out / "checkpoints").latest()
    assert state is not None
    return {**state["model"], **{f"ema.{name}": value for name, value in state["ema"].items()}}


def test_a_run_leaves_log_curves_samples_checkpoints_and_a_result(tmp_path: Path) -> None:
    events = trained(production(), tmp_path)
    result = result_of(events)
    assert (result.finished, result.samples, result.step, result.resumed_from) == (True, 1024, 64, 0)
    assert result.metrics["valid_fit"] < 1.0
    assert len(result.measurement.step_s) == 64
    assert len(result.measurement.reference_s) >= 1
    lines = [event for event in events if isinstance(event, TrainEvent)]
    assert [line.samples for line in lines] == [96 * i for i in range(1, 11)] + [1024]
    with (tmp_path / "metrics.csv").open() as source:
        rows = list(csv.DictReader(source))
    assert [int(row["samples"]) for row in rows] == [line.samples for line in lines]
    assert float(rows[0]["fit"]) == pytest.approx(lines[0].losses["fit"])
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((tmp_path / "samples").glob("*/sample.txt"))) == 2
    assert [path.name for path in Checkpointer(tmp_path / "checkpoints").all()] == [
        "step-000000001024",
        "step-000000000960",
    ]
    assert [reply.outcome for reply in replies(events)] == [Outcome.OK]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights and averaged weights at the end of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole")
    trained(production(), out)
    return state_of(out)


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_killed_at_a_random_moment_the_same_command_reaches_the_same_weights(
    tmp_path: Path, uninterrupted: dict[str, torch.Tensor]
) -> None:
    """kill -9 from outside after a random log line; then the same request again."""
    config = production()
    out, chance = tmp_path / "killed", random.Random()
    request = make_request(ProbeKind.TRAIN, config, train=TrainPlan(out_dir=str(out)))
    last = chance.choice([3, 4, 5, 6])
    killed_at = kill_after(last, request, tmp_path)
    resumed = read_events(start_apart(request, tmp_path))
    result = result_of(resumed)
    assert result.finished
    assert 160 <= result.resumed_from <= killed_at + 160
    assert equal(state_of(out), uninterrupted)
    with (out / "metrics.csv").open() as source:
        samples = [int(row["samples"]) for row in csv.DictReader(source)]
    assert samples == sorted(set(samples))


def kill_after(lines: int, request: ProbeRequest, folder: Path) -> int:
    """Kill the run after so many log lines; returns the samples it had told of."""
    process = start_apart(request, folder)
    assert process.stdout is not None
    with process.stdout as out:
        for line in out:
            event = EVENT.validate_json(line)
            if isinstance(event, TrainEvent) and (lines := lines - 1) == 0:
                process.kill()
                process.wait(timeout=20)
                return event.samples
    raise AssertionError("the run ended before it was killed")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_stops_at_the_next_step_with_a_checkpoint(
    number: signal.Signals, tmp_path: Path, uninterrupted: dict[str, torch.Tensor]
) -> None:
    events: list[Event] = []

    def strike(event: Event) -> None:
        events.append(event)
        if isinstance(event, TrainEvent) and event.samples == 288:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    plan = TrainPlan(out_dir=str(tmp_path / "stopped"))
    tasks.run(make_request(ProbeKind.TRAIN, production(), train=plan), Toy, strike)
    result = result_of(events)
    assert (result.finished, result.reason) == (False, f"stopped by {number.name}")
    assert 288 <= result.samples <= 304
    assert signal.getsignal(number) is before
    again = result_of(trained(production(), tmp_path / "stopped"))
    assert (again.resumed_from, again.finished) == (result.samples, True)
    assert equal(state_of(tmp_path / "stopped"), uninterrupted)


def test_max_samples_and_max_seconds_end_early_and_go_on_later(tmp_path: Path) -> None:
    first = result_of(trained(production(), tmp_path, max_samples=300))
    assert (first.finished, first.samples) == (True, 304)
    second = result_of(trained(production(), tmp_path, max_seconds=1e-6))
    assert (second.finished, second.samples, second.resumed_from) == (False, 320, 304)
    assert "1e-06 s" in second.reason
    third = result_of(trained(production(), tmp_path))
    assert (third.finished, third.samples) == (True, 1024)
    fourth = result_of(trained(production(), tmp_path))
    assert (fourth.finished, fourth.samples, fourth.step) == (True, 1024, 64)


def test_a_damaged_newest_checkpoint_is_told_and_the_run_goes_on_from_the_one_before(tmp_path: Path) -> None:
    trained(production(), tmp_path, max_samples=640)
    newest = Checkpointer(tmp_path / "checkpoints").all()[0] / "tensors.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    events = trained(production(), tmp_path)
    assert result_of(events).resumed_from == 480
    assert any("step-000000000640" in text and "damaged" in text for text in notices(events))


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    trained(production(), tmp_path, max_samples=160)
    other = production(options={"width": 8, "samples": 200})
    (reply,) = replies(trained(other, tmp_path))
    assert reply.outcome is Outcome.BAD_INPUT
    assert "checkpoints of another run" in reply.message
    assert "--out" in reply.message
    events = trained(production(micro_batch_size=16, accumulation_steps=1), tmp_path)
    assert result_of(events).finished
    assert any("micro_batch_size, accumulation_steps" in text for text in notices(events))


def test_a_loss_that_stays_nan_stops_the_run_and_keeps_the_checkpoint_from_before(tmp_path: Path) -> None:
    class GoesMad(Toy):
        def _misfortune(self, batch: object) -> float:
            return float("nan") if self.calls > 44 else 1.0

    events = trained(production(), tmp_path, GoesMad)
    (reply,) = replies(events)
    assert reply.outcome is Outcome.DIVERGED
    assert "3 steps in a row" in reply.message
    assert "step-000000000320 is kept" in reply.message
    assert all(bool(torch.isfinite(value).all()) for value in state_of(tmp_path).values())
    assert not any(isinstance(event, TrainResult) for event in events)


def test_a_late_out_of_memory_writes_a_last_checkpoint_and_advises(tmp_path: Path) -> None:
    config = production(options={"dropout": 0.2, "samples": 200, "fail": "oom_host", "fail_call": 50})
    (reply,) = replies(trained(config, tmp_path))
    assert reply.outcome is Outcome.OOM_HOST
    assert "step-000000000400 is kept" in reply.message
    assert "runner-up" in reply.message
    assert reply.detail


def test_losses_outside_their_band_are_told_with_advice_and_not_every_time(tmp_path: Path) -> None:
    low = LossBands(normal_low=50, normal_high=60, warn_low=40, warn_high=70)
    told = notices(trained(production(loss_bands=low), tmp_path / "low"))
    assert 1 <= len(told) <= 3
    assert "memorises" in told[0]
    assert "normal is 50 to 60" in told[0]
    high = LossBands(normal_low=0, normal_high=1e-9, warn_low=-1.0, warn_high=1e-8)
    told = notices(trained(production(loss_bands=high), tmp_path / "high"))
    assert "lower the learning rate" in told[0]


def test_evaluation_sampling_and_pictures_change_nothing_in_the_training(
    tmp_path: Path, uninterrupted: dict[str, torch.Tensor]
) -> None:
    trained(production(cadence=Cadence()), tmp_path)
    assert equal(state_of(tmp_path), uninterrupted)


def test_prepare_tells_its_progress_and_caches(tmp_path: Path) -> None:
    words = [event for event in answer(ProbeKind.PREPARE, cache_dir=str(tmp_path)) if event.event == "progress"]
    assert [(event.done, event.total) for event in words] == [(1, 3), (2, 3), (3, 3)]
    made = (tmp_path / "toy.json").read_text()
    answer(ProbeKind.PREPARE, cache_dir=str(tmp_path))
    assert (tmp_path / "toy.json").read_text() == made
