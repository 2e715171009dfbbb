"""Goodput: what another effective batch size is worth, from the gradient noise scale. It measures nothing.

The noise scale phi (McCandlish et al., arXiv 1812.06162) says how many samples a gradient may average before more of
them teach little: progress per sample falls as 1 / (phi + B). Goodput is throughput times that efficiency (Pollux,
OSDI'21). Sizes are effective batch sizes in samples, over all devices.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from tuner.contract.config import OptimizerName
from tuner.contract.measurement import Interval, Outcome
from tuner.contract.probe import ProbeKind, ProbeRow, Stage
from tuner.contract.study import Objective, StudySpec
from tuner.search.model import StepFit
from tuner.search.points import optimizer_rule, sample_values

REACH = 1.0
"""Sizes above this multiple of the noise scale are not proposed: up to about there the lr rule holds, beyond it the
best rate grows no further or falls (Li et al., arXiv 2405.14578)."""
NEAR = 1.25
"""A size stands for every other within this ratio of it."""


def efficiency(phi: float, batch: float, reference: float) -> float:
    """Progress per sample at `batch` over that at `reference`: (phi + reference) / (phi + batch)."""
    return (phi + reference) / (phi + batch)


def best_batch(phi: float, alpha: float, omega: float, beta: float) -> float:
    """The size of one undivided micro-batch with the best goodput: sqrt(phi * (alpha + omega) / beta).

    `alpha` and `omega` are seconds per step whatever the size, `beta` seconds per sample. It is where the derivative of
    (alpha + omega + beta * B) * (phi + B) / B is zero; infinite where a sample costs nothing.
    """
    return math.sqrt(phi * (alpha + omega) / beta) if beta > 0 else math.inf


def best_samples(phi: float, fit: StepFit, micro: int) -> float:
    """`best_batch` on one device where memory caps the micro-batch at `micro` samples: above it the step accumulates,
    and alpha counts once per micro-batch."""
    whole = best_batch(phi, fit.alpha, fit.omega, fit.beta)
    if whole <= micro:
        return whole
    return max(float(micro), best_batch(phi, 0.0, fit.omega, fit.beta + fit.alpha / micro))


def usable_samples(spec: StudySpec, phi: float | None, best: float | None, micros: Sequence[int]) -> tuple[int, ...]:
    """Samples per step and device that may be tried, the baseline's first.

    Where the size is free: the listed ones the lr rule reaches, and `best` where none of them is near it, as a multiple
    of one of `micros` and within the range listed. Without a noise scale the baseline's alone.
    """
    own, *others = sample_values(spec)
    if spec.effective_batch is not None or phi is None:
        return (own,)
    world = spec.baseline.world_size
    kept = [own, *(size for size in others if not refusal(spec, size * world, phi))]
    extra = _rounded(best, micros, min(own, *others), max(own, *others)) if best is not None and others else None
    near = extra is None or any(max(extra, size) <= NEAR * min(extra, size) for size in kept)
    if extra is not None and not near and not refusal(spec, extra * world, phi):
        kept.append(extra)
    return tuple(kept)


def _rounded(best: float, micros: Sequence[int], least: int, most: int) -> int | None:
    """`best` as so many of the largest micro-batch that it can be made of; None outside the range."""
    if not micros or not least <= best <= most:
        return None
    unit = max((micro for micro in micros if micro <= best), default=min(micros))
    size = unit * max(1, round(best / unit))
    return size if least <= size <= most else None


def refusal(spec: StudySpec, size: int, phi: float) -> str:
    """Why an effective batch size is not proposed; empty where it may be."""
    own = spec.baseline.effective_batch_size
    if size > own and size > REACH * phi:
        return f"beyond {REACH:g} x the noise scale of {phi:.3g}, where the lr rule no longer holds"
    try:
        optimizer_rule(spec.baseline.optimizer, size / own)
    except ValueError as error:
        return f"{size / own:g} times the baseline's: {error}"
    return ""


def noise_scale(rows: Sequence[ProbeRow], spec: StudySpec) -> Interval | None:
    """The noise scale of the study's own model in samples, from its last noise probe; None = unknown.

    Unknown too where the gradient did not stand out from its noise: no upper end, so no figure to build on.
    """
    for row in reversed(noise_rows(rows, spec)):
        values = row.values
        if row.outcome is Outcome.OK and {"noise_scale", "noise_high"} <= values.keys():
            return Interval(value=values["noise_scale"], low=values.get("noise_low", 0.0), high=values["noise_high"])
    return None


def noise_rows(rows: Sequence[ProbeRow], spec: StudySpec) -> list[ProbeRow]:
    """The study's noise probes, in order; those made by hand are none."""
    wanted = (ProbeKind.NOISE, Stage.NOISE, spec.baseline.options)
    return [row for row in rows if (row.kind, row.stage, row.config.options) == wanted]


