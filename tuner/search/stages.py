"""The stages before anything is compared end to end: baseline, equivalence, loader, flags, batch sizes, compile modes.

Each is a function of the situation that returns the next request, or None when it has nothing left to ask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tuner.contract.config import CompileMode
from tuner.contract.measurement import Outcome
from tuner.contract.probe import ProbeKind, ProbeRequest, ProbeRow, Stage
from tuner.contract.space import Knob
from tuner.contract.study import Objective
from tuner.search.budget import COLD_COMPILE_S
from tuner.search.forecast import LEAST_NOISE
from tuner.search.history import is_ok
from tuner.search.points import (
    FLAG_KNOBS,
    Point,
    Variant,
    as_loader,
    config_of,
    flag_values,
    prefetch_values,
    sample_values,
    with_batch,
    with_flag,
    worker_values,
)
from tuner.search.requests import make_request
from tuner.search.situation import Situation
from tuner.search.tracing import tracing
from tuner.search.view import View

GAIN = 1 + LEAST_NOISE
"""Ratio of step times from which a flag counts as a gain."""
MAX_WORKER_VALUES = 6
LOADER_MATTERS = 0.5
"""Loader seconds per sample, as a share of the reference's total, from which prefetch is worth probing."""
RIVAL = 0.97
"""A second variant is followed through the batch sizes when its speed is at least this share of the best."""
SIZES = 3
"""Batch sizes measured per surviving variant."""
WORTH_RECOMPUTING = 1.10
"""Recomputing activations costs about a third of the compute: larger batches must promise at least this much."""
COMPILE_ORDER = (
    CompileMode.EAGER,
    CompileMode.DEFAULT,
    CompileMode.REDUCE_OVERHEAD,
    CompileMode.CUDAGRAPHS,
    CompileMode.MAX_AUTOTUNE,
)
_CHEAP_MODES = {CompileMode.EAGER: 0.0, CompileMode.CUDAGRAPHS: 10.0}
AUTOTUNE_TIMES = 3.0
COMPILE_HOPE = {"cuda": 1.5, "cpu": 1.15}
"""Speed-up a compile mode is given credit for before it is measured."""
COMPILE_SHARE = 0.5
"""Largest share of what is left of the budget that one compile probe may be expected to take."""


@dataclass(frozen=True)
class Failed:
    """Not even the baseline can be measured."""

    reason: str


def baseline(view: View) -> ProbeRequest | Failed | None:
    """The baseline end to end, before everything else; where it cannot run here, what stands in for it."""
    for point in view.ladder:
        if not view.history.settled(ProbeKind.END_TO_END, point, must=True):
            return make_request(view.history, ProbeKind.END_TO_END, Stage.BASELINE, [config_of(view.spec, point)])
        if view.reference is not None:
            return None
        if not view.fails_for_good(point) or (point == view.ladder[-1] and not view.overflows(point)):
            return Failed(_failure(view, point))
    return Failed(
        f"the baseline does not fit into memory, not even with one sample at a time ({len(view.ladder)} tried)"
    )


def standin_label(view: View, point: Point) -> str:
    if point == view.baseline:
        return "the baseline"
    same = point.micro == view.baseline.micro
    return "the baseline without loader workers" if same else f"the baseline cut to {point.micro}x{point.accumulation}"


def _failure(view: View, point: Point) -> str:
    rows = view.history.of(ProbeKind.END_TO_END, point)
    last: ProbeRow = rows[-1]
    times = "once" if len(rows) == 1 else f"{len(rows)} times"
    label = standin_label(view, point)
    if last.outcome is Outcome.CONTENDED:
        return f"{label} is unmeasurable here: tried {times}, and something else used the machine: {last.message}"
    why = last.message or "no steady step was measured"
    return f"{label} could not be measured ({times}): {last.outcome.value}: {why}"


def equivalence(s: Situation) -> ProbeRequest | None:
    """Gradient of the baseline's cut against another cut of the same batch, in fp32."""
    if s.view.equivalence:
        return None
    for pair in s.view.equivalence_pairs:
        if not s.view.equivalence_settled(pair):
            affordable = s.budget.allows(s.budget.point_s)
            return s.request(ProbeKind.EQUIVALENCE, Stage.EQUIVALENCE, pair) if affordable else None
    return None


