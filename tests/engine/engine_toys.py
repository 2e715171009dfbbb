"""What the engine's tests share: toy configurations, a request answered in this process, and one in a process apart."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tests.toys import Toy
from tuner.contract.base import Scalar
from tuner.contract.config import RunConfig
from tuner.contract.probe import EVENT, Event, PointReply, ProbeKind, ProbeLimits, ProbeRequest
from tuner.engine import tasks
from tuner.engine.trainer import Trainer

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]
QUICK = ProbeLimits(measure_s=0.2, min_steps=4)


def toy_config(options: Mapping[str, Scalar] | None = None, **changes: Any) -> RunConfig:
    """The toy's baseline on one thread, so that a busy machine disturbs it less."""
    config = Toy(options or {}).info().baseline
    return config.model_copy(update={"threads": 1, **changes})


def toy_trainer(config: RunConfig, workload: Any = None) -> Trainer:
    return Trainer(workload or Toy(config.options), config, device=CPU)


def answer(kind: ProbeKind, *points: RunConfig, workload: type[Any] = Toy, **words: Any) -> list[Event]:
    """Every event of a request, answered here and now."""
    events: list[Event] = []
    tasks.run(make_request(kind, *points, **words), workload, events.append)
    return events


def make_request(kind: ProbeKind, *points: RunConfig, **words: Any) -> ProbeRequest:
    settings = {"limits": QUICK, "device": "cpu", **words}
    return ProbeRequest(id="test", kind=kind, workload="tests.toys:Toy", points=points, **settings)


def replies(events: Sequence[Event]) -> list[PointReply]:
    return [event for event in events if isinstance(event, PointReply)]


def start_apart(request: ProbeRequest, folder: Path) -> subprocess.Popen[str]:
    """The request in a process of its own, its events as lines on stdout."""
    file = folder / "request.json"
    file.write_text(request.to_json())
    return subprocess.Popen(
        [sys.executable, "-m", "tuner.worker", "--request", str(file)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )


def read_events(process: subprocess.Popen[str]) -> list[Event]:
    assert process.stdout is not None
    with process.stdout as out:
        events = [EVENT.validate_json(line) for line in out]
    assert process.wait(timeout=60) == 0
    return events
