"""A study in memory: the planner asks, a runner answers, nothing is stored. For replays and for tests."""

from __future__ import annotations

from collections.abc import Sequence

from tuner.contract.probe import ProbeReply, ProbeRequest, ProbeRow, ProbeRunner
from tuner.contract.study import StudySpec
from tuner.contract.tuned import Decision
from tuner.search.planner import Ask, Done, next_probe
from tuner.search.selection import select


def rows_of(request: ProbeRequest, reply: ProbeReply, first: int) -> list[ProbeRow]:
    """The rows a store would keep of `reply`, numbered from `first`."""
    share = reply.fixed_s / max(1, len(reply.points))
    return [
        ProbeRow(
            number=first + place,
            request_id=request.id,
            index=point.index,
            kind=request.kind,
            stage=request.stage,
            config=request.points[point.index],
            pair=request.pair,
            soak=request.soak,
            outcome=point.outcome,
            message=point.message,
            detail=point.detail,
            measurement=point.measurement,
            values=point.values,
            environment=point.environment,
            seconds=point.seconds,
            fixed_s=share,
        )
        for place, point in enumerate(sorted(reply.points, key=lambda item: item.index))
    ]


def run_study(
    spec: StudySpec, runner: ProbeRunner, rows: Sequence[ProbeRow] = (), *, max_requests: int = 1000
) -> tuple[list[ProbeRow], Decision]:
    """Go on from `rows` until the planner is done. Raises RuntimeError after `max_requests` without an end."""
    kept = list(rows)
    for _ in range(max_requests):
        plan = next_probe(spec, kept)
        if isinstance(plan, Done):
            return kept, select(kept, spec)
        if isinstance(plan, Ask):
            from tuner.search.sampler import proposed  # Optuna, which most replays never need

            plan = proposed(spec, kept)
        kept += rows_of(plan, runner.run(plan), len(kept))
    raise RuntimeError(f"the planner asked for more than {max_requests} probes")
