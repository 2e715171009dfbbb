"""Two small jobs whose loader binds: items that wait (a network, a disk) and items that compute (decoding)."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from tuner.contract.base import Scalar
from tuner.contract.config import Cadence, LoaderConfig, OptimizerConfig, RunConfig
from tuner.contract.errors import WorkloadError
from tuner.contract.workload import Batch, Split, Term, Terms, WorkloadInfo

Item = dict[str, Tensor]
FEATURES, SAMPLES, VALID = 64, 4096, 256
ITEM_S = 0.005
"""Seconds one item takes: of waiting, or of one core's time."""
BATCH = 16
KNOWN = {"preset": "tiny", "workers": 0, "horizon": 200 * SAMPLES}


class Slow(Dataset[Item]):
    """Rows of numbers, each of which takes `ITEM_S` to bring. `kind`: sleep, burn, or plain (nothing)."""

    def __init__(self, kind: str, samples: int, seed: int) -> None:
        made = torch.Generator().manual_seed(seed)
        self.x = torch.randn(samples, FEATURES, generator=made)
        self.y = (self.x.sum(1) > 0).long()
        self.kind = kind

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Item:
        if self.kind == "sleep":
            time.sleep(ITEM_S)
        elif self.kind == "burn":
            until = time.thread_time() + ITEM_S
            while time.thread_time() < until:
                pass
        return {"x": self.x[index], "y": self.y[index]}


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.ReLU(), nn.Linear(FEATURES, 2))


class Sleeping:
    """The data set waits for each item, as for a network."""

    kind: Literal["sleep", "burn"] = "sleep"

    def __init__(self, options: Mapping[str, Scalar]) -> None:
        self.options: dict[str, Any] = {**KNOWN, **options}
        if unknown := set(options) - set(KNOWN):
            raise WorkloadError(f"options: {', '.join(sorted(unknown))} not known; known are {', '.join(KNOWN)}")

    def info(self) -> WorkloadInfo:
        horizon = int(self.options["horizon"])
        baseline = RunConfig(
            workload=f"benchmarks.honest.jobs:{type(self).__name__}",
            options=self.options,
            optimizer=OptimizerConfig(lr=1e-3),
            micro_batch_size=BATCH,
            horizon_samples=horizon,
            threads=1,
            loader=LoaderConfig(num_workers=int(self.options["workers"])),
            cadence=Cadence(log_samples=1600, evaluate_samples=horizon // 2, checkpoint_samples=horizon // 2),
        )
        return WorkloadInfo(
            name=type(self).__name__.lower(), summary=str(self.__doc__), baseline=baseline, train_samples=SAMPLES
        )

    def dataset(self, split: Split) -> Slow:
        return Slow(self.kind, SAMPLES, 0) if split == "train" else Slow("plain", VALID, 1)

    def model(self) -> nn.Module:
        return net()

    def loss(self, model: nn.Module, batch: Batch) -> Terms:
        errors = nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="sum")
        return {"cross_entropy": Term(sum=errors, weight=float(len(batch["y"])))}

    def evaluate(self, model: nn.Module, batches: Iterable[Batch]) -> Mapping[str, float]:
        right = torch.cat([model(batch["x"]).argmax(1) == batch["y"] for batch in batches])
        return {"accuracy": float(right.float().mean())}


class Burning(Sleeping):
    """The data set computes each item on one core, as decoding does."""

    kind = "burn"
