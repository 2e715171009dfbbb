"""Jobs in which something stands still, for tests of signals to stop, and one whose batches are large."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from tests.toys import Rows, Toy
from tuner.contract.config import Cadence, LoaderConfig, RunConfig
from tuner.contract.workload import Batch, Split, WorkloadInfo

STUCK_FROM = 390
"""Sample at which the data set stands still: in the step after a line of the log."""


class WithWorkers(Toy):
    """Evaluates and saves often; two loader workers. The horizon is far away."""

    workers = 2

    def info(self) -> WorkloadInfo:
        plain = super().info()
        config: RunConfig = plain.baseline.model_copy(
            update={
                "loader": LoaderConfig(num_workers=self.workers),
                "horizon_samples": 1 << 22,
                "cadence": Cadence(log_samples=64, checkpoint_samples=256, evaluate_samples=0),
            }
        )
        return plain.model_copy(update={"baseline": config})


class StuckRows(Dataset[Mapping[str, Tensor]]):
    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.served = 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Mapping[str, Tensor]:
        self.served += 1
        while self.served > STUCK_FROM:
            time.sleep(3600)
        return self.rows[index]


class StuckWorkers(WithWorkers):
    """Its workers stop delivering."""

    def dataset(self, split: Split) -> Any:
        rows = super().dataset(split)
        return StuckRows(cast(Rows, rows)) if split == "train" else rows


class StuckData(StuckWorkers):
    """The same in the training process itself."""

    workers = 0


class StuckEvaluation(WithWorkers):
    """Its evaluation never ends."""

    workers = 0

    def info(self) -> WorkloadInfo:
        plain = super().info()
        cadence = plain.baseline.cadence.model_copy(update={"evaluate_samples": 512})
        return plain.model_copy(update={"baseline": plain.baseline.model_copy(update={"cadence": cadence})})

    def evaluate(self, model: nn.Module, batches: Iterable[Batch]) -> Mapping[str, float]:
        while os.getpid():
            time.sleep(3600)
        return super().evaluate(model, batches)


class LargeRows(Dataset[Mapping[str, Tensor]]):
    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Mapping[str, Tensor]:
        return {**self.rows[index], "ballast": torch.zeros(75_000)}


class LargeItems(WithWorkers):
    """300 KB an item."""

    def dataset(self, split: Split) -> Any:
        return LargeRows(cast(Rows, super().dataset(split)))
