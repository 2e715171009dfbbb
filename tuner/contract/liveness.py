"""Which process writes something, and whether it is still there: a process number alone is given out again.

A process is named by its number, the moment it began as the kernel counts it, the host, the boot, and the space its
number belongs to (a container has one of its own).
"""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path
from typing import Self

from tuner.contract.base import Frozen

_PROC = Path("/proc")


class Writer(Frozen):
    """One process on one host."""

    pid: int
    began: str
    """When it began, in the kernel's own count; with `pid` it names one process of this boot."""
    host: str
    boot: str
    """Names the host's boot; empty where the system does not tell."""
    space: str
    """Names the space that `pid` is counted in; empty where the system does not tell."""

    @classmethod
    def here(cls) -> Self:
        """This very process."""
        pid = os.getpid()
        return cls(pid=pid, began=_began(pid), host=socket.gethostname(), boot=_boot(), space=_space())

    def alive(self) -> bool | None:
        """Is it still there? None when that cannot be told from here: another host, or another container."""
        here = Writer.here()
        if self.host != here.host:
            return None
        if self.boot != here.boot:
            return False
        if self.space != here.space:
            return None
        return bool(self.began) and _began(self.pid) == self.began


def _began(pid: int) -> str:
    """Empty when there is no such process, or only its remains."""
    if not (_PROC / "self" / "stat").exists():
        return _began_elsewhere(pid)
    with contextlib.suppress(OSError, IndexError):
        # after the name, which may hold anything but ends with the last bracket: state, parent, ..., start time
        fields = (_PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
    return ""


def _began_elsewhere(pid: int) -> str:
    """The same on systems without /proc."""
    import psutil

    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        return "" if process.status() == psutil.STATUS_ZOMBIE else f"{process.create_time():.0f}"
    return ""


def _boot() -> str:
    with contextlib.suppress(OSError):
        return (_PROC / "sys" / "kernel" / "random" / "boot_id").read_text().strip()
    return ""


def _space() -> str:
    with contextlib.suppress(OSError):
        return os.readlink(_PROC / "self" / "ns" / "pid")
    return ""
