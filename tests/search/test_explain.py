"""An explanation of simulated studies, whose true step times, memory and loader are known."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache

import pytest

from tests.search.simulated_world import GIB, Ended, World, drive, make_baseline, make_spec
from tuner.contract.config import CompileMode, LoaderConfig, Precision, RunConfig
from tuner.contract.errors import ConfigError, JobFailed
from tuner.contract.explanation import Change, ExplainResult, Limit
from tuner.contract.measurement import Interval, Measurement, Outcome
from tuner.contract.probe import ProbeKind, ProbeRequest, ProbeRow, Stage
from tuner.contract.space import Dropped, Knob, with_knobs
from tuner.contract.study import GateSpec, StudySpec
from tuner.contract.tuned import Decision
from tuner.report.explain_words import tables
from tuner.search.explain import explain
from tuner.search.history import rate_of

PLAIN = World(alpha=0.03, beta=0.001, omega=0.002, process_noise=0.005, step_noise=0.01)
LOADED = replace(PLAIN, alpha=0.001, beta=0.0005, data_per_sample=0.02)
TIGHT = replace(PLAIN, capacity_bytes=2.2 * GIB, sample_bytes=0.12 * GIB)
"""A micro-batch of 8 takes 1.96 GiB, one of 16 would take 2.92."""
NO_RECOMPUTING = make_spec().space.model_copy(update={"gradient_checkpointing": (False,)})


@cache
def plain() -> Ended:
    return drive(make_spec(), PLAIN)


def told(ended: Ended, config: RunConfig | None = None) -> ExplainResult:
    return explain(ended.spec, ended.rows, ended.decision, config)


def limit(result: ExplainResult, name: str) -> Limit:
    return next(item for item in result.limits if item.name == name)


def change(result: ExplainResult, part: str) -> Change:
    return next(item for item in result.changes if part in item.what)


def within(value: float, interval: Interval | None) -> bool:
    return interval is not None and interval.low <= value <= interval.high


def waiting(rows: list[ProbeRow], world: World) -> list[ProbeRow]:
    """The rows with the waits that a real loop would have recorded; SIMULATION records none."""
    return [
        row if row.measurement is None else row.model_copy(update={"measurement": _waited(row, world)}) for row in rows
    ]


def _waited(row: ProbeRow, world: World) -> Measurement:
    assert row.measurement is not None
    if row.kind is not ProbeKind.END_TO_END:
        return row.measurement
    share = max(0.0, 1 - world.compute_s(row.config) / world.step_s(row.config))
    return row.measurement.model_copy(update={"data_wait_s": tuple(share * t for t in row.measurement.step_s)})


def test_launch_overhead_is_named_with_its_true_share() -> None:
    result = told(plain())
    config, world = result.config, PLAIN
    truth = config.accumulation_steps * world.alpha / world.compute_s(config)
    assert result.decision == "winner"
    assert config.batch_label == "16x1"
    assert result.headline.startswith("Limited by launch overhead:")
    assert within(truth, limit(result, "launch overhead").share)
    parts = [item.share.value for item in result.limits if item.of == "a step" and item.share is not None]
    assert sum(parts) == pytest.approx(1.0, abs=1e-6)


def test_the_fit_is_the_world_s_within_its_interval() -> None:
    result = told(plain())
    fit = max(result.fits, key=lambda item: item.cuts)
    assert fit.cuts >= 3
    assert within(PLAIN.alpha, fit.alpha_s)
    assert fit.residual < 0.1
    assert not fit.exact
    assert any(point.chosen and point.end_to_end for point in result.steps)


def test_two_cuts_are_said_to_prove_nothing() -> None:
    spec = make_spec(space=NO_RECOMPUTING.model_copy(update={"micro_batch_size": (8, 16)}))
    result = told(drive(spec, PLAIN))
    assert all(fit.exact for fit in result.fits)
    assert limit(result, "update").share is None
    assert "one effective batch" in limit(result, "update").text


def test_no_launch_overhead_bounds_what_the_world_would_gain() -> None:
    result = told(plain())
    found = change(result, "no launch overhead")
    without = replace(PLAIN, alpha=0.0)
    truth = without.rate(result.config) / PLAIN.rate(result.config)
    assert found.gain is not None
    assert 0.97 * found.gain.low <= truth <= found.gain.high
    assert result.changes[0] == found, "the largest hope comes first"


def test_a_slow_loader_is_named_and_twice_as_fast_is_bounded() -> None:
    """At most as fast as the true world with half the loader seconds, and the workers that keep up are counted."""
    space = NO_RECOMPUTING.model_copy(update={"num_workers": (0, 1, 2)})
    spec = make_spec(space=space, baseline=make_baseline(loader=LoaderConfig(num_workers=2)))
    ended = drive(spec, LOADED)
    result = explain(spec, waiting(ended.rows, LOADED), ended.decision)
    config = result.config
    assert result.headline.startswith("Limited by loader:")
    wait = limit(result, "loader").share
    assert wait is not None
    assert wait.value == pytest.approx(1 - LOADED.compute_s(config) / LOADED.step_s(config), abs=0.02)
    truth = replace(LOADED, data_per_sample=0.01).rate(config) / LOADED.rate(config)
    found = change(result, "loader twice as fast").gain
    assert found is not None
    assert found.high >= 0.97 * truth
    assert found.high < 2.1
    assert result.loader.enough_workers is None
    assert {point.num_workers for point in result.loader.points} == {0, 1, 2}


def test_workers_that_keep_up_are_counted() -> None:
    world = replace(PLAIN, data_per_sample=0.0052)
    result = told(drive(make_spec(), world))
    assert result.loader.compute_sample_s == pytest.approx(world.compute_s(result.config) / 16, rel=0.1)
    assert result.loader.enough_workers == 2, "a sample takes about 3 ms to compute, and 5.2 ms to load by one worker"


def test_memory_that_keeps_a_faster_size_out_is_named() -> None:
    spec = make_spec(space=NO_RECOMPUTING, memory_budget_bytes=int(2.2 * GIB))
    ended = drive(spec, TIGHT)
    result = told(ended)
    assert result.config.micro_batch_size == 8
    assert limit(result, "memory").limits
    found = change(result, "memory for micro-batch 16")
    bigger = replace(TIGHT, capacity_bytes=16 * GIB)
    truth = bigger.rate(result.config.model_copy(update={"micro_batch_size": 16, "accumulation_steps": 1}))
    assert found.gain is not None
    assert 0.95 * found.gain.low <= truth / bigger.rate(result.config) <= found.gain.high
    assert "the budget is 2,253 MiB" in found.hindrance
    assert "did not fit" not in found.hindrance or cites_an_overrun(found.hindrance, ended, 16)


def test_memory_is_predicted_without_the_rows_it_is_held_against() -> None:
    """A peak that was measured twice as high moves what was measured, and the prediction of others, not its own."""
    ended = plain()
    cells = {cell.micro_batch_size: cell for cell in told(ended).memory if cell.variant == "fp32 eager"}
    assert len(cells) >= 3
    size = sorted(cells)[1]
    changed = [_doubled(row) if row.config.micro_batch_size == size else row for row in ended.rows]
    after = {c.micro_batch_size: c for c in explain(ended.spec, changed, None).memory if c.variant == "fp32 eager"}
    before = cells[size]
    assert before.measured_share is not None
    assert after[size].measured_share == pytest.approx(2 * before.measured_share)
    assert after[size].predicted_share == before.predicted_share
    assert before.below_bar


def _doubled(row: ProbeRow) -> ProbeRow:
    if row.measurement is None:
        return row
    memory = row.measurement.memory
    assert memory.reserved_bytes is not None
    more = memory.model_copy(update={"reserved_bytes": 2 * memory.reserved_bytes})
    return row.model_copy(update={"measurement": row.measurement.model_copy(update={"memory": more})})


def test_a_size_that_ran_out_of_memory_stands_in_the_table() -> None:
    def fault(_request: object, config: RunConfig, _count: int) -> Outcome | None:
        return Outcome.OOM_DEVICE if config.micro_batch_size == 16 else None

    ended = drive(make_spec(space=NO_RECOMPUTING), PLAIN, fault=fault)
    result = told(ended)
    cells = [cell for cell in result.memory if cell.micro_batch_size == 16]
    assert [cell.outcome for cell in cells] == [Outcome.OOM_DEVICE] * len(cells)
    assert cells
    assert all(cell.measured_share is None for cell in cells)
    (line,) = [line for line in result.ruled_out if line.startswith("micro-batch sizes above 16 with fp32 eager:")]
    assert cites_an_overrun(line, ended, 16)


def cites_an_overrun(text: str, ended: Ended, micro: int) -> bool:
    """Every `probe N` in `text` is a row of that micro-batch size that did not fit; there is one."""
    rows = [ended.rows[int(number)] for number in re.findall(r"\(probe (\d+)\)", text)]
    budget = ended.spec.memory_used
    over = [r.outcome.is_oom or (r.measurement is not None and budget(r.measurement.memory) > 1) for r in rows]
    return bool(rows) and all(over) and {row.config.micro_batch_size for row in rows} == {micro}


def test_what_was_never_tried_is_not_said_to_have_failed() -> None:
    """8 without recomputing ran out of memory; 16 without was never asked, and is not said to have been."""
    world = replace(TIGHT, sample_bytes=0.4 * GIB, flag_factors={"checkpointing": 1.3})
    spec = make_spec(baseline=make_baseline(gradient_checkpointing=True), memory_budget_bytes=int(2.2 * GIB))
    ended = drive(spec, world)
    ran = [row for row in ended.rows if row.kind is ProbeKind.END_TO_END and row.outcome is Outcome.OK]
    own = {row.config.digest(): row.config for row in ran if row.config.gradient_checkpointing}
    assert own
    for config in own.values():
        result = told(ended, config)
        found = change(result, "gradient checkpointing off").hindrance
        micro = config.micro_batch_size
        tried = [
            row
            for row in ended.rows
            if row.config.micro_batch_size == micro
            and not row.config.gradient_checkpointing
            and row.kind in (ProbeKind.COMPUTE, ProbeKind.END_TO_END)
        ]
        if not tried:
            assert found == "" or found.startswith("not tried; "), found
        if "it did not fit" in found:
            assert cites_an_overrun(found, ended, micro)


def test_memory_that_nothing_is_known_of_is_not_said_to_have_been_too_little() -> None:
    """Killed after the baseline: the next larger size was never asked."""
    ended = plain()
    first = [row for row in ended.rows if row.stage is Stage.BASELINE]
    huge = explain(ended.spec.model_copy(update={"memory_budget_bytes": int(2.0 * GIB)}), first, None)
    for item in huge.changes:
        assert "did not fit" not in item.hindrance
    verdicts = [candidate.verdict for candidate in explain(ended.spec, ended.rows[:12], None).candidates]
    assert not any("budget ended" in verdict or "it stays" in verdict for verdict in verdicts)


def test_a_compile_mode_that_ran_is_not_said_to_be_untried() -> None:
    """At a cut that is not the leader's any more, by whatever stage."""
    space = make_spec().space.model_copy(update={"compile": (CompileMode.EAGER, CompileMode.DEFAULT)})
    spec = make_spec(space=space, baseline=make_baseline(horizon_samples=2_000))
    ended = drive(spec, PLAIN)
    assert any(line.startswith("compile default:") for line in told(ended).ruled_out)
    row = next(row for row in ended.rows if row.kind is ProbeKind.COMPUTE)
    config = with_knobs(row.config, {Knob.COMPILE: CompileMode.DEFAULT, Knob.MICRO_BATCH_SIZE: 4})
    tried = row.model_copy(update={"number": len(ended.rows), "request_id": "tried", "config": config})
    result = explain(spec, [*ended.rows, tried], ended.decision)
    assert not any(line.startswith("compile default:") for line in result.ruled_out)


