"""A cap on host memory holds for the compiler too: compile modes are not tried under one. On a GPU it is a budget."""

from __future__ import annotations

import pytest

from tests.search.simulated_world import GIB, make_baseline, make_spec
from tuner.commands.optimize import under_cap, without_compiling
from tuner.contract.config import CompileMode
from tuner.contract.space import Knob, SearchSpace

SPACE = SearchSpace(compile=(CompileMode.EAGER, CompileMode.DEFAULT, CompileMode.MAX_AUTOTUNE))


def test_what_the_compiler_cannot_do_is_dropped_with_the_reason() -> None:
    space, dropped = without_compiling(SPACE, make_baseline())
    assert space.compile == (CompileMode.EAGER,)
    assert [(item.knob, item.value) for item in dropped] == [(Knob.COMPILE, "default"), (Knob.COMPILE, "max-autotune")]
    assert all("--memory-cap" in item.reason for item in dropped)


def test_what_the_baseline_runs_stays() -> None:
    space, dropped = without_compiling(SPACE, make_baseline(compile=CompileMode.DEFAULT))
    assert space.compile == (CompileMode.EAGER, CompileMode.DEFAULT)
    assert [item.value for item in dropped] == ["max-autotune"]


@pytest.mark.parametrize(("kind", "budget_gib"), [("cuda", 0.92 * 4), ("cpu", 12.0)])
def test_only_a_gpus_cap_bounds_what_may_be_planned(kind: str, budget_gib: float) -> None:
    device = make_spec().device.model_copy(update={"kind": kind})
    assert under_cap(12 * GIB, 4 * GIB, device) == int(budget_gib * GIB)
    assert under_cap(12 * GIB, None, device) == 12 * GIB
    assert under_cap(2 * GIB, 4 * GIB, device) == 2 * GIB
