"""A trial's parameters and its value are what ran, whatever sampler proposed it and whatever is searched for."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console

from tests.search.simulated_world import GIB, SimulatedRunner, World, make_spec
from tuner.commands.study_loop import StudyLoop
from tuner.contract.config import CompileMode, Precision
from tuner.contract.measurement import Measurement, Outcome, Telemetry
from tuner.contract.probe import Listener, PointReply, ProbeKind, ProbeReply, ProbeRequest, ProbeRow, Stage
from tuner.contract.space import Knob, knob_value
from tuner.contract.statistics import throughput
from tuner.contract.study import LrSpec, Objective, SamplerName, StudySpec
from tuner.search.points import point_of
from tuner.search.score import score
from tuner.store.store import StudyStore
from tuner.store.trials import TrialBook

SPACE = make_spec().space.model_copy(
    update={"lr": (1e-4, 3e-4, 1e-3), "num_workers": (0, 2), "compile": (CompileMode.EAGER, CompileMode.DEFAULT)}
)
WATTS = 250.0


class Powered(SimulatedRunner):
    """On a device that tells its power."""

    def run(self, request: ProbeRequest, listener: Listener | None = None) -> ProbeReply:
        reply = super().run(request, listener)
        return reply.model_copy(update={"points": tuple(map(_powered, reply.points))})


def _powered(point: PointReply) -> PointReply:
    if point.measurement is None:
        return point
    telemetry = Telemetry(power_w=WATTS)
    return point.model_copy(update={"measurement": point.measurement.model_copy(update={"telemetry": telemetry})})


def ended(folder: Path, world: World, **changes: object) -> tuple[StudySpec, list[ProbeRow], list[FrozenTrial]]:
    url = f"sqlite:///{folder}/studies.db"
    spec = make_spec(**{"space": SPACE, "lr": LrSpec(enabled=False), "max_probes": 12, "budget_s": 2000.0, **changes})
    with StudyStore.open(url) as store:
        store.create_study(spec)
        StudyLoop(spec, store, Powered(world), url, Console(file=io.StringIO())).run()
        rows = list(store.rows(spec.name))
    book = TrialBook(url, spec.name)
    trials = book.study.trials
    book.close()
    return spec, rows, trials


def _plain(value: object) -> object:
    return getattr(value, "value", value)


def expected(spec: StudySpec, row: ProbeRow) -> float:
    """The objective's own quantity, from the measurement by its definition."""
    measured = row.measurement
    assert isinstance(measured, Measurement)
    rate = throughput(measured).value
    if spec.objective is Objective.MEMORY:
        return 1 / spec.memory_used(measured.memory)
    if spec.objective is Objective.ENERGY:
        return rate / WATTS
    return rate


@pytest.mark.parametrize(
    ("sampler", "objective"),
    [
        (SamplerName.STAGED, Objective.MEMORY),
        (SamplerName.TPE, Objective.TIME),
        (SamplerName.TPE, Objective.ENERGY),
        (SamplerName.GP, Objective.MEMORY),
        (SamplerName.RANDOM, Objective.THROUGHPUT),
        (SamplerName.RANDOM, Objective.MEMORY),
    ],
)
def test_a_trial_says_what_ran_and_what_it_is_worth(tmp_path: Path, sampler: SamplerName, objective: Objective) -> None:
    if sampler is SamplerName.GP:
        pytest.importorskip("torch")
    spec, rows, trials = ended(tmp_path, World(), sampler=sampler, objective=objective)
    told = [row for row in rows if row.kind is ProbeKind.END_TO_END]
    assert len(trials) == len(told)
    assert sampler is SamplerName.STAGED or sum(row.stage is Stage.SAMPLER for row in told) >= 4
    for row in told:
        assert row.trial is not None
        trial = trials[row.trial]
        for name, value in trial.params.items():
            assert value == _plain(knob_value(row.config, Knob(name))), f"{trial.number}: {name}"
        assert {"micro_batch_size", "lr", "num_workers"} <= set(trial.params)
        assert trial.state is TrialState.COMPLETE
        assert trial.value is not None
        compiled = row.config.compile is not CompileMode.EAGER and objective is Objective.TIME
        too_slow = objective is Objective.MEMORY and trial.value < 0.5
        if not compiled and not too_slow:
            assert trial.value == pytest.approx(expected(spec, row))
    assert {trial.params["lr"] for trial in trials} == {spec.baseline.optimizer.lr}, "no other rate ran"


