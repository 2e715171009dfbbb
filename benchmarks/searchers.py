"""The searchers that are compared on recorded grids: ours, Optuna's, and the batch-size rules of other tools.

Each sees a grid through a ProbeRunner alone, and names one configuration. The rivals name the one with the best single
measurement that fits; they measure end to end, in a fresh process each, and begin with the baseline.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.scoring import worth
from tuner.contract.config import RunConfig
from tuner.contract.probe import Listener, ProbeKind, ProbeReply, ProbeRequest, ProbeRow, ProbeRunner, Stage
from tuner.contract.space import Knob, knob_value, with_knobs
from tuner.contract.study import SamplerName, StudySpec
from tuner.contract.tuned import Decision
from tuner.search.history import SEARCH_STAGES, is_ok, rate_of
from tuner.search.offline import rows_of, run_study
from tuner.search.points import Variant, config_of, point_of
from tuner.search.requests import limits_for
from tuner.search.sampler import make_sampler
from tuner.search.score import overruns
from tuner.search.situation import situation_of
from tuner.search.view import View

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.distributions import BaseDistribution

TRIALS = 60
REJECTED = 20
"""Proposals outside the grid that Optuna may make per trial; they cost nothing and are told as failed."""
FIRST_SIZE = 2
"""Where Lightning's BatchSizeFinder begins (`init_val`)."""
ORDERED = (Knob.MICRO_BATCH_SIZE, Knob.NUM_WORKERS, Knob.PREFETCH_FACTOR)
"""Knobs offered to Optuna as places in a sorted list, so that its samplers know what lies beside what."""


@dataclass(frozen=True)
class Course:
    """What a searcher is given."""

    spec: StudySpec
    cells: tuple[RunConfig, ...]
    """What there is to choose from: a searcher that proposes other configurations is turned away."""
    runner: ProbeRunner
    seed: int


@dataclass(frozen=True)
class Trail:
    """One finished search."""

    searcher: str
    chosen: RunConfig
    seconds: float
    """Seconds of all its probes."""
    ooms: int
    probes: int
    steps: tuple[tuple[float, RunConfig], ...]
    """After so many seconds it would have named this configuration; changes only."""


Searcher = Callable[[Course], list[Trail]]


@dataclass
class Timed:
    """A runner that keeps the seconds after each request, and counts its out-of-memories."""

    inner: ProbeRunner
    after_s: dict[str, float] = field(default_factory=dict)
    total_s: float = 0.0
    ooms: int = 0

    def run(self, request: ProbeRequest, listener: Listener | None = None) -> ProbeReply:
        reply = self.inner.run(request, listener)
        self.total_s += reply.seconds
        self.after_s[request.id] = self.total_s
        self.ooms += sum(point.outcome.is_oom for point in reply.points)
        return reply

    def close(self) -> None:
        self.inner.close()


def staged(course: Course) -> list[Trail]:
    """Ours: what leaves the ship gate, and the leader the search had before it."""
    timed = Timed(course.runner)
    rows, decision = run_study(course.spec, timed)
    return [*staged_trails(course.spec, rows, decision, timed)]


def staged_trails(spec: StudySpec, rows: list[ProbeRow], decision: Decision, timed: Timed) -> Iterator[Trail]:
    steps = tuple(_leaders(spec, rows, timed))
    searched = [row for row in rows if row.stage in SEARCH_STAGES]
    seconds = max((timed.after_s[row.request_id] for row in searched), default=0.0)
    shipped = decision.winner.config if decision.winner is not None else spec.baseline
    leader = steps[-1][1] if steps else spec.baseline
    early = sum(row.outcome.is_oom for row in searched)
    probes = len({row.request_id for row in searched})
    yield Trail("ours", shipped, timed.total_s, timed.ooms, len(timed.after_s), (*steps, (timed.total_s, shipped)))
    yield Trail("ours before the gate", leader, seconds, early, probes, steps)


def _leaders(spec: StudySpec, rows: list[ProbeRow], timed: Timed) -> Iterator[tuple[float, RunConfig]]:
    """Who led after each end-to-end probe of the search, when it changed."""
    before = None
    for place, row in enumerate(rows, start=1):
        if row.kind is not ProbeKind.END_TO_END or row.stage not in SEARCH_STAGES or not is_ok(row):
            continue
        view = View(spec, rows[:place])
        if view.reference is None:
            continue
        leader = config_of(spec, situation_of(view).forecast.leader)
        if leader != before:
            yield timed.after_s[row.request_id], leader
        before = leader


