"""The user's own latents: one file of tensors, `latents` [N, 4, s, s] and `labels` [N], as safetensors or npz.

Nothing is unpickled: an npz with Python objects in it is refused.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tuner.contract.errors import WorkloadError
from tuner.readers.listing import content_digest

from .data import Labelled, held_out

SUFFIXES = (".safetensors", ".npz")
KEYS = ("latents", "labels")
CHANNELS = 4
SIDES_ARE_MULTIPLES_OF = 4
"""The denoiser halves the latents twice."""
LAYOUT = "expected `latents`, floats [N, 4, s, s], and `labels`, whole numbers [N], in a .safetensors or .npz file"

_Read = TypeVar("_Read")


class LatentFile:
    """One class for each value of `labels`, in sorted order, named by that value.

    The last tenth of each class's rows is held out (at least one row), as with class folders: neighbours are often cut
    from one recording, so a random choice would leak.
    """

    remarks: tuple[str, ...] = ()

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.suffix.lower() not in SUFFIXES:
            raise WorkloadError(f"--data {path}: a file ending in {path.suffix or 'nothing'} is not known; {LAYOUT}")
        shapes = self._read(_shapes)
        for key in KEYS:
            if key not in shapes:
                raise self._wrong(f"there is no {key!r}; it holds {', '.join(sorted(shapes)) or 'nothing'}")
        self.size = self._checked_side(shapes["latents"])
        if shapes["labels"] != shapes["latents"][:1]:
            raise self._wrong(f"'labels' has shape {list(shapes['labels'])}, but 'latents' {list(shapes['latents'])}")

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(str(value) for value in self._values.tolist())

    @property
    def counts(self) -> tuple[int, int]:
        held = int(self._is_held.sum())
        return len(self._is_held) - held, held

    def digest(self) -> str:
        return content_digest(self.path.parent, [self.path])

    def load(self) -> Labelled:
        """Latents as the file has them, float32. Raises WorkloadError naming the first value that is not finite."""
        latents = self._read(lambda path: _tensor(path, "latents"))
        if not latents.is_floating_point():
            raise self._wrong(f"'latents' must be floats, got {latents.dtype}")
        latents = latents.float()
        broken = (~latents.isfinite()).nonzero()
        if len(broken):
            row, channel, y, x = broken[0].tolist()
            value = latents[row, channel, y, x].item()
            raise self._wrong(f"'latents' row {row}, channel {channel}, place ({y}, {x}) is {value}; mend or remove it")
        if bool((latents == latents[0]).all()):
            raise self._wrong("all 'latents' are the same, so nothing can be learnt of them")
        numbers, held = torch.searchsorted(self._values, self._labels), self._is_held
        return Labelled(latents[~held], numbers[~held], latents[held], numbers[held])

    @cached_property
    def _labels(self) -> Tensor:
        """int64 [N], as the file has them."""
        labels = self._read(lambda path: _tensor(path, "labels"))
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise self._wrong(f"'labels' must be whole numbers, got {labels.dtype}")
        labels = labels.long()
        values, counts = labels.unique(return_counts=True)
        if len(values) < 2:
            raise self._wrong(f"'labels' must name at least 2 classes, but there are {len(values)}")
        if int(counts.min()) < 2:
            alone = values[counts.argmin()]
            row = int((labels == alone).nonzero()[0])
            raise self._wrong(
                f"'labels' row {row} is the only one of class {int(alone)}; a class needs at least 2 rows"
            )
        return labels

    @property
    def _values(self) -> Tensor:
        """The distinct labels, ascending."""
        values: Tensor = self._labels.unique()
        return values

    @cached_property
    def _is_held(self) -> Tensor:
        held = torch.zeros(len(self._labels), dtype=torch.bool)
        for value in self._values:
            rows = (self._labels == value).nonzero()[:, 0]
            held[rows[len(rows) - held_out(len(rows)) :]] = True
        return held

    def _checked_side(self, shape: tuple[int, ...]) -> int:
        if len(shape) != 4 or shape[1] != CHANNELS or shape[2] != shape[3]:
            raise self._wrong(f"'latents' has shape {list(shape)}")
        if shape[2] < 1 or shape[2] % SIDES_ARE_MULTIPLES_OF:
            raise self._wrong(f"'latents' has sides of {shape[2]}, which is no multiple of {SIDES_ARE_MULTIPLES_OF}")
        return shape[2]

    def _read(self, how: Callable[[Path], _Read]) -> _Read:
        try:
            return how(self.path)
        except OSError as error:
            why = error.strerror or str(error)
        except (SafetensorError, zipfile.BadZipFile, zlib.error, ValueError, EOFError) as error:
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WorkloadError(f"--data {self.path} cannot be read ({why}); {LAYOUT}")

    def _wrong(self, what: str) -> WorkloadError:
        return WorkloadError(f"--data {self.path}: {what}; {LAYOUT}")


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every array in the file; the arrays themselves are not read."""
    if path.suffix.lower() == ".safetensors":
        with safe_open(path, "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith(".npy")]
        return {name.removesuffix(".npy"): _npy_shape(archive, name) for name in names}


def _npy_shape(archive: zipfile.ZipFile, name: str) -> tuple[int, ...]:
    with archive.open(name) as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
    if dtype.hasobject:
        raise ValueError(f"{name.removesuffix('.npy')!r} holds Python objects, which are never opened")
    return tuple(shape)


def _tensor(path: Path, key: str) -> Tensor:
    if path.suffix.lower() == ".safetensors":
        with safe_open(path, "pt") as file:
            found: Tensor = file.get_tensor(key)
            return found
    with np.load(path, allow_pickle=False) as archive:
        array = archive[key]
    if array.dtype.kind not in "fiub":
        raise ValueError(f"{key!r} holds {array.dtype}, no numbers")
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
