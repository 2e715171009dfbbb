"""What a row says to people who look at trials: attributes, values on the way, and what the dashboard reads of both."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tuner.contract.measurement import Interval, Measurement
from tuner.contract.probe import ProbeRow, Score
from tuner.contract.statistics import rate_interval, throughput
from tuner.contract.study import StudySpec

PROBE_ATTR = "tuner_probe"
"""User attribute: the request a trial stands for."""
CONSTRAINTS_ATTR = "constraints"
"""Optuna's system attribute; one constraint is kept under `constraints:NAME`."""
_CHUNKS = 12
_MESSAGE_CHARS = 2000
_CONFIG_BYTES = 60_000
_MIB = 1 << 20


def dashboard_constraints(overruns: Mapping[str, float]) -> dict[str, list[float]]:
    """The worst overrun in the form of Optuna 4, the only one optuna-dashboard 0.21 reads; without it infeasible trials
    are shown as the best ones. A private door of Optuna, used nowhere else; a test says when it may go."""
    return {CONSTRAINTS_ATTR: [max(overruns.values())]} if overruns else {}


def interval_of(measurement: Measurement | None) -> Interval | None:
    """Throughput, or None when no steady step was measured."""
    if measurement is None or not measurement.steady_step_s:
        return None
    return throughput(measurement)


def user_attributes(row: ProbeRow, spec: StudySpec, score: Score) -> dict[str, Any]:
    """What the dashboard shows beside a trial; unknown figures are left out."""
    config = row.config.to_json()
    attributes: dict[str, Any] = {
        PROBE_ATTR: row.request_id,
        "stage": row.stage.value,
        "outcome": row.outcome.value,
        "micro_batch": row.config.micro_batch_size,
        "accumulation": row.config.accumulation_steps,
        "batch_label": row.config.batch_label,
        "seconds": round(row.seconds, 3),
        "message": row.message[:_MESSAGE_CHARS],
        "config": config if len(config.encode()) < _CONFIG_BYTES else "(too large; see the store)",
        **_measured_attributes(row.measurement, spec),
    }
    return attributes | {f"overrun_{key}": value for key, value in score.overruns.items()}


def _measured_attributes(measurement: Measurement | None, spec: StudySpec) -> dict[str, Any]:
    interval = interval_of(measurement)
    if measurement is None or interval is None:
        return {}
    steady = measurement.steady_step_s
    waited = measurement.data_wait_s[measurement.warmup_steps :]
    found: dict[str, Any] = {
        "peak_mib": round(measurement.memory.gate_bytes / _MIB, 1),
        "memory_used": round(spec.memory_used(measurement.memory), 4),
        "step_ms": round(1000 * sum(steady) / len(steady), 3),
        "samples_per_s": interval.value,
        "samples_per_s_low": interval.low,
    }
    if math.isfinite(interval.high):
        found["samples_per_s_high"] = interval.high
    if waited:
        found["data_wait"] = round(sum(waited) / sum(steady), 4)
    return found


def intermediate_values(measurement: Measurement | None) -> dict[int, float]:
    """Samples/s of each twelfth of the steady steps, by the number of the last step in it."""
    if measurement is None or not measurement.steady_step_s:
        return {}
    steady = measurement.steady_step_s
    size = max(1, math.ceil(len(steady) / _CHUNKS))
    chunks = [steady[at : at + size] for at in range(0, len(steady), size)]
    ends = [measurement.warmup_steps + min(len(steady), (at + 1) * size) for at in range(len(chunks))]
    pairs = zip(ends, chunks, strict=True)
    return {end: rate_interval(chunk, measurement.samples_per_step).value for end, chunk in pairs}