def test_without_a_ship_gate_none_is_spoken_of() -> None:
    ended = plain()
    searched = [row for row in ended.rows if row.stage not in (Stage.GATE, Stage.SOAK)]
    verdicts = [candidate.verdict for candidate in explain(ended.spec, searched, None).candidates]
    assert not any("stood for it in the ship gate" in verdict for verdict in verdicts)
    begun = [row for row in ended.rows if row.stage is not Stage.SOAK][: len(searched) + 2]
    verdicts = [candidate.verdict for candidate in explain(ended.spec, begun, None).candidates]
    assert not any(verdict.startswith("not proven") for verdict in verdicts)


def test_candidates_say_why_they_lost() -> None:
    ended = plain()
    result = told(ended)
    shipped = [item for item in result.candidates if item.verdict == "shipped"]
    assert [item.label for item in shipped] == [result.label]
    assert shipped[0].gate is not None
    assert ended.decision.gain == shipped[0].gate
    assert shipped[0].pairs >= ended.spec.gate.min_pairs
    reference = next(item for item in result.candidates if item.verdict == "the reference")
    assert reference.predicted is None, "nothing was known before the first probe"
    assert all(item.verdict for item in result.candidates)
    foretold = [item for item in result.candidates if item.predicted is not None and item.measured is not None]
    for item in foretold:
        assert item.predicted is not None
        assert item.measured is not None
        assert item.predicted.value == pytest.approx(item.measured.value, rel=0.25)
    assert foretold


