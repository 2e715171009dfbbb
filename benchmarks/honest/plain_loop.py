"""A training loop as anybody writes one, timed by the wall clock over an unbroken stretch, without any of the tuner."""

from __future__ import annotations

import math
import multiprocessing
import os
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, RandomSampler

from benchmarks.honest.jobs import Slow, net

ENDLESS = 1 << 30
"""Samples a sampler draws before it ends: no epoch's border lies in a stretch."""
SETTLED_S = 0.5
"""Seconds of steps before the stretch, besides what was prefetched."""


@dataclass(frozen=True)
class Asked:
    kind: str
    micro_batch_size: int
    num_workers: int
    prefetch_factor: int
    seconds: float
    """Of the stretch at least; it ends with a whole round of the workers."""


def samples_per_s(asked: Asked) -> float:
    """Measured in a process of its own, forked from this one, which must have done nothing with torch but import it."""
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(asked, theirs))
    process.start()
    theirs.close()
    try:
        return float(mine.recv())
    finally:
        process.join()


def _run(asked: Asked, answer: Connection) -> None:
    os.setsid()  # as a probe is: Linux shares the cores out by session first (sched_autogroup)
    torch.set_num_threads(1)
    model = net().train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    batches = _batches(asked)
    buffered = asked.num_workers * asked.prefetch_factor
    steps, began = 0, time.perf_counter()
    while steps < 2 + buffered or time.perf_counter() - began < SETTLED_S:
        _step(model, optimizer, batches)
        steps += 1
    every, steps, began = max(1, asked.num_workers), 0, time.perf_counter()
    while steps % every or time.perf_counter() - began < asked.seconds:
        _step(model, optimizer, batches)
        steps += 1
    answer.send(steps * asked.micro_batch_size / (time.perf_counter() - began))
    answer.close()


def _batches(asked: Asked) -> Iterator[dict[str, torch.Tensor]]:
    data = Slow(asked.kind, 4096, 0)
    words: dict[str, Any] = {"prefetch_factor": asked.prefetch_factor} if asked.num_workers else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return iter(
            DataLoader(
                data,
                batch_size=asked.micro_batch_size,
                sampler=RandomSampler(data, replacement=True, num_samples=ENDLESS),
                num_workers=asked.num_workers,
                **words,
            )
        )


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterator[dict[str, torch.Tensor]]) -> None:
    batch = next(batches)
    loss = nn.functional.cross_entropy(model(batch["x"]), batch["y"])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if not math.isfinite(loss.item()):
        raise SystemExit("the loss is not finite")
