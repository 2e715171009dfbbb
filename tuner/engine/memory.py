"""Peak memory of a run: resident host memory, the CUDA allocator, and what the device holds outside it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from pathlib import Path

import psutil
import torch

from tuner.contract.measurement import EvaluationPart, MemoryPeak

_STATUS = Path("/proc/self/status")


def status_bytes(field: str) -> int | None:
    """A field of /proc/self/status, e.g. VmHWM, in bytes; None where there is none."""
    with contextlib.suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return None


def resident_bytes() -> int:
    return int(psutil.Process().memory_info().rss)


class _HeapFigures(ctypes.Structure):
    """`struct mallinfo2` of glibc: the fifth is what is mapped apart, the eighth what else is in use."""

    _fields_ = (("sizes", ctypes.c_size_t * 10),)


def heap_bytes() -> int:
    """Bytes in use in the C heap, tensors' among them, to the byte; 0 where the C library does not tell (glibc does,
    from 2.33 on)."""
    ask = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if ask is None:
        return 0
    ask.restype = _HeapFigures
    sizes = ask().sizes
    return int(sizes[4]) + int(sizes[7])


def tidy() -> None:
    """Give back what a finished point held: garbage, the CUDA cache, and freed pages of the C heap."""
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


class PeakMemory:
    """Watches from its making on; `base_bytes` is what the process held then, unless an earlier base is given."""

    def __init__(self, device: torch.device, base_bytes: int | None = None) -> None:
        self.evaluation: EvaluationPart | None = None
        """What a soak has to say of the peak."""
        self._device = device
        self._resets = _reset_high_water()
        self._seen = resident_bytes()
        self._lately = self._seen
        self._allocated = self._reserved = 0
        self.base_bytes = base_bytes if base_bytes is not None else self._seen
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    @property
    def in_use(self) -> int:
        """Bytes in use now, to the byte: the allocator's on a GPU, the C heap's without one."""
        return torch.cuda.memory_allocated(self._device) if self._device.type == "cuda" else heap_bytes()

    @property
    def held(self) -> int:
        """Bytes held from the system now: reserved on a GPU, resident without one."""
        return torch.cuda.memory_reserved(self._device) if self._device.type == "cuda" else resident_bytes()

    @property
    def most_lately(self) -> int:
        """The most held since `start_anew`."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_reserved(self._device)
        mark = status_bytes("VmHWM") if self._resets else None
        self._lately = max(self._lately, resident_bytes(), mark or 0)
        return self._lately

    def start_anew(self) -> None:
        """Let go of what is free, and watch from here. The peak until now stays in `read`."""
        if self._device.type == "cuda":
            self._allocated = max(self._allocated, torch.cuda.max_memory_allocated(self._device))
            self._reserved = max(self._reserved, torch.cuda.max_memory_reserved(self._device))
        self._process_bytes()
        tidy()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        elif self._resets:
            _reset_high_water()
        self._lately = resident_bytes()

    def read(self) -> MemoryPeak:
        """The peak so far."""
        if self._device.type != "cuda":
            return MemoryPeak(
                process_bytes=self._process_bytes(), base_bytes=self.base_bytes, evaluation=self.evaluation
            )
        return MemoryPeak(
            process_bytes=self._process_bytes(),
            base_bytes=self.base_bytes,
            allocated_bytes=max(self._allocated, torch.cuda.max_memory_allocated(self._device)),
            reserved_bytes=max(self._reserved, torch.cuda.max_memory_reserved(self._device)),
            context_bytes=_context_bytes(self._device),
            evaluation=self.evaluation,
        )

    def gate_bytes(self) -> int:
        """The figure a budget is held against, cheap enough for every log line."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_reserved(self._device)
        return self._process_bytes()

    def _process_bytes(self) -> int:
        """The kernel's high-water mark; where it cannot be had, the most that was seen at a reading."""
        mark = status_bytes("VmHWM") if self._resets else None
        self._seen = max(self._seen, resident_bytes(), mark or 0)
        return self._seen


def _reset_high_water() -> bool:
    """Start VmHWM anew (Linux). False where that is not possible."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _context_bytes(device: torch.device) -> int | None:
    """Device memory in use outside this allocator, as long as nobody else is on the device. None = unknown."""
    from tuner.engine.telemetry import other_processes

    if other_processes(device) != 0:
        return None
    free, total = torch.cuda.mem_get_info(device)
    return max(0, total - free - torch.cuda.memory_reserved(device))
