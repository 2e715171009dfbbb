"""What people type, turned into values: durations, sizes, KEY=VALUE. A refusal names the option and what is known."""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import StrEnum
from typing import TypeVar

from tuner.contract.base import Scalar
from tuner.contract.errors import ConfigError

_Choice = TypeVar("_Choice", bound=StrEnum)
_DURATIONS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_SIZES = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}


def seconds(text: str, option: str) -> float:
    """`90s`, `10m`, `2h`, `30d`, or plain seconds. Raises ConfigError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smhd]?)\s*", text.lower())
    value = float(match[1]) * _DURATIONS[match[2] or "s"] if match else 0.0
    if value <= 0:
        raise ConfigError(f"{option}: a duration above zero is expected, such as 90s, 10m or 2h (got {text!r})")
    return value


def size_bytes(text: str, option: str) -> int:
    """`300MiB`, `4GiB`, `2GB`, or plain bytes. Raises ConfigError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]?i?b?)\s*", text.lower())
    unit = _SIZES.get(match[2]) if match else None
    value = int(float(match[1]) * unit) if match and unit else 0
    if value <= 0:
        raise ConfigError(f"{option}: a size above zero is expected, such as 300MiB or 4GiB (got {text!r})")
    return value


def assignments(items: Sequence[str], option: str) -> dict[str, Scalar]:
    """`KEY=VALUE` items as a mapping; values are read as YAML scalars, so `3e-4` is a number. Raises ConfigError."""
    from tuner.contract.documents import read_mapping

    found: dict[str, Scalar] = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"{option}: KEY=VALUE is expected (got {item!r})")
        scalar = read_mapping(f"value: {value}", option)["value"] if value.strip() else ""
        if isinstance(scalar, dict | list):
            raise ConfigError(f"{option}: {key.strip()}: one plain value is expected (got {value!r})")
        found[key.strip()] = scalar
    return found


def choice(cls: type[_Choice], text: str, option: str) -> _Choice:
    """The member called `text`. Raises ConfigError naming the known ones."""
    try:
        return cls(text)
    except ValueError:
        known = ", ".join(member.value for member in cls)
        raise ConfigError(f"{option}: unknown value {text!r}; known: {known}") from None
