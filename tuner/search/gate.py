"""The ship gate and the soak: finalists against the reference in fresh processes, interleaved, judged sequentially.

The error level is shared over finalists and looks (Bonferroni), so that peeking early costs nothing in honesty.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from tuner.contract.config import RunConfig
from tuner.contract.measurement import Interval
from tuner.contract.probe import ProbeKind, ProbeRequest, ProbeRow, Stage
from tuner.contract.statistics import paired_gain
from tuner.contract.study import GateSpec, Objective
from tuner.search.history import is_ok, is_settled, rate_of
from tuner.search.levers import lever_finalist
from tuner.search.lr import chosen_lr
from tuner.search.objective import production_seconds
from tuner.search.points import Point, config_of, differences, point_of
from tuner.search.requests import make_request
from tuner.search.situation import Situation

NEAR_BEST = 0.95
"""A second finalist must be worth at least this share of the first."""
BASELINE_ROUNDS = 3
"""Fresh processes of the reference alone when nothing measured can beat it: its own promise needs them."""
BETWEEN_LOOKS = 2
ALIKE = 0.99
"""Share of the largest gain from which two finalists count as equally fast."""
MODEL_CHANGE = 100
"""Settings that another model counts for among finalists that are equally fast: the unchanged one is preferred."""
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

    @property
    def finalists(self) -> range:
        return range(1, len(self.sides))


def contest(s: Situation) -> Contest:
    """From the search's rows alone, so that it does not change while the gate runs."""
    spec = s.view.spec
    lr = chosen_lr(s.history.search, spec)
    configs = [_with_lr(config_of(spec, point), lr) for point in finalists(s)]
    if (changed := lever_finalist(s)) is not None:
        configs.append(changed)  # with the lr its quality was measured at
    sides = (config_of(spec, s.forecast.reference), *configs)
    looks = looks_of(spec.gate) if configs else ()
    rounds = max(looks) if looks else min(BASELINE_ROUNDS, spec.gate.min_pairs)
    tests = max(1, len(configs) * len(looks))
    return Contest(sides, rounds, looks, 1 - spec.gate.alpha / tests)


def _with_lr(config: RunConfig, lr: float | None) -> RunConfig:
    if lr is None:
        return config
    return config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"lr": lr})})


def looks_of(gate: GateSpec) -> tuple[int, ...]:
    """Numbers of pairs after which the data is judged."""
    return tuple(range(gate.min_pairs, max(gate.min_pairs, gate.max_pairs) + 1, BETWEEN_LOOKS))


def finalists(s: Situation) -> tuple[Point, ...]:
    """The best measured configurations that beat the reference, or else the one that might within the noise.

    The leader first: it replaced others only beyond the noise. A second one must compute differently, not merely
    load differently, and come close; where no gain passed the noise, one is enough to prove that.
    """
    f = s.forecast
    others = sorted((p for p in f.rates if p != f.reference), key=lambda p: (p != f.leader, -f.measured_worth(p)))
    bar = f.measured_worth(f.reference)
    better = [p for p in others if f.measured_worth(p) > bar]
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
    pairs: dict[int, list[tuple[float, float]]] = field(default_factory=dict)
    """Finalist -> rates (its own, the reference's) of each round both completed."""
    out: dict[int, str] = field(default_factory=dict)
    """Finalist -> why it is no longer in the contest."""
    won: dict[int, Interval] = field(default_factory=dict)
    """Finalist -> its gain, where it is proven."""
    broken: str = ""
    """Why the gate was given up."""

    def gain(self, finalist: int) -> Interval | None:
        pairs = self.pairs.get(finalist, [])
        if not pairs:
            return None
        return paired_gain([own for own, _ in pairs], [other for _, other in pairs], self.contest.confidence)

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


def standing(s: Situation) -> Standing:
    """Replay the gate's rows up to the first probe that is missing."""
    state = Standing(contest(s))
    done = void = 0
    for number in range(state.contest.rounds + VOID_ROUNDS):
        if done == state.contest.rounds:
            break
        rates = _round(s, state, number)
        if rates is None:
            return state
        if 0 not in rates:
            void += 1
            if void == VOID_ROUNDS:
                state.broken = f"the reference failed in {void} rounds of the ship gate"
                return state
            continue
        done += 1
        for finalist in state.active:
            if finalist in rates:
                state.pairs.setdefault(finalist, []).append((rates[finalist], rates[0]))
        if done in state.contest.looks and _over(s, state, last=done == state.contest.looks[-1]):
            break
        if state.contest.looks and not state.active:
            break
    return state


def _round(s: Situation, state: Standing, number: int) -> dict[int, float] | None:
    """Rates of the sides in round `number`; None, with `state.request` set, while a side is still to be measured."""
    rates: dict[int, float] = {}
    for side in order_of(state.active, number):
        config = state.contest.sides[side]
        rows = [row for row in s.history.gate if row.pair == number and row.config == config]
        if not is_settled(rows, retry_fluke=True):
            state.request = make_request(s.history, ProbeKind.END_TO_END, Stage.GATE, [config], pair=number)
            return None
        good = [row for row in rows if is_ok(row)]
        if good:
            rates[side] = rate_of(good[-1])
        if side and (why := _why_out(s, rows)):
            state.out[side] = why
    return rates


def order_of(active: Sequence[int], number: int) -> list[int]:
    """B A C in even rounds, C A B in odd ones: whatever drifts meets every side from both directions."""
    order = [*active[:1], 0, *active[1:]]
    return order if number % 2 == 0 else order[::-1]


def _why_out(s: Situation, rows: Sequence[ProbeRow]) -> str:
    """A finalist that fails or does not fit in the gate is not shipped."""
    last = rows[-1]
    good = [row for row in rows if is_ok(row)]
    if not good:
        return f"{last.outcome.value} in the ship gate: {last.message or 'no steady step was measured'}"
    if not all(s.history.fits(row) for row in good):
        return "its peak memory passed the budget in the ship gate"
    return ""


def _over(s: Situation, state: Standing, *, last: bool) -> bool:
    """Judge every open finalist; True when nothing that is still open could change the answer."""
    state.won.clear()
    least = 1 + s.view.spec.gate.min_gain
    for finalist in state.active:
        gain = state.gain(finalist)
        assert gain is not None
        enough = len(state.pairs[finalist]) >= s.view.spec.gate.min_pairs
        if enough and gain.low > 1.0 and gain.value >= least and pays_off(s, state, finalist, gain.value):
            state.won[finalist] = gain
        elif gain.high < least:
            state.out[finalist] = f"its gain is below {least:.2f}x"
    if last or not state.active:
        return True
    best = max((gain.value for gain in state.won.values()), default=None)
    return best is not None and all(
        gain.value <= best for finalist in state.active if (gain := state.gain(finalist)) is not None
    )


def pays_off(s: Situation, state: Standing, finalist: int, gain: float) -> bool:
    """By total production time, compile included; by throughput alone under that objective."""
    spec = s.view.spec
    if spec.objective is Objective.THROUGHPUT:
        return True
    own, reference = state.contest.sides[finalist], state.contest.sides[0]
    rate = s.forecast.rates[s.forecast.reference]
    times = [
        production_seconds(spec, speed, s.history.compile_seconds(point_of(config).variant))
        for speed, config in ((rate * gain, own), (rate, reference))
    ]
    return times[0] < times[1]


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
