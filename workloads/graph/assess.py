"""Tables and pictures of a trained model: confusion of the classes, errors of the channels, windows filled in."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tuner.contract.workload import Batch

from .cache import Table
from .judge import Judged, errors_of
from .masking import fixed_hidden

EXAMPLES = 4
"""Windows in a picture of reconstructions."""


def write_confusion(judged: Judged, names: Sequence[str], path: Path) -> Tensor:
    """Counts [true class, class said], also written as CSV."""
    size = len(names)
    counts = torch.bincount(judged.label * size + judged.answer, minlength=size**2).reshape(size, size)
    rows = [[name, *row.tolist()] for name, row in zip(names, counts, strict=True)]
    _write_csv(path, ["true \\ said", *names], rows)
    return counts


def recalls(counts: Tensor) -> dict[str, float]:
    """Of the classes that occur among held-out windows."""
    total = counts.sum(1)
    recall = counts.diagonal()[total > 0] / total[total > 0]
    return {"balanced_accuracy": float(recall.mean()), "worst_recall": float(recall.min())}


def write_channels(judged: Judged, batches: Iterable[Batch], table: Table, names: Sequence[str], path: Path) -> None:
    """A row for each channel: its need in training, error when hidden, of zero fill, and of the linear rule (which sees
    the shown channels of the same time step, hidden ones as 0)."""
    zero, linear = [], []
    for batch in batches:
        x = batch["x"]
        hidden = fixed_hidden(batch["index"], x.shape[2])
        zero.append(errors_of(torch.zeros_like(x), x, hidden))
        linear.append(errors_of(x.masked_fill(hidden[:, None], 0.0) @ table.linear.T, x, hidden))
    columns = (judged.errors, torch.cat(zero), torch.cat(linear))
    means = torch.stack([table.need.double(), *(column.nanmean(0) for column in columns)], dim=1)
    rows = [[name, *(f"{value:.4f}" for value in row.tolist())] for name, row in zip(names, means, strict=True)]
    _write_csv(path, ["channel", "need", "masked_mse", "zero_fill_mse", "linear_mse"], rows)


def draw_confusion(counts: Tensor, names: Sequence[str], path: Path) -> Path:
    shares = counts / counts.sum(1, keepdim=True).clamp_min(1)
    side = max(4.0, 0.5 * len(names) + 2)
    figure = _figure(side + 1, side)
    axes = figure.add_subplot()
    shown = axes.imshow(shares.numpy(), vmin=0, vmax=1, cmap="Blues")
    figure.colorbar(shown, ax=axes, label="share of the true class")
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="said", ylabel="true", title="held-out windows")
    if len(names) <= 20:
        for true, row in enumerate(counts.tolist()):
            for said, count in enumerate(row):
                colour = "white" if shares[true, said] > 0.5 else "black"
                axes.text(said, true, str(count), ha="center", va="center", color=colour, fontsize=8)
    return _save(figure, path)


def draw_reconstruction(model: nn.Module, batch: Batch, names: Sequence[str], path: Path) -> Path:
    """A row for each window: its first hidden channels as they were, and as the model fills them in."""
    device = next(model.parameters()).device
    hidden = fixed_hidden(batch["index"], batch["x"].shape[2])
    filled = model(batch["x"].to(device), hidden.to(device))[1].float().cpu()
    count = min(2, int(hidden.sum(1).min()))
    figure = _figure(5 * count, 2.2 * len(filled))
    grid = figure.subplots(len(filled), count, squeeze=False, sharex=True)
    for row in range(len(filled)):
        for column, channel in enumerate(hidden[row].nonzero()[:count, 0].tolist()):
            axes = grid[row, column]
            axes.plot(batch["x"][row, :, channel].numpy(), color="0.6", label="recorded")
            axes.plot(filled[row, :, channel].numpy(), color="tab:blue", label="filled in")
            axes.set_title(f"window {int(batch['index'][row])}: {names[channel]} (standardised)", fontsize=8)
    grid[0, 0].legend(fontsize=8)
    grid[-1, 0].set_xlabel("time step")
    return _save(figure, path)


def _figure(width: float, height: float) -> Any:
    """A matplotlib figure that belongs to no window and no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, format="png", dpi=100)
    return partial.replace(path)


def _write_csv(path: Path, head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(head)
        writer.writerows(rows)
    partial.replace(path)
