"""What the GPU and the host were doing during a measurement. What is not known stays None, never 0."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any, Literal

import psutil
import torch

from tuner.contract.allowance import quota_periods
from tuner.contract.measurement import Telemetry

EVERY_S = 0.1
PowerReading = Literal["energy counter", "power"]
LEAST_S = 0.5
"""The counter moves about ten times a second: over less than this, readings of the power are more exact."""
_SLOWED = ("SwThermalSlowdown", "HwThermalSlowdown", "HwPowerBrakeSlowdown", "HwSlowdown", "SwPowerCap")


class Nvml:
    """NVML's view of one CUDA device. Raises OSError when NVML cannot be used."""

    def __init__(self, device: torch.device) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                import pynvml
            pynvml.nvmlInit()
            self.library: Any = pynvml
            self.handle = self._find(device)
        except Exception as error:
            raise OSError(f"NVML: {error}") from error

    def _find(self, device: torch.device) -> Any:
        """By UUID: CUDA_VISIBLE_DEVICES renumbers what torch sees, not what NVML sees."""
        uuid = str(getattr(torch.cuda.get_device_properties(device), "uuid", ""))
        for index in range(self.library.nvmlDeviceGetCount()):
            handle = self.library.nvmlDeviceGetHandleByIndex(index)
            name = self.library.nvmlDeviceGetUUID(handle)
            name = name.decode() if isinstance(name, bytes) else name
            if uuid and uuid in name:
                return handle
        return self.library.nvmlDeviceGetHandleByIndex(device.index or 0)

    def ask(self, question: Callable[[Any, Any], Any]) -> Any:
        """An answer, or None where this GPU or driver has none."""
        try:
            return question(self.library, self.handle)
        except Exception:
            return None

    def driver(self) -> str | None:
        found = self.ask(lambda n, _: n.nvmlSystemGetDriverVersion())
        return found.decode() if isinstance(found, bytes) else found

    def energy_j(self) -> float | None:
        """Joules since the driver was loaded; None on GPUs before Volta."""
        found = self.ask(lambda n, h: n.nvmlDeviceGetTotalEnergyConsumption(h))
        return float(found) / 1000 if found is not None else None

    def power_w(self) -> float | None:
        found = self.ask(lambda n, h: n.nvmlDeviceGetPowerUsage(h))
        return float(found) / 1000 if found is not None else None

    def power_reading(self) -> PowerReading | None:
        """How this GPU tells what it draws."""
        if self.energy_j() is not None:
            return "energy counter"
        return "power" if self.power_w() is not None else None

    def throttled(self) -> bool | None:
        reasons = self.ask(lambda n, h: n.nvmlDeviceGetCurrentClocksThrottleReasons(h))
        if reasons is None:
            return None
        masks = [getattr(self.library, f"nvmlClocksThrottleReason{name}", 0) for name in _SLOWED]
        return any(reasons & mask for mask in masks)

    def other_processes(self) -> int | None:
        """Compute processes besides this one; None when this one is not seen either (other PID namespace)."""
        running = self.ask(lambda n, h: n.nvmlDeviceGetComputeRunningProcesses(h))
        pids = [process.pid for process in running or []]
        return len(pids) - 1 if os.getpid() in pids else (0 if len(pids) == 1 else None)


def other_processes(device: torch.device) -> int | None:
    with contextlib.suppress(OSError):
        return Nvml(device).other_processes()
    return None


class EnergyMeter:
    """Mean power between the first and the last time the energy counter was seen to move.

    clock: seconds; energy_j: the counter in joules, None where there is none.
    """

    def __init__(self, energy_j: Callable[[], float | None], clock: Callable[[], float] = time.monotonic) -> None:
        self._energy_j = energy_j
        self._clock = clock
        self._last: float | None = None
        self._moves: list[tuple[float, float]] = []
        """The first move seen and the last: when, and to which value."""

    def look(self) -> None:
        joules = self._energy_j()
        if joules is not None and self._last is not None and joules != self._last:
            self._moves = [*self._moves[:1], (self._clock(), joules)]
        self._last = joules

    @property
    def power_w(self) -> float | None:
        """None without a counter, or when it was watched for less than `LEAST_S`."""
        if len(self._moves) < 2:
            return None
        (began, before), (ended, after) = self._moves
        return (after - before) / (ended - began) if ended - began >= LEAST_S else None


class TelemetrySampler:
    """Samples a GPU in a thread of its own while it is open; on a CPU it only notes the host's load, its swap, and
    what a CPU quota takes."""

    def __init__(self, device: torch.device) -> None:
        self._load = load_per_core()
        self._periods = quota_periods()
        self._nvml: Nvml | None = None
        if device.type == "cuda":
            with contextlib.suppress(OSError):
                self._nvml = Nvml(device)
        self._samples: dict[str, list[float]] = {}
        self._slowed: list[bool] = []
        self._energy = EnergyMeter(self._nvml.energy_j if self._nvml is not None else lambda: None)
        self._enough = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        if self._nvml is not None and self._thread is None:
            self._thread = threading.Thread(target=self._watch, args=(self._nvml,), daemon=True)
            self._thread.start()

    def stop(self) -> Telemetry:
        self._enough.set()
        if self._thread is not None:
            self._thread.join()
        busy = self._mean("gpu_utilization")
        return Telemetry(
            gpu_utilization=busy / 100 if busy is not None else None,
            power_w=self._energy.power_w or self._mean("power_w"),
            sm_clock_mhz=self._mean("sm_clock_mhz"),
            temperature_c=self._mean("temperature_c"),
            throttled=any(self._slowed) if self._slowed else None,
            other_processes=self._nvml.other_processes() if self._nvml is not None else None,
            host_load=self._load,
            swap_used_bytes=_swap_used(),
            cpu_throttled=_throttled(self._periods, quota_periods()),
        )

    def _mean(self, name: str) -> float | None:
        values = self._samples.get(name, [])
        return sum(values) / len(values) if values else None

    def _watch(self, nvml: Nvml) -> None:
        questions: dict[str, Callable[[Any, Any], float]] = {
            "gpu_utilization": lambda n, h: float(n.nvmlDeviceGetUtilizationRates(h).gpu),
            "power_w": lambda n, h: float(n.nvmlDeviceGetPowerUsage(h)) / 1000,
            "sm_clock_mhz": lambda n, h: float(n.nvmlDeviceGetClockInfo(h, n.NVML_CLOCK_SM)),
            "temperature_c": lambda n, h: float(n.nvmlDeviceGetTemperature(h, n.NVML_TEMPERATURE_GPU)),
        }
        while not self._enough.wait(EVERY_S):
            self._energy.look()
            for name, question in questions.items():
                value = nvml.ask(question)
                if value is not None:
                    self._samples.setdefault(name, []).append(value)
            slowed = nvml.throttled()
            if slowed is not None:
                self._slowed.append(slowed)


def load_per_core() -> float | None:
    """Of the whole host, as the kernel counts the load of all of it, whatever a container may use."""
    try:
        return os.getloadavg()[0] / (os.cpu_count() or 1)
    except OSError:
        return None


def _throttled(before: tuple[int, int] | None, after: tuple[int, int] | None) -> float | None:
    """From (periods, throttled periods) at two moments."""
    if before is None or after is None or after[0] <= before[0]:
        return None
    return (after[1] - before[1]) / (after[0] - before[0])


def _swap_used() -> int | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return int(psutil.swap_memory().used)
    except (OSError, RuntimeError):
        return None
