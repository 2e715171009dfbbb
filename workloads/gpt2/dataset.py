"""Pieces of the kept tokens as a data set: an item costs a slice."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.utils.data import Dataset

from .tokens import Texts


class TextDataset(Dataset[Mapping[str, Tensor]]):
    """Pieces of the flat row of ids; an item is a view.

    For the classifier a piece is the beginning of a text. For the language model a text and its end token are cut into
    pieces which overlap by one token, so that every token is predicted exactly once.
    """

    def __init__(self, texts: Texts, max_tokens: int, *, language: bool, folds: bool) -> None:
        self._ids, self._labels = texts.ids, texts.labels.unbind()
        self._fold = texts.fold.unbind() if folds else None
        counts: list[int] = texts.counts.tolist()
        self.starts: list[int] = []
        self.lengths: list[int] = []
        self._language = language
        at = 1  # an end token stands before the first text
        for count in counts:
            if language:
                self._cut(at - 1, count + 1, max_tokens - 1)
            else:
                self.starts.append(at)
                self.lengths.append(min(max_tokens, count) or 1)
            at += count + 1

    def _cut(self, start: int, targets: int, most: int) -> None:
        """Pieces of about equal length, as few as can be: a last one of two tokens would not be worth its place."""
        pieces = -(-targets // most)
        for number in range(pieces):
            first, last = number * targets // pieces, (number + 1) * targets // pieces
            self.starts.append(start + first)
            self.lengths.append(last - first + 1)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Mapping[str, Tensor]:
        """{"ids": int32 [L]}, for the classifier also {"labels": float32 [labels]}, in validation {"fold": int64}."""
        start = self.starts[index]
        item = {"ids": self._ids[start : start + self.lengths[index]]}
        if not self._language:
            item["labels"] = self._labels[index]
            if self._fold is not None:
                item["fold"] = self._fold[index]
        return item
