"""A guide's targets beside what the configuration to ship reached in its fresh measurements; a report, never a gate."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal

from tuner.contract.measurement import Measurement, Outcome
from tuner.contract.probe import ProbeKind, ProbeRow, Stage
from tuner.contract.result import TargetResult
from tuner.contract.study import StudySpec
from tuner.contract.tuned import Decision

_FRESH = (Stage.GATE, Stage.SOAK)


def target_results(spec: StudySpec, rows: Sequence[ProbeRow], decision: Decision | None) -> tuple[TargetResult, ...]:
    """One entry per target the study names; none before there is a configuration to ship."""
    if decision is None or decision.winner is None:
        return ()
    measured = _measurements(rows, decision)
    checks = (_memory, _data_wait, _utilisation)
    return (*(found for check in checks for found in check(spec, measured)), *_speedup(spec, decision))


def _measurements(rows: Sequence[ProbeRow], decision: Decision) -> list[Measurement]:
    """Of the configuration to ship: those of the gate and the soak, or else of the search."""
    assert decision.winner is not None
    mine = [
        row
        for row in rows
        if row.kind is ProbeKind.END_TO_END and row.outcome is Outcome.OK and row.config == decision.winner.config
    ]
    fresh = [row for row in mine if row.stage in _FRESH]
    return [row.measurement for row in fresh or mine if row.measurement is not None]


def _memory(spec: StudySpec, measured: Sequence[Measurement]) -> Iterator[TargetResult]:
    limit = spec.targets.memory_share_max
    if limit is not None:
        peak = max((m.memory.gate_bytes for m in measured), default=None)
        whole = spec.target.memory_bytes or spec.device.memory_bytes
        on_host = spec.device.kind == "cpu" and spec.target.kind == "cuda"
        note = f"this host's memory held against the {spec.target.label}'s" if on_host else ""
        yield _share("memory", None, limit, None if peak is None else peak / whole, note)


def _data_wait(spec: StudySpec, measured: Sequence[Measurement]) -> Iterator[TargetResult]:
    limit = spec.targets.data_wait_max
    if limit is not None:
        waited = math.fsum(sum(m.data_wait_s[m.warmup_steps :]) for m in measured)
        spent = math.fsum(sum(m.steady_step_s) for m in measured if m.data_wait_s)
        yield _share("data wait", None, limit, waited / spent if spent else None)


def _utilisation(spec: StudySpec, measured: Sequence[Measurement]) -> Iterator[TargetResult]:
    low, high = spec.targets.gpu_utilisation_min, spec.targets.gpu_utilisation_max
    if low is None and high is None:
        return
    seen = [m.telemetry.gpu_utilization for m in measured if m.telemetry is not None]
    known = [value for value in seen if value is not None]
    why = "no GPU" if spec.device.kind == "cpu" else "the driver does not tell"
    yield _share("GPU utilisation", low, high, sum(known) / len(known) if known else None, "" if known else why)


def _speedup(spec: StudySpec, decision: Decision) -> Iterator[TargetResult]:
    least = spec.targets.speedup_min
    if least is None:
        return
    won = decision.kind == "winner"
    speed = (decision.speedup or decision.gain) if won else None
    value = speed.value if speed is not None else 1.0
    note = "" if won else "the baseline stays"
    yield TargetResult(
        name="speed-up", wanted=f"> {least:g}x", value=value, verdict="ok" if value >= least else "missed", note=note
    )


def _share(name: str, low: float | None, high: float | None, value: float | None, note: str = "") -> TargetResult:
    """A share of 1 held against a lower and an upper limit."""
    inside = value is not None and (low is None or value >= low) and (high is None or value <= high)
    verdict: Literal["ok", "missed", "unknown"] = "unknown" if value is None else "ok" if inside else "missed"
    return TargetResult(name=name, wanted=_wanted(low, high), value=value, verdict=verdict, note=note)


def _wanted(low: float | None, high: float | None) -> str:
    if low is not None and high is not None:
        return f"{100 * low:g}-{100 * high:g} %"
    return f"> {100 * low:g} %" if low is not None else f"< {100 * (high or 0):g} %"


def reached(result: TargetResult) -> str:
    """`2 % ok`, `1.75x missed`, `unknown (no GPU)`."""
    note = f" ({result.note})" if result.note else ""
    if result.value is None:
        return f"unknown{note}"
    if result.wanted.endswith("x"):
        return f"{result.value:.2f}x {result.verdict}{note}"
    percent = 100 * result.value
    return f"{percent:.{0 if percent >= 10 else 1}f} % {result.verdict}{note}"


def in_words(results: Sequence[TargetResult]) -> str:
    """One line: `memory < 80 %: 2 % ok; data wait < 10 %: 0.4 % ok`."""
    return "; ".join(f"{result.name} {result.wanted}: {reached(result)}" for result in results)
