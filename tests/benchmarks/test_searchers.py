"""Searchers on a recorded grid: what each of them names, and how that is scored."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from benchmarks import scoring
from benchmarks.replaying import Job, find_grids, load, search
from benchmarks.scoring import Scale, Scene, split
from benchmarks.searchers import SEARCHERS, SLOW, TRIALS, Course, Trail
from tuner.contract.space import Knob, with_knobs
from tuner.contract.study import Objective
from tuner.probe.replay import Grid, ReplayRunner


@pytest.fixture(scope="module")
def grid(recording: Path) -> Grid:
    return load(str(recording))


@cache
def trails(grid: Grid, name: str, seed: int = 0) -> list[Trail]:
    runner = ReplayRunner(grid, seed=seed, repeats=split(grid, seed).search)
    return SEARCHERS[name](Course(grid.spec, grid.cells, runner, seed))


def test_a_split_uses_every_repeat_once_and_depends_on_the_seed(grid: Grid) -> None:
    splits = [split(grid, seed) for seed in range(20)]
    assert all(sorted((*halves.search, *halves.held_back)) == [0, 1, 2, 3] for halves in splits)
    assert len(set(splits)) > 1
    assert split(grid, 7) == split(grid, 7)


def test_regret_is_zero_at_the_best_and_one_where_nothing_runs(grid: Grid) -> None:
    scale = Scale(grid, grid.spec, grid.repeats)
    best = scale.best_cell()
    assert (best.micro_batch_size, best.compile.value) == (8, "default")
    assert (best.optimizer.fused, best.loader.num_workers) == (True, 1)
    assert scale.regret(best) == 0
    assert scale.score(scale.regret(best)) == 1
    too_large = with_knobs(best, {Knob.MICRO_BATCH_SIZE: 16})
    assert scale.overflows(too_large)
    assert scale.regret(too_large) == 1
    assert 0.1 < scale.regret(grid.spec.baseline) < 1


def test_a_compile_that_does_not_pay_within_the_horizon_is_no_gain(grid: Grid) -> None:
    short = grid.spec.baseline.model_copy(update={"horizon_samples": 20_000})
    spec = grid.spec.model_copy(update={"baseline": short})
    assert Scale(grid, spec, grid.repeats).best_cell().compile.value == "eager"
    fast = spec.model_copy(update={"objective": Objective.THROUGHPUT})
    assert Scale(grid, fast, grid.repeats).best_cell().compile.value == "default"


def test_the_median_cell_scores_zero(grid: Grid) -> None:
    scale = Scale(grid, grid.spec, grid.repeats)
    assert scale.score(1 - scale.middle / scale.best) == pytest.approx(0)


@pytest.mark.parametrize(
    ("scene", "holds"),
    [
        (Scene(floor=0.0, baseline=0.3, unfit=0.25), True),
        (Scene(floor=0.0, baseline=0.05, unfit=0.25), False),
        (Scene(floor=0.21, baseline=0.22, unfit=0.25), False),
        (Scene(floor=0.0, baseline=0.3, unfit=0.05), False),
        (Scene(floor=0.0, baseline=0.3, unfit=0.6), False),
    ],
)
def test_a_grid_counts_only_where_there_is_something_to_gain_and_to_overrun(scene: Scene, holds: bool) -> None:
    good, why = scoring.counts([scene])
    assert good is holds
    assert bool(why) is not holds


def test_the_target_follows_the_noise_floor() -> None:
    assert scoring.target_regret([Scene(0.0, 0.3, 0.2)]) == 0.02
    assert scoring.target_regret([Scene(0.04, 0.3, 0.2)]) == pytest.approx(0.05)


@pytest.mark.parametrize("name", sorted(set(SEARCHERS) - SLOW))
def test_a_searcher_names_a_cell_that_fits_and_says_the_same_again(grid: Grid, name: str) -> None:
    first = trails(grid, name)
    known = {cell.digest() for cell in grid.cells}
    assert all(trail.chosen.digest() in known and grid.fits(trail.chosen) for trail in first)
    assert all(trail.steps[-1][1] == trail.chosen for trail in first)
    assert all(0 < trail.steps[-1][0] <= trail.seconds for trail in first)
    if name != "tpe":  # as slow as it is with the gate
        assert trails.__wrapped__(grid, name) == first


def test_every_cell_measured_names_the_best(grid: Grid) -> None:
    (trail,) = trails(grid, "exhaustive")
    assert trail.probes == len(grid.cells)
    assert trail.ooms == sum(not grid.fits(cell) for cell in grid.cells)
    assert Scale(grid, grid.spec, grid.repeats).regret(trail.chosen) < 0.04


def test_the_rules_of_other_tools_look_at_the_batch_alone(grid: Grid) -> None:
    (up,), (down,) = trails(grid, "lightning"), trails(grid, "accelerate")
    largest = with_knobs(grid.spec.baseline, {Knob.MICRO_BATCH_SIZE: 8})
    assert up.chosen == down.chosen == largest
    assert (up.probes, up.ooms) == (4, 1), "2, 4, 8 ran, 16 did not"
    assert (down.probes, down.ooms) == (2, 1), "16 did not, 8 ran"


def test_the_memory_gate_spares_tpe_out_of_memories(grid: Grid) -> None:
    (plain,), (gated,) = trails(grid, "tpe"), trails(grid, "tpe-gate")
    assert gated.ooms < plain.ooms
    assert gated.ooms <= 4, "one for each way to compute that could overrun"
    assert gated.probes < plain.probes == TRIALS


def test_ours_is_scored_with_and_without_its_gate(recording: Path, grid: Grid) -> None:
    shipped, leader = search(Job(str(recording), Objective.TIME, "ours", 3))
    assert (shipped.searcher, leader.searcher) == ("ours", "ours before the gate")
    assert shipped.seconds > leader.seconds > 0
    assert not shipped.overflows
    baseline = Scale(grid, grid.spec, split(grid, 3).held_back).regret(grid.spec.baseline)
    assert shipped.regret < baseline
    assert shipped.path[-1] == (shipped.seconds, shipped.regret)
    reached = shipped.seconds_to(shipped.regret)
    assert reached is not None
    assert reached <= shipped.seconds
    assert shipped.seconds_to(-1.0) is None


def test_a_missing_recording_is_named() -> None:
    with pytest.raises(SystemExit, match=r"--grid: no recording nowhere; known: .*"):
        find_grids(["nowhere"])
