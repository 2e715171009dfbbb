"""What the fault tests share: small requests, the ledger of faults that struck, and the hunt for survivors."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from tuner.contract.config import LoaderConfig, OptimizerConfig, RunConfig
from tuner.contract.probe import ProbeKind, ProbeLimits, ProbeRequest

GONE_WITHIN_S = 5.0
"""What is promised of orphans (the machine may be busy, so tests wait longer and fail only then)."""


def config(workload: str, **update: Any) -> RunConfig:
    plain = RunConfig(
        workload=workload,
        micro_batch_size=8,
        accumulation_steps=1,
        optimizer=OptimizerConfig(lr=1e-3),
        horizon_samples=4096,
        threads=1,
    )
    return plain.model_copy(update=update)


def request(
    workload: str,
    ledger: Path | None = None,
    *,
    points: int = 1,
    workers: int = 0,
    kind: ProbeKind = ProbeKind.COMPUTE,
    deadline_s: float = 60.0,
    memory_bytes: int | None = None,
    **options: Any,
) -> ProbeRequest:
    if ledger is not None:
        options["ledger"] = str(ledger)
    update = {"options": options, "loader": LoaderConfig(num_workers=workers)}
    sizes = [8 << index for index in range(points)]
    return ProbeRequest(
        id=f"{workload.partition(':')[2]}-{kind.value}",
        kind=kind,
        workload=workload,
        options=options,
        points=tuple(config(workload, **update, micro_batch_size=size) for size in sizes),
        limits=ProbeLimits(measure_s=0.3, min_steps=4, deadline_s=deadline_s, memory_bytes=memory_bytes),
        device="cpu",
    )


def struck(ledger: Path) -> int:
    """How often a fault struck. A test that survives no fault proves nothing, so 0 is an error."""
    lines = ledger.read_text(encoding="utf-8").splitlines() if ledger.exists() else []
    assert lines, "the fault never struck"
    return len(lines)


def pids(ledger: Path) -> list[int]:
    """Every process named in the ledger."""
    return [int(line.split()[-1]) for line in ledger.read_text(encoding="utf-8").splitlines()]


def alive(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def marked(name: str, value: str) -> list[psutil.Process]:
    """Living processes with this environment variable, whoever their parent is now."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(name) == value and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def eventually(true: Callable[[], bool], timeout_s: float = 60.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if true():
            return True
        time.sleep(0.05)
    return true()
