"""Levers: options that change the model itself. Tried only under a quality constraint, never changed silently.

Quality comes first, at equal samples and paired over seeds with the baseline's model; then speed, end to end. The
fastest model that passes both stands in the ship gate as one more finalist.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from tuner.contract.base import Scalar
from tuner.contract.config import QualityConfig, RunConfig
from tuner.contract.measurement import Outcome
from tuner.contract.probe import ProbeKind, ProbeRequest, ProbeRow, Stage
from tuner.contract.statistics import mean_interval
from tuner.contract.study import QualityConstraint, StudySpec
from tuner.search.history import is_ok, is_settled, rate_of
from tuner.search.points import MOST_MODELS, Point, all_models, config_of, other_models, point_of, smaller_cuts
from tuner.search.refine import WORTHWHILE
from tuner.search.requests import make_request
from tuner.search.situation import Situation

ERROR_LEVEL = 0.05
"""Chance, over all models of a study together, that one is let through whose quality is worse than allowed."""

Model = Mapping[str, Scalar]
"""All options of one model."""


def lever_stage(s: Situation) -> ProbeRequest | None:
    """Quality of the baseline's model at the leader's configuration, then model by model its quality and its speed."""
    spec = s.view.spec
    models = other_models(spec)
    if spec.quality is None or not models:
        return None
    own = spec.baseline.options
    one_more = spec.quality.seeds * s.budget.quality_probe_s + s.budget.end_to_end_s
    if (request := _quality(s, own, then_s=one_more)) is not None:
        return request
    if len(scores(s, own)) < spec.quality.seeds:
        return None
    for model in models:
        request = _quality(s, model, then_s=s.budget.end_to_end_s) or _speed(s, model)
        if request is not None:
            return request
    return None


def _quality(s: Situation, model: Model, *, then_s: float) -> ProbeRequest | None:
    """The next seed of `model`; None when all are there, one failed for good, or what is left does not pay for all
    of them and `then_s` more."""
    quality, point = _constraint(s), cut_of(s, model)
    if point is None or _failure(s, model):
        return None
    missing = [seed for seed in _seeds(s.view.spec) if not is_settled(_tries(s, model, seed), retry_fluke=True)]
    if not missing or not s.budget.allows_quality(len(missing) * s.budget.quality_probe_s + then_s):
        return None
    judged_by = QualityConfig(metric=quality.metric, higher_is_better=quality.higher_is_better)
    config = _config(s, model, point).model_copy(update={"seed": missing[0], "quality": judged_by})
    return make_request(s.history, ProbeKind.QUALITY, Stage.QUALITY, [config], samples=quality.samples)


def _speed(s: Situation, model: Model) -> ProbeRequest | None:
    """The production loop with a model whose quality is proven."""
    point = cut_of(s, model)
    if point is None or not compared(s, model).proven or is_settled(_runs(s, model, point), retry_fluke=True):
        return None
    if not s.budget.allows_quality(s.budget.end_to_end_s):
        return None
    return make_request(s.history, ProbeKind.END_TO_END, Stage.QUALITY, [_config(s, model, point)])


def lever_finalist(s: Situation) -> RunConfig | None:
    """The fastest model of proven quality, when it beats the best configuration of the unchanged model."""
    best, bar = None, WORTHWHILE * s.forecast.measured_worth(s.forecast.leader)
    for model in other_models(s.view.spec):
        found = _measured(s, model)
        if found is not None and found[1] > bar:
            best, bar = found
    return best


def _measured(s: Situation, model: Model) -> tuple[RunConfig, float] | None:
    """Configuration and worth of a model that passed; None for any other."""
    point = cut_of(s, model)
    if point is None or not compared(s, model).proven:
        return None
    runs = [row for row in _runs(s, model, point) if is_ok(row)]
    if not runs:
        return None
    rate = float(np.mean([rate_of(row) for row in runs]))
    return _config(s, model, point), s.forecast.worth(point, rate, runs)


def cut_of(s: Situation, model: Model) -> Point | None:
    """The leader, or the largest cut of its batch this model was not seen to overrun the memory with; None = none."""
    leader = s.forecast.leader
    cuts = [leader] if s.view.coupled else [leader, *smaller_cuts(leader)]
    for point in cuts:
        rows = [row for row in _rows(s, model) if point_of(row.config) == point]
        if not any(row.outcome.is_oom or (is_ok(row) and not s.history.fits(row)) for row in rows):
            return point
    return None


def _config(s: Situation, model: Model, point: Point) -> RunConfig:
    return config_of(s.view.spec, point).model_copy(update={"options": dict(model)})


def _constraint(s: Situation) -> QualityConstraint:
    assert s.view.spec.quality is not None
    return s.view.spec.quality


def _seeds(spec: StudySpec) -> list[int]:
    assert spec.quality is not None
    return [spec.baseline.seed + number for number in range(spec.quality.seeds)]


def _rows(s: Situation, model: Model) -> list[ProbeRow]:
    return [row for row in s.history.quality if row.config.options == model]


def _tries(s: Situation, model: Model, seed: int) -> list[ProbeRow]:
    """Quality probes of one seed; those that ran out of memory are asked again in a smaller cut."""
    rows = [row for row in _rows(s, model) if row.kind is ProbeKind.QUALITY and row.config.seed == seed]
    return [row for row in rows if not row.outcome.is_oom]


def _runs(s: Situation, model: Model, point: Point) -> list[ProbeRow]:
    rows = [row for row in _rows(s, model) if row.kind is ProbeKind.END_TO_END]
    return [row for row in rows if point_of(row.config) == point]


def scores(s: Situation, model: Model) -> dict[int, float]:
    """The metric by seed; only what was measured, and is a number."""
    found = {}
    for seed in _seeds(s.view.spec):
        for row in _tries(s, model, seed):
            value = row.values.get(_constraint(s).metric, math.nan)
            if row.outcome is Outcome.OK and math.isfinite(value):
                found[seed] = value
    return found


def _failure(s: Situation, model: Model) -> str:
    """Why a seed that is settled has no score; empty = none such."""
    done = scores(s, model)
    for seed in _seeds(s.view.spec):
        rows = _tries(s, model, seed)
        if seed not in done and is_settled(rows, retry_fluke=True):
            return _why(rows[-1], _constraint(s).metric)
    return ""


def _why(row: ProbeRow, metric: str) -> str:
    if row.outcome is not Outcome.OK:
        return f"{row.outcome.value}: {row.message}"
    if metric in row.values:
        return f"{metric} was not finite"
    return f"quality.metric: {metric!r} is not measured here; known: {', '.join(sorted(row.values)) or 'none'}"


@dataclass(frozen=True)
class Compared:
    """The quality of a model beside that of the baseline's, seed by seed."""

    proven: bool = False
    """Not worse than allowed, by the lower bound and not by the mean."""
    value: float = math.nan
    """Mean of the metric."""
    baseline: float = math.nan
    worst: float = -math.inf
    """Lower bound of the mean difference, better counted upwards."""
    confidence: float = 0.0
    """One-sided, of that bound."""
    seeds: int = 0


