"""The tables of an explanation: fits, step times, the loader, memory predicted and measured, candidates, settings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from tuner.contract.config import RunConfig
from tuner.contract.explanation import (
    Candidate,
    Effect,
    LoaderPoint,
    LoaderResult,
    MemoryCell,
    StepFitResult,
    StepPoint,
)
from tuner.contract.measurement import Interval
from tuner.contract.probe import ProbeKind, ProbeRow
from tuner.search.belief import process_noise
from tuner.search.explain_case import (
    Case,
    around,
    counted_budget,
    cut_noise,
    good_rows,
    overrun_row,
    probe_words,
    ratio_of_rows,
    redrawn,
    rows_of_size,
    spread,
    variant_name,
)
from tuner.search.forecast import Forecast, noise_of
from tuner.search.gate import Standing, soak_rows, soaked
from tuner.search.history import mean_step_s, rate_of
from tuner.search.memory import Size, affine
from tuner.search.model import MEASURED_ERROR, StepFit
from tuner.search.planner import gate_needed, unmet
from tuner.search.points import Loader, Point, Variant, config_of, differences, point_of
from tuner.search.reasons import changes
from tuner.search.refine import WORTHWHILE
from tuner.search.selection import shipped_side
from tuner.search.stages import untried_modes
from tuner.search.standins import gates, standing
from tuner.search.view import View

KEEPS_UP = 0.01
"""Share of the computation that loading may add, where it does not run beside it, and still count as keeping up."""
UNMEASURED_SHOWN = 3


def step_fits(case: Case) -> tuple[StepFitResult, ...]:
    return tuple(_fit_result(case.view, variant, fit) for variant, fit in case.view.steps.fits.items())


def _fit_result(view: View, variant: Variant, fit: StepFit) -> StepFitResult:
    draws = redrawn(view, variant)
    cuts = {cut[:2] for cut in view.steps.cuts[variant]}
    return StepFitResult(
        variant=variant_name(variant),
        alpha_s=spread(lambda it: it.alpha, fit, draws),
        beta_s=spread(lambda it: it.beta, fit, draws),
        omega_s=spread(lambda it: it.omega, fit, draws),
        residual=fit.residual,
        cuts=len(cuts),
        exact=len(cuts) < 3,
    )


def step_points(case: Case) -> tuple[StepPoint, ...]:
    """Compute probes first, then the search's and the gate's end-to-end rows of the unchanged model."""
    found = [_compute_point(case, variant, index) for variant, index in _cuts(case.view)]
    for point, rows in case.s.forecast.rows.items():
        gate = [row for row in case.s.history.gate if row.config == config_of(case.spec, point)]
        found.append(_end_to_end_point(case, point, [*rows, *good_rows(gate)]))
    return tuple(found)


def _cuts(view: View) -> Iterator[tuple[Variant, int]]:
    for variant, cuts in view.steps.cuts.items():
        for index in range(len(cuts)):
            yield variant, index


def _compute_point(case: Case, variant: Variant, index: int) -> StepPoint:
    cut = case.view.steps.cuts[variant][index]
    return StepPoint(
        variant=variant_name(variant),
        micro_batch_size=cut.micro,
        accumulation_steps=cut.accumulation,
        step_s=around(cut.step_s, 2 * cut_noise(case.view, variant, cut)),
        end_to_end=False,
        chosen=False,
    )


def _end_to_end_point(case: Case, point: Point, rows: Sequence[ProbeRow]) -> StepPoint:
    times = [mean_step_s(row.measurement) for row in rows if row.measurement is not None]
    own = float(np.std(times, ddof=1) / np.mean(times)) if len(times) > 1 else 0.0
    error = 2 * max(MEASURED_ERROR, own, max(noise_of(row) for row in rows) / 2) / math.sqrt(len(times))
    return StepPoint(
        variant=variant_name(point.variant),
        micro_batch_size=point.micro,
        accumulation_steps=point.accumulation,
        step_s=around(float(np.mean(times)), error),
        end_to_end=True,
        chosen=case.same_model and point == case.point,
    )


def loader_result(case: Case) -> LoaderResult:
    per_sample = case.view.loading.per_sample
    points = tuple(
        LoaderPoint(
            num_workers=loader.workers,
            prefetch_factor=loader.prefetch,
            sample_s=around(seconds, _loader_noise(case.view, loader)),
        )
        for loader, seconds in sorted(per_sample.items())
    )
    compute = compute_sample_s(case)
    return LoaderResult(points=points, compute_sample_s=compute, enough_workers=_enough(points, compute))


def compute_sample_s(case: Case) -> float | None:
    """Seconds per sample of the computation alone, measured or fitted; None where nothing tells."""
    if not case.same_model:
        return None
    found = case.view.steps.estimate(case.point.variant, case.point.micro, case.point.accumulation)
    return found.value / case.point.samples if found is not None else None


def _loader_noise(view: View, loader: Loader) -> float:
    rows = [
        row
        for point, asked in view.history.of_kind(ProbeKind.LOADER).items()
        for row in good_rows(asked)
        if point.loader == loader
    ]
    return max([MEASURED_ERROR, *(noise_of(row) for row in rows)])


def _enough(points: Sequence[LoaderPoint], compute_s: float | None) -> int | None:
    if compute_s is None:
        return None
    limits = ((p.num_workers, p.sample_s.value / compute_s, 1.0 if p.num_workers else KEEPS_UP) for p in points)
    return min((workers for workers, share, limit in limits if share <= limit), default=None)


def memory_cells(case: Case) -> tuple[MemoryCell, ...]:
    """Every variant and size that ran, or ran out of memory, each predicted from the rows of all others."""
    view = case.view
    sizes = set(view.history.shares) | view.history.overrun_sizes
    return tuple(_memory_cell(view, size) for size in sorted(sizes))


def _memory_cell(view: View, size: Size) -> MemoryCell:
    own = rows_of_size(view, size)
    others = View(view.spec, [row for row in view.history.rows if row not in own])
    share = view.history.shares.get(size)
    worst = next((row.outcome for row in own if row.outcome.is_oom), own[-1].outcome)
    predicted = predicted_share(others, size)
    return MemoryCell(
        variant=_sized(size),
        micro_batch_size=size.micro,
        outcome=worst,
        measured_share=share,
        measured_bytes=share * counted_budget(view.spec) if share is not None else None,
        predicted_share=predicted,
        below_bar=share <= predicted.high if predicted and share is not None else None,
    )


def predicted_share(view: View, size: Size) -> Interval | None:
    """Share of the memory budget by the model; `high` is the bar the gate uses; None = no row tells anything.

    Without a trace the guess is a straight line through the variant's own sizes, which a convex peak never goes below.
    """
    upper = view.memory.upper(*size)
    if not math.isfinite(upper):
        return None
    expected = view.memory.expected(*size)
    if expected is not None:
        return Interval(value=min(expected, upper), low=max(0.0, min(2 * expected - upper, upper)), high=upper)
    own = {other.micro: share for other, share in view.history.shares.items() if other.variant == size.variant}
    value = min(upper, affine(own, size.micro)) if own else upper
    return Interval(value=value, low=value, high=upper)


def candidates(case: Case) -> tuple[Candidate, ...]:
    """What ran end to end, best first, then what failed, then the best guesses that were not measured."""
    f = case.s.forecast
    whole = standing(case.s) if gate_needed(case.s) else None
    ranked = sorted(f.rates, key=f.measured_worth, reverse=True)
    found = [_measured_candidate(case, _gate_of(case, whole, point), point) for point in ranked]
    for state in gates(whole) if whole else ():
        found += [_other_model(case, state, side) for side in _other_models(case, state)]
    found += [
        _failed_candidate(case, point, rows[-1])
        for point, rows in case.s.history.of_kind(ProbeKind.END_TO_END).items()
        if point not in f.rates
    ]
    return (*found, *_unmeasured(case))


def _measured_candidate(case: Case, state: Standing | None, point: Point) -> Candidate:
    f = case.s.forecast
    config = config_of(case.spec, point)
    side = _side_of(state, config)
    return Candidate(
        label=case.spec.label(config),
        predicted=_foretold(case, point),
        measured=_as_measured(case, point),
        at_usual_speed=around(f.rates[point], f.noise(point)) if case.s.history.host_moved else None,
        gate=state.gain(side) if state and side else None,
        pairs=len(state.pairs.get(side, ())) if state and side else 0,
        verdict=_verdict(case, state, point, side),
    )


def _as_measured(case: Case, point: Point) -> Interval:
    """Mean over the point's processes of what they measured, and at least from the slowest to the fastest of them."""
    rates = [rate_of(row) for row in case.s.forecast.rows[point]]
    noise = process_noise([rate_of(row) for row in rows] for rows in case.s.forecast.rows.values())
    mean = around(float(np.mean(rates)), 2 * noise / math.sqrt(len(rates)))
    return mean.model_copy(update={"low": min(mean.low, *rates), "high": max(mean.high, *rates)})


