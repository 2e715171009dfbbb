"""Two small jobs that go wrong on purpose, for the GPU check: one needs the memory it is told to, one never ends."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from tuner.contract.base import Scalar
from tuner.contract.config import OptimizerConfig, RunConfig
from tuner.contract.workload import Batch, Split, Term, WorkloadInfo

WIDTH = 64
STRIKES_AT = 3
"""Spins ends no more from this call of its loss on: the first ones build and warm up."""
KERNEL_CYCLES = 4_000_000
"""Of each kernel of the endless loop: about 2 ms, so that a killed process's queue is soon empty."""


class Numbers(Dataset[Mapping[str, Tensor]]):
    def __len__(self) -> int:
        return 512

    def __getitem__(self, index: int) -> Mapping[str, Tensor]:
        return {"x": torch.full((WIDTH,), index / 512.0)}


class Hungry:
    """A linear model whose loss holds `hold_kib` KiB a sample until it is done; of those only both ends are written."""

    def __init__(self, options: Mapping[str, Scalar]) -> None:
        self.hold_bytes = int(options.get("hold_kib") or 0) << 10
        self.calls = 0

    def info(self) -> WorkloadInfo:
        baseline = RunConfig(
            workload=f"{type(self).__module__}:{type(self).__name__}",
            micro_batch_size=4,
            optimizer=OptimizerConfig(lr=1e-3),
            horizon_samples=1 << 20,
        )
        return WorkloadInfo(name="hungry", summary="Holds memory.", train_samples=512, baseline=baseline)

    def model(self) -> nn.Module:
        return nn.Linear(WIDTH, 1)

    def dataset(self, split: Split) -> Dataset[Mapping[str, Tensor]]:  # noqa: ARG002
        return Numbers()

    def loss(self, model: nn.Module, batch: Batch) -> Mapping[str, Term]:
        self.calls += 1
        x = batch["x"]
        held = torch.empty(len(x) * max(4, self.hold_bytes) // 4, device=x.device)
        held[:1], held[-1:] = 1.0, 1.0
        return {"error": Term(sum=model(x).square().sum() * held[0] * held[-1], weight=float(len(x)))}

    def evaluate(self, model: nn.Module, batches: Iterable[Batch]) -> Mapping[str, float]:  # noqa: ARG002
        return {}


class Spins(Hungry):
    """Launches kernels without end from its third loss on: a hang that holds device and host at once."""

    def loss(self, model: nn.Module, batch: Batch) -> Mapping[str, Term]:
        terms = super().loss(model, batch)
        while self.calls >= STRIKES_AT:
            spin(batch["x"])
        return terms


def spin(x: Tensor) -> Any:
    """One more kernel that takes its time."""
    if x.is_cuda:
        return torch.cuda._sleep(KERNEL_CYCLES)
    side = torch.ones(256, 256)
    return side @ side
