"""What the ranks besides 0 do in a production run: the same steps, and none of its duties. They write nothing, and pass
signals to stop on (see `tuner.stopping`): rank 0 tells them when."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tuner.contract.measurement import Outcome
from tuner.contract.own_files import CHECKPOINTS
from tuner.contract.probe import PointReply, ProbeRequest
from tuner.engine.checkpoint import Checkpointer
from tuner.engine.device import environment
from tuner.engine.failure import classify, details, release
from tuner.engine.hooks import Emit, Phases
from tuner.engine.memory import PeakMemory
from tuner.engine.trainer import Trainer


def follow(request: ProbeRequest, workload: Any, device: torch.device, emit: Emit) -> None:
    """Resume where rank 0 resumes, step until it stops, and tell it this rank's peak memory."""
    try:
        _follow(request, workload, device)
        reply = PointReply(outcome=Outcome.OK, environment=environment(device))
    except Exception as error:
        outcome, message = classify(error)
        reply = PointReply(outcome=outcome, message=message, detail=details(error), environment=environment(device))
        release(error)
    emit(reply)
    Phases(emit).enter("teardown")


def _follow(request: ProbeRequest, workload: Any, device: torch.device) -> None:
    assert request.train is not None
    config, memory = request.points[0], PeakMemory(device)
    trainer = Trainer(workload, config, device=device)
    try:
        state = Checkpointer(Path(request.train.out_dir) / CHECKPOINTS, request.train.keep).latest()
        if state is not None:
            trainer.load_state_dict(state)
        trainer.run(min(config.horizon_samples, request.train.max_samples or config.horizon_samples))
        trainer.rank.largest(memory.read())
    finally:
        trainer.close()
