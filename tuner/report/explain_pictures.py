"""The pictures of an explanation as PNG files (matplotlib): alpha_beta.png, memory.png, loader.png."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tuner.contract.explanation import ExplainResult
from tuner.report.benchmark import plain_text
from tuner.report.explain_figures import budget_shown, colour_of, lines_of
from tuner.report.figures import COLOURS
from tuner.report.frame import MIB

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SIZE, _DPI = (8, 5), 110
_RED, _GREY = "#b00020", "#8a939c"


def draw_all(folder: Path, result: ExplainResult) -> list[Path]:
    """Write the three pictures into `folder`; one with nothing to show says so. Raises OSError."""
    painters: dict[str, Callable[[Axes, ExplainResult], None]] = {
        "alpha_beta.png": _steps,
        "memory.png": _memory,
        "loader.png": _loader,
    }
    return [_draw(folder / name, result, paint) for name, paint in painters.items()]


def _draw(path: Path, result: ExplainResult, paint: Callable[[Axes, ExplainResult], None]) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    paint(axes, result)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
    else:
        axes.text(0.5, 0.5, "not measured in this study", ha="center", transform=axes.transAxes)
    figure.suptitle(plain_text(f"{result.study}: {result.label}"), fontsize=10)
    figure.savefig(path, dpi=_DPI)
    return path


def _steps(axes: Axes, result: ExplainResult) -> None:
    axes.set_title("Step time = accumulation x alpha + samples x beta + omega")
    axes.set_xlabel("micro-batches per step (accumulation); the slope is alpha")
    axes.set_ylabel("milliseconds per step")
    for fit, samples, ends, seconds in lines_of(result):
        label = plain_text(
            f"fit {fit.variant}, {samples} samples: alpha {1000 * fit.alpha_s.value:.3g} ms "
            f"({1000 * fit.alpha_s.low:.3g} to {1000 * fit.alpha_s.high:.3g}), beta {1000 * fit.beta_s.value:.3g} ms"
        )
        axes.plot(ends, [1000 * value for value in seconds], color=colour_of(result, fit.variant), label=label)
    _step_points(axes, result)
    most = max((point.accumulation_steps for point in result.steps), default=1)
    axes.set_xlim(0, most + 0.5)
    axes.set_xticks(range(0, most + 1, max(1, most // 8)))
    axes.set_ylim(bottom=0)


def _step_points(axes: Axes, result: ExplainResult) -> None:
    named: set[tuple[str, bool]] = set()
    for point in result.steps:
        kind = (point.variant, point.end_to_end)
        what = plain_text(f"{point.variant}, {'end to end' if point.end_to_end else 'computation alone'}")
        value, reach = 1000 * point.step_s.value, 1000 * (point.step_s.high - point.step_s.value)
        axes.errorbar(
            [point.accumulation_steps],
            [value],
            yerr=[reach],
            fmt="*" if point.chosen else "D" if point.end_to_end else "o",
            markersize=13 if point.chosen else 6,
            fillstyle="full" if point.end_to_end else "none",
            color=colour_of(result, point.variant),
            capsize=3,
            label=None if kind in named else what,
        )
        named.add(kind)
        if not point.end_to_end:
            cut = f"{point.micro_batch_size}x{point.accumulation_steps}"
            axes.annotate(cut, (point.accumulation_steps, value), xytext=(8, -10), textcoords="offset points")


def _memory(axes: Axes, result: ExplainResult) -> None:
    budget = result.memory_budget_bytes / MIB
    axes.set_title(f"Peak memory: predicted from all other rows, and measured (budget {budget:,.0f} MiB)")
    axes.set_xlabel("micro-batch size")
    axes.set_ylabel("MiB")
    for variant in dict.fromkeys(cell.variant for cell in result.memory):
        _memory_of(axes, result, variant)
    if budget_shown(result) and result.memory:
        axes.axhline(budget, color=_RED, linestyle="--", label="budget")
    sizes = sorted({cell.micro_batch_size for cell in result.memory})
    if sizes:
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_ylim(bottom=0)


def _memory_of(axes: Axes, result: ExplainResult, variant: str) -> None:
    cells = [cell for cell in result.memory if cell.variant == variant]
    colour, budget, name = colour_of(result, variant), result.memory_budget_bytes / MIB, plain_text(variant)
    measured = [(c.micro_batch_size, c.measured_bytes / MIB) for c in cells if c.measured_bytes is not None]
    if measured:
        axes.plot(*zip(*measured, strict=True), "o", color=colour, label=f"{name}, measured")
    known = [(cell.micro_batch_size, cell.predicted_share) for cell in cells if cell.predicted_share is not None]
    if known:
        axes.errorbar(
            [size for size, _ in known],
            [share.value * budget for _, share in known],
            yerr=(
                [(share.value - share.low) * budget for _, share in known],
                [(share.high - share.value) * budget for _, share in known],
            ),
            fmt="_",
            markersize=16,
            capsize=5,
            color=colour,
            label=f"{name}, predicted, with its error bar",
        )


def _loader(axes: Axes, result: ExplainResult) -> None:
    points = result.loader.points
    axes.set_title("The loader alone against the computation")
    axes.set_xlabel("loader workers")
    axes.set_ylabel("milliseconds per sample")
    for colour, prefetch in zip(COLOURS, sorted({p.prefetch_factor for p in points}), strict=False):
        mine = [point for point in points if point.prefetch_factor == prefetch or not point.num_workers]
        axes.errorbar(
            [point.num_workers for point in mine],
            [1000 * point.sample_s.value for point in mine],
            yerr=[1000 * (point.sample_s.high - point.sample_s.value) for point in mine],
            fmt="o-",
            capsize=3,
            color=colour,
            label=f"prefetch {prefetch}",
        )
    compute = result.loader.compute_sample_s
    if points and compute is not None:
        axes.axhline(1000 * compute, color=_GREY, linestyle="--", label="computation alone")
    if points:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xticks(sorted({point.num_workers for point in points}))
