"""The pictures of a production run: its curves as small multiples, and its figures beside what no learning gives."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tuner.contract.own_files import replacing
from tuner.contract.workload import Trivial
from tuner.engine.scores import RAW
from tuner.engine.step import TOTAL
from tuner.engine.table import SAMPLES, Row, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 3
WIDE = 20.0
"""Positive values whose largest is this many times the smallest are drawn on a logarithmic axis."""
_SPEED = ("samples_per_s", "lr", "data_wait")
_NO_CURVE = {SAMPLES, "step", "elapsed_s", *_SPEED}


@dataclass(frozen=True)
class Panel:
    """One small picture: its lines (name -> points), and what the value would be without learning."""

    title: str
    lines: Mapping[str, tuple[Sequence[int], Sequence[float]]]
    trivial: Trivial | None = None
    marked: bool = field(default=False)
    """Few points, each shown by a dot."""


def draw_curves(
    log: Sequence[Row], scores: Sequence[Sequence[Row]], path: Path, trivial: Mapping[str, Trivial] | None = None
) -> None:
    """curves.png: a panel for every loss term (the total first), for every validation metric (the averaged weights
    and the raw ones together), and for the run's speed, all over samples.

    `log`: rows of metrics.csv; `scores`: rows of evaluations.csv and of assessments.csv. Raises OSError.
    """
    panels = [*_loss_panels(log), *_score_panels(scores, trivial or {}), *_speed_panels(log)]
    figure = new_figure(4.2 * COLUMNS, 2.6 * max(1, math.ceil(len(panels) / COLUMNS)))
    for axes, panel in zip(_panels(figure, len(panels)), panels, strict=True):
        _draw(axes, panel)
    save(figure, path)


def _loss_panels(log: Sequence[Row]) -> list[Panel]:
    names = [name for name in _names([log]) if name not in _NO_CURVE]
    names.sort(key=lambda name: name != TOTAL)
    return [Panel(f"training loss: {name}", {name: points(log, name)}) for name in names]


def _score_panels(scores: Sequence[Sequence[Row]], trivial: Mapping[str, Trivial]) -> list[Panel]:
    panels = []
    for rows in scores:
        names = [name for name in _names([rows]) if name != SAMPLES]
        for name in names:
            if name.startswith(RAW) and name.removeprefix(RAW) in names:
                continue
            lines = {"averaged" if RAW + name in names else name: points(rows, name)}
            if RAW + name in names:
                lines["raw weights"] = points(rows, RAW + name)
            panels.append(Panel(f"validation: {name}", lines, trivial.get(name), marked=True))
    return panels


def _speed_panels(log: Sequence[Row]) -> list[Panel]:
    titles = {"samples_per_s": "samples / s", "lr": "learning rate", "data_wait": "data wait (share of the time)"}
    return [Panel(titles[name], {name: points(log, name)}) for name in _SPEED if name in _names([log])]


def _names(tables: Sequence[Sequence[Row]]) -> list[str]:
    return list(dict.fromkeys(name for rows in tables for name in (rows[0] if rows else ())))


def points(rows: Sequence[Row], name: str) -> tuple[list[int], list[float]]:
    """Samples and finite values of one column."""
    pairs = [(int(row[SAMPLES]), number(row.get(name))) for row in rows]
    finite = [(samples, value) for samples, value in pairs if math.isfinite(value)]
    return [samples for samples, _ in finite], [value for _, value in finite]


def _draw(axes: Axes, panel: Panel) -> None:
    values = [value for _, line in panel.lines.values() for value in line]
    for label, (samples, line) in panel.lines.items():
        axes.plot(samples, line, linewidth=1.2, marker="o" if panel.marked else "", markersize=3, label=label)
    if panel.trivial is not None and math.isfinite(panel.trivial.value):
        axes.axhline(panel.trivial.value, color="0.45", linestyle="--", linewidth=1.0, label="without learning")
        values.append(panel.trivial.value)
    if is_wide(values):
        axes.set_yscale("log")
        axes.minorticks_off()
    else:
        axes.locator_params(axis="y", nbins=5)
    axes.locator_params(axis="x", nbins=5)
    _label(axes, panel.title)
    axes.set_xlabel("samples", fontsize=8)
    axes.grid(visible=True, alpha=0.3)
    if len(axes.lines) > 1:
        axes.legend(fontsize=7)


def _label(axes: Axes, title: str) -> None:
    """A title at a place of its own: letting the library look for one costs as much as the rest of the drawing."""
    axes.set_title(title, fontsize=9, y=1.0)
    axes.tick_params(labelsize=7)


def is_wide(values: Sequence[float]) -> bool:
    """Is a logarithmic axis needed to read them, and possible?"""
    return bool(values) and min(values) > 0 and max(values) > WIDE * min(values)


def draw_quality(metrics: Mapping[str, float], trivial: Mapping[str, Trivial], path: Path) -> None:
    """quality.png: a panel for each figure that has a trivial value, both as bars. Raises OSError."""
    shown = [name for name in metrics if name in trivial] or list(metrics)
    figure = new_figure(4.2 * COLUMNS, 1.7 * max(1, math.ceil(len(shown) / COLUMNS)))
    for axes, name in zip(_panels(figure, len(shown)), shown, strict=True):
        _bars(axes, name, metrics[name], trivial.get(name))
    save(figure, path)


def _bars(axes: Axes, name: str, value: float, trivial: Trivial | None) -> None:
    bars = [("this model", value)] + ([(trivial.text, trivial.value)] if trivial is not None else [])
    heights = [height if math.isfinite(height) else 0.0 for _, height in bars]
    axes.barh(
        [-place for place in range(len(bars))], heights, color=["lightsteelblue", "0.85"][: len(bars)], height=0.7
    )
    for place, (label, height) in enumerate(bars):
        text = f"{label}: {height:.4g}"
        axes.text(0.02, -place, text, transform=axes.get_yaxis_transform(), va="center", fontsize=8)
    axes.set_yticks([])
    better = "" if trivial is None else (" (higher is better)" if trivial.higher_is_better else " (lower is better)")
    _label(axes, name + better)


def new_figure(width: float, height: float) -> Figure:
    """A figure in inches that knows no window system. A layout that is searched for would take longer than drawing."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


def _panels(figure: Figure, count: int) -> list[Axes]:
    """`count` small pictures in rows of three, in the order of reading; what is left of the last row stays empty."""
    rows = max(1, math.ceil(count / COLUMNS))
    grid = figure.subplots(rows, COLUMNS, squeeze=False).flatten().tolist()
    width, height = figure.get_size_inches()
    figure.subplots_adjust(
        left=0.6 / width,
        right=1 - 0.2 / width,
        bottom=0.5 / height,
        top=1 - 0.35 / height,
        wspace=0.22,
        hspace=0.9 / (height / rows - 0.9) if rows > 1 else 0.0,
    )
    for axes in grid[count:]:
        axes.set_axis_off()
    return list(grid[:count])


def save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as aside:
        figure.savefig(aside, format="png", dpi=100)
