"""What is said of how a search ended and why it found nothing is true of its rows."""

from __future__ import annotations

from tests.search.simulated_world import GIB, Ended, SimulatedRunner, World, drive, make_spec, rows_of
from tuner.contract.config import RunConfig
from tuner.contract.measurement import Measurement, MemoryPeak, Outcome
from tuner.contract.probe import ProbeKind, ProbeRequest, ProbeRow, Stage
from tuner.contract.space import SearchSpace
from tuner.contract.study import StudySpec
from tuner.contract.tuned import Decision
from tuner.search.planner import Done, next_probe
from tuner.search.selection import select
from tuner.search.situation import situation_of
from tuner.search.view import View

BASE = make_spec().baseline
OTHER = BASE.model_copy(update={"loader": BASE.loader.model_copy(update={"num_workers": 1})})
SMALL = SearchSpace(num_workers=(0, 1))


def row(
    number: int, config: RunConfig, rate: float, *, stage: Stage, host_s: float = 0.01, share: float = 0.3
) -> ProbeRow:
    """An end-to-end process at `rate` samples/s, its peak a `share` of the memory budget."""
    measurement = Measurement(
        samples_per_step=config.effective_batch_size,
        step_s=(config.effective_batch_size / rate,) * 20,
        memory=MemoryPeak(process_bytes=GIB, reserved_bytes=round(share * make_spec().memory_budget_bytes)),
        reference_s=(host_s, host_s),
    )
    return ProbeRow(
        number=number, request_id=f"r{number}", index=0, kind=ProbeKind.END_TO_END, stage=stage, config=config,
        outcome=Outcome.OK, measurement=measurement, seconds=4.0,
    )  # fmt: skip


def judged(spec: StudySpec, *searched: ProbeRow) -> Decision:
    """The decision once the planner has nothing left to ask of a search that closed with these rows."""
    rows, runner = list(searched), SimulatedRunner(World())
    first = row(len(rows), BASE, 300.0, stage=Stage.GATE).model_copy(update={"pair": 0})
    rows.append(first)
    while not isinstance(plan := next_probe(spec, rows), Done):
        assert isinstance(plan, ProbeRequest)
        rows += rows_of(plan, runner.run(plan), len(rows))
    return select(rows, spec)


def test_a_measurement_above_the_baseline_that_was_the_host_s_doing_is_told() -> None:
    """The baseline met a slow host, the other a fast one: raw it is a tenth faster, at the same host a tenth slower."""
    decision = judged(
        make_spec(space=SMALL),
        row(0, BASE, 300.0, stage=Stage.BASELINE, host_s=0.012),
        row(1, OTHER, 330.0, stage=Stage.VERIFY, host_s=0.010),
    )
    assert decision.kind == "no_gain"
    label = make_spec().label(OTHER)
    assert f"one measurement of {label} was above the baseline (1.100x), but" in decision.reason
    assert "the host's speed during each it is at 0.9" in decision.reason
    assert "none of" not in decision.reason


def test_a_faster_configuration_without_room_in_memory_is_told() -> None:
    decision = judged(
        make_spec(space=SMALL),
        row(0, BASE, 300.0, stage=Stage.BASELINE),
        row(1, OTHER, 390.0, stage=Stage.VERIFY, share=0.9999),
    )
    assert "above the baseline (1.300x), but its peak memory leaves too little room" in decision.reason


def test_where_nothing_was_faster_it_is_said_and_how_long_the_search_took() -> None:
    decision = judged(
        make_spec(space=SMALL, budget_s=240.0),
        row(0, BASE, 300.0, stage=Stage.BASELINE),
        row(1, OTHER, 200.0, stage=Stage.VERIFY),
    )
    assert "No gain: none of 1 other configuration measured end to end beat the baseline." in decision.reason
    assert "The search used 8 of 240 s" in decision.reason


def searched(ended: Ended) -> list[str]:
    return [asked.id for asked in ended.requests if asked.stage not in (Stage.GATE, Stage.SOAK)]


def test_a_search_that_came_to_its_end_has_no_note_of_its_budget() -> None:
    """The last probe leaves too little for another one, but none was wanted."""
    roomy = drive(make_spec(budget_s=1000.0), World())
    used = situation_of(View(roomy.spec, roomy.rows))
    ended = drive(make_spec(budget_s=used.history.spent_s + used.budget.gate_reserve_s), World())
    assert searched(ended) == searched(roomy)
    assert situation_of(View(ended.spec, ended.rows)).budget.spent_up
    assert not [note for note in ended.decision.notes if note.startswith("budget")]


def test_a_search_that_needed_all_its_probes_and_no_more_has_no_note_of_them() -> None:
    whole = drive(make_spec(space=SMALL), World())
    exact = drive(make_spec(space=SMALL, max_probes=len(searched(whole))), World())
    assert searched(exact) == searched(whole)
    assert not [note for note in exact.decision.notes if note.startswith("--probes")]
    fewer = drive(make_spec(space=SMALL, max_probes=len(searched(whole)) - 1), World())
    (note,) = [note for note in fewer.decision.notes if note.startswith("--probes")]
    assert f"the search ended with the {len(searched(whole)) - 1} probes allowed; next was " in note


def test_a_search_that_was_cut_short_says_what_was_next_and_what_was_kept_free() -> None:
    ended = drive(make_spec(budget_s=120.0), World())
    used = sum(row.seconds for row in ended.rows if row.stage not in (Stage.GATE, Stage.SOAK))
    (note,) = [note for note in ended.decision.notes if note.startswith("budget")]
    assert note.startswith(f"budget: the search used {used:.0f} of 120 s, and more was to be measured (next ")
    assert note.endswith("s that the ship gate needs")


def test_candidates_that_all_failed_are_not_put_down_to_the_budget() -> None:
    def fault(request: ProbeRequest, config: RunConfig, number: int) -> Outcome | None:
        return Outcome.CRASHED if config.loader.num_workers and request.kind is ProbeKind.END_TO_END else None

    ended = drive(make_spec(space=SMALL, budget_s=10_000.0), World(), fault=fault)
    assert ended.decision.kind == "no_gain"
    assert (
        "No gain: None of the other configurations tried end to end (1) ran within the memory budget"
        in ended.decision.reason
    )
    assert "crashed: injected crashed" in ended.decision.reason
    assert not [note for note in ended.decision.notes if note.startswith("budget")]
