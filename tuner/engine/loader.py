"""Batches from an endless, deterministic stream of samples.

Position i of the stream names (epoch, index) as a pure function of (seed, i). So the order of samples depends neither
on the micro-batch size nor on the number of workers, and to resume is to start at a position.
"""

from __future__ import annotations

import os
import time
import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from tuner import stopping
from tuner.contract.config import RunConfig
from tuner.contract.errors import WorkloadError
from tuner.contract.workload import SAMPLE_SEED
from tuner.engine import shared_memory
from tuner.engine.distributed import this_rank
from tuner.engine.failure import LoaderFailed, Unsupported
from tuner.engine.global_random import seed_host, untouched
from tuner.randomness import sample_seeds

TensorBatch = dict[str, Tensor]
Key = tuple[int, int]
"""(epoch, index)"""
WINDOW_STEPS = 32
"""Optimizer steps sorted by length together; a power of two."""
WAIT_S = 2
"""How long a batch is waited for at a time; between two waits it is asked whether the run is to stop."""
TABLE_SAMPLES = 1 << 18
"""Their seeds take 2 MiB in each worker, and some milliseconds an epoch."""
_Item = Mapping[str, Tensor]


class StoppedWaiting(Exception):
    """The run was asked to stop while it waited for the first batch of a step: it stands at a step border."""


class SampleOrder:
    """Stream position -> (epoch, index): each epoch is a permutation of its own."""

    def __init__(self, size: int, seed: int) -> None:
        if size < 1:
            raise WorkloadError("dataset: the training split is empty")
        self.size = size
        self.seed = seed
        self._kept: dict[int, Tensor] = {}

    def key(self, position: int) -> Key:
        return self.keys(position, 1)[0]

    def keys(self, start: int, count: int) -> list[Key]:
        """Of `count` positions from `start` on: reading a tensor's numbers one by one takes longer than all of them."""
        found: list[Key] = []
        while len(found) < count:
            epoch, place = divmod(start + len(found), self.size)
            part = self._permutation(epoch)[place : place + count - len(found)].tolist()
            found += [(epoch, index) for index in part]
        return found

    def _permutation(self, epoch: int) -> Tensor:
        if epoch not in self._kept:
            if len(self._kept) > 1:
                self._kept.pop(min(self._kept))
            seed = int(sample_seeds(self.seed, epoch, torch.tensor([-1])))
            self._kept[epoch] = torch.randperm(self.size, generator=torch.Generator().manual_seed(seed))
        return self._kept[epoch]


class BucketedOrder:
    """A sample order in which the samples of one optimizer step have about the same length, so that little is padding.

    Windows of `WINDOW_STEPS` steps of the plain order are sorted by length and cut into steps. Which samples make a
    step hangs on the effective batch size alone, never on how the step is cut into micro-batches. Any few steps in a
    row show short and long ones alike (bit-reversed order, turned at random), so a short measurement speaks for a long
    run; the very first step has the longest samples of its window, so that a lack of memory shows at once.
    """

    def __init__(self, plain: SampleOrder, lengths: Sequence[int], step_samples: int) -> None:
        if len(lengths) != plain.size:
            raise WorkloadError(f"lengths: {len(lengths)} were given for {plain.size} training samples")
        self.plain = plain
        self.lengths = lengths
        self.step = step_samples
        self._kept: dict[int, list[Key]] = {}

    def key(self, position: int) -> Key:
        window, place = divmod(position, WINDOW_STEPS * self.step)
        return self._window(window)[place]

    def keys(self, start: int, count: int) -> list[Key]:
        return [self.key(position) for position in range(start, start + count)]

    def _window(self, number: int) -> list[Key]:
        if number not in self._kept:
            if len(self._kept) > 1:
                self._kept.pop(min(self._kept))
            size = WINDOW_STEPS * self.step
            keys = self.plain.keys(number * size, size)
            keys.sort(key=lambda key: -self.lengths[key[1]])
            turn = int(sample_seeds(self.plain.seed, number, torch.tensor([-2]))) % WINDOW_STEPS if number else 0
            firsts = [(_reversed_bits(place) ^ turn) * self.step for place in range(WINDOW_STEPS)]
            self._kept[number] = [key for first in firsts for key in keys[first : first + self.step]]
        return self._kept[number]


def _reversed_bits(place: int) -> int:
    bits = WINDOW_STEPS.bit_length() - 1
    return int(f"{place:0{bits}b}"[::-1], 2)


def sample_order(workload: Any, config: RunConfig, size: int) -> SampleOrder | BucketedOrder:
    """The order of the training samples; bucketed where the workload names their lengths."""
    plain = SampleOrder(size, config.seed)
    lengths = workload.lengths("train") if hasattr(workload, "lengths") else None
    return plain if lengths is None else BucketedOrder(plain, lengths, config.effective_batch_size)


