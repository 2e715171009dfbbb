"""Exponential moving average of the weights, its memory counted in samples."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from tuner.contract.config import EmaConfig


def ema_decay(config: EmaConfig, samples_seen: int, step_samples: int) -> float:
    """Weight of the old average in a step that brought `samples_seen` samples in all.

    The half-life is at most `warmup_ratio` of the samples seen, as in Karras et al., Analyzing and Improving the
    Training Dynamics of Diffusion Models (CVPR 2024), section 3; a ratio of 0 means no such warm-up.
    """
    half_life = float(config.half_life_samples)
    if config.warmup_ratio > 0:
        half_life = min(half_life, config.warmup_ratio * samples_seen)
    return float(0.5 ** (step_samples / max(half_life, 1e-8)))


class Ema:
    """A copy of the model whose trained weights follow slowly. Frozen parameters are shared, buffers copied."""

    def __init__(self, model: nn.Module, config: EmaConfig) -> None:
        self.config = config
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        pairs = list(zip(self.model.parameters(), model.parameters(), strict=True))
        for mine, theirs in pairs:
            if not theirs.requires_grad:
                mine.data = theirs.data
        self._mine: list[Tensor] = [mine for mine, theirs in pairs if theirs.requires_grad]
        self._theirs: list[Tensor] = [theirs for _, theirs in pairs if theirs.requires_grad]
        self._buffers = list(zip(self.model.buffers(), model.buffers(), strict=True))

    @torch.no_grad()
    def update(self, samples_seen: int, step_samples: int) -> None:
        decay = ema_decay(self.config, samples_seen, step_samples)
        torch._foreach_lerp_(self._mine, self._theirs, 1.0 - decay)
        for mine, theirs in self._buffers:
            mine.copy_(theirs)
