"""What samples are worth: do they show the class asked for, and are they new or copies of training pictures.

A copy is told by its distance to the nearest training latent, divided by the mean distance to the fifty nearest: by a
plain distance every dull picture would be one (Carlini et al., Extracting Training Data from Diffusion Models,
arXiv:2301.13188, section 4.2). What counts as near is learnt from held-out pictures, which cannot be copies.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .classifier import Classifier, answers

NEIGHBOURS = 50
NEAR_QUANTILE = 0.01
"""One held-out picture in a hundred lies nearer, by chance; a sample that does counts as memorised."""
HELD_OUT_LIMIT = 1000
"""Held-out latents looked at, evenly chosen: more would only cost time."""


@dataclass(frozen=True)
class Nearest:
    """For each of B latents, its nearest training latents."""

    distance: Tensor
    """[B], root mean squared difference to the nearest; training latents have deviation 1."""
    ratio: Tensor
    """[B], `distance` over the mean distance to the fifty nearest: 0 = a copy, 1 = no nearer than to others."""
    rows: Tensor
    """int64 [B, 3] (fewer with less data), rows of the training split, nearest first."""


@dataclass(frozen=True)
class Judge:
    classifier: Classifier
    held_out_answers: Tensor
    """The class seen in each held-out latent: int64 [N]."""
    distance: float
    """Median distance of held-out latents to their nearest training latent."""
    threshold: float
    """A ratio at or below it counts as memorised."""


def nearest_training(latents: Tensor, train: Tensor) -> Nearest:
    """[B, C, s, s] against [N, C, s, s], on the CPU."""
    flat, known = latents.cpu().flatten(1), train.flatten(1)
    count = min(NEIGHBOURS, len(known))
    kept = [torch.cdist(part, known).topk(count, largest=False) for part in flat.split(128)]
    near = torch.cat([part.values for part in kept]) / flat.shape[1] ** 0.5
    rows = torch.cat([part.indices for part in kept])
    return Nearest(near[:, 0], near[:, 0] / near.mean(1).clamp(min=1e-9), rows[:, :3])


def measure_held_out(classifier: Classifier, train: Tensor, valid: Tensor) -> Judge:
    """What `classifier` and the nearest neighbours make of held-out latents."""
    chosen = valid[torch.linspace(0, len(valid) - 1, min(HELD_OUT_LIMIT, len(valid))).round().long()]
    near = nearest_training(chosen, train)
    return Judge(
        classifier=classifier,
        held_out_answers=answers(classifier, valid),
        distance=float(near.distance.median()),
        threshold=float(near.ratio.quantile(NEAR_QUANTILE)),
    )
