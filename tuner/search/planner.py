"""The planner: which probe comes next, as a pure function of the study's specification and its stored rows.

Killed at any moment and called again with the rows that were stored, it asks for the same probe and repeats none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tuner.contract.config import CompileMode, Precision
from tuner.contract.probe import ProbeKind, ProbeRequest, ProbeRow, Stage
from tuner.contract.space import Knob, with_knobs
from tuner.contract.study import SamplerName, StudySpec
from tuner.search.confirm import confirm, doubt
from tuner.search.fallback import handed_over, open_points
from tuner.search.gate import contest, soak
from tuner.search.history import is_ok
from tuner.search.levers import lever_stage
from tuner.search.lr import lr_stage
from tuner.search.points import rescaled
from tuner.search.refine import polish, verify
from tuner.search.requests import make_request
from tuner.search.situation import Situation, situation_of
from tuner.search.stages import STAGES, Failed, baseline, equivalence, noise
from tuner.search.standins import standing
from tuner.search.view import View

ENDLESS_S = 1e9
"""A budget that no search uses up."""


@dataclass(frozen=True)
class Ask:
    """An Optuna sampler should propose the next end-to-end probe (`sampler.proposed`): that of the study, or TPE where
    ours is the sampler and its model misfits."""

    reason: str


@dataclass(frozen=True)
class Done:
    """Nothing is left to ask; `selection.select` says what came of it."""

    reason: str


def next_probe(spec: StudySpec, rows: Sequence[ProbeRow]) -> ProbeRequest | Ask | Done:
    """The next request of the study: baseline, the search's stages, quality of other models, lr, ship gate, soak.

    The search ends when no unmeasured configuration could beat the best by 1 %, or with the budget, of which the
    cost of the gate is kept free. Once the gate has begun the search is closed.
    """
    view = View(spec, rows)
    first = baseline(view)
    if isinstance(first, Failed):
        return Done(first.reason)
    if first is not None:
        return first
    s = situation_of(view)
    return _searched(s) or _judged(s)


def _searched(s: Situation) -> ProbeRequest | Ask | None:
    if s.history.gate or s.history.soak:
        return None
    begun = {row.stage for row in s.history.search}
    if not begun & {Stage.QUALITY, Stage.LR} and (found := _search(s)) is not None:
        return found
    if Stage.LR not in begun and (request := lever_stage(s)) is not None:
        return request
    return lr_stage(s)


def _search(s: Situation) -> ProbeRequest | Ask | None:
    """The stages in order, those passed over whose kind of probe cannot be asked; then the fall-back."""
    if s.view.spec.sampler is not SamplerName.STAGED:
        if s.budget.spent_up:
            return None
        asked = Ask(f"sampler {s.view.spec.sampler.value} proposes")
        return equivalence(s) or noise(s) or (asked if next(open_points(s), None) is not None else None)
    for stage in (*STAGES, verify, doubt, polish):
        request = stage(s)
        if request is not None and (s.view.spec.probes_alone or request.kind is ProbeKind.END_TO_END):
            return request
    if (request := confirm(s)) is not None:
        return request
    return Ask(reason) if (reason := handed_over(s)) else None


def _judged(s: Situation) -> ProbeRequest | Done:
    """The gate, when anything was compared at all, and the soak of what is to be shipped."""
    if not gate_needed(s):
        return Done(ended_because(s))
    state = standing(s)
    request = state.request or soak(s, state)
    return request or Done("the ship gate is decided")


def gate_needed(s: Situation) -> bool:
    """Some configuration besides the reference ran end to end, so that fresh measurements have something to prove."""
    return len(s.forecast.rates) > 1 or bool(contest(s).finalists)


def unmet(s: Situation) -> str:
    """What the search would measure next had it time and probes without end; empty = it came to its end by itself."""
    spec = s.view.spec.model_copy(update={"budget_s": ENDLESS_S, "max_probes": None})
    found = _search(situation_of(View(spec, s.history.search)))
    if found is None:
        return ""
    if isinstance(found, Ask):
        return "another proposal of the sampler"
    alone = "" if found.kind is ProbeKind.END_TO_END else f", {found.kind.value} probe"
    return f"{spec.label(found.points[0])}{alone}"


def ended_because(s: Situation) -> str:
    """Why the search compared nothing with the reference."""
    if not unmet(s):
        return _nothing_to_compare(s)
    if not s.budget.probes_left:
        return f"--probes: the {s.view.spec.max_probes} probes allowed are used up"
    return (
        f"budget: {s.history.spent_s:.0f} of {s.view.spec.budget_s:.0f} s are used, and too little is left to compare "
        f"anything; a candidate and a ship gate of {s.view.spec.gate.min_pairs} pairs need about "
        f"{s.budget.least_s:.0f} s here"
    )


def _nothing_to_compare(s: Situation) -> str:
    tried = [
        (point, row)
        for point, rows in s.history.of_kind(ProbeKind.END_TO_END).items()
        for row in rows
        if point not in s.forecast.rates and row.stage is not Stage.BASELINE
    ]
    if not tried:
        return "the space holds nothing that could be compared with the baseline here"
    last = tried[-1][1]
    why = "its peak memory passed the budget" if is_ok(last) else f"{last.outcome.value}: {last.message}"
    others = len({point for point, _ in tried})
    return f"none of the other configurations tried end to end ({others}) ran within the memory budget; the last: {why}"


def sampler_request(spec: StudySpec, rows: Sequence[ProbeRow], values: Mapping[str, Any]) -> ProbeRequest:
    """The end-to-end probe of the knob values an Optuna sampler proposed (by `Knob` value; enums as their strings).

    A learning rate is never taken from a sampler: throughput does not depend on it. Raises ValueError when the
    micro-batch size does not divide the effective batch size.
    """
    view = View(spec, rows)
    chosen = {Knob(name): _typed(Knob(name), value) for name, value in values.items() if name != Knob.LR.value}
    if view.coupled and view.reference is not None:
        chosen[Knob.MICRO_BATCH_SIZE] = view.reference.micro
    if chosen.get(Knob.EFFECTIVE_BATCH_SIZE, 0) // spec.baseline.world_size not in view.sample_values:
        chosen.pop(Knob.EFFECTIVE_BATCH_SIZE, None)
    config = rescaled(with_knobs(spec.baseline, chosen), spec.baseline)
    return make_request(view.history, ProbeKind.END_TO_END, Stage.SAMPLER, [config])


def _typed(knob: Knob, value: Any) -> Any:
    if knob is Knob.PRECISION:
        return Precision(value)
    return CompileMode(value) if knob is Knob.COMPILE else value
