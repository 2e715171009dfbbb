"""The answer of a study in words, and production held against its promise; for the page and the dashboard's note."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tuner.contract.measurement import Interval
from tuner.contract.probe import ProbeRow
from tuner.contract.production import ProductionRun
from tuner.contract.promise_check import PeakVerdict, check_promise
from tuner.contract.study import Objective, StudySpec
from tuner.contract.tuned import Decision, Side
from tuner.report.frame import MIB, rate
from tuner.report.targets import reached, target_results

DASH = "–"


@dataclass(frozen=True)
class Answer:
    """What a reader sees first."""

    headline: str
    reason: str
    where: str
    """On which machine speed was measured, and for which target."""
    notes: tuple[str, ...]


def answer(spec: StudySpec, decision: Decision | None, probes: int) -> Answer:
    notes = decision.notes if decision else ()
    reason = decision.reason if decision else "Run the same command again: the search goes on where it stopped."
    return Answer(_headline(spec, decision, probes), reason, where(spec), notes)


def _headline(spec: StudySpec, decision: Decision | None, probes: int) -> str:
    if decision is None:
        return f"No decision yet: {probes} probes so far."
    if decision.kind == "failed":
        return "Not even the baseline could be measured."
    if decision.kind == "no_gain" or decision.winner is None:
        kept = f": {spec.label(decision.baseline.config)}" if decision.baseline else ""
        return f"No configuration beat the baseline beyond the noise. Keep it{kept}."
    gain = f" is {better(spec, decision.gain)}"
    base = f" {spec.label(decision.baseline.config)}" if decision.baseline else ""
    return f"{spec.label(decision.winner.config)}{gain}{base}."


def better(spec: StudySpec, gain: Interval | None) -> str:
    """`42.0 % (...) faster than the baseline`, in the words of the objective."""
    if spec.objective in (Objective.TIME, Objective.THROUGHPUT):
        return f"{percent(gain)} faster than the baseline" if gain else "faster than the baseline"
    name = {Objective.MEMORY: "peak memory", Objective.ENERGY: "samples per joule"}.get(spec.objective, "goodput")
    return f"better in {name} by {percent(gain)} than the baseline" if gain else f"better in {name} than the baseline"


def where(spec: StudySpec) -> str:
    """Honest about what was measured: speed belongs to the machine it was measured on."""
    if not spec.transferred:
        return f"Chosen for {spec.target.label}; measured on {spec.device.name}."
    return (
        f"Chosen for {spec.target.label}, but measured on {spec.device.name}: the target's limits (memory, data types, "
        "compile modes) hold, while its speed is not known. Transfer: unverified."
    )


def percent(gain: Interval) -> str:
    """`42.0 % (95 % interval 39.2 … 44.8 %)`; a ratio of 1.42 is 42 %."""
    if not (math.isfinite(gain.low) and math.isfinite(gain.high)):
        return f"{100 * (gain.value - 1):.1f} % (interval unknown)"
    bounds = f"{100 * (gain.low - 1):.1f} … {100 * (gain.high - 1):.1f} %"
    return f"{100 * (gain.value - 1):.1f} % ({100 * gain.confidence:.0f} % interval {bounds})"


def speed(interval: Interval | None) -> str:
    """`270.0 (267.3 … 272.7)` samples/s."""
    if interval is None:
        return DASH
    if not math.isfinite(interval.high):
        return f"{interval.value:,.1f} (interval unknown)"
    return f"{interval.value:,.1f} ({interval.low:,.1f} … {interval.high:,.1f})"


def mib(value: float | None) -> str:
    return DASH if value is None else f"{value / MIB:,.0f} MiB"


def side_cells(spec: StudySpec, side: Side | None) -> tuple[str, str, str]:
    """Configuration, samples/s, peak memory."""
    if side is None:
        return DASH, DASH, DASH
    return spec.label(side.config), speed(side.samples_per_s), peak_cell(side.peak_bytes, side.peak_from)


def peak_cell(value: int | None, stands_on: str) -> str:
    """`842 MiB (extrapolated from 40 of 200 evaluation batches)`"""
    return mib(value) + (f" ({stands_on})" if stands_on else "")


@dataclass(frozen=True)
class Reality:
    """One production run against its promise, ready to show."""

    id: str
    status: str
    started: str
    out_dir: str
    config: str
    samples: str
    promised: str
    reached: str
    deviation: str
    beyond_drift: str
    verdict: str
    promised_peak: str
    peak: str


def reality(run: ProductionRun) -> Reality:
    """Reality beside the promise, with the verdict of `check_promise`."""
    result, promise = run.result, run.promise
    reached = rate(result.measurement) if result else None
    peak = result.measurement.memory.gate_bytes if result else None
    reference_s = result.measurement.reference_s if result else ()
    held = check_promise(promise, reached.value if reached else None, reference_s, peak)
    return Reality(
        id=run.id,
        status=run.status.value,
        started=run.started_at,
        out_dir=run.out_dir,
        config=run.config.label,
        samples=f"{result.samples:,}" if result else DASH,
        promised=speed(promise.samples_per_s) if promise else DASH,
        reached=speed(reached),
        deviation=_signed(held.deviation),
        beyond_drift=_signed(held.deviation_beyond_drift),
        verdict=held.verdict.value if held.verdict else DASH,
        promised_peak=peak_cell(promise.peak_bytes, promise.peak_from) if promise else DASH,
        peak=f"{mib(peak)}{' (above its bar)' if held.peak_verdict is PeakVerdict.ABOVE else ''}",
    )


def _signed(deviation: float | None) -> str:
    return DASH if deviation is None else f"{100 * deviation:+.1f} %"


def note(spec: StudySpec, decision: Decision, rows: Sequence[ProbeRow]) -> str:
    """The decision as Markdown for the dashboard; angle brackets are escaped."""
    said = answer(spec, decision, len(rows))
    lines = [f"**{said.headline}**", said.reason, said.where]
    lines += [f"- {item}" for item in said.notes]
    lines += [
        f"Guide's target, {item.name} {item.wanted}: {reached(item)}" for item in target_results(spec, rows, decision)
    ]
    for name, side in (("Baseline", decision.baseline), ("Winner", decision.winner)):
        config, rate_text, peak = side_cells(spec, side)
        lines.append(f"{name}: `{config}`, {rate_text} samples/s, peak {peak}")
    return "\n\n".join(lines).replace("<", "&lt;").replace(">", "&gt;")
