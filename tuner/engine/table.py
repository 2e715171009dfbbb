"""CSV tables of a production run, a row per moment, the first column `samples`: metrics, evaluations, assessments.

Columns may come later; a resumed run drops the rows it will write again.
"""

from __future__ import annotations

import contextlib
import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tuner.contract.own_files import replace_text
from tuner.contract.probe import NoticeEvent
from tuner.engine.hooks import Emit

SAMPLES = "samples"
Row = Mapping[str, str]


class Table:
    """One file. What cannot be written is told once and never ends the run."""

    def __init__(self, path: Path, emit: Emit) -> None:
        self.path = path
        self._emit = emit
        self._broken = False
        self._columns: list[str] | None = None
        """Those of the file; None = not read yet."""

    def rows(self) -> list[dict[str, str]]:
        """Every whole row; what a killed writer left of its last one is passed over."""
        try:
            text = self.path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return []
        head, *lines = text[: text.rfind("\n") + 1].split("\n")[:-1] or [""]
        columns = _cells(head)
        rows = [cells for line in lines if len(cells := _cells(line)) == len(columns)]
        named = [dict(zip(columns, cells, strict=True)) for cells in rows]
        return [row for row in named if row.get(SAMPLES, "").isdecimal() and all(map(_is_number, row.values()))]

    def forget_after(self, samples: int) -> None:
        """Keep the rows up to `samples` alone."""
        if self.path.exists():
            self._guarded(lambda: self._rewrite([row for row in self.rows() if int(row[SAMPLES]) <= samples]))

    def add(self, samples: int, numbers: Mapping[str, float]) -> None:
        row = {SAMPLES: str(samples)} | {name: f"{value:.9g}" for name, value in numbers.items()}
        self._guarded(lambda: self._add(row))

    def _add(self, row: Row) -> None:
        if self._columns is None:
            self._columns = _columns(self.rows())
        if not self._columns or not row.keys() <= set(self._columns):
            self._rewrite([*self.rows(), row])
            return
        with self.path.open("a", encoding="utf-8") as target:
            target.write(_as_csv([row], self._columns, header=False))

    def _rewrite(self, rows: Sequence[Row]) -> None:
        columns = _columns(rows)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(self.path, _as_csv(rows, columns, header=True) if rows else "", durable=True)
        self._columns = columns

    def _guarded(self, write: Callable[[], None]) -> None:
        """A full disk must not end the run: the log is told once that its file has stopped."""
        try:
            write()
        except OSError as error:
            self._columns = []  # a part of the line may have been written: the next one makes the file anew
            if not self._broken:
                self._emit(NoticeEvent(level="warning", text=f"{self.path} cannot be written: {error.strerror}"))
            self._broken = True


def _cells(line: str) -> list[str]:
    """The cells of one line; none where it is damaged beyond reading."""
    with contextlib.suppress(csv.Error):
        return next(csv.reader([line]), [])
    return []


def _is_number(cell: str) -> bool:
    """An empty cell is one too: the column came later, or the figure was not taken."""
    with contextlib.suppress(ValueError):
        float(cell or "nan")
        return True
    return False


def _columns(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _as_csv(rows: Sequence[Row], columns: Sequence[str], *, header: bool) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=columns, restval="", lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def number(text: str | None) -> float:
    """A cell as a number; NaN for an empty or broken one."""
    with contextlib.suppress(ValueError):
        return float(text or "nan")
    return math.nan
