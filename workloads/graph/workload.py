"""The job: windows of many sensors, classified while hidden channels are filled in, as the tuner sees it.

                     tiny                      full
windows              64 steps, watch at 10 Hz  320 steps, watch at 50 Hz: 6.4 seconds both
neighbours           3 each side               4 each side
hidden channels      32                        64; by the guide's tiers 32, 64 or 128
encoder, decoder     1, 1                      2, 2; by tiers 1, 2 or 3 each
transformer, heads   1, 2                      1, 2; by tiers 1 or 2, and 1, 2 or 4
parameters           10,143                    45,471; by tiers 10,143, 45,471 or 339,359 (six channels, seven classes)
horizon              60,000 samples            400,000 samples

The baseline is the guide's middle tier, which a P100 (15.9 GiB) falls in: batch 16, gradient checkpointing on. Both
have the same data, watch recordings split by person or the user's own table split by block.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from tuner.contract.base import Scalar
from tuner.contract.config import OptimizerConfig, OptimizerName, QualityConfig, RunConfig, ScheduleConfig, ScheduleKind
from tuner.contract.errors import WorkloadError
from tuner.contract.workload import Batch, Progress, Split, Term, Trivial, WorkloadInfo

from . import assess
from .attention import BandAttention
from .cache import Table, WindowGraph, ensure_graph, ensure_table
from .data import (
    SensorSource,
    WindowDataset,
    Windows,
    classes_of,
    cut_windows,
    refuse_unusable,
)
from .judge import Judged, judge, majority_by_segment, trivial_figures
from .masking import draw_hidden
from .model import GraphNet, Sizes
from .presets import PRESETS
from .sensor_table import SensorTable
from .watch import WatchRecordings

SIZE_OPTIONS = {
    "hidden_channels": (4, 1024),
    "encoder_layers": (1, 32),
    "decoder_layers": (1, 32),
    "transformer_layers": (0, 32),
    "attention_heads": (1, 64),
}
TABLE_OPTIONS = {"block_column": "block", "label_column": "label", "sensor_columns": ""}
OPTIONS = ("preset", "data", *TABLE_OPTIONS, "downsample", "window_size", "time_k", *SIZE_OPTIONS)


class Graph:
    """Options: preset (tiny, full), data (CSV or parquet file, or a folder of them), block_column, label_column,
    sensor_columns (names with commas between; default all others), downsample (rows averaged to one), window_size,
    time_k, and the sizes hidden_channels, encoder_layers, decoder_layers, transformer_layers, attention_heads."""

    preload: Sequence[str] = ("safetensors.torch",)

    def __init__(self, options: Mapping[str, Scalar]) -> None:
        _refuse_unknown(options)
        name = options.get("preset", "tiny")
        if name not in PRESETS:
            raise WorkloadError(f"options.preset: unknown value {name!r}; known: {', '.join(PRESETS)}")
        self._preset_name, self._preset = str(name), PRESETS[str(name)]
        self._options = dict(options)
        self._window_size = _whole(options, "window_size", self._preset.window_size, (8, 16_384))
        self._time_k = _whole(options, "time_k", self._preset.time_k, (1, self._window_size - 1))
        self._sizes = _sizes(options, self._preset.sizes)
        self._source, self._reading = _source(options, self._preset.watch_downsample)
        self._table: Table | None = None
        self._graph: WindowGraph | None = None
        self._needs: dict[torch.device, Tensor] = {}

    def info(self) -> WorkloadInfo:
        segments = self._table.segments if self._table is not None else self._source.segments()
        refuse_unusable(segments, self._window_size)
        return WorkloadInfo(
            name="graph",
            summary="Graph attention over sensor windows: classifies them and fills in hidden channels",
            unit="window",
            preset=self._preset_name,
            preset_note=self._preset.note,
            train_samples=len(cut_windows(segments, self._window_size, held_out=False).starts),
            baseline=self._baseline(),
        )

    def _baseline(self) -> RunConfig:
        """The guide's middle tier, which is also its example configuration."""
        return RunConfig(
            workload="graph",
            options={**self._options, "preset": self._preset_name},
            micro_batch_size=16,
            gradient_checkpointing=True,
            optimizer=OptimizerConfig(name=OptimizerName.ADAMW, lr=2e-3, weight_decay=0.01),
            schedule=ScheduleConfig(kind=ScheduleKind.COSINE, final_factor=0.05),
            max_grad_norm=1.0,
            horizon_samples=self._preset.horizon_samples,
            cadence=self._preset.cadence,
            loss_bands=self._preset.loss_bands,
            quality=QualityConfig(metric="accuracy"),
            threads=self._preset.threads,
        )

    def prepare(self, cache_dir: Path, progress: Progress) -> None:
        """The graph and the table of rows: made once, afterwards loaded. Raises WorkloadError."""
        self._graph = ensure_graph(cache_dir, self._window_size, self._time_k)
        table = ensure_table(cache_dir, self._source, self._reading, progress)
        refuse_unusable(table.segments, self._window_size)
        self._table, self._needs = table, {}

    def model(self) -> nn.Module:
        table, graph = self._prepared()
        channels, classes = table.rows.shape[1], len(classes_of(table.segments))
        return GraphNet(self._sizes, channels, classes, self._window_size, BandAttention(graph.band))

    def dataset(self, split: Split) -> Dataset[Mapping[str, Tensor]]:
        return WindowDataset(self._prepared()[0].rows, self._windows(split), self._window_size)

    def collate(self, items: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """{"x": float32 [B, T, C], "label": int64 [B], "index": int64 [B]}"""
        return {name: torch.stack([item[name] for item in items]) for name in ("x", "label", "index")}

    def loss(self, model: nn.Module, batch: Batch) -> Mapping[str, Term]:
        """`recon`: mean squared error over the hidden channels of each window; `class`: cross-entropy."""
        x = batch["x"]
        hidden = draw_hidden(batch["sample_seed"], self._need_on(x.device))
        logits, filled = model(x, hidden)
        errors = (filled.float() - x).square().mean(1)  # [B, C]
        recon = errors.masked_fill(~hidden, 0.0).sum(1) / hidden.sum(1)
        wrong = functional.cross_entropy(logits.float(), batch["label"], reduction="sum")
        return {"recon": Term(sum=recon.sum(), weight=float(len(x))), "class": Term(sum=wrong, weight=float(len(x)))}

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batches: Iterable[Batch]) -> Mapping[str, float]:
        """On held-out blocks: `loss` (of windows with hidden channels, as in training), `masked_mse` in squared
        deviations, `accuracy` by window and `recording_accuracy` by majority of a recording's windows (all channels
        shown). What is hidden hangs on a window's index alone, so runs are comparable."""
        judged = judge(model, batches)
        return {**judged.figures(), "recording_accuracy": self._by_recording(judged)}

    def checkpoint_blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        assert isinstance(model, GraphNet)
        return model.blocks()

    @torch.no_grad()
    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        """Class logits of whole windows: [B, classes]."""
        shown = torch.zeros(len(batch["x"]), batch["x"].shape[2], dtype=torch.bool, device=batch["x"].device)
        return model(batch["x"], shown)[0]  # type: ignore[no-any-return]

    @torch.no_grad()
    def sample(self, model: nn.Module, out_dir: Path, seed: int) -> Sequence[Path]:
        """Write reconstruction-SEED.png: held-out windows, their hidden channels and what the model filled in."""
        batch = self._examples(seed)
        return [assess.draw_reconstruction(model, batch, self._channels, out_dir / f"reconstruction-{seed}.png")]

    @torch.no_grad()
    def assess(self, model: nn.Module, out_dir: Path, seed: int) -> Mapping[str, float]:
        """`balanced_accuracy` (mean recall of the classes) and `worst_recall` on all held-out windows.

        Writes confusion-SEED.png and .csv, and channels-SEED.csv: error of each channel beside zero fill and a linear
        rule. Draws nothing, so `seed` only names the files.
        """
        table, _ = self._prepared()
        judged = judge(model, self._valid_batches())
        names = classes_of(table.segments)
        counts = assess.write_confusion(judged, names, out_dir / f"confusion-{seed}.csv")
        assess.draw_confusion(counts, names, out_dir / f"confusion-{seed}.png")
        assess.write_channels(judged, self._valid_batches(), table, self._channels, out_dir / f"channels-{seed}.csv")
        return assess.recalls(counts)

    def trivial(self) -> Mapping[str, Trivial]:
        """What the figures would be without learning, computed from the held-out windows."""
        train, valid = self._windows("train"), self._windows("valid")
        return trivial_figures(train, valid, self._valid_batches())

    def _need_on(self, device: torch.device) -> Tensor:
        """Copied to a GPU once: a copy in every step would wait for it."""
        need = self._prepared()[0].need
        if device.type == "cpu":
            return need
        if device not in self._needs:
            self._needs[device] = need.to(device)
        return self._needs[device]

    def _by_recording(self, judged: Judged) -> float:
        return majority_by_segment(judged, self._windows("valid").segments)

    def _examples(self, seed: int) -> dict[str, Tensor]:
        data = self.dataset("valid")
        assert isinstance(data, WindowDataset)
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
        return self.collate(data.__getitems__(order[: assess.EXAMPLES].tolist()))

    def _valid_batches(self) -> Iterable[Batch]:
        data = self.dataset("valid")
        assert isinstance(data, WindowDataset)
        places = range(len(data))
        return (self.collate(data.__getitems__(places[at : at + 64])) for at in places[::64])

    def _windows(self, split: Split) -> Windows:
        return cut_windows(self._prepared()[0].segments, self._window_size, held_out=split == "valid")

    @property
    def _channels(self) -> tuple[str, ...]:
        return self._source.channels

    def _prepared(self) -> tuple[Table, WindowGraph]:
        if self._table is None or self._graph is None:
            raise RuntimeError("prepare(cache_dir, progress) must be called before data or models are asked for")
        return self._table, self._graph


