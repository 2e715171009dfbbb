"""Selection: what the rows prove. The gain comes from the ship gate alone, never from the best figure of the search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from tuner.contract.config import RunConfig
from tuner.contract.measurement import ByteRange, Interval, MemoryPeak
from tuner.contract.probe import ProbeRow
from tuner.contract.statistics import prediction_interval, throughput
from tuner.contract.study import StudySpec
from tuner.contract.tuned import Decision, Promise, Side
from tuner.search import reasons
from tuner.search.gate import Standing, soak_order, soak_rows, soaked
from tuner.search.history import is_ok, rate_of
from tuner.search.objective import break_even_samples, production_seconds
from tuner.search.planner import ended_because, gate_needed, unmet
from tuner.search.points import Variant, config_of, point_of
from tuner.search.situation import Situation, situation_of
from tuner.search.stages import Failed, baseline
from tuner.search.standins import fallen, standing
from tuner.search.view import View

PEAK_ERROR = 0.03
"""Relative error bar on a peak besides what was seen: repeats of one configuration differ by 2 to 4 % on a host."""
LONG_RUN = {"cpu": 1.04, "cuda": 1.0}
"""Peak of a long run's steps over the largest of the short ones. A host's heap goes on growing a little: eight
production runs of two minutes came 2.5 to 7.5 % above; an allocator's pool on a GPU does not."""
NOT_EVALUATED = "peak of the steps: no evaluation was measured"
RUNNER_UPS = 3
MIB = 1 << 20


def select(rows: Sequence[ProbeRow], spec: StudySpec) -> Decision:
    """Winner, no gain, or failed (not even the baseline could be measured); valid at any moment of a study."""
    view = View(spec, rows)
    first = baseline(view)
    if first is not None:
        reason = first.reason if isinstance(first, Failed) else "the baseline has not been measured yet"
        return Decision(kind="failed", reason=_sentence(reason), notes=tuple(reasons.study_notes(view)))
    s = situation_of(view)
    if not gate_needed(s):
        return _untested(s)
    state = standing(s)
    shipped = shipped_side(s, state)
    if shipped:
        return _winner(s, state, shipped)
    return _no_gain(s, state)


def shipped_side(s: Situation, state: Standing) -> int:
    """The best proven finalist whose soak did not fail, or is still open; 0 = the reference."""
    if state.request is not None:
        return 0
    for side in soak_order(state):
        config = state.contest.sides[side]
        if not soak_rows(s, config) or soaked(s, config):
            return side
    return 0


def _winner(s: Situation, state: Standing, side: int) -> Decision:
    reference, winner = state.contest.sides[0], state.contest.sides[side]
    gain = state.won[side]
    speedup = state.speedup(side)
    own = [row for row in s.history.gate if row.pair is not None and row.pair >= state.contest.first]
    fresh = len(gate_rows(own, winner)) + len(gate_rows(own, reference))
    parts = (
        reasons.model_changed(s, winner),
        reasons.changes(reference, winner),
        f"Gain {reasons.times(gain)}{reasons.gain_in(s)} over the {reasons.reference_name(s)}, from "
        f"{len(state.pairs[side])} interleaved pairs in {fresh} fresh processes.",
        reasons.speed_beside(s, speedup),
        reasons.batch_beside(s, reference, winner, speedup),
        reasons.limit(s, point_of(winner)) if winner.options == reference.options else "",
    )
    return Decision(
        kind="winner",
        reason=" ".join(part for part in parts if part),
        baseline=fresh_side(s, reference),
        winner=fresh_side(s, winner),
        gain=gain,
        speedup=speedup,
        search_maximum=search_maximum(s),
        runner_ups=_runner_ups(s, state, side),
        notes=(*reasons.study_notes(s.view), *reasons.search_notes(s), *reasons.gate_notes(s, state)),
    )


