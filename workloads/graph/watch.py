"""The default data: motion of ten people doing seven shoulder exercises, recorded by a smart watch at 50 Hz.

It is a file of the package `seglearn` (BSD licence; Burns et al., Shoulder physiotherapy exercise recognition, 2018,
arXiv:1802.01489). Blocks are people, labels are exercises.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tuner.contract.errors import WorkloadError

from .data import Report, Segment, downsample

FILE = Path("data/watch_dataset.npy")
SHA256 = "eb122f23cdf06ef6bd6c6c5312958ec5cf9d038e2e6d457b8081662c75a42537"
"""Of the file in seglearn 1.2.5. A pickle runs whatever is in it: only this very file is opened."""
INSTALL = "install it with `pip install --no-deps seglearn==1.2.5`, or give your own table: --data FILE"


class WatchRecordings:
    """140 recordings: each of ten people did each of seven exercises with each arm."""

    label_text = "exercise"
    remarks: tuple[str, ...] = ()
    channels = (
        "acceleration_x",
        "acceleration_y",
        "acceleration_z",
        "rotation_x",
        "rotation_y",
        "rotation_z",
    )

    def __init__(self, downsample_by: int) -> None:
        self._by = downsample_by

    def segments(self) -> tuple[Segment, ...]:
        found, first = [], 0
        raw = _recordings()
        for number, motion in enumerate(raw["X"]):
            rows = len(motion) // self._by
            block, label = f"person_{int(raw['subject'][number]):02d}", raw["y_labels"][int(raw["y"][number])]
            found.append(Segment(block, str(label), first, rows, f"recording {number + 1}"))
            first += rows
        return tuple(found)

    def digest(self) -> str:
        return SHA256

    def need_bytes(self) -> int:
        return 12 << 20

    def load(self, report: Report) -> Tensor:
        parts = [downsample(torch.from_numpy(item.astype(np.float32)), self._by) for item in _recordings()["X"]]
        report(len(parts), len(parts))
        return torch.cat(parts)


@functools.cache
def _recordings() -> dict[str, Any]:
    """Raises WorkloadError when seglearn is missing or holds another file than the known one."""
    raw: dict[str, Any] = np.load(io.BytesIO(_content()), allow_pickle=True).item()
    return raw


def _content() -> bytes:
    spec = importlib.util.find_spec("seglearn")  # found, not imported: its own imports need scikit-learn
    folders = spec.submodule_search_locations if spec else None
    if not folders:
        raise WorkloadError(f"the default data are in the package seglearn, which is not installed; {INSTALL}")
    path = Path(next(iter(folders))) / FILE
    try:
        content = path.read_bytes()
    except OSError as error:
        raise WorkloadError(f"{path} cannot be read: {error.strerror}; {INSTALL}") from None
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise WorkloadError(f"{path} is not the file of seglearn 1.2.5, so it is not opened; {INSTALL}")
    return content
