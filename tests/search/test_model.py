"""The factored model on figures whose truth is known."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.search.simulated_world import World, drive, make_baseline, make_spec
from tuner.contract.config import CompileMode, OptimizerConfig, OptimizerName, Precision
from tuner.contract.probe import ProbeKind
from tuner.contract.statistics import throughput
from tuner.search.history import is_ok, mean_rate
from tuner.search.model import Cut, fit_step, overlap
from tuner.search.objective import break_even_samples, production_seconds
from tuner.search.points import Loader, Variant, config_of, lr_rule, point_of, smaller_cuts
from tuner.search.situation import situation_of
from tuner.search.view import View

VARIANT = Variant(Precision.FP32, CompileMode.EAGER, False, False, False)


def cuts(alpha: float, beta: float, omega: float, shapes: list[tuple[int, int]]) -> list[Cut]:
    return [Cut(b, k, k * alpha + b * k * beta + omega) for b, k in shapes]


def test_the_fit_recovers_the_costs_it_was_made_from() -> None:
    fit = fit_step(cuts(0.01, 0.002, 0.005, [(16, 1), (8, 2), (4, 4), (16, 4)]))
    assert fit is not None
    assert (fit.alpha, fit.beta, fit.omega) == pytest.approx((0.01, 0.002, 0.005), rel=1e-6)
    assert fit.residual < 1e-9


def test_at_one_batch_size_omega_hides_in_beta_and_predictions_are_still_right() -> None:
    fit = fit_step(cuts(0.01, 0.002, 0.005, [(16, 1), (4, 4)]))
    assert fit is not None
    assert fit.omega == 0.0
    assert fit.step_s(2, 8) == pytest.approx(8 * 0.01 + 16 * 0.002 + 0.005)


def test_one_cut_is_no_fit() -> None:
    assert fit_step(cuts(0.01, 0.002, 0.0, [(8, 2), (8, 2)])) is None


@given(st.lists(st.floats(0.5, 2.0), min_size=3, max_size=3))
def test_costs_are_never_negative_however_odd_the_times(factors: list[float]) -> None:
    odd = [
        c._replace(step_s=c.step_s * f)
        for c, f in zip(cuts(0.01, 0.002, 0.0, [(16, 1), (8, 2), (4, 4)]), factors, strict=True)
    ]
    fit = fit_step(odd)
    assert fit is not None
    assert min(fit.alpha, fit.beta, fit.omega) >= 0
    assert 0 <= fit.launch_share(8, 2) <= 1


def test_a_loader_without_workers_adds_and_one_with_workers_hides() -> None:
    assert overlap(0.10, 0.04, Loader(0, 2)) == pytest.approx(0.14)
    assert overlap(0.10, 0.04, Loader(2, 2)) == pytest.approx(0.10)
    assert overlap(0.10, 0.40, Loader(2, 2)) == pytest.approx(0.40)


def test_the_fast_rate_is_the_value_of_the_contract_s_throughput() -> None:
    ended = drive(make_spec(max_probes=4), World())
    for row in ended.rows:
        if is_ok(row) and row.measurement is not None:
            assert mean_rate(row.measurement) == pytest.approx(throughput(row.measurement).value)


def test_predictions_of_unmeasured_configurations_are_close_in_a_world_that_factors() -> None:
    world = World(flag_factors={Precision.FP16: 0.8, "fused": 0.95}, process_noise=0.002, step_noise=0.005)
    ended = drive(make_spec(), world)
    s = situation_of(View(ended.spec, ended.rows))
    checked = 0
    for point in s.forecast.grid():
        found = s.forecast.rate(point)
        if found is not None:
            truth = world.rate(config_of(ended.spec, point))
            assert found.value == pytest.approx(truth, rel=0.05)
            checked += 1
    assert checked > 20
    assert s.forecast.residual < 0.03


def test_the_model_s_misfit_is_noticed() -> None:
    ended = drive(make_spec(), World(misfit=0.3), seed=3)
    s = situation_of(View(ended.spec, ended.rows))
    assert s.forecast.residual > 0.1


def test_points_and_configurations_are_two_names_of_one_thing() -> None:
    ended = drive(make_spec(), World())
    spec = ended.spec
    for row in ended.rows:
        if row.kind in (ProbeKind.COMPUTE, ProbeKind.END_TO_END):
            assert config_of(spec, point_of(row.config)) == row.config


def test_smaller_cuts_keep_the_effective_batch() -> None:
    baseline = point_of(make_baseline(micro_batch_size=12, accumulation_steps=2))
    found = [(p.micro, p.accumulation) for p in smaller_cuts(baseline)]
    assert found == [(6, 4), (3, 8), (1, 24)]


def test_lr_rules() -> None:
    assert lr_rule(OptimizerConfig(lr=1e-4), 2.0) == pytest.approx(1.41421e-4, rel=1e-4)
    assert lr_rule(OptimizerConfig(name=OptimizerName.SGD, lr=1e-2), 2.0) == pytest.approx(2e-2)


def test_production_seconds_count_compile_and_duties() -> None:
    from tuner.contract.config import Cadence

    spec = make_spec(
        baseline=make_baseline(
            horizon_samples=10_000, cadence=Cadence(evaluate_samples=5_000, checkpoint_samples=1_000)
        )
    )
    assert production_seconds(spec, 100.0) == pytest.approx(100.0)
    assert production_seconds(spec, 100.0, 30.0) == pytest.approx(130.0)
    with_duties = production_seconds(spec, 100.0, 30.0, {"evaluate": 4.0, "checkpoint": 0.5, "measure": 99.0})
    assert with_duties == pytest.approx(130.0 + 2 * 4.0 + 10 * 0.5)


def test_break_even() -> None:
    assert break_even_samples(100.0, 100.0, 200.0, 0.0, 10**6) == 20_000
    assert break_even_samples(100.0, 100.0, 200.0, 50.0, 10**6) == 30_000
    assert break_even_samples(100.0, 200.0, 200.0, 0.0, 10**6) is None
    assert break_even_samples(100.0, 200.0, 100.0, 0.0, 10**6) is None
