"""A job whose evaluation keeps something of every batch: what `benchmarks.honest.hungry` trains."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tuner.contract.base import Scalar
from tuner.contract.config import Cadence, OptimizerConfig, RunConfig
from tuner.contract.workload import Batch, Term, WorkloadInfo

BATCHES = 200
MICRO = 4
TRAIN = 320
SIDE = 48


class Hungry:
    """Options: `keep_mib` over the whole validation split, `join` to put it into one tensor at the end, `pause_s` a
    batch."""

    def __init__(self, options: Mapping[str, Scalar]) -> None:
        self.options: dict[str, Any] = {"keep_mib": 100, "join": False, "pause_s": 0.0, **options}
        self.pictures = torch.randn(TRAIN + BATCHES * MICRO, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0))

    def info(self) -> WorkloadInfo:
        baseline = RunConfig(
            workload="benchmarks.honest.hungry_job:Hungry", options=self.options, optimizer=OptimizerConfig(lr=1e-3),
            micro_batch_size=MICRO, accumulation_steps=4, horizon_samples=2 * TRAIN, threads=1,
            cadence=Cadence(log_samples=80, evaluate_samples=TRAIN, checkpoint_samples=TRAIN),
        )  # fmt: skip
        return WorkloadInfo(name="hungry", summary="An evaluation that keeps", baseline=baseline, train_samples=TRAIN)

    def dataset(self, split: Literal["train", "valid"]) -> list[dict[str, Tensor]]:
        part = self.pictures[:TRAIN] if split == "train" else self.pictures[TRAIN:]
        return [{"x": picture, "y": picture.mean() > 0} for picture in part]

    def model(self) -> nn.Module:
        layers: list[nn.Module] = [nn.Conv2d(1, 32, 3, padding=1)]
        for _ in range(6):
            layers += [nn.GELU(), nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.Sigmoid()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 2))

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Term]:
        errors = nn.functional.cross_entropy(model(batch["x"]), batch["y"].long(), reduction="sum")
        return {"cross_entropy": Term(sum=errors, weight=float(len(batch["y"])))}

    def evaluate(self, model: nn.Module, batches: Iterable[Batch]) -> Mapping[str, float]:
        a_batch = int(self.options["keep_mib"]) * (1 << 18) // BATCHES
        kept: list[Tensor] = []
        right, count = 0, 0
        for batch in batches:
            time.sleep(float(self.options["pause_s"]))
            kept.append(torch.ones(a_batch))
            right += int((model(batch["x"]).argmax(1) == batch["y"]).sum())
            count += len(batch["y"])
        features = torch.cat(kept) if self.options["join"] else torch.zeros(1)
        return {"accuracy": right / count, "mean": float(features.mean())}
