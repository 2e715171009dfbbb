"""What the command line does where text is no UTF-8: a terminal or pipe of another encoding gets replacements, and
names that nothing could write down are refused at the start instead of at the end."""

from __future__ import annotations

import codecs
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tuner.contract.base import printable
from tuner.contract.errors import ConfigError

PLAINLY = {"±": "+-", "→": "->", "×": "x", "…": "...", "·": "*", "≤": "<=", "≥": ">=", "–": "-", "’": "'"}
HANDLER = "tuner.plainly"
FOLDERS = ("TUNER_CACHE", "TUNER_STORAGE", "XDG_CACHE_HOME", "HOME")
"""Variables that name places we write down."""


def plainly(error: UnicodeError) -> tuple[str | bytes, int]:
    """A codec's error handler: what an encoding lacks is written with what it has, or as an escape."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(_plain(letter) for letter in error.object[error.start : error.end]), error.end


def _plain(letter: str) -> str:
    """A letter of somebody's name as an escape; a bar of a picture made of signs as `?`."""
    if letter.isalnum() or printable(letter) != letter:
        return printable(letter).encode("ascii", "backslashreplace").decode()
    return PLAINLY.get(letter, "?")


def degrade() -> None:
    """From now on nothing that is printed can fail for its encoding."""
    codecs.register_error(HANDLER, plainly)
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)  # a test's own stream may have none
        if reconfigure is not None:
            reconfigure(errors=HANDLER)


def as_carried(text: str, encoding: str | None) -> str:
    """JSON `text` for a stream of that encoding (None: one of text, in memory): where it is not UTF-8, escaped, so that
    its reader gets it whole."""
    if encoding is None or encoding.lower().replace("-", "").startswith("utf8"):
        return text
    return re.sub("[^\x00-\x7f]", lambda found: json.dumps(found[0])[1:-1], text)


def write_document(text: str, write: Callable[[str], object]) -> None:
    """Our files are UTF-8, also when stdout is redirected into one; a terminal gets what it can show."""
    if not sys.stdout.isatty() and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    write(text)


def refuse_names(words: Sequence[str]) -> None:
    """Raises ConfigError for a typed word, the current folder or a variable with bytes that are not UTF-8.

    Configurations, the store and JSON hold UTF-8 only: a run could begin, and would fail when it is written down.
    """
    for before, word in zip(("", *words), words, strict=False):
        if printable(word) != word:
            option = f"{before}: " if before.startswith("-") and "=" not in before and not word.startswith("-") else ""
            raise ConfigError(f"{option}{_told(word)}; rename it")
    if printable(here := _here()) != here:
        raise ConfigError(f"the current folder: {_told(here)}; rename it, or start from another folder")
    for name in FOLDERS:
        if printable(value := os.environ.get(name, "")) != value:
            raise ConfigError(f"{name}: {_told(value)}; set it to another place")


def written_down(path: Path, option: str) -> str:
    """The absolute path, as a configuration keeps it. Raises ConfigError where a link led to a name it cannot keep."""
    whole = str(path.resolve())
    refuse_names((option, whole))
    return whole


def _told(name: str) -> str:
    return f"'{printable(name)}' holds bytes that are not UTF-8"


def _here() -> str:
    try:
        return str(Path.cwd())
    except OSError:
        return ""
