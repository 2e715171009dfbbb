"""Loops timed in turn without ever leaving them: every contender runs once, in a process of its own, and stops for the
others at the borders of its blocks, inside the call that fetches its next batch.

So nothing that happens once (imports, building, a trainer's first step) is in any block, and no contender pays for what
another one imported. Only one process runs at a time; all are pinned to the same core and use one thread.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from multiprocessing.connection import Connection
from typing import Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from benchmarks.ratio import Ratio

TAIL_STEPS = 4
"""Steps after the last block: a loop that fetches a batch ahead must find one there."""
FIRST_SEED = 7
DRAWS = 4000
"""Of the bootstrap."""
SAME_WEIGHTS = 1e-4
"""Relative: contenders whose weights end further from the first one's did not do the same training."""
Item = TypeVar("Item")


@dataclass(frozen=True)
class Job:
    """What one process is to do. Plain values, as it crosses a process border."""

    case: str
    contender: str
    steps: int
    """Optimizer steps in a block."""
    rounds: int
    """Measured blocks; the one before them warms up."""

    @property
    def all_steps(self) -> int:
        return self.steps * (1 + self.rounds) + TAIL_STEPS


@dataclass(frozen=True)
class Contender:
    """One way to run a case. `run` trains until the pace ends and returns the model; its fetches time the blocks."""

    run: Callable[[Pace], nn.Module]
    needs: tuple[str, ...] = ()
    """Distributions that are not among the tuner's own."""
    same_data: bool = True
    """False where it draws its own order of samples: its weights cannot be compared."""

    @property
    def missing(self) -> str:
        """The pip command that would make it run; empty when all is there."""
        absent = [name for name in self.needs if not installed(name)]
        return f"pip install {' '.join(absent)}" if absent else ""


@dataclass(frozen=True)
class Block:
    """Seconds of one block."""

    wall_s: float
    cpu_s: float
    """Of the whole process: what else ran on the core does not count."""


@dataclass(frozen=True)
class Failed:
    text: str


class Pace:
    """Stops a loop at the borders of its blocks: `tick` is called once for every batch, before it is handed out."""

    def __init__(self, job: Job, channel: Connection | None = None, per_step: int = 1) -> None:
        self.job = job
        self._channel = channel
        self._left = self._blocks = 0
        self._wall = self._cpu = 0.0
        self.per_step = per_step
        """Batches in an optimizer step."""

    @property
    def batches(self) -> int:
        return self.job.all_steps * self.per_step

    def tick(self) -> None:
        if not self._left:
            self._border()
        self._left -= 1

    def _border(self) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        if not self._wall:
            torch.manual_seed(FIRST_SEED)  # whatever building drew: dropout is the same for all from here on
        if self._channel is not None:
            self._channel.send(Block(wall - self._wall, cpu - self._cpu))
            self._channel.recv()
        self._blocks += 1
        ended = self._blocks > 1 + self.job.rounds
        self._left = self.batches if ended else self.job.steps * self.per_step
        self._wall, self._cpu = time.perf_counter(), time.process_time()


class Paced(Generic[Item]):
    """The same few batches again and again, until the pace ends."""

    def __init__(self, pace: Pace, batches: Sequence[Item]) -> None:
        self._pace = pace
        self._batches = batches

    def __len__(self) -> int:
        return self._pace.batches

    def __iter__(self) -> Iterator[Item]:
        tick, batches, count = self._pace.tick, self._batches, len(self._batches)
        for number in range(self._pace.batches):
            tick()
            yield batches[number % count]


Find = Callable[[Job], Contender]
"""Must be a function of a module: a child process finds it by its name."""


@dataclass
class _Child:
    process: multiprocessing.process.BaseProcess
    channel: Connection

    def receive(self, name: str) -> Block | float:
        """What the child says next. Raises SystemExit with its traceback when it failed."""
        try:
            found = self.channel.recv()
        except EOFError:
            found = Failed("its process ended without a word")
        if isinstance(found, Failed):
            raise SystemExit(f"{name}: {found.text}")
        assert isinstance(found, Block | float)
        return found


