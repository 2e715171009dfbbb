"""`tuner cache`: what lies prepared on the disk, and its removal. Nothing is removed that the tuner did not make."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner import prepared
from tuner.commands import console as speak
from tuner.commands import setup
from tuner.commands.words import seconds
from tuner.contract.errors import ConfigError, JobFailed
from tuner.prepared import Entry
from tuner.registry import known_workloads

if TYPE_CHECKING:
    from rich.console import Console

_KEYED = re.compile(r"(?P<name>[A-Za-z0-9_.-]+)-[0-9a-f]{16}")
"""A folder name that ends in a key of its content."""
_MADE_BY_TOOLS = {"inductor": "compiled kernels", "logs": "logs of probes", "contents": "digests of data"}


class Kind(StrEnum):
    """What a folder of the cache that is no entry is; decides whether `clear` takes it."""

    HALF = "half made or half removed"
    DAMAGED = "damaged, will be made again"
    OLDER = "prepared data of an older version"
    TOOLS = "tools"
    FOREIGN = "not known here, left alone"


@dataclass(frozen=True)
class Other:
    """Something in the cache that is no entry."""

    path: Path
    kind: Kind
    workload: str
    text: str
    size_bytes: int
    changed_at: float


@dataclass(frozen=True)
class Found:
    folder: Path
    entries: Sequence[Entry]
    others: Sequence[Other]

    @property
    def total_bytes(self) -> int:
        return sum(entry.size_bytes for entry in self.entries) + sum(other.size_bytes for other in self.others)


@dataclass(frozen=True)
class ClearWords:
    """What to clear, as typed."""

    workload: str | None = None
    older_than: str | None = None
    everything: bool = False
    yes: bool = False


def show(*, as_json: bool) -> None:
    """`tuner cache list`."""
    found = look(setup.cache_dir())
    if as_json:
        speak.emit_json(json.dumps(_as_data(found), indent=2))
        return
    console = speak.make_console(as_json=False)
    console.print(f"cache {found.folder}", style="bold")
    if not found.entries and not found.others:
        console.print("  nothing is kept yet")
        return
    for line in table(found):
        console.print(line)
    console.print(f"total {speak.size(found.total_bytes)}; clear prepared data with: tuner cache clear", style="dim")


def clear(words: ClearWords, *, as_json: bool) -> None:
    """`tuner cache clear`. Raises JobFailed (3) when something could not be removed."""
    if words.everything and words.workload:
        raise ConfigError("--all: it clears what all workloads share; leave out --workload, or --all")
    oldest = seconds(words.older_than, "--older-than") if words.older_than else 0.0
    console = speak.make_console(as_json=as_json)
    folder = setup.cache_dir()
    doomed = chosen(look(folder), words, time.time() - oldest)
    if doomed and not words.yes and not agreed(doomed, console):
        console.print("nothing was removed")
        doomed = []
    elif not doomed:
        console.print(_nothing(folder, words))
    removed, failed = _remove_locked(folder, doomed, console) if doomed else ([], [])
    freed = sum(item.size_bytes for item in removed)
    if removed:
        console.print(f"removed {len(removed)}, freed {speak.size(freed)} ({freed:,} bytes)")
    if as_json:
        data = {"cache": str(folder), "removed": [str(_path(item)) for item in removed], "freed_bytes": freed}
        speak.emit_json(json.dumps(data | {"failed": failed}, indent=2))
    if failed:
        raise JobFailed(f"{len(failed)} could not be removed: {'; '.join(failed)}")


def look(folder: Path) -> Found:
    """Everything below the cache folder, our lock file left out."""
    entries = prepared.entries(folder)
    listed = {entry.folder for entry in entries}
    return Found(folder, entries, list(_others(folder, listed)))


def _others(folder: Path, listed: set[Path]) -> Iterator[Other]:
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        inside = [part for part in sorted(path.iterdir()) if _is_made_by_us(part)] if path.is_dir() else []
        if inside:
            yield from (_other(part, path.name) for part in inside if part not in listed)
        elif path.name != prepared.LOCK:
            yield _other(path, "")


def _is_made_by_us(path: Path) -> bool:
    """Is it an entry, whole or not?"""
    keyed = _KEYED.fullmatch(path.name) is not None and path.is_dir() and not path.is_symlink()
    return keyed and (path.name.startswith(prepared.PARTIAL) or (path / prepared.ABOUT).exists())


def _other(path: Path, workload: str) -> Other:
    kind, workload = _kind(path, workload)
    status = path.lstat()
    is_folder = path.is_dir() and not path.is_symlink()
    text = _MADE_BY_TOOLS[path.name] if kind is Kind.TOOLS else kind.value
    return Other(path, kind, workload, text, prepared.size_of(path) if is_folder else status.st_size, status.st_mtime)


def _kind(path: Path, workload: str) -> tuple[Kind, str]:
    """What it is, and which workload's."""
    if path.name.startswith(prepared.PARTIAL) and path.is_dir():
        return Kind.HALF, workload
    if workload:
        return Kind.DAMAGED, workload
    if path.name in _MADE_BY_TOOLS and path.is_dir():
        return Kind.TOOLS, ""
    keyed = _KEYED.fullmatch(path.name)
    if keyed and path.is_dir() and keyed["name"] in {known.name for known in known_workloads()}:
        return Kind.OLDER, keyed["name"]
    return Kind.FOREIGN, ""


