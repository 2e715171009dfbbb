"""An explanation in words and table cells, for the terminal and for pages alike."""

from __future__ import annotations

from dataclasses import dataclass

from tuner.contract.explanation import (
    Candidate,
    Change,
    Effect,
    ExplainResult,
    LoaderPoint,
    LoaderResult,
    MemoryCell,
    StepFitResult,
)
from tuner.contract.measurement import Interval
from tuner.report.words import DASH, mib, speed

UNKNOWN = "unknown"


@dataclass(frozen=True)
class Table:
    title: str
    heads: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    note: str = ""
    """One sentence below."""


def tables(result: ExplainResult) -> tuple[Table, ...]:
    """The evidence, in the order it is read; tables with nothing to show are left out."""
    every = (_candidates(result), _effects(result), _fits(result), _loader(result), _memory(result))
    return tuple(table for table in every if table.lines or table.note)


def not_tried(result: ExplainResult) -> tuple[str, ...]:
    """Everything that was dropped or ruled out, with the reason; values with the same reason on one line."""
    found: dict[tuple[str, str], list[str]] = {}
    for item in result.dropped:
        found.setdefault((item.knob.value, item.reason), []).append(item.value)
    return (*(f"{knob} {', '.join(values)}: {why}" for (knob, why), values in found.items()), *result.ruled_out)


def seconds_text(result: ExplainResult) -> str:
    return ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in result.seconds.items())


def bound(change: Change) -> str:
    """`at most +61 %, likely +32 %`."""
    if change.gain is None:
        return UNKNOWN
    what = "" if change.of == "throughput" else " of run time"
    likely = percent(change.gain.value)
    if change.gain.low == change.gain.high:
        return f"{likely}{what}"
    return f"at most {percent(change.gain.high)}{what}, likely {likely}"


def percent(ratio: float) -> str:
    """A ratio of 1.07 is `+7.0 %`."""
    return f"{100 * (ratio - 1):+.{0 if abs(ratio - 1) >= 0.1 else 1}f} %"


def ratio(interval: Interval) -> str:
    """`1.38x (1.28 to 1.48)`."""
    return f"{interval.value:.2f}x ({interval.low:.2f} to {interval.high:.2f})"


def milliseconds(interval: Interval) -> str:
    value, low, high = (f"{1000 * figure:.3g}" for figure in (interval.value, interval.low, interval.high))
    return f"{value} ms ({low} to {high})"


def _candidates(result: ExplainResult) -> Table:
    moved = any(item.at_usual_speed is not None for item in result.candidates)
    usual = ("at the host's usual speed",) if moved else ()
    heads = ("configuration", "predicted before, samples/s", "measured", *usual, "ship gate", "verdict")
    return Table("Candidates", heads, tuple(_candidate(item, moved=moved) for item in result.candidates))


def _candidate(item: Candidate, *, moved: bool) -> tuple[str, ...]:
    gate = f"{ratio(item.gate)}, {item.pairs} pairs" if item.gate is not None else DASH
    usual = (speed(item.at_usual_speed),) if moved else ()
    return item.label, speed(item.predicted), speed(item.measured), *usual, gate, item.verdict


def _effects(result: ExplainResult) -> Table:
    heads = ("setting", "from", "throughput, with / without", "measured")
    return Table("One setting at a time", heads, tuple(_effect(item) for item in result.effects))


def _effect(item: Effect) -> tuple[str, ...]:
    return item.setting, item.at, ratio(item.ratio), item.basis


def _fits(result: ExplainResult) -> Table:
    heads = ("variant", "alpha, per micro-batch", "beta, per sample", "omega, per update", "residual")
    note = "" if result.fits else "Not fitted: no variant was measured at two cuts without a loader."
    title = "Step time = accumulation x alpha + samples x beta + omega"
    return Table(title, heads, tuple(_fit(item) for item in result.fits), note)


def _fit(item: StepFitResult) -> tuple[str, ...]:
    omega = milliseconds(item.omega_s) if item.omega_s.high else "counted in beta"
    misfit = f"{100 * item.residual:.1f} % over {item.cuts} cuts"
    residual = "nothing checks it: as many unknowns as cuts" if item.exact else misfit
    return item.variant, milliseconds(item.alpha_s), milliseconds(item.beta_s), omega, residual


def _loader(result: ExplainResult) -> Table:
    loader = result.loader
    lines = tuple(_loader_line(point, loader.compute_sample_s) for point in loader.points)
    return Table("The loader alone", ("setting", "per sample", "of the computation"), lines, keeps_up(loader))


def _loader_line(point: LoaderPoint, compute_s: float | None) -> tuple[str, ...]:
    prefetch = f", prefetch {point.prefetch_factor}" if point.num_workers else ""
    share = f"{100 * point.sample_s.value / compute_s:.3g} %" if compute_s else UNKNOWN
    workers = f"{point.num_workers} workers" if point.num_workers != 1 else "1 worker"
    return f"{workers}{prefetch}", milliseconds(point.sample_s), share


def keeps_up(loader: LoaderResult) -> str:
    """How many workers it takes; empty where the loader was not measured."""
    if not loader.points:
        return ""
    if loader.compute_sample_s is None:
        return "The computation alone was not measured, so it is not known how many workers keep up with it."
    compute = f"The computation needs {1000 * loader.compute_sample_s:.3g} ms per sample"
    if loader.enough_workers is None:
        return f"{compute}; no setting that was measured keeps up with it."
    if loader.enough_workers == 0:
        return f"{compute}; loading in the loop itself adds next to nothing: by these figures no worker is needed."
    many = f"{loader.enough_workers} workers keep" if loader.enough_workers > 1 else "1 worker keeps"
    return f"{compute}; {many} up with it."


def _memory(result: ExplainResult) -> Table:
    title = f"Peak memory, predicted without its own rows (budget {mib(result.memory_budget_bytes)})"
    heads = ("variant", "micro-batch", "measured", "predicted", "error bar up to", "")
    return Table(title, heads, tuple(_memory_line(cell, result.memory_budget_bytes) for cell in result.memory))


def _memory_line(cell: MemoryCell, budget: float) -> tuple[str, ...]:
    predicted = cell.predicted_share
    measured = mib(cell.measured_bytes) if cell.measured_bytes is not None else cell.outcome.value
    guess = mib(predicted.value * budget) if predicted else UNKNOWN
    bar = mib(predicted.high * budget) if predicted else DASH
    verdict = "measured above the error bar" if cell.below_bar is False else ""
    return cell.variant, str(cell.micro_batch_size), measured, guess, bar, verdict
