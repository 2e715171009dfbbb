"""Labelled texts in memory, and their split: no text and no group serves both training and validation."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from tuner.contract.errors import WorkloadError

Report = Callable[[int, int, str], None]
"""(done, total, what is done)"""
VALID_SHARE = 0.1
"""Of the rows, where the data do not say themselves which of them are for validation."""


@dataclass
class Rows:
    """Columns of equal length, one entry a text."""

    label_names: tuple[str, ...] = ()
    texts: list[str] = field(default_factory=list)
    labels: list[tuple[int, ...]] = field(default_factory=list)
    """0 or 1 for each label name."""
    groups: list[str] = field(default_factory=list)
    """Rows of one group (a module, an author) stay on one side; empty = the text itself is the group."""
    splits: list[str] = field(default_factory=list)
    """`train`, `valid`, or empty: not said."""
    aside: int = 0
    """Test rows of the data, none of them here: thresholds and the best checkpoint are chosen by validation rows."""

    def add(self, text: str, labels: tuple[int, ...], group: str = "", split: str = "") -> None:
        self.texts.append(text)
        self.labels.append(labels)
        self.groups.append(group)
        self.splits.append(split)


@dataclass(frozen=True)
class Parts:
    """Which rows serve what, in the order of the data."""

    train: list[int]
    valid: list[int]
    fold: list[int]
    """For each of `valid` 0 or 1: halves of the validation rows that share no group either."""
    dropped: int
    """Validation rows left out because a training text says the same."""


class Source(Protocol):
    """Where texts come from."""

    @property
    def remarks(self) -> tuple[str, ...]:
        """What the user should know of how the data were understood; quick."""
        ...

    def train_count(self) -> int:
        """Training texts; may read the data."""
        ...

    def size_bytes(self) -> int:
        """Upper estimate of the texts' size; quick."""
        ...

    def digest(self) -> str:
        """Changes with the data; quick."""
        ...

    def load(self, report: Report) -> tuple[Rows, Parts]:
        """Read everything. Raises WorkloadError for data that cannot be used."""
        ...


def same_text(text: str) -> str:
    """What two texts have in common that differ in case and white space only."""
    return " ".join(text.lower().split())


def split(rows: Rows, origin: str) -> Parts:
    """As the data say (`splits`); otherwise a tenth, whole groups chosen by the hash of their name.

    Raises WorkloadError when a side stays empty.
    """
    names = [group or same_text(text) for group, text in zip(rows.groups, rows.texts, strict=True)]
    held = {index for index, side in enumerate(rows.splits) if side == "valid"} or _held_out(names)
    train = [index for index in range(len(names)) if index not in held]
    known = {same_text(rows.texts[index]) for index in train}
    valid = [index for index in sorted(held) if same_text(rows.texts[index]) not in known]
    if not train or not valid:
        tests = f" ({rows.aside:,} test rows are set aside)" if rows.aside else ""
        raise WorkloadError(
            f"{origin}: {len(train)} texts are left for training and {len(valid)} for validation, of {len(names)}"
            f"{tests}; both need at least one: add rows with other texts, more groups, or a column `split` with train"
            " and valid"
        )
    return Parts(train, valid, halves([names[index] for index in valid]), len(held) - len(valid))


def halves(groups: Sequence[str]) -> list[int]:
    """0 or 1 for each row, about equally often; rows of one group get the same."""
    sizes = Counter(groups)
    rows = [0, 0]
    side: dict[str, int] = {}
    for group in sorted(sizes, key=hashed):
        side[group] = int(rows[1] < rows[0])
        rows[side[group]] += sizes[group]
    return [side[group] for group in groups]


def _held_out(names: Sequence[str]) -> set[int]:
    wanted = max(1, round(VALID_SHARE * len(names)))
    members: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        members.setdefault(name, []).append(index)
    held: set[int] = set()
    for name in sorted(members, key=hashed):
        if len(held) >= wanted:
            break
        if len(held) + len(members[name]) <= max(2 * wanted, 2):  # one huge group must not swallow the training data
            held.update(members[name])
    return held


def hashed(name: str) -> str:
    """Orders names as good as at random, the same everywhere."""
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()
