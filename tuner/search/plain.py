"""A plain Optuna study as the planner sees it: its parameters as knobs, its finished trials as end-to-end rows.

It knows no Optuna: `public_sampler` reads the study and hands over what is here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from tuner.contract.config import CompileMode, LoaderConfig, OptimizerConfig, Precision, RunConfig
from tuner.contract.gpu import DeviceInfo, GpuProfile
from tuner.contract.measurement import Measurement, MemoryPeak, Outcome
from tuner.contract.probe import ProbeKind, ProbeRequest, ProbeRow, Stage
from tuner.contract.space import Knob, SearchSpace, knob_value, with_knobs
from tuner.contract.study import LrSpec, Objective, StudySpec
from tuner.search.planner import next_probe
from tuner.search.points import point_of
from tuner.search.view import View

KNOBS = (
    Knob.MICRO_BATCH_SIZE,
    Knob.PRECISION,
    Knob.COMPILE,
    Knob.GRADIENT_CHECKPOINTING,
    Knob.CHANNELS_LAST,
    Knob.FUSED,
    Knob.NUM_WORKERS,
    Knob.PREFETCH_FACTOR,
)
"""Knobs a plain study may search. The learning rate is none: throughput does not depend on it."""
REPEATS = frozenset({Stage.CONFIRM, Stage.GATE, Stage.SOAK})
"""Stages that only measure again what was measured: of no use to a study that keeps its best single trial."""
_COUNTS = {Knob.MICRO_BATCH_SIZE: 1, Knob.NUM_WORKERS: 0, Knob.PREFETCH_FACTOR: 1}
"""Knobs that are whole numbers, and the least they may be."""
_SWITCHES: dict[Knob, dict[bool, Any]] = {
    Knob.PRECISION: {False: Precision.FP32, True: Precision.FP16},
    Knob.COMPILE: {False: CompileMode.EAGER, True: CompileMode.DEFAULT},
}
"""What on and off mean for knobs with more values than two."""
_SCALE = 1 << 40
"""Bytes that stand for the whole memory budget: trials tell shares of it."""
_FOREVER_S = 1e9
_WORKLOAD = "plain"
_TRIAL_S = 1.0
"""Every trial counts the same: how many there are is the user's choice."""


def word_of(knob: Knob, value: Any) -> Any | None:
    """Our value of what a user's study calls `value`; None = it is none of the knob's."""
    if knob in _COUNTS:
        good = isinstance(value, int) and not isinstance(value, bool) and value >= _COUNTS[knob]
        return value if good else None
    if isinstance(value, bool):
        return _SWITCHES.get(knob, {}).get(value, value)
    try:
        return {Knob.PRECISION: Precision, Knob.COMPILE: CompileMode}[knob](value)
    except (KeyError, ValueError):
        return None


def words_of(knob: Knob, values: Sequence[Any]) -> dict[Any, Any]:
    """Our value -> the user's; empty where one is not understood or two mean the same: the knob is then not ours."""
    words = {word_of(knob, value): value for value in values}
    return {} if None in words or len(words) < len(values) else words


@dataclass(frozen=True)
class Told:
    """One finished trial, in our words."""

    values: Mapping[Knob, Any]
    stage: Stage
    """Why it was proposed; SAMPLER where that was not by the planner."""
    outcome: Outcome
    samples_per_s: float = 0.0
    memory_share: float | None = None
    """Peak memory as a share of the budget; None = not told."""
    data_wait: float | None = None
    """Share of a step spent waiting for data; None = not told."""


