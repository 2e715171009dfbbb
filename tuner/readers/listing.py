"""The files of a folder that a reader takes, those it passes over, and how it knows that they changed."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tuner.contract.base import printable
from tuner.contract.errors import WorkloadError
from tuner.readers.contents import contents, together
from tuner.readers.text import OPTION, why_broken

READ_AS = 1
"""Raised whenever a reader of this room makes something else of the same files: prepared data are then made again."""


@dataclass(frozen=True)
class Listing:
    """Files of the kinds asked for, by name; how many others lay beside them."""

    files: tuple[Path, ...]
    others: Counter[str] = field(default_factory=Counter)
    """Suffix (in lower case; a name where there is none) -> files of it. Hidden files are not counted."""


def listed(folder: Path, suffixes: Sequence[str], option: str = OPTION) -> Listing:
    """The files right below `folder`. Hidden ones (macOS writes `._NAME` beside each NAME) are no data.

    Raises WorkloadError when the folder cannot be read.
    """
    try:
        inside = sorted(item for item in folder.iterdir() if not item.name.startswith(".") and item.is_file())
    except OSError as error:
        raise WorkloadError(f"{option} {printable(folder)} cannot be read: {error.strerror or error}") from None
    files = tuple(item for item in inside if item.suffix.lower() in suffixes)
    taken = set(files)
    return Listing(files, Counter(printable(item.suffix.lower() or item.name) for item in inside if item not in taken))


def folders_in(folder: Path, option: str = OPTION) -> tuple[Path, ...]:
    """The folders right below `folder`, by name, without hidden ones and what macOS puts into archives.

    Raises WorkloadError for a folder that cannot be read, or a name that is not UTF-8: names become classes.
    """
    try:
        inside = sorted(item for item in folder.iterdir() if item.is_dir())
    except OSError as error:
        raise WorkloadError(f"{option} {printable(folder)} cannot be read: {error.strerror or error}") from None
    found = tuple(item for item in inside if not item.name.startswith(".") and item.name != "__MACOSX")
    for item in found:
        if why_broken(item.name):
            raise WorkloadError(f"{option} {printable(item)}: the folder's name is not UTF-8; rename it")
    return found


def passed_over(others: Counter[str], known: Sequence[str]) -> str:
    """`20 files passed over (.heic 18, .txt 2); read are .png, .jpg`; empty where there were none."""
    count = others.total()
    if not count:
        return ""
    named = ", ".join(f"{suffix} {number}" for suffix, number in others.most_common(5))
    more = ", ..." if len(others) > 5 else ""
    return f"{count:,} file{'s' if count > 1 else ''} passed over ({named}{more}); read are {', '.join(known)}"


def content_digest(root: Path, files: Iterable[Path]) -> str:
    """Of the files' names below `root` and of what they hold: the key of what is prepared from them. Each probe asks,
    so a file is read only when it is new or has changed (see `contents`)."""
    cache = os.environ.get("TUNER_CACHE")
    found = contents(root, list(files), Path(cache) if cache else None)
    return hashlib.sha256(f"{READ_AS} {together(found)}".encode()).hexdigest()
