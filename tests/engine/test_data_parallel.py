"""Training over several ranks: real processes that exchange gradients, are killed, stopped, and resumed."""

from __future__ import annotations

import csv
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests.faults.fault_probes import eventually, request
from tuner.contract.config import Cadence, EmaConfig
from tuner.contract.measurement import Outcome
from tuner.contract.probe import (
    Event,
    Listener,
    NoticeEvent,
    ProbeKind,
    ProbeReply,
    ProbeRequest,
    TrainEvent,
    TrainPlan,
)
from tuner.contract.trust import ANY_CODE
from tuner.engine.checkpoint import Checkpointer
from tuner.engine.loader import BucketedOrder, SampleOrder, StreamSampler
from tuner.probe.runner import SubprocessRunner

TOY = "tests.ranked_toys:Plain"
"""All toys here are of one module: the runner imports it once."""
STEPS = 50
STEP = 32
"""Samples of a step: micro-batch 8 x accumulation x ranks."""


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SubprocessRunner]:
    base = tmp_path_factory.mktemp("ranks")
    with SubprocessRunner(base / "cache", log_dir=base / "logs", trust=ANY_CODE) as made:
        yield made


def training(ranks: int, out: Path, workload: str = TOY, steps: int = STEPS, **options: Any) -> ProbeRequest:
    asked = request(workload, kind=ProbeKind.TRAIN, **options)
    changes = {
        "world_size": ranks,
        "accumulation_steps": 4 // ranks,
        "max_grad_norm": 1.0,
        "ema": EmaConfig(half_life_samples=200),
        "horizon_samples": steps * STEP,
        "cadence": Cadence(log_samples=STEP, checkpoint_samples=5 * STEP),
    }
    limits = asked.limits.model_copy(update={"peer_s": 1.0})
    points = (asked.points[0].model_copy(update=changes),)
    return asked.model_copy(update={"points": points, "limits": limits, "train": TrainPlan(out_dir=str(out))})


def losses(reply: ProbeReply) -> list[float]:
    assert reply.points[0].outcome is Outcome.OK, reply.points[0].message
    assert reply.train_result is not None
    return list(reply.train_result.measurement.losses["total"])


def state_of(out: Path) -> dict[str, torch.Tensor]:
    state = Checkpointer(out / "checkpoints").latest()
    assert state is not None
    return {**state["model"], **{f"ema.{name}": value for name, value in state["ema"].items()}}


def rank_processes() -> dict[int, psutil.Process]:
    """Rank -> process, of the run that is now under way: the leader's children, in the order they were started."""
    leader = next(p for p in psutil.Process().children(recursive=True) if len(p.children()) == 2)
    return dict(enumerate(sorted(leader.children(), key=lambda process: process.create_time())))


def at(samples: int, act: Callable[[], None]) -> Listener:
    """A listener that acts once, when so many samples have been seen."""
    done: list[int] = []

    def listen(event: Event) -> None:
        if isinstance(event, TrainEvent) and event.samples >= samples and not done:
            done.append(event.samples)
            act()

    return listen


