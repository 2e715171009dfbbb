"""One process at a time writes a run folder, through no links, and sweeps what a killed one left. The lock is the
operating system's: it ends with its process, however."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import platform
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from tuner.contract.errors import ConfigError
from tuner.contract.own_files import LOCK, refuse_links, sweep_parts

_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
"""A file system without locks: the run goes on without one."""
_LOOK_S = 0.1


class RunLock:
    """Held from `acquire` to `release`, or while the block runs.

    `acquire` raises ConfigError when another process still has it after `wait_s`: one that was just killed, or is just
    saving its last checkpoint, may need a moment. Likewise for a link where the run would write.

    A record lock: what this process forks (loader workers) does not have it, and cannot keep it after this process.
    """

    def __init__(self, folder: Path, wait_s: float = 5.0) -> None:
        self._folder = folder
        self._wait_s = wait_s
        self._descriptor = -1

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def acquire(self) -> None:
        refuse_links(self._folder)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            self._descriptor = os.open(self._folder / LOCK, flags, 0o644)
        except OSError as error:
            raise ConfigError(
                f"{self._folder}: cannot be written ({error.strerror}); free or mend it, or name another with --out"
            ) from None
        deadline = time.monotonic() + self._wait_s
        while not self._try():
            if time.monotonic() >= deadline:
                holder = self._holder()
                self.release()
                raise ConfigError(
                    f"{self._folder}: another process is writing this run{holder}; "
                    "wait until it has ended, or give this run a folder of its own with --out"
                )
            time.sleep(_LOOK_S)
        self._sign()
        sweep_parts(self._folder)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _try(self) -> bool:
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            if error.errno not in _NO_LOCKS:
                raise
        return True

    def _sign(self) -> None:
        """For people, and for the message above."""
        text = f"process {os.getpid()} on {platform.node()}"
        with contextlib.suppress(OSError):  # a full disk ends no run before it has tried to save
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, text.encode(), 0)

    def _holder(self) -> str:
        text = os.pread(self._descriptor, 200, 0).decode(errors="replace")
        return f" ({text})" if text else ""

    def release(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
