"""Statistics on made-up series whose truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tuner.contract.measurement import Measurement, MemoryPeak
from tuner.contract.statistics import (
    drift,
    half_width,
    mean_interval,
    paired_gain,
    prediction_interval,
    rate_interval,
    throughput,
    warmup_cut,
)


def noisy_steps(rng: np.random.Generator, count: int, correlation: float, spread: float = 0.05) -> NDArray[np.float64]:
    """Step times around 1 s whose noise follows an AR(1) process."""
    noise = np.zeros(count)
    shocks = rng.normal(0, spread * math.sqrt(1 - correlation**2), count)
    noise[0] = rng.normal(0, spread)
    for i in range(1, count):
        noise[i] = correlation * noise[i - 1] + shocks[i]
    return 1.0 + noise


@pytest.mark.parametrize(("correlation", "at_least"), [(0.0, 0.88), (0.5, 0.75)])
def test_the_interval_covers_the_truth(correlation: float, at_least: float) -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        interval = rate_interval(noisy_steps(rng, 100, correlation).tolist(), 8)
        hits += interval.low <= 8.0 <= interval.high
    assert hits / 200 >= at_least


def test_more_steps_make_a_narrower_interval() -> None:
    rng = np.random.default_rng(2)
    few, many = (half_width(rate_interval(noisy_steps(rng, n, 0.3).tolist(), 8)) for n in (30, 1000))
    assert many < few / 2


def test_throughput_is_samples_over_seconds_of_the_steady_part() -> None:
    measured = Measurement(
        samples_per_step=16, step_s=(9.0, 9.0, *[0.5] * 20), warmup_steps=2, memory=MemoryPeak(process_bytes=1)
    )
    interval = throughput(measured)
    assert (interval.value, interval.low, interval.high) == (32.0, 32.0, 32.0)


def test_two_steps_give_a_value_but_no_confidence() -> None:
    interval = rate_interval([0.5, 0.5], 4)
    assert interval.value == 8.0
    assert half_width(interval) == math.inf


def test_no_steady_step_is_an_error() -> None:
    with pytest.raises(ValueError, match="no steady step"):
        rate_interval([], 4)


def test_a_level_series_is_steady_from_the_start() -> None:
    steps = noisy_steps(np.random.default_rng(3), 60, 0.0, 0.02)
    assert warmup_cut(steps.tolist()) == 1


@pytest.mark.parametrize("slow", [5, 15, 40])
def test_slow_first_steps_are_cut(slow: int) -> None:
    steps = noisy_steps(np.random.default_rng(4), 200, 0.0, 0.02)
    steps[:slow] += np.linspace(3.0, 1.0, slow)
    cut = warmup_cut(steps.tolist())
    assert cut is not None
    assert abs(float(np.mean(steps[cut:])) - 1.0) < 0.05


def test_a_series_that_keeps_falling_is_never_steady() -> None:
    steps = np.linspace(4.0, 1.0, 40)
    assert warmup_cut(steps.tolist()) is None


def test_five_steps_are_too_few_to_judge() -> None:
    assert warmup_cut([1.0] * 5) is None


def test_a_paired_gain_is_found_through_a_drift_both_sides_share() -> None:
    rng = np.random.default_rng(5)
    host = np.linspace(1.0, 0.6, 8)
    baseline = 100 * host * np.exp(rng.normal(0, 0.005, 8))
    candidate = 110 * host * np.exp(rng.normal(0, 0.005, 8))
    gain = paired_gain(candidate.tolist(), baseline.tolist())
    assert gain.low > 1.05
    assert gain.low < 1.10 < gain.high


def test_false_gains_stay_at_their_level() -> None:
    rng = np.random.default_rng(6)
    false = 0
    for _ in range(400):
        same = rng.lognormal(0, 0.03, (2, 6))
        false += paired_gain(same[0].tolist(), same[1].tolist()).low > 1.0
    assert false / 400 <= 0.05


def test_one_pair_proves_nothing() -> None:
    gain = paired_gain([2.0], [1.0])
    assert (gain.value, gain.low, gain.high) == (2.0, 0.0, math.inf)


def test_the_next_value_may_lie_wider_than_the_mean() -> None:
    values = [10.0, 10.4, 9.7, 10.1, 9.9]
    mean, following = mean_interval(values), prediction_interval(values)
    assert following.low < mean.low < mean.high < following.high


def test_drift_says_how_much_faster_the_host_is_now() -> None:
    assert drift([0.2, 0.2], [0.1, 0.1]) == pytest.approx(0.5)
    assert drift([], [0.1]) is None


def test_a_piece_of_reference_work_that_was_interrupted_does_not_look_like_drift() -> None:
    assert drift([0.1, 0.1, 0.1, 5.0], [0.1, 0.1]) == pytest.approx(1.0)


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=40), st.integers(1, 512))
def test_a_rate_lies_within_its_own_interval(steps: list[float], samples: int) -> None:
    interval = rate_interval(steps, samples)
    assert interval.low <= interval.value * (1 + 1e-9)
    assert interval.value <= interval.high * (1 + 1e-9)


@given(st.lists(st.floats(1e-6, 1e3), max_size=60))
def test_a_warm_up_cut_leaves_at_least_six_steps(steps: list[float]) -> None:
    cut = warmup_cut(steps)
    assert cut is None or 1 <= cut <= len(steps) - 6
