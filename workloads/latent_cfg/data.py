"""Labelled pictures: motion spectrograms of ten people, or the user's own class folders. Knows nothing of latents.

The default data are the gyroscope recordings of a smart watch that the package `seglearn` ships (BSD licence; Burns et
al., Shoulder physiotherapy exercise recognition, 2018, arXiv:1802.01489). Windows overlap, so a random split would put
nearly the same picture on both sides; whole recordings are held out instead.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tuner.contract.base import printable
from tuner.contract.errors import WorkloadError
from tuner.readers.listing import Listing, content_digest, folders_in, listed, passed_over
from tuner.readers.pictures import SUFFIXES as PICTURES
from tuner.readers.pictures import read_picture, refuse_equal

Report = Callable[[int, int], None]
"""(done, total) pictures."""

WATCH_FILE = Path("data/watch_dataset.npy")
WATCH_SHA256 = "eb122f23cdf06ef6bd6c6c5312958ec5cf9d038e2e6d457b8081662c75a42537"
"""The file in seglearn 1.2.5. It is a pickle, and unpickling runs whatever is in it: only this very file is opened."""

PEOPLE, EXERCISES = 10, 7
WINDOW, STRIDE, RATE_HZ = 500, 55, 50
TRAIN_WINDOWS, VALID_WINDOWS = 135, 20
"""Windows of each person; 10 x (135 + 20) = 1,550 pictures."""
FRAME, TAPERS, TOP_HZ = 64, 3, 12.5
FLOOR_DB, CEILING_DB = -28.0, 23.0
VALID_SHARE = 0.1
"""Share of the user's own pictures of each class that is held out."""


@dataclass(frozen=True)
class Labelled:
    """Pictures (uint8 [N, 3, size, size]) or latents (float32 [N, 4, s, s]) of both splits, and int64 labels [N]."""

    train: Tensor
    train_labels: Tensor
    valid: Tensor
    valid_labels: Tensor


class PictureSource(Protocol):
    """Where pictures come from. `classes` and `counts` are cheap; only `load` reads the data."""

    @property
    def remarks(self) -> tuple[str, ...]:
        """What the user should know of how the data were understood."""
        ...

    @property
    def classes(self) -> tuple[str, ...]: ...

    @property
    def counts(self) -> tuple[int, int]:
        """Pictures for training and for validation."""
        ...

    def digest(self) -> str: ...

    def load(self, size: int, report: Report) -> Labelled: ...


# --- the watch recordings -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Window:
    person: int
    recording: int
    start: int
    """First sample within the recording; it ends 500 samples later."""


class WatchRecordings:
    """Ten people, seven shoulder exercises, both arms: 140 recordings at 50 Hz."""

    remarks: tuple[str, ...] = ()
    classes = tuple(f"person_{number:02d}" for number in range(1, PEOPLE + 1))
    counts = (PEOPLE * TRAIN_WINDOWS, PEOPLE * VALID_WINDOWS)

    def digest(self) -> str:
        return hashlib.sha256(_watch_bytes()).hexdigest()

    def load(self, size: int, report: Report) -> Labelled:
        recordings = read_watch()
        gyroscope = [torch.from_numpy(item[:, 3:6].astype(np.float32)) for item in recordings.motion]
        train, valid = split_windows(recordings)
        total = len(train) + len(valid)
        return Labelled(
            train=_spectrograms(gyroscope, train, size, lambda done: report(done, total)),
            train_labels=torch.tensor([window.person for window in train]),
            valid=_spectrograms(gyroscope, valid, size, lambda done: report(len(train) + done, total)),
            valid_labels=torch.tensor([window.person for window in valid]),
        )


@dataclass(frozen=True)
class Recordings:
    motion: list[Any]
    """Per recording a float64 array [samples, 6]: acceleration x, y, z, then rotation x, y, z."""
    person: list[int]
    """Counted from 0."""
    exercise: list[int]
    side: list[int]


