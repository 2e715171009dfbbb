"""The lr stage's verdict: a veto needs more than one lucky batch, and what was not tried is said."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.search.simulated_world import World, drive, make_spec
from tuner.contract.study import LrSpec, StudySpec
from tuner.search.lr import exploded, judge, lr_notes

STEPS = 32


def noisy(level: list[float], seed: int, noise: float = 0.2) -> list[float]:
    rng = np.random.default_rng(seed)
    return [value * math.exp(noise * rng.standard_normal()) for value in level]


def flat(seed: int, noise: float = 0.2) -> list[float]:
    return noisy([0.4] * STEPS, seed, noise)


def test_one_lucky_first_batch_vetoes_nothing() -> None:
    """Seen: batches between 0.23 and 0.57, the first of them the luckiest, and rates too small to learn anything."""
    for seed in range(200):
        assert not exploded([0.226, *flat(seed)[1:]])


@pytest.mark.parametrize("noise", [0.01, 0.1, 0.3])
def test_noise_alone_is_hardly_ever_taken_for_an_explosion(noise: float) -> None:
    assert sum(exploded(flat(seed, noise)) for seed in range(400)) <= 2


@pytest.mark.parametrize(
    "level",
    [
        [0.4, *(80.0,) * (STEPS - 1)],
        [0.4 * 1.06**step for step in range(STEPS)],
        [0.4, *(30.0, 3.0) * (STEPS // 2)],
        [0.4, 80.0, 90.0, 85.0],
    ],
    ids=["leaps up at once", "climbs", "swings", "few steps"],
)
def test_a_loss_that_rises_is_seen_however_it_rises(level: list[float]) -> None:
    assert all(exploded(noisy(level, seed)) for seed in range(50))


def test_a_loss_that_falls_or_has_no_ratio_does_not_explode() -> None:
    assert not exploded([1.0 / (1 + step) for step in range(STEPS)])
    assert not exploded([-3.0, 1.0, 5.0, 90.0] * 8)
    assert not exploded([0.5])


def spec_of(*rates: float, **changes: object) -> StudySpec:
    space = make_spec().space.model_copy(update={"lr": rates})
    return make_spec(space=space, lr=LrSpec.model_validate({"samples": 256, "seeds": 3, **changes}))


def notes_of(world: World, *rates: float, **changes: object) -> list[str]:
    ended = drive(spec_of(*rates, **changes), world)
    return lr_notes(ended.rows, ended.spec)


@pytest.mark.parametrize(("best", "said"), [(5e-5, "a smaller rate"), (4e-4, "a larger rate")])
def test_a_lowest_loss_at_the_edge_of_the_list_is_told(best: float, said: str) -> None:
    notes = notes_of(World(losses=lambda lr: (1.0, 0.3 if lr == best else 0.5)), 5e-5, 2e-4, 4e-4)
    assert any(f"at the edge of the list ({best:g}): {said} was not tried" in note for note in notes)


def test_a_lowest_loss_between_others_or_below_a_vetoed_rate_is_no_edge() -> None:
    between = World(losses=lambda lr: (1.0, 0.3 if lr == 2e-4 else 0.5))
    assert not any("edge" in note for note in notes_of(between, 5e-5, 2e-4, 4e-4))
    below = World(losses=lambda lr: (1.0, 9.0 if lr == 4e-4 else 0.3 if lr == 2e-4 else 0.5))
    assert not any("edge" in note for note in notes_of(below, 5e-5, 2e-4, 4e-4))


def test_tune_lr_is_not_advised_to_who_has_typed_it() -> None:
    broken = World(losses=lambda lr: (1.0, 9.0))
    (line,) = [note for note in notes_of(broken, 5e-5, 2e-4, tune=True) if "baseline's own" in note]
    assert "--tune-lr" not in line
    assert "every rate tried was vetoed; list rates below 5e-05 in the study file (space: lr: [...])" in line
    sound = World(losses=lambda lr: (1.0, 9.0 if lr >= 1e-4 else 0.5))
    (line,) = [note for note in notes_of(sound, 5e-5, 2e-4) if "baseline's own" in note]
    assert "use --tune-lr to have it replaced" in line


def test_under_tune_a_lower_loss_within_the_noise_is_called_that() -> None:
    slightly = World(losses=lambda lr: (1.0, 0.499 if lr == 2e-4 else 0.5))
    notes = notes_of(slightly, 5e-5, 2e-4, 4e-4, tune=True, seeds=1)
    assert any("lr 0.0002: not proven lower than the baseline's" in note and "0.0001 is kept" in note for note in notes)


def test_every_rate_measured_is_counted() -> None:
    ended = drive(spec_of(5e-5, 2e-4), World())
    assert judge(ended.rows, ended.spec).measured == (5e-5, 1e-4, 2e-4)
