"""Arithmetic of a run: autocast, the loss scaler of fp16, and the TF32 switches (set for the run, then put back)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from tuner.contract.config import Precision
from tuner.engine.failure import Unsupported

_AUTOCAST = {Precision.FP16: torch.float16, Precision.BF16: torch.bfloat16}


class Arithmetic:
    """How one run computes. Raises Unsupported for a precision this kind of device does not have."""

    def __init__(self, precision: Precision, device: torch.device) -> None:
        if device.type == "cpu" and precision in (Precision.FP16, Precision.TF32):
            raise Unsupported(
                f"precision: {precision.value} needs a GPU; a CPU has fp32, and bf16 where it is supported"
            )
        if device.type == "cuda" and precision in (Precision.BF16, Precision.TF32):
            major, minor = torch.cuda.get_device_capability(device)
            if major < 8:
                raise Unsupported(
                    f"precision: {precision.value} needs compute capability 8.0; this GPU has {major}.{minor}"
                )
        self.precision = precision
        self.device = device
        self.scaler: Any = torch.amp.GradScaler("cuda") if precision is Precision.FP16 else None
        self._before = _set_tf32(precision is Precision.TF32) if device.type == "cuda" else None

    @property
    def casts(self) -> bool:
        """Does `autocast` do anything?"""
        return self.precision in _AUTOCAST

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of the forward pass and the loss."""
        dtype = _AUTOCAST.get(self.precision)
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype)

    def close(self) -> None:
        """Put the process-wide switches back."""
        if self._before is not None:
            _restore_tf32(self._before)
            self._before = None


def _switches() -> tuple[Any, Any]:
    return torch.backends.cuda.matmul, torch.backends.cudnn


def _set_tf32(on: bool) -> tuple[Any, Any]:
    """Switch TF32 of matrix products and convolutions; returns what to restore. torch 2.9 renamed the switches."""
    matmul, cudnn = _switches()
    if hasattr(matmul, "fp32_precision"):
        before = (matmul.fp32_precision, cudnn.conv.fp32_precision)
        _restore_tf32(("tf32", "tf32") if on else ("ieee", "ieee"))
    else:
        before = (matmul.allow_tf32, cudnn.allow_tf32)
        _restore_tf32((on, on))
    return before


def _restore_tf32(values: tuple[Any, Any]) -> None:
    matmul, cudnn = _switches()
    if hasattr(matmul, "fp32_precision"):
        matmul.fp32_precision, cudnn.conv.fp32_precision = values
    else:
        matmul.allow_tf32, cudnn.allow_tf32 = values
