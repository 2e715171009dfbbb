"""What is made once and kept: all pictures as bytes, all prompts as tokens. Training then only indexes tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from tuner.contract.errors import WorkloadError
from tuner.contract.workload import Progress, Split
from tuner.prepared import ensure
from tuner.readers.pictures import refuse_equal

from .data import Item, Source
from .tokens import PromptTokenizer, TokenSpec

CODE_VERSION = 1
"""Raised whenever the same data would give other pictures or tokens."""
WORKLOAD = "sd_kanji"
_SPLITS: tuple[Split, Split] = ("train", "valid")
_REPORT_EVERY = 50


@dataclass(frozen=True)
class Side:
    """One side of the split; row i of everything belongs to the same picture."""

    pictures: Tensor
    """uint8 [N, channels, size, size], mapped from disk: pages are read when they are asked for."""
    tokens: Tensor
    """int64 [N, length]"""
    names: Sequence[str]
    texts: Sequence[str]


@dataclass(frozen=True)
class Prepared:
    train: Side
    valid: Side
    mean: Tensor
    """float32 [channels, size, size] in [-1, 1]: the mean training picture."""

    def side(self, split: Split) -> Side:
        return self.train if split == "train" else self.valid


class PromptPictures(Dataset[Mapping[str, Tensor]]):
    """Pictures and tokens in memory; an item is a view, nothing is copied before batches are stacked."""

    def __init__(self, side: Side) -> None:
        self._pictures, self._tokens = side.pictures, side.tokens

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> Mapping[str, Tensor]:
        """{"picture": uint8 [channels, size, size], "tokens": int64 [length]}"""
        return {"picture": self._pictures[index], "tokens": self._tokens[index]}


def prepare(cache_dir: Path, source: Source, size: int, spec: TokenSpec, progress: Progress) -> Prepared:
    """Load everything, making first what is missing. Raises WorkloadError: data, disk, folder."""
    for remark in source.remarks:
        progress(0, 0, remark)
    about = {"code": CODE_VERSION, "data": source.digest()}
    count = sum(source.counts)
    pictures = ensure(
        cache_dir, WORKLOAD, "pictures", {**about, "size": size},
        lambda folder: _make_pictures(folder, source, size, progress),
        need_bytes=count * source.channels * size**2,
    )  # fmt: skip
    tokens = ensure(
        cache_dir, WORKLOAD, "tokens", {**about, **spec.about()},
        lambda folder: _make_tokens(folder, source, spec, progress),
        need_bytes=count * (spec.length * 8 + 512),
    )  # fmt: skip
    return _load(pictures, tokens)


def to_float(pictures: Tensor) -> Tensor:
    """uint8 0..255 [N, 1 or 3, s, s] -> float32 -1..1 [N, 3, s, s]; greys become three equal channels."""
    return (pictures.float() / 127.5 - 1).expand(-1, 3, -1, -1)


def _split(source: Source) -> dict[Split, list[Item]]:
    items = source.items()
    return {"train": [item for item in items if not item.held], "valid": [item for item in items if item.held]}


def _make_pictures(folder: Path, source: Source, size: int, progress: Progress) -> None:
    done, total = 0, sum(source.counts)
    for split, items in _split(source).items():
        shape = (len(items), source.channels, size, size)
        into = np.lib.format.open_memmap(_file(folder, split), mode="w+", dtype=np.uint8, shape=shape)
        sums = np.zeros(shape[1:])
        for index, item in enumerate(items):
            into[index] = source.picture(item, size)
            sums += into[index]
            done += 1
            if done % _REPORT_EVERY == 0 or done == total:
                progress(done, total, f"pictures {size} px")
        into.flush()
        if split == "train":
            refuse_equal(into, "--data")
        np.save(folder / f"mean-{split}.npy", (sums / len(items)).astype(np.float32))


def _make_tokens(folder: Path, source: Source, spec: TokenSpec, progress: Progress) -> None:
    tokenizer, total = PromptTokenizer(spec), sum(source.counts)
    progress(0, total, "prompts")
    about: dict[str, dict[str, list[str]]] = {}
    for split, items in _split(source).items():
        texts = [item.text for item in items]
        np.save(_file(folder, split), tokenizer(texts).numpy())
        about[split] = {"names": [item.name for item in items], "texts": texts}
    (folder / "texts.json").write_text(json.dumps(about), encoding="utf-8")
    progress(total, total, "prompts")


def _load(pictures: Path, tokens: Path) -> Prepared:
    try:
        about = json.loads((tokens / "texts.json").read_text(encoding="utf-8"))
        sides = [
            Side(_mapped(_file(pictures, split)), _mapped(_file(tokens, split)), **about[split]) for split in _SPLITS
        ]
        mean = torch.from_numpy(np.load(pictures / "mean-train.npy")) / 127.5 - 1
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WorkloadError(
            f"the prepared data in {pictures} or {tokens} are damaged ({error}); remove them with"
            f" `tuner cache clear --workload {WORKLOAD}` and run again"
        ) from None
    return Prepared(sides[0], sides[1], mean)


def _mapped(path: Path) -> Tensor:
    """The array in `path`, read from disk as it is used; changes would stay in this process."""
    return torch.from_numpy(np.load(path, mmap_mode="c"))


def _file(folder: Path, split: Split) -> Path:
    return folder / f"{split}.npy"
