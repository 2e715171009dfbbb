"""A run stopped anywhere, as often as you like, is the uninterrupted run: weights, random states, curves, patience."""

from __future__ import annotations

import csv
import itertools
import json
import random
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from tests.engine.engine_toys import answer, toy_config
from tests.toys import Rows, Toy
from tuner.commands import train
from tuner.contract.config import Cadence, EmaConfig, LoaderConfig, QualityConfig, RunConfig
from tuner.contract.probe import Event, NoticeEvent, PointReply, ProbeKind, ProbeReply, TrainPlan, TrainResult
from tuner.contract.production import RunStatus
from tuner.contract.workload import Batch, Split, Term
from tuner.engine import judging
from tuner.engine.checkpoint import Checkpointer
from tuner.engine.tree import take_apart
from tuner.probe.verdict import Ending, judge

CLOCKS = ("elapsed_s", "samples_per_s", "data_wait")
STEP, EPOCH, HORIZON = 16, 200, 640
CADENCE = Cadence(log_samples=96, evaluate_samples=128, sample_samples=256, checkpoint_samples=80)


@pytest.fixture(autouse=True)
def no_drawings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The curves are another test's matter, and take longer than these runs."""
    for name in ("draw_curves", "draw_quality"):
        monkeypatch.setattr(judging, name, lambda *_: None)


class NoisyRows(Rows):
    """Items with noise from every random state a process has, as careless augmentation draws it."""

    def __getitem__(self, index: int) -> Mapping[str, torch.Tensor]:
        item = super().__getitem__(index)
        return {**item, "x": item["x"] + random.gauss(0, 0.1) + np.random.normal() / 10 + torch.randn(()) / 10}


class Careless(Toy):
    """Draws from Python's, NumPy's and torch's global random states: in its items, its loss, and its evaluation."""

    def dataset(self, split: Split) -> Dataset[Mapping[str, torch.Tensor]]:
        kind = NoisyRows if split == "train" else Rows
        return kind(self.options["samples"] if split == "train" else 64, 0, self.options)

    def loss(self, model: nn.Module, batch: Batch) -> Mapping[str, Term]:
        fit = super().loss(model, batch)["fit"]
        return {"fit": Term(sum=fit.sum * (1 + random.random() / 10 + np.random.rand() / 10), weight=fit.weight)}

    def evaluate(self, model: nn.Module, batches: Any) -> Mapping[str, float]:
        drawn = {"python": random.random(), "numpy": float(np.random.rand()), "torch": float(torch.rand(()))}
        return {**super().evaluate(model, batches), **drawn, "flat": 1.0}


def run_config(workers: int = 0, **changes: object) -> RunConfig:
    """Everything that has state; 40 steps over 3.2 epochs, cadences that seldom fall together."""
    settings = {
        "horizon_samples": HORIZON,
        "cadence": CADENCE,
        "ema": EmaConfig(half_life_samples=300),
        "loader": LoaderConfig(num_workers=workers),
        **changes,
    }
    return toy_config({"dropout": 0.2, "samples": EPOCH}).model_copy(update=settings)


def trained(config: RunConfig, out: Path, **plan: Any) -> list[Event]:
    asked = TrainPlan(out_dir=str(out), **plan)
    return answer(ProbeKind.TRAIN, config, workload=Careless, train=asked)


def result_of(events: list[Event]) -> TrainResult:
    (result,) = [event for event in events if isinstance(event, TrainResult)]
    return result


