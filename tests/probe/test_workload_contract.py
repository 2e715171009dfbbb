"""The suite plug-in authors inherit: a good workload passes it, and each kind of bad one is told what is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.toys import Toy
from tuner.contract.base import Scalar
from tuner.contract.trust import Trust
from tuner.contract.workload import Batch, Term
from tuner.probe.runner import SubprocessRunner
from tuner.testing import WorkloadContract


class TestToy(WorkloadContract):
    workload = "tests.toys:Toy"
    options = {"samples": 64}  # noqa: RUF012

    def test_batch_norm_that_is_not_owned_up_to_is_found(self, cache_dir: Path) -> None:
        suite = _BatchNormSuite()
        with (
            SubprocessRunner(cache_dir, log_dir=cache_dir / "logs", trust=Trust.of(suite.workload)) as runner,
            pytest.raises(AssertionError, match=r"2 x BatchNorm1d.*batch_coupled=True"),
        ):
            suite.test_accumulation_changes_no_gradient(runner, cache_dir)


class _BatchNormSuite(WorkloadContract):
    workload = "tests.toys:BatchNormToy"


class _Mean(Toy):
    """Sums what is a mean already."""

    def loss(self, model: nn.Module, batch: Batch) -> Mapping[str, Term]:
        terms = super().loss(model, batch)
        return {name: Term(sum=term.sum / term.weight, weight=term.weight) for name, term in terms.items()}


class _BatchNoise(Toy):
    """Draws its noise for the batch, not for the sample."""

    def loss(self, model: nn.Module, batch: Batch) -> Mapping[str, Term]:
        moved = {**batch, "x": batch["x"] + torch.rand_like(batch["x"])}
        return super().loss(model, moved)


class _Fickle(Toy):
    """Augments at random where the same index must give the same item."""

    def dataset(self, split: Any) -> Any:
        dataset = super().dataset(split)
        dataset.x = dataset.x + torch.rand(1)  # type: ignore[attr-defined]
        return dataset


def suite(cls: type[Toy], **options: Scalar) -> tuple[WorkloadContract, Any]:
    made = WorkloadContract()
    return made, cls(options)


@pytest.mark.parametrize("cls", [_Mean, _BatchNoise])
def test_a_loss_that_depends_on_the_cut_is_found(cls: type[Toy]) -> None:
    contract, workload = suite(cls)
    with pytest.raises(AssertionError, match="differs from its two halves"):
        contract.test_a_batchs_loss_is_the_sum_of_its_halves(workload)


def test_an_item_that_changes_is_found() -> None:
    contract, workload = suite(_Fickle)
    with pytest.raises(AssertionError, match="differs between data sets"):
        contract.test_the_same_index_gives_the_same_item(workload, "train")


def test_wrongly_counted_weights_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    contract, workload = suite(Toy)
    monkeypatch.setattr(type(workload), "weights", lambda self, batch: {"fit": 1.0, "size": 8.0})
    with pytest.raises(AssertionError):
        contract.test_weights_counted_beforehand_are_those_of_the_loss(workload)
