"""Does the ship gate keep its error level under noise that is not normal? Whole gates, figures drawn: SIMULATION."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import beta

from tests.search.simulated_world import make_spec
from tuner.search.gate import Contest, Standing, judged, looks_of, order_of
from tuner.search.objective import Figures

GATES = 1000
SPEC = make_spec()
Slowness = Callable[[int, np.random.Generator], NDArray[np.float64]]
"""(probes, generator) -> log of how much slower than usual each of consecutive probes is."""


def normal(count: int, rng: np.random.Generator) -> NDArray[np.float64]:
    return 0.02 * rng.standard_normal(count)


def outliers(count: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """One probe in twenty is 15 % slower."""
    return normal(count, rng) + math.log(1.15) * (rng.random(count) < 0.05)


def two_speeds(count: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Half of all processes get a layout that is 3 % slower."""
    return 0.1 * normal(count, rng) + 0.03 * (rng.random(count) < 0.5)


def autoregressive(count: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """AR(1) with correlation 0.5 from probe to probe: the worst for pairs, whose halves it hardly ties together."""
    noise, values = normal(count, rng), np.empty(count)
    values[0] = noise[0]
    for at in range(1, count):
        values[at] = 0.5 * values[at - 1] + math.sqrt(0.75) * noise[at]
    return values


def drifting(count: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """A random walk: the host never comes back to what it was."""
    walk: NDArray[np.float64] = np.cumsum(normal(count, rng))
    return walk


def rhythmic(count: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Something comes back every fourth probe and slows two in a row by 6 %: the rhythm of alternating orders."""
    phase = int(rng.integers(0, 4))
    return 0.3 * normal(count, rng) + 0.06 * ((np.arange(count) + phase) % 4 < 2)


def gate(slowness: Slowness, seed: int, *, finalists: int = 1, speed: float = 1.0) -> bool:
    """One gate to its end; finalists are `speed` times as fast as the reference. True when it found a gain."""
    looks = looks_of(SPEC.gate)
    confidence = 1 - SPEC.gate.alpha / (finalists * len(looks))
    state = Standing(Contest((SPEC.baseline,) * (finalists + 1), looks[-1], looks, confidence, SPEC))
    probes = iter(slowness(looks[-1] * (finalists + 1), np.random.default_rng([seed, finalists])))
    for pair in range(looks[-1]):
        order = order_of(SPEC.model_copy(update={"seed": seed}), state.active, pair)
        figures = {side: Figures((speed if side else 1.0) * math.exp(-next(probes))) for side in order}
        for finalist in state.active:
            state.pairs.setdefault(finalist, []).append((figures[finalist], figures[0]))
        if pair + 1 in looks and judged(state, last=pair + 1 == looks[-1]):
            break
    return bool(state.won)


@pytest.mark.parametrize("slowness", [normal, outliers, two_speeds, autoregressive, drifting, rhythmic])
def test_false_gains_stay_below_the_error_level(slowness: Slowness) -> None:
    """The upper 95 % bound (Clopper and Pearson, one-sided) of the rate lies below 5 %."""
    found = sum(gate(slowness, seed) for seed in range(GATES))
    assert beta.ppf(0.95, found + 1, GATES - found) <= 0.05


def test_two_finalists_share_the_error_level() -> None:
    found = sum(gate(outliers, seed, finalists=2) for seed in range(400))
    assert beta.ppf(0.95, found + 1, 400 - found) <= 0.05


def test_outliers_cost_power_and_not_honesty() -> None:
    """Real gains of a tenth are proven through them nearly always."""
    assert sum(gate(outliers, seed, speed=1.10) for seed in range(100)) >= 90
