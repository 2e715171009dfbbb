"""TunerSampler: the planner's decisions as an Optuna sampler, for a plain study of anyone's own training loop."""

from __future__ import annotations

import math
import secrets
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.samplers import BaseSampler, TPESampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from tuner.contract.errors import ConfigError
from tuner.contract.measurement import Outcome
from tuner.contract.probe import Stage
from tuner.contract.space import Knob
from tuner.search.plain import KNOBS, PlainStudy, Told, fitting, next_values, word_of, words_of

PLAN_ATTR = "tuner:plan"
"""System attribute of a trial: the stage that proposed it, and the values proposed."""
MOST_VALUES = 1024
"""A range of integers longer than this is no list of choices."""


class TunerSampler(BaseSampler):
    """Proposes training configurations by the tuner's staged search: loader, flags, batch sizes, compile, polish.

    `from tuner import TunerSampler`; it works in any study that maximises samples/s at a fixed effective batch size::

        def objective(trial):
            micro = trial.suggest_categorical("bs", [4, 8, 16, 32, 64])
            workers = trial.suggest_int("num_workers", 0, 8)
            compiled = trial.suggest_categorical("compile", [False, True])
            rate, peak_bytes = train_for_a_moment(micro, 64 // micro, workers, compiled)
            trial.set_constraint("memory", peak_bytes / budget_bytes - 1)
            return rate

        sampler = TunerSampler(effective_batch=64, names={"micro_batch_size": "bs"}, seed=0)
        study = optuna.create_study(direction="maximize", sampler=sampler)
        study.optimize(objective, n_trials=40)

    Parameters it plans are `micro_batch_size`, `num_workers`, `prefetch_factor` (integers or categorical), `precision`
    (`fp32`, `tf32`, `fp16`, `bf16`, or off and on), `compile` (`eager`, `default`, `reduce-overhead`, `max-autotune`,
    `cudagraphs`, or off and on), `gradient_checkpointing`, `channels_last` and `fused` (off and on). Optuna's TPE
    proposes whatever else there is: other parameters, values not understood, conditional parameters, studies that
    minimise or have several objectives, a second worker when the planner's configuration is already being run, trials
    after the planner's search is over, and trials from where its model misfits. So it never stops proposing, and
    `n_trials` ends the study. It never proposes a micro-batch size at or above one seen not to fit with the same flags.

    How a trial tells memory: `trial.set_constraint("memory", peak / budget - 1)`, above zero for too much; or the
    user attribute `peak_bytes` together with `memory_bytes` here. Without either the first size that runs out of
    memory is taken as the limit of every variant. A trial that ran out of memory says so by the constraint, or by the
    user attribute `outcome` = `oom` before it fails or is pruned; any other failure only rules out its configuration.
    The user attribute `data_wait` (share of a step spent waiting for the loader) sharpens the loader's model.

    The proposal is a function of the study's trials and the seed alone: a study that was stopped goes on as it would
    have, and workers that share a storage share one search.
    """

    def __init__(
        self,
        *,
        effective_batch: int,
        names: Mapping[str, str] | None = None,
        baseline: Mapping[str, Any] | None = None,
        memory_bytes: int | None = None,
        memory_constraint: str = "memory",
        noise: float = 0.02,
        device: Literal["cuda", "cpu"] = "cuda",
        n_startup_trials: int = 10,
        seed: int | None = None,
    ) -> None:
        """`effective_batch`: samples per optimizer step on one device, kept whatever the micro-batch size.

        `names`: our knob -> the study's parameter, where they differ. `baseline`: where to start, by the study's own
        parameter names; the least demanding value of what is not named. `noise`: half-width of a trial's samples/s,
        relative. `n_startup_trials`: below so many trials TPE draws what is not ours at random. Raises ConfigError for
        a knob that does not exist, a value that is none of its knob's, and a batch that cannot be cut so.
        """
        known = {knob.value for knob in KNOBS}
        if unknown := sorted(set(names or {}) - known):
            raise ConfigError(f"names: unknown knob {unknown[0]!r}; known: {', '.join(sorted(known))}")
        if effective_batch < 1:
            raise ConfigError(f"effective_batch: must be at least 1, got {effective_batch}")
        self._effective_batch = effective_batch
        self._knobs = {(names or {}).get(knob.value, knob.value): knob for knob in KNOBS}
        self._first = self._starting(baseline or {})
        self._memory_bytes = memory_bytes
        self._memory_constraint = memory_constraint
        self._noise = noise
        self._device = device
        self._n_startup_trials = n_startup_trials
        self._seed = secrets.randbits(31) if seed is None else seed

    def _starting(self, baseline: Mapping[str, Any]) -> dict[Knob, Any]:
        found: dict[Knob, Any] = {}
        for name, value in baseline.items():
            if name not in self._knobs:
                raise ConfigError(f"baseline: {name!r} is no parameter of ours; known: {', '.join(self._knobs)}")
            knob = self._knobs[name]
            found[knob] = word_of(knob, value)
            if found[knob] is None:
                raise ConfigError(f"baseline: {name}: {value!r} is no {knob.value}")
        micro = found.get(Knob.MICRO_BATCH_SIZE, 1)
        if self._effective_batch % micro:
            raise ConfigError(
                f"baseline: micro-batch size {micro} does not divide effective_batch={self._effective_batch}"
            )
        return found

    def reseed_rng(self) -> None:
        """Nothing to do: every draw is seeded by its trial's number, which no two workers of a study share."""

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """What every finished trial suggested; where all have failed so far, what the last of them did."""
        space = self._tpe(trial).infer_relative_search_space(study, trial)
        if space or not _is_ours(study):
            return space
        failed = [t.distributions for t in _finished(study) if t.state is TrialState.FAIL and t.distributions]
        return {} if not failed else {name: d for name, d in failed[-1].items() if not d.single()}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The planner's values of its knobs, TPE's of everything else."""
        words = self._words(search_space) if _is_ours(study) else {}
        planned = self._planned(study, trial, words) if words else {}
        if words and not planned:
            warm = self._tpe(trial, n_startup_trials=0)  # there are the planner's trials to learn from
            return self._within_memory(study, words, warm.sample_relative(study, trial, search_space))
        rest = {name: d for name, d in search_space.items() if name not in planned}
        drawn = self._tpe(trial).sample_relative(study, trial, rest) if rest else {}
        return {**drawn, **planned}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """The baseline's value in a study's first trial, TPE's afterwards."""
        words = self._words({param_name: param_distribution}) if _is_ours(study) else {}
        if words and trial.number == 0:
            ((knob, by_word),) = words.items()
            return by_word[self._study(words).starting(knob)]
        return self._tpe(trial, param_name).sample_independent(study, trial, param_name, param_distribution)

    def _tpe(self, trial: FrozenTrial, param_name: str = "", n_startup_trials: int | None = None) -> TPESampler:
        """Optuna's own sampler, seeded anew for every trial (and parameter), so that it keeps no state between them."""
        parts = [self._seed & 0xFFFFFFFF, trial.number, zlib.crc32(param_name.encode())]
        seed = int(np.random.SeedSequence(parts).generate_state(1)[0])
        least = self._n_startup_trials if n_startup_trials is None else n_startup_trials
        return TPESampler(seed=seed, n_startup_trials=least)

    def _words(self, space: Mapping[str, BaseDistribution]) -> dict[Knob, dict[Any, Any]]:
        """Our value -> the study's, by knob, of the parameters that are ours."""
        found = {}
        for name, distribution in space.items():
            knob = self._knobs.get(name)
            if knob is not None and (words := words_of(knob, _choices(distribution))):
                if knob is Knob.MICRO_BATCH_SIZE:
                    words = {w: v for w, v in words.items() if self._effective_batch % w == 0}
                if words:
                    found[knob] = words
        return found

    def _study(self, words: Mapping[Knob, Mapping[Any, Any]], told: Sequence[Told] = ()) -> PlainStudy:
        """What is not searched (one value alone, conditional, fixed by somebody else) is as in the last trial told."""
        last = told[-1].values if told else {}
        fixed = {knob: value for knob, value in last.items() if knob not in words}
        return PlainStudy(
            effective_batch=self._effective_batch,
            words={knob: tuple(by_word) for knob, by_word in words.items()},
            first={**self._first, **fixed},
            noise=self._noise,
            device=self._device,
        )

    def _planned(self, study: Study, trial: FrozenTrial, words: Mapping[Knob, Mapping[Any, Any]]) -> dict[str, Any]:
        """The planner's next values by the study's names, noted on the trial; empty where it has none to run now."""
        told = self._told(study)
        found = next_values(self._study(words, told), told)
        if found is None:
            return {}
        values, stage = found
        if any(values[knob] not in by_word for knob, by_word in words.items()):
            return {}
        names = {knob: name for name, knob in self._knobs.items()}
        planned = {names[knob]: by_word[values[knob]] for knob, by_word in words.items()}
        running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        if any(_plan(other).get("values") == planned for other in running if other.number != trial.number):
            return {}
        study._storage.set_trial_system_attr(trial._trial_id, PLAN_ATTR, {"stage": stage.value, "values": planned})
        return planned

    def _within_memory(
        self, study: Study, words: Mapping[Knob, Mapping[Any, Any]], drawn: dict[str, Any]
    ) -> dict[str, Any]:
        """`drawn` with the largest micro-batch size up to the one drawn that divides the batch and may be run."""
        name = next((n for n, knob in self._knobs.items() if knob is Knob.MICRO_BATCH_SIZE), "")
        sizes = words.get(Knob.MICRO_BATCH_SIZE, {})
        if name not in drawn or not sizes:
            return drawn
        values = {knob: word_of(knob, drawn[n]) for n, knob in self._knobs.items() if n in drawn and knob in words}
        told = self._told(study)
        legal = fitting(self._study(words, told), told, values)
        smaller = max((size for size in legal if size <= drawn[name]), default=min(sizes))
        return {**drawn, name: sizes[smaller]}

    def _told(self, study: Study) -> list[Told]:
        return [self._lesson(trial) for trial in _finished(study)]

    def _lesson(self, trial: FrozenTrial) -> Told:
        said = {knob: word_of(knob, trial.params[name]) for name, knob in self._knobs.items() if name in trial.params}
        plan = _plan(trial)
        followed = plan and all(trial.params.get(name) == value for name, value in plan["values"].items())
        wait = trial.user_attrs.get("data_wait")
        return Told(
            values={knob: word for knob, word in said.items() if word is not None},
            stage=Stage(plan["stage"]) if followed else _first_stage(trial),
            outcome=self._outcome(trial),
            samples_per_s=trial.value if trial.state is TrialState.COMPLETE and trial.value is not None else 0.0,
            memory_share=self._share(trial),
            data_wait=float(wait) if isinstance(wait, int | float) else None,
        )

    def _outcome(self, trial: FrozenTrial) -> Outcome:
        """OK only for a finished trial with a positive figure. The attribute `outcome` says what else happened."""
        said = str(trial.user_attrs.get("outcome", ""))
        if said in ("oom", *(item.value for item in Outcome if item is not Outcome.OK)):
            return Outcome.OOM_DEVICE if said == "oom" else Outcome(said)
        value = trial.value if trial.state is TrialState.COMPLETE else None
        if value is not None and math.isfinite(value) and value > 0:
            return Outcome.OK
        return Outcome.OOM_DEVICE if trial.constraints.get(self._memory_constraint, 0.0) > 0 else Outcome.CRASHED

    def _share(self, trial: FrozenTrial) -> float | None:
        peak = trial.user_attrs.get("peak_bytes")
        if peak is not None and self._memory_bytes:
            return float(peak) / self._memory_bytes
        overrun = trial.constraints.get(self._memory_constraint)
        return None if overrun is None else max(0.0, 1 + overrun)


def _is_ours(study: Study) -> bool:
    return len(study.directions) == 1 and study.direction is StudyDirection.MAXIMIZE


def _finished(study: Study) -> list[FrozenTrial]:
    states = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
    return sorted(study.get_trials(deepcopy=False, states=states), key=lambda trial: trial.number)


def _plan(trial: FrozenTrial) -> dict[str, Any]:
    plan: dict[str, Any] = trial.system_attrs.get(PLAN_ATTR, {})
    return plan


def _first_stage(trial: FrozenTrial) -> Stage:
    """Nobody planned it: the study's first trial is the baseline, any other one somebody else's idea."""
    return Stage.BASELINE if trial.number == 0 else Stage.SAMPLER


def _choices(distribution: BaseDistribution) -> Sequence[Any]:
    """The values of a distribution; none where it is continuous or a long range."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices
    if not isinstance(distribution, IntDistribution):
        return ()
    values = range(distribution.low, distribution.high + 1, distribution.step)
    return values if len(values) <= MOST_VALUES else ()
