"""What each objective asks for, from the pure function to whole studies on a made-up job."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.search.simulated_world import SimulatedRunner, World, drive, make_baseline, make_spec
from tuner.contract.config import CompileMode, Precision, RunConfig
from tuner.contract.measurement import Telemetry
from tuner.contract.probe import Listener, ProbeReply, ProbeRequest, Stage
from tuner.contract.space import SearchSpace
from tuner.contract.study import Objective, StudySpec
from tuner.contract.tuned import Decision
from tuner.search.objective import Figures, merit, worth
from tuner.search.offline import run_study
from tuner.search.selection import promise

SLOW = Figures(samples_per_s=100.0, memory_used=0.2, power_w=100.0)
FAST = Figures(samples_per_s=150.0, compile_s=60.0, memory_used=0.5, power_w=200.0, efficiency=0.8)


def ratio(objective: Objective, horizon: int = 10**9) -> float:
    spec = make_spec(objective=objective, baseline=make_baseline(horizon_samples=horizon))
    return merit(spec, FAST) / merit(spec, SLOW)


def test_each_objective_compares_its_own_quantity() -> None:
    assert ratio(Objective.THROUGHPUT) == pytest.approx(1.5)
    assert ratio(Objective.GOODPUT) == pytest.approx(1.5 * 0.8)
    assert ratio(Objective.MEMORY) == pytest.approx(0.2 / 0.5)
    assert ratio(Objective.ENERGY) == pytest.approx(1.5 * 0.8 / 2)
    assert ratio(Objective.TIME) == pytest.approx(1.5 * 0.8, rel=1e-4)


def test_time_counts_the_compile_over_the_run_s_own_horizon() -> None:
    seconds = 60 + 12_000 / (150 * 0.8)
    assert ratio(Objective.TIME, horizon=12_000) == pytest.approx((12_000 / 100) / seconds)


def test_under_memory_nothing_too_slow_comes_before_what_is_fast_enough() -> None:
    spec = make_spec(objective=Objective.MEMORY)
    reference = Figures(samples_per_s=100.0, memory_used=1.0)
    tiny_but_slow = Figures(samples_per_s=98.0, memory_used=0.1)
    just_allowed = Figures(samples_per_s=99.7, memory_used=0.9)
    slower_still = Figures(samples_per_s=50.0, memory_used=0.1)
    ranked = sorted((tiny_but_slow, just_allowed, slower_still, reference), key=lambda own: worth(spec, own, reference))
    assert ranked == [slower_still, tiny_but_slow, reference, just_allowed]


HUNGRY = World(sample_bytes=1.2 * (1 << 30), alpha=0.00005, process_noise=0.002, step_noise=0.01)
"""Small micro-batches cost hardly any time and save much memory."""
ONLY_SIZES = SearchSpace(micro_batch_size=(1, 2, 4, 8), num_workers=(0,))


def test_memory_ships_a_smaller_peak_at_the_same_speed() -> None:
    spec = make_spec(objective=Objective.MEMORY, space=ONLY_SIZES)
    decision = drive(spec, HUNGRY).decision
    assert decision.kind == "winner"
    assert decision.winner is not None
    assert decision.baseline is not None
    assert decision.winner.config.micro_batch_size < 8
    assert decision.winner.peak_bytes is not None
    assert decision.baseline.peak_bytes is not None
    assert decision.gain is not None
    assert decision.gain.value == pytest.approx(decision.baseline.peak_bytes / decision.winner.peak_bytes, rel=0.03)
    assert decision.speedup is not None
    assert decision.speedup.low >= 0.99
    assert "peak memory" in decision.reason
    assert "not slower by more than 1 %" in decision.reason


def test_memory_never_ships_what_is_slower() -> None:
    """Every smaller micro-batch is a third slower or worse."""
    spec = make_spec(objective=Objective.MEMORY, space=ONLY_SIZES)
    world = World(sample_bytes=1.2 * (1 << 30), alpha=0.02, beta=0.0005, process_noise=0.002)
    assert drive(spec, world).decision.kind == "no_gain"


def test_at_a_fixed_batch_goodput_decides_as_throughput_does() -> None:
    world = World(flag_factors={Precision.FP16: 0.8})
    found = {}
    for objective in (Objective.THROUGHPUT, Objective.GOODPUT):
        ended = drive(make_spec(objective=objective), world)
        assert ended.decision.winner is not None
        found[objective] = (len(ended.rows), ended.decision.winner.config, ended.decision.gain)
    assert found[Objective.THROUGHPUT] == found[Objective.GOODPUT]


def test_a_compile_that_a_short_run_never_earns_back_gives_way_to_eager() -> None:
    """The compiled baseline is faster per sample; over so few samples the run is not."""
    compiled = make_baseline(compile=CompileMode.DEFAULT, horizon_samples=10_000)
    space = SearchSpace(micro_batch_size=(8,), compile=(CompileMode.EAGER, CompileMode.DEFAULT), num_workers=(0,))
    world = World(flag_factors={CompileMode.DEFAULT: 0.9}, compile_s=120.0)

    def decided(objective: Objective) -> Decision:
        return drive(make_spec(baseline=compiled, space=space, objective=objective, budget_s=6000.0), world).decision

    by_time, by_rate = decided(Objective.TIME), decided(Objective.THROUGHPUT)
    assert by_rate.kind == "no_gain"
    assert by_time.kind == "winner"
    assert by_time.winner is not None
    assert by_time.winner.config.compile is CompileMode.EAGER
    assert by_time.gain is not None
    assert by_time.speedup is not None
    assert by_time.gain.low > 1 > by_time.speedup.high


class Powered:
    """SIMULATION: answers of a made-up job, with a power reading made up beside them."""

    def __init__(self, world: World, watts: Callable[[RunConfig], float | None]) -> None:
        self._runner = SimulatedRunner(world)
        self._watts = watts

    def run(self, request: ProbeRequest, listener: Listener | None = None) -> ProbeReply:
        reply = self._runner.run(request, listener)
        points = []
        for point, config in zip(reply.points, request.points, strict=True):
            if point.measurement is None:
                points.append(point)
                continue
            telemetry = Telemetry(power_w=self._watts(config))
            measurement = point.measurement.model_copy(update={"telemetry": telemetry})
            points.append(point.model_copy(update={"measurement": measurement}))
        return reply.model_copy(update={"points": tuple(points)})

    def close(self) -> None:
        pass


def energy_spec() -> StudySpec:
    space = SearchSpace(micro_batch_size=(8,), precision=(Precision.FP32, Precision.FP16), num_workers=(0,))
    return make_spec(objective=Objective.ENERGY, space=space)


def test_energy_refuses_a_speed_that_costs_more_than_it_brings() -> None:
    world = World(flag_factors={Precision.FP16: 0.8})
    greedy = Powered(world, lambda config: 300.0 if config.precision is Precision.FP16 else 100.0)
    _, decision = run_study(energy_spec(), greedy)
    assert decision.kind == "no_gain"
    assert "joule" in decision.reason or "none of" in decision.reason


def test_energy_ships_what_draws_less_for_the_same_work() -> None:
    world = World(flag_factors={Precision.FP16: 0.97})
    thrifty = Powered(world, lambda config: 60.0 if config.precision is Precision.FP16 else 100.0)
    _, decision = run_study(energy_spec(), thrifty)
    assert decision.kind == "winner"
    assert decision.gain is not None
    assert decision.speedup is not None
    assert decision.gain.value == pytest.approx(decision.speedup.value * 100 / 60, rel=1e-6)
    assert "samples per joule" in decision.reason


def test_energy_without_a_reading_proves_nothing() -> None:
    world = World(flag_factors={Precision.FP16: 0.5})
    rows, decision = run_study(energy_spec(), Powered(world, lambda config: None))
    assert any(row.stage is Stage.GATE for row in rows)
    assert decision.kind == "no_gain"


def test_the_promise_speaks_of_speed_whatever_the_objective() -> None:
    spec = make_spec(objective=Objective.MEMORY, space=ONLY_SIZES)
    ended = drive(spec, HUNGRY)
    found = promise(ended.rows, spec, ended.decision)
    assert found is not None
    assert ended.decision.kind == "winner"
    assert found.gain == ended.decision.speedup


def test_the_search_s_best_figure_is_told_beside_the_gain() -> None:
    decision = drive(make_spec(), World(flag_factors={Precision.FP16: 0.8})).decision
    assert decision.search_maximum is not None
    assert decision.search_maximum > 1.1