def chosen(found: Found, words: ClearWords, before: float) -> list[Entry | Other]:
    """What `clear` takes: prepared data, complete or not; with --all also kernels and logs; never foreign files."""
    kinds = {Kind.HALF, Kind.DAMAGED, Kind.OLDER} | ({Kind.TOOLS} if words.everything else set())
    entries = [entry for entry in found.entries if entry.made_at < before]
    others = [other for other in found.others if other.kind in kinds and other.changed_at < before]
    both: list[Entry | Other] = [*entries, *others]
    return [item for item in both if words.workload in (None, item.workload)]


def agreed(doomed: Sequence[Entry | Other], console: Console) -> bool:
    """Ask on the terminal. Raises ConfigError when nobody is there to answer."""
    for item in doomed:
        console.print(f"  {_path(item)}  {speak.size(item.size_bytes)}")
    total = speak.size(sum(item.size_bytes for item in doomed))
    console.print(f"remove {len(doomed)} ({total})? It will be made again when needed. [y/N] ", end="")
    answer = sys.stdin.readline()
    if not answer:
        raise ConfigError("cache clear: nobody answered; say --yes to remove without being asked")
    return answer.strip().lower() in ("y", "yes")


def _remove_locked(
    folder: Path, doomed: Sequence[Entry | Other], console: Console
) -> tuple[list[Entry | Other], list[str]]:
    """Remove under the lock of `prepare`, so nothing vanishes under a preparation; what was removed, and what not."""
    removed: list[Entry | Other] = []
    failed: list[str] = []
    told: list[bool] = []

    def waiting() -> None:
        if not told:
            told.append(True)
            console.print("waiting for a preparation in another process to end (Ctrl-C: leave everything)")

    try:
        with prepared.locked(folder, waiting):
            for item in doomed:
                try:
                    _remove(item)
                    removed.append(item)
                except FileNotFoundError:
                    continue  # gone meanwhile
                except OSError as error:
                    failed.append(f"{_path(item)}: {error.strerror or error}")
    except KeyboardInterrupt:
        freed = sum(item.size_bytes for item in removed)
        console.print(f"\nstopped; {speak.size(freed)} were freed, the rest is as it was or goes with the next clear")
        raise
    except OSError as error:
        raise ConfigError(f"cache folder {folder}: {error.strerror}; set TUNER_CACHE to the one you mean") from None
    return removed, failed


def _remove(item: Entry | Other) -> None:
    if isinstance(item, Entry):
        prepared.remove(item)
    elif item.kind is Kind.HALF:
        shutil.rmtree(item.path)
    else:
        doomed = item.path.with_name(f"{prepared.PARTIAL}removed-{item.path.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(item.path, doomed)
        shutil.rmtree(doomed)
    if item.workload:
        with contextlib.suppress(OSError):  # holds more
            _path(item).parent.rmdir()


def _path(item: Entry | Other) -> Path:
    return item.folder if isinstance(item, Entry) else item.path


def _nothing(folder: Path, words: ClearWords) -> str:
    if words.workload:
        known = sorted({entry.workload for entry in prepared.entries(folder)})
        return f"nothing to clear for {words.workload}; prepared data is there for: {', '.join(known) or 'none'}"
    return f"nothing to clear in {folder}" + (f" that is older than {words.older_than}" if words.older_than else "")


def table(found: Found) -> list[str]:
    """Entries, then the rest, in columns."""
    lines = [_columns(("workload", "what", "size", "made", "took", "key"))] if found.entries else []
    lines += [
        _columns(
            (
                entry.workload,
                entry.what,
                speak.size(entry.size_bytes),
                _when(entry.made_at),
                speak.clock(entry.seconds),
                entry.key,
            )
        )
        for entry in found.entries
    ]
    if found.others:
        lines.append(_columns(("other", "", "size", "changed", "", "")))
    for other in found.others:
        name = str(other.path.relative_to(found.folder))
        lines.append(f"{name:<36} {speak.size(other.size_bytes):>10}  {_when(other.changed_at):<16}  {other.text}")
    return lines


def _columns(cells: tuple[str, str, str, str, str, str]) -> str:
    workload, what, size, made, took, key = cells
    return f"{workload:<16} {what:<19} {size:>10}  {made:<16}  {took:>10}  {key}".rstrip()


def _when(seconds_since_1970: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds_since_1970))


def _as_data(found: Found) -> dict[str, Any]:
    entries = [
        {
            "workload": entry.workload,
            "what": entry.what,
            "key": entry.key,
            "folder": str(entry.folder),
            "size_bytes": entry.size_bytes,
            "made_at": entry.made_at,
            "seconds": entry.seconds,
            "about": dict(entry.about),
        }
        for entry in found.entries
    ]
    others = [
        {"path": str(other.path), "what": other.text, "size_bytes": other.size_bytes, "changed_at": other.changed_at}
        for other in found.others
    ]
    return {"cache": str(found.folder), "entries": entries, "other": others, "total_bytes": found.total_bytes}
