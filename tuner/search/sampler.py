"""Optuna's side of the search: its samplers by name, and what they propose.

This and `public_sampler` are the only modules here that know Optuna.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler
from optuna.study import Study
from optuna.trial import create_trial

from tuner.contract.probe import ProbeRequest, ProbeRow
from tuner.contract.study import SamplerName, StudySpec
from tuner.search.fallback import Axis, axes, lessons, may_propose, open_points, point_at, values_of
from tuner.search.planner import sampler_request
from tuner.search.situation import Situation, situation_of
from tuner.search.view import View

__all__ = ["make_sampler", "propose", "proposed"]

DRAWS = 60
"""Draws per proposal: most repeats of a small space are passed over so."""
COSTLY_DRAWS = 4
"""The same of the Gaussian process, which takes a second for each and draws alike."""
WARM = 4
"""Trials from which TPE models what it was told; below it draws at random."""


def _plain(value: Any) -> Any:
    """Optuna stores enums as their strings."""
    return getattr(value, "value", value)


def make_sampler(name: SamplerName, seed: int) -> BaseSampler:
    """One of Optuna's: `tpe`, `gp`, `random`; of `staged` its fall-back, a TPE that models from few trials on.

    Optuna's GP computes with torch, which it imports into this process at its first proposal; the others do not.
    Constraints reach all of them through `Trial.set_constraint`.
    """
    if name is SamplerName.TPE:
        return TPESampler(seed=seed)
    if name is SamplerName.GP:
        return GPSampler(seed=seed, deterministic_objective=False)
    if name is SamplerName.RANDOM:
        return RandomSampler(seed=seed)
    return TPESampler(seed=seed, n_startup_trials=WARM)


def proposed(spec: StudySpec, rows: Sequence[ProbeRow]) -> ProbeRequest:
    """The request that answers the planner's `Ask`."""
    return sampler_request(spec, rows, propose(spec, rows))


def propose(spec: StudySpec, rows: Sequence[ProbeRow]) -> dict[str, Any]:
    """Knob values (by `Knob` value) of the next end-to-end probe: the study's sampler, or TPE where ours misfits, on a
    fresh study in memory that was told of every configuration settled end to end, memory as a continuous overrun.

    A pure function: the study is rebuilt from the rows, and the seed follows from the study's and the number of rows,
    so a killed study decides identically. What a sampler draws is no trial yet: a draw that was settled before, cannot
    be cut so, is known not to fit or cannot be paid for is followed by the next one, `DRAWS` times; then any
    configuration that is open does. Raises ValueError where nothing is open.
    """
    s = situation_of(View(spec, rows))
    seed = _seed_of(spec.seed, len(rows))
    study, dimensions = _warm_study(s, seed), axes(s)
    distributions = {axis.knob.value: _distribution(axis) for axis in dimensions}
    for _ in range(COSTLY_DRAWS if spec.sampler is SamplerName.GP else DRAWS):
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
    study = optuna.create_study(direction="maximize", sampler=make_sampler(s.view.spec.sampler, seed))
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
