"""Sensor recordings as one table of rows and the segments in it; how blocks are split and windows are cut.

A segment is an unbroken run of rows of one block with one label. Windows are cut inside segments, and a block (a
person, a recording) serves either training or validation: overlapping windows of one block on both sides would leak.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from tuner.contract.errors import WorkloadError

Report = Callable[[int, int], None]
"""(done, total) rows."""

VALID_SHARE = 0.25
"""Share of the blocks of each label that is held out, rounded up."""
MAX_CHANNELS = 32


@dataclass(frozen=True)
class Segment:
    """Rows `first` to `first + rows` of the table, numbered as they are used (after downsampling)."""

    block: str
    label: str
    first: int
    rows: int
    where: str
    """Where the user finds it: `recording 12`, `walk.csv rows 2 to 800`."""


class SensorSource(Protocol):
    """Where rows come from. `segments` is cheap beside `load`, which reads every value."""

    label_text: str
    """What the classes are, in words."""

    @property
    def remarks(self) -> tuple[str, ...]:
        """What the user should know of how the data were understood."""
        ...

    @property
    def channels(self) -> tuple[str, ...]: ...

    def segments(self) -> tuple[Segment, ...]:
        """Raises WorkloadError for data the user can mend."""
        ...

    def digest(self) -> str: ...

    def need_bytes(self) -> int:
        """At most what all rows take on disk as float32."""
        ...

    def load(self, report: Report) -> Tensor:
        """float32 [rows, channels], as recorded. Raises WorkloadError."""
        ...


@dataclass(frozen=True)
class Windows:
    """Start rows of the windows of one split, their classes, and the segment each was cut from; int64 [N] each."""

    starts: Tensor
    labels: Tensor
    segments: Tensor


class WindowDataset(Dataset[Mapping[str, Tensor]]):
    """Windows as views of one table: nothing is copied before a batch is made."""

    def __init__(self, rows: Tensor, windows: Windows, window_size: int) -> None:
        self._rows, self._windows = rows, windows
        self._offsets = torch.arange(window_size)

    def __len__(self) -> int:
        return len(self._windows.starts)

    def __getitem__(self, index: int) -> Mapping[str, Tensor]:
        """{"x": float32 [T, C], "label": int64 scalar, "index": int64 scalar}"""
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Mapping[str, Tensor]]:
        """All windows in one gather; items are views of its result."""
        index = torch.tensor(indices)
        x = self._rows[self._windows.starts[index][:, None] + self._offsets]
        labels = self._windows.labels[index]
        return [
            {"x": one, "label": label, "index": place}
            for one, label, place in zip(x.unbind(), labels.unbind(), index.unbind(), strict=True)
        ]


def classes_of(segments: Sequence[Segment]) -> tuple[str, ...]:
    return tuple(sorted({segment.label for segment in segments}))


def held_out_blocks(segments: Sequence[Segment]) -> frozenset[str]:
    """Blocks for validation: a quarter of those of each label, while every label keeps one for training.

    Which ones hangs on their names alone (their order is that of a hash), not on their order in the file.
    """
    labels: dict[str, set[str]] = {}
    for segment in segments:
        labels.setdefault(segment.block, set()).add(segment.label)
    left = Counter(label for own in labels.values() for label in own)
    wanted = {label: math.ceil(count * VALID_SHARE) for label, count in left.items()}
    held = set()
    for block in sorted(labels, key=lambda name: hashlib.sha256(name.encode()).hexdigest()):
        if all(left[label] > 1 for label in labels[block]) and any(wanted[label] > 0 for label in labels[block]):
            held.add(block)
            for label in labels[block]:
                left[label], wanted[label] = left[label] - 1, wanted[label] - 1
    return frozenset(held)


def refuse_unusable(segments: Sequence[Segment], window_size: int) -> None:
    """Raises WorkloadError: too few labels, nothing to hold out, a block without one window."""
    classes = classes_of(segments)
    if len(classes) < 2:
        found = f"only {classes[0]!r}" if classes else "none"
        raise WorkloadError(f"--data: at least 2 different labels are needed to tell apart, but found {found}")
    for label in classes:
        blocks = {segment.block for segment in segments if segment.label == label}
        if len(blocks) < 2:
            raise WorkloadError(
                f"--data: label {label!r} is in one block only ({min(blocks)!r}); validation takes whole blocks,"
                " so each label needs at least 2: give another recording of it, or remove its rows"
            )
    longest: dict[str, Segment] = {}
    for segment in segments:
        if segment.block not in longest or segment.rows > longest[segment.block].rows:
            longest[segment.block] = segment
    for block, segment in longest.items():
        if segment.rows < window_size:
            raise WorkloadError(
                f"--data: block {block!r} is shorter than a window: its longest run of one label ({segment.where}) has"
                f" {segment.rows} rows, and options.window_size is {window_size}; rows of a block must stand together"
                " in order of time: sort them, remove the block, or set a smaller window_size"
            )
    if not held_out_blocks(segments):
        raise WorkloadError(
            "--data: no block can be held out, as each holds the only training rows of some label; give more blocks"
        )


def cut_windows(segments: Sequence[Segment], window_size: int, *, held_out: bool) -> Windows:
    """Windows of one split: training ones start every eighth of a window, held-out ones every half."""
    classes, held = classes_of(segments), held_out_blocks(segments)
    stride = max(1, window_size // (2 if held_out else 8))
    starts, labels, owners = [], [], []
    for number, segment in enumerate(segments):
        if (segment.block in held) is held_out and segment.rows >= window_size:
            own = np.arange(segment.first, segment.first + segment.rows - window_size + 1, stride)
            starts.append(own)
            labels.append(np.full(len(own), classes.index(segment.label)))
            owners.append(np.full(len(own), number))
    if not starts:
        raise WorkloadError(
            f"--data: no {'held-out' if held_out else 'training'} block has {window_size} rows in a row with one label;"
            " set a smaller window_size, or give more blocks"
        )
    joined = [torch.from_numpy(np.concatenate(parts).astype(np.int64)) for parts in (starts, labels, owners)]
    return Windows(*joined)


def training_rows(segments: Sequence[Segment], total: int) -> Tensor:
    """bool [rows]: whether a row belongs to a training block."""
    held = held_out_blocks(segments)
    inside = torch.zeros(total, dtype=torch.bool)
    for segment in segments:
        inside[segment.first : segment.first + segment.rows] = segment.block not in held
    return inside


def downsample(rows: Tensor, by: int) -> Tensor:
    """Mean of every `by` rows in turn, a rest left out: [N, C] -> [N // by, C]."""
    whole = len(rows) // by * by
    return rows[:whole].unflatten(0, (-1, by)).mean(1) if by > 1 else rows
