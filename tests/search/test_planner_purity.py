"""The planner as a pure function: killed anywhere and asked again, it asks for the same and repeats nothing."""

from __future__ import annotations

import random
from functools import cache

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.search.simulated_world import GIB, Ended, SimulatedRunner, World, drive, make_baseline, make_spec, rows_of
from tuner.contract.base import Scalar
from tuner.contract.config import Precision, RunConfig
from tuner.contract.measurement import Outcome
from tuner.contract.probe import ProbeRequest, ProbeRow, Stage
from tuner.contract.study import LrSpec, QualityConstraint, StudySpec
from tuner.search.planner import Ask, Done, next_probe


def some_crashes(request: ProbeRequest, config: RunConfig, number: int) -> Outcome | None:
    if request.kind.value == "compute" and config.channels_last:
        return Outcome.CRASHED
    return Outcome.CONTENDED if number % 11 == 7 else None


def worlds() -> dict[str, tuple[World, StudySpec]]:
    lr_space = make_spec().space.model_copy(update={"lr": (5e-5, 1e-4)})
    return {
        "plain": (World(flag_factors={Precision.FP16: 0.8}), make_spec()),
        "tight": (World(alpha=0.05, sample_bytes=1.3 * GIB), make_spec(space=lr_space, lr=LrSpec(samples=256))),
        "noisy": (World(process_noise=0.03, misfit=0.1), make_spec(budget_s=150.0)),
        "levers": (smaller_is_faster(), lever_spec()),
    }


def smaller_is_faster() -> World:
    return World(model_factor=lambda options: 0.5 if options["width"] == 16 else 1.0)


def lever_spec() -> StudySpec:
    options: dict[str, Scalar] = {"width": 32}
    return make_spec(
        baseline=make_baseline(options=options),
        options=options,
        space=make_spec().space.model_copy(update={"options": {"width": (16, 32, 64)}}),
        quality=QualityConstraint(metric="score", samples=256),
    )


@cache
def study(name: str) -> Ended:
    world, spec = worlds()[name]
    return drive(spec, world, seed=5, fault=some_crashes if name != "plain" else None)


def boundaries(ended: Ended) -> list[int]:
    """Numbers of rows after which a request was complete."""
    found = [0]
    for request in ended.requests:
        found.append(found[-1] + len(request.points))
    return found


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_any_prefix_of_the_rows_gives_the_request_that_came_next(data: st.DataObject) -> None:
    ended = study(data.draw(st.sampled_from(["plain", "tight", "noisy", "levers"])))
    ends = boundaries(ended)
    turn = data.draw(st.integers(0, len(ended.requests)))
    rows = ended.rows[: ends[turn]]
    shuffled = list(rows)
    random.Random(turn).shuffle(shuffled)
    plan = next_probe(ended.spec, shuffled)
    if turn < len(ended.requests):
        assert plan == ended.requests[turn]
        assert plan == next_probe(ended.spec, rows)
    else:
        assert plan == Done(ended.reason)


@settings(deadline=None, max_examples=20)
@given(st.data())
def test_a_reply_stored_in_part_is_completed_and_not_repeated(data: st.DataObject) -> None:
    ended = study("plain")
    ends = boundaries(ended)
    shared = [
        turn
        for turn, request in enumerate(ended.requests)
        if len(request.points) > 1 and request.kind.value in ("compute", "loader")
    ]
    turn = data.draw(st.sampled_from(shared))
    kept = data.draw(st.integers(1, len(ended.requests[turn].points) - 1))
    rows = ended.rows[: ends[turn] + kept]
    plan = next_probe(ended.spec, rows)
    assert isinstance(plan, ProbeRequest)
    assert plan.kind is ended.requests[turn].kind
    assert plan.id not in {row.request_id for row in rows}
    assert {p.digest() for p in plan.points} == {p.digest() for p in ended.requests[turn].points[kept:]}


@settings(deadline=None, max_examples=8)
@given(st.integers(0, 10_000), st.sampled_from(["plain", "tight", "noisy", "levers"]))
def test_a_tuner_killed_at_any_row_still_ends_and_repeats_no_good_row(cut: int, name: str) -> None:
    world, spec = worlds()[name]
    earlier: list[ProbeRow] = study(name).rows[: cut % (len(study(name).rows) + 1)]
    ended = drive(spec, world, seed=cut, rows=earlier)
    seen: set[tuple[object, ...]] = set()
    for row in ended.rows:
        if row.kind.value == "equivalence" or row.stage is Stage.CONFIRM:  # which asks again on purpose
            continue
        key = (row.kind, row.config.digest(), row.pair, row.soak)
        assert key not in seen, f"{row.kind} {row.config.label} measured twice"
        if row.outcome is Outcome.OK:
            seen.add(key)
    assert len({(row.request_id, row.index) for row in ended.rows}) == len(ended.rows)


def test_request_ids_are_unique_and_the_same_in_every_run() -> None:
    for name in worlds():
        ids = [request.id for request in study(name).requests]
        assert len(set(ids)) == len(ids)
    world, spec = worlds()["plain"]
    assert [r.id for r in drive(spec, world, seed=5).requests] == [r.id for r in study("plain").requests]


@settings(deadline=None, max_examples=10)
@given(st.data())
def test_any_failures_whatever_end_in_an_honest_answer(data: st.DataObject) -> None:
    """Outcomes at random: the study ends, and never ships what did not fit or did not run."""
    bad = [o for o in Outcome if o is not Outcome.OK]
    chance = data.draw(st.floats(0.0, 0.9))
    rng = random.Random(data.draw(st.integers(0, 1 << 30)))
    world, spec = worlds()["plain"]
    runner, rows = SimulatedRunner(world), list[ProbeRow]()
    runner = SimulatedRunner(world, fault=lambda *_: rng.choice(bad) if rng.random() < chance else None)
    for _ in range(200):
        plan = next_probe(spec, rows)
        assert not isinstance(plan, Ask)
        if isinstance(plan, Done):
            break
        rows += rows_of(plan, runner.run(plan), len(rows))
    else:
        raise AssertionError("no end after 200 probes")
    from tuner.search.selection import promise, select

    decision = select(rows, spec)
    if decision.kind == "failed":
        assert decision.winner is None
        return
    assert decision.winner is not None
    good = {row.config.digest() for row in rows if row.outcome is Outcome.OK and row.kind.value == "end_to_end"}
    assert decision.winner.config.digest() in good
    promise(rows, spec, decision)
