"""A workload's own optimizer and schedule: trained as plain PyTorch would, or refused in one line."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.engine.engine_toys import answer, replies
from tests.plain_toys import Adadelta, Plain
from tuner.contract.config import OptimizerConfig, OptimizerName, RunConfig, ScheduleConfig, ScheduleKind
from tuner.contract.errors import WorkloadError
from tuner.contract.measurement import Outcome
from tuner.contract.probe import DescribeEvent, ProbeKind, ProbeLimits, ProbeRequest
from tuner.contract.trust import ANY_CODE
from tuner.engine.loader import first_batches
from tuner.engine.optim import lr_schedule
from tuner.engine.step import TOTAL
from tuner.engine.trainer import Trainer
from tuner.engine.tree import put_together, take_apart
from tuner.probe.runner import SubprocessRunner

CPU = torch.device("cpu")


def baseline(job: type[Plain], **changes: Any) -> RunConfig:
    return job({}).info().baseline.model_copy(update=changes)


def trainer(job: type[Plain], **changes: Any) -> Trainer:
    return Trainer(job({}), baseline(job, **changes), device=CPU)


def losses(run: Trainer, steps: int) -> list[float]:
    return [float(run.step().losses[TOTAL]) for _ in range(steps)]


def test_adadelta_with_a_stepwise_schedule_is_what_pytorch_makes_of_it() -> None:
    """Three epochs of eight steps, against the loop of PyTorch's own example."""
    whole = {"micro_batch_size": 8, "accumulation_steps": 1, "optimizer": OptimizerConfig(lr=1.0)}
    run = trainer(Adadelta, **whole)
    job, model = Adadelta({}), nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    model.load_state_dict(run.model.state_dict())
    optimizer = torch.optim.Adadelta(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.7)
    batches = first_batches(job, baseline(Adadelta, **whole), 24)
    wanted = []
    for number, batch in enumerate(batches, 1):
        optimizer.zero_grad()
        loss = job.loss(model, batch)
        loss.backward()
        optimizer.step()
        wanted.append(float(loss.detach()))
        if number % 8 == 0:
            schedule.step()
    assert losses(run, 24) == pytest.approx(wanted, rel=1e-5)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.7**3)


