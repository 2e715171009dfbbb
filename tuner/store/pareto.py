"""The Pareto study: beside study NAME an Optuna study NAME-pareto with several directions, for review in the dashboard.

It is made from the rows, is never searched in, and is made anew whenever they say something else.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from tuner.contract.config import RunConfig
from tuner.contract.study import PARETO_SUFFIX, StudySpec
from tuner.store.engine import LOCK_TIMEOUT_S, parse_url, setup_lock
from tuner.store.telling import dashboard_constraints
from tuner.store.trials import distributions, open_storage, params, storage_errors

OF_ATTR = "tuner_pareto_of"
"""User attribute: the study this one shows. Without it a study of that name is someone else's."""
CONTENT_ATTR = "tuner_pareto_content"
"""User attribute, written last: digest of all trials."""
_MIB = 1 << 20


@dataclass(frozen=True)
class ParetoPoint:
    """One configuration over all its end-to-end probes; None = unknown."""

    config: RunConfig
    samples_per_s: float
    peak_bytes: int
    overrun: float
    """Of the memory budget; above 0 it does not fit."""
    processes: int
    loss: float | None = None
    joules_per_sample: float | None = None


class Measure(NamedTuple):
    name: str
    direction: Literal["minimize", "maximize"]
    of: Callable[[ParetoPoint], float | None]


_MEASURES = (
    Measure("samples/s", "maximize", lambda point: point.samples_per_s),
    Measure("peak MiB", "minimize", lambda point: point.peak_bytes / _MIB),
    Measure("loss at equal samples", "minimize", lambda point: point.loss),
    Measure("joules per sample", "minimize", lambda point: point.joules_per_sample),
)


def measures_of(points: Sequence[ParetoPoint]) -> tuple[Measure, ...]:
    """Those known of every point."""
    return tuple(measure for measure in _MEASURES if all(measure.of(point) is not None for point in points))


def write_pareto(
    url: str, spec: StudySpec, points: Sequence[ParetoPoint], *, lock_timeout_s: float = LOCK_TIMEOUT_S
) -> bool:
    """Make the Pareto study say what `points` say; safe to repeat. False when another's study has that name.

    One process at a time: it takes several writes. Raises StoreError.
    """
    storage = open_storage(url, lock_timeout_s=lock_timeout_s)
    try:
        with storage_errors(parse_url(url), lock_timeout_s), setup_lock(storage.engine, lock_timeout_s):
            return _write(storage, spec, points)
    finally:
        storage.remove_session()
        storage.engine.dispose()


def _write(storage: RDBStorage, spec: StudySpec, points: Sequence[ParetoPoint]) -> bool:
    name, measures = spec.name + PARETO_SUFFIX, measures_of(points)
    trials = [_trial(spec, measures, point) for point in points]
    content = _content(measures, trials)
    if name in optuna.study.get_all_study_names(storage):
        there = optuna.load_study(study_name=name, storage=storage)
        if there.user_attrs.get(OF_ATTR) != spec.name and not _just_made(there):
            return False
        if there.user_attrs.get(CONTENT_ATTR) == content:
            return True
        optuna.delete_study(study_name=name, storage=storage)
    study = optuna.create_study(
        study_name=name, storage=storage, directions=[measure.direction for measure in measures]
    )
    study.set_user_attr(OF_ATTR, spec.name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        study.set_metric_names([measure.name for measure in measures])
    study.add_trials(trials)
    study.set_user_attr(CONTENT_ATTR, content)
    return True


def _just_made(study: optuna.Study) -> bool:
    """Several directions and nothing else: what an exit between our first two writes leaves. Nothing in it is lost."""
    return len(study.directions) > 1 and not (study.user_attrs or study.metric_names or study.trials)


def _trial(spec: StudySpec, measures: Sequence[Measure], point: ParetoPoint) -> FrozenTrial:
    choices = distributions(spec.space, spec.baseline)
    values = params(point.config, choices)
    overruns = {"memory": point.overrun}
    return create_trial(
        state=TrialState.COMPLETE,
        values=[float(measure.of(point) or 0.0) for measure in measures],
        params=values,
        distributions={name: choices[name] for name in values},
        user_attrs={
            "label": spec.label(point.config),
            "baseline": point.config == spec.baseline,
            "processes": point.processes,
            "config": point.config.digest(),
        },
        system_attrs=dict(dashboard_constraints(overruns)),
        constraints=overruns,
    )


def _content(measures: Sequence[Measure], trials: Sequence[FrozenTrial]) -> str:
    said = [(trial.values, trial.params, trial.user_attrs, trial.constraints) for trial in trials]
    text = json.dumps([[measure.name for measure in measures], said], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
