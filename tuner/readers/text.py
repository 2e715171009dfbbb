"""Text files and file names: UTF-8, or one line that says where it is not.

A file is read with its stray bytes kept as lone surrogates, so that whoever knows row and column can name them.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from tuner.contract.base import printable
from tuner.contract.errors import WorkloadError

OPTION = "--data"
"""What messages begin with, where the caller does not name another option."""
_OTHER_CODES = {codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}
_STRAY_BYTES = range(0xDC80, 0xDD00)
"""How Python keeps bytes that are not UTF-8 (surrogateescape)."""


def why_broken(text: str) -> str:
    """What about `text` no UTF-8 file could hold, and what to do; empty where nothing is."""
    if text.isascii():
        return ""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        point = ord(text[error.start])
        if point in _STRAY_BYTES:
            return f"it is not UTF-8 text (byte 0x{point - 0xDC00:02x}); save the file as UTF-8"
        return f"it holds half a character (the lone surrogate \\u{point:04x}); remove or replace it"
    return ""


@contextmanager
def opened(path: Path, option: str = OPTION, *, newline: str | None = None) -> Iterator[TextIO]:
    """`path` to read from; a byte order mark is dropped, stray bytes come as `why_broken` knows them.

    Raises WorkloadError for a file that cannot be read, or that is UTF-16.
    """
    try:
        with path.open("rb") as raw:
            code = _OTHER_CODES.get(raw.read(2))
        if code is not None:
            raise WorkloadError(f"{option} {printable(path)}: it is {code}, not UTF-8 text; save the file as UTF-8")
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline=newline) as file:
            yield file
    except OSError as error:
        raise WorkloadError(f"{option} {printable(path)} cannot be read: {error.strerror or error}") from None


def read_text(path: Path, option: str = OPTION) -> str:
    """All of `path`. Raises WorkloadError naming the line that is not UTF-8."""
    with opened(path, option) as file:
        text = file.read()
    if why := why_broken(text):
        line = next(number for number, line in enumerate(text.split("\n"), start=1) if why_broken(line))
        raise WorkloadError(f"{option} {printable(path)}, line {line}: {why}")
    return text
