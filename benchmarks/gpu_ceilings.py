"""What this device can do at best, measured: copies, matrix products in each precision, launches of a small kernel.

    python -m benchmarks.gpu_ceilings          one JSON object

A process of its own, as the one that watches probes must hold no memory of the GPU.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable

import torch

from tuner.contract.config import Precision
from tuner.engine.device import choose_device, describe
from tuner.engine.precision import Arithmetic

SIDES = {"cuda": (4096, 8192), "cpu": (512, 1024)}
"""Of square matrices; the best of them is the ceiling."""
COPY_BYTES = {"cuda": 1 << 30, "cpu": 32 << 20}
LAUNCHES = 500
EACH_S = 0.35
"""About how long one figure is measured for."""
ROUNDS = 3
_DTYPES = {Precision.FP16: torch.float16, Precision.BF16: torch.bfloat16}


def ceilings() -> dict[str, object]:
    device = choose_device("auto")
    info = describe()
    return {
        "device": info.name,
        "matmul_flops": {precision.value: matmul_flops(precision, device) for precision in info.dtypes},
        "copy_bytes_per_s": copy_bytes_per_s(device, info.free_bytes),
        "to_device_bytes_per_s": to_device_bytes_per_s(device) if device.type == "cuda" else None,
        "launch_s": launch_s(device),
    }


def matmul_flops(precision: Precision, device: torch.device) -> float:
    """FLOP/s of a product of square matrices, 2 n^3 each, on random numbers: zeros draw less power and run faster."""
    arithmetic = Arithmetic(precision, device)
    try:
        return max(_matmul_flops(side, _DTYPES.get(precision, torch.float32), device) for side in SIDES[device.type])
    finally:
        arithmetic.close()


def _matmul_flops(side: int, dtype: torch.dtype, device: torch.device) -> float:
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty(side, side, device=device, dtype=dtype)

    def product() -> None:
        torch.mm(left, right, out=out)

    return 2.0 * side**3 / seconds(product, device)


def copy_bytes_per_s(device: torch.device, free_bytes: int) -> float:
    """Bytes read and written per second by a copy within the device's memory."""
    size = min(COPY_BYTES[device.type], free_bytes // 8)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2.0 * size / seconds(lambda: target.copy_(source), device)


def to_device_bytes_per_s(device: torch.device) -> float:
    """From pinned host memory."""
    source = torch.ones(COPY_BYTES["cuda"] // 4, dtype=torch.uint8).pin_memory()
    target = torch.empty_like(source, device=device)
    return source.numel() / seconds(lambda: target.copy_(source, non_blocking=True), device)


def launch_s(device: torch.device) -> float:
    """Seconds to launch one operation on a single number: what a step pays for every small operation."""
    number = torch.zeros(1, device=device)

    def launches() -> None:
        for _ in range(LAUNCHES):
            number.add_(1.0)

    return seconds(launches, device) / LAUNCHES


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Of one call: the best of a few rounds, each long enough for the clock, after a warm-up."""
    _timed(work, device, 2)
    one = max(1e-7, _timed(work, device, 1))
    calls = max(1, math.ceil(EACH_S / ROUNDS / one))
    return min(_timed(work, device, calls) for _ in range(ROUNDS)) / calls


def _timed(work: Callable[[], object], device: torch.device, calls: int) -> float:
    _wait(device)
    began = time.perf_counter()
    for _ in range(calls):
        work()
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    json.dump(ceilings(), sys.stdout)
