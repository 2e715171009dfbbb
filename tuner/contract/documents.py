"""YAML text <-> typed values, safely: YAML 1.2 (`3e-4` is a number, `off` a string), no duplicate keys, no aliases,
bounded size and depth. Every message names the file and the path inside it."""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path
from typing import Any, TypeVar

from tuner.contract.base import Frozen, parse, parse_json
from tuner.contract.errors import ConfigError

MAX_BYTES = 1 << 19
MAX_DEPTH = 32
MAX_TOKENS = 50_000
"""A document this long is read within seconds; the longest that the tuner writes has a few thousand."""

_Model = TypeVar("_Model", bound=Frozen)


def load_document(cls: type[_Model], text: str, source: str) -> _Model:
    """Validate YAML `text` as `cls`. Raises ConfigError."""
    return parse(cls, read_mapping(text, source), source)


def read_file(path: Path) -> str:
    """The text of a YAML file. Raises ConfigError when it cannot be read, is no text, or is over 512 KiB."""
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a text file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None


def load_json(cls: type[_Model], path: Path, most: int = MAX_BYTES) -> _Model | None:
    """Validate the JSON file at `path` as `cls`; None where there is no such file. Raises ConfigError."""
    try:
        return parse_json(cls, read_bytes(path, most), str(path))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None


def read_bytes(path: Path, most: int = MAX_BYTES) -> bytes:
    """What a file holds: of at most `most` bytes, and a regular file, as a pipe or a device may never end.

    Raises OSError, and ConfigError for what is no such file.
    """
    if "\0" in str(path):
        raise ConfigError(f"{path!s}: cannot be read: no path holds a NUL character")
    _check_regular(path, os.stat(path).st_mode)
    with open(path, "rb", opener=_without_waiting) as file:
        _check_regular(path, os.fstat(file.fileno()).st_mode)
        data = file.read(most + 1)
    if len(data) > most:
        raise ConfigError(f"{path}: larger than {most} bytes; this is no file of the tuner's")
    return data


def _check_regular(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        what = "folder" if stat.S_ISDIR(mode) else "pipe" if stat.S_ISFIFO(mode) else "device or socket"
        raise ConfigError(f"{path}: cannot be read: a regular file is expected, and this is a {what}")


def _without_waiting(path: str, flags: int) -> int:
    """Opening a pipe waits for its writer otherwise."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)


def read_mapping(text: str, source: str) -> dict[str, Any]:
    """Plain dicts, lists and scalars of a YAML mapping. Raises ConfigError."""
    from ruamel.yaml import YAML

    if len(text) > MAX_BYTES:
        raise ConfigError(f"{source}: larger than {MAX_BYTES} characters")
    _refuse_bombs(text, source)
    loader = YAML(typ="safe", pure=True)
    try:
        data = loader.load(text)
    except RecursionError:
        raise ConfigError(f"{source}: nested too deeply") from None
    except Exception as error:  # a date of month 13 and a number of 5000 digits are no YAMLError
        raise ConfigError(f"{source}: not readable as YAML: {_one_line(error)}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{source}: a mapping of keys to values is expected (got {type(data).__name__})")
    _check_depth(data, source, 0)
    return data


def write_mapping(data: dict[str, Any], comment: str = "") -> str:
    """YAML text that `read_mapping` gives back unchanged; `comment` becomes leading `#` lines."""
    from ruamel.yaml import YAML
    from ruamel.yaml.representer import SafeRepresenter

    class Representer(SafeRepresenter):
        """Text with a control character, an odd line break or a sign in front is quoted: written plain, some of it
        would not come back."""

        def represent_str(self, data: str) -> Any:
            plain = data.replace("\n", "").isprintable() and (data[:1].isalnum() or data[:1] in "_./(")
            style = None if plain else '"'
            return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)

    Representer.add_representer(str, Representer.represent_str)
    dumper = YAML(typ="safe", pure=True)
    dumper.Representer = Representer
    dumper.default_flow_style = None
    dumper.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    dumper.width = 110
    out = io.StringIO()
    dumper.dump(data, out)
    lead = "".join(f"# {line}\n" for line in comment.splitlines())
    return lead + out.getvalue()


def _refuse_bombs(text: str, source: str) -> None:
    """Aliases, deep nesting and endless lists, found in the tokens: building the value would take minutes already."""
    from ruamel.yaml import YAML, tokens

    opening = (
        tokens.BlockMappingStartToken,
        tokens.BlockSequenceStartToken,
        tokens.FlowMappingStartToken,
        tokens.FlowSequenceStartToken,
    )
    closing = (tokens.BlockEndToken, tokens.FlowMappingEndToken, tokens.FlowSequenceEndToken)
    depth = 0
    try:
        for number, token in enumerate(YAML(typ="safe", pure=True).scan(text)):
            if number > MAX_TOKENS:
                raise ConfigError(f"{source}: more than {MAX_TOKENS:,} words and signs; this is no configuration file")
            depth += isinstance(token, opening) - isinstance(token, closing)
            if depth > MAX_DEPTH + 1:
                raise ConfigError(f"{source}: nested more than {MAX_DEPTH} levels deep")
            if isinstance(token, tokens.AliasToken):
                line = token.start_mark.line + 1
                raise ConfigError(f"{source}: line {line}: YAML aliases (`*name`) are not allowed; write the value out")
    except ConfigError:
        raise
    except Exception as error:  # not only YAMLError: the scanner itself may trip over what is no YAML
        raise ConfigError(f"{source}: not readable as YAML: {_one_line(error)}") from None


def _check_depth(data: Any, source: str, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise ConfigError(f"{source}: nested more than {MAX_DEPTH} levels deep")
    if isinstance(data, dict):
        for key, value in data.items():
            if not isinstance(key, str):
                raise ConfigError(f"{source}: keys must be text (got {key!r})")
            _check_depth(value, source, depth + 1)
    elif isinstance(data, list):
        for value in data:
            _check_depth(value, source, depth + 1)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
