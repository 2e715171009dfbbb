"""Explain: why a configuration, from the stored rows alone: limits, fits, memory, bounds, and how it was chosen."""

from __future__ import annotations

from collections.abc import Sequence

from tuner.contract.config import RunConfig
from tuner.contract.errors import ConfigError, JobFailed
from tuner.contract.explanation import ExplainResult, Limit
from tuner.contract.probe import ProbeRow
from tuner.contract.study import StudySpec
from tuner.contract.tuned import Decision
from tuner.search.explain_case import Case, counted_budget
from tuner.search.explain_limits import changes_to_go_faster, limits, model_use, percent
from tuner.search.explain_tables import (
    candidates,
    effects,
    loader_result,
    memory_cells,
    ruled_out,
    step_fits,
    step_points,
)
from tuner.search.points import config_of
from tuner.search.situation import Situation, situation_of
from tuner.search.view import View


def explain(
    spec: StudySpec, rows: Sequence[ProbeRow], decision: Decision | None, config: RunConfig | None = None
) -> ExplainResult:
    """Explain `config`, which defaults to the one to ship, or the best so far while nothing is decided.

    A pure function: nothing is measured. Raises JobFailed while not even the baseline was measured, and ConfigError
    for a configuration that this study did not measure end to end.
    """
    view = View(spec, rows)
    if view.reference is None:
        why = decision.reason if decision is not None else "the baseline has not been measured yet"
        raise JobFailed(f"study {spec.name}: nothing to explain: {why}")
    s = situation_of(view)
    case = Case(s, config or _chosen(s, decision), decision)
    if not case.rows:
        known = ", ".join(spec.label(config_of(spec, point)) for point in s.forecast.rates)
        raise ConfigError(
            f"{spec.label(case.config)} was not measured end to end in study {spec.name}, so there is nothing to "
            f"explain it from; measured: {known}"
        )
    return _result(case)


def _chosen(s: Situation, decision: Decision | None) -> RunConfig:
    if decision is not None and decision.winner is not None:
        return decision.winner.config
    return config_of(s.view.spec, s.forecast.leader)


def _result(case: Case) -> ExplainResult:
    spec, decision = case.spec, case.decision
    found = limits(case)
    seconds: dict[str, float] = {}
    for row in case.s.history.rows:
        seconds[row.stage.value] = seconds.get(row.stage.value, 0.0) + row.seconds
    return ExplainResult(
        study=spec.name,
        target=spec.target.label,
        tier=spec.tier,
        measured_on=spec.device.place,
        transfer=spec.transfer,
        reason=decision.reason if decision is not None else "no decision yet",
        decision=decision.kind if decision is not None else "open",
        config=case.config,
        label=spec.label(case.config),
        headline=_headline(found),
        samples_per_s=case.rate,
        memory_budget_bytes=counted_budget(spec),
        limits=found,
        model_use=model_use(case),
        changes=changes_to_go_faster(case),
        fits=step_fits(case),
        steps=step_points(case),
        loader=loader_result(case),
        memory=memory_cells(case),
        candidates=candidates(case),
        effects=effects(case),
        dropped=spec.dropped,
        ruled_out=ruled_out(case),
        seconds=seconds,
    )


def _headline(found: Sequence[Limit]) -> str:
    """`Limited by launch overhead: 38 % (22 to 61) of a step; then by computation.`"""
    first, *others = [limit for limit in found if limit.limits] or found[:1]
    figure = f": {percent(first.share)} of {first.of}" if first.share is not None else ""
    more = f"; then by {', '.join(limit.name for limit in others)}" if others else ""
    return f"Limited by {first.name}{figure}{more}."
