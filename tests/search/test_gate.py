"""The ship gate: what it asks in which order, when it stops, and that it does not find gains where none are."""

from __future__ import annotations

import numpy as np
import pytest

from tests.search.simulated_world import GIB, Fault, SimulatedRunner, World, drive, make_spec, rows_of
from tuner.contract.config import Precision, RunConfig
from tuner.contract.measurement import ByteRange, EvaluationPart, Measurement, MemoryPeak, Outcome
from tuner.contract.probe import ProbeKind, ProbeRequest, ProbeRow, Stage
from tuner.contract.study import GateSpec, StudySpec
from tuner.contract.tuned import Decision
from tuner.search.gate import looks_of, order_of
from tuner.search.planner import next_probe
from tuner.search.points import point_of
from tuner.search.selection import promise, select
from tuner.search.situation import situation_of
from tuner.search.standins import STAND_INS, stand_in
from tuner.search.view import View

MEMORY = MemoryPeak(process_bytes=GIB, reserved_bytes=GIB)


def gate_row(config: RunConfig, number: int, rate: float, stage: Stage, pair: int | None = None) -> ProbeRow:
    step = config.effective_batch_size / rate
    measurement = Measurement(
        samples_per_step=config.effective_batch_size, step_s=(step,) * 6, warmup_steps=1, memory=MEMORY
    )
    return ProbeRow(
        number=number, request_id=f"made-{number}", kind=ProbeKind.END_TO_END, stage=stage, config=config,
        pair=pair, outcome=Outcome.OK, measurement=measurement, seconds=4.5,
    )  # fmt: skip


def replayed(spec: StudySpec, seed: int, ratio: float, noise: float, finalists: int = 2) -> Decision:
    """A whole gate whose figures are drawn: baseline 100 samples/s, finalists `ratio` times that, log-normal noise."""
    rng = np.random.default_rng(seed)
    others = [
        spec.baseline.model_copy(update={"micro_batch_size": 16, "accumulation_steps": 1}),
        spec.baseline.model_copy(update={"channels_last": True}),
    ][:finalists]
    rows = [gate_row(spec.baseline, 0, 100.0, Stage.BASELINE)]
    rows += [gate_row(c, 1 + i, 104.0 - i, Stage.VERIFY) for i, c in enumerate(others)]
    for pair in range(spec.gate.max_pairs):
        drift = rng.normal(0, 0.02)
        for config in (spec.baseline, *others):
            own = 100.0 * (1.0 if config == spec.baseline else ratio)
            rate = own * float(np.exp(drift + rng.normal(0, noise)))
            rows.append(gate_row(config, len(rows), rate, Stage.GATE, pair))
    return select(rows, spec)


def test_equal_configurations_hardly_ever_win() -> None:
    """A/A: 400 gates without a gain. The error level is 5 %; intervals are two-sided, so about half of it is spent."""
    spec = make_spec(budget_s=1000.0)
    wins = sum(replayed(spec, seed, 1.0, 0.02).kind == "winner" for seed in range(400))
    assert wins <= 12


def test_equal_configurations_hardly_ever_win_under_heavy_noise() -> None:
    spec = make_spec(budget_s=1000.0)
    wins = sum(replayed(spec, seed, 1.0, 0.10).kind == "winner" for seed in range(200))
    assert wins <= 8


def test_a_real_gain_is_nearly_always_proven() -> None:
    spec = make_spec(budget_s=1000.0)
    wins = sum(replayed(spec, seed, 1.08, 0.01).kind == "winner" for seed in range(60))
    assert wins >= 57


def test_a_gain_below_the_least_that_counts_is_not_shipped() -> None:
    spec = make_spec(budget_s=1000.0, gate=GateSpec(min_gain=0.05))
    decisions = [replayed(spec, seed, 1.03, 0.003) for seed in range(20)]
    assert {decision.kind for decision in decisions} == {"no_gain"}


def test_whole_studies_of_a_flat_world_end_without_a_gain() -> None:
    flat = World(alpha=0.0, omega=0.0, beta=0.003, data_per_sample=0.0, process_noise=0.02)
    kinds = [drive(make_spec(), flat, seed=seed).decision.kind for seed in range(10)]
    assert kinds.count("winner") <= 1


def test_the_order_in_a_round_is_drawn_by_lot_and_the_same_when_asked_again() -> None:
    spec = make_spec()
    ended = drive(spec, World(flag_factors={Precision.FP16: 0.8, "fused": 0.96}))
    rounds: dict[int, list[str]] = {}
    for request in ended.of_stage("gate"):
        assert request.pair is not None
        assert request.reference
        rounds.setdefault(request.pair, []).append(request.points[0].digest())
    assert len(rounds[0]) >= 2
    assert ended.spec.baseline.digest() in rounds[0]
    assert all(order in (rounds[0], rounds[0][::-1]) for order in rounds.values())
    drawn = [order_of(spec, [1], number) for number in range(200)]
    assert drawn == [order_of(spec, [1], number) for number in range(200)]
    assert 70 <= drawn.count([1, 0]) <= 130
    other = [order_of(make_spec(seed=1), [1], number) for number in range(200)]
    assert 70 <= sum(a == b for a, b in zip(drawn, other, strict=True)) <= 130


