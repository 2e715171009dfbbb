"""The lr stage: loss at equal samples for a few rates, the same data and noise, several seeds.

Short runs favour rates that are too small (Wu et al., arXiv 1803.02021), so the stage may veto a rate, suggests one
only with a label, and replaces the baseline's only when told to (`LrSpec.tune`) and the gain is significant.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

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
"""A loss that ends above this multiple of where it began has exploded, beyond the noise of its batches."""
ERRORS = 4.0
"""Standard errors a rise must exceed: all rates of a seed begin with the same batch, and it may be a lucky one."""
WHATEVER_NOISE = 10.0
"""A loss that ends above this multiple of its first has exploded whatever the noise, which an explosion makes large."""
LEAST_STEPS = 8
"""With fewer the noise of the batches cannot be told."""
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
    """How the loss of one rate and seed went."""

    final: float
    """Mean of the last quarter of the steps; not finite where it broke down."""
    vetoed: bool


def trace_of(row: ProbeRow) -> Trace | None:
    """None when the row tells nothing about the rate: a crash, a timeout, no losses."""
    if row.outcome is Outcome.DIVERGED:
        return Trace(math.nan, vetoed=True)
    losses = row.measurement.losses.get("total", ()) if row.measurement is not None else ()
    if row.outcome is not Outcome.OK or not losses:
        return None
    finite = [loss for loss in losses if math.isfinite(loss)]  # skipped fp16 steps have none
    if not finite:
        return Trace(math.nan, vetoed=True)
    return Trace(float(np.mean(_last_quarter(finite))), exploded(finite))


def _last_quarter(losses: Sequence[float]) -> Sequence[float]:
    return losses[-max(1, len(losses) // 4) :]


def exploded(losses: Sequence[float]) -> bool:
    """Did the loss end higher than it began, by more than `EXPLOSION` and the noise between batches?

    The last quarter of the steps is held against the first step, before anything was learned (a loss that leaps up at
    once), and against the mean of the first eighth (one that climbs). The noise is the standard deviation of a batch's
    log loss, from the mean difference between neighbouring steps (von Neumann, 1941), in which a trend hardly counts.
    `losses` must be finite; one that reaches 0 has no ratio, and does not explode.
    """
    if min(losses) <= 0:
        return False
    logs = [math.log(loss) for loss in losses]
    last = _last_quarter(logs)
    apart = np.abs(np.diff(logs))
    noise = float(np.mean(apart)) * math.sqrt(math.pi) / 2 if len(logs) >= LEAST_STEPS else math.inf
    for head in (logs[:1], logs[: max(1, len(logs) // 8)]):
        rise = float(np.mean(last) - np.mean(head))
        error = noise * math.sqrt(1 / len(head) + 1 / len(last))
        if rise > min(max(math.log(EXPLOSION), ERRORS * error), math.log(WHATEVER_NOISE)):
            return True
    return False


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
    measured: tuple[float, ...] = ()
    """Rates with at least one trace."""
    lowest: float | None = None
    """The rate with the lowest loss of those not vetoed, the baseline's among them."""

    @property
    def beyond(self) -> str:
        """`smaller` or `larger`: the side on which no rate was tried beside the lowest loss; empty = both were."""
        if self.lowest is None or len(self.measured) < 2 or min(self.measured) < self.lowest < max(self.measured):
            return ""
        return "smaller" if self.lowest == min(self.measured) else "larger"


def judge(rows: Sequence[ProbeRow], spec: StudySpec) -> LrVerdict:
    found = traces(rows, spec)
    vetoed = tuple(lr for lr, by_seed in found.items() if any(trace.vetoed for trace in by_seed.values()))
    sound = {lr: by_seed for lr, by_seed in found.items() if lr not in vetoed}
    own, measured = spec.baseline.optimizer.lr, tuple(sorted(found))
    if not sound:
        return LrVerdict(vetoed=vetoed, measured=measured)
    shared = _shared_seeds(sound)
    best = min(sound, key=lambda lr: (_mean_final(sound[lr], shared), lr != own))
    verdict = LrVerdict(vetoed, best if best != own else None, measured=measured, lowest=best)
    if best == own or own not in sound:
        return replace(verdict, seeds=len(sound[best]))
    return _compared(verdict, sound[own], sound[best], len(lr_values(spec)) - 1)


def _shared_seeds(sound: dict[float, dict[int, Trace]]) -> set[int]:
    """Seeds every rate was measured with: a budget that ended within a round leaves some rates with one more, and means
    over different seeds do not compare. Where no seed is shared, all."""
    seeds = [set(by_seed) for by_seed in sound.values()]
    return set.intersection(*seeds) or set.union(*seeds)


def _mean_final(by_seed: dict[int, Trace], seeds: set[int]) -> float:
    return float(np.mean([trace.final for seed, trace in by_seed.items() if seed in seeds]))


def _compared(verdict: LrVerdict, own: dict[int, Trace], best: dict[int, Trace], rivals: int) -> LrVerdict:
    """Paired over the seeds (common random numbers); the error level is shared over the rates compared."""
    pairs = [(trace.final, own[seed].final) for seed, trace in best.items() if seed in own]
    logs = [math.log(new / old) for new, old in pairs if new > 0 and old > 0]
    if not logs:
        return verdict
    inner = mean_interval(logs, 1 - (1 - CONFIDENCE) / max(1, rivals))
    value, low, high = (math.exp(min(700.0, max(-700.0, log))) for log in (inner.value, inner.low, inner.high))
    return replace(verdict, significant=inner.high < 0, ratio=(value, low, high), seeds=len(logs))


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
        notes.append(f"lr {own:g} is the baseline's own and is kept all the same: {_why_kept(verdict)}")
    if kept is not None:
        notes.append(f"lr: {own:g} replaced by {kept:g}{_evidence(verdict, spec)}")
    elif verdict.suggested is not None:
        what = "not proven lower than the baseline's" if spec.lr.tune else "suggested, unverified"
        notes.append(f"lr {verdict.suggested:g}: {what}{_evidence(verdict, spec)}; {own:g} is kept")
    elif own not in verdict.vetoed:
        notes.append(f"lr {own:g} kept: no other of {len(verdict.measured)} rates had a lower loss, {_horizon(spec)}")
    if verdict.beyond:
        notes.append(
            f"lr: the lowest loss is at the edge of the list ({verdict.lowest:g}): "
            f"a {verdict.beyond} rate was not tried"
        )
    return notes + _scale_notes(rows, spec)


def _why_kept(verdict: LrVerdict) -> str:
    """Why a baseline's rate that was vetoed is not replaced."""
    if verdict.suggested is not None:
        return "use --tune-lr to have it replaced"
    smallest = min(verdict.measured)
    return f"every rate tried was vetoed; list rates below {smallest:g} in the study file (space: lr: [...])"


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
