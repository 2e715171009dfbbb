"""What this machine is, as torch sees it, and whether its GPU really works with this build."""

from __future__ import annotations

import platform
import socket
import sys
from functools import cache
from pathlib import Path
from typing import Literal

import torch

import tuner
from tuner.contract.allowance import allowance, usable_cores
from tuner.contract.config import Precision
from tuner.contract.gpu import DeviceInfo
from tuner.contract.measurement import Environment
from tuner.engine.compiling import compile_problems
from tuner.engine.failure import Unsupported
from tuner.engine.telemetry import Nvml, PowerReading

_PASCAL = (
    "this GPU is older than what current builds carry; torch wheels for CUDA 12.6 (cu126, up to torch 2.14) still have "
    "its kernels: pip install torch --index-url https://download.pytorch.org/whl/cu126"
)
_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16", "avx_ne_convert"}


def choose_device(asked: Literal["auto", "cpu", "cuda"], rank: int = 0) -> torch.device:
    """`auto`: this rank's GPU where there is one that works, else the CPU. Raises Unsupported for an absent `cuda`."""
    if asked == "cpu" or (asked == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise Unsupported(
            "device: cuda was asked for, but this torch build sees no GPU; use --device cpu, see tuner doctor"
        )
    index = rank % torch.cuda.device_count()
    problem, advice = cuda_problem(index)
    if problem is None:
        return torch.device("cuda", index)
    if asked == "cuda":
        raise Unsupported(f"device: cuda: {problem}; {advice}")
    return torch.device("cpu")


@cache
def cuda_problem(index: int) -> tuple[str | None, str | None]:
    """Why GPU `index` cannot be used with this build, and what to do; (None, None) when a real operation worked."""
    name = torch.cuda.get_device_name(index)
    capability = torch.cuda.get_device_capability(index)
    try:
        found = float((torch.ones(16, 16, device=f"cuda:{index}") @ torch.ones(16, 16, device=f"cuda:{index}")).sum())
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        built = ", ".join(torch.cuda.get_arch_list()) or "none"
        problem = f"the first operation on {name} failed ({first}); this torch build has kernels for: {built}"
        return problem, _advice(capability)
    return (None, None) if found == 4096.0 else (f"{name} computed 16x16x16 ones as {found}", "test this GPU's memory")


def _advice(capability: tuple[int, int]) -> str:
    if capability < (7, 5):
        return _PASCAL
    return "install a torch build for this GPU and driver: https://pytorch.org/get-started/locally"


def describe(asked: Literal["auto", "cpu", "cuda"] = "auto") -> DeviceInfo:
    """The machine at hand. Never raises for a GPU that does not work: `problem` says so, and the CPU is described."""
    problem = advice = None
    if asked != "cpu" and torch.cuda.is_available():
        problem, advice = cuda_problem(0)
        if problem is None:
            return _describe_cuda(torch.device("cuda", 0))
    elif asked != "cpu" and (seen := _unseen_gpu()):
        problem, advice = seen
    return _describe_cpu(problem, advice)


def _unseen_gpu() -> tuple[str, str] | None:
    """An NVIDIA driver is loaded, but this torch build sees no GPU."""
    if not Path("/proc/driver/nvidia/version").exists():
        return None
    if torch.version.cuda is None:
        return "an NVIDIA driver is loaded, but this torch is a CPU build", "install a CUDA build, see README"
    return (
        f"an NVIDIA driver is loaded, but torch (CUDA {torch.version.cuda}) sees no GPU",
        "check CUDA_VISIBLE_DEVICES, and that the driver is new enough for this CUDA version",
    )


def _describe_cuda(device: torch.device) -> DeviceInfo:
    major, minor = torch.cuda.get_device_capability(device)
    free, total = torch.cuda.mem_get_info(device)
    host = allowance()
    dtypes = [Precision.FP32, Precision.FP16]
    if major >= 8:
        dtypes += [Precision.TF32, Precision.BF16]
    return DeviceInfo(
        kind="cuda",
        name=torch.cuda.get_device_name(device),
        capability=(major, minor),
        memory_bytes=total,
        free_bytes=free,
        host_bytes=host.memory_bytes,
        host_free_bytes=host.free_bytes,
        cpu_name=cpu_name(),
        cpu_count=host.cores,
        limits=host.limits,
        torch=torch.__version__,
        cuda=torch.version.cuda,
        driver=driver_version(device),
        power_reading=power_reading(device),
        arch_list=tuple(torch.cuda.get_arch_list()),
        device_count=torch.cuda.device_count(),
        dtypes=tuple(dtypes),
        compile_problems={mode.value: reason for mode, reason in compile_problems(device).items()},
    )


def _describe_cpu(problem: str | None, advice: str | None) -> DeviceInfo:
    host = allowance()
    device = torch.device("cpu")
    return DeviceInfo(
        kind="cpu",
        name=cpu_name(),
        memory_bytes=host.memory_bytes,
        free_bytes=host.free_bytes,
        host_bytes=host.memory_bytes,
        host_free_bytes=host.free_bytes,
        cpu_name=cpu_name(),
        cpu_count=host.cores,
        limits=host.limits,
        torch=torch.__version__,
        cuda=torch.version.cuda,
        dtypes=(Precision.FP32, Precision.BF16) if cpu_has_bf16() else (Precision.FP32,),
        compile_problems={mode.value: reason for mode, reason in compile_problems(device).items()},
        problem=problem,
        advice=advice,
    )


def environment(device: torch.device) -> Environment:
    """Where a measurement is taken; threads are those set at this moment."""
    cuda = device.type == "cuda"
    return Environment(
        tuner=tuner.__version__,
        python=platform.python_version(),
        torch=torch.__version__,
        cuda=torch.version.cuda,
        driver=driver_version(device) if cuda else None,
        device=torch.cuda.get_device_name(device) if cuda else "cpu",
        capability=torch.cuda.get_device_capability(device) if cuda else None,
        cpu=cpu_name(),
        cpu_count=usable_cores(),
        threads=torch.get_num_threads(),
        host=socket.gethostname(),
        platform=f"{sys.platform}-{platform.machine()}",
    )


@cache
def driver_version(device: torch.device) -> str | None:
    try:
        return Nvml(device).driver()
    except OSError:
        return None


def power_reading(device: torch.device) -> PowerReading | None:
    try:
        return Nvml(device).power_reading()
    except OSError:
        return None


@cache
def cpu_name() -> str:
    for line in _cpu_lines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine() or "unknown"


def cpu_has_bf16() -> bool:
    """Does this CPU compute in bfloat16 itself? Without, torch emulates it, which is slower than fp32."""
    flags = next((line for line in _cpu_lines() if line.startswith(("flags", "Features"))), "")
    return bool(_BF16_FLAGS & set(flags.split()))


@cache
def _cpu_lines() -> tuple[str, ...]:
    try:
        return tuple(Path("/proc/cpuinfo").read_text().splitlines())
    except OSError:
        return ()
