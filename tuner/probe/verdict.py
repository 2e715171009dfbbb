"""How a probe's process ended -> one outcome, one line for people, and the last lines of its log."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from dataclasses import dataclass
from pathlib import Path

from tuner.contract.measurement import Outcome
from tuner.contract.probe import STOPPED_EARLY

TAIL_LINES = 120
TAIL_BYTES = 16_000

_FAULTS = {
    int(signal.SIGSEGV): "segmentation fault",
    int(signal.SIGABRT): "aborted",
    int(signal.SIGBUS): "bus error",
    int(signal.SIGFPE): "arithmetic fault",
    int(signal.SIGILL): "illegal instruction",
}
_MEMORY_WORDS = re.compile(
    r"std::bad_alloc|cannot allocate memory|can't allocate memory|MemoryError|Thread creation failed"
    r"|failed to allocate|out of memory",
    re.IGNORECASE,
)
_DEVICE_WORDS = re.compile(r"CUDA ((driver )?error: )?out of memory|CUDA_ERROR_OUT_OF_MEMORY|\w+_STATUS_ALLOC_FAILED")


@dataclass(frozen=True)
class Ending:
    """What is known about the end of a probe's process."""

    status: int | None = None
    """As from waitpid; None = not known, its host is gone."""
    timed_out: str = ""
    """Why the tuner ended it; empty = it ended itself."""
    kernel_oom: bool = False
    """The kernel's out-of-memory killer struck while the probe ran."""
    garbage: str = ""
    """Start of a line that was no event."""
    refused: str = ""
    """Why it was not even started: a measurement would not have been clean."""
    asked_to_stop: bool = False
    """A signal to stop came to the tuner, or to one of its processes."""
    lost: str = ""
    """Why the process could not be started or followed."""
    log: str = ""
    """Last lines of its log."""


def judge(ending: Ending) -> tuple[Outcome, str]:
    """The outcome of the point that was being measured, and one line saying what happened."""
    if ending.refused:
        return Outcome.CONTENDED, ending.refused
    if ending.timed_out and ending.asked_to_stop:
        return Outcome.NO_RESULT, f"{STOPPED_EARLY}: it {ending.timed_out}"
    if ending.timed_out:
        return Outcome.TIMEOUT, ending.timed_out
    if ending.kernel_oom and (ending.status is None or os.WIFSIGNALED(ending.status)):
        return Outcome.OOM_HOST, "killed by the kernel: the host ran out of memory"
    if ending.status is None:
        return Outcome.CRASHED, ending.lost or "its end was not seen"
    if os.WIFSIGNALED(ending.status):
        if ending.asked_to_stop:
            return Outcome.NO_RESULT, STOPPED_EARLY
        return _killed(os.WTERMSIG(ending.status), ending)
    code = os.waitstatus_to_exitcode(ending.status)
    if code:
        return _memory_or(Outcome.CRASHED, f"ended with exit code {code}", ending)
    if ending.garbage:
        return Outcome.NO_RESULT, f"ended without a readable result; it wrote {ending.garbage!r}"
    return Outcome.NO_RESULT, "ended without a result (exit code 0)"


def _killed(number: int, ending: Ending) -> tuple[Outcome, str]:
    names = {known.value: known.name for known in signal.Signals}
    name = names.get(number, "real-time")
    if number in _FAULTS:
        return _memory_or(Outcome.CRASHED, f"{_FAULTS[number]} (signal {number}, {name})", ending)
    return _memory_or(Outcome.CRASHED, f"killed by signal {number} ({name})", ending)


def _memory_or(outcome: Outcome, text: str, ending: Ending) -> tuple[Outcome, str]:
    """A process that dies of a refused allocation in native code says so in its log alone."""
    if found := _DEVICE_WORDS.search(ending.log):
        return Outcome.OOM_DEVICE, f"{text} after {found.group(0)!r}"
    if found := _MEMORY_WORDS.search(ending.log):
        return Outcome.OOM_HOST, f"{text} after {found.group(0)!r}"
    return outcome, text


def log_tail(path: Path) -> str:
    """The last lines of a log; empty when it cannot be read."""
    try:
        with path.open("rb") as source:
            size = source.seek(0, os.SEEK_END)
            source.seek(max(0, size - TAIL_BYTES))
            text = source.read().decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-TAIL_LINES:])


def kernel_oom_kills() -> int:
    """Times the kernel's out-of-memory killer has struck, in cgroups too (Linux; 0 where it is not counted)."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0
