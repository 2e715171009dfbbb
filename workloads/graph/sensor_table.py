"""The user's own sensor tables: CSV or parquet, one file or a folder of them, read in pieces.

A row is one time step: a block column (person, recording: what must not be on both sides of the split), a label column,
and numbers. Rows of a block stand together in order of time; where block, label or file changes, a segment ends.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tuner.contract.base import printable
from tuner.contract.errors import WorkloadError
from tuner.readers.listing import Listing, content_digest, listed, passed_over
from tuner.readers.table_file import CSV, PARQUET, TSV, TableFile

from .data import MAX_CHANNELS, Report, Segment, downsample

SUFFIXES = (CSV, TSV, PARQUET)
MEMORY_SHARE = 0.4
LAYOUT = "expected one row a time step with a block column, a label column and at least two sensor columns"


@dataclass(frozen=True)
class Run:
    """Unbroken rows of one file with one block and one label."""

    file: TableFile
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
        self._listing = _listing(path)
        self._files = tuple(TableFile(file) for file in self._listing.files)
        self._path, self._block, self._label, self._by = path, block_column, label_column, downsample_by
        self.channels = self._named_sensors(sensor_columns)
        self._runs: list[Run] | None = None

    @property
    def remarks(self) -> tuple[str, ...]:
        """What the user should know of how the files were understood."""
        left = passed_over(self._listing.others, SUFFIXES)
        return (*([left] if left else []), *(remark for file in self._files for remark in file.remarks))

    def segments(self) -> tuple[Segment, ...]:
        found, first = [], 0
        for run in self._all_runs():
            where = f"{run.file.name} {_rows_text(run)}"
            found.append(Segment(run.block, run.label, first, run.rows // self._by, where))
            first += run.rows // self._by
        return tuple(found)

    def digest(self) -> str:
        return content_digest(self._files[0].path.parent, [file.path for file in self._files])

    def need_bytes(self) -> int:
        """A CSV spends at least two bytes on a value; a parquet file says its rows."""
        return sum(self._file_bytes(file) for file in self._files)

    def load(self, report: Report) -> Tensor:
        runs = self._all_runs()
        self._refuse_too_many(sum(run.rows for run in runs))
        total, done, parts = sum(run.rows for run in runs), 0, []
        for file in self._files:
            own = [run for run in runs if run.file is file]
            raw = torch.empty(sum(run.rows for run in own), len(self.channels))
            for first, numbers in file.numbers(self.channels, "options.sensor_columns"):
                raw[first : first + len(numbers)] = torch.from_numpy(numbers)
                done += len(numbers)
                report(done, total)
            parts += [downsample(raw[run.first : run.first + run.rows], self._by) for run in own]
        return torch.cat(parts)

    def _all_runs(self) -> list[Run]:
        """The block and label columns, read once in a process."""
        if self._runs is None:
            self._runs = [run for file in self._files for run in self._runs_of(file)]
        return self._runs

    def _runs_of(self, file: TableFile) -> Iterator[Run]:
        current: Run | None = None
        for first, (blocks, labels) in file.names((self._block, self._label)):
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
            raise file.wrong(f"it holds no rows; {LAYOUT}")
        yield current

    def _named_sensors(self, wanted: str) -> tuple[str, ...]:
        """The sensor columns, in the first file's order; every file must have them all."""
        first = self._files[0]
        own = tuple(name.strip() for name in wanted.split(",") if name.strip())
        sensors = own or tuple(name for name in first.columns if name not in (self._block, self._label))
        needed = {self._block: "block_column", self._label: "label_column"} | dict.fromkeys(sensors, "sensor_columns")
        for file in self._files:
            if not file.header:
                raise file.wrong(f"it is empty; {LAYOUT}")
            file.need({name: f"rename one, or name the right one with options.{how}" for name, how in needed.items()})
        if not 2 <= len(sensors) <= MAX_CHANNELS:
            raise first.wrong(
                f"2 to {MAX_CHANNELS} sensor columns can be used, but it has {len(sensors)};"
                " name those to use: options.sensor_columns, with commas between"
            )
        return sensors

    def _file_bytes(self, file: TableFile) -> int:
        rows = file.row_count()
        return 2 * file.path.stat().st_size if rows is None else 4 * len(self.channels) * rows

    def _refuse_too_many(self, rows: int) -> None:
        need = 2 * 4 * rows * len(self.channels)
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if need > memory * MEMORY_SHARE:
            raise WorkloadError(
                f"--data {self._path}: {rows} rows of {len(self.channels)} sensors take {need / 2**30:.1f} GiB of"
                f" memory; this machine has {memory / 2**30:.1f} GiB; give fewer rows or columns"
            )


def _listing(path: Path) -> Listing:
    if not path.exists():
        raise WorkloadError(
            f"--data {printable(path)} does not exist; expected a CSV or parquet file, or a folder of them"
        )
    found = listed(path, SUFFIXES) if path.is_dir() else Listing((path,) if path.suffix.lower() in SUFFIXES else ())
    if not found.files:
        what = "holds no" if path.is_dir() else "is no"
        raise WorkloadError(f"--data {printable(path)} {what} {CSV} or {PARQUET} file; {LAYOUT}")
    return found


def _rows_text(run: Run) -> str:
    last = run.file.row_text(run.first + run.rows - 1).removeprefix("row ")
    return f"{run.file.row_text(run.first).replace('row', 'rows')} to {last}"
