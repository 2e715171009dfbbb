"""The user's pictures: FOLDER/metadata.jsonl or .csv with `file_name` and `text`: Hugging Face's layout."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tuner.contract.errors import WorkloadError
from tuner.prepared import file_digest
from workloads.sd_kanji.data import Item, held_out, normal

SUFFIXES = (".png", ".jpg", ".jpeg")
TABLES = ("metadata.jsonl", "metadata.csv")
COLUMNS = ("file_name", "text")
_LAYOUT = 'expected FOLDER/metadata.jsonl with lines {"file_name": "a.png", "text": "what it shows"}, or metadata.csv'


@dataclass(frozen=True)
class Row:
    where: str
    """`metadata.jsonl, line 3`: what a message begins with."""
    file_name: str
    text: str


class ImageFolder:
    """Pictures beside their table. A tenth of the prompts is held out; equal prompts and equal files stay together."""

    channels = 3

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._table = _table(folder)
        rows = list(_rows(self._table))
        _refuse_missing_files(folder, rows)
        held = held_out(_keys(folder, rows))
        if True not in held:
            raise WorkloadError(
                f"--data {self._table}: at least 2 different prompts with different pictures are needed, one of them"
                f" for validation, but its {len(rows)} rows have 1"
            )
        self._items = [Item(row.file_name, row.text, side) for row, side in zip(rows, held, strict=True)]

    @property
    def counts(self) -> tuple[int, int]:
        held = sum(item.held for item in self._items)
        return len(self._items) - held, held

    def digest(self) -> str:
        """Of the table, and of names, sizes and change times: each probe asks, so the pictures are not read."""
        state = hashlib.sha256(file_digest(self._table).encode())
        for name in sorted({item.name for item in self._items}):
            about = (self.folder / name).stat()
            state.update(f"{name}\0{about.st_size}\0{about.st_mtime_ns}\n".encode())
        return state.hexdigest()

    def items(self) -> Sequence[Item]:
        return self._items

    def picture(self, item: Item, size: int) -> NDArray[np.uint8]:
        """The shorter side scaled to `size`, the longer one cropped at both ends; what is transparent becomes white."""
        from PIL import Image, ImageOps

        path = self.folder / item.name
        try:
            with Image.open(path) as opened:
                upright = ImageOps.exif_transpose(opened).convert("RGBA")
            backed = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright).convert("RGB")
            fitted = ImageOps.fit(backed, (size, size), Image.Resampling.BICUBIC)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise WorkloadError(
                f"--data: {path} is no readable picture ({error}); mend it, or remove its row"
            ) from None
        return np.asarray(fitted).transpose(2, 0, 1)


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


def _rows(table: Path) -> Iterator[Row]:
    """Raises WorkloadError naming file, line and column."""
    try:
        text = table.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise WorkloadError(f"--data {table} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = table.read_bytes()[: error.start].count(b"\n") + 1
        raise WorkloadError(f"--data {table}, line {line}: it is not UTF-8; save the file as UTF-8") from None
    raw = list(_json_lines(table, text) if table.suffix == ".jsonl" else _csv_lines(table, text))
    if not raw:
        raise WorkloadError(f"--data {table} has no rows; {_LAYOUT}")
    for where, values in raw:
        yield Row(where, _file_name(where, values), _cell(where, values, "text"))


def _json_lines(table: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"--data {table}, line {number}"
        try:
            values = json.loads(line)
        except ValueError as error:
            raise WorkloadError(f"{where}: it is no JSON object ({error}); {_LAYOUT}") from None
        if not isinstance(values, dict):
            raise WorkloadError(f"{where}: it is no JSON object but {line.strip()[:40]}; {_LAYOUT}")
        yield where, values


def _csv_lines(table: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            known = ", ".join(reader.fieldnames or ()) or "none"
            raise WorkloadError(f"--data {table}, line 1: column {missing[0]!r} is missing; its columns: {known}")
        for values in reader:
            yield f"--data {table}, line {reader.line_num}", values
    except csv.Error as error:
        raise WorkloadError(f"--data {table}, from line {reader.line_num} on: it is no CSV ({error})") from None


def _cell(where: str, values: dict[str, Any], column: str) -> str:
    if column not in values:
        known = ", ".join(map(str, values)) or "none"
        raise WorkloadError(f"{where}: column {column!r} is missing; its columns: {known}")
    value = values[column]
    if value is not None and not isinstance(value, str):
        raise WorkloadError(f"{where}, column {column!r}: a text is needed, got {json.dumps(value)[:40]}")
    if value is None or not value.strip():
        raise WorkloadError(f"{where}, column {column!r}: it is empty; fill it in, or remove the row")
    return value.strip()


def _file_name(where: str, values: dict[str, Any]) -> str:
    name = _cell(where, values, "file_name")
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise WorkloadError(f"{where}, column 'file_name': a path below the folder is needed, got {name!r}")
    if path.suffix.lower() not in SUFFIXES:
        raise WorkloadError(f"{where}, column 'file_name': {name!r} is not one of {', '.join(SUFFIXES)}")
    return name


def _refuse_missing_files(folder: Path, rows: Sequence[Row]) -> None:
    for row in rows:
        if not (folder / row.file_name).is_file():
            raise WorkloadError(f"{row.where}, column 'file_name': {folder / row.file_name} does not exist")


def _keys(folder: Path, rows: Sequence[Row]) -> Iterator[list[str]]:
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
