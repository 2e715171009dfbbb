"""The log that a probe prints into: its beginning and its newest part are kept, however much it prints.

The probe writes into the file itself, so it never waits for a reader, and its last words are there when it dies. While
it runs the middle is given back to the disk as a hole, which moves nothing; once it has ended the file is cut.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path
from types import TracebackType
from typing import Self

HEAD_BYTES = TAIL_BYTES = 1 << 20
_KEEP_SIZE, _PUNCH_HOLE = 1, 2
"""Modes of fallocate(2)."""


class Log:
    """An empty file, open for appending from its making to the end of the block. Raises OSError."""

    def __init__(self, path: Path) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC
        self._descriptor = os.open(path, flags, 0o644)
        self._hole_end = HEAD_BYTES
        self._left_out = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            if os.fstat(self._descriptor).st_size > HEAD_BYTES + TAIL_BYTES:
                self._cut()
        os.close(self._descriptor)

    def fileno(self) -> int:
        """For the process that prints."""
        return self._descriptor

    def bound(self) -> None:
        """Now and then while it is written: give the middle back to the disk."""
        with contextlib.suppress(OSError):
            end = os.fstat(self._descriptor).st_size - TAIL_BYTES
            if end - self._hole_end <= TAIL_BYTES:
                return
            if _punch(self._descriptor, self._hole_end, end):
                self._hole_end = end
            else:
                self._cut()  # what is printed at this very moment may be lost

    def _cut(self) -> None:
        """Head, a line that says how much is missing, tail."""
        size = os.fstat(self._descriptor).st_size
        pieces = [os.pread(self._descriptor, TAIL_BYTES, place) for place in (size - TAIL_BYTES, size)]
        self._left_out += size - TAIL_BYTES - HEAD_BYTES
        os.ftruncate(self._descriptor, HEAD_BYTES)
        rest = memoryview(f"\n[... {self._left_out:,} bytes were left out here ...]\n".encode() + b"".join(pieces))
        while rest:
            rest = rest[os.write(self._descriptor, rest) :]


def _punch(descriptor: int, begin: int, end: int) -> bool:
    """Make a hole; False where the file system has none."""
    fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if fallocate is None:
        return False
    place = (ctypes.c_int64(begin), ctypes.c_int64(end - begin))
    return bool(fallocate(descriptor, _PUNCH_HOLE | _KEEP_SIZE, *place) == 0)