def noise(s: Situation) -> ProbeRequest | None:
    """The gradient noise scale, once, where the effective batch is free: without it no other size is tried."""
    spec, point = s.view.spec, s.forecast.reference
    if spec.effective_batch is not None or len(sample_values(spec)) < 2:
        return None
    if s.history.settled(ProbeKind.NOISE, point) or not s.budget.allows(s.budget.noise_s):
        return None
    return make_request(s.history, ProbeKind.NOISE, Stage.NOISE, [config_of(spec, point)], samples=spec.lr.samples)


def loader(s: Situation) -> ProbeRequest | None:
    """The loader alone, over workers; over prefetch only where it could limit the training."""
    workers, prefetches = _few_workers(s), prefetch_values(s.view.spec)
    own = s.view.spec.baseline.loader.prefetch_factor
    if len(workers) < 2 and (len(prefetches) < 2 or not any(workers)):
        return None
    first = [s.view.anchor._replace(loader=as_loader(count, own)) for count in workers]
    if request := s.measure(ProbeKind.LOADER, Stage.LOADER, first, s.budget.loader_s):
        return request
    known = {p.loader: s.view.loading.per_sample[p.loader] for p in first if p.loader in s.view.loading.per_sample}
    if not known:
        return None
    best = min(known, key=lambda item: (known[item], item))
    if not best.workers or known[best] * s.forecast.rates[s.forecast.reference] < LOADER_MATTERS:
        return None
    second = [s.view.anchor._replace(loader=as_loader(best.workers, prefetch)) for prefetch in prefetches]
    return s.measure(ProbeKind.LOADER, Stage.LOADER, second, s.budget.loader_s)


def _few_workers(s: Situation) -> tuple[int, ...]:
    """At most a handful of worker counts, the smallest, the largest and the reference's among them."""
    values = worker_values(s.view.spec)
    if len(values) <= MAX_WORKER_VALUES:
        return values
    step = (len(values) - 1) / (MAX_WORKER_VALUES - 2)
    kept = {values[round(index * step)] for index in range(MAX_WORKER_VALUES - 1)}
    return tuple(sorted(kept | {s.forecast.reference.loader.workers}))


def flags(s: Situation) -> ProbeRequest | None:
    """Each flag alone against the base in one process, then the winners together."""
    if request := s.measure(ProbeKind.COMPUTE, Stage.FLAGS, list(_screen(s)), s.budget.point_s):
        return request
    combined = combination(s)
    points = [s.view.anchor._replace(variant=combined)]
    return s.measure(ProbeKind.COMPUTE, Stage.FLAGS, points, s.budget.point_s)


def _screen(s: Situation) -> Iterator[Point]:
    anchor, base = s.view.anchor, s.view.base
    yield anchor
    if s.forecast.reference.samples == anchor.samples:
        yield s.forecast.reference
    for knob, value in single_flips(s):
        yield anchor._replace(variant=with_flag(base, knob, value))
    if base.gradient_checkpointing and False in flag_values(s.view.spec, Knob.GRADIENT_CHECKPOINTING):
        without = anchor._replace(variant=base._replace(gradient_checkpointing=False))
        yield with_batch(without, s.view.micro_values(anchor.samples)[0], anchor.samples)
        own = s.forecast.reference.micro  # where it is on, and would be turned off
        if anchor.samples % own == 0 and s.view.memory.fits(without.variant, own):
            yield with_batch(without, own, anchor.samples)


def single_flips(s: Situation) -> Iterator[tuple[Knob, Any]]:
    for knob in FLAG_KNOBS:
        for value in flag_values(s.view.spec, knob):
            if value != getattr(s.view.base, knob.value):
                yield knob, value


def combination(s: Situation) -> Variant:
    """The base with the best value of every flag that gained alone."""
    variant, best = s.view.base, dict.fromkeys(FLAG_KNOBS, 1 / GAIN)
    for knob, value in single_flips(s):
        ratio = s.view.steps.flag_ratio(knob, value)
        if ratio is not None and ratio < best[knob]:
            best[knob] = ratio
            variant = with_flag(variant, knob, value)
    return variant


