"""What a finished study says: the decision, its reasons and notes, the promise, and the lr stage's verdict."""

from __future__ import annotations

import math

import pytest

from tests.search.simulated_world import Ended, World, drive, make_baseline, make_spec
from tuner.contract.config import Precision
from tuner.contract.measurement import ByteRange, EvaluationPart, MemoryPeak
from tuner.contract.probe import Stage
from tuner.contract.statistics import paired_gain, prediction_interval
from tuner.contract.study import LrSpec, StudySpec
from tuner.contract.tuned import Promise
from tuner.search.history import mean_rate
from tuner.search.lr import chosen_lr, judge
from tuner.search.selection import expected_peak, peak_words, promise, select

FASTER = World(flag_factors={Precision.FP16: 0.8})
FLAT = World(alpha=0.0, omega=0.0, beta=0.003, data_per_sample=0.0)


def rates(ended: Ended, digest: str, *stages: Stage) -> dict[int, float]:
    found = {}
    for row in ended.rows:
        if row.stage in stages and row.config.digest() == digest and row.measurement is not None:
            found[row.number if row.pair is None else row.pair] = mean_rate(row.measurement)
    return found


def promised(ended: Ended) -> Promise:
    found = promise(ended.rows, ended.spec, ended.decision)
    assert found is not None
    return found


def test_the_gain_comes_from_the_gate_s_pairs_alone() -> None:
    ended = drive(make_spec(), FASTER)
    decision = ended.decision
    assert decision.winner is not None
    assert decision.gain is not None
    own = rates(ended, decision.winner.config.digest(), Stage.GATE)
    base = rates(ended, ended.spec.baseline.digest(), Stage.GATE)
    pairs = sorted(own.keys() & base.keys())
    expected = paired_gain([own[p] for p in pairs], [base[p] for p in pairs], decision.gain.confidence)
    assert decision.gain == expected
    assert decision.gain.low > 1.0
    assert f"{len(pairs)} interleaved pairs" in decision.reason


def test_the_promise_is_a_prediction_interval_over_fresh_processes() -> None:
    ended = drive(make_spec(), FASTER)
    found = promised(ended)
    assert ended.decision.winner is not None
    fresh = rates(ended, ended.decision.winner.config.digest(), Stage.GATE, Stage.SOAK)
    expected = prediction_interval(list(fresh.values()))
    assert found.samples_per_s.value == pytest.approx(expected.value)
    assert (found.samples_per_s.low, found.samples_per_s.high) == pytest.approx((expected.low, expected.high))
    assert found.peak_low_bytes < found.peak_bytes < found.peak_high_bytes
    assert found.hours == pytest.approx(2_400_000 / expected.value / 3600, rel=0.01)
    assert found.gain == ended.decision.gain
    assert found.break_even_samples is not None
    assert 0 < found.break_even_samples < 2_400_000
    assert found.reference_s


def test_the_peak_promised_is_that_of_the_evaluation_where_it_is_larger_and_says_what_it_stands_on() -> None:
    steps, process = MemoryPeak(process_bytes=400), MemoryPeak(process_bytes=390)
    whole = MemoryPeak(process_bytes=900, evaluation=EvaluationPart(batches=9, seen=9, seconds=1.0))
    found = expected_peak([steps, process, whole], "cpu")
    assert found.value == 916, "the steps' heap goes on growing, not what an evaluation keeps"
    assert found.low <= 900 <= found.high
    assert found.low > 800, "the steps alone say nothing of the least"
    assert peak_words([steps, whole]) == "peak of the whole evaluation"
    assert peak_words([steps]) == "peak of the steps: no evaluation was measured"

    part = EvaluationPart(batches=90, seen=9, seconds=1.0, held=ByteRange(value=900, low=700, high=1200))
    found = expected_peak([steps, MemoryPeak(process_bytes=410, evaluation=part)], "cpu")
    assert found.value == 916
    assert found.low < 700 < 1200 < found.high


def test_the_hours_hold_the_whole_evaluation_where_a_part_was_seen() -> None:
    cadence = make_baseline().cadence.model_copy(update={"evaluate_samples": 240_000})
    spec = make_spec(baseline=make_baseline(cadence=cadence))
    part = EvaluationPart(batches=200, seen=20, seconds=360.0, held=ByteRange(value=1, low=1, high=1))
    with_it, without = promised(drive(spec, World(evaluation=lambda config: part))), promised(drive(spec, World()))
    assert with_it.hours - without.hours == pytest.approx(1.0, rel=0.01), "ten evaluations of six minutes"


def test_the_reason_names_the_change_the_gain_and_the_limit() -> None:
    reason = drive(make_spec(), FASTER).decision.reason
    assert "batch 8x2 -> 16x1" in reason
    assert "precision fp32 -> fp16" in reason
    assert "fresh processes" in reason
    assert "limits" in reason


@pytest.mark.parametrize(
    ("world", "word"),
    [
        (World(alpha=0.05, beta=0.0001, omega=0.0), "launch overhead"),
        (World(alpha=0.0001, beta=0.004), "computation"),
        (World(data_per_sample=0.05), "loader"),
    ],
)
def test_what_limits_is_read_from_the_model(world: World, word: str) -> None:
    assert word in drive(make_spec(), world).decision.reason


