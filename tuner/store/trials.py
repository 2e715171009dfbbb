"""TrialBook: the Optuna side of a study, in the same database as its rows, for samplers and the dashboard.

The rows are the truth: whatever a crash leaves undone here, `repair` makes good from them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.samplers import BaseSampler
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy import URL

from tuner.contract.config import LoaderConfig, RunConfig
from tuner.contract.errors import StoreError
from tuner.contract.probe import ProbeKind, ProbeRow, Score
from tuner.contract.space import Knob, SearchSpace, knob_value
from tuner.contract.study import StudySpec
from tuner.store.engine import (
    LOCK_TIMEOUT_S,
    engine_options,
    full,
    make_engine,
    parse_url,
    readable,
    readable_errors,
    setup_lock,
    shown,
)
from tuner.store.telling import (
    CONSTRAINTS_ATTR,
    PROBE_ATTR,
    dashboard_constraints,
    intermediate_values,
    user_attributes,
)

INTERRUPTED_ATTR = "interrupted"
"""User attribute of a trial whose probe was ended by a crash of the tuner."""

Value = str | int | float | bool
Scored = Callable[[ProbeRow], Score]
"""The study's rule of what a row is worth."""


class Asked(NamedTuple):
    """A trial that has begun: its number, and the values proposed for its knobs."""

    number: int
    params: dict[str, Value]


def open_storage(url: str, *, lock_timeout_s: float = LOCK_TIMEOUT_S) -> RDBStorage:
    """Optuna's storage on the store's database; its tables are made by one process at a time. Raises StoreError."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    address = parse_url(url)
    with storage_errors(address, lock_timeout_s):
        engine = make_engine(address, lock_timeout_s)
        try:
            with setup_lock(engine, lock_timeout_s):
                return _made(address, lock_timeout_s)
        finally:
            engine.dispose()


def _made(url: URL, lock_timeout_s: float) -> RDBStorage:
    try:
        return RDBStorage(full(url), engine_kwargs=engine_options(url, lock_timeout_s))
    except RuntimeError as error:  # Optuna's tables are of another version than the one installed
        raise StoreError(f"{shown(url)}: {' '.join(str(error).split())}") from None


@contextmanager
def _optuna_errors(url: URL, lock_timeout_s: float) -> Iterator[None]:
    """Optuna wraps what the database said; the message is made from that."""
    try:
        yield
    except StorageInternalError as error:
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        raise readable(cause, url, lock_timeout_s) from None


@contextmanager
def storage_errors(url: URL, lock_timeout_s: float) -> Iterator[None]:
    """Whatever goes wrong in Optuna's storage becomes a StoreError."""
    with readable_errors(url, lock_timeout_s), _optuna_errors(url, lock_timeout_s):
        yield


