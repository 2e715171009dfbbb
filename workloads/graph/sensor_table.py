"""The user's own sensor tables: CSV or parquet, one file or a folder of them, read in pieces.

A row is one time step: a block column (person, recording: what must not be on both sides of the split), a label column,
and numbers. Rows of a block stand together in order of time; where block, label or file changes, a segment ends.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tuner.contract.errors import WorkloadError
from workloads.graph.data import MAX_CHANNELS, Report, Segment, downsample

if TYPE_CHECKING:
    import pandas

Names = np.ndarray[Any, np.dtype[np.object_]]

CSV, PARQUET = ".csv", ".parquet"
ROWS = 200_000
"""Read at a time."""
MISSING = ("", "NA", "N/A", "na", "NaN", "nan", "NULL", "null", "None", "-")
"""How a CSV says that there is no value in a sensor column."""
MEMORY_SHARE = 0.4
LAYOUT = "expected one row a time step with a block column, a label column and at least two sensor columns"


@dataclass(frozen=True)
class Run:
    """Unbroken rows of one file with one block and one label."""

    file: Path
    block: str
    label: str
    first: int
    """Row in the file, counted from 0, the header not counted."""
    rows: int


class SensorTable:
    """`sensor_columns`: names with commas between; empty = all but the block and the label."""

    label_text = "label"

    def __init__(
        self, path: Path, *, block_column: str, label_column: str, sensor_columns: str, downsample_by: int
    ) -> None:
        self._files = _files(path)
        self._path, self._block, self._label, self._by = path, block_column, label_column, downsample_by
        self.channels = self._named_sensors(sensor_columns)
        self._runs: list[Run] | None = None

    def segments(self) -> tuple[Segment, ...]:
        found, first = [], 0
        for run in self._all_runs():
            where = f"{run.file.name} {_rows_text(run)}"
            found.append(Segment(run.block, run.label, first, run.rows // self._by, where))
            first += run.rows // self._by
        return tuple(found)

    def digest(self) -> str:
        """Of names, sizes and change times: each probe asks, so the rows themselves are not read."""
        state = hashlib.sha256()
        for file in self._files:
            about = file.stat()
            state.update(f"{file.name}\0{about.st_size}\0{about.st_mtime_ns}\n".encode())
        return state.hexdigest()

    def need_bytes(self) -> int:
        """A CSV spends at least two bytes on a value; a parquet file says its rows."""
        return sum(self._file_bytes(file) for file in self._files)

    def load(self, report: Report) -> Tensor:
        runs = self._all_runs()
        self._refuse_too_many(sum(run.rows for run in runs))
        total, done, parts = sum(run.rows for run in runs), 0, []
        for file in self._files:
            own = [run for run in runs if run.file == file]
            raw = torch.empty(sum(run.rows for run in own), len(self.channels))
            for first, frame in _frames(file, self.channels):
                raw[first : first + len(frame)] = torch.from_numpy(_numbers(file, first, frame, self.channels))
                done += len(frame)
                report(done, total)
            parts += [downsample(raw[run.first : run.first + run.rows], self._by) for run in own]
        return torch.cat(parts)

    def _all_runs(self) -> list[Run]:
        """The block and label columns, read once in a process."""
        if self._runs is None:
            self._runs = [run for file in self._files for run in self._runs_of(file)]
        return self._runs

    def _runs_of(self, file: Path) -> Iterator[Run]:
        current: Run | None = None
        for first, blocks, labels in _name_pieces(file, self._block, self._label):
            changes = np.flatnonzero((blocks[1:] != blocks[:-1]) | (labels[1:] != labels[:-1])) + 1
            for begin, end in itertools.pairwise([0, *changes.tolist(), len(blocks)]):
                block, label = str(blocks[begin]), str(labels[begin])
                if current is not None and (current.block, current.label) == (block, label):
                    current = replace(current, rows=current.rows + end - begin)
                    continue
                if current is not None:
                    yield current
                current = Run(file, block, label, first + begin, end - begin)
        if current is None:
            raise WorkloadError(f"--data {file}: it holds no rows; {LAYOUT}")
        yield current

    def _named_sensors(self, wanted: str) -> tuple[str, ...]:
        """The sensor columns, in the first file's order; every file must have them all."""
        first = self._files[0]
        given = _columns(first)
        own = tuple(name.strip() for name in wanted.split(",") if name.strip())
        sensors = own or tuple(name for name in given if name not in (self._block, self._label))
        for file in self._files:
            columns = given if file == first else _columns(file)
            self._refuse_missing(file, columns, sensors)
        if not 2 <= len(sensors) <= MAX_CHANNELS:
            raise WorkloadError(
                f"--data {first}: 2 to {MAX_CHANNELS} sensor columns can be used, but it has {len(sensors)};"
                " name those to use: options.sensor_columns, with commas between"
            )
        return sensors

    def _refuse_missing(self, file: Path, columns: Sequence[str], sensors: Sequence[str]) -> None:
        needed = {self._block: "block_column", self._label: "label_column"} | dict.fromkeys(sensors, "sensor_columns")
        for name, option in needed.items():
            if name not in columns:
                raise WorkloadError(
                    f"--data {file}: it has no column {name!r}; its columns are {_listed(columns)}: rename one, or name"
                    f" the right one with options.{option}"
                )

    def _file_bytes(self, file: Path) -> int:
        if file.suffix.lower() == CSV:
            return 2 * file.stat().st_size
        import pyarrow.parquet

        with _readable(file):
            return 4 * len(self.channels) * int(pyarrow.parquet.ParquetFile(file).metadata.num_rows)

    def _refuse_too_many(self, rows: int) -> None:
        need = 2 * 4 * rows * len(self.channels)
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if need > memory * MEMORY_SHARE:
            raise WorkloadError(
                f"--data {self._path}: {rows} rows of {len(self.channels)} sensors take {need / 2**30:.1f} GiB of"
                f" memory; this machine has {memory / 2**30:.1f} GiB; give fewer rows or columns"
            )