def _gate_of(case: Case, state: Standing | None, point: Point) -> Standing | None:
    """The gate it stood in: the last one, or one before it."""
    config = config_of(case.spec, point)
    found = (one for one in gates(state) if _side_of(one, config)) if state else iter(())
    return next(found, state)


def _side_of(state: Standing | None, config: RunConfig) -> int | None:
    """Its side in the gate, whatever lr it stood there with; None = it did not stand there."""
    sides = state.contest.sides if state else ()
    same = (
        i for i, other in enumerate(sides) if other.options == config.options and point_of(other) == point_of(config)
    )
    return next(same, None)


def _foretold(case: Case, point: Point) -> Interval | None:
    """What the model said from the rows before the first of `point`."""
    first = min(row.number for row in case.s.forecast.rows[point])
    before = View(case.spec, [row for row in case.s.history.rows if row.number < first])
    found = Forecast(before).rate(point) if before.reference is not None else None
    return around(found.value, found.error) if found is not None else None


def _verdict(case: Case, state: Standing | None, point: Point, side: int | None) -> str:
    shipped = state is not None and side == shipped_side(case.s, state)
    if point == case.s.forecast.reference:
        stays = case.decision is not None and (shipped or state is None)
        return "the reference, and it stays" if stays else "the reference"
    if state is None or side is None:
        return _not_a_finalist(case, point)
    return "shipped" if shipped else _lost(case, state, side)


