"""A step whose loss or gradient is not finite is as if it had not been made: weights, moments and running statistics
are those from before, it is counted and told, and three in a row end the run, over a resume too."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.engine.engine_toys import answer, replies, toy_config, toy_trainer
from tests.engine.test_watch_production import BadGradient, Blinks, Disturbed, config, result_of, told, trained
from tests.toys import Toy
from tuner.contract.config import Cadence, OptimizerConfig, OptimizerName, Precision
from tuner.contract.measurement import Outcome
from tuner.contract.probe import ProbeKind
from tuner.contract.workload import Batch, Term
from tuner.engine.checkpoint import Checkpointer
from tuner.engine.step import _flagged_step
from tuner.engine.trainer import Trainer
from tuner.engine.tree import take_apart

OFTEN = Cadence(log_samples=16, checkpoint_samples=16)


class NanLoss(Disturbed):
    """Calls 21 and 22 are the eleventh step."""

    first, last = 21, 22

    def disturbed(self, term: Term) -> Term:
        return Term(sum=term.sum * float("nan"), weight=term.weight)


class NanBatch(NanLoss):
    """The data hold it, so that the running statistics see it too."""

    def loss(self, model: nn.Module, batch: Batch) -> Mapping[str, Term]:
        spoilt = self.first <= self.calls + 1 <= self.last
        return Toy.loss(self, model, {**batch, "x": batch["x"] * float("nan")} if spoilt else batch)


class InfiniteGradient(BadGradient):
    last = 22

    def disturbed(self, term: Term) -> Term:
        return Term(sum=term.sum + (0.0 * term.sum).abs().sqrt(), weight=term.weight)


class HalfBad(NanLoss):
    """One of the step's two micro-batches."""

    last = 21


def changeable(trainer: Trainer) -> dict[str, Tensor]:
    """Copies of all that a step may change in model and optimizer."""
    tensors, _ = take_apart({"model": trainer.model.state_dict(), "optimizer": trainer.optimizer.state_dict()})
    return {name: value.clone() for name, value in tensors.items()}


def same(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    return before.keys() == after.keys() and all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize("job", [NanLoss, NanBatch, InfiniteGradient, Blinks, HalfBad])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_grad_norm": None},
        {"max_grad_norm": None, "optimizer": OptimizerConfig(lr=1e-3, fused=True)},
        {"optimizer": OptimizerConfig(name=OptimizerName.SGD, lr=1e-3, momentum=0.9)},
        {"precision": Precision.BF16},
        {"gradient_checkpointing": True},
    ],
    ids=["clipped", "unclipped", "fused", "sgd", "bf16", "recomputed"],
)
def test_a_bad_step_changes_nothing(job: type[Disturbed], changes: dict[str, Any]) -> None:
    asked = toy_config({"batch_norm": True}, **changes)
    trainer = toy_trainer(asked, job(asked.options))
    for _ in range(10):
        assert trainer.step().left_out is False
    before = changeable(trainer)
    assert trainer.step().left_out is True
    assert same(before, changeable(trainer))
    assert trainer.samples == 11 * 16
    assert trainer.step().left_out is False
    after = changeable(trainer)
    assert not same(before, after)
    assert all(bool(torch.isfinite(value).all()) for value in after.values())


def test_a_first_step_that_is_bad_is_left_out_too() -> None:
    asked = toy_config({"batch_norm": True})
    job = NanBatch(asked.options)
    job.first, job.last = 1, 2
    trainer = toy_trainer(asked, job)
    before = trainer.model.state_dict()
    before = {name: value.clone() for name, value in before.items()}
    assert trainer.step().left_out is True
    assert same(before, dict(trainer.model.state_dict()))


