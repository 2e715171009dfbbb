"""What people type, turned into values: durations, sizes, counts, KEY=VALUE. A refusal names the option, the
rule, and what is known."""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import StrEnum
from typing import TypeVar

from tuner.contract.base import Scalar, parse
from tuner.contract.config import RunConfig
from tuner.contract.errors import ConfigError
from tuner.contract.given import LONGEST_S, unfit

_Choice = TypeVar("_Choice", bound=StrEnum)
_DURATIONS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_SIZES = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}
MOST_BYTES = 1 << 50


def seconds(text: str, option: str) -> float:
    """`90s`, `10m`, `2h`, `30d`, or plain seconds. Raises ConfigError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smhd]?)\s*", text.lower())
    value = float(match[1]) * _DURATIONS[match[2] or "s"] if match else 0.0
    if not 0 < value <= LONGEST_S:
        most = f"a duration above zero and up to {LONGEST_S / 86400:.0f}d is expected, such as 90s, 10m or 2h"
        raise ConfigError(f"{option}: {most} (got {_short(text)})")
    return value


def count(text: str, most: int) -> int | None:
    """A whole number from 1 to `most`, in plain digits; None for anything else."""
    if not re.fullmatch(r"[0-9]{1,19}", text.strip()):
        return None
    value = int(text)
    return value if 1 <= value <= most else None


def rechecked(config: RunConfig, option: str) -> RunConfig:
    """`config` held against its own rules again after an option has changed it. Raises ConfigError."""
    return parse(RunConfig, config.model_dump(mode="json"), option)


def size_bytes(text: str, option: str) -> int:
    """`300MiB`, `4GiB`, `2GB`, or plain bytes. Raises ConfigError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]?i?b?)\s*", text.lower())
    unit = _SIZES.get(match[2]) if match else None
    value = float(match[1]) * unit if match and unit else 0.0
    if not 1 <= value <= MOST_BYTES:
        raise ConfigError(
            f"{option}: a size above zero, and below a million GiB, is expected, such as 300MiB or 4GiB "
            f"(got {_short(text)})"
        )
    return int(value)


def assignments(items: Sequence[str], option: str) -> dict[str, Scalar]:
    """`KEY=VALUE` items as a mapping; values are read as YAML scalars, so `3e-4` is a number. Raises ConfigError."""
    from tuner.contract.documents import read_mapping

    found: dict[str, Scalar] = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"{option}: KEY=VALUE is expected (got {_short(item)})")
        scalar = read_mapping(f"value: {value}", option)["value"] if value.strip() else ""
        if not isinstance(scalar, str | int | float | bool | None):
            raise ConfigError(f"{option}: {_short(key.strip())}: one plain value is expected (got {_short(value)})")
        if why := unfit(scalar):
            raise ConfigError(f"{option}: {_short(key.strip())}: {why} (got {_short(value)})")
        found[key.strip()] = scalar
    return found


def choice(cls: type[_Choice], text: str, option: str) -> _Choice:
    """The member called `text`. Raises ConfigError naming the known ones."""
    try:
        return cls(text)
    except ValueError:
        known = ", ".join(member.value for member in cls)
        raise ConfigError(f"{option}: unknown value {_short(text)}; known: {known}") from None


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")
