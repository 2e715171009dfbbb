"""A small classifier of latents, trained on the real ones: it judges whether a sample shows the class asked for.

It sees the training split alone; what it is worth is its accuracy on held-out latents, which is recorded beside it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from tuner import randomness

WIDTH, GROUPS, CELLS = 32, 8, 8
BATCH, LR, DECAY = 64, 2e-3, 0.5
EPOCHS, LEAST_STEPS, MOST_STEPS = 20, 60, 2000
NOISE = 0.2
"""Deviation of the noise put on training latents, which have 1: the classifier must not hang on what a codec adds."""
SMOOTHING, DROPOUT = 0.1, 0.3


class Classifier(nn.Module):
    """Two convolutions, the mean over the horizontal axis (time, in spectrograms), one linear layer."""

    def __init__(self, size: int, channels: int, classes: int) -> None:
        super().__init__()
        strides = [2 if size > CELLS * 2**level else 1 for level in range(2)]
        height = size // (strides[0] * strides[1])
        self.first = nn.Conv2d(channels, WIDTH, 3, padding=1, stride=strides[0])
        self.second = nn.Conv2d(WIDTH, 2 * WIDTH, 3, padding=1, stride=strides[1])
        self.norms = nn.ModuleList((nn.GroupNorm(GROUPS, WIDTH), nn.GroupNorm(GROUPS, 2 * WIDTH)))
        self.head = nn.Sequential(nn.Flatten(), nn.Dropout(DROPOUT), nn.Linear(2 * WIDTH * height, classes))

    def forward(self, latents: Tensor) -> Tensor:
        """[B, channels, size, size] -> logits [B, classes]"""
        x = F.silu(self.norms[0](self.first(latents)))
        x = F.silu(self.norms[1](self.second(x)))
        logits: Tensor = self.head(x.mean(3))
        return logits


def train_classifier(
    latents: Tensor, labels: Tensor, classes: int, device: torch.device, step_done: Callable[[int, int], None]
) -> Classifier:
    """Fit to standardised latents [N, C, s, s]; the same data give the same weights but for rounding.

    Every class is drawn equally often, whatever its number of pictures.
    """
    steps = min(MOST_STEPS, max(LEAST_STEPS, EPOCHS * len(latents) // BATCH))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Classifier(latents.shape[2], latents.shape[1], classes).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=DECAY)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        odds = 1.0 / labels.bincount(minlength=classes)[labels].double()
        for step in range(steps):
            chosen = torch.multinomial(odds, BATCH, replacement=True)
            shown = _disturbed(latents[chosen], step).to(device)
            loss = F.cross_entropy(model(shown), labels[chosen].to(device), label_smoothing=SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            step_done(step + 1, steps)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def answers(model: Classifier, latents: Tensor) -> Tensor:
    """The class seen in each latent: int64 [N], where the latents are."""
    device = next(model.parameters()).device
    return torch.cat([model(part.to(device)).argmax(1).to(latents.device) for part in latents.split(256)])


def _disturbed(latents: Tensor, step: int) -> Tensor:
    """With a little noise, and each shifted sideways by a step of its own (a window may begin anywhere)."""
    seeds = randomness.sample_seeds(step, 0, torch.arange(len(latents)))
    width = latents.shape[3]
    places = (torch.arange(width) + randomness.integers(seeds, width, stream=0)[:, None]) % width
    shifted = latents.gather(3, places[:, None, None, :].expand_as(latents))
    return shifted + NOISE * randomness.normal(seeds, latents.shape[1:], stream=1)
