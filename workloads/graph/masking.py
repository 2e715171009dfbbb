"""Which channels are hidden: on training drawn for each sample by need, on validation fixed by the window's place.

The need of a channel is how badly the others foretell it, measured on training data alone. It decides only what is
hidden while training: held-out windows are hidden evenly, whatever training found hard.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tuner import randomness

HIDDEN_SHARE = 0.3
VALIDATION_SEED = 1 << 21
DRAW = 0
"""Stream of random numbers."""
RIDGE = 1e-3
FLOOR = 0.1
"""Least need, so that easy channels stay in training."""
PART = 1 << 18
"""Rows taken at a time."""


def hidden_count(channels: int) -> int:
    """How many channels of a window are hidden; at least one, and at least one is shown."""
    return min(channels - 1, max(1, round(HIDDEN_SHARE * channels)))


def draw_hidden(seeds: Tensor, need: Tensor) -> Tensor:
    """Hidden channels of each sample without replacement, the needier the likelier: bool [B, C].

    `seeds` int64 [B], `need` float [C] > 0. The least of exponential draws with rates `need` (Efraimidis and Spirakis,
    Weighted random sampling with a reservoir, 2006).
    """
    draws = -torch.log1p(-randomness.uniform(seeds, need.shape, stream=DRAW)) / need
    least = draws.topk(hidden_count(len(need)), dim=1, largest=False).indices
    return torch.zeros_like(draws, dtype=torch.bool).scatter(1, least, True)


def fixed_hidden(indices: Tensor, channels: int) -> Tensor:
    """Hidden channels of held-out windows: bool [B, C], a function of the window's index alone."""
    seeds = randomness.sample_seeds(VALIDATION_SEED, 0, indices)
    return draw_hidden(seeds, torch.ones(channels, device=indices.device))


def measure_need(rows: Tensor) -> tuple[Tensor, Tensor]:
    """How badly each channel follows from the others at the same time, on standardised training rows [N, C].

    Returns need [C], the unexplained share of variance of a ridge regression, not below 0.1; and its weights [C, C]
    (row: the channel foretold; 0 on the diagonal).
    """
    channels = rows.shape[1]
    moments = torch.zeros(channels, channels, dtype=torch.float64)
    for part in rows.split(PART):
        moments += (part.T.double() @ part.double()) / len(rows)
    weights, need = torch.zeros_like(moments), torch.ones(channels, dtype=torch.float64)
    for channel in range(channels):
        others = [other for other in range(channels) if other != channel]
        inner = moments[others][:, others] + RIDGE * torch.eye(channels - 1, dtype=torch.float64)
        solved = torch.linalg.solve(inner, moments[others, channel])
        weights[channel, others] = solved
        explained = solved @ moments[others, channel]
        need[channel] = 1 - explained / moments[channel, channel].clamp_min(1e-12)
    return need.clamp(FLOOR, 1.0).float(), weights.float()
