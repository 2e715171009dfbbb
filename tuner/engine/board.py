"""TensorBoard event files of a production run (the package `tensorboard` is optional), counted in samples.

A resumed run tells TensorBoard to forget what it will write again, so nothing is drawn twice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from tuner.contract.errors import ConfigError
from tuner.contract.probe import Event, TrainEvent

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch.utils.tensorboard import SummaryWriter

FOLDER = "tensorboard"
PICTURES = frozenset({".png", ".jpg", ".jpeg", ".webp"})
MOST_PICTURES = 8
"""Of one sampling."""
WIDEST = 1024
"""Pixels; a larger picture is shown smaller."""
FLUSH_S = 10
"""So much of what was written may be lost by a kill; a resume writes it again."""


class Board:
    """The event files in `<out>/tensorboard`. Raises ConfigError when the package is missing, OSError when they
    cannot be written."""

    def __init__(self, out: Path, resumed_from: int) -> None:
        self._folder = out / FOLDER
        self._forget_from = resumed_from + 1
        _writer_class()

    @cached_property
    def _writer(self) -> SummaryWriter:
        """Opened at the first word: it starts a thread, and the loader's workers are forked before that."""
        return _writer_class()(str(self._folder), purge_step=self._forget_from, flush_secs=FLUSH_S)

    def listen(self, event: Event) -> None:
        if isinstance(event, TrainEvent):
            speed = {"samples_per_s": event.samples_per_s, "data_wait": event.data_wait}
            peak = {"peak_mib": event.peak_bytes / (1 << 20)}
            self._scalars("speed", event.samples, speed | peak)
            self._scalars("loss", event.samples, event.losses)
            self._scalars("optimizer", event.samples, {"lr": event.lr})

    def figures(self, samples: int, found: Mapping[str, float]) -> None:
        """Validation figures."""
        self._scalars("validation", samples, found)
        self._writer.flush()

    def show(self, samples: int, files: Sequence[Path]) -> None:
        """Sample pictures, by their name; texts as text; other files are left where they are."""
        pictures = [path for path in files if path.suffix.lower() in PICTURES]
        for path in pictures[:MOST_PICTURES]:
            self._writer.add_image(f"samples/{path.stem}", _pixels(path), samples, dataformats="HWC")
        for path in [path for path in files if path.suffix.lower() == ".txt"][:MOST_PICTURES]:
            self._writer.add_text(f"samples/{path.stem}", path.read_text(encoding="utf-8", errors="replace"), samples)
        self._writer.flush()

    def close(self) -> None:
        if "_writer" in vars(self):
            self._writer.close()

    def _scalars(self, group: str, samples: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            if math.isfinite(value):
                self._writer.add_scalar(f"{group}/{name}", value, samples)


def _writer_class() -> type[SummaryWriter]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            f"--tensorboard: the package tensorboard cannot be imported ({error}); install it: pip install tensorboard"
        ) from None
    return SummaryWriter


def _pixels(path: Path) -> NDArray[np.uint8]:
    """[height, width, 3]"""
    import numpy as np
    from PIL import Image

    with Image.open(path) as picture:
        plain = picture.convert("RGB")
    plain.thumbnail((WIDEST, WIDEST))
    return np.asarray(plain)
