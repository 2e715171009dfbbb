"""How the batch is cut changes nothing; what would change it is found out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from tests.engine.engine_toys import answer, replies, toy_config, toy_trainer
from tests.toys import Toy
from tuner.contract.config import CompileMode, OptimizerConfig, OptimizerName, Precision
from tuner.contract.errors import WorkloadError
from tuner.contract.measurement import Outcome
from tuner.contract.probe import ProbeKind
from tuner.contract.workload import Batch, Term


@pytest.mark.parametrize("cut", [(16, 1), (4, 4), (1, 16)])
def test_accumulated_gradient_equals_the_whole_batchs(cut: tuple[int, int]) -> None:
    base = toy_config()
    other = base.model_copy(update={"micro_batch_size": cut[0], "accumulation_steps": cut[1]})
    first, second = toy_trainer(base).gradients(), toy_trainer(other).gradients()
    for name, gradient in first.items():
        assert torch.linalg.norm(second[name] - gradient) <= 1e-5 * torch.linalg.norm(gradient)


def test_ragged_weights_make_a_mean_of_means_wrong() -> None:
    """The toy's tokens really are ragged: averaging the micro-batches' means gives another gradient."""
    whole = toy_trainer(toy_config(micro_batch_size=16, accumulation_steps=1)).gradients()

    class Unweighted(Toy):
        def loss(self, model: torch.nn.Module, batch: Batch) -> Mapping[str, Term]:
            terms = super().loss(model, batch)
            size = float(len(batch["x"]))
            return {n: Term(t.sum / float(t.weight) * size, size, t.coefficient) for n, t in terms.items()}

        def weights(self, batch: Batch) -> Mapping[str, float]:
            return dict.fromkeys(("fit", "size"), float(len(batch["x"])))

    wrong = toy_trainer(toy_config(), Unweighted({})).gradients()
    name = "enter.weight"
    assert torch.linalg.norm(wrong[name] - whole[name]) > 1e-3 * torch.linalg.norm(whole[name])


def test_checkpointing_gives_the_same_gradient_with_dropout() -> None:
    plain = toy_config({"dropout": 0.2})
    recomputed = plain.model_copy(update={"gradient_checkpointing": True})
    first, second = toy_trainer(plain).gradients(), toy_trainer(recomputed).gradients()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_checkpointing_without_blocks_is_unsupported() -> None:
    class NoBlocks(Toy):
        def checkpoint_blocks(self, model: torch.nn.Module) -> list[torch.nn.Module]:
            return []

    point = toy_config(gradient_checkpointing=True)
    (reply,) = replies(answer(ProbeKind.COMPUTE, point, workload=NoBlocks))
    assert reply.outcome is Outcome.UNSUPPORTED
    assert "checkpoint_blocks" in reply.message


@pytest.mark.parametrize(
    "changes",
    [
        {"compile": CompileMode.CUDAGRAPHS},
        {"compile": CompileMode.REDUCE_OVERHEAD},
        {"precision": Precision.FP16},
        {"precision": Precision.TF32},
        {"world_size": 2},
    ],
)
def test_what_a_cpu_cannot_do_is_unsupported_with_a_reason(changes: dict[str, Any]) -> None:
    (reply,) = replies(answer(ProbeKind.END_TO_END, toy_config(**changes)))
    assert reply.outcome is Outcome.UNSUPPORTED
    assert next(iter(changes)) in reply.message


def test_a_loss_that_divides_by_something_else_than_counted_is_refused() -> None:
    class Miscounting(Toy):
        def weights(self, batch: Batch) -> Mapping[str, float]:
            return {"fit": 1.0}

    with pytest.raises(WorkloadError, match=r"term fit: its weight is .* but weights\(batch\) counted 1"):
        toy_trainer(toy_config(), Miscounting({})).step()


@pytest.mark.parametrize("name", [name for name in OptimizerName if name is not OptimizerName.OWN])
@pytest.mark.parametrize("fused", [False, True])
def test_every_optimizer_lowers_the_loss(name: OptimizerName, fused: bool) -> None:
    lr = 0.05 if name is OptimizerName.SGD else 1e-3
    trainer = toy_trainer(toy_config(optimizer=OptimizerConfig(name=name, lr=lr, fused=fused)))
    losses = [float(trainer.step().losses["total"]) for _ in range(40)]
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


def test_bf16_autocast_trains() -> None:
    trainer = toy_trainer(toy_config(precision=Precision.BF16))
    losses = [float(trainer.step().losses["total"]) for _ in range(40)]
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    assert all(parameter.dtype == torch.float32 for parameter in trainer.parameters)


def test_groups_of_the_workload_scale_the_one_lr() -> None:
    class TwoRates(Toy):
        def param_groups(self, model: torch.nn.Module) -> list[dict[str, object]]:
            last = [p for n, p in model.named_parameters() if n.startswith("leave")]
            rest = [p for n, p in model.named_parameters() if not n.startswith("leave")]
            return [{"params": rest, "lr_scale": 0.1}, {"params": last, "lr_scale": 1.0}]

    trainer = toy_trainer(toy_config(), TwoRates({}))
    trainer.step()
    assert [group["lr"] for group in trainer.optimizer.param_groups] == pytest.approx([1e-4, 1e-3])
