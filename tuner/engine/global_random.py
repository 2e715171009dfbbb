"""The random states a process has by itself: torch's, the device's, Python's, NumPy's. Seeded, kept, put back.

The engine draws from torch's alone; a workload may use any of them, and its run must still go on exactly.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

_NUMPY = "MT19937"
"""The generator behind numpy.random's functions, unless someone has replaced it."""


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    seed_host(seed)


def seed_host(seed: int) -> None:
    """All but the devices' (which a loader worker may not touch)."""
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)


def random_state(device: torch.device) -> dict[str, Any]:
    """All of them, as tensors and plain values."""
    return {
        "cpu": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "python": _python_state(),
        "numpy": _numpy_state(),
    }


def restore_random(state: Mapping[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and state["device"] is not None:
        torch.cuda.set_rng_state(state["device"], device)
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    if state["numpy"] is not None:
        words, place, has_gauss, cached = state["numpy"]
        np.random.set_state((_NUMPY, words.numpy().astype(np.uint32), place, has_gauss, cached))


@contextmanager
def untouched(device: torch.device) -> Iterator[None]:
    """The random states are afterwards as they were."""
    before = random_state(device)
    try:
        yield
    finally:
        restore_random(before, device)


def _python_state() -> tuple[int, torch.Tensor, float | None]:
    version, words, gauss = random.getstate()
    return version, torch.tensor(words, dtype=torch.int64), gauss


def _numpy_state() -> tuple[torch.Tensor, int, int, float] | None:
    name, words, place, has_gauss, cached = np.random.get_state(legacy=True)
    if name != _NUMPY:
        return None
    return torch.from_numpy(np.asarray(words, dtype=np.int64)), int(place), int(has_gauss), float(cached)