@dataclass(frozen=True)
class PlainStudy:
    """What is searched, and how well it is measured."""

    effective_batch: int
    words: Mapping[Knob, Sequence[Any]]
    """Values by knob, in our words."""
    first: Mapping[Knob, Any]
    """Where the search starts, where that is legal, and what knobs that are not searched are; else the least demanding
    value."""
    noise: float
    device: Literal["cuda", "cpu"]

    @cached_property
    def baseline(self) -> RunConfig:
        humble = {knob: _humblest(knob, listed) for knob, listed in self.legal.items()}
        chosen = {knob: value for knob, value in self.first.items() if value in self.legal.get(knob, (value,))}
        plain = RunConfig(
            workload=_WORKLOAD,
            micro_batch_size=self.effective_batch,
            loader=LoaderConfig(),
            optimizer=OptimizerConfig(lr=1e-3),
            horizon_samples=1 << 40,
        )
        values = humble | chosen
        config = with_knobs(plain, values)
        prefetch = values.get(Knob.PREFETCH_FACTOR, config.loader.prefetch_factor)  # also where no worker uses it yet
        return config.model_copy(update={"loader": config.loader.model_copy(update={"prefetch_factor": prefetch})})

    def starting(self, knob: Knob) -> Any:
        """The baseline's value of a knob that is searched."""
        return _listed(self.words[knob], knob_value(self.baseline, knob))

    @cached_property
    def legal(self) -> dict[Knob, tuple[Any, ...]]:
        """`words` without the micro-batch sizes that do not divide the effective batch size."""
        return {
            knob: tuple(v for v in listed if knob is not Knob.MICRO_BATCH_SIZE or self.effective_batch % v == 0)
            for knob, listed in self.words.items()
        }

    @cached_property
    def spec(self) -> StudySpec:
        """A study of end-to-end probes alone, without end and without a clock."""
        everything = tuple(Precision)
        target = GpuProfile(
            name=_WORKLOAD, label=_WORKLOAD, kind=self.device, dtypes=everything, compile_modes=tuple(CompileMode)
        )
        device = DeviceInfo(
            kind=self.device, name=_WORKLOAD, memory_bytes=_SCALE, free_bytes=_SCALE, host_bytes=_SCALE,
            host_free_bytes=_SCALE, cpu_name=_WORKLOAD, cpu_count=1 << 16, torch="", dtypes=everything,
        )  # fmt: skip
        return StudySpec(
            name=_WORKLOAD, workload=_WORKLOAD, target=target, device=device, baseline=self.baseline,
            space=SearchSpace.model_validate({knob.value: listed for knob, listed in self.legal.items()}),
            effective_batch=self.effective_batch, probes_alone=False, memory_budget_bytes=_SCALE,
            objective=Objective.THROUGHPUT, budget_s=_FOREVER_S, lr=LrSpec(enabled=False),
        )  # fmt: skip

    def rows(self, trials: Sequence[Told]) -> list[ProbeRow]:
        """A row per trial whose micro-batch size divides the effective batch size, numbered in their order."""
        configs = [(self._config(told), told) for told in trials]
        known = [(config, told) for config, told in configs if config is not None]
        limits = _limits(known)
        return [
            ProbeRow(
                number=number, request_id=f"trial-{number}", kind=ProbeKind.END_TO_END, stage=told.stage, config=config,
                outcome=told.outcome, seconds=_TRIAL_S, measurement=self._measurement(config, told, limits),
            )
            for number, (config, told) in enumerate(known)
        ]  # fmt: skip

    def _config(self, told: Told) -> RunConfig | None:
        searched = {knob: value for knob, value in told.values.items() if knob in self.words}
        try:
            return with_knobs(self.baseline, searched)
        except ValueError:
            return None

    def _measurement(self, config: RunConfig, told: Told, limit: int | None) -> Measurement | None:
        """Two steps, as far from each other as the noise of a trial's figure is said to be wide."""
        if told.outcome is not Outcome.OK:
            return None
        step_s = self.effective_batch / told.samples_per_s
        steps = (step_s * (1 - self.noise / 2), step_s * (1 + self.noise / 2))
        share = told.memory_share
        if share is None:
            share = config.micro_batch_size / limit if limit else 0.0
        return Measurement(
            samples_per_step=self.effective_batch,
            step_s=steps,
            data_wait_s=() if told.data_wait is None else tuple(told.data_wait * step for step in steps),
            memory=MemoryPeak(process_bytes=0, reserved_bytes=int(share * _SCALE)),
        )


def _limits(known: Sequence[tuple[RunConfig, Told]]) -> int | None:
    """Smallest micro-batch size that ran out of memory. Where no peaks are told it is taken as the limit of every
    variant: carefully, as nothing tells how much less another one needs."""
    return min((config.micro_batch_size for config, told in known if told.outcome.is_oom), default=None)


def _humblest(knob: Knob, values: Sequence[Any]) -> Any:
    """The value that asks least of the machine: the smallest count, plain fp32, eager, a flag off."""
    plain = knob_value(_PLAIN, knob)
    return min(values) if knob in _COUNTS or plain not in values else plain


_PLAIN = RunConfig(workload=_WORKLOAD, micro_batch_size=1, optimizer=OptimizerConfig(lr=1e-3), horizon_samples=1)


def next_values(study: PlainStudy, trials: Sequence[Told]) -> tuple[dict[Knob, Any], Stage] | None:
    """The planner's next configuration and its stage; None where it has none: the search is over or misfits."""
    plan = next_probe(study.spec, study.rows(trials))
    if not isinstance(plan, ProbeRequest) or plan.stage in REPEATS:
        return None
    values = {knob: knob_value(plan.points[0], knob) for knob in study.words}
    if Knob.PREFETCH_FACTOR in values and not plan.points[0].loader.num_workers:
        values[Knob.PREFETCH_FACTOR] = _listed(study.words[Knob.PREFETCH_FACTOR], values[Knob.PREFETCH_FACTOR])
    return values, plan.stage


def _listed(values: Sequence[Any], value: Any) -> Any:
    """`value`, or the first one listed: without workers prefetch has no effect, and any of its values will do."""
    return value if value in values else values[0]


def fitting(study: PlainStudy, trials: Sequence[Told], values: Mapping[Knob, Any]) -> tuple[int, ...]:
    """Micro-batch sizes that may be run with the flags of `values`: by the memory model where trials tell their memory,
    else those below the smallest that was seen not to fit with the same flags."""
    flags: dict[Knob, Any] = {knob: value for knob, value in values.items() if knob is not Knob.MICRO_BATCH_SIZE}
    point = point_of(with_knobs(study.baseline, flags))
    view, sizes = View(study.spec, study.rows(trials)), study.legal.get(Knob.MICRO_BATCH_SIZE, ())
    limit, needed = view.history.limit(point), view.history.needed(point)
    told = any(trial.memory_share is not None for trial in trials)
    return tuple(
        size for size in sizes if size < limit and (not told or view.memory.fits(*needed._replace(micro=size)))
    )