def test_an_open_question_is_looked_at_again_up_to_the_last_pair() -> None:
    assert looks_of(GateSpec(min_pairs=6, max_pairs=12)) == (6, 8, 10, 12)
    assert looks_of(GateSpec(min_pairs=6, max_pairs=6)) == (6,)
    flat = World(alpha=0.0, omega=0.001, beta=0.003, data_per_sample=0.0, process_noise=0.03)
    longest = max(len({r.pair for r in drive(make_spec(), flat, seed=s).of_stage("gate")}) for s in range(2))
    assert longest == 12


def fails_in_gate(outcome: Outcome, times: int) -> Fault:
    """A fault on the first `times` gate probes of any other configuration than the baseline."""
    left = [times]

    def fault(request: ProbeRequest, config: RunConfig, number: int) -> Outcome | None:
        if request.stage is Stage.GATE and config != make_spec().baseline and left[0] > 0:
            left[0] -= 1
            return outcome
        return None

    return fault


ONE_FINALIST = GateSpec(finalists=1)
FASTER = World(flag_factors={Precision.FP16: 0.8})


def test_a_finalist_that_runs_out_of_memory_in_the_gate_has_a_stand_in() -> None:
    ended = drive(make_spec(gate=ONE_FINALIST), FASTER, fault=fails_in_gate(Outcome.OOM_DEVICE, 1))
    assert ended.decision.kind == "winner"
    assert ended.decision.winner is not None
    (fallen,) = {row.config.digest() for row in ended.rows if row.stage is Stage.GATE and row.outcome.is_oom}
    winner = ended.decision.winner.config
    assert winner.digest() != fallen
    assert fallen not in {config.digest() for config in ended.decision.runner_ups}
    assert any("oom_device" in note for note in ended.decision.notes)
    assert any(note.startswith("stand-in: ") and ended.spec.label(winner) in note for note in ended.decision.notes)
    rounds = {row.pair or 0 for row in ended.rows if row.stage is Stage.GATE and row.config == winner}
    assert len(rounds) >= ended.spec.gate.min_pairs
    assert min(rounds) > 0, "its pairs are its own"
    assert f"from {len(rounds)} interleaved pairs in {2 * len(rounds)} fresh processes" in ended.decision.reason


def test_where_every_stand_in_falls_too_the_baseline_stays() -> None:
    ended = drive(make_spec(gate=ONE_FINALIST), FASTER, fault=fails_in_gate(Outcome.OOM_DEVICE, 1000))
    assert ended.decision.kind == "no_gain"
    tried = {row.config.digest() for row in ended.rows if row.stage is Stage.GATE and row.outcome.is_oom}
    assert 1 < len(tried) <= 1 + STAND_INS


def test_a_stand_in_is_somebody_new() -> None:
    """Another finalist of the gate that was judged and is not faster is not tried again."""
    ended = drive(make_spec(gate=ONE_FINALIST), FASTER, fault=fails_in_gate(Outcome.OOM_DEVICE, 1))
    s = situation_of(View(ended.spec, ended.rows))
    fell = [point_of(row.config) for row in ended.rows if row.stage is Stage.GATE and row.outcome.is_oom]
    first = stand_in(s, fell, fell)
    assert first is not None
    assert stand_in(s, fell, [*fell, first]) not in (first, *fell)


def test_a_winner_that_fails_its_soak_alone_has_a_stand_in() -> None:
    first: list[str] = []

    def fault(request: ProbeRequest, config: RunConfig, number: int) -> Outcome | None:
        if request.soak and not first:
            first.append(config.digest())
        return Outcome.OOM_DEVICE if request.soak and config.digest() in first else None

    ended = drive(make_spec(gate=ONE_FINALIST), FASTER, fault=fault)
    assert ended.decision.kind == "winner"
    assert ended.decision.winner is not None
    assert ended.decision.winner.config.digest() not in first
    assert any("its soak failed" in note for note in ended.decision.notes)


def test_who_was_judged_and_is_not_faster_has_no_stand_in() -> None:
    """That would be a second try at the same error level."""
    flat = World(alpha=0.0, omega=0.001, beta=0.003, data_per_sample=0.0)
    for seed in range(6):
        ended = drive(make_spec(gate=ONE_FINALIST), flat, seed=seed)
        assert len({row.config.digest() for row in ended.rows if row.stage is Stage.GATE}) <= 2


