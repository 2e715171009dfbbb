"""A cap on host memory holds for the compiler too, so compile modes are not tried under one."""

from __future__ import annotations

from tests.search.simulated_world import make_baseline
from tuner.commands.optimize import without_compiling
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
