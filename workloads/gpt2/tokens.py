"""Texts as tokens, made once and kept: the tokeniser is trained on the training texts alone, or comes with the model.

All texts of a split lie in one flat row of ids; a text is a piece of it. So an item costs a slice, and nothing is
tokenised while training.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tuner.contract.errors import WorkloadError
from tuner.contract.workload import Progress, Split
from tuner.prepared import ensure, file_digest

from .rows import Rows, Source

CODE_VERSION = 2
"""Raised whenever the same texts would give other tokens."""
END = "<|endoftext|>"
TOKENS_FILE, TOKENIZER_FILE = "tokens.safetensors", "tokenizer.json"
ENCODED_AT_ONCE = 512
BYTES_PER_BYTE = 6
"""Upper estimate of what a byte of text takes on disk: a token is four bytes, and labels come to it."""


_Ids = NDArray[np.int32]


@dataclass(frozen=True)
class Texts:
    """One split as tokens."""

    ids: Tensor
    """int32 [tokens + N + 1]: the token that ends a text, then each text and that token again."""
    counts: Tensor
    """int64 [N]: tokens of each text"""
    labels: Tensor
    """float32 [N, labels]"""
    fold: Tensor
    """int64 [N]: 0 or 1; which half of the validation split (0 in the training split)."""


@dataclass(frozen=True)
class Tokens:
    train: Texts
    valid: Texts
    """Longest first, so that validation batches hold texts of about equal length."""
    label_names: tuple[str, ...]
    tokenizer: Any
    """A `tokenizers.Tokenizer`."""
    end: int
    """Id of the token that ends a text."""
    aside: int = 0
    """Test rows of the data, of which nothing is here."""

    def part(self, split: Split) -> Texts:
        return self.train if split == "train" else self.valid

    def decode(self, ids: Tensor) -> str:
        text: str = self.tokenizer.decode(ids.tolist(), skip_special_tokens=True)
        return text

    def byte_counts(self, vocabulary: int) -> Tensor:
        """int64 [vocabulary]: UTF-8 bytes each token stands for; 0 for special and unused ones."""
        counts = torch.zeros(vocabulary, dtype=torch.int64)
        for token, index in self.tokenizer.get_vocab().items():
            if token != END and index < vocabulary:  # a byte-level token has one letter for each byte
                counts[index] = len(token)
        return counts


def load_tokens(
    cache_dir: Path, source: Source, vocabulary: int, pretrained: Path | None, asked: dict[str, Any], progress: Progress
) -> Tokens:
    """From the cache, made first where they are missing. `asked`: the options that change the rows.

    Raises WorkloadError for data or a tokeniser that cannot be used."""
    about = {"code": CODE_VERSION, "data": source.digest(), "vocabulary": vocabulary, **asked}
    if pretrained is not None:
        about["tokenizer"] = [file_digest(path) for path in tokenizer_files(pretrained)]
    folder = ensure(
        cache_dir,
        "gpt2",
        "tokens",
        about,
        lambda place: _make(place, source, vocabulary, pretrained, progress),
        need_bytes=BYTES_PER_BYTE * source.size_bytes(),
    )
    tokens = _open(folder)
    for remark in (*source.remarks, _set_aside(tokens.aside)):
        if remark:
            progress(0, 0, remark)
    return tokens


def tokenizer_files(folder: Path) -> list[Path]:
    """`tokenizer.json`, or `vocab.json` and `merges.txt`. Raises WorkloadError when neither is there."""
    whole, pair = folder / TOKENIZER_FILE, [folder / "vocab.json", folder / "merges.txt"]
    if whole.is_file():
        return [whole]
    if all(path.is_file() for path in pair):
        return pair
    raise WorkloadError(f"options.pretrained: {folder} has neither {TOKENIZER_FILE} nor vocab.json with merges.txt")


def _make(place: Path, source: Source, vocabulary: int, pretrained: Path | None, progress: Progress) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads would outlive this, and a fork would not survive them
    rows, parts = source.load(progress)
    progress(0, len(rows.texts), "training the tokeniser" if pretrained is None else "reading the tokeniser")
    if pretrained is None:
        tokenizer = train_tokenizer([rows.texts[index] for index in parts.train], vocabulary)
    else:
        tokenizer = read_tokenizer(pretrained)
    _refuse_large(tokenizer, vocabulary)
    chosen = [*parts.train, *parts.valid]
    encoded = _encode(tokenizer, rows, chosen, progress)
    end, count = tokenizer.token_to_id(END) or 0, len(parts.train)
    made = _tensors("train", rows, end, list(zip(encoded[:count], parts.train, [0] * count, strict=True)))
    held = sorted(zip(encoded[count:], parts.valid, parts.fold, strict=True), key=lambda item: -len(item[0]))
    made |= _tensors("valid", rows, end, held)
    tokenizer.save(str(place / TOKENIZER_FILE))
    save_file(made, place / TOKENS_FILE, metadata={"labels": json.dumps(rows.label_names), "aside": str(rows.aside)})
    progress(len(chosen), len(chosen), f"{len(chosen):,} texts tokenised{_left_out(parts.dropped)}")


def _set_aside(aside: int) -> str:
    return f"{aside:,} test rows are set aside: neither trained on nor chosen by" if aside else ""


def _left_out(dropped: int) -> str:
    return f"; {dropped:,} left out of validation, as training texts say the same" if dropped else ""


def _refuse_large(tokenizer: Any, vocabulary: int) -> None:
    size = max(tokenizer.get_vocab().values()) + 1
    if size > vocabulary:
        raise WorkloadError(f"options.pretrained: its tokeniser has {size} tokens, but config.json allows {vocabulary}")


def _encode(tokenizer: Any, rows: Rows, chosen: Sequence[int], progress: Progress) -> list[_Ids]:
    encoded: list[_Ids] = []
    for start in range(0, len(chosen), ENCODED_AT_ONCE):
        progress(start, len(chosen), "tokenising")
        texts = [rows.texts[index] for index in chosen[start : start + ENCODED_AT_ONCE]]
        batch = tokenizer.encode_batch(texts, add_special_tokens=False)
        encoded += [np.array(item.ids, dtype=np.int32) for item in batch]
    return encoded


def _tensors(name: str, rows: Rows, end: int, items: Sequence[tuple[_Ids, int, int]]) -> dict[str, Tensor]:
    parting = np.array([end], dtype=np.int32)
    flat = np.concatenate([parting, *(piece for ids, _, _ in items for piece in (ids, parting))])
    labels = torch.tensor([rows.labels[index] for _, index, _ in items], dtype=torch.float32)
    return {
        f"{name}.ids": torch.from_numpy(flat),
        f"{name}.counts": torch.tensor([len(ids) for ids, _, _ in items], dtype=torch.int64),
        f"{name}.labels": labels.reshape(len(items), len(rows.label_names)),
        f"{name}.fold": torch.tensor([fold for _, _, fold in items], dtype=torch.int64),
    }


def _open(folder: Path) -> Tokens:
    from tokenizers import Tokenizer

    try:
        with safe_open(folder / TOKENS_FILE, "pt") as file:
            names, aside = tuple(json.loads(file.metadata()["labels"])), int(file.metadata()["aside"])
            texts = [
                Texts(*(file.get_tensor(f"{name}.{column}") for column in ("ids", "counts", "labels", "fold")))
                for name in ("train", "valid")
            ]
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise WorkloadError(f"{folder / TOKENS_FILE} is damaged ({error}); remove {folder} and run again") from None
    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER_FILE))
    end = tokenizer.token_to_id(END)
    return Tokens(texts[0], texts[1], names, tokenizer, 0 if end is None else int(end), aside)


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> Any:
    """A byte-level BPE of at most `vocabulary` tokens: every text can be encoded and comes back unchanged."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer

    tokenizer = Tokenizer(BPE())
    _as_bytes(tokenizer)
    trainer = BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    return tokenizer


def read_tokenizer(folder: Path) -> Any:
    """The tokeniser of a model folder. Raises WorkloadError when it cannot be read."""
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.models import BPE

    files = tokenizer_files(folder)
    try:
        if len(files) == 1:
            return _bare(Tokenizer.from_file(str(files[0])))
        tokenizer = Tokenizer(BPE.from_file(*(str(path) for path in files)))
    except Exception as error:  # the library raises plain Exceptions
        raise WorkloadError(f"options.pretrained: the tokeniser of {folder} cannot be read: {error}") from None
    _as_bytes(tokenizer)
    tokenizer.add_special_tokens([AddedToken(END, special=True)])
    return tokenizer


def _bare(tokenizer: Any) -> Any:
    """Without the padding and cutting its file may ask for."""
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _as_bytes(tokenizer: Any) -> None:
    from tokenizers import decoders, pre_tokenizers

    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
