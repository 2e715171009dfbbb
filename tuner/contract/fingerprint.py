"""Data known by its content: what a run or a study was begun with, and in words how that differs from what is there.

A path says nothing of what lies there. Moving or touching data changes no fingerprint; another byte in it does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tuner.contract.base import Frozen, Scalar, Words

MOST_PARTS = 64
"""Files of a folder that a fingerprint names one by one."""
DATA_FILE = "data.json"
"""In a run's folder: its `RunData`."""
MOST_KEPT = 16 << 20
"""Bytes of it."""
MOST_NAMED = 3
"""Files named in a message."""


class Part(Frozen):
    """One file of a folder."""

    name: Words
    """Below the folder."""
    bytes: int
    sha256: str
    """Of its content; empty = it cannot be read."""


class Fingerprint(Frozen):
    """The file or folder that one option of a workload names."""

    option: str
    path: str
    """As the option has it; where the data lie is no part of what they are."""
    sha256: str
    """SHA-256 of the file, or of the names and digests of all files below the folder."""
    bytes: int
    files: int = 1
    lines: int | None = None
    """Of text in lines (CSV, TSV, JSONL, TXT); None = not counted."""
    head: str = ""
    """Digest of a table's first line, which names its columns; empty = none."""
    parts: tuple[Part, ...] = ()
    """The files of a folder that has no more than `MOST_PARTS`."""

    @property
    def name(self) -> str:
        """As it is typed: `--data comments.csv`, `-o pretrained=gpt2`."""
        return f"--data {self.path}" if self.option == "data" else f"-o {self.option}={self.path}"

    @property
    def brief(self) -> Fingerprint:
        """Without the files one by one, for a document that people read."""
        return self.model_copy(update={"parts": ()})


class EarlierData(Frozen):
    """What a run had learned from before its data were changed knowingly."""

    until_samples: int
    data: tuple[Fingerprint, ...]


class RunData(Frozen):
    """What the run in a folder learns from."""

    data: tuple[Fingerprint, ...] = ()
    earlier: tuple[EarlierData, ...] = ()
    """Oldest first."""

    @property
    def since(self) -> int:
        """Samples at which the run began to learn from `data`."""
        return self.earlier[-1].until_samples if self.earlier else 0

    def resumed(self, data: tuple[Fingerprint, ...], samples: int) -> RunData:
        """As it goes on at `samples` from `data`: a run that begins again has no past, one that goes on from an older
        checkpoint a shorter one."""
        shorter = (item.model_copy(update={"until_samples": min(item.until_samples, samples)}) for item in self.earlier)
        past = tuple(shorter) if samples else ()
        if samples and compare(self.data, data).changes:
            past = (*past, EarlierData(until_samples=samples, data=tuple(item.brief for item in self.data)))
        return RunData(data=data, earlier=past)


class Compared(NamedTuple):
    """The data that something was begun with, held against those there now."""

    same: frozenset[str]
    """Options known on both sides: what they name was compared by content, wherever it lies."""
    changes: tuple[str, ...]
    """What differs, in words, one for each option."""


def compare(
    before: Sequence[Fingerprint], now: Sequence[Fingerprint], options: Mapping[str, Scalar] | None = None
) -> Compared:
    """`options`: those asked for now; one that names what is not there any more is a change too."""
    here = {item.option: item for item in now}
    both = [(item, here[item.option]) for item in before if item.option in here]
    changes = [in_words(old, new) for old, new in both if old.sha256 != new.sha256]
    gone = [old.name for old in before if old.option not in here and old.option in (options or {})]
    changes += [f"{name} was there and cannot be found now" for name in gone]
    return Compared(frozenset(old.option for old, _ in both), tuple(changes))


def in_words(before: Fingerprint, now: Fingerprint) -> str:
    """`--data comments.csv: 1,000 lines, 48,213 bytes then, 1,200 lines, 57,120 bytes now`"""
    sizes = [_size(item) for item in (before, now)]
    if sizes[0] != sizes[1]:
        text = f"{now.name}: {sizes[0]} then, {sizes[1]} now"
    else:
        digests = f"SHA-256 {before.sha256[:8]}, now {now.sha256[:8]}"
        text = f"{now.name}: {sizes[0]} as before, but other content ({digests})"
    if before.head and now.head and before.head != now.head:
        text += ", other columns in its first line"
    if before.path != now.path:
        text += f", then it was {before.path}"
    return text + _parts_in_words(before.parts, now.parts)


def placed(options: Mapping[str, Scalar], was: Mapping[str, Scalar], data: Sequence[Fingerprint]) -> dict[str, Scalar]:
    """`options` with the data where they lie now, in place of where they lay in `was`."""
    moved = {item.option: item.path for item in data if options.get(item.option) == was.get(item.option)}
    return {name: moved.get(name, value) for name, value in options.items()}


def _size(item: Fingerprint) -> str:
    folder = f"{item.files:,} files, " if item.files != 1 else ""
    lines = f"{item.lines:,} lines, " if item.lines is not None else ""
    return f"{folder}{lines}{item.bytes:,} bytes"


def _parts_in_words(before: Sequence[Part], now: Sequence[Part]) -> str:
    """Which files of a folder; empty where they are not known one by one."""
    if not before or not now:
        return ""
    old, new = ({part.name: part for part in parts} for parts in (before, now))
    kinds = {
        "changed": [name for name in old if name in new and old[name].sha256 != new[name].sha256],
        "new": [name for name in new if name not in old],
        "gone": [name for name in old if name not in new],
    }
    return "".join(f"; {kind}: {_listed(names)}" for kind, names in kinds.items() if names)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more