class TwoRates(Plain):
    """The head learns ten times as fast; momentum as only the author wants it."""

    def optimizer(self, model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
        assert isinstance(model, nn.Sequential)
        groups: list[dict[str, Any]] = [
            {"params": model[0].parameters()},
            {"params": model[2].parameters(), "lr": 10 * config.lr},
        ]
        return torch.optim.SGD(groups, lr=config.lr, momentum=0.9, nesterov=True, fused=config.fused)


@pytest.mark.parametrize("lr", [0.01, 0.03])
def test_the_lr_knob_and_the_schedule_multiply_the_authors_own_rates(lr: float) -> None:
    run = trainer(
        TwoRates,
        optimizer=OptimizerConfig(lr=lr),
        schedule=ScheduleConfig(kind=ScheduleKind.LINEAR),
        horizon_samples=64,
    )
    run.step()
    rates = [group["lr"] for group in run.optimizer.param_groups]
    assert rates == pytest.approx([lr * (1 - 4 / 64), 10 * lr * (1 - 4 / 64)])


class OneCycle(Plain):
    def schedule(self, samples: float, horizon_samples: int) -> float:
        up = samples / (0.3 * horizon_samples)
        down = (samples - 0.3 * horizon_samples) / (0.7 * horizon_samples)
        return 0.04 + 0.48 * (1 - math.cos(math.pi * up)) if up < 1 else 0.5 * (1 + math.cos(math.pi * down))


def test_one_cycle_is_two_lines_and_means_the_same_at_every_batch() -> None:
    config = baseline(OneCycle)
    factor, horizon = lr_schedule(OneCycle({}), config), config.horizon_samples
    weight = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.OneCycleLR(weight, max_lr=1.0, total_steps=horizon + 1, final_div_factor=1e9)
    for samples in range(horizon):
        assert factor(samples) == pytest.approx(theirs.get_last_lr()[0], abs=0.01)
        weight.step()
        theirs.step()
    small, large = trainer(OneCycle, accumulation_steps=1), trainer(OneCycle, accumulation_steps=4)
    rates = [small.step().lr for _ in range(4)]
    assert rates[1] < large.step().lr < rates[2], "the rate at the middle of the same sixteen samples"


class Counting(torch.optim.Optimizer):
    """Signed momentum, with a count kept among its settings, as some published optimizers do."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr, "seen": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["seen"] += 1
            for parameter in group["params"]:
                kept = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                kept.lerp_(parameter.grad, 0.1)
                parameter.sub_(kept.sign(), alpha=group["lr"] / group["seen"])


class OwnRule(Plain):
    def optimizer(self, model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
        return Counting(model.parameters(), lr=config.lr)


@pytest.mark.parametrize("job", [Adadelta, TwoRates, OwnRule])
def test_a_resumed_run_goes_on_exactly(job: type[Plain]) -> None:
    whole = losses(trainer(job), 9)
    first, second = trainer(job), trainer(job)
    begun = losses(first, 4)
    second.load_state_dict(put_together(*take_apart(first.state_dict())))
    assert begun + losses(second, 5) == whole


@pytest.mark.parametrize("job", [Adadelta, TwoRates, OwnRule])
@pytest.mark.parametrize("kind", [ProbeKind.TRACE, ProbeKind.EQUIVALENCE, ProbeKind.END_TO_END, ProbeKind.NOISE])
def test_every_probe_takes_them(job: type[Plain], kind: ProbeKind) -> None:
    whole = {"micro_batch_size": 8, "accumulation_steps": 1}
    points = [baseline(job), baseline(job, **whole)] if kind is ProbeKind.EQUIVALENCE else [baseline(job)]
    for reply in replies(answer(kind, *points, workload=job, samples=32)):
        assert reply.outcome is Outcome.OK, f"{reply.message}\n{reply.detail}"
        if kind is ProbeKind.EQUIVALENCE:
            assert reply.values["relative_l2"] < 1e-5


def test_hooks_an_author_sets_on_the_optimizer_are_run() -> None:
    steps: list[int] = []

    class Hooked(OwnRule):
        def optimizer(self, model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
            made = super().optimizer(model, config)
            made.register_step_post_hook(lambda *words: steps.append(len(words)))
            return made

    losses(trainer(Hooked), 3)
    assert len(steps) == 3


class Returns(Plain):
    made: Any = None

    def optimizer(self, model: nn.Module, config: OptimizerConfig) -> Any:
        return type(self).made(list(model.parameters()))


REFUSED: dict[str, tuple[Any, str]] = {
    "nothing": (lambda params: None, "optimizer: it returned a NoneType; return a torch.optim.Optimizer"),
    "closure": (torch.optim.LBFGS, "optimizer: LBFGS.step needs a closure that computes the loss again; choose one"),
    "no rate": (lambda params: Counting(params, lr=None), "optimizer: group 0 of Counting has no lr (got None)"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_loop_cannot_use_is_refused_in_one_line(name: str) -> None:
    class Job(Returns):
        made = REFUSED[name][0]

    (reply,) = replies(answer(ProbeKind.END_TO_END, baseline(Plain), workload=Job))
    assert reply.outcome is Outcome.BAD_INPUT
    assert reply.message.startswith(REFUSED[name][1])
    assert not reply.detail


def test_an_optimizer_that_ignores_fused_is_not_measured_as_fused() -> None:
    fused = OptimizerConfig(lr=0.01, fused=True)
    (reply,) = replies(answer(ProbeKind.COMPUTE, baseline(Adadelta, optimizer=fused), workload=Adadelta))
    assert reply.outcome is Outcome.UNSUPPORTED
    assert reply.message.startswith("fused: the workload's own optimizer (Adadelta) is not fused")
    (reply,) = replies(answer(ProbeKind.COMPUTE, baseline(TwoRates, optimizer=fused), workload=TwoRates))
    assert reply.outcome is Outcome.OK, reply.message


def test_own_without_an_optimizer_is_refused() -> None:
    with pytest.raises(WorkloadError, match=r"name is `own`, but the workload has no method `optimizer"):
        trainer(Plain, optimizer=OptimizerConfig(name=OptimizerName.OWN, lr=0.1))


def test_two_schedules_are_refused_and_so_is_a_factor_that_is_none() -> None:
    with pytest.raises(WorkloadError, match="`schedule` of its own, and the configuration says cosine with 0 samples"):
        trainer(OneCycle, schedule=ScheduleConfig(kind=ScheduleKind.COSINE))

    class Broken(Plain):
        def schedule(self, samples: float, horizon_samples: int) -> float:
            return math.nan

    with pytest.raises(WorkloadError, match="a factor from 0 is needed, got nan after 4 samples"):
        trainer(Broken).step()


@pytest.mark.parametrize(("name", "told"), [(None, "own"), ("sgd", "sgd"), ("adam", "adam")])
def test_no_rule_for_its_lr_is_assumed_unless_the_author_names_one(name: str | None, told: str) -> None:
    class Job(Adadelta):
        def info(self) -> Any:
            info = super().info()
            words: dict[str, Any] = {"lr": 1.0} if name is None else {"lr": 1.0, "name": name}
            return info.model_copy(
                update={"baseline": info.baseline.model_copy(update={"optimizer": OptimizerConfig(**words)})}
            )

    (event,) = [e for e in answer(ProbeKind.DESCRIBE, workload=Job) if isinstance(e, DescribeEvent)]
    assert event.info is not None
    assert event.info.baseline.optimizer.name.value == told


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SubprocessRunner]:
    base = tmp_path_factory.mktemp("own")
    with SubprocessRunner(base / "cache", log_dir=base / "logs", trust=ANY_CODE) as made:
        yield made


def test_several_ranks_take_them(runner: SubprocessRunner, tmp_path: Path) -> None:
    """Two ranks of 4 x 1 reach the losses of one of 4 x 2."""

    def trained(config: RunConfig) -> list[float]:
        reply = runner.run(
            ProbeRequest(
                id="own",
                kind=ProbeKind.LR,
                workload=config.workload,
                points=(config,),
                samples=96,
                limits=ProbeLimits(measure_s=0.2, min_steps=4),
                device="cpu",
            )
        ).points[0]
        assert reply.outcome is Outcome.OK, f"{reply.message}\n{reply.detail}"
        assert reply.measurement is not None
        return list(reply.measurement.losses["loss"])

    alone, shared = trained(baseline(Adadelta)), trained(baseline(Adadelta, accumulation_steps=1, world_size=2))
    assert shared == pytest.approx(alone, rel=1e-4)
