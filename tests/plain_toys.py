"""Toys as an author writes them on the first evening: items are tuples, the loss is a mean, the optimizer their own.

Refer to them as `tests.plain_toys:Plain`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from tuner.contract.config import OptimizerConfig, RunConfig
from tuner.contract.workload import Term, WorkloadInfo


class Pairs:
    """(float array [6], int label), as torchvision's data sets have it."""

    def __init__(self, samples: int, seed: int) -> None:
        draw = np.random.default_rng(seed)
        self.x = draw.standard_normal((samples, 6), dtype=np.float32)
        self.y = (self.x.sum(1) > 0).astype(int).tolist()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        return self.x[index], self.y[index]


class Plain:
    """`loss` says what the loss returns: `mean`, `named`, `mixed`, `term`, or something that is refused."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = {"loss": "mean", **options}

    def info(self) -> WorkloadInfo:
        baseline = RunConfig(
            workload=f"tests.plain_toys:{type(self).__name__}",
            options=dict(self.options),
            micro_batch_size=4,
            accumulation_steps=2,
            horizon_samples=640,
            threads=1,
            optimizer=OptimizerConfig(lr=0.01),
        )
        return WorkloadInfo(name="plain", summary="Sorts rows", train_samples=64, baseline=baseline)

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))

    def dataset(self, split: str) -> Any:
        return Pairs(64 if split == "train" else 16, seed=int(split == "train"))

    def loss(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> Any:
        errors = nn.functional.cross_entropy(model(batch["0"]), batch["1"], reduction="none")
        term = Term(sum=errors.sum(), weight=float(len(errors)))
        ways: dict[str, Any] = {
            "mean": errors.mean(),
            "named": {"nll": errors.mean()},
            "mixed": {"nll": term, "other": 0.5 * errors.mean()},
            "term": {"loss": term},
            "float": 0.25,
            "none": None,
            "vector": errors,
            "tuple": (errors.mean(), model),
            "named vector": {"nll": errors},
            "no sum": {"nll": Term(sum=0.5, weight=4.0)},  # type: ignore[arg-type]
        }
        return ways[str(self.options["loss"])]

    def evaluate(self, model: nn.Module, batches: Iterable[Mapping[str, torch.Tensor]]) -> Mapping[str, float]:
        right = torch.cat([model(batch["0"]).argmax(1) == batch["1"] for batch in batches])
        return {"accuracy": float(right.float().mean())}


class MeanOverTokens(Plain):
    """A mean over what is unmasked, which is another number of cells in every micro-batch."""

    def loss(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> Any:
        errors = nn.functional.cross_entropy(model(batch["0"]), batch["1"], reduction="none")
        mask = batch["0"][:, 0] > 0
        return (errors * mask).sum() / mask.sum().clamp_min(1)


class Adadelta(Plain):
    """The optimizer and the schedule of PyTorch's MNIST example: lr x 0.7 after every pass over the data."""

    def optimizer(self, model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
        return torch.optim.Adadelta(model.parameters(), lr=config.lr)

    def schedule(self, samples: float, horizon_samples: int) -> float:
        return float(0.7 ** (samples // 64))
