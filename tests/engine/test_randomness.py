"""Draws belong to samples: independent of the batch, of each other, and distributed as they say."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tuner.randomness import integers, normal, sample_seeds, uniform

SEEDS = sample_seeds(7, 0, torch.arange(4000))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 3999), min_size=1, max_size=40), st.integers(0, 5))
def test_a_sample_draws_the_same_in_whatever_batch_it_travels(places: list[int], stream: int) -> None:
    batch = SEEDS[torch.tensor(places)]
    for draw in (normal, uniform):
        together = draw(SEEDS, (3, 5), stream=stream)[torch.tensor(places)]
        assert torch.equal(draw(batch, (3, 5), stream=stream), together)
    assert torch.equal(integers(batch, 1000, stream=stream), integers(SEEDS, 1000, stream=stream)[torch.tensor(places)])


def test_moments_of_uniform_and_normal_numbers() -> None:
    flat = uniform(SEEDS, (50,), stream=0).double()
    assert float(flat.min()) >= 0
    assert float(flat.max()) < 1
    assert abs(float(flat.mean()) - 0.5) < 5 * math.sqrt(1 / 12 / flat.numel())
    bell = normal(SEEDS, (50,), stream=0).double()
    assert abs(float(bell.mean())) < 5 / math.sqrt(bell.numel())
    assert abs(float(bell.var()) - 1) < 0.02
    assert abs(float((bell**4).mean()) - 3) < 0.1
    assert bool(torch.isfinite(bell).all())


def test_integers_reach_every_value_equally_often() -> None:
    counts = integers(sample_seeds(1, 0, torch.arange(100_000)), 10, stream=4).bincount(minlength=10)
    expected = 10_000
    assert float(((counts - expected).double() ** 2 / expected).sum()) < 40  # chi square with 9 degrees of freedom


def test_streams_epochs_runs_and_neighbours_are_unrelated() -> None:
    first = normal(SEEDS, (20,), stream=0).flatten()
    others = [
        normal(SEEDS, (20,), stream=1),
        normal(sample_seeds(7, 1, torch.arange(4000)), (20,), stream=0),
        normal(sample_seeds(8, 0, torch.arange(4000)), (20,), stream=0),
        normal(SEEDS.roll(1), (20,), stream=0),
    ]
    for other in others:
        correlation = float(torch.corrcoef(torch.stack((first, other.flatten())))[0, 1])
        assert abs(correlation) < 5 / math.sqrt(first.numel())


def test_seeds_of_samples_do_not_collide() -> None:
    epochs = torch.arange(50).repeat_interleave(2000)
    seeds = sample_seeds(0, epochs, torch.arange(2000).repeat(50))
    assert len(seeds.unique()) == len(seeds)
    assert torch.equal(seeds[2000:4000], sample_seeds(0, 1, torch.arange(2000)))


def test_dtype_and_odd_shapes() -> None:
    assert normal(SEEDS[:2], (7,), stream=0, dtype=torch.float64).dtype == torch.float64
    assert uniform(SEEDS[:2], (), stream=0, dtype=torch.bfloat16).shape == (2,)


def test_high_must_be_sensible() -> None:
    with pytest.raises(ValueError, match=r"1 <= high <= 2\*\*31.*high=0"):
        integers(SEEDS, 0, stream=0)
