"""A/A: whatever is asked, the baseline runs, and a whole search over a job with large gains to be had finds none."""

from __future__ import annotations

from tests.search.simulated_world import SimulatedRunner, World, drive, make_spec
from tuner.contract.config import CompileMode, Precision
from tuner.contract.probe import ProbeKind, ProbeRequest, Stage
from tuner.contract.study import LrSpec
from tuner.probe.aa import BaselineRunner
from tuner.search.offline import run_study

TEMPTING = World(alpha=0.03, flag_factors={Precision.FP16: 0.6, "fused": 0.9}, process_noise=0.02)
SPEC = make_spec(aa=True)


def test_a_search_that_could_gain_much_finds_nothing_when_only_the_baseline_runs() -> None:
    assert drive(make_spec(), TEMPTING).decision.kind == "winner"
    stages = set()
    kinds = []
    for seed in range(5):
        rows, decision = run_study(SPEC, BaselineRunner(SimulatedRunner(TEMPTING, seed), SPEC.baseline))
        kinds.append(decision.kind)
        stages |= {row.stage for row in rows}
        assert any(note.startswith("A/A") for note in decision.notes)
        assert decision.search_maximum is not None
        assert 0.9 < decision.search_maximum < 1.1
    assert kinds.count("winner") <= 1
    assert {Stage.FLAGS, Stage.BATCH, Stage.LOADER, Stage.VERIFY, Stage.GATE, Stage.SOAK} <= stages


def test_the_rows_name_what_was_asked_for() -> None:
    rows, _ = run_study(SPEC, BaselineRunner(SimulatedRunner(TEMPTING), SPEC.baseline))
    assert len({row.config.digest() for row in rows}) > 5


def test_every_measuring_point_becomes_the_baseline_with_the_asked_seed_and_lr() -> None:
    inner = SimulatedRunner(TEMPTING)
    spec = make_spec(
        space=SPEC.space.model_copy(update={"lr": (5e-5, 2e-4)}),
        lr=LrSpec(samples=256, seeds=2),
        aa=True,
        budget_s=600.0,
    )
    run_study(spec, BaselineRunner(inner, spec.baseline))
    measured = [
        point for request in inner.requests for point in request.points if request.kind is not ProbeKind.EQUIVALENCE
    ]
    plain = {"seed": 0, "optimizer": spec.baseline.optimizer}
    assert {point.model_copy(update=plain).digest() for point in measured} == {spec.baseline.digest()}
    trained = [request.points[0] for request in inner.requests if request.kind is ProbeKind.LR]
    assert {point.optimizer.lr for point in trained} == {1e-4, 5e-5, 2e-4}
    assert {point.seed for point in trained} == {0, 1}


def test_what_proves_or_predicts_passes_as_it_is() -> None:
    asked = SPEC.baseline.model_copy(update={"micro_batch_size": 16, "compile": CompileMode.DEFAULT})
    for kind in (ProbeKind.EQUIVALENCE, ProbeKind.TRACE):
        inner = SimulatedRunner(TEMPTING)
        request = ProbeRequest(id="one", kind=kind, workload="simulated", points=(SPEC.baseline, asked))
        BaselineRunner(inner, SPEC.baseline).run(request)
        assert inner.requests == [request]
