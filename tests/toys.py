"""Small real workloads for tests: a multilayer perceptron in many moods. Refer to them as `tests.toys:Toy`."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from tuner import randomness
from tuner.contract.base import Scalar
from tuner.contract.config import Cadence, EmaConfig, OptimizerConfig, RunConfig
from tuner.contract.errors import WorkloadError
from tuner.contract.workload import Batch, Progress, Split, Term, WorkloadInfo

PARTS, FEATURES = 4, 16
DEFAULTS: dict[str, Scalar] = {
    "width": 32,
    "depth": 2,
    "dropout": 0.0,
    "batch_norm": False,
    "samples": 512,
    "ragged": True,
    "sleep_s": 0.0,
    "load_s": 0.0,
    "ballast_bytes": 0,
    "fail": "",
    "fail_call": 0,
}
"""sleep_s: seconds a loss call takes longer; load_s: the same for one dataset item; ballast_bytes: memory held per
sample in the forward pass; fail: what call number `fail_call` of the loss does (in this process):
raise, nan, abort, exit, hang, oom_host, oom_device, loader (the dataset raises)."""


class Rows(Dataset[Mapping[str, Tensor]]):
    """`samples` items: x [4, 16], y [4], and a mask [4] of which at least one is true."""

    def __init__(self, samples: int, seed: int, options: Mapping[str, Any]) -> None:
        made = torch.Generator().manual_seed(seed)
        self.x = torch.randn(samples, PARTS, FEATURES, generator=made)
        self.y = torch.tanh(self.x.sum(dim=2) / 4)
        length = torch.randint(1, PARTS + 1, (samples, 1), generator=made)
        self.mask = torch.arange(PARTS)[None] < (length if options["ragged"] else PARTS)
        self.load_s = float(options["load_s"])
        self.broken = options["fail"] == "loader"

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Mapping[str, Tensor]:
        if self.broken:
            raise OSError(f"toy item {index} cannot be read")
        if self.load_s:
            time.sleep(self.load_s)
        return {"x": self.x[index], "y": self.y[index], "mask": self.mask[index]}


class Net(nn.Module):
    def __init__(self, width: int, depth: int, dropout: float, batch_norm: bool) -> None:
        super().__init__()
        self.enter = nn.Linear(FEATURES, width)
        self.blocks = nn.ModuleList(self._block(width, dropout, batch_norm) for _ in range(depth))
        self.leave = nn.Linear(width, 1)

    @staticmethod
    def _block(width: int, dropout: float, batch_norm: bool) -> nn.Sequential:
        parts: list[nn.Module] = [nn.Linear(width, width)]
        if batch_norm:
            parts.append(nn.BatchNorm1d(width))
        return nn.Sequential(*parts, nn.SiLU(), nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        """[B, 4, 16] -> [B, 4]"""
        h = self.enter(x.flatten(0, 1))
        for block in self.blocks:
            h = h + block(h)
        out: Tensor = self.leave(h).view(x.shape[0], x.shape[1])
        return out


class Toy:
    """Denoise and regress: two loss terms, per-sample noise, ragged token weights. Baseline 8 x 2."""

    name = "toy"
    batch_coupled = False

    def __init__(self, options: Mapping[str, Scalar]) -> None:
        unknown = sorted(set(options) - set(DEFAULTS))
        if unknown:
            raise WorkloadError(f"options: {unknown[0]!r} is not known to {self.name}; known: {', '.join(DEFAULTS)}")
        self.options: dict[str, Any] = {**DEFAULTS, **options}
        self.calls = 0

    def info(self) -> WorkloadInfo:
        baseline = RunConfig(
            workload=f"tests.toys:{type(self).__name__}",
            options={key: value for key, value in self.options.items() if value != DEFAULTS[key]},
            micro_batch_size=8,
            accumulation_steps=2,
            optimizer=OptimizerConfig(lr=1e-3),
            ema=EmaConfig(half_life_samples=200),
            max_grad_norm=1.0,
            horizon_samples=4096,
            cadence=Cadence(log_samples=256),
        )
        return WorkloadInfo(
            name=self.name,
            summary="Regresses noisy rows with a small perceptron, for tests.",
            unit="row",
            train_samples=self.options["samples"],
            baseline=baseline,
            batch_coupled=self.batch_coupled,
        )

    def model(self) -> nn.Module:
        o = self.options
        return Net(o["width"], o["depth"], o["dropout"], o["batch_norm"])

    def dataset(self, split: Split) -> Dataset[Mapping[str, Tensor]]:
        samples = self.options["samples"] if split == "train" else 64
        return Rows(samples, 0 if split == "train" else 1, self.options)

    def weights(self, batch: Batch) -> Mapping[str, float]:
        return {"fit": float(batch["mask"].sum()), "size": float(len(batch["x"]))}

    def loss(self, model: nn.Module, batch: Batch) -> Mapping[str, Term]:
        self.calls += 1
        misfortune = self._misfortune(batch)
        noise = randomness.normal(batch["sample_seed"], batch["x"].shape[1:], stream=1)
        out = model(batch["x"] + 0.1 * noise)
        held = [torch.ones(self.options["ballast_bytes"], dtype=torch.uint8) for _ in range(len(out))]
        error = (out - batch["y"]).square() * batch["mask"]
        count = batch["mask"].sum()
        fit = Term(sum=error.sum() * misfortune + 0.0 * len(held), weight=count)
        size = Term(sum=out.square().mean(dim=1).sum(), weight=float(len(out)), coefficient=0.01)
        return {"fit": fit, "size": size}

    def _misfortune(self, batch: Batch) -> float:
        """1.0, or what the `fail` option asks for."""
        if self.options["sleep_s"]:
            time.sleep(self.options["sleep_s"])
        fail = self.options["fail"] if self.calls - 1 == self.options["fail_call"] else ""
        if fail == "nan":
            self.options["fail_call"] += 1
            return float("nan")
        return _fail(fail)

    def evaluate(self, model: nn.Module, batches: Iterable[Batch]) -> Mapping[str, float]:
        total, count = 0.0, 0.0
        for batch in batches:
            error = (model(batch["x"]) - batch["y"]).square() * batch["mask"]
            total += float(error.sum())
            count += float(batch["mask"].sum())
        return {"valid_fit": total / max(count, 1.0)}

    def prepare(self, cache_dir: Path, progress: Progress) -> None:
        done = cache_dir / "toy.json"
        for part in range(3):
            progress(part + 1, 3, "making toys")
        if not done.exists():
            done.write_text(json.dumps({"pid": os.getpid()}))

    def checkpoint_blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        assert isinstance(model, Net)
        return list(model.blocks)

    def sample(self, model: nn.Module, out_dir: Path, seed: int) -> Sequence[Path]:
        out_dir.mkdir(parents=True, exist_ok=True)
        made = torch.randn(1, PARTS, FEATURES, generator=torch.Generator().manual_seed(seed))
        device = next(model.parameters()).device
        path = out_dir / "sample.txt"
        path.write_text(" ".join(f"{v:.6f}" for v in model(made.to(device)).flatten().tolist()))
        return [path]


class BatchNormToy(Toy):
    """Says its samples do not influence each other; its BatchNorm makes them."""

    name = "batch_norm_toy"

    def __init__(self, options: Mapping[str, Scalar]) -> None:
        super().__init__({"batch_norm": True, **options})


def _fail(how: str) -> float:
    if how == "raise":
        raise ValueError("the toy was told to fail")
    if how == "oom_host":
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
    if how == "oom_device":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.")
    if how == "abort":
        os.abort()
    if how == "exit":
        os._exit(0)
    while how == "hang":
        time.sleep(1)
    return 1.0
