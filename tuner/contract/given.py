"""The base of what people and files set, as against what is measured: every number in it is finite, and of a size that
arithmetic can stand."""

from __future__ import annotations

import math
from typing import Any

from pydantic import field_validator

from tuner.contract.base import Frozen

LARGEST = (1 << 63) - 1
LONGEST_S = 366 * 86400.0
"""Longest duration that may be asked for."""


class Given(Frozen):
    """A closed, frozen type whose numbers are checked, wherever they stand in it. (Types within it check their own.)"""

    @field_validator("*")
    @classmethod
    def _can_be_counted_with(cls, value: Any) -> Any:
        if why := unfit(value):
            raise ValueError(why)
        return value


def unfit(value: Any) -> str:
    """Why a value that was given cannot be used, in words; empty = it can. Looks into lists and mappings."""
    if isinstance(value, float) and not math.isfinite(value):
        return "a finite number is expected"
    if isinstance(value, int) and abs(value) > LARGEST:
        return "an integer of at most 63 bits is expected"
    if isinstance(value, dict):
        return next((why for item in value.values() if (why := unfit(item))), "")
    if isinstance(value, list | tuple):
        return next((why for item in value if (why := unfit(item))), "")
    return ""
