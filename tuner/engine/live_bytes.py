"""Counts the bytes of live tensors while code runs, real or fake: what an allocator would have to hold at the peak.

Storages are counted once, however many views they have, and until the last of them is gone.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """A context; `peak` is the most that was alive at once, counting what `hold` was told of."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self.events: list[tuple[int, int]] = []
        """(number, bytes) of each tensor that was made, (-number, 0) when it was gone, in order."""
        self._known: dict[int, weakref.finalize[Any, Any]] = {}
        self._made = 0

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that were made before."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._known:
                size = storage.nbytes()
                self._made += 1
                self._known[key] = weakref.finalize(storage, self._gone, key, size, self._made)
                self.live += size
                self.events.append((self._made, size))
        self.peak = max(self.peak, self.live)

    def _gone(self, key: int, size: int, number: int) -> None:
        del self._known[key]
        self.live -= size
        self.events.append((-number, 0))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.hold(value for value in tree_iter(out) if isinstance(value, Tensor))
        return out
