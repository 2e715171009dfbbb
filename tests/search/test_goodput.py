"""A free effective batch: what a size is worth, which sizes are tried, and which settings go with them."""

from __future__ import annotations

import math

import pytest

from tests.search.simulated_world import Ended, World, drive, loss_curve, make_baseline, make_spec
from tuner.commands.probe import noise_words
from tuner.contract.config import OptimizerConfig, OptimizerName, RunConfig
from tuner.contract.measurement import Measurement, MemoryPeak, Outcome
from tuner.contract.probe import ProbeKind, ProbeRequest, ProbeRow, Stage
from tuner.contract.study import LrSpec, SamplerName, StudySpec
from tuner.search.goodput import best_batch, best_samples, efficiency, noise_scale, refusal, usable_samples
from tuner.search.losses import loss_notes, losses_at_equal_samples
from tuner.search.model import StepFit
from tuner.search.planner import sampler_request
from tuner.search.points import optimizer_rule, scaled_beta

SIZES, MICROS = (16, 32, 64, 128), (4, 8, 16, 32)
UPDATES = World(alpha=0.0, omega=0.1)
"""An optimizer step costs as much as fifty samples: large batches are fast."""


def free(world_size: int = 1, sizes: tuple[int, ...] = SIZES, **changes: object) -> StudySpec:
    space = make_spec().space.model_copy(update={"effective_batch_size": sizes, "micro_batch_size": MICROS})
    baseline = make_baseline(world_size=world_size)
    return make_spec(**{"effective_batch": None, "space": space, "baseline": baseline, **changes})


def shipped(ended: Ended) -> RunConfig:
    assert ended.decision.winner is not None
    return ended.decision.winner.config


def goodput(world: World, config: RunConfig, phi: float) -> float:
    return world.rate(config) * efficiency(phi, config.effective_batch_size, 16)


def test_the_closed_form_is_the_best_of_all_sizes() -> None:
    """Against a fine scan of progress per second, whole and capped by memory."""
    phi, fit = 60.0, StepFit(alpha=0.010, beta=0.002, omega=0.004, residual=0.0)
    scan = [size / 10 for size in range(10, 4000)]
    best = max(scan, key=lambda b: b / (fit.alpha + fit.beta * b + fit.omega) / (phi + b))
    assert best_batch(phi, fit.alpha, fit.omega, fit.beta) == pytest.approx(best, abs=0.1)
    assert best_samples(phi, fit, micro=64) == pytest.approx(best, abs=0.1)
    slope = fit.beta + fit.alpha / 4
    accumulated = max((b for b in scan if b >= 4), key=lambda b: b / (slope * b + fit.omega) / (phi + b))
    assert best_samples(phi, fit, micro=4) == pytest.approx(accumulated, abs=0.1)
    assert best_batch(phi, 0.01, 0.0, 0.0) == math.inf


def test_efficiency_is_relative_to_the_baseline_s_size() -> None:
    assert efficiency(64.0, 16, 16) == 1.0
    assert efficiency(64.0, 64, 16) == pytest.approx(80 / 128)
    assert efficiency(64.0, 8, 16) > 1.0
    assert efficiency(1e12, 512, 16) == pytest.approx(1.0)


