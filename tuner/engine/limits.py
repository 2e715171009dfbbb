"""A hard cap on the memory of a probe, so that running out of it is a clean error on any machine."""

from __future__ import annotations

import contextlib
import re
import resource
from collections.abc import Iterator

import torch
from torch import nn

from tuner.engine.failure import Unsupported
from tuner.engine.memory import status_bytes

ONEDNN_FAILED = re.compile(r"could not (create|execute) a primitive")


@contextlib.contextmanager
def memory_cap(cap_bytes: int | None, device: torch.device) -> Iterator[None]:
    """Hold the cap while inside. CUDA: the allocator's share of the device (the context is outside it).
    CPU: growth of the data segment from now on. Raises Unsupported where the system has no such limit."""
    if cap_bytes is None:
        yield
    elif device.type == "cuda":
        with _cuda_cap(cap_bytes, device):
            yield
    else:
        with _data_cap(cap_bytes):
            yield


@contextlib.contextmanager
def _cuda_cap(cap_bytes: int, device: torch.device) -> Iterator[None]:
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, cap_bytes / total), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


@contextlib.contextmanager
def _data_cap(cap_bytes: int) -> Iterator[None]:
    warm_up()
    held = status_bytes("VmData")
    if held is None:
        raise Unsupported("memory_bytes: a memory cap on the CPU needs /proc/self/status (Linux)")
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = held + cap_bytes
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (wanted, hard))
    try:
        yield
    except RuntimeError as error:
        if ONEDNN_FAILED.search(str(error)):  # what oneDNN says when its scratch memory is refused
            raise MemoryError(f"{error}: oneDNN got no memory under the cap of {cap_bytes >> 20} MiB") from error
        raise
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def warm_up() -> None:
    """A step of a tiny model with every thread: a thread pool that cannot be started kills the process instead."""
    model = nn.Sequential(nn.Conv2d(4, 16, 3, padding=1), nn.GroupNorm(2, 16), nn.SiLU(), nn.Conv2d(16, 4, 3))
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        out = model(torch.ones(4, 4, 64, 64))
        (out.square().mean() + (torch.ones(256, 256) @ torch.ones(256, 256)).mean()).backward()