def batch_notes(rows: Sequence[ProbeRow], spec: StudySpec, best: float | None, tried: Sequence[int]) -> Iterator[str]:
    """What a reader should know of a free effective batch. `tried`: the effective batch sizes that were proposed."""
    own, listed = spec.baseline.effective_batch_size, sample_values(spec)
    if len(listed) < 2:
        yield f"effective batch free, but space.effective_batch_size lists nothing besides {own}: it is kept"
        return
    phi = noise_scale(rows, spec)
    if phi is None:
        yield f"effective batch kept at {own}, though free: the gradient noise scale is unknown: {_unknown(rows, spec)}"
        return
    values = noise_rows(rows, spec)[-1].values
    yield (
        f"gradient noise scale {phi.value:.3g} samples ({phi.low:.3g} to {phi.high:.3g}) after "
        f"{values.get('warm_samples', 0):.0f} samples of training; it grows in a longer run"
    )
    optimum = f"; by the closed form about {best * spec.baseline.world_size:.3g} is best" if best is not None else ""
    if spec.objective is Objective.THROUGHPUT:
        yield "effective batch free: sizes are compared by samples/s alone, as --objective throughput asks"
    else:
        yield (
            f"effective batch free: sizes are compared by goodput, which is throughput x ({phi.value:.3g} + {own}) / "
            f"({phi.value:.3g} + size){optimum}"
        )
    yield from _size_notes(spec, phi.value, tried)


def _size_notes(spec: StudySpec, phi: float, tried: Sequence[int]) -> Iterator[str]:
    world, own = spec.baseline.world_size, spec.baseline.effective_batch_size
    for size in sorted({*tried, *(samples * world for samples in sample_values(spec))} - {own}):
        why = refusal(spec, size, phi)
        yield f"effective batch {size} not proposed: {why}" if why else _rule_note(spec, size, phi)


def _rule_note(spec: StudySpec, size: int, phi: float) -> str:
    """Which rule was applied, with its numbers."""
    before, own = spec.baseline.optimizer, spec.baseline.effective_batch_size
    factor = size / own
    after = optimizer_rule(before, factor)
    if before.name is OptimizerName.SGD:
        rule = f"SGD: lr {before.lr:g} x {factor:g} = {after.lr:.4g}"
    else:
        betas = ", ".join(f"{old:g} -> {new:g}" for old, new in zip(before.betas, after.betas, strict=True))
        rule = (
            f"{before.name.value}: lr {before.lr:g} x sqrt({factor:g}) = {after.lr:.4g}, betas {betas}, "
            f"eps {before.eps:g} -> {after.eps:.3g}"
        )
    share = efficiency(phi, size, own)
    return f"effective batch {size}: {rule}; each sample teaches {share:.2f} of what it does at {own}; unverified"


def _unknown(rows: Sequence[ProbeRow], spec: StudySpec) -> str:
    found = noise_rows(rows, spec)
    if not found:
        return "the budget left no time to measure it"
    last = found[-1]
    if last.outcome is not Outcome.OK:
        return f"its probe ended with {last.outcome.value}: {last.message}"
    low = last.values.get("noise_low", 0.0)
    return f"the gradient does not stand out from its noise (at least {low:.3g} samples)"
