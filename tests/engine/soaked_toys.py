"""A toy whose evaluation keeps something of every batch of a longer validation split."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from tests.toys import Rows, Toy
from tuner.contract.workload import Batch, Split

BATCHES = 40


class Keeping(Toy):
    """Keeps `keep_bytes` of every batch; `joined` puts them into one tensor at the end."""

    keep_bytes: ClassVar[int] = 0
    joined: ClassVar[bool] = False

    def dataset(self, split: Split) -> Dataset[Mapping[str, Tensor]]:
        return super().dataset(split) if split == "train" else Rows(8 * BATCHES, 1, self.options)

    def evaluate(self, model: nn.Module, batches: Iterable[Batch]) -> Mapping[str, float]:
        kept: list[Tensor] = []

        def noting(given: Iterable[Batch]) -> Iterable[Batch]:
            for batch in given:
                kept.append(torch.ones(self.keep_bytes, dtype=torch.uint8))
                yield batch

        found: dict[str, Any] = dict(super().evaluate(model, noting(batches)))
        whole = torch.cat(kept) if self.joined else kept[0]
        return {**found, "kept": float(len(kept)), "one": float(whole[:1].sum())}


class Hungry(Keeping):
    """80 MiB over the split."""

    keep_bytes = 2 << 20


class Joining(Hungry):
    """80 MiB, and as many again at the end."""

    joined = True


class Choosy(Hungry):
    """Has no figure for less than the whole split."""

    def evaluate(self, model: nn.Module, batches: Iterable[Batch]) -> Mapping[str, float]:
        found = super().evaluate(model, batches)
        if found["kept"] < BATCHES:
            raise ValueError("only one class present")
        return found
