"""Order, schedule, averaging: counted in samples, so none of them changes its meaning with the batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.engine_toys import CPU, toy_config, toy_trainer
from tests.toys import Toy
from tuner.contract.config import EmaConfig, LoaderConfig, ScheduleConfig, ScheduleKind
from tuner.engine.ema import ema_decay
from tuner.engine.loader import SampleOrder, StreamSource, valid_batches
from tuner.engine.optim import lr_factor


def seeds_of(samples: int, micro: int, workers: int = 0, start: int = 0) -> list[int]:
    config = toy_config({"samples": 50}, micro_batch_size=micro, accumulation_steps=1)
    config = config.model_copy(update={"loader": LoaderConfig(num_workers=workers)})
    source = StreamSource(Toy(config.options), config, CPU, start=start)
    seeds: list[int] = []
    while len(seeds) < samples:
        seeds += source.next_batch()["sample_seed"].tolist()
    source.close()
    return seeds[:samples]


@pytest.mark.parametrize(("micro", "workers"), [(16, 0), (7, 0), (3, 1), (8, 2)])
def test_the_order_of_samples_is_the_same_however_they_are_fetched(micro: int, workers: int) -> None:
    assert seeds_of(130, micro, workers) == seeds_of(130, 1)


def test_a_start_position_goes_on_in_the_middle_of_an_epoch() -> None:
    assert seeds_of(60, 8, start=37) == seeds_of(97, 1)[37:]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 200), st.integers(0, 5))
def test_each_epoch_is_a_permutation_of_its_own(size: int, seed: int) -> None:
    order = SampleOrder(size, seed)
    epochs = [[order.key(epoch * size + i) for i in range(size)] for epoch in range(3)]
    for number, keys in enumerate(epochs):
        assert {epoch for epoch, _ in keys} == {number}
        assert sorted(index for _, index in keys) == list(range(size))
    if size > 20:
        assert [i for _, i in epochs[0]] != [i for _, i in epochs[1]]


def test_validation_is_the_same_every_time() -> None:
    config = toy_config()
    first, second = (list(valid_batches(Toy({}), config)) for _ in range(2))
    assert sum(len(batch["x"]) for batch in first) == 64
    assert all(torch.equal(a[key], b[key]) for a, b in zip(first, second, strict=True) for key in a)


def test_an_old_weight_has_halved_after_one_half_life() -> None:
    config = EmaConfig(half_life_samples=640, warmup_ratio=0.0)
    for step in (1, 16, 64, 640):
        kept = 1.0
        for _ in range(640 // step):
            kept *= ema_decay(config, 10**6, step)
        assert kept == pytest.approx(0.5)


def test_early_on_the_average_forgets_the_initial_weights() -> None:
    config = EmaConfig(half_life_samples=100_000, warmup_ratio=0.05)
    kept = 1.0
    for seen in range(16, 4000, 16):
        kept *= ema_decay(config, seen, 16)
    assert kept < 1e-3
    assert ema_decay(config, 10**9, 16) == pytest.approx(0.5 ** (16 / 100_000))


def test_the_average_is_the_weighted_sum_of_past_weights() -> None:
    trainer = toy_trainer(toy_config(ema=EmaConfig(half_life_samples=48, warmup_ratio=0.0)))
    assert trainer.ema is not None
    (weight, *_), (average, *_) = trainer.model.parameters(), trainer.ema.model.parameters()
    expected = weight.detach().clone()
    for _ in range(6):
        trainer.step()
        expected = expected.lerp(weight.detach(), 1 - 0.5 ** (16 / 48))
    assert torch.allclose(average, expected, atol=1e-6)
    assert not torch.allclose(average, weight, atol=1e-4)


def test_schedule_shapes() -> None:
    cosine = ScheduleConfig(kind=ScheduleKind.COSINE, warmup_samples=100, final_factor=0.1)
    linear = cosine.model_copy(update={"kind": ScheduleKind.LINEAR})
    constant = ScheduleConfig(warmup_samples=100)
    assert [lr_factor(constant, 1100, s) for s in (0, 50, 100, 5000)] == pytest.approx([0, 0.5, 1, 1])
    assert [lr_factor(cosine, 1100, s) for s in (100, 600, 1100, 9999)] == pytest.approx([1, 0.55, 0.1, 0.1])
    assert [lr_factor(linear, 1100, s) for s in (100, 350, 1100)] == pytest.approx([1, 0.775, 0.1])


def test_the_rate_at_a_sample_does_not_depend_on_the_batch() -> None:
    schedule = ScheduleConfig(kind=ScheduleKind.COSINE, warmup_samples=512)
    curves = []
    for micro, accumulation in ((8, 2), (32, 2)):
        config = toy_config(micro_batch_size=micro, accumulation_steps=accumulation, schedule=schedule)
        trainer = toy_trainer(config)
        size = micro * accumulation
        curves.append([trainer.step().lr for _ in range(1024 // size)])
    means = [sum(curves[0][i : i + 4]) / 4 for i in range(0, len(curves[0]), 4)]
    assert means == pytest.approx(curves[1], rel=2e-2)
