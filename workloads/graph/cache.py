"""What is made once and kept: the graph of a window, and the standardised table of rows with its segments.

The graph's key is (window_size, time_k) and nothing else, so it serves every data set. The table's key is the data's
digest; it does not know the window size, so other windows are cut from it without reading the data again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tuner import prepared
from tuner.contract.errors import WorkloadError
from tuner.contract.workload import Progress

from .attention import band_mask, edge_index
from .data import Segment, SensorSource, training_rows
from .masking import measure_need

NAME = "graph"
GRAPH_VERSION, TABLE_VERSION = 1, 1
"""Raised whenever the same key would give something else."""
TENSORS, SEGMENTS = "tensors.safetensors", "segments.json"
CONSTANT = 1e-8
"""A channel whose deviation is below this says nothing; it is only moved to 0."""


@dataclass(frozen=True)
class WindowGraph:
    """The graph of one window: bool [T, 2 k + 1] for the banded form, int64 [2, edges] for the general one."""

    band: Tensor
    edges: Tensor


@dataclass(frozen=True)
class Table:
    """All rows, and what was learned of them on training blocks alone."""

    rows: Tensor
    """float32 [N, C], standardised by mean and deviation of training rows."""
    mean: Tensor
    deviation: Tensor
    need: Tensor
    """[C]; see `masking.measure_need`."""
    linear: Tensor
    """[C, C]: weights by which a channel is foretold from the others."""
    segments: tuple[Segment, ...]


def ensure_graph(cache_dir: Path, window_size: int, time_k: int) -> WindowGraph:
    def make(folder: Path) -> None:
        graph = {"band": band_mask(window_size, time_k), "edges": edge_index(window_size, time_k)}
        save_file({name: tensor.contiguous() for name, tensor in graph.items()}, folder / TENSORS)

    about = {"code": GRAPH_VERSION, "window_size": window_size, "time_k": time_k}
    need_bytes = 17 * window_size * (2 * time_k + 1) + 4096
    folder = prepared.ensure(cache_dir, NAME, "graph", about, make, need_bytes=need_bytes)
    found = _load(folder)
    return WindowGraph(found["band"], found["edges"])


def ensure_table(cache_dir: Path, source: SensorSource, about: Mapping[str, Any], progress: Progress) -> Table:
    """`about`: how rows are read from the source. Raises WorkloadError: disk, data, folder."""

    def make(folder: Path) -> None:
        segments = source.segments()
        rows = source.load(lambda done, total: progress(done, total, "reading sensors"))
        _write(folder, rows, segments)

    key = {"code": TABLE_VERSION, "data": source.digest(), **about}
    for remark in source.remarks:
        progress(0, 0, remark)
    folder = prepared.ensure(cache_dir, NAME, "table", key, make, need_bytes=source.need_bytes())
    found = _load(folder)
    listed = json.loads((folder / SEGMENTS).read_text(encoding="utf-8"))
    return Table(**found, segments=tuple(Segment(**item) for item in listed))


def _write(folder: Path, rows: Tensor, segments: Sequence[Segment]) -> None:
    """Standardise `rows` in place and save them."""
    train = rows[training_rows(segments, len(rows))]
    mean, deviation = train.mean(0), train.std(0)
    deviation = torch.where(deviation > CONSTANT, deviation, torch.ones_like(deviation))
    need, linear = measure_need((train - mean) / deviation)
    rows.sub_(mean).div_(deviation)
    tensors = {"rows": rows, "mean": mean, "deviation": deviation, "need": need, "linear": linear}
    save_file(tensors, folder / TENSORS)
    (folder / SEGMENTS).write_text(json.dumps([asdict(segment) for segment in segments]), encoding="utf-8")


def _load(folder: Path) -> dict[str, Tensor]:
    """Raises WorkloadError for a file whose content is damaged."""
    path = folder / TENSORS
    try:
        found: dict[str, Tensor] = load_file(path)
        return found
    except (SafetensorError, OSError) as error:
        raise WorkloadError(f"{path} is damaged ({error}); remove {folder}, it will be made again") from None