def _no_gain(s: Situation, state: Standing) -> Decision:
    reference = state.contest.sides[0]
    best = max(state.pairs, key=lambda finalist: _gain_value(state, finalist), default=None)
    gain = state.gain(best) if best is not None else None
    side = fresh_side(s, reference)
    return Decision(
        kind="no_gain",
        reason=" ".join((_why_no_gain(s, state, best), reasons.limit(s, point_of(reference)))).strip(),
        baseline=side,
        winner=side,
        gain=gain,
        speedup=state.speedup(best) if best is not None else None,
        search_maximum=search_maximum(s),
        runner_ups=_runner_ups(s, state, 0),
        notes=(*reasons.study_notes(s.view), *reasons.search_notes(s), *reasons.gate_notes(s, state), *_soak_notes(s)),
    )


def search_maximum(s: Situation) -> float | None:
    """The best worth measured in the search over the reference's there: what a tuner would claim that ships it."""
    others = [s.forecast.measured_worth(point) for point in s.forecast.rates if point != s.forecast.reference]
    return max(others) / s.forecast.measured_worth(s.forecast.reference) if others else None


def _soak_notes(s: Situation) -> list[str]:
    rows = soak_rows(s, config_of(s.view.spec, s.forecast.reference))
    if not rows or any(is_ok(row) and s.history.fits(row) for row in rows):
        return []
    last = rows[-1]
    if is_ok(last):
        peaks = _peaks(rows[-1:])
        needed, allowed = (round(size / MIB) for size in (peaks[0].gate_bytes, s.view.spec.memory_budget_bytes))
        return [f"soak: the configuration shipped needs {needed:,} MiB of {allowed:,} allowed ({peak_words(peaks)})"]
    return [f"soak: the configuration shipped failed it: {last.outcome.value}: {last.message}"]


def _gain_value(state: Standing, finalist: int) -> float:
    gain = state.gain(finalist)
    return gain.value if gain is not None else 0.0


def _why_no_gain(s: Situation, state: Standing, best: int | None) -> str:
    name = reasons.reference_name(s)
    if state.won and state.request is None:
        return f"No gain: what was faster than the {name} failed its soak (evaluation, sampling, checkpoint)."
    if state.broken:
        return f"No gain: {state.broken}."
    if state.request is not None:
        return f"No gain proven: the ship gate is not finished, so the {name} stays."
    if not state.contest.finalists:
        left = "" if unmet(s) else " and had nothing left to try"
        return f"No gain: {_no_finalist(s, name)}. {_sentence(reasons.spent(s) + left)}"
    if best is None:
        return f"No gain: {next(iter(state.out.values()), 'no finalist completed a pair')}."
    gain = state.gain(best)
    assert gain is not None
    label = s.view.spec.label(state.contest.sides[best])
    if best in state.fell:
        return (
            f"No gain that can be shipped: the best candidate ({label}) reached {reasons.times(gain)}"
            f"{reasons.gain_in(s)} of the {name}, but {state.out[best]}."
        )
    return (
        f"No gain beyond the noise: the best candidate ({label}) reached {reasons.times(gain)}{reasons.gain_in(s)} of "
        f"the {name} in "
        f"{len(state.pairs[best])} interleaved pairs of fresh processes; at least "
        f"{1 + s.view.spec.gate.min_gain:.2f}x and an interval above 1 are asked for."
    )


def _no_finalist(s: Situation, name: str) -> str:
    """Why nothing the search measured was worth a ship gate: also of one whose own measurement was above the baseline's
    (`name`) there."""
    f = s.forecast
    seen = {point: [f.worth(point, rate_of(row)) for row in rows] for point, rows in f.rows.items()}
    bar = fmean(seen.pop(f.reference))
    count = f"{len(seen)} other configuration{'s' if len(seen) > 1 else ''} measured end to end"
    best = max(seen, key=lambda point: max(seen[point]))
    if max(seen[best]) <= bar:
        return f"none of {count} beat the {name}"
    above = f"of {count} one measurement of {s.view.spec.label(config_of(s.view.spec, best))} was above the {name}"
    above += f" ({max(seen[best]) / bar:.3f}x)"
    if best not in f.roomy:
        return f"{above}, but its peak memory leaves too little room in the budget for how far processes differ"
    believed = f.measured_worth(best) / f.measured_worth(f.reference)
    beyond = believed * (1 + f.noise(best) + f.noise(f.reference)) <= 1
    return (
        f"{above}, but by all of its {len(seen[best])} and the host's speed during each it is at {believed:.3f}x"
        f"{', below by more than the noise' if beyond else ''}"
    )


