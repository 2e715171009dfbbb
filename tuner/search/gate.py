"""The ship gate and the soak: finalists against the reference in fresh processes, interleaved, judged sequentially.

The error level is shared over finalists and looks (Bonferroni), so that peeking early costs nothing in honesty.
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from tuner.contract.config import RunConfig
from tuner.contract.measurement import Interval
from tuner.contract.probe import ProbeKind, ProbeRequest, ProbeRow, Stage
from tuner.contract.statistics import paired_gain
from tuner.contract.study import GateSpec, Objective, StudySpec
from tuner.search.history import is_ok, is_settled, power_of, rate_of
from tuner.search.host import has_reference, reference_log
from tuner.search.levers import lever_finalist
from tuner.search.lr import chosen_lr
from tuner.search.objective import Figures, fast_enough, merit
from tuner.search.points import Point, config_of, differences, point_of, with_rate
from tuner.search.requests import make_request
from tuner.search.situation import Situation

NEAR_BEST = 0.95
"""A second finalist must be worth at least this share of the first."""
BASELINE_ROUNDS = 3
"""Fresh processes of the reference alone when nothing measured can beat it: its own promise needs them."""
BETWEEN_LOOKS = 2
ENOUGH_PEAKS = 3
"""Processes of the gate from which its typical peak is judged."""
ALIKE = 0.99
"""Share of the largest gain from which two finalists count as equally fast."""
MODEL_CHANGE = 100
"""Settings that another model counts for among finalists that are equally fast: the unchanged one is preferred."""
STEADIER = 0.7
"""Spread of the pairs with the host's speed taken out, as a share of that without, from which it is taken out."""
VOID_ROUNDS = 2
"""Rounds the reference may fail in before the gate is given up."""


@dataclass(frozen=True)
class Contest:
    """Who stands against whom. Side 0 is the reference, the others are finalists, best first."""

    sides: tuple[RunConfig, ...]
    rounds: int
    looks: tuple[int, ...]
    confidence: float
    """Of each interval, so that all together keep the gate's error level."""
    spec: StudySpec
    """What is compared, and from where a gain counts."""
    first: int = 0
    """Number of its first round."""

    @property
    def finalists(self) -> range:
        return range(1, len(self.sides))


def contest(s: Situation) -> Contest:
    """From the search's rows alone, so that it does not change while the gate runs."""
    configs = [entrant(s, point) for point in finalists(s)]
    if (changed := lever_finalist(s)) is not None:
        configs.append(changed)  # with the lr its quality was measured at
    return contest_of(s, configs)


def entrant(s: Situation, point: Point) -> RunConfig:
    """`point` with the learning rate chosen."""
    spec = s.view.spec
    return with_rate(config_of(spec, point), spec.baseline, chosen_lr(s.history.search, spec))


def contest_of(s: Situation, configs: Sequence[RunConfig], first: int = 0) -> Contest:
    """`configs` against the reference."""
    spec = s.view.spec
    sides = (config_of(spec, s.forecast.reference), *configs)
    looks = looks_of(spec.gate) if configs else ()
    rounds = max(looks) if looks else min(BASELINE_ROUNDS, spec.gate.min_pairs)
    tests = max(1, len(configs) * len(looks))
    return Contest(sides, rounds, looks, 1 - spec.gate.alpha / tests, spec, first)


def looks_of(gate: GateSpec) -> tuple[int, ...]:
    """Numbers of pairs after which the data is judged."""
    return tuple(range(gate.min_pairs, max(gate.min_pairs, gate.max_pairs) + 1, BETWEEN_LOOKS))


def finalists(s: Situation) -> tuple[Point, ...]:
    """The best measured configurations that beat the reference, or else the one that might within the noise.

    The leader first: it replaced others only beyond the noise. A second one must compute differently, not merely
    load differently, and come close; where no gain passed the noise, one is enough to prove that. Under `memory` the
    second is the fastest of those that need less.
    """
    f = s.forecast
    others = sorted((p for p in f.roomy if p != f.reference), key=lambda p: (p != f.leader, -f.measured_worth(p)))
    bar = f.measured_worth(f.reference)
    better = [p for p in others if f.measured_worth(p) > bar]
    if better and s.view.spec.objective is Objective.MEMORY:
        safest = max(better, key=lambda p: f.rates[p])  # the leader may be too close to what counts as slower
        return tuple(dict.fromkeys((better[0], safest)))[: s.budget.finalists]
    if better:
        floor = NEAR_BEST * max(f.measured_worth(p) for p in better)
        distinct = {p._replace(loader=better[0].loader): p for p in reversed(better) if f.measured_worth(p) >= floor}
        most = 1 if f.leader == f.reference else s.budget.finalists
        return tuple(sorted(distinct.values(), key=better.index)[:most])
    hopeful = [p for p in others[:1] if f.measured_worth(p) * (1 + f.noise(p) + f.noise(f.reference)) > bar]
    return tuple(hopeful)


