"""Python takes what YAML takes: an enum by its value, a tuple as a list. Everything else is as strict as before."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from tuner.contract.base import parse
from tuner.contract.config import CompileMode, OptimizerConfig, OptimizerName, Precision, RunConfig
from tuner.contract.space import SearchSpace

OPTIMIZER: dict[str, Any] = {"name": "sgd", "lr": 0.1, "betas": [0.9, 0.99]}


def config(**changes: Any) -> RunConfig:
    words: dict[str, Any] = {"workload": "a:B", "micro_batch_size": 2, "horizon_samples": 8}
    return RunConfig(**{**words, "optimizer": OptimizerConfig(lr=0.1), **changes})


def test_enums_from_their_values_and_tuples_from_lists() -> None:
    optimizer = OptimizerConfig(**OPTIMIZER)
    assert optimizer == parse(OptimizerConfig, OPTIMIZER)
    assert optimizer.name is OptimizerName.SGD
    assert optimizer.betas == (0.9, 0.99)
    made = config(precision="bf16", compile="max-autotune")
    assert (made.precision, made.compile) == (Precision.BF16, CompileMode.MAX_AUTOTUNE)
    lists: dict[str, Any] = {"precision": ["fp32", "bf16"], "micro_batch_size": [8, 16], "options": {"width": [1, 2]}}
    space = SearchSpace(**lists)
    assert space.precision == (Precision.FP32, Precision.BF16)
    assert space.options == {"width": (1, 2)}


@pytest.mark.parametrize(
    "wrong",
    [{"lr": "3e-4"}, {"lr": True}, {"name": "lion"}, {"name": 1}, {"betas": {0.9, 0.99}}, {"betas": ["0.9", 0.99]},
     {"betas": "ab"}, {"betas": [0.9]}, {"fused": 1}],
)  # fmt: skip
def test_what_was_refused_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        OptimizerConfig(**{**OPTIMIZER, **wrong})


@pytest.mark.parametrize("wrong", [[True], ["8"], [8.5]])
def test_items_of_a_list_are_strict_too(wrong: Any) -> None:
    with pytest.raises(ValidationError, match="micro_batch_size"):
        SearchSpace(micro_batch_size=wrong)
