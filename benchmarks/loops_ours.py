"""The tuner's own contender: a whole production run as `tuner train` has it in its worker, paced like the others."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from benchmarks.loops_pace import Pace
from tuner.contract.config import RunConfig
from tuner.contract.probe import Event, TrainPlan
from tuner.engine.hooks import Phases
from tuner.engine.loader import Group
from tuner.engine.onlookers import Onlookers
from tuner.engine.production import Production
from tuner.engine.trainer import Trainer

CPU = torch.device("cpu")
REFERENCE_EVERY_S = 10.0
"""As rarely as a run of ten minutes and more measures its host; these races are shorter."""


class PacedSource:
    """Groups that lie there, as `tuner.engine.loader.ResidentSource` gives them, with the pace ticking."""

    def __init__(self, pace: Pace, groups: Sequence[Group]) -> None:
        self._pace = pace
        self._groups = groups
        self._next = 0

    def next_group(self) -> Group:
        group = self._groups[self._next % len(self._groups)]
        for _ in group.batches:
            self._pace.tick()
        self._next += 1
        return group

    def ready(self) -> int:
        return 0

    def idle(self) -> bool:
        return True

    def close(self) -> None:
        """Nothing is open."""


class Whole(Production):
    """All of a production run: its hooks, its files, its duties. Resident batches take the loader's place."""

    resident: PacedSource | None = None

    def _build(self) -> Trainer:
        trainer = super()._build()
        if self.resident is not None:
            trainer._source = self.resident
        return trainer


def train(job: Any, config: RunConfig, resident: PacedSource | None = None) -> nn.Module:
    """Run `config` to its horizon with everything that hangs on a run; returns the trained model."""
    with tempfile.TemporaryDirectory(prefix="tuner-loops-") as folder:
        plan = TrainPlan(out_dir=folder, reference_every_s=REFERENCE_EVERY_S)
        onlookers = Onlookers(config, plan, CPU, unheard)
        run = Whole(config, plan, job, CPU, Phases(onlookers), onlookers)
        run.resident = resident
        try:
            run.go()
            assert run._trainer is not None
            return run._trainer.model
        finally:
            run.close()
            onlookers.close()


def unheard(event: Event) -> None:
    """Nobody listens."""
