"""Learning from end-to-end rows alone: steps taken apart into compute and loader seconds, and a whole study of them."""

from __future__ import annotations

import pytest

from tests.search.simulated_world import World, drive, make_spec
from tuner.contract.config import Precision
from tuner.contract.measurement import Outcome
from tuner.contract.probe import ProbeKind, Stage
from tuner.contract.space import Knob
from tuner.search.plain import PlainStudy, Told
from tuner.search.points import Loader
from tuner.search.view import View

STUDY = PlainStudy(
    effective_batch=64,
    words={Knob.MICRO_BATCH_SIZE: (8, 16, 32, 64), Knob.NUM_WORKERS: (0, 1, 2, 4)},
    first={},
    noise=0.02,
    device="cpu",
)


def told(micro: int, workers: int, step_s: float, wait: float | None = None) -> Told:
    values = {Knob.MICRO_BATCH_SIZE: micro, Knob.NUM_WORKERS: workers}
    return Told(values, Stage.SAMPLER, Outcome.OK, samples_per_s=64 / step_s, data_wait=wait)


def view_of(*trials: Told) -> View:
    return View(STUDY.spec, [*STUDY.rows([told(8, 0, 1.0), *trials])])


def test_loaders_at_one_cut_are_told_apart_from_the_computation() -> None:
    """Computing takes 0.4 s; the loader 0.5 s alone, so that one worker is too slow and two hide it."""
    view = view_of(told(16, 0, 0.9), told(16, 1, 0.5), told(16, 2, 0.4), told(16, 4, 0.404))
    per_sample = view.loading.per_sample
    assert per_sample[Loader(0, 2)] * 64 == pytest.approx(0.5)
    assert per_sample[Loader(1, 2)] * 64 == pytest.approx(0.5)
    assert per_sample[Loader(2, 2)] == pytest.approx(2 * per_sample[Loader(4, 2)])
    assert view.loading.seconds(Loader(3, 2), 64) == pytest.approx(0.5 / 3)
    assert view.steps.measured(view.base, 16, 4) == pytest.approx(0.4, rel=0.02)


def test_a_loader_known_to_add_is_subtracted_at_other_cuts() -> None:
    view = view_of(told(16, 0, 0.9), told(16, 2, 0.4), told(32, 0, 0.8))
    assert view.steps.measured(view.base, 32, 2) == pytest.approx(0.3)


def test_a_step_that_waits_for_its_loader_says_nothing_of_the_computation() -> None:
    view = view_of(told(16, 1, 0.8), told(16, 4, 0.4), told(64, 1, 0.8))
    assert view.steps.measured(view.base, 64, 1) is None


def test_a_recorded_wait_is_believed() -> None:
    view = view_of(told(32, 0, 0.8, wait=0.25), told(64, 1, 0.5, wait=0.5))
    assert view.steps.measured(view.base, 32, 2) == pytest.approx(0.6)
    assert view.steps.measured(view.base, 64, 1) == pytest.approx(0.25)
    assert view.loading.per_sample[Loader(0, 2)] * 64 == pytest.approx(0.2)
    assert view.loading.per_sample[Loader(1, 2)] * 64 == pytest.approx(0.5)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_study_of_end_to_end_probes_alone_finds_what_the_staged_one_finds(seed: int) -> None:
    world = World(data_per_sample=1e-6, flag_factors={Precision.FP16: 0.8, "fused": 0.95})
    alone = drive(make_spec(probes_alone=False, budget_s=400.0), world, seed=seed)
    staged = drive(make_spec(), world, seed=seed)
    assert {request.kind for request in alone.requests} == {ProbeKind.END_TO_END}
    assert {len(request.points) for request in alone.requests} == {1}
    assert not alone.of_stage("sampler")
    assert alone.decision.winner is not None
    assert staged.decision.winner is not None
    assert world.rate(alone.decision.winner.config) >= 0.97 * world.rate(staged.decision.winner.config)