def test_adam_s_rule() -> None:
    before = OptimizerConfig(lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    after = optimizer_rule(before, 4.0)
    assert after.lr == pytest.approx(2e-4)
    assert after.betas == (0.6, 0.996)
    assert after.eps == pytest.approx(5e-9)
    assert after.weight_decay == 0.1
    back = optimizer_rule(after, 0.25)
    assert (back.lr, back.betas, back.eps) == (before.lr, before.betas, before.eps)


def test_sgd_s_rule_is_linear_and_leaves_the_rest() -> None:
    before = OptimizerConfig(name=OptimizerName.SGD, lr=0.1, momentum=0.9)
    assert optimizer_rule(before, 2.0) == before.model_copy(update={"lr": 0.2})


def test_a_beta_below_zero_is_refused_with_the_arithmetic() -> None:
    assert scaled_beta(0.9, 10.0) == 0.0
    with pytest.raises(ValueError, match=r"1 - 16 x \(1 - 0\.9\) = -0\.6"):
        scaled_beta(0.9, 16.0)
    assert "1 - 16 x (1 - 0.9) = -0.6" in refusal(free(), 256, 1e6)


def test_sizes_beyond_the_noise_scale_are_refused_and_smaller_ones_are_not() -> None:
    spec = free()
    assert "beyond 1 x the noise scale of 60" in refusal(spec, 64, 60.0)
    assert refusal(spec, 32, 60.0) == ""
    assert refusal(spec, 8, 5.0) == ""
    assert usable_samples(spec, 60.0, None, MICROS) == (16, 32)
    assert usable_samples(spec, None, 40.0, MICROS) == (16,)


def test_the_closed_form_s_size_is_tried_where_no_listed_one_is_near() -> None:
    spec = free(sizes=(16, 128))
    assert usable_samples(spec, 500.0, 47.0, MICROS) == (16, 128, 32)
    assert usable_samples(spec, 500.0, 50.0, MICROS) == (16, 128, 64)
    assert usable_samples(spec, 500.0, 120.0, MICROS) == (16, 128), "128 stands for it"
    assert usable_samples(spec, 500.0, 300.0, MICROS) == (16, 128), "outside the range listed"
    assert usable_samples(spec, 40.0, 60.0, MICROS) == (16,), "beyond the noise scale"


@pytest.mark.parametrize(("phi", "size"), [(2000.0, 128), (40.0, 32), (10.0, 16)])
def test_a_study_ships_the_size_with_the_best_goodput(phi: float, size: int) -> None:
    world = World(alpha=0.0, omega=0.1, noise_scale=phi)
    ended = drive(free(), world)
    best = shipped(ended)
    assert best.effective_batch_size == size, ended.decision.reason
    assert [row.stage for row in ended.rows].count(Stage.NOISE) == 1
    assert ended.requests[2].kind is ProbeKind.NOISE
    expected = optimizer_rule(make_baseline().optimizer, size / 16) if size != 16 else make_baseline().optimizer
    assert ("It counts progress" in ended.decision.reason) == (size != 16)
    fused = best.optimizer.fused
    assert best.optimizer == expected.model_copy(update={"fused": fused})


def test_raw_throughput_is_never_the_measure() -> None:
    """Twice the batch is faster in samples/s, and teaches less per second."""
    world = World(alpha=0.0, omega=0.004, beta=0.004, noise_scale=33.0)
    spec = free(sizes=(16, 32))
    ended = drive(spec, world)
    big = spec.baseline.model_copy(update={"accumulation_steps": 4})
    assert world.rate(big) > world.rate(spec.baseline)
    assert goodput(world, big, 33.0) < goodput(world, spec.baseline, 33.0)
    assert shipped(ended).effective_batch_size == 16


def test_the_size_stays_where_the_noise_scale_is_unknown_and_the_notes_say_why() -> None:
    drowned = drive(free(), World(alpha=0.0, omega=0.1, noise_scale=None))
    broken = drive(
        free(), UPDATES, fault=lambda request, *_: Outcome.DIVERGED if request.kind is ProbeKind.NOISE else None
    )
    for ended, why in ((drowned, "does not stand out from its noise (at least 40"), (broken, "injected diverged")):
        assert {c.effective_batch_size for r in ended.requests for c in r.points} == {16}
        assert {c.optimizer.lr for r in ended.requests for c in r.points} == {1e-4}
        (note,) = [note for note in ended.decision.notes if "effective batch kept at 16" in note]
        assert why in note


def test_the_notes_name_the_rule_its_numbers_and_what_was_refused() -> None:
    ended = drive(free(), World(alpha=0.0, omega=0.1, noise_scale=100.0))
    notes = "\n".join(ended.decision.notes)
    assert "gradient noise scale 100 samples (80 to 130) after 1024 samples" in notes
    assert "throughput x (100 + 16) / (100 + size)" in notes
    assert "effective batch 64: adam: lr 0.0001 x sqrt(4) = 0.0002, betas 0.9 -> 0.6, 0.999 -> 0.996" in notes
    assert "effective batch 128 not proposed: beyond 1 x the noise scale of 100" in notes


def test_without_a_rule_for_its_lr_an_optimizer_keeps_its_batch_and_the_notes_say_why() -> None:
    own = make_baseline(optimizer=OptimizerConfig(name=OptimizerName.OWN, lr=1.0))
    ended = drive(free(baseline=own), World(alpha=0.0, omega=0.1, noise_scale=500.0))
    assert shipped(ended).effective_batch_size == 16
    assert shipped(ended).optimizer.lr == 1.0
    assert "effective batch 32 not proposed: 2 times the baseline's: no rule is known" in "\n".join(
        ended.decision.notes
    )


def test_a_fixed_batch_or_a_list_of_one_asks_for_no_noise_scale() -> None:
    kept = drive(make_spec(), UPDATES)
    alone = drive(free(sizes=()), UPDATES)
    assert Stage.NOISE not in {row.stage for row in (*kept.rows, *alone.rows)}
    assert any("lists nothing besides 16" in note for note in alone.decision.notes)


def test_sizes_count_over_all_devices() -> None:
    spec = free(world_size=2, sizes=(32, 64, 128))
    assert usable_samples(spec, 100.0, None, MICROS) == (16, 32), "per device; 128 in all is beyond 100"


def test_an_optuna_sampler_may_not_leave_the_sizes_either() -> None:
    world = World(alpha=0.0, omega=0.1, noise_scale=40.0)
    spec = free(sampler=SamplerName.RANDOM, max_probes=4)
    proposal = {"micro_batch_size": 16, "effective_batch_size": 32}
    ended = drive(spec, world, propose=lambda _: dict(proposal))
    sampled = next(r.points[0] for r in ended.requests if r.stage is Stage.SAMPLER)
    assert sampled.effective_batch_size == 32
    assert sampled.optimizer.betas == (0.8, 0.998)
    beyond = sampler_request(spec, ended.rows, {**proposal, "effective_batch_size": 64}).points[0]
    assert (beyond.effective_batch_size, beyond.optimizer.lr) == (16, 1e-4)


def test_lr_rates_are_carried_over_to_the_leader_s_size() -> None:
    """The stage runs at the leader, a larger batch: its rates are scaled, the verdict names them for the baseline's."""
    space = free().space.model_copy(update={"lr": (1e-4, 3e-4)})
    lr = LrSpec(tune=True, samples=256, seeds=2)
    best = {2e-4: 0.5, 6e-4: 0.4}
    world = World(alpha=0.0, omega=0.1, noise_scale=80.0, losses=lambda lr: (1.0, best[round(lr, 6)]))
    ended = drive(free(space=space, lr=lr, budget_s=400.0), world)
    asked = {round(r.points[0].optimizer.lr, 6) for r in ended.requests if r.kind is ProbeKind.LR}
    assert asked == {2e-4, 6e-4}
    assert shipped(ended).effective_batch_size == 64
    assert shipped(ended).optimizer.lr == pytest.approx(6e-4)
    assert any("0.0001 replaced by 0.0003" in note for note in ended.decision.notes)
    assert any("at 64 they were 2 times that" in note for note in ended.decision.notes)


def noise_row(number: int, **values: float) -> ProbeRow:
    return ProbeRow(
        number=number, request_id=f"noise-{number}", kind=ProbeKind.NOISE, stage=Stage.NOISE, config=make_baseline(),
        outcome=Outcome.OK, values=values, seconds=1.0,
    )  # fmt: skip


def test_a_noise_scale_without_an_upper_end_is_no_figure() -> None:
    known = noise_row(0, noise_scale=50.0, noise_low=40.0, noise_high=70.0)
    open_ended = noise_row(1, noise_scale=500.0, noise_low=40.0)
    assert noise_scale([open_ended], free()) is None
    found = noise_scale([known, open_ended], free())
    assert found is not None
    assert (found.value, found.low, found.high) == (50.0, 40.0, 70.0)
    other = known.model_copy(update={"config": make_baseline(options={"width": 8})})
    assert noise_scale([other], free()) is None, "that of another model says nothing"


def ran(config: RunConfig, losses: list[float], number: int = 0) -> ProbeRow:
    measurement = Measurement(
        samples_per_step=config.effective_batch_size, step_s=(0.1,) * len(losses), losses={"total": tuple(losses)},
        memory=MemoryPeak(process_bytes=1),
    )  # fmt: skip
    request = ProbeRequest(id="x", kind=ProbeKind.END_TO_END, stage=Stage.GATE, workload="simulated", points=(config,))
    return ProbeRow(
        number=number, request_id=request.id, kind=request.kind, stage=request.stage, config=config,
        outcome=Outcome.OK, measurement=measurement, seconds=1.0,
    )  # fmt: skip


BASE = make_baseline()
WHOLE = make_baseline(micro_batch_size=16, accumulation_steps=1)
CURVE = [1.0 / (1 + step) + 0.01 * math.sin(step) for step in range(60)]


def test_losses_are_compared_after_as_many_samples() -> None:
    """The faster one has seen more, and its later losses do not count."""
    rows = [ran(BASE, CURVE[:40]), ran(WHOLE, [loss * 1.0001 for loss in CURVE])]
    found = losses_at_equal_samples(rows, [BASE, WHOLE])
    assert found is not None
    assert found.samples == 40 * 16
    assert found.losses[0] == pytest.approx(sum(CURVE[30:40]) / 10)
    assert found.losses[1] == pytest.approx(found.losses[0], rel=1e-3)
    assert found.differs == (False, False)
    assert list(loss_notes(rows, BASE, [("winner", WHOLE)])) == [
        f"loss at 640 samples: winner {found.losses[1]:.4g}, baseline {found.losses[0]:.4g}"
    ]


def test_a_loss_further_apart_than_noise_is_a_warning() -> None:
    rows = [ran(BASE, CURVE), ran(WHOLE, [loss + 0.01 for loss in CURVE])]
    (note,) = loss_notes(rows, BASE, [("winner", WHOLE)])
    assert "warning" in note
    scattered = [loss + 0.01 * (-1) ** step for step, loss in enumerate(CURVE)]
    (note,) = loss_notes([ran(BASE, CURVE), ran(WHOLE, scattered)], BASE, [("winner", WHOLE)])
    assert "warning" not in note


def test_another_batch_size_is_told_and_not_held_against_it() -> None:
    twice = make_baseline(micro_batch_size=32, accumulation_steps=1)
    rows = [ran(BASE, CURVE), ran(twice, [loss + 0.2 for loss in CURVE])]
    (note,) = loss_notes(rows, BASE, [("winner", twice)])
    assert note.startswith("loss at 960 samples: winner")
    assert "warning" not in note
    assert "effective batch 32" in note


def test_nothing_is_said_without_a_record() -> None:
    assert losses_at_equal_samples([ran(BASE, CURVE)], [BASE, WHOLE]) is None
    assert losses_at_equal_samples([ran(BASE, CURVE), ran(WHOLE, CURVE[:2])], [BASE, WHOLE]) is None
    assert list(loss_notes([], BASE, [("winner", WHOLE)])) == []


def test_losses_without_a_number_are_a_warning() -> None:
    rows = [ran(BASE, CURVE), ran(WHOLE, [*CURVE[:55], *[math.nan] * 5])]
    (note,) = loss_notes(rows, BASE, [("winner", WHOLE)])
    assert "warning" in note


def test_the_lr_verdict_compares_shared_seeds_only() -> None:
    """The budget ended within a round: the baseline's rate has one seed more, a lucky one."""
    from tuner.search.lr import judge

    space = make_spec().space.model_copy(update={"lr": (1e-4, 2e-4)})
    spec = make_spec(space=space, lr=LrSpec(samples=64, seeds=2))
    finals = {(1e-4, 0): 0.6, (2e-4, 0): 0.5, (1e-4, 1): 0.1}
    rows = [
        noise_row(number).model_copy(
            update={
                "measurement": loss_curve(1.0, final),
                "kind": ProbeKind.LR,
                "stage": Stage.LR,
                "config": make_baseline(optimizer=OptimizerConfig(lr=lr), seed=seed),
            }
        )
        for number, ((lr, seed), final) in enumerate(finals.items())
    ]
    verdict = judge(rows, spec)
    assert verdict.suggested == 2e-4
    assert not verdict.significant


def test_a_noise_scale_is_put_into_words() -> None:
    known = noise_words({"noise_scale": 48.0, "noise_low": 40.0, "noise_high": 60.0}, BASE)
    assert "48 samples (40 to 60)" in known
    assert "at the effective batch of 16 a sample teaches 0.75" in known
    assert "at least 40" in noise_words({"noise_scale": 480.0, "noise_low": 40.0}, BASE)