def read_watch() -> Recordings:
    """Raises WorkloadError when seglearn is missing or holds another file than the known one."""
    raw = np.load(io.BytesIO(_watch_bytes()), allow_pickle=True).item()
    return Recordings(
        motion=list(raw["X"]),
        person=[int(value) - 1 for value in raw["subject"]],
        exercise=[int(value) for value in raw["y"]],
        side=[int(value) for value in raw["side"]],
    )


def _watch_bytes() -> bytes:
    install = "install it with `pip install --no-deps seglearn==1.2.5`, or give your own class folders: --data FOLDER"
    spec = importlib.util.find_spec("seglearn")  # found, not imported: its own imports need scikit-learn
    folders = spec.submodule_search_locations if spec else None
    if not folders:
        raise WorkloadError(f"the default data are in the package seglearn, which is not installed; {install}")
    path = Path(next(iter(folders))) / WATCH_FILE
    try:
        content = path.read_bytes()
    except OSError as error:
        raise WorkloadError(f"{path} cannot be read: {error.strerror}; {install}") from None
    if hashlib.sha256(content).hexdigest() != WATCH_SHA256:
        raise WorkloadError(f"{path} is not the file of seglearn 1.2.5, so it is not opened; {install}")
    return content


def split_windows(recordings: Recordings) -> tuple[list[Window], list[Window]]:
    """Windows for training and validation, ordered by person. No recording serves both.

    Each person gives up one recording of each arm, another exercise from person to person.
    """
    train: list[Window] = []
    valid: list[Window] = []
    for person in range(PEOPLE):
        mine = [index for index, owner in enumerate(recordings.person) if owner == person]
        held = {(0, (person + 1) % EXERCISES), (1, (person + 4) % EXERCISES)}
        is_held = {index: (recordings.side[index], recordings.exercise[index]) in held for index in mine}
        for kept, windows, count in ((False, train, TRAIN_WINDOWS), (True, valid, VALID_WINDOWS)):
            chosen = [index for index in mine if is_held[index] is kept]
            windows += _evenly([w for index in chosen for w in _windows(person, index, recordings)], count)
    return train, valid


def _windows(person: int, recording: int, recordings: Recordings) -> list[Window]:
    last = len(recordings.motion[recording]) - WINDOW
    return [Window(person, recording, start) for start in range(0, last + 1, STRIDE)]


def _evenly(windows: Sequence[Window], count: int) -> list[Window]:
    assert len(windows) >= count
    return [windows[round(index)] for index in np.linspace(0, len(windows) - 1, count)]


