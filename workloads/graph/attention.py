"""Attention of every time step over its neighbours in time: the graph, and two ways to compute the same thing.

Nodes are the time steps of a window and edges join |i - j| <= time_k, each node with itself included. So the graph is a
band around the diagonal and depends on (window_size, time_k) alone; `BandAttention` uses that, and `EdgeAttention` goes
edge by edge as a general graph library would. It is the reference: slower, equal in its results.

Both take `values` [B, T, heads, width] and the two halves of the attention score, `source` and `target`
[B, T, heads], and return [B, T, heads, width]: Velickovic et al., Graph Attention Networks (ICLR 2018), equations
3 and 4, with the softmax over the neighbours of each target node.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

SLOPE = 0.2
"""Of the leaky ReLU on scores, as in the paper."""


def band_mask(window_size: int, time_k: int) -> Tensor:
    """bool [T, 2 * time_k + 1]: whether neighbour `i - time_k + offset` of node i lies inside the window."""
    neighbour = torch.arange(window_size)[:, None] + torch.arange(-time_k, time_k + 1)[None]
    return (neighbour >= 0) & (neighbour < window_size)


def edge_index(window_size: int, time_k: int) -> Tensor:
    """int64 [2, edges]: source and target of every edge, sorted by target."""
    target, offset = band_mask(window_size, time_k).nonzero(as_tuple=True)
    return torch.stack((target + offset - time_k, target))


class BandAttention(nn.Module):
    """All windows and all nodes at once, one shifted product for each of the 2 * time_k + 1 diagonals of the band."""

    band: Tensor

    def __init__(self, band: Tensor) -> None:
        super().__init__()
        self.time_k = band.shape[1] // 2
        self.register_buffer("band", band[None, :, None], persistent=False)

    def forward(self, values: Tensor, source: Tensor, target: Tensor) -> Tensor:
        steps, k = values.shape[1], self.time_k
        sources = functional.pad(source, (0, 0, k, k)).unfold(1, 2 * k + 1, 1)  # [B, T, heads, 2k + 1], a view
        scores = functional.leaky_relu(sources + target[..., None], SLOPE)
        shares = scores.masked_fill(~self.band, -torch.inf).softmax(-1).to(values.dtype)
        padded = functional.pad(values, (0, 0, 0, 0, k, k))
        mixed = shares[..., :1] * padded[:, :steps]
        for offset in range(1, 2 * k + 1):
            mixed = torch.addcmul(mixed, shares[..., offset : offset + 1], padded[:, offset : offset + steps])
        return mixed


class EdgeAttention(nn.Module):
    """One row for every edge of every window, gathered and scattered."""

    edges: Tensor

    def __init__(self, edges: Tensor) -> None:
        super().__init__()
        self.register_buffer("edges", edges, persistent=False)

    def forward(self, values: Tensor, source: Tensor, target: Tensor) -> Tensor:
        begin, end = self.edges
        scores = functional.leaky_relu(source[:, begin] + target[:, end], SLOPE)
        place = end[None, :, None].expand_as(scores)
        highest = torch.full_like(target, -torch.inf).scatter_reduce(1, place, scores.detach(), "amax")
        weights = (scores - highest[:, end]).exp()
        shares = weights / torch.zeros_like(target).scatter_add(1, place, weights)[:, end]
        messages = shares.to(values.dtype)[..., None] * values[:, begin]
        return torch.zeros_like(values).index_add(1, end, messages)
