"""Optuna's side of the search: our planner as a sampler, Optuna's own samplers by name, and the fall-back to one.

This and `public_sampler` are the only modules here that know Optuna.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial, create_trial

from tuner.contract.probe import ProbeRequest, ProbeRow
from tuner.contract.study import SamplerName, StudySpec
from tuner.search.fallback import Axis, axes, lessons, may_propose, open_points, point_at, values_of
from tuner.search.planner import sampler_request
from tuner.search.situation import Situation, situation_of
from tuner.search.view import View

__all__ = ["StagedSampler", "make_sampler", "propose", "proposed"]

DRAWS = 60
"""Draws of the fall-back's sampler per proposal: most repeats of a small space are passed over so."""
WARM = 4
"""Trials from which TPE models what it was told; below it draws at random."""


class StagedSampler(BaseSampler):
    """Hands the planner's values to `Study.ask`, so that planned probes are trials like any other.

    It invents nothing: what was not proposed, or is no choice of its distribution, takes the first choice.
    """

    def __init__(self) -> None:
        self._values: dict[str, Any] = {}

    def propose(self, values: Mapping[str, Any]) -> None:
        """Values of the next trial by parameter name; used once."""
        self._values = {name: _plain(value) for name, value in values.items()}

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        del study, trial
        return {}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        del study, trial, search_space
        return {}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        del study, trial
        value = self._values.pop(param_name, None)
        if value is not None and _holds(param_distribution, value):
            return value
        return _first(param_distribution)


def _plain(value: Any) -> Any:
    """Optuna stores enums as their strings."""
    return getattr(value, "value", value)


def _holds(distribution: BaseDistribution, value: Any) -> bool:
    try:
        return bool(distribution._contains(distribution.to_internal_repr(value)))
    except ValueError:
        return False


def _first(distribution: BaseDistribution) -> Any:
    choices = getattr(distribution, "choices", None)
    return choices[0] if choices is not None else distribution.low  # type: ignore[attr-defined]


def make_sampler(name: SamplerName, seed: int) -> BaseSampler:
    """`staged`, or one of Optuna's: `tpe`, `gp`, `random`.

    Optuna's GP computes with torch, which it imports into this process at its first proposal; the others do not.
    Constraints reach all of them through `Trial.set_constraint`.
    """
    if name is SamplerName.TPE:
        return TPESampler(seed=seed)
    if name is SamplerName.GP:
        return GPSampler(seed=seed, deterministic_objective=False)
    if name is SamplerName.RANDOM:
        return RandomSampler(seed=seed)
    return StagedSampler()


def proposed(spec: StudySpec, rows: Sequence[ProbeRow]) -> ProbeRequest:
    """The request that answers the planner's `Ask` in a study of ours whose model misfits."""
    return sampler_request(spec, rows, propose(spec, rows))


def propose(spec: StudySpec, rows: Sequence[ProbeRow]) -> dict[str, Any]:
    """Knob values (by `Knob` value) of the next end-to-end probe where the model misfits: Optuna's TPE on a fresh
    study in memory, warm-started with every configuration settled end to end, memory told as a continuous overrun.

    A pure function: the study is rebuilt from the rows, and the seed follows from the study's and the number of rows,
    so a killed study decides identically. A draw that was settled before, is known not to fit or cannot be paid for is
    followed by the next one, `DRAWS` times; then any configuration that is open does. TPE and not the Gaussian
    process, which would load torch into this process. Raises ValueError where nothing is open (`handed_over` is empty).
    """
    s = situation_of(View(spec, rows))
    seed = _seed_of(spec.seed, len(rows))
    study, dimensions = _warm_study(s, seed), axes(s)
    distributions = {axis.knob.value: _distribution(axis) for axis in dimensions}
    for _ in range(DRAWS):
        drawn = study.ask(distributions).params
        point = point_at(s, {axis.knob: _value(axis, drawn[axis.knob.value]) for axis in dimensions})
        if point is not None and may_propose(s, point):
            break
    else:
        point = random.Random(seed).choice(list(open_points(s)))
    return {knob.value: value for knob, value in values_of(s, point).items()}


def _seed_of(*parts: int) -> int:
    return int(np.random.SeedSequence([abs(part) for part in parts]).generate_state(1)[0])


def _warm_study(s: Situation, seed: int) -> Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize", sampler=TPESampler(seed=seed, n_startup_trials=WARM))
    dimensions = axes(s)
    distributions = {axis.knob.value: _distribution(axis) for axis in dimensions}
    for lesson in lessons(s):
        params = {axis.knob.value: _param(axis, lesson.values[axis.knob]) for axis in dimensions}
        study.add_trial(
            create_trial(params=params, distributions=distributions, value=lesson.worth, constraints=lesson.overruns)
        )
    return study


def _distribution(axis: Axis) -> BaseDistribution:
    """Ordered values as their places in the list, so that TPE knows neighbours; the others as bare choices."""
    last = len(axis.values) - 1
    return IntDistribution(0, last) if axis.ordered else CategoricalDistribution([_plain(v) for v in axis.values])


def _param(axis: Axis, value: Any) -> Any:
    return axis.values.index(value) if axis.ordered else _plain(value)


def _value(axis: Axis, param: Any) -> Any:
    if axis.ordered:
        return axis.values[param]
    return next(value for value in axis.values if _plain(value) == param)