def curve(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as source:
        return [{name: cell for name, cell in row.items() if name not in CLOCKS} for row in csv.DictReader(source)]


def assert_same_run(out: Path, whole: Path) -> None:
    first, second = (Checkpointer(folder / "checkpoints").latest() for folder in (out, whole))
    tensors, plain = take_apart(first)
    others, other_plain = take_apart(second)
    assert [name for name in tensors if not torch.equal(tensors[name], others[name])] == []
    assert tensors.keys() == others.keys()
    assert json.dumps(plain) == json.dumps(other_plain)
    assert curve(out / "metrics.csv") == curve(whole / "metrics.csv")
    found = curve(out / "evaluations.csv")
    assert [row for row in curve(whole / "evaluations.csv") if row not in found] == []


@pytest.fixture(scope="module", params=[0, 2], ids=["no workers", "two workers"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Path]:
    config, out = run_config(request.param), tmp_path_factory.mktemp("whole")
    assert result_of(trained(config, out)).finished
    return config, out


def test_stops_anywhere_leave_no_trace(whole: tuple[RunConfig, Path], tmp_path: Path) -> None:
    """resume(k) after resume(j) is the uninterrupted run, however the checkpoints of each part are written; one cut is
    the step before an epoch ends, one the step in which it does."""
    config, reference = whole
    seed = random.randrange(10**6)
    chance = random.Random(seed)
    border = EPOCH // STEP
    cuts = sorted({border, border + 1, *chance.sample(range(1, HORIZON // STEP), 2)})
    for before, cut in itertools.pairwise([0, *cuts]):
        random.seed(chance.random())
        np.random.seed(chance.randrange(1000))
        torch.rand(chance.randrange(1, 9))
        result = result_of(
            trained(config, tmp_path, max_samples=cut * STEP, background_checkpoints=chance.random() < 0.5)
        )
        assert (result.resumed_from, result.samples) == (before * STEP, cut * STEP), f"seed {seed}"
    assert result_of(trained(config, tmp_path)).finished
    assert_same_run(tmp_path, reference)


def test_going_back_to_an_older_checkpoint_leaves_no_trace(whole: tuple[RunConfig, Path], tmp_path: Path) -> None:
    """As after a kill: log lines and evaluations of the part that is done again are not kept twice."""
    config, reference = whole
    trained(config, tmp_path, max_samples=25 * STEP)
    newest = Checkpointer(tmp_path / "checkpoints").all()[0]
    (newest / "state.json").unlink()
    again = trained(config, tmp_path)
    assert result_of(again).resumed_from == 320
    assert any(newest.name in event.text for event in again if isinstance(event, NoticeEvent))
    assert_same_run(tmp_path, reference)


def test_an_evaluation_at_a_stop_does_not_count_against_patience(tmp_path: Path) -> None:
    """Stopped at every other step, a run makes many evaluations more; it must end no earlier for that."""
    quality = QualityConfig(metric="flat", patience=4)
    config = run_config(quality=quality, cadence=CADENCE.model_copy(update={"sample_samples": 0}))
    assert result_of(trained(config, tmp_path / "whole")).samples == HORIZON
    for samples in range(2 * STEP, 10 * STEP, 2 * STEP):
        assert result_of(trained(config, tmp_path / "stopped", max_samples=samples)).samples == samples
    assert result_of(trained(config, tmp_path / "stopped")).samples == HORIZON


def test_a_finished_run_asked_again_keeps_its_last_line(tmp_path: Path) -> None:
    trained(run_config(), tmp_path)
    lines = curve(tmp_path / "metrics.csv")
    assert lines[-1]["samples"] == str(HORIZON)
    assert result_of(trained(run_config(), tmp_path)).finished
    assert curve(tmp_path / "metrics.csv") == lines


def test_a_stop_before_the_first_step_is_no_failure() -> None:
    """SIGTERM while data are prepared ends the worker at once: nothing is lost, and the exit code says so (75)."""
    ending = Ending(status=signal.SIGTERM, asked_to_stop=True)
    outcome, message = judge(ending)
    reply = ProbeReply(request_id="train", points=(PointReply(outcome=outcome, message=message),), seconds=1.0)
    assert train.status(reply) is RunStatus.STOPPED


def test_samples_that_a_kill_prevented_are_made_up_for(tmp_path: Path) -> None:
    config = run_config(cadence=CADENCE.model_copy(update={"checkpoint_samples": 256}))
    trained(config, tmp_path, max_samples=256)
    made = tmp_path / "samples" / f"{256:012d}" / "sample.txt"
    text = made.read_text()
    made.unlink()
    trained(config, tmp_path, max_samples=272)
    assert made.read_text() == text
