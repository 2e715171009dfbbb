"""The user's pictures: FOLDER/metadata.jsonl or .csv with `file_name` and `text`: Hugging Face's layout."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from tuner.contract.errors import WorkloadError
from tuner.prepared import file_digest
from tuner.readers.listing import content_digest
from tuner.readers.pictures import SUFFIXES, read_picture
from tuner.readers.table_file import Row, TableFile

from .data import Item, held_out, normal

TABLES = ("metadata.jsonl", "metadata.csv")
COLUMNS = ("file_name", "text")
_LAYOUT = 'expected FOLDER/metadata.jsonl with lines {"file_name": "a.png", "text": "what it shows"}, or metadata.csv'


@dataclass(frozen=True)
class Prompt:
    row: Row
    """Where it stands, for messages."""
    file_name: str
    text: str


class ImageFolder:
    """Pictures beside their table. A tenth of the prompts is held out; equal prompts and equal files stay together."""

    channels = 3

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._table = TableFile(_table(folder))
        rows = list(_rows(self._table)) if self._table.header else []
        if not rows:
            raise self._table.wrong(f"it has no rows; {_LAYOUT}")
        _refuse_missing_files(folder, rows)
        held = held_out(_keys(folder, rows))
        if True not in held:
            raise self._table.wrong(
                "at least 2 different prompts with different pictures are needed, one of them for validation, but its"
                f" {len(rows)} rows have 1"
            )
        self._items = [Item(row.file_name, row.text, side) for row, side in zip(rows, held, strict=True)]

    @property
    def counts(self) -> tuple[int, int]:
        held = sum(item.held for item in self._items)
        return len(self._items) - held, held

    @property
    def remarks(self) -> tuple[str, ...]:
        return self._table.remarks

    def digest(self) -> str:
        """Of the table, and of the pictures' names, sizes and change times."""
        names = sorted({item.name for item in self._items})
        pictures = content_digest(self.folder, [self.folder / name for name in names])
        return f"{file_digest(self._table.path)} {pictures}"

    def items(self) -> Sequence[Item]:
        return self._items

    def picture(self, item: Item, size: int) -> NDArray[np.uint8]:
        return read_picture(self.folder / item.name, size, crop=True)


def _table(folder: Path) -> Path:
    if not folder.is_dir():
        why = "is not a folder" if folder.exists() else "does not exist"
        raise WorkloadError(f"--data {folder} {why}; {_LAYOUT}")
    found = [folder / name for name in TABLES if (folder / name).is_file()]
    if not found:
        raise WorkloadError(f"--data {folder}: neither {TABLES[0]} nor {TABLES[1]} is in it; {_LAYOUT}")
    if len(found) > 1:
        raise WorkloadError(f"--data {folder}: both {TABLES[0]} and {TABLES[1]} are in it; remove one of them")
    return found[0]


def _rows(table: TableFile) -> Iterator[Prompt]:
    """Raises WorkloadError naming file, row and column."""
    table.need(dict.fromkeys(COLUMNS, _LAYOUT))
    for row in table.rows():
        yield Prompt(row, _file_name(row), _cell(row, "text"))


def _cell(row: Row, column: str) -> str:
    if column not in row.values:
        known = ", ".join(map(str, row.values)) or "none"
        raise WorkloadError(f"{row.where}: column {column!r} is missing; its columns: {known}")
    value = row.values[column]
    if value is not None and not isinstance(value, str):
        raise row.wrong(column, f"a text is needed, got {json.dumps(value)[:40]}")
    if value is None or not value.strip():
        raise row.wrong(column, "it is empty; fill it in, or remove the row")
    return value.strip()


def _file_name(row: Row) -> str:
    name = _cell(row, "file_name")
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise row.wrong("file_name", f"a path below the folder is needed, got {name!r}")
    if path.suffix.lower() not in SUFFIXES:
        raise row.wrong("file_name", f"{name!r} is not one of {', '.join(SUFFIXES)}")
    return name


def _refuse_missing_files(folder: Path, rows: Sequence[Prompt]) -> None:
    for row in rows:
        if not (folder / row.file_name).is_file():
            raise row.row.wrong("file_name", f"{folder / row.file_name} does not exist")


def _keys(folder: Path, rows: Sequence[Prompt]) -> Iterator[list[str]]:
    """What rows may share: the prompt, the file, and the content of files that have the same size."""
    sizes = {name: (folder / name).stat().st_size for name in {row.file_name for row in rows}}
    common = Counter(sizes.values())
    for row in rows:
        keys = [f"text {normal(row.text)}", f"file {row.file_name}"]
        if common[sizes[row.file_name]] > 1:
            keys.append(f"content {_content(folder / row.file_name)}")
        yield keys


def _content(path: Path) -> str:
    try:
        return file_digest(path)
    except OSError as error:
        raise WorkloadError(f"--data: {path} cannot be read: {error.strerror}") from None
