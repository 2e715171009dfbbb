"""Side-by-side timing: every way has its turn, the ratio is formed within a round, and its interval holds the truth."""

from __future__ import annotations

import pytest

from benchmarks.ratio import interleaved, paired_ratio, print_table


def test_ways_take_turns_and_the_one_that_begins_rotates() -> None:
    calls: list[str] = []
    ways = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    seconds = interleaved(ways, rounds=4, warmup=2)
    assert "".join(calls) == "abcabc" + "abc" + "bca" + "cab" + "abc"
    assert {name: len(times) for name, times in seconds.items()} == {"a": 4, "b": 4, "c": 4}


def test_a_drifting_host_does_not_blur_the_ratio() -> None:
    fast = [1.0 + 0.5 * number for number in range(10)]
    slow = [3.0 * second * (1 + 0.01 * (-1) ** number) for number, second in enumerate(fast)]
    ratio = paired_ratio(slow, fast)
    assert ratio.low < ratio.value < ratio.high
    assert (ratio.low, ratio.high) == pytest.approx((3.0, 3.0), rel=0.02)
    assert str(ratio) == "3.00 (2.98-3.02)"
    assert str(paired_ratio([2.0], [1.0])) == "2.00 (one round: no interval)"


@pytest.mark.parametrize(("slow", "fast"), [([], []), ([1.0], [1.0, 2.0]), ([0.0, 1.0], [1.0, 1.0])])
def test_unpaired_seconds_are_refused(slow: list[float], fast: list[float]) -> None:
    with pytest.raises(ValueError, match="seconds"):
        paired_ratio(slow, fast)


def test_the_table_tells_time_per_unit_and_the_gain(capsys: pytest.CaptureFixture[str]) -> None:
    seconds = {"naive": [0.4, 0.4], "cached": [0.1, 0.1]}
    print_table("reading", seconds, "naive", units_per_call=10, unit="batch", machine=False)
    out = capsys.readouterr().out
    assert "| naive  | 40 " in out
    assert "| cached | 10 " in out
    assert "4.00 (4.00-4.00)" in out
    with pytest.raises(ValueError, match="'slow' is not among the ways naive, cached"):
        print_table("reading", seconds, "slow")
