"""The network: graph attention encoder, transformer over time, class head, graph attention decoder. Knows no data.

Layer normalisation throughout: a window never depends on which others share its batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

DROPOUT = 0.1
WIDENING = 2
"""Hidden width of a transformer layer's feed-forward part, as a multiple of its own."""


@dataclass(frozen=True)
class Sizes:
    """The guide's knobs of model size."""

    hidden_channels: int
    encoder_layers: int
    decoder_layers: int
    transformer_layers: int
    attention_heads: int


class GatLayer(nn.Module):
    """`skip(x) + elu(graph attention over norm(x))`; the output layer leaves the ELU out and has one head."""

    def __init__(self, inputs: int, outputs: int, heads: int, attention: nn.Module, *, last: bool = False) -> None:
        super().__init__()
        self.heads, self.last = (1 if last else heads), last
        self.norm = nn.LayerNorm(inputs) if inputs == outputs else nn.Identity()
        self.skip = nn.Identity() if inputs == outputs else nn.Linear(inputs, outputs)
        self.values = nn.Linear(inputs, outputs, bias=False)
        self.source = nn.Parameter(torch.empty(self.heads, outputs // self.heads))
        self.target = nn.Parameter(torch.empty(self.heads, outputs // self.heads))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.dropout = nn.Dropout(DROPOUT)
        self.attention = attention
        for parameter in (self.values.weight, self.source, self.target):
            nn.init.xavier_uniform_(parameter)
        if last:
            self._begin_small()

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, inputs] -> [B, T, outputs]"""
        values = self.values(self.norm(x)).unflatten(-1, (self.heads, -1))
        source, target = (values * self.source).sum(-1), (values * self.target).sum(-1)
        mixed = self.attention(values, source, target).flatten(-2) + self.bias
        if self.last:
            return self.skip(x) + mixed  # type: ignore[no-any-return]
        return self.skip(x) + self.dropout(functional.elu(mixed))  # type: ignore[no-any-return]

    @torch.no_grad()
    def _begin_small(self) -> None:
        """So that the first reconstructions are near 0, the mean of every channel, and not worse than it."""
        self.values.weight.mul_(0.1)
        for parameter in self.skip.parameters():
            nn.init.zeros_(parameter)


class TransformerLayer(nn.Module):
    """Self-attention over all time steps and a feed-forward part, each behind its norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.queries = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.feed = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, WIDENING * width), nn.GELU(), nn.Linear(WIDENING * width, width)
        )
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, width] -> [B, T, width]"""
        parts = self.queries(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(parts[0], parts[1], parts[2])
        x = x + self.dropout(self.out(mixed.transpose(1, 2).flatten(-2)))
        return x + self.dropout(self.feed(x))  # type: ignore[no-any-return]


class GraphNet(nn.Module):
    """Windows with hidden channels -> class logits, and all channels reconstructed.

    `attention` is shared by all graph layers; it holds the graph and no weights (see `attention`).
    """

    times: Tensor

    def __init__(self, sizes: Sizes, channels: int, classes: int, window_size: int, attention: nn.Module) -> None:
        super().__init__()
        width, heads = sizes.hidden_channels, sizes.attention_heads
        into = [2 * channels] + [width] * (sizes.encoder_layers - 1)
        self.encoder = nn.ModuleList(GatLayer(inputs, width, heads, attention) for inputs in into)
        self.transformer = nn.ModuleList(TransformerLayer(width, heads) for _ in range(sizes.transformer_layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Sequential(nn.Dropout(DROPOUT), nn.Linear(width, classes))
        self.decoder = nn.ModuleList(GatLayer(width, width, heads, attention) for _ in range(sizes.decoder_layers - 1))
        self.decoder.append(GatLayer(width, channels, heads, attention, last=True))
        self.register_buffer("times", positions(window_size, width), persistent=False)

    def forward(self, x: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """`x` [B, T, C] standardised, `hidden` bool [B, C] -> logits [B, classes], reconstruction [B, T, C].

        Hidden channels are set to 0, their mean, before anything sees them.
        """
        shown = x.masked_fill(hidden[:, None], 0.0)
        h = torch.cat((shown, hidden[:, None].to(x.dtype).expand_as(x)), dim=-1)
        for layer in self.encoder:
            h = layer(h)
        h = h + self.times
        for layer in self.transformer:
            h = layer(h)
        h = self.norm(h)
        logits = self.head(h.mean(1))
        for layer in self.decoder:
            h = layer(h)
        return logits, h

    def blocks(self) -> list[nn.Module]:
        """What gradient checkpointing recomputes."""
        return [*self.encoder, *self.transformer, *self.decoder]


def positions(window_size: int, width: int) -> Tensor:
    """Sines and cosines of the time step, [T, width]: Vaswani et al., Attention Is All You Need (2017), section 3.5."""
    rates = torch.exp(torch.arange(0, width, 2) * (-math.log(10_000.0) / width))
    angles = torch.arange(window_size)[:, None] * rates[None]
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)[:, :width]