def ranked_variants(s: Situation) -> list[Variant]:
    """Variants of the base's compile mode measured at the anchor, fastest first; the base wins where it is a draw."""
    anchor, base = s.view.anchor, s.view.base
    times: dict[Variant, float] = {}
    for variant in s.view.steps.cuts:
        same = (variant.compile, variant.gradient_checkpointing) == (base.compile, base.gradient_checkpointing)
        step = s.view.steps.measured(variant, anchor.micro, anchor.accumulation)
        if same and step is not None:
            times[variant] = step
    if base in times:
        times[base] /= GAIN
    return sorted(times, key=lambda variant: times[variant])


def lead_variant(s: Situation) -> Variant:
    return next(iter(ranked_variants(s)), s.view.base)


def batch(s: Situation) -> ProbeRequest | None:
    """Two or three batch sizes per surviving variant, for alpha, beta and the peak; recomputing where memory binds."""
    ranked = ranked_variants(s)
    if not ranked:
        return None
    lead = ranked[0]
    points = list(_sizes(s, lead, SIZES))
    for rival in ranked[1:2]:
        if _anchor_step(s, lead) >= RIVAL * _anchor_step(s, rival):
            points += _sizes(s, rival, SIZES - 1)
    if lead != s.view.base:
        points += _sizes(s, s.view.base, SIZES - 1)
    if request := s.measure(ProbeKind.COMPUTE, Stage.BATCH, points, s.budget.point_s):
        return request
    return _recomputing(s, lead)


def _anchor_step(s: Situation, variant: Variant) -> float:
    step = s.view.steps.measured(variant, s.view.anchor.micro, s.view.anchor.accumulation)
    assert step is not None
    return step


def _sizes(s: Situation, variant: Variant, count: int) -> Iterator[Point]:
    """The anchor's size, the largest that fits by the upper error bar, and the next ones below the anchor's."""
    anchor = s.view.anchor._replace(variant=variant)
    fitting = [m for m in s.view.micro_values(anchor.samples) if s.view.memory.fits(variant, m)]
    below = [m for m in reversed(fitting) if m < anchor.micro]
    wanted = [anchor.micro, *[m for m in fitting[-1:] if m > anchor.micro], *below]
    for micro in wanted[:count]:
        yield with_batch(anchor, micro, anchor.samples)
    largest = max(s.view.sample_values)
    if largest > anchor.samples and largest % anchor.micro == 0:
        yield with_batch(anchor, anchor.micro, largest)


def _recomputing(s: Situation, lead: Variant) -> ProbeRequest | None:
    """Gradient checkpointing, where a batch that does not fit without it would pay for recomputing."""
    if lead.gradient_checkpointing or True not in flag_values(s.view.spec, Knob.GRADIENT_CHECKPOINTING):
        return None
    sizes = s.view.micro_values(s.view.samples)
    best, dream = s.forecast.best_cut(lead), s.forecast.best_cut(lead, ignore_memory=True)
    if best is None or dream is None or s.view.memory.fits(lead, dream.micro):
        return None
    now = s.view.steps.estimate(lead, best.micro, best.accumulation)
    then = s.view.steps.estimate(lead, dream.micro, dream.accumulation)
    assert now is not None
    assert then is not None
    if now.value < WORTH_RECOMPUTING * then.value:
        return None
    variant = lead._replace(gradient_checkpointing=True)
    fitting = [m for m in sizes if s.view.memory.fits(variant, m)]
    points = [with_batch(best._replace(variant=variant), m, best.samples) for m in (best.micro, *fitting[-1:])]
    return s.measure(ProbeKind.COMPUTE, Stage.BATCH, points, s.budget.point_s)


def compiling(s: Situation) -> ProbeRequest | None:
    """The leading variant under each compile mode that could pay, one process each."""
    for point, why_not in compile_plan(s):
        if not why_not and not s.settled(ProbeKind.COMPUTE, point):
            return s.compute_alone(Stage.FLAGS, point)
    return None


