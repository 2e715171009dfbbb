"""The frozen base of every type here, and the one way from untyped data to a typed value.

Values are validated strictly, in Python as in YAML and JSON: an enum may be written as its string and a tuple as a
list, and `"3e-4"` is never a number.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    GetCoreSchemaHandler,
    StringConstraints,
    ValidationError,
)
from pydantic_core import core_schema

from tuner.contract.errors import ConfigError

Scalar = str | int | float | bool | None
NAME_PATTERN = r"^[A-Za-z0-9._-]{1,128}$"
Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]

_Model = TypeVar("_Model", bound="Frozen")
_SURROGATES = re.compile("[\ud800-\udfff]")


def printable(text: str | os.PathLike[str]) -> str:
    """`text` with what UTF-8 cannot hold written out: a stray byte of a file's name as \\xe9, half a character as
    \\ud83d."""

    def written_out(found: re.Match[str]) -> str:
        point = ord(found[0])
        return f"\\x{point - 0xDC00:02x}" if 0xDC80 <= point < 0xDD00 else f"\\u{point:04x}"

    return _SURROGATES.sub(written_out, os.fspath(text))


Words = Annotated[str, AfterValidator(printable)]
"""Text for people, which may quote their data: what no JSON could carry is written out."""


_PLAIN_KEYS = frozenset({"metadata", "serialization", "cls", "default", "function", "members"})
"""Parts of a schema in which no other schema lies."""


def _as_in_yaml(schema: Any, of: type[BaseModel], handler: GetCoreSchemaHandler) -> Any:
    """The schema `of` a type that takes an enum's value for the enum and a list for a tuple in Python too, as it does
    from JSON. Other types within it have seen to their own schemas."""
    if isinstance(schema, list | tuple):
        return type(schema)(_as_in_yaml(item, of, handler) for item in schema)
    if not isinstance(schema, dict):
        return schema
    kind = schema.get("type")
    if kind == "definition-ref":  # an enum lies among the definitions, once for all its fields
        definition = cast(dict[str, Any], handler.resolve_ref_schema(cast(Any, schema)))
        if definition["type"] == "enum":
            definition["strict"] = False
        return schema
    if kind == "json-or-python" or (kind == "model" and schema["cls"] is not of):
        return schema
    found = {key: v if key in _PLAIN_KEYS else _as_in_yaml(v, of, handler) for key, v in schema.items()}
    if kind == "enum":
        return {**found, "strict": False}
    if kind == "tuple":
        listed = core_schema.no_info_before_validator_function(_tuple_of_list, cast(Any, found))
        return core_schema.json_or_python_schema(cast(Any, found), listed)
    return found


def _tuple_of_list(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


MOST_LINES = 20
"""Broken rules that are told of one document."""


class Frozen(BaseModel):
    """Immutable, closed (unknown keys are errors) and strict; JSON keeps NaN and infinities as constants."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, ser_json_inf_nan="constants", use_attribute_docstrings=True
    )

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        schema: core_schema.CoreSchema = _as_in_yaml(handler(source), cls, handler)
        return schema

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
    for item in error.errors(include_url=False)[:MOST_LINES]:
        path = ".".join(str(part) for part in item["loc"]) or "(top)"
        rule = str(item["msg"]).removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            rule = "this key is not known here; remove it or check its spelling"
        got = _short(item.get("input"))
        lines.append(f"{source}: {path}: {rule} (got {got})")
    if error.error_count() > MOST_LINES:
        lines.append(f"{source}: and {error.error_count() - MOST_LINES:,} more broken rules")
    return "\n".join(lines)


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 120 else text[:117] + "..."
