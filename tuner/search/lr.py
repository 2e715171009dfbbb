"""The lr stage: loss at equal samples for a few rates, the same data and noise, several seeds.

Short runs favour rates that are too small (Wu et al., arXiv 1803.02021), so the stage may veto a rate, suggests one
only with a label, and replaces the baseline's only when told to (`LrSpec.tune`) and the gain is significant.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tuner.contract.measurement import Outcome
from tuner.contract.probe import ProbeKind, ProbeRequest, ProbeRow, Stage
from tuner.contract.space import Knob
from tuner.contract.statistics import mean_interval
from tuner.contract.study import StudySpec
from tuner.search.history import is_settled
from tuner.search.points import config_of, lr_factor, with_rate
from tuner.search.requests import make_request
from tuner.search.situation import Situation

EXPLOSION = 1.5
"""A final loss above this multiple of the first is a veto."""
ENDS = 0.1
"""Share of the steps at either end over which a loss is averaged."""
CONFIDENCE = 0.95


def lr_values(spec: StudySpec) -> tuple[float, ...]:
    """The baseline's rate first, then the others of the space."""
    own = spec.baseline.optimizer.lr
    return (own, *sorted(set(spec.space.values(Knob.LR, spec.baseline)) - {own}))


def wanted(spec: StudySpec) -> bool:
    return spec.lr.enabled and len(lr_values(spec)) > 1


def lr_stage(s: Situation) -> ProbeRequest | None:
    """One process per rate and seed at the leading configuration; by seeds, so that a cut-off leaves whole rounds."""
    spec = s.view.spec
    if not wanted(spec):
        return None
    for seed, lr in _plan(spec):
        if not is_settled(rows_of(s.history.search, spec, lr, seed), retry_fluke=True):
            return _request(s, lr, seed) if s.budget.allows_lr() else None
    return None


def _plan(spec: StudySpec) -> list[tuple[int, float]]:
    seeds = [spec.baseline.seed + number for number in range(spec.lr.seeds)]
    return [(seed, lr) for seed in seeds for lr in lr_values(spec)]


def _request(s: Situation, lr: float, seed: int) -> ProbeRequest:
    spec = s.view.spec
    config = with_rate(config_of(spec, s.forecast.leader), spec.baseline, lr).model_copy(update={"seed": seed})
    return make_request(s.history, ProbeKind.LR, Stage.LR, [config], samples=spec.lr.samples)


def rows_of(rows: Sequence[ProbeRow], spec: StudySpec, lr: float, seed: int) -> list[ProbeRow]:
    """Rows of a rate as it is named for the baseline's effective batch size."""
    return [
        row
        for row in rows
        if row.kind is ProbeKind.LR and row.config.seed == seed and math.isclose(_named_rate(row, spec), lr)
    ]


def _named_rate(row: ProbeRow, spec: StudySpec) -> float:
    return row.config.optimizer.lr / lr_factor(row.config, spec.baseline)


@dataclass(frozen=True)
class Trace:
    """How the loss of one rate and seed went; not finite where it broke down."""

    first: float
    final: float

    @property
    def vetoed(self) -> bool:
        return not math.isfinite(self.final) or (self.first > 0 and self.final > EXPLOSION * self.first)


def trace_of(row: ProbeRow) -> Trace | None:
    """None when the row tells nothing about the rate: a crash, a timeout, no losses."""
    if row.outcome is Outcome.DIVERGED:
        return Trace(0.0, math.nan)
    losses = row.measurement.losses.get("total", ()) if row.measurement is not None else ()
    if row.outcome is not Outcome.OK or not (losses or "final_loss" in row.values):
        return None
    count = max(1, round(ENDS * len(losses)))
    first = row.values.get("first_loss", float(np.mean(losses[:count])) if losses else 0.0)
    final = row.values.get("final_loss", float(np.mean(losses[-count:])) if losses else math.nan)
    return Trace(first, final)


def traces(rows: Sequence[ProbeRow], spec: StudySpec) -> dict[float, dict[int, Trace]]:
    """By rate and seed; only what was measured."""
    found: dict[float, dict[int, Trace]] = {}
    for seed, lr in _plan(spec):
        for row in rows_of(rows, spec, lr, seed):
            if (trace := trace_of(row)) is not None:
                found.setdefault(lr, {})[seed] = trace
    return found


@dataclass(frozen=True)
class LrVerdict:
    vetoed: tuple[float, ...] = ()
    suggested: float | None = None
    """The rate with the lowest loss, when it is not the baseline's. Unverified unless `significant`."""
    significant: bool = False
    ratio: tuple[float, float, float] | None = None
    """Final loss under the suggested rate over the baseline's: value, low, high."""
    seeds: int = 0
    measured: int = 0
    """Rates with at least one trace."""