def compared(s: Situation, model: Model) -> Compared:
    """Paired differences with the one-sided Student bound, its error level shared over the models (Bonferroni)."""
    quality, spec = _constraint(s), s.view.spec
    old, new = scores(s, spec.baseline.options), scores(s, model)
    seeds = [seed for seed in new if seed in old]
    if len(seeds) < quality.seeds:
        return Compared(seeds=len(seeds))
    sign = 1.0 if quality.higher_is_better else -1.0
    error = ERROR_LEVEL / len(other_models(spec))
    worst = mean_interval([sign * (new[seed] - old[seed]) for seed in seeds], 1 - 2 * error).low
    means = [float(np.mean([found[seed] for seed in seeds])) for found in (new, old)]
    return Compared(worst >= -quality.tolerance, means[0], means[1], worst, 1 - error, len(seeds))


def model_change(before: Model, after: Model) -> str:
    """`width 32 -> 16`."""
    names = [name for name in after if after[name] != before.get(name)]
    return ", ".join(f"{name} {before.get(name)} -> {after[name]}" for name in names)


def evidence(s: Situation, model: Model) -> str:
    """The quality figures in words."""
    quality, found = _constraint(s), compared(s, model)
    bound = f"{-found.worst:.3g} worse" if found.worst < 0 else f"{found.worst:.3g} better"
    return (
        f"{quality.metric} {found.value:.4g} against {found.baseline:.4g} of the baseline's model after "
        f"{quality.samples:,} samples, means of {found.seeds} seeds; at worst {bound} "
        f"({100 * found.confidence:.3g} % sure), and {quality.tolerance:g} worse is allowed"
    )


def lever_notes(s: Situation) -> Iterator[str]:
    """What became of every model, each line beginning with `model`."""
    spec = s.view.spec
    models = other_models(spec)
    if spec.quality is None or not models:
        return
    own = spec.baseline.options
    if (failed := _failure(s, own)) or len(scores(s, own)) < spec.quality.seeds:
        yield f"model kept: {failed or _no_time(s)}"
        return
    for model in models:
        yield f"model with {model_change(own, model)}: {_fate(s, model)}"
    if (left_out := len(all_models(spec)) - len(models)) > 0:
        yield f"model: {left_out} more combinations of space.options were not tried; at most {MOST_MODELS} are"


def _no_time(s: Situation) -> str:
    quality = _constraint(s)
    needed = 2 * quality.seeds * s.budget.quality_probe_s + s.budget.end_to_end_s
    return (
        f"the options of space.options were not tried; the quality of two models needs about {needed:.0f} s "
        f"(quality: {quality.samples:,} samples, {quality.seeds} seeds), more than the budget of "
        f"{s.view.spec.budget_s:.0f} s has to spare"
    )


def _fate(s: Situation, model: Model) -> str:
    if cut_of(s, model) is None:
        return "out, it does not fit into memory"
    if why := _failure(s, model):
        return f"out, {why}"
    found = compared(s, model)
    if math.isnan(found.value):
        return f"not proven, the budget left time for {found.seeds} of {_constraint(s).seeds} seeds"
    if not found.proven:
        return f"not taken, its quality is not proven: {evidence(s, model)}"
    measured = _measured(s, model)
    if measured is None:
        return f"not taken, its speed was not measured (budget, or it failed): {evidence(s, model)}"
    ratio = measured[1] / s.forecast.measured_worth(s.forecast.leader)
    finalist = measured[0] == lever_finalist(s)
    verdict = "a finalist of the ship gate" if finalist else "not taken, too slow"
    return f"{verdict}, {ratio:.2f}x the best of the unchanged model in the search: {evidence(s, model)}"