def test_candidates_show_what_was_measured_beside_what_the_search_compares() -> None:
    """On a restless host the search takes the host's speed out; the table never passes that off as measured."""
    ended = drive(make_spec(), World(alpha=0.05, host_noise=0.12))
    result = told(ended)
    moved = 0
    for item in result.candidates:
        rates = [
            rate_of(row)
            for row in ended.rows
            if row.kind is ProbeKind.END_TO_END
            and row.stage not in (Stage.GATE, Stage.SOAK)
            and row.measurement is not None
            and ended.spec.label(row.config) == item.label
        ]
        if item.measured is None or not rates:
            continue
        assert item.measured.low <= min(rates) <= max(rates) <= item.measured.high
        assert item.at_usual_speed is not None
        moved += abs(item.at_usual_speed.value / item.measured.value - 1) > 0.02
    assert moved
    table = next(table for table in tables(result) if table.title == "Candidates")
    assert table.heads[2:4] == ("measured", "at the host's usual speed")
    steady = next(table for table in tables(told(plain())) if table.title == "Candidates")
    assert "at the host's usual speed" not in steady.heads


def test_one_flag_s_effect_has_its_ratio_and_interval() -> None:
    world = replace(PLAIN, flag_factors={"fused": 0.8})
    result = told(drive(make_spec(), world))
    found = [item for item in result.effects if item.setting == "fused optimizer off -> on"]
    assert found
    assert any(within(1.25, item.ratio) for item in found)
    batch = [item for item in result.effects if item.setting.startswith("batch ")]
    assert batch