def test_no_gain_still_promises_the_baseline() -> None:
    ended = drive(make_spec(), FLAT)
    found = promised(ended)
    assert ended.decision.kind == "no_gain"
    assert ended.decision.winner == ended.decision.baseline
    assert (found.gain.low, found.gain.value, found.gain.high) == (1.0, 1.0, 1.0)
    assert found.break_even_samples is None
    assert math.isfinite(found.samples_per_s.high)


def test_nothing_is_promised_from_a_single_process() -> None:
    ended = drive(make_spec(budget_s=5.0), FASTER)
    assert promise(ended.rows, ended.spec, ended.decision) is None
    assert any("one process" in note for note in ended.decision.notes)


def test_a_study_without_rows_has_failed_so_far() -> None:
    assert select([], make_spec()).kind == "failed"


def test_the_decision_half_way_through_the_gate_ships_nothing_new() -> None:
    ended = drive(make_spec(), FASTER)
    gate = [row for row in ended.rows if row.stage is Stage.GATE]
    decision = select(ended.rows[: gate[4].number], ended.spec)
    assert decision.kind == "no_gain"
    assert "not finished" in decision.reason


def test_a_target_that_is_not_here_is_said_to_be_unverified() -> None:
    spec = make_spec()
    other = spec.target.model_copy(update={"capability": (6, 0), "label": "Tesla P100"})
    notes = drive(make_spec(target=other), FASTER).decision.notes
    assert any("transfer unverified" in note and "Tesla P100" in note for note in notes)


def test_runner_ups_are_other_configurations_that_ran() -> None:
    ended = drive(make_spec(), FASTER)
    assert ended.decision.winner is not None
    assert ended.decision.runner_ups
    assert ended.decision.winner.config not in ended.decision.runner_ups


def lr_spec(**changes: object) -> StudySpec:
    space = make_spec().space.model_copy(update={"lr": (5e-5, 2e-4, 4e-4)})
    return make_spec(space=space, lr=LrSpec.model_validate({"samples": 256, "seeds": 3, **changes}))


def test_an_exploding_lr_is_vetoed_and_the_baseline_s_is_kept() -> None:
    world = World(losses=lambda lr: (1.0, 3.0 if lr > 3e-4 else 0.5 - 500 * lr))
    ended = drive(lr_spec(), world)
    verdict = judge(ended.rows, ended.spec)
    assert verdict.vetoed == (4e-4,)
    assert verdict.suggested == 2e-4
    assert ended.decision.winner is not None
    assert ended.decision.winner.config.optimizer.lr == 1e-4
    assert any(note.startswith("lr") and "vetoed" in note for note in ended.decision.notes)
    assert any(note.startswith("lr") and "unverified" in note for note in ended.decision.notes)


def test_a_loss_that_is_not_a_number_is_a_veto() -> None:
    ended = drive(lr_spec(), World(losses=lambda lr: (1.0, math.nan if lr > 1e-4 else 0.5)))
    assert set(judge(ended.rows, ended.spec).vetoed) == {2e-4, 4e-4}


def test_a_significant_gain_replaces_the_lr_only_when_asked() -> None:
    world = World(losses=lambda lr: (1.0, 0.3 if lr == 2e-4 else 0.5))
    ended = drive(lr_spec(tune=True), world)
    assert chosen_lr(ended.rows, ended.spec) == 2e-4
    assert ended.decision.winner is not None
    assert ended.decision.winner.config.optimizer.lr == 2e-4
    assert "lr 0.0001 -> 0.0002" in ended.decision.reason


def test_an_insignificant_gain_never_replaces_the_lr() -> None:
    ended = drive(lr_spec(tune=True, seeds=1), World(losses=lambda lr: (1.0, 0.499 if lr == 2e-4 else 0.5)))
    assert chosen_lr(ended.rows, ended.spec) is None


def test_a_vetoed_baseline_lr_is_said_and_kept_unless_tuned() -> None:
    world = World(losses=lambda lr: (1.0, 9.0 if lr >= 1e-4 else 0.5))
    kept = drive(lr_spec(), world)
    assert kept.decision.winner is not None
    assert kept.decision.winner.config.optimizer.lr == 1e-4
    assert any("baseline's own" in note for note in kept.decision.notes)
    tuned = drive(lr_spec(tune=True), world)
    assert tuned.decision.winner is not None
    assert tuned.decision.winner.config.optimizer.lr == 5e-5


def test_no_budget_for_the_lr_stage_is_said() -> None:
    spec = lr_spec(samples=10_000_000)
    ended = drive(spec, FASTER)
    assert not ended.of_stage("lr")
    assert any(note.startswith("lr: not probed") for note in ended.decision.notes)


def test_a_config_is_judged_by_total_time_when_the_run_is_short() -> None:
    """Compiled and a little faster, but not within so short a run."""
    spec = make_spec(baseline=make_baseline(horizon_samples=3_000))
    ended = drive(spec, FASTER)
    assert ended.decision.kind == "winner"
    assert ended.decision.winner is not None
    assert promised(ended).hours * 3600 == pytest.approx(3_000 / promised(ended).samples_per_s.value, rel=0.01)
