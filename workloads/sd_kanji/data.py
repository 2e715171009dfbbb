"""Pictures with prompts: the kanji of KanjiVG with their meanings from KANJIDIC2, or the user's own image folder.

Nothing is downloaded. The strokes lie in the package `kanjivg` (KanjiVG, copyright Ulrich Apel, CC BY-SA 3.0), the
meanings in `jamdict-data` (KANJIDIC2, property of the Electronic Dictionary Research and Development Group, used under
its licence, CC BY-SA). A kanji's prompt is its first three English meanings; kanji of one prompt stay on one side.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tuner.contract.errors import WorkloadError

from .strokes import draw, strokes_of

STROKES, MEANINGS = ("kanjivg", "20260714"), ("jamdict-data", "1.5")
"""Package and version that the default data are defined by."""
TRAIN_COUNT, VALID_COUNT = 5758, 654
"""Kanji on each side of the default data's split."""
MEANINGS_USED = 3
VALID_SHARE = 0.1
_INSTALL = (
    f"install them with `pip install {STROKES[0]}=={STROKES[1]} {MEANINGS[0]}=={MEANINGS[1]}`, or give your own"
    " pictures: --data FOLDER with metadata.jsonl"
)
_QUERY = """
SELECT character.literal, meaning.value FROM character
JOIN rm_group ON rm_group.cid = character.ID JOIN meaning ON meaning.gid = rm_group.ID
WHERE meaning.m_lang = '' ORDER BY character.ID, meaning.rowid
"""


@dataclass(frozen=True)
class Item:
    """One picture and its prompt."""

    name: str
    """The kanji, or the picture's file name."""
    text: str
    held: bool
    """True: for validation."""


class Source(Protocol):
    """Where pictures come from. All but `picture` is cheap."""

    @property
    def remarks(self) -> tuple[str, ...]:
        """What the user should know of how the data were understood."""
        ...

    @property
    def channels(self) -> int:
        """1 = greys, 3 = red, green, blue."""
        ...

    @property
    def counts(self) -> tuple[int, int]:
        """Pictures for training and for validation."""
        ...

    def digest(self) -> str: ...

    def items(self) -> Sequence[Item]: ...

    def picture(self, item: Item, size: int) -> NDArray[np.uint8]:
        """uint8 [channels, size, size], made anew at every call. Raises WorkloadError."""
        ...


class Kanji:
    """6,412 kanji that have both strokes in KanjiVG and an English meaning in KANJIDIC2."""

    remarks: tuple[str, ...] = ()
    channels = 1
    counts = (TRAIN_COUNT, VALID_COUNT)

    def digest(self) -> str:
        return " ".join(f"{name} {_version(name)}" for name in (STROKES[0], MEANINGS[0]))

    def items(self) -> Sequence[Item]:
        """In KANJIDIC2's order. Raises WorkloadError when a package is missing or of another version."""
        for name, version in (STROKES, MEANINGS):
            if _version(name) != version:
                raise WorkloadError(
                    f"the default data are those of {name} {version}, but {_version(name)} is installed; {_INSTALL}"
                )
        prompts = {kanji: ", ".join(texts[:MEANINGS_USED]) for kanji, texts in self._meanings().items()}
        held = held_out([[normal(text)] for text in prompts.values()])
        items = [Item(kanji, text, side) for (kanji, text), side in zip(prompts.items(), held, strict=True)]
        train = sum(not item.held for item in items)
        if (train, len(items) - train) != self.counts:
            raise WorkloadError(
                f"the packages {STROKES[0]} and {MEANINGS[0]} hold {len(items)} kanji with strokes and meanings, not"
                f" {sum(self.counts)}: their files were changed; {_INSTALL}"
            )
        return items

    def picture(self, item: Item, size: int) -> NDArray[np.uint8]:
        path = self._file(item.name)
        try:
            strokes = strokes_of(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise WorkloadError(f"{path} cannot be read ({error}); {_INSTALL}") from None
        return draw(strokes, size)[None]

    def _meanings(self) -> dict[str, list[str]]:
        path = _located(MEANINGS[0], "jamdict_data/jamdict.db")
        try:
            with sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True) as database:
                rows = database.execute(_QUERY).fetchall()
            database.close()
        except sqlite3.Error as error:
            raise WorkloadError(f"{path} cannot be read ({error}); {_INSTALL}") from None
        found: dict[str, list[str]] = {}
        drawn = {file.name for file in _located(STROKES[0], "kanji").glob("*.svg")}
        for kanji, meaning in rows:
            if _file_name(kanji) in drawn:
                found.setdefault(kanji, []).append(meaning)
        return found

    def _file(self, kanji: str) -> Path:
        return _located(STROKES[0], "kanji") / _file_name(kanji)


def held_out(keys: Iterable[Iterable[str]]) -> list[bool]:
    """Which items are held out for validation, from what each may share with others (prompt, file, content).

    Items that share a key, directly or through others, go together. A tenth of those groups is held out, at least one,
    chosen by a digest of the group's smallest key: neither order nor chance decides. One group cannot be divided.
    """
    listed = [sorted(item) for item in keys]
    groups = _joined(listed)
    ranked = sorted(set(groups), key=lambda group: hashlib.sha256(group.encode()).digest())
    held = set(ranked[: max(1, round(len(ranked) * VALID_SHARE))]) if len(ranked) > 1 else set()
    return [group in held for group in groups]


def _joined(keys: Sequence[Sequence[str]]) -> list[str]:
    """Each item's group, named by the smallest key that it reaches (union-find)."""
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        while parent.setdefault(key, key) != key:
            parent[key] = key = parent[parent[key]]
        return key

    for item in keys:
        for other in item[1:]:
            low, high = sorted((root(item[0]), root(other)))
            parent[high] = low
    return [root(item[0]) for item in keys]


def normal(text: str) -> str:
    """What two prompts have in common that the tokeniser cannot tell apart: case and white space are gone."""
    return " ".join(text.lower().split())


def _file_name(kanji: str) -> str:
    return f"{ord(kanji):05x}.svg"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise WorkloadError(
            f"the default data need the package {package}, which is not installed; {_INSTALL}"
        ) from None


def _located(package: str, inside: str) -> Path:
    return Path(str(importlib.metadata.distribution(package).locate_file(inside)))
