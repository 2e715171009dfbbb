"""The file a recorded grid is kept in: JSON lines, the header first, then every probe as a store would keep it.

While it grows it is plain text (`NAME.jsonl.part`), so that a recording goes on where it was cut off; finished, it is
compressed (`NAME.jsonl.gz`).
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

from tuner.contract.base import Frozen, parse_json
from tuner.contract.errors import ConfigError
from tuner.contract.measurement import Environment
from tuner.contract.probe import ProbeRow
from tuner.contract.study import StudySpec

FORMAT = 1
ANCHOR = -1
"""`Recorded.repeat` of the baseline's probes in between: they tell how the host drifted."""
UNCAPPED = -2
"""`Recorded.repeat` of the probes without a memory cap, before the cap was chosen: the true peaks."""


class GridHeader(Frozen):
    """What was recorded, where and how."""

    format: int = FORMAT
    spec: StudySpec
    """Space, baseline, memory cap and measuring times of every probe in the file."""
    repeats: int
    """Fresh processes per configuration."""
    environment: Environment
    packages: dict[str, str]
    command: str
    recorded_at: str
    """UTC, ISO 8601."""


class Recorded(Frozen):
    repeat: int
    row: ProbeRow


def read(path: Path) -> tuple[GridHeader, list[Recorded]]:
    """Header and rows of a finished or growing recording. Raises ConfigError for any other file."""
    try:
        lines = list(_lines(path))
    except (OSError, UnicodeDecodeError, EOFError) as error:
        raise ConfigError(f"{path}: not a recorded grid: {error}") from None
    if not lines or not (found := _format_of(lines[0])):
        raise ConfigError(f"{path}: not a recorded grid: its first line is no header")
    if found != FORMAT:
        raise ConfigError(f"{path}: format {found} of recorded grids is not known; known: {FORMAT}. Record it again")
    header = parse_json(GridHeader, lines[0], str(path))
    return header, [parse_json(Recorded, line, str(path)) for line in lines[1:]]


def _lines(path: Path) -> Iterator[str]:
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    for line in text.splitlines(keepends=True):
        if line.endswith("\n"):  # the last line of a recording that was killed may be cut off
            yield line


def _format_of(line: str) -> int | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found.get("format", FORMAT) if isinstance(found, dict) and "spec" in found else None


class Writer:
    """Appends to a growing recording. Every row is on the disk's way when `add` returns."""

    def __init__(self, path: Path, header: GridHeader) -> None:
        """Go on with `path`, dropping a line that was cut off, or begin it with `header`."""
        self._path = path
        kept = list(_lines(path)) if path.exists() else []
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(kept or [header.to_json() + "\n"]), encoding="utf-8")

    def add(self, recorded: Recorded) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(recorded.model_dump_json(exclude_defaults=True) + "\n")

    def finish(self, path: Path) -> None:
        """Compress into `path` and remove the growing file."""
        data = self._path.read_bytes()
        beside = path.with_suffix(".tmp")
        with beside.open("wb") as raw, gzip.GzipFile(fileobj=raw, mode="wb", compresslevel=9, mtime=0) as file:
            file.write(data)
        beside.replace(path)
        self._path.unlink()
