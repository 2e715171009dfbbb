"""Counts the floating-point operations of what runs inside it: matrix products, convolutions, attention.

Formulas come from torch's own registry; operators it does not know (fused attention on a CPU) count nothing.
"""

from __future__ import annotations

import contextlib
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class FlopCount(TorchDispatchMode):
    """A context; `total` holds forward and backward. Sets no hooks on modules, so it disturbs no model."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = flop_registry.get(getattr(func, "_overloadpacket", func))
        if formula is not None:
            with contextlib.suppress(Exception):  # a formula that does not know these arguments must not end a run
                self.total += int(formula(*args, **kwargs, out_val=out))
        return out
