"""The pictures of an explanation for pages (plotly): step time against cuts, memory, the loader."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import plotly.graph_objects as go

from tuner.contract.explanation import ExplainResult, MemoryCell, StepFitResult, StepPoint
from tuner.report.figures import COLOURS, titled_figure
from tuner.report.frame import MIB

_RED, _GREY = "#b00020", "#8a939c"


def explain_figures(result: ExplainResult) -> dict[str, go.Figure | None]:
    """By name; None where nothing was measured that could be shown."""
    return {
        "explain-steps": steps_figure(result),
        "explain-memory": memory_figure(result),
        "explain-loader": loader_figure(result),
    }


def lines_of(result: ExplainResult) -> Iterator[tuple[StepFitResult, int, tuple[int, int], tuple[float, float]]]:
    """(fit, samples per step, accumulation at both ends, seconds there) of every line to draw.

    At equal samples the fitted step time is a straight line in the number of micro-batches: its slope is alpha.
    """
    most = max((point.accumulation_steps for point in result.steps), default=1)
    for fit in result.fits:
        mine = [point for point in result.steps if point.variant == fit.variant and not point.end_to_end]
        for samples in sorted({point.micro_batch_size * point.accumulation_steps for point in mine}):
            start = fit.beta_s.value * samples + fit.omega_s.value
            yield fit, samples, (0, most), (start, start + most * fit.alpha_s.value)


def variants_of(result: ExplainResult) -> list[str]:
    """Names in the order first measured; their place decides their colour."""
    return list(dict.fromkeys([*(p.variant for p in result.steps), *(cell.variant for cell in result.memory)]))


def colour_of(result: ExplainResult, variant: str) -> str:
    return COLOURS[variants_of(result).index(variant) % len(COLOURS)]


def steps_figure(result: ExplainResult) -> go.Figure | None:
    if not result.steps:
        return None
    figure = titled_figure("Step time against micro-batches per step", "micro-batches per step (accumulation)", "ms")
    for fit, samples, ends, seconds in lines_of(result):
        figure.add_scatter(
            x=list(ends),
            y=[1000 * value for value in seconds],
            mode="lines",
            name=f"fit: {fit.variant}, {samples} samples",
            line={"color": colour_of(result, fit.variant), "width": 1.5},
        )
    for variant in variants_of(result):
        for end_to_end in (False, True):
            _add_steps(figure, result, variant, end_to_end)
    figure.update_yaxes(rangemode="tozero")
    figure.update_xaxes(rangemode="tozero", dtick=1 if _most(result) <= 10 else None)
    return figure


def _most(result: ExplainResult) -> int:
    return max(point.accumulation_steps for point in result.steps)


def _add_steps(figure: go.Figure, result: ExplainResult, variant: str, end_to_end: bool) -> None:
    points = [p for p in result.steps if p.variant == variant and p.end_to_end is end_to_end]
    if not points:
        return
    figure.add_scatter(
        x=[point.accumulation_steps for point in points],
        y=[1000 * point.step_s.value for point in points],
        error_y={"type": "data", "array": [1000 * (p.step_s.high - p.step_s.value) for p in points], "width": 3},
        mode="markers+text",
        name=f"{variant}, {'end to end' if end_to_end else 'computation alone'}",
        text=["" if end_to_end else _cut(point) for point in points],
        textposition="middle right",
        marker={
            "color": colour_of(result, variant),
            "symbol": ["star" if p.chosen else "diamond" if end_to_end else "circle-open" for p in points],
            "size": [15 if p.chosen else 9 for p in points],
        },
        hovertext=[_cut(point) for point in points],
        hovertemplate="%{hovertext}: %{y:.4g} ms<extra>%{fullData.name}</extra>",
    )


def _cut(point: StepPoint) -> str:
    return f"{point.micro_batch_size}x{point.accumulation_steps}"


def memory_figure(result: ExplainResult) -> go.Figure | None:
    """Measured peaks, and beside each what all other rows predict for it, up to the error bar."""
    cells = [cell for cell in result.memory if cell.measured_bytes is not None or cell.predicted_share is not None]
    if not cells:
        return None
    figure = titled_figure("Peak memory: predicted without its own rows, and measured", "micro-batch size", "MiB")
    for variant in dict.fromkeys(cell.variant for cell in cells):
        mine = [cell for cell in cells if cell.variant == variant]
        _add_memory(figure, result, variant, mine)
    if budget_shown(result):
        limit = result.memory_budget_bytes / MIB
        figure.add_hline(y=limit, line={"color": _RED, "dash": "dash"}, annotation_text=f"budget {limit:,.0f} MiB")
    sizes = sorted({cell.micro_batch_size for cell in cells})
    figure.update_xaxes(type="log", tickvals=sizes, ticktext=[str(size) for size in sizes], minor={"showgrid": False})
    figure.update_yaxes(rangemode="tozero")
    return figure


def budget_shown(result: ExplainResult) -> bool:
    """Far below the budget its line would press everything else to the ground."""
    shares = [cell.measured_share for cell in result.memory if cell.measured_share is not None]
    return max(shares, default=1.0) > 0.3


def _add_memory(figure: go.Figure, result: ExplainResult, variant: str, cells: Sequence[MemoryCell]) -> None:
    budget = result.memory_budget_bytes / MIB
    measured = [cell for cell in cells if cell.measured_bytes is not None]
    figure.add_scatter(
        x=[cell.micro_batch_size for cell in measured],
        y=[cell.measured_bytes / MIB for cell in measured if cell.measured_bytes is not None],
        mode="markers",
        name=f"{variant}, measured",
        marker={"color": colour_of(result, variant), "size": 10},
    )
    known = [(cell.micro_batch_size, cell.predicted_share) for cell in cells if cell.predicted_share is not None]
    figure.add_scatter(
        x=[size for size, _ in known],
        y=[share.value * budget for _, share in known],
        error_y={
            "type": "data",
            "symmetric": False,
            "array": [(share.high - share.value) * budget for _, share in known],
            "arrayminus": [(share.value - share.low) * budget for _, share in known],
            "width": 5,
        },
        mode="markers",
        name=f"{variant}, predicted",
        marker={"color": colour_of(result, variant), "size": 12, "symbol": "line-ew-open"},
    )


def loader_figure(result: ExplainResult) -> go.Figure | None:
    """Milliseconds per sample over workers, and what the computation takes: below that line the loader keeps up."""
    points = result.loader.points
    if not points:
        return None
    figure = titled_figure("The loader alone against the computation", "loader workers", "ms per sample")
    for colour, prefetch in zip(COLOURS, sorted({p.prefetch_factor for p in points}), strict=False):
        mine = [point for point in points if point.prefetch_factor == prefetch or not point.num_workers]
        figure.add_scatter(
            x=[point.num_workers for point in mine],
            y=[1000 * point.sample_s.value for point in mine],
            error_y={"type": "data", "array": [1000 * (p.sample_s.high - p.sample_s.value) for p in mine], "width": 3},
            mode="lines+markers",
            name=f"prefetch {prefetch}",
            line={"color": colour, "width": 1.5},
        )
    compute = result.loader.compute_sample_s
    workers = sorted({point.num_workers for point in points})
    if compute is not None:
        figure.add_scatter(
            x=[workers[0], workers[-1]],
            y=[1000 * compute] * 2,
            mode="lines",
            name=f"computation {1000 * compute:.3g} ms",
            line={"color": _GREY, "dash": "dash"},
        )
    figure.update_yaxes(type="log")
    figure.update_xaxes(tickvals=workers)
    return figure
