"""The author's suite finds leakage, figures that are not finite, trivial values of nothing, and needless preparing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.engine.coupled_toys import Augmented
from tests.engine.judged_toys import Judged
from tests.toys import Toy
from tuner.contract.workload import Batch, Progress, Trivial
from tuner.testing import WorkloadContract


def suite(cls: type[Toy]) -> tuple[WorkloadContract, Toy]:
    """The suite for `cls`, which need not be importable by name."""

    class Suite(WorkloadContract):
        workload = "tests.toys:Toy"

        def _make(self) -> Any:
            return cls({"samples": 64})

    return Suite(), cls({"samples": 64})


def test_a_good_workload_passes(tmp_path: Path) -> None:
    contract, workload = suite(Judged)
    workload.prepare(tmp_path, lambda done, total, text: None)
    contract.test_preparing_again_makes_nothing_anew(workload, tmp_path)
    contract.test_no_item_is_in_both_splits(workload)
    contract.test_evaluation_gives_finite_figures(workload)
    contract.test_trivial_values_belong_to_figures_that_are_given(workload, tmp_path)


def test_one_leaked_item_is_found_and_named() -> None:
    class Leaky(Toy):
        def dataset(self, split: Any) -> Any:
            made: Any = super().dataset(split)
            if split == "valid":
                trained: Any = super().dataset("train")
                for values in ("x", "y", "mask"):
                    getattr(made, values)[7] = getattr(trained, values)[33]
            return made

    contract, workload = suite(Leaky)
    with pytest.raises(AssertionError, match="item 7 of the validation split is item 33 of the training split"):
        contract.test_no_item_is_in_both_splits(workload)


def test_a_figure_that_is_not_finite_is_found() -> None:
    class Undefined(Toy):
        def evaluate(self, model: nn.Module, batches: Iterable[Batch]) -> Mapping[str, float]:
            return {**super().evaluate(model, batches), "auc": float("nan")}

    contract, workload = suite(Undefined)
    with pytest.raises(AssertionError, match="auc is nan"):
        contract.test_evaluation_gives_finite_figures(workload)


def test_a_trivial_value_of_a_figure_nobody_gives_is_found(tmp_path: Path) -> None:
    class Boasting(Judged):
        def trivial(self) -> Mapping[str, Trivial]:
            return {"fid": Trivial(value=400.0, text="noise", higher_is_better=False)}

    contract, workload = suite(Boasting)
    with pytest.raises(AssertionError, match="'fid' is given by neither evaluate nor assess: sharpness, valid_fit"):
        contract.test_trivial_values_belong_to_figures_that_are_given(workload, tmp_path)


def test_preparing_anew_is_found(tmp_path: Path) -> None:
    class Forgetful(Toy):
        def prepare(self, cache_dir: Path, progress: Progress) -> None:
            torch.save(torch.rand(3), cache_dir / f"made-{torch.randint(1 << 30, ())}.pt")

    contract, workload = suite(Forgetful)
    workload.prepare(tmp_path, lambda done, total, text: None)
    with pytest.raises(AssertionError, match=r"wrote made-\d+\.pt again"):
        contract.test_preparing_again_makes_nothing_anew(workload, tmp_path)


@pytest.mark.parametrize("accepted", [True, False])
def test_random_augmentation_is_named_unless_it_is_accepted(accepted: bool) -> None:
    contract, workload = suite(Augmented)
    type(contract).augments = accepted
    contract.test_the_same_index_gives_the_same_item(workload, "valid")
    if accepted:
        contract.test_the_same_index_gives_the_same_item(workload, "train")
        return
    with pytest.raises(
        AssertionError, match=r"changes between reads; draw in `loss` from sample_seed.*`augments = True`"
    ):
        contract.test_the_same_index_gives_the_same_item(workload, "train")
