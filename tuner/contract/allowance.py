"""What this process may use of its machine: cores and memory, within the limits of the containers (cgroups) around it.

Asked of the kernel every time, as limits change while a process runs. Both versions of cgroups count, also side by
side, and every ancestor that can be seen from here (man 7 cgroups; the kernel's admin-guide/cgroup-v2).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from pathlib import Path, PurePosixPath

PROC = Path("/proc/self")
_RECLAIMABLE = ("inactive_file", "active_file", "slab_reclaimable")
"""Of memory.stat (version 1 has them with `total_`): page cache and the like, given back when memory is wanted."""
_ESCAPE = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True)
class Allowance:
    cores: int
    """The affinity's, or a CPU quota rounded up; at least 1."""
    memory_bytes: int
    """Physical memory, or the smallest limit."""
    free_bytes: int
    """What can still be had of it."""
    limits: tuple[str, ...] = ()
    """What is less than the whole machine, and where that comes from; empty = nothing is."""


@dataclass(frozen=True)
class _Mount:
    """A cgroup file system, and which part of its tree it shows."""

    unified: bool
    """Version 2."""
    controllers: frozenset[str]
    """Of version 1."""
    root: tuple[str, ...]
    point: Path


@dataclass(frozen=True)
class _Quota:
    cores: float
    folder: Path


@dataclass(frozen=True)
class _Limit:
    size: int
    used: int
    """Bytes its cgroup has taken and cannot give back."""
    source: str


def allowance(proc: Path = PROC) -> Allowance:
    """proc: the /proc folder of this process."""
    import psutil

    host = psutil.virtual_memory()
    cores, why_cores = _cores(proc)
    found = [limit for limit in _memory_limits(proc) if limit.size < host.total]
    least = min(found, key=lambda limit: limit.size, default=None)
    memory = least.size if least is not None else int(host.total)
    why_memory = f"{memory >> 20:,} of {host.total >> 20:,} MiB: {least.source}" if least is not None else ""
    free = min([int(host.available), *(max(0, limit.size - limit.used) for limit in found)])
    return Allowance(cores, memory, free, tuple(filter(None, (why_cores, why_memory))))


def usable_cores(proc: Path = PROC) -> int:
    """Cores this process may use, a quota's share of one counted as one."""
    return _cores(proc)[0]


def quota_periods(proc: Path = PROC) -> tuple[int, int] | None:
    """So far: periods of the narrowest CPU quota in which its cgroup ran, and those of them in which the quota held it
    back. None = there is no quota."""
    quota = min(_quotas(proc), key=lambda one: one.cores, default=None)
    stat = _table(quota.folder / "cpu.stat") if quota is not None else {}
    return (stat["nr_periods"], stat["nr_throttled"]) if {"nr_periods", "nr_throttled"} <= set(stat) else None


def _cores(proc: Path) -> tuple[int, str]:
    """How many, and why not all; empty = all of them."""
    whole = os.cpu_count() or 1
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else whole
    quota = min(_quotas(proc), key=lambda one: one.cores, default=None)
    if quota is not None and quota.cores < mine:
        cores = max(1, ceil(quota.cores))
        return cores, f"{cores} of {whole} cores: a CPU quota of {quota.cores:g} cores, set in {quota.folder}"
    few = f"{mine} of {whole} cores: the CPU affinity of this process (taskset, a cpuset, a batch system)"
    return mine, few if mine < whole else ""


def _quotas(proc: Path) -> Iterator[_Quota]:
    for folder in _folders("cpu", proc):
        words = _text(folder / "cpu.max").split()
        words = words or [_text(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
        numbers = [int(word) for word in words if word.isdecimal()]  # `max` and -1 say that there is none
        if len(numbers) == 2 and min(numbers) > 0:
            yield _Quota(numbers[0] / numbers[1], folder)


def _memory_limits(proc: Path) -> list[_Limit]:
    """Own and ancestors' limits; those of ancestors that only version 1's statistics tell of come last."""
    seen, told = [], []
    for folder in _folders("memory", proc):
        stat = _table(folder / "memory.stat")
        used = _number(folder / "memory.current") or _number(folder / "memory.usage_in_bytes") or 0
        used = max(0, used - sum(stat.get(f"total_{name}", stat.get(name, 0)) for name in _RECLAIMABLE))
        for name in ("memory.max", "memory.high", "memory.limit_in_bytes"):
            if size := _number(folder / name):
                seen.append(_Limit(size, used, f"the limit {folder / name}"))
        if size := stat.get("hierarchical_memory_limit"):
            told.append(_Limit(size, used, f"the limit of a cgroup above {folder}"))
    return seen + told


def _folders(controller: str, proc: Path) -> list[Path]:
    """Of the cgroups whose `controller` binds this process: its own first, then its ancestors. Where no mount shows its
    own, what is mounted."""
    paths = dict(_paths(proc))
    found: dict[Path, None] = {}
    mounted: dict[Path, None] = {}
    for mount in _mounts(proc):
        path = paths.get("" if mount.unified else controller)
        if path is not None and (mount.unified or controller in mount.controllers):
            mounted[mount.point] = None
            if (own := _own_folder(mount, path)) is not None:
                found |= dict.fromkeys([own, *(folder for folder in own.parents if folder.is_relative_to(mount.point))])
    return list(found or mounted)


def _own_folder(mount: _Mount, path: tuple[str, ...]) -> Path | None:
    """Where `mount` shows the cgroup `path`; None where it does not.

    In a cgroup namespace a path is relative to the namespace's own root, from which `..` leads up: a mount from outside
    then begins above it, and what the folders between are called can only be found by looking.
    """
    below = path[len(mount.root) :]
    if path[: len(mount.root)] == mount.root and ".." not in below:
        return mount.point.joinpath(*below)
    if set(mount.root) != {".."} or ".." in path:
        return None
    own, any_below = str(os.getpid()), "/".join("*" * (len(mount.root) + len(path)))
    return next((f for f in mount.point.glob(any_below) if own in _text(f / "cgroup.procs").split()), None)


def _paths(proc: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Controller -> path of this process's cgroup; the empty name stands for version 2."""
    for line in _text(proc / "cgroup").splitlines():
        _, names, path = line.split(":", 2)
        for name in names.split(","):
            yield name, _parts(path)


def _mounts(proc: Path) -> Iterator[_Mount]:
    """man 5 proc: fields of mountinfo, of which the optional ones end with a dash."""
    for line in _text(proc / "mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, (kind, *rest) = before.split(), after.split() or [""]
        if kind in ("cgroup", "cgroup2") and len(fields) > 4:
            root, point = (_ESCAPE.sub(lambda code: chr(int(code[1], 8)), field) for field in fields[3:5])
            yield _Mount(kind == "cgroup2", frozenset((rest or [""])[-1].split(",")), _parts(root), Path(point))


def _parts(path: str) -> tuple[str, ...]:
    return tuple(part for part in PurePosixPath(path).parts if part != "/")


def _table(file: Path) -> dict[str, int]:
    """Lines of a name and a number."""
    pairs = (line.split() for line in _text(file).splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}


def _number(file: Path) -> int | None:
    """None for `max`, and where there is no such file."""
    text = _text(file).strip()
    return int(text) if text.isdecimal() else None


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return ""
