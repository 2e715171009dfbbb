"""Choosing under noise: measurements and the model believed together, contenders measured again, peaks with room."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.search.simulated_world import World, drive, make_spec
from tuner.contract.measurement import MemoryPeak
from tuner.contract.probe import ProbeKind, ProbeRow, Stage
from tuner.contract.space import SearchSpace
from tuner.search.belief import PROCESS_NOISE, Belief, believe, process_noise
from tuner.search.confirm import AGAIN, CONFIRMED, TIMES
from tuner.search.gate import finalists
from tuner.search.history import History
from tuner.search.points import Point, point_of
from tuner.search.situation import situation_of
from tuner.search.view import View

NOISY = World(process_noise=0.08)


def test_a_measurement_is_believed_by_its_error() -> None:
    prior = Belief(math.log(100.0), 0.05)
    once, often = believe([120.0], 0.05, prior), believe([120.0] * 16, 0.05, prior)
    assert once.rate == pytest.approx(math.sqrt(100.0 * 120.0)), "both are off by as much"
    assert 118.0 < often.rate < 120.0
    assert often.sd < once.sd < 0.05
    assert believe([120.0], 0.05, None).rate == pytest.approx(120.0)


def test_the_noise_between_processes_is_learnt_from_repeats() -> None:
    rng = np.random.default_rng(0)
    repeats = [list(100 * np.exp(0.1 * rng.standard_normal(4))) for _ in range(30)]
    assert process_noise(repeats) == pytest.approx(0.1, rel=0.15)
    assert process_noise([[100.0], [50.0]]) == pytest.approx(PROCESS_NOISE), "no repeats, no news"


def test_contenders_are_measured_again_within_bounds() -> None:
    studies = [drive(make_spec(budget_s=400.0), NOISY, seed=seed) for seed in range(4)]
    again = [[row for row in ended.rows if row.stage is Stage.CONFIRM] for ended in studies]
    assert any(again)
    assert max(len(rows) for rows in again) <= CONFIRMED + AGAIN
    for ended in studies:
        searched = [row.config.digest() for row in ended.rows if row.kind is ProbeKind.END_TO_END and row.pair is None]
        assert max(searched.count(digest) for digest in searched) <= TIMES + 1, "and the soak"


def test_a_clear_leader_is_not_measured_again() -> None:
    spec = make_spec(space=SearchSpace(micro_batch_size=(1, 2, 4, 8, 16)))
    ended = drive(spec, World(alpha=0.2, process_noise=0.002, step_noise=0.002))
    assert ended.decision.kind == "winner"
    assert not [row for row in ended.rows if row.stage is Stage.CONFIRM]


def test_a_peak_close_to_the_budget_makes_no_candidate() -> None:
    """The next process of it might not fit."""
    ended = drive(make_spec(), World(alpha=0.05))
    searched = [row for row in ended.rows if row.stage not in (Stage.GATE, Stage.SOAK)]
    first = situation_of(View(ended.spec, searched)).forecast.leader
    tight = [_at_peak(row, 0.98 * ended.spec.memory_budget_bytes) if _is(row, first) else row for row in searched]
    forecast = situation_of(View(ended.spec, tight)).forecast
    assert first in forecast.rates, "it fits"
    assert forecast.leader != first
    assert first not in finalists(situation_of(View(ended.spec, tight)))


def _is(row: ProbeRow, point: Point) -> bool:
    return row.kind is ProbeKind.END_TO_END and point_of(row.config) == point


def _at_peak(row: ProbeRow, peak: float) -> ProbeRow:
    assert row.measurement is not None
    memory = MemoryPeak(process_bytes=0, reserved_bytes=round(peak))
    return row.model_copy(update={"measurement": row.measurement.model_copy(update={"memory": memory})})


def test_a_hosts_peak_is_told_by_the_first_point_of_a_process_alone() -> None:
    ended = drive(make_spec(), World())
    shared = [row for row in ended.rows if row.kind is ProbeKind.COMPUTE and row.measurement is not None]
    later = next(row for row in shared if row.index > 0)
    first = next(row for row in shared if row.index == 0)
    for row, told in ((first, True), (later, False)):
        found = History(ended.spec, [_on_a_host(row, ended.spec.memory_budget_bytes)])
        assert (found.size_of(row.kind, point_of(row.config)) in found.shares) is told
        assert bool(found.overruns) is told


def _on_a_host(row: ProbeRow, budget: int) -> ProbeRow:
    """The same row without a device, its peak beyond the budget."""
    assert row.measurement is not None
    memory = MemoryPeak(process_bytes=2 * budget)
    return row.model_copy(update={"measurement": row.measurement.model_copy(update={"memory": memory})})
