"""GpuProfile: what a target GPU is and can do (data in gpus.yaml); DeviceInfo: what the machine at hand is."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Literal

from pydantic import Field

from tuner.contract.base import Frozen
from tuner.contract.config import CompileMode, Precision
from tuner.contract.documents import load_document
from tuner.contract.errors import ConfigError

AUTO = "auto"


class GpuProfile(Frozen):
    """One row of the table: limits that hold wherever the measuring is done."""

    name: str
    label: str
    kind: Literal["cuda", "cpu"]
    memory_bytes: int | None = Field(default=None, ge=1)
    """Capacity; None = whatever the host has."""
    capability: tuple[int, int] | None = None
    """CUDA compute capability."""
    dtypes: tuple[Precision, ...]
    compile_modes: tuple[CompileMode, ...]
    compile_note: str = ""
    """Why a compile mode is missing."""
    peak_flops: dict[str, float] = Field(default_factory=dict)
    """Dense FLOP/s by precision, without sparsity."""
    bandwidth_bytes_per_s: float | None = None
    wheels: str = ""
    """Which torch builds carry kernels for it."""
    sources: dict[str, str] = Field(default_factory=dict)
    """Where each figure comes from."""


class DeviceInfo(Frozen):
    """The machine at hand, as a worker process sees it."""

    kind: Literal["cuda", "cpu"]
    name: str
    capability: tuple[int, int] | None = None
    memory_bytes: int
    """Device memory on CUDA, host memory otherwise."""
    free_bytes: int
    host_bytes: int
    host_free_bytes: int
    cpu_name: str
    cpu_count: int
    """Cores that may be used here."""
    limits: tuple[str, ...] = ()
    """What of the machine a container, a quota or an affinity leaves to us, one line each; empty = all of it."""
    torch: str
    cuda: str | None = None
    driver: str | None = None
    power_reading: Literal["energy counter", "power"] | None = None
    """How NVML tells what the GPU draws; None = not at all."""
    arch_list: tuple[str, ...] = ()
    """GPU architectures this torch build has kernels for."""
    device_count: int = 1
    dtypes: tuple[Precision, ...]
    compile_problems: dict[str, str] = Field(default_factory=dict)
    """Compile mode -> why it cannot run here; modes that can are absent."""
    problem: str | None = None
    """Why a GPU that is present cannot be used (no kernels for it, the first op failed); None = all well."""
    advice: str | None = None
    """What to install or change about `problem`."""

    @property
    def place(self) -> str:
        """Where a measurement was taken, for people: the GPU, or the CPU with its cores."""
        return self.name if self.kind == "cuda" else f"{self.cpu_name} ({self.cores})"

    @property
    def cores(self) -> str:
        """For people."""
        return f"{self.cpu_count} core{'s' if self.cpu_count > 1 else ''}"


class _Table(Frozen):
    gpus: tuple[GpuProfile, ...]


@cache
def gpu_profiles() -> dict[str, GpuProfile]:
    """Every known GPU by name, in the table's order."""
    text = resources.files("tuner.contract").joinpath("gpus.yaml").read_text(encoding="utf-8")
    table = load_document(_Table, text, source="gpus.yaml")
    return {profile.name: profile for profile in table.gpus}


def gpu_profile(name: str) -> GpuProfile:
    """The profile called `name` (not `auto`: see `detected_profile`). Raises ConfigError for an unknown name."""
    profiles = gpu_profiles()
    if name not in profiles:
        known = ", ".join([*profiles, AUTO])
        raise ConfigError(f"--gpu: unknown GPU {name!r}; known: {known}. `tuner gpus` shows them")
    return profiles[name]


def detected_profile(device: DeviceInfo) -> GpuProfile:
    """The profile `auto` means on this machine: the table's row where the device's name matches one, with the
    memory and capability of the device itself; a row made from the device where none does."""
    if device.kind == "cpu":
        return gpu_profile("cpu")
    modes = tuple(mode for mode in CompileMode if mode.value not in device.compile_problems)
    update = {"memory_bytes": device.memory_bytes, "capability": device.capability}
    words = device.name.lower().replace("-", " ").split()
    for profile in gpu_profiles().values():
        short = profile.name.split("-")[0].removeprefix("rtx")
        near = profile.memory_bytes is not None and abs(profile.memory_bytes / device.memory_bytes - 1) < 0.2
        if short in words and near and profile.capability == device.capability:
            return profile.model_copy(update=update)
    return GpuProfile(
        name=AUTO,
        label=device.name,
        kind="cuda",
        memory_bytes=device.memory_bytes,
        capability=device.capability,
        dtypes=device.dtypes,
        compile_modes=modes,
        sources={"all": "read from the device"},
    )
