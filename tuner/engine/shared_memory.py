"""Shared memory, through which loader workers hand over their batches: a container often has 64 MiB of it.

When it is full, torch's own error comes in a helper thread of the worker, the batch is lost, and its receiver waits for
ever. So the room is looked at before workers start, and a worker shares its batch where an error still reaches the run.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import psutil
from torch import Tensor

from tuner.contract.config import RunConfig
from tuner.engine.failure import Unsupported

SHM = Path("/dev/shm")
PLENTY = 0.25
"""Free room of so much of the host's memory is not looked at closer: Linux gives a half, containers give little."""
MIB = 1 << 20
CURE = (
    "loader workers hand their batches over in it: use fewer workers, a smaller prefetch_factor, or num_workers 0, or "
    "give the container more (docker run --shm-size=8g, Kubernetes: an emptyDir of medium Memory at /dev/shm)"
)


def share(batch: Mapping[str, Tensor]) -> None:
    """Move a batch into shared memory. Raises Unsupported when there is no room."""
    try:
        for value in batch.values():
            value.share_memory_()
    except RuntimeError as error:
        if "shared memory" not in str(error):
            raise
        raise Unsupported(f"{str(error).splitlines()[0]}: {CURE}") from None


def free_bytes() -> int | None:
    """Room for batches; None where it is plenty, or not known."""
    with suppress(OSError):
        room = os.statvfs(SHM)
        free = room.f_bavail * room.f_frsize
        return free if free < PLENTY * psutil.virtual_memory().total else None
    return None


def check_room(config: RunConfig, sample: Mapping[str, Tensor], free: int) -> None:
    """`sample`: a batch of one. Raises Unsupported where what the workers may make ahead is larger than the room."""
    loader = config.loader
    one = sum(value.numel() * value.element_size() for value in sample.values())
    batches = loader.num_workers * loader.prefetch_factor + 1
    needed = one * config.micro_batch_size * batches
    if needed > free:
        raise Unsupported(
            f"shared memory: {loader.num_workers} loader worker(s) x prefetch_factor {loader.prefetch_factor} hold up "
            f"to {batches} batches, {needed / MIB:.1f} MiB, and {SHM} has {free / MIB:.1f} MiB left; {CURE}"
        )
