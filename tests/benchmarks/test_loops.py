"""The race of loops: contenders in processes of their own, in turn, all doing the same training."""

from __future__ import annotations

from dataclasses import replace

import pytest
from torch import nn

from benchmarks import loops, loops_null
from benchmarks.loops_null import CONTENDERS, GOAL_CASE
from benchmarks.loops_pace import Contender, Job, Pace, Paced, measure, ratio_to

STEPS, ROUNDS = 5, 2


def race_of(names: list[str]) -> loops.Race:
    whole = loops.races("null", [GOAL_CASE], STEPS)[0]
    return replace(whole, contenders={name: CONTENDERS[name] for name in names})


@pytest.mark.slow
def test_our_loop_and_the_bare_one_train_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    found = loops.run(race_of([loops_null.BARE, loops_null.OURS]), ROUNDS, sets=1)
    blocks = found["blocks"]
    assert isinstance(blocks, dict)
    assert {name: [len(one) for one in sets] for name, sets in blocks.items()} == {
        loops_null.BARE: [ROUNDS],
        loops_null.OURS: [ROUNDS],
    }
    told = capsys.readouterr().out
    assert "all end with the same weights" in told
    assert loops_null.OURS in told


def test_every_trainer_that_is_installed_trains_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    peers = [name for name, one in CONTENDERS.items() if one.needs]
    ready = [name for name in peers if not CONTENDERS[name].missing]
    if not ready:
        pytest.skip("not run: pip install -e .[benchmarks]")
    loops.run(race_of([loops_null.BARE, loops_null.OURS, *peers]), ROUNDS, sets=1)
    told = capsys.readouterr().out
    assert "all end with the same weights" in told
    assert all(f"{name}: not run: pip install" in told for name in peers if name not in ready)


def absent(pace: Pace) -> nn.Module:
    raise AssertionError("never called")


def test_a_contender_that_is_not_installed_is_told_and_left_out() -> None:
    assert Contender(absent, ("no-such-distribution",)).missing == "pip install no-such-distribution"
    assert Contender(absent, ("torch",)).missing == ""


def broken(pace: Pace) -> nn.Module:
    raise ValueError("this loop does not start")


def find_broken(job: Job) -> Contender:
    return Contender(broken)


def test_a_loop_that_fails_ends_the_race_with_its_own_words() -> None:
    with pytest.raises(SystemExit, match=r"(?s)mine: .*this loop does not start"):
        measure(find_broken, {"mine": Job("any", "mine", STEPS, ROUNDS)}, sets=1)


def test_a_pace_hands_out_every_batch_in_turn_and_ends() -> None:
    pace = Pace(Job("any", "any", steps=3, rounds=1), per_step=2)
    batches = list(Paced(pace, ["a", "b", "c"]))
    assert len(batches) == pace.batches == len(Paced(pace, ["a"]))
    assert batches[:4] == ["a", "b", "c", "a"]


def test_a_ratio_is_formed_within_rounds_and_its_interval_knows_of_the_processes() -> None:
    """The host's speed differs by a factor of ten between rounds; one process of three is slower for its whole life."""
    base = [[1.0, 10.0, 2.0, 5.0]] * 3
    even = ratio_to([[1.1 * value for value in one] for one in base], base)
    assert (even.value, even.low, even.high) == pytest.approx((1.1, 1.1, 1.1))
    odd = ratio_to([[factor * value for value in one] for factor, one in zip((1.1, 1.1, 1.3), base, strict=True)], base)
    assert odd.value == pytest.approx(1.1)
    assert odd.high == pytest.approx(1.3)
