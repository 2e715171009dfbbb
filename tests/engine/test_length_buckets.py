"""Samples of about equal length in one step: whose length is known, in an order that no cutting of a step changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.engine_toys import CPU, toy_config
from tests.toys import Toy
from tuner.contract.config import LoaderConfig
from tuner.contract.errors import WorkloadError
from tuner.contract.workload import Split
from tuner.engine.loader import WINDOW_STEPS, BucketedOrder, SampleOrder, StreamSource, first_batches
from tuner.randomness import sample_seeds

SIZE = 300


def length_of(index: int) -> int:
    return 1 + index * 7919 % 97


class Ragged(Toy):
    """A toy that says how long its samples are."""

    def lengths(self, split: Split) -> Sequence[int] | None:
        return [length_of(index) for index in range(SIZE)] if split == "train" else None


def order(step: int, seed: int = 0) -> BucketedOrder:
    return BucketedOrder(SampleOrder(SIZE, seed), [length_of(index) for index in range(SIZE)], step)


def lengths_of_steps(steps: int, step: int) -> list[list[int]]:
    made = order(step)
    return [[length_of(made.key(at * step + i)[1]) for i in range(step)] for at in range(steps)]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 24), st.integers(0, 3))
def test_a_window_has_the_samples_of_the_plain_order_each_once(step: int, seed: int) -> None:
    made, plain = order(step, seed), SampleOrder(SIZE, seed)
    window = WINDOW_STEPS * step
    for number in range(2):
        positions = range(number * window, (number + 1) * window)
        assert sorted(made.key(i) for i in positions) == sorted(plain.key(i) for i in positions)


def test_the_lengths_of_one_step_are_close_together() -> None:
    steps = lengths_of_steps(2 * WINDOW_STEPS, 16)
    spread = sum(max(lengths) - min(lengths) for lengths in steps) / len(steps)
    assert spread < 8


def test_the_first_step_has_the_longest_of_its_window_and_a_few_steps_are_like_all() -> None:
    steps = lengths_of_steps(WINDOW_STEPS * 3, 16)
    assert max(steps[0]) == max(max(lengths) for lengths in steps[:WINDOW_STEPS])
    means = [sum(lengths) / len(lengths) for lengths in steps]
    overall = sum(means) / len(means)
    for start in range(0, len(means) - 8, 8):
        assert sum(means[start : start + 8]) / 8 == pytest.approx(overall, rel=0.15)


def test_steps_do_not_come_in_the_same_order_in_every_window() -> None:
    steps = [sum(lengths) for lengths in lengths_of_steps(WINDOW_STEPS * 4, 16)]
    ranks = {
        tuple(sorted(range(WINDOW_STEPS), key=steps[at : at + WINDOW_STEPS].__getitem__))
        for at in range(0, len(steps), WINDOW_STEPS)
    }
    assert len(ranks) > 1


def seeds_of(micro: int, accumulation: int, workers: int = 0, start: int = 0) -> list[int]:
    """Seeds of the samples of 6 steps from `start` on."""
    config = toy_config({"samples": SIZE}, micro_batch_size=micro, accumulation_steps=accumulation)
    config = config.model_copy(update={"loader": LoaderConfig(num_workers=workers)})
    source = StreamSource(Ragged(config.options), config, CPU, start=start)
    seeds = [seed for _ in range(6) for batch in source.next_group().batches for seed in batch["sample_seed"].tolist()]
    source.close()
    return seeds


@pytest.mark.parametrize(("micro", "accumulation", "workers"), [(8, 2, 0), (4, 4, 0), (1, 16, 0), (8, 2, 2)])
def test_a_step_has_the_same_samples_however_it_is_cut(micro: int, accumulation: int, workers: int) -> None:
    assert seeds_of(micro, accumulation, workers) == seeds_of(16, 1)


def test_a_run_goes_on_where_it_was_stopped() -> None:
    assert seeds_of(8, 2, start=48)[:48] == seeds_of(8, 2)[48:]


def test_probes_on_resident_batches_get_the_same_samples() -> None:
    config = toy_config({"samples": SIZE}, micro_batch_size=16, accumulation_steps=1)
    workload: Any = Ragged(config.options)
    fetched = [batch["sample_seed"].tolist() for batch in first_batches(workload, config, 6)]
    assert [seed for seeds in fetched for seed in seeds] == seeds_of(16, 1)
    longest = sorted(range(SIZE), key=length_of)[-16:]
    known = {int(seed) for seed in sample_seeds(config.seed, 0, torch.tensor(longest))}
    assert len(known & set(fetched[0])) > 0


def test_a_number_of_lengths_that_does_not_fit_is_refused() -> None:
    with pytest.raises(WorkloadError, match="lengths: 3 were given for 300 training samples"):
        BucketedOrder(SampleOrder(SIZE, 0), [1, 2, 3], 16)