class StreamSampler(Sampler[list[Key]]):
    """Endless micro-batches of keys from `start` on; of each global micro-batch this rank takes its part."""

    def __init__(
        self,
        order: SampleOrder | BucketedOrder,
        micro_batch_size: int,
        start: int,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.order = order
        self.micro = micro_batch_size
        self.start = start
        self.rank = rank
        self.ranks = ranks

    def __iter__(self) -> Iterator[list[Key]]:
        position = self.start + self.rank * self.micro
        while True:
            yield self.order.keys(position, self.micro)
            position += self.ranks * self.micro


class NotedSampler(StreamSampler):
    """Keeps the keys it gave out, so that a batch gets its seeds where it arrives: each tensor from a loader worker
    travels in shared memory of its own, which takes a third of a millisecond of either process (burning items, w2)."""

    noted: deque[list[Key]]

    def __iter__(self) -> Iterator[list[Key]]:
        self.noted = deque()
        for keys in super().__iter__():
            self.noted.append(keys)
            yield keys


class Keyed(Dataset[tuple[Key, _Item]]):
    """The workload's dataset, its items with the key they were asked for.

    In a worker process the random states follow from the batch, not from the batches before it: items that draw from
    them are the same in a resumed run, whichever worker makes them.
    """

    def __init__(self, dataset: Dataset[_Item], run_seed: int = 0) -> None:
        self.dataset = dataset
        self.run_seed = run_seed

    def __getitems__(self, keys: Sequence[Key]) -> list[tuple[Key, _Item]]:
        if get_worker_info() is not None:
            epoch, index = keys[0]
            seed_host(int(sample_seeds(self.run_seed, epoch, torch.tensor([index]))))
        many = getattr(self.dataset, "__getitems__", None)
        items = many([index for _, index in keys]) if many else [self.dataset[index] for _, index in keys]
        return list(zip(keys, items, strict=True))

    def __getitem__(self, key: Key) -> tuple[Key, _Item]:
        return key, self.dataset[key[1]]

    def __len__(self) -> int:
        return len(cast(Any, self.dataset))


class SeedTable:
    """The seeds of an epoch of at most `TABLE_SAMPLES`, made at once: for a few samples the two dozen small operations
    behind a seed take longer than looking it up. `size` 0: samples of unknown number, each seed made as it is asked."""

    def __init__(self, run_seed: int, size: int = 0) -> None:
        self.run_seed = run_seed
        self.size = size
        self._epoch: int | None = None
        self._seeds = torch.empty(0, dtype=torch.int64)

    def __call__(self, keys: Sequence[Key]) -> Tensor:
        """int64 [len(keys)]"""
        epoch = keys[0][0]
        if not 0 < self.size <= TABLE_SAMPLES or any(other != epoch for other, _ in keys):
            epochs, indices = torch.tensor(keys, dtype=torch.int64).unbind(1)
            return sample_seeds(self.run_seed, epochs, indices)
        if epoch != self._epoch:
            self._epoch, self._seeds = epoch, sample_seeds(self.run_seed, epoch, torch.arange(self.size))
        return self._seeds[torch.tensor([index for _, index in keys])]


class Stack:
    """Items with keys -> one batch, by the workload's own rule or by stacking; without the samples' seeds."""

    def __init__(self, workload: Any) -> None:
        self.own = getattr(workload, "collate", None)

    def __call__(self, pairs: Sequence[tuple[Key, _Item]]) -> TensorBatch:
        items = [item for _, item in pairs]
        batch = tensors_of(self.own(items), "collate", "batch") if self.own else _stack(items)
        if get_worker_info() is not None:
            shared_memory.share(batch)
        return batch


class Collate(Stack):
    """The same with the seed of each sample."""

    def __init__(self, workload: Any, run_seed: int, size: int = 0) -> None:
        super().__init__(workload)
        self.seeds = SeedTable(run_seed, size)

    def __call__(self, pairs: Sequence[tuple[Key, _Item]]) -> TensorBatch:
        batch = super().__call__(pairs)
        batch[SAMPLE_SEED] = self.seeds([key for key, _ in pairs])
        return batch


def _stack(items: Sequence[Any]) -> TensorBatch:
    parts = [tensors_of(item, "dataset", "item") for item in items]
    try:
        return {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
    except (RuntimeError, KeyError) as error:
        why = f"one has no part {error}" if isinstance(error, KeyError) else str(error)
        raise WorkloadError(
            f"dataset: items cannot be stacked into a batch ({why}); give the workload a `collate`"
        ) from None


def tensors_of(found: Any, method: str, what: str) -> TensorBatch:
    """An item or a batch as a workload's `method` gave it, as tensors by name. The parts of a tuple or list are named
    by their place: "0", "1". Raises WorkloadError."""
    if isinstance(found, tuple | list):
        found = {str(place): value for place, value in enumerate(found)}
    if not isinstance(found, Mapping):
        raise WorkloadError(
            f"{method}: the {what} is a {type(found).__name__}; return a dict of tensors, or a tuple, whose parts the "
            'batch then names "0", "1", ...'
        )
    return {
        name: value if isinstance(value, Tensor) else _as_tensor(value, f"{method}: part {name!r} of the {what}")
        for name, value in found.items()
    }


def _as_tensor(value: Any, part: str) -> Tensor:
    try:
        return torch.as_tensor(value)
    except (RuntimeError, TypeError, ValueError):
        raise WorkloadError(
            f"{part} is a {type(value).__name__}; a tensor, a number, or a numpy array is needed: make one of it, or "
            "give the workload a `collate` that does"
        ) from None


@dataclass(frozen=True)
class Group:
    """The micro-batches of one optimizer step, and what was counted and measured while fetching them."""

    batches: list[TensorBatch]
    weights: dict[str, float] = field(default_factory=dict)
    """Loss term -> weight summed over the group, where the workload counts its own."""
    wait_s: float = 0.0

    @cached_property
    def samples(self) -> int:
        return sum(batch_size(batch) for batch in self.batches)

    @cached_property
    def elements(self) -> int:
        """Numbers in the batches, padding included."""
        return sum(value.numel() for batch in self.batches for value in batch.values())


def batch_size(batch: Mapping[str, Tensor]) -> int:
    return len(batch[SAMPLE_SEED])


def count_weights(workload: Any, batches: Sequence[TensorBatch]) -> dict[str, float]:
    """The weights of the loss terms over a group, counted before any forward pass and where the batches lie."""
    total: dict[str, float] = {}
    if hasattr(workload, "weights"):
        for batch in batches:
            for name, weight in workload.weights(batch).items():
                total[name] = total.get(name, 0.0) + float(weight)
    return total


class Source(Protocol):
    """Where a trainer gets its groups from."""

    def next_group(self) -> Group: ...

    def ready(self) -> int:
        """Micro-batches that lie ready, made ahead by workers; 0 without workers."""
        ...

    def idle(self) -> bool:
        """Have the workers nothing to do, as everything they may make ahead lies ready?"""
        ...

    def close(self) -> None: ...


class StreamSource:
    """Groups from the loader, starting at a stream position. Raises LoaderFailed from `next_group`."""

    def __init__(
        self, workload: Any, config: RunConfig, device: torch.device, *, start: int = 0, dataset: Any = None
    ) -> None:
        self.workload = workload
        self.accumulation = config.accumulation_steps
        self._loader = make_loader(workload, config, device, start=start, dataset=dataset)
        self._seeds = SeedTable(config.seed, len(cast(Any, self._loader.dataset)))
        self._batches: Iterator[TensorBatch] | None = None
        self._config = config
        self._alone = config.world_size == 1

    def next_group(self) -> Group:
        """Raises LoaderFailed and StoppedWaiting."""
        began = time.perf_counter()
        batches = [self.next_batch() for _ in range(self.accumulation)]
        wait_s = time.perf_counter() - began
        return Group(batches, count_weights(self.workload, batches), wait_s)

    def next_batch(self) -> TensorBatch:
        try:
            if self._batches is None:
                self._look_at_room()
                with _many_workers_allowed(), stopping.held_back():
                    self._batches = iter(self._loader)
            batch = self._await(self._batches)
            batch[SAMPLE_SEED] = self._seeds(cast(NotedSampler, self._loader.batch_sampler).noted.popleft())
            return batch
        except (StoppedWaiting, Unsupported):
            raise
        except Exception as error:
            raise LoaderFailed("the data loader failed") from error

    def _look_at_room(self) -> None:
        """Raises Unsupported where shared memory cannot hold what the workers may make ahead."""
        if self._config.loader.num_workers and (free := shared_memory.free_bytes()) is not None:
            data = cast(Keyed, self._loader.dataset)
            with untouched(torch.device("cpu")):
                batch = Stack(self.workload)([data[(0, 0)]])
            shared_memory.check_room(self._config, batch, free)

    def _await(self, batches: Iterator[TensorBatch]) -> TensorBatch:
        """The next batch, however long it takes, unless the run is asked to stop; one of several ranks may not end its
        wait alone, as the others would wait for it."""
        while True:
            try:
                return next(batches)
            except RuntimeError as error:
                if not str(error).startswith("DataLoader timed out"):
                    raise
                if self._alone and stopping.asked() is not None:
                    raise StoppedWaiting from None

    def ready(self) -> int:
        early = getattr(self._batches, "_task_info", {}).values()  # those that came before their turn hold their data
        return self._queued() + sum(len(task) > 1 for task in early)

    def idle(self) -> bool:
        return self._queued() >= int(getattr(self._batches, "_tasks_outstanding", 0))

    def _queued(self) -> int:
        """torch's DataLoader tells this in private places only; where it does not (macOS), nothing lies ready."""
        with suppress(AttributeError, NotImplementedError):
            return int(cast(Any, self._batches)._data_queue.qsize())
        return 0

    @property
    def worker_pids(self) -> list[int]:
        """The processes that make the batches; empty without workers."""
        return [int(worker.pid) for worker in getattr(self._batches, "_workers", ())]

    def close(self) -> None:
        """End the workers now, not when the garbage collector comes."""
        iterator, self._batches = self._batches, None
        shutdown = getattr(iterator, "_shutdown_workers", None)
        if shutdown is not None:
            shutdown()


class ResidentSource:
    """The same few groups again and again, already on the device: steps without a loader."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self._groups = list(groups)
        self._next = 0

    def next_group(self) -> Group:
        group = self._groups[self._next % len(self._groups)]
        self._next += 1
        return group

    def ready(self) -> int:
        return 0

    def idle(self) -> bool:
        return True

    def close(self) -> None:
        self._groups.clear()


def make_loader(
    workload: Any, config: RunConfig, device: torch.device, *, start: int = 0, dataset: Any = None
) -> DataLoader[TensorBatch]:
    """The DataLoader of a run; its batches have no seeds yet. Its generator is its own: iterating it leaves torch's
    random state alone."""
    data = workload.dataset("train") if dataset is None else dataset
    order, rank = sample_order(workload, config, len(data)), this_rank(config)
    settings: dict[str, Any] = {}
    if config.loader.num_workers:
        settings = {
            "prefetch_factor": config.loader.prefetch_factor,
            "persistent_workers": config.loader.persistent_workers,
            "timeout": WAIT_S,
            "worker_init_fn": _pass_signals_on,
        }
    with _many_workers_allowed():
        return DataLoader(
            cast(Any, Keyed(data, config.seed)),
            batch_sampler=NotedSampler(order, config.micro_batch_size, start, rank.index, rank.world_size),
            collate_fn=Stack(workload),
            num_workers=config.loader.num_workers,
            pin_memory=config.loader.pin_memory and device.type == "cuda",
            generator=torch.Generator().manual_seed(config.seed),
            **settings,
        )


def _pass_signals_on(_worker: int) -> None:
    """A worker that a signal ended would take the run's checkpoint with it."""
    stopping.pass_on(os.getppid())


@contextmanager
def _many_workers_allowed() -> Iterator[None]:
    """Torch warns of more workers than cores; whether they pay is what a probe measures. Python 3.12 warns of a fork
    beside threads; ours only sleep then, and hold no lock."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork", category=DeprecationWarning)
        yield


def first_batches(
    workload: Any, config: RunConfig, count: int, *, dataset: Any = None, start: int = 0
) -> list[TensorBatch]:
    """`count` micro-batches from `start` on, fetched in this process. Raises LoaderFailed."""
    data = workload.dataset("train") if dataset is None else dataset
    order, rank = sample_order(workload, config, len(data)), this_rank(config)
    sampler = StreamSampler(order, config.micro_batch_size, start, rank.index, rank.world_size)
    keyed, collate = Keyed(data), Collate(workload, config.seed)
    try:
        return [collate(keyed.__getitems__(keys)) for keys, _ in zip(sampler, range(count), strict=False)]
    except WorkloadError:
        raise
    except Exception as error:
        raise LoaderFailed("the dataset failed") from error


def valid_batches(workload: Any, config: RunConfig, limit: int | None = None) -> Iterator[TensorBatch]:
    """The validation split in order, with the same seeds every time; `limit` counts batches."""
    data = workload.dataset("valid")
    collate = Collate(workload, config.seed)
    for number, start in enumerate(range(0, len(data), config.micro_batch_size)):
        if limit is not None and number >= limit:
            return
        keys = [(-1, index) for index in range(start, min(start + config.micro_batch_size, len(data)))]
        yield collate(Keyed(data).__getitems__(keys))


def valid_count(workload: Any, config: RunConfig) -> int:
    """Micro-batches of the validation split."""
    return -(-len(workload.dataset("valid")) // config.micro_batch_size)


def to_device(batch: Mapping[str, Tensor], device: torch.device, *, channels_last: bool) -> TensorBatch:
    """Copy, without waiting where the source is pinned; 4-D floating tensors in channels_last where asked."""
    if device.type == "cpu" and not channels_last:
        return dict(batch)
    moved: TensorBatch = {}
    for name, value in batch.items():
        images = channels_last and value.dim() == 4 and value.is_floating_point()
        layout = torch.channels_last if images else torch.preserve_format
        moved[name] = value.to(device, non_blocking=device.type == "cuda", memory_format=layout)
    return moved
