"""Stand-ins: where no finalist can be shipped because it failed or did not fit, the next best measured one is judged.

A peak a little above the search's is no reason to go back to a baseline of half the speed. A stand-in has a gate of its
own at the level of the one it stands in for: that this did not fit says nothing of anybody's speed, and one is shipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from tuner.contract.config import RunConfig
from tuner.search.gate import Contest, Standing, contest, contest_of, contested, entrant, soak_rows, soaked
from tuner.search.history import is_settled
from tuner.search.points import Point, point_of
from tuner.search.situation import Situation

STAND_INS = 2
"""One after the other, at most."""
OUT_OF_MEMORY = 1.01
"""Share of the budget that a process is taken to have needed that ran out of it."""


def standing(s: Situation) -> Standing:
    """The gate, and after it those of the stand-ins, up to the first probe that is missing."""
    state = contested(s, contest(s))
    for _ in range(STAND_INS):
        following = _following(s, state)
        if following is None:
            break
        before, state = state, contested(s, following)
        state.before = before
    return state


def gates(state: Standing) -> Iterator[Standing]:
    """This one and those before it, the latest first."""
    now: Standing | None = state
    while now is not None:
        yield now
        now = now.before


def fallen(s: Situation, state: Standing) -> list[RunConfig]:
    """Finalists so far that failed or did not fit: in the gate, or in their soak."""
    found = []
    for one in gates(state):
        sides = one.contest.sides
        soak = [side for side in one.won if not is_shippable(s, sides[side])]
        found += [sides[side] for side in sorted({*one.fell, *soak})]
    return found


def is_shippable(s: Situation, config: RunConfig) -> bool:
    """Its soak did not fail, or is still to come."""
    return soaked(s, config) or not is_settled(soak_rows(s, config), retry_fluke=True)


def _following(s: Situation, state: Standing) -> Contest | None:
    """The next gate; None while this one is open, where it has somebody to ship, or where nobody fell: who was judged
    and is not faster has no stand-in, as that would be a second try at the same error level."""
    if state.request is not None or state.broken or not state.fell | state.won.keys():
        return None
    if any(is_shippable(s, state.contest.sides[side]) for side in state.won):
        return None
    fell = [config for config in fallen(s, state) if config.options == s.view.spec.baseline.options]
    judged = [point_of(side) for gate in gates(state) for side in gate.contest.sides]
    point = stand_in(s, [point_of(config) for config in fell], judged) if fell else None
    if point is None:
        return None
    following = contest_of(s, [entrant(s, point)], state.contest.first + state.rounds)
    return replace(following, confidence=state.contest.confidence)


def stand_in(s: Situation, fell: list[Point], judged: list[Point]) -> Point | None:
    """The best measured configuration not `judged` that beat the reference in the search, of another size than those
    that did not fit; if there is one, with room for as much as they passed what the search had seen of them."""
    f = s.forecast
    needed = {point: s.history.shares[s.history.needed(point)] for point in (*f.roomy, *fell)}
    passed = {point: share for point in fell if (share := _fresh_share(s, point)) > 1.0}
    tight = {s.history.needed(point) for point in passed}
    grew = max((share / needed[point] for point, share in passed.items()), default=1.0)
    bar = f.measured_worth(f.reference)
    able = [
        point
        for point in sorted(f.roomy, key=lambda p: -f.measured_worth(p))
        if point not in (f.reference, *judged)
        and f.measured_worth(point) > bar
        and s.history.needed(point) not in tight
    ]
    return next(iter([point for point in able if needed[point] * grew <= 1.0] or able), None)


def _fresh_share(s: Situation, point: Point) -> float:
    """The most that fresh processes of it took of the memory budget; a little more than all where one ran out of it."""
    rows = [row for row in (*s.history.gate, *s.history.soak) if point_of(row.config) == point]
    told = [s.view.spec.memory_used(row.measurement.memory) for row in rows if row.measurement is not None]
    return max([*told, *(OUT_OF_MEMORY for row in rows if row.outcome.is_oom)], default=0.0)
