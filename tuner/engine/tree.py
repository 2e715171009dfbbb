"""A nested state of tensors and plain values <-> named tensors and JSON. Nothing here can run code when read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

TENSOR, ITEMS, TUPLE = "$tensor", "$items", "$tuple"
"""Marks in the JSON: a tensor by name, a mapping whose keys are no strings, a tuple."""


def take_apart(state: Any) -> tuple[dict[str, Tensor], Any]:
    """Tensors (contiguous, each storage once) by name, and JSON that names them. Raises TypeError for other objects."""
    tensors: dict[str, Tensor] = {}
    seen: dict[tuple[Any, ...], str] = {}

    def walk(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            return {TENSOR: _keep(value.detach(), path, tensors, seen)}
        if isinstance(value, dict):
            if all(isinstance(key, str) and not key.startswith("$") for key in value):
                return {key: walk(item, f"{path}/{key}") for key, item in value.items()}
            return {ITEMS: [[key, walk(item, f"{path}/{key}")] for key, item in value.items()]}
        if isinstance(value, list | tuple):
            items = [walk(item, f"{path}/{index}") for index, item in enumerate(value)]
            return {TUPLE: items} if isinstance(value, tuple) else items
        if value is None or isinstance(value, str | int | float | bool):
            return value
        raise TypeError(f"a checkpoint holds tensors and plain values only; {path} is a {type(value).__name__}")

    plain = walk(state, "")
    return tensors, plain


def put_together(tensors: dict[str, Tensor], plain: Any) -> Any:
    """The inverse of `take_apart`. Raises KeyError when a tensor is missing."""
    if isinstance(plain, list):
        return [put_together(tensors, item) for item in plain]
    if not isinstance(plain, dict):
        return plain
    if TENSOR in plain:
        return tensors[plain[TENSOR]]
    if ITEMS in plain:
        return {key: put_together(tensors, item) for key, item in plain[ITEMS]}
    if TUPLE in plain:
        return tuple(put_together(tensors, item) for item in plain[TUPLE])
    return {key: put_together(tensors, item) for key, item in plain.items()}


def _keep(value: Tensor, path: str, tensors: dict[str, Tensor], seen: dict[tuple[Any, ...], str]) -> str:
    """The name under which `value` is kept; tied weights are kept once."""
    identity = (value.device, value.data_ptr(), tuple(value.shape), value.stride(), value.dtype)
    if value.numel() and identity in seen:
        return seen[identity]
    name = path.lstrip("/")
    seen[identity] = name
    own = value.untyped_storage().nbytes() == value.numel() * value.element_size()
    tensors[name] = value.contiguous() if own else value.clone(memory_format=torch.contiguous_format)
    return name
