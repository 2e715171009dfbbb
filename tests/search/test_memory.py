"""The memory model on figures whose truth is known, and the stage that asks for traces."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.search.simulated_world import GIB, World, drive, make_baseline, make_spec, rows_of
from tuner.contract.config import CompileMode, Precision
from tuner.contract.measurement import Outcome
from tuner.contract.probe import PointReply, ProbeKind, ProbeReply, ProbeRequest
from tuner.search.memory import DEVICE, HOST, Foresight, Grown, GrowthModel, MemoryModel, Size, Traces
from tuner.search.points import Variant
from tuner.search.score import overruns
from tuner.search.tracing import with_foresight
from tuner.search.view import View

VARIANT = Variant(Precision.FP32, CompileMode.EAGER, False, False, False)
RECOMPUTING = VARIANT._replace(gradient_checkpointing=True)
MIB = 1 << 20


@settings(max_examples=60)
@given(st.floats(0.01, 0.3), st.floats(0.005, 0.05), st.integers(1, 12))
def test_the_memory_bar_covers_the_truth_of_an_affine_peak(fixed: float, slope: float, size: int) -> None:
    def truth(b: int) -> float:
        return fixed + slope * b

    model = MemoryModel({Size(VARIANT, 2): truth(2), Size(VARIANT, 4): truth(4)}, ())
    assert model.upper(VARIANT, size) >= truth(size) - 1e-9 or size < 2
    alone = MemoryModel({Size(VARIANT, 4): truth(4)}, ())
    assert alone.upper(VARIANT, size) >= truth(min(size, 4)) if size <= 4 else alone.upper(VARIANT, size) >= truth(size)


def test_a_size_seen_to_overflow_rules_out_all_above_it_for_its_variant_alone() -> None:
    model = MemoryModel({Size(VARIANT, 4): 0.1, Size(RECOMPUTING, 4): 0.05}, {Size(VARIANT, 6)})
    assert model.fits(VARIANT, 5)
    assert not model.fits(VARIANT, 6)
    assert not model.fits(VARIANT, 7)
    assert model.fits(RECOMPUTING, 8)


def test_an_unmeasured_variant_borrows_and_an_unknown_one_is_not_trusted() -> None:
    other = VARIANT._replace(channels_last=True)
    assert MemoryModel({Size(VARIANT, 4): 0.5}, ()).upper(other, 4) > 0.5
    assert not MemoryModel({}, ()).fits(other, 1)


def test_a_size_that_overflows_beside_loader_workers_may_still_fit_without_them() -> None:
    model = MemoryModel({Size(VARIANT, 4): 0.1, Size(VARIANT, 8): 0.2}, {Size(VARIANT, 6, workers=1)})
    assert model.fits(VARIANT, 6)
    assert not model.fits(VARIANT, 6, workers=1)
    assert not model.fits(VARIANT, 8, workers=2)


def test_what_workers_add_at_one_size_is_expected_at_another() -> None:
    rows = ladder(VARIANT, 1.2, 90, (16, 32, 64))
    beside = Grown(VARIANT, rows[0].traced, rows[0].growth + 10 * MIB, workers=2)
    model, asked = GrowthModel([*rows, beside], HOST), 3.0 * MIB * 48
    plain, two, one = (model.predict(VARIANT, asked, workers) for workers in (0, 2, 1))
    assert plain.value < one.value < two.value < plain.value + 10 * MIB
    assert (
        GrowthModel([*rows, beside], DEVICE).predict(VARIANT, asked, 2).value
        == GrowthModel([*rows, beside], DEVICE).predict(VARIANT, asked).value
    )


def ladder(variant: Variant, slope: float, fixed: float, sizes: tuple[int, ...], noise: float = 0.0) -> list[Grown]:
    """Rows of a job whose trace is 3 MiB a sample and whose growth is `slope` times that and `fixed` MiB more."""
    rng = np.random.default_rng(0)
    truth = [3.0 * MIB * size for size in sizes]
    return [Grown(variant, t, (slope * t + fixed * MIB) * (1 + noise * rng.standard_normal())) for t in truth]


@pytest.mark.parametrize("slope", [1.0, 1.1, 1.25])
def test_growth_far_above_what_was_measured_follows_the_trace(slope: float) -> None:
    model = GrowthModel(ladder(VARIANT, slope, 90, (16, 32, 48)), HOST)
    truth = slope * 3.0 * MIB * 256 + 90 * MIB
    found = model.predict(VARIANT, 3.0 * MIB * 256)
    assert found.value == pytest.approx(truth, rel=0.06)
    assert found.upper >= truth


def test_the_error_bar_is_wider_further_away_with_fewer_rows_and_for_another_variant() -> None:
    rows = ladder(VARIANT, 1.2, 90, (16, 32, 64))
    model, one = GrowthModel(rows, HOST), GrowthModel(rows[:1], HOST)
    near, far = (model.predict(VARIANT, 3.0 * MIB * size) for size in (80, 400))
    assert near.sd / near.value < far.sd / far.value
    assert one.predict(VARIANT, 3.0 * MIB * 400).sd > far.sd
    assert model.predict(RECOMPUTING, 3.0 * MIB * 80).sd > near.sd
    assert GrowthModel([], HOST).predict(VARIANT, 3.0 * MIB * 80).sd > one.predict(VARIANT, 3.0 * MIB * 80).sd


def test_a_convex_trace_is_followed_where_straight_lines_would_be_too_low() -> None:
    traced = {size: MIB * (2.0 * size + 0.02 * size**2) for size in (8, 16, 32, 128)}
    grown = {Size(VARIANT, size): [1.2 * traced[size] + 80 * MIB] for size in (8, 16, 32)}
    budget = 1000 * MIB
    shares = {size: values[0] / budget for size, values in grown.items()}
    foresight = Foresight(Traces({False: traced}), grown, lambda growth: growth / budget, HOST)
    truth = (1.2 * traced[128] + 80 * MIB) / budget
    model = MemoryModel(shares, (), foresight)
    assert model.expected(VARIANT, 128) == pytest.approx(truth, rel=0.06)
    assert model.upper(VARIANT, 128) >= truth
    assert MemoryModel(shares, ()).expected(VARIANT, 128) is None


def test_a_trace_between_two_traced_sizes_is_never_too_low() -> None:
    traces = Traces({False: {8: 100.0, 32: 500.0}})
    assert traces.of(VARIANT, 16) == pytest.approx(233.3, rel=1e-3)
    assert traces.of(VARIANT, 64) == pytest.approx(1033.3, rel=1e-3)
    assert traces.of(RECOMPUTING, 16) is None


TIGHT = World(fixed_bytes=1 * GIB, sample_bytes=0.9 * GIB, beta=0.002, alpha=0.02)
"""8 samples take 8.2 GiB of 16: 16 do not fit without recomputing."""


def test_traces_are_asked_before_any_other_size_is_measured_and_no_probe_runs_out_of_memory() -> None:
    ended = drive(make_spec(), TIGHT)
    kinds = [request.kind for request in ended.requests]
    assert ProbeKind.TRACE in kinds
    assert kinds.index(ProbeKind.TRACE) < kinds.index(ProbeKind.COMPUTE)
    assert not any(row.outcome.is_oom for row in ended.rows)
    traced = {point.gradient_checkpointing for request in ended.of_stage("trace") for point in request.points}
    assert traced == {False, True}


def test_no_trace_is_asked_where_memory_cannot_bind() -> None:
    ended = drive(make_spec(), World(sample_bytes=0.1 * GIB))
    assert not ended.of_stage("trace")


def test_what_a_trace_foretells_is_what_is_measured_later() -> None:
    ended = drive(make_spec(), TIGHT)
    memory = View(ended.spec, ended.rows).memory
    base = make_baseline()
    for micro in (1, 2, 4, 8):
        found = memory.predicted(VARIANT, micro)
        assert found is not None
        truth = TIGHT.peak_bytes(base.model_copy(update={"micro_batch_size": micro}))
        assert found.value == pytest.approx(truth, rel=0.05)
        assert found.upper >= truth
    assert not memory.fits(VARIANT, 16)


def test_a_workload_that_cannot_be_traced_is_asked_once_and_searched_all_the_same() -> None:
    def untraceable(request: ProbeRequest, *_: object) -> Outcome | None:
        return Outcome.UNSUPPORTED if request.kind is ProbeKind.TRACE else None

    ended = drive(make_spec(), TIGHT, fault=untraceable)
    assert len(ended.of_stage("trace")) == 1
    assert ended.decision.kind in ("winner", "no_gain")
    assert View(ended.spec, ended.rows).memory.predicted(VARIANT, 8) is None


@pytest.mark.parametrize("micro", [16, 32])
def test_a_sampler_is_told_by_how_much_an_out_of_memory_overran_the_budget(micro: int) -> None:
    ended = drive(make_spec(), TIGHT)
    config = make_baseline(micro_batch_size=micro, accumulation_steps=1)
    asked = ProbeRequest(id="x", kind=ProbeKind.END_TO_END, workload="simulated", points=(config,))
    failed = ProbeReply(request_id="x", points=(PointReply(outcome=Outcome.OOM_DEVICE),), seconds=1.0)
    reply = with_foresight(ended.spec, ended.rows, asked, failed)
    (row,) = rows_of(asked, reply, 0)
    truth = TIGHT.peak_bytes(config) / ended.spec.memory_budget_bytes - 1
    assert overruns(ended.spec, row)["memory"] == pytest.approx(truth, rel=0.3)