@dataclass
class Standing:
    """What the gate has shown so far, replayed from its rows."""

    contest: Contest
    request: ProbeRequest | None = None
    """The next probe; None when the gate is over."""
    pairs: dict[int, list[tuple[Figures, Figures]]] = field(default_factory=dict)
    """Finalist -> figures (its own, the reference's) of each round both completed."""
    slower: dict[int, list[float]] = field(default_factory=dict)
    """Finalist -> of each such pair: log of how much slower the host was for the finalist, by its reference work; not
    a number where that is not known."""
    out: dict[int, str] = field(default_factory=dict)
    """Finalist -> why it is no longer in the contest."""
    won: dict[int, Interval] = field(default_factory=dict)
    """Finalist -> its gain, where it is proven."""
    fell: set[int] = field(default_factory=set)
    """Finalists that are out because they failed or did not fit, whatever their speed."""
    broken: str = ""
    """Why the gate was given up."""
    rounds: int = 0
    """Begun so far."""
    before: Standing | None = None
    """The gate of those this one's finalist stands in for."""

    def gain(self, finalist: int) -> Interval | None:
        """In what the objective asks for."""
        return self._ratio(finalist, lambda figures: merit(self.contest.spec, figures))

    def speedup(self, finalist: int) -> Interval | None:
        """In samples/s, whatever the objective."""
        return self._ratio(finalist, lambda figures: figures.samples_per_s)

    def progress(self, finalist: int) -> Interval | None:
        """In goodput, whatever the objective."""
        return self._ratio(finalist, lambda figures: figures.samples_per_s * figures.efficiency)

    def _ratio(self, finalist: int, of: Callable[[Figures], float]) -> Interval | None:
        pairs = self._steadied(finalist)
        if not pairs:
            return None
        return paired_gain([of(own) for own, _ in pairs], [of(other) for _, other in pairs], self.contest.confidence)

    def _steadied(self, finalist: int) -> list[tuple[Figures, Figures]]:
        """The pairs, without the host's own changes where those were most of the spread.

        Only between configurations with as many workers and threads: a busy host does not slow others as much.
        """
        pairs, slower = self.pairs.get(finalist, []), self.slower.get(finalist, [])
        known = len(slower) == len(pairs) and all(math.isfinite(log) for log in slower)
        if len(pairs) < 2 or not known:
            return pairs
        logs = [math.log(own.samples_per_s / other.samples_per_s) for own, other in pairs]
        without = [log + slow for log, slow in zip(logs, slower, strict=True)]
        if statistics.stdev(without) > STEADIER * statistics.stdev(logs):
            return pairs
        return [
            (replace(own, samples_per_s=own.samples_per_s * math.exp(slow)), other)
            for (own, other), slow in zip(pairs, slower, strict=True)
        ]

    @property
    def active(self) -> list[int]:
        return [finalist for finalist in self.contest.finalists if finalist not in self.out]

    def winners(self) -> list[int]:
        """Proven finalists, largest gain first; of those within `ALIKE` of it, the one that changes least."""
        best = max((gain.value for gain in self.won.values()), default=0.0)
        return sorted(self.won, key=lambda finalist: self._preference(finalist, best))

    def _preference(self, finalist: int, best: float) -> tuple[bool, float]:
        gain = self.won[finalist].value
        if gain < ALIKE * best:
            return True, -gain
        before, after = (self.contest.sides[side] for side in (0, finalist))
        model = MODEL_CHANGE if before.options != after.options else 0
        return False, float(model + differences(point_of(before), point_of(after)))


def contested(s: Situation, of: Contest) -> Standing:
    """Replay the gate's rows up to the first probe that is missing."""
    state = Standing(of)
    done = void = 0
    for number in range(of.first, of.first + of.rounds + VOID_ROUNDS):
        if done == of.rounds:
            break
        state.rounds += 1
        measured = _round(s, state, number)
        if measured is None:
            return state
        if 0 not in measured:
            void += 1
            if void == VOID_ROUNDS:
                state.broken = f"the reference failed in {void} rounds of the ship gate"
                return state
            continue
        done += 1
        for finalist in state.active:
            if finalist in measured:
                own, other = measured[finalist], measured[0]
                state.pairs.setdefault(finalist, []).append((own.figures, other.figures))
                state.slower.setdefault(finalist, []).append(_slower(own.row, other.row))
        if done in state.contest.looks and judged(state, last=done == state.contest.looks[-1]):
            break
        if state.contest.looks and not state.active:
            break
    return state


class Measured(NamedTuple):
    row: ProbeRow
    figures: Figures


def _slower(own: ProbeRow, other: ProbeRow) -> float:
    if _processes(own) != _processes(other):
        return math.nan
    if not (has_reference(own) and has_reference(other)):
        return math.nan
    return reference_log(own) - reference_log(other)