def _not_a_finalist(case: Case, point: Point) -> str:
    f = case.s.forecast
    if point == f.leader:
        return "the best so far; the ship gate has not judged it"
    share = f.measured_worth(point) / f.measured_worth(f.leader)
    if share < 1 - math.hypot(f.noise(point), f.noise(f.leader)):
        return f"{100 * (1 - share):.1f} % below the leader in the search"
    stood = "which stood for it in the ship gate" if case.s.history.gate else "and no ship gate was run"
    return f"within the noise of the leader, {stood}"


def _lost(case: Case, state: Standing, side: int) -> str:
    if side in state.out:
        return f"out: {state.out[side]}"
    if side not in state.won:
        if case.decision is None:
            return f"not judged yet: {len(state.pairs.get(side, ()))} pairs measured"
        return "not proven: its interval in the ship gate does not lie above 1, or its gain is too small"
    config = state.contest.sides[side]
    if soak_rows(case.s, config) and not soaked(case.s, config):
        return "proven, but its soak failed"
    return "proven too; the one shipped gained more, or as much with fewer changes"


def _other_models(case: Case, state: Standing | None) -> list[int]:
    sides = state.contest.sides if state else ()
    return [i for i, config in enumerate(sides) if config.options != case.spec.baseline.options]


def _other_model(case: Case, state: Standing | None, side: int) -> Candidate:
    assert state is not None
    shipped = side == shipped_side(case.s, state)
    return Candidate(
        label=case.spec.label(state.contest.sides[side]),
        predicted=None,
        measured=None,
        gate=state.gain(side),
        pairs=len(state.pairs.get(side, ())),
        verdict="shipped: another model, its quality proven" if shipped else _lost(case, state, side),
    )


