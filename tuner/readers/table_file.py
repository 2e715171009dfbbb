"""Tables of users: CSV, TSV, JSONL and parquet, as rows of plain values or as columns read in pieces.

The separator is found, an index that pandas wrote is known and left out, every row has as many fields as the header,
and whatever is wrong is named by row and column. Rows are counted as people see them: the header of a CSV is row 1, the
first line of a JSONL file and the first row of a parquet file are.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
from numpy.typing import NDArray

from tuner.contract.base import printable
from tuner.contract.errors import WorkloadError
from tuner.readers.text import OPTION, opened, why_broken

CSV, TSV, JSONL, PARQUET = SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
MISSING = ("", "NA", "N/A", "na", "NaN", "nan", "NULL", "null", "None", "-")
"""How a CSV says that there is no number."""
PIECE_ROWS = 200_000
"""Read at a time, by column."""
_INDEX = re.compile(r"|Unnamed: \d+(\.\d+)*|__index_level_\d+__|index", re.ASCII)
"""Columns in which pandas keeps the numbers of the rows."""
_NUMBER = re.compile(r"[+-]?(0|[1-9]\d{0,17})(\.\d{0,18})?([eE][+-]?\d{1,2})?", re.ASCII)
"""Not 007: where zeros lead, figures are a name."""
_LOOKED_AT, _LOOKED_AT_CHARACTERS = 50, 1 << 16
"""Records, and characters, by which a separator is chosen."""
_DECLARED = re.compile(r"sep=(.)\r?\n?")
"""A first line that Excel understands."""
SPLITS = {"train": "train", "valid": "valid", "validation": "valid", "val": "valid", "dev": "valid", "test": "test"}
Names = NDArray[np.object_]


class Row(NamedTuple):
    where: str
    """`--data FILE: row 7`: what a message begins with."""
    values: Mapping[str, Any]

    def wrong(self, column: str, why: str) -> WorkloadError:
        """The error that names this row's cell."""
        return WorkloadError(f"{self.where}, column {column!r}: {why}")


def plain_name(value: Any) -> str:
    """What a class, a block or a group is called: numbers that are equal have one name (2, 2.0, "2.00": `2`)."""
    text = str(value).strip()
    if not _NUMBER.fullmatch(text):
        return text
    number = Decimal(text)
    return str(int(number)) if number == number.to_integral_value() else f"{number.normalize():f}"


