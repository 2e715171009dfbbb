"""Checkpoints written beside the training: the loop pays for a copy of the state, a thread for the disk.

At most one is in flight. The copy is taken at the step border and complete before the loop goes on, so that what is
written is the state of one step, whatever happens meanwhile. Its memory, once the size of the state, is used again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor

from tuner.engine.checkpoint import CheckpointError, Snapshot


class BackgroundWriter:
    """Calls `write` in a thread; what it raises is raised by `wait`."""

    def __init__(self, write: Callable[[Snapshot], object]) -> None:
        self._write = write
        self._copies: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    @property
    def in_flight(self) -> bool:
        """Was one started that nobody has waited for?"""
        return self._thread is not None

    @property
    def done(self) -> bool:
        """Has the one in flight come to its end?"""
        return self._thread is not None and not self._thread.is_alive()

    def start(self, state: dict[str, Any]) -> None:
        """Copy `state` and begin to write it. Raises CheckpointError for what a checkpoint cannot hold."""
        assert self._thread is None, "one is in flight"
        try:
            snapshot = Snapshot.copy_of(state, self._copies)
        except TypeError as error:
            raise CheckpointError(f"checkpoint: {error}") from error
        self._copies = snapshot.tensors
        self._thread = threading.Thread(target=self._work, args=(snapshot,), name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until nothing is in flight."""
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _work(self, snapshot: Snapshot) -> None:
        try:
            self._write(snapshot)
        except Exception as error:
            self._error = error