def compile_plan(s: Situation) -> Iterator[tuple[Point, str]]:
    """Every other compile mode at the leading variant's best cut, with the reason when it is not probed."""
    lead = lead_variant(s)
    cut = s.forecast.best_cut(lead)
    if cut is None:
        return
    values = flag_values(s.view.spec, Knob.COMPILE)
    for mode in COMPILE_ORDER:
        if mode in values and mode is not s.view.base.compile:
            point = cut._replace(variant=lead._replace(compile=mode))
            asked = s.settled(ProbeKind.COMPUTE, point)
            yield point, "" if asked else _why_not_compile(s, point, cut)


def untried_modes(s: Situation) -> Iterator[tuple[CompileMode, str]]:
    """Compile modes that no row is of, each with why."""
    tried = {row.config.compile for row in s.history.rows}
    yield from ((p.variant.compile, why) for p, why in compile_plan(s) if why and p.variant.compile not in tried)


def _why_not_compile(s: Situation, point: Point, eager: Point) -> str:
    mode, spec = point.variant.compile, s.view.spec
    for rule in (_hopeless, _unpaid):
        if why := rule(s, point, eager):
            return why
    cost = _compile_cost(s, mode)
    if not s.budget.probes_left or cost > COMPILE_SHARE * s.budget.stages_left_s:
        return f"a first compile takes about {cost:.0f} s, more than the budget of {spec.budget_s:.0f} s has to spare"
    return ""


def _hopeless(s: Situation, point: Point, eager: Point) -> str:
    """Modes built upon one that was measured and gained nothing."""
    mode = point.variant.compile
    gains = {m: g for m in COMPILE_ORDER if (g := _compile_gain(s, point, eager, m)) is not None}
    inductor = [gains[m] for m in (CompileMode.DEFAULT, CompileMode.REDUCE_OVERHEAD) if m in gains]
    alike = mode is CompileMode.REDUCE_OVERHEAD and s.view.spec.device.kind == "cpu"
    if (alike or mode is CompileMode.MAX_AUTOTUNE) and inductor and max(inductor) < GAIN:
        return f"the modes it builds on gained nothing here ({max(inductor):.2f}x)"
    return ""


def _compile_gain(s: Situation, point: Point, eager: Point, mode: CompileMode) -> float | None:
    variant = point.variant._replace(compile=mode)
    own = s.view.steps.measured(variant, point.micro, point.accumulation)
    base = s.view.steps.estimate(eager.variant, eager.micro, eager.accumulation)
    return base.value / own if own and base else None


def _unpaid(s: Situation, point: Point, _eager: Point) -> str:
    """Compiling that could not be earned back within the horizon, however well it goes."""
    spec = s.view.spec
    if spec.objective is not Objective.TIME or point.variant.compile in _CHEAP_MODES:
        return ""
    hours_s = spec.baseline.horizon_samples / s.forecast.rates[s.forecast.leader]
    saved = hours_s * (1 - 1 / COMPILE_HOPE[spec.device.kind])
    cost = _compile_cost(s, point.variant.compile)
    if saved > cost:
        return ""
    return f"compiling takes about {cost:.0f} s and could save {saved:.0f} s of this run at best"


def _compile_cost(s: Situation, mode: CompileMode) -> float:
    """Seconds of one compile probe: the dearest seen of a compiler, else what is usual."""
    if mode in _CHEAP_MODES:
        return _CHEAP_MODES[mode] + s.budget.point_s
    seen = [
        row.seconds
        for point, rows in s.history.of_kind(ProbeKind.COMPUTE).items()
        for row in rows
        if is_ok(row) and point.variant.compile not in _CHEAP_MODES
    ]
    cost = max(seen, default=COLD_COMPILE_S[s.view.spec.device.kind])
    return cost * (AUTOTUNE_TIMES if mode is CompileMode.MAX_AUTOTUNE else 1.0)


STAGES: tuple[Callable[[Situation], ProbeRequest | None], ...] = (
    equivalence,
    noise,
    tracing,
    loader,
    flags,
    batch,
    compiling,
)
"""In order; `baseline` comes before them, `refine` after."""