def test_model_use_needs_a_known_peak() -> None:
    ended = plain()
    counted = [_with_flops(row, 1e10) for row in ended.rows]
    unknown = explain(ended.spec, counted, ended.decision).model_use
    assert unknown.mfu is None
    assert unknown.flops_per_s is not None
    assert "no fp32 peak of Simulated is known" in unknown.text
    device = ended.spec.device.model_copy(
        update={"name": "Tesla P100-PCIE-16GB", "capability": (6, 0), "memory_bytes": 17070817280}
    )
    spec = ended.spec.model_copy(update={"device": device})
    result = explain(spec, counted, ended.decision)
    assert result.samples_per_s is not None
    assert result.model_use.mfu is not None
    assert result.model_use.mfu.value == pytest.approx(1e10 * result.samples_per_s.value / 9.3e12)
    assert change(result, "device's peak").gain is not None


def _with_flops(row: ProbeRow, flops: float) -> ProbeRow:
    if row.measurement is None:
        return row
    return row.model_copy(update={"measurement": row.measurement.model_copy(update={"flops_per_sample": flops})})


def test_compile_modes_that_the_target_lacks_stand_against_the_bound() -> None:
    ended = plain()
    gone = Dropped(knob=Knob.COMPILE, value="default", reason="it needs something newer", because="target")
    spec = ended.spec.model_copy(update={"dropped": (gone,)})
    result = explain(spec, ended.rows, ended.decision)
    assert change(result, "no launch overhead").hindrance == "default: it needs something newer"
    assert result.dropped == (gone,)


