"""The planner driven to the end of whole studies in simulated worlds (no hardware: see simulated_world)."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.search.simulated_world import GIB, Ended, SimulatedRunner, World, drive, make_baseline, make_spec, rows_of
from tuner.contract.config import CompileMode, Precision, RunConfig
from tuner.contract.measurement import Outcome
from tuner.contract.probe import ProbeKind, ProbeRequest, Stage
from tuner.contract.space import Knob, SearchSpace, grid
from tuner.contract.study import GateSpec, LrSpec, Objective, SamplerName, StudySpec
from tuner.search.history import SEARCH_STAGES
from tuner.search.planner import Ask, Done, next_probe, sampler_request

LAUNCHES = World(flag_factors={Precision.FP16: 0.8, "fused": 0.95})
SLOW_LOADER = World(data_per_sample=0.01, contention=0.02)
COMPUTE = World(alpha=0.0005, beta=0.004, flag_factors={Precision.FP16: 1.2, "channels_last": 0.85})
TIGHT = World(alpha=0.05, sample_bytes=1.3 * GIB, flag_factors={"checkpointing": 1.3})
NOISY = World(process_noise=0.02, step_noise=0.1, flag_factors={Precision.FP16: 0.85})
BASELINE_BEST = World(
    alpha=0.0, omega=0.01, data_per_sample=0.0, contention=0.05,
    flag_factors={Precision.FP16: 1.2, "channels_last": 1.05, "fused": 1.03, "checkpointing": 1.3},
)  # fmt: skip


def best_rate(world: World, spec: StudySpec) -> float:
    knobs = [knob for knob in Knob if knob is not Knob.LR]
    fitting = (c for c in grid(spec.space, spec.baseline, knobs) if world.peak_bytes(c) <= spec.memory_budget_bytes)
    return max(world.rate(config) for config in fitting)


def shipped(ended: Ended) -> RunConfig:
    assert ended.decision.winner is not None
    return ended.decision.winner.config


def search_seconds(ended: Ended) -> float:
    return sum(row.seconds for row in ended.rows if row.stage in SEARCH_STAGES)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    "world", [LAUNCHES, SLOW_LOADER, COMPUTE, TIGHT, NOISY], ids=["launches", "loader", "compute", "tight", "noisy"]
)
def test_finds_a_configuration_within_the_noise_of_the_best(world: World, seed: int) -> None:
    spec = make_spec()
    ended = drive(spec, world, seed=seed)
    assert ended.decision.kind == "winner", ended.decision.reason
    assert world.rate(shipped(ended)) >= 0.96 * best_rate(world, spec)
    assert world.peak_bytes(shipped(ended)) <= spec.memory_budget_bytes
    assert sum(row.outcome.is_oom for row in ended.rows) <= 2


@pytest.mark.parametrize("seed", range(6))
def test_a_baseline_that_is_best_stays(seed: int) -> None:
    ended = drive(make_spec(), BASELINE_BEST, seed=seed)
    assert ended.decision.kind == "no_gain", ended.decision.reason
    assert shipped(ended) == make_spec().baseline


def test_the_default_study_takes_minutes() -> None:
    """Compute points of about two seconds and end-to-end probes of about four and a half."""
    for world in (LAUNCHES, BASELINE_BEST, COMPUTE):
        ended = drive(make_spec(budget_s=240.0), world)
        assert search_seconds(ended) <= 240.0
        assert ended.seconds <= 400.0


@pytest.mark.parametrize("budget_s", [1.0, 5.0, 40.0])
def test_a_tiny_budget_measures_the_baseline_and_says_so(budget_s: float) -> None:
    ended = drive(make_spec(budget_s=budget_s), LAUNCHES)
    assert [request.stage for request in ended.requests] == [Stage.BASELINE]
    assert ended.decision.kind == "no_gain"
    assert "budget" in ended.decision.reason.lower()
    assert "budget" in ended.reason
    assert ended.decision.baseline is not None
    assert ended.decision.baseline.samples_per_s is not None


@pytest.mark.parametrize("budget_s", [75.0, 90.0, 120.0, 180.0])
def test_a_small_budget_keeps_the_gate_free(budget_s: float) -> None:
    ended = drive(make_spec(budget_s=budget_s), LAUNCHES)
    assert ended.decision.kind == "winner"
    assert search_seconds(ended) < budget_s / 2 + 30
    assert ended.seconds <= budget_s * 1.15


@pytest.mark.parametrize("step_s", [0.09, 0.4, 1.2])
@pytest.mark.parametrize("seed", [0, 1])
def test_slow_steps_are_paid_for_in_the_forecast(step_s: float, seed: int) -> None:
    """The gate waits for its least number of steps; 64 samples a step, as 16x4."""
    world = World(
        alpha=step_s / 16, beta=step_s / 128, omega=step_s / 4, data_per_sample=1e-4,
        flag_factors={Precision.FP16: 0.7},
    )  # fmt: skip
    baseline = make_baseline(micro_batch_size=16, accumulation_steps=4)
    gate = GateSpec(min_pairs=6, max_pairs=6, finalists=1, measure_s=4.0)
    spec = make_spec(baseline=baseline, effective_batch=64, gate=gate, budget_s=240.0)
    ended = drive(spec, world, seed=seed)
    assert ended.decision.kind == "winner", ended.decision.reason
    assert ended.seconds <= 240.0 * 1.05


@pytest.mark.parametrize("most", [1, 2, 3, 5, 8, 12])
def test_max_probes_bounds_the_search(most: int) -> None:
    ended = drive(make_spec(max_probes=most), LAUNCHES)
    searched = [request for request in ended.requests if request.stage in SEARCH_STAGES]
    assert len(searched) <= most
    if most == 1:
        assert ended.decision.kind == "no_gain"
        assert "--probes" in ended.decision.reason


def test_the_baseline_is_the_first_trial_and_equivalence_comes_before_any_other_cut() -> None:
    ended = drive(make_spec(), LAUNCHES)
    first, second = ended.requests[:2]
    assert (first.kind, first.points) == (ProbeKind.END_TO_END, (make_spec().baseline,))
    assert second.kind is ProbeKind.EQUIVALENCE
    assert [point.batch_label for point in second.points] == ["8x2", "16x1"]
    assert {point.precision for point in second.points} == {Precision.FP32}


def crash_baseline(request: ProbeRequest, config: RunConfig, number: int) -> Outcome | None:
    return Outcome.CRASHED if request.stage is Stage.BASELINE else None


def test_a_baseline_that_crashes_is_retried_once_and_then_the_study_has_failed() -> None:
    ended = drive(make_spec(), LAUNCHES, fault=crash_baseline)
    assert len(ended.requests) == 2
    assert len({request.id for request in ended.requests}) == 2
    assert ended.decision.kind == "failed"
    assert "injected crashed" in ended.decision.reason


def test_one_crash_of_the_baseline_is_forgiven() -> None:
    ended = drive(make_spec(), LAUNCHES, fault=lambda r, c, n: Outcome.CRASHED if n == 0 else None)
    assert ended.decision.kind == "winner"


def test_a_contended_baseline_is_unmeasurable_after_three_attempts() -> None:
    ended = drive(make_spec(), LAUNCHES, fault=lambda *_: Outcome.CONTENDED)
    assert len(ended.requests) == 3
    assert ended.decision.kind == "failed"
    assert "unmeasurable here" in ended.decision.reason


def test_a_baseline_that_does_not_fit_is_cut_until_it_does() -> None:
    world = World(sample_bytes=3 * GIB)
    ended = drive(make_spec(), world)
    assert [r.points[0].batch_label for r in ended.of_stage("baseline")] == ["8x2", "4x4"]
    assert ended.decision.baseline is not None
    assert ended.decision.baseline.config.batch_label == "4x4"
    assert any("baseline itself does not fit" in note for note in ended.decision.notes)
    assert world.peak_bytes(shipped(ended)) <= world.capacity_bytes


def test_a_baseline_that_never_fits_is_a_failure() -> None:
    ended = drive(make_spec(), World(fixed_bytes=20 * GIB))
    assert ended.decision.kind == "failed"
    assert "does not fit" in ended.decision.reason


def test_a_size_that_ran_out_of_memory_is_never_tried_again_nor_anything_above() -> None:
    """Memory that jumps between 8 and 16 samples, so that no model can foresee it."""

    def fault(request: ProbeRequest, config: RunConfig, number: int) -> Outcome | None:
        jump = config.micro_batch_size >= 16 and request.kind in (ProbeKind.COMPUTE, ProbeKind.END_TO_END)
        return Outcome.OOM_DEVICE if jump else None

    space = make_spec().space.model_copy(update={"micro_batch_size": (1, 2, 4, 8, 16, 32)})
    spec = make_spec(space=space, effective_batch=32, baseline=make_baseline(micro_batch_size=8, accumulation_steps=4))
    ended = drive(spec, World(alpha=0.05), fault=fault)
    failed: dict[tuple[object, ...], int] = {}
    for row in ended.rows:
        if row.kind in (ProbeKind.LOADER, ProbeKind.EQUIVALENCE, ProbeKind.TRACE):  # a trace runs nothing
            continue
        flags = (row.config.precision, row.config.channels_last, row.config.optimizer.fused)
        variant = (*flags, row.config.gradient_checkpointing)
        limit = failed.get(variant)
        same_process = limit is not None and row.outcome.is_oom and row.stage is Stage.FLAGS
        assert limit is None or row.config.micro_batch_size < limit or same_process
        if row.outcome.is_oom:
            failed[variant] = row.config.micro_batch_size
    assert failed
    assert shipped(ended).micro_batch_size < 16


@pytest.mark.parametrize("declared", [True, False])
def test_a_coupled_batch_is_never_cut_otherwise(declared: bool) -> None:
    world = World(relative_l2=1e-7 if declared else 3e-3, flag_factors={Precision.FP16: 0.7})
    ended = drive(make_spec(batch_coupled=declared), world)
    cuts = {c.batch_label for r in ended.requests if r.kind is not ProbeKind.EQUIVALENCE for c in r.points}
    assert cuts == {"8x2"}
    assert shipped(ended).precision is Precision.FP16
    told = "batch_coupled" if declared else "equivalence: gradients of two cuts"
    assert any(note.startswith(told) for note in ended.decision.notes)
    assert bool(ended.of_stage("equivalence")) != declared


def test_why_a_batch_is_not_cut_otherwise_stands_in_the_notes() -> None:
    figures = {"rerun_l2": 0.0, "sum_l2.fit": 7.0, "span_l2.fit": 1e-7, "span_total.fit": 1.0}
    notes = drive(make_spec(), World(relative_l2=0.5, why_not_equivalent=figures)).decision.notes
    assert any("term fit is a mean" in note and note.endswith("divide by nothing and return the sum") for note in notes)


def test_random_data_is_noted_and_costs_the_search_nothing() -> None:
    ended = drive(make_spec(), World(why_not_equivalent={"refetched": 1.0}))
    assert any("the same sample fetched twice differs" in note for note in ended.decision.notes)
    assert shipped(ended).micro_batch_size > 8


def test_a_crash_among_several_points_costs_only_its_own() -> None:
    def fault(request: ProbeRequest, config: RunConfig, number: int) -> Outcome | None:
        return Outcome.CRASHED if config.channels_last and request.kind is ProbeKind.COMPUTE else None

    ended = drive(make_spec(), LAUNCHES, fault=fault)
    assert ended.decision.kind == "winner"
    assert shipped(ended).optimizer.fused
    asked = Counter(c.digest() for r in ended.requests if r.kind is ProbeKind.COMPUTE for c in r.points)
    alone = [r for r in ended.requests if r.kind is ProbeKind.COMPUTE and r.points[0].channels_last]
    assert max(asked.values()) == 2
    assert [len(request.points) for request in alone] == [1]


def test_points_a_crash_kept_from_running_are_asked_together_in_one_process() -> None:
    def fault(request: ProbeRequest, config: RunConfig, number: int) -> Outcome | None:
        return Outcome.CRASHED if config.precision is Precision.FP16 and request.kind is ProbeKind.COMPUTE else None

    ended = drive(make_spec(), LAUNCHES, fault=fault)
    screens = [request.points for request in ended.requests if request.kind is ProbeKind.COMPUTE][:3]
    assert [len(points) for points in screens] == [5, 1, 2]
    assert {(c.channels_last, c.optimizer.fused) for c in screens[2]} == {(True, False), (False, True)}


def test_contended_probes_are_retried_a_bounded_number_of_times() -> None:
    def fault(request: ProbeRequest, config: RunConfig, number: int) -> Outcome | None:
        return Outcome.CONTENDED if config.precision is Precision.FP16 else None

    ended = drive(make_spec(), LAUNCHES, fault=fault)
    counts = Counter((row.kind, row.config.digest()) for row in ended.rows if row.outcome is Outcome.CONTENDED)
    assert max(counts.values()) == 3
    assert shipped(ended).precision is Precision.FP32
    assert any(note.startswith("contended") for note in ended.decision.notes)


COMPILES = World(compile_s=60.0, flag_factors={CompileMode.DEFAULT: 0.6, CompileMode.REDUCE_OVERHEAD: 0.5})


def with_compile(**changes: object) -> StudySpec:
    modes = (CompileMode.EAGER, CompileMode.DEFAULT, CompileMode.REDUCE_OVERHEAD)
    space = make_spec().space.model_copy(update={"compile": modes})
    return make_spec(**{"space": space, "budget_s": 600.0, **changes})


def test_compile_is_chosen_where_it_pays() -> None:
    ended = drive(with_compile(), COMPILES)
    assert shipped(ended).compile is CompileMode.REDUCE_OVERHEAD
    assert sum(r.points[0].compile is not CompileMode.EAGER for r in ended.of_stage("flags")) == 2


def test_compile_is_not_tried_where_the_run_is_too_short_to_earn_it_back() -> None:
    spec = with_compile(baseline=make_baseline(horizon_samples=20_000))
    ended = drive(spec, COMPILES)
    assert all(c.compile is CompileMode.EAGER for r in ended.requests for c in r.points)
    assert any("compile default not tried" in note for note in ended.decision.notes)


def test_compile_is_not_tried_where_the_budget_cannot_carry_it() -> None:
    ended = drive(with_compile(budget_s=150.0), COMPILES)
    assert all(c.compile is CompileMode.EAGER for r in ended.requests for c in r.points)
    assert any("more than the budget" in note for note in ended.decision.notes)


def test_a_free_effective_batch_changes_lr_by_rule_and_says_so() -> None:
    space = make_spec().space.model_copy(
        update={"effective_batch_size": (16, 32, 64), "micro_batch_size": (4, 8, 16, 32)}
    )
    spec = make_spec(effective_batch=None, space=space)
    ended = drive(spec, World(alpha=0.0, omega=0.1))
    best = shipped(ended)
    assert best.effective_batch_size == 64
    assert best.optimizer.lr == pytest.approx(2e-4)
    assert any("unverified" in note and "effective batch" in note for note in ended.decision.notes)


def test_throughput_objective_ignores_compile_time() -> None:
    spec = with_compile(baseline=make_baseline(horizon_samples=20_000), objective=Objective.THROUGHPUT)
    assert shipped(drive(spec, COMPILES)).compile is CompileMode.REDUCE_OVERHEAD


def test_a_space_without_choice_ends_after_the_baseline() -> None:
    ended = drive(make_spec(space=SearchSpace()), LAUNCHES)
    assert ended.decision.kind == "no_gain"
    assert {request.stage for request in ended.requests} <= {Stage.BASELINE, Stage.FLAGS, Stage.BATCH}


def test_other_samplers_are_asked_between_the_baseline_and_the_gate() -> None:
    spec = make_spec(sampler=SamplerName.TPE, max_probes=9)
    proposals: list[dict[str, object]] = [
        {"micro_batch_size": 16, "precision": "fp16", "num_workers": 2, "prefetch_factor": 2, "fused": True},
        {"micro_batch_size": 4, "precision": "fp32", "num_workers": 0, "prefetch_factor": 4, "lr": 0.5},
    ]
    ended = drive(spec, LAUNCHES, propose=lambda turn: proposals[turn % 2])
    stages = [request.stage for request in ended.requests]
    assert stages[:3] == [Stage.BASELINE, Stage.EQUIVALENCE, Stage.SAMPLER]
    assert stages.count(Stage.SAMPLER) == 7
    assert len({request.id for request in ended.requests}) == len(ended.requests)
    assert {c.optimizer.lr for r in ended.requests for c in r.points} == {1e-4}
    assert ended.decision.kind == "winner"
    assert shipped(ended).batch_label == "16x1"


@pytest.mark.parametrize(("micro", "accumulation"), [(2, 8), (4, 4), (8, 2), (16, 1)])
def test_recomputing_is_turned_off_at_the_baseline_s_own_batch(micro: int, accumulation: int) -> None:
    """Not only at the smallest micro-batch size: what recomputing costs is asked where it is used."""
    cut = {"micro_batch_size": micro, "accumulation_steps": accumulation}
    baseline = make_baseline(gradient_checkpointing=True, **cut)
    ended = drive(make_spec(baseline=baseline), World(flag_factors={"checkpointing": 1.3}))
    screened = [config for request in ended.of_stage("flags") for config in request.points]
    assert any(c.micro_batch_size == micro and not c.gradient_checkpointing for c in screened)
    assert not shipped(ended).gradient_checkpointing


def test_recomputing_is_not_turned_off_where_memory_surely_ends() -> None:
    baseline = make_baseline(gradient_checkpointing=True)
    world = World(sample_bytes=3.0 * GIB, flag_factors={"checkpointing": 1.3})
    ended = drive(make_spec(baseline=baseline), world)
    screened = [config for request in ended.of_stage("flags") for config in request.points]
    assert not any(c.micro_batch_size == 8 and not c.gradient_checkpointing for c in screened)


def test_a_sampler_proposal_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="does not divide"):
        sampler_request(make_spec(), [], {"micro_batch_size": 5})


def test_an_unfinished_study_can_go_on_with_a_larger_budget() -> None:
    first = drive(make_spec(budget_s=5.0), LAUNCHES)
    more = drive(make_spec(), LAUNCHES, rows=first.rows)
    assert more.decision.kind == "winner"
    assert not more.of_stage("baseline")


def test_rows_put_in_by_hand_change_nothing() -> None:
    spec = make_spec()
    plain = next_probe(spec, [])
    assert isinstance(plain, ProbeRequest)
    ended = drive(make_spec(max_probes=1), LAUNCHES)
    by_hand = [row.model_copy(update={"stage": Stage.HAND, "request_id": "hand"}) for row in ended.rows]
    assert next_probe(spec, by_hand) == plain


def test_the_hard_memory_cap_reaches_every_probe() -> None:
    ended = drive(make_spec(memory_cap_bytes=12 * GIB), LAUNCHES)
    assert {request.limits.memory_bytes for request in ended.requests} == {12 * GIB}


def test_lr_probes_come_after_the_search_and_before_the_gate() -> None:
    space = make_spec().space.model_copy(update={"lr": (5e-5, 1e-4, 2e-4)})
    ended = drive(make_spec(space=space, lr=LrSpec(samples=512, seeds=2)), LAUNCHES)
    stages = [request.stage for request in ended.requests]
    assert stages.count(Stage.LR) == 6
    assert stages.index(Stage.LR) > max(stages.index(Stage.VERIFY), stages.index(Stage.BATCH))
    assert stages.index(Stage.GATE) > stages.index(Stage.LR)
    assert {c.seed for r in ended.of_stage("lr") for c in r.points} == {0, 1}
    assert {r.samples for r in ended.of_stage("lr")} == {512}


def test_done_and_ask_say_why() -> None:
    assert "tpe" in Ask("sampler tpe proposes").reason
    ended = drive(make_spec(), LAUNCHES)
    final = next_probe(ended.spec, ended.rows)
    assert isinstance(final, Done)
    assert final.reason == ended.reason != ""


def test_a_partly_stored_equivalence_is_asked_again() -> None:
    spec = make_spec()
    ended = drive(make_spec(max_probes=1), LAUNCHES)
    request = next_probe(spec, ended.rows)
    assert isinstance(request, ProbeRequest)
    assert request.kind is ProbeKind.EQUIVALENCE
    both = rows_of(request, SimulatedRunner(LAUNCHES).run(request), len(ended.rows))
    again = next_probe(spec, [*ended.rows, both[0]])
    assert isinstance(again, ProbeRequest)
    assert again.points == request.points
    assert again.id != request.id


def test_a_baseline_that_once_passed_the_memory_budget_is_cut() -> None:
    """A second measurement of the baseline, which an Optuna sampler may ask for, peaks above the budget."""
    spec = make_spec(sampler=SamplerName.TPE, max_probes=6)
    first = drive(make_spec(max_probes=1), LAUNCHES).rows[0]
    assert first.measurement is not None
    memory = first.measurement.memory.model_copy(update={"reserved_bytes": 15 * GIB})
    measurement = first.measurement.model_copy(update={"memory": memory})
    update = {"number": 1, "request_id": "again", "stage": Stage.SAMPLER, "measurement": measurement}
    plan = next_probe(spec, [first, first.model_copy(update=update)])
    assert isinstance(plan, ProbeRequest)
    assert plan.stage is Stage.BASELINE
    assert plan.points[0].batch_label == "4x4"
