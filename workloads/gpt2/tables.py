"""The user's own texts: CSV, TSV, JSONL or parquet with a text column and label columns, or plain text for task=lm.

Tables are read row by row, so only texts and labels are held.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tuner.contract.base import printable
from tuner.contract.errors import WorkloadError
from tuner.prepared import file_digest
from tuner.readers import table_file
from tuner.readers.table_file import SPLITS, Row, TableFile, plain_name
from tuner.readers.text import read_text

from .rows import VALID_SHARE, Parts, Report, Rows, same_text, split

TEXT_NAMES = ("text", "comment", "comment_text")
CATEGORY, SPLIT, GROUP = "label", "split", "group"
NOT_LABELS = {"id", SPLIT, GROUP}
YES_NO = {"0": 0, "1": 1, "false": 0, "true": 1}
MISSING = {"", "nan", "none"}
SUFFIXES = (*table_file.SUFFIXES, ".txt")
MOST_CLASSES = 100


def text_file(path: Path) -> Path:
    """`path`, if it is a file of a kind that is read. Raises WorkloadError."""
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise WorkloadError(f"options.data: {printable(path)} {what}; give a file ({', '.join(SUFFIXES)})")
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
            parts = split(rows, f"--data {printable(self.path)}")
            if self.needs_labels:
                _refuse_constant_labels(self._file, rows, parts)
            self._loaded = rows, parts
        return self._loaded

    @cached_property
    def _file(self) -> TableFile:
        return TableFile(self.path)

    @property
    def remarks(self) -> tuple[str, ...]:
        return self._file.remarks

    def _read(self, report: Report) -> Rows:
        rows, columns = Rows(), None
        categories: list[str] = []
        for number, row in enumerate(self._file.rows(), start=1):
            if number % 5_000 == 0:
                report(number, 0, f"reading {self._file.name}")
            side = _side(row)
            if side == "test":
                rows.aside += 1
                continue
            if columns is None:
                columns = _Columns.find(self, self._file, row)
                rows.label_names = columns.labels
            if columns.category:
                categories.append(_category(row))
            labels = tuple(_yes_or_no(row, name) for name in columns.labels)
            rows.add(_text(row, columns.text), labels, _group(row), side)
        if columns is None:
            tests = f" ({rows.aside:,} test rows are set aside)" if rows.aside else ""
            raise self._file.wrong(f"it has no rows of data{tests}; expected a text column and label columns")
        if columns.category:
            _one_hot(self._file, rows, categories)
        return rows


@dataclass(frozen=True)
class _Columns:
    text: str
    labels: tuple[str, ...]
    category: bool
    """The labels are the values of one column `label`."""

    @classmethod
    def find(cls, table: Table, file: TableFile, row: Row) -> _Columns:
        """From the first row. Raises WorkloadError naming the columns there are."""
        given = row.values
        found = ", ".join(repr(name) for name in given)
        text = table.text_column or next((name for name in TEXT_NAMES if name in given), None)
        if text is None or text not in given:
            wanted = f"no column {text!r}" if text else f"no text column ({', '.join(TEXT_NAMES)})"
            raise file.wrong(f"{wanted}; its columns are {found}; name one by the option `text_column`")
        missing = [name for name in table.label_columns if name not in given]
        if missing:
            raise file.wrong(f"no column {missing[0]!r} (label_columns); its columns are {found}")
        labels: tuple[str, ...] = ()
        category = False
        if table.needs_labels:
            category = not table.label_columns and CATEGORY in given
            labels = table.label_columns or (() if category else _found_labels(row, text))
            if not labels and not category:
                raise file.wrong(
                    f"no label columns: besides {text!r} there must be columns of 0 and 1, or one column"
                    f" 'label'; its columns are {found}; name them by the option `label_columns`, or take task=lm"
                )
        return cls(text, labels, category)


def _found_labels(row: Row, text: str) -> tuple[str, ...]:
    """Columns whose first value is 0 or 1. A later value that is neither is an error, not another kind of column."""
    names = [name for name in row.values if name != text and name.lower() not in NOT_LABELS]
    return tuple(name for name in names if _as_word(row.values[name]) in YES_NO)


def _one_hot(file: TableFile, rows: Rows, categories: Sequence[str]) -> None:
    names = sorted(set(categories))
    if not 2 <= len(names) <= MOST_CLASSES:
        raise file.wrong(
            f"column {CATEGORY!r} has {len(names)} different values; 2 to {MOST_CLASSES} are needed to tell texts"
            " apart by them"
        )
    if set(names) <= set(YES_NO):
        rows.label_names = (CATEGORY,)
        rows.labels = [(YES_NO[value],) for value in categories]
        return
    rows.label_names = tuple(names)
    rows.labels = [tuple(int(value == name) for name in names) for value in categories]


def _refuse_constant_labels(file: TableFile, rows: Rows, parts: Parts) -> None:
    for place, name in enumerate(rows.label_names):
        values = {rows.labels[index][place] for index in parts.train}
        if len(values) < 2:
            raise file.wrong(
                f"column {name!r} is {values.pop()} in all {len(parts.train)} training rows, so nothing can be"
                " learnt of it; leave it out by the option `label_columns`, or add rows"
            )


# --- single values --------------------------------------------------------------------------------------------------


def _text(row: Row, name: str) -> str:
    value = row.values.get(name)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise row.wrong(name, "a text is needed, but it is missing (NaN); remove the row or fill it")
    if not isinstance(value, str):
        raise row.wrong(name, f"must be a text, got {value!r}")
    if not value.strip():
        raise row.wrong(name, "the text is empty; remove the row or fill it")
    return value


def _category(row: Row) -> str:
    word = _as_word(row.values.get(CATEGORY))
    if word in MISSING:
        raise row.wrong(CATEGORY, "a class is needed, but it is missing; remove the row or fill it")
    return plain_name(row.values[CATEGORY]) if word not in YES_NO else word


def _yes_or_no(row: Row, name: str) -> int:
    value = row.values.get(name)
    word = _as_word(value)
    if word in MISSING:
        raise row.wrong(name, "a 0 or 1 is needed, but it is missing (NaN); remove the row or fill it")
    if word not in YES_NO:
        known = f"must be 0 or 1, got {value!r}"
        raise row.wrong(name, f"{known}; if it is no label, name the labels by the option `label_columns`")
    return YES_NO[word]


def _group(row: Row) -> str:
    word = plain_name(row.values.get(GROUP) or "")
    return "" if word.lower() in MISSING else word


def _side(row: Row) -> str:
    if SPLIT not in row.values:
        return ""
    side = SPLITS.get(str(row.values[SPLIT]).strip().lower())
    if side is None:
        raise row.wrong(SPLIT, f"must be one of {', '.join(SPLITS)}, got {row.values[SPLIT]!r}")
    return side


def _as_word(value: Any) -> str:
    return plain_name(value).lower()


# --- plain text -----------------------------------------------------------------------------------------------------


@dataclass
class PlainText:
    """Paragraphs (parted by empty lines) of one file, for a language model; the last tenth is for validation."""

    path: Path
    remarks: tuple[str, ...] = ()
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
            self._loaded = rows, split(rows, f"--data {printable(self.path)}")
        return self._loaded


def _paragraphs(path: Path) -> Iterator[str]:
    kept = [part.strip() for part in read_text(path).split("\n\n")]
    return (part for part in kept if same_text(part))


def _silent(done: int, total: int, text: str) -> None:
    """Progress nobody watches."""
