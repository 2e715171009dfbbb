"""Rows as a pandas frame, one line per probe: what the page and a notebook start from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from tuner.contract.config import RunConfig
from tuner.contract.measurement import Interval, Measurement, MemoryPeak
from tuner.contract.probe import ProbeRow
from tuner.contract.space import options_text
from tuner.contract.statistics import throughput
from tuner.contract.study import MEMORY_MARGIN, StudySpec

MIB = 1 << 20


def frame(rows: Sequence[ProbeRow], spec: StudySpec) -> pd.DataFrame:
    """One line per probe, by number; what was not measured is missing (NaN).

    `samples_per_s`, `low`, `high`: throughput at steady state with its 95 % interval. `peak_mib`: what the memory gate
    counts. `loss`: mean of the last quarter of the total. `data_wait`: share of the step time.
    """
    lines = [_line(row, spec) for row in rows]
    return pd.DataFrame(lines, columns=list(_columns()))


def _columns() -> Iterable[str]:
    yield from ("number", "request", "stage", "kind", "outcome", "label", "variant", "is_baseline")
    yield from ("micro_batch", "accumulation", "effective_batch", "precision", "compile", "checkpointing")
    yield from ("channels_last", "fused", "workers", "prefetch", "lr")
    yield from ("samples_per_s", "low", "high", "step_ms", "data_wait", "peak_mib", "memory_used", "loss")
    yield from ("seconds", "fixed_s", "pair", "trial", "message", "detail", "finished_at")


def _line(row: ProbeRow, spec: StudySpec) -> dict[str, Any]:
    return {
        "number": row.number,
        "request": row.request_id,
        "stage": row.stage.value,
        "kind": row.kind.value,
        "outcome": row.outcome.value,
        "is_baseline": same_config(row.config, spec.baseline),
        **_knobs(row.config, spec),
        **_measured(row.measurement, spec),
        "seconds": row.seconds,
        "fixed_s": row.fixed_s,
        "pair": row.pair,
        "trial": row.trial,
        "message": row.message,
        "detail": row.detail,
        "finished_at": row.finished_at,
    }


def _knobs(config: RunConfig, spec: StudySpec) -> dict[str, Any]:
    return {
        "label": spec.label(config),
        "variant": f"{variant(config)} {options_text(config.options, spec.space.options)}".rstrip(),
        "micro_batch": config.micro_batch_size,
        "accumulation": config.accumulation_steps,
        "effective_batch": config.effective_batch_size,
        "precision": config.precision.value,
        "compile": config.compile.value,
        "checkpointing": config.gradient_checkpointing,
        "channels_last": config.channels_last,
        "fused": config.optimizer.fused,
        "workers": config.loader.num_workers,
        "prefetch": config.loader.prefetch_factor,
        "lr": config.optimizer.lr,
    }


def _measured(measurement: Measurement | None, spec: StudySpec) -> dict[str, Any]:
    if measurement is None:
        return {}
    found: dict[str, Any] = {
        "peak_mib": counted_bytes(measurement.memory, spec) / MIB,
        "memory_used": spec.memory_used(measurement.memory),
        "loss": late_loss(measurement),
    }
    interval = rate(measurement)
    if interval is not None:
        steady = measurement.steady_step_s
        found |= {"samples_per_s": interval.value, "low": interval.low, "high": interval.high}
        found |= {"step_ms": 1000 * sum(steady) / len(steady), "data_wait": waited_share(measurement)}
    return found


def rate(measurement: Measurement | None) -> Interval | None:
    """Samples/s with its interval; None when no steady step was measured."""
    if measurement is None or not measurement.steady_step_s:
        return None
    return throughput(measurement)


def late_loss(measurement: Measurement) -> float | None:
    """Mean total loss over the last quarter of the steps."""
    total = measurement.losses.get("total", ())
    last = total[-max(1, len(total) // 4) :]
    return sum(last) / len(last) if last else None


def waited_share(measurement: Measurement) -> float | None:
    waited = measurement.data_wait_s[measurement.warmup_steps :]
    steady = measurement.steady_step_s
    return sum(waited) / sum(steady) if waited and sum(steady) > 0 else None


def counted_limit_bytes(spec: StudySpec, peak: MemoryPeak | None = None) -> float:
    """The bytes a peak is held against: the budget, or under a hard cap on a CPU the share of the cap to be planned."""
    host = peak is None or peak.reserved_bytes is None
    if spec.memory_cap_bytes is not None and host and spec.device.kind == "cpu":
        return spec.memory_cap_bytes * MEMORY_MARGIN
    return float(spec.memory_budget_bytes)


def counted_bytes(peak: MemoryPeak, spec: StudySpec) -> float:
    """What the memory gate counts of a peak, in bytes comparable with `counted_limit_bytes`."""
    return spec.memory_used(peak) * counted_limit_bytes(spec, peak)


def variant(config: RunConfig) -> str:
    """What is left of a configuration when batch and loader are set aside: `fp32 eager fused`."""
    flags: Mapping[str, bool] = {
        "fused": config.optimizer.fused,
        "channels_last": config.channels_last,
        "checkpointing": config.gradient_checkpointing,
    }
    return " ".join([config.precision.value, config.compile.value, *(name for name, on in flags.items() if on)])


def same_config(first: RunConfig, second: RunConfig) -> bool:
    """True when both run identically."""
    return first.canonical().digest() == second.canonical().digest()