def _processes(row: ProbeRow) -> tuple[int, int]:
    return row.config.loader.num_workers, row.config.threads


def _round(s: Situation, state: Standing, number: int) -> dict[int, Measured] | None:
    """What was measured in round `number`; None, with `state.request` set, while a side is still to be measured."""
    measured: dict[int, Measured] = {}
    for side in order_of(state.contest.spec, state.active, number):
        config = state.contest.sides[side]
        rows = [row for row in s.history.gate if row.pair == number and row.config == config]
        if not is_settled(rows, retry_fluke=True):
            state.request = make_request(s.history, ProbeKind.END_TO_END, Stage.GATE, [config], pair=number)
            return None
        good = [row for row in rows if is_ok(row)]
        if good and (figures := _figures(s, good[-1])) is not None:
            measured[side] = Measured(good[-1], figures)
        if side and (why := _why_out(s, rows, config)):
            state.out[side] = why
            state.fell.add(side)
    return measured


def _figures(s: Situation, row: ProbeRow) -> Figures | None:
    """None where the row lacks what the objective compares."""
    if s.view.spec.objective is Objective.ENERGY and power_of([row]) is None:
        return None
    return s.forecast.figures(point_of(row.config), rate_of(row), [row])


def order_of(spec: StudySpec, active: Sequence[int], number: int) -> list[int]:
    """B A C or C A B, drawn by lot for every round, the same whenever asked.

    A host's speed hangs together from one probe to the next, and a fixed order can fall into step with it: alternating
    orders meet a rhythm of four probes with the same side up each time. Drawn, it falls on either side by chance, so
    the pairs' differences are independent and symmetric where nothing differs, whatever the noise is like (Fisher,
    The Design of Experiments, 1935, sections 9 and 21).
    """
    order = [*active[:1], 0, *active[1:]]
    lot = hashlib.sha256(f"{spec.name} {spec.seed} {number}".encode()).digest()[0]
    return order if lot % 2 else order[::-1]


def _why_out(s: Situation, rows: Sequence[ProbeRow], config: RunConfig) -> str:
    """A finalist that fails in the gate, or whose processes there typically pass the budget, is not shipped."""
    last = rows[-1]
    until = last.number
    good = [row for row in s.history.gate if row.config == config and row.number <= until and is_ok(row)]
    if not is_ok(last):
        return f"{last.outcome.value} in the ship gate: {last.message or 'no steady step was measured'}"
    if s.history.typical_share(good) > 1.0 and len(good) >= ENOUGH_PEAKS:
        return "its peak memory passed the budget in the ship gate"
    return ""


def judged(state: Standing, *, last: bool) -> bool:
    """One look: who has won so far, and who is out; True when nothing that is still open could change the answer.

    The interval's lower end must lie above 1 and its middle at the least gain that counts. Under `memory` the interval
    of the speed, at the same level, must prove besides that the finalist is not slower (see `fast_enough`); that both
    must hold makes false gains rarer, so the level is not divided again.
    """
    state.won.clear()
    spec = state.contest.spec
    gains = {finalist: gain for finalist in state.active if (gain := state.gain(finalist)) is not None}
    for finalist, gain in gains.items():
        speed = state.progress(finalist)
        assert speed is not None
        enough = len(state.pairs[finalist]) >= spec.gate.min_pairs
        least = 1 + spec.gate.min_gain
        if enough and gain.low > 1.0 and gain.value >= least and fast_enough(spec, speed.low):
            state.won[finalist] = gain
        elif gain.high < least:
            state.out[finalist] = f"its gain is below {least:.2f}x"
        elif not fast_enough(spec, speed.high):
            state.out[finalist] = f"it is slower: {speed.value:.3f}x the speed of the baseline"
    best = max((gain.value for gain in state.won.values()), default=None)
    settled = best is not None and all(f in gains and gains[f].value <= best for f in state.active)
    return last or not state.active or settled


def soak_order(state: Standing) -> Iterator[int]:
    """Who may be shipped, in order of preference; the reference last."""
    yield from state.winners()
    yield 0


def soak_rows(s: Situation, config: RunConfig) -> list[ProbeRow]:
    return [row for row in s.history.soak if row.config == config]


def soak(s: Situation, state: Standing) -> ProbeRequest | None:
    """The configuration to ship once more, with evaluation, sampling and a checkpoint; then the next, if it fails."""
    for side in soak_order(state):
        config = state.contest.sides[side]
        rows = soak_rows(s, config)
        if not is_settled(rows, retry_fluke=True):
            return make_request(s.history, ProbeKind.END_TO_END, Stage.SOAK, [config])
        if soaked(s, config):
            return None
    return None


def soaked(s: Situation, config: RunConfig) -> bool:
    """A soak of `config` ran to its end within the memory budget."""
    return any(is_ok(row) and s.history.fits(row) for row in soak_rows(s, config))