def _files(path: Path) -> tuple[Path, ...]:
    if not path.exists():
        raise WorkloadError(f"--data {path} does not exist; expected a CSV or parquet file, or a folder of them")
    try:
        inside = sorted(path.iterdir()) if path.is_dir() else [path]
    except OSError as error:
        raise WorkloadError(f"--data {path} cannot be read: {error.strerror}") from None
    found = tuple(file for file in inside if file.suffix.lower() in (CSV, PARQUET) and file.is_file())
    if not found:
        what = "holds no" if path.is_dir() else "is no"
        raise WorkloadError(f"--data {path} {what} {CSV} or {PARQUET} file; {LAYOUT}")
    return found


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    """What a reader says about a file it cannot read, as one line."""
    try:
        yield
    except OSError as error:
        raise WorkloadError(f"--data {file} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise WorkloadError(f"--data {file} is not UTF-8 text ({error.reason}); save it as UTF-8") from None
    except (ValueError, NotImplementedError, csv.Error) as error:  # those of pandas and pyarrow are among them
        text = " ".join(str(error).split())
        raise WorkloadError(f"--data {file} cannot be read as {file.suffix[1:]}: {text}") from None


def _columns(file: Path) -> tuple[str, ...]:
    with _readable(file):
        if file.suffix.lower() == PARQUET:
            import pyarrow.parquet

            return tuple(pyarrow.parquet.read_schema(file).names)
        with file.open(encoding="utf-8-sig", newline="") as text:
            head = tuple(next(csv.reader(text), ()))
    if not head:
        raise WorkloadError(f"--data {file}: it is empty; {LAYOUT}")
    twice = sorted({name for name in head if head.count(name) > 1})
    if twice:
        raise WorkloadError(f"--data {file}: row 1: the column name {twice[0]!r} occurs twice; rename one")
    return head


def _name_pieces(file: Path, block: str, label: str) -> Iterator[tuple[int, Names, Names]]:
    """(number of the first row, blocks, labels) of the next rows, read strictly: a row with more or fewer values than
    columns is refused, where a decimal comma would otherwise become two numbers."""
    first = 0
    with _readable(file):
        for batch in _name_batches(file, [block, label]):
            if batch.num_rows:
                blocks, labels = (_names(file, first, batch.column(name), name) for name in (block, label))
                yield first, blocks, labels
                first += batch.num_rows


def _name_batches(file: Path, columns: list[str]) -> Iterator[Any]:
    import pyarrow
    import pyarrow.csv
    import pyarrow.parquet

    if file.suffix.lower() == PARQUET:
        with pyarrow.parquet.ParquetFile(file) as opened:
            yield from opened.iter_batches(ROWS, columns=columns, use_threads=False)
        return
    texts = pyarrow.csv.ConvertOptions(include_columns=columns, column_types=dict.fromkeys(columns, pyarrow.string()))
    reading = pyarrow.csv.ReadOptions(use_threads=False)
    parsing = pyarrow.csv.ParseOptions(ignore_empty_lines=False)
    with pyarrow.csv.open_csv(file, read_options=reading, parse_options=parsing, convert_options=texts) as opened:
        yield from opened


def _names(file: Path, first: int, values: Any, column: str) -> Names:
    import pyarrow
    import pyarrow.compute

    trimmed = pyarrow.compute.utf8_trim_whitespace(values.cast(pyarrow.string()))
    names: Names = pyarrow.compute.fill_null(trimmed, "").to_numpy(zero_copy_only=False)
    empty = names == ""
    if empty.any():
        where = _row_text(file, first + int(empty.argmax()))
        raise WorkloadError(f"--data {file}: {where}, column {column!r}: it is empty; every row needs one")
    return names


def _frames(file: Path, sensors: Sequence[str]) -> Iterator[tuple[int, pandas.DataFrame]]:
    """(number of the first row, the next rows of the sensor columns)."""
    first = 0
    with _readable(file):
        for frame in _parquet(file, sensors) if file.suffix.lower() == PARQUET else _csv(file, sensors):
            yield first, frame
            first += len(frame)


def _parquet(file: Path, sensors: Sequence[str]) -> Iterator[pandas.DataFrame]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file) as opened:
        for batch in opened.iter_batches(ROWS, columns=list(sensors), use_threads=False):
            yield batch.to_pandas(use_threads=False)


