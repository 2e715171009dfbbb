"""Confirm: the few configurations that may be the best are measured again, so that luck does not choose among them."""

from __future__ import annotations

import math

from tuner.contract.probe import ProbeKind, ProbeRequest, Stage
from tuner.search.forecast import MISFIT
from tuner.search.points import Point
from tuner.search.situation import Situation

CONFIRMED = 8
"""Probes at most."""
AGAIN = 4
"""More of them once the fall-back has brought new contenders."""
CONTENDERS = 4
TIMES = 4
"""Processes of one configuration at most."""
DOUBTED = 2
"""Repeats from which the noise between processes is known well enough to say what is the model's misfit."""
WORTH_KNOWING = 0.005
"""Expected loss of taking the leader instead of a rival from which another probe is worth its time."""


def confirm(s: Situation) -> ProbeRequest | None:
    """One more process of the contender that was measured least; None once the leader stands out."""
    rivals = contenders(s)
    late = Stage.SAMPLER in {row.stage for row in s.history.search}
    if len(rivals) < 2 or len(asked(s)) >= CONFIRMED + (AGAIN if late else 0):
        return None
    open_ = [point for point in rivals if len(s.forecast.rows[point]) < TIMES]
    if not open_:
        return None
    point = min(open_, key=lambda p: (len(s.forecast.rows[p]), rivals.index(p)))
    return s.end_to_end(Stage.CONFIRM, point)


def doubt(s: Situation) -> ProbeRequest | None:
    """Where the model seems far off: the leader and the reference once more, as only repeats tell misfit from noise."""
    f = s.forecast
    if f.misfit <= MISFIT or sum(len(rows) - 1 for rows in f.rows.values()) >= DOUBTED:
        return None
    point = min(dict.fromkeys((f.leader, f.reference)), key=lambda p: len(f.rows[p]))
    return s.end_to_end(Stage.CONFIRM, point) if len(f.rows[point]) < TIMES else None


def asked(s: Situation) -> list[int]:
    """Numbers of the rows this stage has brought, failed ones among them."""
    return [
        row.number
        for rows in s.history.of_kind(ProbeKind.END_TO_END).values()
        for row in rows
        if row.stage is Stage.CONFIRM
    ]


def contenders(s: Situation) -> list[Point]:
    """The best believed configuration and those that may well be better, best first; the reference is proven apart."""
    f = s.forecast
    ranked = sorted((p for p in f.roomy if p != f.reference), key=lambda p: -f.measured_worth(p))
    if not ranked:
        return []
    first = ranked[0]
    return [p for p in ranked[:CONTENDERS] if p == first or _loss(s, p, first) > WORTH_KNOWING]


def _loss(s: Situation, point: Point, first: Point) -> float:
    """Expected gain of `point` over `first` where it is the better one: sd * phi(z) - apart * Phi(-z), z = apart / sd
    (expected improvement: Jones et al., J. Global Optimization 13, 1998, eq. 15)."""
    f = s.forecast
    apart = math.log(f.measured_worth(first) / f.measured_worth(point))
    sd = math.hypot(f.beliefs[first].sd, f.beliefs[point].sd)
    z = apart / sd
    return sd * math.exp(-z * z / 2) / math.sqrt(2 * math.pi) - apart * math.erfc(z / math.sqrt(2)) / 2
