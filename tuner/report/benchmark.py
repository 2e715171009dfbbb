"""The picture of `tuner bench`: preparation, latency, throughput and peak memory on one page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tuner.contract.errors import ConfigError
from tuner.contract.result import BenchResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MIB = 1 << 20
_TRAINING, _INFERENCE = "#0b6e99", "#d1495b"


def draw(result: BenchResult, path: Path) -> None:
    """Write the picture. Raises ConfigError when the file cannot be written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), layout="constrained")
    FigureCanvasAgg(figure)
    preset = f" {result.preset}" if result.preset else ""
    figure.suptitle(plain_text(f"{result.workload}{preset} on {result.measured_on}"))
    axes = figure.subplots(2, 2)
    _preparation(axes[0, 0], result)
    _latency(axes[0, 1], result)
    _throughput(axes[1, 0], result)
    _memory(axes[1, 1], result)
    try:
        figure.savefig(path, dpi=110)
    except OSError as error:
        raise ConfigError(f"--out: {path} cannot be written: {error.strerror}") from None


def _preparation(axes: Axes, result: BenchResult) -> None:
    seconds = (result.prepare_cold_s, result.prepare_cached_s)
    bars = axes.bar(("from nothing", "from the cache"), seconds, color=(_TRAINING, _INFERENCE), width=0.5)
    axes.bar_label(bars, labels=[f"{value:.2f} s" for value in seconds], padding=3)
    axes.margins(y=0.15)
    axes.set_title(f"Data preparation ({result.prepared_bytes / MIB:,.1f} MiB kept)")
    axes.set_ylabel("seconds")


def _latency(axes: Axes, result: BenchResult) -> None:
    """Of one sample the median and the 95th percentile, of larger batches the mean."""
    speeds = result.inference.speeds
    heights = [1000 * speed.batch_size / speed.samples_per_s for speed in speeds]
    axes.set_title("Inference latency")
    axes.set_xlabel("batch size")
    axes.set_ylabel("milliseconds")
    if not speeds or result.inference.latency_p50_s is None or result.inference.latency_p95_s is None:
        axes.text(0.5, 0.5, result.inference.outcome.value, ha="center", transform=axes.transAxes)
        return
    heights[0] = 1000 * result.inference.latency_p50_s
    bars = axes.bar(range(len(heights)), heights, color=_INFERENCE, width=0.5)
    axes.plot([0], [1000 * result.inference.latency_p95_s], "k_", markersize=18, label="95 % of single samples")
    axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.set_xticks(range(len(heights)), [str(speed.batch_size) for speed in speeds])
    axes.margins(y=0.15)
    axes.legend()


def _throughput(axes: Axes, result: BenchResult) -> None:
    speeds = [(speed.batch_size, speed.samples_per_s) for speed in result.inference.speeds]
    trained = [(point.micro_batch_size, point.samples_per_s.value) for point in result.training if point.samples_per_s]
    axes.plot(*_columns(speeds), "o-", color=_INFERENCE, label="inference")
    axes.plot(*_columns(trained), "o-", color=_TRAINING, label="training")
    _by_batch(axes, [size for size, _ in (*speeds, *trained)])
    axes.set_title("Throughput")
    axes.set_ylabel(f"{result.unit}s per second")


def _memory(axes: Axes, result: BenchResult) -> None:
    peaks = [
        (point.micro_batch_size, point.peak_bytes / MIB) for point in result.training if point.peak_bytes is not None
    ]
    axes.plot(*_columns(peaks), "o-", color=_TRAINING, label="training")
    if result.inference.peak_bytes is not None:
        largest = result.inference.speeds[-1].batch_size
        label = f"inference, up to batch {largest}"
        axes.axhline(result.inference.peak_bytes / MIB, color=_INFERENCE, linestyle="--", label=label)
    _by_batch(axes, [size for size, _ in peaks])
    axes.set_title("Peak memory")
    axes.set_ylabel("MiB")


def _by_batch(axes: Axes, sizes: Sequence[int]) -> None:
    ticks = sorted(set(sizes))
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(size) for size in ticks])
    axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
    axes.set_xlabel("(micro-)batch size")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()


def _columns(pairs: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [size for size, _ in pairs], [value for _, value in pairs]


def plain_text(text: str) -> str:
    """Names come from users, and matplotlib reads `$` as mathematics."""
    return text.replace("$", r"\$")
