"""Toys for runs over several ranks: one that fails on one rank alone, one with an unused part, one with a BatchNorm."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from tests.toys import BatchNormToy, Net, Toy
from tuner.contract.workload import Batch, Split, Term


class Plain(Toy):
    preload: Sequence[str] = ("matplotlib.figure", "matplotlib.backends.backend_agg")
    """What draws the curves at the end of a run: imported once for all of them."""


class FailsOnRankOne(Toy):
    """Out of memory on rank 1 in the fourth loss call at micro-batch 16 and above."""

    large_calls = 0

    def loss(self, model: nn.Module, batch: Batch) -> Mapping[str, Term]:
        self.large_calls += len(batch["x"]) >= 16
        if os.environ.get("RANK") == "1" and self.large_calls == 4:
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
            )
        return super().loss(model, batch)


class PartlyUnused(Toy):
    """A layer that no loss ever reaches, and the lengths of its samples for batches of about equal length."""

    def model(self) -> nn.Module:
        made = super().model()
        assert isinstance(made, Net)
        made.spare = nn.Linear(3, 3)
        return made

    def lengths(self, split: Split) -> Sequence[int]:
        mask: torch.Tensor = self.dataset(split).mask  # type: ignore[attr-defined]
        return [int(length) for length in mask.sum(dim=1)]


class Coupled(BatchNormToy):
    batch_coupled = True