def test_checkpointing_off_is_bounded_and_its_memory_named() -> None:
    baseline = make_baseline(gradient_checkpointing=True)
    world = replace(TIGHT, sample_bytes=0.4 * GIB, flag_factors={"checkpointing": 1.3})
    spec = make_spec(baseline=baseline, memory_budget_bytes=int(2.2 * GIB))
    ended = drive(spec, world)
    result = told(ended)
    if not result.config.gradient_checkpointing:
        pytest.fail(f"the world is made so that it stays on: {result.label}")
    assert "budget" in change(result, "gradient checkpointing off").hindrance


def test_duties_and_compiling_are_shares_of_the_run() -> None:
    ended = plain()
    cadence = ended.spec.baseline.cadence.model_copy(update={"evaluate_samples": 100_000})
    rows = [_with_evaluation(row, cadence, 60.0) for row in ended.rows]
    spec = ended.spec.model_copy(update={"baseline": ended.spec.baseline.model_copy(update={"cadence": cadence})})
    assert ended.decision.winner is not None
    winner = ended.decision.winner.config.model_copy(update={"cadence": cadence})
    result = explain(spec, rows, None, winner)
    share = limit(result, "duties").share
    assert share is not None
    steady = spec.baseline.horizon_samples / PLAIN.rate(winner)
    assert share.value == pytest.approx(24 * 60 / (24 * 60 + steady), rel=0.03)
    assert change(result, "no evaluation").of == "run time"
    assert limit(told(ended), "compile").text == "nothing is compiled"


def _with_evaluation(row: ProbeRow, cadence: object, seconds: float) -> ProbeRow:
    config = row.config.model_copy(update={"cadence": cadence})
    measurement = row.measurement
    if measurement is not None and row.stage is Stage.SOAK:
        measurement = measurement.model_copy(update={"phases_s": {"evaluate": seconds}})
    return row.model_copy(update={"config": config, "measurement": measurement})


def test_every_prefix_of_a_study_can_be_explained() -> None:
    """Killed at any moment, what is stored still says something; before the baseline it says that there is nothing."""
    ended = plain()
    with pytest.raises(JobFailed, match="nothing to explain"):
        explain(ended.spec, [], None)
    for count in range(1, len(ended.rows), 3):
        result = explain(ended.spec, ended.rows[:count], None)
        assert result.decision == "open"
        assert result.headline.startswith("Limited by ")
        assert sum(result.seconds.values()) == pytest.approx(sum(row.seconds for row in ended.rows[:count]))


def test_it_is_a_pure_function() -> None:
    ended = plain()
    assert told(ended) == explain(ended.spec, list(reversed(ended.rows)), ended.decision)


def test_a_runner_up_can_be_explained_and_an_unknown_one_not() -> None:
    ended = plain()
    result = told(ended, ended.spec.baseline)
    assert result.label == ended.spec.label(ended.spec.baseline)
    assert result.samples_per_s is not None
    assert result.samples_per_s.value == pytest.approx(PLAIN.rate(ended.spec.baseline), rel=0.05)
    never = ended.spec.baseline.model_copy(update={"compile": CompileMode.MAX_AUTOTUNE})
    with pytest.raises(ConfigError, match=r"was not measured end to end .*measured: .*8x2 fp32 eager w0"):
        told(ended, never)


def test_a_failed_study_says_so() -> None:
    spec: StudySpec = make_spec()
    with pytest.raises(JobFailed, match="it died"):
        explain(spec, [], Decision(kind="failed", reason="it died"))


def test_who_fell_and_who_stood_in_are_both_told() -> None:
    def fault(request: ProbeRequest, config: RunConfig, number: int) -> Outcome | None:
        first_round = request.stage is Stage.GATE and request.pair == 0
        return Outcome.OOM_DEVICE if first_round and config != make_spec().baseline else None

    ended = drive(make_spec(gate=GateSpec(finalists=1)), World(flag_factors={Precision.FP16: 0.8}), fault=fault)
    told = [candidate.verdict for candidate in explain(ended.spec, ended.rows, ended.decision).candidates]
    assert told.count("shipped") == 1
    assert sum(verdict.startswith("out: oom_device in the ship gate") for verdict in told) == 1