@dataclass(frozen=True)
class Times:
    """Blocks by contender: one list for each set of processes, in the order of its rounds."""

    blocks: Mapping[str, list[list[Block]]]
    weights: Mapping[str, float]
    """Sum of the absolute weights at the end of each contender's training."""


def measure(find: Find, jobs: Mapping[str, Job], sets: int) -> Times:
    """Run all contenders `sets` times, each time in new processes: where a process lies in memory shifts its speed by a
    percent or two for as long as it lives. The order within a round is drawn anew. Raises SystemExit."""
    blocks: dict[str, list[list[Block]]] = {name: [] for name in jobs}
    weights: dict[str, float] = {}
    for number in range(sets):
        found, weights = _one_set(find, jobs, random.Random(number))
        for name, times in found.items():
            blocks[name].append(times)
    return Times(blocks, weights)


def _one_set(
    find: Find, jobs: Mapping[str, Job], chance: random.Random
) -> tuple[dict[str, list[Block]], dict[str, float]]:
    children = {name: _start(find, job) for name, job in jobs.items()}
    try:
        for name, child in children.items():
            child.receive(name)  # built, and waiting before its first batch: seconds that mean nothing
        order, blocks = list(jobs), {name: list[Block]() for name in jobs}
        for round_number in range(1 + next(iter(jobs.values())).rounds):
            chance.shuffle(order)
            for name in order:
                children[name].channel.send(True)
                block = children[name].receive(name)
                assert isinstance(block, Block)
                if round_number:
                    blocks[name].append(block)
        return blocks, {name: _finish(name, child) for name, child in children.items()}
    finally:
        for child in children.values():
            child.process.kill()
            child.process.join()


def _start(find: Find, job: Job) -> _Child:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_contend, args=(find, job, theirs), daemon=False)
    process.start()
    theirs.close()
    return _Child(process, ours)


def _finish(name: str, child: _Child) -> float:
    child.channel.send(True)
    weights = child.receive(name)
    assert isinstance(weights, float)
    return weights


def _contend(find: Find, job: Job, channel: Connection) -> None:
    """The child: what it sends is nothing (ready), blocks, and at last the sum of its weights, or Failed."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    try:
        model = find(job).run(Pace(job, channel))
        with torch.no_grad():
            channel.send(float(sum(p.double().abs().sum() for p in model.parameters())))
    except (BrokenPipeError, EOFError):
        return  # the race was ended from outside
    except BaseException:
        channel.send(Failed(traceback.format_exc()))


def ratio_to(blocks: Sequence[Sequence[float]], base: Sequence[Sequence[float]]) -> Ratio:
    """How many times longer blocks last than those of `base`: the median of the ratios within the rounds.

    [sets][rounds] both. The 95 % interval is a bootstrap of two stages (Davison and Hinkley, Bootstrap Methods and
    their Application, 1997, section 3.8): sets of processes are drawn, and rounds within each of them.
    """
    ratios = np.asarray(blocks, dtype=np.float64) / np.asarray(base, dtype=np.float64)
    middles = _bootstrap(ratios, np.random.default_rng(0))
    low, high = np.quantile(middles, (0.025, 0.975))
    return Ratio(float(np.median(ratios)), float(low), float(high))


def _bootstrap(ratios: NDArray[np.float64], chance: np.random.Generator) -> NDArray[np.float64]:
    sets, rounds = ratios.shape
    chosen = chance.integers(sets, size=(DRAWS, sets, 1))
    places = chance.integers(rounds, size=(DRAWS, sets, rounds))
    return np.asarray(np.median(ratios[chosen, places].reshape(DRAWS, -1), axis=1))


def installed(name: str) -> str:
    """The version of a distribution, or nothing."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""
