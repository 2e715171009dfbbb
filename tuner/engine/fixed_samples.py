"""Samples of a run's stream, each fetched once, that may be cut into micro-batches in any way."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tuner.contract.config import RunConfig
from tuner.contract.equivalence import Figure
from tuner.contract.errors import WorkloadError
from tuner.contract.workload import SAMPLE_SEED
from tuner.engine.distributed import this_rank
from tuner.engine.failure import LoaderFailed
from tuner.engine.global_random import seed_host
from tuner.engine.loader import Collate, Key, Keyed, StreamSampler, TensorBatch, sample_order
from tuner.randomness import sample_seeds

LOOKED_AT = 16
"""So many samples are fetched a second time."""
Cut = list[list[Key]]
"""The keys of each micro-batch."""


class FixedSamples:
    """Random states are set before every sample and batch, so that the same keys give the same numbers in every cut and
    on every rank. Raises LoaderFailed where the data set or `collate` fails."""

    def __init__(self, workload: Any, config: RunConfig, dataset: Any) -> None:
        self._keyed = Keyed(dataset, config.seed)
        self._collate = Collate(workload, config.seed)
        self._order = sample_order(workload, config, len(dataset))
        self._seed = config.seed
        self._items: dict[Key, Any] = {}
        self._whole: tuple[dict[Key, int], TensorBatch] | None = None
        self.unheld = False
        """True once a random `collate` had to be called for each cut anew."""

    def cut(self, config: RunConfig, start: int) -> Cut:
        """This rank's micro-batches of the step that begins at stream position `start`."""
        rank = this_rank(config)
        sampler = StreamSampler(self._order, config.micro_batch_size, start, rank.index, rank.world_size)
        return [keys for keys, _ in zip(sampler, range(config.accumulation_steps), strict=False)]

    def batches(self, cut: Cut) -> list[TensorBatch]:
        if self._whole is not None:
            places, whole = self._whole
            if all(key in places for keys in cut for key in keys):
                return [_rows(whole, [places[key] for key in keys]) for keys in cut]
            self.unheld = True
        return [self._collated(keys, self._seed) for keys in cut]

    def look_twice(self, cut: Cut) -> dict[str, float]:
        """Does the data set give the same sample when asked again, and `collate` the same batch? Where it is `collate`
        that draws, batches are split from one collated batch of `cut` from now on."""
        keys = [key for batch in cut for key in batch]
        few = keys[:LOOKED_AT]
        first, same = self._collated(few, self._seed), self._collated(few, self._seed)
        again = self._collated(few, self._seed, [self._fetch(key, 1) for key in few])
        shuffled = _share_apart(first, self._collated(few, self._seed + 1))
        if shuffled:
            self._hold(keys)
        own_state = _share_apart(first, same) > 0  # of `collate`: then the items' part in it cannot be told
        return {Figure.REFETCHED: 0.0 if own_state else _share_apart(first, again), Figure.RECOLLATED: shuffled}

    def _hold(self, keys: Sequence[Key]) -> None:
        whole = self._collated(keys, self._seed)
        if all(value.dim() and len(value) == len(keys) for value in whole.values()):
            self._whole = {key: place for place, key in enumerate(keys)}, whole
        else:
            self.unheld = True

    def _collated(self, keys: Sequence[Key], seed: int, items: Sequence[Any] | None = None) -> TensorBatch:
        fetched = [self._item(key) for key in keys] if items is None else items
        seed_host(seed)
        try:
            return self._collate(list(zip(keys, map(copy.copy, fetched), strict=True)))
        except WorkloadError:
            raise
        except Exception as error:
            raise LoaderFailed("collate failed") from error

    def _item(self, key: Key) -> Any:
        if key not in self._items:
            self._items[key] = self._fetch(key, 0)
        return self._items[key]

    def _fetch(self, key: Key, time: int) -> Any:
        epoch, index = key
        seed_host(int(sample_seeds(self._seed + time, epoch, torch.tensor([index]))))
        try:
            [(_, item)] = self._keyed.__getitems__([key])
        except WorkloadError:
            raise
        except Exception as error:
            raise LoaderFailed("the dataset failed") from error
        return item


def _rows(batch: TensorBatch, places: list[int]) -> TensorBatch:
    chosen = torch.tensor(places)
    return {name: value[chosen] for name, value in batch.items()}


def _share_apart(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """Share of the samples that differ between two batches of the same keys; 1 where that cannot be told by sample."""
    size = len(first[SAMPLE_SEED])
    apart = torch.zeros(size, dtype=torch.bool)
    for name, value in first.items():
        other = second.get(name)
        if other is None or other.shape != value.shape:
            return 1.0
        same = (value == other) | ((value != value) & (other != other))  # two NaN are the same number here
        if value.dim() == 0 or len(value) != size:
            apart |= ~same.all()
        else:
            apart |= ~same.reshape(size, -1).all(dim=1)
    return float(apart.double().mean())
