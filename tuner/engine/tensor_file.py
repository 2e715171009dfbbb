"""Named tensors -> a safetensors file, hashed while it is written and flushed; and back.

The digest is that of the bytes that were meant, not of what the disk made of them. Writing holds Python's lock only
between pieces, so that another thread can write while the training goes on. The format: 8 bytes with the length of the
header (little endian), the header in JSON (dtype, shape and place of each tensor), then the data without gaps
(https://huggingface.co/docs/safetensors). Reading is the safetensors package's, which checks the header.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_PIECE = 8 << 20
"""Bytes written and hashed at a time."""


@dataclass(frozen=True)
class Written:
    """What a file must be found to be."""

    sha256: str
    bytes: int


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> Written:
    """Write a new file and flush it to the disk. Raises TypeError for a dtype the format has no name for, OSError."""
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # so that all data are aligned
    return write_bytes(path, _pieces([*names], tensors))


def write_bytes(path: Path, pieces: Iterator[bytes | memoryview]) -> Written:
    """Write a new file from its pieces and flush it to the disk. Raises OSError."""
    digest, size = hashlib.sha256(), 0
    with path.open("xb", buffering=0) as target:
        for piece in pieces:
            digest.update(piece)
            size += len(piece)
            rest = memoryview(piece)
            while rest:
                rest = rest[target.write(rest) :]
        os.fsync(target.fileno())
    return Written(digest.hexdigest(), size)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors on the CPU with memory of their own: the package's would be views into the file, and hold it open."""
    from safetensors.torch import load_file

    return {name: value.clone() for name, value in load_file(path).items()}


def _pieces(names: Sequence[str], tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    yield _header(names, tensors)
    for name in names:
        data = _bytes_of(tensors[name]).numpy().data
        for start in range(0, len(data), _PIECE):
            yield data[start : start + _PIECE]


def _header(names: Sequence[str], tensors: Mapping[str, Tensor]) -> bytes:
    table: dict[str, object] = {}
    place = 0
    for name in names:
        value = tensors[name]
        if value.dtype not in DTYPES:
            raise TypeError(f"a checkpoint cannot hold {value.dtype}; {name} is of that type")
        end = place + value.numel() * value.element_size()
        table[name] = {"dtype": DTYPES[value.dtype], "shape": list(value.shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes_of(value: Tensor) -> Tensor:
    return value.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
