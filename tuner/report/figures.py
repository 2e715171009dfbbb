"""The pictures of a study, as plotly figures. Text from users is escaped: plotly reads labels as markup."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from tuner.contract.measurement import Interval, Outcome
from tuner.contract.probe import ProbeKind, ProbeRow, Stage
from tuner.contract.study import StudySpec
from tuner.contract.tuned import Decision
from tuner.report.frame import MIB, counted_limit_bytes, rate, same_config

COLOURS = ("#0b6e99", "#d1495b", "#2e933c", "#8d5fd3", "#c77700", "#4d5d6c", "#00897b", "#ad1457")
_GREY = "#8a939c"
_MAX_CURVES = 24
_MAX_POINTS = 240


def titled_figure(title: str, x: str, y: str) -> go.Figure:
    """An empty figure in the style of all pages."""
    figure = go.Figure()
    figure.update_layout(
        title={"text": title, "font": {"size": 15}, "x": 0, "xref": "paper"},
        template="plotly_white",
        font={"family": "system-ui, sans-serif", "color": "#1d2329", "size": 13},
        margin={"l": 60, "r": 16, "t": 48, "b": 48},
        showlegend=True,
        legend={"orientation": "h", "yanchor": "top", "y": -0.2, "x": 0},
        hovermode="closest",
        height=420,
    )
    figure.update_xaxes(title_text=x)
    figure.update_yaxes(title_text=y)
    return figure


def throughput_figure(data: pd.DataFrame) -> go.Figure | None:
    """Samples/s over the micro-batch size by variant, with 95 % intervals; failures as crosses on the axis."""
    shown = data[data["kind"].isin([ProbeKind.COMPUTE.value, ProbeKind.END_TO_END.value])]
    if shown.empty:
        return None
    figure = titled_figure("Throughput over micro-batch size", "micro-batch size", "samples/s at steady state")
    for colour, (name, kind, part) in zip(_colours(), _by_variant(shown), strict=False):
        compute = kind == ProbeKind.COMPUTE.value
        figure.add_scatter(
            x=list(part["micro_batch"]),
            y=list(part["samples_per_s"]),
            error_y=_error_bars(part),
            mode="lines+markers" if compute else "markers",
            name=f"{name} ({'compute only' if compute else 'end to end'})",
            marker={"color": colour, "size": 8, "symbol": "circle-open" if compute else "diamond"},
            line={"dash": "dot", "width": 1},
            text=[f"#{row.number} {row.stage}: {html.escape(str(row.label))}" for row in part.itertuples()],
            hovertemplate="%{text}<br>%{y:.1f} samples/s<extra></extra>",
        )
    _add_failures(figure, shown)
    _batch_axis(figure, shown)
    figure.update_yaxes(rangemode="tozero")
    return figure


def _add_failures(figure: go.Figure, data: pd.DataFrame) -> None:
    bad = data[data["outcome"] != Outcome.OK.value]
    if bad.empty:
        return
    figure.add_scatter(
        x=list(bad["micro_batch"]),
        y=[0.0] * len(bad),
        mode="markers",
        name="failed",
        marker={"color": "#b00020", "size": 10, "symbol": "x"},
        text=[html.escape(f"#{row.number} {row.outcome}: {row.message}"[:200]) for row in bad.itertuples()],
        hovertemplate="%{text}<extra></extra>",
    )


def memory_figure(data: pd.DataFrame, spec: StudySpec) -> go.Figure | None:
    """Peak memory as the gate counts it, over the micro-batch size, with the budget as a line."""
    shown = data[data["peak_mib"].notna() & data["kind"].isin([ProbeKind.COMPUTE.value, ProbeKind.END_TO_END.value])]
    if shown.empty:
        return None
    figure = titled_figure("Peak memory over micro-batch size", "micro-batch size", "peak MiB")
    for colour, (name, kind, part) in zip(_colours(), _by_variant(shown), strict=False):
        figure.add_scatter(
            x=list(part["micro_batch"]),
            y=list(part["peak_mib"]),
            mode="markers",
            name=f"{name} ({'compute only' if kind == ProbeKind.COMPUTE.value else 'end to end'})",
            marker={"color": colour, "size": 8},
            hovertemplate="%{x}: %{y:,.0f} MiB<extra>%{fullData.name}</extra>",
        )
    limit = counted_limit_bytes(spec) / MIB
    figure.add_hline(y=limit, line={"color": "#b00020", "dash": "dash"}, annotation_text=f"budget {limit:,.0f} MiB")
    _batch_axis(figure, shown)
    figure.update_yaxes(rangemode="tozero")
    return figure


def loss_figure(rows: Sequence[ProbeRow], spec: StudySpec, decision: Decision | None) -> go.Figure | None:
    """Total loss over samples: the lr stage's values, the baseline and the winner."""
    figure = titled_figure("Loss over samples", "samples", "total loss")
    count = 0
    for name, row in _curves(rows, spec, decision):
        measurement = row.measurement
        if measurement is None or count >= _MAX_CURVES:
            continue
        total = measurement.losses.get("total", ())
        stride = max(1, math.ceil(len(total) / _MAX_POINTS))
        steps = range(0, len(total), stride)
        figure.add_scatter(
            x=[(step + 1) * measurement.samples_per_step for step in steps],
            y=[total[step] if math.isfinite(total[step]) else None for step in steps],
            mode="lines",
            name=name,
            line={"width": 1.5, "color": COLOURS[count % len(COLOURS)]},
        )
        count += len(total) > 0
    return figure if count else None