def judge(rows: Sequence[ProbeRow], spec: StudySpec) -> LrVerdict:
    found = traces(rows, spec)
    vetoed = tuple(lr for lr, by_seed in found.items() if any(trace.vetoed for trace in by_seed.values()))
    sound = {lr: by_seed for lr, by_seed in found.items() if lr not in vetoed}
    own = spec.baseline.optimizer.lr
    if not sound:
        return LrVerdict(vetoed=vetoed, measured=len(found))
    shared = _shared_seeds(sound)
    best = min(sound, key=lambda lr: (_mean_final(sound[lr], shared), lr != own))
    suggested = best if best != own else None
    if suggested is None or own not in sound:
        return LrVerdict(vetoed, suggested, measured=len(found), seeds=len(sound[best]))
    return _compared(vetoed, sound, own, best, len(found), len(lr_values(spec)) - 1)


def _shared_seeds(sound: dict[float, dict[int, Trace]]) -> set[int]:
    """Seeds every rate was measured with: a budget that ended within a round leaves some rates with one more, and means
    over different seeds do not compare. Where no seed is shared, all."""
    seeds = [set(by_seed) for by_seed in sound.values()]
    return set.intersection(*seeds) or set.union(*seeds)


def _mean_final(by_seed: dict[int, Trace], seeds: set[int]) -> float:
    return float(np.mean([trace.final for seed, trace in by_seed.items() if seed in seeds]))


def _compared(
    vetoed: tuple[float, ...],
    sound: dict[float, dict[int, Trace]],
    own: float,
    best: float,
    measured: int,
    rivals: int,
) -> LrVerdict:
    """Paired over the seeds (common random numbers); the error level is shared over the rates compared."""
    pairs = [(sound[best][seed].final, sound[own][seed].final) for seed in sound[best] if seed in sound[own]]
    logs = [math.log(new / old) for new, old in pairs if new > 0 and old > 0]
    if not logs:
        return LrVerdict(vetoed, best, measured=measured)
    inner = mean_interval(logs, 1 - (1 - CONFIDENCE) / max(1, rivals))
    ratio = tuple(math.exp(min(700.0, max(-700.0, value))) for value in (inner.value, inner.low, inner.high))
    return LrVerdict(vetoed, best, inner.high < 0, (ratio[0], ratio[1], ratio[2]), len(logs), measured)


def chosen_lr(rows: Sequence[ProbeRow], spec: StudySpec) -> float | None:
    """The rate that replaces the baseline's, or None: only under `tune`, and only for a significant gain.

    When the baseline's own rate is vetoed there is nothing to compare with, and `tune` takes the best sound one.
    """
    if not spec.lr.tune:
        return None
    verdict = judge(rows, spec)
    if verdict.suggested is None:
        return None
    return verdict.suggested if verdict.significant or spec.baseline.optimizer.lr in verdict.vetoed else None


def lr_notes(rows: Sequence[ProbeRow], spec: StudySpec) -> list[str]:
    """What a reader should know, each line beginning with `lr`."""
    if not wanted(spec):
        return []
    verdict, own = judge(rows, spec), spec.baseline.optimizer.lr
    if not verdict.measured:
        return ["lr: not probed, the budget left no time for it; no other rate than the baseline's was tried"]
    notes = [f"lr {lr:g}: vetoed, the loss broke down within {spec.lr.samples} samples" for lr in verdict.vetoed]
    kept = chosen_lr(rows, spec)
    if own in verdict.vetoed and kept is None:
        notes.append(f"lr {own:g} is the baseline's own and is kept, as nothing else was asked for: use --tune-lr")
    if kept is not None:
        notes.append(f"lr: {own:g} replaced by {kept:g}{_evidence(verdict, spec)}")
    elif verdict.suggested is not None:
        notes.append(f"lr {verdict.suggested:g}: suggested, unverified{_evidence(verdict, spec)}; {own:g} is kept")
    elif own not in verdict.vetoed:
        notes.append(f"lr {own:g} kept: no other of {verdict.measured} rates had a lower loss, {_horizon(spec)}")
    return notes + _scale_notes(rows, spec)


def _scale_notes(rows: Sequence[ProbeRow], spec: StudySpec) -> list[str]:
    """Rates are named for the baseline's effective batch size, and were measured at the leader's."""
    own = spec.baseline.effective_batch_size
    sizes = {row.config.effective_batch_size: row.config for row in rows if row.kind is ProbeKind.LR}
    factors = {size: lr_factor(config, spec.baseline) for size, config in sizes.items() if size != own}
    return [
        f"lr: rates are named for the effective batch of {own}; at {size} they were {factor:.4g} times that, by rule"
        for size, factor in factors.items()
    ]


def _evidence(verdict: LrVerdict, spec: StudySpec) -> str:
    if verdict.ratio is None:
        return f" ({_horizon(spec)})"
    value, low, high = verdict.ratio
    bounds = f", interval {low:.3f} to {high:.3f}" if verdict.seeds > 1 else ""
    return f" (loss {value:.3f} of the baseline's{bounds}, {verdict.seeds} seeds, {_horizon(spec)})"


def _horizon(spec: StudySpec) -> str:
    share = spec.lr.samples / spec.baseline.horizon_samples
    return f"after {spec.lr.samples} samples, {100 * share:.2g} % of the run"
