"""Situation: the view of the rows, the forecast from them and the budget that is left, as every stage needs them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tuner.contract.probe import ProbeKind, ProbeRequest, Stage
from tuner.search.budget import Budget
from tuner.search.forecast import Forecast
from tuner.search.history import History
from tuner.search.points import Point, config_of
from tuner.search.requests import make_request
from tuner.search.view import View

MAX_POINTS = 8
"""Points one process measures at most, so that little is lost when it dies."""


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

    def measure(self, kind: ProbeKind, stage: Stage, points: Sequence[Point], cost_s: float) -> ProbeRequest | None:
        """One process for those of `points` that are still open and affordable; a former crash goes alone."""
        pending = [p for p in dict.fromkeys(points) if not self.history.settled(kind, p)]
        retries = [p for p in pending if self.history.is_retry(kind, p)]
        batch = (retries[:1] or pending)[: min(MAX_POINTS, self.budget.points_allowed(cost_s))]
        return self.request(kind, stage, batch) if batch else None

    def end_to_end(self, stage: Stage, point: Point) -> ProbeRequest | None:
        """An end-to-end probe of `point`, if the budget allows it."""
        if not self.budget.allows(self.budget.probe_s(point)):
            return None
        return self.request(ProbeKind.END_TO_END, stage, [point])


def situation_of(view: View) -> Situation:
    """Needs a reference (`View.reference`)."""
    forecast = Forecast(view)
    return Situation(view, forecast, Budget(view, forecast))