def _source(options: Mapping[str, Scalar], watch_downsample: int) -> tuple[SensorSource, dict[str, Any]]:
    """Where rows come from, and how they are read from there (a part of the table's key)."""
    data = options.get("data")
    if data is None:
        given = sorted(set(options) & set(TABLE_OPTIONS))
        if given:
            raise WorkloadError(f"options.{given[0]}: names a column of your own table; give that too: --data FILE")
        by = _whole(options, "downsample", watch_downsample, (1, 50))
        return WatchRecordings(by), {"downsample": by}
    if not isinstance(data, str):
        raise WorkloadError(f"options.data: must be the path of a CSV or parquet file or of a folder, got {data!r}")
    columns = {name: _text(options, name, default) for name, default in TABLE_OPTIONS.items()}
    by = _whole(options, "downsample", 1, (1, 1000))
    return SensorTable(Path(data), **columns, downsample_by=by), {"downsample": by, **columns}


def _sizes(options: Mapping[str, Scalar], preset: Sizes) -> Sizes:
    found = {name: _whole(options, name, asdict(preset)[name], limits) for name, limits in SIZE_OPTIONS.items()}
    sizes = Sizes(**found)
    if sizes.hidden_channels % sizes.attention_heads:
        raise WorkloadError(
            f"options.hidden_channels: must be a multiple of attention_heads ({sizes.attention_heads}),"
            f" got {sizes.hidden_channels}"
        )
    return sizes


def _refuse_unknown(options: Mapping[str, Scalar]) -> None:
    unknown = sorted(set(options) - set(OPTIONS))
    if unknown:
        raise WorkloadError(f"options.{unknown[0]}: graph does not know it; known: {', '.join(OPTIONS)}")


def _whole(options: Mapping[str, Scalar], name: str, default: int, limits: tuple[int, int]) -> int:
    value = options.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not limits[0] <= value <= limits[1]:
        raise WorkloadError(f"options.{name}: must be a whole number from {limits[0]} to {limits[1]}, got {value!r}")
    return value


def _text(options: Mapping[str, Scalar], name: str, default: str) -> str:
    value = options.get(name, default)
    if not isinstance(value, str):
        raise WorkloadError(f"options.{name}: must be the name of a column, got {value!r}")
    return value
