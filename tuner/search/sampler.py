"""Optuna's side of the search: our planner as a sampler, and Optuna's own samplers by name.

This is the only module here that knows Optuna.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial

from tuner.contract.study import SamplerName


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