@pytest.mark.parametrize("momentum", [None, 0.0, 0.9])
def test_a_fused_optimizer_leaves_out_what_the_device_flags(momentum: float | None) -> None:
    """As on a GPU, where nobody waits for the flag; the kernels of a CPU know it too."""
    weight = torch.ones(5, requires_grad=True)
    made: torch.optim.Optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    if momentum is not None:
        made = torch.optim.SGD([weight], lr=0.1, momentum=momentum, fused=True)
    for value, total, left_out in (
        (1.0, 1.0, False),
        (float("nan"), 1.0, True),
        (1.0, float("inf"), True),
        (1.0, 1.0, False),
    ):
        before = weight.detach().clone()
        weight.grad = torch.full((5,), value)
        flag = _flagged_step(made, [weight], None, torch.tensor(total))
        assert bool(flag) is left_out
        assert torch.equal(weight.detach(), before) is left_out
        assert not hasattr(made, "found_inf")
    assert bool(torch.isfinite(weight).all())


@pytest.mark.parametrize("job", [NanLoss, InfiniteGradient])
def test_one_bad_step_is_counted_and_told_and_the_run_goes_on(job: type[Disturbed], tmp_path: Path) -> None:
    events = trained(config(), tmp_path, job)
    result = result_of(events)
    assert (result.finished, result.skipped_steps, result.not_finite_steps) == (True, 1, int(job is NanLoss))
    (text,) = told(events)
    assert "not finite in 1 step before 192 samples; their updates were left out" in text


def test_a_run_whose_last_step_is_bad_keeps_its_last_checkpoint(tmp_path: Path) -> None:
    events = trained(config(horizon_samples=176), tmp_path, NanLoss)
    assert result_of(events).finished
    assert len(told(events)) == 1
    assert [path.name for path in Checkpointer(tmp_path / "checkpoints").all()][:1] == ["step-000000000176"]


@pytest.mark.parametrize("job", [NanLoss, InfiniteGradient])
def test_three_in_a_row_end_the_run(job: type[Disturbed], tmp_path: Path) -> None:
    class Long(job):  # type: ignore[valid-type,misc]
        last = 26

    (reply,) = replies(trained(config(), tmp_path, Long))
    assert reply.outcome is Outcome.DIVERGED
    what = "loss" if job is NanLoss else "gradient"
    assert f"the {what} was not finite in 3 steps in a row (at 208 samples)" in reply.message
    assert "The checkpoint step-000000000160 is kept" in reply.message


def test_a_resume_between_bad_steps_changes_nothing(tmp_path: Path) -> None:
    """Stopped after each sixteen samples: the same weights in the end, and three in a row are three in a row."""

    class Placed(NanBatch):
        """Bad by its place in the run, whichever process comes there."""

        bad: tuple[int, ...] = (160,)
        at = 0

        def loss(self, model: nn.Module, batch: Batch) -> Mapping[str, Term]:
            place = type(self).at
            type(self).at += len(batch["x"])
            spoilt = {**batch, "x": batch["x"] * float("nan")} if place // 16 * 16 in self.bad else batch
            return Toy.loss(self, model, spoilt)

    def run(out: Path, cuts: list[int], bad: tuple[int, ...]) -> list[Any]:
        Placed.bad, Placed.at, events = bad, 0, []
        for cut in cuts:
            events += trained(config(horizon_samples=320, cadence=OFTEN), out, Placed, max_samples=cut)
        return events

    run(tmp_path / "whole", [320], (160,))
    run(tmp_path / "cut", [160, 176, 192, 320], (160,))
    states = [Checkpointer(tmp_path / name / "checkpoints").latest() for name in ("whole", "cut")]
    first, second = (take_apart(state) for state in states)
    assert same(first[0], second[0])
    assert json.dumps(first[1]) == json.dumps(second[1])
    events = run(tmp_path / "bad", [160, 176, 192, 208, 320], (160, 176, 192))
    ends = [reply for reply in replies(events) if reply.outcome is Outcome.DIVERGED]
    assert "in 3 steps in a row (at 208 samples)" in ends[0].message


@pytest.mark.parametrize("kind", [ProbeKind.LR, ProbeKind.END_TO_END])
def test_a_probe_does_not_hide_a_bad_gradient(kind: ProbeKind) -> None:
    class AtOnce(BadGradient):
        first = 3

    (reply,) = replies(answer(kind, toy_config(), workload=AtOnce, samples=160))
    assert reply.outcome is Outcome.DIVERGED
    assert "gradient was not finite" in reply.message
