"""Compile modes: which of them can run here and why not, and how a model is put into one."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tuner.contract.config import CompileMode, RunConfig
from tuner.engine.failure import Unsupported

GRAPH_MODES = (CompileMode.REDUCE_OVERHEAD, CompileMode.MAX_AUTOTUNE, CompileMode.CUDAGRAPHS)
"""Modes that replay CUDA graphs: gradients must keep their addresses, outputs are overwritten by the next replay."""
_INDUCTOR = (CompileMode.DEFAULT, CompileMode.REDUCE_OVERHEAD, CompileMode.MAX_AUTOTUNE)


def compile_problems(device: torch.device) -> dict[CompileMode, str]:
    """Mode -> why it cannot run on this device; modes that can are absent."""
    return _cpu_problems() if device.type == "cpu" else _cuda_problems(device)


def _cpu_problems() -> dict[CompileMode, str]:
    problems = {mode: f"{mode.value} replays CUDA graphs; this device is a CPU" for mode in GRAPH_MODES}
    del problems[CompileMode.MAX_AUTOTUNE]
    missing = _missing_toolchain("CXX", ("c++", "g++", "clang++"), "C++")
    if missing:
        problems |= dict.fromkeys((CompileMode.DEFAULT, CompileMode.MAX_AUTOTUNE), missing)
    return problems


def _cuda_problems(device: torch.device) -> dict[CompileMode, str]:
    major, minor = torch.cuda.get_device_capability(device)
    reason = ""
    if (major, minor) < (7, 0):
        reason = f"inductor needs compute capability 7.0; this GPU has {major}.{minor}"
    elif importlib.util.find_spec("triton") is None:
        reason = "the triton package is not installed"
    else:
        reason = _missing_toolchain("CC", ("cc", "gcc", "clang"), "C")
    return dict.fromkeys(_INDUCTOR, reason) if reason else {}


def _missing_toolchain(variable: str, names: tuple[str, ...], language: str) -> str:
    """What inductor lacks here, with what to install; empty when it has all."""
    wanted = os.environ.get(variable, "")
    compilers = (wanted.split()[0], *names) if wanted.strip() else names
    if not any(shutil.which(name) for name in compilers):
        tried = ", ".join(compilers)
        return f"torch.compile needs a {language} compiler (tried {tried}); install one, e.g. the package `g++`"
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.is_file():
        return f"torch.compile needs Python's headers ({header} is missing); install e.g. the package `python3-dev`"
    return ""


def refuse_illegal(config: RunConfig, device: torch.device) -> None:
    """Raises Unsupported when `config` asks for a compile mode that cannot run here."""
    reason = compile_problems(device).get(config.compile)
    if reason:
        raise Unsupported(f"compile: {config.compile.value}: {reason}")
    graphs = (CompileMode.REDUCE_OVERHEAD, CompileMode.CUDAGRAPHS)
    if config.gradient_checkpointing and config.compile in graphs:
        raise Unsupported(
            f"compile: {config.compile.value} together with gradient_checkpointing asserts inside torch"
            " (pytorch#154306); choose one of the two"
        )


def compile_model(model: nn.Module, mode: CompileMode) -> None:
    """Put `model` into `mode`, in place: its class, attributes and parameter names stay."""
    if mode is CompileMode.EAGER:
        return
    if mode is CompileMode.CUDAGRAPHS:
        model.compile(backend="cudagraphs")
    elif mode is CompileMode.DEFAULT:
        model.compile()
    else:
        model.compile(mode=mode.value)


def forget_compiled() -> None:
    """Between two points of one process: otherwise a second batch size would be compiled for dynamic shapes,
    and the ninth would silently run uncompiled."""
    torch._dynamo.reset()


def checkpoint_blocks(workload: Any, model: nn.Module) -> None:
    """Recompute the activations of the workload's blocks in the backward pass. Raises Unsupported without blocks."""
    blocks = workload.checkpoint_blocks(model) if hasattr(workload, "checkpoint_blocks") else ()
    if not blocks:
        raise Unsupported("gradient_checkpointing: this workload names no blocks (checkpoint_blocks); set it to false")
    for block in blocks:
        block.forward = _recomputing(block.forward)


def _recomputing(forward: Callable[..., Any]) -> Callable[..., Any]:
    from torch.utils.checkpoint import checkpoint

    def recomputed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return recomputed
