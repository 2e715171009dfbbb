"""TunerSampler in plain Optuna studies: Optuna's own contract suite, and the planner's path through a landscape.

Of the suite (`optuna.testing.pytest_samplers`) three parts apply:

- `BasicSamplerTestCase`: any sampler. Its parameters are none of our knobs, so they show that what is not ours reaches
  Optuna's TPE unharmed; the tests below this part repeat its cases with knobs, so that the planner answers.
- `RelativeSamplerTestCase`: any sampler that proposes parameters together, which is how the planner proposes.
- `MultiObjectiveSamplerTestCase`: any sampler that may be used in a study of several objectives; those are TPE's.

`SingleOnlySamplerTestCase` does not apply: it demands that several objectives are refused, and here they are not.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, PartialFixedSampler, TPESampler
from optuna.testing import pytest_samplers as suite
from optuna.trial import Trial, TrialState

from tuner import TunerSampler
from tuner.contract.errors import ConfigError

NAMES = {"micro_batch_size": "bs", "precision": "amp"}
optuna.logging.set_verbosity(optuna.logging.ERROR)


class _Ours:
    @pytest.fixture
    def sampler(self) -> Callable[[], BaseSampler]:
        return lambda: TunerSampler(effective_batch=64, seed=0)


class TestBasic(_Ours, suite.BasicSamplerTestCase):
    pass


class TestRelative(suite.RelativeSamplerTestCase):
    """It wants parameters proposed together from the second trial on, when TPE as a rule still draws at random."""

    @pytest.fixture
    def sampler(self) -> Callable[[], BaseSampler]:
        return lambda: TunerSampler(effective_batch=64, n_startup_trials=0, seed=0)


class TestMultiObjective(_Ours, suite.MultiObjectiveSamplerTestCase):
    pass


@dataclass
class Landscape:
    """A made-up training job at 64 samples a step: SIMULATION. Memory rules out the largest sizes without AMP."""

    seed: int = 0
    told: str = "constraint"
    """How a trial says what memory it took: `constraint`, `bytes`, or by `oom` alone."""
    budget: int = 16 << 30
    sizes: tuple[int, ...] = (2, 4, 8, 16, 32, 64)
    seen: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._rng = np.random.default_rng(self.seed)

    def suggest(self, trial: Trial) -> dict[str, Any]:
        return {
            "bs": trial.suggest_categorical("bs", self.sizes),
            "num_workers": trial.suggest_int("num_workers", 0, 6),
            "prefetch_factor": trial.suggest_categorical("prefetch_factor", (2, 4)),
            "compile": trial.suggest_categorical("compile", (False, True)),
            "amp": trial.suggest_categorical("amp", ("fp32", "fp16")),
            "fused": trial.suggest_categorical("fused", (False, True)),
            "dropout": trial.suggest_float("dropout", 0.0, 0.5),
        }

    def rate(self, p: Mapping[str, Any]) -> float:
        factor = (0.6 if p["compile"] else 1) * (0.8 if p["amp"] == "fp16" else 1) * (0.95 if p["fused"] else 1)
        compute = (64 // p["bs"] * 0.01 + 0.132) * factor * (1 + 0.01 * p["num_workers"])
        data = 0.192 / max(1, p["num_workers"])
        return 64.0 / float(max(compute, data) if p["num_workers"] else compute + data)

    def peak(self, p: Mapping[str, Any]) -> float:
        return float(1 + 0.3 * p["bs"] * (0.6 if p["amp"] == "fp16" else 1)) * (1 << 30)

    def __call__(self, trial: Trial) -> float:
        p = self.suggest(trial)
        self.seen.append(p)
        peak = self.peak(p)
        if self.told == "constraint":
            trial.set_constraint("memory", peak / self.budget - 1)
        if self.told == "bytes":
            trial.set_user_attr("peak_bytes", peak)
        if peak > self.budget:
            trial.set_user_attr("outcome", "oom")
            raise optuna.TrialPruned
        return self.rate(p) * float(np.exp(0.01 * self._rng.standard_normal()))

    @property
    def ooms(self) -> int:
        return sum(self.peak(p) > self.budget for p in self.seen)

    @property
    def best(self) -> float:
        choices = itertools.product(self.sizes, range(7), (False, True), ("fp32", "fp16"), (False, True))
        every = (dict(zip(("bs", "num_workers", "compile", "amp", "fused"), c, strict=True)) for c in choices)
        return max(self.rate(p) for p in every if self.peak(p) <= self.budget)

    def trials_to(self, share: float) -> int:
        """Trials until one within memory reached this share of the best."""
        good = (
            i for i, p in enumerate(self.seen, 1) if self.peak(p) <= self.budget and self.rate(p) >= share * self.best
        )
        return next(good, 10_000)


def ours(seed: int = 0, **changes: Any) -> TunerSampler:
    return TunerSampler(**{"effective_batch": 64, "names": NAMES, "seed": seed, **changes})


def optimized(sampler: BaseSampler, landscape: Landscape, trials: int) -> optuna.Study:
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.optimize(landscape, n_trials=trials)
    return study


@cache
def searched(seed: int, told: str = "constraint") -> tuple[Landscape, optuna.Study]:
    landscape = Landscape(seed, told)
    return landscape, optimized(ours(seed, memory_bytes=landscape.budget), landscape, 30)


@pytest.mark.parametrize("seed", [0, 1])
def test_it_needs_fewer_trials_than_tpe_and_meets_no_out_of_memory_on_the_way(seed: int) -> None:
    landscape, _ = searched(seed)
    rival = Landscape(seed)
    optimized(TPESampler(seed=seed), rival, 30)
    assert landscape.trials_to(0.98) <= 20
    assert landscape.trials_to(0.98) <= rival.trials_to(0.98)
    assert landscape.ooms == 0


@pytest.mark.parametrize("told", ["constraint", "bytes", "oom"])
def test_memory_may_be_told_in_three_ways(told: str) -> None:
    landscape, _ = searched(0, told)
    assert landscape.trials_to(0.93) <= 25
    assert landscape.ooms <= 1


@pytest.mark.parametrize("told", ["constraint", "bytes", "oom"])
def test_no_size_is_proposed_above_one_seen_not_to_fit(told: str) -> None:
    landscape = Landscape(3, told, budget=6 << 30)
    optimized(ours(3, memory_bytes=landscape.budget), landscape, 26)
    limits: dict[tuple[Any, ...], int] = {}
    for p in landscape.seen:
        flags = (p["compile"], p["amp"], p["fused"])
        assert p["bs"] < limits.get(flags, 1000)
        if landscape.peak(p) > landscape.budget:
            limits[flags] = p["bs"]


def test_the_first_trial_asks_least_of_the_machine_and_the_planner_follows() -> None:
    landscape, study = searched(0)
    first = landscape.seen[0]
    assert (first["bs"], first["num_workers"], first["compile"], first["amp"]) == (2, 0, False, "fp32")
    stages = [trial.system_attrs.get("tuner:plan", {}).get("stage") for trial in study.trials]
    assert stages[1:15].count(None) == 0
    assert {"loader", "flags", "batch", "verify"} <= set(stages)


def test_a_baseline_of_one_s_own_is_where_the_search_starts() -> None:
    landscape = Landscape()
    optimized(ours(baseline={"bs": 8, "num_workers": 3, "prefetch_factor": 4, "compile": True}), landscape, 1)
    first = landscape.seen[0]
    assert (first["bs"], first["num_workers"], first["prefetch_factor"], first["compile"]) == (8, 3, 4, True)


def test_the_proposal_is_a_function_of_the_trials_alone() -> None:
    """A study that was stopped after any trial, and taken up by a new process, goes on as it would have."""
    landscape, study = searched(0)
    for cut in (1, 7, 16, 24):
        again = optuna.create_study(direction="maximize", sampler=ours(0, memory_bytes=landscape.budget))
        again.add_trials(study.trials[:cut])
        trial = again.ask()
        assert landscape.suggest(trial) == study.trials[cut].params


def test_a_second_worker_is_never_given_the_planner_s_configuration_again() -> None:
    landscape = Landscape()
    study = optimized(ours(), landscape, 5)
    asked = [landscape.suggest(study.ask()) for _ in range(3)]
    system = [{k: v for k, v in p.items() if k != "dropout"} for p in asked]
    assert sum("tuner:plan" in trial.system_attrs for trial in study.trials[5:]) == 1
    assert system[0] not in system[1:]


def test_threads_share_one_search() -> None:
    landscape = Landscape()
    study = optuna.create_study(direction="maximize", sampler=ours())
    study.optimize(landscape, n_trials=12, n_jobs=2)
    assert len(study.trials) == 12
    assert all(trial.state.is_finished() for trial in study.trials)


KNOB_DISTRIBUTIONS: dict[str, BaseDistribution] = {
    "micro_batch_size": IntDistribution(1, 64, log=True),
    "num_workers": IntDistribution(0, 8, step=2),
    "prefetch_factor": CategoricalDistribution((4, 8)),
    "precision": CategoricalDistribution(("bf16", "fp32")),
    "compile": CategoricalDistribution(("eager", "reduce-overhead")),
    "channels_last": CategoricalDistribution((True, False)),
    "gradient_checkpointing": CategoricalDistribution((False, True)),
}


def asked(distributions: Mapping[str, BaseDistribution], trials: int, **changes: Any) -> optuna.Study:
    study = optuna.create_study(direction="maximize", sampler=TunerSampler(effective_batch=48, seed=1, **changes))
    for _ in range(trials):
        trial = study.ask(dict(distributions))
        study.tell(trial, 10.0 + trial.params.get("micro_batch_size", 1))
    return study


def test_knobs_stay_within_their_distributions_as_plain_values() -> None:
    study = asked(KNOB_DISTRIBUTIONS, 24)
    for trial in study.trials:
        for name, distribution in KNOB_DISTRIBUTIONS.items():
            value = trial.params[name]
            assert distribution._contains(distribution.to_internal_repr(value))
            assert type(value) in (int, str, bool)
        assert 48 % trial.params["micro_batch_size"] == 0
    assert sum("tuner:plan" in trial.system_attrs for trial in study.trials) >= 10
    assert study.best_trial.params["micro_batch_size"] == 48


def test_knobs_with_one_value_alone_are_taken_as_they_are() -> None:
    single: dict[str, BaseDistribution] = {
        "micro_batch_size": CategoricalDistribution((8,)),
        "num_workers": IntDistribution(2, 2),
        "fused": CategoricalDistribution((False, True)),
        "channels_last": CategoricalDistribution((False, True)),
    }
    study = asked(single, 6)
    assert all((t.params["micro_batch_size"], t.params["num_workers"]) == (8, 2) for t in study.trials)
    assert len({(t.params["fused"], t.params["channels_last"]) for t in study.trials}) >= 3


def test_ranges_may_change_during_a_study() -> None:
    study = asked(KNOB_DISTRIBUTIONS, 6)
    for _ in range(6):
        trial = study.ask({**KNOB_DISTRIBUTIONS, "num_workers": IntDistribution(0, 16)})
        study.tell(trial, 1.0)
    assert len(study.trials) == 12


def test_what_is_no_knob_or_not_understood_is_tpe_s() -> None:
    strange: dict[str, BaseDistribution] = {
        "num_workers": FloatDistribution(0.0, 4.0),
        "precision": CategoricalDistribution(("fp4", "fp32")),
        "compile": CategoricalDistribution((True, "default")),
        "dropout": FloatDistribution(0.0, 0.5),
    }
    study = asked(strange, 8)
    assert not any("tuner:plan" in trial.system_attrs for trial in study.trials)
    assert len({trial.params["dropout"] for trial in study.trials}) == 8


def test_a_study_that_minimises_is_tpe_s() -> None:
    study = optuna.create_study(sampler=TunerSampler(effective_batch=48, seed=0))
    for _ in range(4):
        study.tell(study.ask(KNOB_DISTRIBUTIONS), 1.0)
    assert not any("tuner:plan" in trial.system_attrs for trial in study.trials)


def test_a_fixed_parameter_is_left_to_its_owner() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = PartialFixedSampler({"bs": 8}, ours())
    landscape = Landscape()
    study = optimized(sampler, landscape, 14)
    assert {p["bs"] for p in landscape.seen} == {8}
    assert sum("tuner:plan" in trial.system_attrs for trial in study.trials) >= 10
    assert len({tuple(p[k] for k in p if k != "dropout") for p in landscape.seen}) >= 12


def test_enqueued_trials_and_odd_figures_teach_what_they_can() -> None:
    study = optuna.create_study(direction="maximize", sampler=ours())
    landscape = Landscape()
    study.enqueue_trial({"bs": 32, "num_workers": 2})
    values = iter([float("nan"), float("-inf"), 0.0])
    study.optimize(landscape, n_trials=3)
    study.optimize(lambda trial: (landscape.suggest(trial), next(values))[1], n_trials=3)
    study.optimize(landscape, n_trials=12)
    assert landscape.seen[0]["bs"] == 32
    assert study.best_value > 100


def test_every_trial_failing_ends_in_proposals_all_the_same() -> None:
    study = optuna.create_study(direction="maximize", sampler=ours())
    landscape = Landscape()
    for _ in range(8):
        trial = study.ask()
        landscape.suggest(trial)
        study.tell(trial, state=TrialState.FAIL)
    assert len(study.trials) == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"names": {"batch": "bs"}}, "names: unknown knob 'batch'"),
        ({"effective_batch": 0}, "effective_batch: must be at least 1"),
        ({"baseline": {"micro": 4}}, "baseline: 'micro' is no parameter of ours"),
        ({"baseline": {"num_workers": -1}}, "baseline: num_workers: -1 is no num_workers"),
        ({"baseline": {"bs": 5}}, "micro-batch size 5 does not divide effective_batch=64"),
    ],
)
def test_what_it_is_told_is_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ours(**options)