@dataclass
class TableFile:
    """One file. `option` is what messages name. Raises WorkloadError, at once for what the header shows."""

    path: Path
    option: str = OPTION
    kind: str = field(init=False)
    """The suffix, in lower case."""
    header: tuple[str, ...] = field(init=False)
    """Every column the file has, in its order."""
    separator: str = field(init=False, default="")
    """Of a CSV or TSV."""
    _skipped: int = field(init=False, default=0)
    """Lines before the header."""

    def __post_init__(self) -> None:
        self.kind = self.path.suffix.lower()
        if self.kind not in SUFFIXES:
            raise self.wrong(f"files of kind {self.path.suffix!r} are not read; known: {', '.join(SUFFIXES)}")
        self.header = self._read_header()
        named = [name for name in self.header if name]
        if twice := next((name for name in named if named.count(name) > 1), None):
            raise self.wrong(f"row 1: the column name {twice!r} occurs twice; rename one")

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of data: an index is none."""
        return tuple(name for name in self.header if not is_index(name))

    @property
    def remarks(self) -> tuple[str, ...]:
        """What the user should know of how the file was understood."""
        said = []
        if self.separator and self.separator != ("\t" if self.kind == TSV else ","):
            said.append(f"{self.name}: its fields are parted by {SEPARATORS[self.separator]}")
        if left := [name for name in self.header if is_index(name)]:
            named = ", ".join(repr(name) for name in left)
            said.append(f"{self.name}: column {named} is taken for an index, as pandas writes one, and passed over")
        return tuple(said)

    @property
    def name(self) -> str:
        return printable(self.path.name)

    def wrong(self, why: str) -> WorkloadError:
        return WorkloadError(f"{self.option} {printable(self.path)}: {why}")

    def need(self, columns: Mapping[str, str]) -> None:
        """`columns`: name -> how the user names another one. Raises WorkloadError for the first that is not there."""
        for name, how in columns.items():
            if name not in self.header:
                found = listed(self.columns) or "none"
                parted = f", parted by {SEPARATORS[self.separator]}" if self.separator not in ("", ",") else ""
                raise self.wrong(f"it has no column {name!r}; its columns are {found}{parted}: {how}")

    # --- by row -------------------------------------------------------------------------------------------------------

    def rows(self) -> Iterator[Row]:
        """Texts from a CSV, other plain values from the other kinds. Raises WorkloadError naming row and column."""
        read = {JSONL: self._json_rows, PARQUET: self._parquet_rows}.get(self.kind, self._csv_rows)
        for where, values in read():
            row = Row(f"{self.option} {printable(self.path)}: {where}", values)
            for column, value in values.items():
                if isinstance(value, str) and not value.isascii() and (why := why_broken(value)):
                    raise row.wrong(printable(column), why)
            yield row

    def _csv_rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        with self._csv_reader() as reader:
            next(reader, None)
            for number, cells in enumerate((cells for cells in reader if cells), start=2 + self._skipped):
                line = reader.line_num + self._skipped
                where = f"row {number}" if line == number else f"row {number} (line {line})"
                if len(cells) != len(self.header):
                    parted = SEPARATORS[self.separator]
                    raise self.wrong(
                        f"{where} has {len(cells)} fields, but the header has {len(self.header)}:"
                        f" {listed(self.header)}; texts with {parted} or line breaks in them need quotes"
                    )
                yield where, {name: cell for name, cell in zip(self.header, cells, strict=True) if not is_index(name)}

    def _json_rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for where, values in self._json_objects():
            yield where, {name: value for name, value in values.items() if not is_index(name)}

    def _json_objects(self) -> Iterator[tuple[str, dict[str, Any]]]:
        with opened(self.path, self.option) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"row {number}", self._json_object(f"row {number}", line)

    def _json_object(self, where: str, line: str) -> dict[str, Any]:
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            why = why_broken(line) or f"it is no valid JSON: {getattr(error, 'msg', 'nested too deeply')}"
            raise self.wrong(f"{where}: {why}") from None
        if not isinstance(values, dict):
            shown = printable(line.strip()[:40])
            raise self.wrong(f"{where}: it must be an object {{column: value}}, got {shown}")
        if broken := next((name for name in values if why_broken(name)), None):
            raise self.wrong(f"{where}: the column name '{printable(broken)}': {why_broken(broken)}")
        return values

    def _parquet_rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        import pyarrow.parquet

        number = 0
        with self._readable(), pyarrow.parquet.ParquetFile(self.path) as file:
            for batch in file.iter_batches(batch_size=10_000, columns=list(self.columns), use_threads=False):
                for values in batch.to_pylist():
                    number += 1
                    yield f"row {number}", values

    # --- by column ----------------------------------------------------------------------------------------------------

    def names(self, columns: Sequence[str]) -> Iterator[tuple[int, list[Names]]]:
        """(first row, from 0; for each of `columns` its next values as `plain_name` has them); CSV and parquet.

        Every row of the file is seen: one with more or fewer fields than the header is refused, where a decimal comma
        would otherwise become two numbers. An empty cell is refused too.
        """
        first = 0
        for batch in self._text_batches(columns):
            if batch.num_rows:
                yield first, [self._named(first, batch.column(at), name) for at, name in enumerate(columns)]
                first += batch.num_rows

    def _text_batches(self, columns: Sequence[str]) -> Iterator[Any]:
        import pyarrow
        import pyarrow.csv
        import pyarrow.parquet

        with self._readable():
            if self.kind == PARQUET:
                with pyarrow.parquet.ParquetFile(self.path) as opened_file:
                    for batch in opened_file.iter_batches(PIECE_ROWS, columns=list(columns), use_threads=False):
                        yield batch.select(list(columns))
                return
            wanted = [str(self.header.index(name)) for name in columns]
            places = [str(place) for place in range(len(self.header))]
            reading = pyarrow.csv.ReadOptions(use_threads=False, column_names=places, skip_rows=1 + self._skipped)
            parsing = pyarrow.csv.ParseOptions(delimiter=self.separator, newlines_in_values=True)
            texts = pyarrow.csv.ConvertOptions(
                include_columns=wanted, column_types=dict.fromkeys(wanted, pyarrow.string())
            )
            with pyarrow.csv.open_csv(
                self.path, read_options=reading, parse_options=parsing, convert_options=texts
            ) as opened_csv:
                yield from opened_csv

    def _named(self, first: int, values: Any, column: str) -> Names:
        import pyarrow

        coded = values.cast(pyarrow.string()).dictionary_encode()
        known = ["" if value is None else plain_name(value) for value in coded.dictionary.to_pylist()]
        places = coded.indices.fill_null(len(known)).to_numpy(zero_copy_only=False)
        names: Names = np.array([*known, ""], dtype=object)[places]
        empty = names == ""
        if empty.any():
            where = self.row_text(first + int(empty.argmax()))
            raise self.wrong(f"{where}, column {column!r}: it is empty; every row needs one")
        return names

    def numbers(self, columns: Sequence[str], how_to_choose: str = "") -> Iterator[tuple[int, NDArray[np.float32]]]:
        """(first row, from 0; the next rows of `columns` as float32 [rows, columns]); CSV and parquet.

        Raises WorkloadError naming the first cell that is no finite number. `how_to_choose`: how the user names the
        columns to use instead.
        """
        import pandas

        first = 0
        for frame in self._frames(columns):
            numbers = np.empty((len(frame), len(columns)), dtype=np.float32)
            for place, name in enumerate(columns):
                read = pandas.to_numeric(frame[name], errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
                with np.errstate(over="ignore"):
                    numbers[:, place] = read
                wrong = ~np.isfinite(numbers[:, place])
                if wrong.any():
                    at = int(wrong.argmax())
                    raise self._no_number(first + at, name, frame[name].iloc[at], how_to_choose)
            yield first, numbers
            first += len(frame)

    def _frames(self, columns: Sequence[str]) -> Iterator[Any]:
        import pandas
        import pyarrow.parquet

        with self._readable():
            if self.kind == PARQUET:
                with pyarrow.parquet.ParquetFile(self.path) as opened_file:
                    for batch in opened_file.iter_batches(PIECE_ROWS, columns=list(columns), use_threads=False):
                        yield batch.to_pandas(use_threads=False, ignore_metadata=True)
                return
            places = {self.header.index(name): name for name in columns}
            with pandas.read_csv(
                self.path,
                sep=self.separator,
                header=None,
                skiprows=1 + self._skipped,
                usecols=sorted(places),
                na_values=list(MISSING),
                keep_default_na=False,
                low_memory=False,
                encoding="utf-8-sig",
                chunksize=PIECE_ROWS,
            ) as pieces:
                for piece in pieces:
                    yield piece.rename(columns=places)

    def _no_number(self, row: int, column: str, value: Any, how_to_choose: str) -> WorkloadError:
        where = f"{self.row_text(row)}, column {column!r}"
        if value is None or value != value:
            return self.wrong(
                f"{where}: the value is missing; fill it in or remove the recording: gaps are not guessed"
            )
        comma = isinstance(value, str) and _NUMBER.fullmatch(value.strip().replace(",", ".", 1)) is not None
        mend = "write it with a decimal point" if comma else "mend it"
        choose = f", or leave the column out by naming those to use: {how_to_choose}" if how_to_choose else ""
        return self.wrong(f"{where}: {str(value)[:40]!r} is not a finite number; {mend}{choose}")

    def row_count(self) -> int | None:
        """Of a parquet file, which says it; None where rows would have to be counted."""
        if self.kind != PARQUET:
            return None
        import pyarrow.parquet

        with self._readable():
            return int(pyarrow.parquet.read_metadata(self.path).num_rows)

    def row_text(self, row: int) -> str:
        """`row`, from 0, as people count."""
        return f"row {row + 1}" if self.kind in (JSONL, PARQUET) else f"row {row + 2 + self._skipped}"

    # --- the file -----------------------------------------------------------------------------------------------------

    def _read_header(self) -> tuple[str, ...]:
        if self.kind == PARQUET:
            import pyarrow.parquet

            with self._readable():
                return tuple(pyarrow.parquet.read_schema(self.path).names)
        if self.kind == JSONL:
            return tuple(next(self._json_objects(), ("", {}))[1])
        self.separator = self._found_separator()
        with self._csv_reader() as reader:
            header = tuple(name.strip() for name in next(reader, []))
        for name in header:
            if why := why_broken(name):
                raise self.wrong(f"row 1, column '{printable(name)}': {why}")
        return header

    def _found_separator(self) -> str:
        with opened(self.path, self.option, newline="") as file:
            head = file.read(_LOOKED_AT_CHARACTERS)
        if declared := _DECLARED.match(head):
            self._skipped = 1
            if declared[1] in SEPARATORS:
                return declared[1]
            head = head[declared.end() :]
        usual = "\t" if self.kind == TSV else ","
        return chosen_separator(head, usual, whole=len(head) < _LOOKED_AT_CHARACTERS)

    @contextmanager
    def _csv_reader(self) -> Iterator[Any]:
        csv.field_size_limit(1 << 30)
        with opened(self.path, self.option, newline="") as file:
            _skip_lines(file, self._skipped)
            reader = csv.reader(file, delimiter=self.separator, strict=True)
            try:
                yield reader
            except csv.Error as error:
                line = reader.line_num + self._skipped
                raise self.wrong(f"line {line} is no valid CSV: {error}; texts with quotes need them doubled") from None

    @contextmanager
    def _readable(self) -> Iterator[None]:
        """What a fast reader cannot read is named by the exact one, or by what the fast one says, as one line."""
        try:
            yield
        except WorkloadError:
            raise
        except OSError as error:
            raise WorkloadError(
                f"{self.option} {printable(self.path)} cannot be read: {error.strerror or error}"
            ) from None
        except UnicodeDecodeError as error:
            self._explain()
            raise self.wrong(f"it is not UTF-8 text ({error.reason}); save it as UTF-8") from None
        except (ValueError, NotImplementedError) as error:  # those of pandas and pyarrow are among them
            self._explain()
            text = printable(" ".join(str(error).split()))[:300]
            what = f"{self.option} {printable(self.path)} cannot be read as {self.kind[1:]}"
            raise WorkloadError(f"{what}: {text}") from None

    def _explain(self) -> None:
        """Raises WorkloadError with row and column where reading row by row finds what is wrong."""
        if self.kind in (CSV, TSV):
            for _ in self.rows():
                pass


def is_index(name: str) -> bool:
    """Whether a column of this name holds the numbers that pandas gave to the rows."""
    return _INDEX.fullmatch(name) is not None


def chosen_separator(head: str, usual: str, *, whole: bool = True) -> str:
    """What parts the fields of the table that begins with `head`: the usual sign if each record has the same number of
    fields by it, more than one; else another one by which they have; else the one that parts the header most often."""
    widths: dict[str, list[int]] = {}
    for sign in (usual, *(other for other in SEPARATORS if other != usual)):
        try:
            records = list(itertools.islice(csv.reader(io.StringIO(head), delimiter=sign), _LOOKED_AT))
        except csv.Error:
            continue
        if not whole and len(records) < _LOOKED_AT:
            records = records[:-1]  # the end of what was looked at may be in the middle of it
        widths[sign] = [len(record) for record in records if record]
        if widths[sign] and widths[sign][0] > 1 and len(set(widths[sign])) == 1:
            return sign
    return max(widths, key=lambda sign: (widths[sign] or [0])[0], default=usual)


def listed(columns: Sequence[str]) -> str:
    shown = ", ".join(columns[:12])
    return f"{shown}, ..." if len(columns) > 12 else shown


def _skip_lines(file: TextIO, count: int) -> None:
    for _ in range(count):
        file.readline()
