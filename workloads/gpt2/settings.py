"""The options of gpt2: what they may be, and the model's shape that follows from preset, options and a model folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from tuner.contract.base import Scalar
from tuner.contract.config import Cadence
from tuner.contract.errors import WorkloadError

from .docstrings import Docstrings
from .rows import Source
from .tables import PlainText, Table, text_file
from .tokens import tokenizer_files

Task = Literal["classify", "lm"]
Padding = Literal["bucket", "fixed"]
OPTIONS = (
    "preset", "data", "task", "pretrained", "text_column", "label_columns", "padding", "pad_multiple", "max_tokens",
    "blocks", "width", "trained_blocks",
)  # fmt: skip
HEAD_WIDTH = 64
"""Of every GPT-2: 12 heads at width 768."""
PRETRAINED_BLOCKS = 8
"""How many of the top blocks the guide trains."""
POSITIONS = 1024


@dataclass(frozen=True)
class Preset:
    blocks: int
    width: int
    vocabulary: int
    """Of a tokeniser trained here; a model folder brings its own."""
    max_tokens: int
    dropout: float
    threads: int
    """CPU threads; 0 = every core. Steps of tiny are too short to share."""
    horizon_samples: int
    warmup_samples: int
    cadence: Cadence
    note: str


TINY_NOTE = (
    "tiny is a rehearsal: the same data, losses and code with a GPT-2 of 2 blocks of width 128 on 64 tokens, trained"
    " from nothing. Its speeds say nothing about full; run `preset: full` for GPT-2 small"
)
FULL_NOTE = (
    "full is the guide's model: GPT-2 small on 128 tokens. With `pretrained: FOLDER` its top 8 blocks, ln_f and the"
    " head are trained, as in the guide; without, there is nothing worth freezing, so all of it is trained from nothing"
)
PRESETS = {
    "tiny": Preset(
        blocks=2,
        width=128,
        vocabulary=2048,
        max_tokens=64,
        dropout=0.1,
        threads=1,
        horizon_samples=24_000,
        warmup_samples=1_600,
        cadence=Cadence(log_samples=1_600, evaluate_samples=6_400, sample_samples=12_800, checkpoint_samples=12_800),
        note=TINY_NOTE,
    ),
    "full": Preset(
        blocks=12,
        width=768,
        vocabulary=8192,
        max_tokens=128,
        dropout=0.1,
        threads=0,
        horizon_samples=96_000,
        warmup_samples=9_600,
        cadence=Cadence(log_samples=3_200, evaluate_samples=9_600, sample_samples=32_000, checkpoint_samples=16_000),
        note=FULL_NOTE,
    ),
}


@dataclass(frozen=True)
class Shape:
    blocks: int
    width: int
    heads: int
    vocabulary: int
    positions: int


@dataclass(frozen=True)
class Settings:
    """All options, checked."""

    preset_name: str
    preset: Preset
    task: Task
    source: Source
    asked: dict[str, str]
    """The options that decide which rows there are."""
    pretrained: Path | None
    padding: Padding
    pad_multiple: int
    max_tokens: int
    shape: Shape
    trained_blocks: int | None
    """None = everything."""

    @classmethod
    def read(cls, options: Mapping[str, Scalar]) -> Settings:
        """Raises WorkloadError naming the option."""
        unknown = sorted(set(options) - set(OPTIONS))
        if unknown:
            raise WorkloadError(f"options.{unknown[0]}: gpt2 does not know it; known: {', '.join(OPTIONS)}")
        name = _choice(options, "preset", tuple(PRESETS))
        preset = PRESETS[name]
        task = cast(Task, _choice(options, "task", ("classify", "lm")))
        folder = _word(options, "pretrained")
        pretrained = None if folder is None else _model_folder(Path(folder))
        max_tokens = _whole(options, "max_tokens", preset.max_tokens, 8, POSITIONS)
        shape = _shape(options, preset, pretrained, max_tokens)
        default = None if pretrained is None else min(PRETRAINED_BLOCKS, shape.blocks)
        return cls(
            preset_name=name,
            preset=preset,
            task=task,
            source=_source(options, task),
            asked={key: str(options[key]) for key in ("text_column", "label_columns") if key in options}
            | {"task": task},
            pretrained=pretrained,
            padding=cast(Padding, _choice(options, "padding", ("bucket", "fixed"))),
            pad_multiple=_whole(options, "pad_multiple", 8, 1, POSITIONS),
            max_tokens=max_tokens,
            shape=shape,
            trained_blocks=_whole(options, "trained_blocks", 0, 0, shape.blocks)
            if "trained_blocks" in options
            else default,
        )


def _source(options: Mapping[str, Scalar], task: Task) -> Source:
    data, text_column = _word(options, "data"), _word(options, "text_column")
    labels = tuple(name.strip() for name in (_word(options, "label_columns") or "").split(",") if name.strip())
    if data is None:
        if text_column or labels:
            raise WorkloadError("options.text_column and label_columns are for a table of your own: give `data` too")
        return Docstrings()
    path = text_file(Path(data))
    if path.suffix.lower() != ".txt":
        return Table(path, text_column, labels, needs_labels=task == "classify")
    if task == "classify":
        raise WorkloadError(f"options.data: {path} has no labels; give a table (CSV, JSONL, parquet), or take task=lm")
    return PlainText(path)


def _shape(options: Mapping[str, Scalar], preset: Preset, pretrained: Path | None, max_tokens: int) -> Shape:
    if pretrained is None:
        blocks = _whole(options, "blocks", preset.blocks, 1, 96)
        width = _whole(options, "width", preset.width, HEAD_WIDTH, 8192)
        if width % HEAD_WIDTH:
            raise WorkloadError(f"options.width: must be a multiple of {HEAD_WIDTH} (a head's width), got {width}")
        positions = POSITIONS if preset.max_tokens > 64 else max_tokens
        return Shape(blocks, width, width // HEAD_WIDTH, preset.vocabulary, positions)
    for name in ("blocks", "width"):
        if name in options:
            raise WorkloadError(f"options.{name}: the folder given as `pretrained` decides it; leave one of them out")
    shape = _read_shape(pretrained / "config.json")
    if max_tokens > shape.positions:
        raise WorkloadError(
            f"options.max_tokens: the model of {pretrained} has {shape.positions} positions, got {max_tokens}"
        )
    return shape


def _model_folder(folder: Path) -> Path:
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise WorkloadError(
                f"options.pretrained: {folder / name} does not exist; give the folder of a GPT-2 with config.json,"
                " model.safetensors and its tokeniser"
            )
    tokenizer_files(folder)
    return folder


def _read_shape(path: Path) -> Shape:
    names = ("n_layer", "n_embd", "n_head", "vocab_size", "n_positions")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        return Shape(*(int(raw[name]) for name in names))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise WorkloadError(
            f"options.pretrained: {path} is no GPT-2's: {type(error).__name__} {error}; needed are {', '.join(names)}"
        ) from None


def _choice(options: Mapping[str, Scalar], name: str, known: tuple[str, ...]) -> str:
    value = options.get(name, known[0])
    if value not in known:
        raise WorkloadError(f"options.{name}: unknown value {value!r}; known: {', '.join(known)}")
    return str(value)


def _word(options: Mapping[str, Scalar], name: str) -> str | None:
    value = options.get(name)
    if value is not None and (not isinstance(value, str) or not value):
        raise WorkloadError(f"options.{name}: must be a text, got {value!r}")
    return value


def _whole(options: Mapping[str, Scalar], name: str, default: int, low: int, high: int) -> int:
    value = options.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise WorkloadError(f"options.{name}: must be a whole number from {low} to {high}, got {value!r}")
    return value
