"""The words of a decision: what changed, what limits, and what a reader should also know."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tuner.contract.config import RunConfig
from tuner.contract.equivalence import EQUIVALENT, Figure, causes, remarks
from tuner.contract.measurement import Interval, Outcome
from tuner.contract.probe import ProbeKind, ProbeRow
from tuner.contract.space import Knob, knob_value
from tuner.contract.study import Objective, SamplerName
from tuner.search.fallback import proposals
from tuner.search.forecast import MISFIT
from tuner.search.gate import Standing, soak_rows, soaked
from tuner.search.goodput import batch_notes
from tuner.search.levers import evidence, lever_notes, model_change
from tuner.search.losses import loss_notes
from tuner.search.lr import lr_notes
from tuner.search.objective import GAIN_IN
from tuner.search.planner import unmet
from tuner.search.points import Point, micro_values, point_of
from tuner.search.situation import Situation
from tuner.search.stages import standin_label, untried_modes
from tuner.search.standins import gates, is_shippable
from tuner.search.view import View

_NAMES = {
    Knob.EFFECTIVE_BATCH_SIZE: "effective batch",
    Knob.PRECISION: "precision",
    Knob.COMPILE: "compile",
    Knob.GRADIENT_CHECKPOINTING: "gradient checkpointing",
    Knob.CHANNELS_LAST: "channels_last",
    Knob.FUSED: "fused optimizer",
    Knob.NUM_WORKERS: "loader workers",
    Knob.PREFETCH_FACTOR: "prefetch",
    Knob.LR: "lr",
}
LAUNCH_BOUND = 0.3
"""Share of a step spent on per-micro-batch cost from which launches are called the limit."""
LOADER_BOUND = 1.0
"""Loader seconds over compute seconds from which the loader is called the limit."""


def changes(before: RunConfig, after: RunConfig) -> str:
    """`Changed: batch 8x2 -> 16x1, loader workers 0 -> 2.`; options, which are the model, apart (`model_changed`)."""
    found = []
    if before.batch_label != after.batch_label:
        found.append(f"batch {before.batch_label} -> {after.batch_label} (micro-batch x accumulation)")
    for knob, name in _NAMES.items():
        old, new = knob_value(before, knob), knob_value(after, knob)
        idle = knob is Knob.PREFETCH_FACTOR and not (before.loader.num_workers and after.loader.num_workers)
        if old != new and not idle:
            found.append(f"{name} {_word(old)} -> {_word(new)}")
    if not found and before.options != after.options:
        return "Nothing else was changed."
    return f"Changed: {', '.join(found) or 'nothing'}."


def model_changed(s: Situation, after: RunConfig) -> str:
    """Aloud, where the model itself is another; empty where it is not."""
    before = s.view.spec.baseline.options
    if after.options == before:
        return ""
    return f"The MODEL itself was changed: {model_change(before, after.options)} ({evidence(s, after.options)})."


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(getattr(value, "value", value))


def times(gain: Interval) -> str:
    """`1.213x (1.190 to 1.236)`."""
    return f"{gain.value:.3f}x ({gain.low:.3f} to {gain.high:.3f})"


def gain_in(s: Situation) -> str:
    """` in peak memory`; empty where a gain is one of time or samples/s."""
    name = GAIN_IN.get(s.view.spec.objective)
    return f" in {name}" if name else ""


def speed_beside(s: Situation, speedup: Interval | None) -> str:
    """What becomes of the speed, where the objective is another quantity."""
    objective = s.view.spec.objective
    if speedup is None or objective not in (Objective.MEMORY, Objective.ENERGY):
        return ""
    allowed = f"; not slower by more than {100 * s.view.spec.gate.min_gain:g} % was asked for"
    return f"Speed {times(speedup)} of the baseline's{allowed if objective is Objective.MEMORY else ''}."


def batch_beside(s: Situation, before: RunConfig, after: RunConfig, speedup: Interval | None) -> str:
    """What a gain in time is made of, where the effective batch is another; empty where it is not."""
    same = before.effective_batch_size == after.effective_batch_size
    if speedup is None or same or s.view.spec.objective is Objective.THROUGHPUT:
        return ""
    share = s.forecast.efficiency(point_of(after)) / s.forecast.efficiency(point_of(before))
    return f"It counts progress: {speedup.value:.3f}x the samples/s, each teaching {share:.2f} of what it did."


def reference_name(s: Situation) -> str:
    return standin_label(s.view, s.forecast.reference).removeprefix("the ")


def limit(s: Situation, point: Point) -> str:
    """One sentence on what the speed of `point` is limited by, from the model; empty where nothing was fitted."""
    compute = s.view.steps.estimate(point.variant, point.micro, point.accumulation)
    if compute is None or compute.value <= 0:
        return ""
    data = s.forecast.data_seconds(point) / compute.value
    if data >= LOADER_BOUND:
        return f"What limits it now is the loader: it needs {data:.1f} times as long as the computation."
    fit = s.view.steps.nearest_fit(point.variant)
    if fit is None:
        return ""
    share = fit.launch_share(point.micro, point.accumulation)
    if share >= LAUNCH_BOUND:
        return (
            f"What limits it now is launch overhead: {100 * share:.0f} % of a step does not depend on the batch size."
        )
    return f"What limits it now is computation: {100 * (1 - share):.0f} % of a step grows with the samples."


def study_notes(view: View) -> Iterator[str]:
    """Notes that hold whether or not anything was searched."""
    spec = view.spec
    if spec.transferred:
        yield (
            f"transfer unverified: measured on {spec.device.name}; limits are those of {spec.target.label}, "
            "speed there is not known"
        )
    if view.reference is not None and view.reference != view.baseline:
        yield _standin_note(view, view.reference)
    for change in spec.data_changes:
        yield f"the data were changed meanwhile, and accepted; earlier figures are of the old data: {change}"
    yield from _equivalence_notes(view)
    if spec.aa:
        yield "A/A: every probe ran the baseline itself, so the true gain is 1 and any other finding is false"
    if spec.effective_batch is None and view.reference is not None:
        tried = [samples * spec.baseline.world_size for samples in view.sample_values]
        yield from batch_notes(view.history.rows, spec, view.best_samples, tried)


def _standin_note(view: View, reference: Point) -> str:
    rows = view.history.of(ProbeKind.END_TO_END, view.baseline)
    label = standin_label(view, reference).removeprefix("the baseline ")
    if reference.micro == view.baseline.micro:
        return f"the baseline itself cannot run here ({rows[-1].message}); compared with itself {label}"
    what = "ran out of memory" if any(row.outcome.is_oom for row in rows) else "passed the memory budget"
    return (
        f"the baseline itself does not fit: {view.spec.baseline.batch_label} {what}; compared with "
        f"{label.removeprefix('cut to ')}, the largest cut of the same effective batch that fits"
    )


def _equivalence_notes(view: View) -> Iterator[str]:
    searched = len(micro_values(view.spec, view.samples)) > 1
    if view.spec.batch_coupled:
        yield "batch_coupled: the workload says so, so micro-batch size and accumulation were not searched"
    elif view.coupled:
        yield (
            f"equivalence: gradients of two cuts of one batch differ by {view.equivalence[Figure.RELATIVE_L2]:.1e} "
            f"(allowed {EQUIVALENT:.0e}), so micro-batch size and accumulation were not searched"
        )
        yield from (f"equivalence: {found.line}" for found in causes(view.equivalence))
    elif not view.equivalence and searched and view.reference is not None:
        yield "equivalence not measured: that accumulation is a free trade here is the workload's word"
    yield from (f"equivalence: {found.line}" for found in remarks(view.equivalence))


def search_notes(s: Situation) -> Iterator[str]:
    """Notes on how the search went."""
    yield from lever_notes(s)
    yield from lr_notes(s.history.search, s.view.spec)
    for mode, why_not in untried_modes(s):
        yield f"compile {mode.value} not tried: {why_not}"
    yield from _ended_early(s)
    yield from _misfit_notes(s)
    contended = sum(row.outcome is Outcome.CONTENDED for row in s.history.rows)
    if contended:
        yield f"contended: {contended} measurements were disturbed by something else on this machine"


def _ended_early(s: Situation) -> Iterator[str]:
    """Where more would have been measured with more probes or time."""
    following, budget = unmet(s), s.budget
    if following and not budget.probes_left:
        yield f"--probes: the search ended with the {s.view.spec.max_probes} probes allowed; next was {following}"
    elif following:
        yield (
            f"budget: {spent(s)}, and more was to be measured (next {following}), which did not fit beside the "
            f"{budget.gate_reserve_s:.0f} s that the ship gate needs"
        )


def spent(s: Situation) -> str:
    return f"the search used {s.history.spent_s:.0f} of {s.view.spec.budget_s:.0f} s"


def _misfit_notes(s: Situation) -> Iterator[str]:
    asked = len(proposals(s)) if s.view.spec.sampler is SamplerName.STAGED else 0
    if s.forecast.misfit <= MISFIT and not asked:
        return
    off = f"model: predictions {'are' if asked else 'were'} off by {100 * s.forecast.misfit:.0f} % end to end"
    if asked:
        yield f"{off}; Optuna's TPE, told every configuration measured, proposed {asked} more"
    else:
        yield f"{off}, so neighbours of the best were measured instead"


def gate_notes(s: Situation, state: Standing) -> Iterator[str]:
    yield from loss_notes(_fresh_rows(s), state.contest.sides[0], _named_finalists(s, state))
    for gate in reversed([*gates(state)]):
        label = [s.view.spec.label(side) for side in gate.contest.sides]
        if gate.before is not None:
            yield f"stand-in: {label[1]}, in a gate of its own, as who came before could not be shipped"
        yield from (f"finalist {label[finalist]}: out, {why}" for finalist, why in gate.out.items())
        failed = [side for side in gate.won if not is_shippable(s, gate.contest.sides[side])]
        yield from (f"finalist {label[finalist]}: proven, but its soak failed or did not fit" for finalist in failed)
    if state.contest.looks:
        tests = round(s.view.spec.gate.alpha / (1 - state.contest.confidence))
        yield (
            f"gate: intervals of {100 * state.contest.confidence:.2f} %: the error level is shared over {tests} tests "
            f"({tests // len(state.contest.looks)} finalists, {len(state.contest.looks)} looks; Bonferroni)"
        )


def _fresh_rows(s: Situation) -> list[ProbeRow]:
    return [*s.history.gate, *s.history.soak]


def _named_finalists(s: Situation, state: Standing) -> list[tuple[str, RunConfig]]:
    """Finalists by what the notes call them: the one to be shipped is `winner`."""
    sides = state.contest.sides
    sound = (side for side in state.winners() if not soak_rows(s, sides[side]) or soaked(s, sides[side]))
    shipped = next(sound, 0)
    return [("winner" if i == shipped else s.view.spec.label(sides[i]), sides[i]) for i in state.contest.finalists]
