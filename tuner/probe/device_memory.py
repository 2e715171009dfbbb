"""Which GPUs a process may use, and is the first of them clean again after a probe? Asks NVML; unknown where there is
none."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any, Protocol

SLACK_BYTES = 256 << 20
"""Growth that is not counted: driver bookkeeping, a display."""


class DeviceMemory(Protocol):
    """Tells how much of the device's memory is taken, by whomever."""

    def used_bytes(self) -> int | None: ...


class NvmlMemory:
    """Memory in use on the first visible GPU; None without a driver."""

    def __init__(self) -> None:
        self._nvml: Any = None
        self._handle: Any = None
        try:
            import pynvml

            pynvml.nvmlInit()
            self._handle = pynvml.nvmlDeviceGetHandleByIndex(first_visible_index())
            self._nvml = pynvml
        except Exception:  # no driver, no library, no permission: all mean that nothing is known
            self._nvml = None

    def used_bytes(self) -> int | None:
        if self._nvml is None:
            return None
        try:
            return int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used)
        except self._nvml.NVMLError:
            return None


def first_visible_index() -> int:
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    return int(first) if first.isdigit() else 0


def visible_gpus() -> tuple[str, ...]:
    """Names of the GPUs that torch may use here, in its order: UUIDs, or what CUDA_VISIBLE_DEVICES calls a part of one.
    Empty without any."""
    asked = os.environ.get("CUDA_VISIBLE_DEVICES")
    return _visible(_uuids(), None if asked is None else asked.split(","))


def _visible(uuids: Sequence[str], asked: Sequence[str] | None) -> tuple[str, ...]:
    """As CUDA reads the variable: numbers, UUIDs or how they begin; the first that is none ends the list."""
    if asked is None or not uuids:
        return tuple(uuids)
    found: list[str] = []
    for name in map(str.strip, asked):
        if name.isdigit() and int(name) < len(uuids):
            found.append(uuids[int(name)])
        elif name.startswith("MIG-"):
            found.append(name)
        elif named := [uuid for uuid in uuids if name and uuid.startswith(name)]:
            found.append(named[0])
        else:
            break
    return tuple(dict.fromkeys(found))


def _uuids() -> tuple[str, ...]:
    try:
        import pynvml

        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return tuple(_as_text(pynvml.nvmlDeviceGetUUID(handle)) for handle in handles)
    except Exception:  # no driver, no library, no permission: all mean that nothing is known
        return ()


def _as_text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name


class CleanDevice:
    """Remembers what was in use before a probe, and says afterwards whether it was given back."""

    def __init__(self, memory: DeviceMemory, wait_s: float) -> None:
        self._memory = memory
        self._wait_s = wait_s
        self._before: int | None = None

    def note(self) -> None:
        """A probe is about to start on a clean device."""
        self._before = self._memory.used_bytes()

    def wait(self) -> str:
        """Wait until the device is as clean as before the last probe; empty, or why measuring would not be."""
        if self._before is None:
            return ""
        deadline = time.monotonic() + self._wait_s
        while True:
            used = self._memory.used_bytes()
            if used is None or used <= self._before + SLACK_BYTES:
                return ""
            if time.monotonic() >= deadline:
                extra = (used - self._before) / (1 << 20)
                return (
                    f"GPU memory not returned: {extra:.0f} MiB more in use than before the last probe, "
                    f"after {self._wait_s:g} s of waiting; `nvidia-smi` shows who holds it"
                )
            time.sleep(0.05)
