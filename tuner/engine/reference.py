"""A fixed small piece of training work: its time, taken again and again, tells the host's own drift.

It is taken where the configuration does not run: on one thread whatever the configuration asks for, while no loader
worker computes, and with its own data fetched into the caches first. It draws from no random state but its own.
"""

from __future__ import annotations

import time

import torch
from torch import nn

REPEATS = 4


class HostReference:
    """Convolution, group norm, matrix product and element-wise work, forward and backward, on fixed tensors (CPU)."""

    def __init__(self) -> None:
        made = torch.Generator().manual_seed(20_240_229)
        self._images = torch.randn(8, 24, 32, 32, generator=made)
        self._kernel = (torch.randn(24, 24, 3, 3, generator=made) * 0.05).requires_grad_()
        self._matrix = (torch.randn(384, 384, generator=made) * 0.05).requires_grad_()
        self._rows = torch.randn(384, 384, generator=made)

    def measure(self, times: int = 1) -> list[float]:
        """Seconds of the work, `times` in a row."""
        threads = torch.get_num_threads()
        _use_threads(1)
        try:
            self._work()
            return [self._timed() for _ in range(times)]
        finally:
            _use_threads(threads)

    def _timed(self) -> float:
        began = time.perf_counter()
        for _ in range(REPEATS):
            self._work()
        return time.perf_counter() - began

    def _work(self) -> None:
        with torch.enable_grad(), torch.autocast("cpu", enabled=False):
            h = nn.functional.conv2d(self._images, self._kernel, padding=1)
            h = nn.functional.silu(nn.functional.group_norm(h, 4))
            product = torch.tanh(self._rows @ self._matrix) @ self._matrix
            loss = h.square().mean() + product.exp().clamp(max=10.0).mean()
            torch.autograd.grad(loss, [self._kernel, self._matrix])


def _use_threads(count: int) -> None:
    if torch.get_num_threads() != count:
        torch.set_num_threads(count)
