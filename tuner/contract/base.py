"""The frozen base of every type here, and the one way from untyped data to a typed value.

Values are validated strictly and through JSON, so an enum is written as its string, a tuple as a list,
and `"3e-4"` is never a number.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

from tuner.contract.errors import ConfigError

Scalar = str | int | float | bool | None
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]{1,128}$")]

_Model = TypeVar("_Model", bound="Frozen")


class Frozen(BaseModel):
    """Immutable, closed (unknown keys are errors) and strict; JSON keeps NaN and infinities as constants."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, ser_json_inf_nan="constants", use_attribute_docstrings=True
    )

    def to_json(self) -> str:
        return self.model_dump_json()

    def digest(self) -> str:
        """Twelve hex digits naming this value: equal values have equal digests."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def parse_json(cls: type[_Model], text: str | bytes, source: str = "input") -> _Model:
    """Validate JSON `text` as `cls`.

    Raises ConfigError: one line per broken rule, each with its path, the rule, and the value got.
    """
    try:
        return cls.model_validate_json(text)
    except ValidationError as error:
        raise ConfigError(describe_validation(error, source)) from None


def parse(cls: type[_Model], data: Mapping[str, Any], source: str = "input") -> _Model:
    """Validate plain data (as read from YAML) as `cls`; see `parse_json`."""
    try:
        text = json.dumps(data)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{source}: only plain values are allowed: {error}") from None
    return parse_json(cls, text, source)


def describe_validation(error: ValidationError, source: str) -> str:
    lines = []
    for item in error.errors(include_url=False):
        path = ".".join(str(part) for part in item["loc"]) or "(top)"
        rule = str(item["msg"]).removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            rule = "this key is not known here; remove it or check its spelling"
        got = _short(item.get("input"))
        lines.append(f"{source}: {path}: {rule} (got {got})")
    return "\n".join(lines)


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 120 else text[:117] + "..."
