"""GPT-2 with a head of labels over the mean of its outputs, or with its language-model head.

Texts are padded on the right and attention looks to the left only, so no real token ever sees a padded one: no mask
has to be built, and the fast causal attention kernel is used. What stands at padded places is left out afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.gpt2.configuration_gpt2 import GPT2Config
from transformers.models.gpt2.modeling_gpt2 import GPT2Model

from tuner import randomness
from tuner.contract.errors import WorkloadError

HEAD_DROPOUT = 0.1
SEED_STREAM = 0


@dataclass(frozen=True)
class Size:
    """Shape of the trunk, and how much of it is trained."""

    blocks: int
    width: int
    heads: int
    vocabulary: int
    positions: int
    dropout: float = 0.1
    trained_blocks: int | None = None
    """The top so many blocks, ln_f and the head are trained, the rest and the embeddings are frozen; None = all."""


class Decoder(nn.Module):
    """The trunk, with parts frozen as `size` says."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        config = GPT2Config(
            vocab_size=size.vocabulary,
            n_positions=size.positions,
            n_embd=size.width,
            n_layer=size.blocks,
            n_head=size.heads,
            resid_pdrop=size.dropout,
            embd_pdrop=size.dropout,
            attn_pdrop=size.dropout,
            use_cache=False,
            bos_token_id=None,
            eos_token_id=None,
        )
        config._attn_implementation = "sdpa"
        self.trunk = GPT2Model(config)
        self._trained = size.blocks if size.trained_blocks is None else size.trained_blocks
        if size.trained_blocks is not None:
            for part in (self.trunk.wte, self.trunk.wpe, *self.trunk.h[: size.blocks - self._trained]):
                part.requires_grad_(False)

    def trained_blocks(self) -> list[nn.Module]:
        """From the lowest to the highest."""
        return list(self.trunk.h[len(self.trunk.h) - self._trained :])

    def hidden(self, ids: Tensor) -> Tensor:
        """int64 [B, L] -> [B, L, width]"""
        out: Tensor = self.trunk(input_ids=ids, use_cache=False).last_hidden_state
        return out


class Classifier(Decoder):
    """Mean of the outputs at real tokens, dropout, a linear head."""

    positive_weight: Tensor

    def __init__(self, size: Size, positive_weight: Tensor) -> None:
        super().__init__(size)
        self.dropout = nn.Dropout(HEAD_DROPOUT)
        self.head = nn.Linear(size.width, len(positive_weight))
        self.register_buffer("positive_weight", positive_weight)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """int64 [B, L], int64 [B] -> logits [B, labels]"""
        hidden = self.hidden(ids)
        real = (torch.arange(ids.shape[1], device=ids.device) < lengths[:, None])[..., None]
        mean = torch.where(real, hidden, hidden.new_zeros(())).sum(dim=1) / lengths[:, None]
        out: Tensor = self.head(self.dropout(mean))
        return out


class LanguageModel(Decoder):
    """The next token, by the embedding's own weights."""

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [B, L] -> logits [B, L, vocabulary]"""
        return functional.linear(self.hidden(ids), self.trunk.wte.weight)


def label_losses(logits: Tensor, labels: Tensor, positive_weight: Tensor) -> Tensor:
    """[B]: positive-weighted binary cross-entropy, the mean over the labels."""
    each = functional.binary_cross_entropy_with_logits(
        logits.float(), labels, pos_weight=positive_weight, reduction="none"
    )
    return each.mean(dim=1)


def token_losses(logits: Tensor, ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the negative log-likelihoods (nats) of every token but the first of each text, and their number."""
    place = torch.arange(1, ids.shape[1], device=ids.device)
    targets = torch.where(place < lengths[:, None], ids[:, 1:], -100)
    total = functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum"
    )
    return total, (lengths - 1).sum()


@torch.no_grad()
def continue_texts(
    model: LanguageModel, start: Tensor, count: int, seed: int, *, temperature: float = 0.8, best: int = 40
) -> Tensor:
    """int64 [B, L] -> int64 [B, L + count], drawn among the `best` most likely tokens; the seed alone decides."""
    context = int(model.trunk.config.n_positions)
    rows = torch.arange(len(start), device=start.device)
    draws = randomness.uniform(randomness.sample_seeds(seed, 0, rows), (count,), stream=SEED_STREAM)
    ids = start
    for step in range(count):
        logits = model(ids[:, -context:])[:, -1].float() / temperature
        top, token = logits.topk(min(best, logits.shape[-1]), dim=-1)
        reached = top.softmax(dim=-1).cumsum(dim=-1)
        chosen = (reached < draws[:, step : step + 1]).sum(dim=-1, keepdim=True).clamp(max=top.shape[-1] - 1)
        ids = torch.cat((ids, token.gather(1, chosen)), dim=1)
    return ids


def load_weights(model: Decoder, folder: Path) -> None:
    """Fill the trunk from `folder/model.safetensors`. Raises WorkloadError when it holds another model."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / "model.safetensors"
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise WorkloadError(f"{path} cannot be read: {error}; options.pretrained needs a GPT-2 folder") from None
    named = {name.removeprefix("transformer."): value for name, value in state.items()}
    wanted = model.trunk.state_dict()
    missing = [name for name in wanted if name not in named or named[name].shape != wanted[name].shape]
    if missing:
        raise WorkloadError(
            f"{path}: {len(missing)} of {len(wanted)} weights are missing or of another shape, first {missing[0]};"
            " options.pretrained needs the weights of a GPT-2 that fits its config.json"
        )
    model.trunk.load_state_dict({name: named[name] for name in wanted})


def groups_of(model: Decoder) -> tuple[Sequence[nn.Parameter], Sequence[nn.Parameter]]:
    """Trained parameters of the trunk, and of the head."""
    head = list(model.head.parameters()) if isinstance(model, Classifier) else []
    return [parameter for parameter in model.trunk.parameters() if parameter.requires_grad], head
