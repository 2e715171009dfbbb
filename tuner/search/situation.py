"""Situation: the view of the rows, the forecast from them and the budget that is left, as every stage needs them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from tuner.contract.probe import ProbeKind, ProbeRequest, Stage
from tuner.search.budget import Budget
from tuner.search.forecast import Forecast
from tuner.search.history import History, is_ok
from tuner.search.points import Loader, Point, config_of
from tuner.search.requests import make_request
from tuner.search.view import View

MAX_POINTS = 8
"""Points one process measures at most, so that little is lost when it dies."""
AS_FAST = 1.03
"""Ratio of rates up to which two loaders count as equally fast."""
HEADROOM = 0.3
"""Share of a step that loading may take where flags are compared: they may make the computation three times as fast."""


@dataclass(frozen=True)
class Situation:
    view: View
    forecast: Forecast
    budget: Budget

    @property
    def history(self) -> History:
        return self.view.history

    def request(self, kind: ProbeKind, stage: Stage, points: Sequence[Point]) -> ProbeRequest:
        configs = [config_of(self.view.spec, point) for point in points]
        return make_request(self.history, kind, stage, configs)

    def settled(self, kind: ProbeKind, point: Point) -> bool:
        """`History.settled` of the question as it is asked here."""
        return self.history.settled(*self._as_asked(kind, point))

    def _as_asked(self, kind: ProbeKind, point: Point) -> tuple[ProbeKind, Point]:
        """End to end where parts cannot be probed alone: computing then beside the loader that hides best."""
        if self.view.spec.probes_alone:
            return kind, point
        loader = self.working if kind is ProbeKind.COMPUTE else point.loader
        return ProbeKind.END_TO_END, point._replace(loader=loader)

    @cached_property
    def working(self) -> Loader:
        """The fastest loader of the loader stage, of equals the one with fewest workers that would still hide behind a
        much faster computation; the reference's before that stage.

        Judged from that stage and the baseline alone, so that it stays what it is while more is measured.
        """
        anchor = self.view.anchor
        found: dict[Loader, float] = {}
        for point, rows in self.history.of_kind(ProbeKind.END_TO_END).items():
            if point._replace(loader=anchor.loader) == anchor and rows[0].stage in (Stage.LOADER, Stage.BASELINE):
                found.update((point.loader, 1 / self.history.rate(row)) for row in rows if is_ok(row))
        if not found:
            return self.forecast.reference.loader
        least = min(found.values())
        single = max((cost - least for loader, cost in found.items() if not loader.workers), default=0.0)
        equals = [loader for loader, cost in found.items() if cost <= AS_FAST * least]
        roomy = [loader for loader in equals if single / max(1, loader.workers) <= HEADROOM * least]
        return min(roomy, default=max(equals))

    def measure(self, kind: ProbeKind, stage: Stage, points: Sequence[Point], cost_s: float) -> ProbeRequest | None:
        """One process for those of `points` that are still open and affordable; a former crash goes alone."""
        if not self.view.spec.probes_alone:
            return self._whole(kind, stage, points)
        pending = [p for p in dict.fromkeys(points) if not self.history.settled(kind, p)]
        retries = [p for p in pending if self.history.is_retry(kind, p)]
        batch = (retries[:1] or pending)[: min(MAX_POINTS, self.budget.points_allowed(cost_s))]
        return self.request(kind, stage, batch) if batch else None

    def compute_alone(self, stage: Stage, point: Point) -> ProbeRequest | None:
        """The computation of `point` in a process of its own, whatever it costs."""
        if not self.view.spec.probes_alone:
            return self._whole(ProbeKind.COMPUTE, stage, [point])
        return self.request(ProbeKind.COMPUTE, stage, [point])

    def _whole(self, kind: ProbeKind, stage: Stage, points: Sequence[Point]) -> ProbeRequest | None:
        """The first of `points` that is still open, end to end; never a size that was seen not to fit."""
        for point in (self._as_asked(kind, point)[1] for point in points):
            too_large = point.micro >= self.history.limit(point)
            if not too_large and not self.history.settled(ProbeKind.END_TO_END, point):
                return self.end_to_end(stage, point)
        return None

    def fits(self, point: Point) -> bool:
        """By the memory model, end to end with its loader."""
        return self.view.memory.fits(*self.history.needed(point))

    def end_to_end(self, stage: Stage, point: Point) -> ProbeRequest | None:
        """An end-to-end probe of `point`, if the budget allows it."""
        if not self.budget.allows(self.budget.probe_s(point)):
            return None
        return self.request(ProbeKind.END_TO_END, stage, [point])


def situation_of(view: View) -> Situation:
    """Needs a reference (`View.reference`)."""
    forecast = Forecast(view)
    return Situation(view, forecast, Budget(view, forecast))
