"""What files hold, known by digests of their content.

Every file is read once. What was read is remembered in the cache beside the file's size, times and inode, and it is
read again only when one of these has changed: a change of content behind the same name and size is seen, and a hundred
GiB are not read at every start.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

FOLDER = "contents"
"""Of the cache: one file for each root that was asked for."""
ROOTS_KEPT = 200
RECENT_NS = 2_000_000_000
"""A file changed so shortly before it was read may change again without its times telling: it is not remembered."""
_PIECE = 1 << 20
_NO_DATA = ("__MACOSX", "__pycache__")
_IN_LINES = (".csv", ".tsv", ".jsonl", ".ndjson", ".txt")
_WITH_HEAD = (".csv", ".tsv")


@dataclass(frozen=True)
class Content:
    """What one file holds."""

    name: str
    """Below the root, with `/`."""
    bytes: int
    digest: str
    """SHA-256; empty where the file cannot be read."""
    lines: int | None = None
    head: str = ""


def contents(
    root: Path,
    files: Sequence[Path],
    cache: Path | None = None,
    reading: Callable[[int], None] = lambda _: None,
) -> list[Content]:
    """One for each of `files`, which lie below `root`. `reading` is told how many bytes must be read now, before they
    are. Without a `cache` folder, or where it cannot be used, everything is read."""
    memory = _Memory(root, cache)
    names = [file.relative_to(root).as_posix() for file in files]
    marks = [_mark(file) for file in files]
    unknown = {name for name, mark in zip(names, marks, strict=True) if memory.get(name, mark) is None}
    if unknown:
        reading(sum(mark.bytes for name, mark in zip(names, marks, strict=True) if name in unknown))
    found = []
    for file, name, mark in zip(files, names, marks, strict=True):
        known = memory.get(name, mark)
        if known is None:
            known = _read(file, name)
            memory.put(name, mark, known)
        found.append(known)
    memory.write()
    return found


def together(found: Sequence[Content]) -> str:
    """One digest of many files' names and contents."""
    state = hashlib.sha256()
    for item in sorted(found, key=lambda item: item.name):
        state.update(f"{item.name}\0{item.bytes}\0{item.digest}\n".encode("utf-8", "surrogateescape"))
    return state.hexdigest()


def below(root: Path, aside: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """Every regular file below `root`, links followed; hidden ones, and what lies in folders `aside`, are no data."""
    seen: set[tuple[int, int]] = set()
    no_disks = {os.stat(place).st_dev for place in ("/proc", "/sys", "/dev") if os.path.isdir(place)}
    for folder, folders, files in os.walk(root, followlinks=True):
        here = os.stat(folder)
        known = (here.st_dev, here.st_ino) in seen or here.st_dev in no_disks
        if known or (Path(folder) != root and Path(folder).resolve() in aside):
            folders.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in _NO_DATA)
        for name in sorted(files):
            path = Path(folder, name)
            if not name.startswith(".") and path.is_file():
                yield path


@dataclass(frozen=True)
class _Mark:
    """By what a file is known without reading it."""

    bytes: int
    key: str
    settled: bool


def _mark(file: Path) -> _Mark:
    try:
        about = file.stat()
    except OSError:
        return _Mark(0, "", False)
    times = (about.st_mtime_ns, about.st_ctime_ns)
    text = f"{about.st_size} {times[0]} {times[1]} {about.st_dev} {about.st_ino}"
    settled = time.time_ns() - max(times) > RECENT_NS
    return _Mark(about.st_size, hashlib.blake2b(text.encode(), digest_size=8).hexdigest(), settled)


def _read(file: Path, name: str) -> Content:
    try:
        if file.is_file():  # opening a pipe would wait for its writer
            with file.open("rb") as source:
                return _digested(source, name, file.suffix.lower())
    except OSError:
        pass
    return Content(name, 0, "")


def _digested(source: IO[bytes], name: str, suffix: str) -> Content:
    """No more is read than the file holds now: some never end."""
    state, size, lines, head, last = hashlib.sha256(), 0, 0, "", b""
    whole = os.fstat(source.fileno()).st_size
    while piece := source.read(min(_PIECE, whole - size)):
        if not size and suffix in _WITH_HEAD:
            head = hashlib.sha256(piece.partition(b"\n")[0].strip()).hexdigest()[:12]
        state.update(piece)
        size += len(piece)
        if suffix in _IN_LINES:
            lines += piece.count(b"\n")
            last = piece[-1:]
    counted = lines + (last not in (b"", b"\n")) if suffix in _IN_LINES else None
    return Content(name, size, state.hexdigest(), counted, head)


class _Memory:
    """What was read below one root before. Losing it costs reading again, so nothing about it is an error."""

    def __init__(self, root: Path, cache: Path | None) -> None:
        place = os.path.abspath(root)
        self._root = place
        key = hashlib.sha256(os.fsencode(place)).hexdigest()[:16]
        self._path = cache / FOLDER / f"{key}.json" if cache is not None else None
        self._known: dict[str, list[Any]] = {}
        self._changed = False
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            if self._path is not None:
                self._known = dict(json.loads(self._path.read_text(encoding="utf-8"))["files"])

    def get(self, name: str, mark: _Mark) -> Content | None:
        kept = self._known.get(name)
        if not mark.key or not isinstance(kept, list) or len(kept) != 5 or kept[0] != mark.key:
            return None
        return Content(name, *kept[1:])

    def put(self, name: str, mark: _Mark, content: Content) -> None:
        if mark.settled and content.digest:
            self._known[name] = [mark.key, content.bytes, content.digest, content.lines, content.head]
            self._changed = True

    def write(self) -> None:
        if self._path is None or not self._changed:
            return
        here = {name: kept for name, kept in self._known.items() if os.path.lexists(os.path.join(self._root, name))}
        aside = self._path.with_name(f".{self._path.name}.{os.getpid()}.part")
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            aside.write_text(json.dumps({"root": self._root, "files": here}), encoding="utf-8")
            os.replace(aside, self._path)
            _forget_old(self._path.parent)
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


def _forget_old(folder: Path) -> None:
    """Keep the roots asked for last."""
    kept = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in kept[ROOTS_KEPT:]:
        path.unlink()
