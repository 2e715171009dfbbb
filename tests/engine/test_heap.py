"""The heap simulation, and traces of jobs whose memory is known."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.engine_toys import answer, replies, toy_config
from tuner.contract.config import EmaConfig
from tuner.contract.measurement import Outcome
from tuner.contract.probe import ProbeKind
from tuner.engine.heap import Heap, heap_peak

KIB, LINGER = 1024, 30


def test_what_is_held_side_by_side_takes_little_more_than_its_bytes() -> None:
    sizes = [100 * KIB] * 20
    assert sum(sizes) <= heap_peak(sizes, []) <= 1.01 * sum(sizes)


def test_a_freed_tensor_s_hole_is_just_too_small_for_the_next_one_of_its_size() -> None:
    heap = Heap(LINGER)
    first, _, _ = heap.take(100 * KIB), heap.take(100 * KIB), heap.take(100 * KIB)
    before = heap.peak
    heap.give_back(*first)
    heap.take(100 * KIB)
    assert heap.peak > before


@pytest.mark.parametrize("waits", [False, True])
def test_holes_join_once_the_scraps_between_them_are_free_again(waits: bool) -> None:
    heap = Heap(LINGER)
    chunks = [heap.take(100 * KIB) for _ in range(10)]
    heap.take(KIB)  # nothing given back lies next to the top
    for chunk in chunks:
        heap.give_back(*chunk)
    for _ in range(LINGER if waits else 0):
        heap.take(KIB)
    before = heap.peak
    heap.take(350 * KIB)
    assert (heap.peak == before) is waits


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(KIB, 64 * KIB), st.booleans()), min_size=1, max_size=80))
def test_live_chunks_never_overlap_and_the_peak_covers_them(plan: list[tuple[int, bool]]) -> None:
    heap, live = Heap(LINGER), []
    for size, drops in plan:
        start, got = heap.take(size)
        assert got >= size
        assert start % 16 == 0
        live.append((start, got))
        if drops:
            heap.give_back(*live.pop(len(live) // 2))
        ordered = sorted(live)
        assert all(a + n <= b for (a, n), (b, _) in itertools.pairwise(ordered))
        assert max((a + n for a, n in live), default=0) <= heap.peak


def traced(**changes: object) -> dict[str, float]:
    (reply,) = replies(answer(ProbeKind.TRACE, toy_config({"width": 256, "depth": 3}, **changes)))
    assert reply.outcome is Outcome.OK, reply.message
    return reply.values


def test_the_heap_needs_at_least_the_live_tensors() -> None:
    found = traced(micro_batch_size=256, accumulation_steps=1)
    assert found["predicted_heap_bytes"] >= found["predicted_peak_bytes"]


def test_averaged_weights_and_waiting_gradients_are_in_the_trace() -> None:
    plain = traced(micro_batch_size=8, accumulation_steps=1, ema=None)
    averaged = traced(micro_batch_size=8, accumulation_steps=1, ema=EmaConfig(half_life_samples=1000))
    weights = averaged["predicted_peak_bytes"] - plain["predicted_peak_bytes"]
    assert weights > 3 * 256 * 256 * 4 * 0.9
    large = {"micro_batch_size": 512, "ema": None}
    once, twice = traced(accumulation_steps=1, **large), traced(accumulation_steps=2, **large)
    assert twice["predicted_peak_bytes"] - once["predicted_peak_bytes"] == pytest.approx(weights, rel=0.7)
    assert twice["predicted_peak_bytes"] > once["predicted_peak_bytes"]