def test_compiling_counts_in_the_value_of_a_short_run(tmp_path: Path) -> None:
    baseline = make_spec().baseline.model_copy(update={"horizon_samples": 50_000})
    _, rows, trials = ended(tmp_path, World(), sampler=SamplerName.RANDOM, baseline=baseline)
    compiled = [row for row in rows if row.stage is Stage.SAMPLER and row.config.compile is CompileMode.DEFAULT]
    assert compiled
    for row in compiled:
        assert row.measurement is not None
        assert row.trial is not None
        rate = throughput(row.measurement).value
        variant = point_of(row.config).variant
        alike = [other for other in rows[: row.number + 1] if point_of(other.config).variant == variant]
        compile_s = max(other.measurement.phases_s["compile"] for other in alike if other.measurement is not None)
        assert compile_s > 0
        assert trials[row.trial].value == pytest.approx(50_000 / (compile_s + 50_000 / rate))


def test_a_free_effective_batch_is_told_as_the_size_that_ran(tmp_path: Path) -> None:
    """Sizes that cannot be cut so, or that the noise scale forbids, are drawn too: what runs is what is told."""
    space = SPACE.model_copy(update={"micro_batch_size": (4, 8, 12, 16), "effective_batch_size": (16, 24, 32, 64)})
    world = World(noise_scale=40.0)
    asked = {"sampler": SamplerName.RANDOM, "space": space, "effective_batch": None, "objective": Objective.GOODPUT}
    spec, rows, trials = ended(tmp_path, world, **asked, max_probes=16)
    sampled = [row for row in rows if row.stage is Stage.SAMPLER]
    assert len({row.config.effective_batch_size for row in sampled}) > 1
    for row in sampled:
        assert row.trial is not None
        trial = trials[row.trial]
        assert trial.params["effective_batch_size"] == row.config.effective_batch_size
        assert trial.params["micro_batch_size"] == row.config.micro_batch_size
        if row.config.optimizer.lr != spec.baseline.optimizer.lr:
            assert "lr" not in trial.params, "the rule's rate is none of the choices"
        assert row.measurement is not None
        share = (40.0 + 16) / (40.0 + row.config.effective_batch_size)
        assert trial.value == pytest.approx(throughput(row.measurement).value * share)


def test_a_coupled_batch_is_told_as_the_cut_that_ran(tmp_path: Path) -> None:
    _, rows, trials = ended(tmp_path, World(), sampler=SamplerName.RANDOM, batch_coupled=True)
    sampled = [row for row in rows if row.stage is Stage.SAMPLER]
    assert sampled
    assert {trials[row.trial].params["micro_batch_size"] for row in sampled if row.trial is not None} == {8}


def test_what_runs_out_of_memory_is_not_asked_again_nor_anything_larger(tmp_path: Path) -> None:
    world = World(sample_bytes=1.5 * GIB)
    _, rows, trials = ended(tmp_path, world, sampler=SamplerName.RANDOM, max_probes=30)
    seen: dict[tuple[Precision, CompileMode, bool, bool, bool], int] = {}
    for row in rows:
        if row.kind is not ProbeKind.END_TO_END:
            continue
        c = row.config
        variant = (c.precision, c.compile, c.gradient_checkpointing, c.channels_last, c.optimizer.fused)
        assert c.micro_batch_size < seen.get(variant, 1 << 30)
        if row.outcome is Outcome.OOM_DEVICE:
            seen[variant] = c.micro_batch_size
            assert row.trial is not None
            assert trials[row.trial].value == 0.0
            assert trials[row.trial].constraints["memory"] > 0
    assert seen


def test_a_small_space_ends_the_search(tmp_path: Path) -> None:
    space = SPACE.model_copy(
        update={
            "micro_batch_size": (8, 16), "precision": (), "channels_last": (), "fused": (), "num_workers": (0,),
            "gradient_checkpointing": (), "compile": (), "prefetch_factor": (),
        }
    )  # fmt: skip
    _, rows, _ = ended(tmp_path, World(), sampler=SamplerName.TPE, space=space, max_probes=None)
    assert sum(row.stage is Stage.SAMPLER for row in rows) == 1
    assert any(row.stage is Stage.GATE for row in rows)


def test_a_row_means_the_same_whenever_it_is_asked(tmp_path: Path) -> None:
    """A trial that a crash lost is rebuilt with the value it was told."""
    spec, rows, trials = ended(tmp_path, World(), sampler=SamplerName.TPE)
    for row in rows:
        if row.kind is ProbeKind.END_TO_END and row.trial is not None:
            assert score(spec, rows, row).value == trials[row.trial].value