def _untested(s: Situation) -> Decision:
    """The search ended before anything could be compared: the baseline stays, with the figure of its own probe."""
    reference = config_of(s.view.spec, s.forecast.reference)
    row = s.forecast.rows[s.forecast.reference][-1]
    assert row.measurement is not None
    side = Side(
        config=reference,
        samples_per_s=throughput(row.measurement),
        peak_bytes=row.measurement.memory.gate_bytes,
        processes=1,
    )
    note = "the interval of the baseline is from one process: how far processes differ was not measured"
    no_gain = "No gain was looked for to the end" if unmet(s) else "No gain"
    why = _sentence(ended_because(s))
    return Decision(
        kind="no_gain",
        reason=f"{no_gain}: {why} The {reasons.reference_name(s)} stays.",
        baseline=side,
        winner=side,
        notes=(*reasons.study_notes(s.view), *reasons.search_notes(s), note),
    )


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}" + ("" if text.endswith(".") else ".")


def gate_rows(rows: Sequence[ProbeRow], config: RunConfig) -> list[ProbeRow]:
    return [row for row in rows if row.config == config and is_ok(row)]


def fresh_rows(s: Situation, config: RunConfig) -> list[ProbeRow]:
    """Fresh measurements of `config`: gate and soak; of a gate that never began, the search's own."""
    found = gate_rows([*s.history.gate, *s.history.soak], config)
    known = config.options == s.view.spec.baseline.options
    return found or (list(s.forecast.rows.get(point_of(config), ())) if known else [])


def fresh_side(s: Situation, config: RunConfig) -> Side:
    rows = fresh_rows(s, config)
    peaks = _peaks(rows)
    return Side(
        config=config,
        samples_per_s=_prediction(rows),
        peak_bytes=max((peak.gate_bytes for peak in peaks), default=None),
        peak_from=peak_words(peaks) if peaks else "",
        processes=len(rows),
    )


def _prediction(rows: Sequence[ProbeRow]) -> Interval | None:
    """Where one further process will lie; with one process alone, the interval within it."""
    if len(rows) > 1:
        return prediction_interval([rate_of(row) for row in rows])
    measurement = rows[0].measurement if rows else None
    return throughput(measurement) if measurement is not None else None


def _peaks(rows: Sequence[ProbeRow]) -> list[MemoryPeak]:
    return [row.measurement.memory for row in rows if row.measurement is not None]


def _runner_ups(s: Situation, state: Standing, shipped: int) -> tuple[RunConfig, ...]:
    """Other finalists still sound, then other measured configurations, best first; never of another model, as
    production may fall back on them by itself."""
    sound = [state.contest.sides[i] for i in state.contest.finalists if i != shipped and i not in state.out]
    failed = {state.contest.sides[i].digest() for i in state.out} | {config.digest() for config in fallen(s, state)}
    ranked = sorted(s.forecast.rates, key=s.forecast.measured_worth, reverse=True)
    measured = [config_of(s.view.spec, point) for point in ranked]
    found: dict[str, RunConfig] = {}
    for config in (*sound, *measured):
        digest = config.digest()
        same_model = config.options == state.contest.sides[shipped].options
        if same_model and digest not in failed and config != state.contest.sides[shipped]:
            found.setdefault(digest, config)
    return tuple(found.values())[:RUNNER_UPS]


@dataclass(frozen=True)
class _Costs:
    compile_s: float
    phases_s: dict[str, float]


