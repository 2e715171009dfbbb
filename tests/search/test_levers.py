"""Model-size levers in simulated worlds: the model changes only for proven quality and a proven gain, and aloud."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest

from tests.search.simulated_world import GIB, Ended, World, drive, make_baseline, make_spec
from tuner.contract.base import Scalar
from tuner.contract.config import RunConfig
from tuner.contract.measurement import Outcome
from tuner.contract.probe import ProbeKind, ProbeRequest, Stage
from tuner.contract.study import LrSpec, QualityConstraint, StudySpec
from tuner.search.planner import next_probe
from tuner.search.selection import promise

QUALITY = QualityConstraint(metric="score", tolerance=0.01, samples=512, seeds=3)


def lever_spec(**changes: object) -> StudySpec:
    options: dict[str, Scalar] = {"width": 32, "data": "mine"}
    space = make_spec().space.model_copy(update={"options": {"width": (16, 32, 64)}})
    fields: dict[str, object] = {
        "baseline": make_baseline(options=options), "options": options, "space": space, "quality": QUALITY,
        "budget_s": 600.0,
    }  # fmt: skip
    return make_spec(**{**fields, **changes})


def width(options: Mapping[str, Scalar]) -> int:
    value = options.get("width", 32)
    assert isinstance(value, int)
    return value


def speed(options: Mapping[str, Scalar]) -> float:
    return width(options) / 32


def noisy(score: float, seed: int, model: int) -> float:
    """Seeds move all models together (common random numbers), and each a little by itself."""
    return score + 0.05 * math.sin(seed + 1) + 0.0005 * math.sin(7 * seed + model)


def equal_score(options: Mapping[str, Scalar], seed: int) -> float:
    return noisy(0.8, seed, width(options))


def wide_is_better(options: Mapping[str, Scalar], seed: int) -> float:
    return noisy({16: 0.7, 32: 0.8, 64: 0.83}[width(options)], seed, width(options))


EQUAL = World(model_factor=speed, score=equal_score)
WORSE = World(model_factor=speed, score=wide_is_better)


def note_about(ended: Ended, text: str) -> str:
    (found,) = [note for note in ended.decision.notes if note.startswith(f"model with {text}:")]
    return found


def shipped(ended: Ended) -> RunConfig:
    assert ended.decision.winner is not None
    return ended.decision.winner.config


def test_a_smaller_model_of_proven_quality_ships_and_the_reason_says_so_aloud() -> None:
    ended = drive(lever_spec(), EQUAL)
    assert ended.decision.kind == "winner"
    assert shipped(ended).options == {"width": 16, "data": "mine"}
    reason = ended.decision.reason
    assert "The MODEL itself was changed: width 32 -> 16 (score 0.8" in reason
    assert "3 seeds" in reason
    assert "0.01 worse is allowed" in reason
    found = promise(ended.rows, ended.spec, ended.decision)
    assert found is not None
    assert found.gain == ended.decision.gain


def test_quality_is_compared_at_equal_samples_and_seeds_with_the_point_s_own_options() -> None:
    ended = drive(lever_spec(), EQUAL)
    asked = [r for r in ended.requests if r.kind is ProbeKind.QUALITY]
    seeds: dict[int, list[int]] = {}
    for request in asked:
        (point,) = request.points
        assert (request.samples, request.options) == (512, point.options)
        assert point.quality is not None
        assert point.quality.metric == "score"
        seeds.setdefault(width(point.options), []).append(point.seed)
    assert seeds == {32: [0, 1, 2], 16: [0, 1, 2], 64: [0, 1, 2]}
    assert len({point.batch_label for request in asked for point in request.points}) == 1


def test_a_model_of_lower_quality_is_never_measured_for_speed() -> None:
    ended = drive(lever_spec(), WORSE)
    assert shipped(ended).options["width"] == 32
    assert "MODEL" not in ended.decision.reason
    assert "quality is not proven" in note_about(ended, "width 32 -> 16")
    assert "too slow" in note_about(ended, "width 32 -> 64")
    fast = [r for r in ended.of_stage("quality") if r.kind is ProbeKind.END_TO_END]
    assert [width(r.points[0].options) for r in fast] == [64]
    assert all(width(row.config.options) == 32 for row in ended.rows if row.stage is Stage.GATE)


def test_a_difference_within_the_tolerance_on_average_alone_is_not_proven() -> None:
    """The mean is a little better, but the seeds scatter far beyond the tolerance."""
    scatter = {0: 0.1, 1: -0.09, 2: 0.02}
    world = World(model_factor=speed, score=lambda o, seed: 0.8 + (scatter[seed] if width(o) == 16 else 0.0))
    ended = drive(lever_spec(), world)
    assert shipped(ended).options["width"] == 32
    assert "quality is not proven" in note_about(ended, "width 32 -> 16")


def test_lower_may_be_better() -> None:
    quality = QUALITY.model_copy(update={"higher_is_better": False})
    ended = drive(lever_spec(quality=quality), WORSE)
    assert shipped(ended).options["width"] == 16


@pytest.mark.parametrize("fault", [Outcome.DIVERGED, Outcome.CRASHED])
def test_a_model_that_fails_is_out_and_the_others_go_on(fault: Outcome) -> None:
    def failing(request: ProbeRequest, config: RunConfig, number: int) -> Outcome | None:
        return fault if request.kind is ProbeKind.QUALITY and config.options["width"] == 16 else None

    ended = drive(lever_spec(), EQUAL, fault=failing)
    assert f"out, {fault.value}" in note_about(ended, "width 32 -> 16")
    assert "too slow" in note_about(ended, "width 32 -> 64")
    assert len([r for r in ended.requests if r.points[0].options["width"] == 16]) <= 2


def test_a_larger_model_that_does_not_fit_is_tried_in_a_smaller_cut() -> None:
    world = World(
        model_factor=lambda o: 2.0 if width(o) == 64 else 1.0,
        score=lambda o, seed: noisy(0.8, seed, width(o)),
        alpha=0.05, sample_bytes=0.7 * GIB,
    )  # fmt: skip
    ended = drive(lever_spec(), world)
    tried = [
        (row.config.micro_batch_size, row.outcome)
        for row in ended.rows
        if row.stage is Stage.QUALITY and row.config.options["width"] == 64
    ]
    assert tried[0] == (16, Outcome.OOM_DEVICE)
    assert {micro for micro, outcome in tried if outcome is Outcome.OK} == {8}


def test_a_metric_that_is_not_measured_is_named_with_those_that_are() -> None:
    ended = drive(lever_spec(quality=QUALITY.model_copy(update={"metric": "acuracy"})), EQUAL)
    (note,) = [note for note in ended.decision.notes if note.startswith("model")]
    assert "'acuracy' is not measured here; known: score" in note
    assert len([r for r in ended.requests if r.kind is ProbeKind.QUALITY]) == 1


def test_a_budget_too_small_for_two_models_skips_the_stage_and_says_what_it_needs() -> None:
    ended = drive(lever_spec(quality=QUALITY.model_copy(update={"samples": 1_000_000})), EQUAL)
    assert ended.of_stage("quality") == []
    assert ended.decision.kind == "winner"
    (note,) = [note for note in ended.decision.notes if note.startswith("model")]
    assert "not tried" in note
    assert "1,000,000 samples" in note


def test_a_budget_for_some_of_the_models_takes_them_in_the_order_of_the_file() -> None:
    space = make_spec().space.model_copy(update={"options": {"width": (16, 20, 24, 28, 40, 48, 56, 64)}})
    ended = drive(lever_spec(space=space, budget_s=400.0), EQUAL)
    tried = [width(r.points[0].options) for r in ended.of_stage("quality") if r.kind is ProbeKind.QUALITY]
    assert tried[:6] == [32, 32, 32, 16, 16, 16]
    assert set(tried) <= {32, 16, 20, 24, 28, 40, 48}
    assert any("more combinations of space.options were not tried" in note for note in ended.decision.notes)
    assert ended.seconds <= 400.0 * 1.15


def test_the_lr_stage_keeps_its_share_and_looks_at_the_unchanged_model() -> None:
    space = lever_spec().space.model_copy(update={"lr": (5e-5, 1e-4, 2e-4)})
    ended = drive(lever_spec(space=space, lr=LrSpec(samples=256, seeds=2)), EQUAL)
    stages = list(dict.fromkeys(request.stage for request in ended.requests))
    assert stages.index(Stage.QUALITY) < stages.index(Stage.LR) < stages.index(Stage.GATE)
    assert {width(r.points[0].options) for r in ended.of_stage("lr")} == {32}
    assert shipped(ended).options["width"] == 16


def test_nothing_of_another_model_is_offered_as_a_runner_up() -> None:
    for world in (EQUAL, WORSE):
        ended = drive(lever_spec(), world)
        assert all(config.options == shipped(ended).options for config in ended.decision.runner_ups)


def test_of_equally_fast_finalists_the_unchanged_model_stays() -> None:
    world = World(model_factor=lambda o: 1.005 if width(o) == 32 else 1.0, score=equal_score)
    assert shipped(drive(lever_spec(), world)).options["width"] == 32


def test_a_study_without_levers_asks_the_same_as_before() -> None:
    spec = lever_spec(space=make_spec().space, quality=None)
    ended = drive(spec, EQUAL)
    assert ended.of_stage("quality") == []
    assert not any(note.startswith("model with") for note in ended.decision.notes)


def test_any_prefix_of_the_rows_gives_the_request_that_came_next() -> None:
    ended = drive(lever_spec(), EQUAL, seed=3)
    number = 0
    for request in ended.requests:
        if request.stage in (Stage.QUALITY, Stage.GATE):
            assert next_probe(ended.spec, ended.rows[:number]) == request
        number += len(request.points)
