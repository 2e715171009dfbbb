"""A production run as the store keeps it: what was promised, and what came of it."""

from __future__ import annotations

from enum import StrEnum

from tuner.contract.base import Frozen
from tuner.contract.config import RunConfig
from tuner.contract.probe import TrainResult
from tuner.contract.tuned import Promise


class RunStatus(StrEnum):
    """`running` is also what a run is left at whose machine died."""

    RUNNING = "running"
    FINISHED = "finished"
    STOPPED = "stopped"
    FAILED = "failed"


class ProductionRun(Frozen):
    """One invocation of `tuner train`; a resumed job has one of these per invocation."""

    id: str
    study: str | None = None
    """The study its configuration came from."""
    config: RunConfig
    promise: Promise | None = None
    out_dir: str = ""
    started_at: str = ""
    """UTC, ISO 8601; for people, never for arithmetic."""
    finished_at: str = ""
    status: RunStatus = RunStatus.RUNNING
    result: TrainResult | None = None