def promise(rows: Sequence[ProbeRow], spec: StudySpec, decision: Decision) -> Promise | None:
    """What production will do with the decision's configuration; None with fewer than two fresh processes of it."""
    side = decision.winner
    if decision.kind == "failed" or side is None or side.samples_per_s is None or side.processes < 2:
        return None
    s = situation_of(View(spec, rows))
    fresh = fresh_rows(s, side.config)
    peak = expected_peak(_peaks(fresh), spec.device.kind)
    costs = _costs(s, side.config)
    rate = side.samples_per_s.value
    speedup = speedup_of(decision)
    return Promise(
        samples_per_s=side.samples_per_s,
        peak_bytes=peak.value,
        peak_low_bytes=peak.low,
        peak_high_bytes=peak.high,
        peak_from=peak_words(_peaks(fresh)),
        hours=production_seconds(spec, rate, costs.compile_s, costs.phases_s) / 3600,
        gain=speedup or Interval(value=1.0, low=1.0, high=1.0),
        break_even_samples=_break_even(s, decision, rate / speedup.value) if speedup is not None else None,
        reference_s=tuple(t for row in fresh if row.measurement is not None for t in row.measurement.reference_s),
    )


def expected_peak(peaks: Sequence[MemoryPeak], kind: str) -> ByteRange:
    """Of a long run, from those of fresh processes: steps alone (the gate's), and with an evaluation (the soak's).

    An evaluation that keeps much lies above all steps. Then it makes the peak, and bounds it from below: how far
    processes differ is taken from those of the steps.
    """
    ranges = [peak.gate_range for peak in peaks]
    steps = [peak.gate_bytes for peak in peaks if peak.evaluation is None] or [peak.gate_bytes for peak in peaks]
    growth, spread = (LONG_RUN[kind] - 1) * max(steps), min(steps) / max(steps)
    return ByteRange(
        value=round(max(found.value for found in ranges) + growth),
        low=round((max(found.low for found in ranges) * spread + growth) * (1 - PEAK_ERROR)),
        high=round((max(found.high for found in ranges) + growth) * (1 + PEAK_ERROR)),
    )


def peak_words(peaks: Sequence[MemoryPeak]) -> str:
    """What a peak stands on: the largest of those with an evaluation, if any."""
    told = [peak for peak in peaks if peak.evaluation is not None]
    largest = max(told, key=lambda peak: peak.gate_bytes, default=None)
    return NOT_EVALUATED if largest is None or largest.evaluation is None else largest.evaluation.words


def speedup_of(decision: Decision) -> Interval | None:
    """A winner's speed over the baseline's; of decisions stored before there were other objectives, their gain."""
    return (decision.speedup or decision.gain) if decision.kind == "winner" else None


def _costs(s: Situation, config: RunConfig) -> _Costs:
    """Compile time, and what evaluation, sampling and checkpoints cost by the soak."""
    soaks = [row.measurement for row in soak_rows(s, config) if is_ok(row) and row.measurement is not None]
    phases = soaks[-1].duties_s if soaks else {}
    return _Costs(s.history.compile_seconds(point_of(config).variant), dict(phases))


def _break_even(s: Situation, decision: Decision, baseline_rate: float) -> int | None:
    """In samples of the baseline's progress, where the winner has another effective batch size."""
    assert decision.winner is not None
    assert decision.winner.samples_per_s is not None
    assert decision.baseline is not None
    extra = _compile_of(s, decision.winner.config) - _compile_of(s, decision.baseline.config)
    tuning_s = sum(row.seconds for row in (*s.history.search, *s.history.gate, *s.history.soak))
    rate = decision.winner.samples_per_s.value * s.forecast.efficiency(point_of(decision.winner.config))
    return break_even_samples(tuning_s, baseline_rate, rate, extra, s.view.spec.baseline.horizon_samples)


def _compile_of(s: Situation, config: RunConfig) -> float:
    variant: Variant = point_of(config).variant
    return s.history.compile_seconds(variant)