class TrialBook:
    """One Optuna study beside one of ours, of the same name; maximises the study's objective.

    A trial's parameters and value are what ran: it begins with the values that its request has."""

    def __init__(
        self,
        url: str,
        study_name: str,
        sampler: BaseSampler | None = None,
        *,
        measure: str = "samples/s",
        lock_timeout_s: float = LOCK_TIMEOUT_S,
    ) -> None:
        """Opens the study, or makes it. `sampler` None = Optuna's default; `measure`: what its values are called.

        Raises StoreError.
        """
        self._url = parse_url(url)
        self._lock_timeout_s = lock_timeout_s
        self.storage = open_storage(url, lock_timeout_s=lock_timeout_s)
        with self._errors():
            self.study = optuna.create_study(
                storage=self.storage, study_name=study_name, direction="maximize", sampler=sampler, load_if_exists=True
            )
            self._name_metric(measure)

    def _name_metric(self, name: str) -> None:
        if self.study.metric_names is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ExperimentalWarning)
                self.study.set_metric_names([name])

    def describe(self, spec: StudySpec) -> None:
        """Say beside the study what it searches and where it is measured; `repair` does so too."""
        wanted = {"workload": spec.workload, "target": spec.target.label, "measured_on": spec.device.name}
        with self._errors():
            known = self.study.user_attrs
            for key, value in wanted.items():
                if known.get(key) != value:
                    self.study.set_user_attr(key, value)

    def close(self) -> None:
        self.storage.remove_session()
        self.storage.engine.dispose()

    def ask(
        self, distributions: Mapping[str, CategoricalDistribution], values: Mapping[str, Value] | None = None
    ) -> Asked:
        """Begin a trial. The sampler proposes a value for every distribution, unless `values` fixes all of them.

        Raises ValueError when a value is none of its distribution's choices.
        """
        if values is None:
            with self._errors():
                trial = self.study.ask(fixed_distributions=dict(distributions))
            return Asked(trial.number, dict(trial.params))
        chosen = {name: distributions[name] for name in values}
        for name, distribution in chosen.items():
            if values[name] not in distribution.choices:
                raise ValueError(f"{name}: {values[name]!r} is none of {distribution.choices}")
        sampler, self.study.sampler = self.study.sampler, _Handed(values)
        try:
            return self.ask(chosen)
        finally:
            self.study.sampler = sampler

    def tell(self, number: int, row: ProbeRow, spec: StudySpec, score: Score) -> None:
        """Finish trial `number` with what its row says: attributes and constraints first, then the value.

        An out-of-memory is a finished trial with a bad value and an overrun, never a failed one: a sampler learns
        nothing from failed trials and would propose the same again. Telling a finished trial is a no-op.
        """
        with self._errors():
            trial_id = self._trial_id(number)
            if self.storage.get_trial(trial_id).state.is_finished():
                return
            self._write(trial_id, row, spec, score)
            if score.value is None:
                self.study.tell(number, state=TrialState.FAIL, skip_if_finished=True)
            else:
                self.study.tell(number, score.value, skip_if_finished=True)

    def _write(self, trial_id: int, row: ProbeRow, spec: StudySpec, score: Score) -> None:
        for key, value in user_attributes(row, spec, score).items():
            self.storage.set_trial_user_attr(trial_id, key, value)
        for step, rate in intermediate_values(row.measurement).items():
            self.storage.set_trial_intermediate_value(trial_id, step, rate)
        trial = optuna.Trial(self.study, trial_id)
        known = self.storage.get_trial(trial_id).system_attrs
        for key, overrun in score.overruns.items():
            if f"{CONSTRAINTS_ATTR}:{key}" not in known:
                trial.set_constraint(key, overrun)
        for key, listed in dashboard_constraints(score.overruns).items():
            self.storage.set_trial_system_attr(trial_id, key, listed)

    def repair(self, rows: Sequence[ProbeRow], spec: StudySpec, scored: Scored) -> None:
        """Make the trials agree with the rows after a crash; to be called when no probe of this study is running.

        A running trial with a row is told; one without is told FAIL and marked interrupted; an end-to-end row without
        a trial gets one. Safe to repeat.
        """
        self.describe(spec)
        wanted = {row.request_id: row for row in rows if row.kind is ProbeKind.END_TO_END}
        by_trial = {row.trial: row for row in wanted.values() if row.trial is not None}
        with self._errors():
            for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING, TrialState.WAITING)):
                self._settle(trial, by_trial.get(trial.number), spec, scored)
            present = set(self._present())
            for request_id, row in wanted.items():
                if request_id not in present:
                    self.study.add_trial(rebuilt(row, spec, scored(row)))

    def _settle(self, trial: FrozenTrial, row: ProbeRow | None, spec: StudySpec, scored: Scored) -> None:
        if row is not None:
            self.tell(trial.number, row, spec, scored(row))
            return
        trial_id = self._trial_id(trial.number)
        if trial.state is TrialState.WAITING:
            self.storage.set_trial_state_values(trial_id, TrialState.RUNNING)
        self.storage.set_trial_user_attr(trial_id, INTERRUPTED_ATTR, True)
        self.study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)

    def _present(self) -> Iterator[str]:
        for trial in self.study.get_trials(deepcopy=False):
            if INTERRUPTED_ATTR not in trial.user_attrs and PROBE_ATTR in trial.user_attrs:
                yield trial.user_attrs[PROBE_ATTR]

    def _trial_id(self, number: int) -> int:
        return self.storage.get_trial_id_from_study_id_trial_number(self.study._study_id, number)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        with storage_errors(self._url, self._lock_timeout_s):
            yield


def rebuilt(row: ProbeRow, spec: StudySpec, score: Score) -> FrozenTrial:
    """The finished trial that telling this row would have made."""
    choices = distributions(spec.space, spec.baseline)
    values = params(row.config, choices)
    return create_trial(
        state=TrialState.FAIL if score.value is None else TrialState.COMPLETE,
        value=score.value,
        params=values,
        distributions={name: choices[name] for name in values},
        user_attrs=user_attributes(row, spec, score),
        system_attrs=dict(dashboard_constraints(score.overruns)),
        intermediate_values=intermediate_values(row.measurement),
        constraints=score.overruns,
    )


class _Handed(BaseSampler):
    """Hands on values that were chosen elsewhere."""

    def __init__(self, values: Mapping[str, Value]) -> None:
        self._values = dict(values)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:  # noqa: ARG002
        return {}

    def sample_relative(self, *_ignored: object, **_named: object) -> dict[str, Any]:
        return {}

    def sample_independent(
        self,
        study: optuna.Study,  # noqa: ARG002
        trial: FrozenTrial,  # noqa: ARG002
        param_name: str,
        param_distribution: BaseDistribution,  # noqa: ARG002
    ) -> Value:
        return self._values[param_name]


def distributions(space: SearchSpace, baseline: RunConfig) -> dict[str, CategoricalDistribution]:
    """One categorical distribution per knob with a choice, by its name; the baseline's value always among them."""
    found = {}
    for knob in Knob:
        choices = [_plain(value) for value in space.values(knob, baseline)]
        if knob is Knob.PREFETCH_FACTOR:
            choices += [value for value in _idle_prefetch(space, baseline) if value not in choices]
        if len(choices) > 1:
            found[knob.value] = CategoricalDistribution(choices)
    return found


def _idle_prefetch(space: SearchSpace, baseline: RunConfig) -> Iterable[int]:
    """Without workers a canonical configuration has the default prefetch factor, so that must be a choice too."""
    if len(space.prefetch_factor) > 1 and 0 in space.values(Knob.NUM_WORKERS, baseline):
        yield LoaderConfig().prefetch_factor


def params(config: RunConfig, distributions: Mapping[str, CategoricalDistribution]) -> dict[str, Value]:
    """The knobs of `config` as Optuna knows them; a knob whose value is none of the choices is left out."""
    values = {name: _plain(knob_value(config, Knob(name))) for name in distributions}
    return {name: value for name, value in values.items() if value in distributions[name].choices}


def _plain(value: Any) -> Value:
    plain: Value = str(value.value) if hasattr(value, "value") else value
    return plain
