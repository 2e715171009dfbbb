"""metrics.csv and curves.png of a production run."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tuner.contract.probe import NoticeEvent, TrainEvent
from tuner.engine.hooks import Emit
from tuner.engine.step import TOTAL


class Table:
    """metrics.csv: one row per log line. A resumed run drops the rows it will write again."""

    def __init__(self, path: Path, emit: Emit) -> None:
        self.path = path
        self._emit = emit
        self._broken = False

    def rows(self) -> list[dict[str, str]]:
        try:
            with self.path.open(newline="", encoding="utf-8") as source:
                return [row for row in csv.DictReader(source) if (row.get("samples") or "").isdigit()]
        except OSError:
            return []

    def forget_after(self, samples: int) -> None:
        rows = self.rows()
        kept = [row for row in rows if int(row["samples"]) <= samples and None not in row.values()]
        if len(kept) == len(rows):
            return
        self._guarded(lambda: _rewrite(self.path, kept))

    def add(self, line: TrainEvent) -> None:
        numbers = {"elapsed_s": line.elapsed_s, "samples_per_s": line.samples_per_s, "lr": line.lr}
        numbers |= {"data_wait": line.data_wait, **line.losses}
        row = {"samples": str(line.samples), "step": str(line.step)}
        row |= {name: f"{value:.9g}" for name, value in numbers.items()}
        self._guarded(lambda: self._append(row))

    def _append(self, row: Mapping[str, str]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = not self.path.exists() or self.path.stat().st_size == 0
        with self.path.open("a", encoding="utf-8") as target:
            target.write(_as_csv([row], header=fresh))

    def _guarded(self, write: Callable[[], None]) -> None:
        """A full disk must not end the run: the log is told once that its file has stopped."""
        try:
            write()
        except OSError as error:
            if not self._broken:
                self._emit(NoticeEvent(level="warning", text=f"{self.path} cannot be written: {error.strerror}"))
            self._broken = True


def _rewrite(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    aside = path.with_suffix(".csv.part")
    aside.write_text(_as_csv(rows, header=True) if rows else "", encoding="utf-8")
    os.replace(aside, path)


def _as_csv(rows: Sequence[Mapping[str, str]], *, header: bool) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(rows[0]), lineterminator="\n", extrasaction="ignore")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def draw_curves(rows: Sequence[Mapping[str, str]], path: Path) -> None:
    """Every loss term and the throughput over samples, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True)
    plain = {"samples", "step", "elapsed_s", "samples_per_s", "lr", "data_wait"}
    samples = [int(row["samples"]) for row in rows]
    for name in [name for name in (rows[0] if rows else {}) if name not in plain]:
        above.plot(samples, [_number(row[name]) for row in rows], label=name, linewidth=2.0 if name == TOTAL else 1.0)
    below.plot(samples, [_number(row["samples_per_s"]) for row in rows])
    above.set_ylabel("loss")
    if rows:
        above.legend(loc="upper right")
    below.set_ylabel("samples / s")
    below.set_xlabel("samples")
    for axes in (above, below):
        axes.grid(visible=True, alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.part")
    figure.savefig(aside, format="png", dpi=110)
    os.replace(aside, path)


def _number(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan
