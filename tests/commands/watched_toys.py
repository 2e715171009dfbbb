"""A toy whose speed and memory hang on its micro-batch, as if the machine were another than the one measured on."""

from __future__ import annotations

import time
from collections.abc import Mapping

from torch import nn

from tests.toys import Toy
from tuner.contract.base import Scalar
from tuner.contract.workload import Batch, Term

NAME = "tests.commands.watched_toys:Moody"


class Moody(Toy):
    """slow_batch: micro-batches of this size take 20 ms longer. oom_batch: those of at least this size run out of
    memory, from loss call number oom_call on."""

    name = "moody"

    def __init__(self, options: Mapping[str, Scalar]) -> None:
        own = dict(options)
        self.slow_batch = own.pop("slow_batch", 0)
        self.oom_batch = int(own.pop("oom_batch", 1 << 30) or 0)
        self.oom_call = int(own.pop("oom_call", 0) or 0)
        super().__init__(own)

    def loss(self, model: nn.Module, batch: Batch) -> Mapping[str, Term]:
        terms = super().loss(model, batch)
        size = len(batch["x"])
        if size == self.slow_batch:
            time.sleep(0.02)
        if size >= self.oom_batch and self.calls > self.oom_call:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9.")
        return terms