def _failed_candidate(case: Case, point: Point, row: ProbeRow) -> Candidate:
    why = row.outcome.value if row.measurement is None else "its peak memory passed the budget"
    return Candidate(
        label=case.spec.label(config_of(case.spec, point)),
        predicted=None,
        measured=None,
        gate=None,
        verdict=f"{why}: {row.message}" if row.message else why,
    )


def _unmeasured(case: Case) -> Iterator[Candidate]:
    f = case.s.forecast
    hopes = [(found, point) for point in f.grid() if (found := f.optimistic(point)) is not None]
    for hope, point in sorted(hopes, key=lambda pair: pair[0], reverse=True)[:UNMEASURED_SHOWN]:
        rate = f.rate(point)
        bound = hope / f.measured_worth(f.leader)
        open_ = _why_open(case) if bound > WORTHWHILE else "too little to be worth a probe"
        yield Candidate(
            label=case.spec.label(config_of(case.spec, point)),
            predicted=around(rate.value, rate.error) if rate else None,
            measured=None,
            gate=None,
            verdict=f"not measured: at best {bound:.2f}x the leader, {open_}",
        )


def _why_open(case: Case) -> str:
    """Why something worth a probe has none."""
    if case.decision is None:
        return "the search has not ended"
    if not case.s.budget.probes_left:
        return f"the {case.spec.max_probes} probes allowed were used up"
    return "the budget ended before it" if unmet(case.s) else "not tried"


def effects(case: Case) -> tuple[Effect, ...]:
    """Pairs of measured configurations that differ in one setting: computation alone, and the production loop."""
    compute = {p: rows for p, r in case.s.history.of_kind(ProbeKind.COMPUTE).items() if (rows := good_rows(r))}
    return (
        *(_effect(case, one, other, compute, "compute") for one, other in _single(case, compute)),
        *(
            _effect(case, one, other, case.s.forecast.rows, "end to end")
            for one, other in _single(case, case.s.forecast.rows)
        ),
    )


def _single(case: Case, rows: dict[Point, list[ProbeRow]]) -> Iterator[tuple[Point, Point]]:
    """(before, after) where one setting differs: `before` has more in common with the reference."""
    points = sorted(rows, key=lambda point: differences(point, case.s.forecast.reference))
    for index, before in enumerate(points):
        for after in points[index + 1 :]:
            if differences(before, after) == 1:
                yield before, after


def _effect(case: Case, before: Point, after: Point, rows: dict[Point, list[ProbeRow]], basis: str) -> Effect:
    configs = [config_of(case.spec, point) for point in (before, after)]
    text = changes(*configs).removeprefix("Changed: ").removesuffix(".")
    return Effect(
        setting=text.removesuffix(" (micro-batch x accumulation)"),
        at=case.spec.label(configs[0]),
        ratio=ratio_of_rows(rows[after], rows[before]),
        basis="compute" if basis == "compute" else "end to end",
    )


def _sized(size: Size) -> str:
    return variant_name(size.variant) + (f" and {size.workers} loader workers" if size.workers else "")


def _least(sizes: Iterable[Size]) -> list[Size]:
    """The smallest by variant and number of workers."""
    found: dict[tuple[Variant, int], Size] = {}
    for size in sorted(sizes):
        found.setdefault((size.variant, size.workers), size)
    return list(found.values())


def ruled_out(case: Case) -> tuple[str, ...]:
    """Compile modes that no row is of, and what lies above the sizes that rows show not to fit."""
    found = [f"compile {mode.value}: {why}" for mode, why in untried_modes(case.s)]
    found += [
        f"micro-batch sizes above {size.micro} with {_sized(size)}: {size.micro} did not fit into memory "
        f"({probe_words(overrun_row(case.view, size))})"
        for size in _least(case.s.history.overrun_sizes)
    ]
    return tuple(found)
