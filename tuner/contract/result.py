"""What `--json` prints: one object on stdout. Published as JSON Schema in docs/schema/."""

from __future__ import annotations

import json
import math
from typing import Any, Literal

from tuner.contract.base import Frozen
from tuner.contract.config import RunConfig
from tuner.contract.measurement import Interval
from tuner.contract.space import Dropped


class SideResult(Frozen):
    config: RunConfig
    samples_per_s: Interval | None
    peak_bytes: int | None


class OptimizeResult(Frozen):
    """`tuner optimize --json`."""

    study: str
    target: str
    measured_on: str
    transfer: Literal["measured", "unverified"]
    decision: Literal["winner", "no_gain", "failed"]
    reason: str
    notes: tuple[str, ...]
    probes: dict[str, int]
    """How many probes ended with which outcome."""
    dropped: tuple[Dropped, ...]
    baseline: SideResult | None
    winner: SideResult | None
    gain: Interval | None
    config_path: str | None
    storage: str
    """The store's URL, its password hidden."""
    seconds: dict[str, float]
    """Wall seconds by phase: setup, prepare, each stage of the search, gate, total."""


class TrainResultJson(Frozen):
    """`tuner train --json`."""

    run: str
    out_dir: str
    samples: int
    finished: bool
    reason: str
    resumed_from: int
    elapsed_s: float
    samples_per_s: Interval | None
    promised_samples_per_s: Interval | None
    host_drift: float | None
    """How much faster the host was than when the promise was made; 0.95 = 5 % slower; null = unknown."""
    deviation: float | None
    """reached / promised - 1."""
    deviation_beyond_drift: float | None
    """reached / promised / host_drift - 1: what the promise is judged by on a machine without a GPU."""
    peak_bytes: int
    promised_peak_bytes: int | None
    peak_deviation: float | None
    losses: dict[str, float]
    metrics: dict[str, float]


def plain_json(value: Frozen) -> str:
    """Valid JSON text (RFC 8259): what is not finite becomes null."""
    return json.dumps(_finite(json.loads(value.model_dump_json())), indent=2)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value
