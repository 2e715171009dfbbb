"""The user's own texts: CSV, TSV, JSONL or parquet with a text column and label columns, or plain text for task=lm.

Tables are read row by row, so only texts and labels are held. Row 1 is the first row of data.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuner.contract.errors import WorkloadError
from tuner.prepared import file_digest
from workloads.gpt2.rows import VALID_SHARE, Parts, Report, Rows, same_text, split

TEXT_NAMES = ("text", "comment", "comment_text")
CATEGORY, SPLIT, GROUP = "label", "split", "group"
NOT_LABELS = {"", "id", "index", SPLIT, GROUP}
SPLITS = {"train": "train", "valid": "valid", "validation": "valid", "val": "valid", "dev": "valid", "test": "valid"}
YES_NO = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1}
MISSING = {"", "nan", "none"}
SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet", ".txt")
MOST_CLASSES = 100
Row = tuple[int, Mapping[str, Any]]


def text_file(path: Path) -> Path:
    """`path`, if it is a file of a kind that is read. Raises WorkloadError."""
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise WorkloadError(f"options.data: {path} {what}; give a file ({', '.join(SUFFIXES)})")
    if path.suffix.lower() not in SUFFIXES:
        raise WorkloadError(f"options.data: {path}: files of kind {path.suffix!r} are not read; known: {SUFFIXES}")
    return path


@dataclass
class Table:
    """A table of texts. `labels` = (): the 0/1 columns are found; `needs_labels` is false for a language model."""

    path: Path
    text_column: str | None = None
    label_columns: tuple[str, ...] = ()
    needs_labels: bool = True
    _loaded: tuple[Rows, Parts] | None = None

    def train_count(self) -> int:
        return len(self.load(_silent)[1].train)

    def size_bytes(self) -> int:
        return self.path.stat().st_size * (4 if self.path.suffix.lower() == ".parquet" else 1)

    def digest(self) -> str:
        return file_digest(self.path)

    def load(self, report: Report) -> tuple[Rows, Parts]:
        if self._loaded is None:
            rows = self._read(report)
            parts = split(rows, str(self.path))
            if self.needs_labels:
                _refuse_constant_labels(self.path, rows, parts)
            self._loaded = rows, parts
        return self._loaded

    def _read(self, report: Report) -> Rows:
        rows, columns = Rows(), None
        categories: list[str] = []
        for number, row in _rows(self.path):
            if columns is None:
                columns = _Columns.find(self, row)
                rows.label_names = columns.labels
            if number % 5_000 == 0:
                report(number, 0, f"reading {self.path.name}")
            if columns.category:
                categories.append(_category(self.path, number, row))
            labels = tuple(_yes_or_no(self.path, number, name, row.get(name)) for name in columns.labels)
            group = str(row.get(GROUP) or "") if columns.group else ""
            rows.add(_text(self.path, number, columns.text, row), labels, group, self._side(number, row, columns))
        if columns is None:
            raise WorkloadError(f"{self.path}: it has no rows of data; expected a text column and label columns")
        if columns.category:
            _one_hot(self.path, rows, categories)
        return rows

    def _side(self, number: int, row: Mapping[str, Any], columns: _Columns) -> str:
        if not columns.split:
            return ""
        value = str(row.get(SPLIT)).strip().lower()
        if value not in SPLITS:
            raise _bad(self.path, number, SPLIT, f"must be one of {', '.join(SPLITS)}, got {row.get(SPLIT)!r}")
        return SPLITS[value]


@dataclass(frozen=True)
class _Columns:
    text: str
    labels: tuple[str, ...]
    category: bool
    """The labels are the values of one column `label`."""
    split: bool
    group: bool

    @classmethod
    def find(cls, table: Table, row: Mapping[str, Any]) -> _Columns:
        """From the first row. Raises WorkloadError naming the columns there are."""
        found = ", ".join(repr(name) for name in row)
        text = table.text_column or next((name for name in TEXT_NAMES if name in row), None)
        if text is None or text not in row:
            wanted = f"no column {text!r}" if text else f"no text column ({', '.join(TEXT_NAMES)})"
            raise WorkloadError(
                f"{table.path}: {wanted}; its columns are {found}; name one by the option `text_column`"
            )
        missing = [name for name in table.label_columns if name not in row]
        if missing:
            raise WorkloadError(f"{table.path}: no column {missing[0]!r} (label_columns); its columns are {found}")
        labels: tuple[str, ...] = ()
        category = False
        if table.needs_labels:
            category = not table.label_columns and CATEGORY in row
            labels = table.label_columns or (() if category else _found_labels(row, text))
            if not labels and not category:
                raise WorkloadError(
                    f"{table.path}: no label columns: besides {text!r} there must be columns of 0 and 1, or one column"
                    f" 'label'; its columns are {found}; name them by the option `label_columns`, or take task=lm"
                )
        return cls(text, labels, category, SPLIT in row, GROUP in row)


def _found_labels(row: Mapping[str, Any], text: str) -> tuple[str, ...]:
    """Columns whose first value is 0 or 1. A later value that is neither is an error, not another kind of column."""
    names = [name for name in row if name != text and name.lower() not in NOT_LABELS]
    return tuple(name for name in names if _as_word(row[name]) in YES_NO)


def _one_hot(path: Path, rows: Rows, categories: Sequence[str]) -> None:
    names = sorted(set(categories))
    if not 2 <= len(names) <= MOST_CLASSES:
        raise WorkloadError(
            f"{path}: column {CATEGORY!r} has {len(names)} different values; 2 to {MOST_CLASSES} are needed to tell"
            " texts apart by them"
        )
    if set(names) <= set(YES_NO):
        rows.label_names = (CATEGORY,)
        rows.labels = [(YES_NO[value],) for value in categories]
        return
    rows.label_names = tuple(names)
    rows.labels = [tuple(int(value == name) for name in names) for value in categories]


def _refuse_constant_labels(path: Path, rows: Rows, parts: Parts) -> None:
    for place, name in enumerate(rows.label_names):
        values = {rows.labels[index][place] for index in parts.train}
        if len(values) < 2:
            raise WorkloadError(
                f"{path}: column {name!r} is {values.pop()} in all {len(parts.train)} training rows, so nothing can be"
                " learnt of it; leave it out by the option `label_columns`, or add rows"
            )


# --- single values --------------------------------------------------------------------------------------------------


def _text(path: Path, number: int, name: str, row: Mapping[str, Any]) -> str:
    value = row.get(name)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise _bad(path, number, name, "a text is needed, but it is missing (NaN); remove the row or fill it")
    if not isinstance(value, str):
        raise _bad(path, number, name, f"must be a text, got {value!r}")
    if not value.strip():
        raise _bad(path, number, name, "the text is empty; remove the row or fill it")
    return value


def _category(path: Path, number: int, row: Mapping[str, Any]) -> str:
    word = _as_word(row.get(CATEGORY))
    if word in MISSING:
        raise _bad(path, number, CATEGORY, "a class is needed, but it is missing; remove the row or fill it")
    return str(row[CATEGORY]).strip() if word not in YES_NO else word


def _yes_or_no(path: Path, number: int, name: str, value: Any) -> int:
    word = _as_word(value)
    if word in MISSING:
        raise _bad(path, number, name, "a 0 or 1 is needed, but it is missing (NaN); remove the row or fill it")
    if word not in YES_NO:
        known = f"must be 0 or 1, got {value!r}"
        raise _bad(path, number, name, f"{known}; if it is no label, name the labels by the option `label_columns`")
    return YES_NO[word]


def _as_word(value: Any) -> str:
    return str(value).strip().lower()


def _bad(path: Path, number: int, column: str, why: str) -> WorkloadError:
    return WorkloadError(f"{path}: row {number}, column {column!r}: {why}")


# --- files ----------------------------------------------------------------------------------------------------------


def _rows(path: Path) -> Iterator[Row]:
    """(row number from 1, column -> value). Raises WorkloadError for a file that cannot be read."""
    reader = {".csv": _csv_rows, ".tsv": _csv_rows, ".jsonl": _jsonl_rows, ".parquet": _parquet_rows}[
        path.suffix.lower()
    ]
    try:
        yield from reader(path)
    except UnicodeDecodeError as error:
        raise WorkloadError(
            f"{path}: it is not UTF-8 text (byte 0x{error.object[error.start]:02x}); save it as UTF-8"
        ) from None
    except OSError as error:
        raise WorkloadError(f"{path} cannot be read: {error.strerror or error}") from None


def _csv_rows(path: Path) -> Iterator[Row]:
    csv.field_size_limit(1 << 30)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        try:
            heads = next(reader, [])
            twice = [name for name in heads if heads.count(name) > 1]
            if twice:
                raise WorkloadError(f"{path}: the column name {twice[0]!r} occurs twice; rename one of them")
            for number, cells in enumerate((cells for cells in reader if cells), start=1):
                if len(cells) != len(heads):
                    raise WorkloadError(
                        f"{path}: row {number} (line {reader.line_num}) has {len(cells)} fields, but the header has"
                        f" {len(heads)}: {', '.join(heads[:8])}; texts with a comma or a line break need quotes"
                    )
                yield number, dict(zip(heads, cells, strict=True))
        except csv.Error as error:
            raise WorkloadError(f"{path}: line {reader.line_num} is no valid CSV: {error}") from None


def _jsonl_rows(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate((line for line in file if line.strip()), start=1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise WorkloadError(f"{path}: row {number} is no valid JSON: {error.msg}") from None
            if not isinstance(row, dict):
                raise WorkloadError(
                    f"{path}: row {number} must be an object {{column: value}}, got {line.strip()[:40]}"
                )
            yield number, row


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=10_000, use_threads=False):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except pyarrow.ArrowException as error:
        raise WorkloadError(f"{path} is no readable parquet file: {str(error).splitlines()[0]}") from None


# --- plain text -----------------------------------------------------------------------------------------------------


@dataclass
class PlainText:
    """Paragraphs (parted by empty lines) of one file, for a language model; the last tenth is for validation."""

    path: Path
    _loaded: tuple[Rows, Parts] | None = None

    def train_count(self) -> int:
        return len(self.load(_silent)[1].train)

    def size_bytes(self) -> int:
        return self.path.stat().st_size

    def digest(self) -> str:
        return file_digest(self.path)

    def load(self, report: Report) -> tuple[Rows, Parts]:
        if self._loaded is None:
            report(0, 1, f"reading {self.path.name}")
            rows = Rows()
            for paragraph in _paragraphs(self.path):
                rows.add(paragraph, ())
            last = len(rows.texts) - max(1, round(VALID_SHARE * len(rows.texts)))
            rows.splits = ["train" if index < last else "valid" for index in range(len(rows.texts))]
            rows.groups = [str(index * 20 // max(1, len(rows.texts))) for index in range(len(rows.texts))]
            self._loaded = rows, split(rows, str(self.path))
        return self._loaded


def _paragraphs(path: Path) -> Iterator[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise WorkloadError(f"{path}: it is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise WorkloadError(f"{path} cannot be read: {error.strerror or error}") from None
    kept = [part.strip() for part in text.replace("\r\n", "\n").split("\n\n")]
    return (part for part in kept if same_text(part))


def _silent(done: int, total: int, text: str) -> None:
    """Progress nobody watches."""