def _curves(rows: Sequence[ProbeRow], spec: StudySpec, decision: Decision | None) -> Iterable[tuple[str, ProbeRow]]:
    for row in rows:
        if row.stage is Stage.LR:
            yield f"#{row.number} lr {row.config.optimizer.lr:g}", row
    winner = decision.winner.config if decision and decision.winner else None
    ended = [row for row in rows if row.kind is ProbeKind.END_TO_END and row.measurement]
    for name, config in (("baseline", spec.baseline), ("winner", winner)):
        match = next((row for row in reversed(ended) if config and same_config(row.config, config)), None)
        if match is not None:
            yield f"#{match.number} {name}", match


def gate_figure(rows: Sequence[ProbeRow], spec: StudySpec, decision: Decision | None) -> go.Figure | None:
    """Ship gate: each finalist over the baseline of the same round, and the gain that came out."""
    pairs = list(gate_ratios(rows, spec))
    if not pairs:
        return None
    figure = titled_figure("Ship gate: candidate over baseline, pair by pair", "pair", "throughput ratio")
    labels = sorted({label for label, _, _ in pairs})
    for colour, label in zip(_colours(), labels, strict=False):
        mine = [(pair, ratio) for name, pair, ratio in pairs if name == label]
        figure.add_scatter(
            x=[pair for pair, _ in mine],
            y=[ratio for _, ratio in mine],
            mode="markers",
            name=html.escape(label),
            marker={"color": colour, "size": 10},
        )
    figure.add_hline(y=1.0, line={"color": _GREY, "dash": "dash"}, annotation_text="equal")
    ratio = (decision.speedup or decision.gain) if decision else None
    if ratio and _finite(ratio):
        figure.add_hrect(y0=ratio.low, y1=ratio.high, fillcolor=COLOURS[2], opacity=0.15, line_width=0)
    figure.update_xaxes(dtick=1)
    return figure


def gate_ratios(rows: Sequence[ProbeRow], spec: StudySpec) -> Iterable[tuple[str, int, float]]:
    """(label, pair, candidate / baseline) of every complete round of the ship gate."""
    rounds: dict[int, list[tuple[ProbeRow, Interval]]] = {}
    for row in rows:
        speed = rate(row.measurement)
        if row.stage is Stage.GATE and row.pair is not None and row.outcome is Outcome.OK and speed:
            rounds.setdefault(row.pair, []).append((row, speed))
    for pair, members in sorted(rounds.items()):
        base = [speed.value for row, speed in members if same_config(row.config, spec.baseline)]
        for row, speed in members:
            if base and not same_config(row.config, spec.baseline):
                yield spec.label(row.config), pair, speed.value / (sum(base) / len(base))


def seconds_figure(data: pd.DataFrame) -> go.Figure | None:
    """Where the time went: probe seconds by stage, the fixed cost of starting processes apart."""
    if data.empty:
        return None
    sums = data.groupby("stage", sort=False)[["seconds", "fixed_s"]].sum()
    stages = [str(stage) for stage in sums.index]
    fixed = [float(value) for value in sums["fixed_s"]]
    rest = [max(0.0, float(total) - own) for total, own in zip(sums["seconds"], fixed, strict=True)]
    figure = titled_figure("Seconds by stage", "", "seconds")
    figure.add_bar(x=stages, y=rest, name="build, warm-up, measuring", marker={"color": COLOURS[0]})
    figure.add_bar(x=stages, y=fixed, name="starting and ending processes", marker={"color": COLOURS[4]})
    figure.update_layout(barmode="stack")
    return figure


def _by_variant(data: pd.DataFrame) -> Iterable[tuple[str, str, pd.DataFrame]]:
    for name in sorted(set(data["variant"])):
        for kind in (ProbeKind.COMPUTE.value, ProbeKind.END_TO_END.value):
            part = data[(data["variant"] == name) & (data["kind"] == kind) & (data["outcome"] == Outcome.OK.value)]
            if not part.empty:
                yield str(name), kind, part.sort_values("micro_batch")


def _colours() -> Iterable[str]:
    while True:
        yield from COLOURS


def _error_bars(part: pd.DataFrame) -> dict[str, Any]:
    up = [_reach(high, value) for high, value in zip(part["high"], part["samples_per_s"], strict=True)]
    down = [_reach(value, low) for low, value in zip(part["low"], part["samples_per_s"], strict=True)]
    return {"type": "data", "symmetric": False, "array": up, "arrayminus": down, "thickness": 1, "width": 3}


def _reach(high: float, low: float) -> float:
    return high - low if math.isfinite(high - low) else 0.0


def _batch_axis(figure: go.Figure, data: pd.DataFrame) -> None:
    sizes = sorted({int(size) for size in data["micro_batch"]})
    figure.update_xaxes(type="log", tickvals=sizes, ticktext=[str(size) for size in sizes], minor={"showgrid": False})


def _finite(interval: Interval) -> bool:
    return math.isfinite(interval.low) and math.isfinite(interval.high)