def _spectrograms(
    motion: Sequence[Tensor], windows: Sequence[Window], size: int, report: Callable[[int], None]
) -> Tensor:
    basis = _taper_basis(size)
    chunk = max(1, 4096 // size)
    pictures = torch.empty(len(windows), 3, size, size, dtype=torch.uint8)
    for start in range(0, len(windows), chunk):
        some = windows[start : start + chunk]
        signals = torch.stack([motion[w.recording][w.start : w.start + WINDOW].T for w in some])
        pictures[start : start + len(some)] = spectrogram(signals, size, basis)
        report(start + len(some))
    return pictures


def spectrogram(signals: Tensor, size: int, basis: Tensor | None = None) -> Tensor:
    """Multitaper spectrograms of three axes as colours: float32 [B, 3, 500] -> uint8 [B, 3, size, size].

    Power of 64-sample frames under three sine tapers (Riedel and Sidorenko, IEEE Trans. Signal Processing 43, 1995),
    averaged, in dB between a floor and a ceiling; time runs right, frequency up from 0 to 12.5 Hz. A larger `size`
    shows the same picture on a finer grid.
    """
    basis = _taper_basis(size) if basis is None else basis
    padded = torch.nn.functional.pad(signals, (FRAME // 2, FRAME // 2), mode="reflect")
    starts = torch.linspace(0, WINDOW, size).round().long()
    frames = padded.unfold(2, FRAME, 1)[:, :, starts]
    waves = (frames @ basis).unflatten(-1, (2 * TAPERS, size))
    decibel = 10 * torch.log10(waves.square().sum(-2) / TAPERS + 1e-8)
    shade = (decibel - FLOOR_DB) / (CEILING_DB - FLOOR_DB)
    return (shade.clamp(0, 1) * 255).round().to(torch.uint8).transpose(2, 3).flip(2)


def _taper_basis(size: int) -> Tensor:
    """Cosines and sines of `size` frequencies under each taper: float32 [64, 2 * tapers * size]."""
    n = torch.arange(1, FRAME + 1, dtype=torch.float64)[:, None]
    angle = 2 * math.pi * torch.arange(size, dtype=torch.float64)[None] * (TOP_HZ / size / RATE_HZ) * n
    parts = []
    for order in range(1, TAPERS + 1):
        taper = torch.sin(math.pi * order * n / (FRAME + 1)) * math.sqrt(2 / (FRAME + 1))
        parts += [taper * torch.cos(angle), taper * torch.sin(angle)]
    return torch.cat(parts, dim=1).float()


# --- the user's own pictures ----------------------------------------------------------------------------------------


class ClassFolders:
    """`FOLDER/NAME/*.jpg|png|...`: one class a subfolder, classes in sorted order.

    The last tenth of each class by file name is held out (at least one picture): neighbours in name are often cut
    from one recording, so a random choice would leak.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        found = _class_listings(folder)
        self.files = {name: listing.files for name, listing in found.items()}
        self.classes = tuple(self.files)
        self._others = sum((listing.others for listing in found.values()), Counter[str]())

    @property
    def remarks(self) -> tuple[str, ...]:
        left = passed_over(self._others, PICTURES)
        return (left,) if left else ()

    @property
    def counts(self) -> tuple[int, int]:
        held = sum(held_out(len(files)) for files in self.files.values())
        return sum(len(files) for files in self.files.values()) - held, held

    def digest(self) -> str:
        return content_digest(self.folder, [file for files in self.files.values() for file in files])

    def load(self, size: int, report: Report) -> Labelled:
        total = sum(self.counts)
        self._refuse_too_many(total, size)
        pictures = torch.empty(total, 3, size, size, dtype=torch.uint8)
        labels: list[int] = []
        held: list[bool] = []
        for label, files in enumerate(self.files.values()):
            for position, file in enumerate(files):
                # scaled whole, not cropped: both axes of a spectrogram carry meaning
                pictures[len(labels)] = torch.from_numpy(read_picture(file, size).copy())
                labels.append(label)
                held.append(position >= len(files) - held_out(len(files)))
                report(len(labels), total)
        number, is_held = torch.tensor(labels), torch.tensor(held)
        refuse_equal(pictures[~is_held].numpy(), f"--data {printable(self.folder)}")
        return Labelled(pictures[~is_held], number[~is_held], pictures[is_held], number[is_held])

    def _refuse_too_many(self, total: int, size: int) -> None:
        need = 2 * total * 3 * size * size
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if need > memory * 0.5:
            raise WorkloadError(
                f"--data {self.folder}: encoding {total} pictures of {size} px takes {need / 2**30:.1f} GiB of memory;"
                f" this machine has {memory / 2**30:.1f} GiB; give fewer pictures"
            )


def _class_listings(folder: Path) -> dict[str, Listing]:
    layout = "expected class folders with pictures in them: NAME/*.jpg or NAME/*.png"
    if not folder.is_dir():
        why = "is not a folder" if folder.exists() else "does not exist"
        raise WorkloadError(f"--data {printable(folder)} {why}; {layout}")
    found = {item.name: listed(item, PICTURES) for item in folders_in(folder)}
    if len(found) < 2:
        raise WorkloadError(
            f"--data {printable(folder)}: at least 2 classes are needed, but got {len(found)}; {layout}"
        )
    for name, listing in found.items():
        if len(listing.files) < 2:
            left = passed_over(listing.others, PICTURES)
            raise WorkloadError(
                f"--data {printable(folder / name)}: a class needs at least 2 pictures, but got {len(listing.files)}"
                f"{f' ({left})' if left else ''}; {layout}"
            )
    return found


def held_out(count: int) -> int:
    """How many of a class's `count` pictures are for validation."""
    return max(1, round(count * VALID_SHARE))