def test_the_other_finalist_takes_its_place() -> None:
    world = World(flag_factors={Precision.FP16: 0.8, "fused": 0.97})
    ended = drive(make_spec(), world, fault=fails_in_gate(Outcome.OOM_DEVICE, 1))
    assert ended.decision.kind == "winner"
    out = [row.config.digest() for row in ended.rows if row.stage is Stage.GATE and row.outcome.is_oom]
    assert ended.decision.winner is not None
    assert ended.decision.winner.config.digest() not in out


def test_a_single_crash_in_the_gate_is_measured_again_in_its_round() -> None:
    ended = drive(make_spec(gate=ONE_FINALIST), FASTER, fault=fails_in_gate(Outcome.CRASHED, 1))
    assert ended.decision.kind == "winner"
    assert len([r for r in ended.of_stage("gate") if r.pair == 0]) == 3


def test_a_baseline_that_keeps_failing_ends_the_gate() -> None:
    def fault(request: ProbeRequest, config: RunConfig, number: int) -> Outcome | None:
        hit = request.stage is Stage.GATE and config == make_spec().baseline
        return Outcome.CRASHED if hit else None

    ended = drive(make_spec(), FASTER, fault=fault)
    assert ended.decision.kind == "no_gain"
    assert "reference failed" in ended.decision.reason


def test_a_winner_that_fails_its_soak_gives_way() -> None:
    def fault(request: ProbeRequest, config: RunConfig, number: int) -> Outcome | None:
        return Outcome.OOM_DEVICE if request.soak and config != make_spec().baseline else None

    ended = drive(make_spec(), FASTER, fault=fault)
    assert ended.decision.kind == "no_gain"
    assert "soak" in ended.decision.reason
    assert ended.requests[-1].soak
    assert ended.requests[-1].points == (make_spec().baseline,)


def test_a_winner_whose_evaluation_does_not_fit_gives_way() -> None:
    """The soak never reached that peak: it saw a part of the evaluation, and the whole of it passes the budget."""

    def hungry(config: RunConfig) -> EvaluationPart:
        need = round((5 if config == make_spec().baseline else 15) * GIB)
        held = ByteRange(value=need, low=need - GIB, high=need + GIB)
        return EvaluationPart(batches=200, seen=20, seconds=40.0, held=held)

    ended = drive(make_spec(), World(flag_factors={Precision.FP16: 0.8}, evaluation=hungry))
    assert ended.decision.kind == "no_gain"
    assert "soak" in ended.decision.reason
    assert ended.decision.winner is not None
    assert ended.decision.winner.config == make_spec().baseline
    found = promise(ended.rows, ended.spec, ended.decision)
    assert found is not None
    assert found.peak_bytes == 5 * GIB
    assert (found.peak_low_bytes, found.peak_high_bytes) == pytest.approx((4 * GIB, 6 * GIB), rel=0.05)
    assert found.peak_from == "extrapolated from 20 of 200 evaluation batches"


def test_a_baseline_whose_evaluation_does_not_fit_is_told() -> None:
    need = 15 * GIB
    part = EvaluationPart(batches=200, seen=20, seconds=1.0, held=ByteRange(value=need, low=need, high=need))
    ended = drive(make_spec(), World(flag_factors={Precision.FP16: 0.8}, evaluation=lambda config: part))
    told = "soak: the configuration shipped needs 15,360 MiB of 15,073 allowed (extrapolated from 20 of 200"
    assert any(note.startswith(told) for note in ended.decision.notes)


def test_the_soak_is_the_last_probe_of_the_shipped_configuration() -> None:
    ended = drive(make_spec(), FASTER)
    soak = ended.requests[-1]
    assert soak.soak
    assert ended.decision.winner is not None
    assert soak.points == (ended.decision.winner.config,)
    assert soak.limits.deadline_s > ended.requests[0].limits.deadline_s


def test_finalists_stay_the_same_while_the_gate_runs() -> None:
    spec, runner, rows = make_spec(), SimulatedRunner(FASTER), list[ProbeRow]()
    sides: list[set[str]] = []
    for _ in range(120):
        plan = next_probe(spec, rows)
        if not isinstance(plan, ProbeRequest):
            break
        if plan.stage is Stage.GATE and plan.pair is not None:
            while len(sides) <= plan.pair:
                sides.append(set())
            sides[plan.pair].add(plan.points[0].digest())
        rows += rows_of(plan, runner.run(plan), len(rows))
    assert len(sides) >= spec.gate.min_pairs
    assert all(later <= sides[0] for later in sides)


@pytest.mark.parametrize("pairs", [2, 4])
def test_shorter_gates_are_possible_when_asked_for(pairs: int) -> None:
    ended = drive(make_spec(gate=GateSpec(min_pairs=pairs, max_pairs=pairs)), FASTER)
    assert len({request.pair for request in ended.of_stage("gate")}) == pairs