class Lane:
    """End-to-end probes of a rival, and the best single measurement among them."""

    def __init__(self, course: Course, name: str) -> None:
        self.spec = course.spec
        self._name = name
        self._timed = Timed(course.runner)
        self._best = -math.inf
        self._chosen = course.spec.baseline
        self._steps: list[tuple[float, RunConfig]] = []
        self._limits = limits_for(course.spec, ProbeKind.END_TO_END, Stage.SAMPLER)

    @property
    def probes(self) -> int:
        return len(self._timed.after_s)

    def measure(self, config: RunConfig) -> ProbeRow:
        request = ProbeRequest(
            id=f"{self.probes}-{config.digest()}",
            kind=ProbeKind.END_TO_END,
            stage=Stage.SAMPLER,
            workload=config.workload,
            options=config.options,
            points=(config,),
            limits=self._limits,
            device=self.spec.device.kind,
        )
        row = rows_of(request, self._timed.run(request), self.probes - 1)[0]
        value = worth_of(row, self.spec)
        if value > self._best and max(overruns(self.spec, row).values(), default=0.0) <= 0:
            self._best = value
            self.choose(config)
        return row

    def choose(self, config: RunConfig) -> None:
        self._chosen = config
        self._steps.append((self._timed.total_s, config))

    def trail(self) -> Trail:
        return Trail(
            self._name, self._chosen, self._timed.total_s, self._timed.ooms, self.probes, tuple(self._steps)
        )  # fmt: skip


def worth_of(row: ProbeRow, spec: StudySpec) -> float:
    """By the one measurement of `row`; 0 when it did not run."""
    if not is_ok(row) or row.measurement is None:
        return 0.0
    return worth(spec, rate_of(row), row.measurement.phases_s.get("compile", 0.0))


def random_draws(course: Course) -> list[Trail]:
    """The baseline, then cells drawn without replacement."""
    lane = Lane(course, "random")
    order = np.random.default_rng([course.seed, 2]).permutation(len(course.cells))
    others = [course.cells[place] for place in order if course.cells[place] != course.spec.baseline.canonical()]
    for config in [course.spec.baseline, *others][:TRIALS]:
        lane.measure(config)
    return [lane.trail()]


def exhaustive(course: Course) -> list[Trail]:
    """Every cell once, in an order drawn by the seed."""
    lane = Lane(course, "exhaustive")
    for place in np.random.default_rng([course.seed, 3]).permutation(len(course.cells)):
        lane.measure(course.cells[place])
    return [lane.trail()]


def doubling(course: Course) -> list[Trail]:
    """Lightning's BatchSizeFinder in its mode `power`: double the micro-batch until memory is out.

    The last that ran is kept. Everything else stays the baseline's, and so does the effective batch, which ends the
    doubling too. Every try is charged as a probe; the tool itself runs three steps in one process.
    """
    lane = Lane(course, "Lightning's rule")
    return [_first_fit(lane, _sizes(course, FIRST_SIZE), goes_on=True)]


def halving(course: Course) -> list[Trail]:
    """accelerate's find_executable_batch_size: begin high, go down while memory is out, keep the first that ran.

    Down to the grid's next size, as the effective batch is kept; with power-of-two sizes that is a half, as it was in
    accelerate's first releases. Newer ones take nine tenths, and so more tries to the same end.
    """
    lane = Lane(course, "accelerate's rule")
    return [_first_fit(lane, reversed(list(_sizes(course, 1, factor=1))), goes_on=False)]


def _first_fit(lane: Lane, configs: Iterable[RunConfig], *, goes_on: bool) -> Trail:
    """Try in turn; stop at the first that does not fit (`goes_on`), or at the first that does, whatever its speed."""
    ran: RunConfig | None = None
    for config in configs:
        row = lane.measure(config)
        if is_ok(row):
            ran = config
        if is_ok(row) is not goes_on:
            break
    if ran is not None:
        lane.choose(ran)
    return lane.trail()


def _sizes(course: Course, first: int, factor: int = 2) -> Iterator[RunConfig]:
    """The baseline at the grid's micro-batch sizes from `first` up, each at least `factor` times the one before."""
    base, known = course.spec.baseline, {cell.digest() for cell in course.cells}
    least = first
    for size in sorted({cell.micro_batch_size for cell in course.cells}):
        if size < least or base.effective_batch_size % (size * base.world_size):
            continue
        config = with_knobs(base, {Knob.MICRO_BATCH_SIZE: size})
        if config.digest() in known:
            yield config
            least = factor * size


def tpe(course: Course) -> list[Trail]:
    return [_optuna(course, "TPE", SamplerName.TPE, gated=False)]


def gated_tpe(course: Course) -> list[Trail]:
    """With a memory gate: no size is run that is not below one seen not to fit. Refusing is free, and uses a trial."""
    return [_optuna(course, "TPE + memory gate", SamplerName.TPE, gated=True)]