def _csv(file: Path, sensors: Sequence[str]) -> Iterator[pandas.DataFrame]:
    import pandas

    missing: Any = {name: list(MISSING) for name in sensors}
    with pandas.read_csv(
        file,
        usecols=list(sensors),
        na_values=missing,
        keep_default_na=False,
        skip_blank_lines=False,
        low_memory=False,
        encoding="utf-8-sig",
        chunksize=ROWS,
    ) as pieces:
        yield from pieces


def _numbers(file: Path, first: int, frame: pandas.DataFrame, sensors: Sequence[str]) -> np.ndarray[Any, Any]:
    """float32 [rows, sensors]. Raises WorkloadError naming the first cell that is no finite number."""
    import pandas

    numbers = np.empty((len(frame), len(sensors)), dtype=np.float32)
    for place, name in enumerate(sensors):
        read = pandas.to_numeric(frame[name], errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
        with np.errstate(over="ignore"):
            numbers[:, place] = read
        wrong = ~np.isfinite(numbers[:, place])
        if wrong.any():
            at = int(wrong.argmax())
            raise WorkloadError(_bad_cell(file, first + at, name, frame[name].iloc[at]))
    return numbers


def _bad_cell(file: Path, row: int, column: str, value: Any) -> str:
    where = f"--data {file}: {_row_text(file, row)}, column {column!r}"
    if value is None or value != value:
        return f"{where}: the value is missing; fill it in or remove the recording: gaps are not guessed"
    return (
        f"{where}: {str(value)[:40]!r} is not a finite number; mend it, or leave the column out by naming those to use:"
        " options.sensor_columns"
    )


def _row_text(file: Path, row: int) -> str:
    """As the user counts: a CSV's header is row 1."""
    return f"row {row + 2}" if file.suffix.lower() == CSV else f"row {row + 1}"


def _rows_text(run: Run) -> str:
    last = _row_text(run.file, run.first + run.rows - 1).removeprefix("row ")
    return f"{_row_text(run.file, run.first).replace('row', 'rows')} to {last}"


def _listed(columns: Sequence[str]) -> str:
    shown = ", ".join(columns[:12])
    return f"{shown}, ..." if len(columns) > 12 else shown
