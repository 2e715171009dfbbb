"""Random draws that belong to a sample: the same seed gives the same numbers in whatever batch the sample travels.

A counter-based generator: `mix(mix(seed, stream) + position)` with the finaliser of SplitMix64 (Steele, Lea, Flood:
Fast Splittable Pseudorandom Number Generators, OOPSLA 2014), in int64 arithmetic that wraps around. The integers are
equal on every device and under torch.compile; it keeps no state, so nothing has to be saved or restored.

A workload's loss draws from `batch["sample_seed"]` and gives every kind of draw its own `stream`:

    t = integers(batch["sample_seed"], 1000, stream=0)
    noise = normal(batch["sample_seed"], x.shape[1:], stream=1)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def _signed(value: int) -> int:
    """The int64 whose 64 bits are those of `value`."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


_GAMMA = _signed(0x9E3779B97F4A7C15)
_FIRST = _signed(0xBF58476D1CE4E5B9)
_SECOND = _signed(0x94D049BB133111EB)


def uniform(seeds: Tensor, shape: Sequence[int], *, stream: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Uniform numbers in [0, 1), one block of `shape` per sample: [B] -> [B, *shape].

    `seeds` is int64 [B]; draws with different `stream` are independent of each other.
    """
    bits = _bits(seeds, math.prod(shape), stream)
    if dtype == torch.float64:
        values = _shift(bits, 11).to(torch.float64) * 2.0**-53
    else:
        values = _shift(bits, 40).to(torch.float32) * 2.0**-24
    return values.to(dtype).reshape(len(seeds), *shape)


def normal(seeds: Tensor, shape: Sequence[int], *, stream: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers, one block of `shape` per sample: [B] -> [B, *shape] (Box and Muller, 1958)."""
    count = math.prod(shape)
    bits = _bits(seeds, (count + 1) // 2, stream)
    work = torch.float64 if dtype == torch.float64 else torch.float32
    first = (_shift(bits, 32).to(work) + 0.5) * 2.0**-32
    second = (bits & 0xFFFFFFFF).to(work) * (2.0 * math.pi * 2.0**-32)
    radius = torch.sqrt(-2.0 * torch.log(first))
    pairs = torch.cat((radius * torch.cos(second), radius * torch.sin(second)), dim=1)
    return pairs[:, :count].to(dtype).reshape(len(seeds), *shape)


def integers(seeds: Tensor, high: int, *, stream: int) -> Tensor:
    """One integer in [0, high) per sample: int64 [B] -> int64 [B]. `high` is at most 2**31."""
    if not 1 <= high <= 1 << 31:
        raise ValueError(f"`1 <= high <= 2**31` must hold, but got high={high}")
    return _shift(_bits(seeds, 1, stream)[:, 0], 11) % high


def sample_seeds(run_seed: int, epoch: int | Tensor, indices: Tensor) -> Tensor:
    """The seed of each sample, from the run's seed, its epoch (an int, or int64 [B]) and its index: int64 [B]."""
    run = _signed(run_seed * 0x632BE59BD9B4E019 + 0x2545F4914F6CDD1D)
    epochs = torch.as_tensor(epoch, dtype=torch.int64, device=indices.device)
    return _mix(_mix(_mix(epochs * _GAMMA + run) + indices) * _FIRST + indices * _GAMMA)


def _bits(seeds: Tensor, count: int, stream: int) -> Tensor:
    """64 random bits for each position: int64 [B] -> int64 [B, count]."""
    key = _mix(seeds + _signed((stream + 1) * 0xD1342543DE82EF95))
    position = torch.arange(1, count + 1, dtype=torch.int64, device=seeds.device)
    return _mix(key[:, None] + position[None, :] * _GAMMA)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _FIRST
    x = (x ^ _shift(x, 27)) * _SECOND
    return x ^ _shift(x, 31)


def _shift(x: Tensor, by: int) -> Tensor:
    """Logical shift right (torch's own keeps the sign)."""
    return (x >> by) & ((1 << (64 - by)) - 1)
