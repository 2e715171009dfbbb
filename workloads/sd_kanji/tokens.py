"""CLIP's byte-pair tokens, read from the vocabulary file in the package `open_clip_torch`, which is never imported.

The file lists the merges in the order they were learned (MIT licence; Radford et al., Learning Transferable Visual
Models From Natural Language Supervision, arXiv:2103.00020). Fewer merges give a smaller vocabulary that still spells
every text, in more pieces: what a tiny text encoder needs.
"""

from __future__ import annotations

import gzip
import importlib.metadata
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tuner.contract.errors import WorkloadError

ALL_MERGES = 48_894
"""CLIP's own vocabulary: 2 x 256 bytes, these merges, and two marks make 49,408 tokens."""
CLIP_LENGTH = 77
_PACKAGE, _FILE = "open_clip_torch", "open_clip/bpe_simple_vocab_16e6.txt.gz"
_INSTALL = "install it with `pip install --no-deps open_clip_torch==3.3.0`"
_START, _END = "<|startoftext|>", "<|endoftext|>"


@dataclass(frozen=True)
class TokenSpec:
    """Which tokens a text becomes. The same spec and text always give the same numbers."""

    merges: int
    length: int
    """Tokens of every text, marks and padding included; longer texts are cut."""

    @property
    def vocabulary(self) -> int:
        return 512 + self.merges + 2

    @property
    def start(self) -> int:
        return self.vocabulary - 2

    @property
    def end(self) -> int:
        """Ends a text and fills what is left, as in CLIP."""
        return self.vocabulary - 1

    def about(self) -> dict[str, int]:
        return asdict(self)

    def empty(self) -> Tensor:
        """The tokens of no prompt: int64 [length]."""
        return torch.tensor([self.start] + [self.end] * (self.length - 1))


class PromptTokenizer:
    """Texts -> int64 [N, length]. Raises WorkloadError when the vocabulary file is not there."""

    def __init__(self, spec: TokenSpec) -> None:
        self._spec = spec
        self._clip = _clip_tokenizer(spec)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        length = self._spec.length
        lists = self._clip(list(texts), padding="max_length", truncation=True, max_length=length)["input_ids"]
        return torch.tensor(lists, dtype=torch.int64).reshape(len(texts), length)


def _clip_tokenizer(spec: TokenSpec) -> Any:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # no threads: workers are forked from this process
    from transformers.models.clip.tokenization_clip import CLIPTokenizer

    merges = _merges()[: spec.merges]
    letters = _byte_letters()
    words = [*letters, *(letter + "</w>" for letter in letters), *(a + b for a, b in merges), _START, _END]
    made = CLIPTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=merges)
    assert len(made) == spec.vocabulary
    return made


def _merges() -> list[tuple[str, str]]:
    try:
        path = Path(str(importlib.metadata.distribution(_PACKAGE).locate_file(_FILE)))
        lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
    except importlib.metadata.PackageNotFoundError:
        raise WorkloadError(
            f"CLIP's vocabulary is in the package {_PACKAGE}, which is not installed; {_INSTALL}"
        ) from None
    except (OSError, EOFError, ValueError) as error:
        raise WorkloadError(f"CLIP's vocabulary cannot be read: {error}; {_INSTALL}") from None
    pairs = [line.split(" ") for line in lines[1 : ALL_MERGES + 1]]  # the first line names the file's version
    return [(first, second) for first, second in pairs]


def _byte_letters() -> list[str]:
    """The letter that stands for each byte, in CLIP's order: printable ones stand for themselves, others follow at 256.

    The scheme is GPT-2's (Radford et al., Language Models are Unsupervised Multitask Learners, section 2.2).
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = len(set(range(256)) - set(printable))
    return [chr(code) for code in (*printable, *range(256, 256 + others))]