@pytest.fixture(scope="module")
def by_one(runner: SubprocessRunner, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of the same training on one rank."""
    return losses(runner.run(training(1, tmp_path_factory.mktemp("one"))))


@pytest.fixture(scope="module")
def by_two(runner: SubprocessRunner, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed run on two ranks, with dropout."""
    out = tmp_path_factory.mktemp("two")
    losses(runner.run(training(2, out, steps=20, dropout=0.2)))
    return out


@pytest.mark.parametrize("bucketed", [False, True])
def test_the_ranks_take_the_samples_of_one_between_them(bucketed: bool) -> None:
    plain = SampleOrder(100, seed=3)
    order = BucketedOrder(plain, [index % 17 for index in range(100)], 12) if bucketed else plain
    whole = iter(StreamSampler(order, 12, start=24))
    parts = [iter(StreamSampler(order, 2, start=24, rank=rank, ranks=3)) for rank in range(3)]
    for _ in range(40):
        shared = [key for _ in range(2) for part in parts for key in next(part)]
        assert shared == next(whole)


def test_two_ranks_train_as_one(runner: SubprocessRunner, by_one: list[float], tmp_path: Path) -> None:
    reply = runner.run(training(2, tmp_path))
    found = losses(reply)
    assert len(found) == len(by_one) == STEPS
    assert max(abs(one - two) for one, two in zip(by_one, found, strict=True)) < 1e-5
    assert reply.train_result is not None
    assert reply.train_result.measurement.samples_per_step == STEP
    with (tmp_path / "metrics.csv").open() as source:
        assert [int(row["samples"]) for row in csv.DictReader(source)] == [STEP * (i + 1) for i in range(STEPS)]


def test_a_part_without_gradient_and_ordered_lengths_train_as_on_one(runner: SubprocessRunner, tmp_path: Path) -> None:
    one, two = (
        losses(runner.run(training(ranks, tmp_path / str(ranks), "tests.ranked_toys:PartlyUnused", steps=10)))
        for ranks in (1, 2)
    )
    assert two == pytest.approx(one, abs=1e-5)


@pytest.mark.parametrize(
    ("number", "rank", "says"),
    [
        (signal.SIGKILL, 1, "was ended by signal 9 (SIGKILL)"),
        (signal.SIGKILL, 0, "was ended by signal 9 (SIGKILL)"),
        (signal.SIGSTOP, 1, "was stopped and did not go on within 1 s"),
    ],
)
def test_a_lost_rank_is_named_and_nothing_is_left(
    runner: SubprocessRunner, tmp_path: Path, number: signal.Signals, rank: int, says: str
) -> None:
    struck: dict[int, psutil.Process] = {}

    def strike() -> None:
        struck.update(rank_processes())
        struck[rank].send_signal(number)

    (point,) = runner.run(training(2, tmp_path, steps=4000), at(6 * STEP, strike)).points
    assert point.outcome is Outcome.CRASHED
    assert point.message.startswith(f"rank {rank} of 2 (process {struck[rank].pid}) {says}")
    assert "goes on from the newest checkpoint" in point.message
    assert "\n" not in point.message
    assert eventually(lambda: not any(process.is_running() for process in struck.values()), 5)
    assert Checkpointer(tmp_path / "checkpoints").all(), "a checkpoint from before stands"


def test_stopped_as_a_whole_for_longer_than_a_rank_may_be_the_run_goes_on(
    runner: SubprocessRunner, tmp_path: Path
) -> None:
    def pause() -> None:
        ranks = rank_processes()
        leader = ranks[0].parent()
        assert leader is not None
        for process in (*ranks.values(), leader):
            process.suspend()
        time.sleep(4.0)
        for process in (leader, *ranks.values()):
            process.resume()

    reply = runner.run(training(2, tmp_path, steps=20), at(6 * STEP, pause))
    assert len(losses(reply)) == 19, "of 20 steps: that in which it was stopped is no measurement"
    assert reply.train_result is not None
    assert reply.train_result.finished
    assert max(reply.train_result.measurement.step_s) < 4.0


def test_killed_as_a_whole_the_same_command_reaches_the_same_weights(
    runner: SubprocessRunner, by_two: Path, tmp_path: Path
) -> None:
    def kill_all() -> None:
        ranks = rank_processes()
        leader = ranks[0].parent()
        assert leader is not None
        for process in (leader, *ranks.values()):
            process.kill()

    killed = runner.run(training(2, tmp_path, steps=20, dropout=0.2), at(8 * STEP, kill_all))
    assert killed.points[0].outcome is Outcome.CRASHED
    again = runner.run(training(2, tmp_path, steps=20, dropout=0.2))
    losses(again)
    assert again.train_result is not None
    assert again.train_result.resumed_from >= 5 * STEP
    found, expected = state_of(tmp_path), state_of(by_two)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_a_stop_signal_stops_all_at_one_border_and_one_rank_may_go_on(
    runner: SubprocessRunner, by_one: list[float], tmp_path: Path
) -> None:
    stopped = runner.run(training(2, tmp_path), at(12 * STEP, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert stopped.train_result is not None
    assert (stopped.train_result.finished, stopped.train_result.reason) == (False, "stopped by SIGTERM")
    done = len(losses(stopped))
    assert 12 <= done < STEPS
    alone = runner.run(training(1, tmp_path))
    assert alone.train_result is not None
    assert alone.train_result.resumed_from == done * STEP
    assert losses(stopped) + losses(alone) == pytest.approx(by_one, abs=1e-5)


def test_a_failure_on_one_rank_is_told_as_its_own(runner: SubprocessRunner, tmp_path: Path) -> None:
    asked = request("tests.ranked_toys:FailsOnRankOne", points=3)
    sizes = (8, 16, 8)
    points = tuple(
        point.model_copy(update={"world_size": 2, "micro_batch_size": size})
        for point, size in zip(asked.points, sizes, strict=True)
    )
    reply = runner.run(asked.model_copy(update={"points": points}))
    assert [point.outcome for point in reply.points] == [Outcome.OK, Outcome.OOM_HOST, Outcome.OK]
    assert reply.points[1].message.startswith("rank 1: RuntimeError: [enforce fail]")
    assert [point.measurement.samples_per_step for point in reply.points if point.measurement] == [16, 16]
    trained = runner.run(training(2, tmp_path, "tests.ranked_toys:FailsOnRankOne"))
    assert trained.points[0].outcome is Outcome.OK


@pytest.mark.parametrize("kind", [ProbeKind.LOADER, ProbeKind.LR, ProbeKind.QUALITY, ProbeKind.EQUIVALENCE])
def test_probes_of_two_ranks_speak_for_both(runner: SubprocessRunner, kind: ProbeKind) -> None:
    asked = request(TOY, kind=kind, points=2 if kind is ProbeKind.EQUIVALENCE else 1)
    sizes = (8, 16)
    points = tuple(
        point.model_copy(update={"world_size": 2, "micro_batch_size": size, "accumulation_steps": 16 // size})
        for point, size in zip(asked.points, sizes, strict=False)
    )
    reply = runner.run(asked.model_copy(update={"points": points, "samples": 320}))
    assert [point.outcome for point in reply.points] == [Outcome.OK] * len(points)
    if kind is ProbeKind.EQUIVALENCE:
        assert reply.points[0].values["relative_l2"] < 1e-5
    elif reply.points[0].measurement is not None:
        assert reply.points[0].measurement.samples_per_step == (16 if kind is ProbeKind.LOADER else STEP)


def test_coupled_samples_are_pointed_out(runner: SubprocessRunner, tmp_path: Path) -> None:
    told: list[str] = []

    def listen(event: Event) -> None:
        if isinstance(event, NoticeEvent) and event.level == "warning":
            told.append(event.text)

    losses(runner.run(training(2, tmp_path, "tests.ranked_toys:Coupled", steps=5), listen))
    assert any("batch_coupled" in text and "2 ranks" in text for text in told)