def gp(course: Course) -> list[Trail]:
    """Optuna's GPSampler; it computes with torch."""
    return [_optuna(course, "GP", SamplerName.GP, gated=False)]


def _optuna(course: Course, name: str, sampler: SamplerName, *, gated: bool) -> Trail:
    """Optuna's sampler with its own defaults. An out-of-memory is told as a bad value with a constraint overrun that
    grows with the size: told as a failure, its samplers go on proposing the same."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study = optuna.create_study(direction="maximize", sampler=make_sampler(sampler, course.seed))
        return _OptunaSearch(course, name, study, gated=gated).run()


class _OptunaSearch:
    def __init__(self, course: Course, name: str, study: Study, *, gated: bool) -> None:
        self._lane = Lane(course, name)
        self._spec = course.spec
        self._study = study
        self._gated = gated
        self._known = {cell.digest() for cell in course.cells}
        self._choices = choices(course.spec)
        self._limits: dict[Variant, int] = {}

    def run(self) -> Trail:
        self._study.enqueue_trial(self._params(self._spec.baseline))
        done = 0
        for _ in range(REJECTED * TRIALS):
            if done == TRIALS:
                break
            trial = self._study.ask(fixed_distributions=distributions(self._choices))
            config = self._config(trial)
            if config is None:
                self._study.tell(trial, state=_failed())
                continue
            self._tell(trial, config)
            done += 1
        return self._lane.trail()

    def _params(self, config: RunConfig) -> dict[str, Any]:
        """A knob without effect may hold a value that is no choice; the sampler then picks one."""
        own = {knob: knob_value(config, knob) for knob in self._choices}
        named = {k: v for k, v in own.items() if v in self._choices[k]}
        return {k.value: self._choices[k].index(v) if k in ORDERED else _plain(v) for k, v in named.items()}

    def _config(self, trial: Trial) -> RunConfig | None:
        """The cell that `trial` proposes; None when the grid has no such cell."""
        values = {
            knob: listed[trial.params[knob.value]] if knob in ORDERED else _typed(listed, trial.params[knob.value])
            for knob, listed in self._choices.items()
        }
        try:
            config = with_knobs(self._spec.baseline, values)
        except ValueError:
            return None
        return config if config.digest() in self._known else None

    def _tell(self, trial: Trial, config: RunConfig) -> None:
        point = point_of(config)
        if self._gated and point.micro >= self._limits.get(point.variant, math.inf):
            trial.set_constraint("memory", 0.1 * point.micro / self._spec.baseline.micro_batch_size)
            self._study.tell(trial, 0.0)
            return
        row = self._lane.measure(config)
        if row.outcome.is_oom:
            self._limits[point.variant] = min(point.micro, self._limits.get(point.variant, point.micro))
        for key, overrun in overruns(self._spec, row).items():
            trial.set_constraint(key, overrun)
        self._study.tell(trial, worth_of(row, self._spec))


def choices(spec: StudySpec) -> dict[Knob, tuple[Any, ...]]:
    """Values of every knob with a choice, those of `ORDERED` sorted; not the learning rate, which changes no speed."""
    found: dict[Knob, tuple[Any, ...]] = {}
    for knob in Knob:
        listed = spec.space.values(knob, spec.baseline)
        if len(listed) > 1 and knob not in (Knob.LR, Knob.EFFECTIVE_BATCH_SIZE):
            found[knob] = tuple(sorted(listed)) if knob in ORDERED else listed
    return found


def distributions(listed: dict[Knob, tuple[Any, ...]]) -> dict[str, BaseDistribution]:
    from optuna.distributions import CategoricalDistribution, IntDistribution

    return {
        knob.value: IntDistribution(0, len(values) - 1)
        if knob in ORDERED
        else CategoricalDistribution([_plain(value) for value in values])
        for knob, values in listed.items()
    }


def _plain(value: Any) -> Any:
    """Optuna stores enums as their strings."""
    return getattr(value, "value", value)


def _typed(listed: tuple[Any, ...], plain: Any) -> Any:
    return next(value for value in listed if _plain(value) == plain)


def _failed() -> Any:
    from optuna.trial import TrialState

    return TrialState.FAIL


SEARCHERS: dict[str, Searcher] = {
    "ours": staged,
    "random": random_draws,
    "tpe": tpe,
    "tpe-gate": gated_tpe,
    "gp": gp,
    "exhaustive": exhaustive,
    "lightning": doubling,
    "accelerate": halving,
}
"""By the word that names them on the command line."""
SLOW = frozenset({"gp"})
"""Run on fewer seeds."""
