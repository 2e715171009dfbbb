"""Prepared data, kept: made once under a key of its content, complete or absent; what `tuner cache` lists and clears.

For workload authors. An entry is a folder `CACHE/WORKLOAD/WHAT-KEY`. It is built in a folder beside and moved when all
of it is on disk, so a process killed at any moment leaves no half an entry; what it was building is removed by the next
one. `ensure` takes no lock of its own: the engine calls `prepare`, and `tuner cache` removes, while holding `locked`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuner.contract.errors import WorkloadError

ABOUT = "about.json"
LOCK = ".prepare.lock"
PARTIAL = ".partial-"
"""How the name of a folder begins that is still being built, or being removed."""
_WAIT_S = 1.0
"""Between two looks at a lock another process holds."""
_SPARE_BYTES = 64 << 20
"""Left free beside what an entry needs."""
_building: set[Path] = set()
"""What this process is building now: an entry may be made from another one."""


@dataclass(frozen=True)
class Entry:
    """One entry of the cache."""

    folder: Path
    workload: str
    what: str
    key: str
    about: Mapping[str, Any]
    """What the key was made of."""
    size_bytes: int
    made_at: float
    """Seconds since 1970."""
    seconds: float
    """How long it took to make."""


def ensure(
    cache_dir: Path,
    workload: str,
    what: str,
    about: Mapping[str, Any],
    make: Callable[[Path], None],
    *,
    need_bytes: int = 0,
) -> Path:
    """The folder of the entry; `make(folder)` fills an empty one when there is none, or when a file of it is damaged.

    `about` (plain values: digests of the data, options, a version of the code) is hashed to the key: whatever changes
    the content must be in it. `need_bytes` is an upper estimate of the disk it takes.
    Raises WorkloadError when the disk is too full or the folder cannot be used, and what `make` raises.
    """
    folder = cache_dir / workload / f"{what}-{digest(about)}"
    if is_whole(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder.parent)
        _refuse_full_disk(folder, need_bytes)
        _build(folder, workload, what, about, make)
    except OSError as error:
        if not _is_ours(error, cache_dir):
            raise
        raise _unusable(folder, error) from error
    return folder


@contextlib.contextmanager
def locked(cache_dir: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Alone in the cache, among all processes, until the block or the process ends; `waiting` is called every second
    in which another one has it. Raises OSError when the folder cannot be written."""
    with (cache_dir / LOCK).open("w", encoding="utf-8") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                waiting()
                time.sleep(_WAIT_S)
        yield


def digest(about: Mapping[str, Any]) -> str:
    """Sixteen hex digits naming `about`."""
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]


def file_digest(path: Path) -> str:
    """sha256 of a file's content, read in pieces."""
    state = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            state.update(piece)
    return state.hexdigest()


def entries(cache_dir: Path) -> list[Entry]:
    """Every entry, by workload and what it is; those still being built, and unreadable ones, are left out."""
    folders = [path.parent for path in sorted(cache_dir.glob(f"*/*/{ABOUT}"))]
    found = [_read(folder) for folder in folders if not folder.name.startswith(PARTIAL)]
    return [entry for entry in found if entry is not None]


def remove(entry: Entry) -> None:
    """Take the entry away at once (renamed first, so that nobody sees half of it). Raises OSError."""
    doomed = entry.folder.with_name(f"{PARTIAL}removed-{entry.folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)  # left by a removal that was killed
    os.replace(entry.folder, doomed)
    shutil.rmtree(doomed)


def size_of(folder: Path) -> int:
    """Bytes of all files below `folder`; files that vanish meanwhile count nothing."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.lstat().st_size if not path.is_dir() else 0
    return total


def _build(folder: Path, workload: str, what: str, about: Mapping[str, Any], make: Callable[[Path], None]) -> None:
    partial = folder.with_name(f"{PARTIAL}{folder.name}")
    partial.mkdir()
    _building.add(partial)
    began = time.monotonic()
    try:
        make(partial)
        files = {str(path.relative_to(partial)): path.stat().st_size for path in _files(partial)}
        text = json.dumps(
            {
                "workload": workload,
                "what": what,
                "about": dict(about),
                "files": files,
                "made_at": time.time(),
                "seconds": round(time.monotonic() - began, 2),
            }
        )
        (partial / ABOUT).write_text(text, encoding="utf-8")
        for path in _files(partial):
            _sync(path)
        if folder.exists():  # damaged, or it would not be built again
            shutil.rmtree(folder)
        os.replace(partial, folder)
        _sync(folder.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        _building.discard(partial)


def is_whole(folder: Path) -> bool:
    """All files of an entry are there with the size they had. Their content is for the reader to check."""
    try:
        files = json.loads((folder / ABOUT).read_text(encoding="utf-8"))["files"]
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False


def _read(folder: Path) -> Entry | None:
    try:
        raw = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        return Entry(
            folder=folder,
            workload=str(raw["workload"]),
            what=str(raw["what"]),
            key=folder.name.rpartition("-")[2],
            about=dict(raw["about"]),
            size_bytes=size_of(folder),
            made_at=float(raw["made_at"]),
            seconds=float(raw["seconds"]),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _remove_leftovers(parent: Path) -> None:
    for left in parent.glob(f"{PARTIAL}*"):
        if left not in _building:
            shutil.rmtree(left, ignore_errors=True)


def _refuse_full_disk(folder: Path, need_bytes: int) -> None:
    free = shutil.disk_usage(folder.parent).free
    if need_bytes and free < need_bytes + _SPARE_BYTES:
        raise WorkloadError(
            f"cache folder {folder.parent}: {folder.name} needs {need_bytes / 2**20:.0f} MiB, but"
            f" {free / 2**20:.0f} MiB are free; free disk space (`tuner cache`), or set TUNER_CACHE to another disk"
        )


def _is_ours(error: OSError, cache_dir: Path) -> bool:
    """Is the trouble in the cache? `make` reads other files too, and what is wrong with them is another matter."""
    if not isinstance(error.filename, str) or error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    named, cache = Path(error.filename).absolute(), cache_dir.absolute()
    return named.is_relative_to(cache) or cache.is_relative_to(named)


def _unusable(folder: Path, error: OSError) -> WorkloadError:
    where = error.filename or folder
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return WorkloadError(
            f"{where}: the disk is full; free disk space (`tuner cache`), or set TUNER_CACHE to another disk"
        )
    return WorkloadError(f"cache folder: {where}: {error.strerror or error}; mend it, or set TUNER_CACHE to another")


def _sync(path: Path) -> None:
    with contextlib.suppress(OSError):  # some file systems refuse; the rename itself is still atomic
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
